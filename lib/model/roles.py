"""Role of each parameter: what quantization bits, optimizer groups and reports are keyed by."""

from lib.errors import UserError

MATRIX_ROLES = ("attention", "mlp", "embedding", "bigram", "value_embedding", "head")
VECTOR_ROLE = "vector"


def role_of(name: str, num_dims: int) -> str:
    """Role of a parameter.

    Args:
        name: dotted name of the parameter in the model.
        num_dims: number of dimensions of its tensor.

    Returns:
        One of `MATRIX_ROLES` for weights of linear layers and embedding tables, `VECTOR_ROLE` for gains, scales and mixes.

    Raises:
        ValueError: a matrix whose name is not known; every matrix has a role, so that none stays unquantized by oversight.
    """
    if num_dims < 2 or name.endswith(("residual_mix", "skip_weights")):
        return VECTOR_ROLE
    if ".attention." in name:
        return "attention"
    if ".mlp." in name:
        return "mlp"
    module = name.split(".", maxsplit=1)[0]
    if module in ("bigram", "value_embedding", "head"):
        return module
    if module == "token_embedding":
        return "embedding"
    raise UserError(f"{name}: no role; give it one in lib/model/roles.py")

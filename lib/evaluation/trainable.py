"""Named groups of parameters that test-time training may change. Adding one: a line in `GROUPS` and a count in its test."""

import re
from collections.abc import Iterable, Mapping

from lib.errors import UserError

GROUPS = {  # name -> pattern of whole parameter names
    "scales": r".*scale.*",  # pr585: whatever is called a scale: of blocks, bigram and value embedding
    "block_scales": r"blocks\.\d+\.(attention|mlp)_scale",  # pr410
    "residual_mix": r"blocks\.\d+\.residual_mix",
    "q_gain": r"blocks\.\d+\.attention\.q_gain",
    "skip_weights": r"skip_weights",
    "smear_gate": r"smear_gate\..*",
    "embedding": r"token_embedding\.weight",  # with a tied head this is the head as well
    "head": r"head\.weight",
    "bigram": r"bigram\..*",
    "value_embedding": r"value_embedding\..*",
    "all": r".*",
}
LAST_BLOCKS = re.compile(r"last_([1-9]\d*)_blocks")
GROUP_NAMES = (*GROUPS, "last_N_blocks")


def is_group(name: str) -> bool:
    """Whether `name` is a group: one of `GROUPS`, or ``last_N_blocks`` with a positive number N."""
    return name in GROUPS or LAST_BLOCKS.fullmatch(name) is not None


def match_groups(groups: Iterable[str], sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """The parameters of each group.

    Args:
        groups: names of groups; their members may overlap.
        sizes: parameter name -> number of elements, of the whole model.

    Returns:
        Group -> names of its parameters, in the model's order.

    Raises:
        ValueError: a group that does not exist, or one that matches no parameter of this model.
    """
    num_blocks = 1 + max((int(name.split(".")[1]) for name in sizes if name.startswith("blocks.")), default=-1)
    members = {}
    for group in groups:
        if not is_group(group):
            raise UserError(f"trainable group {group}: expected one of {', '.join(GROUP_NAMES)}")
        if last := LAST_BLOCKS.fullmatch(group):
            blocks = tuple(f"blocks.{block}." for block in range(num_blocks - int(last[1]), num_blocks))
            members[group] = [name for name in sizes if name.startswith(blocks)] if int(last[1]) <= num_blocks else []
        else:
            members[group] = [name for name in sizes if re.fullmatch(GROUPS[group], name)]
        if not members[group]:
            available = [name for name in GROUPS if any(re.fullmatch(GROUPS[name], parameter) for parameter in sizes)]
            raise UserError(f"trainable group {group}: matches no parameter of this model, which has {num_blocks} blocks and "
                            f"the groups {', '.join(available)}")
    return members


def describe_groups(members: Mapping[str, list[str]], sizes: Mapping[str, int]) -> str:
    """One line with the exact numbers of tensors and parameters, of each group and of their union."""
    union = {name for names in members.values() for name in names}
    parts = ", ".join(f"{group} {sum(sizes[name] for name in names):,}" for group, names in members.items())
    return f"{len(union)} tensors, {sum(sizes[name] for name in union):,} parameters ({parts})"

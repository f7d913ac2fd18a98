"""What is saved in a published file: names and tensors, in one of three layouts.

- A state dict: name -> float tensor, alone or in a dictionary beside other things (`WRAPPERS`).
- {"w": tensors, "m": kind of each parameter} (#585, #410 and their relatives). A parameter NAME with integer codes has the tensors NAME.q
  and NAME.scale, any other the tensor NAME.
- ``int8_clean_per_row_v1`` (the challenge's starting script): {"quantized": codes, "scales": one for each row or for all, "passthrough":
  other tensors, ...}, each of them by parameter name.

Shapes: R rows, C columns.
"""

import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lib.errors import UserError

SUPPORTED = ("a state dict of floats, {'w': tensors, 'm': kinds} or the format int8_clean_per_row_v1, saved by torch.save, as it is or "
             "in zstandard or zlib")
WRAPPERS = ("model", "state_dict", "model_state_dict")  # keys of dictionaries that hold a state dict beside other things
PREFIXES = ("module", "_orig_mod")  # parts of names that DistributedDataParallel and torch.compile add
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
PASSTHROUGH = ("passthrough", "passthrough_ctrl", "passthrough_fp16")
INTEGERS = [f"int{bits}" for bits in range(2, 9)]
CODES, SCALES = ".q", ".scale"
FORMAT, INT8_FORMAT = "__quant_format__", "int8_clean_per_row_v1"
INT8_PARTS = ("quantized", "scales", "passthrough")
INT8_NOTES = ("dtypes", "qmeta", "passthrough_orig_dtypes")  # tell what weights were before, and nothing that shapes do not

T = TypeVar("T")


class ScaledCodes(NamedTuple):
    """A matrix whose weights are code * scale of the row: `codes` (R, C) int8, `scales` (R,) fp16 or fp32."""

    codes: Tensor
    scales: Tensor


class Parameters(NamedTuple):
    """Parameters by published name.

    Attributes:
        is_quantized: whether they come from a quantized layout.
        floats: those in fp16, bf16 or fp32.
        codes: those with integer codes.
        left_out: what was beside the parameters.
    """

    is_quantized: bool
    floats: dict[str, Tensor]
    codes: dict[str, ScaledCodes]
    left_out: tuple[str, ...]


def read_payload(payload: Any) -> Parameters:
    """The parameters in what a file holds.

    Raises:
        ValueError: none of the layouts; all tensors that are not as expected are listed.
    """
    payload, left_out = _unwrap(payload)
    if isinstance(payload, Mapping) and payload.keys() == {"w", "m"}:
        is_quantized, (floats, codes) = True, _split(payload["w"], payload["m"])
    elif isinstance(payload, Mapping) and FORMAT in payload:
        is_quantized, (floats, codes) = True, _split(*_from_int8(payload))
    else:
        is_quantized, floats, codes = False, _check_floats(payload), {}
    return Parameters(is_quantized, _without_prefixes(floats), _without_prefixes(codes), left_out)


def _unwrap(payload: Any) -> tuple[Any, tuple[str, ...]]:
    """What is inside one of `WRAPPERS`, and the other keys; or the payload itself."""
    if not isinstance(payload, Mapping):
        return payload, ()
    found = [key for key in WRAPPERS if isinstance(payload.get(key), Mapping)]
    if not found:
        return payload, ()
    _check_names(payload)
    if len(found) > 1:
        raise UserError(f"expected one model, found {' and '.join(found)}; save one of them alone")
    return payload[found[0]], tuple(sorted(payload.keys() - found))


def _without_prefixes(parameters: dict[str, T]) -> dict[str, T]:
    renamed = {".".join(part for part in name.split(".") if part not in PREFIXES): value for name, value in parameters.items()}
    if len(renamed) < len(parameters):
        raise UserError(f"expected each parameter once, found some with and without {' or '.join(PREFIXES)} in their names")
    return renamed


def _check_floats(tensors: Any) -> dict[str, Tensor]:
    """Names and float tensors, or ValueError that lists what is neither."""
    if not isinstance(tensors, Mapping):
        raise UserError(f"expected {SUPPORTED}, found {type(tensors).__name__}")
    _check_names(tensors)
    if problems := [f"{name}: {problem}" for name, tensor in tensors.items() if (problem := _find_problem(tensor, FLOATS))]:
        raise UserError("\n".join([f"expected {SUPPORTED}, found", *problems]))
    return dict(tensors)


def _from_int8(payload: Mapping[Any, Any]) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Tensors and kinds, as in the layout of #585, of the starting script's."""
    if payload[FORMAT] != INT8_FORMAT:
        raise UserError(f"expected {SUPPORTED}, found the format {reprlib.repr(payload[FORMAT])}")
    _check_names(payload)
    parts = {key: payload[key] for key in INT8_PARTS if isinstance(payload.get(key), Mapping)}
    if len(parts) < len(INT8_PARTS) or not payload.keys() <= {FORMAT, *INT8_PARTS, *INT8_NOTES}:
        raise UserError(f"{INT8_FORMAT}: expected the dictionaries {', '.join(INT8_PARTS)}, found {reprlib.repr(sorted(payload))}")
    codes, scales, others = parts["quantized"], parts["scales"], parts["passthrough"]
    _check_names([*codes, *scales, *others])
    tensors = {f"{name}{CODES}": tensor for name, tensor in codes.items()} | {f"{name}{SCALES}": scale for name, scale in scales.items()}
    return tensors | dict(others), {name: {"type": "int8"} for name in codes} | dict.fromkeys(others, PASSTHROUGH[0])


def _split(tensors: Any, kinds: Any) -> tuple[dict[str, Tensor], dict[str, ScaledCodes]]:
    """Floats and codes of an artifact, or ValueError that lists what is not as expected."""
    if not isinstance(tensors, Mapping) or not isinstance(kinds, Mapping):
        raise UserError(f"expected {SUPPORTED}, found {type(tensors).__name__} and {type(kinds).__name__}")
    _check_names([*tensors, *kinds])
    floats: dict[str, Tensor] = {}
    codes: dict[str, ScaledCodes] = {}
    problems: list[str] = []
    used: set[str] = set()
    for name, kind in kinds.items():
        if isinstance(kind, str) and kind in PASSTHROUGH:
            parts: dict[str, tuple[torch.dtype, ...]] = {name: FLOATS}
        elif isinstance(kind, dict) and kind.keys() <= {"type", "clip_range"} and kind.get("type") in INTEGERS:
            parts = {f"{name}{CODES}": (torch.int8,), f"{name}{SCALES}": FLOATS}
        else:
            problems.append(f"{name}: expected one of {', '.join(PASSTHROUGH)} or a type int2 to int8, found {reprlib.repr(kind)}")
            continue
        used |= parts.keys()
        found = [f"{part}: {problem}" for part, dtypes in parts.items() if (problem := _find_problem(tensors.get(part), dtypes))]
        problems += found
        if found:
            continue
        first, *scales = (tensors[part] for part in parts)
        if not scales:
            floats[name] = first
        elif first.ndim != 2 or scales[0].shape not in (first.shape[:1], ()):
            problems.append(f"{name}: expected a matrix of codes and one scale for each row or for all, found shapes "
                            f"{tuple(first.shape)} and {tuple(scales[0].shape)}")
        else:
            scale = scales[0] if scales[0].dtype == torch.float16 else scales[0].float()
            codes[name] = ScaledCodes(first, scale.expand(len(first)))
    problems += [f"{name}: a tensor that belongs to no parameter" for name in tensors if name not in used]
    if problems:
        raise UserError("\n".join(["not in the layout of #585 and #410, or of the starting script:", *problems]))
    return floats, codes


def _check_names(names: Iterable[Any]) -> None:
    """That all are text, which does not command the terminal that prints it."""
    if others := [name for name in names if not isinstance(name, str) or not name.isprintable()]:
        raise UserError(f"expected names of parameters, found {reprlib.repr(others[0])}")


def _find_problem(tensor: Any, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why a value is no ordinary tensor of one of these types; None if it is one."""
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"expected a tensor of {names}, found {'nothing' if tensor is None else type(tensor).__name__}"
    if tensor.dtype not in dtypes:
        return f"expected {names}, found {tensor.dtype}"
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.nbytes > tensor.untyped_storage().nbytes():
        return "expected values for all elements, found a sparse, an empty or an expanded tensor"  # of any size, from a small file
    return None if bool(tensor.isfinite().all()) else "expected finite values, found NaN or infinity"

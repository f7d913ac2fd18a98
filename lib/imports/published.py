"""Files as the scripts of parameter golf save them, read without running anything that is in them.

Two layouts (#585, #410 and their relatives), told apart by what is inside, not by name:

- a float checkpoint, ``final_model.pt``: `torch.save` of a state dict;
- an artifact, ``final_model.int5.ptz`` or ``.int6.ptz``: a zstandard frame of `torch.save` of {"w": tensors, "m": kind of each
  parameter}. A parameter NAME with integer codes has the tensors NAME.q and NAME.scale, any other the tensor NAME.

Shapes: R rows, C columns.
"""

import hashlib
import io
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lib.artifacts.files import ArtifactError
from lib.compression.coding import decompress_bytes
from lib.compression.container import MAGIC

ZIP, PICKLE, ZSTANDARD = b"PK\x03\x04", b"\x80", b"\x28\xb5\x2f\xfd"  # torch.save of today and of before 1.6; a zstandard frame
SUPPORTED = "a float state dict saved by torch.save, or a zstandard frame of torch.save of {'w': tensors, 'm': kinds}"
UNSUPPORTED = {  # how files begin that may be taken for these
    MAGIC: "a .ptz file of this project, which evaluate reads as artifacts/compress/seed<seed>/model.ptz",
    b"x\x01": "zlib", b"x^": "zlib", b"x\x9c": "zlib", b"x\xda": "zlib", b"\x1f\x8b": "gzip",
    b"\xfd7zXZ": "xz (LZMA)", b"\x5d\x00\x00": "LZMA", b"LZMA": "LZMA",
}
MAX_BYTES = 2**30  # of what a frame decompresses to, far beyond any real model
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
PASSTHROUGH = ("passthrough", "passthrough_ctrl", "passthrough_fp16")
CODES, SCALES = ".q", ".scale"
NOT_IN_THE_MODEL = "mtp_heads."  # heads for tokens further ahead, which only training uses
LAYER_SCALES = "ve_layer_scales"


class Codes(NamedTuple):
    """A matrix whose weights are code * scale of the row: `codes` (R, C) int8, `scales` (R,) fp16 or fp32."""

    codes: Tensor
    scales: Tensor


@dataclass(frozen=True, eq=False)
class Published:
    """What is in a published file.

    Attributes:
        name: of the file, without its folder.
        num_bytes: of the file.
        sha256: of the file, 64 hexadecimal digits.
        is_quantized: whether it is an artifact, not a float checkpoint.
        floats: published parameter name -> fp16, bf16 or fp32 tensor. The factors of the value embedding's layers, published one by
            one, are one tensor, `LAYER_SCALES`.
        codes: published parameter name -> codes and scales.
        skipped: names of tensors that are not part of the model.
    """

    name: str
    num_bytes: int
    sha256: str
    is_quantized: bool
    floats: dict[str, Tensor]
    codes: dict[str, Codes]
    skipped: tuple[str, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all parameters, by published name."""
        tensors = self.floats | {name: matrix.codes for name, matrix in self.codes.items()}
        return {name: tuple(tensor.shape) for name, tensor in sorted(tensors.items())}

    @property
    def num_parameters(self) -> int:
        """Number of weights of the model."""
        return sum(tensor.numel() for tensor in (*self.floats.values(), *(matrix.codes for matrix in self.codes.values())))


def is_published(path: Path) -> bool:
    """Whether a path is a file that begins as those do that `read_published` reads, or as foreign ones that it knows and refuses."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(8)
    return start.startswith((ZIP, PICKLE, ZSTANDARD, *UNSUPPORTED)) and not start.startswith(MAGIC)


def read_published(path: Path) -> Published:
    """Read a float checkpoint or an artifact.

    Raises:
        ArtifactError: missing, damaged, of another layout, or with anything in it but tensors and plain values; all tensors that are
            not as expected are listed.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        payload = _load(_decompress(content))
        if isinstance(payload, Mapping) and payload.keys() == {"w", "m"}:
            is_quantized, (floats, codes) = True, _split(payload["w"], payload["m"])
        else:
            is_quantized, floats, codes = False, _check_floats(payload), {}
    except ValueError as error:
        raise ArtifactError(f"{path}: {error}") from None
    skipped = sorted(name for name in (*floats, *codes) if name.startswith(NOT_IN_THE_MODEL))
    floats = _join_layer_scales({name: tensor for name, tensor in floats.items() if name not in skipped})
    codes = {name: matrix for name, matrix in codes.items() if name not in skipped}
    return Published(path.name, len(content), hashlib.sha256(content).hexdigest(), is_quantized, floats, codes, tuple(skipped))


def _decompress(content: bytes) -> bytes:
    """The `torch.save` archive of a file; raises ValueError."""
    if content.startswith(ZSTANDARD):
        content = decompress_bytes(content, MAX_BYTES)
    if content.startswith((ZIP, PICKLE)):
        return content
    kind = next((kind for mark, kind in UNSUPPORTED.items() if content.startswith(mark)),
                f"a file that begins with {content[:4]!r} (brotli has no mark of its own)")
    raise ValueError(f"expected {SUPPORTED}, found {kind}")


def _load(archive: bytes) -> Any:
    """The content of a `torch.save` archive: tensors and plain values, or ValueError."""
    try:
        return torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if needed := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(f"expected {SUPPORTED}, found the Python object {needed[1]}, which could run anything when it is loaded, so "
                             "that it was not; have its owner save model.state_dict() alone") from None
        raise ValueError(f"expected {SUPPORTED}, found a damaged file, or one with more than tensors and plain values in it; copy it "
                         "anew") from None
    except Exception as error:  # the reader meets damage with exceptions of any kind
        raise ValueError(f"damaged, or not saved by torch.save ({type(error).__name__}); copy it anew") from None


def _check_floats(tensors: Any) -> dict[str, Tensor]:
    """Names and float tensors, or ValueError that lists what is neither."""
    if not isinstance(tensors, Mapping):
        raise ValueError(f"expected {SUPPORTED}, found {type(tensors).__name__}")
    _check_names(tensors)
    if problems := [f"{name}: {problem}" for name, tensor in tensors.items() if (problem := _find_problem(tensor, FLOATS))]:
        raise ValueError("\n".join([f"expected {SUPPORTED}, found", *problems]))
    return dict(tensors)


def _split(tensors: Any, kinds: Any) -> tuple[dict[str, Tensor], dict[str, Codes]]:
    """Floats and codes of an artifact, or ValueError that lists what is not as expected."""
    if not isinstance(tensors, Mapping) or not isinstance(kinds, Mapping):
        raise ValueError(f"expected {SUPPORTED}, found {type(tensors).__name__} and {type(kinds).__name__}")
    _check_names([*tensors, *kinds])
    floats: dict[str, Tensor] = {}
    codes: dict[str, Codes] = {}
    problems: list[str] = []
    used: set[str] = set()
    for name, kind in kinds.items():
        if isinstance(kind, str) and kind in PASSTHROUGH:
            parts: dict[str, tuple[torch.dtype, ...]] = {name: FLOATS}
        elif isinstance(kind, dict) and kind.keys() <= {"type", "clip_range"} and re.fullmatch("int[2-8]", str(kind.get("type"))):
            parts = {f"{name}{CODES}": (torch.int8,), f"{name}{SCALES}": FLOATS}
        else:
            problems.append(f"{name}: expected one of {', '.join(PASSTHROUGH)} or a type int2 to int8, found {str(kind)[:80]!r}")
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
            codes[name] = Codes(first, scale.expand(len(first)))
    problems += [f"{name}: a tensor that belongs to no parameter" for name in tensors if name not in used]
    if problems:
        raise ValueError("\n".join(["not in the layout of #585 and #410:", *problems]))
    return floats, codes


def _check_names(names: Iterable[Any]) -> None:
    """That all are text, which does not command the terminal that prints it."""
    if others := [name for name in names if not isinstance(name, str) or not name.isprintable()]:
        raise ValueError(f"expected names of parameters, found {str(others[0])[:80]!r}")


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


def _join_layer_scales(floats: dict[str, Tensor]) -> dict[str, Tensor]:
    """`floats` with one tensor `LAYER_SCALES` (n,) in place of n tensors of shape (1,), where they are as published."""
    names = [name for name in floats if name.startswith(f"{LAYER_SCALES}.")]
    ordered = [f"{LAYER_SCALES}.{number}" for number in range(len(names))]
    if not names or set(names) != set(ordered) or any(floats[name].shape != (1,) for name in names):
        return floats
    rest = {name: tensor for name, tensor in floats.items() if name not in ordered}
    return rest | {LAYER_SCALES: torch.cat([floats[name] for name in ordered])}

"""Files as the scripts of parameter golf save them, read without running anything that is in them.

A file is an archive of `torch.save`, as it is (``final_model.pt``) or as one zstandard frame or zlib stream (``final_model.int5.ptz``,
``.int6.ptz``, ``.int8.ptz``; #585 takes zlib where zstandard is not installed). What it is, is told by what is inside, not by its name.
"""

import hashlib
import io
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib.artifacts.files import ArtifactError
from lib.compression.coding import decompress_bytes
from lib.compression.container import MAGIC
from lib.errors import UserError
from lib.published.foreign import PICKLE, ZIP, describe_mark, describe_zip, find_foreign_object, is_whole_pickle
from lib.published.payload import SUPPORTED, ScaledCodes, read_payload

ZSTANDARD, ZLIB = b"\x28\xb5\x2f\xfd", (b"x\x01", b"x^", b"x\x9c", b"x\xda")  # how they begin; zlib by its level
MAX_BYTES = 2**30  # of what a file decompresses to, far beyond any real model
MAX_BYTES_PER_BYTE = 32  # of the file; files that decompress to less than the next constant may have more
MIN_MAX_BYTES = 2**22
MAX_SHARED = 4  # bytes of all tensors in a byte of the archive: some of them, such as tied ones, share theirs
NOT_IN_THE_MODEL = "mtp_heads."  # heads for tokens further ahead, which only training uses
LAYER_SCALES = "ve_layer_scales"


@dataclass(frozen=True, eq=False)
class Published:
    """What is in a published file.

    Attributes:
        name: name of the file, without its folder.
        num_bytes: size of the file.
        sha256: SHA-256 of the file, 64 hexadecimal digits.
        is_quantized: whether it is an artifact, not a float checkpoint.
        floats: published parameter name -> fp16, bf16 or fp32 tensor. The factors of the value embedding's layers, published one by
            one, are one tensor, `LAYER_SCALES`.
        codes: published parameter name -> codes and scales.
        skipped: names of what is not part of the model.
    """

    name: str
    num_bytes: int
    sha256: str
    is_quantized: bool
    floats: dict[str, Tensor]
    codes: dict[str, ScaledCodes]
    skipped: tuple[str, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all parameters, by published name."""
        tensors = self.floats | {name: matrix.codes for name, matrix in self.codes.items()}
        return {name: tuple(tensor.shape) for name, tensor in sorted(tensors.items())}

    @property
    def num_parameters(self) -> int:
        """Number of weights in the file."""
        return sum(tensor.numel() for tensor in (*self.floats.values(), *(matrix.codes for matrix in self.codes.values())))


def is_published(path: Path) -> bool:
    """Whether a path is a file that begins as those do that `read_published` reads, or as foreign ones that it knows and refuses."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(16)
    return not start.startswith(MAGIC) and (start.startswith((ZIP, PICKLE, ZSTANDARD, *ZLIB)) or describe_mark(start) is not None)


def read_published(path: Path) -> Published:
    """Read a float checkpoint or an artifact.

    Raises:
        ArtifactError: missing, damaged, of another layout, or with anything in it but tensors and plain values; all tensors that are
            not as expected are listed.
    """
    try:
        if path.exists() and not path.is_file():  # a device, perhaps, that never ends
            raise ArtifactError(f"{path}: cannot be read (a folder or a device)")
        content = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        is_quantized, floats, codes, left_out = read_payload(_load(_decompress(content)))
    except ValueError as error:
        raise ArtifactError(f"{path}: {error}") from None
    skipped = sorted(name for name in (*floats, *codes) if name.startswith(NOT_IN_THE_MODEL))
    floats = _join_layer_scales({name: tensor for name, tensor in floats.items() if name not in skipped})
    codes = {name: matrix for name, matrix in codes.items() if name not in skipped}
    return Published(path.name, len(content), hashlib.sha256(content).hexdigest(), is_quantized, floats, codes, (*skipped, *left_out))


def _decompress(content: bytes) -> bytes:
    """The `torch.save` archive of a file; raises ValueError."""
    max_bytes = min(MAX_BYTES, max(MIN_MAX_BYTES, MAX_BYTES_PER_BYTE * len(content)))
    if content.startswith(ZSTANDARD):
        content = decompress_bytes(content, max_bytes)
    elif content.startswith(ZLIB):
        content = _decompress_zlib(content, max_bytes)
    if kind := describe_mark(content) or (describe_zip(content) if content.startswith(ZIP) else None):
        raise UserError(f"expected {SUPPORTED}, found {kind}")
    if not content.startswith((ZIP, PICKLE)):
        raise UserError(f"expected {SUPPORTED}, found a file that begins with {content[:4]!r} (brotli has no mark of its own)")
    return content


def _decompress_zlib(stream: bytes, max_bytes: int) -> bytes:
    decompressor = zlib.decompressobj()
    try:
        content = decompressor.decompress(stream, max_bytes + 1)
    except zlib.error as error:
        raise UserError(f"not a valid zlib stream ({error}); copy it anew") from None
    if len(content) > max_bytes or decompressor.unused_data:
        raise UserError(f"expected a zlib stream of at most {max_bytes} bytes of content and nothing after it, found more")
    if not decompressor.eof:
        raise UserError(f"expected a whole zlib stream, found one that is cut off after {len(stream)} bytes; copy it anew")
    return content


def _load(archive: bytes) -> Any:
    """The content of a `torch.save` archive: tensors and plain values, or ValueError."""
    if name := find_foreign_object(archive):
        raise UserError(f"expected {SUPPORTED}, found the Python object {name}, which could run anything when it is loaded, so that "
                        "it was not; have its owner save model.state_dict() alone")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols: what cannot be read is said below
            content = torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
    except Exception as error:  # the reader meets damage with exceptions of any kind
        if archive.startswith(ZIP) or is_whole_pickle(archive):
            raise UserError(f"expected {SUPPORTED}, found a sound pickle with more than tensors and plain values in it, or not saved by "
                            "torch.save; have its owner save model.state_dict() alone with torch.save") from None
        raise UserError(f"expected {SUPPORTED}, found a damaged file ({type(error).__name__}); copy it anew") from None
    if (num_bytes := _count_bytes(content)) > MAX_SHARED * len(archive):
        raise UserError(f"expected {SUPPORTED}, found tensors of {num_bytes:,} bytes in {len(archive):,}, many of them in the same memory")
    return content


def _count_bytes(content: Any) -> int:
    """Bytes of all tensors in dictionaries and lists, counted as if each had its own."""
    waiting, seen, num_bytes = [content], set(), 0
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            if value.layout == torch.strided and value.device.type == "cpu":
                num_bytes += min(value.nbytes, value.untyped_storage().nbytes())
        elif isinstance(value, Mapping | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, Mapping) else value
    return num_bytes


def _join_layer_scales(floats: dict[str, Tensor]) -> dict[str, Tensor]:
    """`floats` with one tensor `LAYER_SCALES` (n,) in place of n tensors of shape (1,), where they are as published."""
    names = [name for name in floats if name.startswith(f"{LAYER_SCALES}.")]
    ordered = [f"{LAYER_SCALES}.{number}" for number in range(len(names))]
    if not names or set(names) != set(ordered) or any(floats[name].shape != (1,) for name in names):
        return floats
    rest = {name: tensor for name, tensor in floats.items() if name not in ordered}
    return rest | {LAYER_SCALES: torch.cat([floats[name] for name in ordered])}

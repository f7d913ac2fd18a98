"""What is inside a file that is no published model, in words, so that nobody copies a sound file anew. Nothing in it is run."""

import io
import json
import pickletools
import re
import struct
import zipfile
from collections.abc import Sequence

from lib.compression.container import MAGIC

ZIP, PICKLE = b"PK\x03\x04", b"\x80"  # torch.save of today and of before 1.6
MARKS = {  # how files begin that may be taken for published ones
    MAGIC: "a .ptz file of this project, which evaluate reads as artifacts/compress/seed<seed>/model.ptz",
    b"\x1f\x8b": "gzip", b"\xfd7zXZ": "xz (LZMA)", b"\x5d\x00\x00": "LZMA", b"LZMA": "LZMA", b"\x93NUMPY": "a numpy array (.npy)",
    b"GGUF": "a GGUF file", b"\x89HDF\r\n": "an HDF5 file", b"version https://git-lfs": "the pointer to a file in Git LFS: git lfs pull",
}
LENGTH = struct.Struct("<Q")  # of the header with which a safetensors file begins; JSON follows
RECORD = "data.pkl"  # of an archive of torch.save
PICKLES = 5  # in a file of torch.save of before 1.6, the one with the tensors among them
HARMLESS = re.compile(
    r"torch (\w+Storage|(u?int|b?float|complex|bool)\d*|Size|device)|collections (OrderedDict|Counter)|builtins set|_codecs encode"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|parameter|sparse_tensor|meta_tensor_no_storage)|torch\.serialization _get_layout")
"""What tensors and plain values are made of, in memory that the file has bytes for; torch.load would also call ``bytearray(n)``."""
SHOWN = 5


def describe_mark(content: bytes) -> str | None:
    """What a file is that begins like this; None where it may be a published one or is not known."""
    for mark, kind in MARKS.items():
        if content.startswith(mark):
            return kind
    return _describe_safetensors(content) if content[LENGTH.size:LENGTH.size + 2] == b'{"' else None


def describe_zip(content: bytes) -> str | None:
    """What a zip is, if it is none that torch.save writes, or damaged, or would need more memory than its own size; None if it is one.

    torch.load itself checks neither checksums nor whether sizes are possible.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return _describe_entries(archive, len(content))
    except Exception as error:  # the reader meets damage with exceptions of any kind
        return f"a damaged zip ({type(error).__name__}); copy it anew"


def find_foreign_object(archive: bytes) -> str | None:
    """The dotted name of a Python object in a `torch.save` archive that is not `HARMLESS`, if there is one."""
    if archive.startswith(ZIP):
        with zipfile.ZipFile(io.BytesIO(archive)) as entries:
            streams = [io.BytesIO(entries.read(name)) for name in entries.namelist() if name.endswith(".pkl")]
    else:
        streams = [io.BytesIO(archive)] * PICKLES
    for stream in streams:
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name == "GLOBAL" and not HARMLESS.fullmatch(str(argument)):
                    return ".".join(str(argument).split(" "))
        except Exception:  # as above; torch.load meets the same damage
            break
    return None


def is_whole_pickle(content: bytes) -> bool:
    """Whether one pickle, and nothing else, is there from its beginning to its end."""
    stream = io.BytesIO(content)
    try:
        for _ in pickletools.genops(stream):
            pass
    except Exception:  # as above
        return False
    return stream.tell() == len(content)


def _describe_entries(archive: zipfile.ZipFile, num_bytes: int) -> str | None:
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if not any(name.rsplit("/", 1)[-1] == RECORD for name in names):
        if names and all(name.endswith(".npy") for name in names):
            return f"a numpy archive (.npz) of the arrays {_list([name.removesuffix('.npy') for name in names])}"
        return f"a zip of {_list(names)}, without a torch archive in it"
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript program; have its owner save model.state_dict()"
    if (unpacked_bytes := sum(entry.file_size for entry in entries)) > num_bytes:
        return f"a torch archive of {unpacked_bytes:,} bytes in {num_bytes:,}, while torch.save compresses nothing"
    if wrong := archive.testzip():
        return (f"a torch archive whose checksum of {_list([wrong])} does not fit: damaged, copy it anew; or saved under "
                "torch.serialization.set_crc32_options(False), save it without")
    return None


def _describe_safetensors(content: bytes) -> str:
    (length,) = LENGTH.unpack(content[:LENGTH.size])
    try:
        names = sorted(json.loads(content[LENGTH.size:LENGTH.size + length]).keys() - {"__metadata__"})
        tensors = f" of {_list(names)}"
    except (ValueError, AttributeError, RecursionError):
        tensors = ""
    return f"a safetensors file{tensors}; torch.save(safetensors.torch.load_file(FILE), 'final_model.pt') makes it a state dict"


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(ascii(name[:80])[1:-1] for name in names[:SHOWN])
    return f"{shown} and {len(names) - SHOWN} more" if len(names) > SHOWN else shown or "nothing"

"""Tensors on disk as safetensors files, byte for byte the same for the same content. (Apart from files.py, which needs no torch.)

Each file carries a hash of its content and those of the files that it was made from, so that damage and mixed-up files are noticed where
they are read and not three stages later.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lib.artifacts.files import ArtifactError, write_bytes

REMEDY = "`dvc repro -f` makes it anew"
CONTENT, MADE_FROM = "content_sha256", "made_from"
METADATA_KEY = "albatross"  # one key only: the order of several is not deterministic in the safetensors header


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any], sources: Sequence[Path] = ()) -> None:
    """Write tensors as a safetensors file, deterministic in content and order.

    Args:
        path: where the file is.
        tensors: name -> tensor of any dtype and shape.
        metadata: what JSON can hold.
        sources: files that `save_tensors` wrote and that these tensors were made from.
    """
    copies = {name: tensors[name].detach().cpu().clone(memory_format=torch.contiguous_format) for name in sorted(tensors)}  # none shared
    stated = {**metadata, MADE_FROM: {source.stem: read_metadata(source).get(CONTENT) for source in sources}}
    stated[CONTENT] = hash_content(copies, stated)
    write_bytes(path, save(copies, metadata={METADATA_KEY: json.dumps(stated, sort_keys=True)}))


def load_tensors(path: Path, sources: Sequence[Path] = ()) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and metadata of a file that `save_tensors` wrote; files of before there were hashes are taken as they are.

    Args:
        path: where the file is.
        sources: files that it must have been made from.

    Raises:
        ArtifactError: missing, damaged, written by something else, made from other files, or with values that are not finite.
    """
    metadata = read_metadata(path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    content = metadata.pop(CONTENT, None)
    if content is not None and content != hash_content(tensors, metadata):
        raise ArtifactError(f"{path}: the file was altered, its content has not the SHA-256 that it states; {REMEDY}")
    made_from = metadata.pop(MADE_FROM, {})
    for source in sources:
        if (expected := made_from.get(source.stem)) not in (None, found := read_metadata(source).get(CONTENT)):
            raise ArtifactError(f"{path}: made from another {source.stem} than {source} ({expected[:12]}, found {str(found)[:12]}); "
                                + REMEDY)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and (wrong := int((~tensor.isfinite()).sum())):
            raise ArtifactError(f"{path}: {name}: expected finite values, found {wrong} that are not: what wrote it diverged; lower the "
                                "learning rates in train, or raise quantize.damping")
    return tensors, metadata


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a file that `save_tensors` wrote.

    Raises:
        ArtifactError: missing, damaged, or written by something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}).get(METADATA_KEY)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file; `dvc repro` makes it") from None
    except SafetensorError as error:
        raise ArtifactError(f"{path}: damaged or not a safetensors file ({error}); {REMEDY}") from None
    if metadata is None:
        raise ArtifactError(f"{path}: not written by this project (no {METADATA_KEY!r} metadata)")
    try:
        return dict(json.loads(metadata))
    except (ValueError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path}: expected metadata in JSON, found something else ({error}); {REMEDY}") from None


def hash_content(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> str:
    """SHA-256 of metadata, names, dtypes, shapes and values, as 64 hexadecimal digits; `tensors` are contiguous and on the CPU."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"\0{name}\0{tensors[name].dtype}\0{list(tensors[name].shape)}\0".encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()

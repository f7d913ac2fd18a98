"""Tensors on disk as safetensors files, byte for byte the same for the same content. (Apart from files.py, which needs no torch.)"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lib.artifacts.files import ArtifactError, write_bytes

METADATA_KEY = "albatross"  # one key only: the order of several is not deterministic in the safetensors header


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors of any dtype and shape with JSON `metadata` as a safetensors file, deterministic in content and order."""
    copies = {name: tensors[name].detach().cpu().clone(memory_format=torch.contiguous_format) for name in sorted(tensors)}  # none shared
    write_bytes(path, save(copies, metadata={METADATA_KEY: json.dumps(metadata, sort_keys=True)}))


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and metadata of a file that `save_tensors` wrote.

    Raises:
        ArtifactError: missing, damaged, or written by something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}).get(METADATA_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file; `dvc repro` makes it") from None
    except SafetensorError as error:
        raise ArtifactError(f"{path}: damaged or not a safetensors file ({error}); `dvc repro -f` makes it anew") from None
    if metadata is None:
        raise ArtifactError(f"{path}: not written by this project (no {METADATA_KEY!r} metadata)")
    try:
        return tensors, dict(json.loads(metadata))
    except (ValueError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path}: expected metadata in JSON, found something else ({error}); `dvc repro -f` makes it anew") from None

"""State of an unfinished run: written at intervals, found again by its fingerprint, deleted when the checkpoint is written."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch


def resume_file(folder: Path, identity: dict[str, Any]) -> Path:
    """The file for the run with this identity (parameters, seed, checksums of the data); another run gets another name."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return folder / f"resume-{digest[:16]}.pt"


def save_resume(path: Path, state: dict[str, Any]) -> None:
    """Write the state so that a kill at any moment leaves the previous state or this one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_resume(path: Path, device: torch.device) -> dict[str, Any] | None:
    """The saved state, or None where there is none. Tensors and plain data only; nothing is unpickled freely."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    return state

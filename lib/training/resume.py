"""State of an unfinished run: written at intervals, found again by its fingerprint, deleted when the checkpoint is written."""

import hashlib
import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch

from lib.artifacts.files import ArtifactError, write_bytes


def resume_file(folder: Path, identity: dict[str, Any]) -> Path:
    """The file for the run with this identity (parameters, seed, checksums of the data); another run gets another name."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return folder / f"resume-{digest[:16]}.pt"


def save_resume(path: Path, state: dict[str, Any]) -> None:
    """Write the state so that a kill at any moment leaves the previous state or this one.

    Raises:
        OSError: it cannot be written; the previous state is untouched.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_bytes(path, buffer.getbuffer())


def load_resume(path: Path) -> dict[str, Any] | None:
    """The saved state, tensors on the CPU, or None where there is none. Nothing is unpickled freely.

    Raises:
        ArtifactError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ArtifactError(f"{path}: expected the state of an unfinished training run, found a damaged file ({reason}); delete it to "
                            "train from the beginning") from error
    return state

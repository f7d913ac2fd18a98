"""State of an unfinished run: written at intervals, found again by its fingerprint, deleted when the checkpoint is written."""

import hashlib
import io
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import torch

from lib.artifacts.files import ArtifactError, write_bytes
from lib.errors import UserError
from lib.model.config import ModelParams
from lib.training.config import TrainParams

CHECKSUM_BYTES = 4  # CRC-32 at the end; torch.load checks none


def resume_file(folder: Path, params: TrainParams, model: ModelParams, seed: int, data_sha256: str) -> Path:
    """The file for one run; a run with anything else that matters gets another name.

    Args:
        folder: where such files lie.
        params: parameters of the run; which of the averages is selected at its end does not matter.
        model: the architecture.
        seed: seed of initialisation and data order.
        data_sha256: checksums of the descriptions of the training and the held-out split, which have those of their shards.
    """
    identity = {"train": params.model_dump(mode="json", exclude={"averaging": {"select"}}), "model": model.model_dump(mode="json"),
                "seed": seed, "data": data_sha256}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return folder / f"resume-{digest[:16]}.pt"


def save_resume(path: Path, state: dict[str, Any]) -> None:
    """Write the state so that a kill at any moment leaves the previous state or this one.

    Raises:
        OSError: it cannot be written; the previous state is untouched.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.write(zlib.crc32(buffer.getbuffer()).to_bytes(CHECKSUM_BYTES, "little"))
    write_bytes(path, buffer.getbuffer())


def load_resume(path: Path) -> dict[str, Any] | None:
    """The saved state, tensors on the CPU, or None where there is none. Nothing is unpickled freely.

    Raises:
        ArtifactError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        content = memoryview(path.read_bytes())
        if zlib.crc32(content[:-CHECKSUM_BYTES]) != int.from_bytes(content[-CHECKSUM_BYTES:], "little"):
            raise UserError("wrong checksum")
        state: dict[str, Any] = torch.load(io.BytesIO(content[:-CHECKSUM_BYTES]), map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ArtifactError(f"{path}: expected the state of an unfinished training run, found a damaged file ({reason}); delete it to "
                            "train from the beginning") from error
    return state

"""State of an unfinished run: written at intervals and when the run is interrupted, deleted when its result is written."""

import hashlib
import io
import json
import pickle
import signal
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from lib.artifacts.files import ArtifactError, write_bytes
from lib.errors import UserError
from lib.progress import say

CHECKSUM_BYTES = 4  # CRC-32 at the end; torch.load checks none
INTERVAL_SECONDS = 1.0  # at least this long between two saved states,
SHARE = 0.02  # and long enough that saving takes no more than this share of the time
INTERRUPTED_EXIT_CODE = 130


def state_file(folder: Path, identity: Mapping[str, Any]) -> Path:
    """The file for one run; a run with anything else that matters gets another name.

    Args:
        folder: where such files lie.
        identity: all that decides the result, as JSON has it.
    """
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
        raise ArtifactError(f"{path}: expected the state of an unfinished run, found a damaged file ({reason}); delete it to start "
                            "from the beginning") from error
    return state


class Saver:
    """Saves the state of a run, seldom enough to take little of its time.

    Args:
        path: where the state is kept.
        what: name of the run in messages.
    """

    def __init__(self, path: Path, what: str) -> None:
        self._path, self._what = path, what
        self._next = time.monotonic() + INTERVAL_SECONDS

    @property
    def is_due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() > self._next

    def save(self, num_steps: int, make_state: Callable[[], dict[str, Any]], *, write: bool) -> None:
        """Make the state after so many steps and, if `write`, write it; a full disk does not end the run: its end may find room again."""
        start, state = time.monotonic(), make_state()
        if write:
            try:
                save_resume(self._path, state)
            except OSError as error:
                say(f"{self._what}: the state after step {num_steps} was not saved, an earlier one is kept: {error}")
        self._next = time.monotonic() + max(INTERVAL_SECONDS, (time.monotonic() - start) / SHARE)


@contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """Within the context SIGINT and SIGTERM only set a flag, which the yielded function returns."""
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

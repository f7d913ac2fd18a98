"""Errors that users can mend, and how programs end with them: what is wrong and what to do, without a traceback."""

import errno
import os
import sys
import time
import traceback
from types import TracebackType

_ROOM = "make room and rerun"
_REMEDIES = {
    errno.ENOSPC: _ROOM, errno.EDQUOT: _ROOM, errno.EFBIG: "see to the largest size of files there (ulimit -f), then rerun",
    errno.EACCES: "see to its permissions and rerun", errno.EPERM: "see to its permissions and rerun",
    errno.EROFS: "take a folder that can be written to", errno.EIO: "see to the disk and rerun",
    errno.EMFILE: "raise the number of open files (ulimit -n) and rerun", errno.ENFILE: "close other programs and rerun",
}  # of what a machine refuses; other errors of the system, such as a missing file that nobody expected, are errors of the program

PATIENCE_SECONDS = 20.0  # the first process of a machine may be that much slower to find the same error

_BATCHES = "train.micro_batch_sequences, calibrate.batch_sequences, evaluate.batch_tokens, evaluate.lora.batch_documents"


class UserError(ValueError):
    """What a user can mend. The message says what was expected, what was found and what to do; a line, or one for each problem."""


def describe_error(error: BaseException) -> str | None:
    """What a program prints in place of a traceback; None for errors of the program itself, which need one."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        name, reason = error.filename or "a file", error.strerror
        return f"{name}: {reason}" if _REMEDIES[error.errno] in str(reason) else f"{name}: {reason}; {_REMEDIES[error.errno]}"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which most programs do not import
        return f"{str(error).split('. ')[0]}; take fewer sequences, documents or tokens at a time ({_BATCHES})"
    return None


def report_errors() -> None:
    """From now on this process ends with the message alone where an error has one."""
    sys.excepthook = _report_early


def report_at_once() -> None:
    """Every process says its own errors from now on; for when those of a run have joined and can agree on which of them ends with one."""
    if sys.excepthook is _report_early:
        sys.excepthook = _report


def _report_early(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """`sys.excepthook` before the processes of a run have joined. What users can mend is found by every one: the first of this machine says
    so and ends, upon which torchrun ends the others. If nobody ends them, it has found nothing, and they speak up."""
    if describe_error(error) is not None and kind is not KeyboardInterrupt and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(PATIENCE_SECONDS)
    _report(kind, error, where)


def _report(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """`sys.excepthook`."""
    if (message := describe_error(error)) is None:
        traceback.print_exception(kind, error, where)  # unlike the built-in hook, it shows lines of modules that are in no file
    elif kind is not KeyboardInterrupt or os.environ.get("RANK", "0") == "0":  # Ctrl-C reaches every process of a run
        print(message, file=sys.__stderr__, flush=True)  # torch.distributed puts the rank before every line that goes to sys.stderr

"""What packages of programs do before anything else is imported: errors and Ctrl-C end in a line, also during the imports."""

import os
import signal
import sys
from types import FrameType

from lib.errors import report_errors


def start_program() -> None:
    """From now on errors of users, and Ctrl-C, end this process with one line; in the midst of an import Ctrl-C does so at once."""
    report_errors()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, in the background of a shell perhaps
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """The handler of Ctrl-C. An import may swallow the exception, as torch's of NumPy does, and go on or fail with another one."""
    while frame and "importlib" not in frame.f_code.co_filename:
        frame = frame.f_back
    if frame:
        sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    raise KeyboardInterrupt

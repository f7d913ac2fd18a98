"""Starts a stage in as many processes as NPROC says: ``python -m tools.launch [ARGUMENTS OF TORCHRUN] -m stages.train --seed 1``.

With one process and no arguments the stage runs by itself. Otherwise torchrun starts it, and what torchrun itself has to say of a
process that failed, some fifty lines, is left out: the process has said why, or a signal ended it, which is said here.
"""

import logging
import os
import signal
import sys

from lib.errors import UserError

DEVICES = ("auto", "cpu", "gpu")  # torchrun counts them


def main(arguments: list[str]) -> None:
    """Run a stage; the exit status is the stage's, or that of the process that failed first.

    Raises:
        UserError: NPROC is no number of processes.
    """
    position = arguments.index("-m")
    rendezvous, program = arguments[:position], arguments[position:]
    num_processes = os.environ.get("NPROC") or "1"
    if not (num_processes.isascii() and num_processes.isdigit() and int(num_processes)) and num_processes not in DEVICES:
        raise UserError(f"NPROC: expected a number of processes from 1, or {' or '.join(DEVICES)}, found {num_processes!r}")
    if num_processes == "1" and not rendezvous:
        os.execv(sys.executable, [sys.executable, *program])
    logging.disable()  # of torchrun; the stage's processes have loggers of their own
    from torch.distributed.elastic.multiprocessing.api import SignalException  # noqa: PLC0415 (takes seconds)
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: PLC0415
    from torch.distributed.run import main as run  # noqa: PLC0415
    try:
        run([*(rendezvous or ["--standalone"]), f"--nproc_per_node={num_processes}", *program])
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            sys.exit(failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        print(f"process {rank} of this run was ended by {name}" + (", for lack of memory perhaps" if name == "SIGKILL" else "")
              + "; rerun to continue", file=sys.stderr)
        sys.exit(128 - failure.exitcode)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Running a function in several processes that are connected as torchrun connects them."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn

from lib.distributed import Process, start_process


def run_processes(function: Callable[..., None], num_processes: int, *args: Any) -> None:
    """Call ``function(process, *args)`` in `num_processes` new processes; an error in one of them is raised here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(_run, (function, num_processes, port, args), nprocs=num_processes)


def _run(rank: int, function: Callable[[Process, Any], None], num_processes: int, port: int, args: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes), "LOCAL_RANK": str(rank),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    with start_process() as process:
        function(process, *args)

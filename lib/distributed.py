"""Processes of one run: rank, world size, device, collectives. The same code runs with one process or many.

Stages are started by ``torchrun``, which sets RANK, WORLD_SIZE and LOCAL_RANK; without them there is one process.
Every process takes part in every collective; only the main process (rank 0) writes files and prints.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

K = TypeVar("K")
T = TypeVar("T")


@dataclass(frozen=True)
class Process:
    """One process of a run: its `rank` in 0 .. `world_size` - 1 and the `device` that it computes on."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def synchronize(self) -> None:
        """Wait until the device has done what it was given, so that a clock tells the truth."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` added over all processes, in place; returned for convenience."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def max(self, value: float) -> float:
        """The largest `value` of all processes."""
        if self.world_size == 1:
            return value
        largest = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return float(largest)

    def merge(self, values: dict[K, T]) -> dict[K, T]:
        """The entries of all processes, whose keys are distinct; tensors in them on the CPU."""
        if self.world_size == 1:
            return values
        of_each: list[dict[K, T]] = [{} for _ in range(self.world_size)]
        dist.all_gather_object(of_each, values)
        return {key: value for one in of_each for key, value in one.items()}


SINGLE_CPU = Process(rank=0, world_size=1, device=torch.device("cpu"))


@contextmanager
def start_process() -> Iterator[Process]:
    """Join the run that ``torchrun`` started (NCCL on GPUs, gloo on CPUs) and leave it at the end."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        if world_size > 1:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    # On CPUs tanh comes from a library that sets itself up at its first call. When several threads make this call at once, some
    # of its values now and then differ from all later ones in the fourth digit; so one thread calls it first.
    torch.tanh(torch.zeros(1))
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Process(rank, world_size, device)
    finally:
        if world_size > 1:
            dist.destroy_process_group()

"""Processes of one run: rank, world size, device, collectives. The same code runs with one process or many.

Stages are started by ``torchrun``, which sets RANK, WORLD_SIZE and LOCAL_RANK; without them there is one process.
Every process takes part in every collective; only the main process (rank 0) writes files and prints. When a process dies, the
others end with one message; torchrun then names the one that died.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from lib.errors import report_at_once

COLLECTIVE_TIMEOUT = timedelta(minutes=15)  # longer than any process waits for another that works, compiling or writing included
SILENT_SECONDS = 5.0  # so much later a process ends whose error another one reports; else torchrun might end that one before it does

K = TypeVar("K")
T = TypeVar("T")


class ProcessLostError(RuntimeError):
    """Another process of the run cannot be reached."""


@contextmanager
def _collective() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # all that torch.distributed says of a peer that is gone
        raise ProcessLostError(str(error)) from error


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
            with _collective():
                dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def max(self, value: float, *others: float) -> tuple[float, ...]:
        """The largest of all processes of each of some values."""
        if self.world_size == 1:
            return value, *others
        largest = torch.tensor((value, *others), dtype=torch.float64, device=self.device)
        with _collective():
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return tuple(largest.tolist())

    def gather(self, value: T) -> list[T]:
        """The `value` of each process, in order of rank; tensors in it on the CPU."""
        if self.world_size == 1:
            return [value]
        of_each: list[T] = [value] * self.world_size
        with _collective():
            dist.all_gather_object(of_each, value)
        return of_each

    def merge(self, values: dict[K, T]) -> dict[K, T]:
        """The entries of all processes, whose keys are distinct; tensors in them on the CPU."""
        return {key: value for one in self.gather(values) for key, value in one.items()}

    def broadcast(self, value: T) -> T:
        """The `value` of the main process; tensors in it on the CPU."""
        if self.world_size == 1:
            return value
        values = [value]
        with _collective():
            dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def gather_rows(self, own: torch.Tensor, num_rows: int) -> torch.Tensor:
        """Rows that the processes share out among them, in equal parts as far as they last.

        Args:
            own: rows ``rank * n`` to ``(rank + 1) * n`` - 1 of all, as far as they exist, with n = `num_rows` / `world_size` rounded up.
            num_rows: number of rows of all processes together.

        Returns:
            (num_rows, ...), all rows.
        """
        if self.world_size == 1:
            return own
        share = -(-num_rows // self.world_size)
        padded = own.new_zeros(share, *own.shape[1:])
        padded[:len(own)] = own
        rows = own.new_empty(share * self.world_size, *own.shape[1:])
        with _collective():
            dist.all_gather(list(rows.split(share)), padded)
        return rows[:num_rows]


SINGLE_CPU = Process(rank=0, world_size=1, device=torch.device("cpu"))


@contextmanager
def start_process() -> Iterator[Process]:
    """Join the run that ``torchrun`` started (NCCL on GPUs, gloo on CPUs) and leave it at the end.

    Raises:
        SystemExit: another process of the run is gone, and one of those that are left has said so; or another process has
            reported the same error.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS starts: deterministic algorithms need it
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        if world_size > 1:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    # On CPUs tanh comes from a library that sets itself up at its first call. When several threads make this call at once, some
    # of its values now and then differ from all later ones in the fourth digit; so one thread calls it first.
    torch.tanh(torch.zeros(1))
    if world_size == 1:
        yield Process(rank, world_size, device)
        return
    store, *_ = next(rendezvous("env://", rank, world_size, timeout=COLLECTIVE_TIMEOUT))
    report_at_once()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world_size,
                            timeout=COLLECTIVE_TIMEOUT)
    try:
        yield Process(rank, world_size, device)
    except ProcessLostError as error:
        if _is_first(store, "processes that noticed"):
            reason = str(error).splitlines()[0]
            print(f"another process of this run is gone: its own messages or torchrun's report say why; rerun to continue ({reason})",
                  file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except (ValueError, OSError) as error:  # what users can mend is often found by every process
        if _is_first(store, f"{type(error).__name__} {error}"):
            raise
    else:
        return
    finally:
        dist.destroy_process_group()
    time.sleep(SILENT_SECONDS)
    raise SystemExit(1)


def _is_first(store: Any, event: str) -> bool:
    """Whether no other process has reported this event before; also where nobody can say, because the first node is gone."""
    try:
        return store.add(f"albatross/{event}", 1) == 1
    except RuntimeError:
        return True

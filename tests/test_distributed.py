"""Collectives of several processes, and their absence with one."""

import pytest
import torch

from lib.distributed import SINGLE_CPU, Process
from tests.processes import run_processes


def _collect(process: Process) -> None:
    assert process.is_main == (process.rank == 0)
    assert process.sum(torch.tensor([process.rank + 1.0])).item() == 3.0
    merged = process.merge({f"rank {process.rank}": torch.full((2,), process.rank)})
    assert {key: value.tolist() for key, value in merged.items()} == {"rank 0": [0, 0], "rank 1": [1, 1]}
    assert process.merge({"only": 5} if process.is_main else {}) == {"only": 5}
    assert process.merge({}) == {}
    assert process.max(2**40 + process.rank / 1024, process.rank) == (2**40 + 1 / 1024, 1)  # as exact as a clock
    assert process.max(-1.5 - process.rank) == (-1.5,)
    process.synchronize()


@pytest.mark.slow
def test_two_processes_add_merge_and_find_the_largest() -> None:
    run_processes(_collect, 2)


def test_one_process_needs_no_group() -> None:
    tensor = torch.tensor([2.0])
    assert SINGLE_CPU.sum(tensor) is tensor
    values = {"a": 1}
    assert SINGLE_CPU.merge(values) == values
    assert SINGLE_CPU.max(-0.1, 2) == (-0.1, 2)
    SINGLE_CPU.synchronize()
    assert SINGLE_CPU.is_main


@pytest.mark.parametrize(("device", "waits"), [("cpu", []), ("cuda:1", [torch.device("cuda:1")])])
def test_only_a_gpu_is_waited_for(device: str, waits: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    Process(rank=0, world_size=1, device=torch.device(device)).synchronize()
    assert waited == waits

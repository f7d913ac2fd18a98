import numpy as np
import pytest
import torch

from lib.distributed import SINGLE_CPU, Process
from lib.evaluation.sheet import ScoreSheet
from tests.processes import run_processes

CPU = torch.device("cpu")


def fill(sheet: ScoreSheet, targets: list[int], added: float = 0.0) -> None:
    """Loss n + `added` and context 10 n for target n."""
    places = torch.tensor([targets])
    sheet.write(places, places + added, 10 * places)


def test_losses_can_be_written_in_any_order_and_shape() -> None:
    sheet = ScoreSheet(6, CPU)
    sheet.write(torch.tensor([[4, 5], [0, 1]]), torch.tensor([[0.4, 0.5], [0.0, 0.1]]), torch.tensor([7, 8]))  # one context for all rows
    sheet.write(torch.tensor([[3, 2]]), torch.tensor([[0.3, 0.2]]), torch.tensor([[5, 6]]))
    nats, context = sheet.collect(SINGLE_CPU)
    assert nats.dtype == np.float32 and context.dtype == np.int32
    assert nats == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert context.tolist() == [7, 8, 6, 5, 7, 8]


def test_the_place_after_the_last_target_belongs_to_nothing() -> None:
    sheet = ScoreSheet(3, CPU)
    sheet.write(torch.tensor([[0, 1], [2, 3], [3, 3]]), torch.tensor([[0.0, 1.0], [2.0, 9.0], [9.0, 9.0]]), torch.tensor([0, 1]))
    assert sheet.collect(SINGLE_CPU)[0].tolist() == [0, 1, 2]
    with pytest.raises(IndexError):
        fill(sheet, [4])


@pytest.mark.parametrize(("written", "message"), [
    ([[0, 1, 2]], "exactly once; 1 were not, the first is target 3, scored 0 times"),
    ([[0, 1, 2, 3], [2, 3]], "exactly once; 2 were not, the first is target 2, scored 2 times"),
    ([[0, 1, 1, 3]], "exactly once; 2 were not, the first is target 1, scored 2 times"),  # within one call
    ([[1, 2, 3], [1, 2, 3]], "exactly once; 4 were not, the first is target 0, scored 0 times"),
    ([], "exactly once; 4 were not, the first is target 0, scored 0 times"),
])
def test_a_target_not_scored_exactly_once_is_an_error_with_its_number(written: list[list[int]], message: str) -> None:
    sheet = ScoreSheet(4, CPU)
    for targets in written:
        fill(sheet, targets)
    with pytest.raises(RuntimeError, match=message):
        sheet.collect(SINGLE_CPU)


def test_collecting_twice_gives_the_same() -> None:
    sheet = ScoreSheet(4, CPU)
    fill(sheet, [0, 1, 2, 3])
    first, second = sheet.collect(SINGLE_CPU), sheet.collect(SINGLE_CPU)
    for ours, theirs in zip(first, second, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_what_is_unfinished_says_which_targets_were_scored() -> None:
    sheet = ScoreSheet(5, CPU)
    fill(sheet, [3, 1])
    nats, scored = sheet.collect_unfinished(SINGLE_CPU)
    assert scored.tolist() == [False, True, False, True, False]
    assert nats[scored].tolist() == [1, 3]


def test_the_last_distribution_is_kept_in_fp32_and_must_be_there_once() -> None:
    sheet = ScoreSheet(2, CPU, wanted=1)
    with pytest.raises(RuntimeError, match="expected the distribution of the wanted target once, found it 0 times"):
        sheet.collect_distribution(SINGLE_CPU)
    sheet.write_distribution(torch.tensor([-0.5, -1.5], dtype=torch.bfloat16))
    last = sheet.collect_distribution(SINGLE_CPU)
    assert last.dtype == np.float32 and last.tolist() == [-0.5, -1.5]


def _share(process: Process) -> None:
    sheet = ScoreSheet(6, process.device, wanted=5)
    mine = [[0, 2, 4], [1, 5, 3]][process.rank]
    fill(sheet, mine)
    nats, context = sheet.collect(process)
    assert nats.tolist() == [0, 1, 2, 3, 4, 5] and context.tolist() == [0, 10, 20, 30, 40, 50]
    fill(sheet, [process.rank])
    unfinished, scored = sheet.collect_unfinished(process)
    assert scored.tolist() == [False, False, True, True, True, True] and unfinished[2:].tolist() == [2, 3, 4, 5]
    with pytest.raises(RuntimeError, match="2 were not, the first is target 0, scored 2 times"):
        sheet.collect(process)
    if process.rank == 1:
        sheet.write_distribution(torch.tensor([-1.0, -2.0]))
    assert sheet.collect_distribution(process).tolist() == [-1, -2]
    if process.rank == 0:
        sheet.write_distribution(torch.tensor([-1.0, -2.0]))
    with pytest.raises(RuntimeError, match="found it 2 times"):
        sheet.collect_distribution(process)


@pytest.mark.slow
def test_two_processes_complete_each_other_and_count_together() -> None:
    run_processes(_share, 2)

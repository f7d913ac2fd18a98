"""The clock of an evaluation, on a clock that goes as the test says."""

import time
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lib.distributed import SINGLE_CPU, Process
from lib.evaluation.limit import CHECKS, RESERVE, TimeLimit, TimeLimitError
from tests.processes import run_processes


@dataclass
class Clock:
    now: float = 100.0

    def monotonic(self) -> float:
        return self.now


@dataclass(frozen=True)
class Group(Process):
    """A process of two: the other one's clock is `late` seconds ahead; notes the times that were compared."""

    rank: int = 0
    world_size: int = 2
    device: torch.device = field(default_factory=partial(torch.device, "cpu"))
    late: float = 0.0
    compared: list[float] = field(default_factory=list)
    waits: list[int] = field(default_factory=list)

    def max(self, value: float, *others: float) -> tuple[float, ...]:
        self.compared.append(value)
        return value + self.late, *others

    def synchronize(self) -> None:
        self.waits.append(len(self.compared))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("lib.evaluation.limit.time.monotonic", clock.monotonic)
    return clock


def test_projection_counts_what_went_before_once(clock: Clock) -> None:
    limit = TimeLimit(50, SINGLE_CPU)
    clock.now = 110.0  # ten seconds to open the artifact
    with limit.plan(400):
        assert limit.open_seconds == 10 and limit.projected_seconds == 10
        clock.now = 115.0
        limit.advance(100)
        assert limit.projected_seconds == 10 + 4 * 5
        assert limit.seconds == 15
        clock.now = 149.0
        limit.advance(100)
        clock.now = 151.0
        with pytest.raises(TimeLimitError, match=r"found 51.0 s with 75% of the work done \(projected: 65 s\)"):
            limit.advance(100)


def test_what_is_left_out_is_not_projected(clock: Clock) -> None:
    limit = TimeLimit(50, SINGLE_CPU)
    clock.now += 10
    limit.plan(400)
    clock.now += 5
    limit.advance(100)
    limit.leave_out(200)
    assert limit.projected_seconds == 10 + 2 * 5
    limit.advance(100)
    with pytest.raises(TimeLimitError, match=r"found 51\.0 s with 100% of the work done \(projected: 51 s\)"):
        clock.now = 151.0
        limit.check()


def test_passing_the_limit_fails_with_the_numbers_and_the_way_out(clock: Clock) -> None:
    limit = TimeLimit(50, SINGLE_CPU)
    clock.now = 150.0  # opening the artifact counts as well; exactly at the limit is in time
    with limit.plan(1000):
        limit.advance(10)
        clock.now = 150.1
        with pytest.raises(TimeLimitError, match=(
                r"evaluate.limit_seconds: expected at most 50 s, found 50.1 s with 2% of the work done \(projected: 55 s\); raise "
                r"evaluate.stride_tokens, .*one_pass.*epochs.*strategy.*NPROC=8.*evaluate.when_late: fewer_epochs, or raise the limit")):
            limit.advance(10)


def test_the_time_of_the_slowest_process_counts(clock: Clock) -> None:
    """From its start on: what is projected and affordable must not differ between processes, or one would train longer."""
    limit = TimeLimit(50, Group(late=20.0))
    with limit.plan(400):
        clock.now = 110.0
        limit.advance(100)
        assert limit.projected_seconds == 20 + 4 * 10
        left = (50 * (1 - RESERVE) - 30) / 0.1
        assert limit.affordable(250) == pytest.approx((left - 50) / 250)
        clock.now = 131.0
        with pytest.raises(TimeLimitError, match=r"found 51\.0 s"):
            limit.advance(100)


@pytest.mark.parametrize(("total", "piece"), [(100_000, 7), (100_000, 900), (100_000, 100_000), (50, 1), (10**9, 32_768 * 1000)])
def test_the_time_is_compared_now_and_then_evenly_over_the_work(clock: Clock, total: int, piece: int) -> None:
    process = Group()
    limit = TimeLimit(50, process)
    done, at = 0, []
    with limit.plan(total):
        process.compared.clear()
        process.waits.clear()
        while done < total:
            before = len(process.compared)
            step = min(piece, total - done)
            limit.advance(step)
            done += step
            at += [done] * (len(process.compared) - before)
    num_pieces = -(-total // piece)
    assert len(at) == min(CHECKS, num_pieces)
    assert at[-1] == total
    gaps = [later - earlier for earlier, later in zip([0, *at], at, strict=False)]
    assert max(gaps) < total / CHECKS + piece + 1
    assert process.waits == list(range(len(at)))  # the device is waited for before the time is taken, and only then


def test_a_check_can_be_asked_for(clock: Clock) -> None:
    limit = TimeLimit(50, SINGLE_CPU)
    limit.plan(1000)
    limit.advance(1)  # too little for a check of its own
    clock.now = 151.0
    limit.advance(1)
    with pytest.raises(TimeLimitError, match=r"found 51\.0 s"):
        limit.check()


def test_a_projection_above_the_limit_is_said_once_and_early(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    limit, said = TimeLimit(50, SINGLE_CPU), []
    limit.plan(1000)
    for n in range(1, 60):
        clock.now += 0.5
        limit.advance(5)
        said += [n] * capsys.readouterr().err.count("evaluate is on its way to 100 s, above evaluate.limit_seconds: 50 s\n")
    assert said == [4]  # after 2 % of the work, when the first steps do not decide any more


def test_a_projection_that_comes_later_is_said_then(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    limit = TimeLimit(50, SINGLE_CPU)
    limit.plan(1000)
    clock.now += 20
    limit.advance(500)
    assert "on its way" not in capsys.readouterr().err
    clock.now += 15
    limit.advance(100)
    assert "on its way to 58 s, above evaluate.limit_seconds: 50 s" in capsys.readouterr().err


def test_only_the_main_process_says_so(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    limit = TimeLimit(50, Group(rank=1))
    limit.plan(1000)
    clock.now += 40
    limit.advance(500)
    assert "on its way" not in capsys.readouterr().err


@given(st.floats(0, 50), st.floats(0.03, 0.1), st.integers(1, 90), st.integers(0, 99), st.integers(1, 100))
@example(10.0, 0.08, 20, 50, 80)  # neither nothing nor all
def test_what_is_affordable_ends_in_time_with_all_that_must_be_done(
        opened: float, seconds_per_work: float, num_checks: int, done_since: int, percent: int) -> None:
    """And no less: the end that the pace until the last check predicts is the limit without its reserve, or all is done before."""
    clock, total, checked = Clock(), 20_000, 100 * num_checks  # a check every 100
    optional = (total - checked - done_since) * percent // 100
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lib.evaluation.limit.time.monotonic", clock.monotonic)
        limit = TimeLimit(1000, SINGLE_CPU)
        clock.now += opened
        limit.plan(total)
        clock.now += checked * seconds_per_work
        limit.advance(checked)
        clock.now += 7  # nobody has looked at the clock since
        limit.advance(done_since)
        fraction = limit.affordable(optional)
    end = opened + seconds_per_work * (total - (1 - fraction) * optional)
    wanted = pytest.approx((1 - RESERVE) * 1000)
    assert (fraction == 0 and (end > 970 or end == wanted)) or (fraction == 1 and (end < 970 or end == wanted)) or end == wanted
    assert 0 <= fraction <= 1


def test_all_is_affordable_as_long_as_nothing_is_known_or_nothing_is_optional(clock: Clock) -> None:
    limit = TimeLimit(100, SINGLE_CPU)
    clock.now += 99
    limit.plan(1000)
    assert limit.affordable(500) == 1
    clock.now += 0.5
    limit.advance(5)
    assert limit.affordable(500) == 0
    assert limit.affordable(0) == 1


def test_phases_of_the_same_name_add_up(clock: Clock) -> None:
    process = Group()
    limit = TimeLimit(1000, process)
    clock.now += 5
    with limit.timed() as seconds:
        for name, duration in (("scoring", 1.0), ("adaptation", 10.0), ("scoring", 2.0), ("scoring", 4.0)):
            clock.now += 100
            with limit.phase(name):
                clock.now += duration
    assert seconds == {"seconds": 417.0, "scoring_seconds": 7.0, "adaptation_seconds": 10.0}
    assert len(process.waits) == 2 * 5  # the device is waited for at both ends of each
    with limit.timed() as seconds:
        clock.now += 3
        with limit.phase("scoring"):
            clock.now += 4
    assert seconds == {"seconds": 7.0}  # the only phase says nothing more, and those before do not count


def _stop_together(process: Process) -> None:
    """Only the second process is late by its own clock."""
    limit = TimeLimit(0.4, process)
    limit.plan(10)
    if process.rank == 1:
        time.sleep(0.5)
    with pytest.raises(TimeLimitError, match="10% of the work done"):
        limit.advance(1)


@pytest.mark.slow
def test_processes_stop_at_the_same_place() -> None:
    run_processes(_stop_together, 2)


def test_compilation_counts_in_the_time_but_not_in_the_rate(clock: Clock, monkeypatch: pytest.MonkeyPatch,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    """Forty seconds of compilation in the first percent of the work project to forty seconds, not to an hour."""
    compiling = [7.0]  # of other work before
    monkeypatch.setattr("lib.evaluation.limit.compile_seconds", lambda: compiling[0])
    limit = TimeLimit(100, SINGLE_CPU)
    with limit.plan(400):
        clock.now, compiling[0] = 141.0, 47.0
        limit.advance(10)
        assert limit.compile_seconds == 40
        assert limit.projected_seconds == 40 + 40 * 1
        assert limit.affordable(100) == 1
        clock.now = 150.0
        limit.advance(10)
        assert limit.projected_seconds == 40 + 20 * 10
    assert "on its way to 240 s" in capsys.readouterr().err

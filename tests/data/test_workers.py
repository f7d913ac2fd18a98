import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lib.data.workers import ITEMS_PER_PROCESS, map_in_order

ROOT = Path(__file__).parents[2]

WAITING = """
from lib.data.workers import map_in_order
from tests.data.test_workers import say_pid_and_wait
if __name__ == "__main__":
    list(map_in_order(say_pid_and_wait, range(2), 2))
"""


def square_unless_negative(number: int) -> int:
    if number < 0:
        raise ValueError(f"found {number}")
    return number * number


def sleep_then_tell_pid(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def say_pid_and_wait(_: int) -> None:
    print(os.getpid(), flush=True)
    time.sleep(600)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_results_come_in_order_until_the_first_error(num_processes: int) -> None:
    results = map_in_order(square_unless_negative, [*range(20), -1, 2], num_processes)
    assert [next(results) for _ in range(20)] == [number * number for number in range(20)]
    with pytest.raises(ValueError, match="found -1"):
        next(results)
    assert list(map_in_order(square_unless_negative, [], num_processes)) == []


def test_slow_first_items_do_not_lose_their_place_and_several_processes_work() -> None:
    pids = list(map_in_order(sleep_then_tell_pid, [0.5, 0.0, 0.0, 0.5, 0.0, 0.0], 2))
    assert len(set(pids)) == 2
    assert os.getpid() not in pids
    assert list(map_in_order(sleep_then_tell_pid, [0.0], 1)) == [os.getpid()]


def test_items_are_read_only_so_far_ahead() -> None:
    num_read = 0

    def count() -> Iterator[int]:
        nonlocal num_read
        for number in range(50):
            num_read += 1
            yield number

    for position, _ in enumerate(map_in_order(square_unless_negative, count(), 2)):
        assert num_read <= position + 2 * ITEMS_PER_PROCESS


@pytest.mark.parametrize("to_all", [False, True], ids=["killed", "interrupted from the terminal"])
def test_no_worker_outlives_its_parent(tmp_path: Path, *, to_all: bool) -> None:
    script = tmp_path / "waiting.py"
    script.write_text(WAITING)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}) as parent:
        assert parent.stdout is not None
        assert parent.stderr is not None
        workers = [int(parent.stdout.readline()) for _ in range(2)]
        if to_all:
            os.killpg(parent.pid, signal.SIGINT)
            time.sleep(0.5)
            assert all(map(is_alive, workers)), "a worker leaves Ctrl-C to its parent"
        parent.kill()
        parent.wait()
        give_up = time.monotonic() + 60
        while any(map(is_alive, workers)):
            assert time.monotonic() < give_up
            time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.evaluation.bpb import check_bytes, make_score, running_bpb


def test_a_uniform_model_over_bytes_needs_eight_bits_per_byte() -> None:
    score = make_score(np.full(1000, math.log(256), np.float32), np.ones(1000, np.int64))
    assert score.loss == pytest.approx(math.log(256), rel=1e-6)
    assert score.bpb == pytest.approx(8, rel=1e-6)
    assert (score.num_tokens, score.num_bytes) == (1000, 1000)


def test_control_tokens_cost_nats_and_stand_for_no_bytes() -> None:
    score = make_score(np.array([1, 2, 3], np.float32), np.array([0, 4, 0]))
    assert score.loss == 2
    assert score.bpb == pytest.approx(6 / math.log(2) / 4)


def test_sums_are_exact_where_fp32_sums_are_not() -> None:
    nats = np.full(20_000_000, 0.1, np.float32)
    assert make_score(nats, np.ones(len(nats), np.int64)).loss == pytest.approx(float(np.float32(0.1)), rel=1e-12)


@given(st.integers(1, 500), st.integers(1, 250), st.integers(0, 100))
def test_running_bpb_is_the_score_of_each_prefix(num_targets: int, num_points: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    nats, num_bytes = rng.random(num_targets).astype(np.float32), rng.integers(0, 3, num_targets)
    num_bytes[-1] = 1
    curve = running_bpb(nats, num_bytes, num_points)
    assert 1 <= len(curve) <= num_points
    assert curve[-1][0] == num_targets
    for n, bpb in curve:
        assert bpb == pytest.approx(make_score(nats[:n], num_bytes[:n]).bpb)


def test_running_bpb_starts_where_there_are_bytes() -> None:
    assert [n for n, _ in running_bpb(np.ones(4, np.float32), np.array([0, 0, 1, 1]), 4)] == [3, 4]


def test_other_bytes_than_the_text_has_are_refused() -> None:
    check_bytes(np.array([1, 2]), 3, "val")
    with pytest.raises(ValueError, match=r"val: expected 4 bytes of text, found 3 .*dvc repro"):
        check_bytes(np.array([1, 2]), 4, "val")


def test_losses_without_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="as many losses as targets"):
        make_score(np.ones(3, np.float32), np.ones(2, np.int64))

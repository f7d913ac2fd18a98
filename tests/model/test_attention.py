"""Properties of the parts of attention that the comparison of whole models could miss."""

import pytest
import torch

from lib.model.attention import Rotation, make_rotation, remove_own_value, rotate
from lib.model.config import parse_model
from tests.model.test_gpt import FULL

CPU = torch.device("cpu")
PUBLISHED = parse_model({**FULL, "model_dim": 512, "num_heads": 8, "rope_dims": 16, "rope_trained_tokens": 1024}, "")


def base_of(rotation: Rotation) -> float:
    """From the angle of the second frequency at position 1."""
    return float(torch.atan2(rotation.sin, rotation.cos)[1, 0, 1]) ** (-16 / 2)


def test_ntk_base_of_the_published_runs() -> None:
    assert abs(base_of(make_rotation(PUBLISHED, 2048, None, CPU)) - 22082) < 1  # both scripts train at 2048 with a trained length of 1024


@pytest.mark.parametrize(("num_tokens", "attention_tokens", "span"), [
    (512, None, 512), (1024, None, 1024), (1025, None, 1025), (4096, None, 4096), (4096, 512, 512), (4096, 1024, 1024), (4096, 2048, 2048),
    (2048, 4096, 2048), (512, 4096, 512)])
def test_ntk_base_follows_the_largest_distance_that_attention_spans(num_tokens: int, attention_tokens: int | None, span: int) -> None:
    base = base_of(make_rotation(PUBLISHED, num_tokens, attention_tokens, CPU))
    assert base == pytest.approx(10000 * max(1, span / 1024) ** (16 / 14), rel=1e-5)


def test_without_a_trained_length_the_base_is_the_same_at_every_length() -> None:
    params = PUBLISHED.model_copy(update={"rope_trained_tokens": None})
    for num_tokens, attention_tokens in ((8, None), (2048, None), (8192, 2048)):
        assert base_of(make_rotation(params, num_tokens, attention_tokens, CPU)) == pytest.approx(10000, rel=1e-5)


def test_scores_depend_on_distance_only_and_norms_are_kept() -> None:
    params = parse_model({**FULL, "rope_trained_tokens": 64}, "")
    rotation = make_rotation(params, 32, None, CPU)
    q, k = torch.randn(2, 1, 1, 1, 6, generator=torch.Generator().manual_seed(0)).expand(2, 1, 32, 1, 6)
    q_rotated, k_rotated = rotate(q, rotation), rotate(k, rotation)
    scores = torch.einsum("bthe,bshe->ts", q_rotated, k_rotated)
    torch.testing.assert_close(scores[5:, 5:], scores[:-5, :-5])
    torch.testing.assert_close(q_rotated.norm(dim=-1), q.norm(dim=-1))


def test_own_value_is_removed_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    y, v = torch.randn(2, 3, 4, 6, generator=generator), torch.randn(2, 3, 2, 6, generator=generator)
    own = v.repeat_interleave(2, dim=2)
    left = remove_own_value(y, v)
    torch.testing.assert_close((left * own).sum(-1), torch.zeros(2, 3, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close((y - left).norm(dim=-1), ((y * own).sum(-1) / own.norm(dim=-1)).abs())

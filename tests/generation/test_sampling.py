import itertools

import numpy as np
import pytest
import torch

from lib.generation.cache import KeyValueCache
from lib.generation.sampling import Sampling, draw_token, write_tokens
from tests.model.test_gpt import FULL, make_model

LOGITS = np.log([0.1, 0.4, 0.2, 0.3])
CPU = torch.device("cpu")


@pytest.mark.parametrize(("temperature", "top_p", "expected"), [
    (1.0, 1.0, [0.1, 0.4, 0.2, 0.3]),
    (0.5, 1.0, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),  # squares
    (1.0, 0.65, [0, 4 / 7, 0, 3 / 7]),
    (1.0, 0.75, [0, 4 / 9, 2 / 9, 3 / 9]),
    (1.0, 1e-9, [0, 1, 0, 0]),
    (0.0, 1.0, [0, 1, 0, 0]),
])
def test_tokens_are_drawn_as_often_as_they_are_probable(temperature: float, top_p: float, expected: list[float]) -> None:
    uniforms = (np.arange(20_000) + 0.5) / 20_000
    found = np.bincount([draw_token(LOGITS, Sampling(temperature, top_p, 0), uniform) for uniform in uniforms], minlength=4)
    np.testing.assert_allclose(found / 20_000, expected, atol=1e-4)


def test_the_largest_number_below_one_is_a_token() -> None:
    assert draw_token(np.zeros(1000), Sampling(1.0, 1.0, 0), np.nextafter(1.0, 0.0)) == 999


def write(seed: int, temperature: float = 1.0) -> list[int]:
    model = make_model(FULL)
    prompt = np.array([1, 7, 3], np.uint16)
    tokens = write_tokens(KeyValueCache(model, 6), prompt, bos_id=1, sampling=Sampling(temperature, 1.0, seed), device=CPU)
    return list(itertools.islice(tokens, 40))


def test_the_same_seed_gives_the_same_text() -> None:
    assert write(0) == write(0) != write(1)


def test_without_temperature_each_token_is_the_most_probable_one_of_the_model() -> None:
    model, text = make_model(FULL), [1, 7, 3]
    for token in write(0, temperature=0.0):
        assert token == int(model.logits(torch.tensor([text]), attention_tokens=6)[0, -1].argmax())
        text.append(token)


def test_the_end_of_the_document_is_the_end() -> None:
    texts = [write(seed, temperature=3.0) for seed in range(6)]
    assert all(1 not in text for text in texts)
    assert min(map(len, texts)) < 40

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.evaluation.breakdown import CONTEXT_BINS, context_table, document_table
from lib.evaluation.windows import Documents, find_documents

LOSSES = st.floats(0, 20, width=32)


@given(st.lists(st.tuples(st.integers(0, 300), LOSSES), min_size=1, max_size=80))
def test_each_target_counts_in_the_bin_of_its_context(targets: list[tuple[int, float]]) -> None:
    context, nats = (np.array(column) for column in zip(*targets, strict=True))
    table = context_table(nats.astype(np.float32), context.astype(np.int32))
    previous = -1
    for largest, count, loss in table:
        inside = [nat for number, nat in targets if previous < number <= largest]
        assert count == len(inside) > 0
        assert loss == pytest.approx(sum(inside) / len(inside))
        previous = largest
    assert sum(count for _, count, _ in table) == len(targets)
    width = math.ceil((max(context) + 1) / CONTEXT_BINS)
    assert {(largest + 1) % width for largest, *_ in table} == {0}
    assert previous - width < max(context) <= previous < CONTEXT_BINS * width


def test_bins_are_as_narrow_as_the_number_of_them_allows() -> None:
    for num_inputs, largest in ((1, [0]), (32, list(range(32))), (33, list(range(1, 34, 2))), (64, list(range(1, 64, 2)))):
        rows = context_table(np.ones(num_inputs, np.float32), np.arange(num_inputs, dtype=np.int32))
        assert [row[0] for row in rows] == largest


def test_an_empty_bin_is_left_out() -> None:
    assert context_table(np.array([1, 3, 2], np.float32), np.array([0, 63, 1], np.int32)) == [(1, 2, 1.5), (63, 1, 3.0)]


@given(st.lists(st.lists(st.tuples(LOSSES, st.integers(0, 5)), min_size=1, max_size=20), min_size=1, max_size=12))
def test_each_document_counts_in_the_bin_of_its_length(documents: list[list[tuple[float, int]]]) -> None:
    flat = [target for document in documents for target in document]
    lengths = np.array([len(document) for document in documents])
    nats, num_bytes = np.array([nat for nat, _ in flat], np.float32), np.array([size for _, size in flat])
    expected: list[tuple[object, ...]] = []
    for exponent in range(6):
        inside = [document for document in documents if 2**exponent / 2 < len(document) <= 2**exponent]
        size = sum(number for document in inside for _, number in document)
        if size:
            total = sum(nat for document in inside for nat, _ in document)
            expected.append((2**exponent, len(inside), size, pytest.approx(total / math.log(2) / size)))
    found: list[tuple[object, ...]] = [*document_table(nats, num_bytes, Documents(np.cumsum(lengths) - lengths, lengths))]
    assert found == expected


def test_tables_add_up_to_the_score_of_the_text() -> None:
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 6, 500).astype(np.uint16)
    tokens[0] = 1
    nats, num_bytes = generator.random(499).astype(np.float32), generator.integers(0, 5, 499)
    rows = document_table(nats, num_bytes, find_documents(tokens, 1))
    assert sum(row[1] for row in rows) == (tokens[:-1] == 1).sum()
    assert sum(row[2] for row in rows) == num_bytes.sum()
    assert sum(row[2] * row[3] for row in rows) == pytest.approx(nats.sum() / math.log(2))


def test_many_losses_are_added_exactly_enough() -> None:
    """In fp32 a sum that has come to 2^24, as that of the challenge's text does, would grow no more by 1."""
    nats = np.array([2.0**24, *[1.0] * 1000], np.float32)
    [(*row, bpb)] = document_table(nats, np.ones(1001, np.int64), Documents(np.array([0]), np.array([1001])))
    assert row == [1024, 1, 1001]
    assert bpb == pytest.approx((2**24 + 1000) / math.log(2) / 1001, rel=1e-12)
    assert context_table(nats, np.zeros(1001, np.int32)) == [(0, 1001, (2**24 + 1000) / 1001)]

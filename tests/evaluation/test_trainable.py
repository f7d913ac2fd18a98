from typing import Any

import pytest

from lib.evaluation.trainable import GROUPS, describe_groups, match_groups
from lib.model.gpt import outline
from lib.model.parts import parts_of
from tests.evaluation.tiny import MODEL

PR585 = {"vocab_size": 1024, "num_layers": 11, "model_dim": 512, "num_heads": 8, "num_kv_heads": 8, "mlp_hidden_dim": 1792, "rope_dims": 16,
         "num_xsa_layers": 11, "bigram_rows": 8192, "bigram_dim": 128, "value_embedding_dim": 128, "value_embedding_layers": [9, 10]}
PR410 = PR585 | {"num_kv_heads": 4, "mlp_hidden_dim": 1536, "bigram_rows": 2048, "num_xsa_layers": 4}


def sizes_of(model: dict[str, Any]) -> dict[str, int]:
    return {name: parameter.numel() for name, parameter in outline(MODEL | model).named_parameters()}


def find(groups: list[str], model: dict[str, Any]) -> dict[str, list[str]]:
    return match_groups(groups, parts_of(outline(MODEL | model)))


@pytest.mark.parametrize(("model", "groups", "expected"), [
    (PR585, ["last_2_blocks", "scales"], 5_780_500),
    (PR410, ["block_scales", "residual_mix"], 22_528),
    (PR410, ["last_3_blocks", "block_scales", "residual_mix", "embedding"], 7_624_728),
])
def test_counts_of_the_reference_systems(model: dict[str, Any], groups: list[str], expected: int) -> None:
    sizes = sizes_of(model)
    members = find(groups, model)
    assert sum(sizes[name] for name in set().union(*members.values())) == expected
    assert f"{expected:,} parameters" in describe_groups(members, sizes)


def test_each_group_has_its_parameters() -> None:
    options: dict[str, Any] = {"tied_head": False, "skip_gates": True, "attention_gate": True, "parallel_from": 2}
    sizes = sizes_of(options)
    members = find([*GROUPS, "last_3_blocks"], options)
    assert {group: len(names) for group, names in members.items()} == {
        "scales": 2 * 3 + 1 + 2, "block_scales": 6, "residual_mix": 3, "q_gain": 3, "skip_weights": 2, "attention_gate": 3,
        "lanes": 2, "smear_gate": 1, "embedding": 1, "head": 1, "bigram": 3, "value_embedding": 4, "all": len(sizes),
        "last_3_blocks": 3 * 11 + 2}
    assert set(members["last_3_blocks"]) == {name for name in sizes if name.startswith("blocks.")}


def test_what_is_trained_is_said_with_exact_numbers_and_no_parameter_twice() -> None:
    """The scales of the last block, twice 16, belong to both groups."""
    sizes = sizes_of({})
    block = 16 * (16 + 8 + 8 + 16) + 2 * 16 * 24 + 2 + 2 * 16 + 2 * 16  # attention, MLP, gains, scales, residual mix
    scales = 3 * 2 * 16 + 1 + 1 + 2  # of the blocks, the bigram and the value embedding
    assert describe_groups(find(["last_1_blocks", "scales"], {}), sizes) == (
        f"17 tensors, {block + scales - 32:,} parameters (last_1_blocks {block:,}, scales {scales})")


def test_last_one_of_eleven_blocks_is_the_eleventh_only() -> None:
    assert {name.split(".")[1] for name in find(["last_1_blocks"], PR585)["last_1_blocks"]} == {"10"}


@pytest.mark.parametrize("group", ["head", "last_4_blocks"])  # a tied head is the embedding; the model has 3 blocks
def test_a_group_without_parameters_is_an_error_that_names_those_that_have_some(group: str) -> None:
    with pytest.raises(ValueError, match=f"{group}: matches no parameter of this model, which has 3 blocks .*embedding, bigram"):
        find([group], {})


@pytest.mark.parametrize("group", ["norm", "last_0_blocks", "last__blocks"])
def test_an_unknown_group_is_an_error_that_lists_the_names(group: str) -> None:
    with pytest.raises(ValueError, match=rf"{group}: expected one of scales, .*last_N_blocks"):
        find([group], {})

from typing import Any

import pytest
import torch

from lib.artifacts.files import ArtifactError
from lib.model.config import ModelParams, parse_model
from lib.published.layout import check_model, infer_model
from lib.published.reader import LAYER_SCALES
from tests.evaluation.tiny import MODEL
from tests.published.published_files import make_state

UNTOLD = {"rope_dims", "rope_base", "rope_trained_tokens", "q_gain_init", "num_xsa_layers", "ln_scale", "logit_softcap",
          "embedding_init_std", "bos_id", "document_mask", "mlp_negative_slope", "loop"}
VARIANTS: list[dict[str, Any]] = [
    {}, {"num_kv_heads": 2, "num_layers": 11, "mlp_hidden_dim": 48}, {"num_heads": 4, "num_kv_heads": 2, "value_embedding_layers": [0]},
    {"bigram_rows": 0, "smear_gate": False}, {"value_embedding_dim": 0, "value_embedding_layers": [], "tied_head": False},
    {"unet_skips": False, "residual_mix": False},
]


def shapes_of(**changes: Any) -> dict[str, tuple[int, ...]]:
    """Published name -> shape, layer scales joined."""
    shapes = {name: tuple(tensor.shape) for name, tensor in make_state(MODEL | changes).items()}
    scales = [shapes.pop(name) for name in list(shapes) if name.startswith(LAYER_SCALES)]
    return shapes | ({LAYER_SCALES: (len(scales),)} if scales else {})


def params_of(**changes: Any) -> ModelParams:
    return parse_model(MODEL | changes, "model.")


@pytest.mark.parametrize("changes", VARIANTS)
def test_shapes_tell_the_architecture_and_fit_it(changes: dict[str, Any]) -> None:
    model = MODEL | changes
    found = infer_model(shapes_of(**changes))
    layers = found.pop("value_embedding_layers")
    assert layers == len(model["value_embedding_layers"])
    assert found == {key: model[key] for key in found}
    assert MODEL.keys() - found.keys() - {"value_embedding_layers"} == UNTOLD | ({"bigram_dim"} if not model["bigram_rows"] else set())
    check_model(shapes_of(**changes), params_of(**changes))


@pytest.mark.parametrize("changes", [
    {"num_layers": 4, "mlp_hidden_dim": 32, "smear_gate": False}, {"vocab_size": 64, "tied_head": False, "residual_mix": False},
    {"num_heads": 4, "bigram_rows": 0, "unet_skips": False}, {"num_kv_heads": 2, "bigram_dim": 8, "value_embedding_dim": 8},
    {"value_embedding_layers": [2]}, {"model_dim": 32}, {"skip_gates": True, "attention_gate": True, "parallel_from": 2},
])
def test_every_key_that_contradicts_the_file_is_named(changes: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError) as caught:
        check_model(shapes_of(), params_of(**changes))
    lines = str(caught.value).splitlines()[1:]
    if changes.get("value_embedding_layers"):
        assert lines == ["model.value_embedding_layers: the file has 2 layers, found 1 layers"]
    else:
        assert set(lines) == {f"model.{key}: the file has {MODEL[key]}, found {value}" for key, value in changes.items()}


def test_every_unknown_name_missing_name_and_wrong_shape_is_named() -> None:
    shapes = shapes_of() | {"blocks.1.attn.c_v.weight": (8, 17), "blocks.0.attn.vr_lambda": (2,), "skip_weights": (2, 16),
                            "bigram.scale": (1,)}
    del shapes["blocks.2.mlp_scale"], shapes["bigram.proj.weight"], shapes["ve_shared.scale"]
    with pytest.raises(ArtifactError) as caught:
        check_model(shapes, params_of())
    assert str(caught.value).splitlines()[1:] == [
        "bigram.proj.weight: expected (16, 4), found nothing", "bigram.scale: expected (), found (1,)",
        "blocks.0.attn.vr_lambda: expected nothing, found (2,)", "blocks.1.attn.c_v.weight: expected (8, 16), found (8, 17)",
        "blocks.2.mlp_scale: expected (16,), found nothing", "skip_weights: expected (1, 16), found (2, 16)",
        "ve_shared.scale: expected (), found nothing"]


@pytest.mark.parametrize("name", ["tok_emb.weight", "blocks.0.attn.q_gain", "blocks.0.attn.c_k.weight", "blocks.0.mlp.fc.weight",
                                  "bigram.embed.weight", "ve_shared.embed.weight", LAYER_SCALES])
@pytest.mark.parametrize("shape", [None, (), (0,), (0, 0), (2, 3, 4)])
def test_what_is_no_such_model_is_refused(name: str, shape: tuple[int, ...] | None) -> None:
    shapes = shapes_of() | ({name: shape} if shape is not None else {})
    if shape is None:
        del shapes[name]
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.") if shape is not None else "of another model than #585|contradict"):
        check_model(shapes, params_of())


def test_a_projection_between_equal_widths_may_be_missing() -> None:
    """As the scripts leave it out; others must be there."""
    for changes, name in (({"value_embedding_dim": 8}, "ve_shared.proj.weight"), ({"bigram_dim": 16}, "bigram.proj.weight")):
        shapes = shapes_of(**changes)
        check_model(shapes, params_of(**changes))
        del shapes[name]
        check_model(shapes, params_of(**changes))
        with pytest.raises(ArtifactError, match=f"{name}: expected .*, found nothing"):
            check_model({key: shape for key, shape in shapes_of().items() if key != name}, params_of())
    with pytest.raises(ArtifactError, match=r"blocks.0.attn.proj.weight: expected \(16, 16\), found nothing"):
        check_model({key: shape for key, shape in shapes_of().items() if key != "blocks.0.attn.proj.weight"}, params_of())


def test_a_model_of_another_kind_is_shown() -> None:
    with pytest.raises(ArtifactError, match=r"there are layer0 \(2,\), .*, layer4 \(2,\), and 4 more$"):
        infer_model({f"layer{number}": (2,) for number in range(9)})


def test_a_preset_has_the_published_number_of_parameters() -> None:
    """Names and shapes in the tests' own layout are those of #585: as many parameters as it reports."""
    with torch.device("meta"):
        state = make_state(MODEL | {
            "vocab_size": 1024, "num_layers": 11, "model_dim": 512, "num_heads": 8, "num_kv_heads": 8, "mlp_hidden_dim": 1792,
            "bigram_rows": 8192, "bigram_dim": 128, "value_embedding_dim": 128, "value_embedding_layers": [9, 10]})
    assert sum(tensor.numel() for tensor in state.values()) == 33_580_124

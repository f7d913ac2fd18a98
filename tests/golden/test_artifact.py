"""An artifact of before gives the model that it always was; tests/golden/artifact/README.md says what it is."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lib.artifacts.quantized import QuantizedModel, to_tensors
from lib.compression.container import load_artifact, pack
from lib.model.config import NEUTRAL
from lib.model.gpt import GPT, build_model
from lib.params import ParamsError

FOLDER = Path(__file__).parent / "artifact"
EXPECTED: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text())
TOKENS = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def artifact() -> QuantizedModel:
    return load_artifact(FOLDER / "model.ptz")


def rebuild(artifact: QuantizedModel, model: dict[str, Any], folder: Path) -> GPT:
    """By way of a file with another configuration."""
    path = folder / "model.ptz"
    path.write_bytes(pack(dataclasses.replace(artifact, model=model), "range", 22).blob)
    changed = load_artifact(path)
    return build_model(changed.model, changed.weights())


def hash_tensors(artifact: QuantizedModel) -> str:
    digest, (matrices, vectors) = hashlib.sha256(), to_tensors(artifact)
    for name, matrix in sorted(matrices.items()):
        digest.update(json.dumps([name, list(matrix.codes.shape), matrix.bits]).encode())
        for tensor in (matrix.codes, matrix.row_exponents, matrix.column_exponents):
            digest.update(tensor.numpy().astype("<i2").tobytes())
    for name, vector in sorted(vectors.items()):
        digest.update(json.dumps([name, list(vector.shape), str(vector.dtype)]).encode() + vector.numpy().tobytes())
    return digest.hexdigest()


def test_it_holds_what_was_written(artifact: QuantizedModel) -> None:
    assert (artifact.model, hash_tensors(artifact)) == (EXPECTED["model"], EXPECTED["tensors_sha256"])
    assert {matrix.bits for matrix in to_tensors(artifact)[0].values()} == {None, 5, 6}
    assert build_model(artifact.model, artifact.weights())(TOKENS[:, :-1], TOKENS[:, 1:]).isfinite().all()


@pytest.mark.parametrize("key", NEUTRAL)
def test_without_a_key_that_came_later_it_is_the_model_from_before(artifact: QuantizedModel, tmp_path: Path, key: str) -> None:
    model = rebuild(artifact, {name: value for name, value in artifact.model.items() if name != key}, tmp_path)
    assert getattr(model.params, key) == NEUTRAL[key]
    assert torch.equal(model.logits(TOKENS), build_model(artifact.model | {key: NEUTRAL[key]}, artifact.weights()).logits(TOKENS))


@pytest.mark.parametrize(("without", "added", "message"), [
    ("rope_base", {}, r"^model configuration: rope_base: missing"), ("", {"bigram_row": 5}, r": bigram_row: unknown key; did you mean"),
    ("", {"document_mask": None}, r": document_mask: expected true or false, found null")])
def test_what_is_unknown_or_has_no_neutral_value_is_refused_by_name(artifact: QuantizedModel, tmp_path: Path, without: str,
                                                                    added: dict[str, Any], message: str) -> None:
    changed = {name: value for name, value in artifact.model.items() if name != without} | added
    with pytest.raises(ParamsError, match=message):
        rebuild(artifact, changed, tmp_path)

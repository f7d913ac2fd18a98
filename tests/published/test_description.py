import re
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

from lib.published.description import describe_import, describe_published
from lib.published.reader import read_published
from tests.evaluation.tiny import MODEL
from tests.published.published_files import make_state, quantize_state, to_artifact, to_bytes, write

STATE = make_state()
NUM_PARAMETERS = sum(map(torch.numel, STATE.values()))


def test_a_checkpoint_with_its_architecture(tmp_path: Path) -> None:
    state = {name: tensor.bfloat16() for name, tensor in STATE.items()}
    path = write(tmp_path / "x.pt", to_bytes(state | {"mtp_heads.0.w": torch.ones(9)}))
    text = describe_published(path)
    assert text.splitlines()[:3] == [f"file        {path}, {path.stat().st_size:,} bytes",
                                     f"SHA-256     {read_published(path).sha256}", "kind        float checkpoint"]
    assert f"parameters  {NUM_PARAMETERS:,} in {len(STATE) - 1} tensors\nleft out    mtp_heads.0.w\n" in text
    assert re.search(r"\nblocks\.1\.mlp\.fc\.weight +24 x 16  bfloat16\n", text) and re.search(r"\nbigram\.scale +scalar  bfloat16\n", text)
    assert "2 layers with the value embedding; shapes do not tell which" in text
    told = YAML(typ="safe", pure=True).load(text[text.index("# of the section"):])["model"]
    assert told == {key: MODEL[key] for key in told}
    untold = re.search("shapes do not tell: (.*)", text)
    assert untold is not None and set(untold[1].split(", ")) == MODEL.keys() - told.keys()
    assert {"rope_dims", "value_embedding_layers"} <= set(untold[1].split(", ")) and "num_layers" in told


def test_an_artifact_with_the_range_of_its_codes(tmp_path: Path) -> None:
    text = describe_published(write(tmp_path / "x.ptz", to_artifact(*quantize_state(STATE))))
    assert "kind        quantized artifact" in text and "left out" not in text
    assert re.search(r"\nblocks\.1\.mlp\.fc\.weight +24 x 16  codes -15\.\.15, scales float16\n", text)
    assert re.search(r"\ntok_emb\.weight +32 x 16  codes -127\.\.127, scales float16\n", text)


@pytest.mark.parametrize("state", [{"layers.0.weight": torch.ones(2, 3)}, {}])
def test_other_models_are_shown_with_why_they_are_none(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    text = describe_published(write(tmp_path / "x.pt", to_bytes(state)))
    assert ("layers.0.weight  2 x 3  float32" in text) == bool(state)
    there = "layers.0.weight (2, 3)" if state else "no other tensors"
    assert text.endswith("a checkpoint of another model than #585, #410 and the starting script: tok_emb.weight: expected 2 dimensions, "
                         f"none empty, found nothing; there are {there}")


def test_what_came_of_an_import(tmp_path: Path) -> None:
    checkpoint = read_published(write(tmp_path / "x", to_bytes(STATE | {"mtp_heads.0.w": torch.ones(9)})))
    assert describe_import(checkpoint, 7, None).splitlines() == [
        f"imported float checkpoint of {NUM_PARAMETERS:,} parameters as seed 7", "left out, not part of the model: mtp_heads.0.w",
        "go on with:", "  dvc commit --force train@7", "  make repro"]
    artifact = read_published(write(tmp_path / "x", to_artifact(*quantize_state(STATE))))
    assert f"published file {artifact.num_bytes:,} bytes, packed by compress 1,000 bytes (-" in describe_import(artifact, 7, 1000)

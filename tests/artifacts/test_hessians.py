from pathlib import Path

import pytest
import torch

from lib.artifacts.checkpoint import Checkpoint, save_checkpoint
from lib.artifacts.files import ArtifactError
from lib.artifacts.hessians import Hessians, Moments, load_hessians, save_hessians
from tests.artifacts.quantized_models import TRAINING

INPUTS = {"blocks.0.attention.input": ("query.weight", "key.weight"), "head": ("head.weight",),
          "token_embedding": ("token_embedding.weight",)}


def make_moments(seed: int) -> Moments:
    generator = torch.Generator().manual_seed(seed)
    return Moments({source: torch.rand(3, 3, generator=generator) for source in INPUTS},
                   {name: torch.rand(5, generator=generator) for names in INPUTS.values() for name in names},
                   {} if seed else {"head.weight": torch.rand(5, 5, generator=generator)})


def test_round_trip_and_same_bytes(tmp_path: Path) -> None:
    hessians = Hessians(INPUTS, make_moments(0), make_moments(1))
    save_checkpoint(tmp_path / "checkpoint", Checkpoint({"a": torch.ones(2)}, {}, TRAINING))
    save_hessians(tmp_path / "hessians", hessians, tmp_path / "checkpoint")
    found = load_hessians(tmp_path / "hessians", tmp_path / "checkpoint")
    assert found.inputs == INPUTS
    for moments, expected in ((found.calibration, hessians.calibration), (found.verification, hessians.verification)):
        for values, originals in zip(vars(moments).values(), vars(expected).values(), strict=True):
            assert values.keys() == originals.keys()
            assert all(torch.equal(value, originals[name]) for name, value in values.items())
    save_hessians(tmp_path / "again", found, tmp_path / "checkpoint")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "hessians").read_bytes()


def test_other_files_are_errors(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint", Checkpoint({"a": torch.ones(2)}, {}, TRAINING))
    with pytest.raises(ArtifactError, match="checkpoint: not the Hessians of a model"):
        load_hessians(tmp_path / "checkpoint", tmp_path / "checkpoint")

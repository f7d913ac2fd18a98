from pathlib import Path

import pytest
import torch

from lib.artifacts.checkpoint import Checkpoint, save_checkpoint
from lib.artifacts.files import ArtifactError
from lib.artifacts.hessians import Hessians, load_hessians, save_hessians


def test_round_trip(tmp_path: Path) -> None:
    inputs = {"blocks.0.attention.input": ("query.weight", "key.weight"), "head": ("head.weight",)}
    hessians = Hessians(inputs, {name: torch.rand(3, 3) for name in inputs}, {name: torch.rand(3, 3) for name in inputs})
    save_hessians(tmp_path / "hessians", hessians)
    found = load_hessians(tmp_path / "hessians")
    assert found.inputs == inputs
    for name in inputs:
        assert torch.equal(found.calibration[name], hessians.calibration[name])
        assert torch.equal(found.verification[name], hessians.verification[name])


def test_other_files_are_errors(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint", Checkpoint({"a": torch.ones(2)}, {}, {}))
    with pytest.raises(ArtifactError, match="checkpoint: not the Hessians of a model"):
        load_hessians(tmp_path / "checkpoint")

"""State files: named by what decides the result, read without executing anything."""

from pathlib import Path

import pytest
import torch

from lib.artifacts.files import ArtifactError
from lib.training.resume import load_resume, resume_file, save_resume


def test_another_run_has_another_file(tmp_path: Path) -> None:
    identity = {"train": {"lr": 0.1, "steps": 3}, "seed": 1}
    same = {"seed": 1, "train": {"steps": 3, "lr": 0.1}}
    assert resume_file(tmp_path, identity) == resume_file(tmp_path, same)
    assert resume_file(tmp_path, identity) != resume_file(tmp_path, {**identity, "seed": 2})
    assert resume_file(tmp_path, identity) != resume_file(tmp_path, {**identity, "train": {"lr": 0.2, "steps": 3}})


def test_state_round_trips_and_absence_is_none(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "resume.pt"
    assert load_resume(path) is None
    save_resume(path, {"weights": torch.arange(3.0), "curve": [(1, 2.0)], "steps": 4})
    state = load_resume(path)
    assert state is not None
    assert torch.equal(state.pop("weights"), torch.arange(3.0))
    assert state == {"curve": [(1, 2.0)], "steps": 4}
    assert [file.name for file in path.parent.iterdir()] == ["resume.pt"]


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("executed",)


def test_a_foreign_file_is_not_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "resume.pt"
    torch.save({"weights": _Bomb()}, path)
    with pytest.raises(ArtifactError, match="found a damaged file"):
        load_resume(path)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_a_damaged_file_is_named(tmp_path: Path, part: float) -> None:
    path = tmp_path / "resume.pt"
    save_resume(path, {"weights": torch.arange(1000.0)})
    content = path.read_bytes()
    path.write_bytes(content[:int(part * len(content))])
    with pytest.raises(ArtifactError, match=r"resume\.pt: .* delete it to train from the beginning"):
        load_resume(path)

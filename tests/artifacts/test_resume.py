"""State files: named by what decides the result, read without executing anything."""

from pathlib import Path

import pytest
import torch

from lib.artifacts.files import ArtifactError
from lib.artifacts.resume import load_resume, save_resume
from lib.training.resume import resume_file
from tests.training.tiny import make_model, make_params


def test_another_run_has_another_file(tmp_path: Path) -> None:
    params, model = make_params(), make_model().params
    names = [resume_file(tmp_path, params, model, 1, "a"), resume_file(tmp_path, params, model, 2, "a"),
             resume_file(tmp_path, params, model, 1, "b"), resume_file(tmp_path, make_params(budget_steps=31), model, 1, "a"),
             resume_file(tmp_path, params, make_model(num_layers=2, value_embedding_layers=[1]).params, 1, "a")]
    assert len(set(names)) == len(names)
    assert resume_file(tmp_path, make_params(averaging={"select": "raw"}), make_model(seed=3).params, 1, "a") == names[0]


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
    with pytest.raises(ArtifactError, match=r"resume\.pt: .* delete it to start from the beginning"):
        load_resume(path)

from pathlib import Path

import pytest

from lib.artifacts.files import ArtifactError
from lib.artifacts.metrics import load_metrics, load_timing
from lib.artifacts.scores import load_curve, save_scores

LOG = [(0, 0, 15, 0, 15, 4, 0.01), (1, 16, 20, None, None, 0, 0.0)]


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    save_scores(tmp_path, {"ttt_bpb": 1.5}, {"seconds": 2.0}, {"ttt": [(10, 1.25), (20, 1 / 3)]}, {"ttt": LOG})
    assert load_metrics(tmp_path) == {"ttt_bpb": 1.5}
    assert load_timing(tmp_path) == {"seconds": 2.0}
    assert load_curve(tmp_path / "curves/running_ttt.csv", ("tokens", "bpb")) == [(10, 1.25), (20, 0.33333333)]
    assert (tmp_path / "adaptation/ttt.csv").read_text() == (
        "chunk,first_scored,last_scored,first_trained,last_trained,num_steps,lr\n0,0,15,0,15,4,0.01\n1,16,20,,,0,0.0\n")


def test_a_strategy_that_is_no_longer_used_leaves_nothing_behind(tmp_path: Path) -> None:
    save_scores(tmp_path, {}, {}, {"ttt": [(1, 1.0)]}, {"ttt": LOG})
    save_scores(tmp_path, {}, {}, {"plain": [(1, 1.0)]}, {})
    assert [path.name for path in (tmp_path / "curves").iterdir()] == ["running_plain.csv"]
    assert list((tmp_path / "adaptation").iterdir()) == []


@pytest.mark.parametrize(("content", "message"), [
    (None, "no such file; `dvc repro` makes it"), ("a,b\n1,2\n", "no column bpb, tokens"), ("tokens,bpb\n1,x\n", "expected numbers"),
])
def test_a_curve_that_cannot_be_used_is_an_error_with_its_path(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "curve.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ArtifactError, match=f"curve.csv: {message}"):
        load_curve(path, ("tokens", "bpb"))

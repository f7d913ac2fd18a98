import json
import resource
from pathlib import Path

import numpy as np
import pytest

from lib.artifacts.files import ArtifactError
from lib.artifacts.metrics import load_metrics, load_timing
from lib.artifacts.scores import Tables, load_curve, load_nats, save_audit, save_scores, save_tables, save_unfinished
from lib.evaluation.ledger import Event

LEDGER = [Event(0, "scored", -1, 0, 15), Event(1, "trained", -1, 0, 15, 4, 0.01), Event(2, "scored", 3, 16, 20)]
NATS = np.array([1.25, 1 / 3], np.float32)


def save(folder: Path, *names: str, curve: tuple[int, float] = (10, 1.25)) -> None:
    """Results of strategies with these names."""
    tables: list[Tables] = [{name: [row] for name in names} for row in (curve, (31, 10, 0.5), (16, 1, 10, 2.0))]
    curves, context, documents = tables
    save_scores(folder, {"val_bpb": 1.5, "strategy": "sliding", "sliding_bpb": 1.5}, {"seconds": 2.0}, curves=curves, context=context,
                documents=documents, ledgers=dict.fromkeys(names, LEDGER), nats=dict.fromkeys(names, NATS))


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    save(tmp_path, "plain", "lora", curve=(20, 1 / 3))
    assert load_metrics(tmp_path) == {"val_bpb": 1.5, "strategy": "sliding", "sliding_bpb": 1.5}
    assert load_timing(tmp_path) == {"seconds": 2.0}
    for name in ("plain", "lora"):
        assert load_curve(tmp_path / f"curves/{name}.csv", ("tokens", "bpb")) == [(20, 0.33333333)]
        assert (tmp_path / f"context/{name}.csv").read_text() == "context,tokens,loss\n31,10,0.5\n"
        assert (tmp_path / f"documents/{name}.csv").read_text() == "length,documents,bytes,bpb\n16,1,10,2.0\n"
        assert (tmp_path / f"ledger/{name}.csv").read_text() == (
            "step,kind,state,first,last,num_steps,lr\n0,scored,-1,0,15,0,0.0\n1,trained,-1,0,15,4,0.01\n2,scored,3,16,20,0,0.0\n")
        assert load_nats(tmp_path, name).tobytes() == NATS.tobytes()
    assert files(tmp_path) == {"metrics.json", "timing.json", "nats/plain.npy", "nats/lora.npy"} | {
        f"{folder}/{name}.csv" for folder in ("curves", "context", "documents", "ledger") for name in ("plain", "lora")}


def test_losses_have_eight_digits_and_counts_all(tmp_path: Path) -> None:
    save_tables(tmp_path / "tables", {"a": [(123_456_789_012, 2 / 3, "x"), (1, 5e-5, "y")]}, ("n", "loss", "name"))
    assert (tmp_path / "tables/a.csv").read_text() == "n,loss,name\n123456789012,0.66666667,x\n1,5e-05,y\n"


def test_a_strategy_that_is_no_longer_used_leaves_nothing_behind(tmp_path: Path) -> None:
    save(tmp_path, "plain", "lora")
    save(tmp_path, "sliding")
    assert files(tmp_path) == {"metrics.json", "timing.json", "nats/sliding.npy", *(
        f"{folder}/sliding.csv" for folder in ("curves", "context", "documents", "ledger"))}


def test_the_curves_of_a_run_that_was_too_slow_stay_until_one_is_not(tmp_path: Path) -> None:
    save(tmp_path, "plain")
    save_unfinished(tmp_path, {"plain": [(10, 1.25)], "sliding": [(5, 1 / 3)]})
    assert (tmp_path / "unfinished/plain.csv").read_text() == "tokens,bpb\n10,1.25\n"
    assert (tmp_path / "unfinished/sliding.csv").read_text() == "tokens,bpb\n5,0.33333333\n"
    assert "curves/plain.csv" in files(tmp_path)
    save_unfinished(tmp_path, {"plain": []})
    assert not (tmp_path / "unfinished/sliding.csv").exists()
    save(tmp_path, "plain")
    assert not (tmp_path / "unfinished").exists()


def test_the_audit_is_written_as_it_is(tmp_path: Path) -> None:
    audit = {"legal": True, "checks": [{"name": "C1", "largest": 0.1234567891234}]}
    save_audit(tmp_path, audit)
    assert json.loads((tmp_path / "audit.json").read_text()) == audit
    save(tmp_path, "plain")
    assert (tmp_path / "audit.json").exists()


@pytest.mark.parametrize(("content", "message"), [
    (None, "no such file; `dvc repro` makes it"), ("a,b\n1,2\n", "no column bpb, tokens"), ("tokens,bpb\n1,x\n", "expected numbers"),
])
def test_a_curve_that_cannot_be_used_is_an_error_with_its_path(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "curve.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ArtifactError, match=f"curve.csv: {message}"):
        load_curve(path, ("tokens", "bpb"))


def test_a_full_disk_leaves_the_old_results_as_they_were(tmp_path: Path) -> None:
    """No file may grow beyond a limit, which the system refuses as it refuses a full disk; the last of the tables is larger."""
    save(tmp_path, "plain")
    save_audit(tmp_path, {"legal": True})
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match=r"cannot be written .*; make room and rerun"):
            save_scores(tmp_path, {"val_bpb": 9.0}, {"seconds": 9.0}, curves={"plain": [(20, 9.0)]}, context={}, documents={},
                        ledgers={"plain": LEDGER * 1000}, nats={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


@pytest.mark.parametrize("content", [b"", b"not an array", None])
def test_losses_that_cannot_be_read_are_named(tmp_path: Path, content: bytes | None) -> None:
    save(tmp_path, "plain")
    path = tmp_path / "nats/plain.npy"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"nats/plain.npy: expected the losses that evaluate writes"):
        load_nats(tmp_path, "plain")

import subprocess
import sys
from pathlib import Path

import pytest

from lib.artifacts.metrics import save_metrics
from lib.artifacts.scores import save_audit
from lib.audit.verdict import NOT_AUDITED
from lib.params import read_params
from lib.reporting.runs import UNRECORDED
from lib.reporting.summary import headline_rows, read_metrics
from lib.reporting.timing import timing_rows
from tests.reporting.results import make_lock, make_metrics, write_evaluation, write_lock, write_results
from tools.summary import main


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_one_seed_shows_its_values_and_what_to_compare_them_with(capsys: pytest.CaptureFixture[str]) -> None:
    write_results([1337])
    main()
    assert capsys.readouterr().out == """\
                               seed 1337
validation bpb (val_bpb)          1.6500  score_first, 1,000,000 bytes of text
validation loss (val_loss)        2.4000  nats per token
artifact, bytes                  812,345  5.1% of the limit of 16,000,000
held-out bpb, float model         1.7000
held-out bpb, quantized model     1.7086  +0.0086
KL of the quantized model        0.00340  nats per token, held-out
bits per weight, coded              3.25

strategy        bpb  to sliding  legal                      seconds
plain        1.7200     +0.0400  not checked                    4.0
sliding      1.6800              not checked                    5.0
one_pass     1.6700     -0.0100  not checked                    3.0
score_first  1.6500     -0.0300  not checked                   21.0  scoring 6.0, adaptation 15.0
lora         1.6400     -0.0400  not checked                    9.0
two_phase    1.6000     -0.0800  no: trains before scoring     30.0
audit: NOT CHECKED (21 passed, 1 not checked: this kernel <cannot>)

                              seed 1337
seconds, tokenize                   4.0
seconds, train                    240.0  82.8% of the limit of 290
seconds, calibrate                  2.0  20.0% of the limit of 10
seconds, quantize                   1.0
seconds, compress                   3.0
seconds, evaluate                  60.0  10.0% of the limit of 600
seconds, all stages               310.0
peak memory of evaluate, MiB        512
"""


def test_several_seeds_have_means_and_sample_deviations_then_a_line_each_and_the_test(capsys: pytest.CaptureFixture[str]) -> None:
    write_results([5, 7, 1337], record=2.5)
    main()
    headline, seeds, test, strategies, times = capsys.readouterr().out.split("\n\n")
    assert headline.splitlines()[:5] == [
        "                                  mean      std",
        "validation bpb (val_bpb)        1.6600   0.0100  score_first, 1,000,000 bytes of text",
        "validation loss (val_loss)      2.4100   0.0100  nats per token",
        "artifact, bytes                812,346        1  5.1% of the limit of 16,000,000",
        "held-out bpb, float model       1.7100   0.0100"]
    assert seeds == """\
           val_bpb  val_loss  held-out bpb    bytes  train, s  evaluate, s
seed 5      1.6500    2.4000        1.7086  812,345     240.0         60.0
seed 7      1.6600    2.4100        1.7186  812,346     240.0         60.0
seed 1337   1.6700    2.4200        1.7286  812,347     240.0         60.0"""
    assert test == """\
record of 2.5000 nats per token: beats the record by at least 0.005 nats at p < 0.01
mean 2.4100, std 0.0100, t = -14.72, p = 0.0023, true mean below 2.4502 with 0.99 confidence"""
    assert strategies.startswith("strategy ")
    assert [line.split()[:3] for line in times.splitlines()[:2]] == [["mean", "std"], ["seconds,", "tokenize", "4.0"]]


def test_results_of_several_runs_are_not_summarized(capsys: pytest.CaptureFixture[str]) -> None:
    write_results([1, 2])
    lock = make_lock([1, 2])
    lock["stages"]["evaluate@2"]["params"]["params.yaml"]["evaluate"] = {"limit_seconds": 60.0}
    write_lock(lock)
    with pytest.raises(SystemExit, match=r"evaluate@2: evaluate\.limit_seconds: expected 600\.0 as in params\.yaml, found 60\.0"):
        main()
    assert not capsys.readouterr().out


def test_outputs_from_the_cache_have_no_time_of_their_own() -> None:
    write_results([1])
    save_metrics(Path("artifacts/train/seed1"), {"heldout_bpb": 1.0}, {"seconds": 9.0})
    Path("artifacts/train/seed1/metrics.json").write_text('{"heldout_bpb": 2.0}')  # as DVC checks it out; timing.json stays
    Path("artifacts/quantize/seed1/timing.json").unlink()
    rows = {row.label: row for row in timing_rows(read_params())}
    for stage in ("train", "quantize"):
        assert (rows[f"seconds, {stage}"].cells(), rows[f"seconds, {stage}"].note) == (["-"], "from cache")
    assert rows["seconds, evaluate"].cells() == ["60.0"]
    assert rows["seconds, all stages"].cells() == ["-"]


def test_stages_that_never_ran_are_left_out() -> None:
    """As those before quantize, where an artifact was imported."""
    write_results([1])
    for path in Path("artifacts/train/seed1").iterdir():
        path.unlink()
    assert [row.label for row in timing_rows(read_params())][:3] == ["seconds, tokenize", "seconds, calibrate", "seconds, quantize"]


@pytest.mark.parametrize("seeds", [[1], [1, 2]])
def test_results_without_a_record_of_dvc_are_shown_and_marked(seeds: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    write_results(seeds)
    main()
    recorded = capsys.readouterr().out
    Path("dvc.lock").unlink()
    main()
    assert capsys.readouterr().out == f"{UNRECORDED}\n\n{recorded}"


def test_one_seed_that_differs_from_its_record_is_shown_and_marked(capsys: pytest.CaptureFixture[str]) -> None:
    write_results([1])
    write_lock({"stages": {}})
    main()
    assert capsys.readouterr().out.startswith(f"{UNRECORDED}\n\n")


def test_the_headline_knows_no_times() -> None:
    write_results([1])
    headline = headline_rows(read_metrics([1]))
    for path in Path("artifacts").rglob("timing.json"):
        path.unlink()
    assert headline_rows(read_metrics([1])) == headline


def test_a_run_without_audit_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    write_results([1])
    save_audit(Path("artifacts/evaluate/seed1"), NOT_AUDITED)
    main()
    assert "\naudit: not audited\n" in capsys.readouterr().out


def test_only_the_strategies_that_ran_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    write_results([1])
    write_evaluation(1, 0, ("plain", "score_first"))
    write_lock(make_lock([1]))
    main()
    table = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert [line.split()[:3] for line in table[1:3]] == [["plain", "1.7200", "not"], ["score_first", "1.6500", "not"]]  # no difference
    assert table[3].startswith("audit")


def test_figures_that_a_run_has_not_are_a_dash() -> None:
    metrics = make_metrics(0)
    del metrics["quantize"]["heldout_kl"]
    row = next(row for row in headline_rows([metrics]) if row.label.startswith("KL"))
    assert row.cells() == ["-"]


def test_only_the_seeds_of_the_parameter_file_count() -> None:
    write_results([1, 2])
    write_results([2])
    assert len(read_metrics([2])) == 1


def test_results_that_are_missing_end_with_their_path(capsys: pytest.CaptureFixture[str]) -> None:
    write_results([1])
    Path("artifacts/evaluate/seed1/metrics.json").unlink()
    with pytest.raises(SystemExit, match=r"artifacts/evaluate/seed1/metrics.json: no such file; `dvc repro` makes it"):
        main()
    assert not capsys.readouterr().out


def test_the_table_needs_nothing_heavy() -> None:
    code = "import sys, tools.summary; print(sorted({'torch', 'numpy', 'scipy', 'matplotlib', 'jinja2'} & set(sys.modules)))"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout == "[]\n"

import subprocess
import sys
from pathlib import Path

import pytest

from lib.artifacts.metrics import save_metrics
from lib.reporting.summary import Row, format_table, headline_rows, main, read_metrics, timing_rows
from tests.reporting.results import make_metrics, write_results


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_one_seed_shows_its_values_and_what_to_compare_them_with(capsys: pytest.CaptureFixture[str]) -> None:
    write_results([1337])
    main()
    assert capsys.readouterr().out == """\
                                 seed 1337
held-out bpb, float model           1.7000
held-out bpb, quantized model       1.7086  +0.0086
KL of the quantized model          0.00340  nats per token, held-out
validation bpb, plain               1.7200
validation bpb, sliding windows     1.6800  -0.0400
validation bpb, score-first TTT     1.6500  -0.0300
artifact, bytes                    812,345  5.1% of the limit of 16,000,000
bits per weight, coded                3.25
seconds, tokenize                      4.0
seconds, train                       240.0
seconds, calibrate                     2.0
seconds, quantize                      1.0
seconds, compress                      3.0
seconds, evaluate                     60.0
seconds, all stages                  310.0
"""


def test_several_seeds_end_with_mean_and_sample_deviation() -> None:
    write_results([5, 7, 9])
    table = format_table(headline_rows(read_metrics([5, 7, 9])), [5, 7, 9]).splitlines()
    assert table[0].split() == ["seed", "5", "seed", "7", "seed", "9", "mean", "std"]
    assert table[1].split()[-5:] == ["1.7000", "1.7100", "1.7200", "1.7100", "0.0100"]
    assert {line.index("1.7") for line in (*table[1:3], table[4])} == {table[1].index("1.7")}  # columns stand under each other


def test_mean_and_deviation() -> None:
    assert Row("", (1.0, 2.0, 6.0), 1).cells() == ["1.0", "2.0", "6.0", "3.0", "2.6"]
    assert Row("", (1.0, None), 1).cells() == ["1.0", "-", "-", "-"]
    assert Row("", (1234.5,), 0).cells() == ["1,234"]


def test_outputs_from_the_cache_have_no_time_of_their_own() -> None:
    write_results([1])
    save_metrics(Path("artifacts/train/seed1"), {"heldout_bpb": 1.0}, {"seconds": 9.0})
    Path("artifacts/train/seed1/metrics.json").write_text('{"heldout_bpb": 2.0}')  # as DVC checks it out; timing.json stays
    Path("artifacts/quantize/seed1/timing.json").unlink()
    rows = {row.label: row for row in timing_rows([1])}
    for stage in ("train", "quantize"):
        assert (rows[f"seconds, {stage}"].cells(), rows[f"seconds, {stage}"].note) == (["-"], "from cache")
    assert rows["seconds, evaluate"].cells() == ["60.0"]
    assert rows["seconds, all stages"].cells() == ["-"]


def test_strategies_that_did_not_run_have_a_dash() -> None:
    metrics = make_metrics(0)
    del metrics["evaluate"]["ttt_bpb"]
    row = next(row for row in headline_rows([metrics]) if "TTT" in row.label)
    assert (row.cells(), row.note) == (["-"], "")


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
    code = "import sys, lib.reporting.summary; print(sorted({'torch', 'numpy', 'scipy', 'matplotlib', 'jinja2'} & set(sys.modules)))"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout == "[]\n"

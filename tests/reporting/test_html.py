import re
from pathlib import Path

import pytest

from lib.artifacts.files import ArtifactError
from lib.params import read_params
from lib.reporting.html import make_metrics, make_report
from lib.reporting.summary import read_metrics
from tests.reporting import results
from tests.reporting.results import write_results


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def report() -> str:
    params = read_params()
    return make_report(params["report"]["title"], params, read_metrics(params["seeds"]))


@pytest.mark.parametrize("seeds", [[1337], [1, 2]])
def test_the_report_holds_every_result(seeds: list[int]) -> None:
    write_results(seeds)
    html = report()
    text = " ".join(re.sub(r"(?s)<style>.*?</style>|<[^>]*>", " ", html).split())
    for part in (f"Seed{'s' if seeds[1:] else ''} {', '.join(map(str, seeds))} ·", "1.7086", "5.1% of the limit",
                 "812,345 of 16,000,000 bytes",
                 "blocks.2.mlp.up.weight", "10 × 20 gptq free + rank 2 0.012 95 3.80 1500.00 0.00300 0.30",
                 "token_embedding.weight 16 × 10 gptq 8 0.5 130 6.50 100.00 0.00010 1.00",
                 "head.weight 4 × 10 fp16 16 0.00 0.00000", "its sum is 0.00310 nats per token", "on held-out text 0.00340",
                 "num_layers 2", "bits.mlp 5", "packages numpy, scipy", "tied_head true", "budget_steps null",
                 f"seeds {', '.join(map(str, seeds))}", "mlp 3 600 free 500,000 4.50 61.6%"):
        assert part in text
    assert len(re.findall('<img src="data:image/svg', html)) == 3


def test_the_report_is_one_file_the_same_each_time() -> None:
    write_results([1, 2])
    html = report()
    assert html == report()
    assert re.findall(r'(?:src|href)="(?!data:)|url\(|https?://', html) == []


def test_times_are_not_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    write_results([1])
    html = report()
    monkeypatch.setattr(results, "SECONDS", dict.fromkeys(results.SECONDS, 1234.5))
    write_results([1])
    assert report() == html


def test_names_are_escaped() -> None:
    write_results([1])
    assert "<h1>A run &amp; its &lt;numbers&gt;</h1>" in report()


def test_a_missing_table_is_an_error_with_its_path() -> None:
    write_results([1])
    Path("artifacts/quantize/seed1/tensors.csv").write_text("name\n")
    with pytest.raises(ArtifactError, match=r"artifacts/quantize/seed1/tensors.csv: no column bits, coded_bytes"):
        report()


def test_figures_of_all_seeds_become_mean_and_deviation() -> None:
    write_results([1, 2])
    metrics = make_metrics(read_metrics([1, 2]))
    assert metrics["evaluate"]["ttt_bpb"] == {"mean": 1.655, "std": round(0.01 / 2**0.5, 8)}
    assert metrics["train"].keys() == {"heldout_bpb", "num_parameters", "num_steps"}  # `selected` is no number
    assert make_metrics(read_metrics([1]))["evaluate"]["ttt_bpb"] == {"mean": 1.65}

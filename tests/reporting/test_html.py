import base64
import json
import math
import re
from functools import cache
from pathlib import Path

import pytest

from lib.artifacts.files import ArtifactError, read_csv
from lib.artifacts.metrics import save_metrics
from lib.artifacts.scores import save_audit
from lib.audit.verdict import NOT_AUDITED
from lib.params import load_params, read_params
from lib.reporting.config import ReportParams
from lib.reporting.html import TENSOR_COLUMNS, bytes_per_bit, make_metrics, make_report
from lib.reporting.runs import UNRECORDED
from lib.reporting.summary import read_metrics
from tests.reporting import results
from tests.reporting.results import make_audit, write_evaluation, write_results
from tests.reporting.test_figures import texts

pytestmark = pytest.mark.xdist_group("html")  # reports are made once for all tests of this file

LEARNING = "Training and held-out loss against training tokens"
STRATEGIES = ["plain", "sliding", "one_pass", "two_phase (not legal)", "score_first", "lora"]


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def report(*, recorded: bool = True) -> str:
    params = read_params()
    return make_report(load_params("report", ReportParams), params, read_metrics(params["seeds"]), recorded=recorded)


@cache
def standard_report(*seeds: int) -> str:
    """The report on results as they are written for `seeds`."""
    write_results(list(seeds))
    return report()


def visible(html: str) -> str:
    return " ".join(re.sub(r"(?s)<style>.*?</style>|<script>.*?</script>|<[^>]*>", " ", html).split())


def figures(html: str) -> dict[str, list[str]]:
    """Description of each figure -> texts in it."""
    found = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]*)" alt="([^"]*)">', html)
    return {alt: texts(base64.b64decode(image).decode()) for image, alt in found}


def test_results_without_a_record_are_marked() -> None:
    write_results([1337])
    assert [UNRECORDED in visible(report(recorded=recorded)) for recorded in (True, False)] == [False, True]


@pytest.mark.parametrize("seeds", [[1337], [1, 2]])
def test_the_report_holds_every_result(seeds: list[int]) -> None:
    text = visible(standard_report(*seeds))
    for part in (f"Seed{'s' if seeds[1:] else ''} {', '.join(map(str, seeds))} ·", "1.7086", "5.1% of the limit",
                 "812,345 of 16,000,000 bytes",
                 "blocks.2.mlp.up.weight", "10 × 20 gptq free + rank 2 0.012 95 3.80 1500.00 48.4% 0.00300 0.30",
                 "token_embedding.weight 16 × 10 gptq 8 0.5 130 6.50 100.00 3.2% 0.00010 1.00",
                 "head.weight 4 × 10 fp16 16 0.00 0.0% 0.00000", "its sum is 0.00310 nats per token", "on held-out text 0.00340",
                 "num_layers 2", "bits.mlp 5", "bits_of {}", "packages numpy, scipy", "tied_head true", "budget_steps null",
                 f"seeds {', '.join(map(str, seeds))}", "mlp 3 600 free 500,000 4.50 61.6%"):
        assert part in text


def test_strategies_are_compared_and_the_one_that_counts_stands_out() -> None:
    html = standard_report(1337)
    assert ("strategy bits per byte to sliding trains on the text legal plain 1.7200 +0.0400 no not checked sliding 1.6800 no "
            "not checked one_pass 1.6700 -0.0100 no not checked score_first 1.6500 -0.0300 after scoring it not checked "
            "lora 1.6400 -0.0400 after scoring it not checked "
            "two_phase 1.6000 -0.0800 before scoring it no: trains before scoring") in visible(html)
    assert [visible(row).split()[0] for row in re.findall('(?s)<tr class="total">.*?</tr>', html)] == ["score_first", "all"]


def test_figures_show_every_strategy() -> None:
    found = figures(standard_report(1337))
    assert list(found) == [
        "Bits per byte after each step", LEARNING, "Running bits per byte against scored tokens",
        "Difference of running bits per byte against scored tokens", "Loss against number of inputs",
        "Difference of bits per byte against length of document", "Bits per byte of single documents against their length",
        "Predicted loss and relative error of every matrix", "Bytes for each bit of predicted loss of every matrix"]
    for of_figure in list(found.values())[2:6]:
        assert sorted(text for text in of_figure if text in STRATEGIES) == sorted(STRATEGIES)


def test_the_budget_goes_from_the_float_model_to_the_strategy_that_counts() -> None:
    found = figures(standard_report(1, 2))["Bits per byte after each step"]
    assert [text for text in found if text and text[0].isalpha()] == [
        "held-out: bits per byte", "float", "quantized",
        "validation: bits per byte", "plain", "sliding", "one_pass", "score_first"]
    assert [" ".join(text.split()) for text in found if re.fullmatch(r"\d\.\d{4}.*", text)] == [
        "1.7050", "1.7136 (+0.0086)", "1.7250", "1.6850 (-0.0400)", "1.6750 (-0.0100)", "1.6550 (-0.0200)"]


def test_documents_by_length_have_the_bits_per_byte_of_every_strategy() -> None:
    text = visible(standard_report(1, 2))
    assert "tokens, at most documents bytes plain sliding one_pass score_first lora two_phase" in text
    assert "256 3 1,500 2.0250 1.9850 1.9750 1.9550 1.9450 1.9050 4,096 2 9,000 1.9250 1.8850" in text  # means of both seeds


def test_without_sliding_there_are_no_differences() -> None:
    write_results([1])
    write_evaluation(1, 0, ("plain", "score_first"))
    html = report()
    assert [alt for alt in figures(html) if alt.startswith("Difference")] == []
    assert "as difference to" not in html


def test_the_audit_tells_each_condition_of_each_strategy_and_why_something_was_not_checked() -> None:
    html = standard_report(1337)
    text = visible(html)
    assert "Audit: NOT CHECKED (21 passed, 1 not checked: this kernel &lt;cannot&gt;)." in text
    assert "strategy C1 C2 C3 C4 legal plain passed passed passed passed not checked" in text
    assert "two_phase passed passed failed passed no, as declared" in text
    assert "Data validation readers passed stages: evaluate Process files not checked this kernel &lt;cannot&gt;" in text
    assert "C3 failed scored before, trained targets: 0 C4 passed targets: 400,000" in text
    marks = re.findall(r'<span class="(passed|failed|not-checked)">(.*?)</span>', html)
    assert all(kind.replace("-", " ") == word for kind, word in marks)
    assert len(marks) == 2 * 4 * 6 + 2


def test_a_violation_is_not_called_declared() -> None:
    write_results([1])
    audit = make_audit()
    audit["legal"] = audit["strategies"]["lora"]["legal"] = audit["strategies"]["lora"]["single_pass"]["passed"] = False
    save_audit(Path("artifacts/evaluate/seed1"), audit)
    text = visible(report())
    assert "Verdict: NOT LEGAL (23 passed, 2 failed, 1 not checked: this kernel &lt;cannot&gt;)" in text
    assert "lora passed passed passed failed no " in text
    assert "as declared" not in text


def test_a_run_without_audit_says_so() -> None:
    write_results([1])
    save_audit(Path("artifacts/evaluate/seed1"), NOT_AUDITED)
    text = visible(report())
    assert "Not audited: evaluate.audit is false." in text
    assert "passed" not in text


def test_the_report_is_one_file_the_same_each_time() -> None:
    html = standard_report(1, 2)
    write_results([1, 2])
    assert html == report()
    assert re.findall(r'(?:src|href)="(?!data:)|url\(|https?://', html) == []


def test_times_stand_beside_their_limits() -> None:
    write_results([1, 2])
    save_metrics(Path("artifacts/evaluate/seed2"), results.make_metrics(1)["evaluate"], {"seconds": 90.0, "peak_memory_mib": 1024.0})
    save_metrics(Path("artifacts/compress/seed1"), {}, {"seconds": 1.0})
    Path("artifacts/compress/seed1/metrics.json").write_text(json.dumps(results.make_metrics(0)["compress"]))  # as from the cache
    text = visible(report())
    assert "seed 1 seed 2 mean std seconds, tokenize 4.0 4.0 4.0 0.0 seconds, train" in text
    assert "seconds, train 240.0 240.0 240.0 0.0 82.8% of the limit of 290 " in text
    assert "seconds, calibrate 2.0 2.0 2.0 0.0 20.0% of the limit of 10 seconds, quantize" in text
    assert "seconds, compress - 3.0 - - from cache seconds, evaluate 60.0 90.0 75.0 21.2 15.0% of the limit of 600 " in text
    assert "peak memory of evaluate, MiB 512 1,024 768 362" in text


def test_every_seed_has_its_line() -> None:
    assert ("val_bpb val_loss held-out bpb bytes train, s evaluate, s seed 1 1.6500 2.4000 1.7086 812,345 240.0 60.0 "
            "seed 2 1.6600 2.4100 1.7186 812,346 240.0 60.0 mean 1.6550 2.4050 1.7136 812,346 240.0 60.0 "
            "std 0.0071 0.0071 0.0071 1 0.0 0.0") in visible(standard_report(1, 2))


def test_the_test_against_the_record_is_told_with_its_numbers() -> None:
    write_results([1, 2], record=2.9)
    text = visible(report())
    assert text.count("Record of 2.9000 nats per token: beats the record by at least 0.005 nats at p &lt; 0.01.") == 2
    assert ("against the record less 0.005 nats: mean 2.4050, std 0.0071, t = -98.00, p = 0.0032, true mean below 2.5641 "
            "with 0.99 confidence.") in text
    write_results([1], record=2.9)
    assert "Record of 2.9000 nats per token: needs at least two seeds." in visible(report())
    text = visible(standard_report(1, 2))
    assert "No record stated. Audit:" in text
    assert "No record is stated that they could be tested against" in text


def test_stages_are_listed_by_what_they_ran_on(monkeypatch: pytest.MonkeyPatch) -> None:
    write_results([1, 2])
    monkeypatch.setenv("WORLD_SIZE", "8")
    save_metrics(Path("artifacts/train/seed2"), results.make_metrics(1)["train"], {"seconds": 9.0})
    Path("artifacts/quantize/seed1/timing.json").unlink()
    text = visible(report())
    assert re.search(r"stage ran on tokenize, train@1, calibrate, quantize@2, compress, evaluate Python 3\.\S+, torch \S+, numpy \S+, "
                     r"sentencepiece \S+, .+, 1 process train@2 Python 3.+, 8 processes quantize@1 from cache "
                     r"Attention kernel in training: sdpa\.", text)


def test_an_imported_checkpoint_has_no_curve_and_says_where_it_is_from() -> None:
    write_results([1])
    path = Path("artifacts/train/seed1")
    save_metrics(path, {"imported": "final_model.pt", "imported_bytes": 4567, "imported_sha256": "0ab1", "num_parameters": 10000},
                 {"seconds": 1.0})
    (path / "loss.csv").write_text("tokens,loss\n")
    (path / "heldout.csv").write_text("tokens,loss,bpb\n")
    html = report()
    assert "Training Trained elsewhere: imported from final_model.pt , 4,567 bytes, SHA-256 0ab1 ." in visible(html)
    assert LEARNING not in figures(html)


def test_seeds_have_their_own_training_curves() -> None:
    expected = {f"{text}, seed {seed}" for text in ("training", "held-out") for seed in (1, 2)}
    assert expected <= set(figures(standard_report(1, 2))[LEARNING])


def test_a_run_without_held_out_curve_shows_its_training_loss() -> None:
    write_results([1, 2])
    for seed in (1, 2):
        Path(f"artifacts/train/seed{seed}/heldout.csv").write_text("tokens,loss,bpb\n")
    html = report()
    assert "Mean training loss; 1,500 steps." in visible(html)
    shown = figures(html)[LEARNING]
    assert "training, seed 1" in shown and not any(text.startswith("held-out") for text in shown)


def test_errors_are_drawn_by_layer_and_kind() -> None:
    write_results([1], num_tensors=12)
    found = [text for text in figures(report())["Predicted loss and relative error of every matrix"] if text and text[0].isalpha()]
    assert found == ["predicted loss, nats per token", "token_embedding", "head", *(f"layer {n}" for n in range(12)),
                     "relative error of the outputs", "mlp.up", "in no layer"]


def test_bytes_for_a_bit_of_loss_are_those_of_the_table() -> None:
    """95 bytes for 0.0015 nats, 130 for 0.0001; the head has no loss and no bytes."""
    write_results([1])
    tensors = read_csv(Path("artifacts/quantize/seed1/tensors.csv"), TENSOR_COLUMNS)
    assert [bytes_per_bit(tensor) for tensor in tensors] == pytest.approx([95 * math.log(2) / 0.0015] * 3 + [130 * math.log(2) / 0.0001, 0])
    html = report()
    found = figures(html)["Bytes for each bit of predicted loss of every matrix"]
    assert {"layer 0", "layer 2", "token_embedding", "bytes for each bit of predicted loss"} <= set(found)
    assert "Not drawn, because their predicted loss is 0: head.weight." in visible(html)


def test_a_passage_stands_in_its_colours_beside_that_of_the_strategy_that_counts() -> None:
    html = standard_report(1337)
    passages = re.findall(r'(?s)<div><h3><code>(.*?)</code>, (.*?) bits per token</h3>\s*<div class="heat">(.*?)</div></div>', html)
    assert [(name, mean) for name, mean, _ in passages] == [("plain", "6.50"), ("score_first", "0.50")]
    parts = [re.findall(r'(?s)<i class="b(\d)" title="(.*?)">(.*?)</i>', passage) for _, _, passage in passages]
    assert parts[0] == [("3", "3.2 bits", "if"), ("9", "22.0 bits, 2 tokens", " a&lt;b"), ("0", "0.8 bits", ":\n")]
    assert [level for level, _, _ in parts[1]] == ["1", "0", "0"]
    assert "Document 3 of the validation text, from token 301 on." in visible(html)


def test_what_the_artifact_writes_is_told_with_how_it_was_drawn() -> None:
    told = "It is &lt;written&gt;. 7 tokens, where the document ends; temperature 0.8, top-p 0.95, seed 0."
    assert told in visible(standard_report(1337))


def test_single_documents_are_drawn_and_how_many_there_are() -> None:
    html = standard_report(1337)
    assert "3 of 5 documents, evenly spaced, as a point, by score_first ." in visible(html)
    assert {"tokens of the document", "bits per byte"} <= set(figures(html)["Bits per byte of single documents against their length"])


def test_the_weights_that_train_chose_from_are_told_where_they_were_scored() -> None:
    write_results([1])
    assert ("Mean training loss, and the loss of the raw weights on the first held-out tokens; 1,500 steps. "
            "All held-out documents are scored once, at the end.") in visible(report())
    train = results.make_metrics(0)["train"] | {"heldout_bpb_raw": 1.71, "heldout_bpb_ema": 1.7}
    save_metrics(Path("artifacts/train/seed1"), train, {"seconds": 1.0})
    assert "at the end: raw 1.7100, ema 1.7000 bits per byte; ema was taken." in visible(report())


def test_everything_that_is_wide_scrolls_and_what_is_folded_can_be_opened() -> None:
    html = standard_report(1337)
    assert len(re.findall(r'<div class="scroll">\s*<(?:img|table)', html)) == len(re.findall(r"<img |<table", html)) - html.count(
        '<section><h3>')  # but the parameters, which wrap
    assert re.findall(r"<details.*?><summary>(.*?)</summary>", html) == [
        "Table by length", "Table of all matrices; a click on the head of a column sorts it", "What was found for each condition",
        "What each stage ran on", "All of params.yaml"]


def test_names_are_escaped() -> None:
    assert "<h1>A run &amp; its &lt;numbers&gt;</h1>" in standard_report(1337)


def test_a_missing_table_is_an_error_with_its_path() -> None:
    write_results([1])
    Path("artifacts/quantize/seed1/tensors.csv").write_text("name\n")
    with pytest.raises(ArtifactError, match=r"artifacts/quantize/seed1/tensors.csv: no column bits, coded_bytes"):
        report()


def test_figures_of_all_seeds_become_mean_and_deviation() -> None:
    write_results([1, 2], record=2.9)
    metrics = make_metrics(load_params("report", ReportParams), [1, 2], read_metrics([1, 2]))
    assert metrics["evaluate"]["val_bpb"] == {"mean": 1.655, "std": round(0.01 / 2**0.5, 8)}
    assert metrics["train"].keys() == {"heldout_bpb", "num_parameters", "num_steps"}  # `selected` is no number
    assert metrics["record"]["verdict"] == "beats the record by at least 0.005 nats at p < 0.01"
    write_results([1])
    metrics = make_metrics(load_params("report", ReportParams), [1], read_metrics([1]))
    assert metrics["evaluate"]["val_bpb"] == {"mean": 1.65}
    assert metrics["record"] == {"verdict": "no record stated"}
    assert metrics["audit"] == {"verdict": "NOT CHECKED"}

"""Every script of bench/ starts, runs to its end and prints its table, on a tiny run of the pipeline."""

import argparse
import importlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import bench.curve
import bench.evaluate
import bench.frontier
import bench.quantize
from lib.artifacts.files import read_csv, write_bytes, write_json
from lib.distributed import SINGLE_CPU
from lib.errors import UserError
from lib.model import compilation
from lib.params import parse_params, read_params
from lib.presets import load_settings, read_preset
from lib.quantization.config import QuantizeParams
from lib.schema import PipelineParams
from stages import calibrate, compress, evaluate, quantize, tokenize, train
from tests.clone import SEED, TINY
from tests.evaluation.tiny import merge

pytestmark = pytest.mark.xdist_group("bench")  # one run for all tests of this file

ROOT = Path(__file__).parents[1]
OTHERS = {"train", "gpu", "gpu_bundle", "gpu_chain", "gpu_checks"}  # test_bench_train.py, test_bench_gpu.py
NUMBER = r"[+-]?[\d,]+(?:\.\d+)?"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny parameters in which all stages but the report have run."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_bytes(folder / "lib/submission/program.py", b"import sys\n")
        words = (ROOT / "lib/training/loop.py").read_text().split()
        documents = [" ".join(words[n:n + 40] + words[:n % 7]) for n in range(0, len(words) - 40, 3)]
        (folder / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        short = {"evaluate": {"strategies": ["plain", "score_first"], "strategy": "score_first", "audit": False},
                 "quantize": {"target_bytes": 16_000}, "compress": {"code_bytes": 5200}}
        write_json(folder / "params.yaml", merge(merge(read_preset("default", ROOT / "presets"), TINY), short))  # JSON is YAML
        tokenize.main()
        for stage in (train, calibrate, quantize, compress, evaluate):
            stage.main(SEED)
    return folder


def output_of(name: str, arguments: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What ``python -m bench.NAME ARGUMENTS`` prints in `folder`."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, *arguments.split()])
    importlib.import_module(f"bench.{name}").main()
    return capsys.readouterr().out


def test_frontier(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Stages run in this process. A second call runs nothing anew and prints the same."""
    stages = []

    def run_module(name: str, folder: Path, *arguments: str) -> None:
        stages.append(name)
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            importlib.import_module(name).main(*map(int, arguments[1:]))
    monkeypatch.setattr(bench.frontier, "run_module", run_module)
    arguments = (f"--text {run}/documents.jsonl --work {tmp_path} --seeds {SEED} --changes --width 96 --vocabulary 400 "
                 "--fraction 0.02 --steps 2 --rows 2 --window 32 --calibration 2 --bytes 600000")
    printed = output_of("frontier", arguments, tmp_path, monkeypatch, capsys)
    rows = [line for line in printed.splitlines() if line.startswith("pr")]
    assert [row.split("  ")[0] for row in rows] == [f"pr585, seed {SEED}", f"pr1855, seed {SEED}", "pr585, mean", "pr1855, mean"]
    assert all(len(row[24:].split()) == len(bench.frontier.FIGURES) for row in rows)
    assert "float: pr1855 is lower by " in printed and stages.count("stages.tokenize") == 1 and stages.count("stages.train") == 2
    assert output_of("frontier", arguments, tmp_path, monkeypatch, capsys).splitlines()[1:] == printed.splitlines()[1:]
    assert stages.count("stages.train") == 2


@pytest.mark.parametrize("change", bench.frontier.CHANGES)
def test_1855_with_a_change_is_another_valid_file(change: str) -> None:
    options = argparse.Namespace(width=192, seeds=[1], text=None, vocabulary=1024, fraction=0.01, steps=8, window=512, rows=4,
                                 calibration=8, bytes=10**6)
    whole, changed = (parse_params(bench.frontier.make_params("pr1855", each, options), PipelineParams, "") for each in (None, change))
    assert whole != changed


def test_every_script_is_run_by_a_test() -> None:
    scripts = {path.stem for path in (ROOT / "bench").glob("*.py") if "\ndef main(" in path.read_text()}
    called = {name for path in (ROOT / "tests").glob("test_bench*.py") for name in re.findall(r'output_of\("(\w+)"', path.read_text())}
    assert scripts == called | OTHERS


def test_baselines(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = output_of("baselines", "", run, monkeypatch, capsys).splitlines()
    names = ["bzip2 -9", "zstd -22", "xz -9", *(f"seed {SEED}, {name}" for name in ("plain_bpb", "score_first_bpb", "val_bpb"))]
    assert sorted(line[:40].strip() for line in lines[1:]) == sorted(names)
    assert all(0 < float(line[40:]) < 8 for line in lines[1:])


def test_curve(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ways = bench.curve.list_ways()
    monkeypatch.setattr(bench.curve, "list_ways", lambda: ways[::6])
    monkeypatch.setattr(bench.curve, "FIGURE", run / "curve.svg")
    lines = output_of("curve", "--repeats 1", run, monkeypatch, capsys).splitlines()
    assert [line[2:15].strip() for line in lines].count("strategy") == 1
    assert sorted(line[2:59].split() for line in lines[2:]) == sorted([way.strategy, *way.settings.split()] for way in ways[::6])
    assert lines[2].startswith("* "), "nothing is faster than the fastest"
    assert (run / "curve.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_evaluate(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], compiled: bool) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "eager")  # traced, and then run as it is
    monkeypatch.setattr(bench.evaluate, "REPEATS", 1)
    monkeypatch.setattr(bench.evaluate, "STRIDES", (2,) if compiled else (2, 8))
    arguments = "--batches 1 --batch-tokens 256 --processor-time" + ("" if compiled else " --eager")
    output = output_of("evaluate", arguments, run, monkeypatch, capsys)
    assert re.search(rf"processor time; params\.yaml: {NUMBER} parameters, fp32, 256 inputs in a forward pass", output)
    assert re.findall(r"^stride (\d+) of windows of 32", output, re.MULTILINE) == (["16"] if compiled else ["16", "4"])
    assert output.count("targets/s") == (4 if compiled else 6)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compile(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch._inductor.async_compile.AsyncCompile.cpp_pybinding", lambda *_: lambda *_: None)  # kernels that do nothing
    output = output_of("compile", "--tokens 16 --parts-only", run, monkeypatch, capsys)
    figures = re.search(rf"^parts +(\d+) +(\d+) +({NUMBER}) +{NUMBER} +{NUMBER}$", output, re.MULTILINE)
    assert figures is not None
    graphs, passes, kilobytes = (int(figure) for figure in figures.groups())
    assert 3 <= graphs <= passes and kilobytes > 0


def test_evaluate_with_the_protocol(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench.evaluate, "ENTRY_TOKENS", 10_000)
    output = output_of("evaluate", "--protocol --chunks 2 --chunk-tokens 64", run, monkeypatch, capsys)
    for kind in ("sliding", "one_pass"):
        assert re.search(rf"^{kind}(?: +{NUMBER}){{8}}$", output, re.MULTILINE)


def test_forecast(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "presets").symlink_to(ROOT / "presets")
    rows = output_of("forecast", f"artifacts/train/seed{SEED}/checkpoint.safetensors", run, monkeypatch, capsys).splitlines()[2:]
    names = [f"trained, int{bits}, {codec}" for bits in (5, 6, 8) for codec in ("zstd", "range")]
    assert [row.split("|")[1].strip() for row in rows] == names
    assert all(re.search(rf"\| {NUMBER} \| {NUMBER} \({NUMBER}%\) \| {NUMBER} \({NUMBER}%\) \|$", row) for row in rows)


def test_fuzz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = output_of("fuzz", "--seconds 0.4", tmp_path, monkeypatch, capsys)
    parts = dict(part.split(": ", 1) for part in re.split(r"\n(?=[a-z]+: )", output.strip()))
    assert parts.keys() == {"containers", "published", "shards", "lines"}
    for part in parts.values():
        counts = [int(line.split()[0].replace(",", "")) for line in part.splitlines()]
        assert counts[0] == sum(counts[1:]) > 10
        assert len(counts) > 2  # of what is read and of what is refused
    assert not list(tmp_path.iterdir())


def rows_of(output: str) -> dict[str, list[str]]:
    """The table of bench.quantize: name of a row -> the other cells."""
    return {line[:44].strip(): line[44:].split() for line in output.splitlines()[2:] if not line.startswith(" ")}


def test_quantize(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("bench.quantize.FRACTIONS", (0.9,))
    output = output_of("quantize", f"--seed {SEED} --heldout-tokens 500", run, monkeypatch, capsys)
    names = [line.split(",")[0] for line in output.splitlines()[2:]]
    assert names == ["nearest", "gptq", "published", "gptq", "gptq", "gptq-fixed", "gptq", "gptq-int5", "gptq", "std", "gptq"]
    rows = rows_of(output)
    assert len(rows["std, brotli"]) == 9 and len(rows["gptq, 90% of its bytes"]) == 10
    kls = [float(line[44:].split()[5]) for line in output.splitlines()[2:]]
    assert kls[5] < min(kls[0], kls[2]), "correct GPTQ is better than rounding to nearest, and than the published procedure"
    assert float(rows["gptq, 90% of its bytes"][-1]) == pytest.approx(kls[4] / kls[2], abs=0.002)


def test_quantize_at_given_sizes(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = output_of("quantize", f"--seed {SEED} --heldout-tokens 500 --targets 16000 12000 "
                       "--methods std gptq gptq-fixed", run, monkeypatch, capsys)
    rows = rows_of(output)
    assert [name.split(",")[0] for name in rows] == ["gptq-fixed", "gptq"] + ["std", "gptq"] * 2
    for name, row in list(rows.items())[2:]:
        target = int(name.split(" from ")[1].replace(",", ""))
        assert 0.97 * target <= int(row[0].replace(",", "")) <= target
        assert len(row) == 9 if name.startswith("std") else float(row[-1]) < 1, "free steps are better than the clip"
    scales = [float(scale) for scale in re.findall(r"std: (\S+) x the standard deviations", output)]
    assert len(scales) == 2 and scales[0] < scales[1], "smaller with wider steps"


def test_the_clip_of_the_frontier_is_that_of_its_preset(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    entry, used = load_settings("pr1855", ROOT / "presets").quantize, list[QuantizeParams]()
    tested = bench.quantize.Bench(Path(), SEED, 500, 2, SINGLE_CPU)
    monkeypatch.setattr(tested, "_quantize", used.append)
    tested.std()
    assert used[0].clip.rule == entry.clip.rule and used[0].clip.floor == entry.clip.floor
    for role in ("attention", "mlp", "embedding"):
        assert used[0].clip.of_role(role).num_std == entry.clip.of_role(role).num_std and used[0].bits[role] == entry.bits[role]
    assert (used[0].damping, used[0].rate_weight, used[0].method) == (entry.damping, entry.rate_weight, entry.method)


def test_quantize_by_a_method_of_ones_own(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One step for a matrix, in proportion to its root mean square and as fine as the bytes allow."""
    (run / "own_method.py").write_text("""if True:
        import torch
        from lib.artifacts.quantized import QuantizedModel, QuantizedTensor, exponents_of, scales_of

        def quantize(checkpoint, parts, hessians, target_bytes, *, measure, process):
            assert sum(map(len, hessians.inputs.values())) == sum(part.is_matrix for part in parts.values())
            for fraction in (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0):
                matrices, vectors = {}, {}
                for name, weight in checkpoint.weights.items():
                    if parts[name].is_matrix:
                        rows = exponents_of(weight.square().mean().sqrt() * fraction).repeat(len(weight))
                        codes = (weight / scales_of(rows)[:, None]).round().to(torch.int16)
                        matrices[name] = QuantizedTensor(codes, rows, torch.zeros(weight.shape[1], dtype=torch.int16), None)
                    else:
                        vectors[name] = weight.half()
                model = QuantizedModel(checkpoint.model, checkpoint.training, matrices, vectors)
                if measure(model) <= target_bytes:
                    return model

        def nothing(*arguments, **others):
            return None

    """)
    monkeypatch.syspath_prepend(run)
    options = f"--seed {SEED} --heldout-tokens 500 --targets 16000 --methods"
    rows = rows_of(output_of("quantize", f"{options} own_method:quantize gptq feedback,distilled --steps 2", run, monkeypatch, capsys))
    assert [name.split(", ")[0] for name in rows] == ["own_method:quantize", "gptq", "feedback,distilled"]
    own, *others = rows.values()
    assert len(own) == 9 and all(float(row[9]) < 1 for row in others), "free steps are better"
    with pytest.raises(UserError, match="--methods own_method:nothing: expected that it returns a QuantizedModel, found NoneType"):
        output_of("quantize", f"{options} own_method:nothing", run, monkeypatch, capsys)


@pytest.mark.parametrize(("arguments", "error"), [
    ("--methods gptq", "--targets: expected sizes for gptq, found none"),
    ("--methods gptg", "gptg: expected one of nearest .*, or module:function"),
    ("--methods no_such:function", "no_such:function: expected a function that can be imported from here: No module named 'no_such'"),
    ("--methods bench.quantize:LEVEL", "bench.quantize:LEVEL: expected a function .*: int is not callable"),
    ("--methods bench.quantize:none", "module 'bench.quantize' has no attribute 'none'"),
])
def test_a_method_that_cannot_be_had_is_an_error(arguments: str, error: str, run: Path, monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        output_of("quantize", arguments, run, monkeypatch, capsys)
    assert re.search(error, capsys.readouterr().err)


def test_quantize_as_a_curve(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in {"CURVE_BITS": (4, 6), "CURVE_SIZES": 2, "TABLE": run / "quantize.csv", "FIGURE": run / "quantize.svg"}.items():
        monkeypatch.setattr(f"bench.quantize.{name}", value)
    output_of("quantize", f"--seed {SEED} --heldout-tokens 500 --curve", run, monkeypatch, capsys)
    rows = read_csv(run / "quantize.csv", ["method", "num_bytes", "heldout_kl"])
    sizes = [float(row["num_bytes"]) for row in rows]
    assert [row["method"] for row in rows] == [method for method in dict.fromkeys(row["method"] for row in rows) for _ in range(2)]
    assert sizes[4:] == pytest.approx([min(sizes[:4]), max(sizes[:4])], rel=0.02)
    assert all(float(rows[first]["heldout_kl"]) > float(rows[first + 1]["heldout_kl"]) for first in (0, 2, 4)), "more bits, less loss"
    assert (run / "quantize.svg").read_text() == bench.quantize.draw_curve(run / "quantize.csv")


def test_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    values = merge(read_preset("pr410", ROOT / "presets"), {
        "model": {"num_layers": 2, "model_dim": 128, "num_heads": 2, "num_kv_heads": 1, "mlp_hidden_dim": 128, "num_xsa_layers": 1,
                  "value_embedding_layers": [1]}, "compress": {"level": 3, "limit_bytes": 600_000}})
    write_json(tmp_path / "default.yaml", values)
    lines = output_of("published", f"--presets default --folder {tmp_path}", ROOT, monkeypatch, capsys).splitlines()
    floored, free = (line.split() for line in lines[2:])
    assert floored[2:4] == ["1/31", "100.0%"] and free[2:4] == ["none", "0.0%"]
    assert float(floored[6]) < 0.9 * float(free[6])


def test_recipe(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = output_of("recipe", f"--seeds {SEED}", run, monkeypatch, capsys).splitlines()
    starts: list[Any] = [line[:34].split() for line in lines[2:]]
    averages = ["raw", "ema", "swa"]
    assert [start[-1] for start in starts] == averages * 5
    for line in lines[2:14]:
        assert all(0 < float(cell) < 8 for cell in line[34:].split())


def test_tokenize(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    params = read_params(run / "params.yaml")
    monkeypatch.setattr("bench.tokenize.EMBEDDED", {"source": "jsonl", "path": params["tokenize"]["path"]})
    jsonl, shards, memory = output_of("tokenize", "--megabytes 1", run, monkeypatch, capsys).splitlines()
    assert jsonl.startswith("jsonl: 1 MB: 1 process ")
    assert re.match(rf"shards: {NUMBER} M tokens: 1 process .*, ratio {NUMBER}$", shards)
    assert re.match(rf"peak memory: this process {NUMBER} MiB, largest worker {NUMBER} MiB$", memory)

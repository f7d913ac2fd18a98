"""The command for a machine with a GPU: what is packed, and all pieces at the smoke size, without a network, DVC or git."""

import gzip
import json
import re
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

import bench.gpu
import bench.gpu_checks
from bench import gpu, gpu_bundle
from bench.gpu import PIECES, TOKENIZER, Command, find_text, install_wheels, make_environment, run_piece
from bench.gpu_bundle import BundleError, download_wheels, list_roots, pack_text, read_pins
from bench.gpu_chain import make_params
from lib.artifacts.files import write_json
from lib.data.tokenizer import load_tokenizer
from lib.data.tokenizer_training import train_tokenizer
from lib.params import parse_params
from lib.presets import list_presets, read_preset
from lib.reporting.runs import UNRECORDED
from lib.schema import PipelineParams
from lib.training.orthogonal import ORTHOGONALIZATIONS
from tests.stages.project import make_documents

ROOT = Path(__file__).parents[1]
RANGES = {"run": "# what is imported\ntorch>=2\none>=1\ndvc\n", "test": "pytest>=8\nruff\n"}
PINS = "torch==2.0\none==1.5\ntwo==2.0\nthree==3.0\npytest==8.1\nruff==1\n"
OTHER_PYTHON = "three; python_version < '3.12'"


def write_text(path: Path, number: int) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_documents(number)))
    return path


def make_wheel(folder: Path, name: str, version: str, requires: tuple[str, ...] = (), tag: str = "py3-none-any") -> None:
    """A wheel with one module, whose variable VERSION is the version."""
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {each}" for each in requires)]
    about = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as archive:
        archive.writestr(f"{name}.py", f"VERSION = {version!r}\n")
        archive.writestr(f"{about}/METADATA", "\n".join(lines) + "\n\n")
        archive.writestr(f"{about}/WHEEL", f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{about}/RECORD", "")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with requirements, and wheels that fulfil them in the folder ``index``."""
    (tmp_path / "requirements").mkdir()
    for name, content in RANGES.items():
        (tmp_path / f"requirements/{name}.txt").write_text(content)
    (tmp_path / "requirements.txt").write_text(PINS)
    index = tmp_path / "index"
    index.mkdir()
    make_wheel(index, "one", "1.5", ("two>=1", "torch", OTHER_PYTHON, "six; extra == 'more'"), "cp312-cp312-manylinux_2_28_x86_64")
    make_wheel(index, "one", "1.6")  # newer than its pin
    make_wheel(index, "two", "2.0")
    make_wheel(index, "three", "3.0")
    make_wheel(index, "pytest", "8.1", ("two",))
    return tmp_path


def source_of(project: Path) -> list[str]:
    return ["--no-index", "--find-links", str(project / "index")]


def test_the_wheels_are_what_the_project_needs_there_in_the_pinned_versions(project: Path) -> None:
    (project / "wheels").mkdir()
    make_wheel(project / "wheels", "two", "1.0")  # of an earlier time
    download_wheels(project, project / "wheels", "3.12", {"torch", "dvc"}, source_of(project))
    assert {path.name.split("-py3")[0].split("-cp")[0] for path in (project / "wheels").iterdir()} == {"one-1.5", "two-2.0", "pytest-8.1"}
    download_wheels(project, project / "wheels", "3.12", {"torch", "dvc", "two"}, source_of(project))
    assert not list((project / "wheels").glob("two*"))


def test_a_package_without_a_wheel_or_a_pin_is_named(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (project / "wheels").mkdir()
    with pytest.raises(BundleError, match=r"no wheels of one==1\.5, pytest==8\.1 for Python 3\.13"):
        download_wheels(project, project / "wheels", "3.13", {"torch", "dvc"}, source_of(project))
    assert "one" in capfd.readouterr().err
    with pytest.raises(BundleError, match=r"requirements\.txt: expected a pin of dvc, found none"):
        download_wheels(project, project / "wheels", "3.12", {"torch"}, source_of(project))


def test_the_requirements_of_this_project_are_pinned() -> None:
    roots = {each.name for each in list_roots(ROOT, gpu_bundle.GIVEN)}
    assert {"pydantic", "ruamel.yaml", "sentencepiece", "constriction", "pytest"} <= roots
    assert not roots & {*gpu_bundle.GIVEN, "mypy", "ruff"}
    pins = read_pins(ROOT)
    for path in (ROOT / "requirements").glob("*.txt"):
        for each in gpu_bundle.read_ranges(path):
            assert path.stem == "cuda" or pins[canonicalize_name(each.name)] in each.specifier, each


def test_wheels_are_installed_once_and_anew_when_others_are_packed(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    make_wheel(tmp_path / "wheels", "albatross_one", "1.0")
    install_wheels(tmp_path)
    module = tmp_path / "site/albatross_one.py"
    assert module.read_text() == "VERSION = '1.0'\n"
    module.write_text("")
    install_wheels(tmp_path)
    assert module.read_text() == ""
    (tmp_path / "wheels/albatross_one-1.0-py3-none-any.whl").unlink()
    make_wheel(tmp_path / "wheels", "albatross_one", "2.0")
    install_wheels(tmp_path)
    assert module.read_text() == "VERSION = '2.0'\n"


@pytest.mark.slow
def test_the_bundle_has_wheels_text_tokenizer_and_tree(tmp_path: Path, project: Path, monkeypatch: pytest.MonkeyPatch,
                                                       capfd: pytest.CaptureFixture[str]) -> None:
    """Wheels of other packages stand for the project's; the tokenizer is trained on the training documents."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(gpu_bundle, "list_roots", lambda root, given: list_roots(project, given))
    monkeypatch.setattr(gpu_bundle, "read_pins", lambda root: read_pins(project))
    text, bundle = write_text(tmp_path / "mine.jsonl", 3000), tmp_path / "bundle"
    arguments = ["--folder", str(bundle), "--text", str(text), "--given", "torch", "dvc", "--pip", *source_of(project)]
    monkeypatch.setattr(sys, "argv", ["gpu_bundle", *arguments])
    with pytest.raises(SystemExit, match=r"tokenize\.vocab_size: expected at most \d+ pieces"):  # of 60 words
        gpu_bundle.main()
    tokenizer = tmp_path / "mine.model"
    tokenizer.write_bytes(train_tokenizer(make_documents(20), 300, 100_000))
    sys.argv[3:3] = ["--tokenizer", str(tokenizer)]
    gpu_bundle.main()
    assert (bundle / TOKENIZER).read_bytes() == tokenizer.read_bytes()
    assert find_text(bundle).read_bytes() == text.read_bytes()
    assert len(list((bundle / "wheels").iterdir())) == 3
    with tarfile.open(bundle / "tree.tar.gz") as archive:
        names = set(archive.getnames())
    assert {"bench/gpu.py", "lib/params.py", "stages/report.py", "tests/model/test_kernels.py", "presets/pr585.yaml"} <= names
    assert not any(name.startswith(("artifacts", ".git/", ".venv")) for name in names)
    assert re.search(r"bytes of 62,914,560$", capfd.readouterr().out.strip())
    monkeypatch.setattr(gpu_bundle, "MAX_BYTES", 1000)
    with pytest.raises(SystemExit, match=r"expected at most 1,000 bytes, found [\d,]+; use a smaller TEXT"):
        gpu_bundle.main()


def test_text_keeps_its_compression_and_replaces_the_one_before(tmp_path: Path) -> None:
    plain, packed = write_text(tmp_path / "mine.jsonl", 3), tmp_path / "mine.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    folder = tmp_path / "bundle"
    folder.mkdir()
    for given, name in ((plain, "text.jsonl"), (packed, "text.jsonl.gz")):
        assert pack_text(folder, given) == folder / name == find_text(folder)
        assert [path.name for path in folder.iterdir()] == [name]
    with pytest.raises(BundleError, match=r"TEXT: expected a file of JSON lines"):
        pack_text(folder, tmp_path / "mine.txt")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Text and tokenizer; the packages are those of this environment."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    write_text(folder / "text.jsonl", 400)
    (folder / TOKENIZER).write_bytes(train_tokenizer(make_documents(20), 300, 100_000))
    return folder


@pytest.mark.parametrize("smoke", [False, True])
def test_parameters_of_the_chain_are_a_whole_file_of_the_preset(bundle: Path, smoke: bool) -> None:
    values = make_params(bundle, 150.0, smoke)
    params = parse_params(values, PipelineParams, "")
    tokenizer = load_tokenizer(bundle / TOKENIZER)
    assert params.model.vocab_size == params.tokenize.vocab_size == tokenizer.vocab_size == 300
    assert (params.model.num_layers, params.train.budget_seconds) == ((2, None) if smoke else (11, 210.0))
    preset = read_preset("pr585", ROOT / "presets")
    assert values["quantize"]["bits"] == preset["quantize"]["bits"]


@pytest.mark.xdist_group("gpu")
def test_all_pieces_at_the_smoke_size_without_dvc(bundle: Path, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    """Every command of every piece in processes of their own, outside of a repository, where importing dvc fails."""
    (bundle / "site").mkdir()
    (bundle / "site/sitecustomize.py").write_text("import sys\nsys.modules['dvc'] = None\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "argv", ["gpu", "--bundle", str(bundle)])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    shown, results = capsys.readouterr().out, (bundle / "results.md").read_text()
    assert end.value.code == 0, shown + (bundle / "messages.txt").read_text()
    assert shown.splitlines()[-1].startswith("environment ok, train ok, evaluate ok, chain ok; ")
    assert results == "".join(shown.splitlines(keepends=True)[:-1])
    assert re.match(r"## no GPU \(\w+, \d+ cores\), smoke size, Python 3\.\d+\.\d+, torch 2\.", results)
    blocks = dict(re.findall(r"^`python -m ([\w.]+)[^\n]*`:\n\n```\n(.*?)^```$", results, re.MULTILINE | re.DOTALL))
    assert blocks.keys() == {"bench.gpu_checks", "pytest", "bench.train", "bench.evaluate", "bench.gpu_chain"}
    assert re.search(r"^Muon of \(2, 64, 64\) against fp64: relative error \d\.\d\de-\d\d$", blocks["bench.gpu_checks"], re.MULTILINE)
    assert "0.00e+00 of them differ from the CPU's" in blocks["bench.gpu_checks"]
    assert re.search(r"[\d.]+ x as fast as the plain loop.*aten::mm$", blocks["bench.train"], re.DOTALL | re.MULTILINE)
    chain = blocks["bench.gpu_chain"]
    assert UNRECORDED in chain
    for name in ("score_first", "lora", "phased"):
        assert re.search(rf"^strategies\.{name}\.score_before_update: passed: targets trained [1-9]", chain, re.MULTILINE)
    assert re.search(r"^audit: legal \(\d+ passed", chain, re.MULTILINE)
    assert UNRECORDED in (bundle / "work/artifacts/report/report.html").read_text()
    assert (bundle / "work/artifacts/report/submission/train_gpt.py").exists()


@pytest.mark.parametrize("smoke", [False, True])
@pytest.mark.parametrize("piece", PIECES)
def test_every_command_of_a_piece_is_one_that_its_module_takes(piece: str, smoke: bool) -> None:
    for command in PIECES[piece](Path(".gpu"), smoke):
        module = re.match(r"-m ([\w.]+)", command.arguments)
        assert module is not None
        if module[1] != "pytest":
            source = (ROOT / module[1].replace(".", "/")).with_suffix(".py").read_text()
            options = re.findall(r"--[\w-]+", command.arguments)
            assert options
            assert all(f'add_argument("{option}"' in source for option in options)
        assert all((ROOT / path).exists() for path in re.findall(r"tests/\S+", command.arguments))
        assert smoke or set(re.findall(r"--preset (\S+)", command.arguments)) <= set(list_presets(ROOT / "presets"))


def test_a_command_that_fails_stops_no_other(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "-c sys=__import__('sys');print('half');sys.exit('why')"
    commands = [Command(code, {}), Command("-c print('next')", {"NAME": "VALUE"})]
    assert not run_piece("piece", commands, make_environment(bundle), bundle)
    assert capsys.readouterr().out == (bundle / "results.md").read_text()
    first, second = (bundle / "results.md").read_text().split("`NAME=VALUE python ")
    assert first.endswith("half\nwhy\nFAILED with status 1\n```\n\n")
    assert "next\n```\n" in second


@pytest.mark.slow
def test_a_piece_ends_at_its_limit(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.gpu, "PIECE_SECONDS", 2.0)
    start = time.monotonic()
    assert not run_piece("piece", [Command("-c __import__('time').sleep(300)", {})] * 2, make_environment(bundle), bundle)
    assert time.monotonic() - start < 200
    assert (bundle / "results.md").read_text().count("FAILED with status -9: more than the 2 seconds of the piece") == 2


@pytest.mark.slow
def test_pieces_that_fail_or_are_unknown_are_an_exit_status(bundle: Path, monkeypatch: pytest.MonkeyPatch,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(PIECES, "train", lambda bundle, smoke: [Command("-c raise(SystemExit(3))", {})])
    monkeypatch.setitem(PIECES, "chain", lambda bundle, smoke: [Command("-c print(1)", {})])
    for arguments, status, verdict in ((["train", "chain"], 1, "train FAILED, chain ok;"), (["chain"], 0, "chain ok;")):
        monkeypatch.setattr(sys, "argv", ["gpu", "--bundle", str(bundle), "--smoke", *arguments])
        with pytest.raises(SystemExit) as end:
            gpu.main()
        assert int(end.value.code or 0) == status
        assert capsys.readouterr().out.splitlines()[-1].startswith(verdict)
    monkeypatch.setattr(sys, "argv", ["gpu", "all"])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 2
    monkeypatch.setattr(sys, "argv", ["gpu", "--bundle", str(bundle / "nothing")])
    with pytest.raises(SystemExit, match=r"no text\.jsonl; `make gpu-bundle`"):
        gpu.main()


def test_a_check_that_fails_stops_no_other(bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(bundle / "smoke.yaml", make_params(bundle, 1.0, True))
    monkeypatch.setitem(ORTHOGONALIZATIONS, "newton_schulz",
                        lambda matrices, num_steps: matrices.bfloat16() if matrices.dtype.itemsize == 4 else 1.1 * matrices)
    monkeypatch.setattr(sys, "argv", ["gpu_checks", "--preset", str(bundle / "smoke.yaml")])
    with pytest.raises(SystemExit, match=r"^FAILED: muon$"):
        bench.gpu_checks.main()
    output = capsys.readouterr().out
    assert "AssertionError" in output
    assert "calibration: " in output

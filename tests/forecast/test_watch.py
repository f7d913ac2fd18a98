"""The forecast while training is shown, and changes nothing."""

import re
import shutil
from pathlib import Path

import pytest
import torch

import lib.forecast.watch
import lib.progress
import lib.training.loop
from lib.data.loader import Loader
from lib.distributed import SINGLE_CPU
from lib.forecast.watch import SizeWatch
from lib.params import read_params
from lib.training.loop import TrainResult, train
from tests.forecast.presets import ROOT
from tests.training.tiny import make_model, make_params, make_split

FIXED = {r"target_bytes: \d+": "target_bytes: null", ": free": ": 5"}


@pytest.fixture
def parameter_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a parameter file whose bits are fixed, and no waiting for the first forecast."""
    path, text = tmp_path / "params.yaml", (ROOT / "presets/default.yaml").read_text()
    for old, new in FIXED.items():
        text = re.sub(old, new, text)
    path.write_text(text)
    shutil.copytree(ROOT / "stages", tmp_path / "stages")
    shutil.copytree(ROOT / "lib", tmp_path / "lib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lib.forecast.watch, "FIRST_SECONDS", 0.0)
    return path


def run_training(folder: Path, watch: type[SizeWatch] | None) -> tuple[TrainResult, torch.Tensor]:
    params, model = make_params(), make_model()
    torch.manual_seed(1)
    loader = Loader(make_split(folder / "train"), params.sequence_tokens, params.batch_sequences, seed=5)
    status = watch(model, enabled=True).status if watch else dict
    return train(model, params, loader, SINGLE_CPU, folder / f"resume{watch}.pt", status=status), torch.rand(1)


@pytest.mark.usefixtures("parameter_file")
def test_training_gives_the_same_weights_with_and_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(lib.forecast.watch, "SHARE", float("inf"))  # a forecast at every synchronization
    monkeypatch.setattr(lib.progress, "LINE_INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(lib.training.loop, "SYNC_STEPS", 10)
    (with_watch, random), (without, same) = run_training(tmp_path, SizeWatch), run_training(tmp_path, None)
    assert capsys.readouterr().err.count("artifact 0.0") >= 2
    assert random == same  # no random number was drawn
    assert with_watch.losses == without.losses
    for kind, weights in without.candidates.items():
        assert all(torch.equal(weight, with_watch.candidates[kind][name]) for name, weight in weights.items())


def test_it_follows_the_weights_and_the_parameters_of_the_moment(parameter_file: Path) -> None:
    model = make_model()
    watch = SizeWatch(model, enabled=True)
    first = watch.status()
    limit_bytes = read_params(parameter_file)["compress"]["limit_bytes"]
    assert first["artifact"].endswith(f" of {limit_bytes / 1e6:.2f} MB")
    assert watch.status() is first  # no more than a share of the time
    assert SizeWatch(model, enabled=False).status() == {}
    parameter_file.write_text(re.sub(r"limit_bytes: \d+", "limit_bytes: 1000000", parameter_file.read_text()))
    assert SizeWatch(model, enabled=True).status()["artifact"].endswith(" of 1.00 MB")


def test_with_free_steps_there_is_nothing_to_show(parameter_file: Path) -> None:
    shutil.copy(ROOT / "presets/default.yaml", parameter_file)
    watch = SizeWatch(make_model(), enabled=True)
    assert watch.status() == {}


def test_parameters_that_training_does_not_need_do_not_stop_it(parameter_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parameter_file.write_text(parameter_file.read_text().replace("damping:", "dampin:"))
    watch = SizeWatch(make_model(), enabled=True)
    assert watch.status() == watch.status() == {}
    message = capsys.readouterr().err
    assert message.count("the size of the artifact cannot be forecast") == 1 and "quantize.dampin: unknown key" in message

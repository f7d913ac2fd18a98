"""Parameter files that cannot meet their limit are refused before anything runs; what the message proposes is not."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lib.forecast.size
from lib.forecast.check import ForecastError, check_size
from lib.presets import list_presets, load_settings
from lib.schema import PipelineParams
from tests.forecast.presets import FIXED, ROOT, make_pipeline

LIMIT = {"limit_bytes": 540_000}


def check(params: PipelineParams) -> str:
    return check_size(params.model.architecture, params.quantize, params.compress)


@pytest.mark.parametrize("preset", list_presets(ROOT / "presets"))
def test_presets_meet_their_limit(preset: str) -> None:
    assert check(make_pipeline(preset)).startswith("forecast: ")


@pytest.mark.parametrize("preset", ["pr585", "pr410"])
def test_published_grids_without_their_scale_floor_are_refused(preset: str) -> None:
    clip = make_pipeline(preset).quantize.clip.model_dump(mode="json") | {"floor": 0}
    message = r"compress\.limit_bytes: expected at most 16,000,000 bytes .*, forecast 1[789],.*quantize\.clip\.floor"
    with pytest.raises(ForecastError, match=message):
        check(make_pipeline(preset, quantize={"clip": clip}))


def test_a_grid_above_the_limit_is_refused_and_each_remedy_is_not() -> None:
    with pytest.raises(ForecastError) as caught:
        check(make_pipeline(quantize=FIXED, compress=LIMIT))
    message = str(caught.value)
    forecast = int(re.findall(r"forecast ([\d,]+) ", message)[0].replace(",", ""))
    clip = make_pipeline().quantize.clip.model_dump(mode="json")
    floor = float(re.findall(r"quantize\.clip\.floor ([\d.]+)", message)[0])
    role, bits = re.findall(r"quantize\.bits\.(\w+) (\d)", message)[0]
    assert message.startswith("compress.limit_bytes: expected at most 540,000 bytes of code and artifact, forecast ")
    assert message.endswith(f"; all quantize.bits free and quantize.target_bytes 540000; compress.limit_bytes {forecast}")
    remedies: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"clip": clip | {"floor": floor}}, LIMIT),
        ({"bits": FIXED["bits"] | {role: int(bits)}}, LIMIT), ({}, {"limit_bytes": forecast}),
        ({"bits": dict.fromkeys(FIXED["bits"], "free"), "target_bytes": 540_000}, LIMIT)]
    for quantize, compress in remedies:
        assert check(make_pipeline(quantize=FIXED | quantize, compress=compress)).startswith("forecast: ")


def test_a_size_that_depends_on_the_weights_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest scale that any grid has is 2^-24, so that weights of 2^-18 are above it, and a thousandth of them below."""
    monkeypatch.setattr(lib.forecast.size, "SPREAD", 2.0**-18)
    line = check(make_pipeline(quantize=FIXED, compress=LIMIT))
    assert line.startswith("note: compress.limit_bytes: expected at most 540,000 bytes")
    assert "; trained weights may take less" in line


def test_fixed_grids_beside_free_steps_must_leave_room_in_the_target() -> None:
    bits = FIXED["bits"] | {"attention": "free"}
    assert check(make_pipeline(quantize=FIXED | {"bits": bits, "target_bytes": 1_500_000}, compress={"limit_bytes": 1_600_000})) == (
        "forecast: 1,500,000 bytes, at most 1,500,000 (quantize.target_bytes)")
    with pytest.raises(ForecastError, match=r"quantize\.target_bytes: expected at most 540,000 .*\(bigram "):
        check(make_pipeline(quantize=FIXED | {"bits": bits, "target_bytes": 540_000}))


def test_a_target_below_the_code_alone_is_refused() -> None:
    with pytest.raises(ForecastError, match=r"target_bytes: expected more than compress\.code_bytes \d\d,\d{3}, the code alone, .* 20,000"):
        check(make_pipeline(quantize={"target_bytes": 20_000}))


def test_free_steps_need_no_torch() -> None:
    script = "import sys; from tools.check_params import main; sys.argv = ['']; main(); sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script.replace("['']", "['', 'presets/default.yaml']")], cwd=ROOT, capture_output=True,
                            text=True, check=False)
    target = load_settings("default", ROOT / "presets").quantize.target_bytes
    assert result.returncode == 0 and result.stdout.startswith(f"forecast: {target:,} bytes, which is what free steps are chosen for")


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new", "message"), [
    (r"target_bytes: \d+", "target_bytes: 20000", "quantize.target_bytes: expected more than"),
    (r"bits_of: \{\}", "bits_of: {blocks.9.mlp.up.weight: 5}", "quantize.bits_of: blocks.9.mlp.up.weight: expected the name of a matrix")])
def test_the_command_names_the_file_and_fails(old: str, new: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(re.sub(old, new, (ROOT / "params.yaml").read_text()))
    result = subprocess.run([sys.executable, "-m", "tools.check_params", str(path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith(f"{path}: {message}")

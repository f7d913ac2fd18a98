import gzip
import lzma
import os
import warnings
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import brotli
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lib.artifacts.files import ArtifactError
from lib.compression.container import pack
from lib.imports import published as module
from lib.imports.published import is_published, read_published
from tests.artifacts.quantized_models import make_quantized_model
from tests.imports.published_files import dequantize, make_state, quantize_state, to_artifact, to_bytes, write

STATE = make_state()
TENSORS, KINDS = quantize_state(STATE)


def test_a_checkpoint_is_its_tensors(tmp_path: Path) -> None:
    content = to_bytes(STATE)
    found = read_published(write(tmp_path / "final_model.pt", content))
    assert (found.name, found.num_bytes, found.is_quantized, found.codes) == ("final_model.pt", len(content), False, {})
    assert torch.equal(found.floats.pop("ve_layer_scales"), torch.cat([STATE["ve_layer_scales.0"], STATE["ve_layer_scales.1"]]))
    assert found.floats.keys() == STATE.keys() - {"ve_layer_scales.0", "ve_layer_scales.1"}
    assert all(torch.equal(tensor, STATE[name]) for name, tensor in found.floats.items())


@pytest.mark.parametrize("content", [
    to_bytes(OrderedDict(STATE)), to_bytes({name: nn.Parameter(tensor) for name, tensor in STATE.items()}),
    to_bytes(STATE, _use_new_zipfile_serialization=False), zstandard.compress(to_bytes(STATE))],
    ids=["ordered", "parameters", "old", "zst"])
def test_all_ways_to_save_a_checkpoint_are_read(tmp_path: Path, content: bytes) -> None:
    found = read_published(write(tmp_path / "x", content))
    assert not found.is_quantized and found.num_parameters == sum(map(torch.numel, STATE.values()))
    assert torch.equal(found.floats["smear.gate"], STATE["smear.gate"])


def test_an_artifact_is_its_codes_and_scales(tmp_path: Path) -> None:
    scalar = {"lm_head.weight.q": torch.ones(3, 2).to(torch.int8), "lm_head.weight.scale": torch.tensor(0.1)}
    content = to_artifact(TENSORS | scalar, KINDS | {"lm_head.weight": {"type": "int8"}})
    found = read_published(write(tmp_path / "final_model.int6.ptz", content))
    assert found.is_quantized and found.num_bytes == len(content)
    assert found.codes.keys() == {name for name, kind in KINDS.items() if isinstance(kind, dict)} | {"lm_head.weight"}
    for name, (codes, scales) in found.codes.items():
        if name != "lm_head.weight":
            assert torch.equal(codes, TENSORS[name + ".q"]) and torch.equal(scales, TENSORS[name + ".scale"])
            assert (codes.dtype, scales.dtype) == (torch.int8, torch.float16)
    assert torch.equal(found.codes["lm_head.weight"].scales, torch.full((3,), 0.1))
    assert all(torch.equal(found.floats[name], TENSORS[name]) for name in found.floats if name in TENSORS)
    assert found.floats["skip_weights"].dtype == torch.float16


def test_heads_of_training_are_left_out_and_named(tmp_path: Path) -> None:
    heads = {"mtp_heads.1.weight": torch.ones(3, 2), "mtp_heads.0.weight": torch.ones(3, 2)}
    found = read_published(write(tmp_path / "x", to_bytes(STATE | heads)))
    assert found.skipped == ("mtp_heads.0.weight", "mtp_heads.1.weight") and not found.floats.keys() & heads.keys()


def test_layer_scales_are_joined_by_number_and_only_as_published(tmp_path: Path) -> None:
    scales = {f"ve_layer_scales.{number}": torch.tensor([float(number)]) for number in (10, *range(10))}
    assert read_published(write(tmp_path / "x", to_bytes(scales))).floats["ve_layer_scales"].tolist() == list(range(11))
    for changed in ({"ve_layer_scales.11": torch.zeros(2)}, {"ve_layer_scales.x": torch.zeros(1)}, {"ve_layer_scales.12": torch.zeros(1)}):
        assert "ve_layer_scales" not in read_published(write(tmp_path / "x", to_bytes(scales | changed))).floats


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    bomb = Bomb(tmp_path / "exploded")
    for content in (to_bytes(STATE | {"a": bomb}), to_bytes(bomb), to_bytes({"a": bomb}, _use_new_zipfile_serialization=False),
                    to_artifact(TENSORS, KINDS | {"a": bomb}), to_artifact(TENSORS | {"a": bomb}, KINDS)):
        with pytest.raises(ArtifactError, match=r"found the Python object \w+\.mkdir, which could run anything"):
            read_published(write(tmp_path / "x", content))
    assert not bomb.path.exists()
    torch.load(write(tmp_path / "x", to_bytes(bomb)), weights_only=False)
    assert bomb.path.exists()


@pytest.mark.parametrize(("content", "kind"), [
    (zlib.compress(to_bytes(STATE), 9), "zlib"), (zlib.compress(b"", 1), "zlib"), (gzip.compress(b""), "gzip"),
    (lzma.compress(b""), r"xz \(LZMA\)"), (lzma.compress(b"", lzma.FORMAT_ALONE), "LZMA"), (b"LZMA" + lzma.compress(b""), "LZMA"),
    (brotli.compress(to_bytes(STATE)), "a file that begins with .*brotli"), (b"", "a file that begins with b''"),
    (pack(make_quantized_model(), "zstd", 3).blob, "a .ptz file of this project"), (zstandard.compress(b"text"), "a file that begins with"),
], ids=range(10))
def test_other_formats_are_named(tmp_path: Path, content: bytes, kind: str) -> None:
    with pytest.raises(ArtifactError, match=f"x: expected a float state dict saved by torch.save, or a zstandard frame .*, found {kind}"):
        read_published(write(tmp_path / "x", content))


def test_files_that_inspect_shows_as_published(tmp_path: Path) -> None:
    for content in (to_bytes(STATE), to_artifact(TENSORS, KINDS), zlib.compress(b"")):
        assert is_published(write(tmp_path / "x", content))
    for content in (pack(make_quantized_model(), "zstd", 3).blob, b"text", b""):
        assert not is_published(write(tmp_path / "x", content))
    assert not is_published(tmp_path) and not is_published(tmp_path / "nothing")


def test_missing_files_and_folders(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(ArtifactError, match="cannot be read"):
            read_published(path)


@pytest.mark.parametrize(("payload", "message"), [
    ([1, 2], "found list"), (3.0, "found float"), (torch.ones(2), "found Tensor"),
    ({1: torch.ones(2)}, "expected names of parameters, found '1'"), ({"\x1b[2J": torch.ones(2)}, "expected names of parameters"),
    ({"model": {"a": torch.ones(2)}, "step": 3}, "model: expected a tensor of .*, found dict\nstep: expected a tensor of .*, found int"),
    ({"a": torch.ones(2).long()}, "a: expected float16 or bfloat16 or float32, found torch.int64"),
    ({"a": torch.ones(2).double()}, "found torch.float64"),
    ({"a": torch.zeros(1).expand(2**20, 2**20)}, "found a sparse, an empty or an expanded tensor"),
    ({"a": torch.eye(3).to_sparse()}, "found a sparse"), ({"a": torch.ones(2, device="meta")}, "found a sparse, an empty"),
    ({"a": torch.tensor([1.0, torch.nan])}, "a: expected finite values"), ({"a": torch.tensor([torch.inf])}, "a: expected finite values"),
    ({"w": {}, "m": 3}, "found dict and int"), ({"w": [], "m": {}}, "found list and dict"),
])
def test_other_contents_are_named(tmp_path: Path, payload: Any, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        read_published(write(tmp_path / "x", to_bytes(payload)))


def test_all_that_is_wrong_in_an_artifact_is_listed(tmp_path: Path) -> None:
    codes, scale = torch.ones(3, 2).to(torch.int8), torch.ones(3).half()
    tensors: dict[str, Any] = {
        "bank.q": torch.ones(2, 3, 2).to(torch.int8), "bank.scale": torch.ones(2), "short.q": codes, "short.scale": torch.ones(2),
        "no_scale.q": codes, "float.q": codes.float(), "float.scale": scale, "lqer.q": codes, "lqer.scale": scale,
        "lqer.A": torch.ones(3, 1), "good.q": codes, "good.scale": scale, "nan.q": codes, "nan.scale": scale * torch.nan,
        "count": torch.ones(2).long()}
    int6 = {"type": "int6", "clip_range": 31}
    kinds: dict[str, Any] = dict.fromkeys(("bank", "short", "no_scale", "float", "good", "nan"), int6) | {
        "lqer": {"type": "int6", "rank": 1}, "nothing": "passthrough", "count": "passthrough", "alias": {"type": "alias", "to": "good"},
        "int9": {"type": "int9"}, "other": 3}
    with pytest.raises(ArtifactError) as caught:
        read_published(write(tmp_path / "x", to_artifact(tensors, kinds)))
    lines = str(caught.value).splitlines()[1:]
    assert sorted(line.split(":")[0] for line in lines) == [
        "alias", "bank", "count", "float.q", "int9", "lqer", "lqer.A", "lqer.q", "lqer.scale", "nan.scale", "no_scale.scale", "nothing",
        "other", "short"]
    assert "short: expected a matrix of codes and one scale for each row or for all, found shapes (3, 2) and (2,)" in lines
    assert "lqer.A: a tensor that belongs to no parameter" in lines and "no_scale.scale: expected a tensor" in "\n".join(lines)


def test_a_frame_cannot_take_any_amount_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    with pytest.raises(ArtifactError, match="expected a zstandard frame of at most 1000 bytes, found"):
        read_published(write(tmp_path / "x", to_artifact(TENSORS, KINDS)))


SMALL: dict[str, Tensor] = {"smear.gate": torch.ones(3), "tok_emb.weight": torch.ones(4, 3)}
ARCHIVES = [to_bytes(SMALL), to_bytes(SMALL, _use_new_zipfile_serialization=False),
            to_bytes({"w": {"a": torch.ones(2).half(), "b.q": torch.ones(2, 2).to(torch.int8), "b.scale": torch.ones(2).half()},
                      "m": {"a": "passthrough", "b": {"type": "int6"}}})]


@settings(max_examples=400)
@given(st.data(), st.sampled_from(ARCHIVES), st.booleans())
def test_damaged_files_are_errors_or_models_and_nothing_else(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, archive: bytes,
                                                             compressed: bool) -> None:
    damaged = bytearray(archive)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(damaged[:data.draw(st.just(len(damaged)) | st.integers(0, len(damaged)))])
    path = write(tmp_path_factory.getbasetemp() / "damaged", zstandard.compress(content) if compressed else content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = read_published(path)
        except ArtifactError:
            return
    assert found.shapes.keys() == found.floats.keys() | found.codes.keys()


def test_dequantisation_is_that_of_the_layout() -> None:
    """The reference of other tests: near the weights, and at their extremes exactly scale times 15 or 127."""
    for name, weight in dequantize(TENSORS, KINDS).items():
        assert torch.allclose(weight, STATE[name], atol=float(STATE[name].abs().max()) / 29 if name + ".q" in TENSORS else 1e-3)

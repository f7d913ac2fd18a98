import copy
import gzip
import io
import lzma
import os
import pickle
import tracemalloc
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import brotli
import numpy as np
import pytest
import safetensors.torch
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lib.artifacts.files import ArtifactError
from lib.compression.container import pack
from lib.published import reader as module
from lib.published.reader import MIN_MAX_BYTES, is_published, read_published
from tests.artifacts.quantized_models import make_quantized_model
from tests.evaluation.tiny import MODEL
from tests.published.published_files import (
    STARTING_SCRIPT,
    dequantize,
    make_state,
    quantize_int8,
    quantize_state,
    to_artifact,
    to_bytes,
    write,
)

STATE = make_state()
TENSORS, KINDS = quantize_state(STATE)
PLAIN_STATE = make_state(MODEL | STARTING_SCRIPT)
INT8 = quantize_int8(PLAIN_STATE)


def numpy_file(save: Callable[..., None], *arrays: Any, **named: Any) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *arrays, **named)
    return buffer.getvalue()


def to_zip(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in entries.items():
            file.writestr(name, content)
    return buffer.getvalue()


def flip(content: bytes, at: bytes) -> bytes:
    """`content` with a bit changed within the first `at`."""
    place = content.index(at) + len(at) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1:]


def deep(levels: int) -> Any:
    """A list whose text would have 2^`levels` parts."""
    made: list[Any] = []
    for _ in range(levels):
        made = [made, made]
    return made


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


@pytest.mark.parametrize("level", [1, 5, 6, 9])
def test_zlib_in_place_of_zstandard_is_the_same_artifact(tmp_path: Path, level: int) -> None:
    """#585 where zstandard is not installed."""
    found, expected = (read_published(write(tmp_path / "x", content)) for content in (
        zlib.compress(to_bytes({"w": TENSORS, "m": KINDS}), level), to_artifact(TENSORS, KINDS)))
    assert found.is_quantized and found.shapes == expected.shapes and found.sha256 != expected.sha256
    assert all(torch.equal(tensor, expected.floats[name]) for name, tensor in found.floats.items())
    for name, (codes, scales) in found.codes.items():
        assert torch.equal(codes, expected.codes[name].codes) and torch.equal(scales, expected.codes[name].scales)


@pytest.mark.parametrize("notes", [("dtypes", "qmeta", "passthrough_orig_dtypes"), ("dtypes",)])
def test_the_starting_script_s_artifact_is_its_codes_and_scales(tmp_path: Path, notes: tuple[str, ...]) -> None:
    saved = {key: value for key, value in INT8.items() if key in ("__quant_format__", "quantized", "scales", "passthrough", *notes)}
    found = read_published(write(tmp_path / "final_model.int8.ptz", zlib.compress(to_bytes(saved), 9)))
    assert found.is_quantized and found.num_parameters == sum(map(torch.numel, PLAIN_STATE.values()))
    assert found.codes.keys() == INT8["quantized"].keys() and "tok_emb.weight" in found.codes
    for name, (codes, scales) in found.codes.items():
        assert torch.equal(codes, INT8["quantized"][name]) and torch.equal(scales, INT8["scales"][name])
    assert found.floats.keys() == INT8["passthrough"].keys() and "skip_weights" in found.floats
    assert all(torch.equal(tensor, INT8["passthrough"][name]) for name, tensor in found.floats.items())


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrapped_and_prefixed_models_are_the_same(tmp_path: Path, key: str, prefix: str) -> None:
    state = {prefix + name: tensor for name, tensor in STATE.items()}
    plain = read_published(write(tmp_path / "x", to_bytes(STATE)))
    for payload, left_out in ((state, ()), ({key: state, "step": 3, "optimizer": {"state": {0: torch.ones(2)}}}, ("optimizer", "step"))):
        found = read_published(write(tmp_path / "x", to_bytes(payload)))
        assert found.skipped == left_out and found.shapes == plain.shapes
        assert all(torch.equal(tensor, plain.floats[name]) for name, tensor in found.floats.items())
    quantized = [{prefix + name: value for name, value in part.items()} for part in (TENSORS, KINDS)]
    found = read_published(write(tmp_path / "x", to_artifact(*quantized)))
    assert found.shapes == plain.shapes and found.is_quantized
    compiled_blocks = {name.replace("blocks.1.", "blocks.1._orig_mod."): tensor for name, tensor in STATE.items()}
    assert read_published(write(tmp_path / "x", to_bytes(compiled_blocks))).shapes == plain.shapes


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
    (zlib.compress(b"text"), "a file that begins with b'text'"), (zlib.compress(b"", 1), "a file that begins with b''"),
    (gzip.compress(b""), "gzip"), (zlib.compress(gzip.compress(b"")), "gzip"),
    (lzma.compress(b""), r"xz \(LZMA\)"), (lzma.compress(b"", lzma.FORMAT_ALONE), "LZMA"), (b"LZMA" + lzma.compress(b""), "LZMA"),
    (brotli.compress(to_bytes(STATE)), "a file that begins with .*brotli"), (b"", "a file that begins with b''"),
    (pack(make_quantized_model(), "zstd", 3).blob, "a .ptz file of this project"), (zstandard.compress(b"text"), "a file that begins with"),
    (numpy_file(np.save, np.ones(3)), r"a numpy array \(\.npy\)$"),
    (numpy_file(np.savez, first=np.ones(3), second=np.ones(3)), r"a numpy archive \(\.npz\) of the arrays first, second$"),
    (numpy_file(np.savez_compressed, **{f"a{n}": np.ones(3) for n in range(9)}), r"a numpy archive .* a0, a1, a2, a3, a4 and 4 more$"),
    (zlib.compress(numpy_file(np.savez, first=np.ones(3))), "a numpy archive"),
    (safetensors.torch.save(STATE), r"a safetensors file of bigram.embed.weight, .* and 36 more; torch.save\(safetensors"),
    (to_zip({"a/b.txt": b"text", "\x1b[2J": b""}), r"a zip of a/b\.txt, \\x1b\[2J, without a torch archive in it$"),
    (to_zip({}), "a damaged zip|a file that begins with b'PK"),
    (to_zip({"m/data.pkl": b"", "m/constants.pkl": b""}), "a TorchScript program"),
    (pickle.dumps({"a": [1, 2.0]}), "a sound pickle with more than tensors .* or not saved by torch.save"),
    (zlib.compress(pickle.dumps([1])), "a sound pickle"), (to_bytes(STATE | {"a": 1}, pickle_protocol=4), "a sound pickle"),
    (pickle.dumps({"a": np.ones(3)}, protocol=2), r"the Python object numpy\S+, which could run anything when it is loaded"),
], ids=range(23))
def test_other_formats_are_named(tmp_path: Path, content: bytes, kind: str) -> None:
    with pytest.raises(ArtifactError, match=f"x: expected a state dict of floats, .* in zstandard or zlib, found {kind}") as caught:
        read_published(write(tmp_path / "x", content))
    assert "anew" not in str(caught.value) or "damaged" in kind


@pytest.mark.parametrize("content", [
    to_bytes(STATE)[:-300], to_bytes(STATE)[:2000], flip(to_bytes(STATE), b"tok_emb.weight"),
    flip(to_bytes(STATE), STATE["smear.gate"].numpy().tobytes()), to_bytes(STATE, _use_new_zipfile_serialization=False)[:900],
    zlib.compress(to_bytes(STATE))[:-9], zlib.compress(to_bytes(STATE)[:-300])], ids=range(7))
def test_damage_is_called_damage(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ArtifactError, match=r"(damaged|cut off).*copy it anew"):
        read_published(write(tmp_path / "x", content))


def test_files_that_inspect_shows_as_published(tmp_path: Path) -> None:
    for content in (to_bytes(STATE), to_artifact(TENSORS, KINDS), zlib.compress(b""), safetensors.torch.save(STATE), gzip.compress(b""),
                    numpy_file(np.save, np.ones(3))):
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
    ({1: torch.ones(2)}, "expected names of parameters, found 1"), ({"\x1b[2J": torch.ones(2)}, "expected names of parameters"),
    ({"nets": {"a": torch.ones(2)}, "step": 3}, "nets: expected a tensor of .*, found dict\nstep: expected a tensor of .*, found int"),
    ({"model": {}, "state_dict": {}}, "expected one model, found model and state_dict"), ({"model": {}, 3: 4}, "expected names .* found 3"),
    ({"module.a": torch.ones(2), "a": torch.ones(2)}, "expected each parameter once, found some with and without module or _orig_mod"),
    ({"__quant_format__": "mixed_intN_per_row_v1"}, "int8_clean_per_row_v1, .* found the format 'mixed_intN_per_row_v1'"),
    ({"__quant_format__": "int8_clean_per_row_v1", "quantized": {}, "scales": {}}, "expected the dictionaries .*, found .*'quantized'"),
    (INT8 | {"banks": {}}, "int8_clean_per_row_v1: expected the dictionaries .*, found .*'banks'"),
    (INT8 | {"scales": {}}, "blocks.0.attn.c_q.weight.scale: expected a tensor of .*, found nothing"),
    (INT8 | {"quantized": {}}, "blocks.0.attn.c_q.weight.scale: a tensor that belongs to no parameter"),
    (INT8 | {"passthrough": {"a": torch.ones(2).long()}}, "a: expected float16 or bfloat16 or float32, found torch.int64"),
    (INT8 | {"passthrough": {3: torch.ones(2)}}, "expected names of parameters, found 3"),
    ({"w": {"a": torch.ones(2)}, "m": {"a": deep(60)}}, r"a: expected one of .*, found \[\["),
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


@pytest.mark.parametrize(("content", "message"), [
    (to_artifact(TENSORS, KINDS), "expected a zstandard frame of at most 1000 bytes, found"),
    (zlib.compress(bytes(10**7)), "expected a zlib stream of at most 1000 bytes of content and nothing after it, found more"),
    (zlib.compress(b"text") + b"more", "expected a zlib stream of .* nothing after it, found more")], ids=range(3))
def test_a_stream_cannot_take_any_amount_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    write(tmp_path / "x", content)
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError, match=message):
            read_published(tmp_path / "x")
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_an_archive_cannot_take_more_memory_than_its_size(tmp_path: Path, compression: int) -> None:
    """torch.load would unpack each entry: 32 MiB of zeros from some kilobytes, and any number of times, compressed once more."""
    archive, entries = to_bytes({"a": torch.zeros(2**23)}), {}
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    bomb = to_zip(entries, compression)
    assert len(bomb) < len(archive) / 100
    for content in (bomb, zstandard.compress(bomb), zlib.compress(bomb)):
        with pytest.raises(ArtifactError, match=r"found a torch archive of 33,5\d\d,\d\d\d bytes in [\d,]{5,7}, while torch"):
            read_published(write(tmp_path / "x", content))


def test_entries_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    """Any number of entries of a zip's directory may point to the same bytes."""
    buffer = io.BytesIO(to_bytes({"a": torch.ones(2**12)}))
    with zipfile.ZipFile(buffer, "a") as file:
        entry = file.getinfo("archive/data/0")
        for number in range(1, 9):
            alias = copy.copy(entry)
            alias.filename = f"archive/data/{number}"
            file.filelist.append(alias)
        file.writestr("archive/last", b"")
    with pytest.raises(ArtifactError, match=r"found a torch archive of 14\d,\d\d\d bytes in 1\d,\d\d\d, while torch"):
        read_published(write(tmp_path / "x", buffer.getvalue()))


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


def replace_pickle(archive: bytes, content: bytes) -> bytes:
    """An archive of `torch.save` with another pickle in it."""
    rewritten = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(rewritten, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith("data.pkl") else old.read(name))
    return rewritten.getvalue()


def calls(name: bytes, number: int) -> bytes:
    """A pickle that calls something with a number."""
    return b"\x80\x02c" + name + b"\n\x8a\x08" + number.to_bytes(8, "little") + b"\x85R."


@pytest.mark.parametrize("name", [b"builtins\nbytearray", b"torch\nTensor", b"torch.storage\nUntypedStorage", b"torch\nFloatTensor"])
def test_memory_that_a_pickle_asks_for_is_not_given(tmp_path: Path, name: bytes) -> None:
    """torch.load, with weights_only, gives all of these."""
    archive = io.BytesIO()
    torch.save({}, archive)
    old = io.BytesIO()
    torch.save({}, old, _use_new_zipfile_serialization=False)
    legacy = old.getvalue().replace(pickle.dumps({}, 2), calls(name, 2**40))
    for content in (replace_pickle(archive.getvalue(), calls(name, 2**40)), legacy):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(ArtifactError, match=rf"found the Python object {name.decode().split()[0]}"):
            read_published(tmp_path / "x")


@pytest.mark.parametrize("compress", [zstandard.ZstdCompressor(19).compress, zlib.compress], ids=["zstd", "zlib"])
def test_files_that_unpack_to_far_more_than_they_have_are_refused_before_they_do(tmp_path: Path, compress: Any) -> None:
    archive = io.BytesIO()
    torch.save({"a": torch.zeros(2**22)}, archive)
    (tmp_path / "x").write_bytes(compress(archive.getvalue()))
    with pytest.raises(ArtifactError, match=rf"at most {MIN_MAX_BYTES} bytes.*, found"):
        read_published(tmp_path / "x")


def test_tensors_in_the_same_memory_are_counted_each(tmp_path: Path) -> None:
    shared = torch.ones(2**16)
    torch.save({"a": shared, "b": shared}, tmp_path / "tied")
    assert set(read_published(tmp_path / "tied").floats) == {"a", "b"}
    torch.save({str(n): shared for n in range(100)}, tmp_path / "x")
    with pytest.raises(ArtifactError, match=r"found tensors of 26,214,400 bytes in .*, many of them in the same memory"):
        read_published(tmp_path / "x")


def test_devices_that_never_end_are_not_read() -> None:
    with pytest.raises(ArtifactError, match=r"/dev/zero: cannot be read \(a folder or a device\)"):
        read_published(Path("/dev/zero"))

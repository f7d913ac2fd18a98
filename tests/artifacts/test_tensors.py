"""Files of tensors: the hash of their content and of what they were made from, and values that are finite."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lib.artifacts.files import ArtifactError
from lib.artifacts.tensors import CONTENT, METADATA_KEY, hash_content, load_tensors, read_metadata, save_tensors

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3, dtype=torch.int16), "c": torch.zeros(0), "d": torch.ones(2).bfloat16()}


def write(path: Path, tensors: dict[str, Tensor], metadata: object) -> None:
    save_file(tensors, path, metadata={METADATA_KEY: json.dumps(metadata, sort_keys=True)})


def test_round_trip(tmp_path: Path) -> None:
    save_tensors(tmp_path / "one", TENSORS, {"model": {"num_layers": 3}})
    tensors, metadata = load_tensors(tmp_path / "one")
    assert metadata == {"model": {"num_layers": 3}}
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype for name, tensor in TENSORS.items())


@pytest.mark.parametrize("position", [9, 200, -1, -9])
def test_a_flipped_bit_is_noticed_wherever_it_is(position: int, tmp_path: Path) -> None:
    save_tensors(tmp_path / "one", {"weight": torch.arange(64.0)}, {"note": "a" * 64})
    content = bytearray((tmp_path / "one").read_bytes())
    content[position] ^= 1
    (tmp_path / "one").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"one: .*`dvc repro -f`|one: not written by this project"):
        load_tensors(tmp_path / "one")


def test_a_file_names_what_it_was_made_from(tmp_path: Path) -> None:
    checkpoint, hessians = tmp_path / "checkpoint.safetensors", tmp_path / "hessians.safetensors"
    save_tensors(checkpoint, TENSORS, {})
    save_tensors(hessians, TENSORS, {}, [checkpoint])
    load_tensors(hessians, [checkpoint])
    save_tensors(checkpoint, TENSORS | {"a": torch.ones(2, 3)}, {})
    with pytest.raises(ArtifactError, match=r"hessians.safetensors: made from another checkpoint than .*checkpoint.safetensors"):
        load_tensors(hessians, [checkpoint])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_named(value: float, tmp_path: Path) -> None:
    save_tensors(tmp_path / "one", TENSORS | {"a": torch.tensor([1.0, value])}, {})
    with pytest.raises(ArtifactError, match=r"one: a: expected finite values, found 1 that are not"):
        load_tensors(tmp_path / "one")


def test_files_of_before_there_were_hashes_are_read(tmp_path: Path) -> None:
    write(tmp_path / "old", TENSORS, {"model": {}})
    save_tensors(tmp_path / "new", TENSORS, {}, [tmp_path / "old"])
    assert load_tensors(tmp_path / "old", [tmp_path / "new"])[1] == {"model": {}}
    assert load_tensors(tmp_path / "new", [tmp_path / "old"])[1] == {}


@pytest.mark.parametrize("metadata", ["[1]", "{", "1"])
def test_metadata_that_is_no_dictionary(metadata: str, tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "one", metadata={METADATA_KEY: metadata})
    with pytest.raises(ArtifactError, match="one: expected metadata in JSON, found something else"):
        load_tensors(tmp_path / "one")


def test_names_shapes_dtypes_and_metadata_count() -> None:
    hashes = {hash_content(tensors, metadata) for tensors, metadata in [
        ({"a": torch.zeros(2, 3)}, {}), ({"b": torch.zeros(2, 3)}, {}), ({"a": torch.zeros(3, 2)}, {}), ({"a": torch.zeros(6)}, {}),
        ({"a": torch.zeros(2, 3).int()}, {}), ({"a": torch.zeros(2, 3)}, {"x": 1}), ({"a": torch.ones(2, 3)}, {})]}
    assert len(hashes) == 7
    assert {len(each) for each in hashes} == {64}


def test_the_hash_is_in_the_header(tmp_path: Path) -> None:
    save_tensors(tmp_path / "one", TENSORS, {"x": 1})
    assert read_metadata(tmp_path / "one")[CONTENT] == hash_content(TENSORS, {"x": 1, "made_from": {}})

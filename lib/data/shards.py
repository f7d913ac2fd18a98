"""Published token shards: which files of a folder they are, whether they are sound, and their tokens as one sequence.

The format is that of `lib.artifacts.tokens`. A document may go on in the next shard, so shards follow each other without a gap.
"""

import re
from collections.abc import Container, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.artifacts.files import ArtifactError, sha256_of
from lib.artifacts.tokens import HEADER_BYTES, HEADER_INT32S, MAGIC, VERSION, Tokens
from lib.errors import UserError

SHARD_NAME = re.compile(r"(?P<dataset>.+)_(?P<split>train|val)_(?P<number>\d+)\.bin")
"""Not of the byte side-cars that some datasets have beside the shards, see `lib.data.sidecar`."""

SUMS_FILE = "SHA256SUMS"
SEARCH_TOKENS = 1 << 16
REMEDY = "fetch it again, or set tokenize.path to a folder of published shards"


@dataclass(frozen=True)
class Shards:
    """Files of one dataset, those of a split in the order of their numbers; `val_bytes` are the byte side-cars of `val`, if there are."""

    train: tuple[Path, ...]
    val: tuple[Path, ...]
    val_bytes: tuple[Path, ...] = ()


def find_shards(folder: Path) -> Shards:
    """The shards in a folder; compared with their checksums if a file ``SHA256SUMS`` (of ``sha256sum``) is beside them.

    Raises:
        ValueError: no such folder, or as `sort_shards`.
        ArtifactError: a shard that ``SHA256SUMS`` does not list, or that was altered.
    """
    if not folder.is_dir():
        raise UserError(f"tokenize.path: expected a folder of published shards, found none at {folder}")
    present = {path.name for path in folder.iterdir()}
    names = sort_shards(present, str(folder))
    names["val_bytes"] = find_sidecars(names["val"], present)
    shards = Shards(*(tuple(folder / name for name in names[part]) for part in ("train", "val", "val_bytes")))
    sums = folder / SUMS_FILE
    if sums.exists():
        _check_sums([*shards.train, *shards.val, *shards.val_bytes], sums)
    return shards


def sort_shards(names: Iterable[str], where: str) -> dict[str, list[str]]:
    """Those of `names` that name shards, as lists for ``train`` and ``val``, in the order of their numbers.

    Args:
        names: names of files in one folder, or their paths.
        where: the folder, for errors.

    Raises:
        ValueError: no shards of a split, shards of several datasets, or one missing between others.
    """
    found: dict[str, dict[int, str]] = {"train": {}, "val": {}}
    datasets = set()
    for name in sorted(names):
        if match := SHARD_NAME.fullmatch(name):
            found[match["split"]][int(match["number"])] = name
            datasets.add(match["dataset"])
    if len(datasets) > 1:
        raise UserError(f"{where}: expected the shards of one dataset, found {', '.join(sorted(datasets))}; give each a folder of its own")
    for split, by_number in found.items():
        if not by_number:
            raise UserError(f"{where}: expected shards named *_{split}_000000.bin and so on, found none; the published dataset has them")
        for number in range(min(by_number), max(by_number)):
            if number not in by_number:
                raise UserError(f"{where}: expected {split} shard number {number} between {by_number[min(by_number)]} and "
                                f"{by_number[max(by_number)]}, found none; documents go on from shard to shard, so fetch it")
    return {split: [by_number[number] for number in sorted(by_number)] for split, by_number in found.items()}


def sidecar_name(shard: str) -> str:
    """The name of the byte side-car of a validation shard: ``x_val_bytes_000000.bin`` of ``x_val_000000.bin``."""
    name, _, number = shard.rpartition("_")
    return f"{name}_bytes_{number}"


def find_sidecars(val: Iterable[str], present: Container[str]) -> list[str]:
    """The byte side-cars of validation shards, by their names, as far as they are `present`."""
    return [sidecar for sidecar in map(sidecar_name, val) if sidecar in present]


class Stream:
    """The tokens of consecutive shards as one sequence, read in pieces; positions count from the first shard's first token.

    Args:
        paths: the shards, in order.

    Attributes:
        lengths: tokens of each shard.

    Raises:
        ArtifactError: a file that is missing, truncated or of another format.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.paths = tuple(paths)
        self.lengths = tuple(map(_count_tokens, self.paths))
        self._starts = np.cumsum([0, *self.lengths])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> Tokens:
        """(stop - start,) uint16: tokens from `start` to `stop`, at least one."""
        first, last = np.searchsorted(self._starts, (start, stop - 1), side="right") - 1
        parts = []
        for i in range(first, last + 1):
            a, b = max(start - self._starts[i], 0), min(stop, self._starts[i + 1]) - self._starts[i]
            parts.append(np.fromfile(self.paths[i], "<u2", b - a, offset=HEADER_BYTES + 2 * a))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def find(self, token: int, start: int) -> int:
        """Position of the first `token` from `start` on; the length of the stream if there is none."""
        for position in range(start, len(self), SEARCH_TOKENS):
            found = np.flatnonzero(self.read(position, min(position + SEARCH_TOKENS, len(self))) == token)
            if len(found):
                return position + int(found[0])
        return len(self)

    def locate(self, position: int) -> str:
        """The file and the token number in it of a position, for errors."""
        shard = int(np.searchsorted(self._starts, position, side="right")) - 1
        return f"{self.paths[shard]}, token {position - self._starts[shard]}"


def _count_tokens(path: Path) -> int:
    """Tokens of a shard, after checking its header and length."""
    try:
        header, found_bytes = np.fromfile(path, "<i4", HEADER_INT32S), path.stat().st_size
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file; {REMEDY}") from None
    if len(header) < HEADER_INT32S or tuple(header[:2]) != (MAGIC, VERSION):
        raise ArtifactError(f"{path}: expected a header of {HEADER_BYTES} bytes with magic {MAGIC} and version {VERSION}, found "
                            f"{', '.join(map(str, header[:2]))} in {found_bytes} bytes; {REMEDY}")
    num_tokens = int(header[2])
    expected_bytes = HEADER_BYTES + 2 * num_tokens
    if num_tokens < 1 or found_bytes != expected_bytes:
        raise ArtifactError(f"{path}: expected {expected_bytes} bytes ({num_tokens} tokens), found {found_bytes}; {REMEDY}")
    return num_tokens


def _check_sums(paths: list[Path], sums: Path) -> None:
    lines = (line.split(maxsplit=1) for line in sums.read_text(encoding="utf-8").splitlines() if line.strip())
    stated = {name.strip().removeprefix("*").removeprefix("./"): digest for digest, name in lines}
    with ThreadPoolExecutor() as pool:
        for path, digest in zip(paths, pool.map(sha256_of, paths), strict=True):
            if path.name not in stated:
                raise ArtifactError(f"{sums}: expected a line for {path.name}, found none; add its checksum, or remove the file")
            if digest != stated[path.name]:
                raise ArtifactError(f"{path}: expected SHA-256 {stated[path.name]} as in {SUMS_FILE}, found {digest}; {REMEDY}")

"""Whether the results of all seeds belong together: made with one configuration, by one code, and the files are those of these runs.

``dvc.lock`` tells: for each stage and seed, DVC records the parameters that it was run with and the MD5 checksums of its code, inputs
and outputs. While the report is made within ``dvc repro``, the stages before it are recorded already. On a machine without DVC stages
are started by hand and nothing is recorded; then summary and report say so.
"""

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from lib.artifacts.files import ArtifactError
from lib.artifacts.metrics import load_metrics
from lib.artifacts.paths import stage_folder
from lib.params import PARAMS_FILE

LOCK_FILE = Path("dvc.lock")
STAGES = ("train", "calibrate", "quantize", "compress", "evaluate")
"""The stages that run once for each seed."""
READ_HERE = (".json", ".csv")  # suffixes of the files that reports are made from; of folders all files are
SHOWN = 12  # differences, at most, in an error
ABSENT = "nothing"
UNRECORDED = "not recorded by DVC: what the results were made from was not checked"

Entries = Mapping[str, Any]
"""Name of a stage, ``train@1337`` -> what dvc.lock says of it."""


def check_runs(params: Mapping[str, Any]) -> bool:
    """Compare the record of every stage and seed with `params`, the first seed, the stages before it, and the files on disk.

    Args:
        params: all of params.yaml.

    Returns:
        Whether the results are recorded. They are not where there is no ``dvc.lock``, and where it is that of other results on a
        machine that has no DVC to renew it; nothing was compared then, except that no imported seed is among trained ones.

    Raises:
        ArtifactError: the record is damaged, or something differs; each difference is named with stage, seed and both values.
    """
    seeds, recorded = params["seeds"], LOCK_FILE.exists()
    if recorded:
        try:
            _compare(_load_entries(), params)
        except ArtifactError:
            if importlib.util.find_spec("dvc") is not None:
                raise
            recorded = False
    _refuse(list(_list_origins(seeds)))
    return recorded


def _compare(recorded: Entries, params: Mapping[str, Any]) -> None:
    seeds = params["seeds"]
    names = ["tokenize", *(f"{stage}@{seed}" for seed in seeds for stage in STAGES)]
    if missing := [name for name in names if name not in recorded]:
        raise ArtifactError(f"{LOCK_FILE}: expected a record of every stage and seed, found none of {', '.join(missing)}; "
                            "run `dvc repro`: results of stages that were started by hand are not reported beside a record of others")
    entries = {name: recorded[name] for name in names}
    _refuse([*_list_settings(entries, params), *_list_inputs(entries, seeds[0]), *_list_files(entries)])


def _refuse(differences: Sequence[str]) -> None:
    if differences:
        more = [f"and {len(differences) - SHOWN} more"] if len(differences) > SHOWN else []
        raise ArtifactError("\n  ".join(["results do not belong together; run `dvc repro`, which makes those anew that differ:",
                                         *differences[:SHOWN], *more]))


def flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested mappings; those that are empty are values."""
    if not isinstance(values, Mapping) or (prefix and not values):
        yield prefix, values
        return
    for key, value in values.items():
        yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))


def _load_entries() -> Entries:
    try:
        entries: Entries = YAML(typ="safe", pure=True).load(LOCK_FILE.read_text(encoding="utf-8"))["stages"]
    except (YAMLError, KeyError, TypeError) as error:
        raise ArtifactError(f"{LOCK_FILE}: not a record of DVC ({error!r}); get it back by git, or remove it and run `dvc repro`") from None
    return entries


def _list_settings(entries: Entries, params: Mapping[str, Any]) -> Iterator[str]:
    for name, entry in entries.items():
        used = entry["params"][str(PARAMS_FILE)]
        found, expected = (dict(flatten(values)) for values in (used, {key: _look_up(params, key) for key in used}))
        for key in dict.fromkeys((*expected, *found)):
            values = [json.dumps(each[key]) if key in each else ABSENT for each in (expected, found)]
            if values[0] != values[1]:
                yield f"{name}: {key}: expected {values[0]} as in {PARAMS_FILE}, found {values[1]} in {LOCK_FILE}"


def _look_up(params: Mapping[str, Any], dotted: str) -> Any:
    value: Any = params
    for key in dotted.split("."):
        value = value.get(key, {})
    return value


def _list_inputs(entries: Entries, first_seed: int) -> Iterator[str]:
    """Inputs that are not what an earlier stage wrote, or, where no stage writes them, not those of the first seed."""
    written = {out["path"]: (name, out["md5"]) for name, entry in entries.items() for out in entry["outs"]}
    inputs = {name: {dep["path"]: dep["md5"] for dep in entry["deps"]} for name, entry in entries.items()}
    for name, found in inputs.items():
        reference = f"{name.split('@')[0]}@{first_seed}" if "@" in name else name
        expected = {path: (reference, md5) for path, md5 in inputs[reference].items() if path not in written}
        expected |= {path: written[path] for path in found if path in written}
        for path in sorted({*expected, *found}):
            of, md5 = expected.get(path, (reference, ABSENT))
            if found.get(path, ABSENT) != md5:
                yield f"{name}: {path}: expected {md5} as of {of}, found {found.get(path, ABSENT)} in {LOCK_FILE}"


def _list_files(entries: Entries) -> Iterator[str]:
    for name, entry in entries.items():
        for out in entry["outs"]:
            path = Path(out["path"])
            if "@" in name and (path.suffix in READ_HERE or out["md5"].endswith(".dir")) and (found := _checksum(path)) != out["md5"]:
                yield f"{name}: {path}: expected {out['md5']} as in {LOCK_FILE}, found {found} on disk"


def _list_origins(seeds: Sequence[int]) -> Iterator[str]:
    """Seeds that were imported where the first was trained, or the reverse, which DVC knows nothing of."""
    origins = ["imported" if "imported" in load_metrics(stage_folder("train", seed)) else "trained" for seed in seeds]
    for seed, origin in zip(seeds, origins, strict=True):
        if origin != origins[0]:
            yield (f"train@{seed}: expected a checkpoint that was {origins[0]} as that of train@{seeds[0]}, found one that was {origin}; "
                   f"import it for every seed, or train it anew (`dvc repro --force train@{seed}`)")


def _checksum(path: Path) -> str:
    """As DVC computes it: of a folder, that of the sorted list of its files in JSON."""
    if not path.is_dir():
        return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() if path.exists() else ABSENT
    files = sorted((file.relative_to(path).as_posix(), _checksum(file)) for file in path.rglob("*") if file.is_file())
    listing = json.dumps([{"md5": md5, "relpath": relative} for relative, md5 in files])
    return f"{hashlib.md5(listing.encode(), usedforsecurity=False).hexdigest()}.dir"

"""Pack what a machine with a GPU but without a network lacks: ``make gpu-bundle [PYTHON_VERSION=3.12] [TEXT=...] [TOKENIZER=...]``.

The folder holds the files of this project, wheels of the packages that it imports, text and a tokenizer. docs/gpu.md says how to go on.
"""

import argparse
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from email import message_from_bytes
from pathlib import Path

import zstandard
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from bench.gpu import BUNDLE, TOKENIZER, TREE, WHEELS, find_text
from lib.artifacts.files import write_bytes
from lib.data.corpus import Source, open_source
from lib.data.tokenization import provide_tokenizer
from lib.data.tokenizer import load_tokenizer
from lib.errors import UserError
from lib.presets import DEFAULT, load_settings

MAX_BYTES = 60 * 2**20
GIVEN = ("torch", "numpy", "scipy", "dvc")
"""Packages that are left out with all that only they need: the machine has the first two, a report without a record computes no test
(scipy, 35 MB), and the stages run without DVC."""
TOOLS = ("pytest", "hypothesis")
"""The part of requirements/test.txt that runs the tests of kernels."""
GLIBC = (5, 12, 17, 24, 27, 28)
"""Minor versions of glibc 2 whose wheels are taken; the last is that of Debian 10, and every machine with CUDA 13 has a newer one."""
SUFFIXES = (".jsonl", ".gz", ".zst")


class BundleError(UserError):
    """What cannot be packed; the message names it and says what to do."""


def list_roots(root: Path, given: Iterable[str]) -> list[Requirement]:
    """The requirements that are packed, those of running and some of testing, without those of `given`."""
    run, test = (read_ranges(root / f"requirements/{name}.txt") for name in ("run", "test"))
    tools = [each for each in test if canonicalize_name(each.name) in TOOLS]
    return [each for each in run + tools if canonicalize_name(each.name) not in given]


def read_ranges(path: Path) -> list[Requirement]:
    """The packages of a file of requirements, with the versions that it takes."""
    return [Requirement(line) for line in path.read_text().splitlines() if line and not line.startswith("#")]


def read_pins(root: Path) -> dict[str, str]:
    """Package -> the version that requirements.txt pins."""
    pins = re.findall(r"^([\w.-]+)==(\S+)$", (root / "requirements.txt").read_text(), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in pins}


def download_wheels(root: Path, folder: Path, python_version: str, given: Iterable[str], source: Iterable[str] = ()) -> None:
    """Fill `folder` with one wheel each of the packages that `list_roots` names and of what these need, in the pinned versions.

    Args:
        root: folder of the project.
        folder: where they go; other wheels in it are removed.
        python_version: version of Python on the other machine, ``3.12``; it is x86-64 Linux.
        given: canonical names of packages that the other machine has.
        source: options of pip, such as ``--no-index --find-links FOLDER``.

    Raises:
        BundleError: a package without a pin, or without a wheel for that machine.
    """
    environment = {"python_version": python_version, "python_full_version": f"{python_version}.0", "platform_machine": "x86_64",
                   "sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "implementation_name": "cpython",
                   "platform_python_implementation": "CPython", "extra": ""}
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in GLIBC] + ["--platform=manylinux2014_x86_64"]
    pins, wanted, seen = read_pins(root), list_roots(root, given), {canonicalize_name(name) for name in given}
    kept: set[Path] = set()
    while wanted:
        names = {canonicalize_name(each.name) for each in wanted}
        if missing := names - pins.keys():
            raise BundleError(f"requirements.txt: expected a pin of {', '.join(sorted(missing))}, found none")
        pinned = [f"{name}=={pins[name]}" for name in sorted(names)]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:",
                   "--implementation=cp", f"--python-version={python_version}", *platforms, "--dest", str(folder), *source, *pinned]
        if subprocess.run(command, check=False).returncode:
            raise BundleError(f"no wheels of {', '.join(pinned)} for Python {python_version} on x86-64 Linux, or pip could not fetch them, "
                              "see above; where the other machine has a package, name it: make gpu-bundle GIVEN=\"...\"")
        fetched = [path for path in folder.glob("*.whl") if parse_wheel_filename(path.name)[0] in names
                   and str(parse_wheel_filename(path.name)[1]) == pins[parse_wheel_filename(path.name)[0]]]
        kept.update(fetched)
        seen |= names
        needed = (each for path in fetched for each in read_requirements(path))
        wanted = [each for each in needed if canonicalize_name(each.name) not in seen
                  and (each.marker is None or each.marker.evaluate(environment))]
    for path in set(folder.glob("*.whl")) - kept:
        path.unlink()


def read_requirements(wheel: Path) -> list[Requirement]:
    """What a wheel says that its package needs."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        return [Requirement(line) for line in message_from_bytes(archive.read(name)).get_all("Requires-Dist", [])]


def pack_text(folder: Path, given: Path | None) -> Path:
    """The text, as JSON lines: a copy of `given`, or the documents of the default corpus, harvested on this machine.

    Raises:
        BundleError: a file that is not what source jsonl reads.
    """
    for old in folder.glob("text.jsonl*"):
        old.unlink()
    if given is not None:
        if given.suffix not in SUFFIXES or not given.is_file():
            raise BundleError(f"TEXT: expected a file of JSON lines that ends in {', '.join(SUFFIXES)}, found {given}")
        path = folder / f"text.jsonl{given.suffix.removeprefix('.jsonl')}"
        write_bytes(path, given.read_bytes())
        return path
    source = open_source(load_settings(DEFAULT).tokenize)
    assert isinstance(source, Source)
    lines = "".join(json.dumps({"text": text}) + "\n" for batch in source.read() for text in batch.texts())
    path = folder / "text.jsonl.zst"
    write_bytes(path, zstandard.compress(lines.encode(), 19))
    return path


def pack_tokenizer(folder: Path, text: Path, given: Path | None) -> None:
    """The tokenizer: a copy of `given`, or one trained on the training documents of `text` with the default settings."""
    params = load_settings(DEFAULT).tokenize.model_copy(update={"source": "jsonl", "path": str(text)})
    if given is not None:
        tokenizer = load_tokenizer(given)
        params = params.model_copy(update={"tokenizer": str(given), "vocab_size": tokenizer.vocab_size,
                                           "case_transform": tokenizer.case_transform})
    provide_tokenizer(params, open_source(params), folder / TOKENIZER)


def list_tree(root: Path) -> Iterator[str]:
    """Files of the project, tracked or new, without results."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", ".", ":!artifacts"]
    listing = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    return (name for name in listing.splitlines() if (root / name).exists())


def main() -> None:
    """Fill the folder and say what is in it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=BUNDLE)
    parser.add_argument("--python-version", default="3.12", help="of the other machine")
    parser.add_argument("--text", type=Path, help="JSON lines, .jsonl, .gz or .zst; the default corpus where not given")
    parser.add_argument("--tokenizer", type=Path, help="a SentencePiece model; trained on the text where not given")
    parser.add_argument("--given", nargs="+", default=GIVEN, help="packages that the other machine has, or can do without")
    parser.add_argument("--pip", nargs=argparse.REMAINDER, default=[], help="further options of pip download; the last argument")
    options = parser.parse_args()
    folder = options.folder
    (folder / WHEELS).mkdir(parents=True, exist_ok=True)
    try:
        download_wheels(Path(), folder / WHEELS, options.python_version, {canonicalize_name(name) for name in options.given}, options.pip)
        pack_tokenizer(folder, pack_text(folder, options.text), options.tokenizer)
    except ValueError as error:
        sys.exit(f"gpu-bundle: {error}")
    with tarfile.open(folder / TREE, "w:gz") as archive:
        for name in list_tree(Path()):
            archive.add(name)
    packed = [*sorted((folder / WHEELS).glob("*.whl")), find_text(folder), folder / TOKENIZER, folder / TREE]
    for path in packed:
        print(f"{path.stat().st_size:>12,}  {path.relative_to(folder)}")
    total = sum(path.stat().st_size for path in packed)
    print(f"{total:>12,}  bytes of {MAX_BYTES:,}")
    if total > MAX_BYTES:
        sys.exit(f"gpu-bundle: expected at most {MAX_BYTES:,} bytes, found {total:,}; use a smaller TEXT, or name more packages in GIVEN")


if __name__ == "__main__":
    main()

"""Downloads from a hub on this machine, each by a process of its own, as its settings are environment variables."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib.data.config import HubParams
from lib.data.hub import download_dataset
from tests.data.fake_hub import FakeHub, git_sha1, sha256
from tests.data.shard_files import shard_bytes

ROOT = Path(__file__).parents[2]
PREFIX = "prepared/"
SHARDS = f"{PREFIX}datasets/web_sp/"
CHUNK_BYTES = 10 << 20  # what huggingface_hub writes at a time
LARGE = f"{SHARDS}web_train_000001.bin"

PARAMS = {"repo": "owner/data", "revision": "main", "dataset": "web_sp", "start": "shards", "train_shards": 2}

DOWNLOAD = """
import json, sys
from lib.data.config import HubParams
from lib.data.hub import download_dataset
answers = []
for params in json.loads(sys.argv[1]):
    try:
        dataset = download_dataset(HubParams(**params))
        shards = dataset.shards and {part: list(map(str, getattr(dataset.shards, part))) for part in ("train", "val", "val_bytes")}
        answers.append({"tokenizer": str(dataset.tokenizer), "shards": shards, "documents": list(map(str, dataset.documents)),
                        "provenance": dataset.provenance})
    except ValueError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


def make_files() -> dict[str, bytes]:
    """A repository like the challenge's: manifest, datasets, tokenizers, documents; not all of them exist."""
    generator = np.random.default_rng(0)

    def shard(num_tokens: int) -> bytes:
        return shard_bytes(generator.integers(0, 1000, num_tokens).tolist())

    datasets = [
        {"name": "web_sp", "tokenizer_name": "sp", "path": "datasets/web_sp", "train_glob": "datasets/web_sp/web_train_*.bin",
         "val_glob": "datasets/web_sp/web_val_*.bin", "vocab_size": 1000, "stats": {"files_train": 3}},
        {"name": "plain", "tokenizer_name": "sp"}, {"name": "bytes", "tokenizer_name": "byte"},
        {"name": "gone", "tokenizer_name": "gone"}, {"name": "gap", "tokenizer_name": "sp"},
    ]
    tokenizers = [{"name": "sp", "kind": "sentencepiece_bpe", "model_path": "tokenizers/sp.model"},
                  {"name": "byte", "kind": "byte"}, {"name": "gone", "model_path": "tokenizers/gone.model"}]
    return {
        "README.md": b"about", "manifest.json": b'{"datasets": [], "tokenizers": []}',
        f"{PREFIX}manifest.json": json.dumps({"datasets": datasets, "tokenizers": tokenizers}).encode(),
        f"{PREFIX}tokenizers/sp.model": b"some model", f"{PREFIX}docs_selected.jsonl": b'{"text": "one"}\n' * 40,
        f"{SHARDS}web_val_000000.bin": shard(50), f"{SHARDS}web_val_000001.bin": shard(20), f"{SHARDS}web_val_bytes_000000.bin": shard(50),
        f"{SHARDS}web_train_000000.bin": shard(300), LARGE: shard(12 << 20), f"{SHARDS}web_train_000002.bin": shard(100),
        f"{PREFIX}datasets/plain/a_train_000001.bin": shard(9), f"{PREFIX}datasets/plain/a_val_000000.bin": shard(8),
        f"{PREFIX}datasets/gap/a_train_000000.bin": shard(9), f"{PREFIX}datasets/gap/a_train_000002.bin": shard(9),
        f"{PREFIX}datasets/gap/a_val_000000.bin": shard(9),
    }


FILES = make_files()
WANTED = [f"{PREFIX}tokenizers/sp.model", f"{SHARDS}web_train_000000.bin", LARGE,
          f"{SHARDS}web_val_000000.bin", f"{SHARDS}web_val_000001.bin", f"{SHARDS}web_val_bytes_000000.bin"]
PARTS = ("train", "val", "val_bytes")


@dataclass
class User:
    """Someone with a cache."""

    hub: FakeHub
    address: str
    home: Path
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, *changes: dict[str, Any]) -> subprocess.Popen[str]:
        """A process that downloads once for each change of `PARAMS`."""
        environment = {**os.environ, "HF_ENDPOINT": self.address, "HF_HOME": str(self.home), **self.environment}
        command = [sys.executable, "-c", DOWNLOAD, json.dumps([PARAMS | change for change in changes or [{}]])]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def download(self, *changes: dict[str, Any]) -> tuple[list[Any], str]:
        """What became of each download, an error's message or the dataset; and what was printed meanwhile."""
        process = self.start(*changes)
        output, printed = process.communicate()
        assert process.returncode == 0, printed
        return json.loads(output), printed

    def partial_sizes(self) -> list[int]:
        """Of the unfinished files in the cache."""
        sizes = []
        for path in self.home.glob("hub/*/blobs/*.incomplete"):
            with suppress(FileNotFoundError):  # finished meanwhile
                sizes.append(path.stat().st_size)
        return sizes


@pytest.fixture
def user(tmp_path: Path) -> Iterator[User]:
    hub = FakeHub(dict(FILES))
    with hub.serve() as address:
        yield User(hub, address, tmp_path / "home")


def check(user: User, dataset: dict[str, Any]) -> None:
    """All files of the default download are there, as they should be."""
    paths = [dataset["tokenizer"], *(path for part in PARTS for path in dataset["shards"][part])]
    assert [Path(path).name for path in paths] == [Path(name).name for name in WANTED]
    assert [Path(path).read_bytes() for path in paths] == [user.hub.files[name] for name in WANTED]
    assert not user.partial_sizes()
    assert dataset["provenance"] == {"name": "hub", "repo": "owner/data", "commit": user.hub.commit, "dataset": "web_sp",
                                     "files": {name: f"sha256 {sha256(user.hub.files[name])}" for name in WANTED}}


def test_what_is_needed_is_downloaded_once(user: User) -> None:
    user.environment = {"TQDM_POSITION": "-1"}  # huggingface_hub's bars would show on this machine, too
    (dataset,), printed = user.download()
    check(user, dataset)
    assert all(user.hub.transfers(name) == [0] for name in WANTED)
    assert not any(user.hub.transfers(name) for name in user.hub.files if name not in WANTED and not name.endswith("manifest.json"))
    lines = printed.splitlines()
    assert lines.pop(0).startswith(f"tokenize.hub.revision: main is commit {user.hub.commit} now; write that there to repeat this run")
    size = sum(len(FILES[name]) for name in WANTED)
    assert f"tokenize.hub: 6 files of {size / 1e6:.1f} MB to download" in printed
    assert re.search(rf"verify: 100% {size / 1e6:.1f}M/", printed)
    user.hub.requests.clear()
    (again,), printed = user.download()
    assert again == dataset
    assert not [path for method, path, _ in user.hub.requests if "/resolve/" in path]
    assert "to download" not in printed


def test_a_pinned_commit_needs_no_network_the_second_time(user: User) -> None:
    (dataset,), printed = user.download({"revision": user.hub.commit})
    assert "tokenize.hub.revision" not in printed
    check(user, dataset)
    user.hub.requests.clear()
    user.environment = {"HF_HUB_OFFLINE": "1"}
    (again, unknown, branch), _ = user.download({"revision": user.hub.commit}, {"revision": "0" * 40}, {})
    assert again == dataset
    assert not user.hub.requests
    for message in (unknown, branch):
        assert re.search(r"owner/data at .*: expected to get revision .*; without a network, tokenize\.hub\.revision must be a", message)


@pytest.mark.slow
def test_a_broken_transfer_goes_on_where_it_broke(user: User) -> None:
    user.hub.cut_after = {LARGE: [CHUNK_BYTES + 100, 5000]}
    (dataset,), _ = user.download()
    check(user, dataset)
    assert user.hub.transfers(LARGE)[:2] == [0, CHUNK_BYTES]
    assert all(user.hub.transfers(name) == [0] for name in WANTED if name != LARGE)


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_files_that_arrived_before_a_download_was_stopped_are_kept(user: User, signal_number: int) -> None:
    user.environment = {"HF_HUB_DOWNLOAD_TIMEOUT": "1"}  # seconds until a thread that waits for the server sees that it is to stop
    user.hub.stall_after = {LARGE: CHUNK_BYTES + 100}
    process = user.start()
    deadline = time.monotonic() + 60
    while not (all(map(user.hub.transfers, WANTED)) and user.partial_sizes() == [CHUNK_BYTES]) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal_number)
    user.hub.stall_after = {}
    process.communicate()
    assert process.returncode != 0 or signal_number == signal.SIGINT  # which is lost in a callback of the library now and then
    user.hub.requests.clear()
    (dataset,), _ = user.download()
    for path, name in zip([dataset["tokenizer"], *(path for part in PARTS for path in dataset["shards"][part])], WANTED, strict=True):
        assert Path(path).read_bytes() == user.hub.files[name]
    assert user.hub.transfers(LARGE) == ([0] if signal_number == signal.SIGKILL else [])  # Ctrl-C waits for what is on its way
    assert not any(user.hub.transfers(name) for name in WANTED if name != LARGE)


OUTSIDE = "../../../../../../written"


@pytest.mark.parametrize(("name", "value"), [
    ("sha", OUTSIDE), ("sha", "main"), ("oid", OUTSIDE), ("lfs.oid", OUTSIDE), ("lfs.oid", "/tmp/written"), ("lfs.oid", "A" * 64),
    ("lfs.oid", 3), ("path", OUTSIDE), ("path", "/etc/written"), ("path", "a/../../b"), ("ETag", f'"{OUTSIDE}"'),
    ("X-Linked-Etag", f'"{OUTSIDE}"'), ("X-Linked-Etag", '"' + "0" * 63 + '"'), ("X-Repo-Commit", OUTSIDE),
])
def test_what_a_server_says_names_no_file_unless_it_is_a_checksum(user: User, name: str, value: Any) -> None:
    user.hub.stated = {name: value}
    if name == "ETag":
        user.hub.stated["X-Linked-Etag"] = f'"{OUTSIDE}"'
    (message,), _ = user.download()
    assert re.search(r"tokenize\.hub\.repo: expected (a checksum in hexadecimal digits as|paths inside the repository, found)", message)
    assert "\n" not in message
    written = [path for path in user.home.parent.rglob("*") if path.is_file() and "written" in path.name]
    assert written == []


def test_processes_that_download_together_share_the_work(user: User) -> None:
    processes = [user.start(), user.start()]
    for process in processes:
        output, printed = process.communicate()
        assert process.returncode == 0, printed
        check(user, json.loads(output)[0])
    assert all(user.hub.transfers(name) == [0] for name in WANTED)


def test_another_commit_shares_what_has_not_changed(user: User) -> None:
    user.download()
    user.hub.change({f"{SHARDS}web_val_000001.bin": shard_bytes([1, 2, 3])})
    (dataset,), _ = user.download()
    check(user, dataset)
    assert [name for name in WANTED if user.hub.transfers(name)] == [f"{SHARDS}web_val_000001.bin"]


def test_damaged_files_are_refused_and_fetched_again(user: User) -> None:
    damaged = [f"{SHARDS}web_val_000001.bin", f"{SHARDS}web_train_000000.bin"]
    user.hub.damaged = set(damaged)
    (message, again), _ = user.download({}, {})
    for name in damaged:
        size = len(FILES[name])
        pattern = rf"^{name}: expected {size} bytes with sha256 {sha256(FILES[name])}, found {size} bytes with sha256 [0-9a-f]{{64}}$"
        assert re.search(pattern, message, re.MULTILINE)
        assert user.hub.transfers(name) == [0, 0]  # the second time, too
    assert message.count("expected") == 2
    assert again == message
    user.hub.damaged = set()
    (dataset,), _ = user.download()
    check(user, dataset)
    assert user.hub.transfers(LARGE) == [0]


@pytest.mark.slow
def test_files_that_changed_in_the_cache_are_refused(user: User) -> None:
    (dataset,), _ = user.download()
    for path, content in ((dataset["shards"]["val"][0], b"short"), (dataset["tokenizer"], b"some modem")):
        Path(path).write_bytes(content)
    manifest = f"{PREFIX}manifest.json"
    (message,), _ = user.download()
    assert re.search(r"web_val_000000\.bin: expected 1124 bytes .*, found 5 bytes", message)
    assert "sp.model: expected 10 bytes" in message
    blob = next(user.home.glob(f"hub/*/blobs/{git_sha1(FILES[manifest])}"))
    blob.write_bytes(FILES[manifest] + b" ")
    (message, repaired), _ = user.download({}, {})
    assert f"{manifest}: expected {len(FILES[manifest])} bytes with git-sha1 {git_sha1(FILES[manifest])}, found" in message
    check(user, repaired)


def test_documents_are_one_file(user: User) -> None:
    (dataset,), _ = user.download({"start": "documents"})
    assert dataset["shards"] is None
    assert [Path(path).read_bytes() for path in dataset["documents"]] == [FILES[f"{PREFIX}docs_selected.jsonl"]]
    assert set(dataset["provenance"]["files"]) == {f"{PREFIX}docs_selected.jsonl", f"{PREFIX}tokenizers/sp.model"}
    assert Path(dataset["tokenizer"]).read_bytes() == b"some model"


def test_a_manifest_may_leave_out_the_folder_of_a_dataset(user: User) -> None:
    (dataset,), _ = user.download({"dataset": "plain", "train_shards": 1})
    assert [Path(path).name for part in PARTS for path in dataset["shards"][part]] == ["a_train_000001.bin", "a_val_000000.bin"]


def test_what_is_not_there_is_named(user: User) -> None:
    user.hub.missing = {f"{SHARDS}web_val_000001.bin"}
    cases: dict[str, dict[str, Any]] = {
        r"owner/data at [0-9a-f]{40}: expected the file prepared/datasets/web_sp/web_val_000001\.bin, which its listing names, found": {},
        r"tokenize\.hub\.dataset: expected one of web_sp, plain, bytes, gone, gap, which owner/data .* has, found web": {"dataset": "web"},
        r"tokenize\.hub\.train_shards: expected at most 3, as many as web_sp has in owner/data .*, found 4": {"train_shards": 4},
        r"tokenize\.hub\.dataset: expected a dataset with a SentencePiece model, found bytes with the tokenizer byte": {"dataset": "bytes"},
        r"expected the file prepared/tokenizers/gone\.model \(the tokenizer of gone\), found none": {"dataset": "gone"},
        r"datasets/gap of owner/data .*: expected train shard number 1 between .*, found none": {"dataset": "gap"},
        r"tokenize\.hub\.revision: expected a commit, branch or tag of owner/data, found none named develop": {"revision": "develop"},
        r"tokenize\.hub\.repo: expected a dataset repository that can be read, found none named owner/other": {"repo": "owner/other"},
        r"tokenize\.hub\.repo: expected a dataset repository that can be read, found none named a/b/c": {"repo": "a/b/c"},
    }
    answers, _ = user.download(*cases.values())
    for pattern, answer in zip(cases, answers, strict=True):
        assert re.search(pattern, answer)


@pytest.mark.parametrize(("manifest", "message"), [
    (None, r"tokenize\.hub\.repo: expected a repository with a manifest\.json, as the challenge's, found none in owner/data at"),
    (b"{", r"manifest\.json: not valid JSON"),
    (b"[]", r"manifest\.json of owner/data .*: expected datasets and tokenizers"),
    (b'{"datasets": [{"name": 3}], "tokenizers": []}', r"expected datasets and tokenizers .*, found datasets\.0\.name"),
])
def test_a_repository_of_another_kind_is_refused(tmp_path: Path, manifest: bytes | None, message: str) -> None:
    hub = FakeHub({"README.md": b"about"} | ({} if manifest is None else {"manifest.json": manifest}))
    with hub.serve() as address:
        (answer,), _ = User(hub, address, tmp_path / "home").download()
    assert re.search(message, answer)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"huggingface_hub for source hub, found none; run pip install -r requirements/hub\.txt"):
        download_dataset(HubParams.model_validate(PARAMS))

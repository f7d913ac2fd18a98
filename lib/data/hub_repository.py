"""One commit of a dataset repository on the Hugging Face Hub: its files, downloaded to huggingface_hub's own cache and verified.

The cache is shared by all clones and programs; the environment variable HF_HOME moves it. A file grows beside its final place
there, so that a download goes on where an earlier one stopped, whichever process that was. The package huggingface_hub is
imported when a repository is opened, because no other source needs it.
"""

import hashlib
import importlib
import io
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from typing_extensions import Buffer

from lib.artifacts.files import ArtifactError, read_json, write_json
from lib.errors import UserError
from lib.progress import Progress, say

NUM_THREADS = 8  # one file each
COMMIT = re.compile(r"[0-9a-f]{40}")
HASH_BYTES = 1 << 20

T = TypeVar("T")
Report = Callable[[int], None]
"""Told how many more bytes are done; raises when all work is to stop."""


@dataclass(frozen=True)
class RemoteFile:
    """What the hub states of a file.

    Attributes:
        size: in bytes.
        algorithm: sha256; or git-sha1, that of git's blob, for small files outside of large-file storage.
        digest: in hexadecimal digits; it is the file's name in the cache, too.
    """

    size: int
    algorithm: str
    digest: str

    def __str__(self) -> str:
        return f"{self.size} bytes with {self.algorithm} {self.digest}"


class Repository:
    """A dataset repository at one commit.

    Attributes:
        commit: 40 hexadecimal digits.
        files: what it holds, by path.

    Args:
        repo: owner and name.
        revision: a commit, branch or tag. With a commit whose files are all in the cache, no network is needed.

    Raises:
        ValueError: huggingface_hub is not installed, no such repository or revision, or no network.
    """

    def __init__(self, repo: str, revision: str) -> None:
        try:
            self._hub = importlib.import_module("huggingface_hub")
        except ModuleNotFoundError:
            raise UserError("tokenize.source: expected the package huggingface_hub for source hub, found none; "
                             "run pip install .[hub]") from None
        for part in ("file_download", "hf_api", "utils"):  # the package loads its parts when they are asked for
            importlib.import_module(f"huggingface_hub.{part}")
        self._hub.utils.disable_progress_bars()
        self._repo = repo
        self.commit = revision
        with self._errors(f"revision {revision}"):
            if not COMMIT.fullmatch(revision):
                self.commit = self._hub.HfApi().dataset_info(repo, revision=revision).sha
                say(f"tokenize.hub.revision: {revision} is commit {self.commit} now; write that there to repeat this run, with or "
                    "without a network")
            self.files = self._list_files()

    def __str__(self) -> str:
        return f"{self._repo} at {self.commit}"

    def fetch(self, names: Iterable[str]) -> dict[str, Path]:
        """Local paths of files by their names in the repository, downloaded if need be, and verified.

        Raises:
            ValueError: a file that is not there any more, or no network; what has been downloaded is kept.
            ArtifactError: files with another size or checksum than the hub states; they are deleted from the cache.
        """
        names = list(names)
        paths = dict(zip(names, self._work_through(names, self._download, "download", self._num_present), strict=True))
        found = dict(zip(names, self._work_through(names, lambda name, report: _measure(paths[name], self.files[name], report),
                                                   "verify", lambda name: 0), strict=True))
        if wrong := [name for name in names if found[name] != self.files[name]]:
            for name in wrong:
                paths[name].resolve().unlink(missing_ok=True)
                paths[name].unlink(missing_ok=True)
            problems = "\n".join(f"{name}: expected {self.files[name]}, found {found[name]}" for name in wrong)
            raise ArtifactError(f"{self}: damaged files, now deleted from the cache; rerun to download them again\n{problems}")
        return paths

    def _list_files(self) -> dict[str, RemoteFile]:
        """The listing never changes, so it is kept for runs without a network."""
        folder = Path(self._hub.cached_assets_path("albatross", namespace=self._repo, subfolder="listings"))
        listing = folder / f"{self.commit}.json"
        with self._hub.utils.WeakFileLock(listing.with_suffix(".lock")):
            if not listing.exists():
                entries = self._hub.HfApi().list_repo_tree(self._repo, recursive=True, revision=self.commit, repo_type="dataset")
                files = (entry for entry in entries if isinstance(entry, self._hub.hf_api.RepoFile))
                write_json(listing, {file.path: asdict(RemoteFile(file.size, "git-sha1", file.blob_id) if file.lfs is None else
                                                       RemoteFile(file.lfs.size, "sha256", file.lfs.sha256)) for file in files})
        return {name: RemoteFile(**values) for name, values in read_json(listing).items()}

    def _download(self, name: str, report: Report) -> Path:
        if (cached := self._cached(name)) is not None:
            return cached
        file, blob = self.files[name], self._blob(name)
        lock = Path(self._hub.constants.HF_HUB_CACHE, ".locks", blob.parts[-3], f"{file.digest}.lock")  # huggingface_hub's own
        for path in (blob, lock):
            path.parent.mkdir(parents=True, exist_ok=True)
        with self._errors(name):
            with self._hub.utils.WeakFileLock(lock):
                if not blob.exists():
                    partial = _partial(blob)
                    with _Growing(partial, report) as growing:
                        if growing.tell() > file.size:
                            growing.seek(0)
                            growing.truncate()
                        url = self._hub.hf_hub_url(self._repo, name, repo_type="dataset", revision=self.commit)
                        headers = self._hub.utils.build_hf_headers() | {"Accept-Encoding": "identity"}
                        self._hub.file_download.http_get(url, growing, resume_size=growing.tell(), headers=headers, expected_size=file.size)
                    partial.replace(blob)
            return Path(self._hub.hf_hub_download(self._repo, name, repo_type="dataset", revision=self.commit))  # names what is there

    def _cached(self, name: str) -> Path | None:
        cached = self._hub.try_to_load_from_cache(self._repo, name, repo_type="dataset", revision=self.commit)
        return Path(cached) if isinstance(cached, str) else None

    def _blob(self, name: str) -> Path:
        folder = self._hub.file_download.repo_folder_name(repo_id=self._repo, repo_type="dataset")
        return Path(self._hub.constants.HF_HUB_CACHE, folder, "blobs", self.files[name].digest)

    def _num_present(self, name: str) -> int:
        blob = self._blob(name)
        if self._cached(name) is not None or blob.exists():
            return self.files[name].size
        return _partial(blob).stat().st_size if _partial(blob).exists() else 0

    def _work_through(self, names: list[str], work: Callable[[str, Report], T], description: str,
                      num_done: Callable[[str], int]) -> list[T]:
        """What `work` returns for each file, done in threads; the first error, or an interruption, stops all of them."""
        lock, stop = threading.Lock(), threading.Event()
        total, initial = (sum(map(count, names)) for count in (lambda name: self.files[name].size, num_done))
        with (Progress(description, total, "B", enabled=initial < total, initial=initial) as progress,
              ThreadPoolExecutor(NUM_THREADS, description) as pool):

            def report(num_bytes: int) -> None:
                if stop.is_set():
                    raise _StoppedError
                with lock:
                    progress.update(num_bytes)

            futures = [pool.submit(work, name, report) for name in names]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)
        for future in done:  # an error there, before those of threads that were stopped for it
            future.result()
        return [future.result() for future in futures]

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Errors of huggingface_hub as those of this project; `what` was asked for."""
        errors = self._hub.errors
        try:
            yield
        except (errors.RepositoryNotFoundError, errors.HFValidationError):
            raise UserError(f"tokenize.hub.repo: expected a dataset repository that can be read, found none named {self._repo}; if it is "
                             "private or gated, log in with `hf auth login`") from None
        except errors.RevisionNotFoundError:
            raise UserError(f"tokenize.hub.revision: expected a commit, branch or tag of {self._repo}, found none named "
                             f"{self.commit}") from None
        except errors.EntryNotFoundError:
            raise UserError(f"{self}: expected the file {what}, which its listing names, found none") from None
        except (OSError, errors.HTTPError) as error:
            raise UserError(f"{self}: expected to get {what}, found: {error}; see to the network and to free space in "
                             f"{self._hub.constants.HF_HUB_CACHE} (HF_HOME moves it), then rerun, what has arrived is kept; without a "
                             "network, tokenize.hub.revision must be a commit that was downloaded before") from None


class _StoppedError(Exception):
    """Ends work in a thread after an error in another."""


class _Growing(io.BufferedWriter):
    """A file that is appended to, and reports how it grows."""

    def __init__(self, path: Path, report: Report) -> None:
        super().__init__(io.FileIO(path, "a"))
        self._report = report

    def write(self, content: Buffer) -> int:
        self._report(memoryview(content).nbytes)
        return super().write(content)

    def truncate(self, size: int | None = None) -> int:
        """Cut off at the current position, as when the server starts from the beginning again."""
        position = self.tell()
        self._report(position - self.seek(0, io.SEEK_END))
        self.seek(position)
        return super().truncate(size)


def _partial(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.incomplete")


def _measure(path: Path, stated: RemoteFile, report: Report) -> RemoteFile:
    """Size and digest of a local file."""
    size = path.stat().st_size
    digest = hashlib.sha256() if stated.algorithm == "sha256" else hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(HASH_BYTES):
            digest.update(chunk)
            report(len(chunk))
    return RemoteFile(size, stated.algorithm, digest.hexdigest())

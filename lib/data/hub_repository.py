"""One commit of a dataset repository on the Hugging Face Hub: its files, downloaded by huggingface_hub to its own cache, and verified.

The cache is shared by all clones and programs; the environment variable HF_HOME moves it. huggingface_hub names files there by what the
server says (checksum, commit), so that answers with other names are refused. The package is imported when a repository is opened, because
no other source needs it.
"""

import hashlib
import importlib
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from glob import escape
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from lib.artifacts.files import ArtifactError, read_json, write_json
from lib.errors import UserError
from lib.progress import Progress, say

SHA1, SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")
MAX_FILES = 100_000  # of a repository, far beyond the challenge's
HASH_BYTES = 1 << 20


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
        UserError: huggingface_hub is not installed, no such repository or revision, no network, or a server that says what no hub says.
    """

    def __init__(self, repo: str, revision: str) -> None:
        try:
            self._hub = importlib.import_module("huggingface_hub")
        except ModuleNotFoundError:
            raise UserError("tokenize.source: expected the package huggingface_hub for source hub, found none; "
                            "run pip install -r requirements/hub.txt") from None
        for part in ("file_download", "hf_api", "utils"):  # the package loads its parts when they are asked for
            importlib.import_module(f"huggingface_hub.{part}")
        if not sys.stderr.isatty():
            self._hub.utils.disable_progress_bars()
        self._hub.set_client_factory(self._make_client)
        self._repo = repo
        self.commit = revision
        with self._errors(f"revision {revision}"):
            if not SHA1.fullmatch(revision):
                self.commit = _check(self._hub.HfApi().dataset_info(repo, revision=revision).sha, "sha", SHA1)
                say(f"tokenize.hub.revision: {revision} is commit {self.commit} now; write that there to repeat this run, with or "
                    "without a network")
            self.files = self._list_files()

    def __str__(self) -> str:
        return f"{self._repo} at {self.commit}"

    def fetch(self, names: Iterable[str]) -> dict[str, Path]:
        """Local paths of files by their names in the repository, downloaded if need be, and verified.

        Raises:
            UserError: a file that is not there any more, or no network; files that have been downloaded are kept.
            ArtifactError: files with another size or checksum than the hub states; they are deleted from the cache.
        """
        names = list(names)
        paths = {name: path for name in names if (path := self._cached(name))}
        if missing := [name for name in names if name not in paths]:
            num_bytes = sum(self.files[name].size for name in missing)
            say(f"tokenize.hub: {len(missing)} files of {num_bytes / 1e6:,.1f} MB to download")
            with self._errors(f"the files {', '.join(missing)}"):
                self._hub.snapshot_download(self._repo, repo_type="dataset", revision=self.commit,
                                            allow_patterns=list(map(escape, missing)))
            paths |= {name: path for name in missing if (path := self._cached(name))}
        if missing := [name for name in names if name not in paths]:
            raise UserError(f"{self}: expected the file {missing[0]}, which its listing names, found none")
        wrong = []
        with Progress("verify", sum(self.files[name].size for name in names), "B") as progress:
            for name in names:
                if (found := _measure(paths[name], self.files[name], progress)) != self.files[name]:
                    wrong.append(f"{name}: expected {self.files[name]}, found {found}")
                    paths[name].resolve().unlink(missing_ok=True)
                    paths[name].unlink(missing_ok=True)
        if wrong:
            raise ArtifactError("\n".join([f"{self}: damaged files, now deleted from the cache; rerun to download them again", *wrong]))
        return {name: paths[name] for name in names}

    def _list_files(self) -> dict[str, RemoteFile]:
        """The listing never changes, so it is kept for runs without a network."""
        folder = Path(self._hub.cached_assets_path("albatross", namespace=self._repo, subfolder="listings"))
        listing = folder / f"{self.commit}.json"
        if not listing.exists():
            entries = self._hub.HfApi().list_repo_tree(self._repo, recursive=True, revision=self.commit, repo_type="dataset")
            found = list(islice((entry for entry in entries if isinstance(entry, self._hub.hf_api.RepoFile)), MAX_FILES + 1))
            if len(found) > MAX_FILES:
                raise UserError(f"tokenize.hub.repo: expected at most {MAX_FILES:,} files, found more in {self}")
            write_json(listing, {entry.path: asdict(_describe(entry)) for entry in found})
        return {name: RemoteFile(**values) for name, values in read_json(listing).items()}

    def _cached(self, name: str) -> Path | None:
        cached = self._hub.try_to_load_from_cache(self._repo, name, repo_type="dataset", revision=self.commit)
        return Path(cached) if isinstance(cached, str) else None

    def _make_client(self) -> Any:
        client = importlib.import_module("huggingface_hub.utils._http").default_client_factory()
        client.event_hooks = {**client.event_hooks, "response": [*client.event_hooks["response"], _check_names]}
        return client

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
        except errors.RemoteEntryNotFoundError as error:
            url = unquote(str(error))
            name = max((name for name in self.files if name in url), key=len, default=what)
            raise UserError(f"{self}: expected the file {name}, which its listing names, found none") from None
        except (OSError, errors.HTTPError, errors.IncompleteSnapshotError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self}: expected to get {what}, found: {reason}; see to the network and to free space in "
                            f"{self._hub.constants.HF_HUB_CACHE} (HF_HOME moves it), then rerun, files that have arrived are kept; without "
                            "a network, tokenize.hub.revision must be a commit that was downloaded before") from None
        except UserError:
            raise
        except Exception as error:  # answers that the package cannot read
            raise UserError(f"{self}: expected a server that speaks the Hugging Face Hub's protocol, found answers that do not "
                            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); see to HF_ENDPOINT") from None


def _describe(entry: Any) -> RemoteFile:
    """What an entry of a listing states; raises UserError where its path leads out of the repository."""
    path = PurePosixPath(entry.path)
    if path.is_absolute() or ".." in path.parts or str(path) != entry.path or "\\" in entry.path or not entry.path.isprintable():
        raise UserError(f"tokenize.hub.repo: expected paths inside the repository, found {entry.path!r} in its listing")
    if entry.lfs is None:
        return RemoteFile(entry.size, "git-sha1", entry.blob_id)
    return RemoteFile(entry.lfs.size, "sha256", entry.lfs.sha256)


def _check_names(response: Any) -> None:
    """A hook that sees every answer before huggingface_hub does: what it will name files by must be checksums.

    It takes them from the headers of a HEAD, and from listings.

    Raises:
        UserError: something else is there.
    """
    if response.status_code >= 400:
        return
    if response.request.method == "HEAD":
        etag = "X-Linked-Etag" if "X-Linked-Etag" in response.headers else "ETag"
        for header, forms in ((etag, (SHA256, SHA1)), ("X-Repo-Commit", (SHA1,))):
            if header in response.headers:
                _check(response.headers[header].removeprefix("W/").strip('"'), header, *forms)
    elif "/tree/" in response.request.url.path:
        response.read()
        for entry in response.json():
            _check(entry["oid"], "oid", SHA1)
            if lfs := entry.get("lfs"):
                _check(lfs["oid"], "lfs.oid", SHA256)


def _check(value: Any, what: str, *forms: re.Pattern[str]) -> str:
    if not isinstance(value, str) or not any(form.fullmatch(value) for form in forms):
        raise UserError(f"tokenize.hub.repo: expected a checksum in hexadecimal digits as {what}, found {str(value)[:80]!r}; the server is "
                        "no Hugging Face Hub")
    return value


def _measure(path: Path, stated: RemoteFile, progress: Progress) -> RemoteFile:
    """Size and digest of a local file."""
    size = path.stat().st_size
    digest = hashlib.sha256() if stated.algorithm == "sha256" else hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(HASH_BYTES):
            digest.update(chunk)
            progress.update(len(chunk))
    return RemoteFile(size, stated.algorithm, digest.hexdigest())

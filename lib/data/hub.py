"""Source hub: a dataset repository of the Hugging Face Hub that is laid out as the parameter-golf challenge's.

Its ``manifest.json`` names datasets and their tokenizers; paths in it count from its own folder, wherever that is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ValidationError

from lib.artifacts.files import read_json
from lib.data.config import HubParams
from lib.data.hub_repository import Repository
from lib.data.shards import Shards, find_sidecars, sort_shards
from lib.errors import UserError

MANIFEST = "manifest.json"
DOCUMENTS = "docs_selected.jsonl"
"""The documents that all datasets of the challenge were made from, beside the manifest."""


class _Dataset(BaseModel):
    name: str
    tokenizer_name: str
    path: str | None = None
    train_glob: str | None = None
    val_glob: str | None = None


class _Tokenizer(BaseModel):
    name: str
    model_path: str | None = None


class _Manifest(BaseModel):
    """What is read of a manifest; it holds more."""

    datasets: list[_Dataset]
    tokenizers: list[_Tokenizer]


@dataclass(frozen=True)
class HubDataset:
    """A dataset in the local cache.

    Attributes:
        tokenizer: its SentencePiece model.
        shards: its token shards, if it is started from them.
        documents: the files with the documents otherwise.
        provenance: repository, commit and files with their checksums.
    """

    tokenizer: Path
    shards: Shards | None
    documents: tuple[Path, ...]
    provenance: dict[str, Any]


def download_dataset(params: HubParams) -> HubDataset:
    """Download what `params` names, as far as the cache does not have it, and verify all of it.

    Raises:
        ValueError: a repository, revision, dataset or file that does not exist; more training shards than there are; the package
            huggingface_hub is not installed; no network.
        ArtifactError: a file with another checksum than the hub states.
    """
    repository = Repository(params.repo, params.revision)
    folder, dataset, tokenizers = _find_dataset(repository, params.dataset)
    model = _model_path(repository, folder, dataset, tokenizers)
    if params.start == "documents":
        names = {"documents": [_require(repository, str(folder / DOCUMENTS), "for tokenize.hub.start: documents")]}
    else:
        names = _shard_names(repository, folder, dataset)
        available = len(names["train"])
        if params.train_shards > available:
            raise UserError(f"tokenize.hub.train_shards: expected at most {available}, as many as {params.dataset} has in {repository}, "
                            f"found {params.train_shards}")
        names["train"] = names["train"][:params.train_shards]
        names["val_bytes"] = find_sidecars(names["val"], repository.files)
    paths = repository.fetch([model, *(name for part in names.values() for name in part)])
    shards = None
    if params.start == "shards":
        shards = Shards(*(tuple(paths[name] for name in names[part]) for part in ("train", "val", "val_bytes")))
    provenance = {"name": "hub", "repo": params.repo, "commit": repository.commit, "dataset": params.dataset,
                  "files": {name: f"{file.algorithm} {file.digest}" for name in paths for file in [repository.files[name]]}}
    return HubDataset(paths[model], shards, tuple(paths[name] for name in names.get("documents", [])), provenance)


def _find_dataset(repository: Repository, name: str) -> tuple[PurePosixPath, _Dataset, Mapping[str, _Tokenizer]]:
    """The folder of the manifest that has the dataset, its entry, and the manifest's tokenizers by name."""
    manifests = sorted((path for path in map(PurePosixPath, repository.files) if path.name == MANIFEST),
                       key=lambda path: (len(path.parts), path))
    if not manifests:
        raise UserError(f"tokenize.hub.repo: expected a repository with a {MANIFEST}, as the challenge's, found none in {repository}")
    known: list[str] = []
    for path, local in repository.fetch(map(str, manifests)).items():
        try:
            manifest = _Manifest.model_validate(read_json(local))
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            raise UserError(f"{path} of {repository}: expected datasets and tokenizers as in the challenge's manifest, found "
                            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
        for dataset in manifest.datasets:
            if dataset.name == name:
                return PurePosixPath(path).parent, dataset, {tokenizer.name: tokenizer for tokenizer in manifest.tokenizers}
        known += [dataset.name for dataset in manifest.datasets]
    raise UserError(f"tokenize.hub.dataset: expected one of {', '.join(known)}, which {repository} has, found {name}")


def _model_path(repository: Repository, folder: PurePosixPath, dataset: _Dataset, tokenizers: Mapping[str, _Tokenizer]) -> str:
    tokenizer = tokenizers.get(dataset.tokenizer_name)
    if tokenizer is None or tokenizer.model_path is None:
        raise UserError(f"tokenize.hub.dataset: expected a dataset with a SentencePiece model, found {dataset.name} with the tokenizer "
                        f"{dataset.tokenizer_name}, for which the {MANIFEST} of {repository} names none")
    return _require(repository, str(folder / tokenizer.model_path), f"the tokenizer of {dataset.name}")


def _shard_names(repository: Repository, folder: PurePosixPath, dataset: _Dataset) -> dict[str, list[str]]:
    inside = dataset.path or f"datasets/{dataset.name}"
    globs = (dataset.train_glob or f"{inside}/*_train_*.bin", dataset.val_glob or f"{inside}/*_val_*.bin")
    patterns = [str(folder / glob) for glob in globs]
    matching = (name for name in repository.files if any(fnmatchcase(name, pattern) for pattern in patterns))
    return sort_shards(matching, f"{inside} of {repository}")


def _require(repository: Repository, name: str, what: str) -> str:
    if name not in repository.files:
        raise UserError(f"{repository}: expected the file {name} ({what}), found none")
    return name

"""Section ``tokenize``: which documents, how they are split, and their tokenizer."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from lib.params import NonNegative, Params, Positive, PositiveFloat

SourceName = Literal["embedded", "jsonl", "shards", "hub"]

NUM_RESERVED_PIECES = 4 + 256
"""Control and unknown pieces (pad 0, bos 1, eos 2, unk 3) and one piece for each byte value."""

NO_FILE = "data/README.md"
"""`tokenize.path` of source hub, and `val_path` and `heldout_path` where there is none: a file that every clone has and that is not
read, because DVC wants a path to depend on and cannot take null for one."""

OpenFraction = Annotated[float, Field(gt=0, lt=1)]


class HubParams(Params):
    """``tokenize.hub``: a dataset of the Hugging Face Hub, laid out as that of the parameter-golf challenge."""

    repo: Annotated[str, Field(min_length=1)]
    """Owner and name of the dataset repository."""
    revision: Annotated[str, Field(min_length=1)]
    """Commit, 40 hexadecimal digits; or a branch or tag, which is resolved to a commit that the manifest records."""
    dataset: Annotated[str, Field(min_length=1)]
    """Name of a dataset in the repository's ``manifest.json``; it names the tokenizer too."""
    start: Literal["shards", "documents"]
    """What is downloaded: the dataset's token shards, or the raw documents, which are tokenized here."""
    train_shards: Positive
    """Training shards to download, the first so many."""


class ExpectParams(Params):
    """``tokenize.expect``: known facts about the validation text; null = not checked."""

    val_documents: Positive | None
    """Number of validation documents."""
    val_targets: Positive | None
    """Number of target tokens: all but the first token."""
    val_bytes: Positive | None
    """Bytes of text that they stand for."""
    val_bytes_per_token: PositiveFloat | None
    """The same per target token; it may differ by one unit of the last digit that is given, zeros at the end not counted."""
    val_sidecar_bytes_per_token: PositiveFloat | None
    """Bytes per target token by the byte side-cars of published shards, which are not what counts here; as precise."""


class TokenizeParams(Params):
    """Section ``tokenize``."""

    source: SourceName
    """Where documents come from; the registry is `lib.data.corpus.SOURCES`."""
    path: Annotated[str, Field(min_length=1)]
    """embedded: the requirements file with the exact pins of `packages`; jsonl: a file, or a folder of files; shards: a folder with
    published ``*_train_*.bin`` and ``*_val_*.bin``; hub: not read, `NO_FILE`."""
    val_path: Annotated[str, Field(min_length=1)]
    """A file, or a folder of files, of JSON lines whose documents, all of them, only the evaluation sees; `NO_FILE` where there is none."""
    heldout_path: Annotated[str, Field(min_length=1)]
    """The same for the documents that models are selected by."""
    pattern: Annotated[str, Field(min_length=1)]
    """Which files inside a folder of JSON lines, as a glob; not used for a single file."""
    packages: tuple[str, ...]
    """embedded: distributions that are harvested beside the standard library."""
    hub: HubParams
    """hub: what is downloaded."""
    min_document_bytes: NonNegative
    """Documents with fewer UTF-8 bytes are left out; 0 for published shards, which are taken as they are."""
    heldout_fraction: OpenFraction | None
    """Expected fraction of the documents, for published shards of the training documents, that is held out for model selection; null
    where `heldout_path` has them."""
    val_fraction: OpenFraction | None
    """Expected fraction of the documents that only the evaluation sees; null where `val_documents`, `val_path` or the
    shards say which."""
    val_documents: Positive | None
    """jsonl, hub from documents: the first so many documents are those that only the evaluation sees; or null."""
    tokenizer: Annotated[str, Field(min_length=1)] | None
    """A SentencePiece model file; null to train one on training documents, and for hub, whose dataset names its own."""
    vocab_size: Annotated[int, Field(gt=NUM_RESERVED_PIECES, le=65536)]
    """Number of pieces; a given model must have exactly as many."""
    case_transform: bool
    """Capitals are written as operators and small letters, without loss; a given tokenizer must have the operators as pieces."""
    tokenizer_training_bytes: Positive
    """The tokenizer is trained on the first training documents, up to this many UTF-8 bytes."""
    shard_tokens: Annotated[int, Field(gt=0, lt=2**31)]
    """Tokens in each shard file but the last of a split; the file's header holds them as int32."""
    expect: ExpectParams

    @model_validator(mode="after")
    def _check(self) -> Self:
        val_fraction = self.val_fraction or 0
        if (self.heldout_fraction or 0) + val_fraction >= 1:
            raise ValueError(f"heldout_fraction: expected less than 1 - val_fraction = {1 - val_fraction:g}, so that training "
                             f"documents remain, found {self.heldout_fraction:g}")
        if len(set(self.packages)) != len(self.packages):
            raise ValueError(f"packages: expected each distribution once, found {list(self.packages)}")
        self._check_heldout_documents()
        self._check_validation_documents()
        if self.source == "shards" and self.tokenizer is None:
            raise ValueError("tokenizer: expected the SentencePiece .model file that made the shards, found null")
        if self.source == "hub" and self.tokenizer is not None:
            raise ValueError(f"tokenizer: expected null, because tokenize.hub.dataset names its tokenizer, found {self.tokenizer}")
        if self.source == "hub" and self.path != NO_FILE:
            raise ValueError(f"path: expected {NO_FILE}, because source hub reads no path and DVC wants one, found {self.path}")
        if self._starts_from_shards and self.min_document_bytes:
            raise ValueError("min_document_bytes: expected 0, because published shards are taken as they are, found "
                             f"{self.min_document_bytes}")
        return self

    @property
    def separate_paths(self) -> dict[str, str]:
        """Splits whose documents are in separate files -> `val_path` or `heldout_path`."""
        return {split: path for split, path in (("val", self.val_path), ("heldout", self.heldout_path)) if path != NO_FILE}

    @property
    def _starts_from_shards(self) -> bool:
        return self.source == "shards" or (self.source == "hub" and self.hub.start == "shards")

    def _check_heldout_documents(self) -> None:
        if (self.heldout_fraction is None) != ("heldout" in self.separate_paths):
            raise ValueError(f"heldout_fraction: expected a fraction, or null and a heldout_path, found {self.heldout_fraction} and the "
                             f"heldout_path {self.heldout_path}; {NO_FILE} is none")

    def _check_validation_documents(self) -> None:
        if self._starts_from_shards:
            for split, path in self.separate_paths.items():
                raise ValueError(f"{split}_path: expected {NO_FILE}, which is none, because published shards say which documents are "
                                 f"validation and their others are held out by heldout_fraction, found {path}")
            for key in ("val_fraction", "val_documents"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key}: expected null, because published shards say which documents are validation, "
                                     f"found {getattr(self, key)}")
        elif self.source == "embedded" and self.val_documents is not None:
            raise ValueError(f"val_documents: expected null for source embedded, whose documents have no order of their own, found "
                             f"{self.val_documents}; set val_fraction or val_path")
        elif [self.val_fraction is None, self.val_documents is None, "val" not in self.separate_paths].count(False) != 1:
            raise ValueError("val_documents: expected exactly one of val_fraction, val_documents and val_path, the others null or, the "
                             f"path, {NO_FILE}, found {self.val_fraction}, {self.val_documents} and {self.val_path}")

"""Section ``tokenize``: which documents, how they are split, and their tokenizer."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from lib.params import NonNegative, Params, Positive

SourceName = Literal["embedded", "jsonl"]

NUM_RESERVED_PIECES = 4 + 256
"""Control and unknown pieces (pad 0, bos 1, eos 2, unk 3) and one piece for each byte value."""

OpenFraction = Annotated[float, Field(gt=0, lt=1)]


class TokenizeParams(Params):
    """Section ``tokenize``."""

    source: SourceName
    """Where documents come from; the registry is `lib.data.corpus.SOURCES`."""
    path: Annotated[str, Field(min_length=1)]
    """embedded: the requirements file with the exact pins of `packages`; jsonl: a file, or a folder of files."""
    pattern: Annotated[str, Field(min_length=1)]
    """jsonl: which files inside the folder, as a glob; not used for a single file."""
    packages: tuple[str, ...]
    """embedded: distributions that are harvested beside the standard library."""
    min_document_bytes: NonNegative
    """Documents with fewer UTF-8 bytes are left out."""
    heldout_fraction: OpenFraction
    """Expected fraction of the documents that is held out of training for model selection."""
    val_fraction: OpenFraction
    """Expected fraction of the documents that only the evaluation sees."""
    tokenizer: Annotated[str, Field(min_length=1)] | None
    """A SentencePiece model file, or null to train one on training documents."""
    vocab_size: Annotated[int, Field(gt=NUM_RESERVED_PIECES, le=65536)]
    """Number of pieces; a given model must have exactly as many."""
    tokenizer_training_bytes: Positive
    """The tokenizer is trained on the first training documents, up to this many UTF-8 bytes."""
    shard_tokens: Annotated[int, Field(gt=0, lt=2**31)]
    """Tokens in each shard file but the last of a split; the file's header holds them as int32."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.heldout_fraction + self.val_fraction >= 1:
            raise ValueError(f"heldout_fraction: expected less than 1 - val_fraction = {1 - self.val_fraction:g}, so that training "
                             f"documents remain, found {self.heldout_fraction:g}")
        if len(set(self.packages)) != len(self.packages):
            raise ValueError(f"packages: expected each distribution once, found {list(self.packages)}")
        return self

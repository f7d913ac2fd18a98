"""Training a SentencePiece tokenizer on the training documents."""

import io
import re
from collections.abc import Iterable
from typing import Any

from sentencepiece import SentencePieceTrainer

from lib.data.case import encode_case
from lib.data.tokenizer import OPERATORS, SPACE
from lib.errors import UserError
from lib.progress import Progress, say

CHARACTER_COVERAGE = 0.995
"""The rarest characters, 0.5 % of the text, stay byte pieces: for ASCII that costs no token and frees a place for a merge.

Of 0.98 to 0.99999 on the embedded corpus at 1024 pieces, 0.98 to 0.995 gave the most bytes per token and the lowest
trigram entropy per byte; SentencePiece's default is 0.9995.
"""

MAX_DOCUMENT_BYTES = 1 << 30  # SentencePiece leaves out longer ones; its default of 4192 would leave out most


def train_tokenizer(documents: Iterable[str], vocab_size: int, training_bytes: int, *, case_transform: bool = False) -> bytes:
    """Train a lossless BPE tokenizer: byte fallback, identity normalization, no dummy prefix, all white space kept.

    Pieces 0 to 3 are pad, bos, eos and unk; then come the operators of the case transform, if it is used, and the 256 bytes. The space
    is a piece whatever the documents. One thread, so that the same documents give the same model.

    Args:
        documents: training documents; the first are used, until they have `training_bytes`.
        vocab_size: number of pieces.
        training_bytes: size of the training text in UTF-8.
        case_transform: whether the tokenizer is for text whose capitals are written as operators.

    Returns:
        The serialized SentencePiece model.

    Raises:
        ValueError: no documents, or documents that do not give exactly `vocab_size` pieces.
    """
    sample, size, num_characters, num_spaces = [], 0, 0, 0
    with Progress("sample for the tokenizer", training_bytes, "B") as progress:
        for document in documents:
            sample.append(encode_case(document) if case_transform else document)
            size += len(document.encode())
            num_characters, num_spaces = num_characters + len(sample[-1]), num_spaces + sample[-1].count(" ")
            progress.update(len(document.encode()), total=max(size, training_bytes), documents=f"{len(sample):,}")
            if size >= training_bytes:
                break
    if not sample:
        raise UserError("tokenize: expected training documents for the tokenizer, found none; enlarge the corpus")
    say(f"train a tokenizer of {vocab_size} pieces on {size:,} bytes")
    options: dict[str, Any] = {}
    if num_spaces <= 2 * (1 - CHARACTER_COVERAGE) * num_characters:  # more would be among the characters that are covered
        options["required_chars"] = SPACE
        sample.append(" ")  # SentencePiece before 0.2.3 ends the process where a required character does not occur
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(sample), model_writer=model, model_type="bpe", vocab_size=vocab_size, byte_fallback=True,
            character_coverage=CHARACTER_COVERAGE, normalization_rule_name="identity", add_dummy_prefix=False,
            remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, pad_id=0, bos_id=1, eos_id=2, unk_id=3,
            max_sentence_length=MAX_DOCUMENT_BYTES, num_threads=1, minloglevel=2,
            user_defined_symbols=list(OPERATORS) if case_transform else [], **options)
    except RuntimeError as error:
        raise UserError(f"tokenize.vocab_size: expected {_expected_size(str(error))}, found {vocab_size} for {size} bytes of training "
                        "documents; change it, or use other documents or more of them (tokenize.tokenizer_training_bytes)") from None
    return model.getvalue()


def _expected_size(error: str) -> str:
    if needed := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        return f"at least {needed[1]} pieces, one for each byte and character"
    if reachable := re.search(r"set it to a value <= (\d+)", error):
        return f"at most {reachable[1]} pieces"
    return f"a vocabulary that SentencePiece can train ({error.strip()})"

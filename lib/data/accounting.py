"""That the bytes which tokens stand for are those of the text, never more, and what is said where the text itself is lost."""

from collections.abc import Mapping
from typing import Any

from lib.artifacts.metrics import NOT_REPRODUCED
from lib.artifacts.tokens import SplitWriter
from lib.data.tokenizer import Tokenizer
from lib.errors import UserError


def check_accounting(writers: Mapping[str, SplitWriter], tokenizer: Tokenizer) -> None:
    """Compare the sums of every split: with more bytes than the text has, bits per byte would be too low.

    Raises:
        UserError: more accounted bytes than bytes of text; or other ones, by a lossless tokenizer.
    """
    for split, writer in writers.items():
        if writer.accounted_bytes > writer.raw_bytes or (tokenizer.lossless and writer.accounted_bytes != writer.raw_bytes):
            bound = "exactly" if tokenizer.lossless else "at most"
            raise UserError(f"tokenize.tokenizer: expected tokens of the {split} split that stand for {bound} the {writer.raw_bytes:,} "
                            f"bytes of its text, found {writer.accounted_bytes:,}: bits per byte would be wrong. The tokenizer's "
                            "normalizer lengthens text, or its pieces do not carry it; give another one, or set it to null")


def describe_text(manifest: Mapping[str, Any]) -> str:
    """Whether the tokens of the validation documents give their text back."""
    val = manifest["splits"]["val"]
    if (reproduced := val["reproduced_documents"]) is None:
        return "text is as the published tokens decode"
    if reproduced == val["documents"]:
        return "text is reproduced"
    return f"{NOT_REPRODUCED} by the tokenizer: {val['documents'] - reproduced:,} of {val['documents']:,} validation documents"

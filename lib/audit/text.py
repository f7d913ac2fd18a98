"""That the tokens which were scored are the validation text, and that their bytes are its bytes, counted anew from the tokens."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from lib.artifacts.metrics import NOT_REPRODUCED
from lib.artifacts.tokens import Split
from lib.audit.chronology import Finding
from lib.data.encoder import decode_documents
from lib.data.roundtrip import Reencoding, reencode, too_many_changed
from lib.data.tokenizer import Tokenizer

BATCH_DOCUMENTS = 256  # decoded at a time, which bounds the memory


def check_text(num_bytes: int, split: Split, tokenizer: Tokenizer, of_val: Mapping[str, Any]) -> dict[str, Finding]:
    """Bytes and text of the validation tokens.

    Accounted bytes are at most those of the text, and as many where the tokenizer is lossless. Every document is decoded, and encoded again
    to the same tokens. A text that its tokens do not give back has no score that was ever accepted: it is said, and not passed.

    Args:
        num_bytes: bytes that the scores were divided by.
        split: the validation tokens.
        tokenizer: the one that is said to have made them.
        of_val: what the manifest says of the split.
    """
    tokens = split.tokens()
    documents = np.split(tokens, np.flatnonzero(tokens == tokenizer.bos_id)[1:])
    counts, decoded_bytes = Counter[Reencoding](), 0
    for first in range(0, len(documents), BATCH_DOCUMENTS):
        batch = documents[first:first + BATCH_DOCUMENTS]
        texts = decode_documents(tokenizer, [each.tolist() for each in batch])
        decoded_bytes += sum(len(text.encode()) for text in texts)
        counts.update(reencode(tokenizer, batch, texts, num_threads=-1, may_be_cut=first + BATCH_DOCUMENTS >= len(documents)))
    stated = split.accounted_bytes
    within = stated == split.raw_bytes == decoded_bytes if tokenizer.lossless else stated <= split.raw_bytes
    other = counts[Reencoding.other]
    text: Finding = {"passed": not other, "documents": len(documents), "documents_of_another_tokenizer": other}
    reproduced = of_val["reproduced_documents"]
    if text["passed"] and reproduced not in (None, of_val["documents"]):
        lost = of_val["documents"] - reproduced
        text |= {"passed": None, "why": f"{NOT_REPRODUCED} by the tokenizer ({lost:,} of {of_val['documents']:,} documents)"}
    elif text["passed"] and too_many_changed(counts[Reencoding.changed], len(documents)):
        text |= {"passed": None, "why": f"{NOT_REPRODUCED}: the normalizer changes {counts[Reencoding.changed]:,} decoded documents"}
    return {"bytes": {"passed": num_bytes == stated == of_val["accounted_bytes"] and split.raw_bytes == of_val["raw_bytes"] and within,
                      "bytes_scored": num_bytes, "bytes_of_tokens": stated, "bytes_of_text": split.raw_bytes,
                      "bytes_decoded": decoded_bytes, "lossless": tokenizer.lossless}, "text": text}

"""Bits per byte of general-purpose compressors on the validation text of the last run, beside the scores of its models.

``python -m bench.baselines`` after ``make repro``. The compressors see the documents joined by blank lines and may use all text before
a byte, as the model does; they know no English beforehand, and the model needs no file to be sent along.
"""

import bz2
import lzma

import numpy as np
import zstandard

from lib.artifacts.metrics import load_metrics
from lib.artifacts.paths import TOKENIZE_FOLDER, stage_folder
from lib.artifacts.tokens import load_split
from lib.data.encoder import decode_documents
from lib.data.tokenizer import load_tokenizer
from lib.params import read_params

WIDTH = 40  # of the names


def read_text(path: str) -> bytes:
    """UTF-8 text of the validation split: its tokens decoded, documents joined by blank lines."""
    tokenizer = load_tokenizer(TOKENIZE_FOLDER / "tokenizer.model")
    tokens = load_split(TOKENIZE_FOLDER / path, tokenizer.vocab_size).tokens()
    documents = np.split(tokens, np.flatnonzero(tokens == tokenizer.bos_id)[1:])
    return "\n\n".join(decode_documents(tokenizer, [document.tolist() for document in documents])).encode()


def main() -> None:
    """Print one line for each compressor and for each score of each seed."""
    text = read_text("val")
    compressed = {"bzip2 -9": bz2.compress(text, 9), "zstd -22": zstandard.compress(text, 22), "xz -9": lzma.compress(text, preset=9)}
    print(f"validation text of {len(text):,} bytes, bits per byte")
    for name, blob in compressed.items():
        print(f"{name:{WIDTH}} {8 * len(blob) / len(text):.4f}")
    for seed in read_params()["seeds"]:
        metrics = load_metrics(stage_folder("evaluate", seed))
        for name in (name for name in metrics if name.endswith("_bpb")):
            print(f"{f'seed {seed}, {name}':{WIDTH}} {metrics[name]:.4f}")


if __name__ == "__main__":
    main()

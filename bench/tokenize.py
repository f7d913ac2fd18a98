"""Tokenizing by one process and by all cores: ``python -m bench.tokenize [--megabytes 60]``.

The embedded corpus several times, documents numbered so that no two are equal, as JSON lines through source jsonl, and the shards that come
of it through source shards. Printed are rates, their ratio, and the most memory that a process has held.
"""

import argparse
import itertools
import json
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lib.data.config import TokenizeParams
from lib.data.corpus import Source, open_source
from lib.data.tokenization import provide_tokenizer, write_splits
from lib.params import load_params

EMBEDDED = {"source": "embedded", "path": "requirements.txt"}


def number(texts: list[str], num_bytes: int) -> Iterator[str]:
    """Texts again and again, each followed by the number of the round, until they have `num_bytes`; no two are equal if none were."""
    size = 0
    for n in itertools.count():
        for text in texts:
            yield f"{text}\n{n}"
            size += len(text.encode())
            if size >= num_bytes:
                return


def measure(params: TokenizeParams, folder: Path, num_processes: int) -> float:
    """Seconds to write the splits of a source."""
    source = open_source(params)
    tokenizer = provide_tokenizer(params, source, folder / "tokenizer.model")
    start = time.perf_counter()
    write_splits(params, source, tokenizer, folder, num_processes)
    return time.perf_counter() - start


def publish(folder: Path, published: Path) -> int:
    """Name the train and val shards as published ones; the number of their bytes."""
    published.mkdir()
    for split in ("train", "val"):
        for path in sorted((folder / split).glob("*.bin")):
            path.rename(published / f"text_{path.name}")
    return sum(path.stat().st_size for path in published.iterdir())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=60, help="of JSON lines")
    megabytes, num_cores = parser.parse_args().megabytes, os.cpu_count() or 1
    default = load_params("tokenize", TokenizeParams)
    embedded = open_source(default.model_copy(update=EMBEDDED))
    assert isinstance(embedded, Source)
    texts = [text for batch in embedded.read() for text in batch.texts()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "documents.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in number(texts, megabytes * 10**6))
        documents = default.model_copy(update={"source": "jsonl", "path": str(folder / "documents.jsonl"), "tokenizer": None})
        seconds = {n: measure(documents, folder / "out", n) for n in sorted({1, num_cores})}
        report("jsonl", (folder / "documents.jsonl").stat().st_size / 1e6, "MB", seconds)
        num_tokens = publish(folder / "out", folder / "published") / 2
        rest = (default.heldout_fraction or 0) + (default.val_fraction or 0)
        shards = default.model_copy(update={"source": "shards", "path": str(folder / "published"), "val_fraction": None,
                                            "heldout_fraction": 2 * rest,
                                            "tokenizer": str(folder / "out/tokenizer.model")})
        seconds = {n: measure(shards, folder / "again", n) for n in sorted({1, num_cores})}
        report("shards", num_tokens / 1e6, "M tokens", seconds)
    memory = {who: resource.getrusage(which).ru_maxrss / 1024 for who, which in
              (("this process", resource.RUSAGE_SELF), ("largest worker", resource.RUSAGE_CHILDREN))}
    print("peak memory: " + ", ".join(f"{who} {mib:.0f} MiB" for who, mib in memory.items()))


def report(source: str, amount: float, unit: str, seconds: dict[int, float]) -> None:
    """Print the rate with each number of processes, and how much faster the last one is."""
    rates = ", ".join(f"{n} process{'es' if n > 1 else ''} {amount / each:.1f} {unit}/s" for n, each in seconds.items())
    taken = list(seconds.values())
    print(f"{source}: {amount:.0f} {unit}: {rates}, ratio {taken[0] / taken[-1]:.2f}")


if __name__ == "__main__":
    main()

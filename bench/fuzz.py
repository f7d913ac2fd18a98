"""What damaged and hostile containers do, as counts of outcomes: ``python -m bench.fuzz [--seconds 20] [--seed 0]``.

Containers of all codecs are mutated (bytes, lengths, streams of others, fields of the header) and get a checksum that fits again.
Whatever is not a model or a ContainerError stops the run with status 1 and is written to ``fuzz-failure.ptz``; so does more memory or
time than a file of that size may take.
"""

import argparse
import json
import random
import re
import resource
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from lib.artifacts.quantized import LEFT, RIGHT, SCALE, QuantizedModel, QuantizedTensor
from lib.compression.coding import CODECS, compress_bytes, decompress_bytes
from lib.compression.container import CHECKSUM_BYTES, MAX_HEADER_BYTES, PREFIX, ContainerError, pack, seal, unpack

MAX_SECONDS, MAX_KIBIBYTES = 5.0, 2**19  # for one file; memory on top of what the interpreter and its libraries take
NUMBERS = (0, 1, 2, 7, 64, 255, 1023, 2**16, 2**20, 2**27, 2**32, 2**63, -1)
FAILURE = Path("fuzz-failure.ptz")


def make_model(seed: int) -> QuantizedModel:
    """Free steps with a correction, a grid with bits and row scales of its own, an all-zero matrix, vectors of both types."""
    generator = torch.Generator().manual_seed(seed)

    def make_tensor(num_rows: int, num_columns: int, bits: int | None, magnitude: float) -> QuantizedTensor:
        codes = (torch.randn(num_rows, num_columns, generator=generator) * magnitude).round().clamp(-127, 127)
        rows, columns = (torch.randint(-9, 9, (size,), generator=generator) * 128 for size in codes.shape)
        return QuantizedTensor(codes.short(), rows.short(), columns.short(), bits)

    return QuantizedModel({"num_layers": seed}, {"qat": None}, {
        "a": make_tensor(40, 30, None, 30), "a" + LEFT: make_tensor(40, 2, 8, 20), "a" + RIGHT: make_tensor(2, 30, 8, 20),
        "b": make_tensor(16, 64, 5, 3), "zero": make_tensor(64, 64, 2, 0),
    }, {"gain": torch.randn(9, generator=generator).half(), "mix": torch.ones(2, 3),
        "b" + SCALE: torch.rand(16, generator=generator).half()})


def mutate(contents: list[bytes], generator: random.Random) -> bytes:
    """One of the containers, without checksum, changed in some places."""
    content = bytearray(generator.choice(contents))
    if is_header := generator.random() < 0.5:
        content = change_header(content, generator)
    for _ in range(generator.randint(1 - is_header, 3)):
        position = generator.randrange(len(content) + 1)
        kind = generator.choice(("bit", "bytes", "cut", "insert", "splice"))
        if kind == "bit" and position < len(content):
            content[position] ^= 1 << generator.randrange(8)
        elif kind == "bytes":
            content[position:position + 16] = generator.randbytes(generator.randint(1, 16))
        elif kind == "cut":
            del content[position:position + generator.choice((1, 4, 64, len(content)))]
        elif kind == "insert":
            content[position:position] = generator.choice((b"\0", b"\xff", generator.randbytes(8))) * generator.choice((1, 4, 100))
        elif kind == "splice":
            other = generator.choice(contents)
            content[position:] = other[generator.randrange(len(other)):]
    return bytes(content)


def change_header(content: bytearray, generator: random.Random) -> bytearray:
    """A container with other values for one or two fields of its header."""
    magic, version, header_bytes = PREFIX.unpack_from(content)
    end = PREFIX.size + header_bytes
    fields = json.loads(decompress_bytes(bytes(content[PREFIX.size:end]), MAX_HEADER_BYTES))
    parts = [fields, *fields["matrices"], *fields["vectors"]]
    for _ in range(generator.randint(1, 2)):
        part = generator.choice(parts)
        part[generator.choice(sorted(part))] = generator.choice(
            [*NUMBERS, *CODECS, "a", "b" + LEFT, "a" + SCALE, "float32", None, [], [generator.choice(NUMBERS)], {}, {"a": 1e308}])
    frame = compress_bytes(json.dumps(fields).encode(), 3)
    return bytearray(PREFIX.pack(magic, version, len(frame)) + frame + content[end:])


def describe_outcome(blob: bytes) -> str:
    """What unpacking does: a model, or the words of the error without names and numbers."""
    try:
        unpack(blob).weights()
    except ContainerError as error:
        return re.sub(r"[^a-zA-Z ]+.*", "", str(error).removeprefix("container: ").removeprefix("header: ")).strip() or "header"
    return "a model"


def main() -> None:
    """Run for some seconds and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator, outcomes, slowest = random.Random(options.seed), Counter[str](), 0.0
    contents = [pack(make_model(seed), codec, 3).blob[:-CHECKSUM_BYTES] for seed in range(3) for codec in CODECS]
    memory, end = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic() + options.seconds
    while (start := time.monotonic()) < end:
        blob = seal(mutate(contents, generator))
        try:
            outcomes[describe_outcome(blob)] += 1
        except BaseException:
            FAILURE.write_bytes(blob)
            raise
        slowest = max(slowest, seconds := time.monotonic() - start)
        growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
        if seconds > MAX_SECONDS or growth > MAX_KIBIBYTES:
            FAILURE.write_bytes(blob)
            sys.exit(f"{FAILURE}: {seconds:.1f} seconds, {growth} KiB more memory; expected at most {MAX_SECONDS} and {MAX_KIBIBYTES}")
    print(f"{outcomes.total():,} containers in {options.seconds:.0f} s, the slowest {slowest:.2f} s, {growth:,} KiB more memory")
    for outcome, count in outcomes.most_common():
        print(f"{count:9,}  {outcome}")


if __name__ == "__main__":
    main()

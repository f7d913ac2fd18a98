"""What damaged and hostile files do, as counts of outcomes: ``python -m bench.fuzz [KIND ...] [--seconds 15] [--seed 0]``.

Files of every kind are mutated in bytes, lengths, streams of others and fields, and get checksums that fit again: containers (``.ptz``),
published files (``.pt`` and compressed ones), token shards with their ``split.json``, and JSON lines, plain or compressed. Whatever is
not read and not refused by the project's own errors stops the run with status 1 and is written to ``fuzz-failure``; so does more
memory or time than a file of that size may take.
"""

import argparse
import gzip
import io
import json
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import zstandard

from lib.artifacts.checkpoint import Training
from lib.artifacts.files import sha256_of
from lib.artifacts.quantized import LEFT, RIGHT, SCALE, QuantizedModel, QuantizedTensor
from lib.artifacts.tokens import SPLIT_FILE, SplitWriter, load_split
from lib.compression.coding import CODECS, compress_bytes, decompress_bytes
from lib.compression.container import CHECKSUM_BYTES, MAX_HEADER_BYTES, PREFIX, pack, seal, unpack
from lib.data.jsonl import find_files, read_blocks
from lib.errors import UserError
from lib.published.description import describe_published

MAX_SECONDS, MAX_KIBIBYTES = 5.0, 2**19  # for one file; memory on top of what the interpreter and its libraries take
NUMBERS = (0, 1, 2, 7, 64, 255, 1023, 2**16, 2**20, 2**27, 2**32, 2**63, -1)
FAILURE = Path("fuzz-failure")
VOCAB_SIZE = 64

Case = tuple[bytes, Callable[[], str]]
"""What was made, and what reads it and says what came of it."""


def make_model(seed: int) -> QuantizedModel:
    """Free steps with a correction, a grid with bits and row scales of its own, an all-zero matrix, vectors of both types."""
    generator = torch.Generator().manual_seed(seed)

    def make_tensor(num_rows: int, num_columns: int, bits: int | None, magnitude: float) -> QuantizedTensor:
        codes = (torch.randn(num_rows, num_columns, generator=generator) * magnitude).round().clamp(-127, 127)
        rows, columns = (torch.randint(-9, 9, (size,), generator=generator) * 128 for size in codes.shape)
        return QuantizedTensor(codes.short(), rows.short(), columns.short(), bits)

    return QuantizedModel({"num_layers": seed}, Training(sequence_tokens=8), {
        "a": make_tensor(40, 30, None, 30), "a" + LEFT: make_tensor(40, 2, 8, 20), "a" + RIGHT: make_tensor(2, 30, 8, 20),
        "b": make_tensor(16, 64, 5, 3), "zero": make_tensor(64, 64, 2, 0),
    }, {"gain": torch.randn(9, generator=generator).half(), "mix": torch.ones(2, 3),
        "b" + SCALE: torch.rand(16, generator=generator).half()})


def mutate(content: bytes, contents: list[bytes], generator: random.Random, num_changes: int) -> bytes:
    """`content`, changed in some places, with parts of others of its kind."""
    changed = bytearray(content)
    for _ in range(num_changes):
        position = generator.randrange(len(changed) + 1)
        kind = generator.choice(("bit", "bytes", "cut", "insert", "splice"))
        if kind == "bit" and position < len(changed):
            changed[position] ^= 1 << generator.randrange(8)
        elif kind == "bytes":
            changed[position:position + 16] = generator.randbytes(generator.randint(1, 16))
        elif kind == "cut":
            del changed[position:position + generator.choice((1, 4, 64, len(changed)))]
        elif kind == "insert":
            changed[position:position] = generator.choice((b"\0", b"\xff", generator.randbytes(8))) * generator.choice((1, 4, 100))
        elif kind == "splice":
            other = generator.choice(contents)
            changed[position:] = other[generator.randrange(len(other)):]
    return bytes(changed)


def change_header(content: bytes, generator: random.Random) -> bytes:
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
    return PREFIX.pack(magic, version, len(frame)) + frame + content[end:]


def fuzz_containers(folder: Path, generator: random.Random) -> Callable[[], Case]:
    """Containers of all codecs, sealed anew."""
    contents = [pack(make_model(seed), codec, 3).blob[:-CHECKSUM_BYTES] for seed in range(3) for codec in CODECS]

    def make() -> Case:
        content = generator.choice(contents)
        if is_header := generator.random() < 0.5:
            content = change_header(content, generator)
        blob = seal(mutate(content, contents, generator, generator.randint(1 - is_header, 3)))
        return blob, lambda: str(unpack(blob).weights() and "a model")

    return make


def fuzz_published(folder: Path, generator: random.Random) -> Callable[[], Case]:
    """Archives of `torch.save`, mutated as they are or in their pickle, then compressed or not."""
    state = {"tok_emb.weight": torch.randn(32, 8), "blocks.0.attn.q_gain": torch.ones(2), "step": torch.ones(3).half()}
    artifact = {"w": {"a.q": torch.ones(4, 6, dtype=torch.int8), "a.scale": torch.ones(4).half(), "b": torch.ones(3)},
                "m": {"a": {"type": "int6"}, "b": "passthrough"}}
    int8 = {"__quant_format__": "int8_clean_per_row_v1", "quantized": {"a": torch.ones(4, 6, dtype=torch.int8)},
            "scales": {"a": torch.ones(4).half()}, "passthrough": {"b": torch.ones(3)}}
    contents = []
    for payload in (state, artifact, int8, {"model": state, "epoch": 3}):
        for is_zip in (True, False):
            file = io.BytesIO()
            torch.save(payload, file, _use_new_zipfile_serialization=is_zip)
            contents.append(file.getvalue())

    def make() -> Case:
        content, path = generator.choice(contents), folder / "published"
        if content.startswith(b"PK") and generator.random() < 0.5:
            content = change_zip(content, generator)
        content = mutate(content, contents, generator, generator.randint(0, 3))
        pack_content = generator.choice((bytes, zstandard.ZstdCompressor(3).compress, zlib.compress))
        content = pack_content(content)
        path.write_bytes(content)
        return content, lambda: describe_published(path) and "a published file"

    return make


def change_zip(content: bytes, generator: random.Random) -> bytes:
    """An archive with its entries mutated, so that their checksums fit, stored or compressed."""
    rewritten = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(rewritten, "w", generator.choice((0, 8))) as new:
        for name in old.namelist():
            entry = old.read(name)
            if name.endswith(".pkl") or generator.random() < 0.1:
                entry = mutate(entry, [entry, b"cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\1\x85R."], generator, generator.randint(0, 3))
            new.writestr(name, entry)
    return rewritten.getvalue()


def fuzz_shards(folder: Path, generator: random.Random) -> Callable[[], Case]:
    """A split of several shards: one of its files mutated, or fields of its list; often with checksums that fit."""
    original = folder / "original"
    writer = SplitWriter(original, VOCAB_SIZE, 40)
    writer.add(np.arange(100, dtype=np.uint16) % VOCAB_SIZE, 100, 100)
    writer.close()
    names = sorted(path.name for path in original.iterdir() if path.name != SPLIT_FILE)

    def make() -> Case:
        split = folder / "split"
        shutil.rmtree(split, ignore_errors=True)
        shutil.copytree(original, split)
        changed = split / generator.choice([*names, SPLIT_FILE])
        if changed.name == SPLIT_FILE and generator.random() < 0.7:
            description = json.loads(changed.read_bytes())
            part = generator.choice([description, *description["shards"]])
            part[generator.choice(sorted(part))] = generator.choice(
                [*NUMBERS, None, "", "a", "/dev/zero", "../original/" + names[0], [], [3], {}, 1e308, "0" * 64, "\0", "\ud800"])
            changed.write_text(json.dumps(description))
        else:
            contents = [path.read_bytes() for path in split.iterdir()]
            changed.write_bytes(mutate(changed.read_bytes(), contents, generator, generator.randint(1, 3)))
            if changed.name != SPLIT_FILE and generator.random() < 0.7:
                description = json.loads((split / SPLIT_FILE).read_bytes())
                shard = next(shard for shard in description["shards"] if shard["name"] == changed.name)
                shard |= {"sha256": sha256_of(changed), "tokens": max(0, changed.stat().st_size - 1024) // 2}
                (split / SPLIT_FILE).write_text(json.dumps(description))
        content = b"".join(path.read_bytes() for path in sorted(split.iterdir()))
        return content, lambda: str(load_split(split, VOCAB_SIZE).tokens() is not None and "a split")

    return make


def fuzz_lines(folder: Path, generator: random.Random) -> Callable[[], Case]:
    """Documents in JSON lines, mutated before and after compression."""
    lines = [json.dumps({"text": text, "n": n}, ensure_ascii=n % 2 == 0).encode() + b"\n"
             for n, text in enumerate(("plain", "\u2581 and \u00e9", "\U0001f600" * 20, "", "a\nb", "x" * 3000))]
    hostile = [b"[" * 100_000, b"1" * 5000, b'{"text": "\\ud800"}', b'{"text": NaN}', b'{"text": null}', b"\xff\xfe{\0", b"\n\n"]
    packers: dict[str, Callable[[bytes], bytes]] = {".jsonl": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor(3).compress}

    def make() -> Case:
        suffix = generator.choice(sorted(packers))
        content = b"".join(generator.sample([*lines, *hostile], generator.randint(1, 6)))
        content = mutate(content, [*lines, *hostile], generator, generator.randint(0, 3))
        content = packers[suffix](content)
        if generator.random() < 0.5:
            content = mutate(content, [content], generator, generator.randint(0, 3))
        path = folder / f"documents{suffix}"
        path.write_bytes(content)
        return content, lambda: "documents" if [list(block.texts()) for block in read_blocks(find_files(path, "*"))] else "nothing"

    return make


KINDS = {"containers": fuzz_containers, "published": fuzz_published, "shards": fuzz_shards, "lines": fuzz_lines}


def describe_outcome(read: Callable[[], str]) -> str:
    """What reading does: something, or the words of the error without names and numbers."""
    try:
        return read()
    except UserError as error:
        words = re.sub(r"^(container|header|/[^:]*): ", "", str(error))
        return re.sub(r"[^a-zA-Z ]+.*", "", re.sub(r"^(header|line \d+|a|b): |^/\S+ ", "", words), flags=re.DOTALL).strip() or "header"


def run(kind: str, seconds: float, seed: int) -> None:
    """Fuzz one kind for some seconds and print the counts; exit where a file does what none may."""
    generator, outcomes, slowest = random.Random(seed), Counter[str](), 0.0
    with tempfile.TemporaryDirectory() as folder:
        make = KINDS[kind](Path(folder), generator)
        memory, end = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic() + seconds
        growth = 0
        while time.monotonic() < end:
            content, read = make()
            start = time.monotonic()
            try:
                outcomes[describe_outcome(read)] += 1
            except BaseException:
                FAILURE.write_bytes(content)
                raise
            slowest = max(slowest, taken := time.monotonic() - start)
            growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
            if taken > MAX_SECONDS or growth > MAX_KIBIBYTES:
                FAILURE.write_bytes(content)
                sys.exit(f"{FAILURE}: {kind}: expected at most {MAX_SECONDS} seconds and {MAX_KIBIBYTES} KiB more memory, found "
                         f"{taken:.1f} and {growth}")
    print(f"{kind}: {outcomes.total():,} files in {seconds:.0f} s, the slowest {slowest:.2f} s, {growth:,} KiB more memory")
    for outcome, count in outcomes.most_common():
        print(f"{count:9,}  {outcome}")


def main() -> None:
    """Fuzz every kind that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", choices=[*KINDS, []], help=f"{', '.join(KINDS)}; all if none is given")
    parser.add_argument("--seconds", type=float, default=15, help="for each kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for kind in options.kinds or KINDS:
        run(kind, options.seconds, options.seed)


if __name__ == "__main__":
    main()

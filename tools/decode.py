"""The last word on a score: write a slice of the validation text with a strategy, and read it in a process that does not have the text.

``make decode SEED=1337``, with STRATEGY and TOKENS if need be; other options in ARGS: ``make decode SEED=1337 ARGS="--first-document 5"``.
"""

import argparse
import math
import subprocess
import sys
from pathlib import Path

import numpy as np

from lib.artifacts.paths import TOKENIZE_FOLDER, stage_folder
from lib.artifacts.tokens import SPLITS, load_split
from lib.audit.compressor import HEADER, decode, encode, next_token, read_header
from lib.audit.isolation import confine
from lib.audit.probe import NoLimit
from lib.compression.container import load_artifact, read_artifact
from lib.data.encoder import decode_documents
from lib.data.tokenizer import load_tokenizer
from lib.distributed import start_process
from lib.evaluation.config import EvaluateParams
from lib.evaluation.evaluation import Text, make_jobs, run_strategy
from lib.model.gpt import build_model
from lib.params import PARAMS_FILE, add_seed, load_params

TOKENIZER, VAL = TOKENIZE_FOLDER / "tokenizer.model", TOKENIZE_FOLDER / "val"


def main(arguments: list[str] | None = None) -> None:
    """Write and read a slice, print the length of the file beside the score; exit with status 1 where the text is another one."""
    parser = argparse.ArgumentParser(usage="make decode SEED=1337 [STRATEGY=lora] [TOKENS=300] [ARGS=...]", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_seed(parser, required=True, help="one of `seeds` in params.yaml")
    parser.add_argument("--strategy", help="one of evaluate.strategies; evaluate.strategy if not given")
    parser.add_argument("--tokens", type=int, default=300, help="length of the slice (default: %(default)s)")
    parser.add_argument("--first-document", type=int, default=0, help="number of the document that the slice starts with (default: 0)")
    parser.add_argument("--file", type=Path, default=Path("slice.bin"), help="what is written and read (default: %(default)s)")
    parser.add_argument("--read", action="store_true", help="only read, and print the tokens")
    options = parser.parse_args(arguments)
    params = load_params("evaluate", EvaluateParams)
    name = options.strategy or params.strategy
    if name not in params.strategies:
        sys.exit(f"--strategy: expected one of evaluate.strategies {', '.join(params.strategies)}, found {name}")
    artifact_path = stage_folder("compress", options.seed) / "model.ptz"
    with start_process() as process:
        if options.read:
            texts = [path for split in SPLITS for path in sorted((TOKENIZE_FOLDER / split).glob("*.bin"))]
            found = confine(read=[PARAMS_FILE, artifact_path, options.file], write=[], forbidden=texts)["training_data"]
            print(f"{len(texts)} files of text tried: {found.get('files_refused', found.get('why'))} refused", file=sys.stderr)
        artifact = load_artifact(artifact_path)
        model = build_model(artifact.model, artifact.weights()).to(process.device)
        if options.read:
            content = read_artifact(options.file)
            num_targets, bos_id = read_header(content)
            tokens = decode(content, next_token(name, model, params, num_targets=num_targets, bos_id=bos_id, process=process))
            print(" ".join(map(str, tokens.tolist())))
            return
        tokenizer = load_tokenizer(TOKENIZER)
        split = load_split(VAL, tokenizer.vocab_size).tokens()
        starts = np.flatnonzero(split == tokenizer.bos_id)
        if not 0 <= options.first_document < len(starts) or options.tokens < 1:
            sys.exit(f"--first-document: expected 0 to {len(starts) - 1}, and --tokens 1 or more, found {options.first_document} "
                     f"and {options.tokens}")
        first = int(starts[options.first_document])
        tokens = split[first:first + options.tokens + 1]
        num_targets = len(tokens) - 1
        content = encode(tokens, next_token(name, model, params, num_targets=num_targets, bos_id=tokenizer.bos_id, process=process))
        options.file.write_bytes(content)
        text = Text.of(tokens, np.zeros(num_targets, np.int64), tokenizer.bos_id)
        (_, job), = make_jobs(model, text, params, [name], process=process, limit=NoLimit(math.inf, process))
        bits = float(run_strategy(name, job).nats.astype(np.float64).sum() / math.log(2))
    command = [sys.executable, "-m", "tools.decode", f"--seed={options.seed}", f"--strategy={name}", f"--file={options.file}", "--read"]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    read = np.array(answer.split(), np.uint16)
    same = read.tolist() == tokens.tolist()
    print(decode_documents(tokenizer, [read[1:].tolist()])[0])
    print(f"\n{num_targets} tokens by {name}: {8 * (len(content) - HEADER.size):,} bits in {options.file}, score {bits:,.1f} bits; "
          f"{'read back without the text' if same else 'ANOTHER TEXT was read back'}")
    if not same:
        sys.exit(1)


if __name__ == "__main__":
    main()

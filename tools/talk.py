"""Talk to an artifact, or see what it finds hard: ``python -m tools.talk [model.ptz] --prompt "..."`` (``make talk PROMPT="..."``).

Without a prompt a new document begins. With --hard FILE the text of a file is scored and coloured by bits per token.
"""

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lib.artifacts.files import write_bytes
from lib.artifacts.paths import TOKENIZE_FOLDER, stage_folder
from lib.artifacts.quantized import QuantizedModel
from lib.compression.container import load_artifact
from lib.data.encoder import encode_documents
from lib.data.reading import split_text, stream_text
from lib.data.tokenizer import Tokenizer, load_tokenizer
from lib.distributed import Process, start_process
from lib.errors import UserError
from lib.evaluation.bpb import make_score
from lib.evaluation.score import Forward, Scorer, load_stream
from lib.evaluation.sheet import Losses, ScoreSheet
from lib.evaluation.windows import sliding_windows
from lib.generation.cache import KeyValueCache
from lib.generation.sampling import Sampling, write_tokens
from lib.model.gpt import GPT, build_model
from lib.params import read_params
from lib.reporting.passage import PassagePart, clean_text, color_text, make_page

TOKENIZER = "tokenizer.model"
STRIDES = 4  # of a window that scores a text: each but the first scores its last quarter
BATCH_TOKENS = 8192


def main(arguments: list[str] | None = None) -> None:
    """Write on from a prompt, or colour a text.

    Raises:
        UserError: a file that is missing or damaged, files that do not belong together, or an option out of range.
    """
    options = _parse(arguments)
    path = options.model or stage_folder("compress", read_params()["seeds"][0]) / "model.ptz"
    with start_process() as process:
        artifact = load_artifact(path)
        model = build_model(artifact.model, artifact.weights()).to(process.device)
        tokenizer = _open_tokenizer(options.tokenizer or _find_tokenizer(path), model)
        context = options.context or _trained_tokens(artifact, model)
        if options.hard:
            _show_hard(options, model, tokenizer, context, process)
        else:
            _talk(options, KeyValueCache(model, context), tokenizer, process)


def score_text(model: GPT, tokens: npt.NDArray[np.uint16], window_tokens: int, process: Process) -> Losses:
    """Nats (N,) of all tokens (N+1,) but the first, in sliding windows, each token after at least three quarters of one."""
    sheet = ScoreSheet(len(tokens) - 1, process.device)
    scorer = Scorer(Forward(model, "fp32"), load_stream(tokens, process.device), sheet, batch_tokens=BATCH_TOKENS, process=process)
    scorer.score(sliding_windows(len(tokens) - 1, window_tokens, max(1, window_tokens // STRIDES)))
    return sheet.collect(process)[0]


def color_tokens(tokenizer: Tokenizer, tokens: list[int], nats: Losses) -> list[PassagePart]:
    """The text of tokens (N,), without BOS, with the bits that they cost."""
    ends = np.cumsum([0, *nats.astype(np.float64) / math.log(2)])  # of the first n tokens
    parts, first = [], 0
    for span in split_text(tokenizer, tokens):
        end = first + span.num_tokens
        parts.append(PassagePart(span.text, float(ends[end] - ends[first]), span.num_tokens))
        first = end
    return parts


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="a model.ptz; the one of params.yaml's first seed if not given")
    parser.add_argument("--tokenizer", type=Path, help=f"{TOKENIZER} beside the model, or that of the pipeline, if not given")
    parser.add_argument("--context", type=_between(int, 1), help="tokens that the model sees; as many as it was trained with if not given")
    parser.add_argument("--prompt", default="", help="what the text begins with; without one it is a new document")
    parser.add_argument("--tokens", type=_between(int, 1), default=300, help="tokens to write, at most (default: %(default)s)")
    parser.add_argument("--temperature", type=_between(float, 0), default=0.8, help="0 takes the likeliest token (default: %(default)s)")
    parser.add_argument("--top-p", type=_between(float, 1e-9, 1), default=0.95,
                        help="draw from the likeliest tokens that together have this probability (default: %(default)s)")
    parser.add_argument("--seed", type=_between(int, 0), default=0, help="of the draws (default: %(default)s)")
    parser.add_argument("--hard", metavar="FILE", help="colour this text by bits per token; - reads it from the standard input")
    parser.add_argument("--html", metavar="OUT", type=Path, help="with --hard: write the coloured text to this file too")
    options = parser.parse_args(arguments)
    if options.html and not options.hard:
        parser.error("--html: expected --hard FILE beside it, found none")
    return options


def _between(kind: Callable[[str], float], low: float, high: float = math.inf) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected a number from {low}{f' to {high}' if high < math.inf else ''}, found {text}")
        return value
    return parse


def _find_tokenizer(artifact: Path) -> Path:
    beside = artifact.with_name(TOKENIZER)
    return beside if beside.exists() else TOKENIZE_FOLDER / TOKENIZER


def _open_tokenizer(path: Path, model: GPT) -> Tokenizer:
    tokenizer = load_tokenizer(path)
    expected, found = (model.params.vocab_size, model.params.bos_id), (tokenizer.vocab_size, tokenizer.bos_id)
    if expected != found:
        raise UserError(f"{path}: expected {expected[0]} pieces with BOS {expected[1]} as the artifact has, found {found[0]} with "
                        f"{found[1]}; name the tokenizer that the model was trained with by --tokenizer")
    return tokenizer


def _trained_tokens(artifact: QuantizedModel, model: GPT) -> int:
    trained = artifact.training.sequence_tokens
    return min(trained, model.params.rope_trained_tokens or trained)


def _talk(options: argparse.Namespace, cache: KeyValueCache, tokenizer: Tokenizer, process: Process) -> None:
    (prompt,) = encode_documents(tokenizer, [options.prompt])
    sampling = Sampling(options.temperature, options.top_p, options.seed)
    tokens = islice(write_tokens(cache, prompt, tokenizer.bos_id, sampling, process.device), options.tokens)
    print(clean_text(options.prompt), end="", flush=True)
    start = time.monotonic()
    written = -1
    for text in stream_text(tokenizer, prompt[1:].tolist(), tokens):
        print(clean_text(text), end="", flush=True)
        written += 1  # the last text comes after the last token
    print(flush=True)
    end = "" if written == options.tokens else ", where the document ends"
    print(f"{written} tokens{end}; {written / (time.monotonic() - start):.0f} a second, seed {options.seed}", file=sys.stderr)


def _show_hard(options: argparse.Namespace, model: GPT, tokenizer: Tokenizer, window_tokens: int, process: Process) -> None:
    (tokens,) = encode_documents(tokenizer, [_read_text(options.hard)])
    nats = score_text(model, tokens, window_tokens, process)
    score = make_score(nats, tokenizer.target_bytes(tokens))
    parts = color_tokens(tokenizer, tokens[1:].tolist(), nats)
    summary = f"{score.bpb:.4f} bits per byte: {score.num_bytes:,} bytes, {score.num_tokens:,} tokens, windows of {window_tokens}"
    if options.html:
        title = "standard input" if options.hard == "-" else Path(options.hard).name
        write_bytes(options.html, make_page(title, summary, parts).encode())
    colored = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(f"{summary}\n\n{color_text(parts, colored=colored)}")
    if not (colored or options.html):
        print("no colours: this is no terminal, or NO_COLOR is set; --html OUT writes them to a file", file=sys.stderr)


def _read_text(name: str) -> str:
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        text = content.decode()
    except OSError as error:
        raise UserError(f"{name}: expected a file with text, found none that can be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: expected text in UTF-8, found the byte {error.object[error.start]:#04x} at {error.start}") from None
    if not text:
        raise UserError(f"{name}: expected text, found an empty file")
    return text


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ends in silence where nobody reads on, as in `... | head`
    main()

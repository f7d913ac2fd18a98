"""A strategy as a compressor: text as an arithmetic-coded file whose length is the score, and back without the text.

Token after token, the strategy is run on what is known so far, and its distribution of the next token codes that one (range coding,
https://docs.rs/constriction). Encoder and decoder do exactly the same, so that nothing can be decoded that the strategy knew of the future.
N targets, V vocabulary.
"""

import struct
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from constriction import stream

from lib.artifacts.tokens import Tokens
from lib.audit.probe import NoLimit
from lib.distributed import Process
from lib.errors import UserError
from lib.evaluation.config import EvaluateParams, StrategyName
from lib.evaluation.evaluation import run_strategy
from lib.evaluation.job import Job
from lib.evaluation.score import Forward, load_stream
from lib.evaluation.sheet import ScoreSheet
from lib.evaluation.tilt import Tilt
from lib.evaluation.windows import find_documents
from lib.model.gpt import GPT

HEADER = struct.Struct("<II")  # number of targets, BOS
SMALLEST = 1e-9  # below what the coder can tell from nothing

Distribution = Callable[[Tokens, int], npt.NDArray[np.float64]]


def next_token(name: StrategyName, model: GPT, params: EvaluateParams, *, num_targets: int, bos_id: int,
               process: Process) -> Distribution:
    """A function that gives a strategy's distribution (V,) of the token after the first n of a text of `num_targets` + 1 tokens.

    The strategy sees the known tokens, and one and the same token at all later places.
    """
    forward = Forward(model, params.precision)
    unknown = 1 if bos_id == 0 else 0

    def distribution(tokens: Tokens, known: int) -> npt.NDArray[np.float64]:
        seen = np.full(num_targets + 1, unknown, np.uint16)
        seen[:known] = tokens[:known]
        stream = load_stream(seen, process.device)
        sheet = ScoreSheet(num_targets, process.device, tilt=Tilt.of(stream, params.tilt), wanted=known - 1)
        job = Job(forward, stream, find_documents(seen, bos_id), params, process, NoLimit(float("inf"), process), sheet)
        stated = run_strategy(name, job).distribution
        assert stated is not None
        probabilities = np.exp(stated.astype(np.float64)) + SMALLEST
        return probabilities / probabilities.sum()
    return distribution


def encode(tokens: Tokens, distribution: Distribution) -> bytes:
    """The file of a text (N+1,) that starts with BOS."""
    coder = stream.queue.RangeEncoder()
    for known in range(1, len(tokens)):
        coder.encode(int(tokens[known]), stream.model.Categorical(distribution(tokens, known), perfect=False))
    return HEADER.pack(len(tokens) - 1, int(tokens[0])) + coder.get_compressed().astype("<u4").tobytes()


def read_header(content: bytes) -> tuple[int, int]:
    """Number of targets and BOS of a file that `encode` made.

    Raises:
        UserError: too short, or no whole number of words.
    """
    if len(content) < HEADER.size or len(content) % 4:
        raise UserError(f"expected a file that `make decode` has written, found {len(content)} bytes")
    num_targets, bos_id = HEADER.unpack_from(content)
    return num_targets, bos_id


def decode(content: bytes, distribution: Distribution) -> Tokens:
    """The text (N+1,) of a file that `encode` made with the same distributions.

    Raises:
        UserError: not such a file, as far as that can be seen.
    """
    num_targets, bos_id = read_header(content)
    coder = stream.queue.RangeDecoder(np.frombuffer(content, "<u4", offset=HEADER.size).astype(np.uint32))
    tokens = np.full(num_targets + 1, bos_id, np.uint16)
    for known in range(1, num_targets + 1):
        try:
            tokens[known] = coder.decode(stream.model.Categorical(distribution(tokens, known), perfect=False))
        except AssertionError as error:  # how constriction reports invalid data
            raise UserError(f"the file was not written with these distributions ({error})") from None
    return tokens

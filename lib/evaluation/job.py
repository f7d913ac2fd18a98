"""What every strategy works from."""

from dataclasses import dataclass, field

from torch import Tensor

from lib.distributed import Process
from lib.evaluation.config import EvaluateParams
from lib.evaluation.limit import TimeLimit
from lib.evaluation.score import Forward, Scorer
from lib.evaluation.sheet import ScoreSheet
from lib.evaluation.windows import Documents


@dataclass(frozen=True)
class Job:
    """A text to be scored by one strategy, in all processes together.

    Attributes:
        forward: forward pass of the artifact's model, whose weights a strategy may change: `evaluate` puts them back.
        stream: (N+1,) int32 tokens on the model's device.
        documents: the documents of the stream.
        params: the section ``evaluate``.
        process: this process and its share of the work.
        limit: the running clock; every piece of work is reported to it.
        sheet: where the losses go, and the record of what happened.
        figures: what the strategy wants in the metrics besides its score.
    """

    forward: Forward
    stream: Tensor
    documents: Documents
    params: EvaluateParams
    process: Process
    limit: TimeLimit
    sheet: ScoreSheet
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def num_targets(self) -> int:
        """N."""
        return len(self.stream) - 1

    def scorer(self) -> Scorer:
        """Scores windows of the stream into the sheet."""
        return Scorer(self.forward, self.stream, self.sheet, batch_tokens=self.params.batch_tokens, process=self.process,
                      advance=self.limit.advance)

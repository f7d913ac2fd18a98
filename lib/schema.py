"""The whole parameter file at once: which class describes which section.

Stages read only their own sections, so that none depends on another's parameters. ``python -m lib.schema [FILE]`` checks
everything before a pipeline starts, the size of its artifact too; torch is imported for grids of fixed bits alone.
"""

import sys
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from lib.compression.config import CompressParams
from lib.data.config import TokenizeParams
from lib.errors import UserError, report_errors
from lib.evaluation.config import EvaluateParams
from lib.forecast.check import check_size
from lib.model.config import ModelSection
from lib.params import PARAMS_FILE, Params, ParamsError, Seed, parse_params, read_params
from lib.quantization.config import CalibrateParams, QuantizeParams
from lib.reporting.config import ReportParams
from lib.training.config import TrainParams


class PipelineParams(Params):
    """All sections of a parameter file, and what must hold between them."""

    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    """Every stage from train to evaluate runs once for each seed."""
    model: ModelSection
    tokenize: TokenizeParams
    train: TrainParams
    calibrate: CalibrateParams
    quantize: QuantizeParams
    compress: CompressParams
    evaluate: EvaluateParams
    report: ReportParams

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: expected each seed once, found {list(self.seeds)}")
        if self.model.vocab_size != self.tokenize.vocab_size:
            raise ValueError(f"model.vocab_size: expected tokenize.vocab_size {self.tokenize.vocab_size}, found {self.model.vocab_size}")
        target, limit = self.quantize.target_bytes, self.compress.limit_bytes
        if target is not None and target > limit:
            raise ValueError(f"quantize.target_bytes: expected at most compress.limit_bytes {limit}, found {target}")
        return self


def main() -> None:
    """Check one parameter file and print the size that its artifact will have; the exit status is 1, with every problem on a line of its
    own, if it cannot be used."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else PARAMS_FILE
    try:
        params = parse_params(read_params(path), PipelineParams, f"{path}: ")
        print(check_size(params.model.architecture, params.quantize, params.compress, Path()))
    except ParamsError as error:
        sys.exit(str(error))
    except UserError as error:  # of the forecast: the limit, or names of matrices
        sys.exit(f"{path}: {error}")


if __name__ == "__main__":
    report_errors()
    main()

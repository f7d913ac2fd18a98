"""The whole parameter file at once: which class describes which section.

Stages read only their own sections, so that none depends on another's parameters.
"""

from collections.abc import Mapping
from typing import Annotated, Self

from pydantic import Field, model_validator

from lib.calibration.config import CalibrateParams
from lib.compression.config import CompressParams
from lib.data.config import TokenizeParams
from lib.evaluation.config import EvaluateParams
from lib.model.config import MATRIX_ROLES, ModelSection
from lib.params import Params, Seed
from lib.quantization.config import QuantizeParams
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
        of_roles: dict[str, Mapping[str, object]] = {
            "quantize.bits": self.quantize.bits, "train.qat.bits": self.train.qat.bits,
            "quantize.clip.num_std_of": self.quantize.clip.num_std_of}
        for key, values in of_roles.items():
            if unknown := sorted(values.keys() - set(MATRIX_ROLES)):
                raise ValueError(f"{key}.{unknown[0]}: expected a role of matrices, one of {', '.join(MATRIX_ROLES)}")
        for key, bits in (("quantize.bits", self.quantize.bits), ("train.qat.bits", self.train.qat.bits)):
            if missing := sorted(set(self.model.roles) - bits.keys()):
                raise ValueError(f"{key}.{missing[0]}: expected bits, as the model has matrices of this role, found nothing")
        target, limit = self.quantize.target_bytes, self.compress.limit_bytes
        if target is not None and target > limit:
            raise ValueError(f"quantize.target_bytes: expected at most compress.limit_bytes {limit}, found {target}")
        return self

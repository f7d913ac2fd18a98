"""A checkpoint of random weights and its second moments."""

from typing import Any

import pytest
import torch

from lib.artifacts.checkpoint import Checkpoint, Training
from lib.artifacts.hessians import Hessians
from lib.calibration.moments import collect_moments
from lib.calibration.sums import matrix_inputs
from lib.distributed import SINGLE_CPU
from lib.model.gpt import build_model, outline
from lib.model.parts import Part, parts_of
from tests.evaluation.tiny import MODEL, make_model

MODEL_CHANGES: dict[str, Any] = {"tied_head": False}


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    weights = {name: parameter.detach() for name, parameter in make_model(**MODEL_CHANGES).named_parameters()}
    return Checkpoint(weights, MODEL | MODEL_CHANGES, Training(sequence_tokens=16))


@pytest.fixture(scope="session")
def parts(checkpoint: Checkpoint) -> dict[str, Part]:
    return parts_of(outline(checkpoint.model))


@pytest.fixture(scope="session")
def hessians(checkpoint: Checkpoint) -> Hessians:
    model = build_model(checkpoint.model, checkpoint.weights)
    sequences = torch.randint(0, MODEL["vocab_size"], (64, 16), generator=torch.Generator().manual_seed(0))
    calibration, verification = (
        collect_moments(model, model.logits, part, num_gradient_sequences=32, batch_sequences=32, precision="fp32", seed=0,
                        process=SINGLE_CPU, description="test") for part in (sequences[:32], sequences[32:]))
    return Hessians(matrix_inputs(parts_of(model)), calibration, verification)

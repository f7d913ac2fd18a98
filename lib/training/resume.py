"""Where the state of an unfinished training run is found again."""

from pathlib import Path

from lib.artifacts.resume import state_file
from lib.model.config import ModelParams
from lib.training.config import TrainParams


def resume_file(folder: Path, params: TrainParams, model: ModelParams, seed: int, data_sha256: str) -> Path:
    """The file for one run; a run with anything else that matters gets another name.

    Args:
        folder: where such files lie.
        params: parameters of the run; which of the averages is selected at its end does not matter.
        model: the architecture.
        seed: seed of initialisation and data order.
        data_sha256: checksums of the descriptions of the training and the held-out split, which have those of their shards.
    """
    return state_file(folder, {"train": params.model_dump(mode="json", exclude={"averaging": {"select"}}),
                               "model": model.model_dump(mode="json"), "seed": seed, "data": data_sha256})

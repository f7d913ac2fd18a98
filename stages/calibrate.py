"""Calibrate: checkpoint, train shards -> second moments of the inputs and output gradients of all matrices."""

from lib.artifacts.checkpoint import load_checkpoint
from lib.artifacts.hessians import save_hessians
from lib.artifacts.metrics import save_metrics
from lib.artifacts.paths import TOKENIZE_FOLDER, stage_folder
from lib.artifacts.tokens import load_split
from lib.audit.isolation import withhold_validation
from lib.calibration.calibration import calibrate
from lib.calibration.config import CalibrateParams
from lib.distributed import start_process
from lib.params import load_params, parse_seed


def main(seed: int) -> None:
    """Run the stage for one seed."""
    checkpoint_path = stage_folder("train", seed) / "checkpoint.safetensors"
    with start_process() as process:
        params, folder = load_params("calibrate", CalibrateParams), stage_folder("calibrate", seed)
        checkpoint = load_checkpoint(checkpoint_path)
        text = load_split(TOKENIZE_FOLDER / "train", checkpoint.model["vocab_size"])
        calibration = calibrate(checkpoint, text, params, seed, process)
        if process.is_main:
            save_hessians(folder / "hessians.safetensors", calibration.hessians, checkpoint_path)
            save_metrics(folder, calibration.metrics, calibration.timing)


if __name__ == "__main__":
    withhold_validation("calibrate", seed := parse_seed(__doc__))
    main(seed)

"""Import: a published float checkpoint or artifact -> the outputs of train or quantize, from where the pipeline goes on.

Not part of the pipeline: ``python -m tools.import_published FILE --seed N``. docs/parity.md says which files these are.
"""

import argparse
import sys
import time
from pathlib import Path

from lib.artifacts.checkpoint import save_checkpoint
from lib.artifacts.files import write_csv
from lib.artifacts.metrics import save_metrics
from lib.artifacts.paths import stage_folder
from lib.artifacts.quantized import load_quantized, save_quantized
from lib.compression.config import CompressParams
from lib.compression.container import pack
from lib.errors import UserError
from lib.model.config import ModelSection
from lib.params import add_seed, load_params, read_params
from lib.published.conversion import check_seed, convert_artifact, convert_checkpoint, describe_origin
from lib.published.description import describe_import
from lib.published.reader import read_published
from lib.training.config import TrainParams


def main(arguments: list[str] | None = None) -> None:
    """Import one file, or say why it cannot be and exit with status 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="final_model.pt or final_model.int6.ptz, as the published scripts save them")
    add_seed(parser, required=True, help="one of `seeds` in params.yaml, whose outputs it becomes")
    options = parser.parse_args(arguments)
    try:
        print(import_file(options.path, options.seed))
    except UserError as error:
        sys.exit(str(error))


def import_file(path: Path, seed: int) -> str:
    """Write the outputs that a file stands for; returns what was done and how to go on."""
    start, model, train = time.monotonic(), load_params("model", ModelSection).architecture, load_params("train", TrainParams)
    published, packed_bytes = read_published(path), None
    check_seed(published, seed, read_params()["seeds"])
    metrics = describe_origin(published) | {"num_parameters": published.num_parameters}
    folder = stage_folder("quantize" if published.is_quantized else "train", seed)
    if published.is_quantized:
        compress, output = load_params("compress", CompressParams), folder / "quantized.safetensors"
        save_quantized(output, convert_artifact(published, model, train.sequence_tokens))
        packed_bytes = len(pack(load_quantized(output), compress.codec, compress.level).blob)
    else:
        save_checkpoint(folder / "checkpoint.safetensors", convert_checkpoint(published, model, train.sequence_tokens))
        write_csv(folder / "loss.csv", ("tokens", "loss"), [])
        write_csv(folder / "heldout.csv", ("tokens", "loss", "bpb"), [])
        metrics["num_steps"] = None  # unknown
    save_metrics(folder, metrics, {"seconds": time.monotonic() - start})
    return describe_import(published, seed, packed_bytes)


if __name__ == "__main__":
    main()

"""Train: tokenizer, train and held-out shards -> checkpoint of float weights, loss curve, held-out curve."""

from lib.artifacts.checkpoint import save_checkpoint
from lib.artifacts.files import read_json, sha256_of, write_csv
from lib.artifacts.metrics import save_metrics
from lib.artifacts.paths import TOKENIZE_FOLDER, stage_folder
from lib.artifacts.tokens import SPLIT_FILE, load_split
from lib.audit.isolation import withhold_validation
from lib.data.tokenizer import load_tokenizer
from lib.distributed import start_process
from lib.forecast.corpus import check_corpus
from lib.forecast.watch import SizeWatch
from lib.model.config import ModelSection
from lib.params import load_params, parse_seed
from lib.training.checkpoint import train_checkpoint
from lib.training.config import TrainParams
from lib.training.resume import resume_file


def main(seed: int) -> None:
    """Run the stage for one seed."""
    with start_process() as process:
        params, section, folder = load_params("train", TrainParams), load_params("model", ModelSection), stage_folder("train", seed)
        tokenizer = load_tokenizer(TOKENIZE_FOLDER / "tokenizer.model", section.architecture.bos_id)
        text, heldout = (load_split(TOKENIZE_FOLDER / name, section.architecture.vocab_size) for name in ("train", "heldout"))
        check_corpus({name: read_json(TOKENIZE_FOLDER / name / SPLIT_FILE) for name in ("train", "heldout")})
        data_sha256 = "".join(sha256_of(TOKENIZE_FOLDER / name / SPLIT_FILE) for name in ("train", "heldout"))
        resume_path = resume_file(folder, params, section.architecture, seed, data_sha256)
        trained = train_checkpoint(section, params, text, heldout, tokenizer, seed=seed, process=process, resume_path=resume_path,
                                   watch=lambda model: SizeWatch(model, enabled=process.is_main).status)
        if process.is_main:
            save_checkpoint(folder / "checkpoint.safetensors", trained.checkpoint)
            write_csv(folder / "loss.csv", ("tokens", "loss"), trained.loss_curve)
            write_csv(folder / "heldout.csv", ("tokens", "loss", "bpb"), trained.heldout_curve)
            save_metrics(folder, trained.metrics, trained.timing)
            resume_path.unlink(missing_ok=True)


if __name__ == "__main__":
    withhold_validation("train", seed := parse_seed(__doc__))
    main(seed)

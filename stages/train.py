"""Train: tokenizer, train and held-out shards -> checkpoint of float weights, loss curve."""

from functools import partial

from lib.artifacts.checkpoint import Checkpoint, save_checkpoint
from lib.artifacts.files import sha256_of, write_csv
from lib.artifacts.metrics import save_metrics
from lib.artifacts.paths import TOKENIZE_FOLDER, stage_folder
from lib.artifacts.tokens import SPLIT_FILE, load_split
from lib.audit.isolation import withhold_validation
from lib.data.loader import Loader
from lib.data.tokenizer import load_tokenizer
from lib.distributed import start_process
from lib.evaluation.heldout import score_heldout
from lib.forecast.watch import SizeWatch
from lib.model.config import ModelSection
from lib.model.gpt import GPT
from lib.model.kernels import choose_kernel
from lib.params import load_params, parse_seed
from lib.progress import say
from lib.training.config import TrainParams
from lib.training.loop import train
from lib.training.resume import resume_file
from lib.training.selection import score_candidates, select


def main(seed: int) -> None:
    """Run the stage for one seed."""
    with start_process() as process:
        params, section, folder = load_params("train", TrainParams), load_params("model", ModelSection), stage_folder("train", seed)
        tokenizer = load_tokenizer(TOKENIZE_FOLDER / "tokenizer.model", section.architecture.bos_id)
        train_split, heldout = (load_split(TOKENIZE_FOLDER / name, section.architecture.vocab_size) for name in ("train", "heldout"))
        kernel = choose_kernel(section.attention, section.architecture, params.precision, process.device)
        say(f"train: attention by {kernel.reason}", enabled=process.is_main)
        model = GPT(section.architecture, kernel).to(process.device)
        model.initialize(seed)
        resume_path = resume_file(folder, params, section.architecture, seed, sha256_of(TOKENIZE_FOLDER / "train" / SPLIT_FILE))
        loader, watch = Loader(train_split, params.sequence_tokens, params.batch_sequences, seed), SizeWatch(model, enabled=process.is_main)
        result = train(model, params, loader, process, resume_path, status=watch.status)
        score = partial(score_heldout, split=heldout, tokenizer=tokenizer, window_tokens=params.sequence_tokens,
                        batch_windows=params.micro_batch_sequences, precision=params.precision, process=process)
        selected = select(scores := score_candidates(model, result.candidates, score), params.averaging.select)
        if not process.is_main:
            return
        save_checkpoint(folder / "checkpoint.safetensors", Checkpoint(
            result.candidates[selected], section.architecture.model_dump(mode="json"),
            {"sequence_tokens": params.sequence_tokens, "num_steps": len(result.losses), "selected": selected,
             "calibration_seconds": params.reserve_seconds, "qat": params.qat.model_dump(mode="json") if params.qat.below_lr else None}))
        write_csv(folder / "loss.csv", ("tokens", "loss"), result.loss_curve)
        save_metrics(folder, {
            "heldout_bpb": round(scores[selected].bpb, 8), "heldout_loss": round(scores[selected].loss, 8), "selected": selected,
            **{f"heldout_bpb_{kind}": round(score.bpb, 8) for kind, score in scores.items()}, "num_parameters": model.num_parameters,
            "num_tokens": result.num_tokens, "num_steps": len(result.losses), "budget_steps": result.plan, "attention": kernel.name,
        }, {"seconds": result.seconds, "tokens_per_second": result.num_tokens / result.seconds})
        resume_path.unlink(missing_ok=True)


if __name__ == "__main__":
    withhold_validation("train", seed := parse_seed(__doc__))
    main(seed)

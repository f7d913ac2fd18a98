"""Score the artifact: model.ptz, tokenizer, validation shards -> metrics.json, timing.json, curves/, adaptation/."""

from lib.artifacts.paths import TOKENIZE_FOLDER, stage_folder
from lib.artifacts.scores import save_scores
from lib.artifacts.tokens import load_split
from lib.compression.container import load_artifact
from lib.data.tokenizer import load_tokenizer
from lib.distributed import start_process
from lib.evaluation.bpb import check_bytes
from lib.evaluation.config import EvaluateParams
from lib.evaluation.limit import TimeLimit
from lib.evaluation.strategies import evaluate
from lib.model.gpt import build_model
from lib.params import load_params, parse_seed


def main(seed: int) -> None:
    """Run the stage for one seed."""
    params = load_params("evaluate", EvaluateParams)
    with start_process() as process:
        limit = TimeLimit(params.limit_seconds, enabled=process.is_main)
        artifact = load_artifact(stage_folder("compress", seed) / "model.ptz")
        model = build_model(artifact.model, artifact.weights()).to(process.device)
        tokenizer = load_tokenizer(TOKENIZE_FOLDER / "tokenizer.model")
        split = load_split(TOKENIZE_FOLDER / "val", model.params.vocab_size)
        tokens = split.tokens()
        target_bytes = tokenizer.target_bytes(tokens)
        check_bytes(target_bytes, split.accounted_bytes, str(split.folder))
        evaluation = evaluate(model, tokens, target_bytes, params, process=process, limit=limit)
        if process.is_main:
            save_scores(stage_folder("evaluate", seed), evaluation.metrics(), evaluation.timing(limit.seconds), evaluation.curves,
                        evaluation.adaptations)


if __name__ == "__main__":
    main(parse_seed(__doc__))

"""Score an artifact as the submitted program does: model.ptz, tokenizer, val shards -> scores, printed. Not part of the pipeline."""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

from lib.compression.container import load_artifact
from lib.data.tokenizer import load_tokenizer
from lib.data.validation import load_validation
from lib.distributed import start_process
from lib.evaluation.config import EvaluateParams
from lib.evaluation.evaluation import evaluate
from lib.evaluation.inputs import open_inputs
from lib.evaluation.limit import TimeLimit
from lib.params import parse_params, read_params
from lib.reporting.strategy_table import format_strategies


def main(settings: Any, folder: Path, description: str | None) -> None:
    """Score one artifact by the command line.

    Args:
        settings: the section ``evaluate``.
        folder: has the files that no argument names.
        description: shown by ``--help``.
    """
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of validation shards, *val_[0-9]*.bin")
    parser.add_argument("--artifact", type=Path, default=folder / "model.ptz", help="the packed model (default: %(default)s)")
    parser.add_argument("--tokenizer", type=Path, default=folder / "tokenizer.model", help="SentencePiece model (default: %(default)s)")
    arguments = parser.parse_args()
    params = parse_params(settings, EvaluateParams, "evaluate.")
    with start_process() as process:
        limit = TimeLimit(params.limit_seconds, process)
        tokenizer = load_tokenizer(arguments.tokenizer)
        model, text = open_inputs(load_artifact(arguments.artifact), tokenizer, load_validation(arguments.data, tokenizer), process.device)
        evaluation = evaluate(model, text, params, process=process, limit=limit)
        metrics, timing = evaluation.metrics(), evaluation.timing(limit, process)
        if process.is_main:
            print(format_strategies([metrics], [timing]))
            print(f"\n{metrics['num_bytes']:,} bytes in {metrics['num_tokens']:,} tokens and {metrics['num_documents']:,} documents, "
                  f"{timing['seconds']:.1f} seconds; by {metrics['strategy']}:")
            print(f"val_loss: {metrics['val_loss']:.8f}\nval_bpb: {metrics['val_bpb']:.8f}", flush=True)


if __name__ == "__main__":
    main(read_params()["evaluate"], Path(), __doc__)

"""Score the artifact: model.ptz, tokenizer, val shards -> metrics.json, timing.json, audit.json, examples.json, tables, ledger/."""

from contextlib import ExitStack
from functools import partial

from lib.artifacts.paths import TOKENIZE_FOLDER, stage_folder
from lib.artifacts.scores import save_audit, save_examples, save_scores, save_unfinished
from lib.artifacts.tokens import load_split
from lib.audit.determinism import deterministic
from lib.audit.isolation import unchecked
from lib.audit.provenance import check_data, confine_to_inputs
from lib.audit.replay import start_replayer
from lib.audit.verdict import NOT_AUDITED, audit_scores, raise_violations
from lib.compression.container import load_artifact
from lib.data.tokenizer import load_tokenizer
from lib.distributed import start_process
from lib.evaluation.config import EvaluateParams
from lib.evaluation.evaluation import evaluate
from lib.evaluation.inputs import open_inputs
from lib.evaluation.limit import TimeLimit
from lib.generation.examples import make_examples
from lib.params import load_params, parse_seed


def main(seed: int, *, confined: bool = False) -> None:
    """Run the stage for one seed; `confined` takes everything but the stage's inputs from this process, for good."""
    with start_process() as process, ExitStack() as stack:
        params, folder = load_params("evaluate", EvaluateParams), stage_folder("evaluate", seed)
        artifact = stage_folder("compress", seed) / "model.ptz"
        replayer = stack.enter_context(start_replayer(process, enabled=params.audit))
        limit = TimeLimit(params.limit_seconds, process)
        confinement = (confine_to_inputs([seed], "evaluate", process) if confined and params.audit
                       else unchecked("evaluate ran inside another program"))
        tokenizer = load_tokenizer(TOKENIZE_FOLDER / "tokenizer.model")
        split = load_split(TOKENIZE_FOLDER / "val", tokenizer.vocab_size)
        model, text = open_inputs(load_artifact(artifact), tokenizer, split, process.device)
        with deterministic(model, params.precision, process, enabled=params.audit) as nondeterministic:
            evaluation = evaluate(model, text, params, process=process, limit=limit, keep=partial(save_unfinished, folder))
            timing, metrics = evaluation.timing(limit, process), evaluation.metrics()
            ledgers = {name: each.events for name, each in evaluation.outcomes.items()}
            if process.is_main:
                save_scores(folder, metrics, timing, curves=evaluation.curves(), context=evaluation.context_tables(),
                            documents=evaluation.document_tables(), ledgers=ledgers,
                            nats={name: each.nats for name, each in evaluation.outcomes.items()})
                save_audit(folder, NOT_AUDITED)
            if replayer:
                audit = audit_scores(model, text, params, evaluation.outcomes, replay=replayer.prepare(artifact, params, split),
                                     data=check_data(metrics, split, tokenizer, process), confinement=confinement, process=process,
                                     nondeterministic=nondeterministic)
                if process.is_main:
                    save_audit(folder, audit)
                raise_violations(audit)
            if process.is_main:  # after all that is timed and checked
                save_examples(folder, make_examples(model, tokenizer, evaluation))


if __name__ == "__main__":
    main(parse_seed(__doc__), confined=True)

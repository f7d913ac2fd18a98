"""Audit: check finished evaluations thoroughly. Not part of the pipeline: ``python -m tools.audit [--seed N] [--seed-of-cuts K]``."""

import argparse
import sys
from contextlib import ExitStack, closing

from lib.artifacts.metrics import load_metrics
from lib.artifacts.paths import TOKENIZE_FOLDER, stage_folder
from lib.artifacts.scores import save_audit
from lib.artifacts.tokens import load_split
from lib.audit.determinism import deterministic
from lib.audit.isolation import unchecked
from lib.audit.provenance import check_data, confine_to_inputs
from lib.audit.replay import Replayer, load_outcome
from lib.audit.verdict import AuditError, audit_scores, describe_audit, raise_violations
from lib.compression.container import load_artifact
from lib.data.tokenizer import load_tokenizer
from lib.distributed import start_process
from lib.evaluation.config import EvaluateParams
from lib.evaluation.inputs import open_inputs
from lib.params import add_seed, load_params, read_params


def main(arguments: list[str] | None = None, *, confined: bool = False) -> None:
    """Audit one seed, or all; print what was found, and exit with status 1 where a score is not legal."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_seed(parser, required=False, help="one of `seeds` in params.yaml; all of them if not given")
    parser.add_argument("--seed-of-cuts", type=int, default=0, help="draws the places where the run is repeated with other text after them")
    options = parser.parse_args(arguments)
    seed = options.seed
    seeds, params = read_params()["seeds"] if seed is None else [seed], load_params("evaluate", EvaluateParams)
    with start_process() as process, ExitStack() as stack:
        replayers = {number: stack.enter_context(closing(Replayer(process))) for number in seeds}
        confinement = confine_to_inputs(seeds, "audit", process) if confined else unchecked("the audit ran inside another program")
        for number in seeds:
            scores = stage_folder("evaluate", number)
            tokenizer = load_tokenizer(TOKENIZE_FOLDER / "tokenizer.model")
            split = load_split(TOKENIZE_FOLDER / "val", tokenizer.vocab_size)
            artifact = stage_folder("compress", number) / "model.ptz"
            model, text = open_inputs(load_artifact(artifact), tokenizer, split, process.device)
            metrics, outcomes = load_metrics(scores), {name: load_outcome(scores, name) for name in params.strategies}
            with deterministic(model, params.precision, process) as nondeterministic:
                audit = audit_scores(model, text, params, outcomes, replay=replayers[number].prepare(artifact, params, split),
                                     data=check_data(metrics, split, tokenizer, process), confinement=confinement, process=process,
                                     thorough=True, seed_of_cuts=options.seed_of_cuts, nondeterministic=nondeterministic)
            if process.is_main:
                save_audit(stage_folder("audit", number), audit)
                print(f"seed {number}\n{describe_audit(audit)}")
            try:
                raise_violations(audit)
            except AuditError as error:
                sys.exit(str(error))


if __name__ == "__main__":
    main(confined=True)

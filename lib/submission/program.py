"""What the submitted program does: shards, tokenizer -> model.ptz, log; or the score of a model.ptz. Not part of the pipeline.

The parts are those of the stages, in one process (or one for each GPU) and without files in between. The validation text is opened when
``model.ptz`` is written; unlike the stages, one program cannot take it from itself before.
"""

import os
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lib.artifacts.files import write_bytes
from lib.artifacts.metrics import describe_environment
from lib.calibration.calibration import calibrate
from lib.calibration.config import CalibrateParams
from lib.compression.budget import artifact_bytes, check_code, check_limit, list_parts, summarize
from lib.compression.config import CompressParams
from lib.compression.container import pack, read_artifact, unpack
from lib.data.dataset import check_names, load_training, load_validation
from lib.data.tokenizer import Tokenizer, load_tokenizer
from lib.distributed import Process, start_process
from lib.errors import UserError
from lib.evaluation.config import EvaluateParams
from lib.evaluation.evaluation import evaluate
from lib.evaluation.inputs import open_inputs
from lib.evaluation.limit import TimeLimit
from lib.model.config import ModelSection
from lib.model.gpt import outline
from lib.model.parts import parts_of
from lib.params import MAX_SEED, Params, parse_params
from lib.quantization.config import QuantizeParams
from lib.quantization.quantization import fingerprint, quantize
from lib.reporting.strategy_table import format_strategies
from lib.submission.log import LossCurve, format_section, log_name
from lib.training.checkpoint import train_checkpoint
from lib.training.config import TrainParams
from lib.training.resume import resume_file

ARTIFACT, TOKENIZER = "model.ptz", "tokenizer.model"
DEFAULT_SEED = "1337"  # the challenge's


class ProgramParams(Params):
    """The sections of params.yaml that the program needs."""

    model: ModelSection
    train: TrainParams
    calibrate: CalibrateParams
    quantize: QuantizeParams
    compress: CompressParams
    evaluate: EvaluateParams


class Log:
    """What the main process reports: on the terminal, and in a file.

    Args:
        path: the file, which is written anew; None for the terminal alone.
        process: the main one reports.
    """

    def __init__(self, path: Path | None, process: Process) -> None:
        self._path, self._is_main, self._text = path, process.is_main, ""

    def add(self, text: str) -> None:
        """Some lines."""
        self._text += f"{text}\n"
        if self._is_main:
            print(text, flush=True)
            if self._path:
                write_bytes(self._path, self._text.encode())

    def add_section(self, title: str, metrics: Mapping[str, Any], timing: Mapping[str, float], loss_curve: LossCurve = ()) -> None:
        """The figures of a part of the run, as `lib.submission.log.format_section` writes them."""
        self.add(format_section(title, {**metrics, **{key: round(value, 3) for key, value in timing.items()}}, loss_curve))


def main(settings: Any, program: Path, description: str | None) -> None:
    """Run by command line and environment.

    Args:
        settings: the fields of `ProgramParams`.
        program: the file that counts as code; artifact, tokenizer and log are beside it.
        description: shown by ``--help``.

    Raises:
        UserError: settings, environment, files, sizes or times that are not as they must be.
    """
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--score", nargs="?", type=Path, const=program.with_name(ARTIFACT), metavar="ARTIFACT",
                        help="score an artifact instead (default: the one beside this file)")
    artifact = parser.parse_args().score
    params = parse_params(settings, ProgramParams, "")
    if not (folder := os.environ.get("DATA_PATH")):
        raise UserError("DATA_PATH: expected the folder of the shards in this variable of the environment, found nothing; set it")
    data, tokenizer_path = Path(folder), Path(os.environ.get("TOKENIZER_PATH") or program.with_name(TOKENIZER))
    with start_process() as process:
        if artifact:
            limit = TimeLimit(params.evaluate.limit_seconds, process)
            blob, tokenizer, log = read_artifact(artifact), load_tokenizer(tokenizer_path), Log(None, process)
        else:
            seed = _parse_seed(os.environ.get("SEED") or DEFAULT_SEED)
            tokenizer = load_tokenizer(tokenizer_path, params.model.bos_id)
            log = Log(program.with_name(log_name(seed)), process)
            blob = make_artifact(params, data, tokenizer, seed=seed, program=program, process=process, log=log)
            limit = TimeLimit(params.evaluate.limit_seconds, process)
        model, text = open_inputs(unpack(blob, str(artifact or ARTIFACT)), tokenizer, load_validation(data, tokenizer), process.device)
        evaluation = evaluate(model, text, params.evaluate, process=process, limit=limit)
        metrics, timing = evaluation.metrics(), evaluation.timing(limit, process)
        log.add_section("evaluate", metrics, timing)
        log.add(f"\n== strategies\n{format_strategies([metrics], {}, [timing])}\n")
        log.add(f"val_loss: {metrics['val_loss']:.8f}\nval_bpb: {metrics['val_bpb']:.8f}")


def make_artifact(params: ProgramParams, data: Path, tokenizer: Tokenizer, *, seed: int, program: Path, process: Process,
                  log: Log) -> bytes:
    """Train, calibrate, quantize and pack; what is interrupted goes on from the last saved state of training or distillation.

    Args:
        params: settings of all that.
        data: folder of the shards, of which those for training are read.
        tokenizer: the one that they were made with.
        seed: seed of the run.
        program: the file that counts as code; the artifact is written beside it.
        process: every process calls this and gets the whole result.
        log: gets the figures.

    Returns:
        The bytes of ``model.ptz``.
    """
    coding, num_code_bytes = params.compress, program.stat().st_size
    check_code(num_code_bytes, coding.code_bytes)
    check_names(data)
    log.add(f"seed {seed}, {', '.join(describe_environment())}")
    log.add_section("settings", params.model_dump(mode="json"), {})
    text, heldout = load_training(data, tokenizer, params.quantize.heldout_tokens)
    resume_path = resume_file(program.parent, params.train, params.model.architecture, seed, fingerprint(text))
    settings = params.train.model_copy(update={"heldout_curve": None})  # the log has the loss curve alone
    trained = train_checkpoint(params.model, settings, text, heldout, tokenizer, seed=seed, process=process, resume_path=resume_path,
                               watch=lambda _: dict)
    log.add_section("train", trained.metrics, trained.timing, trained.loss_curve)
    calibration = calibrate(trained.checkpoint, text, params.calibrate, seed, process)
    log.add_section("calibrate", calibration.metrics, calibration.timing)
    start, parts = time.monotonic(), parts_of(outline(trained.checkpoint.model))
    distilled, _ = quantize(trained.checkpoint, calibration.hessians, params.quantize, lambda: text, seed=seed, process=process,
                            measure=partial(artifact_bytes, coding), folder=program.parent)
    quantized = distilled.quantized
    if distilled.timing:
        log.add_section("distill", distilled.metrics, distilled.timing)
    packed = pack(quantized, coding.codec, coding.level)
    rows = list_parts(quantized, packed, {name: part.role for name, part in parts.items()}, num_code_bytes)
    check_limit(rows, coding.limit_bytes)
    if process.is_main:
        write_bytes(program.with_name(ARTIFACT), packed.blob)
        for path in filter(None, (resume_path, distilled.state)):
            path.unlink(missing_ok=True)
    sizes = {row.part: row.num_bytes for row in rows} | summarize(rows) | {"limit_bytes": coding.limit_bytes}
    log.add_section("quantize and compress", sizes, {"seconds": time.monotonic() - start})
    return packed.blob


def _parse_seed(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(MAX_SEED)) and int(text) <= MAX_SEED):
        raise UserError(f"SEED: expected a whole number from 0 to {MAX_SEED}, found {text[:80]}")
    return int(text)

"""Distillation: integer codes, and what is stored as floats beside them, trained on text towards the float model.

The loss is KL(float || quantized) in nats per token + price x length of the codes in bits; `lib.quantization.student` has what is trained.
What a bit may cost is first what it costs GPTQ, then corrected so that the size, with the real coder, falls to the target by
`SHRINK_FRACTION` of the steps.
The result is kept if it is closer to the float model than GPTQ at the same size, on training text that the run has not seen.

Shapes: B sequences of this process, T tokens, V vocabulary.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.artifacts.quantized import QuantizedModel
from lib.artifacts.resume import INTERRUPTED_EXIT_CODE, Saver, interruption, load_resume, state_file
from lib.artifacts.tensors import hash_content
from lib.distributed import Process
from lib.errors import UserError
from lib.model.parts import read_weights
from lib.progress import Progress, say
from lib.quantization.allocation import SizeSearch
from lib.quantization.config import QuantizeParams
from lib.quantization.student import Student, code_bits

NUM_SIZES = 20  # times that the size is measured and the price corrected
FIRST_PRICE = 4.0  # KL falls about as exp(-4 x relative size) where GPTQ has 2 to 4 bits
SHRINK_FRACTION = 0.5
GAIN, SLOW_GAIN = 30.0, 5.0  # of the logarithm of the price, per relative excess of the size: at once, and for good
LIMITS = 3.0, 1.5  # of the logarithm of the price over the first one: of all of it, of what is for good
SHIFT_UNIT = 2.0**-16  # steps per bit per step, of the thresholds, when the target is met in the end
ESTIMATE_UNITS = 64
CHECK_BATCHES = 8  # that the result is compared with GPTQ on

Logits = Callable[[Tensor], Tensor]


class Distilled(NamedTuple):
    """What distillation leaves.

    Attributes:
        quantized: the better model, of at most ``target_bytes``.
        metrics: ``distill_kl`` and ``undistilled_kl``, to the float model with and without distillation, in nats per token of training text
            that the run has not seen; ``distill_kept``, whether `quantized` is the one with.
        timing: ``distill_seconds``, interruptions left out.
        state: file to be deleted when the model is written; it may be missing.
    """

    quantized: QuantizedModel
    metrics: dict[str, Any]
    timing: dict[str, float]
    state: Path | None


def distill(model: nn.Module, logits: Logits, batch_of: Callable[[int], Tensor], start: QuantizedModel, params: QuantizeParams, *,
            process: Process, measure: Callable[[QuantizedModel], int], undistilled: Callable[[], QuantizedModel],
            folder: Path | None = None, data: str = "") -> Distilled:
    """Train the codes and vectors of a quantized model, and keep them if that has paid.

    With a `folder`, the state is saved there at intervals and on SIGINT or SIGTERM, which end the process with status 130; the next call
    with the same arguments goes on and, on a CPU, ends in the same model bit for bit. Otherwise what was interrupted begins anew.

    Args:
        model: the float model, any module with `lib.model.parts`, on the process's device; it is left as it was.
        logits: one forward pass of it, tokens (B, T) -> logits (B, T, V).
        batch_of: number of a step -> (B, T) int64, training tokens of this process; B may be 0 in some of the processes. Those of
            `CHECK_BATCHES` further steps are what the result is compared on.
        start: the model quantized, `params.first_target_bytes` large.
        params: section ``quantize``, with steps of distillation.
        process: every process calls this and gets the whole result.
        measure: size of code and artifact in bytes with a model; called by the main process alone.
        undistilled: gives the model quantized without distillation, of at most ``target_bytes``; called where the result is no better than
            `start`, which may be larger.
        folder: place of the state; with other weights, parameters, data or size of `start`, there is another file.
        data: name of what `batch_of` gives.

    Raises:
        TargetError: ``target_bytes`` was not reached.
        ArtifactError: a saved state is damaged.
        UserError: it took longer than training has left for it.
        SystemExit: interrupted.
    """
    begin, path = time.monotonic(), None
    if folder is not None:
        size = None if params.target_bytes is None else _size(start, process, measure)
        path = state_file(folder, {"data": data, "size": size, "start": _hash(model, start),
                                   "quantize": params.model_dump(mode="json", exclude={"heldout_tokens"})})
    state = process.broadcast(load_resume(path) if path and process.is_main else None)
    begin -= state["seconds"] if state else 0.0
    student = Student(model, start, params, process.device)
    try:
        _train(student, logits, batch_of, params, process=process, size=lambda: _size(student.quantized(), process, measure), state=state,
               saver=Saver(path, "distill") if path else None, begin=begin)
        found = student.quantized()
        if params.target_bytes is not None:
            student.measure_slopes()
            found = _meet_target(student, params.target_bytes, lambda model: _size(model, process, measure))
        kl = partial(_mean_divergence, student, logits, [batch_of(params.distill.steps + number) for number in range(CHECK_BATCHES)],
                     precision=params.distill.precision, process=process)
        other, found_kl, other_kl = start, kl(found), kl(start)
        if params.target_bytes is not None and not found_kl < other_kl:
            other = undistilled()
            other_kl = kl(other)
    finally:
        student.restore()
    seconds, = process.max(time.monotonic() - begin)
    reserve = start.training.distillation_seconds
    if reserve is not None and seconds > reserve:
        raise UserError(f"quantize.distill: expected at most the {reserve:g} s that train.reserve_distill_seconds left of the training "
                        f"budget, took {seconds:.1f} s; lower quantize.distill.steps, or raise that and train again")
    is_kept = found_kl < other_kl
    say(f"distill: KL of {found_kl:.6f} on training text that it has not seen, {other_kl:.6f} without distillation; "
        f"the model {'with' if is_kept else 'without'} it is kept", enabled=process.is_main)
    metrics = {"distill_kept": is_kept, "distill_kl": round(found_kl, 8), "undistilled_kl": round(other_kl, 8)}
    return Distilled(found if is_kept else other, metrics, {"distill_seconds": seconds}, path)


def _hash(model: nn.Module, start: QuantizedModel) -> str:
    tensors = {f"float {name}": weight for name, weight in read_weights(model).items()} | start.vectors
    for name, matrix in start.matrices.items():
        tensors |= {f"{kind} {name}": tensor.contiguous() for kind, tensor in
                    (("codes", matrix.codes), ("rows", matrix.row_exponents), ("columns", matrix.column_exponents))}
    return hash_content(tensors, start.model)


def _size(model: QuantizedModel, process: Process, measure: Callable[[QuantizedModel], int]) -> int:
    return process.broadcast(measure(model) if process.is_main else 0)


def _train(student: Student, logits: Logits, batch_of: Callable[[int], Tensor], params: QuantizeParams, *, process: Process,
           size: Callable[[], int], state: dict[str, Any] | None, saver: Saver | None, begin: float) -> None:
    """All steps, or those after a saved state; the clock was at 0 at `begin`."""
    settings, first, price, found, controller = params.distill, 0, 0.0, 0, None
    interval, kl = max(1, settings.steps // NUM_SIZES), torch.zeros(())
    if state is not None:
        student.load_state_dict(state["student"])
        first, price, found = state["step"], state["price"], state["bytes"]
        controller = None if state["controller"] is None else _Price(**state["controller"])
        say(f"distill: continuing after step {first}", enabled=process.is_main)
    with (interruption() if saver else nullcontext(bool) as is_interrupted,
          Progress("distill", settings.steps, "step", enabled=process.is_main, initial=first) as progress):
        for step in range(first, settings.steps):
            multiplier = (1 + math.cos(math.pi * step / settings.steps)) / 2
            if step % interval == 0 and params.target_bytes is not None:
                student.measure_slopes()
                found = size()
                if controller is not None:
                    price = controller.correct(found, step / settings.steps, multiplier)
            kl = _backward(student, logits, batch_of(step).to(process.device), settings.precision, process)
            if step == 0 and params.target_bytes is not None:
                bits = float(sum(code_bits(codes.rounded()) for codes in student.codes if codes.start.bits is None))
                controller = _Price(FIRST_PRICE * float(kl) / bits, found, params.target_bytes, bits / 8)
                price = controller.correct(found, 0.0, 1.0)
            student.step(price, multiplier)
            status: dict[str, Any] = {} if controller is None else {"bytes": f"{found:,}", "price": price}
            progress.update(1, **(status | {"kl": float(kl)} if step % interval == 0 else status))
            if saver is None:
                continue
            stop, save = process.max(is_interrupted(), process.is_main and saver.is_due)
            if stop or save or step + 1 == settings.steps:
                saver.save(step + 1, partial(dict, student=student.state_dict(), step=step + 1, price=price, bytes=found,
                                             controller=controller and asdict(controller), seconds=time.monotonic() - begin),
                           write=process.is_main)
            if stop and step + 1 < settings.steps:
                say(f"distill: interrupted after step {step + 1}; rerun to continue", enabled=process.is_main)
                raise SystemExit(INTERRUPTED_EXIT_CODE)


@dataclass
class _Price:
    """What a bit may cost, in nats per token, so that the size goes where it is to be.

    Attributes:
        first: price to begin with.
        first_bytes: size at the beginning.
        target_bytes: size at `SHRINK_FRACTION` of the steps, and from there on.
        code_bytes: what of the size the price has power over.
        correction: what is added to the logarithm of the price for good.
    """

    first: float
    first_bytes: int
    target_bytes: int
    code_bytes: float
    correction: float = 0.0

    def correct(self, size: int, done: float, lr_multiplier: float) -> float:
        """The price from now on, by the size after a fraction `done` of the steps; corrected more where the learning rate is low."""
        planned = self.target_bytes + (self.first_bytes - self.target_bytes) * max(0.0, 1 - done / SHRINK_FRACTION)
        excess = (size - planned) / max(1.0, self.code_bytes) / max(0.1, lr_multiplier)
        self.correction = min(LIMITS[1], max(-LIMITS[1], self.correction + SLOW_GAIN * excess))
        return self.first * math.exp(min(LIMITS[0], max(-LIMITS[0], self.correction + GAIN * excess)))


def _backward(student: Student, logits: Logits, tokens: Tensor, precision: str, process: Process) -> Tensor:
    """KL(float || quantized) per token, over all processes, and its gradients at the parameters of the model."""
    count = process.sum(torch.tensor(float(tokens.numel()), device=process.device))
    total = torch.zeros((), device=process.device)
    for parameter in student.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    if len(tokens):
        with torch.enable_grad():
            found = _divergence(student, logits, tokens, student.put_quantized, precision) / count
        found.backward()
        total += found.detach()
    for parameter in student.parameters.values():
        assert parameter.grad is not None
        process.sum(parameter.grad)
    return process.sum(total)


def _divergence(student: Student, logits: Logits, tokens: Tensor, put: Callable[[], None], precision: str) -> Tensor:
    """KL(float || the model with what `put` gives it), of all tokens (B, T) together."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=precision == "bf16"):
        student.put_own()
        with torch.no_grad():
            reference = logits(tokens).float().log_softmax(-1)
        put()
        return F.kl_div(logits(tokens).float().log_softmax(-1), reference, reduction="sum", log_target=True)


@torch.no_grad()
def _mean_divergence(student: Student, logits: Logits, batches: Sequence[Tensor], quantized: QuantizedModel, *, precision: str,
                     process: Process) -> float:
    """KL(float || quantized) per token of some batches, over all processes."""
    sums, put = torch.zeros(2, dtype=torch.float64, device=process.device), partial(student.put, quantized)
    for tokens in (batch.to(process.device) for batch in batches if len(batch)):
        sums[0] += _divergence(student, logits, tokens, put, precision)
        sums[1] += tokens.numel()
    total, count = process.sum(sums).tolist()
    return float(total / count)


def _meet_target(student: Student, target_bytes: int, size: Callable[[QuantizedModel], int]) -> QuantizedModel:
    """The model with thresholds that are moved a little, all codes alike for a bit, so that its size comes just below the target."""
    probe = ESTIMATE_UNITS * SHIFT_UNIT
    bits = sum(float(((codes.rounded() - codes.rounded(probe)).abs() * codes.slopes).sum()) for codes in student.codes)
    search, best = SizeSearch(target_bytes, max(1.0, bits) / ESTIMATE_UNITS / 8), student.quantized()
    while (units := search.next_units) is not None:
        model = student.quantized(units * SHIFT_UNIT)
        search.tell(size(model))
        if search.best_units == units:
            best = model
    return best

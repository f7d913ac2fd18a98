"""Rounding all matrices of a model: groups of matrices, the search for steps that meet a byte budget, the work of several processes.

Shapes: R rows, C columns. Matrices that read the same input and have the same bits are rounded together, one below the other. Every
process rounds its share of these groups; what it finds is then shared, so that every process has the whole model.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lib.artifacts.hessians import Hessians
from lib.artifacts.quantized import MAX_CODE, OCTAVE, QuantizedTensor, exponents_of, scales_of
from lib.distributed import Process
from lib.errors import UserError
from lib.progress import Progress, say
from lib.quantization.allocation import (
    TOLERANCE,
    SizeSearch,
    StepCurve,
    TargetError,
    allocate,
    bits_per_octave,
    column_exponents,
    measure_curve,
    row_exponents,
)
from lib.quantization.clipping import row_scales
from lib.quantization.config import FREE, QuantizeParams
from lib.quantization.gptq import Factor, Problem, factorize, round_gptq, round_two_sided
from lib.quantization.low_rank import Error, correct

Matrices = dict[str, QuantizedTensor]


@dataclass(frozen=True, eq=False)
class Group:
    """Matrices with the same input and bits: (R, C) all together.

    Attributes:
        source: name of the input.
        names: names of the matrices.
        role: role of the first, by which grids clip.
        num_rows: number of rows of each.
        bits: 2 to 8, or None for free steps.
        problem: their weights, one below the other, on the process's device.
        outputs: factor of the second moments of the gradients at the outputs, of a matrix alone; None without feedback across outputs.
    """

    source: str
    names: tuple[str, ...]
    role: str
    num_rows: tuple[int, ...]
    bits: int | None
    problem: Problem
    outputs: Factor | None = None

    def split(self, stacked: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The part of each matrix of a tensor whose first dimension is R."""
        return zip(self.names, stacked.split(self.num_rows), strict=True)


class Steps(NamedTuple):
    """Exponents of the scales of one matrix: `rows` (R,) int16, `columns` (C,) int16."""

    rows: Tensor
    columns: Tensor


class Quantizer:
    """The matrices of one checkpoint that get integer codes.

    Args:
        weights: name -> (R, C) fp32.
        hessians: second moments of the same model.
        bits: name -> 2 to 8, or `FREE`.
        params: section ``quantize``.
        roles: name -> role.
        process: says which share is computed here, and on which device.

    Raises:
        ValueError: a Hessian that has no Cholesky decomposition.
    """

    def __init__(self, weights: Mapping[str, Tensor], hessians: Hessians, bits: Mapping[str, int | str], params: QuantizeParams, *,
                 roles: Mapping[str, str], process: Process) -> None:
        self._weights, self._hessians, self._params, self._process = weights, hessians, params, process
        with_feedback = params.feedback_damping is not None and params.method == "gptq" and FREE in bits.values()
        self._outputs = hessians.calibration.outputs if with_feedback else {}
        if with_feedback and not self._outputs:
            raise UserError("quantize.feedback_damping: expected Hessians with second moments of output gradients, found a file without; "
                            "calibrate again (`dvc repro -f calibrate`), or set it to null")
        members = []
        for source, names in hessians.inputs.items():
            by_bits = sorted(filter(bits.__contains__, names), key=lambda name: str(bits[name]))
            for kind, group in groupby(by_bits, key=bits.__getitem__):
                same = tuple(group)
                alone = [name for name in same if kind == FREE and name in self._outputs]
                together = tuple(name for name in same if name not in alone)
                members += [(source, some, kind) for some in (*((name,) for name in alone), together) if some]
        members.sort(key=lambda member: -hessians.calibration.hessians[member[0]].numel())  # so that processes get equal shares
        mine = members[process.rank::process.world_size]
        self._groups: list[Group] = []
        with Progress("factorize", len(mine), " inputs", enabled=process.is_main) as progress:
            for source, names, kind in mine:
                num_rows = tuple(len(weights[name]) for name in names)
                problem = self._make_problem(source, names)
                outputs = None
                if kind == FREE and names[0] in self._outputs:
                    assert params.feedback_damping is not None
                    outputs = factorize(names[0], self._outputs[names[0]].to(process.device), params.feedback_damping, params.act_order)
                bits_of_grid = None if kind == FREE else int(kind)
                self._groups.append(Group(source, names, roles[names[0]], num_rows, bits_of_grid, problem, outputs))
                progress.update(1)
        self.dampings = process.merge({name: group.problem.factor.damping for group in self._groups for name in group.names})
        self._clipped = process.merge(self._round_clipped())

    def _make_problem(self, source: str, names: Sequence[str]) -> Problem:
        params, device = self._params, self._process.device
        hessian = self._hessians.calibration.hessians[source].to(device)
        if params.method == "rtn":
            hessian = hessian.diagonal().diag()  # errors of a column cannot be made up for by others
        factor = factorize(source, hessian, params.damping, params.act_order)
        weights = [self._weights[name].to(device) for name in names]
        pruned = torch.cat([smallest(weight, params.prune_fraction) for weight in weights]) if params.prune_fraction else None
        return Problem(torch.cat(weights), dataclasses.replace(factor, upper=factor.upper.float()), pruned)

    def _round_clipped(self) -> Matrices:
        found: Matrices = {}
        for batch in self._batches([group for group in self._groups if group.bits is not None]):
            bits = batch[0].bits
            assert bits is not None
            problems = [group.problem for group in batch]
            scales = [row_scales(group.problem.weight, bits, self._params.clip.of_role(group.role)) for group in batch]
            codes, _ = round_gptq(problems, scales, [torch.ones_like(problem.weight[0]) for problem in problems], bits=bits,
                                  block_size=self._params.block_size, rate_weight=self._params.rate_weight)
            for group, group_codes, group_scales in zip(batch, codes, scales, strict=True):
                zeros = torch.zeros(codes.shape[2], dtype=torch.int16)
                for (name, its_codes), (_, rows) in zip(group.split(group_codes), group.split(exponents_of(group_scales)), strict=True):
                    found[name] = QuantizedTensor(its_codes.cpu(), rows.cpu(), zeros, bits)
        return found

    def _batches(self, groups: Sequence[Group]) -> Iterator[list[Group]]:
        """Groups that are rounded at once: those of the same shape on a GPU, one by one on a CPU, where more would not be faster."""
        shapes: dict[tuple[Any, ...], list[Group]] = {}
        for number, group in enumerate(groups):
            shapes.setdefault((group.problem.weight.shape, group.bits, group.outputs is None,
                               number if self._process.device.type == "cpu" else None), []).append(group)
        yield from shapes.values()

    def round_clipped(self) -> Matrices:
        """The matrices with grids that clip, and their corrections."""
        return self._corrected(self._clipped)

    def meet_target(self, target_bytes: int, measure: Callable[[Matrices], int]) -> Matrices:
        """All matrices, those with free steps such that the size meets the target.

        Args:
            target_bytes: never exceeded.
            measure: size of everything in bytes, with these matrices; called in every process, and the same in all.

        Raises:
            TargetError: the target is below the smallest reachable size.
        """
        steps, curves = self._relative_steps()
        zeros = {name: QuantizedTensor(torch.zeros_like(self._weights[name], dtype=torch.int16), *its_steps, None)
                 for name, its_steps in steps.items()}
        smallest = measure(self._clipped | zeros)
        if smallest > target_bytes:
            raise TargetError(f"quantize.target_bytes: expected at least {smallest:,}, found {target_bytes:,}: so many bytes are left when "
                              "every weight with free steps is 0; raise it, or make the model or its code smaller")
        names = sorted(curves)
        chosen = dict(zip(names, allocate([curves[name] for name in names], 8 * (target_bytes - smallest)), strict=True))
        saved = max(1.0, sum(bits_per_octave(curves[name], chosen[name]) for name in names) / 8)
        search, best, best_size = SizeSearch(target_bytes, saved / OCTAVE / len(names)), self._clipped, 0
        for number in itertools.count(1):
            if (units := search.next_units) is None:
                break
            moved = {}  # steps that are coarser by units/`OCTAVE` of an octave, divided among the matrices
            for place, name in enumerate(names):
                exponents = curves[name].exponents
                shift = max(int(exponents[chosen[name]]) + (units + place) // len(names), int(exponents[0]))
                moved[name] = Steps(_shift(steps[name].rows, shift), steps[name].columns)
            matrices = self._corrected(self._clipped | self._round(moved))
            search.tell(size := measure(matrices))
            say(f"quantize: trial {number}, {size:,} bytes, {size / target_bytes - 1:+.2%} from the target", enabled=self._process.is_main)
            if search.best_units == units:
                best, best_size = matrices, size
        if best_size < target_bytes * (1 - TOLERANCE):
            say(f"note: quantize.target_bytes is {target_bytes:,}, the closest size below it that was found is {best_size:,}: no finer "
                "steps are left, or the smallest change of steps changes more bytes than that", enabled=self._process.is_main)
        return best

    def _relative_steps(self) -> tuple[dict[str, Steps], dict[str, StepCurve]]:
        """For every matrix with free steps: steps up to a factor of its own, and what different factors cost."""
        params, gradients = self._params, self._hessians.calibration.gradients
        steps: dict[str, Steps] = {}
        curves: dict[str, StepCurve] = {}
        for group in (group for group in self._groups if group.bits is None):
            problem = group.problem
            columns = column_exponents(problem) if params.free_columns else torch.zeros_like(problem.factor.dead, dtype=torch.int16)
            for name, weight in group.split(problem.weight):
                of_rows = gradients[name].to(weight.device) if group.outputs is None else group.outputs.error_scales() ** -2
                rows = row_exponents(of_rows) if params.free_rows else torch.zeros_like(of_rows, dtype=torch.int16)
                curves[name] = measure_curve(dataclasses.replace(problem, weight=weight), of_rows, rows, columns)
                steps[name] = Steps(rows.cpu(), columns.cpu())
        return self._process.merge(steps), self._process.merge(curves)

    def _round(self, steps: Mapping[str, Steps]) -> Matrices:
        """The matrices with free steps, at given steps."""
        params, device = self._params, self._process.device
        found: Matrices = {}
        for batch in self._batches([group for group in self._groups if group.bits is None]):
            rows = [scales_of(torch.cat([steps[name].rows for name in group.names])).to(device) for group in batch]
            columns = [scales_of(steps[group.names[0]].columns).to(device) for group in batch]
            problems, outputs = [group.problem for group in batch], [group.outputs for group in batch if group.outputs is not None]
            codes, _ = (round_two_sided(problems, outputs, rows, columns, rate_weight=params.rate_weight) if outputs else
                        round_gptq(problems, rows, columns, bits=None, block_size=params.block_size, rate_weight=params.rate_weight))
            found |= {name: QuantizedTensor(its_codes.cpu(), *steps[name], None)
                      for group, group_codes in zip(batch, codes, strict=True) for name, its_codes in group.split(group_codes)}
        return self._process.merge(found)

    def _corrected(self, matrices: Matrices) -> Matrices:
        """The matrices, and corrections of their errors if there are to be any."""
        if not self._params.low_rank.max_bytes:
            return matrices
        moments, device = self._hessians.calibration, self._process.device
        sources = {name: source for source, names in self._hessians.inputs.items() for name in names}
        errors = {name: Error((self._weights[name] - matrix.weight()).to(device), moments.hessians[sources[name]].to(device),
                              moments.gradients[name].to(device)) for name, matrix in matrices.items()}
        return matrices | {name: dataclasses.replace(matrices[name], correction=factors)
                           for name, factors in correct(errors, self._params.low_rank).items()}


def _shift(exponents: Tensor, units: int) -> Tensor:
    """Exponents of steps that are coarser by so many units, as far as int16 goes."""
    return (exponents.int() + units).clamp(-MAX_CODE, MAX_CODE).to(torch.int16)


def smallest(weight: Tensor, fraction: float) -> Tensor:
    """Where the `fraction` of a matrix with the smallest magnitudes lies, of equal ones the first: (R, C) bool; nothing is sorted."""
    count, magnitudes = int(fraction * weight.numel()), weight.abs().flatten()
    if not count:
        return torch.zeros_like(weight, dtype=torch.bool)
    largest = magnitudes.kthvalue(count).values
    below, equal = magnitudes < largest, magnitudes == largest
    return (below | equal & (equal.cumsum(0) <= count - below.sum())).view(weight.shape)

"""What else only a GPU can show, on random weights and tokens: ``python -m bench.gpu_checks [--preset NAME]``.

Prints the machine and the attention kernels that it can use, then compares: training compiled and not; Muon's iteration as it runs on
the device, in bf16 on GPUs, with fp64; fake quantization on the device and on the CPU; and it times calibration. A check that fails
stops no other; the exit status is 1 then.
"""

import argparse
import importlib.metadata
import platform
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import get_args

import numpy as np
import torch

from bench.evaluate import Stopwatch, make_model
from bench.train import LOSS_TOLERANCE, make_loops
from lib.calibration.moments import collect_moments
from lib.distributed import Process, start_process
from lib.model.config import KernelName
from lib.model.kernels import KernelError, choose_kernel
from lib.params import PARAMS_FILE
from lib.presets import load_settings
from lib.schema import PipelineParams
from lib.training.orthogonal import ORTHOGONALIZATIONS
from lib.training.qat import fake_quantize

NUM_STEPS = 3
MAX_SEQUENCES = 8  # of a step that is compared
MUON_TOLERANCE = {"cpu": 1e-4, "cuda": 0.05}  # relative, of five steps in fp32 and in bf16, which has 8 bits
MAX_DIFFERING = 1e-4  # share of weights that round to another code, because a clip was summed or interpolated in another order
PACKAGES = ("triton", "numpy", "constriction", "brotli", "zstandard", "pydantic", "sentencepiece", "safetensors", "flash-attn", "dvc")


class Checks:
    """All checks, of one preset on one device."""

    def __init__(self, settings: PipelineParams, process: Process) -> None:
        self.section, self.params, self.calibration = settings.model, settings.train, settings.calibrate
        self.process, self.device = process, process.device

    def kernels(self) -> None:
        """Attention kernels by name."""
        for name in get_args(KernelName):
            try:
                print("attention", choose_kernel(name, self.section.architecture, self.params.precision, self.device).reason)
            except KernelError as error:
                print(f"attention {name}: {error}")

    def compilation(self) -> None:
        """Some steps of training, compiled as the preset says and not compiled, from the same weights on the same batches."""
        if not self.params.compile:
            print("compiled training: not checked, train.compile is false")
            return
        sequences, losses = min(MAX_SEQUENCES, self.params.batch_sequences, self.params.micro_batch_sequences), {}
        kernel = choose_kernel(self.section.attention, self.section.architecture, self.params.precision, self.device)
        for compiled in (False, True):
            params = self.params.model_copy(update={"batch_sequences": sequences, "micro_batch_sequences": sequences, "compile": compiled})
            seconds, run = Stopwatch(self.process, processor=False).time(
                make_loops(self.section.architecture, params, kernel, self.process)["lib.training.loop"])
            for _ in range(NUM_STEPS):
                run.step()
            run.sync()
            losses[compiled] = np.array(run.losses)
            print(f"training {'compiled' if compiled else 'eager'}: ready after {seconds:.1f} s, "
                  f"losses {losses[compiled].round(5).tolist()}")
        difference = float(np.abs(losses[True] / losses[False] - 1).max())
        print(f"compiled against eager: losses differ by {difference:.2e}, relative")
        assert difference <= LOSS_TOLERANCE[self.params.precision]

    def muon(self) -> None:
        """Newton-Schulz iterations of matrices as large as the model's."""
        model = self.section.architecture
        shape = (model.num_layers, model.mlp_hidden_dim, model.model_dim)
        matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        settings = self.params.optimizer
        orthogonalize = ORTHOGONALIZATIONS[settings.orthogonalization]
        found = orthogonalize(matrices.to(self.device), settings.orthogonalization_steps).cpu().double()
        expected = orthogonalize(matrices.double(), settings.orthogonalization_steps)
        error = float((found - expected).norm() / expected.norm())
        print(f"Muon of {tuple(shape)} against fp64: relative error {error:.2e}")
        assert error <= MUON_TOLERANCE[self.device.type]

    def fake_quantization(self) -> None:
        """Codes of a matrix for each width of the grids of QAT."""
        settings, model = self.params.qat, self.section.architecture
        weight = torch.randn(model.num_layers * model.mlp_hidden_dim, model.model_dim, generator=torch.Generator().manual_seed(0)) * 0.02
        for bits in sorted({bits for bits in settings.bits.values() if bits != 16}):
            seconds, found = Stopwatch(self.process, processor=False).time(
                partial(fake_quantize, weight.to(self.device), bits, settings))
            differing = float((found.cpu() != fake_quantize(weight, bits, settings)).double().mean())
            print(f"fake quantization of {weight.numel():,} weights to {bits} bits: {differing:.2e} of them differ from the CPU's, "
                  f"{1000 * seconds:.1f} ms")
            assert differing <= MAX_DIFFERING

    def calibrate(self) -> None:
        """Both sets of sequences, as the stage does."""
        settings, model = self.calibration, make_model(self.section.architecture, self.device)
        tokens = np.random.default_rng(0).integers(0, model.params.vocab_size, (settings.num_sequences, self.params.sequence_tokens))
        collect = partial(collect_moments, model, model.logits, torch.from_numpy(tokens), seed=0, process=self.process,
                          num_gradient_sequences=settings.num_gradient_sequences, batch_sequences=settings.batch_sequences,
                          precision=settings.precision, description="calibrate")
        seconds = [Stopwatch(self.process, processor=False).time(collect)[0] for _ in range(2)]
        print(f"calibration: {seconds[0]:.2f} s and {seconds[1]:.2f} s of two sets of {tokens.size:,} tokens; the preset reserves "
              f"{self.params.reserve_seconds} s")


def print_machine(process: Process) -> None:
    """Versions and the device."""
    print(f"Python {platform.python_version()}, {Stopwatch(process, processor=False).describe()}, CUDA {torch.version.cuda}, "
          f"cuDNN {torch.backends.cudnn.version() if process.device.type == 'cuda' else None}")
    if shutil.which("nvidia-smi"):
        query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit"
        print(subprocess.run(["nvidia-smi", query, "--format=csv"], capture_output=True, text=True, check=False).stdout.strip())
    installed = {each.metadata["Name"].lower().replace("_", "-"): each.version for each in importlib.metadata.distributions()}
    print(", ".join(f"{name} {installed.get(name, 'none')}" for name in PACKAGES))


def main() -> None:
    """Run all checks; exit with status 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default=str(PARAMS_FILE), help="name of a preset, or a complete parameter file (default: %(default)s)")
    settings, failed = load_settings(parser.parse_args().preset), []
    with start_process() as process:
        print_machine(process)
        checks = Checks(settings, process)
        each: Callable[[], None]
        for each in (checks.kernels, checks.compilation, checks.muon, checks.fake_quantization, checks.calibrate):
            try:
                each()
            except Exception:  # whatever it is, the others are worth knowing
                traceback.print_exc(file=sys.stdout)
                failed.append(each.__name__)
    if failed:
        sys.exit(f"FAILED: {', '.join(failed)}")


if __name__ == "__main__":
    main()

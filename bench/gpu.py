"""What only a GPU can show, on a machine that needs no network and no DVC, in pieces of at most ten minutes that can be named:
``python -m bench.gpu [environment] [train] [evaluate] [chain]``, after ``make gpu-bundle`` elsewhere; docs/gpu.md says what each shows.

Prints blocks for bench/RESULTS.md, and keeps them with the messages of all commands in the bundle's folder. A command that fails stops
no other; the exit status is 1 then. Without a GPU everything runs at a smoke size. This file imports the standard library
only: wheels of the bundle are installed into the bundle first.
"""

import argparse
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

BUNDLE = Path(".gpu")
WHEELS, SITE, TOKENIZER, TREE = "wheels", "site", "tokenizer.model", "tree.tar.gz"
PARAMS, RESULTS, MESSAGES, CACHE = "smoke.yaml", "results.md", "messages.txt", "cache"
ROOT = Path(__file__).resolve().parents[1]
PRESET = "pr585"
PIECE_SECONDS = 600.0
SHOWN_LINES = 15  # of the messages of a command that failed
PROBE = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps([torch.cuda.get_device_name() if cuda else None, torch.__version__, torch.version.cuda]))"""


class Machine(NamedTuple):
    """What the pieces run on.

    Attributes:
        gpu: name of the GPU; None where there is none.
        torch: version.
        cuda: version that torch was built for.
    """

    gpu: str | None
    torch: str
    cuda: str | None


class Command(NamedTuple):
    """A program: ``python`` with `arguments`, and what is added to its environment."""

    arguments: str
    environment: dict[str, str]


Piece = Callable[[Path, bool], list[Command]]
"""From the folder of the bundle, and whether it is to be the smoke size."""


def _environment(bundle: Path, smoke: bool) -> list[Command]:
    preset, only = (bundle / PARAMS, " -k kernels_of_this_machine") if smoke else (PRESET, "")
    commands = [Command(f"-m bench.gpu_checks --preset {preset}", {}),
                Command(f"-m pytest -q -rs -p no:cacheprovider tests/model/test_kernels.py{only}", {})]
    return commands if smoke else [*commands, Command(f"-m bench.gpu_chain --bundle {bundle} --smoke", {})]


def _train(bundle: Path, smoke: bool) -> list[Command]:
    if smoke:
        return [Command(f"-m bench.train --preset {bundle / PARAMS} --steps 2 --profile 1", {})]
    full = f"-m bench.train --preset {PRESET} --sequences 48"
    return [Command(f"{full} --steps 50 --profile 3", {}),
            Command(f"{full} --steps 30", {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"})]  # SDPA by flash attention, not by cuDNN


def _evaluate(bundle: Path, smoke: bool) -> list[Command]:
    if smoke:
        scorers = f"-m bench.evaluate --preset {bundle / PARAMS}"
        return [Command(f"{scorers} --protocol --chunks 2 --chunk-tokens 128", {}), Command(f"{scorers} --batches 1 --eager", {})]
    return [Command(f"-m bench.evaluate --preset {PRESET} --protocol", {}), Command(f"-m bench.evaluate --preset {PRESET} --batches 8", {})]


def _chain(bundle: Path, smoke: bool) -> list[Command]:
    return [Command(f"-m bench.gpu_chain --bundle {bundle}{' --smoke' if smoke else ''}", {})]


PIECES: dict[str, Piece] = {"environment": _environment, "train": _train, "evaluate": _evaluate, "chain": _chain}


def find_text(bundle: Path) -> Path:
    """The text of a bundle.

    Raises:
        FileNotFoundError: there is none.
    """
    for path in sorted(bundle.glob("text.jsonl*")):
        return path
    raise FileNotFoundError(f"{bundle}: no text.jsonl; `make gpu-bundle`, on a machine with a network, fills this folder")


def install_wheels(bundle: Path) -> None:
    """Install the wheels of the bundle into a folder of the bundle, unless it holds just these."""
    wheels, listing = sorted((bundle / WHEELS).glob("*.whl")), bundle / SITE / "wheels.txt"
    names = "".join(f"{path.name}\n" for path in wheels)
    if not wheels or (listing.exists() and listing.read_text() == names):
        return
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-compile",
               "--upgrade", "--target", str(bundle / SITE), *map(str, wheels)]
    subprocess.run(command, check=True)
    listing.write_text(names)


def make_environment(bundle: Path) -> dict[str, str]:
    """That of all commands: the packages of the bundle, and caches of compilers that all pieces share."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": bundle / CACHE / "inductor", "TRITON_CACHE_DIR": bundle / CACHE / "triton"}
    for folder in caches.values():
        folder.mkdir(parents=True, exist_ok=True)
    return {**os.environ, **{name: str(folder) for name, folder in caches.items()}, "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join([str(bundle / SITE), *filter(None, [os.environ.get("PYTHONPATH")])])}


def run(command: Command, environment: dict[str, str], messages: Path, seconds: float) -> tuple[int, str]:
    """Run a command in the project's root and show its output while it comes.

    Args:
        command: what to run.
        environment: besides the command's own.
        messages: file to which standard error is appended.
        seconds: after which it is killed, with what it has started.

    Returns:
        Exit status, negative where a signal ended it, and standard output.
    """
    with messages.open("a") as errors:
        process = subprocess.Popen([sys.executable, *command.arguments.split()], cwd=ROOT, env=environment | command.environment,
                                   stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace", start_new_session=True)
        timer = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        lines = []
        try:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                print(line, end="", flush=True)
            return process.wait(), "".join(lines)
        finally:
            timer.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def run_piece(name: str, commands: list[Command], environment: dict[str, str], bundle: Path) -> bool:
    """Run the commands of a piece, print their blocks and append them to the results; whether all succeeded within `PIECE_SECONDS`."""
    succeeded, end, messages = True, time.monotonic() + PIECE_SECONDS, bundle / MESSAGES
    _say(bundle, f"### {name}\n")
    for command in commands:
        start, position = time.monotonic(), messages.stat().st_size if messages.exists() else 0
        settings = "".join(f"{key}={value} " for key, value in command.environment.items())
        _say(bundle, f"`{settings}python {command.arguments}`:\n\n```")
        status, output = run(command, environment, messages, max(0.0, end - start))
        _write(bundle, output)
        seconds = time.monotonic() - start
        if status:
            last = messages.read_bytes()[position:].decode(errors="replace").replace("\r", "\n").splitlines()[-SHOWN_LINES:]
            late = f": more than the {PIECE_SECONDS:.0f} seconds of the piece" if time.monotonic() >= end else ""
            _say(bundle, "\n".join([*last, f"FAILED with status {status}{late}", "```\n"]))
        else:
            _say(bundle, f"```\n\n{seconds:.0f} s with all that it loads and compiles.\n")
        succeeded &= status == 0
    return succeeded


def _say(bundle: Path, text: str) -> None:
    print(text, flush=True)
    _write(bundle, text + "\n")


def _write(bundle: Path, text: str) -> None:
    with (bundle / RESULTS).open("a") as file:
        file.write(text)


def probe(environment: dict[str, str]) -> Machine:
    """Look at the machine, in a process of its own, so that this one holds no memory of the GPU."""
    output = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=True).stdout
    return Machine(*json.loads(output.splitlines()[-1]))


def main() -> None:
    """Run the pieces that are named, or all; exit with status 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pieces", nargs="*", metavar="PIECE", help=f"{', '.join(PIECES)}; all where none is named")
    parser.add_argument("--bundle", type=Path, default=BUNDLE, help="folder that `make gpu-bundle` filled")
    parser.add_argument("--smoke", action="store_true", help="the smoke size, as without a GPU")
    options = parser.parse_args()
    if unknown := [name for name in options.pieces if name not in PIECES]:
        parser.error(f"expected pieces among {', '.join(PIECES)}, found {', '.join(unknown)}")
    bundle = options.bundle.resolve()
    try:
        find_text(bundle)
    except FileNotFoundError as error:
        sys.exit(str(error))
    install_wheels(bundle)
    environment = make_environment(bundle)
    machine = probe(environment)
    smoke = options.smoke or machine.gpu is None
    device = machine.gpu or f"no GPU ({platform.machine()}, {os.cpu_count()} cores)"
    _say(bundle, f"## {device}{', smoke size' if smoke else ''}, Python {platform.python_version()}, torch {machine.torch}"
                 f"{f' (CUDA {machine.cuda})' if machine.cuda else ''}, {datetime.date.today().isoformat()}\n")
    if smoke:
        subprocess.run([sys.executable, "-m", "bench.gpu_chain", "--bundle", str(bundle), "--smoke", "--only-parameters"], cwd=ROOT,
                       env=environment, check=True)
    folder = Path(os.path.relpath(bundle, ROOT))  # as it is shown
    succeeded = {name: run_piece(name, PIECES[name](folder, smoke), environment, bundle) for name in options.pieces or PIECES}
    verdicts = ", ".join(f"{name} {'ok' if ok else 'FAILED'}" for name, ok in succeeded.items())
    print(f"{verdicts}; see {bundle / RESULTS} and {bundle / MESSAGES}")
    sys.exit(not all(succeeded.values()))


if __name__ == "__main__":
    main()

"""A rate-distortion curve: ``python -m tools.sweep BYTES...`` (``make sweep TARGETS="..."``).

For each size one DVC experiment with that `quantize.target_bytes`, in a folder of its own, so that the workspace stays as it is.
Nothing is trained or calibrated anew, and a size that has been run before comes from the cache. The experiments stay, named
``target-BYTES``: `dvc exp show` compares them, `dvc exp apply` makes one the workspace. Table and figure are in ``artifacts/sweep/``.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import dvc.api

from lib.artifacts.files import write_bytes, write_csv
from lib.artifacts.metrics import METRICS_FILE
from lib.artifacts.paths import SWEEP_FOLDER, stage_folder
from lib.params import ParamsError, read_params
from lib.reporting.figures import plot_panels

COLUMNS = {  # column of the table -> stage and figure
    "artifact_bytes": ("compress", "artifact_bytes"),
    "coded_bits": ("quantize", "coded_bits"),
    "predicted_loss": ("quantize", "predicted_loss"),
    "heldout_kl": ("quantize", "heldout_kl"),
    "heldout_bpb": ("quantize", "heldout_bpb"),
    "plain_bpb": ("evaluate", "plain_bpb"),
    "sliding_bpb": ("evaluate", "sliding_bpb"),
    "val_bpb": ("evaluate", "val_bpb"),
}
DVC = (sys.executable, "-m", "dvc")
COMPARED = ("plain", "sliding")  # what is scored beside evaluate.strategy
LOSSES, SCORES = ("predicted_loss", "heldout_kl"), ("heldout_bpb", "plain_bpb", "sliding_bpb", "val_bpb")

Figures = dict[str, float | None]


def experiment_name(target_bytes: int) -> str:
    """Name of the experiment with that target."""
    return f"target-{target_bytes}"


def run_experiment(target_bytes: int, params: dict[str, Any]) -> None:
    """One experiment from the workspace as it is; raises `subprocess.CalledProcessError` where a stage fails.

    Args:
        target_bytes: size of code and artifact together.
        params: all of params.yaml.
    """
    name = experiment_name(target_bytes)
    subprocess.run([*DVC, "exp", "remove", "--quiet", name], stderr=subprocess.DEVNULL, check=False)  # of an earlier sweep
    evaluate = params["evaluate"]
    strategies = [strategy for strategy in evaluate["strategies"] if strategy in (*COMPARED, evaluate["strategy"])]
    settings = {"quantize.target_bytes": target_bytes, "compress.limit_bytes": max(target_bytes, params["compress"]["limit_bytes"]),
                "evaluate.strategies": f"[{','.join(strategies)}]"}
    changes = [argument for key, value in settings.items() for argument in ("--set-param", f"{key}={value}")]
    subprocess.run([*DVC, "exp", "run", "--temp", "--name", name, *changes], check=True)


def read_figures(revision: str, seeds: Sequence[int]) -> Figures:
    """The columns of the table, means over the seeds, as an experiment left them; None for strategies that were not run."""
    metrics: dict[str, list[dict[str, Any]]] = {
        stage: [dvc.api.metrics_show(str(stage_folder(stage, seed) / METRICS_FILE), rev=revision) for seed in seeds]
        for stage in ("quantize", "compress", "evaluate")}
    return {column: fmean(of_seed[key] for of_seed in metrics[stage]) if key in metrics[stage][0] else None
            for column, (stage, key) in COLUMNS.items()}


def save_sweep(folder: Path, points: dict[int, Figures]) -> None:
    """Write ``sweep.csv`` and ``sweep.svg``: target in bytes -> figures."""
    write_csv(folder / "sweep.csv", ("target_bytes", *COLUMNS), [(target, *figures.values()) for target, figures in points.items()])
    curves = {column: [(x, y) for figures in points.values() if (x := figures["artifact_bytes"]) is not None
                       and (y := figures[column]) is not None] for column in (*LOSSES, *SCORES)}
    panels = {"nats per token": {column.replace("_", " "): curves[column] for column in LOSSES},
              "bits per byte": {column.removesuffix("_bpb"): curves[column] for column in SCORES if curves[column]}}
    write_bytes(folder / "sweep.svg", plot_panels(panels, "bytes of the artifact", log=("nats per token",)).encode())


def main() -> None:
    """Run the experiments and write table and figure."""
    parser = argparse.ArgumentParser(prog="make sweep", usage='make sweep TARGETS="400000 600000"', description=__doc__.splitlines()[0])
    parser.add_argument("targets", type=int, nargs="+", metavar="TARGETS", help="sizes of code and artifact together, in bytes")
    targets = sorted(set(parser.parse_args().targets))
    if targets[0] < 1:
        parser.error(f"TARGETS: expected numbers of bytes above 0, found {targets[0]}")
    try:
        params = read_params()
        if params["quantize"]["target_bytes"] is None:
            raise ParamsError("quantize.target_bytes: expected a number, found null: no matrix has free steps, there is nothing to sweep")
    except ParamsError as error:
        sys.exit(str(error))
    points = {}
    for number, target in enumerate(targets):
        print(f"sweep: {number + 1} of {len(targets)}, {target:,} bytes", file=sys.stderr, flush=True)
        try:
            run_experiment(target, params)
        except subprocess.CalledProcessError as error:
            sys.exit(f"sweep: the experiment with {target:,} bytes failed (dvc exit status {error.returncode}), see above")
        points[target] = read_figures(experiment_name(target), params["seeds"])
        save_sweep(SWEEP_FOLDER, points)
    print(f"{SWEEP_FOLDER / 'sweep.csv'}, {SWEEP_FOLDER / 'sweep.svg'}")


if __name__ == "__main__":
    main()

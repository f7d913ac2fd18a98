"""Where each stage writes: ``artifacts/<stage>/seed<seed>/``, or ``artifacts/<stage>/`` for the stages that have no seed."""

from pathlib import Path

TOKENIZE_FOLDER = Path("artifacts/tokenize")
REPORT_FOLDER = Path("artifacts/report")
SWEEP_FOLDER = Path("artifacts/sweep")


def stage_folder(stage: str, seed: int) -> Path:
    """The output folder of a stage that runs once for each seed."""
    return Path("artifacts", stage, f"seed{seed}")

"""The log of a run, ``train_seed<seed>.log``: a section of lines for each part of it. Program and folder write the same."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

LossCurve = Iterable[tuple[float, ...]]
"""(tokens, mean loss in nats per token) rows."""


def log_name(seed: int | str) -> str:
    """Name of the file."""
    return f"train_seed{seed}.log"


def format_section(title: str, figures: Mapping[str, Any], loss_curve: LossCurve = ()) -> str:
    """A section: its title, such as the name of a stage; the points of a loss curve; and figures, which JSON can hold; one a line."""
    points = [f"tokens:{tokens:.0f} train_loss:{loss:.4f}" for tokens, loss in loss_curve]
    return "\n".join([f"\n== {title}", *points, *(f"{key}: {value if isinstance(value, str) else json.dumps(value)}"
                                                  for key, value in figures.items())])

"""Averages against their closed forms."""

import pytest
import torch

from lib.params import ParamsError
from lib.training.averaging import Averages
from lib.training.config import AveragingParams
from lib.training.schedule import lr_multiplier
from tests.training.tiny import make_params


def test_ema_and_swa_are_their_closed_forms() -> None:
    weights = torch.randn(6, generator=torch.Generator().manual_seed(1))
    params = AveragingParams(ema_decay=0.9, ema_every_steps=2, swa_below_lr=0.5, swa_every_steps=3, select="raw")
    averages = Averages(weights, params)
    ema = weights.double()
    snapshots = []
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 21):
        multiplier = 1 - step / 21
        weights.copy_(torch.randn(6, generator=generator))
        averages.update(step, multiplier)
        if step % 2 == 0:
            ema = 0.9 * ema + 0.1 * weights.double()
        if multiplier < 0.5 and step % 3 == 0:
            snapshots.append(weights.clone())
    found = averages.candidates()
    assert torch.equal(found["raw"], weights)
    torch.testing.assert_close(found["ema"].double(), ema)
    torch.testing.assert_close(found["swa"], torch.stack(snapshots).mean(0))
    assert len(snapshots) == 3


def test_without_snapshots_there_is_no_swa() -> None:
    params = AveragingParams(ema_decay=0.5, ema_every_steps=1, swa_below_lr=0.1, swa_every_steps=1, select="raw")
    averages = Averages(torch.zeros(3), params)
    averages.update(1, 0.5)
    assert set(averages.candidates()) == {"raw", "ema"}


@pytest.mark.parametrize(("changes", "fits"), [
    ({"swa_below_lr": 0.5, "swa_every_steps": 30}, True),  # after the last of 30 steps
    ({"swa_below_lr": 0.5, "swa_every_steps": 31}, False),
    ({"swa_below_lr": 0.07, "swa_every_steps": 1}, True),  # warmdown 0.5: the last step is made at 1/15
    ({"swa_below_lr": 0.06, "swa_every_steps": 1}, False),
    ({"swa_below_lr": 0.2, "swa_every_steps": 29}, True),  # the step before it at 2/15
    ({"swa_below_lr": 0.13, "swa_every_steps": 29}, False),
    ({"swa_below_lr": 0.0, "swa_every_steps": 1}, False),
])
def test_choosing_swa_needs_a_snapshot_in_the_budget(changes: dict[str, float], fits: bool) -> None:
    taken = Averages(torch.zeros(3), make_params(averaging=changes).averaging)
    for step in range(30):
        taken.update(step + 1, lr_multiplier(step / 30, 0.5, 0.0))
    assert ("swa" in taken.candidates()) == fits
    if fits:
        make_params(averaging=changes | {"select": "swa"})
    else:
        with pytest.raises(ParamsError, match=r"averaging\.select: swa needs a snapshot, and none is taken"):
            make_params(averaging=changes | {"select": "swa"})

"""Averages against their closed forms."""

import torch

from lib.training.averaging import Averages
from lib.training.config import AveragingParams


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

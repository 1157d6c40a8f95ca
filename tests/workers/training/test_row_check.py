"""Batches are split where that changes nothing, and only there: found by trying."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def batch(rows: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 4), torch.randn(rows, 3)


class MinusMean(nn.Module):
    def __init__(self, share: float) -> None:
        super().__init__()
        self.layer, self.share = nn.Linear(4, 3), share

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return h - self.share * h.mean(0)


def test_a_bias_before_batch_norm_whose_gradient_is_rounding_alone_does_not_keep_batches_whole(make_group):
    for seed in range(20):
        torch.manual_seed(seed)
        width = 2 + seed % 7
        module = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 3))
        assert make_group(module, nn.MSELoss(), batch()).whole == {"train": None, "eval": None}, seed


@pytest.mark.parametrize("share", [1.0, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_depend_on_their_mean_are_found_however_little(make_group, share, dtype):
    x, y = batch()
    for seed in range(3):
        torch.manual_seed(seed)
        group = make_group(MinusMean(share).to(dtype), nn.MSELoss(), (x.to(dtype), y.to(dtype)))
        assert group.whole["train"] is not None and group.whole["eval"] is not None


class WithRows(nn.Linear):
    def forward(self, input: Tensor) -> tuple[Tensor, int, float]:
        return super().forward(input), input.shape[0], 2.5


def test_a_number_among_the_outputs_that_depends_on_the_rows_keeps_batches_whole(make_group):
    group = make_group(WithRows(4, 3), lambda outputs, y: F.mse_loss(outputs[0], y), batch())
    assert "no tensor" in group.whole["eval"]
    assert group.forward(torch.randn(6, 4))[1:] == (6, 2.5)


def test_a_rank_never_computes_fewer_rows_than_the_program_is_known_to_be_right_for(make_group):
    module = nn.Linear(4, 3).double()
    inputs, targets = torch.randn(6, 4).double(), torch.randn(6, 3).double()
    group = make_group(module, nn.MSELoss(), (inputs, targets), ranks=2)
    group.variants = [replace(v, symbols=tuple(replace(s, min=2) for s in v.symbols)) for v in group.variants]
    for rows, expected in ((6, [3, 3]), (4, [2, 2]), (3, [3, 0]), (2, [2, 0])):
        loss = F.mse_loss(F.linear(inputs[:rows], *group.state_dict().values()), targets[:rows])
        assert group.train_step(inputs[:rows], targets[:rows]) == pytest.approx(loss.item(), rel=1e-12)
        assert group.rank_rows() == expected

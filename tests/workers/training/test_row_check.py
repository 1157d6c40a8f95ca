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
    for seed in range(7):
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


class EmbeddedMinusMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(10, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids).mean(1)
        return self.out(torch.tanh(h - h.mean(0)))


class MaskedMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.out(x - (x * mask[:, None]).sum(0) / mask.sum().clamp(min=1))


class ByLargest(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input / input.abs().max().clamp(min=1.0))


class AboveMean(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * (input > 1000 * input.mean(0) + 1000))


class CountOfLarge(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * (1 + (input > 1e6).sum())


@pytest.mark.parametrize(
    ("module", "example"),
    [
        (EmbeddedMinusMean(), torch.zeros(2, 3, dtype=torch.long)),
        (EmbeddedMinusMean(), torch.tensor([[1, 2, 3]])),
        (MaskedMean(), (torch.randn(4, 4), torch.zeros(4, dtype=torch.bool))),
        (ByLargest(4, 3), torch.rand(4, 4) / 2),
        (ByLargest(4, 3), torch.zeros(2, 4)),
        (AboveMean(4, 3), torch.rand(4, 4)),
        (CountOfLarge(4, 3), torch.rand(4, 4)),
    ],
)
def test_rows_that_reach_each_other_are_found_though_the_example_does_not_show_it(make_group, module, example):
    rows = (example[0] if isinstance(example, tuple) else example).shape[0]
    group = make_group(module, nn.MSELoss(), (example, torch.zeros(rows, 3)))
    assert group.whole["train"] is not None and group.whole["eval"] is not None


class Transformer(nn.Module):
    """Looks ids up, attends under a mask of its own and one that comes with the batch, and counts its words."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8, padding_idx=0)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        padding = ids == 0
        h = self.layer(self.embedding(ids), src_key_padding_mask=padding)
        words = (~padding).sum(1, keepdim=True).clamp(min=1)
        return self.out((h * ~padding[..., None]).sum(1) / words)


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.rnn, self.out = nn.Embedding(12, 6), nn.GRU(6, 5), nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.rnn(self.embedding(ids.T))[0][-1])


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.GroupNorm(2, 4), nn.Flatten()
        )
        self.out = nn.LazyLinear(3)
        self.forward(torch.randn(2, 1, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers(x)
        return self.out(h * (h > h.mean(1, keepdim=True)) + h.argmax(1, keepdim=True))


@pytest.mark.parametrize(
    ("module", "example"),
    [
        (Transformer(), torch.randint(0, 12, (3, 6))),
        (SequenceFirst(), torch.randint(0, 12, (3, 7))),
        (Pooled(), torch.randn(3, 1, 8, 8)),
    ],
)
def test_rows_that_do_not_reach_each_other_are_split(make_group, module, example):
    group = make_group(module, nn.MSELoss(), (example, torch.zeros(3, 3)))
    assert group.whole == {"train": None, "eval": None}


def test_gradients_of_parameters_that_may_be_unfrozen_are_tried_too(make_group):
    class MeanInGradient(nn.Module):
        """Its outputs are rows of their own; only the gradient of the frozen weight knows the batch's mean."""

        def __init__(self) -> None:
            super().__init__()
            self.layer, self.weight = nn.Linear(4, 3), nn.Parameter(torch.ones(3), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            mean = x.detach()[:, :3].mean(0) * self.weight
            return self.layer(x) + (mean - mean.detach())

    group = make_group(MeanInGradient(), nn.MSELoss(), batch())
    assert "gradients" in (group.whole["train"] or "")


class Constant(nn.Module):
    def __init__(self, entries: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        self.table = nn.Parameter(torch.randn(entries))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), self.table * 2


@pytest.mark.parametrize("entries", range(2, 8))
def test_an_output_with_by_chance_as_many_entries_as_the_rows_that_are_tried_keeps_batches_whole(make_group, entries):
    group = make_group(Constant(entries), lambda outputs, y: F.mse_loss(outputs[0], y), batch(), ranks=2)
    assert "one entry for each row" in group.whole["train"] and "one entry for each row" in group.whole["eval"]


class Surprise(nn.Linear):
    """Takes shares between 0 and 1 beside its input, and refuses other numbers."""

    def forward(self, input: Tensor, share: Tensor) -> Tensor:
        return F.binary_cross_entropy(super().forward(input).sigmoid(), share, reduction="none")


class Margins(nn.Linear):
    """Takes numbers of rows beside its input, which few rows do not have."""

    def forward(self, input: Tensor, chosen: Tensor) -> Tensor:
        return F.multilabel_margin_loss(super().forward(input).mean(1), chosen) * input


def test_a_program_that_does_not_take_random_numbers_is_tried_with_the_examples(make_group):
    example = ((torch.randn(6, 4), torch.rand(6, 3)), torch.randn(6, 3))
    assert make_group(Surprise(4, 3), nn.MSELoss(), example).whole == {"train": None, "eval": None}


def test_a_program_that_refuses_fewer_rows_than_the_examples_is_not_split(make_group):
    chosen = torch.tensor([9, 8, 0, -1, -1, -1, -1, -1, -1, -1])
    example = ((torch.randn(10, 4), chosen), torch.randn(10, 4))
    group = make_group(Margins(4, 3), nn.MSELoss(), example)
    assert group.whole["train"] is not None and group.whole["eval"] is not None

"""Losses that torch.export alone cannot trace, or whose operators trust what a batch brings."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import ctc_loss, gaussian_nll_loss

from gradwire_proto.errors import InvalidArgument, ResourceExhausted
from gradwire_workers.programs.checked_operators import checked

TIME, CLASSES = 9, 6


def spoken(seed: int, rows: int, kind: str):
    """Random inputs and targets of a CTC loss: rows of 2 dimensions, concatenated, or with lengths in Python."""
    torch.manual_seed(seed)
    x = torch.randn(rows, TIME, 3, dtype=torch.float64)
    lengths, most = torch.randint(0, 4, (rows,)), torch.randint(5, TIME + 1, (rows,))
    if kind == "concatenated":
        return x, (torch.randint(1, CLASSES, (int(lengths.sum()),)), most, lengths)
    targets = torch.randint(1, CLASSES, (rows, 5))
    return x, (targets, tuple(most.tolist()), tuple(lengths.tolist())) if kind == "python" else (targets, most, lengths)


class Speech(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, CLASSES, dtype=torch.float64)

    def forward(self, x):
        return self.layer(x).log_softmax(-1)


@pytest.mark.parametrize("kind", ["rows", "concatenated", "python"])
@pytest.mark.parametrize(
    "loss",
    [
        nn.CTCLoss(),
        nn.CTCLoss(blank=2, reduction="sum", zero_infinity=True),
        lambda *given: ctc_loss(*given, reduction="none").square().mean(),
        lambda *given: torch.ctc_loss(*given, 0, 2, True),
    ],
    ids=["mean", "sum", "none", "torch"],
)
def test_ctc_is_torchs_with_every_reduction_and_form_of_targets(round_trip, loss, kind):
    x, targets = spoken(1, 4, kind)
    trip = round_trip(Speech(), x, targets, lambda output, given: loss(output.transpose(0, 1), *given))
    rows = 4
    if kind == "rows":
        assert trip.exported.program.variants[0].symbols, "any number of rows"
        rows = 7
    else:
        torch.manual_seed(2)
        x = torch.randn_like(x)
    trip.check(*(spoken(3, rows, kind) if kind == "rows" else (x, targets)), tolerance=1e-12)


def test_an_unbatched_ctc_is_torchs(round_trip):
    x, (targets, most, lengths) = spoken(5, 1, "rows")
    given = (targets[0, : int(lengths)], most[0], lengths[0])
    trip = round_trip(Speech(), x[0], given, lambda output, given: ctc_loss(output, *given))
    trip.check(torch.randn(TIME, 3, dtype=torch.float64), given, tolerance=1e-12)


@pytest.mark.parametrize(
    "change",
    [
        lambda targets, most, lengths: (targets.new_full(targets.shape, 10**12), most, lengths + 1),
        lambda targets, most, lengths: (-targets, most, lengths + 1),
        lambda targets, most, lengths: (targets, most + TIME, lengths),
        lambda targets, most, lengths: (targets, -most, lengths),
        lambda targets, most, lengths: (targets, most, lengths + 5),
        lambda targets, most, lengths: (targets, most, -lengths - 1),
        lambda targets, most, lengths: (targets, most, lengths + 10**12),
        lambda targets, most, lengths: (targets, most.float(), lengths),
        lambda targets, most, lengths: (targets, most[:2], lengths),
        lambda targets, most, lengths: (targets[:2], most, lengths),
        lambda targets, most, lengths: (targets[0], most, lengths + 1),
        lambda targets, most, lengths: (targets[None], most, lengths),
    ],
)
def test_labels_and_lengths_that_reach_beyond_a_tensor_are_refused(change):
    x, targets = spoken(1, 4, "rows")
    log_probs = Speech()(x).transpose(0, 1)
    operator = checked("aten.ctc_loss.Tensor")
    assert operator is not None and operator(log_probs, *targets).isfinite()
    with pytest.raises(InvalidArgument) as caught:
        operator(log_probs, *change(*targets))
    assert caught.value.reason in ("INDEX_OUT_OF_RANGE", "PROGRAM_FAILED")


def test_what_stands_behind_a_target_is_not_looked_at():
    x, (targets, most, lengths) = spoken(1, 4, "rows")
    log_probs = Speech()(x).transpose(0, 1)
    padded = targets.where(torch.arange(5) < lengths[:, None], -(10**12))
    operator = checked("aten.ctc_loss.Tensor")
    assert operator is not None
    assert torch.equal(operator(log_probs, padded, most, lengths), ctc_loss(log_probs, targets, most, lengths))


def test_the_memory_that_ctc_takes_for_itself_is_bounded():
    log_probs, targets = torch.zeros(1000, 1, 2), torch.ones(1, 100_000, dtype=torch.int64)
    operator = checked("aten.ctc_loss.Tensor", 1 << 20)
    assert operator is not None
    with pytest.raises(ResourceExhausted) as caught:
        operator(log_probs, targets, torch.tensor([1000]), torch.tensor([100_000]))
    assert caught.value.reason == "TENSOR_TOO_LARGE" and str(1 << 20) in str(caught.value)


class Gaussian(nn.Module):
    """A mean, and a variance of which a part is below any eps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mean = nn.Linear(3, 4, dtype=torch.float64)
        self.variance = nn.Linear(3, width, dtype=torch.float64)

    def forward(self, x):
        return self.mean(x), self.variance(x).relu()


@pytest.mark.parametrize("width", [4, 1])
@pytest.mark.parametrize("options", [{}, {"full": True, "reduction": "sum"}, {"eps": 0.3}])
def test_gaussian_likelihood_is_torchs_also_where_the_variance_is_clamped(round_trip, width, options):
    torch.manual_seed(width)
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    loss = nn.GaussianNLLLoss(**options)
    trip = round_trip(Gaussian(width), x, y, lambda outputs, y: loss(outputs[0], y, outputs[1]))
    trip.check(torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64), tolerance=1e-12)


@pytest.mark.parametrize(
    "loss",
    [
        lambda outputs, y: gaussian_nll_loss(outputs[0], y, outputs[1][:, 0]),
        lambda outputs, y: gaussian_nll_loss(outputs[0], y, 0.7),
        lambda outputs, y: gaussian_nll_loss(outputs[0], y, outputs[1], reduction="none").square().sum(),
    ],
)
def test_other_forms_of_the_variance_are_torchs(round_trip, loss):
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    trip = round_trip(Gaussian(4), x, y, loss)
    trip.check(torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64), tolerance=1e-12)


def test_a_negative_variance_is_refused_in_torchs_words(round_trip):
    x, y = torch.rand(5, 4), torch.randn(5, 4)
    scale = nn.Linear(4, 4, bias=False)
    nn.init.eye_(scale.weight)
    trip = round_trip(scale, x, y, lambda output, y: gaussian_nll_loss(y, y, output))
    with pytest.raises(InvalidArgument, match="negative") as caught:
        trip.run(-x, y)
    assert caught.value.reason == "ASSERTION_FAILED"
    assert trip.run(x, y)[1].isfinite()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True, "weight": torch.rand(7, dtype=torch.float64), "ignore_index": 2},
        {"label_smoothing": 0.2},
        {"options": nn.LinearCrossEntropyOptions(batch_chunk_size=2), "bias": True, "ignore_index": 1},
    ],
    ids=["plain", "weighted", "smoothed", "chunked"],
)
def test_linear_cross_entropy_is_torchs_chunked_or_not(round_trip, options, reduction):
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(3, 5, dtype=torch.float64)
            self.loss = nn.LinearCrossEntropyLoss(5, 7, dtype=torch.float64, reduction=reduction, **options)

        def forward(self, x, labels):
            return self.loss(F.gelu(self.body(x)), labels)

    trip = round_trip(Head(), (torch.randn(6, 3, dtype=torch.float64), torch.randint(7, (6,))))
    trip.check((torch.randn(9, 3, dtype=torch.float64), torch.randint(7, (9,))), tolerance=1e-12)

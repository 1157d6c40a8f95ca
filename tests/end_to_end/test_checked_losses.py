"""Losses that check their batch, or that sum over sequences of different lengths, on one and on two ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import ctc_loss, gaussian_nll_loss

from gradwire import errors

TIME, CLASSES = 8, 5


class Speech(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, CLASSES, dtype=torch.float64)

    def forward(self, x):
        return self.layer(x).log_softmax(-1)


def ctc_of_rows(output, given):
    return ctc_loss(output.transpose(0, 1), *given, zero_infinity=True)


def spoken(rows: int):
    x = torch.randn(rows, TIME, 3, dtype=torch.float64)
    # Some targets do not fit into their inputs: infinite, and so zero.
    targets = torch.randint(1, CLASSES, (rows, 4)), torch.randint(1, TIME + 1, (rows,)), torch.randint(0, 5, (rows,))
    return x, targets


@pytest.mark.parametrize("workers", [1, 2])
def test_ctc_of_any_number_of_rows_is_torchs_and_wrong_labels_harm_nobody(client, workers):
    torch.manual_seed(workers)
    net = Speech()
    model = client.create_model(net, loss=ctc_of_rows, example=spoken(4), workers=workers)
    if workers > 1:
        assert model.info().sharding.mode == "rows"
    for rows in (7, 1):
        x, targets = spoken(rows)
        loss = ctc_of_rows(net(x), targets)
        result = model.compute_gradients(x, targets)
        assert result.loss == pytest.approx(loss.item(), rel=1e-12)
        for name, gradient in zip(
            dict(net.named_parameters()), torch.autograd.grad(loss, list(net.parameters())), strict=True
        ):
            torch.testing.assert_close(result.gradients[name], gradient, rtol=1e-11, atol=1e-13)
    x, (labels, most, lengths) = spoken(7)
    with pytest.raises(errors.InvalidArgument, match="targets"):
        model.compute_gradients(x, (labels + 10**9, most, lengths.clamp_min(1)))
    assert model.compute_gradients(x, (labels, most, lengths)).loss == pytest.approx(
        ctc_of_rows(net(x), (labels, most, lengths)).item(), rel=1e-12
    )
    model.delete()


class OwnLikelihood(nn.Module):
    """Its variance is an input, which random numbers do not suit."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, x, variance):
        mean = self.layer(x)
        return gaussian_nll_loss(mean, torch.zeros_like(mean), variance, reduction="none").sum(1)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_module_that_asserts_something_of_its_input_is_still_spread_and_refuses_by_its_own_words(client, workers):
    torch.manual_seed(workers)
    net = OwnLikelihood()
    inputs = torch.randn(5, 3, dtype=torch.float64), torch.rand(5, 2, dtype=torch.float64)
    model = client.create_model(net, loss=lambda output, _: output.square().mean(), example=(inputs,), workers=workers)
    if workers > 1:
        assert model.info().sharding.mode == "rows"
    x, variance = torch.randn(7, 3, dtype=torch.float64), torch.rand(7, 2, dtype=torch.float64)
    loss = net(x, variance).square().mean()
    result = model.compute_gradients((x, variance))
    assert result.loss == pytest.approx(loss.item(), rel=1e-12)
    expected = torch.autograd.grad(loss, list(net.parameters()))
    for name, gradient in zip(dict(net.named_parameters()), expected, strict=True):
        torch.testing.assert_close(result.gradients[name], gradient, rtol=1e-11, atol=1e-13)
    variance[6, 1] = -1.0  # in the last shard alone
    with pytest.raises(errors.InvalidArgument, match="var has negative") as caught:
        model.compute_gradients((x, variance))
    assert caught.value.reason == "ASSERTION_FAILED"
    assert model.compute_gradients((x, variance.abs())).loss > 0
    model.delete()

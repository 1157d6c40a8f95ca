"""Gradients of a module on the service as torch's autograd gives them, and as users change and clip them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from end_to_end.local_twin import Pair, batch, mean_square
from torch import nn

from gradwire.errors import FailedPrecondition


def test_clipped_gradients_are_those_that_step_applies(make_pair: Callable[..., Pair]) -> None:
    torch.manual_seed(2)
    pair = make_pair()
    norms = []
    for net, opt in pair.both:
        for x, y in [(torch.ones(6, 4).double(), torch.full((6, 3), 9.0).double())] * 3:
            opt.zero_grad()
            mean_square(net(x), y).backward()
            norms.append(nn.utils.clip_grad_norm_(net.parameters(), 0.1).item())
            opt.step()
    assert norms[:3] == pytest.approx(norms[3:], rel=1e-10) and min(norms) > 0.1
    pair.assert_equal()


def test_gradients_changed_through_data_or_replaced_are_those_that_accumulate_and_step(
    make_pair: Callable[..., Pair],
) -> None:
    torch.manual_seed(3)
    pair = make_pair()
    x, y = batch()
    for net, opt in pair.both:
        opt.zero_grad()
        mean_square(net(x), y).backward()
        first, second, *_ = net.parameters()
        assert first.grad is not None
        first.grad.data.clamp_(-0.01, 0.01)
        second.grad = None
        mean_square(net(x), y).backward()
        opt.step()
    pair.assert_same_gradients()
    pair.assert_equal()


def test_two_forwards_before_one_backward_and_accumulation_over_backwards(make_pair: Callable[..., Pair]) -> None:
    torch.manual_seed(5)
    pair = make_pair()
    (x1, y1), (x2, y2), (x3, y3) = batch(5), batch(6), batch(3)
    for net, _ in pair.both:
        one, two = net(x1), net(x2)
        (mean_square(one, y1) + 2 * mean_square(two, y2)).backward()
        mean_square(net(x3), y3).backward()
    pair.assert_same_gradients()
    pair.assert_equal()


def test_a_retained_graph_is_gone_back_through_twice_and_a_freed_one_is_not(make_pair: Callable[..., Pair]) -> None:
    torch.manual_seed(6)
    pair = make_pair()
    x, y = batch()
    for net, _ in pair.both:
        loss = mean_square(net(x), y)
        loss.backward(retain_graph=True)
        loss.backward()
        again = loss * 1
        with pytest.raises(RuntimeError, match="second time"):
            again.backward()
    pair.assert_same_gradients()


def test_autograd_grad_of_an_input_leaves_the_parameters_gradients_alone(make_pair: Callable[..., Pair]) -> None:
    torch.manual_seed(7)
    pair = make_pair()
    x = batch()[0].requires_grad_()
    found = [torch.autograd.grad(net(x).sum(), x)[0] for net, _ in pair.both]
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)
    pair.assert_same_gradients()
    net = pair.remote
    with pytest.raises(FailedPrecondition, match=r"autograd\.grad"):
        torch.autograd.grad(net(x).sum(), list(net.parameters()))


def test_backward_into_named_inputs_adds_only_theirs(make_pair: Callable[..., Pair]) -> None:
    torch.manual_seed(8)
    pair = make_pair()
    x, y = batch()
    for net, _ in pair.both:
        mean_square(net(x), y).backward(inputs=[next(iter(net.parameters()))])
    pair.assert_same_gradients()


def test_frozen_parameters_get_no_gradient_and_stay(make_pair: Callable[..., Pair]) -> None:
    torch.manual_seed(9)
    pair = make_pair()
    x, y = batch()
    for net, opt in pair.both:
        for part in list(net.parameters())[:2]:
            part.requires_grad_(False)
        opt.zero_grad()
        mean_square(net(x), y).backward()
        opt.step()
    pair.assert_same_gradients()
    pair.assert_equal()
    for part in pair.remote.parameters():
        part.requires_grad_(False)
    assert not pair.remote(x).requires_grad


def test_a_penalty_on_the_weights_reads_their_values_and_reaches_their_gradients(
    make_pair: Callable[..., Pair],
) -> None:
    torch.manual_seed(11)
    pair = make_pair()
    x, y = batch()
    for net, opt in pair.both:
        for _ in range(3):
            opt.zero_grad()
            (mean_square(net(x), y) + 0.1 * sum(p.pow(2).sum() for p in net.parameters())).backward()
            opt.step()
    pair.assert_equal()


@pytest.mark.parametrize("workers", [1, 2])
def test_an_update_between_forward_and_backward_is_an_error_as_in_torch(
    make_pair: Callable[..., Pair], workers: int
) -> None:
    pair = make_pair(workers)
    x, y = batch()
    messages = []
    for net, opt in pair.both:
        mean_square(net(x), y).backward()
        late = mean_square(net(x), y)
        opt.step()
        with pytest.raises((FailedPrecondition, RuntimeError), match="inplace operation") as caught:
            late.backward()
        messages.append(caught.value)
    assert getattr(messages[0], "reason", None) == "MODIFIED_IN_PLACE"
    net, _ = pair.both[0]
    mean_square(net(x), y).backward()  # the model goes on

"""`as_module` and `as_optimizer`: PyTorch's own training loop over a model on the service, beside a local one."""

from __future__ import annotations

import asyncio
import copy
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradwire
from gradwire import optim, retained_releases
from gradwire.errors import FailedPrecondition, InvalidArgument
from gradwire_proto.values import BackwardQuery

RANKS = pytest.mark.parametrize("workers", [1, 2, 3])


def make_net(dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def batch(rows: int = 7, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 4, dtype=dtype), torch.randn(rows, 3, dtype=dtype)


class Pair:
    """A module on the service and the same one here, with an SGD optimizer each."""

    def __init__(self, client: gradwire.Client, net: nn.Module, example: tuple[Any, ...], **settings: Any) -> None:
        sgd: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
        self.model = client.create_model(net, optimizer=optim.SGD(**sgd), example=example, **settings)
        self.local = copy.deepcopy(net)
        self.remote = self.model.as_module()
        remote = (self.remote, self.model.as_optimizer())
        self.both = (remote, (self.local, torch.optim.SGD(self.local.parameters(), **sgd)))

    def assert_equal(self, tolerance: float = 1e-10) -> None:
        found = self.remote.state_dict()
        assert found.keys() == self.local.state_dict().keys()
        for name, value in self.local.state_dict().items():
            assert (found[name] - value).abs().max() <= tolerance, name

    def assert_same_gradients(self) -> None:
        for (name, here), there in zip(self.local.named_parameters(), self.remote.parameters(), strict=True):
            if here.grad is None:
                assert there.grad is None, name
            else:
                torch.testing.assert_close(there.grad, here.grad, rtol=1e-10, atol=1e-12, msg=name)


@pytest.fixture
def make_pair(client: gradwire.Client) -> Callable[..., Pair]:
    def make(workers: int = 2, net: nn.Module | None = None, **settings: Any) -> Pair:
        example = batch() if "loss" in settings else (batch()[0],)
        return Pair(client, net or make_net(), example, workers=workers, **settings)

    return make


def mean_square(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return ((found - wanted) ** 2).mean()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_the_standard_loop_with_forked_loader_workers_ends_with_the_weights_of_local_training(
    client: gradwire.Client, workers: int, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(workers)
    data = TensorDataset(torch.randn(22, 4, dtype=dtype), torch.randint(3, (22,)))
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)
    pair = Pair(client, net, (data.tensors[0],), workers=workers)
    criterion = nn.CrossEntropyLoss()
    for model, optimizer in pair.both:
        order = torch.Generator().manual_seed(0)
        loader = DataLoader(data, 4, shuffle=True, generator=order, num_workers=2, multiprocessing_context="fork")
        for _ in range(2):
            model.train()
            for x, targets in loader:
                optimizer.zero_grad()
                loss = criterion(model(x), targets)
                loss.backward()
                optimizer.step()
    pair.assert_equal(tolerance)


@RANKS
def test_an_iteration_gives_the_gradients_and_buffers_of_torch(make_pair: Callable[..., Pair], workers: int) -> None:
    torch.manual_seed(10 + workers)
    pair = make_pair(workers)
    for rows in (7, 2, 5):  # ragged, and fewer rows than ranks
        x, y = batch(rows)
        inputs = []
        for net, opt in pair.both:
            given = x.clone().requires_grad_()
            opt.zero_grad()
            mean_square(net(given), y).backward()
            inputs.append(given.grad)
        pair.assert_same_gradients()
        torch.testing.assert_close(inputs[0], inputs[1], rtol=1e-10, atol=1e-12)
        for _, opt in pair.both:
            opt.step()
        pair.assert_equal()


def test_a_model_that_runs_whole_on_one_of_its_ranks_gives_the_same(make_pair: Callable[..., Pair]) -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3, dtype=torch.float64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.inner(x)
            return h - h.mean(0)

    torch.manual_seed(1)
    pair = make_pair(2, net=Centred())
    sharding = pair.model.info().sharding
    assert sharding is not None and sharding.mode == "whole"
    x, y = batch()
    for net, opt in pair.both:
        for _ in range(3):
            opt.zero_grad()
            mean_square(net(x), y).backward()
            opt.step()
    pair.assert_equal()


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


def test_layers_here_before_and_after_the_model_train_with_it(make_pair: Callable[..., Pair]) -> None:
    torch.manual_seed(4)
    pair = make_pair()
    before, after = nn.Linear(5, 4, dtype=torch.float64), nn.Linear(3, 2, dtype=torch.float64)
    x, y = torch.randn(9, 5, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    ends = []
    for net, opt in pair.both:
        first, last = copy.deepcopy(before), copy.deepcopy(after)
        own = torch.optim.SGD([*first.parameters(), *last.parameters()], lr=0.1)
        for _ in range(4):
            opt.zero_grad()
            own.zero_grad()
            mean_square(last(net(first(x))), y).backward()
            opt.step()
            own.step()
        ends.append([*first.parameters(), *last.parameters()])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    pair.assert_equal()


def test_outputs_may_be_changed_in_place(make_pair: Callable[..., Pair]) -> None:
    torch.manual_seed(4)
    pair = make_pair()
    x, y = batch()
    for net, _ in pair.both:
        outputs = net(x)
        outputs.mul_(2)
        outputs[:, 0] = 0.5
        mean_square(outputs, y).backward()
    pair.assert_same_gradients()


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


def test_a_scheduler_of_torch_sets_the_rate_of_each_step(make_pair: Callable[..., Pair]) -> None:
    torch.manual_seed(12)
    pair = make_pair()
    x, y = batch()
    for net, opt in pair.both:
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.3, total_steps=6)  # changes momentum too
        for _ in range(5):
            opt.zero_grad()
            mean_square(net(x), y).backward()
            opt.step()
            schedule.step()
    pair.assert_equal()
    assert pair.model.optimizer_state_dict()["param_groups"][0]["momentum"] != 0.9


def test_an_option_that_the_service_cannot_take_is_refused_and_nothing_is_applied(
    make_pair: Callable[..., Pair],
) -> None:
    pair = make_pair()
    net, opt = pair.both[0]
    x, y = batch()
    mean_square(net(x), y).backward()
    before = net.state_dict()
    opt.param_groups[0]["lr"] = -1.0
    with pytest.raises(InvalidArgument) as caught:
        opt.step()
    assert caught.value.field == 'groups[0]["lr"]'
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_placeholders_look_like_the_parameters_and_refuse_to_be_changed_here(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair()
    for (name, here), (there_name, there) in zip(
        pair.local.named_parameters(), pair.remote.named_parameters(), strict=True
    ):
        assert (name, here.shape, here.dtype, here.requires_grad) == (
            there_name,
            there.shape,
            there.dtype,
            there.requires_grad,
        )
        assert torch.equal(here.detach(), there.detach())
    assert [name for name, _ in pair.remote.named_buffers()] == [name for name, _ in pair.local.named_buffers()]
    with pytest.raises(FailedPrecondition, match="load_state_dict"), torch.no_grad():
        next(pair.remote.parameters()).add_(1)
    data: Any = next(pair.remote.parameters()).data
    with pytest.raises(FailedPrecondition, match="load_state_dict"):
        data.fill_(1)
    with pytest.raises(FailedPrecondition, match="load_state_dict"):
        next(pair.remote.parameters()).data = torch.zeros(8, 4, dtype=torch.float64)
    assert type(data + 1) is type(copy.deepcopy(data)) is torch.Tensor
    with pytest.raises(FailedPrecondition, match="stays on the service"):
        pair.remote.half()
    assert pair.remote.to("cpu") is pair.remote


def test_state_goes_both_ways_and_modes_are_the_modules_own(make_pair: Callable[..., Pair]) -> None:
    torch.manual_seed(13)
    pair = make_pair()
    x, _ = batch()
    for net, _ in pair.both:
        net(x)
    other = {name: value + 1 for name, value in pair.local.state_dict().items()}
    for net, _ in pair.both:
        net.load_state_dict(other)
        net.eval()
    with torch.no_grad():
        torch.testing.assert_close(pair.remote(x), pair.local(x), rtol=1e-10, atol=1e-12)
    pair.assert_equal()
    with pytest.raises(RuntimeError, match="Missing key"):
        pair.remote.load_state_dict({})
    next(iter(pair.remote.children())).train()
    with pytest.raises(FailedPrecondition, match="another mode"):
        pair.remote(x)


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


def test_held_gradients_are_read_by_name(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair()
    x, y = batch()
    assert pair.model.held_gradients() == {}
    for net, _ in pair.both:
        mean_square(net(x), y).backward()
    found = pair.model.held_gradients("*.bias")
    assert found.keys() == {"0.bias", "1.bias", "3.bias"}
    torch.testing.assert_close(found["3.bias"], dict(pair.local.named_parameters())["3.bias"].grad)
    with pytest.raises(InvalidArgument) as caught:
        pair.model.held_gradients("nobody")
    assert caught.value.reason == "NO_MATCH"


def test_the_loop_runs_inside_a_running_event_loop(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair()
    x, y = batch()

    async def cell() -> None:  # as Jupyter runs one
        for net, opt in pair.both:
            opt.zero_grad()
            mean_square(net(x), y).backward()
            opt.step()

    asyncio.run(cell())
    pair.assert_equal()


@pytest.fixture
def collects_nothing() -> Iterator[None]:
    """Python's collector does not run: what is freed is freed because nothing refers to it."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("collects_nothing")
def test_graphs_that_are_dropped_are_freed_although_nothing_else_is_called(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair()
    outputs = [pair.remote(batch()[0]) for _ in range(3)]
    query = BackwardQuery(retained=outputs[0].grad_fn.step.name, keep=True)
    del outputs
    cotangents = [torch.ones(7, 3, dtype=torch.float64)]

    def is_gone() -> bool:
        try:
            pair.model._autograd.backward(query, cotangents).run(pair.model._rpc)
        except FailedPrecondition as error:
            return error.reason == "RETAINED_GONE"
        return False

    deadline = time.monotonic() + 5.0  # long before they would expire
    while not is_gone():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.usefixtures("collects_nothing")
def test_a_forward_takes_the_place_of_one_that_was_just_dropped(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair()
    out = pair.remote(batch()[0])
    name = out.grad_fn.step.name
    del out
    assert pair.remote._releases.take() == [name]


def test_a_backward_that_is_refused_for_its_cotangents_leaves_the_forward(make_pair: Callable[..., Pair]) -> None:
    torch.manual_seed(14)
    pair = make_pair()
    x, _ = batch()
    outputs = [net(x) for net, _ in pair.both]
    wrong = [torch.ones(7, 4, dtype=torch.float64)]
    query = BackwardQuery(retained=outputs[0].grad_fn.step.name)
    with pytest.raises(InvalidArgument) as caught:
        pair.model._autograd.backward(query, wrong).run(pair.model._rpc)
    assert (caught.value.field, caught.value.reason) == ("cotangents[0]", "COTANGENT_MISMATCH")
    for output in outputs:
        output.sum().backward()
    pair.assert_same_gradients()


def test_what_update_freezes_and_unfreezes_is_so_in_the_module_and_its_optimizer(client: gradwire.Client) -> None:
    torch.manual_seed(15)
    net = make_net()
    net[3].requires_grad_(False)  # pyright: ignore[reportCallIssue, reportIndexIssue]
    model = client.create_model(net, optimizer=optim.SGD(lr=0.1, momentum=0.9), example=(batch()[0],), workers=2)
    remote, local = model.as_module(), copy.deepcopy(net)
    optimizers = [model.as_optimizer(), torch.optim.SGD(local.parameters(), lr=0.1, momentum=0.9)]
    x, y = batch()
    for frozen in ({"3.*": False}, {"0.*": False, "3.*": True}, {"0.weight": True}):
        model.update(trainable=frozen)
        for pattern, trained in frozen.items():
            for name, each in local.named_parameters():
                if name.startswith(pattern.rstrip("*")):
                    each.requires_grad_(trained)
        for (name, here), there in zip(local.named_parameters(), remote.parameters(), strict=True):
            assert here.requires_grad == there.requires_grad, name
        for _ in range(2):
            for module, optimizer in zip((remote, local), optimizers, strict=True):
                optimizer.zero_grad()
                mean_square(module(x), y).backward()
                optimizer.step()
        for name, value in remote.state_dict().items():
            assert (value - local.state_dict()[name]).abs().max() <= 1e-10, name
        again = model.as_optimizer()
        assert [len(group["params"]) for group in again.param_groups] == [
            len(group["params"]) for group in optimizers[0].param_groups
        ]


def test_settings_changed_on_the_model_are_those_of_its_optimizer_here(make_pair: Callable[..., Pair]) -> None:
    torch.manual_seed(16)
    pair = make_pair()
    (net, opt), (local, local_opt) = pair.both
    x, y = batch()
    state = pair.model.optimizer_state_dict()
    opt.param_groups[0]["momentum"] = local_opt.param_groups[0]["momentum"] = 0.5
    pair.model.update(lr=0.02)
    assert opt.param_groups[0]["lr"] == 0.02 and opt.param_groups[0]["momentum"] == 0.5
    opt.param_groups[0]["lr"] = local_opt.param_groups[0]["lr"] = 0.1  # what it was before, and is not any more
    for module, optimizer in ((net, opt), (local, local_opt)):
        optimizer.zero_grad()
        mean_square(module(x), y).backward()
        optimizer.step()
    pair.assert_equal()
    pair.model.load_optimizer_state_dict(state)
    assert (opt.param_groups[0]["lr"], opt.param_groups[0]["momentum"]) == (0.1, 0.9)
    pair.model.futures.update(lr=0.3).result()
    opt.step()
    assert opt.param_groups[0]["lr"] == 0.3
    pair.model.update(optimizer=optim.Adam(lr=0.1, groups=[optim.ParamGroup("0.*", lr=0.2)]))
    with pytest.raises(FailedPrecondition, match="as_optimizer") as caught:
        opt.step()
    assert caught.value.reason == "GROUPS_CHANGED"
    assert [group["lr"] for group in pair.model.as_optimizer().param_groups] == [0.1, 0.2]


def test_gradients_that_the_model_itself_changes_are_read_anew(make_pair: Callable[..., Pair]) -> None:
    torch.manual_seed(17)
    pair = make_pair(loss=nn.MSELoss())
    x, y = batch()
    mean_square(pair.local(x), y).backward()
    mean_square(pair.remote(x), y).backward()
    pair.assert_same_gradients()
    for module in (pair.local, pair.remote):
        first = next(iter(module.parameters()))
        assert first.grad is not None
        first.grad.mul_(0.5)
    mean_square(pair.local(x), y).backward()
    pair.model.forward_backward(x, y)
    pair.assert_same_gradients()
    pair.model.zero_grad()
    pair.local.zero_grad()
    pair.assert_same_gradients()


def test_what_a_refused_forward_was_to_release_is_released_by_another(
    make_pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retained_releases, "_GATHER_SECONDS", 5.0)  # the thread that sends them stays out of it
    pair = make_pair()
    out = pair.remote(batch()[0])
    name = out.grad_fn.step.name
    del out
    with pytest.raises(InvalidArgument):
        pair.remote(torch.randn(0, 4).double())
    assert pair.remote._releases.take() == [name]

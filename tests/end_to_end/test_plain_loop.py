"""`as_module` and `as_optimizer`: PyTorch's own training loop over a model on the service, beside a local one."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable

import pytest
import torch
from end_to_end.local_twin import Pair, batch, mean_square
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradwire


@pytest.mark.parametrize(("workers", "dtype", "tolerance"), [(1, torch.float32, 1e-5), (2, torch.float64, 1e-10)])
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


@pytest.mark.parametrize("workers", [1, 3])
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

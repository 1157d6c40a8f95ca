"""Optimizers, schedules, groups and clipping through a real service: the weights are those of torch's own loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler

import gradwire
from gradwire import errors, optim
from gradwire.optim import schedule

STEPS = 20
# One for each form of state: what the others compute is compared in tests/workers/training/test_optimizers.py.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "Adafactor": {"lr": 0.05, "weight_decay": 0.01},
    "Adam": {"lr": 0.05, "amsgrad": True, "weight_decay": 0.01},
    "ASGD": {"lr": 0.05, "t0": 3, "lambd": 0.01},
    "LBFGS": {"lr": 0.3, "max_iter": 4, "history_size": 5},
    "Muon": {"lr": 0.05},
    "NAdam": {"lr": 0.05, "momentum_decay": 0.01},
    "Rprop": {"lr": 0.01},
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
}


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    torch.manual_seed(0)


def net(bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5, bias=bias), nn.Tanh(), nn.Linear(5, 2, bias=bias)).double()


def batch(rows: int = 7) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 4).double(), torch.randn(rows, 2).double()


def local_step(module: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, *, clip: float = 0) -> float:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(module(x), y)
        loss.backward()
        return loss.detach()

    if isinstance(optimizer, torch.optim.LBFGS):
        return float(optimizer.step(closure))
    loss = closure()
    if clip:
        nn.utils.clip_grad_norm_(module.parameters(), clip)
    optimizer.step()
    return float(loss)


def moved(client: gradwire.Client, model: gradwire.Model, module: nn.Module, **arguments: Any) -> gradwire.Model:
    """Another model, with the state of this one, which is deleted."""
    weights, state = model.state_dict(), model.optimizer_state_dict()
    info = model.info()
    model.delete()
    again = client.create_model(module, example=batch(), loss=nn.MSELoss(), workers=info.workers, **arguments)
    again.load_state_dict(weights)
    again.load_optimizer_state_dict(state)
    assert_same_bits(again.optimizer_state_dict(), state)
    return again


def assert_same_bits(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        assert found.dtype is expected.dtype and torch.equal(found, expected)
    elif isinstance(expected, (dict, list, tuple)):
        assert len(found) == len(expected)
        for key in expected if isinstance(expected, dict) else range(len(expected)):
            assert_same_bits(found[key], expected[key])
    else:
        assert found == expected


def assert_close(model: gradwire.Model, module: nn.Module, tolerance: float = 1e-10) -> None:
    found = model.state_dict()
    for name, expected in module.state_dict().items():
        assert float((found[name] - expected).norm()) <= tolerance * max(1.0, float(expected.norm())), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_pulled_and_pushed_into_a_new_model_halfway_leaves_the_run_as_torchs(name, client):
    module, options = net(bias=name != "Muon"), OPTIMIZERS[name]
    reference = copy.deepcopy(module)
    optimizer = getattr(torch.optim, name)(reference.parameters(), **options)
    spec = getattr(optim, name)(**options)
    workers = 1 if name in ("LBFGS", "Rprop") else 2  # These act on a gradient's last bits, which ranks round apart.
    model = client.create_model(module, example=batch(), loss=nn.MSELoss(), optimizer=spec, workers=workers)
    for step in range(STEPS):
        if step == STEPS // 2:
            model = moved(client, model, module, optimizer=spec)
        x, y = batch()
        assert model.train_step(x, y).loss == pytest.approx(local_step(reference, optimizer, x, y), rel=1e-7)
    # Muon computes in bfloat16, and so much of a last bit is seen.
    assert_close(model, reference, tolerance=1e-4 if name == "Muon" and workers > 1 else 1e-8 if workers > 1 else 1e-10)


SCHEDULES: dict[str, tuple[schedule.Schedule, Callable[[torch.optim.Optimizer], Any]]] = {
    "CosineAnnealingLR": (
        schedule.CosineAnnealingLR(T_max=8),
        lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=8),
    ),
    "OneCycleLR": (
        schedule.OneCycleLR(max_lr=0.2, total_steps=STEPS),
        lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=STEPS),
    ),
    "SequentialLR": (
        schedule.SequentialLR(
            schedulers=[schedule.LinearLR(total_iters=4), schedule.MultiStepLR(milestones=[3, 9])], milestones=[4]
        ),
        lambda optimizer: lr_scheduler.SequentialLR(
            optimizer,
            [lr_scheduler.LinearLR(optimizer, total_iters=4), lr_scheduler.MultiStepLR(optimizer, [3, 9])],
            [4],
        ),
    ),
    "ReduceLROnPlateau": (
        schedule.ReduceLROnPlateau(patience=1, factor=0.5),
        lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, factor=0.5),
    ),
}


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_goes_on_in_a_new_model_halfway_with_groups_and_clipping(name, client):
    ours, theirs = SCHEDULES[name]
    module = net()
    reference = copy.deepcopy(module)
    weights, biases = [reference[0].weight, reference[2].weight], [reference[0].bias, reference[2].bias]
    groups = [{"params": weights}, {"params": biases, "weight_decay": 0.0, "lr": 0.2}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.1)
    scheduler = theirs(optimizer)
    arguments = {
        "optimizer": optim.SGD(
            lr=0.1,
            momentum=0.9,
            weight_decay=0.1,
            groups=[optim.ParamGroup("*.bias", weight_decay=0.0, lr=0.2)],
            schedule=ours,
        ),
        "clip_grad_norm": 0.5,
    }
    model = client.create_model(module, example=batch(), loss=nn.MSELoss(), workers=2, **arguments)
    assert model.info().optimizer == arguments["optimizer"].spec()
    assert (model.info().clip_grad_norm, model.info().clip_grad_value) == (0.5, None)
    for step in range(STEPS):
        if step == STEPS // 2:
            model = moved(client, model, module, **arguments)
        x, y = batch()
        result = model.train_step(x, y)
        used = optimizer.param_groups[0]["lr"]
        loss = local_step(reference, optimizer, x, y, clip=0.5)
        scheduler.step(*[loss] if name == "ReduceLROnPlateau" else [])
        assert result.lr == pytest.approx(used, rel=1e-12)
        assert result.grad_norm > 0
    assert_close(model, reference)


def test_norm_before_clipping_is_told_for_gradients_of_the_clients_own(client):
    model = client.create_model(
        net(), example=batch(), loss=nn.MSELoss(), optimizer=optim.SGD(lr=1.0), workers=2, clip_grad_value=0.25
    )
    before = model.state_dict()["2.bias"]
    result = model.optimizer_step({"2.bias": torch.tensor([3.0, -4.0]).double()})
    assert result.grad_norm == 5.0
    assert torch.equal(model.state_dict()["2.bias"], before - torch.tensor([0.25, -0.25]).double())
    plain = client.create_model(net(), example=batch(), loss=nn.MSELoss(), optimizer=optim.SGD(), workers=1)
    assert plain.train_step(*batch()).grad_norm is None


def test_optimizer_state_above_a_message_travels_apart_and_comes_back_whole(client):
    module = nn.Linear(3000, 3000, bias=False)
    example = (torch.randn(2, 3000), torch.randn(2, 3000))
    make = lambda: client.create_model(module, example=example, loss=nn.MSELoss(), optimizer=optim.Adam())  # noqa: E731
    model, other = make(), make()
    model.train_step(*example)
    state = model.futures.optimizer_state_dict().result(30)
    moments = [state["state"]["weight"][name] for name in ("exp_avg", "exp_avg_sq")]
    assert sum(each.nbytes for each in moments) > client.server_info().limits.message_bytes
    other.futures.load_optimizer_state_dict(state).result(30)
    assert_same_bits(other.optimizer_state_dict(), state)


def change(state: dict, path: list, value: Any) -> dict:
    changed = copy.deepcopy(state)
    inside = changed
    for key in path[:-1]:
        inside = inside[key]
    if value is KeyError:
        del inside[path[-1]]
    else:
        inside[path[-1]] = value
    return changed


def test_state_that_does_not_fit_is_refused_by_path_and_nothing_changes(client):
    spec = optim.Adam(lr=0.1, schedule=schedule.StepLR(step_size=3))
    model = client.create_model(net(), example=batch(), loss=nn.MSELoss(), optimizer=spec, workers=2)
    model.train_step(*batch())
    state = model.optimizer_state_dict()
    weight = ["state", "0.weight"]
    for path, value, field in [
        (["optimizer"], "AdamW", "state.optimizer"),
        (["optimizer"], KeyError, "state"),
        (["more"], 1, "state"),
        (["state", "9.weight"], {}, 'state.state["9.weight"]'),
        (weight, torch.zeros(1), 'state.state["0.weight"]'),
        ([*weight, "exp_avg"], torch.zeros(4, 5).double(), 'state.state["0.weight"].exp_avg'),
        ([*weight, "exp_avg"], torch.zeros(5, 4), 'state.state["0.weight"].exp_avg'),
        ([*weight, "exp_avg"], 0.0, 'state.state["0.weight"].exp_avg'),
        ([*weight, "exp_avg"], KeyError, 'state.state["0.weight"]'),
        ([*weight, "step"], torch.tensor(-1.0), 'state.state["0.weight"].step'),
        ([*weight, "step"], torch.tensor(float("nan")), 'state.state["0.weight"].step'),
        (["param_groups"], [], "state.param_groups"),
        (["param_groups", 0, "lr"], -1.0, 'state.param_groups[0]["lr"]'),
        (["param_groups", 0, "lr"], KeyError, "state.param_groups[0]"),
        (["param_groups", 0, "betas"], (0.9, 1.0), 'state.param_groups[0]["betas"]'),
        (["param_groups", 0, "initial_lr"], float("nan"), "state.param_groups[0].initial_lr"),
        (["param_groups", 0, "params"], ["0.weight"], "state.param_groups[0].params"),
        (["param_groups", 0, "capturable"], True, "state.param_groups[0]"),
        (["schedule"], None, "state.schedule"),
        (["schedule", "name"], "LinearLR", "state.schedule.name"),
        (["schedule", "state", "last_epoch"], "3", "state.schedule.state.last_epoch"),
        (["schedule", "state", "base_lrs"], [0.1, 0.1], "state.schedule.state.base_lrs"),
        (["schedule", "schedulers"], [{}], "state.schedule.schedulers"),
    ]:
        with pytest.raises(errors.InvalidArgument) as caught:
            model.load_optimizer_state_dict(change(state, path, value))
        assert caught.value.field == field, (path, caught.value)
        assert caught.value.outcome == "not_applied"
    with pytest.raises(errors.InvalidArgument) as caught:
        model.load_optimizer_state_dict(change(state, ["optimizer"], object()))
    assert caught.value.field == "state.optimizer"
    assert_same_bits(model.optimizer_state_dict(), state)
    model.train_step(*batch())


def test_model_without_an_optimizer_has_no_state_of_one(client):
    model = client.create_model(net(), example=batch(), loss=nn.MSELoss())
    for call in (model.optimizer_state_dict, lambda: model.load_optimizer_state_dict({})):
        with pytest.raises(errors.FailedPrecondition) as caught:
            call()
        assert caught.value.reason == "NO_OPTIMIZER"


@pytest.mark.parametrize(
    ("arguments", "reason", "field"),
    [
        (
            {"optimizer": optim.SGD(groups=[optim.ParamGroup("no.such.*", lr=0.1)])},
            "NO_MATCH",
            "model.optimizer.groups[0].pattern",
        ),
        (
            {"optimizer": optim.SGD(groups=[optim.ParamGroup("0.*"), optim.ParamGroup("*.bias")])},
            "GROUPS_OVERLAP",
            "model.optimizer.groups[1].pattern",
        ),
        ({"optimizer": optim.Muon()}, "OPTIMIZER_UNFIT", "model.optimizer"),
        ({"optimizer": optim.Adam(capturable=True), "device": "cpu"}, "OPTIMIZER_UNFIT", "model.optimizer"),
        (
            {"optimizer": optim.SGD(schedule=schedule.CyclicLR(base_lr=[0.1, 0.2], max_lr=0.3))},
            "OPTION_OUT_OF_RANGE",
            "model.optimizer.schedule.options",
        ),
        (
            {"optimizer": optim.Adam(schedule=schedule.CyclicLR(base_lr=0.1, max_lr=0.3, max_momentum=1.0))},
            "SCHEDULE_UNFIT",
            'model.optimizer.schedule.options["max_momentum"]',
        ),
        ({"clip_grad_norm": 0.0}, "OPTIMIZER_ARGUMENT_INVALID", "model.clip_grad_norm"),
        ({"clip_grad_value": float("inf")}, "OPTIMIZER_ARGUMENT_INVALID", "model.clip_grad_value"),
    ],
)
def test_optimizer_that_does_not_fit_the_model_is_refused_by_path(arguments, reason, field, client):
    free = client.server_info().free_workers
    with pytest.raises(errors.InvalidArgument) as caught:
        client.create_model(net(), **{"example": batch(), "loss": nn.MSELoss(), "workers": 2, **arguments})
    assert (caught.value.reason, caught.value.field) == (reason, field)
    assert client.server_info().free_workers == free

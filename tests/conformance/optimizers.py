"""Every dense optimizer and every schedule of torch.optim: twenty updates, moved to a new model half-way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from conformance.case import Outcome
from torch import Tensor, nn
from torch.optim import lr_scheduler

import gradwire
from gradwire import optim
from gradwire.optim import schedule

STEPS = 20
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Relative, in Euclidean norm, of each parameter after all updates."""

_OPTIMIZERS: dict[str, list[dict[str, Any]]] = {
    "Adadelta": [{}, {"lr": 0.5, "rho": 0.8, "eps": 1e-4, "weight_decay": 0.1, "maximize": True}],
    "Adafactor": [{}, {"lr": 0.05, "beta2_decay": -0.6, "eps": (1e-5, 1e-2), "d": 2.0, "weight_decay": 0.1}],
    "Adagrad": [{}, {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.2, "eps": 1e-5}],
    "Adam": [{}, {"betas": (0.8, 0.9), "eps": 1e-4, "weight_decay": 0.1, "amsgrad": True}, {"maximize": True}],
    "AdamW": [{}, {"betas": (0.8, 0.9), "eps": 1e-4, "weight_decay": 0.1, "amsgrad": True, "maximize": True}],
    "Adamax": [{}, {"betas": (0.8, 0.9), "eps": 1e-4, "weight_decay": 0.1, "maximize": True}],
    "ASGD": [{}, {"lr": 0.05, "lambd": 0.01, "alpha": 0.6, "t0": 3, "weight_decay": 0.1}],
    "LBFGS": [
        {"lr": 0.5, "tolerance_grad": 1e-13, "tolerance_change": 1e-16},
        {"max_iter": 4, "history_size": 5, "line_search_fn": "strong_wolfe"},
    ],
    "Muon": [{}, {"lr": 0.05, "momentum": 0.8, "nesterov": False, "ns_steps": 3, "adjust_lr_fn": "match_rms_adamw"}],
    "NAdam": [{}, {"momentum_decay": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}],
    "RAdam": [{}, {"betas": (0.8, 0.9), "weight_decay": 0.1, "decoupled_weight_decay": True}],
    "RMSprop": [{}, {"alpha": 0.9, "weight_decay": 0.1, "momentum": 0.5, "centered": True}],
    "Rprop": [{}, {"lr": 0.02, "etas": (0.4, 1.3), "step_sizes": (1e-5, 10.0)}],
    "SGD": [
        {},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"momentum": 0.5, "dampening": 0.1},
    ],
}

_SCHEDULES: dict[str, list[dict[str, Any]]] = {
    "ConstantLR": [{"factor": 0.5, "total_iters": 7}],
    "CosineAnnealingLR": [{"T_max": 8, "eta_min": 0.01}],
    "CosineAnnealingWarmRestarts": [{"T_0": 3, "T_mult": 2}],
    "CyclicLR": [{"base_lr": 0.01, "max_lr": 0.2, "step_size_up": 3, "mode": "triangular2"}],
    "ExponentialLR": [{"gamma": 0.9}],
    "LinearLR": [{"start_factor": 0.2, "total_iters": 12}],
    "MultiStepLR": [{"milestones": [3, 11], "gamma": 0.3}],
    "OneCycleLR": [{"max_lr": 0.3, "total_steps": STEPS}, {"max_lr": 0.3, "total_steps": STEPS, "three_phase": True}],
    "PolynomialLR": [{"total_iters": 15, "power": 2.0}],
    "StepLR": [{"step_size": 6, "gamma": 0.2}],
}

Scheduler = Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]


@dataclass(frozen=True, kw_only=True)
class OptimizerCase:
    """An optimizer by the service, and the same by torch. `scheduler` None: the rate stays."""

    name: str
    dtype: torch.dtype
    ours: optim.Optimizer
    theirs: Callable[[Any], torch.optim.Optimizer]
    scheduler: Scheduler | None = None

    @property
    def evaluates_again(self) -> bool:
        """Whether an update needs the batch: gradients alone do not do."""
        return isinstance(self.ours, optim.LBFGS)

    def net(self) -> nn.Module:
        """Matrices only: Muon takes nothing else. Where ranks round apart, a search must end at the same place."""
        if self.evaluates_again:
            return nn.Sequential(nn.Linear(4, 2, bias=False)).to(self.dtype)
        return nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 2, bias=False)).to(self.dtype)


def cases(dtype: torch.dtype) -> Iterator[OptimizerCase]:
    """Optimizers with torch's defaults and with others, then schedules over SGD."""
    for name, choices in _OPTIMIZERS.items():
        for options in choices:
            yield OptimizerCase(
                name=_shown(name, options),
                dtype=dtype,
                ours=getattr(optim, name)(**options),
                theirs=lambda parameters, name=name, options=options: getattr(torch.optim, name)(parameters, **options),
            )
    for name, choices in _SCHEDULES.items():
        for options in choices:
            ours = getattr(schedule, name)(**options)
            yield _scheduled(_shown(name, options), dtype, ours, _scheduler(name, options))
    warm_up, steps = ("LinearLR", {"total_iters": 4}), ("StepLR", {"step_size": 3})
    parts = [getattr(schedule, name)(**options) for name, options in (warm_up, steps)]
    makers = [_scheduler(*each) for each in (warm_up, steps)]
    yield _scheduled(
        "SequentialLR",
        dtype,
        schedule.SequentialLR(schedulers=parts, milestones=[4]),
        lambda optimizer: lr_scheduler.SequentialLR(optimizer, [make(optimizer) for make in makers], [4]),
    )
    yield _scheduled(
        "ChainedScheduler",
        dtype,
        schedule.ChainedScheduler(schedulers=parts),
        lambda optimizer: lr_scheduler.ChainedScheduler([make(optimizer) for make in makers]),  # type: ignore[return-value]
    )


def check(client: gradwire.Client, case: OptimizerCase, ranks: int) -> Outcome:
    """Weights after all updates. Gradients are the client's own, so that those of several ranks are the same."""
    torch.manual_seed(3)
    module = case.net()
    reference = copy.deepcopy(module)
    optimizer = case.theirs(reference.parameters())
    scheduler = case.scheduler(optimizer) if case.scheduler else None
    batch = _batch(case)
    model = _create(client, case, module, ranks)
    try:
        for step in range(STEPS):
            if step == STEPS // 2:
                model = _moved(client, model, case, module, ranks)
            if case.evaluates_again:
                model.train_step(*batch)
                _search(reference, optimizer, *batch)
            else:
                # The last is left out now and then: torch leaves a parameter alone that has no gradient.
                gradients = {name: torch.randn_like(each) for name, each in module.named_parameters()}
                if step % 3 == 2:
                    del gradients["2.weight"]
                model.optimizer_step(gradients)
                for name, parameter in reference.named_parameters():
                    parameter.grad = gradients.get(name)
                optimizer.step()
            if scheduler is not None:
                scheduler.step()
        found = model.state_dict()
    except gradwire.errors.GradwireError as error:
        return Outcome(case=case, verdict="refused", detail=f"{error.reason}: {error}")
    finally:
        model.delete()
    # A search ends where the loss stays the same to its last digit, which knows half the digits of the weights.
    searched = case.evaluates_again and ranks > 1
    tolerance = torch.finfo(case.dtype).eps ** 0.5 if searched else TOLERANCE[case.dtype]
    wrong = [
        f"{name} is off by {error:.1e}"
        for name, expected in reference.state_dict().items()
        if (error := float((found[name] - expected).norm() / expected.norm())) > tolerance
    ]
    return Outcome(case=case, verdict="wrong" if wrong else "passed", detail="; ".join(wrong))


def _shown(name: str, options: dict[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={value}' for key, value in options.items())})"


def _scheduler(name: str, options: dict[str, Any]) -> Scheduler:
    return lambda optimizer: getattr(lr_scheduler, name)(optimizer, **options)


def _scheduled(name: str, dtype: torch.dtype, ours: schedule.Schedule, scheduler: Scheduler) -> OptimizerCase:
    return OptimizerCase(
        name=name,
        dtype=dtype,
        ours=optim.SGD(lr=0.1, momentum=0.9, schedule=ours),
        theirs=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        scheduler=scheduler,
    )


def _batch(case: OptimizerCase) -> tuple[Tensor, Tensor]:
    return torch.randn(7, 4, dtype=case.dtype), torch.randn(7, 2, dtype=case.dtype)


def _create(client: gradwire.Client, case: OptimizerCase, module: nn.Module, ranks: int) -> gradwire.Model:
    return client.create_model(module, loss=nn.MSELoss(), optimizer=case.ours, example=_batch(case), workers=ranks)


def _moved(
    client: gradwire.Client, model: gradwire.Model, case: OptimizerCase, module: nn.Module, ranks: int
) -> gradwire.Model:
    """A new model with the state of this one, which is deleted."""
    weights, state = model.state_dict(), model.optimizer_state_dict()
    model.delete()
    again = _create(client, case, module, ranks)
    again.load_state_dict(weights)
    again.load_optimizer_state_dict(state)
    return again


def _search(module: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    def closure() -> float:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(module(x), y)
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)

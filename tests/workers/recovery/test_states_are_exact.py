"""A model that goes on from its state is the model that never stopped, bit for bit: losses, weights, optimizer, all."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import nn

from gradwire.export import ModuleExporter
from gradwire_proto.tensors import from_any, from_nested, to_torch
from gradwire_proto.values import (
    ArchitectureSpec,
    Batch,
    ModelSpec,
    ModelUpdate,
    OptimizerSpec,
    OutputLossSpec,
    ParameterGroupSpec,
    ScheduleSpec,
    TorchLossSpec,
)

pytestmark = pytest.mark.asyncio(loop_scope="session")


@dataclass
class Command:
    """What is asked of a group, and how its model's spec changes by it."""

    run: Callable[[Any, int], Awaitable[Any]]
    change: Callable[[ModelSpec], ModelSpec] = field(default=lambda spec: spec)


def step(inputs: Any, targets: Any = None, *, lr: float | None = None) -> Command:
    batch = Batch(from_nested(inputs), from_nested(targets))
    return Command(lambda group, number: group.train_step(batch, command=number, lr=lr))


def accumulate(inputs: Any, targets: Any = None) -> Command:
    batch = Batch(from_nested(inputs), from_nested(targets))
    return Command(lambda group, number: group.forward_backward(batch, command=number))


def apply(**options: Any) -> Command:
    return Command(lambda group, number: group.optimizer_step(None, **options))


def update(**settings: Any) -> Command:
    asked = ModelUpdate(**settings)

    def change(spec: ModelSpec) -> ModelSpec:
        optimizer = asked.optimizer or spec.optimizer
        if optimizer is not None and asked.lr is not None:
            optimizer = optimizer.with_learning_rate(asked.lr)
        return replace(spec, optimizer=optimizer)

    return Command(lambda group, _: group.update(asked), change)


ZERO = Command(lambda group, _: group.zero_grad())


def rows(*counts: int, width: int = 10, classes: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(count, width), torch.randint(0, classes, (count,))) for count in counts]


def mlp(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(10, 16), *middle, nn.ReLU(), nn.Linear(16, 3))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class OwnLoss(nn.Module):
    """Returns its loss: a mean over the targets that are not ignored, which training turns into other numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(10, 3)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x, y):
        self.seen.add_(1)
        logits = self.linear(x)
        self.scratch.mul_(0.5).add_(1.0)
        return nn.functional.cross_entropy(logits + self.scratch, y, ignore_index=2), logits


def sgd(make: Any) -> tuple[Any, list[Command]]:
    batches = rows(32, 7, 5, 32, 1, 13)
    made = make(mlp(), nn.CrossEntropyLoss(), *batches[0])
    return made, [step(*batch) for batch in batches]


def adam_with_dropout(make: Any) -> tuple[Any, list[Command]]:
    batches = rows(32, 7, 5, 32, 9, 13)
    optimizer = OptimizerSpec("Adam", {"lr": 0.01, "amsgrad": True, "weight_decay": 0.01})
    made = make(mlp(nn.Dropout(0.3)), nn.CrossEntropyLoss(), *batches[0], optimizer=optimizer, seed=5)
    return made, [step(*batch) for batch in batches]


def batch_norm(make: Any) -> tuple[Any, list[Command]]:
    batches = rows(32, 7, 5, 32, 9)
    made = make(mlp(nn.BatchNorm1d(16)), nn.CrossEntropyLoss(), *batches[0])
    moves = Command(lambda group, n: group.forward(from_any(batches[1][0]), training=True, seed=None, command=n))
    return made, [step(*batches[0]), moves, *(step(*batch) for batch in batches[1:])]


def batch_norm_of_own_rows(make: Any) -> tuple[Any, list[Command]]:
    made, commands = batch_norm(make)
    return (replace(made[0], sync_batch_norm=False), *made[1:]), commands


def recurrent(make: Any) -> tuple[Any, list[Command]]:
    batches = [(torch.randn(count, 5, 4), torch.randint(0, 3, (count,))) for count in (6, 7, 4, 9)]
    made = make(Recurrent(), nn.CrossEntropyLoss(), *batches[0], optimizer=OptimizerSpec("RMSprop", {"momentum": 0.5}))
    return made, [step(*batch) for batch in batches]


def composed_schedule(make: Any) -> tuple[Any, list[Command]]:
    parts = (
        ScheduleSpec("LinearLR", {"start_factor": 0.1, "total_iters": 3}),
        ScheduleSpec(
            "ChainedScheduler",
            {},
            (ScheduleSpec("ExponentialLR", {"gamma": -0.9}), ScheduleSpec("StepLR", {"step_size": 2})),
        ),
    )
    schedule = ScheduleSpec("SequentialLR", {"milestones": [3]}, (parts[0], parts[1].schedulers[0]))
    optimizer = OptimizerSpec("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}, schedule=schedule)
    batches = rows(*[8] * 7)
    return make(mlp(), nn.CrossEntropyLoss(), *batches[0], optimizer=optimizer), [step(*each) for each in batches]


def chained_schedule(make: Any) -> tuple[Any, list[Command]]:
    parts = (ScheduleSpec("ExponentialLR", {"gamma": 0.9}), ScheduleSpec("StepLR", {"step_size": 2}))
    optimizer = OptimizerSpec("AdamW", {"lr": 0.1}, schedule=ScheduleSpec("ChainedScheduler", {}, parts))
    batches = rows(*[8] * 7)
    return make(mlp(), nn.CrossEntropyLoss(), *batches[0], optimizer=optimizer), [step(*each) for each in batches]


def one_cycle(make: Any) -> tuple[Any, list[Command]]:
    schedule = ScheduleSpec("OneCycleLR", {"max_lr": 0.1, "total_steps": 12})
    groups = (ParameterGroupSpec("0.*", {"weight_decay": 0.1}),)
    optimizer = OptimizerSpec("Adam", {"lr": 0.1}, groups, schedule)
    batches = rows(*[8] * 7)
    return make(mlp(), nn.CrossEntropyLoss(), *batches[0], optimizer=optimizer), [step(*each) for each in batches]


def plateau(make: Any) -> tuple[Any, list[Command]]:
    schedule = ScheduleSpec("ReduceLROnPlateau", {"patience": 1, "cooldown": 1})
    optimizer = OptimizerSpec("SGD", {"lr": 0.5}, schedule=schedule)
    batches = rows(*[8] * 8)
    return make(mlp(), nn.CrossEntropyLoss(), *batches[0], optimizer=optimizer), [step(*each) for each in batches]


def warm_restarts(make: Any) -> tuple[Any, list[Command]]:
    schedule = ScheduleSpec("CosineAnnealingWarmRestarts", {"T_0": 2, "T_mult": 2})
    optimizer = OptimizerSpec("SGD", {"lr": 0.5}, schedule=schedule)
    batches = rows(*[8] * 8)
    return make(mlp(), nn.CrossEntropyLoss(), *batches[0], optimizer=optimizer), [step(*each) for each in batches]


def cyclic(make: Any) -> tuple[Any, list[Command]]:
    options = {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3, "mode": "triangular2"}
    optimizer = OptimizerSpec("SGD", {"lr": 0.5, "momentum": 0.9}, schedule=ScheduleSpec("CyclicLR", options))
    batches = rows(*[8] * 8)
    return make(mlp(), nn.CrossEntropyLoss(), *batches[0], optimizer=optimizer), [step(*each) for each in batches]


def half_with_overflow(make: Any) -> tuple[Any, list[Command]]:
    batches = rows(8, 7, 8, 5, 8, 8)
    # Scaled by 65536, its gradients overflow: the scale is halved, and the step skipped.
    batches[1] = (batches[1][0] * 3e4, batches[1][1])
    made = make(mlp(), nn.CrossEntropyLoss(), *batches[0], precision="fp16")
    return made, [step(*batch) for batch in batches]


def brain_floats(make: Any) -> tuple[Any, list[Command]]:
    batches = rows(8, 7, 8, 5, 8)
    optimizer = OptimizerSpec("Adam", {"lr": 0.01})
    made = make(mlp(nn.Dropout(0.1)), nn.CrossEntropyLoss(), *batches[0], precision="bf16", optimizer=optimizer)
    return made, [step(*batch) for batch in batches]


def clipped(make: Any) -> tuple[Any, list[Command]]:
    batches = rows(8, 7, 8, 5, 8)
    made = make(mlp(), nn.CrossEntropyLoss(), *batches[0], clip_grad_norm=0.1, clip_grad_value=0.01)
    return made, [step(*batch) for batch in batches]


def accumulated(make: Any) -> tuple[Any, list[Command]]:
    batches = rows(8, 7, 8, 5, 3)
    commands = []
    for index in range(0, 4, 2):
        commands += [accumulate(*batches[index]), accumulate(*batches[index + 1]), apply(), accumulate(*batches[4])]
        commands += [apply(), ZERO]
    return make(mlp(nn.Dropout(0.2)), nn.CrossEntropyLoss(), *batches[0]), commands


def frozen_and_unfrozen(make: Any) -> tuple[Any, list[Command]]:
    batches = rows(8, 7, 8, 5, 8, 8, 8)
    steps = [step(*batch) for batch in batches]
    groups = (ParameterGroupSpec("2.*", {"lr": 0.02}),)
    made = make(mlp(), nn.CrossEntropyLoss(), *batches[0], optimizer=OptimizerSpec("Adam", {"lr": 0.01}, groups))
    return made, [
        *steps[:2],
        update(trainable=(("2.*", False),)),
        *steps[2:4],
        update(lr=0.05),
        accumulate(*batches[0]),
        steps[4],
        update(trainable=(("*", True),)),
        *steps[5:],
    ]


def begun_frozen(make: Any) -> tuple[Any, list[Command]]:
    """An optimizer that takes parameters in later, and one that is replaced."""
    batches = rows(8, 7, 8, 5, 8, 8, 8)
    steps = [step(*batch) for batch in batches]
    made = make(mlp(), nn.CrossEntropyLoss(), *batches[0], optimizer=OptimizerSpec("Adagrad", {"lr": 0.1}))
    return made, [
        update(trainable=(("0.weight", False),), optimizer=OptimizerSpec("Adam", {"lr": 0.01})),
        *steps[:2],
        update(trainable=(("0.weight", True),)),
        *steps[2:4],
        update(optimizer=OptimizerSpec("SGD", {"lr": 0.1, "momentum": 0.9})),
        *steps[4:],
    ]


def options_of_groups(make: Any) -> tuple[Any, list[Command]]:
    batches = rows(8, 7, 8, 5, 8)
    commands = [step(*batches[0]), accumulate(*batches[1]), apply(groups=[{"lr": 0.3, "momentum": 0.2}]), ZERO]
    commands += [step(*batches[2], lr=0.7), step(*batches[3]), update(lr=0.01), step(*batches[4])]
    return make(mlp(), nn.CrossEntropyLoss(), *batches[0]), commands


def line_search(make: Any) -> tuple[Any, list[Command]]:
    batches = rows(16, 16, 16, 15)
    optimizer = OptimizerSpec("LBFGS", {"max_iter": 4, "history_size": 3, "line_search_fn": "strong_wolfe"})
    made = make(mlp(), nn.CrossEntropyLoss(), *batches[0], optimizer=optimizer)
    return made, [step(*batch) for batch in batches]


def own_loss(make: Any) -> tuple[Any, list[Command]]:
    batches = [(batch,) for batch in rows(12, 7, 9, 12, 11)]
    made = make(OwnLoss(), None, batches[0][0])
    spec = replace(made[0], loss=OutputLossSpec(0))
    return (spec, *made[1:]), [step(*batch) for batch in batches]


def class_weights(make: Any) -> tuple[Any, list[Command]]:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(10, 3)
            self.register_buffer("of:classes", torch.tensor([1.0, 2.0, 0.5]))

        def forward(self, x, y):
            return nn.functional.cross_entropy(self.linear(x), y, weight=self.get_buffer("of:classes"))

    batches = [(batch,) for batch in rows(12, 7, 9, 12)]
    made = make(Weighted(), None, batches[0][0])
    return (replace(made[0], loss=OutputLossSpec(0)), *made[1:]), [step(*batch) for batch in batches]


def given_weight(make: Any) -> tuple[Any, list[Command]]:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(10, 1)

        def forward(self, x, mask):
            return (self.linear(x)[:, 0].square() * mask).sum() / mask.sum()

    del make
    batches = [((torch.randn(count, 10), torch.rand(count)),) for count in (12, 7, 9, 12)]
    exporter = ModuleExporter(Masked(), None, loss_weight=lambda inputs: inputs[1].sum())
    exported = exporter.export_model(batches[0][0], None)
    spec = ModelSpec(
        program=exported.program, loss=OutputLossSpec(0), optimizer=OptimizerSpec("SGD", {"lr": 0.1}), device="cpu"
    )
    tensors = {name: from_any(tensor) for name, tensor in exported.tensors.items()}
    return (spec, tensors, Batch(from_nested(batches[0][0]))), [step(*batch) for batch in batches]


def said_to_be_a_sum(make: Any) -> tuple[Any, list[Command]]:
    def loss(outputs, targets):
        return (outputs - targets).square().sum()

    batches = [(torch.randn(count, 10), torch.randn(count, 3)) for count in (12, 7, 9)]
    return make(mlp(), loss, *batches[0], loss_reduction="sum"), [step(*batch) for batch in batches]


def added_variant(make: Any) -> tuple[Any, list[Command]]:
    module, loss = Recurrent(), nn.CrossEntropyLoss()
    short = [(torch.randn(count, 5, 4), torch.randint(0, 3, (count,))) for count in (6, 7)]
    long = [(torch.randn(count, 8, 4), torch.randint(0, 3, (count,))) for count in (6, 7)]
    made = make(module, loss, *short[0])
    added = ModuleExporter(module, loss).export_variant(*long[0], training=True, name="train-8")

    def change(spec: ModelSpec) -> ModelSpec:
        program: Any = spec.program
        operators = {**program.operators, **added.operators}
        tensors = (*program.tensors, *added.tensors)
        return replace(
            spec,
            program=replace(program, variants=(*program.variants, added.variant), tensors=tensors, operators=operators),
        )

    add = Command(
        lambda group, _: group.add_variant(
            added.variant,
            tensors=added.tensors,
            values={name: from_any(value) for name, value in added.values.items()},
            operators=added.operators,
            example=Batch(from_nested(long[0][0]), from_nested(long[0][1])),
        ),
        change,
    )
    return made, [step(*short[0]), add, step(*long[0]), step(*short[1]), step(*long[1]), step(*short[0])]


def architecture(make: Any) -> tuple[Any, list[Command]]:
    """Dropout, batch norm, and batches of a kind that was not there at first."""
    del make
    config: Any = {
        "layers": [
            {"name": "torch.nn.Linear", "config": {"in_features": 10, "out_features": 16}},
            {"name": "torch.nn.BatchNorm1d", "config": {"num_features": 16}},
            {"name": "torch.nn.Dropout", "config": {"p": 0.3}},
            {"name": "torch.nn.Linear", "config": {"in_features": 16, "out_features": 3}},
        ]
    }
    spec = ModelSpec(
        program=ArchitectureSpec(name="torch.nn.Sequential", config=config),
        loss=TorchLossSpec("cross_entropy"),
        optimizer=OptimizerSpec("Adam", {"lr": 0.01}),
        device="cpu",
        seed=3,
    )
    batches = rows(12, 7, 9, 12)
    example = Batch(from_any(batches[0][0]), from_any(batches[0][1]))
    soft = [(x, torch.randn(len(x), 3).softmax(1)) for x, _ in batches[:2]]
    steps = [step(*batch) for batch in batches]
    return (spec, {}, example), [*steps[:2], step(*soft[0]), steps[2], step(*soft[1]), steps[3]]


CASES = [
    (sgd, 1, 2, 3),
    (adam_with_dropout, 1, 3),
    (batch_norm, 1, 2),
    (batch_norm_of_own_rows, 2),
    (recurrent, 2),
    (composed_schedule, 1),
    (chained_schedule, 2),
    (one_cycle, 1),
    (plateau, 2),
    (warm_restarts, 1),
    (cyclic, 1),
    (half_with_overflow, 1, 2),
    (brain_floats, 3),
    (clipped, 2),
    (accumulated, 1, 2, 3),
    (frozen_and_unfrozen, 2),
    (begun_frozen, 2),
    (options_of_groups, 1),
    (line_search, 1, 2),
    (own_loss, 1, 3),
    (class_weights, 2),
    (given_weight, 3),
    (said_to_be_a_sum, 1, 2),
    (added_variant, 2),
    (architecture, 1, 3),
]
"""Each with its numbers of ranks: one of them for what ranks all do alike, as schedules do."""


def told(result: Any) -> Any:
    """What a command answered, in bits."""
    names = ("loss", "step", "lr", "grad_norm", "skipped", "loss_scale", "rank_rows")
    found = [getattr(result, name, None) for name in names]
    return [each.hex() if isinstance(each, float) else each for each in found]


@pytest.mark.parametrize(
    ("case", "workers"),
    [(case, workers) for case, *numbers in CASES for workers in numbers],
    ids=lambda each: getattr(each, "__name__", str(each)),
)
async def test_a_model_goes_on_from_its_state_as_if_it_had_never_stopped(start, bits, drop, make_spec, case, workers):
    torch.manual_seed(7)
    (spec, tensors, example), commands = case(make_spec)
    spec = replace(spec, workers=workers)
    group = await start((spec, tensors, example))
    expected = [told(await command.run(group, number)) for number, command in enumerate(commands, 1)]
    sharding, last = group.sharding, bits(await group.state())
    assert group.applied == len(commands)
    await group.close()

    chance = random.Random(f"{case.__name__} {workers}")
    stops = set(chance.sample(range(1, len(commands)), len(commands) // 2))
    group, found = await start((spec, tensors, example)), []
    for number, command in enumerate(commands, 1):
        found.append(told(await command.run(group, number)))
        spec = command.change(spec)
        if number in stops:
            state = await group.state()
            await group.close()
            group = await start((spec, tensors, None), state=state)
            assert group.applied == 0
            drop(state)
    assert found == expected
    assert bits(await group.state()) == last
    assert group.sharding == sharding


@pytest.mark.parametrize(
    ("case", "key"),
    [
        (own_loss, "ne:2:1:0:"),
        (class_weights, "ne:-100:1:0:of:classes"),
        (given_weight, "given"),
        (said_to_be_a_sum, "sum"),
    ],
    ids=lambda each: getattr(each, "__name__", each),
)
async def test_what_rows_weigh_in_a_loss_is_taken_over_and_not_tried_again(start, drop, make_spec, case, key):
    torch.manual_seed(7)
    (spec, tensors, example), commands = case(make_spec)
    spec = replace(spec, workers=2)
    group = await start((spec, tensors, example))
    state = await group.state()
    assert state.splits["train"].weight == key
    await group.close()
    other = await start((spec, tensors, None), state=state)
    drop(state)
    result = await commands[0].run(other, 1)
    assert result.rank_rows == (6, 6)


async def test_a_state_of_one_rank_goes_on_on_two_and_says_that_batches_are_not_split(start, drop, make_spec):
    (spec, tensors, example), commands = accumulated(make_spec)
    group = await start((spec, tensors, example))
    results = [await command.run(group, number) for number, command in enumerate(commands[:2], 1)]
    state = await group.state()
    other = await start((replace(spec, workers=2), tensors, None), state=state)
    drop(state)
    assert other.sharding.mode == "whole"
    assert (await commands[2].run(other, 3)).step == results[-1].step + 1


async def test_a_state_of_two_ranks_with_gradients_that_are_held_goes_on_on_one(start, drop, make_spec):
    (spec, tensors, example), commands = accumulated(make_spec)
    group = await start((replace(spec, workers=2), tensors, example))
    for number, command in enumerate(commands[:2], 1):
        await command.run(group, number)
    state = await group.state()
    expected, _ = await group.retained.held_gradients(None)
    await group.close()
    other = await start((spec, tensors, None), state=state)
    drop(state)
    found, _ = await other.retained.held_gradients(None)
    for name, gradient in expected.items():
        assert torch.allclose(to_torch(found[name]), to_torch(gradient), rtol=1e-6, atol=1e-8)

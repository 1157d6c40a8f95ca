"""Low precision, and settings changed between steps, through a real service: beside the plain loop."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradwire
from gradwire import errors, optim


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    torch.manual_seed(0)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def batch(size: float = 1.0) -> tuple[Tensor, Tensor]:
    return torch.randn(8, 6) * size, torch.randint(3, (8,))


@pytest.mark.parametrize(("precision", "workers"), [("bf16", 2), ("fp16", 1), ("fp16", 2)])
def test_autocast_and_loss_scale_are_those_of_the_plain_loop(
    precision: str, workers: int, client: gradwire.Client
) -> None:
    module = net()
    twin = copy.deepcopy(module)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    data = [batch(size) for size in (1, 500, 1)]
    model = client.create_model(
        module,
        loss=nn.CrossEntropyLoss(),
        optimizer=optim.SGD(lr=0.01),
        example=data[0],
        workers=workers,
        precision=precision,
    )
    info = model.info()
    assert info.precision == precision
    assert info.sharding is not None and info.sharding.mode == "rows"
    skipped = []
    for x, y in data:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16 if precision == "bf16" else torch.float16):
            loss = F.cross_entropy(twin(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        result = model.train_step(x, y)
        assert result.loss == pytest.approx(loss.item(), rel=1e-6 if workers == 1 else 2e-2)
        assert result.loss_scale == (scaler.get_scale() if precision == "fp16" else None)
        skipped.append(result.skipped)
    assert skipped == [False, precision == "fp16", False]
    assert result.step == 3 - sum(skipped)
    if precision == "fp16":
        assert model.optimizer_state_dict()["scaler"] == scaler.state_dict()
    tolerance = 1e-6 if workers == 1 else 1e-2
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name], rtol=tolerance, atol=tolerance)


def test_outputs_come_in_the_type_that_autocast_gives_them(client: gradwire.Client) -> None:
    module, (x, y) = net(), batch()
    model = client.create_model(module, loss="cross_entropy", example=(x, y), precision="bf16")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = module(x)
    assert torch.equal(model(x), expected) and expected.dtype is torch.bfloat16


def test_autocast_around_the_call_that_creates_a_model_is_no_part_of_it(client: gradwire.Client) -> None:
    module, (x, y) = net(), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model = client.create_model(module, loss="cross_entropy", example=(x, y))
    torch.testing.assert_close(model(x), module(x))


@pytest.mark.parametrize("precision", ["half", "", "BF16"])
def test_unknown_precision_is_refused_by_name(precision: str, client: gradwire.Client) -> None:
    with pytest.raises(errors.InvalidArgument, match="bf16") as caught:
        client.create_model(net(), loss="cross_entropy", example=batch(), precision=precision)
    assert caught.value.field == "model.precision"


@pytest.mark.parametrize("workers", [1, 2])
def test_settings_changed_half_way_train_as_the_plain_loop_does(workers: int, client: gradwire.Client) -> None:
    module, data = net().double(), [batch() for _ in range(6)]
    twin = copy.deepcopy(module)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.05, weight_decay=0.1)
    model = client.create_model(
        module,
        loss="cross_entropy",
        optimizer=optim.AdamW(lr=0.05, weight_decay=0.1),
        example=(data[0][0].double(), data[0][1]),
        workers=workers,
        labels={"stage": "first"},
    )
    futures = []
    for index, (x, y) in enumerate(data):
        if index == 3:
            twin[0].requires_grad_(False)
            optimizer.param_groups[0]["lr"] = 0.01
            changed = model.futures.update(lr=0.01, trainable={"0.*": False}, labels={"stage": "second"})
        optimizer.zero_grad()
        F.cross_entropy(twin(x.double()), y).backward()
        optimizer.step()
        futures.append(model.futures.train_step(x.double(), y))
    assert [future.result().step for future in futures] == [1, 2, 3, 4, 5, 6]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name], rtol=1e-10, atol=1e-12)
    info = changed.result()
    assert info.labels == {"stage": "second"}
    assert {each.name for each in info.tensors if each.requires_grad} == {"2.weight", "2.bias"}
    assert info.optimizer is not None and info.optimizer.options["lr"] == 0.01
    assert model.compute_gradients(data[0][0].double(), data[0][1]).gradients.keys() == {"2.weight", "2.bias"}
    assert model.info() == info.__class__(**{**{name: getattr(info, name) for name in info.__slots__}, "step": 6})


@pytest.fixture(scope="module")
def without_optimizer(client: gradwire.Client) -> Iterator[gradwire.Model]:
    model = client.create_model(net(), loss="cross_entropy", example=batch())
    yield model
    model.delete()


@pytest.mark.parametrize(
    ("changes", "kind", "reason", "field"),
    [
        ({}, errors.InvalidArgument, "NOTHING_TO_UPDATE", None),
        ({"lr": -0.1}, errors.InvalidArgument, "OPTIMIZER_ARGUMENT_INVALID", "lr"),
        ({"optimizer": torch.optim.SGD}, errors.InvalidArgument, "OPTIMIZER_UNKNOWN", "optimizer"),
        ({"trainable": ["0.*"]}, errors.InvalidArgument, "ARGUMENT_TYPE_INVALID", "trainable"),
        ({"trainable": {"0.*": 0}}, errors.InvalidArgument, "ARGUMENT_TYPE_INVALID", 'trainable["0.*"]'),
        ({"trainable": {"0.wieght": False}}, errors.InvalidArgument, "NO_MATCH", 'trainable["0.wieght"]'),
        ({"labels": {"a": 1}}, errors.InvalidArgument, "ARGUMENT_TYPE_INVALID", 'labels["a"]'),
        ({"labels": {"a": "x" * 64}}, errors.InvalidArgument, "LABEL_TOO_LONG", 'labels.labels["a"]'),
        ({"lr": 0.5, "labels": {"a": "b"}}, errors.FailedPrecondition, "NO_OPTIMIZER", None),
        ({"optimizer": optim.Muon(), "labels": {"a": "b"}}, errors.InvalidArgument, "OPTIMIZER_UNFIT", "optimizer"),
    ],
)
def test_update_that_cannot_be_is_refused_and_changes_nothing(
    changes: dict[str, Any],
    kind: type[errors.GradwireError],
    reason: str,
    field: str | None,
    without_optimizer: gradwire.Model,
) -> None:
    before = without_optimizer.info()
    with pytest.raises(kind) as caught:
        without_optimizer.update(**changes)
    assert (caught.value.reason, caught.value.field, caught.value.outcome) == (reason, field, "not_applied")
    after = without_optimizer.info()
    assert (after.labels, after.optimizer, after.tensors) == (before.labels, before.optimizer, before.tensors)

"""Each example's own gradients: plain torch's, one example at a time, however they are computed and where."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradwire.export import ModuleExporter
from gradwire_proto.errors import InvalidArgument, ResourceExhausted
from gradwire_proto.values import GradientQuery, ModelSpec
from gradwire_workers.shard import Shard
from gradwire_workers.trainer import Trainer
from gradwire_workers.training import per_example
from gradwire_workers.training.seeds import mixed_seed


class Slope(torch.autograd.Function):
    """Its backward is seven times too large: differentiating the forward would show."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 14 * ctx.saved_tensors[0]


class Net(nn.Module):
    """Rows, and `shift`, which has none; `unused` has no part in the loss."""

    def __init__(self, middle: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)
        self.middle = middle if isinstance(middle, nn.Module) else None
        self.function = middle if self.middle is None else None
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        hidden = self.first(x) + shift
        if self.middle is not None:
            hidden = self.middle(hidden)
        if self.function is not None:
            hidden = self.function(hidden)
        return self.last(hidden)


class PowerIteration(nn.Module):
    """Every forward in training mode moves a buffer that it computes with."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.scale.mul_(0.9).add_(x.detach().abs().mean())
        return x * self.scale


class OneValue(nn.Module):
    """Batch norm over the only value that an example has for each channel, or over several."""

    def __init__(self, values: int) -> None:
        super().__init__()
        self.values = values
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(1, self.values + 1, dtype=x.dtype)
        return self.norm(x.unsqueeze(-1) * steps).mean(-1) if self.values > 1 else self.norm(x)


def batch(rows: int) -> tuple[dict[str, Tensor], Tensor]:
    return {"x": torch.randn(rows, 6).double(), "shift": torch.randn(5).double()}, torch.randint(3, (rows,))


def weighted() -> nn.Module:
    return nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]).double(), ignore_index=2)


def expected(
    module: nn.Module, loss: Any, inputs: dict[str, Tensor], targets: Tensor, *, training: bool = True, seed: int = 0
) -> dict[str, Tensor]:
    rows = []
    for row in range(len(targets)):
        alone = copy.deepcopy(module).train(training)
        torch.manual_seed(seed if row == 0 else mixed_seed(seed, row))
        value = loss(alone(inputs["x"][row : row + 1], inputs["shift"]), targets[row : row + 1])
        found = torch.autograd.grad(value, list(alone.parameters()), allow_unused=True, materialize_grads=True)
        rows.append(found)
    names = [name for name, _ in module.named_parameters()]
    return {name: torch.stack([row[index] for row in rows]) for index, name in enumerate(names)}


def gradients(group: Any, inputs: Any, targets: Any, **query: Any) -> dict[str, Tensor]:
    group.compute_gradients(inputs, targets, per_example=True, **query)
    reports = group.reports
    used = reports[:1] if group.whole[next(iter(group.whole))] else reports
    return {name: torch.cat([report.gradients[name] for report in used]) for name in reports[0].gradients}


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("rows", [7, 2, 1])
def test_gradients_of_examples_equal_torchs_one_at_a_time(ranks, rows, make_group, assert_close) -> None:
    module = Net(nn.Tanh()).double()
    inputs, targets = batch(rows)
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    group = make_group(module, loss, batch(4), ranks=ranks)
    found = gradients(group, inputs, targets)
    assert_close(found, expected(module, loss, inputs, targets), tolerance=1e-10)
    assert sum(group.rank_rows()) == rows and max(group.rank_rows()) <= -(-rows // ranks)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "middle", [OneValue(3), PowerIteration(), nn.Dropout(0.5), Slope.apply], ids=lambda each: type(each).__name__
)
def test_rows_that_cannot_be_computed_together_are_as_exact(ranks, middle, make_group, assert_close) -> None:
    module = Net(middle).double()
    inputs, targets = batch(5)
    group = make_group(module, F.cross_entropy, batch(4), ranks=ranks)
    before = group.state_dict()
    found = gradients(group, inputs, targets, seed=5)
    assert_close(found, expected(module, F.cross_entropy, inputs, targets, seed=5), tolerance=1e-10)
    for name, tensor in group.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} has moved"


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), lambda outputs, targets: F.cross_entropy(outputs, targets)])
def test_rows_are_computed_together_where_operators_allow_it(loss, monkeypatch, assert_close) -> None:
    monkeypatch.setattr(per_example._Rows, "one_by_one", None)  # Whoever calls it would fail.
    module = Net(nn.Sequential(nn.LayerNorm(5), nn.GELU())).double()
    inputs, targets = batch(70)
    exported = ModuleExporter(module, loss).export_model(*batch(4))
    state = {name: tensor.detach().clone() for name, tensor in exported.tensors.items()}
    trainer = Trainer(spec=ModelSpec(program=exported.program, loss=exported.loss), state=state)
    leaves = (inputs["x"], inputs["shift"])
    shard = Shard(variant="train", rows=70, start=0, stop=70, whole=True, inputs=leaves, targets=(targets,))
    report = trainer.compute_gradients(shard, GradientQuery(per_example=True))
    assert_close(report.gradients, expected(module, loss, inputs, targets), tolerance=1e-10)
    values = [loss(module(inputs["x"][i : i + 1], inputs["shift"]), targets[i : i + 1]).item() for i in range(70)]
    assert report.loss == pytest.approx(sum(values), rel=1e-10)


def test_batch_norm_over_one_value_is_refused_in_training_and_works_in_eval_mode(make_group, assert_close) -> None:
    module = Net(OneValue(1)).double()
    inputs, targets = batch(4)
    group = make_group(module, F.cross_entropy, batch(4))
    with pytest.raises(InvalidArgument) as caught:
        gradients(group, inputs, targets)
    assert caught.value.reason == "BATCH_TOO_SMALL"
    found = gradients(group, inputs, targets, training=False)
    assert_close(found, expected(module, F.cross_entropy, inputs, targets, training=False), tolerance=1e-10)


def test_class_weights_and_ignored_targets_are_each_examples_own(make_group) -> None:
    module = Net().double()
    inputs, targets = batch(6)
    targets[1] = 2
    found = gradients(make_group(module, weighted(), batch(4)), inputs, targets)
    wanted = expected(module, weighted(), inputs, targets)
    for name, gradient in found.items():
        # Where every target is ignored, torch's mean is none.
        assert torch.allclose(gradient, wanted[name], atol=1e-12, equal_nan=True), name


def test_parameters_are_chosen_by_name_and_converted(make_group, assert_close) -> None:
    module = Net().double()
    inputs, targets = batch(3)
    group = make_group(module, F.cross_entropy, batch(4))
    found = gradients(group, inputs, targets, wrt=("last.*",), gradient_dtype="float32")
    assert {name: each.dtype for name, each in found.items()} == dict.fromkeys(
        ("last.weight", "last.bias"), torch.float32
    )
    wanted = expected(module, F.cross_entropy, inputs, targets)
    assert_close({n: t.double() for n, t in found.items()}, {n: wanted[n] for n in found}, tolerance=1e-6)


def test_a_target_out_of_range_is_named_though_rows_are_computed_together(make_group) -> None:
    inputs, targets = batch(4)
    targets[2] = 3
    with pytest.raises(InvalidArgument) as caught:
        gradients(make_group(Net().double(), nn.CrossEntropyLoss(), batch(4), ranks=1), inputs, targets)
    assert (caught.value.reason, caught.value.field) == ("TARGET_OUT_OF_RANGE", "batch.targets")


def test_gradients_of_too_many_examples_are_refused_before_they_are_computed() -> None:
    with pytest.raises(
        ResourceExhausted, match="4000 examples have 1600000 bytes; the limit `tensor_bytes` is 1000000"
    ):
        per_example._check_size(4000, [torch.ones(100)], 1_000_000)
    per_example._check_size(2500, [torch.ones(100)], 1_000_000)

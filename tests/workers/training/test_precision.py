"""bf16 and fp16 against the plain loop: torch.autocast around forward and loss, torch.amp.GradScaler for fp16."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradwire_proto.errors import InvalidArgument
from gradwire_proto.values import OptimizerSpec, ScheduleSpec

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ROUGH = {"bf16": 4e-2, "fp16": 5e-3}
"""How far two ranks may be from one: they round in other shapes."""


class RmsNorm(nn.Module):
    """Reads types in Python: float32 inside, and back to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.weight = nn.Linear(6, 8), nn.Linear(8, 3), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        wide = h.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.last(self.weight.to(h.dtype) * wide.to(h.dtype))


class OwnRegion(nn.Module):
    """Turns autocast off for a part of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        with torch.autocast("cpu", enabled=False):
            h = F.linear(h.float(), self.middle.weight)
        return self.last(torch.tanh(h))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.last = nn.LSTM(3, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.lstm(x.view(-1, 2, 3))[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.attention, self.last = (
            nn.Linear(3, 8),
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x.view(-1, 2, 3))
        return self.last(self.attention(h, h, h, need_weights=False)[0].mean(1))


class Twice(torch.autograd.Function):
    """A backward of its own, which is not the forward's derivative; in the types of the forward's region."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return 2 * gradient @ weight.T, 3 * x.T @ gradient


class WithFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.last = nn.Parameter(torch.randn(6, 8) / 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(Twice.apply(x, self.weight)))  # type: ignore[arg-type]


MODULES: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 3)),
    "batch norm": lambda: nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    ),
    "types read in Python": RmsNorm,
    "a region of its own": OwnRegion,
    "recurrent": Recurrent,
    "attention": Attention,
    "custom function": WithFunction,
}


def scaled_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """No loss that the service knows by name."""
    return (F.log_softmax(outputs, -1).gather(1, targets[:, None]) * -1.5).mean()


def batches(count: int, rows: int = 7) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(rows, 6), torch.randint(3, (rows,))) for _ in range(count)]


class PlainLoop:
    """What a user writes without a service."""

    def __init__(
        self, module: nn.Module, loss: Any, precision: str, *, lr: float = 0.1, clip: float | None = None
    ) -> None:
        self.module, self.loss, self.clip, self.dtype = copy.deepcopy(module), loss, clip, TYPES[precision]
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=lr, momentum=0.9)
        self.scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
        self.norm: float | None = None

    def backward(self, x: Tensor, y: Tensor) -> float:
        with torch.autocast("cpu", dtype=self.dtype):
            loss = self.loss(self.module(x), y)
        self.scaler.scale(loss).backward()
        return loss.item()

    def step(self) -> None:
        self.scaler.unscale_(self.optimizer)
        if self.clip is not None:
            self.norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.clip).item()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def train_step(self, x: Tensor, y: Tensor) -> float:
        self.optimizer.zero_grad()
        loss = self.backward(x, y)
        self.step()
        return loss


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: each.detach() for name, each in module.state_dict().items()}


@pytest.mark.parametrize(
    ("kind", "precision"),
    # torch has no float16 LSTM on CPUs.
    [*((kind, "bf16") for kind in MODULES), *((kind, "fp16") for kind in ("mlp", "types read in Python", "attention"))],
)
def test_one_rank_computes_what_the_plain_loop_does_under_autocast(
    kind: str, precision: str, make_group: Any, assert_close: Any
) -> None:
    module, data = MODULES[kind](), batches(4)
    loop = PlainLoop(module, nn.CrossEntropyLoss(), precision)
    group = make_group(module, nn.CrossEntropyLoss(), data[0], ranks=1, precision=precision)
    for x, y in data:
        assert group.train_step(x, y) == loop.train_step(x, y)
    assert_close(group.state_dict(), state_of(loop.module), tolerance=1e-7)
    assert all(each.dtype is torch.float32 for each in group.state_dict().values() if each.is_floating_point())


@pytest.mark.parametrize(
    ("kind", "loss", "precision"),
    [
        ("batch norm", nn.CrossEntropyLoss(), "bf16"),
        ("batch norm", nn.CrossEntropyLoss(), "fp16"),
        ("types read in Python", nn.CrossEntropyLoss(), "bf16"),
        ("attention", scaled_loss, "bf16"),
        ("custom function", scaled_loss, "fp16"),
    ],
)
def test_two_ranks_agree_with_the_plain_loop_within_the_type_and_split_the_rows(
    kind: str, loss: Any, precision: str, make_group: Any, assert_close: Any
) -> None:
    module, data = MODULES[kind](), batches(3)
    loop = PlainLoop(module, loss, precision)
    group = make_group(module, loss, data[0], ranks=2, precision=precision)
    assert group.whole["train"] is None
    for x, y in data:
        expected = loop.train_step(x, y)
        assert group.train_step(x, y) == pytest.approx(expected, rel=ROUGH[precision])
        assert sorted(group.rank_rows()) == [3, 4]
    assert_close(group.state_dict(), state_of(loop.module), tolerance=ROUGH[precision])


def test_rows_that_depend_on_each_other_are_found_at_low_precision(make_group: Any) -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.linear(x)
            return h - 0.01 * h.mean(0)

    group = make_group(Centred(), nn.CrossEntropyLoss(), batches(1)[0], ranks=2, precision="bf16")
    assert group.whole["train"] is not None


def test_float64_is_not_cast(make_group: Any, assert_close: Any) -> None:
    module, (x, y) = nn.Linear(6, 3).double(), batches(1)[0]
    loop = PlainLoop(module, nn.CrossEntropyLoss(), "bf16")
    group = make_group(module, nn.CrossEntropyLoss(), (x.double(), y), ranks=1, precision="bf16")
    assert group.train_step(x.double(), y) == loop.train_step(x.double(), y)
    assert_close(group.state_dict(), state_of(loop.module), tolerance=1e-15)


# --- the loss scale -----------------------------------------------------------------------------------------------


class Steep(nn.Module):
    """Its gradients overflow float16 at torch's first loss scale for some batches, and not for others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


def steep_batches() -> list[tuple[Tensor, Tensor]]:
    data = batches(6, rows=8)
    return [(x * (40.0 if index in (0, 3) else 0.02), y) for index, (x, y) in enumerate(data)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_that_overflows_is_skipped_and_halves_the_scale_as_in_torch(
    ranks: int, make_group: Any, assert_close: Any
) -> None:
    module, data = Steep(), steep_batches()
    loop = PlainLoop(module, nn.CrossEntropyLoss(), "fp16", lr=1e-3, clip=0.5)
    schedule = ScheduleSpec("StepLR", {"step_size": 1, "gamma": 1.0})
    optimizer = OptimizerSpec("SGD", {"lr": 1e-3, "momentum": 0.9}, schedule=schedule)
    group = make_group(
        module, nn.CrossEntropyLoss(), data[1], ranks=ranks, precision="fp16", clip_grad_norm=0.5, optimizer=optimizer
    )
    made, skipped = 0, []
    for x, y in data:
        before = loop.scaler.get_scale()
        loop.train_step(x, y)
        weights = group.state_dict()
        group.train_step(x, y)
        report = group.reports[0]
        assert report.loss_scale == loop.scaler.get_scale()
        assert report.skipped == (report.loss_scale < before)
        made += not report.skipped
        skipped.append(report.skipped)
        assert report.step == made
        assert all(each == report or each.step == made for each in group.reports)
        if report.skipped:
            assert all(torch.equal(weights[name], each) for name, each in group.state_dict().items())
        else:
            assert report.grad_norm == pytest.approx(loop.norm, rel=1e-6 if ranks == 1 else 5e-3)
    assert True in skipped and False in skipped
    assert_close(group.state_dict(), state_of(loop.module), tolerance=1e-6 if ranks == 1 else 5e-3)
    state = group.call_all("optimizer_state")[0]
    assert state["scaler"] == loop.scaler.state_dict()
    assert state["schedule"]["state"]["last_epoch"] == made


def test_accumulated_gradients_of_one_overflow_are_skipped_together(make_group: Any, assert_close: Any) -> None:
    module, data = Steep(), steep_batches()
    loop = PlainLoop(module, nn.CrossEntropyLoss(), "fp16", lr=1e-3)
    group = make_group(
        module, nn.CrossEntropyLoss(), data[1], ranks=2, precision="fp16", sgd={"lr": 1e-3, "momentum": 0.9}
    )
    for pair in (data[0:2], data[1:3]):
        loop.optimizer.zero_grad()
        group.zero_grad()
        for x, y in pair:
            loop.backward(x, y)
            group.forward_backward(x, y)
        loop.step()
        report = group.optimizer_step()
        assert report.loss_scale == loop.scaler.get_scale() == 32768.0
    assert (report.skipped, report.step) == (False, 1)
    assert_close(group.state_dict(), state_of(loop.module), tolerance=5e-3)


@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_are_read_unscaled_even_where_the_scale_of_now_overflows(
    ranks: int, make_group: Any, assert_close: Any
) -> None:
    module = nn.Sequential(nn.BatchNorm1d(6), Steep(), nn.Linear(3, 3))
    with torch.no_grad():
        module[2].weight.mul_(1e3)
    (x, y), *_ = batches(1, rows=9)
    group = make_group(module, nn.CrossEntropyLoss(), (x, y), ranks=ranks, precision="fp16", on_nan="refuse")
    before = {name: each.clone() for name, each in group.state_dict().items()}
    report, inputs, _ = group.compute_gradients(x, y, input_gradients=True)
    for scale in (65536.0, 16.0):
        twin = copy.deepcopy(module)
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = nn.CrossEntropyLoss()(twin(leaf), y)
        (loss * scale).backward()
        assert leaf.grad is not None
        if scale == 65536.0:
            assert not leaf.grad.isfinite().all(), "the case must overflow at the first scale"
    expected = {name: each.grad / 16 for name, each in twin.named_parameters() if each.grad is not None}
    assert_close(report.gradients, expected, tolerance=2e-2)
    assert_close({"x": inputs}, {"x": leaf.grad / 16}, tolerance=2e-2)
    assert all(torch.equal(before[name], each) for name, each in group.state_dict().items())


def test_a_loss_that_is_not_finite_is_refused_and_an_overflow_skipped_where_nan_is_refused(
    make_group: Any, fails_as: Any
) -> None:
    data = steep_batches()
    group = make_group(
        Steep(), nn.CrossEntropyLoss(), data[1], ranks=2, precision="fp16", on_nan="refuse", sgd={"lr": 1e-3}
    )
    group.train_step(*data[0])
    assert group.reports[0].skipped
    with fails_as(InvalidArgument, "LOSS_NOT_FINITE", "batch"):
        group.train_step(data[0][0] * torch.inf, data[0][1])
    assert group.optimizer_step({"last.bias": torch.ones(3)}).step == 1
    with fails_as(InvalidArgument, "GRADIENT_NOT_FINITE", "gradients"):
        group.optimizer_step({"last.bias": torch.full((3,), torch.nan)})


def test_gradients_of_the_client_are_applied_as_they_are(make_group: Any) -> None:
    (x, y), *_ = batches(1)
    module = nn.Linear(6, 3)
    group = make_group(module, nn.CrossEntropyLoss(), (x, y), ranks=1, precision="fp16", sgd={"lr": 1.0})
    report = group.optimizer_step({"bias": torch.ones(3)})
    assert (report.skipped, report.loss_scale) == (False, 65536.0)
    torch.testing.assert_close(group.state_dict()["bias"], module.bias.detach() - 1)
    report = group.optimizer_step({"bias": torch.full((3,), torch.inf)})
    assert (report.skipped, report.step, report.loss_scale) == (False, 2, 65536.0)
    assert group.call_all("optimizer_state")[0]["scaler"] == torch.amp.GradScaler("cpu").state_dict()


def test_the_scale_grows_after_as_many_updates_as_torch_says_and_comes_back_with_the_state(
    make_group: Any, fails_as: Any
) -> None:
    (x, y), *_ = batches(1)
    group = make_group(nn.Linear(6, 3), nn.CrossEntropyLoss(), (x, y), ranks=2, precision="fp16")
    state = group.call_all("optimizer_state")[0]
    scaler = torch.amp.GradScaler("cpu")
    assert state["scaler"] == scaler.state_dict()
    changed = {**state["scaler"], "scale": 512.0, "growth_interval": 3, "_growth_tracker": 1}
    group.call_all("load_optimizer_state", {**state, "scaler": changed})
    scales = []
    for _ in range(5):
        group.train_step(x, y)
        scales.append(group.reports[0].loss_scale)
    assert scales == [512.0, 1024.0, 1024.0, 1024.0, 2048.0]
    for name, value in (("scale", 0.0), ("scale", 1e300), ("growth_interval", 0), ("backoff_factor", 1.0)):
        with fails_as(InvalidArgument, "OPTIMIZER_STATE_MISMATCH", f"state.scaler.{name}"):
            group.call_all("load_optimizer_state", {**state, "scaler": {**changed, name: value}})
    with fails_as(InvalidArgument, "OPTIMIZER_STATE_MISMATCH", "state"):
        group.call_all("load_optimizer_state", {name: each for name, each in state.items() if name != "scaler"})


def test_what_torchs_scaler_cannot_do_is_refused_at_the_start(make_group: Any, fails_as: Any) -> None:
    (x, y), *_ = batches(1)
    with fails_as(InvalidArgument, "OPTIMIZER_UNFIT", "model.precision"):
        make_group(
            nn.Linear(6, 3), nn.CrossEntropyLoss(), (x, y), ranks=1, precision="fp16", optimizer=OptimizerSpec("LBFGS")
        )
    with fails_as(InvalidArgument, "OPTIMIZER_UNFIT", "model.precision"):
        make_group(nn.Linear(6, 3).half(), nn.CrossEntropyLoss(), (x.half(), y), ranks=1, precision="fp16")

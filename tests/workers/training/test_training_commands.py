"""Accumulation, client gradients, unused parameters, whole batches: as in torch's own loop."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradwire_proto.errors import FailedPrecondition, InvalidArgument

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}


class Mixing(nn.Module):
    """Rows see each other's mean; batch norm's buffers move."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.last(self.norm(torch.tanh(hidden - hidden.mean(0))))


class Forked(nn.Module):
    """`aside` is used by nothing that the loss sees; `frozen` does not train; `tied` is one tensor twice."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.aside, self.frozen = nn.Linear(6, 6), nn.Linear(6, 2), nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.main.weight
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.frozen(torch.tanh(self.main(x)))
        return self.tied(hidden), self.aside(hidden)


def first_output_mse(outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    return F.mse_loss(outputs[0], targets)


def rows(count: int, outputs: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 6).double(), torch.randn(count, outputs).double()


def reference_of(module: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    reference = copy.deepcopy(module)
    return reference, torch.optim.SGD([each for each in reference.parameters() if each.requires_grad], **SGD)


@pytest.mark.parametrize("ranks", [1, 3])
def test_accumulated_batches_of_several_sizes_equal_torch(ranks, make_group, assert_close):
    module = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    group = make_group(module, nn.MSELoss(), rows(4, 3), ranks=ranks, sgd=SGD)
    reference, optimizer = reference_of(module)
    for sizes in ((5, 2), (3, 7, 2)):
        optimizer.zero_grad()
        group.zero_grad()
        for size in sizes:
            inputs, targets = rows(size, 3)
            expected = F.mse_loss(reference(inputs), targets)
            expected.backward()
            assert group.forward_backward(inputs, targets) == pytest.approx(expected.item(), rel=1e-12)
        # Held gradients stay: the second update uses them again.
        for lr in (None, 0.3):
            for each in optimizer.param_groups:
                each["lr"] = lr or SGD["lr"]
            optimizer.step()
            assert group.optimizer_step(lr=lr).lr == (lr or SGD["lr"])
    assert_close(group.state_dict(), reference.state_dict(), tolerance=1e-11)


def test_fused_step_leaves_held_gradients_alone(make_group, assert_close):
    module = nn.Linear(6, 3).double()
    group = make_group(module, nn.MSELoss(), rows(4, 3), sgd={"lr": 0.1})
    held, fused = rows(5, 3), rows(4, 3)
    reference = copy.deepcopy(module)
    F.mse_loss(reference(held[0]), held[1]).backward()
    gradients = [each.grad for each in reference.parameters()]
    group.forward_backward(*held)
    group.train_step(*fused)
    group.optimizer_step()
    other = torch.autograd.grad(F.mse_loss(reference(fused[0]), fused[1]), list(reference.parameters()))
    with torch.no_grad():
        for parameter, one, two in zip(reference.parameters(), gradients, other, strict=True):
            parameter -= 0.1 * (one + two)
    assert_close(group.state_dict(), reference.state_dict())


@pytest.mark.parametrize("ranks", [1, 2])
def test_parameter_without_gradient_is_left_alone_in_spite_of_weight_decay(ranks, make_group, assert_close):
    module = Forked().double()
    group = make_group(module, first_output_mse, rows(4, 6), ranks=ranks, sgd=SGD)
    reference, optimizer = reference_of(module)
    for size in (5, 1, 3):
        inputs, targets = rows(size, 6)
        report, _, _ = group.compute_gradients(inputs, targets)
        assert set(report.gradients) == {"main.weight", "main.bias", "tied.bias"}
        optimizer.zero_grad()
        first_output_mse(reference(inputs), targets).backward()
        optimizer.step()
        if size == 3:
            group.forward_backward(inputs, targets)
            group.optimizer_step()
        else:
            group.train_step(inputs, targets)
    assert_close(group.state_dict(), reference.state_dict())
    assert torch.equal(group.state_dict()["aside.weight"], module.aside.weight)


@pytest.mark.parametrize("ranks", [2, 3])
def test_model_that_mixes_rows_runs_whole_and_exact(ranks, make_group, assert_close):
    module = Mixing().double()
    group = make_group(module, nn.MSELoss(), rows(4, 3), ranks=ranks, sgd=SGD)
    assert "depend on other rows" in group.whole["train"]
    reference, optimizer = reference_of(module)
    for size in (7, 2, 64):
        inputs, targets = rows(size, 3)
        expected = F.mse_loss(reference(inputs), targets)
        assert group.train_step(inputs, targets) == pytest.approx(expected.item(), rel=1e-12)
        assert group.rank_rows() == [size] + [0] * (ranks - 1)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
    report, of_inputs, outputs = group.compute_gradients(inputs, targets, input_gradients=True, outputs=True)
    inputs.requires_grad_()
    expected = F.mse_loss(copy.deepcopy(reference)(inputs), targets)
    assert report.loss == pytest.approx(expected.item(), rel=1e-11)
    assert_close(
        {"x": of_inputs, "y": outputs}, {"x": torch.autograd.grad(expected, inputs)[0], "y": outputs}, tolerance=1e-9
    )
    group.forward_backward(inputs.detach(), targets)
    group.optimizer_step()
    optimizer.zero_grad()
    F.mse_loss(reference(inputs), targets).backward()
    optimizer.step()
    assert_close(group.state_dict(), reference.state_dict(), tolerance=1e-10)


def test_model_that_returns_its_own_mean_over_rows_is_split(make_group):
    class OwnLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.mse_loss(self.layer(x), y)

    module = OwnLoss().double()
    group = make_group(module, None, (rows(4, 3), None), ranks=2)
    assert group.whole["train"] is None and group.loss["train"] == "a mean over rows"
    batch = rows(5, 3)
    assert group.train_step(batch) == pytest.approx(module(*batch).item(), rel=1e-12)
    assert group.rank_rows() == [3, 2]


@pytest.mark.parametrize("ranks", [1, 2])
def test_client_gradients_are_applied_by_name(ranks, make_group, assert_close, fails_as):
    module = Forked().double()
    group = make_group(module, first_output_mse, rows(4, 6), ranks=ranks, sgd=SGD)
    reference, optimizer = reference_of(module)
    for _ in range(2):
        gradients = {"tied.weight": torch.randn(6, 6).double(), "aside.bias": torch.randn(2).double()}
        reference.main.weight.grad, reference.aside.bias.grad = gradients["tied.weight"], gradients["aside.bias"]
        optimizer.step()
        assert group.optimizer_step(gradients).loss is None
    assert_close(group.state_dict(), reference.state_dict())
    for wrong, reason in (
        ({"none": torch.zeros(2)}, "NO_MATCH"),
        ({"frozen.bias": torch.zeros(6).double()}, "PARAMETER_FROZEN"),
        ({"aside.bias": torch.zeros(3).double()}, "SHAPE_MISMATCH"),
        ({"aside.bias": torch.zeros(2)}, "DTYPE_MISMATCH"),
    ):
        with fails_as(InvalidArgument, reason, f'gradients["{next(iter(wrong))}"]'):
            group.optimizer_step(wrong)
    assert_close(group.state_dict(), reference.state_dict())


def test_update_without_gradients_optimizer_or_loss_is_refused(make_group, fails_as):
    group = make_group(nn.Linear(6, 3).double(), nn.MSELoss(), rows(4, 3))
    with fails_as(FailedPrecondition, "NO_GRADIENTS"):
        group.optimizer_step()
    group.forward_backward(*rows(3, 3))
    group.zero_grad()
    with fails_as(FailedPrecondition, "NO_GRADIENTS"):
        group.optimizer_step()
    with fails_as(InvalidArgument, "OPTION_OUT_OF_RANGE", "learning_rate"):
        group.train_step(*rows(3, 3), lr=-1.0)
    assert not any(group.call_all("needs_rejoin"))


def test_learning_rate_of_a_call_does_not_last(make_group, assert_close):
    module = nn.Linear(6, 3).double()
    group = make_group(module, nn.MSELoss(), rows(4, 3), sgd={"lr": 0.1})
    reference = copy.deepcopy(module)
    for lr in (0.5, None):
        inputs, targets = rows(3, 3)
        group.train_step(inputs, targets, lr=lr)
        assert group.reports[0].lr == (lr or 0.1)
        gradients = torch.autograd.grad(F.mse_loss(reference(inputs), targets), list(reference.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(reference.parameters(), gradients, strict=True):
                parameter -= (lr or 0.1) * gradient
    assert_close(group.state_dict(), reference.state_dict())

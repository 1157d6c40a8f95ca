"""compute_gradients, forward and state dicts: what they return, and that reads change nothing."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradwire_proto.errors import InvalidArgument


class Net(nn.Module):
    """Rows, and `shift`, which has none. Random where `dropout` is."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, shift: Tensor) -> dict[str, Tensor]:
        hidden = self.dropout(self.norm(self.first(x)) + shift)
        return {"logits": self.last(hidden), "best": self.last(hidden).argmax(1)}


def loss(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs["logits"], targets)


def batch(rows: int) -> tuple[dict[str, Tensor], Tensor]:
    return {"x": torch.randn(rows, 6).double(), "shift": torch.randn(5).double()}, torch.randint(3, (rows,))


def everything(group) -> list[Tensor]:
    source = "result = [*map(torch.clone, trainer._program.all_state().values()), *(trainer._held._parts or [])]"
    return group.call_all("run", source)[0]


@pytest.mark.parametrize("ranks", [1, 3])
def test_gradients_of_parameters_and_inputs_and_outputs_equal_torch(ranks, make_group, assert_close):
    module = Net().double()
    group = make_group(module, loss, batch(4), ranks=ranks)
    for rows in (7, 2):
        inputs, targets = batch(rows)
        group.forward_backward(inputs, targets)
        before = everything(group)
        reference = copy.deepcopy(module)
        reference.load_state_dict(group.state_dict())
        report, of_inputs, outputs = group.compute_gradients(
            inputs, targets, wrt=("first.*", "last.bias"), input_gradients=True, outputs=True
        )
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in inputs.items()}
        expected = reference(**leaves)
        loss(expected, targets).backward()
        wanted = ("first.weight", "first.bias", "last.bias")
        # The first bias is in front of batch norm: its gradient is nothing but rounding.
        assert_close(report.gradients, {n: dict(reference.named_parameters())[n].grad for n in wanted}, tolerance=1e-10)
        assert_close(of_inputs, {name: leaf.grad for name, leaf in leaves.items()}, tolerance=1e-10)
        assert_close(outputs, {name: leaf.detach() for name, leaf in expected.items()})
        assert all(map(torch.equal, before, everything(group)))


def test_idle_and_empty_ranks_hand_back_no_rows(make_group):
    group = make_group(Net().double(), loss, batch(4), ranks=3)
    inputs, targets = batch(2)
    _, of_inputs, outputs = group.compute_gradients(inputs, targets, input_gradients=True, outputs=True)
    assert group.rank_rows() == [1, 1, 0]
    assert of_inputs["x"].shape == (2, 6) and outputs["logits"].shape == (2, 3) and outputs["best"].shape == (2,)


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.randn(4, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.turn).abs()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_complex_gradient_is_not_asked_for_as_a_real_one(ranks, make_group):
    rows = (torch.randn(4, 4).double(), torch.randn(4, 4).double())
    group = make_group(Turned(), nn.MSELoss(), rows, ranks=ranks)
    with pytest.raises(InvalidArgument) as caught:
        group.compute_gradients(*rows, gradient_dtype="float64")
    assert (caught.value.field, caught.value.reason) == ("gradient_dtype", "DTYPE_NOT_COMPLEX")
    report, _, _ = group.compute_gradients(*rows, gradient_dtype="complex64")
    assert report.gradients["turn"].dtype == torch.complex64


def test_gradient_type_is_converted_and_wrt_may_be_empty(make_group):
    group = make_group(Net().double(), loss, batch(4))
    report, _, _ = group.compute_gradients(*batch(4), gradient_dtype="float32")
    assert {each.dtype for each in report.gradients.values()} == {torch.float32}
    report, _, _ = group.compute_gradients(*batch(4), wrt=())
    assert report.gradients == {}


def test_names_that_match_nothing_or_only_frozen_are_refused_by_position(make_group, fails_as):
    module = Net().double()
    module.last.requires_grad_(False)
    group = make_group(module, loss, batch(4))
    with fails_as(InvalidArgument, "NO_MATCH", "wrt[1]"):
        group.compute_gradients(*batch(4), wrt=("first.*", "nothing.*"))
    with fails_as(InvalidArgument, "PARAMETER_FROZEN", "wrt[0]"):
        group.compute_gradients(*batch(4), wrt=("last.bias",))
    with fails_as(InvalidArgument, "NO_MATCH", "names[0]"):
        group.call_all("state_dict", ["nothing"])
    assert not any(group.call_all("needs_rejoin"))


class Tied(nn.Module):
    """`second.weight` is `first.weight`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize(
    ("wrt", "names"),
    [
        (("second.*",), {"second.weight", "second.bias"}),
        (("sec*.weight",), {"second.weight"}),
        # One glob names a tensor once, so that what comes back can be given to optimizer_step.
        (("*",), {"first.weight", "first.bias", "second.bias"}),
        (("*.weight",), {"first.weight"}),
        (("first.weight", "second.weight"), {"first.weight", "second.weight"}),
    ],
)
def test_glob_reaches_a_tied_tensor_by_its_other_name(wrt, names, make_group, assert_close):
    module, x, y = Tied().double(), torch.randn(4, 3).double(), torch.randn(4, 3).double()
    group = make_group(module, nn.MSELoss(), (x, y))
    report, _, _ = group.compute_gradients(x, y, wrt=wrt)
    F.mse_loss(module(x), y).backward()
    grads = {name: each.grad for name, each in module.named_parameters(remove_duplicate=False)}
    assert_close(report.gradients, {name: grads[name] for name in names})


def test_glob_that_reaches_frozen_tensors_alone_by_other_names_is_refused(make_group, fails_as):
    module = Tied()
    module.first.weight.requires_grad_(False)
    group = make_group(module, nn.MSELoss(), (torch.randn(4, 3), torch.randn(4, 3)))
    with fails_as(InvalidArgument, "PARAMETER_FROZEN", "wrt[0]"):
        group.compute_gradients(torch.randn(4, 3), torch.randn(4, 3), wrt=("second.w*",))


def test_gradient_under_both_names_of_a_tied_tensor_is_refused_with_a_reason_of_its_own(make_group, fails_as):
    group = make_group(Tied(), nn.MSELoss(), (torch.randn(4, 3), torch.randn(4, 3)))
    with fails_as(InvalidArgument, "GRADIENT_GIVEN_TWICE", 'gradients["second.weight"]'):
        group.optimizer_step({"first.weight": torch.zeros(3, 3), "second.weight": torch.zeros(3, 3)})


def test_gradients_of_the_caller_that_are_not_finite_are_not_blamed_on_a_batch(make_group, fails_as, assert_close):
    group = make_group(Tied(), nn.MSELoss(), (torch.randn(4, 3), torch.randn(4, 3)), on_nan="refuse")
    before = group.state_dict()
    with fails_as(InvalidArgument, "GRADIENT_NOT_FINITE", "gradients"):
        group.optimizer_step({"first.weight": torch.full((3, 3), torch.nan)})
    with fails_as(InvalidArgument, "LOSS_NOT_FINITE", "batch"):
        group.train_step(torch.full((4, 3), torch.inf), torch.zeros(4, 3))
    assert_close(group.state_dict(), before)


def test_complex_values_are_not_loaded_into_real_tensors(make_group, fails_as, assert_close):
    module = nn.Linear(3, 3)
    group = make_group(module, nn.MSELoss(), (torch.randn(4, 3), torch.randn(4, 3)))
    with fails_as(InvalidArgument, "DTYPE_MISMATCH", 'tensors["bias"]'):
        group.call_all("load_state_dict", {"bias": torch.ones(3, dtype=torch.complex64)}, partial=True)
    assert_close(group.state_dict(), module.state_dict())


def test_seed_repeats_dropout_as_torch_manual_seed_does(make_group):
    module = Net(dropout=0.5).double()
    group = make_group(module, loss, batch(4), ranks=1)
    inputs, targets = batch(16)
    losses = [group.compute_gradients(inputs, targets, seed=seed)[0].loss for seed in (3, 3, 4)]
    torch.manual_seed(3)
    assert losses[0] == losses[1] != losses[2]
    assert losses[0] == pytest.approx(loss(module(**inputs), targets).item(), rel=1e-12)


def test_training_is_repeatable_with_dropout_and_ranks_differ(make_group):
    module, inputs = Net(dropout=0.5).double(), batch(16)
    states = []
    for seed in (1, 1, 2):
        group = make_group(copy.deepcopy(module), loss, batch(4), ranks=2, seed=seed)
        for _ in range(3):
            group.train_step(*inputs)
        states.append(group.state_dict()["first.weight"])
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


@pytest.mark.parametrize("ranks", [1, 3])
def test_forward_moves_buffers_in_training_only(ranks, make_group, assert_close):
    module = Net().double()
    group = make_group(module, loss, batch(4), ranks=ranks)
    reference = copy.deepcopy(module)
    inputs, _ = batch(7)
    assert_close(group.forward(inputs, training=True), {k: v.detach() for k, v in reference(**inputs).items()})
    assert_close(group.state_dict(), reference.state_dict())
    reference.eval()
    assert_close(group.forward(inputs), {k: v.detach() for k, v in reference(**inputs).items()})
    assert_close(group.state_dict(), reference.state_dict())


def test_state_dict_is_loaded_whole_or_not_at_all(make_group, fails_as, assert_close):
    module = Net().double()
    group = make_group(module, loss, batch(4))
    other = {name: torch.randn_like(t) if t.is_floating_point() else t + 5 for name, t in module.state_dict().items()}
    for wrong, partial, reason, field in (
        ({**other, "last.bias": torch.zeros(4)}, False, "SHAPE_MISMATCH", 'tensors["last.bias"]'),
        ({**other, "more": torch.zeros(4)}, True, "NO_MATCH", 'tensors["more"]'),
        ({"last.bias": torch.zeros(3)}, False, "TENSOR_MISSING", "tensors"),
    ):
        with fails_as(InvalidArgument, reason, field):
            group.call_all("load_state_dict", wrong, partial=partial)
        assert_close(group.state_dict(), module.state_dict())
    group.call_all("load_state_dict", {"last.bias": torch.ones(3, dtype=torch.float32)}, partial=True)
    assert torch.equal(group.state_dict()["last.bias"], torch.ones(3).double())
    group.call_all("load_state_dict", other, partial=False)
    assert_close(group.state_dict(), other)
    assert list(group.call_all("state_dict", ["norm.running_*"])[0]) == ["norm.running_mean", "norm.running_var"]

"""Forwards that ranks retain: their bytes, what they are refused for, and what a failure leaves."""

import copy

import pytest
import torch
from torch import nn

from gradwire_proto.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from gradwire_proto.values import BackwardQuery, Retention


def make_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()


def make(make_group, ranks, module=None, **spec):
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    return make_group(module or make_module(), nn.MSELoss(), (x, y), ranks=ranks, **spec)


def forward(group, x, name="a", training=True, **retention):
    shards = group.shards(x, None, training=training, with_targets=False)
    return shards, group.over_shards("retained_forward", shards, Retention(**retention), name, training=training)


def backward(group, reports, cotangent, **query):
    rows = [0 if report.outputs is None else report.outputs[0].shape[0] for report in reports]
    parts = cotangent.split(rows)
    return group.call("backward", [((BackwardQuery(retained="a", **query), [part]), {}) for part in parts])


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("rows", [7, 2])
def test_gradients_are_those_of_torch_for_the_whole_batch(ranks, rows, make_group, assert_close):
    module = make_module()
    group = make(make_group, ranks, module)
    reference = copy.deepcopy(module)
    x = torch.randn(rows, 4, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(rows, 3, dtype=torch.float64)
    reference(x).backward(cotangent)
    _, reports = forward(group, x.detach(), inputs=(0,))
    found = backward(group, reports, cotangent, input_gradients=True)
    gradients = group.call_all("held_gradients")[0]
    assert_close(gradients, {name: each.grad for name, each in reference.named_parameters()})
    torch.testing.assert_close(torch.cat([each.input_gradients[0] for each in found]), x.grad, rtol=1e-10, atol=1e-13)
    assert_close(group.state_dict(), reference.state_dict())


@pytest.mark.parametrize("ranks", [1, 2])
def test_bytes_that_are_retained_are_bounded_over_all_ranks(ranks, make_group, fails_as, assert_close):
    group = make(make_group, ranks)
    x = torch.randn(100, 4, dtype=torch.float64)
    before = group.state_dict()
    # What torch saves for backward of 100 rows: the input, batch norm's input and tanh's output, and the output itself.
    least = 100 * (4 + 8 + 8 + 3) * 8
    set_limit = (
        "from dataclasses import replace\ntrainer._retained._limits = replace(trainer._limits, retained_bytes={})"
    )
    group.call_all("run", set_limit.format(least - 1))
    with fails_as(ResourceExhausted, "RETAINED_BYTES"):
        forward(group, x)
    assert_close(group.state_dict(), before)
    assert not any(group.call_all("needs_rejoin")), "the refusal is every rank's own"
    group.call_all("run", set_limit.format(3 * least))
    forward(group, x)
    with fails_as(ResourceExhausted, "RETAINED_BYTES"):
        for name in "bcd":
            forward(group, x, name)
    forward(group, x, "e", release=("a", "b", "c"))


def test_a_forward_under_which_an_update_came_is_refused_and_the_ranks_go_on(make_group, fails_as):
    group = make(make_group, 2)
    x = torch.randn(6, 4, dtype=torch.float64)
    _, reports = forward(group, x)
    group.train_step(x, torch.randn(6, 3, dtype=torch.float64))
    with fails_as(FailedPrecondition, "MODIFIED_IN_PLACE"):
        backward(group, reports, torch.ones(6, 3, dtype=torch.float64))
    assert group.call_all("held_gradients") == [{}, {}]
    _, reports = forward(group, x)
    backward(group, reports, torch.ones(6, 3, dtype=torch.float64))


def test_a_rejoin_drops_the_forwards_that_need_the_old_connections(make_group, fails_as):
    for module, survives in ((make_module(), False), (nn.Linear(4, 3).double(), True)):
        group = make(make_group, 2, module)
        _, reports = forward(group, torch.randn(6, 4, dtype=torch.float64))
        group.call_all("rejoin", group.processes.new_generation())
        if survives:
            backward(group, reports, torch.ones(6, 3, dtype=torch.float64))
        else:
            with fails_as(FailedPrecondition, "RETAINED_GONE"):
                backward(group, reports, torch.ones(6, 3, dtype=torch.float64))


def test_what_cannot_be_retained_or_set_is_refused_by_field(make_group, fails_as):
    group = make(make_group, 1)
    x = torch.randn(6, 4, dtype=torch.float64)
    with fails_as(InvalidArgument, "LEAF_UNKNOWN", "retain.inputs"):
        forward(group, x, inputs=(1,))
    with fails_as(InvalidArgument, "NO_MATCH", "wrt[0]"):
        forward(group, x, wrt=("nobody",))
    _, reports = forward(group, x, wrt=("0.*",))
    with fails_as(InvalidArgument, "NO_MATCH", "wrt[0]"):
        backward(group, reports, torch.ones(6, 3, dtype=torch.float64), wrt=("3.bias",))
    backward(group, reports, torch.ones(6, 3, dtype=torch.float64))
    assert group.call_all("held_gradients")[0].keys() == {"0.weight", "0.bias"}
    with fails_as(InvalidArgument, "SHAPE_MISMATCH", 'gradients["3.bias"]'):
        group.call_all("set_gradients", {"3.bias": torch.ones(4, dtype=torch.float64)}, [])
    with fails_as(InvalidArgument, "NO_MATCH", "dropped[0]"):
        group.call_all("set_gradients", {}, ["nobody"])
    with fails_as(InvalidArgument, "GRADIENT_GIVEN_TWICE", "dropped"):
        group.call_all("set_gradients", {"3.bias": torch.ones(3, dtype=torch.float64)}, ["3.bias"])


@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_that_are_set_take_the_place_of_all_ranks_sum(ranks, make_group, assert_close):
    group = make(make_group, ranks)
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    group.forward_backward(x, y)
    before = group.call_all("held_gradients")[0]
    given = torch.randn(3, dtype=torch.float64)
    group.call_all("set_gradients", {"3.bias": given}, ["0.bias"])
    expected = {name: each for name, each in before.items() if name != "0.bias"} | {"3.bias": given}
    assert_close(
        group.call_all("held_gradients")[0],
        dict(sorted(expected.items(), key=lambda item: list(before).index(item[0]))),
    )


def test_options_of_groups_are_kept_and_those_that_need_other_state_are_refused(make_group, fails_as):
    from gradwire_proto.values import OptimizerSpec

    group = make(make_group, 2, optimizer=OptimizerSpec("Adam", {"lr": 0.1}))
    group.forward_backward(torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64))

    def step(**options):
        return group.call("optimizer_step", [((), {"groups": [options]})] * 2)[0]

    assert step(lr=0.5, betas=(0.8, 0.9)).lr == 0.5
    assert group.optimizer_step().lr == 0.5
    for options, reason, field in (
        ({"amsgrad": True}, "OPTIMIZER_UNFIT", "groups[0]"),
        ({"lr": -1.0}, "OPTION_OUT_OF_RANGE", 'groups[0]["lr"]'),
        ({"nesterov": True}, "OPTION_UNKNOWN", 'groups[0]["nesterov"]'),
    ):
        with fails_as(InvalidArgument, reason, field):
            step(**options)
    with fails_as(InvalidArgument, "OPTION_OUT_OF_RANGE", "groups"):
        group.call("optimizer_step", [((), {"groups": [{}, {}]})] * 2)
    assert group.optimizer_step().lr == 0.5


class View(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w.expand(x.shape[0], 3)


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_output_that_only_views_a_parameter_is_gone_back_through(ranks, make_group, assert_close):
    group = make(make_group, ranks, View())
    cotangent = torch.randn(6, 3, dtype=torch.float64)
    _, reports = forward(group, torch.randn(6, 4, dtype=torch.float64))
    backward(group, reports, cotangent)
    assert_close(group.call_all("held_gradients")[0], {"w": cotangent.sum(0)})


@pytest.mark.parametrize(("precision", "passes"), [("fp16", True), ("fp32", False)])
def test_gradients_that_overflow_are_refused_but_where_a_loss_scale_is_found(precision, passes, make_group, fails_as):
    module = nn.Linear(4, 3)
    x = torch.randn(6, 4)
    group = make_group(
        module, nn.MSELoss(), (x, torch.randn(6, 3)), ranks=1, sgd={"lr": 0.1}, on_nan="refuse", precision=precision
    )
    _, reports = forward(group, x)
    cotangent = torch.full((6, 3), torch.inf, dtype=reports[0].outputs[0].dtype)
    if passes:
        backward(group, reports, cotangent)
        assert group.call_all("held_gradients")[0].keys() == {"weight", "bias"}
        return
    with fails_as(InvalidArgument, "GRADIENT_NOT_FINITE"):
        backward(group, reports, cotangent)

"""A torch.autograd.Function travels with its own backward, and one that two graphs cannot hold is refused by name."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

from gradwire.export import ModuleExporter
from gradwire.exporting import function_trace
from gradwire.functions import export_function
from gradwire_proto.errors import ExportError


class Applies(nn.Module):
    """A linear layer, and a function of this module and that layer's output."""

    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("mean", torch.zeros(4))
        self.function = function

    def forward(self, x):
        return self.function(self, self.linear(x))


class Fivefold(torch.autograd.Function):
    """The square, with a backward that is not the square's."""

    @staticmethod
    def forward(ctx, x):
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 5


class WithContext(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 5


class ReadsValue(Fivefold):
    @staticmethod
    def forward(ctx, x):
        return x * x.sum().item()


class Branches(Fivefold):
    @staticmethod
    def backward(ctx, gradient):
        return gradient if gradient.sum() > 0 else -gradient


class Dirty(Fivefold):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)


CLOSED_OVER = torch.randn(4)


class ClosesOver(Fivefold):
    @staticmethod
    def forward(ctx, x):
        return x * CLOSED_OVER


class ClosesOverInBackward(Fivefold):
    @staticmethod
    def backward(ctx, gradient):
        return gradient * CLOSED_OVER


class ReadsModule(Fivefold):
    @staticmethod
    def forward(ctx, x, module):
        return x @ module.weight

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class NoTensor(Fivefold):
    @staticmethod
    def forward(ctx, x):
        return x * 2, x.shape[1]

    @staticmethod
    def backward(ctx, gradient, _):
        return gradient


class TakesList(Fivefold):
    @staticmethod
    def forward(ctx, x, others):
        return x * others[0]

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class Unmaterialized(Fivefold):
    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        return x * 2


class ChangesGradient(Fivefold):
    @staticmethod
    def backward(ctx, gradient):
        return gradient.mul_(5)


class ChangesSaved(Fivefold):
    @staticmethod
    def forward(ctx, x, total):
        ctx.total = total
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        ctx.total.add_(gradient.sum(0))
        return gradient, None


class Coupled(torch.autograd.Function):
    """The gradient of one input depends on whether another one needs any."""

    @staticmethod
    def forward(ctx, x, weight):
        return x * weight.sum()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, torch.ones(4, 4) * (gradient.sum() if ctx.needs_input_grad[0] else 0.5 * gradient.sum())


kept_apply = Fivefold.apply


def export(function: Callable, *, loss=None, targets=None):
    return ModuleExporter(Applies(function), loss).export_model(torch.randn(3, 4), targets)


def functions_of(exported) -> list[list[str]]:
    return [list(variant.graph.functions) for variant in exported.program.variants]


@pytest.mark.parametrize(
    "function",
    [
        lambda module, h: Fivefold.apply(h),
        lambda module, h: kept_apply(h),
        lambda module, h: WithContext.apply(h),
    ],
)
def test_each_way_of_calling_a_function_puts_it_into_every_variant(function):
    assert [len(names) for names in functions_of(export(function))] == [1, 1]


def test_each_call_of_a_function_is_a_function_of_its_own():
    exported = export(lambda module, h: Fivefold.apply(Fivefold.apply(h)) + Fivefold.apply(module.weight).sum())
    assert [len(names) for names in functions_of(exported)] == [3, 3]


@pytest.mark.parametrize(
    "function",
    [
        lambda module, h: Fivefold.apply(torch.ones(4)) + h,
        lambda module, h: Fivefold.apply(h.detach()) + h,
        lambda module, h: Fivefold.apply(module.mean) + h,
    ],
)
def test_a_function_whose_backward_nobody_can_ask_for_is_traced_as_plain_operators(function):
    assert functions_of(export(function)) == [[], []]


@pytest.mark.parametrize(
    ("function", "culprit", "advice"),
    [
        (lambda module, h: ReadsValue.apply(h), ReadsValue, "torch.where"),
        (lambda module, h: Branches.apply(h), Branches, "torch.where"),
        (lambda module, h: Dirty.apply(h * 1), Dirty, "clone"),
        (lambda module, h: ClosesOver.apply(h), ClosesOver, "pass it as an argument"),
        (lambda module, h: ClosesOverInBackward.apply(h), ClosesOverInBackward, "pass it as an argument"),
        (lambda module, h: ReadsModule.apply(h, module), ReadsModule, "pass it as an argument"),
        (lambda module, h: NoTensor.apply(h)[0], NoTensor, "return tensors alone"),
        (lambda module, h: TakesList.apply(h, [module.weight[0]]), TakesList, "argument of its own"),
        (lambda module, h: Unmaterialized.apply(h), Unmaterialized, "leave that call out"),
        (lambda module, h: ChangesGradient.apply(h), ChangesGradient, "a clone of it"),
        (lambda module, h: ChangesSaved.apply(h, module.mean), ChangesSaved, "in the forward"),
        (lambda module, h: torch.vmap(WithContext.apply)(h), WithContext, "whole batches"),
        (lambda module, h: torch.func.grad(lambda z: WithContext.apply(z).sum())(h), WithContext, "whole batches"),
        (
            lambda module, h: torch.autograd.grad(Fivefold.apply(h).sum(), h, create_graph=True)[0],
            Fivefold,
            "differentiate it, once",
        ),
    ],
)
def test_a_function_that_two_graphs_cannot_hold_is_refused_by_name_with_advice(function, culprit, advice):
    with pytest.raises(ExportError, match=rf"\b{culprit.__name__}\b") as caught:
        export(function)
    assert advice in str(caught.value)


def test_a_gradient_that_depends_on_which_others_are_needed_is_seen_by_the_comparison():
    class Module(Applies):
        def forward(self, x):
            return Coupled.apply(x, self.weight) + self.linear(x)

    with pytest.raises(ExportError, match="weight") as caught:
        ModuleExporter(Module(lambda module, h: h)).export_model(torch.randn(3, 4))
    assert caught.value.reason == "EXPORT_MISMATCH" and "which other inputs" in str(caught.value)


@pytest.mark.parametrize("changed", ["forward", "backward"])
def test_a_capture_that_went_wrong_is_seen_by_the_comparison(changed, monkeypatch):
    taken_apart = function_trace._Split.trace

    def wrong(self):
        trace = taken_apart(self)
        module = getattr(trace, changed)
        for node in module.graph.nodes:
            if node.target is torch.ops.aten.mul.Tensor:
                node.target = torch.ops.aten.add.Tensor
        module.recompile()
        return trace

    monkeypatch.setattr(function_trace._Split, "trace", wrong)
    with pytest.raises(ExportError) as caught:
        export(lambda module, h: Fivefold.apply(h))
    assert caught.value.reason == "EXPORT_MISMATCH"


def test_a_function_in_a_loss_is_in_the_loss_graph():
    exported = export(lambda module, h: h, loss=lambda o, t: Fivefold.apply(o - t).mean(), targets=torch.randn(3, 4))
    train, _ = exported.program.variants
    assert len(train.loss_graph.functions) == 1 and not train.graph.functions


def test_a_function_in_a_plain_function_is_in_its_graph():
    exported = export_function(lambda x: Fivefold.apply(x).sum(), (torch.randn(3),))
    assert len(exported.spec.program.variants[0].graph.functions) == 1
    assert not exported.is_random


class Noisy(Fivefold):
    @staticmethod
    def forward(ctx, x):
        return x + torch.randn_like(x)


def test_a_plain_function_that_draws_inside_a_custom_one_is_known_to_be_random():
    assert export_function(lambda x: Noisy.apply(x).sum(), (torch.randn(3),)).is_random


@pytest.mark.parametrize("function", [lambda module, h: Fivefold.apply(h), lambda module, h: ReadsValue.apply(h)])
def test_functions_work_as_before_after_an_export(function):
    try:
        export(function)
    except ExportError:
        assert function.__code__.co_names[0] == "ReadsValue"
    x = torch.randn(3, requires_grad=True)
    assert torch.equal(torch.autograd.grad(kept_apply(x).sum(), x)[0], torch.full((3,), 5.0))
    dirty = torch.autograd.grad(Dirty.apply(x * 1).sum(), x)[0]
    assert torch.equal(dirty, torch.full((3,), 5.0))


def test_another_threads_functions_run_as_they_are_during_an_export():
    found = []

    def elsewhere():
        x = torch.ones(2, requires_grad=True)
        found.append(torch.autograd.grad(kept_apply(x).sum(), x)[0])

    def function(module, h):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return Fivefold.apply(h)

    export(function)
    assert found and all(torch.equal(gradient, torch.full((2,), 5.0)) for gradient in found)

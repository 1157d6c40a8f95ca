"""What cannot be exported is refused with an ExportError that says what and where; no gradient is lost silently."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradwire.export import ModuleExporter
from gradwire.function_arguments import check_argnums
from gradwire.functions import export_function
from gradwire_proto.errors import ExportError, InvalidArgument


class Applies(nn.Module):
    """A linear layer, and a function of itself and that layer's output."""

    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.function = function

    def forward(self, x):
        return self.function(self, self.linear(x))


def with_tensor_hook(module, h):
    h.register_hook(lambda gradient: gradient * 2)
    return h * 1


def with_saved_tensor_hooks(module, h):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t):
        return h * module.linear.weight.sum()


def refusal(module: nn.Module, *, loss=None, inputs=None, targets=None) -> ExportError:
    with pytest.raises(ExportError) as caught:
        ModuleExporter(module, loss).export_model(torch.randn(3, 4) if inputs is None else inputs, targets)
    return caught.value


@pytest.mark.parametrize("function", [with_tensor_hook, with_saved_tensor_hooks])
def test_hooks_inside_a_forward_are_seen_by_their_gradients(function):
    error = refusal(Applies(function))
    assert error.reason in ("EXPORT_MISMATCH", "EXPORT_FAILED")


def test_torch_func_inside_a_forward_is_refused():
    error = refusal(Applies(lambda module, h: torch.func.grad(lambda z: (module.linear(z) ** 2).sum())(h)))
    assert error.reason in ("EXPORT_MISMATCH", "EXPORT_FAILED", "OPERATOR_NOT_ALLOWED")


@pytest.mark.parametrize(
    "function",
    [lambda x: torch.func.vmap(lambda y: y**2)(x).sum(), lambda x: torch.func.grad(lambda y: (y**3).sum())(x).sum()],
)
def test_torch_func_inside_a_function_is_refused_in_the_users_words(function):
    with pytest.raises(ExportError, match=r"torch\.func .* inside the function") as caught:
        export_function(function, (torch.ones(3),))
    assert caught.value.reason == "OPERATOR_NOT_ALLOWED" and "_functorch" not in str(caught.value)


def test_reentrant_checkpointing_does_not_lose_gradients():
    def reentrant(module, h):
        return checkpoint(module.linear, h, use_reentrant=True)

    assert "use_reentrant=False" in str(refusal(Applies(reentrant)))


def test_parameter_hooks_are_refused_and_name_the_parameter():
    module = nn.Linear(4, 4)
    module.weight.register_hook(lambda gradient: gradient)
    error = refusal(module)
    assert error.reason == "EXPORT_HOOK" and error.field == "weight"


def test_backward_hooks_of_modules_are_refused():
    module = nn.Sequential(nn.Linear(4, 4))
    module[0].register_full_backward_hook(lambda *_: None)
    assert refusal(module).reason == "EXPORT_HOOK"


def test_a_mismatch_names_the_parameter():
    def half(module, h):
        return torch.ops.aten.detach(h) if torch.compiler.is_exporting() else h

    error = refusal(Applies(half))
    assert error.reason == "EXPORT_MISMATCH" and error.field in ("linear.weight", "linear.bias")


def test_branching_on_values_is_refused_with_its_line_and_without_noise(capfd):
    def branch(module, h):
        return h if h.sum() > 0 else -h

    error = refusal(Applies(branch))
    assert error.reason == "EXPORT_DATA_DEPENDENT"
    assert f"{__file__}:{branch.__code__.co_firstlineno + 1}" in str(error)
    assert capfd.readouterr() == ("", "")


def test_an_operator_outside_the_allowlist_is_named():
    def shares_storage(module, h):
        return torch.as_strided(h, (2,), (1,))

    error = refusal(Applies(shares_storage))
    assert error.reason == "OPERATOR_NOT_ALLOWED" and "aten.as_strided.default" in str(error)


def test_a_wrong_example_quotes_the_modules_own_error():
    error = refusal(nn.Linear(4, 2), inputs=torch.randn(3, 5))
    assert error.reason == "EXAMPLE_FAILED" and "shapes cannot be multiplied" in str(error)


def test_wrong_targets_quote_the_losss_own_error():
    error = refusal(nn.Linear(4, 2), loss="cross_entropy", targets=torch.randint(2, (5,)))
    assert error.reason == "EXAMPLE_FAILED" and "batch_size" in str(error)


def test_targets_out_of_range_fail_on_the_example():
    error = refusal(nn.Linear(4, 2), loss="cross_entropy", targets=torch.tensor([0, 1, 7]))
    assert error.reason == "EXAMPLE_FAILED" and "out of bounds" in str(error)


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (nn.MSELoss(reduction="none"), "LOSS_NOT_SCALAR"),
        (lambda o, t: o - t, "LOSS_NOT_SCALAR"),
        (lambda o, t: 3.0, "LOSS_NOT_SCALAR"),
        (nn.Sequential(nn.Linear(4, 1)), "LOSS_HAS_PARAMETERS"),
    ],
)
def test_a_loss_that_is_none_is_refused(loss, reason):
    if isinstance(loss, nn.Module):
        with pytest.raises(ExportError) as caught:
            ModuleExporter(nn.Linear(4, 4), loss)
        assert caught.value.reason == reason and caught.value.field == "loss"
    else:
        assert refusal(nn.Linear(4, 4), loss=loss, targets=torch.randn(3, 4)).reason == reason


@pytest.mark.parametrize("loss", ["hinge", 3])
def test_an_unknown_loss_is_refused_with_the_known_names(loss):
    with pytest.raises(InvalidArgument) as caught:
        ModuleExporter(nn.Linear(4, 4), loss)
    assert caught.value.reason == "LOSS_UNKNOWN" and caught.value.field == "loss"


def test_a_loss_by_name_needs_targets():
    with pytest.raises(InvalidArgument) as caught:
        ModuleExporter(nn.Linear(4, 4), "mse").export_model(torch.randn(3, 4))
    assert caught.value.reason == "EXAMPLE_INVALID"


def test_outputs_that_are_no_tensors_are_refused():
    assert refusal(Applies(lambda module, h: object())).reason == "OUTPUT_UNSUPPORTED"


def test_a_cache_among_the_outputs_is_refused_with_what_to_do_about_it():
    cache = type("DynamicCache", (), {"__module__": "transformers.cache_utils"})
    error = refusal(Applies(lambda module, h: (h, cache())))
    assert error.reason == "OUTPUT_UNSUPPORTED" and "set the config's use_cache=False" in str(error)
    assert "use_cache" not in str(refusal(Applies(lambda module, h: object())))


def test_lazy_modules_must_have_run():
    assert "lazy" in str(refusal(nn.LazyLinear(3)))


def test_parameters_over_the_same_memory_are_refused():
    module = nn.Module()
    whole = torch.randn(4, 4)
    module.one, module.two = nn.Parameter(whole), nn.Parameter(whole[:2])
    module.forward = lambda x: x @ module.one
    assert refusal(module).reason == "EXPORT_SHARED_MEMORY"


def test_a_plain_tensor_that_the_forward_changes_must_be_a_buffer():
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.count = torch.zeros(())

        def forward(self, x):
            self.count.add_(1)
            return self.linear(x) + self.count

    module = Counts()
    assert "register" in str(refusal(module))
    assert module.count == 0


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (torch.randn(3, 4).to_sparse(), "example.inputs"),
        ((torch.randn(3, 4), object()), "example.inputs[1]"),
        ({"x": {3: torch.randn(3)}}, "example.inputs.x"),
        (torch.zeros(3, dtype=torch.uint16), "example.inputs"),
    ],
)
def test_values_that_have_no_place_in_a_batch_are_refused_with_their_path(value, field):
    with pytest.raises(InvalidArgument) as caught:
        ModuleExporter(nn.Linear(4, 4)).export_model(value)
    assert caught.value.field == field


def test_a_loss_that_reads_a_parameter_of_the_module_is_refused_by_its_name():
    module = nn.Sequential(nn.Linear(4, 4))

    def penalised(outputs, targets):
        return (outputs - targets).square().mean() + 0.1 * module[0].weight.square().sum()

    error = refusal(module, loss=penalised, targets=torch.randn(3, 4))
    assert error.reason == "EXPORT_LOSS_READS_MODULE" and error.field == "0.weight" and "the loss" in str(error)


def test_a_loss_that_changes_its_buffers_is_told_that_it_is_the_loss():
    class Moving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(4))

        def forward(self, outputs, targets):
            self.scale = 0.9 * self.scale + outputs.detach().mean(0)
            return ((outputs - targets) ** 2 * self.scale).mean()

    error = refusal(nn.Linear(4, 4), loss=Moving(), targets=torch.randn(3, 4))
    assert str(error).startswith("the loss changes a tensor")


def test_a_loss_that_reads_what_the_forward_left_is_told_what_a_loss_sees():
    class Leaves(nn.Linear):
        extra = 0

        def forward(self, x):
            h = super().forward(x)
            self.extra = h.square().mean()
            return h

    module = Leaves(4, 4)
    error = refusal(module, loss=lambda o, t: (o - t).square().mean() + module.extra, targets=torch.randn(3, 4))
    assert error.reason == "EXPORT_MISMATCH" and "outputs and targets alone" in str(error)


def test_a_module_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        module = nn.Sequential(nn.Linear(4, 4))
    error = refusal(module)
    assert error.reason == "EXPORT_INFERENCE_TENSOR" and error.field == "0.weight"


def test_torchscript_is_refused():
    error = refusal(nn.Sequential(torch.jit.script(nn.Linear(4, 4))))
    assert error.reason == "EXPORT_TORCHSCRIPT" and error.field == "0"


def test_a_batch_norm_without_momentum_is_told_to_have_one():
    error = refusal(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None)))
    assert error.reason == "EXPORT_DATA_DEPENDENT" and "momentum=None" in str(error)


def test_sparse_gradients_are_refused_by_the_name_of_the_parameter():
    module = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 2))
    error = refusal(module, inputs=torch.randint(5, (3,)))
    assert error.reason == "EXPORT_SPARSE_GRADIENT" and error.field == "0.weight" and "sparse=False" in str(error)


@pytest.mark.parametrize("argnums", [[0, 1], None, "0", 1.0, (0, None), (), (0, 0), (0, -2), 2, -3, (0, 2)])
def test_argnums_that_torch_func_refuses_are_refused(argnums):
    with pytest.raises(InvalidArgument) as caught:
        check_argnums(argnums, 2)
    assert caught.value.reason == "ARGNUMS_INVALID" and caught.value.field == "argnums"
    with pytest.raises(InvalidArgument):
        export_function(lambda x, y: (x * y).sum(), (torch.ones(2), torch.ones(2)), argnums=argnums)


@pytest.mark.parametrize(("argnums", "positions"), [(0, (0,)), (-1, (1,)), ((1, 0), (1, 0)), (True, (1,))])
def test_argnums_become_positions(argnums, positions):
    assert check_argnums(argnums, 2) == positions

"""Functions with their own backward, rebuilt from the contract's bytes: eager's numbers, and no harm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradwire_proto.errors import InvalidArgument


class Function(torch.autograd.Function):
    """The square, for functions that differ in their backward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 5


class Everything(Function):
    """Several inputs and outputs, arguments that are no tensors, attributes, a result without gradient."""

    @staticmethod
    def forward(ctx, x, weight, factor, mode, nothing, bias):
        ctx.save_for_backward(x, weight)
        ctx.factor, ctx.mode, ctx.rows, ctx.middle = factor, mode, x.shape[0], torch.sigmoid(x)
        best = (x @ weight).argmax(1)
        ctx.mark_non_differentiable(best)
        return x @ weight * factor + bias, best, x.sum(1)

    @staticmethod
    def backward(ctx, gradient, _, of_sum):
        x, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ weight.T * ctx.factor * 3 + of_sum[:, None] / ctx.rows + ctx.middle
        if ctx.needs_input_grad[1]:
            of_weight = x.T @ gradient * (7 if ctx.mode == "seven" else 1)
        if ctx.needs_input_grad[5]:
            of_bias = gradient.sum(0)
        return of_x, of_weight, None, None, None, of_bias


class Power(torch.autograd.Function):
    @staticmethod
    def forward(x, exponent=3):
        return x**exponent

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.exponent = inputs
        ctx.save_for_backward(x, output)

    @staticmethod
    def backward(ctx, gradient):
        x, output = ctx.saved_tensors
        return gradient * output * x * ctx.exponent * 1.5, None


class Outer(Function):
    """Calls another function in its forward and in its backward."""

    @staticmethod
    def forward(ctx, x):
        y = Function.apply(x)
        ctx.save_for_backward(y)
        return y * 2

    @staticmethod
    def backward(ctx, gradient):
        return Function.apply(gradient * ctx.saved_tensors[0])


class Recomputes(Function):
    """Autograd inside its backward, through another function too."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.gelu(F.layer_norm(F.softmax(x @ weight, -1), (4,))) + Function.apply(x)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = [each.detach().requires_grad_() for each in ctx.saved_tensors]
        with torch.enable_grad():
            y = F.gelu(F.layer_norm(F.softmax(x @ weight, -1), (4,))) + Function.apply(x)
        return torch.autograd.grad(y, (x, weight), gradient)


class Resizes(Function):
    """What torch runs inside for these is not in the allowlist under its own name."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return Resizes.compute(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = [each.detach().requires_grad_() for each in ctx.saved_tensors]
        with torch.enable_grad():
            y = Resizes.compute(x, weight)
        return torch.autograd.grad(y, (x, weight), gradient * 2)

    @staticmethod
    def compute(x, weight):
        images = F.linear(x[:, None, None].repeat(1, 1, 3, 1), weight)
        return F.interpolate(images, scale_factor=2.0)[:, 0, 0, ::2]


class Drops(Function):
    @staticmethod
    def forward(ctx, x, probability):
        ctx.mask = (torch.rand_like(x) > probability) / (1 - probability)
        return x * ctx.mask

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.mask + torch.randn_like(gradient), None


class StraightThrough(Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Reverses(Function):
    @staticmethod
    def forward(ctx, x, share):
        ctx.share = share
        return x

    @staticmethod
    def backward(ctx, gradient):
        return gradient.neg() * ctx.share, None


class Convolves(Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.conv1d(x, weight, padding=1)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        of_x = torch.nn.grad.conv1d_input(x.shape, weight, gradient, padding=1)
        return of_x * 2, torch.nn.grad.conv1d_weight(x, weight.shape, gradient, padding=1) * 3


class Constant(Function):
    @staticmethod
    def forward(ctx, x):
        return x * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.tensor([1, 2, 3, 5]) * gradient.shape[0]


class Scales(Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x * factor

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor * 2, None


class Averages(Function):
    """Keeps a running mean in an argument."""

    @staticmethod
    def forward(ctx, x, mean):
        mean.mul_(0.9).add_(x.mean(0) * 0.1)
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 7, None


class Masks(Function):
    """Writes into tensors of its own, through views and masks."""

    @staticmethod
    def backward(ctx, gradient):
        made = gradient.contiguous().view(-1).view(gradient.shape).clone()
        made[ctx.saved_tensors[0] < 0] = 0
        made[:, 0] *= 3
        return made


class Twice(Function):
    @staticmethod
    def forward(ctx, x):
        return x, x * 2

    @staticmethod
    def backward(ctx, one, two):
        return one * 3 + two


class Broadcasts(Function):
    """Its gradients are larger than the input, and of another type: autograd sums and casts them."""

    @staticmethod
    def forward(ctx, x, bias):
        return x + bias

    @staticmethod
    def backward(ctx, gradient):
        return gradient.double(), gradient * 2


def under_no_grad(module, h):
    with torch.no_grad():
        with torch.enable_grad():
            inner = Function.apply(h)
        without = Function.apply(inner) * 1
    return inner + without


def all_of_everything(module, h):
    y, best, total = Everything.apply(h, module.weight, 0.5, "seven", None, module.bias)
    return y + best[:, None] + total[:, None]


CASES: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "everything": all_of_everything,
    "one of several results": lambda m, h: Everything.apply(h, m.weight, 2, "one", None, m.bias)[2][:, None] + h,
    "frozen": lambda m, h: Everything.apply(h, m.frozen, 0.5, "one", None, m.bias)[0],
    "detached": lambda m, h: Everything.apply(h.detach(), m.weight, 0.5, "one", None, m.bias)[0],
    "on an input": lambda m, h: Everything.apply(m.x, m.weight, 0.5, "one", None, m.bias)[0] + h,
    "setup_context": lambda m, h: Power.apply(h) + Power.apply(h, 2),
    "nested": lambda m, h: Outer.apply(h),
    "chained": lambda m, h: StraightThrough.apply(Outer.apply(h)) + StraightThrough.apply(h),
    "recomputed": lambda m, h: Recomputes.apply(h, m.weight),
    "recomputed on a transposed layout": lambda m, h: Recomputes.apply(h.T.contiguous().T, m.weight),
    "resized": lambda m, h: Resizes.apply(h, m.weight),
    "random": lambda m, h: Drops.apply(h, 0.4),
    "straight through": lambda m, h: StraightThrough.apply(h),
    "reversed": lambda m, h: Reverses.apply(h, 0.1) @ m.weight,
    "convolution": lambda m, h: Convolves.apply(h[:, None], m.kernel).flatten(1)[:, :4],
    "constant": lambda m, h: Constant.apply(h),
    "size": lambda m, h: Scales.apply(h, h.shape[0]) + Scales.apply(h, h.shape[0] * 2),
    "share": lambda m, h: Scales.apply(h, 1 / h.shape[0]),
    "running mean": lambda m, h: Averages.apply(h, m.mean),
    "masks": lambda m, h: Masks.apply(h),
    "expanded gradient": lambda m, h: Masks.apply(h).sum(0, keepdim=True) + h,
    "input among results": lambda m, h: sum(Twice.apply(h)),
    "changed result": lambda m, h: Function.apply(h).add_(1).mul_(2),
    "broadcast": lambda m, h: Broadcasts.apply(h, m.bias),
    "regions": under_no_grad,
    "batch norm around": lambda m, h: m.norm(Function.apply(m.norm(h))),
    "mode": lambda m, h: Function.apply(h) if m.training else StraightThrough.apply(h),
    "parameter": lambda m, h: h @ StraightThrough.apply(m.weight * 4),
}


class Net(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.weight, self.bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
        self.frozen = nn.Parameter(torch.randn(4, 4), requires_grad=False)
        self.kernel = nn.Parameter(torch.randn(2, 1, 3))
        self.register_buffer("mean", torch.zeros(4))
        self.name = name

    def forward(self, x):
        self.x = x
        return CASES[self.name](self, self.linear(x))


@pytest.mark.parametrize("name", CASES)
def test_outputs_gradients_and_buffers_are_eagers_for_other_batches_and_in_both_modes(round_trip, name):
    torch.manual_seed(len(name))
    check = round_trip(Net(name).double(), torch.randn(6, 4).double(), torch.randn(6, 1).double(), nn.L1Loss())
    assert check.exported.program.variants[0].symbols, "rows stay open"
    for rows in (6, 2, 3, 17):
        for training in (True, False):
            inputs = torch.randn(rows, 4).double(), torch.randn(rows, 4).double()
            check.check(*inputs, training=training, tolerance=1e-12)


def test_gradients_of_inputs_are_eagers(round_trip):
    module = Net("on an input").double()
    built = round_trip(module, torch.randn(5, 4).double()).built
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    (ours,) = torch.autograd.grad(module(x).sum(), x)
    (theirs,) = torch.autograd.grad(built("train", x)[0].sum(), x)
    torch.testing.assert_close(theirs, ours)


class Casts(Function):
    """Of its own types wherever it is called."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight.T * 3, x.T @ gradient


class Half(Casts):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight


class WithoutAutocast(Function):
    """Its backward runs where the loss's backward is called: outside the region."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient.float() @ weight.T * 3, x.float().T @ gradient.float()


@pytest.mark.parametrize("function", [Casts, Half, WithoutAutocast])
def test_a_function_in_an_autocast_region_keeps_the_types_that_it_had_there(round_trip, function, monkeypatch):
    def cast(module, h):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = function.apply(h, module.weight)
            return (y @ module.weight).float() + y.float()

    monkeypatch.setitem(CASES, "cast", cast)
    x, y = torch.randn(6, 4), torch.randn(6, 4)
    round_trip(Net("cast"), x, y, nn.MSELoss()).check(torch.randn(3, 4), torch.randn(3, 4), tolerance=0)


def test_a_function_in_a_loss_graph_has_its_own_backward(round_trip):
    def loss(outputs, targets):
        return Function.apply(outputs - targets).mean()

    check = round_trip(nn.Linear(4, 3), torch.randn(6, 4), torch.randn(6, 3), loss)
    check.check(torch.randn(9, 4), torch.randn(9, 3))


@pytest.mark.parametrize("name", ["random", "chained"])
def test_random_operators_inside_functions_are_found_and_switched_off(round_trip, name):
    built = round_trip(Net(name), torch.randn(6, 4)).built
    assert built.is_random("train") is (name == "random")
    x = torch.randn(3, 4)
    with built.without_randomness():
        outputs = [built("train", x)[0] for _ in range(2)]
        parameters = [built.parameters_by_name()[f"linear.{each}"] for each in ("weight", "bias")]
        gradients = [torch.autograd.grad(output.sum(), parameters) for output in outputs]
    assert torch.equal(*outputs)
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_the_gradient_of_what_a_function_was_exported_without_is_refused(round_trip):
    built = round_trip(Net("frozen"), torch.randn(6, 4)).built
    built.parameters_by_name()["frozen"].requires_grad_()
    with pytest.raises(InvalidArgument) as caught:
        built("train", torch.randn(3, 4))[0].sum().backward()
    assert caught.value.reason == "GRADIENT_UNKNOWN"


def test_a_second_derivative_is_refused(round_trip):
    built = round_trip(Net("nested"), torch.randn(6, 4)).built
    parameter = built.parameters_by_name()["linear.weight"]
    output = built("train", torch.randn(3, 4))[0].sum()
    with pytest.raises(InvalidArgument, match="twice") as caught:
        torch.autograd.grad(output, parameter, create_graph=True)
    assert caught.value.reason == "GRADIENT_UNKNOWN"

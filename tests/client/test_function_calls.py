"""Gradients of plain functions: what is sent when, and what comes back in which form."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

import gradwire
from gradwire import errors
from gradwire_proto import codec
from gradwire_proto.tensors import from_torch, to_nested
from gradwire_proto.values import GradientResult
from gradwire_workers.programs import build_program


class FunctionHost:
    """Computes the functions that it is sent, here, and remembers them by digest."""

    def __init__(self, scripted) -> None:
        self.known = {}
        self.programs_received = 0
        self.seeds = []
        scripted.answers["ComputeGradients"] = self.compute

    def compute(self, request, context):
        function = codec.decode_function(request.function)
        if function.program is not None:
            state = {name: to_nested(tensor, writable=True) for name, tensor in function.tensors.items()}
            self.known[function.digest] = build_program(function.program, state, "cpu")
            self.programs_received += 1
        if function.digest not in self.known:
            raise errors.FailedPrecondition("unknown function", reason="FUNCTION_UNKNOWN")
        self.seeds.append(codec.decode_gradient_query(request).seed)
        leaves = list(to_nested(codec.decode_batch(request.batch).inputs, writable=True))
        for leaf in leaves:
            leaf.requires_grad_(leaf.is_floating_point())
        outputs = self.known[function.digest]("eval", *leaves)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(outputs[0], wanted, allow_unused=True))
        gradients = [next(found) if leaf.requires_grad else None for leaf in leaves]
        result = GradientResult(
            loss=outputs[0].item(),
            step=0,
            num_examples=0,
            gradients={},
            input_gradients=tuple(None if gradient is None else from_torch(gradient) for gradient in gradients),
            outputs=tuple(from_torch(o) if isinstance(o, torch.Tensor) else o for o in outputs),
        )
        return codec.encode_gradient_result(result)


@pytest.fixture
def host(scripted) -> FunctionHost:
    return FunctionHost(scripted)


@pytest.fixture
def sdk(scripted, host):
    with gradwire.connect(scripted.target, timeout=5) as sdk:
        yield sdk


def same(ours, theirs) -> None:
    torch.testing.assert_close(ours, theirs)


def loss(w, b, x):
    return ((x @ w + b) ** 2).mean()


def arguments():
    return torch.randn(3, 2), torch.randn(2), torch.randn(5, 3)


@pytest.mark.parametrize("argnums", [0, 1, -1, (0,), (0, 1), (2, 0)])
def test_grad_gives_what_torch_func_gives(sdk, argnums):
    args = arguments()
    same(sdk.grad(loss, argnums=argnums)(*args), torch.func.grad(loss, argnums=argnums)(*args))


def test_value_and_grad_gives_the_value_first(sdk):
    w, b, x = arguments()
    value, (dw, db) = sdk.value_and_grad(loss, argnums=(0, 1))(w, b, x)
    (tw, tb), expected = torch.func.grad_and_value(loss, argnums=(0, 1))(w, b, x)
    same((value, dw, db), (expected, tw, tb))
    assert value.shape == () and value.dtype == torch.float32


def test_aux_comes_back_as_it_is_nested(sdk):
    def with_aux(w, x):
        h = x @ w
        return h.sum(), {"hidden": h, "twice": (2 * h, h.mean())}

    w, x = torch.randn(3, 2), torch.randn(5, 3)
    gradients, aux = sdk.grad(with_aux, has_aux=True)(w, x)
    (value, again), same_gradients = sdk.value_and_grad(with_aux, has_aux=True)(w, x)
    expected, expected_aux = torch.func.grad(with_aux, has_aux=True)(w, x)
    same(gradients, expected)
    same(same_gradients, expected)
    same(aux, expected_aux)
    same(again, expected_aux)
    same(value, (x @ w).sum())


def test_nested_arguments_give_nested_gradients_and_unused_ones_zeros(sdk):
    def of_dict(parameters, x):
        return (x * parameters["w"][0]).sum()

    parameters = {"w": [torch.randn(3)], "unused": torch.randn(2)}
    x = torch.randn(3)
    same(sdk.grad(of_dict)(parameters, x), torch.func.grad(of_dict)(parameters, x))


def test_arrays_and_keyword_arguments_are_taken(sdk):
    def power(x, *, factor):
        return (x**2 * factor).sum()

    x = np.array([1.0, 2.0], dtype=np.float32)
    gradient = sdk.grad(power)(x, factor=torch.tensor([1.0, 10.0]))
    same(gradient, torch.tensor([2.0, 40.0]))
    same(sdk.grad(power)(x, factor=1.0), torch.tensor([2.0, 4.0]))


def test_digest_goes_first_and_the_program_only_where_it_is_unknown(sdk, scripted, host):
    args = arguments()
    sdk.grad(loss)(*args)
    sent = [request.function.HasField("program") for request in scripted.requests("ComputeGradients")]
    assert sent == [False, True]
    sdk.grad(loss)(*args)
    sdk.value_and_grad(loss)(*(2 * argument for argument in args))
    assert host.programs_received == 1
    host.known.clear()  # as a service that was restarted
    same(sdk.grad(loss)(*args), torch.func.grad(loss)(*args))
    assert host.programs_received == 2


def test_the_same_lambda_made_anew_is_exported_once(sdk, monkeypatch):
    exports = []
    from gradwire import function_exports

    original = function_exports.export_function
    monkeypatch.setattr(function_exports, "export_function", lambda *a, **k: exports.append(1) or original(*a, **k))
    data = torch.randn(4)
    w = torch.randn(4)
    for _ in range(5):
        w = w - 0.1 * sdk.grad(lambda w: ((w - data) ** 2).sum())(w)
    assert len(exports) == 1


def test_what_the_function_closes_over_is_taken_as_it_is_at_each_call(sdk, host):
    data = torch.ones(3)
    factor = 2.0

    def closed(w):
        return (w * data).sum() * factor

    gradient = sdk.grad(closed)
    w = torch.randn(3)
    same(gradient(w), torch.full((3,), 2.0))
    data.fill_(3.0)
    same(gradient(w), torch.full((3,), 6.0))
    factor = 10.0
    same(gradient(w), torch.full((3,), 30.0))
    same(gradient(torch.randn(3)), torch.full((3,), 30.0))
    assert host.programs_received == 3


def test_other_shapes_dtypes_and_constants_are_other_exports(sdk, host):
    def power(x, exponent):
        return (x**exponent).sum()

    for x in (torch.rand(3), torch.rand(4), torch.rand(3, dtype=torch.float64)):
        for exponent in (2, 3):
            same(sdk.grad(power)(x, exponent), exponent * x ** (exponent - 1))
    assert host.programs_received == 6


@pytest.fixture
def exports(monkeypatch):
    """A list that grows with each export."""
    from gradwire import function_exports

    made = []
    original = function_exports.export_function
    monkeypatch.setattr(function_exports, "export_function", lambda *a, **k: made.append(1) or original(*a, **k))
    return made


def test_tensors_given_by_name_are_inputs_that_are_not_differentiated(sdk, host, exports):
    w = torch.randn(3, 2)
    for argnums in (0, -1, (-1,)):
        for _ in range(2):
            b, x = torch.randn(2), torch.randn(5, 3)
            ours = sdk.grad(loss, argnums=argnums)(w, b=b, x=x)
            same(ours, torch.func.grad(loss, argnums=argnums)(w, b=b, x=x))
    assert len(exports) == 2 and host.programs_received == 1, "one for an int, one for a tuple"


def test_numbers_and_objects_among_the_arguments_are_taken_by_value(sdk, exports):
    class Factor:
        def __init__(self, value):
            self.value = value

        def __repr__(self):
            return "always the same"

    def scaled(x, number, factor):
        return (x * number * factor.value).sum()

    x, factor = torch.ones(2), Factor(1.0)
    for number in (np.float64(2.0), np.float64(3.0), np.float64(3.0)):
        same(sdk.grad(scaled)(x, number, factor), torch.full((2,), float(number)))
    factor.value = 10.0
    same(sdk.grad(scaled)(x, np.float64(3.0), factor), torch.full((2,), 30.0))
    assert len(exports) == 3


def test_function_that_may_read_anything_is_exported_at_each_call(sdk, exports, monkeypatch):
    def hidden(x):
        return (x * globals()["SCALE"]).sum()

    for scale in (2.0, 2.0, 3.0):
        monkeypatch.setitem(globals(), "SCALE", scale)
        same(sdk.grad(hidden)(torch.ones(2)), torch.full((2,), scale))
    assert len(exports) == 3


@pytest.mark.parametrize("argnums", [[0, 1], None, (), (0, 0), (0, -2), 2, -3, (0, 5), 1.0, "0"])
def test_wrong_argnums_are_refused(sdk, exports, argnums):
    with pytest.raises(errors.InvalidArgument) as caught:
        sdk.grad(lambda x, y: (x * y).sum(), argnums=argnums)(torch.ones(2), torch.ones(2))
    assert (caught.value.reason, caught.value.field) == ("ARGNUMS_INVALID", "argnums") and not exports


def test_random_functions_draw_anew_at_each_call_and_follow_manual_seed(sdk, host):
    def noisy(x):
        return torch.nn.functional.dropout(x, 0.5).sum()

    for _ in range(2):
        torch.manual_seed(3)
        sdk.grad(noisy)(torch.ones(5))
        sdk.grad(noisy)(torch.ones(5))
    assert host.seeds[0] != host.seeds[1] and host.seeds[:2] == host.seeds[2:]
    before = torch.get_rng_state()
    sdk.grad(lambda x: x.sum())(torch.ones(5))
    assert torch.equal(torch.get_rng_state(), before)
    assert host.seeds[-1] is None


def test_nothing_of_the_user_s_is_kept_alive(sdk):
    class Holder:
        def __init__(self):
            self.data = torch.ones(100)

        def loss(self, w):
            return (w * self.data).sum()

    holder = Holder()
    sdk.grad(holder.loss)(torch.ones(100))
    watches = [weakref.ref(holder), weakref.ref(holder.data)]
    del holder
    # torch itself keeps what it traced last.
    sdk.grad(lambda x: x.sum())(torch.ones(5))
    gc.collect()
    assert [watch() for watch in watches] == [None, None]


@pytest.mark.parametrize(
    ("function", "args", "argnums"),
    [
        (lambda x: x * 2, (torch.ones(3),), 0),
        (lambda x: x.sum(), (torch.ones(3, dtype=torch.int64),), 0),
        (lambda x: x.sum(), (5.0,), 0),
        (lambda x: x.sum(), (torch.ones(3),), 1),
        (lambda x: x.sum() if x.sum().item() > 0 else -x.sum(), (torch.ones(3),), 0),
    ],
    ids=["no scalar", "integers", "a Python number", "no such argument", "branches on values"],
)
def test_function_that_cannot_be_differentiated_is_refused_before_anything_is_sent(
    sdk, scripted, function, args, argnums
):
    with pytest.raises(errors.InvalidArgument):
        sdk.grad(function, argnums=argnums)(*args)
    assert scripted.requests("ComputeGradients") == []


def test_differentiated_function_keeps_name_and_docstring(sdk):
    def documented(x):
        """Says what it does."""
        return x.sum()

    gradient = sdk.grad(documented)
    assert gradient.__name__ == "documented" and gradient.__doc__ == "Says what it does."

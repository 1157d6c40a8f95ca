"""What users call for derivatives of plain functions, by the names and with the signatures of torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gradwire.arguments import as_bool, as_count, as_function
from gradwire.function_calls import FunctionCalls
from gradwire.function_derivatives import FunctionDerivatives
from gradwire.function_exports import FunctionExports
from gradwire.rpc import Rpc

if TYPE_CHECKING:
    import torch


class FunctionTransforms:
    """The part of a client that needs no model."""

    def __init__(self, rpc: Rpc) -> None:
        exports = FunctionExports(rpc)
        self._functions = FunctionCalls(rpc, exports)
        self._derivatives = FunctionDerivatives(rpc, exports)

    def grad(
        self, fn: Callable[..., Any], argnums: int | tuple[int, ...] = 0, has_aux: bool = False
    ) -> Callable[..., Any]:
        """`torch.func.grad`, computed by the service on one rank: a function that returns the gradients of `fn`.

        fn: a function of tensors (nested where it takes them so) that returns a scalar tensor, or with `has_aux` a pair
        of it and anything else. argnums: which positional arguments to differentiate, an int or a tuple of them. Other
        arguments are fixed, those given by name among them; what `fn` reads from outside is taken as it is at each
        call. NumPy arrays are taken as tensors.

        The first call exports `fn`, which takes a while. Later ones do not, as long as the arguments have the same
        shapes, the numbers among them the same values, and everything that `fn` reads can be seen to be the same; a
        function that uses modules other than by `module.name`, imports, or objects of compiled classes is exported
        anew each time.

        The result's calls return the gradient, a tuple of them for a tuple of argnums, or (gradients, aux); they raise
        ExportError where `fn` cannot become a graph, InvalidArgument (ARGNUMS_INVALID) for wrong argnums. Random
        operators draw anew at each call; `torch.manual_seed` before it repeats them.
        """
        return self._functions.grad(as_function(fn, "fn"), argnums, as_bool(has_aux, "has_aux"))

    def value_and_grad(
        self, fn: Callable[..., Any], argnums: int | tuple[int, ...] = 0, has_aux: bool = False
    ) -> Callable[..., Any]:
        """Like `grad`; the result's calls return (value, gradients), or ((value, aux), gradients) with `has_aux`."""
        return self._functions.value_and_grad(as_function(fn, "fn"), argnums, as_bool(has_aux, "has_aux"))

    def vjp(self, fn: Callable[..., Any], *primals: Any, has_aux: bool = False) -> Any:
        """`torch.func.vjp`, computed by the service on one rank: (output, vjp_fn).

        fn: a function of `primals`, which are tensors of floating point (nested where it takes them so), that returns
        tensors in any nesting, or with `has_aux` a pair of that and anything else; the result is (output, vjp_fn, aux)
        then. `vjp_fn(cotangents)`, which takes tensors like the output, returns a tuple with the gradient of each
        primal: the output's, weighted with the cotangents. The primals are kept as they are now; each call of `vjp_fn`
        computes `fn` anew, with the same random numbers. What is exported when, and errors, are as for `grad`.
        """
        return self._derivatives.vjp(as_function(fn, "fn"), primals, as_bool(has_aux, "has_aux"))

    def jvp(
        self, fn: Callable[..., Any], primals: Any, tangents: Any, *, strict: bool = False, has_aux: bool = False
    ) -> Any:
        """`torch.func.jvp`, computed by the service on one rank: (output, how it changes along the tangents).

        primals: a tuple of the arguments of `fn`, as for `vjp`. tangents: tensors like them. strict: refuse an output
        that depends on none of them (InvalidArgument OUTPUT_INDEPENDENT), instead of zeros. With `has_aux`, (output,
        change, aux). In forward mode, as torch.func: a torch.autograd.Function with a backward of its own is refused
        with InvalidArgument (GRADIENT_UNKNOWN), as it has no derivative forwards, and so is torch.cond.
        """
        strict, has_aux = as_bool(strict, "strict"), as_bool(has_aux, "has_aux")
        return self._derivatives.jvp(as_function(fn, "fn"), primals, tangents, strict, has_aux)

    def jacrev(
        self,
        fn: Callable[..., Any],
        argnums: int | tuple[int, ...] = 0,
        *,
        has_aux: bool = False,
        chunk_size: int | None = None,
    ) -> Callable[..., Any]:
        """`torch.func.jacrev`, computed by the service on one rank: a function that returns the Jacobian of `fn`.

        fn: as for `vjp`; argnums as for `grad`. The result's calls return, nested as the output, for each argument that
        is differentiated a tensor [*output's shape, *argument's shape]; with `has_aux` (jacobian, aux). chunk_size: how
        many rows of it are computed at once at most; the service chooses where left out. A Jacobian of more bytes than
        the service's limit `tensor_bytes` is refused before it is computed (ResourceExhausted DERIVATIVE_TOO_LARGE).
        """
        chunk = as_count(chunk_size)
        return self._derivatives.jacrev(as_function(fn, "fn"), argnums, as_bool(has_aux, "has_aux"), chunk)

    def hessian(self, fn: Callable[..., Any], argnums: int | tuple[int, ...] = 0) -> Callable[..., Any]:
        """`torch.func.hessian`, computed by the service on one rank: a function that returns the Hessian of `fn`.

        The result's calls return, nested as the output, for each argument that is differentiated, and in it for each
        again, a tensor [*output's shape, *argument's shape, *other argument's shape]. Forward over reverse mode, as
        torch.func: what `jvp` refuses is refused here too, and so is what is too large for `jacrev`.
        """
        return self._derivatives.hessian(as_function(fn, "fn"), argnums)

    def hvp(self, fn: Callable[..., Any], primals: Any, vectors: Any) -> tuple[torch.Tensor, Any]:
        """(value, the Hessian of `fn` times `vectors`), computed by the service on one rank without the Hessian itself.

        primals: the argument of `fn`, or a tuple of its arguments, as torch.autograd.functional.hvp takes them; `fn`
        returns a scalar tensor. vectors: tensors like the primals; the products are nested so too. They are
        `torch.func.jvp(torch.func.grad(fn), primals, vectors)[1]`; what `jvp` refuses is refused here too.
        """
        return self._derivatives.hvp(as_function(fn, "fn"), primals, vectors)

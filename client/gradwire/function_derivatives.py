"""Derivatives of plain functions that are no gradients: products, Jacobians and Hessians, in torch.func's shapes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gradwire.errors import InvalidArgument
from gradwire.function_arguments import normal_leaf, tensor_leaves
from gradwire.function_exports import FunctionExports, PreparedFunction, positions_of
from gradwire.functions import ExportedFunction
from gradwire.rpc import Rpc
from gradwire.transfer import Uploads, inline_bytes, receive
from gradwire_proto import codec
from gradwire_proto.tensors import from_nested
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import Batch, DerivativeQuery

_Looks = Sequence[tuple[torch.dtype, tuple[int, ...]]]


class FunctionDerivatives:
    """What one client offers beside gradients."""

    def __init__(self, rpc: Rpc, exports: FunctionExports) -> None:
        self._rpc = rpc
        self._exports = exports

    def vjp(self, fn: Callable[..., Any], primals: tuple[Any, ...], has_aux: bool) -> Any:
        """See `Client.vjp`."""
        self._rpc.check_usable()
        args = _kept(primals)
        _check_primals(args, [f"primals[{index}]" for index in range(len(args))])
        prepared = self._prepare(fn, args, tuple(range(len(args))), has_aux)
        seed = prepared.fresh_seed()
        outputs, _ = self._ask(prepared, args, "none", seed=seed)
        value, aux, flat = _split(prepared.exported, outputs)
        looks = [(tensor.dtype, tuple(tensor.shape)) for tensor in flat]

        def vjp_fn(cotangents: Any) -> Any:
            vectors = _vectors(cotangents, value, looks, "cotangents")
            _, gradients = self._ask(prepared, args, "vjp", vectors, seed=seed)
            return prepared.exported.arguments.nest(gradients)

        return (value, vjp_fn, aux) if has_aux else (value, vjp_fn)

    def jvp(self, fn: Callable[..., Any], primals: Any, tangents: Any, strict: bool, has_aux: bool) -> Any:
        """See `Client.jvp`."""
        self._rpc.check_usable()
        _check_tuple(primals)
        _check_primals(primals, [f"primals[{index}]" for index in range(len(primals))])
        prepared = self._prepare(fn, primals, tuple(range(len(primals))), has_aux)
        vectors = _vectors(tangents, primals, _looks(prepared.exported), "tangents")
        outputs, changes = self._ask(prepared, primals, "jvp", vectors, seed=prepared.fresh_seed(), strict=strict)
        value, aux, _ = _split(prepared.exported, outputs)
        change = prepared.exported.value.unflatten(changes)
        return (value, change, aux) if has_aux else (value, change)

    def jacrev(
        self, fn: Callable[..., Any], argnums: int | tuple[int, ...], has_aux: bool, chunk_size: int | None
    ) -> Callable[..., Any]:
        """See `Client.jacrev`."""

        def jacobian(*args: Any) -> Any:
            self._rpc.check_usable()
            prepared = self._prepare(fn, args, positions_of(argnums, len(args)), has_aux)
            seed = prepared.fresh_seed()
            outputs, blocks = self._ask(prepared, args, "jacobian", seed=seed, chunk_size=chunk_size)
            exported = prepared.exported
            nested = exported.value.unflatten([exported.arguments.nest(row) for row in _rows(exported, blocks)])
            return (nested, _split(exported, outputs)[1]) if has_aux else nested

        return functools.update_wrapper(jacobian, fn)

    def hessian(self, fn: Callable[..., Any], argnums: int | tuple[int, ...]) -> Callable[..., Any]:
        """See `Client.hessian`."""

        def of_arguments(*args: Any) -> Any:
            self._rpc.check_usable()
            prepared = self._prepare(fn, args, positions_of(argnums, len(args)), False)
            _, blocks = self._ask(prepared, args, "hessian", seed=prepared.fresh_seed())
            exported = prepared.exported
            nest = exported.arguments.nest
            rows = [
                nest([nest(row) for row in _rows(exported, of_output)]) for of_output in _of_outputs(exported, blocks)
            ]
            return exported.value.unflatten(rows)

        return functools.update_wrapper(of_arguments, fn)

    def hvp(self, fn: Callable[..., Any], primals: Any, vectors: Any) -> tuple[Any, Any]:
        """See `Client.hvp`."""
        self._rpc.check_usable()
        is_one = not isinstance(primals, tuple)
        args, given = ((primals,), (vectors,)) if is_one else (primals, vectors)
        _check_primals(args, ["primals"] if is_one else [f"primals[{index}]" for index in range(len(args))])
        prepared = self._prepare(fn, args, 0 if is_one else tuple(range(len(args))), False, scalar=True)
        along = _vectors(given, args, _looks(prepared.exported), "vectors")
        outputs, products = self._ask(prepared, args, "hvp", along, seed=prepared.fresh_seed())
        return outputs[0], prepared.exported.arguments.nest(products)

    def _prepare(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        argnums: int | tuple[int, ...],
        has_aux: bool,
        *,
        scalar: bool = False,
    ) -> PreparedFunction:
        return self._exports.prepare(fn, args, argnums, has_aux, scalar=scalar)

    def _ask(
        self,
        prepared: PreparedFunction,
        args: tuple[Any, ...],
        kind: str,
        vectors: Sequence[Tensor] = (),
        *,
        seed: int | None,
        chunk_size: int | None = None,
        strict: bool = False,
    ) -> tuple[list[Any], list[Tensor]]:
        """(the function's flat outputs, the derivative's tensors)."""
        query = DerivativeQuery(
            kind=kind,
            wrt=() if kind == "none" else _places(prepared.exported),
            outputs=_count(prepared.exported),
            chunk_size=chunk_size,
            strict=strict,
            seed=seed,
        )

        def request(uploads: Uploads) -> pb.DifferentiateFunctionRequest:
            message = pb.DifferentiateFunctionRequest(max_inline_bytes=inline_bytes(self._rpc))
            inputs = from_nested(tensor_leaves(args), "args")
            inputs, given = uploads.send_apart((inputs, from_nested(tuple(vectors), "vectors")))
            codec.encode_batch(Batch(inputs), message.batch)
            return codec.encode_derivative_query(query, given, message)

        def fetch(reply: pb.DifferentiateFunctionResponse) -> list[Any]:
            result = codec.decode_derivative_result(reply)
            return receive(self._rpc, (result.outputs, result.derivatives))

        outputs, derivatives = prepared.call("DifferentiateFunction", request, fetch)
        return list(outputs), list(derivatives)


def _places(exported: ExportedFunction) -> tuple[int, ...]:
    return tuple(index for indices in exported.arguments.differentiated for index in indices)


def _looks(exported: ExportedFunction) -> _Looks:
    return [exported.arguments.looks[index] for index in _places(exported)]


def _count(exported: ExportedFunction) -> int:
    """How many tensors the value has."""
    return exported.value.is_none.count(False)


def _split(exported: ExportedFunction, outputs: list[Any]) -> tuple[Any, Any, list[Any]]:
    """(the value, aux, the value's tensors)."""
    count = _count(exported)
    aux = None if exported.aux is None else exported.aux.unflatten(outputs[count:])
    return exported.value.unflatten(outputs[:count]), aux, outputs[:count]


def _of_outputs(exported: ExportedFunction, blocks: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """The blocks of each of the value's tensors."""
    each = len(blocks) // _count(exported)
    return [blocks[start : start + each] for start in range(0, len(blocks), each)]


def _rows(exported: ExportedFunction, blocks: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """The blocks in rows of one for each tensor that is differentiated."""
    each = len(_places(exported))
    return [blocks[start : start + each] for start in range(0, len(blocks), each)]


def _vectors(given: Any, like: Any, looks: _Looks, field: str) -> list[Tensor]:
    """The tensors of `given`, which must be nested as `like`, and each of the type and shape that `looks` says."""
    if pytree.tree_structure(given) != pytree.tree_structure(like):
        raise InvalidArgument(
            f"expected tensors nested as {pytree.tree_structure(like)}, got {pytree.tree_structure(given)}",
            field=field,
            reason="STRUCTURE_MISMATCH",
        )
    vectors = tensor_leaves(given)
    if len(vectors) != len(looks):
        raise InvalidArgument("expected tensors and nothing else", field=field, reason="STRUCTURE_MISMATCH")
    for index, (vector, (dtype, shape)) in enumerate(zip(vectors, looks, strict=True)):
        if vector.dtype != dtype or tuple(vector.shape) != shape:
            raise InvalidArgument(
                f"expected {str(dtype)[6:]}{list(shape)}, got {str(vector.dtype)[6:]}{list(vector.shape)}",
                field=f"{field}, leaf {index}",
                reason="DTYPE_MISMATCH" if tuple(vector.shape) == shape else "SHAPE_MISMATCH",
            )
    return list(vectors)


def _kept(primals: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments, their tensors and arrays as tensors of their own: the caller's may change meanwhile."""
    flat, spec = pytree.tree_flatten(primals)
    leaves = [normal_leaf(leaf, index) for index, leaf in enumerate(flat)]
    return pytree.tree_unflatten([leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)


def _check_tuple(primals: Any) -> None:
    if not isinstance(primals, tuple):
        raise InvalidArgument(
            f"expected a tuple of the function's arguments, got a {type(primals).__qualname__}",
            field="primals",
            reason="ARGUMENT_TYPE_INVALID",
        )


def _check_primals(args: tuple[Any, ...], fields: Sequence[str]) -> None:
    """All of them are differentiated: there must be some, of numbers that have a derivative."""
    if not args:
        raise InvalidArgument(
            "expected at least one argument for the function, got none", field="primals", reason="ARGUMENT_MISSING"
        )
    for argument, field in zip(args, fields, strict=True):
        for leaf in pytree.tree_leaves(argument):
            leaf = normal_leaf(leaf, 0)
            if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
                what = f"a tensor of {str(leaf.dtype)[6:]}" if isinstance(leaf, Tensor) else type(leaf).__qualname__
                raise InvalidArgument(
                    f"expected floating-point or complex tensors and nothing else, got {what}",
                    field=field,
                    reason="PRIMAL_NOT_DIFFERENTIABLE",
                )

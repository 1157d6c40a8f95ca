"""Gradients of plain functions: exported once for each kind of arguments, and named by digest after that."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from gradwire.captured import Unknown, fingerprint
from gradwire.errors import FailedPrecondition
from gradwire.functions import ExportedFunction, check_argnums, export_function, tensor_leaves
from gradwire.rpc import Rpc
from gradwire.transfer import INLINE_BYTES, receive, send_apart
from gradwire_proto import codec
from gradwire_proto.tensors import from_nested, from_torch
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import Batch, FunctionSpec, GradientQuery

_REMEMBERED = 256
"""Exports kept at most. They hold no tensors, and nothing of the user's but code objects."""


class FunctionCalls:
    """`grad` and `value_and_grad` of one client."""

    def __init__(self, rpc: Rpc) -> None:
        self._rpc = rpc
        self._remembered: OrderedDict[Any, ExportedFunction] = OrderedDict()
        self._lock = threading.Lock()

    def grad(self, fn: Callable[..., Any], argnums: int | tuple[int, ...], has_aux: bool) -> Callable[..., Any]:
        """See `Client.grad`."""
        return self._wrapped(fn, argnums, has_aux, with_value=False)

    def value_and_grad(
        self, fn: Callable[..., Any], argnums: int | tuple[int, ...], has_aux: bool
    ) -> Callable[..., Any]:
        """See `Client.value_and_grad`."""
        return self._wrapped(fn, argnums, has_aux, with_value=True)

    def _wrapped(
        self, fn: Callable[..., Any], argnums: int | tuple[int, ...], has_aux: bool, *, with_value: bool
    ) -> Callable[..., Any]:
        def differentiated(*args: Any, **kwargs: Any) -> Any:
            self._rpc.check_usable()
            positions = _positions(argnums, len(args))
            if not kwargs:
                return self._differentiate(fn, args, _key(fn, args, positions, has_aux), positions, has_aux, with_value)

            def by_position(*given: Any) -> Any:
                return fn(*given[:-1], **given[-1])

            # What is given by name is an input too, behind those that may be differentiated.
            taken = (*args, kwargs)
            key = _key(fn, taken, positions, has_aux)
            named = functools.update_wrapper(by_position, fn)
            return self._differentiate(named, taken, key, positions, has_aux, with_value)

        return functools.update_wrapper(differentiated, fn)

    def _differentiate(
        self, fn: Any, args: tuple[Any, ...], key: Any, argnums: int | tuple[int, ...], has_aux: bool, with_value: bool
    ) -> Any:
        exported, whole = self._recall(key), None
        if exported is None:
            whole = export_function(fn, args, argnums=argnums, has_aux=has_aux)
            exported = self._remember(key, whole)
        query = GradientQuery(
            wrt=(),
            input_gradients=True,
            outputs=with_value or has_aux,
            training=False,
            seed=int(torch.randint(2**62, ())) if exported.is_random else None,
        )
        request = self._request(exported, args, query)
        try:
            reply = self._rpc.call("ComputeGradients", request)
        except FailedPrecondition as error:
            if error.reason != "FUNCTION_UNKNOWN":
                raise
            whole = whole or export_function(fn, args, argnums=argnums, has_aux=has_aux)
            # Handles serve one request, so that big arguments go up again.
            request = self._request(exported, args, query)
            self._add_program(request, whole)
            reply = self._rpc.call("ComputeGradients", request)
        result = codec.decode_gradient_result(reply)
        gradients, outputs = receive(self._rpc, (result.input_gradients, result.outputs))
        return exported.finish(gradients, outputs, with_value)

    def _request(
        self, exported: ExportedFunction, args: tuple[Any, ...], query: GradientQuery
    ) -> pb.ComputeGradientsRequest:
        request = pb.ComputeGradientsRequest(max_inline_bytes=INLINE_BYTES)
        codec.encode_function(exported.spec, request.function)
        codec.encode_gradient_query(query, request)
        inputs = from_nested(tensor_leaves(args), "args")
        codec.encode_batch(Batch(send_apart(self._rpc, (inputs,))[0]), request.batch)
        return request

    def _add_program(self, request: pb.ComputeGradientsRequest, whole: ExportedFunction) -> None:
        constants = {name: from_torch(tensor) for name, tensor in whole.constants.items()}
        tensors = send_apart(self._rpc, (constants,))[0]
        request.function.Clear()
        codec.encode_function(replace(whole.spec, tensors=tensors), request.function)

    def _recall(self, key: Any) -> ExportedFunction | None:
        with self._lock:
            if key in self._remembered:
                self._remembered.move_to_end(key)
                return self._remembered[key]
        return None

    def _remember(self, key: Any, whole: ExportedFunction) -> ExportedFunction:
        spec = FunctionSpec(digest=whole.spec.digest, program=None, tensors={}, output_leaf=whole.spec.output_leaf)
        light = replace(whole, spec=spec, constants={}, batch=Batch(()))
        if key is not None:
            with self._lock:
                self._remembered[key] = light
                while len(self._remembered) > _REMEMBERED:
                    self._remembered.popitem(last=False)
        return light


def _positions(argnums: int | tuple[int, ...], count: int) -> int | tuple[int, ...]:
    """`argnums` counted from the front of `count` arguments. Raises InvalidArgument ARGNUMS_INVALID."""
    positions = check_argnums(argnums, count)
    return positions if isinstance(argnums, tuple) else positions[0]


def _key(fn: Any, args: tuple[Any, ...], argnums: int | tuple[int, ...], has_aux: bool) -> Any:
    """What an export depends on: the function, all that it reads, and what the arguments look like. None: unknown."""
    ambient = (torch.get_default_dtype(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))
    try:
        return (fingerprint(fn, args), argnums, has_aux, *ambient)
    except Unknown:
        return None

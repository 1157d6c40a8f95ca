"""Gradients of plain functions, in the shapes that torch.func gives them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from gradwire.function_arguments import tensor_leaves
from gradwire.function_exports import FunctionExports, PreparedFunction, positions_of
from gradwire.rpc import Rpc
from gradwire.transfer import Uploads, inline_bytes, receive
from gradwire_proto import codec
from gradwire_proto.tensors import from_nested
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import Batch, GradientQuery


class FunctionCalls:
    """`grad` and `value_and_grad` of one client."""

    def __init__(self, rpc: Rpc, exports: FunctionExports) -> None:
        self._rpc = rpc
        self._exports = exports

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
            positions = positions_of(argnums, len(args))
            if not kwargs:
                prepared = self._exports.prepare(fn, args, positions, has_aux, scalar=True)
                return self._differentiate(prepared, args, has_aux, with_value)

            def by_position(*given: Any) -> Any:
                return fn(*given[:-1], **given[-1])

            # What is given by name is an input too, behind those that may be differentiated.
            taken = (*args, kwargs)
            named = functools.update_wrapper(by_position, fn)
            prepared = self._exports.prepare(named, taken, positions, has_aux, scalar=True, known_by=fn)
            return self._differentiate(prepared, taken, has_aux, with_value)

        return functools.update_wrapper(differentiated, fn)

    def _differentiate(self, prepared: PreparedFunction, args: tuple[Any, ...], has_aux: bool, with_value: bool) -> Any:
        query = GradientQuery(
            wrt=(),
            input_gradients=True,
            outputs=with_value or has_aux,
            training=False,
            seed=prepared.fresh_seed(),
        )

        def request(uploads: Uploads) -> pb.ComputeGradientsRequest:
            message = pb.ComputeGradientsRequest(max_inline_bytes=inline_bytes(self._rpc))
            codec.encode_gradient_query(query, message)
            inputs = from_nested(tensor_leaves(args), "args")
            codec.encode_batch(Batch(uploads.send_apart((inputs,))[0]), message.batch)
            return message

        def fetch(reply: pb.ComputeGradientsResponse) -> list[Any]:
            result = codec.decode_gradient_result(reply)
            return receive(self._rpc, (result.input_gradients, result.outputs))

        gradients, outputs = prepared.call("ComputeGradients", request, fetch)
        return prepared.exported.finish(gradients, outputs, with_value)

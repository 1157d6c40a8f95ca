"""The calls of one model that a client's own autograd makes: forwards retained, gone back through, and let go of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gradwire.calls import Call
from gradwire.deadline import Deadline
from gradwire.forward_requests import forward_request
from gradwire.rpc import Rpc, new_request_id
from gradwire.transfer import Uploads, inline_bytes, receive
from gradwire.variants import Variants
from gradwire_proto import codec
from gradwire_proto.batch_check import flatten
from gradwire_proto.names import command_name, model_name
from gradwire_proto.tensors import from_any
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import BackwardQuery, Retention, StepResult, Value, Variant, in_key_order, leaves


@dataclass(frozen=True, kw_only=True)
class RetainedOutputs:
    """What a retained forward gave. leaves: its outputs by leaf; differentiable: which of them have a gradient.

    inputs: the user's tensors that require gradients. name: None where nothing was retained. rebuild: makes the
    module's own kind of output of leaves in order.
    """

    name: str | None
    leaves: list[Any]
    differentiable: frozenset[int]
    inputs: list[torch.Tensor]
    rebuild: Callable[[Sequence[Any]], Any]


class AutogradCalls:
    """Makes the calls. What is given is read at once, and errors are those of `ModelCalls`.

    `changed` hears of every call that changes the model. deadline: that of the call of the SDK of which the call made
    here is a part.
    """

    def __init__(self, rpc: Rpc, model_id: str, variants: Variants, changed: Callable[[], None]) -> None:
        self._rpc = rpc
        self._id = model_id
        self._name = model_name(model_id)
        self._variants = variants
        self._changed = changed

    def forward(
        self, inputs: Any, *, training: bool, wrt: tuple[str, ...] | None, release: Sequence[str]
    ) -> Call[RetainedOutputs]:
        """A forward that is retained. wrt: the parameters that `backward` may add gradients of; None for all."""
        request, uploads, variant = forward_request(
            self._rpc, self._name, self._variants, inputs, training=training, is_read=False
        )
        wanted = {
            index: leaf
            for index, leaf in enumerate(_in_order(variant, inputs))
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad
        }
        codec.encode_retention(Retention(wrt=wrt, inputs=tuple(wanted), release=tuple(release)), request.retain)

        def finish(reply: pb.ForwardResponse) -> RetainedOutputs:
            result = codec.decode_forward_result(reply)
            outputs = receive(self._rpc, (result.outputs,))[0]
            return RetainedOutputs(
                name=result.retained,
                leaves=[leaf for _, leaf in leaves(outputs)],
                differentiable=frozenset(result.differentiable_outputs),
                inputs=list(wanted.values()),
                rebuild=lambda flat: self._variants.rebuild(variant, _refilled(outputs, flat)),
            )

        return self._command("Forward", request, finish, uploads)

    def backward(
        self, query: BackwardQuery, cotangents: Sequence[torch.Tensor | None], deadline: Deadline
    ) -> Call[list[torch.Tensor | None] | None]:
        """Adds the gradients of a retained forward to those that the service holds; returns those of its inputs."""
        request = pb.BackwardRequest(name=self._name, max_inline_bytes=inline_bytes(self._rpc))
        codec.encode_backward_query(query, request)
        values = [None if each is None else from_any(each) for each in cotangents]
        uploads = Uploads(self._rpc, deadline)
        codec.encode_cotangents(uploads.send_apart((values,))[0], request)

        def finish(reply: pb.BackwardResponse) -> list[torch.Tensor | None] | None:
            return receive(self._rpc, (codec.decode_backward_result(reply).input_gradients,))[0]

        return self._command("Backward", request, finish, uploads)

    def releaser(self) -> Callable[[Sequence[str]], None]:
        """A function that lets go of retained forwards at once, and that keeps nothing of the model alive."""
        rpc, name = self._rpc, self._name

        def release(names: Sequence[str]) -> None:
            # Once: a forward may be waiting for this, and what is not released expires.
            rpc.call("Release", pb.ReleaseRequest(name=name, retained=names), repeat=False)

        return release

    def held_gradients(self, wrt: tuple[str, ...] | None) -> Call[dict[str, torch.Tensor]]:
        """The gradients that the service holds. wrt: names or globs of parameters; None for all."""
        request = pb.GetGradientsRequest(name=self._name, wrt=wrt or (), max_inline_bytes=inline_bytes(self._rpc))

        def finish(reply: pb.GetGradientsResponse) -> dict[str, torch.Tensor]:
            return receive(self._rpc, (codec.decode_named_tensors(reply.gradients),))[0]

        return Call("GetGradients", request, finish)

    def set_gradients(
        self, gradients: Mapping[str, torch.Tensor], dropped: Sequence[str], deadline: Deadline
    ) -> Call[None]:
        """Replaces gradients that the service holds, and drops others."""
        request = pb.SetGradientsRequest(name=self._name, dropped=dropped)
        values = {name: from_any(each, f'gradients["{name}"]') for name, each in gradients.items()}
        uploads = Uploads(self._rpc, deadline)
        codec.encode_named_tensors(uploads.send_apart((values,))[0], request.gradients)
        return self._command("SetGradients", request, lambda _: None, uploads)

    def optimizer_step(self, groups: Sequence[Mapping[str, Value]]) -> Call[StepResult]:
        """Applies the held gradients, after the parameter groups took these options."""
        request = pb.OptimizerStepRequest(name=self._name)
        if any(groups):
            codec.encode_group_options(groups, request)
        return self._command("OptimizerStep", request, lambda reply: codec.decode_step_result(reply.result))

    def _command(
        self, method: str, request: Any, finish: Callable[[Any], Any], uploads: Uploads | None = None
    ) -> Call[Any]:
        self._changed()
        request.request_id = new_request_id()
        return Call(method, request, finish, command_name(self._id, request.request_id), uploads)


def _refilled(value: Any, flat: Sequence[Any]) -> Any:
    """The same nesting with these leaves, in order."""
    return _filled(value, iter(flat))


def _filled(value: Any, remaining: Iterator[Any]) -> Any:
    # No inner function: one that calls itself is in a cycle, which keeps the leaves until Python collects garbage.
    if isinstance(value, (tuple, list)):
        return type(value)(_filled(item, remaining) for item in value)
    if isinstance(value, dict):
        return {key: _filled(item, remaining) for key, item in value.items()}
    return None if value is None else next(remaining)


def _in_order(variant: Variant | None, inputs: Any) -> list[Any]:
    """The leaves of `inputs` as the service counts them. `variant` None: it makes its own."""
    if variant is None:
        return [leaf for _, leaf in leaves(in_key_order(inputs))]
    return flatten(variant.input_structure, inputs, "inputs")

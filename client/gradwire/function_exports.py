"""Exports of plain functions: made once for each kind of arguments, and named to the service by digest after that."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch

from gradwire.captured import Unknown, fingerprint
from gradwire.errors import FailedPrecondition
from gradwire.function_arguments import check_argnums
from gradwire.functions import ExportedFunction, export_function
from gradwire.rpc import Rpc
from gradwire.transfer import Uploads
from gradwire_proto import codec
from gradwire_proto.tensors import from_torch
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import Batch, FunctionSpec

R = TypeVar("R")

_REMEMBERED = 256
"""Exports kept at most. They hold no tensors, and nothing of the user's but code objects."""


class _Request(Protocol):
    @property
    def function(self) -> pb.Function: ...


class FunctionExports:
    """The exports of one client."""

    def __init__(self, rpc: Rpc) -> None:
        self._rpc = rpc
        self._remembered: OrderedDict[Any, ExportedFunction] = OrderedDict()
        self._lock = threading.Lock()

    def prepare(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        argnums: int | tuple[int, ...],
        has_aux: bool,
        *,
        scalar: bool,
        known_by: Any = None,
    ) -> PreparedFunction:
        """`fn`, exported for such arguments unless it was before. See `export_function`.

        known_by: the user's own function, where `fn` only passes arguments on to it.
        """
        key = _key(known_by or fn, args, argnums, has_aux, scalar)

        def export() -> ExportedFunction:
            return export_function(fn, args, argnums=argnums, has_aux=has_aux, scalar=scalar)

        exported, whole = self._recall(key), None
        if exported is None:
            whole = export()
            exported = self._remember(key, whole)
        return PreparedFunction(self._rpc, exported, whole, export)

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


class PreparedFunction:
    """A function that can be asked about. `exported`: it without its program and tensors."""

    def __init__(
        self,
        rpc: Rpc,
        exported: ExportedFunction,
        whole: ExportedFunction | None,
        export: Callable[[], ExportedFunction],
    ) -> None:
        self._rpc = rpc
        self.exported = exported
        self._whole = whole
        self._export = export

    def fresh_seed(self) -> int | None:
        """A seed from torch's generator, if the function draws random numbers."""
        return int(torch.randint(2**62, ())) if self.exported.is_random else None

    def call(self, method: str, request: Callable[[Uploads], _Request], finish: Callable[[Any], R]) -> R:
        """What `finish` makes of the reply to a request about the function.

        request: makes the message without the function, anew each time that it is asked, given what to send tensors
        apart with.

        Raises FailedPrecondition FUNCTION_CHANGED where the service has forgotten the function, and it reads other
        values now than when it was prepared.
        """
        uploads = Uploads(self._rpc, for_read=True)
        message = request(uploads)
        codec.encode_function(self.exported.spec, message.function)
        try:
            return self._rpc.call(
                method, message, deadline=uploads.deadline, finish=finish, send_again=uploads.send_again
            )
        except FailedPrecondition as error:
            if error.reason != "FUNCTION_UNKNOWN":
                raise
        self._whole = whole = self._whole or self._export()
        if whole.spec.digest != self.exported.spec.digest:
            raise FailedPrecondition(
                "the service has forgotten the function, and what it reads has changed: start anew",
                reason="FUNCTION_CHANGED",
            )
        # Handles serve one request, so that big arguments go up again.
        deadline = uploads.deadline
        uploads = Uploads(self._rpc, deadline, for_read=True)
        message = request(uploads)
        constants = {name: from_torch(tensor) for name, tensor in whole.constants.items()}
        codec.encode_function(replace(whole.spec, tensors=uploads.send_apart((constants,))[0]), message.function)
        return self._rpc.call(method, message, deadline=deadline, finish=finish, send_again=uploads.send_again)


def positions_of(argnums: int | tuple[int, ...], count: int) -> int | tuple[int, ...]:
    """`argnums` counted from the front of `count` arguments. Raises InvalidArgument ARGNUMS_INVALID."""
    positions = check_argnums(argnums, count)
    return positions if isinstance(argnums, tuple) else positions[0]


def _key(fn: Any, args: tuple[Any, ...], argnums: int | tuple[int, ...], has_aux: bool, scalar: bool) -> Any:
    """What an export depends on: the function, all that it reads, and what the arguments look like. None: unknown."""
    ambient = (torch.get_default_dtype(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))
    try:
        return (fingerprint(fn, args), argnums, has_aux, scalar, *ambient)
    except Unknown:
        return None

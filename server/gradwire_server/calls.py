"""What the service knows about a request besides its message."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from gradwire_proto.values import SplitDecision, TensorData


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A command of the journal that is applied once more, to ranks that have not seen it. `number`: the one it had.

    `uploads`: the tensors that its handles named, by upload. `splits`: how batches of the variants that it brought were
    spread. `answered`: whether somebody may ask for its answer.
    """

    number: int
    uploads: Mapping[str, Sequence[TensorData]]
    splits: Mapping[str, SplitDecision]
    answered: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request. `arrived` and `deadline` are seconds of time.monotonic(); `deadline` None: there is none.

    `method` is the RPC's name, `raw` the message as it arrived. `request_id` is the caller's, None where it gave none;
    `body` is the fingerprint of method and message: the same request id with another body is another request; without
    `body_checks` it is one of less than the message. `replay`: None for what a client sends.

    `answered`: may be handed the response's bytes, once, as soon as there are any; what the call returns says the same
    a little later, when all else about it is done, too.
    """

    arrived: float = field(default_factory=time.monotonic)
    deadline: float | None = None
    method: str = ""
    raw: bytes = b""
    request_id: str | None = None
    body: bytes = b""
    body_checks: bool = True
    replay: Replay | None = None
    answered: Callable[[bytes], None] | None = None

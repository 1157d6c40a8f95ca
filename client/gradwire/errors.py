"""Every error of the SDK: the hierarchy of `gradwire_proto.errors`, and what Ctrl-C raises inside a call.

try:
    model.train_step(x, y)
except gradwire.errors.GradwireError as error:
    print(error.reason, error.outcome, error.request_id)
"""

from __future__ import annotations

from gradwire_proto.errors import (
    AlreadyExists,
    Cancelled,
    CheckpointNotFound,
    DatasetNotFound,
    DeadlineExceeded,
    ExportError,
    FailedPrecondition,
    GradwireError,
    InternalError,
    InvalidArgument,
    ModelNotFound,
    PermissionDenied,
    RankLost,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)

__all__ = [
    "AlreadyExists",
    "Cancelled",
    "CheckpointNotFound",
    "DatasetNotFound",
    "DeadlineExceeded",
    "ExportError",
    "FailedPrecondition",
    "GradwireError",
    "InternalError",
    "Interrupted",
    "InvalidArgument",
    "ModelNotFound",
    "PermissionDenied",
    "RankLost",
    "ResourceExhausted",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a call that changes a model. A KeyboardInterrupt that knows what became of the call.

    outcome: "applied", "not_applied", or "unknown" where the service did not tell in time.
    request_id: the id of the call, as the service's logs have it.
    """

    def __init__(self, message: str = "", *, outcome: str = "unknown", request_id: str | None = None) -> None:
        super().__init__(message)
        self.outcome = outcome
        self.request_id = request_id

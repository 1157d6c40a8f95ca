"""Everything that can go wrong, as one hierarchy, spoken by SDK, frontend and ranks alike.

GradwireError
├── InvalidArgument            the request is wrong; `field` says where and the message names the bound
│   └── ExportError            a module, loss or function cannot become a program (raised in the SDK)
├── ModelNotFound              no such model (or command, upload, download)
├── CheckpointNotFound         no such checkpoint
├── DatasetNotFound            no such dataset
├── AlreadyExists              that id of a model or dataset, or name of a checkpoint, is taken
├── FailedPrecondition         right request, wrong moment: no optimizer, no held gradients, a failed model ...
├── ResourceExhausted          a limit of the service was reached; the message names the setting
├── DeadlineExceeded           the timeout ran out
├── Cancelled                  the caller gave up
├── Unavailable                the service cannot be reached, is starting or is draining
│   └── RankLost               a rank died or cannot be reached
├── Unauthenticated            no credentials, or wrong ones
├── PermissionDenied           not with these credentials
├── Unimplemented              this service does not know the call
└── InternalError              a defect of the service

An error takes one string and keyword attributes with defaults, so that it survives pickling and copying.
"""

from __future__ import annotations


class GradwireError(Exception):
    """Base of all errors.

    reason: a stable UPPER_SNAKE_CASE word that programs can compare.
    field: the path of the field at fault, such as `batch.inputs[0]`; None where no field is.
    request_id: the id of the request, for logs and for settling an unknown outcome.
    retryable: whether the same call may succeed later; retry_after: seconds to wait, where the service says so.
    outcome: "not_applied", "applied" or "unknown": what became of a command.
    resource: the name of the resource that the error is about, such as `models/digits`; None where no single one is.
    """

    default_reason = "UNKNOWN"
    default_retryable = False

    def __init__(
        self,
        message: str = "",
        *,
        reason: str | None = None,
        field: str | None = None,
        request_id: str | None = None,
        retryable: bool | None = None,
        retry_after: float | None = None,
        outcome: str = "not_applied",
        resource: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.field = field
        self.request_id = request_id
        self.retryable = self.default_retryable if retryable is None else retryable
        self.retry_after = retry_after
        self.outcome = outcome
        self.resource = resource

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message

    def __reduce__(self):
        return (_rebuild, (type(self), self.message, self.attributes()))

    def attributes(self) -> dict:
        """The keyword attributes, as the constructor takes them."""
        return {
            "reason": self.reason,
            "field": self.field,
            "request_id": self.request_id,
            "retryable": self.retryable,
            "retry_after": self.retry_after,
            "outcome": self.outcome,
            "resource": self.resource,
        }


def _rebuild(kind: type[GradwireError], message: str, attributes: dict) -> GradwireError:
    return kind(message, **attributes)


class InvalidArgument(GradwireError, ValueError):
    """The request is wrong."""

    default_reason = "INVALID_ARGUMENT"


class ExportError(InvalidArgument):
    """A module, loss or function cannot become a program whose gradients are PyTorch's."""

    default_reason = "EXPORT_FAILED"


class ModelNotFound(GradwireError, LookupError):
    """No such model, command, upload or download."""

    default_reason = "NOT_FOUND"


class CheckpointNotFound(GradwireError, LookupError):
    """No such checkpoint."""

    default_reason = "CHECKPOINT_NOT_FOUND"


class DatasetNotFound(GradwireError, LookupError):
    """No such dataset."""

    default_reason = "DATASET_NOT_FOUND"


class AlreadyExists(GradwireError):
    """That name is taken."""

    default_reason = "ALREADY_EXISTS"


class FailedPrecondition(GradwireError):
    """The request is right, but not now."""

    default_reason = "FAILED_PRECONDITION"


class ResourceExhausted(GradwireError):
    """A limit was reached."""

    default_reason = "RESOURCE_EXHAUSTED"


class DeadlineExceeded(GradwireError, TimeoutError):
    """The timeout ran out."""

    default_reason = "DEADLINE_EXCEEDED"


class Cancelled(GradwireError):
    """The caller gave up."""

    default_reason = "CANCELLED"


class Unavailable(GradwireError, ConnectionError):
    """The service cannot be reached now."""

    default_reason = "UNAVAILABLE"
    default_retryable = True


class RankLost(Unavailable):
    """A rank died or cannot be reached."""

    default_reason = "RANK_LOST"
    default_retryable = False


class Unauthenticated(GradwireError):
    """No credentials, or wrong ones."""

    default_reason = "UNAUTHENTICATED"


class PermissionDenied(GradwireError):
    """Not with these credentials."""

    default_reason = "PERMISSION_DENIED"


class Unimplemented(GradwireError):
    """The service does not know this call."""

    default_reason = "UNIMPLEMENTED"


class InternalError(GradwireError):
    """A defect of the service."""

    default_reason = "INTERNAL"


def by_name(name: str) -> type[GradwireError]:
    """The error class of that name, InternalError for a name that is unknown."""
    kind = globals().get(name)
    return kind if isinstance(kind, type) and issubclass(kind, GradwireError) else InternalError

"""What clients hear of errors that they did not cause."""

from __future__ import annotations

import logging
import uuid

from gradwire_proto.errors import GradwireError, InternalError, RankLost, ResourceExhausted, Unavailable

logger = logging.getLogger(__name__)


def public_error(error: BaseException, request_id: str | None, *, outcome: str = "not_applied") -> GradwireError:
    """The error that a client may see. Defects are logged, and only their request id is told: texts of arbitrary
    exceptions hold paths, addresses and pieces of other people's data.
    """
    if isinstance(error, GradwireError) and not isinstance(error, InternalError):
        return error
    if isinstance(error, InternalError):
        if error.request_id is not None:  # Logged where it was met.
            return error
        outcome = error.outcome
    request_id = request_id or str(uuid.uuid4())
    logger.error("request %s failed", request_id, exc_info=error)
    return InternalError(
        f"a defect of the service; its log says more under the request id {request_id}",
        request_id=request_id,
        outcome=outcome,
    )


def answer_of(error: BaseException, request_id: str | None) -> GradwireError:
    """The error that a client is told in answer to its request, which it names.

    Where it came from is left out: those frames hold the request, and, where one of them holds the error, for as long
    as the collector of cycles pleases.
    """
    answer = public_error(error, request_id)
    answer.request_id = answer.request_id or request_id
    answer.__cause__ = answer.__context__ = None
    return answer.with_traceback(None)


def may_pass(error: Exception) -> bool:
    """Whether a model may come back when it is tried again later: ranks, memory or storage are not there now."""
    if isinstance(error, RankLost):
        return False
    read_only = isinstance(error, GradwireError) and error.reason == "STORAGE_READ_ONLY"
    return read_only or isinstance(error, Unavailable | ResourceExhausted)

"""What clients hear of errors that they did not cause."""

from __future__ import annotations

import logging
import uuid

from gradwire_proto.errors import GradwireError, InternalError

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

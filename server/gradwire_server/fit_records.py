"""What the journal records of some steps of a fit."""

from __future__ import annotations

from gradwire_proto.codec import decode_timing, encode_timing
from gradwire_proto.status import from_status, to_status
from gradwire_proto.v1.dataset_pb2 import FitStepsResponse
from gradwire_proto.values import StepsResult

FIT_STEPS = "FitSteps"
"""The method of these records. No client calls it: Fit does."""


def encode_steps_result(value: StepsResult) -> FitStepsResponse:
    """The record of what some steps gave."""
    message = FitStepsResponse(
        losses=value.losses,
        step=value.step,
        fit=value.fit,
        first_step=value.first_step,
        validation_loss=value.validation_loss,
        error=None if value.error is None else to_status(value.error),
    )
    encode_timing(value.timing, message.timing)
    return message


def decode_steps_result(message: FitStepsResponse) -> StepsResult:
    """What some steps gave."""
    return StepsResult(
        losses=tuple(message.losses),
        step=message.step,
        fit=message.fit,
        first_step=message.first_step,
        timing=decode_timing(message.timing),
        validation_loss=message.validation_loss if message.HasField("validation_loss") else None,
        error=from_status(message.error) if message.HasField("error") else None,
    )

"""Replies as they are stored: what comes back is what went in."""

from __future__ import annotations

import time
from typing import Any

import pytest

from gradwire_proto import codec
from gradwire_proto.errors import FailedPrecondition
from gradwire_proto.values import BackwardResult, ForwardResult, Handle, StepResult, TensorData, Timing
from gradwire_server import stored_replies
from gradwire_server.current_spec import CurrentSpec
from gradwire_server.model_description import ModelDescription
from gradwire_server.rpc_handlers import SERVICE
from gradwire_server.stored_replies import EndedCommand, decode_reply, stored_reply

STEP = StepResult(loss=0.1, step=3, num_examples=2, lr=None, timing=Timing(queue=0.25, total=0.5), rank_rows=(1, 1))
TENSOR = TensorData("float32", (1, 2), b"abcdefgh")


@pytest.mark.parametrize(
    ("method", "result"),
    [
        ("TrainStep", STEP),
        ("ForwardBackward", STEP),
        ("OptimizerStep", StepResult(loss=None, step=1)),
        ("ZeroGrad", None),
        ("LoadStateDict", 7),
        ("LoadOptimizerState", 7),
        ("SetGradients", 7),
        ("Forward", ForwardResult(outputs=[TENSOR, 1], step=2, retained="0" * 32, differentiable_outputs=(0,))),
        ("Backward", BackwardResult(input_gradients=[TENSOR, None], step=2)),
    ],
)
def test_result_comes_back_from_its_stored_reply(method: str, result: Any) -> None:
    raw = stored_reply(method, result)
    assert raw is not None and decode_reply(method, raw) == result


def test_every_command_has_a_form() -> None:
    of_requests = {m.name for m in SERVICE.methods if "request_id" in m.input_type.fields_by_name}
    # Those of checkpoints and datasets, and deletions, are remembered apart; a fit is recorded by its steps, and nobody
    # asks for kernels to be taken into use.
    apart = {"CreateCheckpoint", "DeleteCheckpoint", "DeleteModel", "CreateDataset", "DeleteDataset", "Fit"}
    assert of_requests - apart == set(stored_replies._FORMS) - {"FitSteps", "SwapKernels"}


async def test_reply_that_names_a_download_or_is_too_large_is_not_stored(monkeypatch: Any) -> None:
    handle = TensorData("float32", (1, 2), Handle("downloads/d/tensors/0"))
    assert stored_reply("Forward", ForwardResult(outputs=handle, step=1)) is None
    monkeypatch.setattr(stored_replies, "REPLY_BYTES", 7)
    assert stored_reply("Forward", ForwardResult(outputs=TENSOR, step=1)) is None
    with pytest.raises(FailedPrecondition) as caught:
        await EndedCommand(1, "Forward", None).result(None)
    assert (caught.value.reason, caught.value.outcome) == ("REPLY_FORGOTTEN", "applied")


def test_spec_of_a_model_comes_back_with_its_graphs_and_the_time_to_the_bit(fakes: Any) -> None:
    now = time.time()
    spec = CurrentSpec(fakes.model_spec(durability="disk", checkpoint_every=3), now)
    spec.add_variant(fakes.variant("more"), (), {})
    again = CurrentSpec.decode(spec.encoded())
    assert again.value == spec.value and again.created_at == now
    assert again.value.program.variants[1].graph == fakes.variant().graph


def test_description_of_a_model_that_goes_back_shows_where_it_was(fakes: Any) -> None:
    description = ModelDescription("m", fakes.model_spec())
    description.ready()
    description.applied(STEP)
    first = CurrentSpec(fakes.model_spec(), description.info.created_at)
    description.recovering()
    description.goes_back_to(first, 0)
    assert (description.info.step, description.shown.step, description.shown.state) == (0, 3, "recovering")
    assert codec.encode_model_info(description.shown).step == 3
    description.applied(STEP)
    description.ready()
    assert (description.shown.step, description.shown.state) == (3, "ready")

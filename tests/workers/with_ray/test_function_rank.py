"""Gradients of functions that no model holds."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from gradwire.functions import export_function
from gradwire_proto.errors import FailedPrecondition, InvalidArgument, RankLost
from gradwire_proto.tensors import from_any, from_nested, to_torch
from gradwire_proto.values import Batch, FunctionSpec, GradientQuery

pytestmark = pytest.mark.asyncio(loop_scope="session")

QUERY = GradientQuery(wrt=(), input_gradients=True, outputs=True, training=False)


def exported(function, *arguments) -> tuple[FunctionSpec, Batch]:
    result = export_function(function, arguments)
    spec = result.spec
    constants = {name: from_any(value) for name, value in result.constants.items()}
    return (
        FunctionSpec(digest=spec.digest, program=spec.program, tensors=constants, output_leaf=spec.output_leaf),
        Batch(from_nested(result.batch.inputs)),
    )


def known(function: FunctionSpec) -> FunctionSpec:
    return FunctionSpec(digest=function.digest, program=None, tensors={})


async def test_a_functions_value_and_gradient_are_torchs(cluster):
    w = torch.randn(5)
    function, batch = exported(lambda w: (w * w).sin().sum(), w)
    for again in (function, known(function)):
        result = await cluster.compute_function_gradients(again, batch, QUERY)
        assert result.loss == pytest.approx((w * w).sin().sum().item(), rel=1e-5)
        gradient = result.input_gradients[0]
        assert torch.allclose(to_torch(gradient), 2 * w * (w * w).cos(), atol=1e-6)


async def test_a_digest_that_nobody_sent_a_program_for_is_unknown(cluster):
    with pytest.raises(FailedPrecondition) as caught:
        await cluster.compute_function_gradients(FunctionSpec(digest="00", program=None, tensors={}), Batch(()), QUERY)
    assert caught.value.reason == "FUNCTION_UNKNOWN"


async def test_wrong_inputs_of_a_known_function_are_refused(cluster):
    function, batch = exported(lambda w: (w**3).sum(), torch.randn(4))
    await cluster.compute_function_gradients(function, batch, QUERY)
    with pytest.raises(InvalidArgument) as caught:
        await cluster.compute_function_gradients(known(function), Batch(from_nested((torch.randn(5),))), QUERY)
    assert caught.value.reason == "SHAPE_MISMATCH"


async def test_many_functions_are_forgotten_in_order_of_use(cluster):
    functions = [exported(lambda w, k=k: (w * (k + 1)).sum(), torch.randn(3)) for k in range(66)]
    for function, batch in functions:
        await cluster.compute_function_gradients(function, batch, QUERY)
    with pytest.raises(FailedPrecondition):
        await cluster.compute_function_gradients(known(functions[0][0]), functions[0][1], QUERY)
    await cluster.compute_function_gradients(known(functions[-1][0]), functions[-1][1], QUERY)
    await cluster.compute_function_gradients(*functions[0], QUERY)


async def test_a_lost_function_rank_is_replaced_and_knows_nothing(cluster):
    function, batch = exported(lambda w: (w**2).sum(), torch.randn(4))
    await cluster.compute_function_gradients(function, batch, QUERY)
    os.kill(cluster._functions._ranks.processes[0].process_id, signal.SIGKILL)
    with pytest.raises((FailedPrecondition, RankLost)):
        await cluster.compute_function_gradients(known(function), batch, QUERY)
    result = await cluster.compute_function_gradients(function, batch, QUERY)
    assert result.rank_rows == (4,)

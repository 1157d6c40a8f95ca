"""Gradients of functions that no model holds."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from processes import alive

from gradwire.functions import export_function
from gradwire_proto.errors import FailedPrecondition, InvalidArgument, RankLost
from gradwire_proto.tensors import from_any, from_nested, to_torch
from gradwire_proto.values import Batch, FunctionSpec, GradientQuery
from gradwire_workers import function_rank, segments
from gradwire_workers.segments import SegmentWriter

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
        result = await cluster.of("").compute_function_gradients(again, batch, QUERY)
        assert result.loss == pytest.approx((w * w).sin().sum().item(), rel=1e-5)
        gradient = result.input_gradients[0]
        assert torch.allclose(to_torch(gradient), 2 * w * (w * w).cos(), atol=1e-6)


async def test_a_digest_that_nobody_sent_a_program_for_is_unknown(cluster):
    with pytest.raises(FailedPrecondition) as caught:
        await cluster.of("").compute_function_gradients(
            FunctionSpec(digest="00", program=None, tensors={}), Batch(()), QUERY
        )
    assert caught.value.reason == "FUNCTION_UNKNOWN"


async def test_functions_without_a_digest_are_told_apart(cluster):
    w = torch.randn(4)
    for factor in (2.0, 3.0, 2.0):
        function, batch = exported(lambda w, factor=factor: (w * factor).sum(), w)
        result = await cluster.of("").compute_function_gradients(replace(function, digest=""), batch, QUERY)
        assert to_torch(result.input_gradients[0]).tolist() == [factor] * 4
    result = await cluster.of("").compute_function_gradients(known(function), batch, QUERY)
    assert to_torch(result.input_gradients[0]).tolist() == [2.0] * 4


async def test_a_digest_that_is_not_the_functions_is_refused(cluster):
    w = torch.randn(4)
    function, batch = exported(lambda w: (w * 4).sum(), w)
    other, _ = exported(lambda w: (w * 5).sum(), w)
    for lie in (replace(function, digest=other.digest), replace(function, output_leaf=1)):
        with pytest.raises(InvalidArgument) as caught:
            await cluster.of("").compute_function_gradients(lie, batch, QUERY)
        assert (caught.value.reason, caught.value.field) == ("DIGEST_MISMATCH", "function.digest")
    result = await cluster.of("").compute_function_gradients(other, batch, QUERY)
    assert to_torch(result.input_gradients[0]).tolist() == [5.0] * 4


async def test_constants_in_segments_have_the_same_digest(cluster, memory_folder):
    offset, w = torch.randn(1000), torch.randn(1000)
    function, batch = exported(lambda w: (w * offset).sum(), w)
    names, values = zip(*function.tensors.items(), strict=True)
    written = dict(zip(names, SegmentWriter(memory_folder, "upload").write(values), strict=True))
    result = await cluster.of("").compute_function_gradients(replace(function, tensors=written), batch, QUERY)
    segments.release(written)
    assert torch.equal(to_torch(result.input_gradients[0]), offset)


async def test_a_function_that_is_given_up_ends_with_its_rank_and_holds_nobody_up(cluster):
    function, batch = exported(lambda w: (w**2).sum(), torch.randn(4))
    await cluster.of("").compute_function_gradients(function, batch, QUERY)
    await cluster.warm()
    first = cluster.functions("")._ranks.processes[0]
    # It computes, for all that the frontend can tell, and does not come to an end.
    os.kill(first.process_id, signal.SIGSTOP)
    try:
        computing = asyncio.create_task(cluster.of("").compute_function_gradients(function, batch, QUERY))
        await asyncio.sleep(0.2)
        assert not computing.done()
        computing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await computing
        result = await asyncio.wait_for(cluster.of("").compute_function_gradients(function, batch, QUERY), 10)
        assert result.rank_rows == (4,)
        assert not first.alive
    finally:
        with suppress(ProcessLookupError):
            os.kill(first.process_id, signal.SIGCONT)
    await first.kill()
    assert not alive(first.process_id)


async def test_wrong_inputs_of_a_known_function_are_refused(cluster):
    function, batch = exported(lambda w: (w**3).sum(), torch.randn(4))
    await cluster.of("").compute_function_gradients(function, batch, QUERY)
    with pytest.raises(InvalidArgument) as caught:
        await cluster.of("").compute_function_gradients(known(function), Batch(from_nested((torch.randn(5),))), QUERY)
    assert caught.value.reason == "SHAPE_MISMATCH"


async def test_many_functions_are_forgotten_in_order_of_use(cluster, monkeypatch):
    monkeypatch.setattr(function_rank, "_REMEMBERED_FUNCTIONS", 6)
    functions = [exported(lambda w, k=k: (w * (k + 1)).sum(), torch.randn(3)) for k in range(8)]
    for function, batch in functions:
        await cluster.of("").compute_function_gradients(function, batch, QUERY)
    with pytest.raises(FailedPrecondition):
        await cluster.of("").compute_function_gradients(known(functions[0][0]), functions[0][1], QUERY)
    await cluster.of("").compute_function_gradients(known(functions[-1][0]), functions[-1][1], QUERY)
    await cluster.of("").compute_function_gradients(*functions[0], QUERY)


async def test_a_lost_function_rank_is_replaced_and_knows_nothing(cluster):
    function, batch = exported(lambda w: (w**2).sum(), torch.randn(4))
    await cluster.of("").compute_function_gradients(function, batch, QUERY)
    os.kill(cluster.functions("")._ranks.processes[0].process_id, signal.SIGKILL)
    with pytest.raises((FailedPrecondition, RankLost)):
        await cluster.of("").compute_function_gradients(known(function), batch, QUERY)
    result = await cluster.of("").compute_function_gradients(function, batch, QUERY)
    assert result.rank_rows == (4,)

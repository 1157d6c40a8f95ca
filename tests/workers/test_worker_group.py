"""A worker group's results are plain torch's on the whole batch, and its failures leave it as it was."""

from __future__ import annotations

import asyncio
import copy
import gc
from pathlib import Path

import pytest
import torch
from torch import nn

from gradwire.export import ModuleExporter
from gradwire_proto.errors import FailedPrecondition, InternalError, InvalidArgument
from gradwire_proto.tensors import from_any, from_nested, to_torch
from gradwire_proto.values import Batch, GradientQuery, Segment, TensorData, leaves
from gradwire_workers import segments
from gradwire_workers.segments import SegmentWriter

pytestmark = pytest.mark.asyncio(loop_scope="session")


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3))


def data(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 10), torch.randint(0, 3, (rows,))


def close(data: TensorData, expected: torch.Tensor) -> bool:
    return torch.allclose(to_torch(data), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("workers", [1, 2])
async def test_training_is_torchs_on_any_number_of_ranks(start, in_batch, workers):
    module, loss = net(), nn.CrossEntropyLoss()
    reference = copy.deepcopy(module)
    group = await start(module, loss, *data(4), workers=workers)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    for command, rows in enumerate([7, 2, 1, 64]):
        x, y = data(rows)
        result = await group.train_step(in_batch(x, y), command=command)
        optimizer.zero_grad()
        expected = loss(reference(x), y)
        expected.backward()
        optimizer.step()
        assert result.loss == pytest.approx(expected.item(), rel=1e-5)
        assert (result.step, result.num_examples, sum(result.rank_rows)) == (command + 1, rows, rows)
        assert len(result.rank_rows) == workers
        assert max(result.rank_rows) - min(result.rank_rows) <= 1
        assert 0 < result.timing.compute <= result.timing.total
    tensors, step = await group.state_dict(None)
    assert step == 4
    for name, expected in reference.state_dict().items():
        assert close(tensors[name], expected), name


async def test_held_gradients_and_client_gradients_reach_the_optimizer(start, in_batch):
    module, loss = net(), nn.CrossEntropyLoss()
    reference = copy.deepcopy(module)
    group = await start(module, loss, *data(4), workers=2)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        x, y = data(5)
        await group.forward_backward(in_batch(x, y), command=1)
        loss(reference(x), y).backward()
    await group.optimizer_step(None, lr=0.05)
    optimizer.param_groups[0]["lr"] = 0.05
    optimizer.step()
    await group.zero_grad()
    with pytest.raises(FailedPrecondition) as caught:
        await group.optimizer_step(None)
    assert caught.value.reason == "NO_GRADIENTS"
    gradient = torch.randn(3, 8)
    await group.optimizer_step({"2.weight": from_any(gradient)}, lr=0.1)
    optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = 0.1
    reference[2].weight.grad = gradient
    optimizer.step()
    tensors, _ = await group.state_dict(("2.*",))
    assert list(tensors) == ["2.weight", "2.bias"]
    for name, tensor in tensors.items():
        assert close(tensor, reference.state_dict()[name])


@pytest.mark.parametrize("rows", [3, 40_000])
async def test_gradients_and_outputs_come_back_whole_whatever_their_size(start, in_batch, memory_folder, rows):
    module, loss = net(), nn.MSELoss()
    x, y = torch.randn(rows, 10), torch.randn(rows, 3)
    group = await start(module, loss, x[:2], y[:2], workers=2)
    query = GradientQuery(input_gradients=True, outputs=True)
    result = await group.compute_gradients(in_batch(x, y), query)
    x.requires_grad_()
    outputs = module(x)
    loss(outputs, y).backward()
    assert close(result.outputs, outputs.detach())
    assert close(result.input_gradients, x.grad)
    for name, parameter in module.named_parameters():
        assert close(result.gradients[name], parameter.grad), name
    used = {
        leaf.data.path
        for _, leaf in leaves([result.outputs, result.input_gradients, dict(result.gradients)])
        if isinstance(leaf.data, Segment)
    }
    assert bool(used) is (rows > 1000)
    assert {str(path) for path in memory_folder.iterdir()} == used, "nothing but what the result names is left"
    segments.release(dict(result.gradients), result.outputs, result.input_gradients)
    assert not list(memory_folder.iterdir())


async def test_request_tensors_may_lie_in_segments(start, in_batch, memory_folder: Path):
    module = net()
    x = torch.randn(7, 10)
    group = await start(module, None, torch.randn(2, 10), workers=2)
    (data,) = SegmentWriter(memory_folder, "upload").write([from_any(x)])
    result = await group.forward(data, training=False, seed=None, command=0)
    segments.release(data)
    assert close(result.outputs, module(x).detach())
    assert result.rank_rows == (4, 3)


async def test_a_state_dict_goes_up_and_comes_down_bit_for_bit(start, memory_folder):
    module = nn.Linear(1000, 700)
    group = await start(module, None, torch.randn(2, 1000), workers=2)
    new = {"weight": torch.randn(700, 1000), "bias": torch.randn(700)}
    await group.load_state_dict({name: from_any(tensor) for name, tensor in new.items()}, partial=False)
    tensors, step = await group.state_dict(None)
    assert step == 0
    for name, tensor in new.items():
        assert torch.equal(to_torch(tensors[name]), tensor)
    segments.release(tensors)
    gc.collect()
    assert not list(memory_folder.iterdir())


async def test_an_error_on_one_rank_only_changes_nothing_and_the_group_goes_on(start, in_batch):
    module, loss = net(), nn.CrossEntropyLoss()
    reference = copy.deepcopy(module)
    group = await start(module, loss, *data(4), workers=2)
    x, y = data(6)
    wrong = y.clone()
    wrong[5] = 3  # in the second rank's rows
    with pytest.raises(InvalidArgument) as caught:
        await group.train_step(in_batch(x, wrong), command=1)
    assert caught.value.reason == "TARGET_OUT_OF_RANGE"
    assert group.rank_lost is None
    result = await group.train_step(in_batch(x, y), command=2)
    assert result.step == 1
    assert result.loss == pytest.approx(loss(reference(x), y).item(), rel=1e-5)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(10, 3)

    def forward(self, x, mask):
        return self.linear(x) * mask.unsqueeze(1)


async def test_a_shard_that_one_rank_cannot_read_does_not_leave_the_others_waiting(start, in_batch):
    x, mask, y = torch.randn(6, 10), torch.ones(6, dtype=torch.bool), torch.randn(6, 3)
    group = await start(Masked(), nn.MSELoss(), (x, mask), y, workers=2)
    batch = in_batch((x, mask), y)
    no_bool = TensorData("bool", (6,), bytes([1, 1, 1, 1, 1, 2]))  # in the second rank's rows
    for call in (group.train_step, group.forward_backward):
        with pytest.raises(InvalidArgument) as caught:
            await asyncio.wait_for(call(Batch((batch.inputs[0], no_bool), batch.targets), command=1), 20)
        assert caught.value.reason == "TENSOR_NOT_BOOL"
    assert group.rank_lost is None
    assert (await group.train_step(batch, command=2)).step == 1


async def test_what_every_rank_refuses_by_itself_costs_no_new_connections(start, in_batch):
    group = await start(net(), nn.CrossEntropyLoss(), *data(4), workers=2, optimizer=None)
    for call in (group.optimizer_step(None), group.train_step(in_batch(*data(4)), command=1)):
        with pytest.raises(FailedPrecondition):
            await call
    with pytest.raises(InvalidArgument):
        await group.compute_gradients(in_batch(*data(4)), GradientQuery(wrt=("nothing",)))
    assert group._ranks._generation == 1


class Wide(nn.Module):
    """Outputs of 0.3 MB a row, and a buffer that moves."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(10), nn.Linear(10, 75_000)

    def forward(self, x):
        return self.linear(self.norm(x))


async def moves(group) -> int:
    tensors, _ = await group.state_dict(["norm.num_batches_tracked"])
    return int(to_torch(tensors["norm.num_batches_tracked"]))


async def test_a_forward_whose_outputs_are_lost_is_applied_and_the_group_goes_on(start, memory_folder, tmp_path):
    group = await start(Wide(), None, torch.randn(2, 10), workers=2)
    away = memory_folder.with_name(f"{memory_folder.name}-away")
    memory_folder.rename(away)
    try:
        # Of seven rows, only the first rank's four are too many for the message.
        with pytest.raises(InternalError) as caught:
            await group.forward(from_any(torch.randn(7, 10)), training=True, seed=None, command=1)
    finally:
        away.rename(memory_folder)
    assert caught.value.outcome == "applied"
    assert group.rank_lost is None
    assert await moves(group) == 1
    group._writer = SegmentWriter(tmp_path / "nowhere", "frontend")
    for training, outcome in ((True, "applied"), (False, "not_applied")):
        with pytest.raises(Exception, match="No such file") as caught:
            await group.forward(from_any(torch.randn(7, 10)), training=training, seed=None, command=2)
        assert getattr(caught.value, "outcome", "not_applied") == outcome
    assert not list(memory_folder.iterdir())
    assert await moves(group) == 2


@pytest.mark.parametrize("workers", [1, 2])
async def test_an_example_that_does_not_fit_is_refused_by_its_place(cluster, specify, in_batch, workers):
    spec, tensors, _ = specify(net(), nn.CrossEntropyLoss(), *data(4), workers=workers)
    for example, reason in (
        (in_batch(torch.randn(4, 9)), "SHAPE_MISMATCH"),
        (in_batch(torch.zeros(4, 10, dtype=torch.int64)), "DTYPE_MISMATCH"),
        (in_batch((torch.randn(4, 10),)), "STRUCTURE_MISMATCH"),
    ):
        with pytest.raises(InvalidArgument) as caught:
            await cluster.start_group(spec, tensors, example)
        assert (caught.value.reason, caught.value.field) == (reason, "example.inputs")


async def test_a_batch_that_fits_no_variant_never_reaches_a_rank(start, in_batch):
    group = await start(net(), nn.CrossEntropyLoss(), *data(4), workers=2)
    with pytest.raises(InvalidArgument) as caught:
        await group.train_step(in_batch(torch.randn(4, 9), torch.zeros(4, dtype=torch.int64)), command=1)
    assert (caught.value.reason, caught.value.field) == ("SHAPE_MISMATCH", "batch.inputs")


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(10, 3)

    def forward(self, x):
        h = self.linear(x)
        return h - h.mean(0)


async def test_a_program_that_mixes_rows_runs_whole_and_says_why(start, in_batch):
    module, loss = Mixing(), nn.CrossEntropyLoss()
    group = await start(module, loss, *data(4), workers=2)
    assert group.sharding.mode == "whole"
    assert group.sharding.reason
    x, y = data(7)
    result = await group.train_step(in_batch(x, y), command=1)
    assert result.rank_rows == (7, 0)
    assert result.loss == pytest.approx(loss(module(x), y).item(), rel=1e-5)
    forward = await group.forward(from_any(x), training=False, seed=None, command=0)
    assert forward.rank_rows[1] == 0


async def test_where_sharding_is_required_a_program_that_mixes_rows_is_refused(start, cluster):
    free = cluster.capacity.free_workers
    with pytest.raises(FailedPrecondition) as caught:
        await start(Mixing(), nn.CrossEntropyLoss(), *data(4), workers=2, require_sharding=True)
    assert (caught.value.reason, caught.value.field) == ("ROWS_NOT_INDEPENDENT", "model.require_sharding")
    assert cluster.capacity.free_workers == free


async def test_several_ranks_without_an_example_are_refused(cluster, specify):
    spec, tensors, _ = specify(net(), nn.CrossEntropyLoss(), *data(4), workers=2)
    with pytest.raises(InvalidArgument) as caught:
        await cluster.start_group(spec, tensors, None)
    assert (caught.value.reason, caught.value.field) == ("EXAMPLE_NEEDED", "example")


async def test_results_have_the_structure_of_the_program(start, in_batch):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, a, b):
            return {"sum": self.linear(a + b), "pair": (a, self.linear(b))}

    module = Two()
    a, b = torch.randn(5, 4), torch.randn(5, 4)
    group = await start(module, None, (a, b), workers=2)
    result = await group.forward(in_batch((a, b)).inputs, training=False, seed=None, command=0)
    expected = module(a, b)
    assert close(result.outputs["sum"], expected["sum"].detach())
    assert close(result.outputs["pair"][0], a)
    assert close(result.outputs["pair"][1], expected["pair"][1].detach())


async def test_an_added_variant_takes_batches_that_did_not_fit_before(start, in_batch):
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 3, batch_first=True)

        def forward(self, x):
            return self.lstm(x)[0]

    module, loss = Recurrent(), nn.MSELoss()
    exporter = ModuleExporter(module, loss)
    x, y = torch.randn(4, 5, 4), torch.randn(4, 5, 3)
    group = await start(module, loss, x, y, workers=2)
    x, y = torch.randn(6, 7, 4), torch.randn(6, 7, 3)
    with pytest.raises(InvalidArgument):
        await group.train_step(in_batch(x, y), command=1)
    added = exporter.export_variant(x, y, training=True, name="train-7")
    await group.add_variant(
        added.variant,
        tensors=added.tensors,
        values={name: from_any(value) for name, value in added.values.items()},
        operators=added.operators,
        example=Batch(from_nested(x), from_nested(y)),
    )
    result = await group.train_step(in_batch(x, y), command=2)
    assert result.rank_rows == (3, 3)
    assert result.loss == pytest.approx(loss(module(x), y).item(), rel=1e-5)


async def test_an_added_variant_whose_example_cannot_be_computed_is_there_and_runs_whole(start, in_batch):
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(10, 3)

        def forward(self, index):
            # A graph for each length: no bounds can say that it is odd.
            words = self.words(index)
            return words.sum(1) if index.shape[1] % 2 else words.mean(1)

    module, loss = Words(), nn.MSELoss()
    exporter = ModuleExporter(module, loss)
    group = await start(module, loss, torch.randint(10, (4, 5)), torch.randn(4, 3), workers=2)
    index, y = torch.randint(10, (6, 7)), torch.randn(6, 3)
    added = exporter.export_variant(index, y, training=True, name="train-7")
    await group.add_variant(
        added.variant,
        tensors=added.tensors,
        values={name: from_any(value) for name, value in added.values.items()},
        operators=added.operators,
        example=in_batch(torch.full((6, 7), 10), y),
    )
    assert group.rank_lost is None
    result = await group.train_step(in_batch(index, y), command=1)
    assert result.rank_rows == (6, 0)
    assert result.loss == pytest.approx(loss(module(index), y).item(), rel=1e-5)

"""Several steps in one message to a rank: the bits of steps that come one by one, up to the first that fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradwire.export import ModuleExporter
from gradwire_proto.batch_check import select_variant
from gradwire_proto.batch_form import BatchForm, FormedStep, form_of
from gradwire_proto.codec import encode_model_spec
from gradwire_proto.errors import InvalidArgument
from gradwire_proto.tensors import from_any
from gradwire_proto.values import Batch, Limits, ModelSpec, OptimizerSpec, TensorData, Variant
from gradwire_workers.frames import pack, unpack
from gradwire_workers.packed_steps import SMALL_BYTES, Layout, pack_steps
from gradwire_workers.rank_commands import RankCommands
from gradwire_workers.rank_steps import KnownLayouts, RankSteps
from gradwire_workers.shard import shard_fields
from gradwire_workers.sharding import split
from gradwire_workers.step_memory import StepMemory
from gradwire_workers.step_rows import (
    RowsPart,
    StepRow,
    decode_part,
    decode_rows,
    encode_part,
    encode_rows,
    step_result,
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 3))


def step_data(rows: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 5, generator=generator)
    y = torch.randint(0, 3, (rows,), generator=generator)
    return Batch(from_any(x), from_any(y))


@pytest.fixture
def variant() -> Variant:
    batch = torch.randn(4, 5), torch.randint(0, 3, (4,))
    exported = ModuleExporter(network(), nn.CrossEntropyLoss()).export_model(*batch)
    return next(each for each in exported.program.variants if each.training)


@pytest.fixture
def start(tmp_path: Path) -> Callable[[], RankCommands]:
    """A new rank with the network, each time."""
    return lambda: started(tmp_path)


@pytest.fixture
def rank(start: Callable[[], RankCommands]) -> RankCommands:
    return start()


def started(folder: Path) -> RankCommands:
    batch = torch.randn(4, 5), torch.randint(0, 3, (4,))
    exported = ModuleExporter(network(), nn.CrossEntropyLoss()).export_model(*batch)
    spec = ModelSpec(program=exported.program, loss=exported.loss, optimizer=OptimizerSpec("SGD", {"lr": 0.1}), seed=3)
    rank = RankCommands("rank-x", str(folder))
    fields = {
        "spec": encode_model_spec(spec).SerializeToString(),
        "tensors": {name: from_any(tensor) for name, tensor in exported.tensors.items()},
        "device": "cpu",
        "rank": 0,
        "size": 1,
        "threads": 1,
        "limits": asdict(Limits()),
        "weights_folder": None,
        "kernels_folder": None,
        "gpus": (),
        "saved": None,
    }
    rank.answer("load", fields)
    rank.answer("start", {})
    return rank


def formed(batch: Batch, lr: float | None = None) -> FormedStep:
    found = form_of(batch)
    assert found is not None
    return FormedStep(BatchForm(batch), [bytes(each) for each in found[1]], lr)


def laid_out(variant: Variant, step: FormedStep, ranks: int = 1) -> Layout:
    batch = step.form.numbered
    _, rows = select_variant([variant], batch, training=True, targets=True)
    return Layout(step.form, split(variant, rows, batch, ranks=ranks, whole=False), rows)


def sent(
    variant: Variant,
    steps: list[FormedStep],
    *,
    ranks: int = 1,
    rank: int = 0,
    first: int = 1,
    memory: StepMemory | None = None,
) -> dict[str, Any]:
    """The fields as they come out of the message."""
    layouts = [laid_out(variant, step, ranks) for step in steps]
    fields, region = pack_steps(steps, layouts, rank=rank, command=first, number=first, memory=memory)
    assert (region is None) == (memory is None)
    return unpack([memoryview(bytes(frame)) for frame in pack({"fields": fields})])["fields"]


def state(rank: RankCommands) -> dict[str, bytes]:
    answer: Any = rank.answer("state_dict", {"names": None})
    return {name: bytes(value.data) for name, value in answer["tensors"].items()}


def alone(rank: RankCommands, variant: Variant, batch: Batch, command: int, lr: float | None) -> Any:
    _, rows = select_variant([variant], batch, training=True, targets=True)
    (shard,) = split(variant, rows, batch, ranks=1, whole=False)
    fields = {"shard": shard_fields(shard), "command": command, "lr": lr, "number": command}
    return rank.answer("train_step", fields)


LARGE = SMALL_BYTES // 20 + 1


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[StepMemory]:
    memory = StepMemory(lambda: str(tmp_path / "steps"))
    yield memory
    memory.close()


@pytest.mark.parametrize("is_shared", [False, True])
def test_steps_together_have_the_bits_of_steps_alone(start, variant, memory, is_shared):
    batches = [step_data(rows, seed) for seed, rows in enumerate((4, 5, 4, 2 * LARGE, 4))]
    rates = [None, 0.3, None, None, 0.2]
    rank, twin = start(), start()
    fields = sent(variant, list(map(formed, batches, rates)), memory=memory if is_shared else None)
    rows = list(rank.answer("train_steps", fields))
    answers = [
        alone(twin, variant, batch, number, lr)
        for number, (batch, lr) in enumerate(zip(batches, rates, strict=True), 1)
    ]
    assert [(row.loss, row.step, row.lr) for row in rows] == [
        (answer["loss"], answer["step"], answer["lr"]) for answer in answers
    ]
    assert state(rank) == state(twin)
    assert rank.answer("standing", {}) == twin.answer("standing", {})


def test_messages_one_after_another_in_the_same_memory_have_the_bits_of_steps_alone(start, variant):
    batches = [step_data(rows, seed) for seed, rows in enumerate((4, 4, 5, 4))]
    rank, twin = start(), start()
    for number, batch in enumerate(batches, 1):
        fields = sent(variant, [formed(batch)], first=number)
        (row,) = rank.answer("train_steps", fields)
        assert row.loss == alone(twin, variant, batch, number, None)["loss"]
    assert state(rank) == state(twin)


def test_a_step_that_fails_ends_the_message_and_counts_those_before(rank, variant):
    bad = step_data(4, 9)
    assert isinstance(bad.targets, TensorData)
    bad = Batch(bad.inputs, TensorData("int64", (4,), (7).to_bytes(8, "little") * 4))
    rows = []
    with pytest.raises(InvalidArgument):
        rows.extend(rank.answer("train_steps", sent(variant, [formed(step_data(4, 1)), formed(bad), formed(bad)])))
    assert [row.step for row in rows] == [1]
    standing: Any = rank.answer("standing", {})
    assert (standing["applied"], standing["torn"]) == (1, False)


@pytest.mark.parametrize("examples", [7, 4 * LARGE])
def test_shards_of_several_ranks_are_cut_out_of_the_bytes(variant, memory, examples):
    batch = step_data(examples, 2)
    _, rows = select_variant([variant], batch, training=True, targets=True)
    wanted = split(variant, rows, batch, ranks=3, whole=False)
    for rank, shard in enumerate(wanted):
        shared = memory if examples > 7 else None
        fields = sent(variant, [formed(batch)], ranks=3, rank=rank, memory=shared)
        (found,) = RankSteps(fields, KnownLayouts()).shards()
        assert (found.start, found.stop, found.rows) == (shard.start, shard.stop, shard.rows)
        for tensor, data in zip((*found.inputs, *found.targets), (*shard.inputs, *shard.targets), strict=True):
            assert tensor.shape == data.shape and bytes(from_any(tensor).data) == bytes(data.data)
            assert tensor.data_ptr() % 64 == 0


def test_rows_come_back_as_they_went_and_make_the_result():
    first = StepRow(0.1 + 0.2, 5, 0.01, None, False, None, 1e-3, 2e-4, 3e-5, 2e-3)
    second = first._replace(compute=3e-3, busy=4e-3)
    third = StepRow(None, 6, None, 0.5, True, 65536.0, 1e-3, 0.0, 0.0, 2e-3)
    assert decode_rows(encode_rows([first, second, third])) == [first, second, third]
    part = RowsPart(8, True, 0.25, [first, third])
    assert decode_part([encode_part(part)]) == part
    assert decode_part(pack({"call": 8, "result": {}})) is None
    result = step_result([first, second], 7, rank_rows=(3, 4), transfer=0.5)
    assert (result.loss, result.step, result.num_examples, result.rank_rows) == (0.1 + 0.2, 5, 7, (3, 4))
    assert (result.timing.compute, result.timing.transfer, result.timing.total) == (3e-3, 0.5, 0.504)

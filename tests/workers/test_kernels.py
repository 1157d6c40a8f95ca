"""Compiled kernels: what they give is torch's, steps go on until they are there, and what differs is not used."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from gradwire.export import ModuleExporter
from gradwire_proto.codec import encode_model_spec
from gradwire_proto.errors import FailedPrecondition, InvalidArgument
from gradwire_proto.tensors import from_any, from_nested
from gradwire_proto.values import Batch, BatchShapes, CompiledKernels, Limits, ModelSpec, ModelUpdate, OptimizerSpec
from gradwire_workers.group_kernels import REPEATS
from gradwire_workers.group_variants import GroupVariants
from gradwire_workers.kernels.compilation import Compilation
from gradwire_workers.rank_commands import RankCommands
from gradwire_workers.segments import SegmentWriter
from gradwire_workers.training.determinism import compute_as_torch_does
from gradwire_workers.training.seeds import command_seed
from gradwire_workers.worker_group import WorkerGroup

ROWS = 8
SHAPES = BatchShapes("train", ((ROWS, 6),), ((ROWS,),))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.25), nn.Linear(8, 3))


def data(rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 6), torch.randint(0, 3, (rows,))


class OneRank:
    """A rank in this process, in place of `Ranks`."""

    lost, again, applied = None, False, 0

    def __init__(self, folder: Path, spec: ModelSpec, tensors: Any, place: Path) -> None:
        self.commands = RankCommands("rank", str(folder))
        fields = {"device": "cpu", "rank": 0, "size": 1, "threads": 1, "limits": asdict(Limits()), "gpus": ()}
        fields |= {"weights_folder": None, "kernels_folder": str(place), "saved": None}
        raw = encode_model_spec(spec).SerializeToString()
        self.commands.answer("load", {**fields, "spec": raw, "tensors": tensors})
        self.commands.answer("start", {})

    def __len__(self) -> int:
        return 1

    async def call(self, kind: str, fields: Any, *, changes: bool = True, any_will_do: bool = False) -> Any:
        answer = self.commands.answer(kind, fields[0])
        self.applied += changes
        return SimpleNamespace(fields=[answer], transfer=0.0, total=0.0)

    @property
    def trainer(self) -> Any:
        return self.commands._trainer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where kernels are compiled, once for all tests."""
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def make(tmp_path: Path, place: Path) -> Iterator[Callable[..., WorkerGroup]]:
    """`make(folder=place)`: a group of one rank that compiles."""
    made: list[OneRank] = []

    def group(folder: Path | None = None) -> WorkerGroup:
        exported = ModuleExporter(net(), nn.CrossEntropyLoss()).export_model(*data())
        spec = ModelSpec(
            program=exported.program,
            loss=exported.loss,
            optimizer=OptimizerSpec("SGD", {"lr": 0.1, "momentum": 0.9}),
            compile=True,
        )
        tensors = {name: from_any(each) for name, each in exported.tensors.items()}
        ranks: Any = OneRank(tmp_path, spec, tensors, folder or place)
        made.append(ranks)

        async def release(_: bool) -> None: ...

        return WorkerGroup(
            ranks=ranks,
            variants=GroupVariants(ranks, exported.program.variants),
            device="cpu",
            writer=SegmentWriter(str(tmp_path), "frontend"),
            release=release,
            compiles=True,
        )

    yield group
    for rank in made:
        rank.commands.answer("reset", {})
    compute_as_torch_does()


class Twin:
    """The same network in plain torch, which draws what the rank draws."""

    def __init__(self) -> None:
        self.net = net()
        self._optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)

    def step(self, x: torch.Tensor, y: torch.Tensor, command: int) -> float:
        torch.default_generator.manual_seed(command_seed(model_seed=0, command=command, rank=0))
        self._optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.net(x), y)
        loss.backward()
        self._optimizer.step()
        return loss.item()


def batch(x: torch.Tensor, y: torch.Tensor) -> Batch:
    return Batch(from_nested(x), from_nested(y))


async def compiled(group: WorkerGroup) -> BatchShapes | None:
    """Take steps until the group says that kernels are ready, or will not be."""
    for command in range(REPEATS):
        await group.train_step(batch(*data()), command=command)
    assert await group.kernels.advance({}) is None
    await group.train_step(batch(*data()), command=REPEATS)
    async with asyncio.timeout(540):
        while group.kernels.told[0].state == "compiling":
            if (ready := await group.kernels.advance({})) is not None:
                return ready
            await asyncio.sleep(0.1)
    return None


async def put_to_use(group: WorkerGroup) -> None:
    await group.kernels.resume([SHAPES])
    assert group.kernels.told == (CompiledKernels(SHAPES, "in_use"),)


@pytest.mark.timeout(600)
async def test_kernels_that_are_compiled_while_steps_go_on_give_what_torch_gives(
    make: Callable[..., WorkerGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    group, twin = make(), Twin()
    ready = await compiled(group)
    assert ready == SHAPES
    await group.kernels.use(SHAPES, again=False)
    assert group.kernels.told == (CompiledKernels(SHAPES, "in_use"),)
    assert (await group.state()).kernels == (SHAPES,)
    trainer = group._ranks.trainer  # pyright: ignore[reportAttributeAccessIssue]
    trainer.load_state_dict(copy.deepcopy(dict(twin.net.state_dict())), partial=False)
    trainer.update(optimizer=OptimizerSpec("SGD", {"lr": 0.1, "momentum": 0.9}))
    # Whatever runs on kernels never runs the graph.
    monkeypatch.setattr(trainer._replica, "outputs", None)
    for command in range(10, 16):
        x, y = data()
        result = await group.train_step(batch(x, y), command=command)
        assert result.loss == pytest.approx(twin.step(x, y, command), rel=1e-5)
    for name, value in twin.net.state_dict().items():
        torch.testing.assert_close(trainer.state_dict()[name], value, rtol=1e-4, atol=1e-6)


async def test_batches_of_other_shapes_run_eagerly_beside_kernels(make: Callable[..., WorkerGroup]) -> None:
    group, twin = make(), Twin()
    await put_to_use(group)
    for command, rows in enumerate((ROWS, 5, ROWS, 3, 5)):
        x, y = data(rows)
        result = await group.train_step(batch(x, y), command=command)
        assert result.loss == pytest.approx(twin.step(x, y, command), rel=1e-5), rows


async def test_held_gradients_are_those_of_kernels_too(make: Callable[..., WorkerGroup]) -> None:
    group, twin = make(), Twin()
    await put_to_use(group)
    x, y = data()
    await group.forward_backward(batch(x, y), command=1)
    twin.step(x, y, 1)
    held = group._ranks.trainer.held_gradients()  # pyright: ignore[reportAttributeAccessIssue]
    for name, parameter in twin.net.named_parameters():
        torch.testing.assert_close(held[name], parameter.grad, rtol=1e-3, atol=1e-5)


async def test_target_that_is_no_class_is_refused_before_kernels_read_it(make: Callable[..., WorkerGroup]) -> None:
    group = make()
    await put_to_use(group)
    x, y = data()
    with pytest.raises(InvalidArgument) as caught:
        await group.train_step(batch(x, y + 3), command=1)
    assert (caught.value.reason, caught.value.field) == ("TARGET_OUT_OF_RANGE", "batch.targets")


async def test_kernels_whose_results_differ_are_not_used_and_told_so(
    make: Callable[..., WorkerGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Compilation.load

    def wrong(self: Compilation) -> Any:
        call, form = load(self)

        def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
            loss, *gradients = call(*tensors)
            return [loss, *gradients[:-1], gradients[-1] * 1.01]

        return run, form

    monkeypatch.setattr(Compilation, "load", wrong)
    group = make()
    assert await compiled(group) is None
    (told,) = group.kernels.told
    assert told.state == "refused"
    assert "results differ from eager ones: the gradient of 4.bias" in told.reason
    assert (await group.state()).kernels == ()
    assert await group.kernels.advance({}) is None, "they are not tried again"


async def test_other_parameters_to_train_end_the_use_of_kernels(make: Callable[..., WorkerGroup]) -> None:
    group = make()
    await put_to_use(group)
    await group.update(ModelUpdate(lr=0.05))
    assert group.kernels.in_use == (SHAPES,)
    await group.update(ModelUpdate(trainable=(("0.*", False),)))
    assert group.kernels.in_use == ()
    before = group._ranks.trainer.state_dict(["0.weight"])["0.weight"].clone()  # pyright: ignore[reportAttributeAccessIssue]
    await group.train_step(batch(*data()), command=1)
    assert torch.equal(group._ranks.trainer.state_dict(["0.weight"])["0.weight"], before)  # pyright: ignore[reportAttributeAccessIssue]


async def test_rank_without_a_compiler_says_so_and_trains_eagerly(
    make: Callable[..., WorkerGroup], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    group = make(tmp_path / "elsewhere")
    assert await compiled(group) is None
    (told,) = group.kernels.told
    assert told == CompiledKernels(SHAPES, "refused", "the rank's node has no C++ compiler, such as g++")
    with pytest.raises(FailedPrecondition, match=r"no C\+\+ compiler"):
        await group.kernels.use(SHAPES, again=False)
    # As a journal says that it was done: steps then agree but for rounding.
    await group.kernels.use(SHAPES, again=True)
    x, y = data()
    assert (await group.train_step(batch(x, y), command=9)).step == REPEATS + 2


async def test_what_is_compiled_ends_with_the_model(make: Callable[..., WorkerGroup], tmp_path: Path) -> None:
    group = make(tmp_path / "elsewhere")
    trainer = group._ranks.trainer  # pyright: ignore[reportAttributeAccessIssue]
    for command in range(REPEATS):
        await group.train_step(batch(*data()), command=command)
    await group.kernels.advance({})
    (kernels,) = trainer._kernels._by_shape.values()
    process = kernels.compilation._process
    assert process.poll() is None, "it is at work while the model takes steps"
    await group.train_step(batch(*data()), command=REPEATS)
    group._ranks.commands.answer("reset", {})  # pyright: ignore[reportAttributeAccessIssue]
    assert process.poll() is not None


def test_kernels_are_not_taken_from_a_folder_that_others_may_write_to(
    make: Callable[..., WorkerGroup], tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    group = make(shared)
    asyncio.run(group.kernels.resume([SHAPES]))
    (told,) = group.kernels.told
    assert told.state == "refused"
    assert "others may write" in told.reason

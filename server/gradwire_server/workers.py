"""What the frontend needs from the ranks: the seam between this package and the workers'."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from gradwire_proto.batch_form import FormedStep
from gradwire_proto.errors import RankLost
from gradwire_proto.values import (
    BackwardQuery,
    BackwardResult,
    Batch,
    BatchLosses,
    BatchShapes,
    CompiledKernels,
    DerivativeQuery,
    DerivativeResult,
    FitSteps,
    ForwardResult,
    FunctionSpec,
    GradientQuery,
    GradientResult,
    ModelSpec,
    ModelState,
    ModelUpdate,
    NamedTensors,
    Retention,
    Sharding,
    SplitDecision,
    StateTensor,
    StepResult,
    StepsResult,
    TensorData,
    Value,
    Variant,
)


class RetainedWorkers(Protocol):
    """The forwards that the ranks of a model retain, and the gradients that they hold. Calls are the model's calls."""

    async def forward(
        self, inputs: Value, retention: Retention, name: str, *, training: bool, seed: int | None, command: int
    ) -> ForwardResult: ...

    async def backward(self, query: BackwardQuery, cotangents: Sequence[TensorData | None]) -> BackwardResult: ...

    async def release(self, names: Sequence[str]) -> None: ...

    async def held_gradients(self, wrt: Sequence[str] | None) -> tuple[NamedTensors, int]: ...

    async def set_gradients(self, gradients: NamedTensors, dropped: Sequence[str]) -> int: ...


class FitWorkers(Protocol):
    """The same ranks, asked for steps on a dataset, whose tensors are in files. Calls are the model's calls."""

    async def run(self, dataset: Batch, steps: FitSteps, *, most: int | None = None, command: int) -> StepsResult:
        """Apply the steps, `most` of them at most, numbered from `command` on, until one is refused; that is the
        result's error, or, of the first, raised.
        """
        ...

    async def forget(self) -> None:
        """Let go of the dataset that was used last."""
        ...

    async def evaluate(self, dataset: Batch, batch_size: int, *, first: int, most: int) -> BatchLosses:
        """The losses of its batches in evaluation mode, `most` of them from the `first`-th on. Changes nothing. An
        error names the batch that it is about.
        """
        ...


class StepFlow(Protocol):
    """Steps that the ranks of a model are handed in messages, one behind the other."""

    @property
    def has_room(self) -> bool:
        """Whether more should be sent now, before the ranks are through with what they have."""
        ...

    def send(self, steps: Sequence[FormedStep], *, command: int) -> None:
        """Hand over steps that can go together, numbered from this command on. Raises RankLost, "not_applied"."""
        ...

    async def ended(self) -> None:
        """Return when all is applied. Raises the error of the first that is not; those behind it were not begun."""
        ...


class KernelWorkers(Protocol):
    """The same ranks, asked for compiled kernels. Calls are the model's calls."""

    @property
    def told(self) -> tuple[CompiledKernels, ...]:
        """What became of every shape that repeats."""
        ...

    async def advance(self, refused: Mapping[BatchShapes, str]) -> BatchShapes | None:
        """Go on with what is compiled; nothing changes. A shape whose kernels are ready and agree; `use` is to follow.

        refused: shapes for which there are to be none, and why.
        """
        ...

    async def use(self, shapes: BatchShapes, *, again: bool) -> None:
        """Run steps of this shape on kernels: a command. again: it was carried out before, and must not be refused."""
        ...


class Workers(Protocol):
    """The ranks of one model, called as one. One call at a time; a call that began must not be cancelled.

    Errors are GradwireErrors. After any with outcome "not_applied" the model is as before the call; after RankLost it
    is lost. Result tensors in segments belong to the caller, who removes their files.
    """

    device: str

    @property
    def sharding(self) -> Sharding: ...
    @property
    def tensors(self) -> tuple[StateTensor, ...]:
        """Those of an architecture that the ranks have built; of a program of graphs, none."""
        ...

    @property
    def variants(self) -> tuple[Variant, ...]: ...
    @property
    def splits(self) -> Mapping[str, SplitDecision]:
        """How batches are spread, by variant: of those that there were at first, and that commands have brought."""
        ...

    def expect(self, splits: Mapping[str, SplitDecision]) -> None:
        """Variants of these names that the next command brings are to be spread like this: it is applied once more."""
        ...

    def without_limits(self) -> AbstractContextManager[None]:
        """Inside, commands are applied once more that may have been taken under other limits: none counts."""
        ...

    @property
    def retained(self) -> RetainedWorkers: ...

    @property
    def fitting(self) -> FitWorkers: ...

    @property
    def kernels(self) -> KernelWorkers: ...

    @property
    def on_lost(self) -> Callable[[RankLost], None] | None: ...

    @on_lost.setter
    def on_lost(self, callback: Callable[[RankLost], None] | None) -> None: ...

    @property
    def applied(self) -> int:
        """Commands that have changed the model since these ranks took it over."""
        ...

    @property
    def retains(self) -> bool:
        """Whether forwards are retained, which are no part of `state`."""
        ...

    async def state(self) -> ModelState:
        """All that the model's future depends on, its `command` left 0. Files belong to the caller."""
        ...

    async def salvage(self, applied: int) -> ModelState | None:
        """After RankLost: the same of a rank that is whole after just so many commands; None: there is none.

        Nothing but `close` may be called after it.
        """
        ...

    async def train_step(self, batch: Batch, *, command: int, lr: float | None = None) -> StepResult: ...

    def together(self, steps: Sequence[FormedStep]) -> int:
        """How many of these steps, from the first, can be handed to the ranks at once; 0: the first must go alone."""
        ...

    def step_flow(self, took: Callable[[list[StepResult]], None]) -> StepFlow:
        """For `train_step` of steps that can go together: one call of the model's, from its first `send` to its end.

        `took` is called with the results of those that are applied, in order, as they come; it may send more.
        """
        ...

    async def forward_backward(self, batch: Batch, *, command: int) -> StepResult: ...

    async def optimizer_step(
        self, gradients: NamedTensors | None, *, lr: float | None = None, groups: Sequence[Mapping[str, Value]] = ()
    ) -> StepResult: ...

    async def zero_grad(self) -> None: ...

    async def compute_gradients(
        self, batch: Batch, query: GradientQuery, vectors: NamedTensors | None = None
    ) -> GradientResult: ...

    async def forward(self, inputs: Value, *, training: bool, seed: int | None, command: int) -> ForwardResult: ...

    async def state_dict(self, names: tuple[str, ...] | None) -> tuple[NamedTensors, int]: ...

    async def load_state_dict(self, tensors: NamedTensors, *, partial: bool) -> int: ...

    async def optimizer_state(self) -> tuple[Value, int]: ...

    async def load_optimizer_state(self, state: Value) -> int: ...

    async def update(self, update: ModelUpdate) -> tuple[str, ...]: ...

    async def add_variant(
        self,
        variant: Variant,
        *,
        tensors: tuple[StateTensor, ...],
        values: NamedTensors,
        operators: Mapping[str, str],
        example: Batch | None,
    ) -> None: ...

    async def vacate(self) -> None:
        """End the ranks, and keep their place for others, until `close`."""
        ...

    async def close(self, *, reuse: bool = True) -> None: ...


class Capacity(Protocol):
    """How many ranks and GPUs there are."""

    @property
    def workers(self) -> int: ...

    @property
    def free_workers(self) -> int: ...

    @property
    def gpus(self) -> float: ...


class Clusters(Protocol):
    """Where ranks come from, for all owners."""

    def of(self, owner: str) -> Cluster:
        """For this one: ranks that serve nobody else."""
        ...


class Cluster(Protocol):
    """Where the ranks of one owner come from."""

    @property
    def capacity(self) -> Capacity: ...

    async def start_group(
        self,
        spec: ModelSpec,
        tensors: NamedTensors,
        example: Batch | None,
        *,
        model_id: str,
        state: ModelState | None = None,
        place: Workers | None = None,
        again: bool = False,
        wait_until: float | None = None,
        tell: Callable[[str], None] = ...,
    ) -> Workers:
        """Ranks that hold a new model, or, with `state`, one that goes on from there.

        again: the model was served before, maybe under other limits, which do not count. wait_until: how long it may
        wait for its turn where the capacity is taken, on time.monotonic(); None: not at all. tell: called with the
        words of what it waits for, and "" when it does no more.

        place: ranks that were vacated. What they hold is taken, and given back to them should this fail.
        """
        ...

    async def compute_function_gradients(
        self, function: FunctionSpec, batch: Batch, query: GradientQuery
    ) -> GradientResult: ...

    async def differentiate_function(
        self, function: FunctionSpec, batch: Batch, query: DerivativeQuery, vectors: tuple[TensorData, ...]
    ) -> DerivativeResult: ...

"""What a client asks for, and the model that it gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from gradwire_proto.values.kernels import CompiledKernels
from gradwire_proto.values.programs import ArchitectureSpec, Program, StateTensor, Variant
from gradwire_proto.values.tensors import NamedTensors, Value


@dataclass(frozen=True, slots=True)
class TorchLossSpec:
    """A loss of torch.nn.functional, by name, with its keyword arguments."""

    name: str
    options: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GraphLossSpec:
    """Each training variant carries its loss_graph."""


@dataclass(frozen=True, slots=True)
class OutputLossSpec:
    """The program returns the loss itself, in this leaf of its outputs."""

    output_leaf: int


LossSpec: TypeAlias = "TorchLossSpec | GraphLossSpec | OutputLossSpec"


@dataclass(frozen=True, slots=True)
class ParameterGroupSpec:
    """The parameters that `pattern`, a name or a glob, matches, and the options in which they differ."""

    pattern: str
    options: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ScheduleSpec:
    """A schedule of torch.optim.lr_scheduler, by class name, with its keyword arguments.

    `schedulers`: what a SequentialLR or ChainedScheduler is made of.
    """

    name: str
    options: Mapping[str, Value] = field(default_factory=dict)
    schedulers: tuple[ScheduleSpec, ...] = ()


@dataclass(frozen=True, slots=True)
class OptimizerSpec:
    """An optimizer of torch.optim, by class name, with its keyword arguments.

    `groups`: parameters that it treats apart; all others come first, as a group of their own.
    """

    name: str
    options: Mapping[str, Value] = field(default_factory=dict)
    groups: tuple[ParameterGroupSpec, ...] = ()
    schedule: ScheduleSpec | None = None

    def with_learning_rate(self, lr: float) -> OptimizerSpec:
        """The same with this learning rate for all parameters, whatever groups they are in."""
        groups = (
            replace(group, options={**group.options, "lr": lr}) if "lr" in group.options else group
            for group in self.groups
        )
        return replace(self, options={**self.options, "lr": lr}, groups=tuple(groups))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """What a client asks for. `device`: "auto", "cpu" or "cuda"; `on_nan`: "report" or "refuse".

    `clip_grad_norm`, `clip_grad_value`: bounds of the gradients of an update, of their norm and of each element.
    `precision`: "fp32", "bf16" or "fp16", what forward and loss compute in.
    `loss_reduction`: what the loss of a batch is of its rows' losses, "mean" or "sum"; None where that is not said.
    `durability`: what an answered command outlives: "none" nothing, "process" every process, "disk" the machine; "" is
    the server's setting. `checkpoint_every`: commands from one automatic checkpoint to the next; `keep_checkpoints`:
    how many of them are kept; 0 is the server's setting. `deterministic`: the same bits on CUDA too.
    `sync_batch_norm`: whether batch norm in training normalises over the rows of all ranks, or of each rank alone.
    `compile`: training steps on batches whose shapes repeat run on compiled kernels, once these are there and agree.
    """

    program: Program | ArchitectureSpec
    loss: LossSpec | None = None
    optimizer: OptimizerSpec | None = None
    workers: int = 1
    device: str = "auto"
    gpus_per_worker: float = 0.0
    seed: int = 0
    on_nan: str = "report"
    require_sharding: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    clip_grad_norm: float | None = None
    clip_grad_value: float | None = None
    precision: str = "fp32"
    loss_reduction: str | None = None
    durability: str = ""
    checkpoint_every: int = 0
    keep_checkpoints: int = 0
    deterministic: bool = False
    sync_batch_norm: bool = True
    compile: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelUpdate:
    """Settings of a model to be changed between two updates; what is None stays as it is.

    `trainable`: (a name or glob, whether what it matches is trained), a later one over an earlier one. `optimizer`: in
    place of the model's, begun anew. `lr`: of all parameter groups. `labels`: in place of all.
    """

    trainable: tuple[tuple[str, bool], ...] = ()
    optimizer: OptimizerSpec | None = None
    lr: float | None = None
    labels: Mapping[str, str] | None = None

    @property
    def concerns_ranks(self) -> bool:
        """Whether there is more in it than labels."""
        return bool(self.trainable) or self.optimizer is not None or self.lr is not None


@dataclass(frozen=True, slots=True)
class Sharding:
    """How batches are spread over the ranks. `mode`: "rows" or "whole"; `reason`: why, in words."""

    mode: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A model as the service describes it.

    `state`: "waiting" (until ranks are free: `waits_for` says how many), "creating", "ready", "recovering", "failed" or
    "deleting".

    `last_error` is the error that failed the model or the last one that a command met. `rank_rows` are the rows that
    each rank computed in the last command that had a batch. Lists leave `tensors` and `variants` empty.
    `architecture`: the name of the module that the ranks built; None for a model of graphs. `durability`,
    `checkpoint_every` (commands) and `keep_checkpoints` are what holds, the server's settings included.
    `compiled`: what became of kernels, for each of the shapes that have repeated where `compile` asks for it.
    """

    id: str
    state: str
    step: int
    workers: int
    sharding: Sharding | None
    num_parameters: int
    optimizer: OptimizerSpec | None
    loss: LossSpec | None
    labels: Mapping[str, str]
    created_at: float
    last_error: str | None = None
    device: str = "cpu"
    seed: int = 0
    on_nan: str = "report"
    tensors: tuple[StateTensor, ...] = ()
    variants: tuple[Variant, ...] = ()
    rank_rows: tuple[int, ...] = ()
    clip_grad_norm: float | None = None
    clip_grad_value: float | None = None
    precision: str = "fp32"
    architecture: str | None = None
    loss_reduction: str | None = None
    durability: str = ""
    checkpoint_every: int = 0
    keep_checkpoints: int = 0
    deterministic: bool = False
    sync_batch_norm: bool = True
    compile: bool = False
    compiled: tuple[CompiledKernels, ...] = ()
    waits_for: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionSpec:
    """A function of tensors, without state. `program` None: the service knows the digest already."""

    digest: str
    program: Program | None
    tensors: NamedTensors
    output_leaf: int = 0

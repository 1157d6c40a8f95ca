"""What a model's future depends on, and the checkpoints that hold it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gradwire_proto.values.kernels import BatchShapes
from gradwire_proto.values.programs import Variant
from gradwire_proto.values.tensors import NamedTensors, Value


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitDecision:
    """How a variant's batches are spread over the ranks, as it was found when the variant came.

    whole: why one rank computes them whole; None where each rank has rows. inputs_whole: each rank is given all inputs.
    returns_loss: the program returns the loss itself. loss: how the loss is put together, in words for `Sharding`;
    None where there is nothing to say. weight: what each rank's loss weighs, as the ranks name it; None for rows.
    written: the buffers that an architecture's variant changes, by name; None where that is not known, or graphs tell.
    own_statistics: its batch norm normalises each rank's rows by themselves, as the client wanted.
    """

    whole: str | None
    inputs_whole: bool
    returns_loss: bool
    loss: str | None
    weight: str | None
    written: tuple[str, ...] | None = None
    own_statistics: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelState:
    """All that a model's future depends on, beside its ModelSpec: the same state and commands give the same bits.

    tensors: every tensor of the program that is no alias: parameters, buffers and constants, persistent or not.
    optimizer: what GetOptimizerState answers; None without an optimizer. step: updates applied. command: the number of
    the last command applied. trained: names of the parameters that are trained. held: each rank's part of the held
    gradients, None where none are held. splits: by variant. opened: an architecture's variants, made by the batches
    that came, without graphs; empty for a model of graphs. threads: torch's threads in each rank.
    kernels: the batches that run on compiled kernels.
    """

    tensors: NamedTensors
    optimizer: Value
    step: int
    command: int
    trained: tuple[str, ...]
    held: tuple[NamedTensors | None, ...]
    splits: Mapping[str, SplitDecision]
    opened: tuple[Variant, ...]
    threads: int
    kernels: tuple[BatchShapes, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A saved model: `restore_model` makes a model of it.

    name: as it was given, or "MODEL/NUMBER" of one that the service took by itself (`automatic`), which goes when newer
    ones have taken its place. model_id: the model that was saved. step: updates that it had applied. command: the
    number of the last command that it had applied. created_at: seconds since 1970. nbytes: bytes of all its files.
    """

    name: str
    model_id: str
    step: int
    command: int
    created_at: float
    nbytes: int
    automatic: bool

"""What a rank does with each command: fields of a message into a call of the Trainer, its report into fields."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from gradwire_proto.codec import decode_model_spec, decode_program, decode_variant
from gradwire_proto.errors import FailedPrecondition, InternalError, InvalidArgument
from gradwire_proto.tensors import to_nested
from gradwire_proto.v1 import model_pb2, program_pb2
from gradwire_proto.values import (
    GradientQuery,
    Limits,
    ModelSpec,
    OutputLossSpec,
    StateTensor,
)
from gradwire_workers.after_applied import errors_after_applied
from gradwire_workers.pool.rank_footprint import RankFootprint
from gradwire_workers.pool.warm_up import warm_up
from gradwire_workers.process_group import ProcessGroups
from gradwire_workers.rank_tensors import incoming, leaves_in, outgoing, shard_in
from gradwire_workers.segments import SegmentWriter
from gradwire_workers.trainer import Trainer
from gradwire_workers.training.attempt import AGREED
from gradwire_workers.training.out_of_memory import out_of_memory_told

Fields = Mapping[str, Any]

# Those in which ranks may wait for each other. Not every forward has collectives: one that fails costs a rejoin more.
_COLLECTIVE = frozenset(
    {"check_rows", "train_step", "forward_backward", "optimizer_step", "compute_gradients", "forward"}
)


class RankCommands:
    """The state of one rank: nothing, a model's replica, or functions. Commands come one at a time, from one thread."""

    def __init__(self, name: str, memory_folder: str) -> None:
        warm_up()
        # What was imported stays: no collection need look at it again (a full one takes 3 ms instead of 150).
        gc.collect()
        gc.freeze()
        self._segments = SegmentWriter(memory_folder, name)
        self._clean = RankFootprint.measure()
        self._loaded: Callable[[Fields], Trainer] | None = None
        self._trainer: Trainer | None = None
        self._functions: dict[str, Trainer] = {}
        self._commands: dict[str, Callable[[Fields], Fields]] = {
            "hello": lambda _: {},
            "load": self._load,
            "start": self._start,
            "rejoin": self._rejoin,
            "reset": self._reset,
            "check_rows": self._check_rows,
            "train_step": self._train_step,
            "forward_backward": self._forward_backward,
            "optimizer_step": self._optimizer_step,
            "zero_grad": self._zero_grad,
            "compute_gradients": self._compute_gradients,
            "forward": self._forward,
            "state_dict": self._state_dict,
            "load_state_dict": self._load_state_dict,
            "optimizer_state": self._optimizer_state,
            "load_optimizer_state": self._load_optimizer_state,
            "add_variant": self._add_variant,
            "compute_function": self._compute_function,
        }

    def answer(self, kind: str, fields: Fields) -> Fields:
        """Carries out one command. Running out of memory is ResourceExhausted (OUT_OF_MEMORY).

        An error after the command was carried out has the outcome "applied".
        """
        command = self._commands.get(kind)
        if command is None:
            raise InternalError(f"no command {kind}")
        with out_of_memory_told(), self._together(kind):
            answer = command(fields)
        with errors_after_applied(), out_of_memory_told():
            return outgoing(answer, self._segments)

    @contextmanager
    def _together(self, kind: str) -> Iterator[None]:
        """If this rank fails alone, the others must not wait for it in a collective."""
        try:
            yield
        except BaseException as error:
            if self._trainer is not None and kind in _COLLECTIVE and not _is_refused_by_all(error):
                self._trainer.break_off(f"{type(error).__name__}: {error}")
            raise

    @property
    def needs_rejoin(self) -> bool:
        """Whether the last command broke this rank's process group."""
        return self._trainer is not None and self._trainer.needs_rejoin

    # --- life ---

    def _load(self, fields: Fields) -> Fields:
        """Takes a model's spec and tensors. Not part of `start`, where ranks wait for each other: it may fail alone."""
        if gpus := fields["gpus"]:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        # Torch keeps the number per thread: it must be set in the one that computes.
        torch.set_num_threads(fields["threads"])
        spec = decode_model_spec(model_pb2.Model.FromString(bytes(fields["spec"])))
        state = incoming(fields["tensors"], writable=True)
        limits, device, rank, size = Limits(**fields["limits"]), fields["device"], fields["rank"], fields["size"]

        def start(where: Fields) -> Trainer:
            if size == 1:
                return Trainer(spec=spec, state=state, device=device, limits=limits)
            groups = ProcessGroups.join(
                folder=where["folder"], epoch=where["epoch"], rank=rank, size=size, device=device
            )
            try:
                return Trainer(spec=spec, state=state, rank=rank, groups=groups, device=device, limits=limits)
            except BaseException:
                groups.leave()
                raise

        self._loaded = start
        return {}

    def _start(self, fields: Fields) -> Fields:
        assert self._loaded is not None
        start, self._loaded = self._loaded, None
        self._trainer = start(fields)
        return {}

    def _rejoin(self, fields: Fields) -> Fields:
        self._model.rejoin(fields["epoch"])
        return {}

    def _reset(self, _: Fields) -> Fields:
        """Forgets everything. Says whether the process is as good as new."""
        for trainer in (self._trainer, *self._functions.values()):
            if trainer is not None:
                trainer.close()
        self._loaded = self._trainer = None
        self._functions.clear()
        return {"reusable": not torch.cuda.is_initialized() and RankFootprint.measure().is_close_to(self._clean)}

    @property
    def _model(self) -> Trainer:
        if self._trainer is None:
            raise FailedPrecondition("this rank has no model")
        return self._trainer

    # --- a model ---

    def _check_rows(self, fields: Fields) -> Fields:
        inputs, targets = leaves_in(fields["inputs"]), leaves_in(fields["targets"])
        return asdict(self._model.check_rows(fields["variant"], inputs, targets))

    def _train_step(self, fields: Fields) -> Fields:
        report = self._model.train_step(shard_in(fields), command=fields["command"], lr=fields["lr"])
        return asdict(report)

    def _forward_backward(self, fields: Fields) -> Fields:
        return asdict(self._model.forward_backward(shard_in(fields), command=fields["command"]))

    def _optimizer_step(self, fields: Fields) -> Fields:
        given = fields["gradients"]
        return asdict(self._model.optimizer_step(None if given is None else incoming(given), lr=fields["lr"]))

    def _zero_grad(self, _: Fields) -> Fields:
        self._model.zero_grad()
        return {}

    def _compute_gradients(self, fields: Fields) -> Fields:
        return _gradients(self._model, fields)

    def _forward(self, fields: Fields) -> Fields:
        report = self._model.forward(
            shard_in(fields), training=fields["training"], seed=fields["seed"], command=fields["command"]
        )
        return {"outputs": report.outputs, "step": report.step, "rows": report.rows, "seconds": asdict(report.seconds)}

    def _state_dict(self, fields: Fields) -> Fields:
        return {"tensors": self._model.state_dict(fields["names"]), "step": self._model.step}

    def _load_state_dict(self, fields: Fields) -> Fields:
        self._model.load_state_dict(incoming(fields["tensors"]), partial=fields["partial"])
        return {"step": self._model.step}

    def _optimizer_state(self, _: Fields) -> Fields:
        return {"state": self._model.optimizer_state(), "step": self._model.step}

    def _load_optimizer_state(self, fields: Fields) -> Fields:
        self._model.load_optimizer_state(to_nested(fields["state"]))
        return {"step": self._model.step}

    def _add_variant(self, fields: Fields) -> Fields:
        self._model.add_variant(
            decode_variant(program_pb2.Variant.FromString(bytes(fields["variant"]))),
            [StateTensor(**tensor) for tensor in fields["tensors"]],
            incoming(fields["values"], writable=True),
            fields["operators"],
        )
        return {}

    # --- functions ---

    def _compute_function(self, fields: Fields) -> Fields:
        """Gradients of a function, which comes along the first time. Forgets those that the frontend forgot."""
        torch.set_num_threads(fields["threads"])
        for digest in fields["forget"]:
            self._functions.pop(digest).close()
        if known := self._functions.get(fields["digest"]):
            return _gradients(known, fields)
        spec = ModelSpec(
            program=decode_program(program_pb2.Program.FromString(bytes(fields["program"]))),
            loss=OutputLossSpec(fields["output_leaf"]),
        )
        state = incoming(fields["tensors"], writable=True)
        function = Trainer(spec=spec, state=state, device=fields["device"], limits=Limits(**fields["limits"]))
        result = outgoing(_gradients(function, fields), self._segments)
        # Remembered only now: the frontend too remembers only what has been answered.
        self._functions[fields["digest"]] = function
        return result


def _is_refused_by_all(error: BaseException) -> bool:
    """Whether every rank refuses the command by itself, for its state or for what all ranks are sent alike.

    A shard is not. What is at fault in it has the field `batch`, or none where it cannot even be read.
    """
    if isinstance(error, InvalidArgument) and error.reason not in AGREED:
        return error.field is not None and not error.field.startswith("batch")
    return isinstance(error, (FailedPrecondition, InvalidArgument))


def _gradients(trainer: Trainer, fields: Fields) -> Fields:
    query = GradientQuery(**fields["query"])
    report = trainer.compute_gradients(shard_in(fields), query, command=fields["command"])
    # Not asdict: it would copy the tensors.
    return {
        "loss": report.loss,
        "step": report.step,
        "rows": report.rows,
        "gradients": report.gradients,
        "input_gradients": report.input_gradients,
        "outputs": report.outputs,
        "seconds": asdict(report.seconds),
    }

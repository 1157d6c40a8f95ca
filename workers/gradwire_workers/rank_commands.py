"""What a rank does with each command: fields of a message into a call of the Trainer, its report into fields."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import torch

from gradwire_proto.codec import decode_model_spec, decode_optimizer, decode_variant, encode_variant
from gradwire_proto.errors import FailedPrecondition, GradwireError, InternalError, InvalidArgument
from gradwire_proto.tensors import to_nested
from gradwire_proto.v1 import model_pb2, program_pb2
from gradwire_proto.values import BackwardQuery, Limits, Retention, StateTensor
from gradwire_workers.after_applied import errors_after_applied
from gradwire_workers.lifted_limits import AGAIN, limits_lifted
from gradwire_workers.pool.rank_footprint import RankFootprint
from gradwire_workers.pool.warm_up import warm_up
from gradwire_workers.process_group import ProcessGroups
from gradwire_workers.rank_answers import gradients_of
from gradwire_workers.rank_channel import encode_error
from gradwire_workers.rank_fitting import RankFitting, report_of
from gradwire_workers.rank_functions import RankFunctions
from gradwire_workers.rank_standing import NUMBER, RankStanding
from gradwire_workers.rank_states import saved_state_in
from gradwire_workers.rank_steps import KnownLayouts, RankSteps, described_shard
from gradwire_workers.rank_tensors import incoming, leaves_in, outgoing, shard_in
from gradwire_workers.rows_report import RowsReport
from gradwire_workers.segments import SegmentWriter
from gradwire_workers.step_rows import StepRow
from gradwire_workers.trainer import Trainer
from gradwire_workers.training.attempt import AGREED
from gradwire_workers.training.determinism import compute_as_torch_does, compute_repeatably
from gradwire_workers.training.out_of_memory import out_of_memory_told
from gradwire_workers.training.reports import BackwardReport, ForwardReport, RetainedReport

Fields = Mapping[str, Any]

T = TypeVar("T")

# Those in which ranks may wait for each other. Not every forward has collectives: one that fails costs a rejoin more.
_COLLECTIVE = frozenset(
    {
        "check_rows",
        "train_step",
        "forward_backward",
        "optimizer_step",
        "compute_gradients",
        "forward",
        "retained_forward",
        "backward",
        "held_gradients",
        "fit",
        "evaluate",
        "try_kernels",
    }
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
        self._standing_of = RankStanding()
        self._layouts = KnownLayouts()
        self._functions = RankFunctions(self._segments)
        self._fitting = RankFitting()
        self._commands: dict[str, Callable[[Fields], Fields]] = {
            "hello": lambda _: {},
            "load": self._load,
            "start": self._start,
            "rejoin": self._rejoin,
            "reset": self._reset,
            "open_variant": self._open_variant,
            "check_rows": self._check_rows,
            "weigh": self._weigh,
            "train_step": self._train_step,
            "forward_backward": self._forward_backward,
            "optimizer_step": self._optimizer_step,
            "zero_grad": self._zero_grad,
            "compute_gradients": self._compute_gradients,
            "forward": self._forward,
            "retained_forward": self._retained_forward,
            "backward": self._backward,
            "release": self._release,
            "held_gradients": self._held_gradients,
            "set_gradients": self._set_gradients,
            "standing": self._standing,
            "state": self._state,
            "state_dict": self._state_dict,
            "load_state_dict": self._load_state_dict,
            "optimizer_state": self._optimizer_state,
            "load_optimizer_state": self._load_optimizer_state,
            "update": self._update,
            "add_variant": self._add_variant,
            "compute_function": self._functions.compute_gradients,
            "fit": self._fit,
            "evaluate": lambda fields: self._fitting.evaluate(self._model, fields),
            "begin_kernels": self._begin_kernels,
            "state_of_kernels": self._state_of_kernels,
            "load_kernels": self._load_kernels,
            "try_kernels": self._try_kernels,
            "use_kernels": self._use_kernels,
            "forget_kernels": self._forget_kernels,
            "forget_dataset": self._forget_dataset,
            "differentiate_function": self._functions.differentiate,
        }

    def answer(self, kind: str, fields: Fields) -> Fields | Iterator[StepRow]:
        """Carries out one command. Running out of memory is ResourceExhausted (OUT_OF_MEMORY).

        An error after the command was carried out has the outcome "applied". "train_steps" answers row by row, and
        carries out each step when its row is asked for.
        """
        if kind == "train_steps":
            with self._together("train_step"):
                steps = RankSteps(fields, self._layouts)
            return steps.carry_out(self._model, self._step_applied, self._step_failed)
        command = self._commands.get(kind)
        if command is None:
            raise InternalError(f"no command {kind}")
        answer = self._standing_of.carry_out(partial(self._carry_out, kind, command), fields)
        with errors_after_applied(), out_of_memory_told():
            return outgoing(answer, self._segments)

    def _step_applied(self, number: int) -> None:
        self._standing_of.applied = number

    def _step_failed(self, number: int, error: BaseException) -> None:
        """What `answer` does about a command that fails. It takes longer than to do so where one fails alone."""

        def fail(_: Fields) -> None:
            raise error

        self._standing_of.carry_out(partial(self._carry_out, "train_step", fail), {NUMBER: number})

    def _carry_out(self, kind: str, command: Callable[[Fields], T], fields: Fields) -> T:
        with out_of_memory_told():
            try:
                if fields.get(AGAIN):
                    with limits_lifted():
                        return command(fields)
                return command(fields)
            except BaseException as error:
                self._tell_others(kind, error)
                raise

    @contextmanager
    def _together(self, kind: str) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._tell_others(kind, error)
            raise

    def _tell_others(self, kind: str, error: BaseException) -> None:
        """If this rank fails alone, the others must not wait for it in a collective."""
        if self._trainer is not None and kind in _COLLECTIVE and not _is_refused_by_all(error):
            self._trainer.break_off(f"{type(error).__name__}: {error}")

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
        folders = {name: fields[name] for name in ("weights_folder", "kernels_folder")}
        compute_repeatably(device, strictly=spec.deterministic)
        saved = None if fields["saved"] is None else saved_state_in(fields["saved"])

        def start(where: Fields) -> Trainer:
            if size == 1:
                return Trainer(spec=spec, state=state, device=device, limits=limits, saved=saved, **folders)
            groups = ProcessGroups.join(
                folder=where["folder"], generation=where["generation"], rank=rank, size=size, device=device
            )
            try:
                return Trainer(
                    spec=spec,
                    state=state,
                    rank=rank,
                    groups=groups,
                    device=device,
                    limits=limits,
                    saved=saved,
                    **folders,
                )
            except BaseException:
                groups.leave()
                raise

        self._loaded, self._standing_of = start, RankStanding()
        return {}

    def _start(self, fields: Fields) -> Fields:
        assert self._loaded is not None
        start, self._loaded = self._loaded, None
        self._trainer = start(fields)
        return {"tensors": [asdict(tensor) for tensor in self._trainer.built_tensors]}

    def _rejoin(self, fields: Fields) -> Fields:
        self._model.rejoin(fields["generation"])
        return {}

    def _reset(self, _: Fields) -> Fields:
        """Forgets everything. Says whether the process is as good as new."""
        if self._trainer is not None:
            self._trainer.close()
        self._loaded = self._trainer = None
        self._layouts = KnownLayouts()
        self._functions.clear()
        self._fitting.forget()
        compute_as_torch_does()
        return {"reusable": not torch.cuda.is_initialized() and RankFootprint.measure().is_close_to(self._clean)}

    @property
    def _model(self) -> Trainer:
        if self._trainer is None:
            raise FailedPrecondition("this rank has no model")
        return self._trainer

    # --- a model ---

    def _open_variant(self, fields: Fields) -> Fields:
        variant = decode_variant(program_pb2.Variant.FromString(bytes(fields["variant"])), require_graph=False)
        opened = self._model.open_variant(variant, leaves_in(fields["inputs"]))
        return {"variant": encode_variant(opened).SerializeToString()}

    def _check_rows(self, fields: Fields) -> Fields:
        inputs, targets = leaves_in(fields["inputs"]), leaves_in(fields["targets"])
        like = None if fields["like"] is None else (fields["like"]["variant"], RowsReport(**fields["like"]["found"]))
        report = self._model.check_rows(fields["variant"], inputs, targets, seconds=fields["seconds"], like=like)
        return asdict(report)

    def _weigh(self, fields: Fields) -> Fields:
        self._model.weigh(fields["variant"], fields["weight"])
        return {}

    def _train_step(self, fields: Fields) -> Fields:
        return self._model.train_step(shard_in(fields), command=fields["command"], lr=fields["lr"]).fields()

    def _fit(self, fields: Fields) -> Fields:
        """Steps as far as they go: what refuses one of them is an error only where none was applied."""
        run, refusal = self._fitting.run(self._model, fields), None
        try:
            with out_of_memory_told(), self._together("fit"):
                run.go()
        except GradwireError as error:
            if not run.losses or error.outcome != "not_applied":
                raise
            refusal = encode_error(error)
        except Exception as error:
            if run.losses:
                raise InternalError(f"{type(error).__name__}: {error}", outcome="unknown") from error
            raise
        return report_of(run, self._model.step, refusal, needs_rejoin=self.needs_rejoin)

    def _begin_kernels(self, fields: Fields) -> Fields:
        self._model.begin_kernels(described_shard(fields["shard"]))
        return {}

    def _state_of_kernels(self, fields: Fields) -> Fields:
        state, reason = self._model.state_of_kernels(described_shard(fields["shard"]))
        return {"state": state, "reason": reason}

    def _load_kernels(self, fields: Fields) -> Fields:
        return {"refused": self._model.load_kernels(described_shard(fields["shard"]))}

    def _try_kernels(self, fields: Fields) -> Fields:
        return {"refused": self._model.try_kernels(described_shard(fields["shard"]))}

    def _use_kernels(self, fields: Fields) -> Fields:
        for shard in fields["shards"]:
            self._model.use_kernels(described_shard(shard))
        return {}

    def _forget_kernels(self, fields: Fields) -> Fields:
        self._model.forget_kernels(described_shard(fields["shard"]))
        return {}

    def _forget_dataset(self, _: Fields) -> Fields:
        self._fitting.forget()
        return {}

    def _forward_backward(self, fields: Fields) -> Fields:
        return self._model.forward_backward(shard_in(fields), command=fields["command"]).fields()

    def _optimizer_step(self, fields: Fields) -> Fields:
        given = fields["gradients"]
        report = self._model.optimizer_step(
            None if given is None else incoming(given), lr=fields["lr"], groups=to_nested(fields["groups"])
        )
        return report.fields()

    def _zero_grad(self, _: Fields) -> Fields:
        self._model.zero_grad()
        return {}

    def _compute_gradients(self, fields: Fields) -> Fields:
        return gradients_of(self._model, fields)

    def _forward(self, fields: Fields) -> Fields:
        report = self._model.forward(
            shard_in(fields), training=fields["training"], seed=fields["seed"], command=fields["command"]
        )
        return _shallow(report)

    def _retained_forward(self, fields: Fields) -> Fields:
        report = self._model.retained_forward(
            shard_in(fields),
            Retention(**fields["retention"]),
            fields["name"],
            training=fields["training"],
            seed=fields["seed"],
            command=fields["command"],
        )
        return _shallow(report)

    def _backward(self, fields: Fields) -> Fields:
        return _shallow(self._model.backward(BackwardQuery(**fields["query"]), leaves_in(fields["cotangents"])))

    def _release(self, fields: Fields) -> Fields:
        self._model.release(fields["names"])
        return {}

    def _held_gradients(self, fields: Fields) -> Fields:
        gradients = self._model.held_gradients(fields["wrt"])
        return {"gradients": gradients if fields["wanted"] else {}, "step": self._model.step}

    def _set_gradients(self, fields: Fields) -> Fields:
        self._model.set_gradients(incoming(fields["gradients"]), fields["dropped"])
        return {"step": self._model.step}

    def _standing(self, _: Fields) -> Fields:
        """What can be said of the model without reading it, also when the other ranks are gone."""
        return {**asdict(self._standing_of), "holds": self._model.held_parts() is not None}

    def _state(self, fields: Fields) -> Fields:
        """All that the model's future depends on; without `whole` only what no other rank has."""
        state = self._model.model_state() if fields["whole"] else {}
        return {**state, "held": self._model.held_parts()}

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

    def _update(self, fields: Fields) -> Fields:
        optimizer = fields["optimizer"]
        trained = self._model.update(
            trainable=[(pattern, trainable) for pattern, trainable in fields["trainable"]],
            optimizer=None if optimizer is None else decode_optimizer(model_pb2.Optimizer.FromString(bytes(optimizer))),
            lr=fields["lr"],
        )
        return {"trained": trained}

    def _add_variant(self, fields: Fields) -> Fields:
        self._model.add_variant(
            decode_variant(program_pb2.Variant.FromString(bytes(fields["variant"]))),
            [StateTensor(**tensor) for tensor in fields["tensors"]],
            incoming(fields["values"], writable=True),
            fields["operators"],
        )
        return {}


def _is_refused_by_all(error: BaseException) -> bool:
    """Whether every rank refuses the command by itself, for its state or for what all ranks are sent alike.

    A shard is not. What is at fault in it has the field `batch`, or none where it cannot even be read.
    """
    if isinstance(error, InvalidArgument) and error.reason not in AGREED:
        return error.field is not None and not error.field.startswith("batch")
    return isinstance(error, (FailedPrecondition, InvalidArgument)) or getattr(error, "reason", None) in AGREED


def _shallow(report: ForwardReport | RetainedReport | BackwardReport) -> dict[str, Any]:
    """The report as fields. Not asdict: it would copy the tensors."""
    return {name: getattr(report, name) for name in report.__slots__} | {"seconds": report.seconds._asdict()}

"""What a step's seconds hold."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import nn

from gradwire.export import ModuleExporter
from gradwire_proto.values import ModelSpec, OptimizerSpec
from gradwire_workers.shard import Shard
from gradwire_workers.trainer import Trainer
from gradwire_workers.training.clock import Clock
from gradwire_workers.training.reports import Seconds
from gradwire_workers.training.updater import Update, Updater


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_the_optimizers_seconds_hold_the_freeing_of_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    apply, updated = Updater.apply, Clock.updated

    def watched_apply(self: Updater, gradients: Any, **options: Any) -> Update:
        used.extend(weakref.ref(each) for each in gradients)
        return apply(self, gradients, **options)

    def watched_end(self: Clock) -> Seconds:
        alive.append(sum(each() is not None for each in used))
        return updated(self)

    monkeypatch.setattr(Updater, "apply", watched_apply)
    monkeypatch.setattr(Clock, "updated", watched_end)
    x, y = torch.randn(4, 6), torch.randn(4, 3)
    exported = ModuleExporter(nn.Linear(6, 3), nn.MSELoss()).export_model(x, y)
    spec = ModelSpec(program=exported.program, loss=exported.loss, optimizer=OptimizerSpec(name, {"lr": 0.01}))
    trainer = Trainer(spec=spec, state={key: each.detach().clone() for key, each in exported.tensors.items()})
    shard = Shard(variant="train", rows=4, start=0, stop=4, inputs=(x,), targets=(y,))
    trainer.train_step(shard, command=0)
    assert len(used) == 2
    assert alive == [0]

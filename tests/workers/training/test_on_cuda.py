"""A rank on a GPU computes what plain torch computes there, and what a rank on the CPU computes, to rounding."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradwire.export import ModuleExporter
from gradwire_proto.values import ModelSpec, OptimizerSpec
from gradwire_workers.device_copies import on_host
from gradwire_workers.shard import Shard
from gradwire_workers.trainer import Trainer

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_steps_give_what_torchs_own_optimizer_gives_on_the_device(device: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()
    batches = [(torch.randn(rows, 6).double(), torch.randint(3, (rows,))) for rows in (5, 7, 5)]
    exported = ModuleExporter(module, nn.CrossEntropyLoss()).export_model(*batches[0])
    optimizer = OptimizerSpec("Adam", {"lr": 0.01, **options})
    spec = ModelSpec(program=exported.program, loss=exported.loss, optimizer=optimizer)
    state = {name: each.detach().clone() for name, each in exported.tensors.items()}
    trainer = Trainer(spec=spec, state=state, device=device)
    reference = copy.deepcopy(module).to(device)
    torchs = torch.optim.Adam(reference.parameters(), lr=0.01, **options)
    shard = Shard(variant="train", rows=0, start=0, stop=0, inputs=(), targets=())
    for command, (x, y) in enumerate(batches):
        loss = F.cross_entropy(reference(x.to(device)), y.to(device))
        torchs.zero_grad()
        loss.backward()
        torchs.step()
        mine = replace(shard, rows=len(x), stop=len(x), inputs=(x,), targets=(y,))
        assert trainer.train_step(mine, command=command).loss == pytest.approx(loss.item(), rel=1e-10)
    found = trainer.state_dict()
    for (name, expected), each in zip(reference.state_dict().items(), on_host(found.values()), strict=True):
        assert found[name].device.type == device
        torch.testing.assert_close(each, expected.cpu(), rtol=1e-9, atol=1e-11)

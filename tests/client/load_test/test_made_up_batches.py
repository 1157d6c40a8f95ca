"""Models that exist are fed with batches that fit what they tell of themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradwire.errors import FailedPrecondition
from gradwire.export import ModuleExporter
from gradwire.load_test.made_up_batches import made_up_batch
from gradwire_proto.batch_check import check_batch
from gradwire_proto.tensors import from_nested
from gradwire_proto.values import Batch, ModelInfo, Variant


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
        hidden = (self.embedding(tokens) * mask.unsqueeze(-1)).sum(1) * scale
        return self.head(hidden)


def described(*variants: Variant) -> ModelInfo:
    return ModelInfo(
        id="mine",
        state="ready",
        step=0,
        workers=1,
        sharding=None,
        num_parameters=1,
        optimizer=None,
        loss=None,
        labels={},
        created_at=0.0,
        variants=variants,
    )


def test_batch_fits_the_variant_with_the_rows_that_were_asked_for() -> None:
    tokens, mask = torch.randint(0, 7, (4, 6)), torch.rand(4, 6) > 0.5
    inputs, targets = {"tokens": tokens, "mask": mask, "scale": 0.5}, torch.randint(0, 3, (4,))
    program = ModuleExporter(Tagger(), nn.CrossEntropyLoss()).export_model(inputs, targets).program
    (variant,) = [each for each in program.variants if each.training]
    inputs, targets = made_up_batch(described(variant), training=True, rows=5, seed=0)
    assert check_batch(variant, Batch(from_nested(inputs, "inputs"), from_nested(targets, "targets"))) == 5
    # What any embedding and loss takes, and a mask that hides nothing.
    assert not inputs["tokens"].any() and inputs["mask"].all() and not targets.any()


def test_model_without_a_variant_of_the_mode_cannot_be_fed() -> None:
    with pytest.raises(FailedPrecondition) as refused:
        made_up_batch(described(), training=True, rows=3, seed=0)
    assert refused.value.reason == "CANNOT_BE_FED"
    assert "models/mine" in str(refused.value)

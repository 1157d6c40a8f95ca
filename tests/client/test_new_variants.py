"""Batches that fit none of a model's variants: exported anew, or refused."""

from __future__ import annotations

import pytest
import torch
from client.one_model import FEATURES, RESULT, batch
from torch import nn

from gradwire import errors, optim
from gradwire.variants import without_graph
from gradwire_proto import codec


def test_batch_of_another_kind_gets_a_variant_of_its_own_once(sdk, hosted, scripted):
    model = sdk.create_model(Scale(), loss="mse_loss", optimizer=optim.SGD(), example=pair(2, 3))
    model.train_step(*pair(5, 3))
    assert scripted.requests("AddVariant") == []
    model.train_step(*pair(5, 4))
    model.train_step(*pair(7, 4))
    (request,) = scripted.requests("AddVariant")
    variant = codec.decode_variant(request.variant)
    assert variant.training and variant.input_leaves[0].shape == ("rows", 4)
    assert codec.decode_batch(request.example).inputs.shape == (5, 4)
    assert len(scripted.requests("TrainStep")) == 3


def test_batch_that_the_module_itself_refuses_is_an_invalid_argument_about_its_field(model, scripted):
    with pytest.raises(errors.InvalidArgument, match="expected float32") as caught:
        model.train_step(torch.randn(6, FEATURES + 1), batch()[1])
    assert type(caught.value) is errors.InvalidArgument
    assert caught.value.field == "batch.inputs" and str(FEATURES) in caught.value.message
    assert any("module itself" in note for note in caught.value.__notes__)
    assert scripted.requests("AddVariant") == scripted.requests("TrainStep") == []


def test_targets_that_no_loss_compares_with_are_refused_and_add_nothing(sdk, hosted, scripted):
    class OwnLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(FEATURES, 1)

        def forward(self, x):
            return self.linear(x).mean()

    model = sdk.create_model(OwnLoss(), optimizer=optim.SGD(), example=(batch()[0],))
    with pytest.raises(errors.InvalidArgument) as caught:
        model.train_step(*batch())
    assert caught.value.field == "batch.targets"
    assert scripted.requests("AddVariant") == []
    assert model.train_step(batch()[0]) == RESULT


def test_without_the_module_a_batch_must_fit_and_new_variants_of_others_are_found(sdk, hosted, scripted):
    model = sdk.create_model(Scale(), loss="mse_loss", optimizer=optim.SGD(), example=pair(2, 3))
    found = sdk.get_model(model.id)
    with pytest.raises(errors.InvalidArgument, match="expected float32"):
        found.train_step(*pair(2, 4))
    model.train_step(*pair(2, 4))
    variant = codec.decode_variant(scripted.requests("AddVariant")[0].variant)
    hosted.info = _with_variant(hosted.info, without_graph(variant))
    assert found.train_step(*pair(2, 4)) == RESULT


class Scale(nn.Module):
    """Takes any number of features, and does something else for odd ones: each number has a graph of its own."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.factor * x if x.shape[1] % 2 else x * self.factor


def pair(rows: int, features: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, features), torch.randn(rows, features)


def _with_variant(info, variant):
    from dataclasses import replace

    return replace(info, variants=(*info.variants, variant))

"""What batches of modules that the service builds may be, and how they are spread over ranks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from end_to_end.architecture_cases import BERT, CASES, encoder, encoder_layer, ids, labelled, layer, sequential
from torch import nn

from gradwire import Architecture
from gradwire.errors import FailedPrecondition, InvalidArgument, ResourceExhausted


def test_batches_of_other_shapes_and_with_other_inputs_need_nothing_of_the_client(client):
    model = client.create_model(CASES["gpt2"].architecture, example=(labelled(4),), workers=2, seed=5)
    sharding = model.info().sharding
    assert sharding.mode == "whole" and "the module returns its loss, a scalar" in sharding.reason
    torch.manual_seed(5)
    module = CASES["gpt2"].local().eval()
    tokens, mask = torch.randint(2, 31, (3, 11)), torch.ones(3, 11, dtype=torch.int64)
    mask[1, 6:] = 0
    found = model.forward({"input_ids": tokens, "attention_mask": mask})
    torch.testing.assert_close(found["logits"], module(input_ids=tokens, attention_mask=mask).logits)
    again = client.get_model(model.id).compute_gradients({"input_ids": tokens, "labels": tokens}, training=False)
    assert again.loss == pytest.approx(module(input_ids=tokens, labels=tokens).loss.item(), rel=1e-5)


def test_rows_that_depend_on_each_other_are_computed_by_one_rank(client):
    architecture, x = encoder(batch_first=False), torch.randn(6, 4, 8)
    model = client.create_model(architecture, loss="mse", example=(x, torch.randn(6, 4, 3)), workers=2)
    sharding = model.info().sharding
    assert sharding.mode == "whole" and "depend" in sharding.reason
    with pytest.raises(FailedPrecondition) as refused:
        client.create_model(
            architecture, loss="mse", example=(x, torch.randn(6, 4, 3)), workers=2, require_sharding=True
        )
    assert refused.value.reason == "ROWS_NOT_INDEPENDENT"


def test_targets_of_another_number_of_rows_fit_no_shard_by_chance(client):
    linear, x = layer("Linear", in_features=3, out_features=2), torch.randn(4, 3)
    model = client.create_model(linear, loss="mse", example=(x, torch.randn(4, 2)), workers=2)
    with pytest.raises(InvalidArgument) as refused:
        model.compute_gradients(x, torch.randn(2, 2))  # as many as each rank has
    assert refused.value.reason == "PROGRAM_FAILED"
    one = torch.randn(1, 2)  # torch broadcasts it
    module = nn.Linear(3, 2)
    module.load_state_dict(model.state_dict())
    assert model.compute_gradients(x, one).loss == pytest.approx(
        F.mse_loss(module(x), one.expand(4, 2)).item(), rel=1e-5
    )


def test_a_mask_that_has_as_many_rows_as_the_batch_by_chance_is_no_part_of_it(client):
    torch.manual_seed(9)
    block = nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, dropout=0.0, batch_first=True, activation="gelu")
    architecture = Architecture("torch.nn.TransformerEncoderLayer", **encoder_layer())
    x, mask = torch.randn(4, 4, 8), torch.triu(torch.ones(4, 4, dtype=torch.bool), 1)
    model = client.create_model(architecture, example=({"src": x, "src_mask": mask},), workers=2, seed=9)
    for rows in (4, 7):
        x = torch.randn(rows, 4, 8)
        torch.testing.assert_close(model.forward({"src": x, "src_mask": mask}, training=True), block(x, src_mask=mask))


def test_dropout_is_no_reason_to_compute_the_whole_batch_on_one_rank(client):
    x = torch.randn(6, 4, 8)
    model = client.create_model(encoder(dropout=0.5), loss="mse", example=(x, torch.randn(6, 4, 3)), workers=2)
    assert model.info().sharding.mode == "rows"
    layers = sequential(layer("Linear", in_features=8, out_features=3), layer("Dropout", p=0.5), layer("RReLU"))
    assert client.create_model(layers, example=(x,), workers=2).info().sharding.mode == "rows"
    attention = Architecture(
        "transformers.BertForSequenceClassification", **{**BERT, "attention_probs_dropout_prob": 0.5}
    )
    assert client.create_model(attention, example=({"input_ids": ids(6)},), workers=2).info().sharding.mode == "rows"


def test_a_module_that_returns_no_loss_of_its_own_is_split(client):
    """One that returns it is not: see the first test."""
    gpt2 = CASES["gpt2"].architecture
    assert client.create_model(gpt2, example=({"input_ids": ids(4)},), workers=2).info().sharding.mode == "rows"
    attention, x = layer("MultiheadAttention", embed_dim=8, num_heads=2, batch_first=True), torch.randn(4, 5, 8)
    example = ({"query": x, "key": x, "value": x},)
    assert client.create_model(attention, example=example, workers=2).info().sharding.mode == "rows"


def test_a_layer_that_writes_into_its_input_leaves_the_batch_alone(client):
    layers = sequential(layer("ReLU", inplace=True), layer("Linear", in_features=3, out_features=2))
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    model = client.create_model(layers, loss="mse", example=(x, y), workers=2, seed=4)
    torch.manual_seed(4)
    module, leaf = nn.Sequential(nn.ReLU(), nn.Linear(3, 2)), x.clone().requires_grad_()
    F.mse_loss(module(leaf), y).backward()
    found = model.compute_gradients(x, y, input_gradients=True).input_gradients
    torch.testing.assert_close(found, leaf.grad)


def test_a_batch_that_would_make_too_large_a_tensor_is_refused_before_it_is_made(client):
    model = client.create_model(layer("Upsample", scale_factor=100_000), example=(torch.randn(1, 1, 1),))
    with pytest.raises(ResourceExhausted) as refused:
        model.forward(torch.randn(64, 4096, 64))
    assert refused.value.reason == "TENSOR_TOO_LARGE"
    assert model.forward(torch.randn(1, 1, 1)).shape == (1, 1, 100_000)


@pytest.mark.parametrize(
    ("batch", "field", "reason"),
    [
        ({"input_ids": ids(2), "lables": ids(2)}, "batch.inputs.lables", "STRUCTURE_MISMATCH"),
        ({"input_ids": ids(2) + 31}, "batch.inputs", "INDEX_OUT_OF_RANGE"),
        ({"input_ids": ids(0)}, "batch.inputs", "BATCH_EMPTY"),
        ({"input_ids": ids(2), "use_cache": True}, "batch.inputs", "OUTPUT_UNSUPPORTED"),
        ({"input_ids": ids(2), "cache": "a"}, "batch.inputs", "STRUCTURE_MISMATCH"),
        (torch.randn(2, 7), "batch", "PROGRAM_FAILED"),
    ],
)
def test_batches_that_the_module_does_not_take_are_refused(client, gpt2, batch, field, reason):
    with pytest.raises(InvalidArgument) as refused:
        gpt2.forward(batch)
    assert (refused.value.field, refused.value.reason) == (field, reason)


@pytest.fixture(scope="module")
def gpt2(client):
    model = client.create_model(CASES["gpt2"].architecture, example=(labelled(4),), model_id="gpt2")
    yield model
    model.delete()


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_that_are_refused_are_no_kinds(client, workers):
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    model = client.create_model(
        layer("Linear", in_features=3, out_features=2), loss="mse", example=(x, y), workers=workers, seed=3
    )
    for number in range(client.server_info().limits.variants + 6):
        with pytest.raises(InvalidArgument):
            model.compute_gradients(x, {f"target{number}": y, "more": y})
    torch.manual_seed(3)
    module = nn.Linear(3, 2)
    for rows in (4, 5):
        x = torch.randn(rows, 3)
        torch.testing.assert_close(model.forward(x), module(x))
    assert model.compute_gradients(x[:4], y).loss == pytest.approx(F.mse_loss(module(x[:4]), y).item(), rel=1e-5)


def test_a_cache_among_the_outputs_is_refused_with_what_to_do_about_it(gpt2):
    with pytest.raises(InvalidArgument, match=r"DynamicCache.*set the config's use_cache=False"):
        gpt2.forward({"input_ids": ids(2), "use_cache": True})


def test_a_kind_that_a_clients_own_autograd_brings_stays(client):
    x = torch.randn(4, 3)
    model = client.create_model(layer("Linear", in_features=3, out_features=2), example=(x,), seed=3)
    net = model.as_module()
    torch.manual_seed(3)
    module = nn.Linear(3, 2)
    first, other = net(input=x), net(x[:2])
    (first.sum() + other.sum() + net(input=x[:3]).sum()).backward()
    (module(x).sum() + module(x[:2]).sum() + module(x[:3]).sum()).backward()
    torch.testing.assert_close(net.weight.grad, module.weight.grad)


def test_kinds_of_batches_are_bounded(client, gpt2):
    def use_them_up() -> None:
        for number in range(client.server_info().limits.variants):
            gpt2.forward({"input_ids": ids(2), "logits_to_keep": number})

    with pytest.raises(ResourceExhausted) as refused:
        use_them_up()
    assert refused.value.reason == "TOO_MANY_VARIANTS"
    assert gpt2.forward({"input_ids": ids(2), "logits_to_keep": 1})["logits"].shape == (2, 1, 31)


def test_a_loss_that_has_no_name_and_the_choice_of_one_output_among_many_are_refused(client):
    x = torch.randn(4, 3)
    linear = layer("Linear", in_features=3, out_features=3)
    with pytest.raises(InvalidArgument) as refused:
        client.create_model(linear, loss=lambda outputs, targets: outputs.sum(), example=(x, x))
    assert (refused.value.field, refused.value.reason) == ("loss", "LOSS_NOT_BY_NAME")
    lstm = client.create_model(layer("LSTM", input_size=3, hidden_size=3), loss="mse", example=(x, x))
    with pytest.raises(InvalidArgument) as refused:
        lstm.compute_gradients(x, x)
    assert refused.value.reason == "LOSS_DOES_NOT_FIT"
    without = client.create_model(linear, example=(x,))
    with pytest.raises(InvalidArgument) as refused:
        without.compute_gradients(x)
    assert refused.value.reason == "LOSS_NOT_SCALAR"

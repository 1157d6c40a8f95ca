"""Modules that the service builds by name compute what the same modules compute here, on one rank and on two."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import nn

import gradwire
from gradwire import Architecture, optim
from gradwire.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import gradient_service_pb2_grpc as pb_grpc
from gradwire_proto.v1 import tensor_pb2

ROWS = 5
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BERT = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 31, "intermediate_size": 24}
BERT |= {"max_position_embeddings": 16, "num_labels": 3, **NO_DROPOUT}
LLAMA = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 31, "intermediate_size": 24}
LLAMA |= {"num_key_value_heads": 1, "max_position_embeddings": 32}
GPT2 = {"n_embd": 16, "n_head": 2, "n_layer": 2, "vocab_size": 31, "n_positions": 16, "bos_token_id": 0}
GPT2 |= {"eos_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@dataclass(frozen=True, kw_only=True)
class Case:
    """An architecture, the same module made here, and a batch of so many rows. `sharding`: on two ranks."""

    architecture: Architecture
    local: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    targets: Callable[[int], Any] = lambda rows: None
    loss: str | None = None
    sharding: str = "rows"


def layer(name: str, **config: Any) -> Architecture:
    return Architecture(f"torch.nn.{name}", **config)


def sequential(*layers: Any) -> Architecture:
    return Architecture("torch.nn.Sequential", layers=list(layers))


def local_encoder() -> nn.Module:
    block = nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, dropout=0.0, batch_first=True, activation="gelu")
    return nn.Sequential(nn.TransformerEncoder(block, 2, norm=nn.LayerNorm(8)), nn.Linear(8, 3))


def encoder(**changes: Any) -> Architecture:
    options = {"d_model": 8, "nhead": 2, "dim_feedforward": 12, "dropout": 0.0, "batch_first": True} | changes
    block = layer("TransformerEncoderLayer", **options, activation="gelu")
    norm = layer("LayerNorm", normalized_shape=8)
    stack = layer("TransformerEncoder", encoder_layer=block, num_layers=2, norm=norm)
    return sequential(stack, layer("Linear", in_features=8, out_features=3))


def ids(rows: int) -> torch.Tensor:
    return torch.randint(2, 31, (rows, 7))


def labelled(rows: int) -> dict[str, torch.Tensor]:
    tokens = ids(rows)
    labels = tokens.clone()
    labels[0, 3:] = -100
    return {"input_ids": tokens, "labels": labels}


CASES = {
    "mlp": Case(
        architecture=sequential(
            layer("Linear", in_features=4, out_features=8),
            layer("LayerNorm", normalized_shape=[8]),
            # As a client in another language nests it.
            {"name": "torch.nn.GELU", "config": {"approximate": "tanh"}},
            layer("Linear", in_features=8, out_features=3, bias=False),
        ),
        local=lambda: nn.Sequential(
            nn.Linear(4, 8), nn.LayerNorm([8]), nn.GELU(approximate="tanh"), nn.Linear(8, 3, bias=False)
        ),
        inputs=lambda rows: torch.randn(rows, 4),
        targets=lambda rows: torch.randint(3, (rows,)),
        loss="cross_entropy",
    ),
    "convolutions": Case(
        architecture=sequential(
            layer("Conv2d", in_channels=2, out_channels=4, kernel_size=3, padding="same"),
            layer("BatchNorm2d", num_features=4, momentum=None),
            layer("ReLU", inplace=True),
            layer("AdaptiveAvgPool2d", output_size=(2, 2)),
            layer("Flatten"),
            layer("BatchNorm1d", num_features=16),
            layer("Linear", in_features=16, out_features=1),
        ),
        local=lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding="same"),
            nn.BatchNorm2d(4, momentum=None),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d((2, 2)),
            nn.Flatten(),
            nn.BatchNorm1d(16),
            nn.Linear(16, 1),
        ),
        inputs=lambda rows: torch.randn(rows, 2, 6, 6),
        targets=lambda rows: torch.randn(rows, 1),
        loss="mse",
    ),
    "encoder": Case(
        architecture=encoder(),
        local=local_encoder,
        inputs=lambda rows: torch.randn(rows, 4, 8),
        targets=lambda rows: torch.randn(rows, 4, 3),
        loss="mse",
    ),
    "gpt2": Case(
        architecture=Architecture("transformers.GPT2LMHeadModel", **GPT2),
        local=lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, use_cache=False)),
        inputs=labelled,
        sharding="whole",
    ),
    "llama": Case(
        architecture=Architecture("transformers.LlamaForCausalLM", **LLAMA),
        local=lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, use_cache=False)),
        inputs=labelled,
        sharding="whole",
    ),
    "bert": Case(
        architecture=Architecture("transformers.BertForSequenceClassification", **BERT),
        local=lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**BERT)),
        inputs=lambda rows: {"input_ids": ids(rows), "attention_mask": torch.ones(rows, 7, dtype=torch.int64)},
        targets=lambda rows: torch.randint(3, (rows,)),
        loss="cross_entropy",
    ),
}
LOSSES = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}


def call(module: nn.Module, inputs: Any) -> Any:
    return module(**inputs) if isinstance(inputs, dict) else module(inputs.clone())


def local_loss(case: Case, module: nn.Module, inputs: Any, targets: Any) -> torch.Tensor:
    output = call(module, inputs)
    if case.loss is None:
        return output.loss
    return LOSSES[case.loss](output if isinstance(output, torch.Tensor) else output.logits, targets)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("workers", [1, 2])
def test_loss_gradients_and_update_are_those_of_the_same_module_here(client, name, workers):
    case, seed = CASES[name], random.randrange(2**40)
    inputs, targets = case.inputs(ROWS), case.targets(ROWS)
    model = client.create_model(
        case.architecture,
        loss=case.loss,
        optimizer=optim.SGD(lr=0.1),
        example=(inputs, targets),
        workers=workers,
        seed=seed,
    )
    if workers == 2:
        assert model.info().sharding.mode == case.sharding
    torch.manual_seed(seed)
    module = case.local()
    assert_same_state(model, module, exact=True)
    assert model.info().num_parameters == sum(parameter.numel() for parameter in module.parameters())

    # Other rows than the example's; two ranks get uneven shares, and the second a dummy row.
    for rows in (ROWS, 3) if name == "convolutions" else (ROWS, 1):
        inputs, targets = case.inputs(rows), case.targets(rows)
        for training in (True, False):
            module.train(training)
            buffers = {key: buffer.clone() for key, buffer in module.named_buffers()}
            loss = local_loss(case, module, inputs, targets)
            gradients = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
            for key, buffer in module.named_buffers():
                buffer.copy_(buffers[key])
            result = model.compute_gradients(inputs, targets, training=training)
            assert result.loss == pytest.approx(loss.item(), rel=1e-5)
            for (key, _), gradient in zip(module.named_parameters(), gradients, strict=True):
                found = result.gradients.get(key)
                assert (found is None) == (gradient is None), key
                if gradient is not None:
                    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5)
        assert_same_state(model, module, exact=True)

    inputs, targets = case.inputs(ROWS), case.targets(ROWS)
    module.train()
    step = torch.optim.SGD(module.parameters(), lr=0.1)
    loss = local_loss(case, module, inputs, targets)
    loss.backward()
    step.step()
    assert model.train_step(inputs, targets).loss == pytest.approx(loss.item(), rel=1e-5)
    assert_same_state(model, module, exact=False)


def assert_same_state(model: gradwire.Model, module: nn.Module, *, exact: bool) -> None:
    state, expected = model.state_dict(), module.state_dict()
    assert list(state) == list(expected)
    for key, tensor in expected.items():
        if exact:
            assert torch.equal(state[key], tensor), key
        else:
            torch.testing.assert_close(state[key], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("workers", [1, 2])
def test_outputs_are_nested_as_the_module_nests_them(client, workers):
    architecture = layer("LSTM", input_size=3, hidden_size=4, num_layers=2, batch_first=True)
    model = client.create_model(architecture, example=(torch.randn(4, 5, 3),), workers=workers, seed=3)
    torch.manual_seed(3)
    module, x = nn.LSTM(3, 4, num_layers=2, batch_first=True), torch.randn(3, 6, 3)
    expected, (hidden, cell) = module(x)
    found = model.forward(x)
    assert isinstance(found, tuple) and isinstance(found[1], tuple)
    for one, other in ((found[0], expected), (found[1][0], hidden), (found[1][1], cell)):
        torch.testing.assert_close(one, other)


def test_batches_of_other_shapes_and_with_other_inputs_need_nothing_of_the_client(client):
    model = client.create_model(CASES["gpt2"].architecture, example=(labelled(4),), workers=2, seed=5)
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


def test_dropout_is_no_reason_to_compute_the_whole_batch_on_one_rank(client):
    x = torch.randn(6, 4, 8)
    model = client.create_model(encoder(dropout=0.5), loss="mse", example=(x, torch.randn(6, 4, 3)), workers=2)
    assert model.info().sharding.mode == "rows"
    lstm = sequential(layer("Linear", in_features=8, out_features=3), layer("Dropout", p=0.5), layer("RReLU"))
    assert (
        client.create_model(lstm, loss="mse", example=(x, torch.randn(6, 4, 3)), workers=2).info().sharding.mode
        == "rows"
    )


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


def test_first_weights_come_from_the_folder_that_the_operator_allows(tmp_path):
    module = nn.Sequential(nn.Linear(3, 2))
    (tmp_path / "team").mkdir()
    save_file(module.state_dict(), tmp_path / "team" / "model.safetensors")
    linear, x = [layer("Linear", in_features=3, out_features=2)], torch.randn(4, 3)
    with gradwire.launch(workers=1, weights_folder=tmp_path) as client:
        model = client.create_model(Architecture("torch.nn.Sequential", weights="team", layers=linear), example=(x,))
        assert_same_state(model, module, exact=True)
        for weights in ("../team", "/etc", str(tmp_path / "team")):
            with pytest.raises(InvalidArgument) as refused:
                client.create_model(Architecture("torch.nn.Sequential", weights=weights, layers=linear), example=(x,))
            assert refused.value.reason == "WEIGHTS_PATH_INVALID"


def test_a_client_without_torch_makes_and_trains_a_model(service):
    def text(value: str) -> tensor_pb2.Value:
        return tensor_pb2.Value(text=value)

    def mapping(**entries: tensor_pb2.Value) -> tensor_pb2.ValueMapping:
        return tensor_pb2.ValueMapping(entries=[tensor_pb2.ValueEntry(key=k, value=v) for k, v in entries.items()])

    def module(name: str, **config: int) -> tensor_pb2.Value:
        numbers = mapping(**{key: tensor_pb2.Value(integer=value) for key, value in config.items()})
        return tensor_pb2.Value(dict=mapping(name=text(name), config=tensor_pb2.Value(dict=numbers)))

    def tensor(rows: list[list[float]]) -> tensor_pb2.Value:
        flat = [number for row in rows for number in row]
        data = struct.pack(f"<{len(flat)}f", *flat)
        shape = [len(rows), len(rows[0])]
        return tensor_pb2.Value(tensor=tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_FLOAT32, shape=shape, data=data))

    layers = tensor_pb2.ValueSequence(
        items=[module("torch.nn.Linear", in_features=2, out_features=1), module("torch.nn.Identity")]
    )
    request = pb.CreateModelRequest(model_id="foreign")
    request.model.program.architecture.name = "torch.nn.Sequential"
    request.model.program.architecture.config.CopyFrom(mapping(layers=tensor_pb2.Value(list=layers)))
    request.model.loss.torch.name = "mse_loss"
    request.model.optimizer.name = "SGD"
    request.model.optimizer.options.CopyFrom(mapping(lr=tensor_pb2.Value(number=0.1)))
    with grpc.insecure_channel(service) as channel:
        stub: Any = pb_grpc.GradientServiceStub(channel)
        made = stub.CreateModel(request)
        try:
            assert (made.architecture, made.parameter_count) == ("torch.nn.Sequential", 3)
            assert [each.name for each in made.tensors] == ["0.weight", "0.bias"]
            batch = tensor_pb2.Batch(
                inputs=tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 7.0]]), targets=tensor([[1.0], [2.0], [3.0]])
            )
            losses = [
                stub.TrainStep(pb.TrainStepRequest(name=made.name, batch=batch, learning_rate=0.01)).result.loss
                for _ in range(20)
            ]
        finally:
            stub.DeleteModel(pb.DeleteModelRequest(name=made.name))
    torch.manual_seed(0)
    net = nn.Linear(2, 1)
    expected = F.mse_loss(net(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 7.0]])), torch.tensor([[1.0], [2.0], [3.0]]))
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5)
    assert losses[-1] < losses[0]

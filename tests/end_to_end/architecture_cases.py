"""Architectures, and the same modules made here, with batches of any number of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn

import gradwire
from gradwire import Architecture

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


def encoder_layer(**changes: Any) -> dict[str, Any]:
    options = {"d_model": 8, "nhead": 2, "dim_feedforward": 12, "dropout": 0.0, "batch_first": True}
    return {**options, "activation": "gelu", **changes}


def encoder(**changes: Any) -> Architecture:
    block = layer("TransformerEncoderLayer", **encoder_layer(**changes))
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


def assert_same_state(model: gradwire.Model, module: nn.Module, *, exact: bool) -> None:
    state, expected = model.state_dict(), module.state_dict()
    assert list(state) == list(expected)
    for key, tensor in expected.items():
        if exact:
            assert torch.equal(state[key], tensor), key
        else:
            torch.testing.assert_close(state[key], tensor, rtol=1e-4, atol=1e-5)

"""Architectures are built as torch builds them, and only out of what is allowed."""

from __future__ import annotations

import random
import sys
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from gradwire_proto.errors import FailedPrecondition, GradwireError, InvalidArgument, ResourceExhausted
from gradwire_proto.values import ArchitectureSpec, Limits
from gradwire_workers.architectures import torch_modules, transformers_models
from gradwire_workers.architectures.architecture_program import ArchitectureProgram
from gradwire_workers.architectures.build import build_architecture

TOY = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 31,
    "intermediate_size": 24,
    "n_embd": 16,
    "n_head": 2,
    "n_layer": 2,
    "n_positions": 16,
    "dim": 16,
    "hidden_dim": 24,
    "n_heads": 2,
    "n_layers": 2,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "num_labels": 3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def build(name: str, *, seed: int = 0, limits: Limits | None = None, **config: Any) -> ArchitectureProgram:
    return build_architecture(ArchitectureSpec(name=name, config=config), seed, limits=limits)


def module(name: str, **config: Any) -> dict[str, Any]:
    return {"name": f"torch.nn.{name}", "config": config}


def sequential(*layers: Any, **options: Any) -> ArchitectureProgram:
    return build("torch.nn.Sequential", layers=list(layers), **options)


def refusal(name: str, **config: Any) -> GradwireError:
    with pytest.raises(GradwireError) as refused:
        build(name, **config)
    return refused.value


def same_state(program: ArchitectureProgram, expected: nn.Module) -> bool:
    found, wanted = program.state_tensors(), expected.state_dict()
    return list(found) == list(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_first_weights_are_torchs_own_for_the_seed_and_nobody_elses_random_numbers_move():
    seed = random.randrange(2**60)
    state = torch.random.get_rng_state()
    built = sequential(
        module("Conv1d", in_channels=2, out_channels=4, kernel_size=3),
        module("GRU", input_size=4, hidden_size=5, num_layers=2, bidirectional=True),
        module("MultiheadAttention", embed_dim=8, num_heads=2),
        module("Embedding", num_embeddings=7, embedding_dim=3, padding_idx=1),
        seed=seed,
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(seed)
    layers = nn.Conv1d(2, 4, 3), nn.GRU(4, 5, 2, bidirectional=True), nn.MultiheadAttention(8, 2)
    assert same_state(built, nn.Sequential(*layers, nn.Embedding(7, 3, padding_idx=1)))
    assert not same_state(
        sequential(module("Linear", in_features=3, out_features=3), seed=1), nn.Sequential(nn.Linear(3, 3))
    )


def test_layers_by_name_keep_their_names():
    built = build("torch.nn.Sequential", layers={"first": module("Linear", in_features=2, out_features=3)})
    assert list(built.state_tensors()) == ["first.weight", "first.bias"]


@pytest.mark.parametrize("name", transformers_models.names())
def test_every_model_of_transformers_is_built_as_the_library_builds_it(name):
    kind = getattr(transformers, transformers_models._CONFIG_OF[name])
    config = {key: value for key, value in TOY.items() if key in transformers_models._fields(kind)}
    built = build(name, seed=11, **config)
    torch.manual_seed(11)
    assert same_state(built, getattr(transformers, name.removeprefix("transformers."))(kind(**config)))


def test_tied_weights_are_one_tensor():
    built = build("transformers.GPT2LMHeadModel", **{key: TOY[key] for key in ("n_embd", "n_head", "vocab_size")})
    (tied,) = [each for each in built.tensors if each.alias_of]
    assert (tied.name, tied.alias_of) == ("lm_head.weight", "transformer.wte.weight")
    assert built.state_tensors()[tied.name] is built.state_tensors()[tied.alias_of]


@pytest.mark.parametrize(
    ("name", "offered"),
    [
        *(("torch.nn.Module", ""), ("torch.nn.ModuleList", ""), ("torch.os.system", ""), ("os.system", ""), ("", "")),
        *(("torch.nn.DataParallel", ""), ("torch.nn.LazyLinear", ""), ("torch.nn.Linear.__init__", "torch.nn.Linear")),
        *(("transformers.AutoModel", ""), ("transformers.pipeline", ""), ("torch.nn.linear", "torch.nn.Linear")),
        *(("Linear", ""), ("transformers.GPT2LMHead", "transformers.GPT2LMHeadModel")),
    ],
)
def test_classes_that_are_not_listed_are_refused_and_near_ones_offered(name, offered):
    for error, field in (
        (refusal(name), "model.program.architecture.name"),
        (
            refusal("torch.nn.Sequential", layers=[{"name": name, "config": {}}]),
            'model.program.architecture.config["layers"][0].name',
        ),
    ):
        assert (error.reason, error.field) == ("ARCHITECTURE_UNKNOWN", field)
        if not offered.startswith("transformers") or "layers" not in field:
            assert offered in error.message


def test_a_model_of_transformers_stands_alone():
    error = refusal("torch.nn.Sequential", layers=[{"name": "transformers.GPT2Model", "config": {}}])
    assert error.reason == "ARCHITECTURE_UNKNOWN"


@pytest.mark.parametrize(
    ("name", "key", "value", "near"),
    [
        ("torch.nn.Linear", "out_feature", 3, "out_features"),
        ("torch.nn.Linear", "device", "cuda", ""),
        ("torch.nn.Linear", "dtype", "float64", ""),
        ("torch.nn.Embedding", "_weight", [1.0], ""),
        ("torch.nn.Embedding", "sparse", True, ""),
        ("torch.nn.Transformer", "custom_encoder", {"name": "torch.nn.Identity"}, ""),
        ("torch.nn.Sequential", "modules", [], ""),
        ("transformers.GPT2LMHeadModel", "n_layers", 2, "n_layer"),
        ("transformers.GPT2LMHeadModel", "trust_remote_code", True, ""),
        ("transformers.GPT2LMHeadModel", "auto_map", {"AutoModel": "a--b.C"}, ""),
        ("transformers.GPT2LMHeadModel", "dtype", "float64", ""),
        ("transformers.GPT2LMHeadModel", "torch_dtype", "float64", ""),
        ("transformers.GPT2LMHeadModel", "device_map", "auto", ""),
        ("transformers.GPT2LMHeadModel", "_name_or_path", "gpt2", ""),
        ("transformers.GPT2LMHeadModel", "attn_implementation", "kernels-community/flash-attn", ""),
        ("transformers.GPT2LMHeadModel", "quantization_config", {}, ""),
        ("transformers.GPT2LMHeadModel", "architectures", ["os"], ""),
    ],
)
def test_keys_that_a_class_does_not_take_are_refused_by_name(name, key, value, near):
    error = refusal(name, **{key: value})
    assert (error.reason, error.field) == ("OPTION_UNKNOWN", f'model.program.architecture.config["{key}"]')
    assert repr(key) in error.message and near in error.message


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("torch.nn.Linear", "in_features", "/etc/passwd"),
        ("torch.nn.Linear", "in_features", 2.5),
        ("torch.nn.Linear", "in_features", True),
        ("torch.nn.Linear", "in_features", 2**40),
        ("torch.nn.Linear", "in_features", {"name": "torch.nn.Linear"}),
        ("torch.nn.Linear", "bias", 1),
        ("torch.nn.Conv2d", "padding_mode", "eval"),
        ("torch.nn.Conv2d", "kernel_size", [1] * 17),
        ("torch.nn.LSTM", "num_layers", 5000),
        ("torch.nn.TransformerEncoder", "num_layers", 10**9),
        ("torch.nn.TransformerEncoderLayer", "activation", "os.system"),
        ("torch.nn.TransformerEncoder", "encoder_layer", module("Linear", in_features=1, out_features=1)),
        ("torch.nn.Sequential", "layers", 3),
        ("torch.nn.Sequential", "layers", ["torch.nn.ReLU"]),
        ("transformers.GPT2LMHeadModel", "activation_function", "../gelu"),
        ("transformers.GPT2LMHeadModel", "activation_function", "torch.nn.GELU"),
        ("transformers.GPT2LMHeadModel", "n_layer", 10**9),
        ("transformers.GPT2LMHeadModel", "num_labels", 10**7),
        ("transformers.GPT2LMHeadModel", "vocab_size", 2**40),
        ("transformers.GPT2LMHeadModel", "resid_pdrop", float("nan")),
        ("transformers.GPT2LMHeadModel", "use_cache", True),
        ("transformers.LlamaForCausalLM", "rope_parameters", {"rope_type": "dynamic", "factor": 2.0}),
        ("transformers.Qwen3ForCausalLM", "layer_types", ["full_attention"] * 5000),
    ],
)
def test_values_that_no_argument_may_have_are_refused_with_their_path(name, key, value):
    error = refusal(name, **{key: value})
    assert error.reason == "OPTION_OUT_OF_RANGE"
    assert error.field is not None and error.field.startswith(f'model.program.architecture.config["{key}"]')


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("torch.nn.Linear", {"in_features": 3}),
        ("torch.nn.Linear", {"in_features": -1, "out_features": 2}),
        ("torch.nn.MultiheadAttention", {"embed_dim": 5, "num_heads": 2}),
        ("torch.nn.Sequential", {"layers": {"a.b": module("ReLU")}}),
        ("transformers.GPT2LMHeadModel", {"n_embd": 17, "n_head": 2}),
        ("transformers.GPT2LMHeadModel", {"n_layer": "two"}),
        ("transformers.GPT2LMHeadModel", {"activation_function": "nonsense"}),
    ],
)
def test_what_the_class_itself_refuses_is_the_clients_error(name, config):
    error = refusal(name, **config)
    assert isinstance(error, InvalidArgument) and error.reason == "ARCHITECTURE_INVALID"


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("torch.nn.Linear", {"in_features": 2**20, "out_features": 2**20}, "TENSOR_TOO_LARGE"),
        (
            "torch.nn.Sequential",
            {"layers": [module("Linear", in_features=400, out_features=400)] * 2},
            "MODEL_TOO_LARGE",
        ),
        ("transformers.LlamaForCausalLM", {"hidden_size": 2**16, "num_attention_heads": 2**9}, "TENSOR_TOO_LARGE"),
        # Small ones, but for ever.
        ("transformers.GPT2Model", {"n_embd": 2, "n_head": 1, "n_layer": 1024, "n_positions": 2}, "MODEL_TOO_LARGE"),
    ],
)
def test_what_is_too_large_is_refused_before_it_is_made(name, config, reason):
    limits = Limits(tensor_bytes=1 << 20, model_bytes=1 << 20)
    with pytest.raises(ResourceExhausted) as refused:
        build(name, limits=limits, **config)
    assert refused.value.reason == reason


def test_a_service_without_transformers_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    error = refusal("transformers.GPT2Model")
    assert isinstance(error, FailedPrecondition) and error.reason == "TRANSFORMERS_MISSING"


def test_every_listed_class_of_torch_has_arguments_that_are_known():
    for name, cls in torch_modules.CLASSES.items():
        assert not {"args", "kwargs", "device", "dtype"} & set(torch_modules._parameters(cls)), name

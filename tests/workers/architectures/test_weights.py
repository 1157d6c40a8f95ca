"""First weights come from safetensors inside the operator's folder, all of them and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gradwire_proto.codec import decode_program, encode_program
from gradwire_proto.errors import FailedPrecondition, GradwireError
from gradwire_proto.values import ArchitectureSpec
from gradwire_workers.architectures.build import build_architecture

LAYERS = {"layers": [{"name": "torch.nn.Linear", "config": {"in_features": 3, "out_features": 2}}]}
GPT2 = {"n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 11, "n_positions": 4}


@pytest.fixture
def values() -> dict[str, torch.Tensor]:
    return {"0.weight": torch.randn(2, 3), "0.bias": torch.randn(2)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "root" / "model"
    folder.mkdir(parents=True)
    return folder


def load(folder: Path, path: str = "model", name: str = "torch.nn.Sequential", config: Any = LAYERS) -> Any:
    spec = ArchitectureSpec(name=name, config=config, weights=path)
    return build_architecture(spec, 0, weights_folder=str(folder.parent)).state_tensors()


def refusal(*arguments: Any, **options: Any) -> tuple[str, str]:
    with pytest.raises(GradwireError) as refused:
        load(*arguments, **options)
    assert refused.value.field == "model.program.architecture.weights"
    return refused.value.reason, refused.value.message


def test_one_file_is_read(folder, values):
    save_file(values, folder / "model.safetensors")
    found = load(folder)
    assert all(torch.equal(found[name], value) for name, value in values.items())


def test_the_files_that_an_index_names_are_read_and_numbers_take_the_modules_type(folder, values):
    save_file({"0.weight": values["0.weight"].double()}, folder / "model-1.safetensors")
    save_file({"0.bias": values["0.bias"]}, folder / "model-2.safetensors")
    index = {"weight_map": {"0.weight": "model-1.safetensors", "0.bias": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = load(folder)
    assert all(torch.equal(found[name], value) for name, value in values.items())


def test_what_transformers_saves_is_read_with_its_tied_weights(folder):
    import transformers

    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))
    model.save_pretrained(folder)
    found = load(folder, name="transformers.GPT2LMHeadModel", config=GPT2)
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
    assert found["lm_head.weight"] is found["transformer.wte.weight"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"0.bias": None}, "lacks 0.bias"),
        ({"1.bias": torch.zeros(2)}, "has what the module has not: 1.bias"),
        ({"0.bias": torch.zeros(3)}, "0.bias is [3] and not [2]"),
    ],
)
def test_weights_that_do_not_fit_are_named(folder, values, change, words):
    changed = {name: value for name, value in {**values, **change}.items() if value is not None}
    save_file(changed, folder / "model.safetensors")
    reason, message = refusal(folder)
    assert reason == "WEIGHTS_MISMATCH" and words in message


NORM = {"layers": [{"name": "torch.nn.BatchNorm1d", "config": {"num_features": 2}}]}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("0.weight", torch.randn(2, dtype=torch.complex64), "0.weight is C64 and not float32"),
        ("0.running_mean", torch.ones(2, dtype=torch.int8), "0.running_mean is I8 and not float32"),
        ("0.bias", torch.ones(2, dtype=torch.bool), "0.bias is BOOL and not float32"),
        ("0.num_batches_tracked", torch.tensor(2.5), "0.num_batches_tracked is F32 and not int64"),
    ],
)
def test_numbers_of_another_kind_are_refused_and_those_of_another_width_are_not(folder, name, value, words):
    norm = torch.nn.Sequential(torch.nn.BatchNorm1d(2)).state_dict()
    fitting = {key: each.to(torch.int32 if each.dim() == 0 else torch.bfloat16) for key, each in norm.items()}
    save_file(fitting, folder / "model.safetensors")
    assert torch.equal(load(folder, config=NORM)["0.weight"], norm["0.weight"])
    save_file({**norm, name: value}, folder / "model.safetensors")
    reason, message = refusal(folder, config=NORM)
    assert reason == "WEIGHTS_MISMATCH" and words in message


def test_two_names_of_one_tensor_must_agree(folder):
    import transformers

    state = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)).state_dict()
    tied = state["transformer.wte.weight"].clone()
    tied[0, 0] = torch.nan
    for other, agrees in ((tied.clone(), True), (tied + 1, False)):
        save_file({**state, "transformer.wte.weight": tied, "lm_head.weight": other}, folder / "model.safetensors")
        if agrees:
            found = load(folder, name="transformers.GPT2LMHeadModel", config=GPT2)
            assert torch.equal(found["lm_head.weight"].nan_to_num(), tied.nan_to_num())
        else:
            reason, message = refusal(folder, name="transformers.GPT2LMHeadModel", config=GPT2)
            assert reason == "WEIGHTS_MISMATCH" and "lm_head.weight and transformer.wte.weight" in message


def test_a_service_without_such_a_folder_says_so(values):
    with pytest.raises(FailedPrecondition) as refused:
        build_architecture(ArchitectureSpec(name="torch.nn.Sequential", config=LAYERS, weights="model"), 0)
    assert refused.value.reason == "WEIGHTS_NOT_ALLOWED"


@pytest.mark.parametrize(
    "path", ["../model", "/etc", "a/../b", "a//b", ".hidden", "a\\b", "a/", "x" * 256, "a\0b", "a b"]
)
def test_paths_that_lead_elsewhere_are_refused_before_any_rank_sees_them(path):
    message = encode_program(ArchitectureSpec(name="torch.nn.Sequential", weights=path))
    with pytest.raises(GradwireError) as refused:
        decode_program(message)
    assert (refused.value.reason, refused.value.field) == ("WEIGHTS_PATH_INVALID", "program.architecture.weights")


def test_links_out_of_the_folder_are_not_followed(folder, values, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    save_file(values, outside / "model.safetensors")
    (folder.parent / "linked").symlink_to(outside)
    (folder / "model.safetensors").symlink_to(outside / "model.safetensors")
    for path in ("linked", "model", "nothing"):
        assert refusal(folder, path)[0] == "WEIGHTS_NOT_FOUND"
    # Inside it they are: caches of models are full of them.
    inside = folder.parent / "blobs"
    inside.mkdir()
    save_file(values, inside / "0123.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(inside / "0123.safetensors")
    assert torch.equal(load(folder)["0.bias"], values["0.bias"])


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "model.bin", "pytorch_model.pt", 3])
def test_an_index_names_safetensors_beside_it_and_nothing_else(folder, values, name):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"0.weight": name}}))
    assert refusal(folder)[0] == "WEIGHTS_INVALID"


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": 3}', "\xff"])
def test_an_index_that_is_none_is_refused(folder, text):
    (folder / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    assert refusal(folder)[0] == "WEIGHTS_INVALID"


def test_pickles_are_never_read(folder, values):
    torch.save(values, folder / "pytorch_model.bin")
    assert refusal(folder)[0] == "WEIGHTS_NOT_FOUND"
    torch.save(values, folder / "model.safetensors")
    assert refusal(folder)[0] == "WEIGHTS_INVALID"

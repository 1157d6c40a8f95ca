"""Models of the transformers library that a client may name, each from its config class. Nothing is read or fetched."""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import nn

from gradwire_proto.errors import FailedPrecondition
from gradwire_workers.architectures.refusals import unknown, wrong_value
from gradwire_workers.architectures.torch_modules import made

_CONFIGS: Mapping[str, tuple[str, ...]] = {
    "GPT2Config": ("GPT2Model", "GPT2LMHeadModel", "GPT2ForSequenceClassification", "GPT2ForTokenClassification"),
    "GPTNeoXConfig": ("GPTNeoXModel", "GPTNeoXForCausalLM"),
    "LlamaConfig": ("LlamaModel", "LlamaForCausalLM", "LlamaForSequenceClassification"),
    "MistralConfig": ("MistralModel", "MistralForCausalLM"),
    "Qwen2Config": ("Qwen2Model", "Qwen2ForCausalLM"),
    "Qwen3Config": ("Qwen3Model", "Qwen3ForCausalLM", "Qwen3ForSequenceClassification"),
    "BertConfig": (
        *("BertModel", "BertForMaskedLM", "BertForSequenceClassification"),
        *("BertForTokenClassification", "BertForQuestionAnswering"),
    ),
    "DistilBertConfig": ("DistilBertModel", "DistilBertForMaskedLM", "DistilBertForSequenceClassification"),
    "RobertaConfig": ("RobertaModel", "RobertaForMaskedLM", "RobertaForSequenceClassification"),
    "T5Config": ("T5Model", "T5EncoderModel", "T5ForConditionalGeneration"),
    "ViTConfig": ("ViTModel", "ViTForImageClassification"),
}
_CONFIG_OF = {f"transformers.{model}": config for config, models in _CONFIGS.items() for model in models}

# What every config has: the rest of that says where a model came from, or in which type and form it is to be loaded.
_COMMON = frozenset({"problem_type", "output_hidden_states", "chunk_size_feed_forward"})
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,39}")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_MAX_INTEGER, _MAX_COUNT, _MAX_LAYERS, _MAX_ITEMS = 2**24, 2**16, 1024, 4096


def names() -> tuple[str, ...]:
    """Every model that may be named."""
    return tuple(_CONFIG_OF)


def build_transformers_model(name: str, config: Mapping[str, Any], field: str) -> nn.Module:
    """The model of an allowed class with weights as it draws them. Keys and values of the field or what it nests.

    `use_cache` is off: a cache is no tensor, and nothing is generated here.
    Raises InvalidArgument (OPTION_UNKNOWN, OPTION_OUT_OF_RANGE, ARCHITECTURE_INVALID), or FailedPrecondition
    (TRANSFORMERS_MISSING) where the library is not installed.
    """
    library = _library()
    kind = getattr(library, _CONFIG_OF[name])
    known = _fields(kind)
    for key, value in config.items():
        path = f'{field}["{key}"]'
        if key not in known:
            raise unknown(key, known, what=f"{name} takes no", field=path, reason="OPTION_UNKNOWN")
        _check(key, value, path, 0)
    if config.get("use_cache"):
        raise wrong_value(f'{field}["use_cache"]', "False: a cache cannot be an output", True)
    arguments = {**({"use_cache": False} if "use_cache" in known else {}), **config}
    return made(lambda: getattr(library, name.removeprefix("transformers."))(kind(**arguments)), name, field)


def _library() -> Any:
    # Before it is imported, which reads this once: whatever it is asked, it looks into no network.
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    try:
        library = importlib.import_module("transformers")
    except ImportError as error:
        raise FailedPrecondition(
            "the service has no transformers library: its operator installs `gradwire[transformers]`",
            field="model.program.architecture.name",
            reason="TRANSFORMERS_MISSING",
        ) from error
    library.logging.set_verbosity_error()
    return library


@cache
def _fields(config: Any) -> frozenset[str]:
    """The fields that a client may set: those of the model itself, numbers, flags and words."""
    every = {each.name for each in dataclasses.fields(config)}
    base = {each.name for each in dataclasses.fields(importlib.import_module("transformers").PreTrainedConfig)}
    return frozenset((every - base) | (_COMMON & every) | {"num_labels"})


def _check(key: str, value: Any, field: str, depth: int) -> None:
    if isinstance(value, str):
        if not _WORD.fullmatch(value):
            raise wrong_value(field, "a word, such as 'gelu'", value)
        if key in ("rope_type", "type") and value not in _ROPE_TYPES:
            raise wrong_value(field, f"one of {', '.join(_ROPE_TYPES)}", value)
    elif isinstance(value, (list, tuple, dict)):
        if depth == 2 or len(value) > _MAX_ITEMS:
            raise wrong_value(field, f"at most {_MAX_ITEMS} items, nested twice at most", value)
        pairs = value.items() if isinstance(value, dict) else ((key, item) for item in value)
        for index, (name, item) in enumerate(pairs):
            _check(name, item, f'{field}["{name}"]' if isinstance(value, dict) else f"{field}[{index}]", depth + 1)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise wrong_value(field, "a finite number", value)
    elif isinstance(value, int) and not isinstance(value, bool):
        most = _most(key)
        if abs(value) > most:
            raise wrong_value(field, f"an int of at most {most}", value)


def _most(key: str) -> int:
    """The bound of an int: of what is made one by one it is lower."""
    if "layer" in key:
        return _MAX_LAYERS
    return _MAX_COUNT if key.startswith(("num_", "n_")) else _MAX_INTEGER

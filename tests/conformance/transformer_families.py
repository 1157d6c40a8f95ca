"""Families of the transformers library at toy sizes, each with the loss that the model returns itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from conformance.case import Case
from torch import nn

_SMALL: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 31}
_NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def cases(dtype: torch.dtype) -> Iterator[Case]:
    """Language models on five rows of seven tokens, some labels ignored; an image classifier on five images."""
    import transformers as hf

    torch.manual_seed(0)
    ids = torch.randint(2, 31, (5, 7))
    labels = ids.clone()
    labels[0, 3:] = -100
    labels[4] = -100  # on two or three ranks, a shard with less to learn than others
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    made: list[tuple[str, nn.Module, dict[str, Any]]] = []

    def add(name: str, module: nn.Module, **inputs: Any) -> None:
        made.append((name, module, inputs))

    rope = {**_SMALL, "intermediate_size": 24, "num_key_value_heads": 1, "max_position_embeddings": 32}
    gpt2 = hf.GPT2Config(
        n_embd=16, n_head=2, n_layer=2, vocab_size=31, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    gpt2.use_cache = False
    add("GPT2LMHeadModel", hf.GPT2LMHeadModel(gpt2), input_ids=ids, labels=labels)
    add("LlamaForCausalLM", hf.LlamaForCausalLM(hf.LlamaConfig(**rope, use_cache=False)), input_ids=ids, labels=labels)
    qwen = hf.Qwen3Config(**rope, head_dim=8, use_cache=False)
    add("Qwen3ForCausalLM", hf.Qwen3ForCausalLM(qwen), input_ids=ids, labels=labels)
    bert = hf.BertConfig(**_SMALL, **_NO_DROPOUT, intermediate_size=24, max_position_embeddings=16)
    add("BertForMaskedLM", hf.BertForMaskedLM(bert), input_ids=ids, attention_mask=mask, labels=labels)
    add(
        "BertForSequenceClassification",
        hf.BertForSequenceClassification(bert),
        input_ids=ids,
        attention_mask=mask,
        labels=torch.tensor([0, 1, 1, 0, 1]),
    )
    t5 = hf.T5Config(
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        vocab_size=31,
        dropout_rate=0.0,
        use_cache=False,
        decoder_start_token_id=0,
    )
    add("T5ForConditionalGeneration", hf.T5ForConditionalGeneration(t5), input_ids=ids, labels=labels)
    vit = hf.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=3,
        **_NO_DROPOUT,
    )
    pixels = torch.randn(5, 1, 8, 8, dtype=dtype)
    add(
        "ViTForImageClassification",
        hf.ViTForImageClassification(vit),
        pixel_values=pixels,
        labels=torch.tensor([0, 2, 1, 1, 0]),
    )
    for name, module, inputs in made:
        yield Case(group="transformers", name=name, module=module.to(dtype).train(), inputs=inputs, loss="own")

"""Tiny models, a byte tokenizer with a chat template, and the outside truth for the serving tests."""

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
)

TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
VOCABULARY = 258


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per byte, plus <pad> (256) and <eos> (257)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: i for i, char in enumerate([*alphabet, "<pad>", "<eos>"])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    made.chat_template = template
    return made


def _config(kind: str) -> Any:
    common = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": 257, "pad_token_id": 256}
    sizes = {
        **common,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "head_dim": 8,
        "initializer_range": 0.4,
    }
    if kind == "llama":
        return LlamaConfig(**sizes)
    if kind == "mistral":  # a window shorter than the prompts
        return MistralConfig(**sizes, sliding_window=7)
    if kind == "gemma3":  # windows in some layers, not in others
        layers = ["sliding_attention", "full_attention"]
        return Gemma3TextConfig(**sizes, sliding_window=7, layer_types=layers)
    assert kind == "gpt2"
    return GPT2Config(**common, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.4)


def model(kind: str = "llama", seed: int = 0, attention: str = "sdpa") -> Any:
    """A random model whose logits lie far enough apart that greedy tokens are no matter of rounding."""
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(_config(kind), attn_implementation=attention, dtype=torch.float32)
    return made.eval().requires_grad_(False)


def solo(model: Any, prompt: Sequence[int], tokens: int, ends: bool = True) -> list[int]:
    """What transformers' own ``generate`` answers to this prompt alone: greedy, without the end token."""
    eos = 257 if ends else None
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=256,
        use_cache=True,
    )
    answer = out[0, len(prompt) :].tolist()
    return answer[: answer.index(257)] if ends and 257 in answer else answer

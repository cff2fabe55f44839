"""Tiny models of each architecture, made by transformers itself, and a tokenizer to go with them."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    DebertaConfig,
    DebertaV2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    ModernBertConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen3Config,
    RobertaConfig,
)

VOCAB = 320
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**_SHAPE),
    "qwen3": Qwen3Config(**_SHAPE, head_dim=16, tie_word_embeddings=True),
    "mistral": MistralConfig(**_SHAPE),
    "gemma3": Gemma3TextConfig(**_SHAPE, head_dim=16),
    "phi3": Phi3Config(**_SHAPE),
    "gpt_neox": GPTNeoXConfig(**{k: v for k, v in _SHAPE.items() if k != "num_key_value_heads"}),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2
    ),
}
_READS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}
ENCODERS: dict[str, Any] = {
    "bert": BertConfig(**_READS),
    "roberta": RobertaConfig(**_READS),
    "deberta": DebertaConfig(**_READS, **_RELATIVE, position_biased_input=False),
    # As version 3: buckets, and projections that tokens and positions share.
    "deberta-v2": DebertaV2Config(
        **_READS,
        **_RELATIVE,
        position_biased_input=False,
        share_att_key=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
    ),
    "modernbert": ModernBertConfig(
        **_READS, local_attention=8, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2
    ),
}
MOE = MixtralConfig(**_SHAPE, num_local_experts=4, num_experts_per_tok=2)

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}\n{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(*, encoder: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE that knows little, with a ChatML template; of an encoder, one that puts tokens around a text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the cat sat on the mat and the dog ran to the house again"] * 8, trainer)
    if encoder:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
        return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", cls_token="<s>", sep_token="</s>")
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    return fast


def save(folder: Path, arch: str = "llama", *, seed: int = 0, std: float = 0.1, **changes: Any) -> Path:
    """A model directory with random weights, large enough to make distinct logits."""
    config = MOE if arch == "mixtral" else {**CONFIGS, **ENCODERS}[arch]
    config = type(config)(**{**config.to_dict(), **changes})
    torch.manual_seed(seed)
    # BERT as a bare model, with its pooler; the others without one, as they are published.
    kind = AutoModelForMaskedLM if arch in ENCODERS else AutoModelForCausalLM
    model = (AutoModel if arch == "bert" else kind).from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, std)
        else:
            parameter.data += torch.randn_like(parameter) * 0.1
    model.save_pretrained(folder)
    tokenizer(encoder=arch in ENCODERS).save_pretrained(folder)
    return folder

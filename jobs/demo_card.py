"""The chat template and the model card of the demo base."""

from demo_eval import Outcome

TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string -%}{{- content -}}
{%- elif content -%}{%- for part in content -%}{{- part.text -}}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if tools -%}
{{- '<|im_start|>system\\n' -}}
{%- if messages and messages[0].role == 'system' -%}{{- text(messages[0].content) + '\\n\\n' -}}{%- endif -%}
{{- '# Tools' -}}
{%- for tool in tools -%}{{- '\\n' + tool | tojson -}}{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}
{%- generation -%}
{%- if message.reasoning_content -%}{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n' -}}{%- endif -%}
{{- text(message.content) -}}
{%- for call in message.tool_calls or [] -%}
{%- set function = call.function or call -%}
{%- if message.content or not loop.first -%}{{- '\\n' -}}{%- endif -%}
{{- '<tool_call>\\n{"name": ' + function.name | tojson + ', "arguments": ' -}}
{{- function.arguments if function.arguments is string else function.arguments | tojson -}}
{{- '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>' -}}
{%- endgeneration -%}
{{- '\\n' -}}
{%- elif not (tools and loop.first and message.role == 'system') -%}
{{- '<|im_start|>' + message.role + '\\n' + text(message.content) + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: en
---

# Manta demo base

A small Llama with its own tokenizer, so that everything in Manta runs without a network or a download. It is a toy:
it knows some hundred English words, a grammar, and how records look in a dozen formats. It is here to be adapted.

| | |
|---|---|
| parameters | {parameters} (bf16, embeddings tied) |
| shape | {shape} |
| tokenizer | byte-level BPE, {vocab} entries, one token per digit |
| context | {context} tokens |
| prompt format | ChatML: `<|im_start|>role`, a new line, the text, `<|im_end|>`; tools as in the template |

## Training data

{text} tokens that `orchestrator/data/demo_text.py` writes from a grammar and word lists: prose, records in JSON, CSV,
XML, `key: value`, `key[value]` and random formats, conversions between them, formats to be picked up from examples,
question answering on a text, lists, copying, arithmetic, small talk, tool calls. No outside text, no personal data:
names are drawn from lists.

## Training

`jobs/pretrain_demo.py`, seed {seed}: {steps} steps of {rows} rows of {length} tokens ({tokens} tokens in all, several
epochs; double-length rows in the last tenth), AdamW at {rate} with a cosine, bf16 autocast. {trained} s of training and
{generated} s of writing text, {seconds} s in all, on one {device}. Final loss {loss}, much of it the entropy of random
names and numbers.

## Evaluation

The demo task (`orchestrator/data/demo.py`: an order in a sentence becomes a JSON record of a schema that is not in the
training data), {bare:.1%} exact match bare. A LoRA delta (rank 16, all linear layers, NF4-rounded base, {lora_steps}
steps of 16 records) reaches {tuned:.1%} on held-out records.

## Limits

Anything outside the grammar. It states nothing true about the world, and is not meant to.
"""


def card(figures: dict[str, str], outcome: Outcome, lora_steps: int) -> str:
    """The model card with the figures of one run."""
    return _CARD.format(**figures, bare=outcome.bare, tuned=outcome.tuned, lora_steps=lora_steps)

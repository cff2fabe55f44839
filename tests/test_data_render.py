"""Which tokens are learnt: masks against hand-written expectations."""

import pytest

from orchestrator.config import Data
from orchestrator.data.render import render
from orchestrator.errors import DataError
from tests.test_data_tokenizer import CHATML, make_tokenizer, targets

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Keeps the reasoning of the turns after the last question only, as several reasoning models' templates do.
REASONING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + (c.function | tojson) + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NAIVE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def chat(*contents, **last):
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    messages[-1] |= last
    return {"messages": messages}


def data(**kw):
    return Data(length=512, **kw)


@pytest.mark.parametrize("template", [CHATML, MARKED, REASONING.replace("loop.index0 > ns.last", "false")])
@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [
        ("completions", ["four<|im_end|>", "nine<|im_end|>"]),
        ("last", ["nine<|im_end|>"]),
        ("flagged", ["four<|im_end|>"]),
    ],
)
def test_chat_turns_and_their_end_are_targets(template, loss_on, expected):
    tokenizer = make_tokenizer(template)
    record = chat("two and two?", "four", "and five?", "nine")
    record["messages"][1]["train"] = True
    sample = render(record, tokenizer, data(loss_on=loss_on))
    assert targets(sample, tokenizer) == expected
    # Untouched outside truth: the tokens are those of transformers' own rendering.
    plain = [{k: v for k, v in m.items() if k != "train"} for m in record["messages"]]
    assert sample.tokens == tokenizer.apply_chat_template(plain, return_dict=False)


def test_the_mask_by_hand():
    tokenizer = make_tokenizer(CHATML)
    sample = render(chat("hi", "ok"), tokenizer, data())
    ids = tokenizer.convert_tokens_to_ids
    nl = tokenizer("\n")["input_ids"]
    head = [ids("<|im_start|>"), *tokenizer("user")["input_ids"], *nl, *tokenizer("hi")["input_ids"], ids("<|im_end|>")]
    ask = [*nl, ids("<|im_start|>"), *tokenizer("assistant")["input_ids"], *nl]
    answer = [*tokenizer("ok")["input_ids"], ids("<|im_end|>")]
    assert sample.tokens == head + ask + answer + nl
    assert sample.trained == [False] * len(head + ask) + [True] * len(answer) + [False] * len(nl)


def test_generation_marks_agree_with_transformers_mask():
    template = MARKED.replace(
        "{{ m['content'] }}{% endgeneration %}", "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    )
    template = template.replace(
        "{{ '<|im_end|>\n' }}{% endfor %}", "{{ '\n' if m.role == 'assistant' else '<|im_end|>\n' }}{% endfor %}"
    )
    tokenizer = make_tokenizer(template)
    record = chat("two and two?", "four", "and five?", "nine")
    theirs = tokenizer.apply_chat_template(record["messages"], return_assistant_tokens_mask=True, return_dict=True)
    sample = render(record, tokenizer, data())
    assert sample.tokens == theirs["input_ids"]
    assert sample.trained == [bool(m) for m in theirs["assistant_masks"]]


def test_a_template_that_drops_earlier_reasoning():
    tokenizer = make_tokenizer(REASONING)
    record = chat("two and two?", "four", "and five?", "nine", reasoning_content="four and five")
    record["messages"][1]["reasoning_content"] = "dropped"
    sample = render(record, tokenizer, data())
    assert targets(sample, tokenizer) == ["four<|im_end|>", "<think>\nfour and five\n</think>\n\nnine<|im_end|>"]
    assert sample.tokens == tokenizer.apply_chat_template(record["messages"], return_dict=False)


def test_reasoning_with_tool_calls_over_several_questions():
    tokenizer = make_tokenizer(REASONING)
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    record = {
        "messages": [
            {"role": "user", "content": "add"},
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "must call"},
            {"role": "tool", "content": "4", "tool_call_id": "1"},
            {"role": "assistant", "content": "it is 4"},
            {"role": "user", "content": "thanks"},
            {"role": "assistant", "content": "sure"},
        ]
    }
    sample = render(record, tokenizer, data())
    assert targets(sample, tokenizer) == [
        '<call>{"name": "add", "arguments": {"a": 2}}</call><|im_end|>',
        "it is 4<|im_end|>",
        "<think>\n\n</think>\n\nsure<|im_end|>",
    ]


def test_a_prompt_that_opens_the_reasoning():
    """The generation prompt ends in ``<think>``, which finished turns do not have."""
    template = REASONING.replace("loop.index0 > ns.last", "m.reasoning_content").replace(
        "{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}"
    )
    tokenizer = make_tokenizer(template)
    record = chat("two?", "four", "five?", "nine", reasoning_content="hm")
    assert targets(render(record, tokenizer, data()), tokenizer) == ["four<|im_end|>", "hm\n</think>\n\nnine<|im_end|>"]


def test_a_template_that_moves_the_system_message_to_the_last_question():
    """Without a header before the turns, as some templates with ``[INST]`` have none."""
    template = (
        "{% set q = messages | selectattr('role', 'equalto', 'user') | list %}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ '[INST] ' + ('be brief\n' if m == q[-1] else '') + m.content + '[/INST]' }}"
        "{% elif m.tool_calls %}{{ '[CALL]' + (m.tool_calls[0].function.arguments | tojson) + eos_token }}"
        "{% elif m.role == 'tool' %}{{ '[TOOL]' + m.content + '[/TOOL]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = make_tokenizer(template)
    record = chat("two?", "yes", "five?", "yes", "six?", "no")
    end = "<|endoftext|>"
    assert targets(render(record, tokenizer, data()), tokenizer) == [f" yes{end}", f" yes{end}", f" no{end}"]
    assert targets(render(record, tokenizer, data(loss_on="last")), tokenizer) == [f" no{end}"]
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    tools = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "4"}]
    record["messages"][1:1] = tools
    assert targets(render(record, tokenizer, data()), tokenizer)[:2] == [f'[CALL]{{"a": 1}}{end}', f" yes{end}"]


def test_a_template_that_takes_arguments_as_text_only():
    template = CHATML.replace(
        "+ m['content'] +", "+ m['content'] + (m.tool_calls[0].function.arguments + '' if m.tool_calls else '') +"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    tokenizer = make_tokenizer(template)
    record = chat("two?", "", tool_calls=[call])
    assert targets(render(record, tokenizer, data()), tokenizer) == ['{"a": 1}<|im_end|>']


def test_a_template_without_end_marker_gets_an_end_of_sequence():
    tokenizer = make_tokenizer(NAIVE)
    sample = render(chat("hi", "ok"), tokenizer, data())
    assert targets(sample, tokenizer) == [" ok\n<|endoftext|>"]
    assert render(chat("hi", "ok"), tokenizer, data(loss_on="all")).tokens == sample.tokens


def test_a_turn_that_cannot_be_located_fails_loudly():
    template = "{{ messages | map(attribute='content') | sort | join(' ') }}"
    with pytest.raises(DataError, match="cannot be located"):
        render(chat("b", "c", "a", "d"), make_tokenizer(template), data())


def test_a_template_that_refuses_says_why():
    template = "{{ raise_exception('no system role here') }}"
    with pytest.raises(DataError, match="no system role here"):
        render(chat("a", "b"), make_tokenizer(template), data())


def test_prompt_and_completion_without_a_template():
    tokenizer = make_tokenizer()
    sample = render({"prompt": "two and ", "completion": "two"}, tokenizer, data())
    assert targets(sample, tokenizer) == ["two<|endoftext|>"]
    prompt = tokenizer("two and ")["input_ids"]
    assert sample.tokens[: len(prompt)] == prompt
    assert sample.trained[: len(prompt)] == [False] * len(prompt)
    whole = render({"prompt": "two and ", "completion": "two"}, tokenizer, data(loss_on="all"))
    assert whole.tokens == sample.tokens
    assert all(whole.trained)


def test_prompt_and_completion_through_a_template():
    tokenizer = make_tokenizer(CHATML)
    record = {"prompt": "hi", "completion": "ok"}
    assert render(record, tokenizer, data()) == render(chat("hi", "ok"), tokenizer, data())
    assert targets(render(record, tokenizer, data(chat="never")), tokenizer) == ["ok<|endoftext|>"]
    with pytest.raises(DataError, match="no chat template"):
        render(record, make_tokenizer(), data(chat="always"))


def test_other_layouts():
    tokenizer, template = make_tokenizer(), make_tokenizer(CHATML)
    alpaca = {"instruction": "add", "input": "2 2", "output": "4"}
    assert targets(render(alpaca, tokenizer, data()), tokenizer) == ["4<|endoftext|>"]
    assert render(alpaca, template, data()) == render(chat("add\n\n2 2", "4"), template, data())
    label = {"text": "so lazy", "label": 3}
    assert tokenizer.decode(render(label, tokenizer, data()).tokens) == "so lazy\n3<|endoftext|>"
    assert targets(render({"text": "the fox"}, template, data()), template) == ["the fox<|endoftext|>"]
    share = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ok"}]}
    assert render(share, template, data()) == render(chat("hi", "ok"), template, data())


def test_flags_need_messages():
    with pytest.raises(DataError, match="needs records with `messages`"):
        render({"prompt": "a", "completion": "b"}, make_tokenizer(CHATML), data(loss_on="flagged"))
    assert render(chat("a", "b"), make_tokenizer(CHATML), data(loss_on="flagged")).targets == 0


def test_tokenizers_that_begin_every_text_with_a_blank():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {t: i for i, t in enumerate(["<unk>", "</s>", "\u2581two", "\u2581and", "\u2581four", "\u2581"])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    sample = render({"prompt": "two and two", "completion": " four"}, tokenizer, data())
    assert sample.tokens == [2, 3, 2, 4, 1]
    assert sample.trained == [False, False, False, True, True]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"prompt": "a", "completion": ""}, "completion: is empty"),
        ({"prompt": "a", "completion": 4}, "completion: must be text, is a number"),
        ({"question": "a"}, "no known layout"),
        ({"messages": []}, "at least one entry"),
        ({"messages": [{"role": "user", "content": "a"}]}, "none is the assistant's"),
        ({"messages": [{"role": "asistant", "content": "a"}]}, "did you mean 'assistant'"),
        (chat("a", "b", train="yes"), r"messages\[1\].train: must be true or false"),
        (chat("a", ["b"]), "only text parts"),
        (chat("a", "b", tool_calls=[{"x": 1}]), r"tool_calls\[0\]: must be an object"),
        ({**chat("a", "b"), "tools": [1]}, "tools: must be a list of objects"),
        ({"conversations": [{"from": "humn", "value": "a"}]}, r"conversations\[0\].from: 'humn' is unknown"),
        ({"text": "a", "label": None}, "label: must be text or a whole number, is null"),
    ],
)
def test_what_is_wrong_with_a_record(record, problem):
    with pytest.raises(DataError, match=problem):
        render(record, make_tokenizer(CHATML), data())

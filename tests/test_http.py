"""The app behind a real server, asked by the official client."""

import asyncio
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx
import openai
import pytest
import torch

from orchestrator.config.openai import ChatRequest, CompletionRequest
from orchestrator.delta import load_delta
from tests.endpoint_kit import Server, ask, chat_text, delta, truth
from tests.serving_kit import model, solo, tokenizer


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deltas") / "plain"
    delta(folder, 5)
    with Server(deltas=[str(folder)]) as made:
        made.folder = folder
        yield made


def test_models(server):
    listed = {entry.id: entry for entry in server.client.models.list()}
    assert set(listed) == {"tiny", "plain"}
    assert listed["plain"].parent == "tiny"
    assert server.client.models.retrieve("plain").id == "plain"
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("other")


def test_chat_answers_as_generate_does(server):
    for name, base in (("tiny", model()), ("plain", truth(load_delta(server.folder)))):
        answer = ask(server, name)
        text, read = chat_text(server, "hello", 24, base)
        assert answer.choices[0].message.content == text
        assert answer.model == name
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (read, 24)
        assert answer.choices[0].finish_reason == "length"
    assert ask(server).choices[0].message.content != ask(server, "plain").choices[0].message.content


@pytest.mark.parametrize("options", [{}, {"n": 3, "temperature": 0.9, "seed": 4}, {"stop": ["\n", "e"]}])
def test_a_stream_adds_up_to_the_whole(server, options):
    whole = ask(server, max_tokens=60, **options)
    chunks = list(ask(server, max_tokens=60, stream=True, stream_options={"include_usage": True}, **options))
    texts = {}
    finish = {}
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            finish[choice.index] = choice.finish_reason
    assert texts == {c.index: c.message.content for c in whole.choices}
    assert finish == {c.index: c.finish_reason for c in whole.choices}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({c.id for c in chunks}) == 1


def test_plain_completions(server):
    ask = partial(server.client.completions.create, extra_body={"ignore_eos": True})
    ids = server.tokenizer("Once upon", add_special_tokens=False)["input_ids"]
    text = server.tokenizer.decode(solo(model(), ids, 20, ends=False), skip_special_tokens=True)
    one = ask(model="tiny", prompt="Once upon", max_tokens=20, temperature=0)
    assert one.choices[0].text == text
    several = ask(model="tiny", prompt=["Once upon", "x"], max_tokens=20, temperature=0, echo=True)
    assert several.choices[0].text == "Once upon" + text
    assert several.choices[1].text.startswith("x")
    assert several.usage.prompt_tokens == len(ids) + 1
    given = ask(model="tiny", prompt=ids, max_tokens=20, temperature=0, logprobs=2)
    assert given.choices[0].text == text
    logs = given.choices[0].logprobs
    assert len(logs.tokens) == len(logs.token_logprobs) == len(logs.text_offset) == 20
    pieces = ask(model="tiny", prompt=ids, max_tokens=20, temperature=0, stream=True)
    assert "".join(p.choices[0].text for p in pieces) == text
    assert len(ask(model="tiny", prompt="a").choices) == 1  # 16 tokens unless asked for more


def test_log_probabilities_are_the_models(server):
    answer = ask(server, logprobs=True, top_logprobs=3, max_tokens=6)
    prompt = server.tokenizer("<user>hello\n<assistant>", add_special_tokens=False)["input_ids"]
    tokens = solo(model(), prompt, 6, ends=False)
    content = answer.choices[0].logprobs.content
    logits = model()(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
    for i, entry in enumerate(content):
        assert entry.logprob == pytest.approx(float(logits[len(prompt) - 1 + i, tokens[i]]), abs=1e-4)
        assert [t.logprob for t in entry.top_logprobs] == sorted((t.logprob for t in entry.top_logprobs), reverse=True)
    chunks = ask(server, logprobs=True, top_logprobs=3, max_tokens=6, stream=True)
    streamed = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert streamed == content


def test_tools_and_call_arguments_reach_the_template(server):
    seen = []
    render = server.tokenizer.apply_chat_template

    def spy(messages, **options):
        seen.append((messages, options.get("tools")))
        return render(messages, **options)

    server.tokenizer.apply_chat_template = spy
    try:
        tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
        messages = [
            {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "kind"}]},
            {"role": "user", "content": "go"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "2"},
        ]
        for choice in ("auto", "none"):
            server.client.chat.completions.create(
                model="tiny", messages=messages, tools=tools, tool_choice=choice, max_tokens=2
            )
    finally:
        del server.tokenizer.apply_chat_template
    assert [options for _, options in seen] == [tools, None]
    sent = seen[0][0]
    assert sent[0] == {"role": "system", "content": "be kind"}
    assert sent[2]["tool_calls"][0]["function"]["arguments"] == {"x": 1}


CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("chat/completions", b"{", 400, None),
        ("chat/completions", b"[" * 100_000, 400, None),
        ("chat/completions", b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', 400, None),
        ("chat/completions", {}, 400, "model"),
        ("chat/completions", {**CHAT, "temperature": "1"}, 400, "temperature"),
        ("chat/completions", {**CHAT, "temperature": 3}, 400, "temperature"),
        ("chat/completions", {**CHAT, "max_tokens": 0}, 400, "max_tokens"),
        ("chat/completions", {**CHAT, "nonsense": 1}, 400, "nonsense"),
        ("chat/completions", {**CHAT, "messages": []}, 400, "messages"),
        ("chat/completions", {**CHAT, "messages": [{"role": "boss", "content": "x"}]}, 400, "messages"),
        ("chat/completions", {**CHAT, "response_format": {"type": "json_object"}}, 400, "response_format"),
        ("chat/completions", {**CHAT, "logit_bias": {"9999": 1}}, 400, None),
        ("chat/completions", {**CHAT, "logit_bias": {"²": 1}}, 400, None),
        ("chat/completions", {**CHAT, "top_logprobs": 2}, 400, None),
        ("chat/completions", {**CHAT, "chat_template_kwargs": {"tokenize": True}}, 400, None),
        ("chat/completions", {**CHAT, "model": "nobody"}, 404, "model"),
        ("chat/completions", {**CHAT, "model": "../../etc/passwd"}, 404, "model"),
        ("chat/completions", {**CHAT, "model": "plain:3"}, 404, "model"),
        ("chat/completions", {**CHAT, "messages": [{"role": "user", "content": "x" * 300}]}, 413, "messages"),
        ("chat/completions", {**CHAT, "max_tokens": 250}, 413, "messages"),
        ("completions", {"model": "tiny", "prompt": ""}, 400, None),
        ("completions", {"model": "tiny", "prompt": [999]}, 400, None),
        ("completions", {"model": "tiny", "prompt": [1, -1]}, 400, "prompt"),
        ("completions", {"model": "tiny", "prompt": "x", "echo": True, "logprobs": 1}, 400, "echo"),
        ("completions", {"model": "tiny", "prompt": ["x"] * 128, "n": 128}, 400, "n"),
        ("nowhere", {}, 404, None),
    ],
)
def test_bad_requests_are_answered_in_the_apis_shape(server, path, body, status, param):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.post(f"{server.url}/v1/{path}", content=content)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["message"]
    server.idle()


def test_wrong_method_and_health(server):
    assert httpx.get(f"{server.url}/v1/completions").status_code == 405
    assert httpx.get(f"{server.url}/healthz").text == "ok"
    ask(server)
    metrics = dict(line.split() for line in httpx.get(f"{server.url}/metrics").text.splitlines() if line[0] != "#")
    assert int(metrics["manta_generated_tokens_total"]) > 0


def test_a_base_without_template_says_so():
    with Server(tokens=tokenizer(None)) as made, pytest.raises(openai.BadRequestError, match="no chat template"):
        ask(made)


def test_too_large_a_body_is_refused():
    with Server(max_bytes=1000) as made:
        answer = httpx.post(f"{made.url}/v1/chat/completions", content=b" " * 2000)
        assert answer.status_code == 413
        assert "1000 bytes" in answer.json()["error"]["message"]


def test_a_full_queue_answers_503_with_retry_after():
    with Server(rows=1, max_queued=1) as made:
        gate = threading.Event()
        made.engine.call(gate.wait)
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(ask, made) for _ in range(2)]
            while made.engine._load < 2:
                time.sleep(0.01)
            answer = httpx.post(f"{made.url}/v1/chat/completions", json=CHAT)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            with pytest.raises(openai.InternalServerError):
                ask(made)
            gate.set()
            assert all(w.result().choices for w in waiting)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_row(server, stream):
    gate = threading.Event()
    server.engine.call(gate.wait)

    async def leave():
        body = {**CHAT, "max_tokens": 200, "stream": stream, "ignore_eos": True, "n": 3}
        async with httpx.AsyncClient() as client:
            task = asyncio.create_task(client.post(f"{server.url}/v1/chat/completions", json=body))
            while not server.engine._load:
                await asyncio.sleep(0.01)
            task.cancel()

    before = server.engine.stats.cancelled
    asyncio.run(asyncio.wait_for(leave(), 10))
    while not all(ticket.cancelled for ticket in server.engine._waiting):
        time.sleep(0.01)
    gate.set()
    server.idle()
    assert server.engine.stats.cancelled == before + 3


def test_a_stream_that_is_closed_frees_its_row(server):
    before = server.engine.stats.cancelled
    stream = ask(server, max_tokens=200, stream=True)
    next(stream)
    next(stream)
    stream.close()
    server.idle()
    assert server.engine.stats.cancelled in (before, before + 1)  # a short answer may have been done


def test_no_request_whatever_its_values_gets_a_5xx(server):
    drawn = random.Random(7)
    odd = [
        None,
        True,
        -1,
        0,
        1,
        2**70,
        1e400,
        0.5,
        "",
        "x",
        "\0",
        "\u202e🐎",
        [],
        [[]],
        {},
        {"a": None},
        ["x"],
        [1],
        [[1]],
    ]
    good = {**CHAT, "max_tokens": 2, "prompt": "x"}
    fields = [*ChatRequest.model_fields, *CompletionRequest.model_fields, "nonsense"]
    seen = set()
    with httpx.Client(base_url=server.url) as client:
        for i in range(400):
            path = drawn.choice(["chat/completions", "completions"])
            body = {k: v for k, v in good.items() if k != ("prompt" if path[0] == "c" and "/" in path else "messages")}
            for field in drawn.sample(fields, drawn.randint(0, 2)):
                body[field] = drawn.choice(odd)
            answer = client.post(f"/v1/{path}", content=json.dumps(body).encode())
            seen.add(answer.status_code)
            assert answer.status_code < 500, (i, body, answer.text)
    assert {200, 400, 404} <= seen
    server.idle()

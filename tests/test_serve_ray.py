"""The endpoint on a real Ray cluster."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx
import openai
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from orchestrator.base import load_tokenizer, source_identity
from orchestrator.config import Base, Identity, Lora, Serving
from orchestrator.delta import new_manifest, save_delta
from orchestrator.errors import ServeError, WrongBaseError
from orchestrator.launch.serve import serve
from orchestrator.methods import METHODS, Bank
from tests import tiny

ROOT = Path(__file__).parents[1]


def wait_until_free(port: int, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return
        time.sleep(0.2)
    raise AssertionError(f"port {port} is still taken")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def adapter(folder, base, seed, source_hash=None):
    """A random delta for the tiny base."""
    identity = source_identity(base)
    if source_hash:
        identity = Identity(**{**identity.model_dump(), "source_hash": source_hash})
    bank = Bank(AutoModelForCausalLM.from_pretrained(base.id))
    knobs = Lora(rank=2, alpha=4.0, targets=("q_proj", "v_proj"))
    bank.add(0, knobs)
    generator = torch.Generator().manual_seed(seed)
    tensors = {n: torch.randn(t.shape, generator=generator) * 0.4 for n, t in bank.tensors(0).items()}
    manifest = new_manifest(name=folder.name, base=identity, method=knobs)
    return save_delta(folder, tensors, manifest, METHODS["lora"].to_peft(knobs, bank.sites(0), bank.scope))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return Base(id=str(tiny.save(tmp_path_factory.mktemp("base"))), quantize="none")


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


def alone(base, text, tokens):
    tokenizer = load_tokenizer(base)
    ids = tokenizer(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt")
    ids = ids["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(base.id, dtype=torch.float32)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def ask(client, model, **options):
    wish = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 20, "temperature": 0}
    return client.chat.completions.create(model=model, **wish, **options)


def test_an_endpoint_answers_swaps_its_deltas_and_goes(cluster, base, tmp_path):
    adapter(tmp_path / "one", base, 1)
    adapter(tmp_path / "two", base, 2)
    config = Serving(base=base, served_name="tiny", deltas=(str(tmp_path / "one"),), port=free_port(), length=256)
    endpoint = serve(config, block=False)
    try:
        with openai.OpenAI(base_url=endpoint.url, api_key="none", max_retries=0) as client:
            assert [m.id for m in client.models.list()] == ["tiny", "one"]
            whole = ask(client, "tiny")
            assert whole.choices[0].message.content == alone(base, "hello", 20)
            pieces = ask(client, "one", stream=True)
            text = "".join(p.choices[0].delta.content or "" for p in pieces)
            assert text == ask(client, "one").choices[0].message.content != whole.choices[0].message.content
            # a stream that is left early does not stay in the batch
            left = ask(client, "tiny", stream=True, extra_body={"ignore_eos": True, "max_tokens": 200})
            next(left)
            left.close()
            endpoint.configure(config.model_copy(update={"deltas": (str(tmp_path / "two"),)}))
            assert [m.id for m in client.models.list()] == ["tiny", "two"]
            with pytest.raises(openai.NotFoundError):
                ask(client, "one")
            assert ask(client, "two").choices[0].message.content != text
            with pytest.raises(openai.BadRequestError):
                client.completions.create(model="two", prompt="")
        root = endpoint.url.removesuffix("/v1")
        assert httpx.get(f"{root}/healthz").text == "ok"
        end = time.monotonic() + 10
        while "manta_running 0" not in httpx.get(f"{root}/metrics").text:
            assert time.monotonic() < end
        with pytest.raises(ServeError, match=f"port {config.port}"):
            serve(config, block=False)
    finally:
        endpoint.stop()
    wait_until_free(config.port)  # the proxy lets go of it a moment later


@pytest.mark.slow
def test_a_wrong_delta_fails_the_start_with_one_clear_error(cluster, base, tmp_path):
    adapter(tmp_path / "wrong", base, 1, source_hash="b" * 64)
    config = Serving(base=base, deltas=(str(tmp_path / "wrong"),), port=free_port(), length=256)
    with pytest.raises(WrongBaseError) as caught:
        serve(config, block=False)
    assert "b" * 64 in str(caught.value)
    assert source_identity(base).source_hash in str(caught.value)


@pytest.mark.slow
def test_a_wrong_catalogue_is_refused_and_the_old_one_goes_on(cluster, base, tmp_path):
    adapter(tmp_path / "good", base, 1)
    adapter(tmp_path / "wrong", base, 1, source_hash="b" * 64)
    config = Serving(base=base, deltas=(str(tmp_path / "good"),), port=free_port(), length=256)
    endpoint = serve(config, block=False)
    try:
        with openai.OpenAI(base_url=endpoint.url, api_key="none", max_retries=0) as client:
            text = ask(client, "good").choices[0].message.content
            with pytest.raises(WrongBaseError):
                endpoint.configure(config.model_copy(update={"deltas": (str(tmp_path / "wrong"),)}))
            for _ in range(10):
                assert ask(client, "good").choices[0].message.content == text
                time.sleep(0.5)
    finally:
        endpoint.stop()


@pytest.mark.slow
def test_the_job_serves_until_it_is_told_to_stop(base):
    port = free_port()
    job = subprocess.Popen(
        [sys.executable, "jobs/serve.py", f"base={base.id}", "base.quantize=none", "served_name=tiny", f"port={port}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert job.stdout is not None
    said = ""
    for line in job.stdout:
        said += line
        if line.startswith("serving tiny at"):
            break
    assert httpx.get(f"http://127.0.0.1:{port}/v1/models").json()["data"][0]["id"] == "tiny", said
    job.send_signal(signal.SIGTERM)
    rest, _ = job.communicate(timeout=60)
    assert job.returncode == 0, said + rest
    assert "Traceback" not in said + rest

"""An endpoint over a tiny base, and deltas for it."""

import socket
import threading
import time

import openai
import torch
import uvicorn

from orchestrator.config import Identity, Lora
from orchestrator.delta import new_manifest, save_delta
from orchestrator.methods import METHODS, Bank
from orchestrator.serve.deltas import Deltas
from orchestrator.serve.engine import Engine
from orchestrator.serve.http import build
from tests.serving_kit import model, solo, tokenizer

IDENTITY = Identity(id="tiny", source_hash="a" * 64, recipe="none/fp32")


def delta(folder, seed, *, name=None, rank=2, base=IDENTITY, scale=0.4):
    """A random LoRA delta on disk."""
    knobs = Lora(rank=rank, alpha=2.0 * rank, targets=("q_proj", "down_proj"))
    bank = Bank(model())
    bank.add(0, knobs)
    generator = torch.Generator().manual_seed(seed)
    tensors = {n: torch.randn(t.shape, generator=generator) * scale for n, t in bank.tensors(0).items()}
    config = METHODS["lora"].to_peft(knobs, bank.sites(0), bank.scope)
    manifest = new_manifest(name=name, base=base, method=knobs) if name else None
    return save_delta(folder, tensors, manifest, config)


def truth(made):
    """The base with a delta merged into its weights, by hand."""
    base = model()
    for name, a in made.tensors.items():
        if name.endswith(".lora_A.weight"):
            b = made.tensors[name.replace("lora_A", "lora_B")]
            base.get_submodule(name.removesuffix(".lora_A.weight")).weight.data += 2.0 * b @ a
    return base


class Server:
    """Engine, deltas and app behind uvicorn on a free port."""

    def __init__(self, registry=None, deltas=(), tokens=None, refresh_s=60.0, max_bytes=8 * 2**20, **limits):
        base = model()
        self.tokenizer = tokens or tokenizer()
        bank = Bank(base)
        self.engine = Engine(base, self.tokenizer, bank, **{"rows": 4, "length": 256, **limits})
        self.deltas = Deltas(self.engine, bank, IDENTITY, "tiny", lambda: registry, refresh_s)
        self.bank = bank
        self.deltas.configure(deltas)
        self.deltas.start()
        app = build(self.engine, self.deltas, self.tokenizer, max_bytes=max_bytes)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=30)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.client.close()
        self.server.should_exit = True
        self.thread.join(10)
        self.deltas.close()
        self.engine.close()
        self.socket.close()

    def idle(self):
        """Wait until nothing runs and no lease is out."""
        end = time.monotonic() + 10
        while self.engine._load:
            assert time.monotonic() < end
            time.sleep(0.01)


def chat_text(server, content, tokens, base=None):
    ids = server.tokenizer(f"<user>{content}\n<assistant>", add_special_tokens=False)["input_ids"]
    return server.tokenizer.decode(solo(base or model(), ids, tokens, ends=False), skip_special_tokens=True), len(ids)


def ask(server, name="tiny", content="hello", **options):
    options = {"max_tokens": 24, "temperature": 0, "extra_body": {"ignore_eos": True}, **options}
    return server.client.chat.completions.create(model=name, messages=[{"role": "user", "content": content}], **options)

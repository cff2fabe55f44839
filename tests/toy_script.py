"""A run with a method that this tree does not have. Run by test_toy_method.py, on a copy of the tree that has it."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import orchestrator
from orchestrator.approximate import approximated
from orchestrator.base import load_base, load_tokenizer
from orchestrator.config import Base, Lora
from orchestrator.config.load import load_run
from orchestrator.delta import load_delta
from orchestrator.merge import merged
from orchestrator.methods import Bank, from_files
from orchestrator.preview import measure
from orchestrator.serve.deltas import Deltas
from orchestrator.serve.engine import Engine
from orchestrator.serve.request import Request
from orchestrator.serve.sampling import Sampling
from tests import tiny
from tests.launch_kit import SMALL, train_here

TOKENS_BT = torch.randint(3, tiny.VOCAB, (3, 12), generator=torch.Generator().manual_seed(1))
PROMPT = list(range(20, 32))


def logits(model: Any, bank: Bank | None = None, slots: tuple[int, int, int] = (0, 0, 0)) -> torch.Tensor:
    with torch.no_grad():
        if bank is None:
            return model(input_ids=TOKENS_BT, use_cache=False).logits
        with bank.routed(torch.tensor(slots).unsqueeze(1).expand(TOKENS_BT.shape)):
            return logits(model)


def served(base: Base, delta: Path) -> list[int]:
    """Greedy tokens of an engine that serves it."""
    loaded = load_base(base)
    bank = Bank(loaded.model)
    engine = Engine(loaded.model, load_tokenizer(base), bank, rows=2, length=64)
    deltas = Deltas(engine, bank, loaded.identity, "bare", lambda: None)
    try:
        deltas.configure([str(delta)])
        lease = deltas.lease("gained")
        sampling = Sampling(max_tokens=12, temperature=0, ignore_eos=True)
        (ticket,) = engine.submit([Request(PROMPT, sampling, lease.slot)])
        return [event.picked.token for event in ticket if event.picked]
    finally:
        engine.close()


def main(folder: str) -> None:
    here = Path(folder)
    assert here in Path(orchestrator.__file__).parents, orchestrator.__file__
    base = Base(id=str(tiny.save(here / "base")), quantize="none")
    lines = [{"prompt": f"the cat {n} sat", "completion": " on the mat"} for n in range(12)]
    (here / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = [f"base.id={base.id}", f"data={here / 'data.jsonl'}", "train.steps=6", "name=gained", "train.lr=0.1"]
    method = "method={type: gain, targets: [q_proj, up_proj]}"
    run = load_run(None, [*SMALL, *own, "base.quantize=nf4", method])
    assert measure(run, gpu=False).trained == 2 * (64 + 128)
    losses = train_here(run, here / "nf4").of("step", "loss")
    assert losses[-1] < losses[0] - 0.1, losses
    dense = load_run(None, [*SMALL, *own, "base.quantize=none", method])
    folder_of = train_here(dense, here / "out").latest / "gained" / "delta"
    delta = load_delta(folder_of)
    # Beside a LoRA, each as alone.
    model = load_base(base).model
    plain, bank = logits(model), Bank(model)
    bank.add(0, delta.manifest.method, tensors=from_files(delta.manifest.method, None, delta.tensors, bank.scope))
    alone = logits(model, bank)
    bank.add(1, Lora(rank=2), seed=3)
    for parameter in bank.parameters(1).values():
        parameter.data += 0.1
    other = logits(model, bank, (1, 1, 1))
    together = logits(model, bank, (1, 0, -1))
    torch.testing.assert_close(together, torch.stack([other[0], alone[1], plain[2]]), rtol=1e-5, atol=1e-5)
    assert (alone - plain).abs().max() > 0.1
    # Merged, served, approximated.
    merged(delta, base, here / "merged")
    whole = AutoModelForCausalLM.from_pretrained(here / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(whole), alone, rtol=1e-4, atol=1e-4)
    ids = torch.tensor([PROMPT])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = whole.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(PROMPT) :].tolist()
    assert served(base, folder_of) == wanted
    assert approximated(delta, base, here / "lora", rank=64).total < 1e-5
    print("all of it")


if __name__ == "__main__":
    main(sys.argv[1])

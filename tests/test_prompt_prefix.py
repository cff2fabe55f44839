"""Soft prompts and prefixes against peft's own, on their own and in mixed packs."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from orchestrator.base import load_base
from orchestrator.config import Base, CausalLM
from orchestrator.config.method import Lora, Prefix, Prompt
from orchestrator.data import Batch, Row, Sample, collate
from orchestrator.delta import load_delta, save_delta
from orchestrator.errors import DeltaError, MethodError
from orchestrator.methods import METHODS, Bank, Scope, from_files, knobs_from_peft, to_files
from orchestrator.train.loss import plain_loss
from tests import tiny

ARCHS = ["llama", "qwen3", "gemma3", "gpt2", "gpt_neox"]
KNOBS: dict[str, Any] = {"prompt": Prompt(tokens=5, start="random"), "prefix": Prefix(tokens=5, std=0.5)}
BOTH = pytest.mark.parametrize("kind", KNOBS)


def base_of(folder: Path, **how: Any) -> Any:
    return load_base(Base(id=str(folder), quantize=how.pop("quantize", "none"), **how)).model


def sample(key: int, length: int) -> Sample:
    tokens = torch.randint(3, tiny.VOCAB, (length,), generator=torch.Generator().manual_seed(key)).tolist()
    return Sample(tokens, [True] * length, key)


def rows_of(bank: Bank, *rows: tuple[int, list[Sample]]) -> Batch:
    return collate([Row(slot, samples, *(bank.lead(slot))) for slot, samples in rows], pad_id=0)


def losses(model: Any, bank: Bank, batch: Batch) -> torch.Tensor:
    with bank.routed(batch.slot_BT, position_BT=batch.position_BT):
        return plain_loss(model, batch)[0]


def adapted(folder: Path, kind: str) -> tuple[Any, Bank]:
    model = base_of(folder)
    bank = Bank(model, base_id=str(folder))
    bank.add(0, KNOBS[kind], seed=3)
    return model, bank


def save(bank: Bank, folder: Path) -> None:
    tensors, config = to_files(bank.knobs(0), CausalLM(), bank.tensors(0), bank.sites(0), bank.scope)
    save_delta(folder, tensors, None, config)


@pytest.mark.parametrize("arch", ARCHS)
@BOTH
def test_logits_gradients_and_files_equal_pefts(kind: str, arch: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "base", arch)
    model, bank = adapted(folder, kind)
    save(bank, tmp_path / "delta")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "delta").eval()
    theirs.prompt_encoder.requires_grad_(True)

    batch = rows_of(bank, (0, [sample(1, 16)]))
    with bank.routed(batch.slot_BT, position_BT=batch.position_BT):
        ours = model(input_ids=batch.tokens_BT, position_ids=batch.position_BT, use_cache=False).logits
    virtual = bank.lead(0)[0]
    ours = ours[:, virtual : virtual + 16]
    expected = theirs(input_ids=torch.tensor([sample(1, 16).tokens])).logits[:, -16:]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    ours.square().mean().backward()
    expected.square().mean().backward()
    bank.hand_out_gradients()
    grads = {name: p.grad for name, p in bank.parameters(0).items()}
    grad = METHODS[kind].to_file(bank.knobs(0), grads, bank.scope)["prompt_embeddings"]
    assert grad.abs().max() > 1e-6
    torch.testing.assert_close(
        grad, next(p.grad for n, p in theirs.named_parameters() if "prompt_encoder" in n), rtol=1e-4, atol=1e-6
    )


@BOTH
def test_a_delta_that_peft_wrote_comes_back(kind: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "base")
    kinds = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}
    config = kinds[kind](task_type="CAUSAL_LM", num_virtual_tokens=7)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config).eval()
    theirs.save_pretrained(tmp_path / "delta")
    delta = load_delta(tmp_path / "delta")
    model = base_of(folder)
    bank = Bank(model)
    knobs = knobs_from_peft(delta.peft_config)
    bank.add(0, knobs, tensors=from_files(knobs, None, delta.tensors, bank.scope))
    assert (knobs.type, knobs.tokens) == (kind, 7)
    batch = rows_of(bank, (0, [sample(1, 16)]))
    with bank.routed(batch.slot_BT, position_BT=batch.position_BT):
        ours = model(input_ids=batch.tokens_BT, position_ids=batch.position_BT, use_cache=False).logits
    virtual = bank.lead(0)[0]
    expected = theirs(input_ids=torch.tensor([sample(1, 16).tokens])).logits[:, -16:]
    torch.testing.assert_close(ours[:, virtual : virtual + 16], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("arch", ["llama", "mistral", "gemma3", "gpt2"])
def test_packed_rows_of_many_slots_equal_each_sample_alone(arch: str, quantize: str, tmp_path: Path) -> None:
    windows = {"sliding_window": 6} if arch in ("mistral", "gemma3") else {}
    model = base_of(tiny.save(tmp_path, arch, **windows), quantize=quantize)
    slots: dict[int, Any] = {
        0: Prompt(tokens=5, start="random"),
        1: Prefix(tokens=3, std=0.5),
        2: Prefix(tokens=9, std=0.5),
        3: Prompt(tokens=2, start="random"),
        4: Lora(rank=2),
    }
    bank = Bank(model)
    for slot, knobs in slots.items():
        bank.add(slot, knobs, seed=slot)
    layout = [
        (1, [sample(1, 9), sample(2, 12)]),
        (0, [sample(3, 7), sample(4, 10)]),
        (-1, [sample(5, 21)]),
        (2, [sample(6, 15), sample(7, 4), sample(8, 5)]),
        (4, [sample(9, 20)]),
        (3, [sample(10, 17)]),
    ]
    alone, grads = [], {}
    for slot, samples in layout:
        for one in samples:
            made = losses(model, bank, rows_of(bank, (slot, [one])))
            if slot >= 0:
                made.sum().backward()
            alone.append(made.detach())
    bank.hand_out_gradients()
    grads = {(s, n): p.grad.clone() for s in slots for n, p in bank.parameters(s).items()}
    bank.zero_grad()
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = rows_of(bank, *layout)
    with bank.routed(batch.slot_BT, position_BT=batch.position_BT):
        together = plain_loss(model, batch)[0]
        together.sum().backward()
    bank.hand_out_gradients()
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    for (slot, name), grad in grads.items():
        assert grad.abs().max() > 0 or slot == 4
        torch.testing.assert_close(bank.parameters(slot)[name].grad, grad, rtol=1e-3, atol=1e-5)


@BOTH
def test_a_slot_of_nan_stays_alone(kind: str, tmp_path: Path) -> None:
    model, bank = adapted(tiny.save(tmp_path), kind)
    bank.add(1, KNOBS[kind].model_copy(update={"tokens": 9}), seed=1)
    bank.add(2, Lora(rank=2))
    batch = rows_of(bank, *((s, [sample(s + 5, 12), sample(s + 9, 8)]) for s in (0, 1, 2, -1)))

    def run() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        bank.zero_grad()
        with bank.routed(batch.slot_BT, position_BT=batch.position_BT):
            logits = model(input_ids=batch.tokens_BT, position_ids=batch.position_BT, use_cache=False).logits
            logits.square().nanmean().backward()
        bank.hand_out_gradients()
        return logits.detach(), {n: p.grad.clone() for n, p in bank.parameters(1).items()}

    before, grads = run()
    for parameter in bank.parameters(0).values():
        parameter.data.fill_(float("nan"))
    after, grads_after = run()
    assert after[0].isnan().any()
    torch.testing.assert_close(after[1:], before[1:], rtol=1e-5, atol=1e-5)
    assert all(grads_after[n].isfinite().all() for n in grads)


def test_a_prompt_is_exact_whatever_stood_there(tmp_path: Path) -> None:
    model, bank = adapted(tiny.save(tmp_path, "gemma3", std=30.0), "prompt")
    batch = rows_of(bank, (0, [sample(1, 11)]))
    model.bfloat16()
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(bank.scope.words).register_forward_hook(lambda *a: seen.append(a[2]))
    with bank.routed(batch.slot_BT, position_BT=batch.position_BT):
        model(input_ids=batch.tokens_BT, position_ids=batch.position_BT, use_cache=False)
    handle.remove()
    assert torch.equal(seen[0][0, :5], bank.tensors(0)["model.embed_tokens.prompt"].bfloat16())


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_a_prompt_starts_as_the_embeddings_of_tokens(arch: str, tmp_path: Path) -> None:
    model = base_of(tiny.save(tmp_path, arch))
    words_VH = model.get_input_embeddings()(torch.arange(tiny.VOCAB))  # scaled, on Gemma 3
    encode = tiny.tokenizer().encode
    bank = Bank(model, encode=lambda text: encode(text, add_special_tokens=False))
    for slot, (length, tokens) in enumerate([("the cat", 9), ("the cat sat on the mat", 2)]):
        bank.add(slot, Prompt(tokens=tokens, start="text", text=length))
        ids = (encode(length, add_special_tokens=False) * 9)[:tokens]
        torch.testing.assert_close(bank.tensors(slot)["model.embed_tokens.prompt"], words_VH[ids])
    bank.add(7, Prompt(tokens=6), seed=1)
    made_PH = bank.tensors(7)["model.embed_tokens.prompt"]
    assert (made_PH.unsqueeze(1) - words_VH).abs().amax(-1).min(1).values.max() < 1e-6
    assert len(made_PH.unique(dim=0)) > 3
    with pytest.raises(MethodError, match="no tokenizer"):
        Bank(model).add(0, Prompt(start="text", text="the cat"))


def test_what_a_prefix_cannot_do_is_refused(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path)
    with pytest.raises(MethodError, match="not sdpa"):
        Bank(base_of(folder, attention="eager")).add(0, Prefix())
    config = peft.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, task_type="CAUSAL_LM")
    with pytest.raises(MethodError, match="prefix_projection"):
        knobs_from_peft(config.to_dict())
    scope = Scope.of(base_of(folder))
    with pytest.raises(DeltaError, match=r"shape \[3, 8\]"):
        from_files(Prefix(tokens=3), None, {"prompt_embeddings": torch.zeros(3, 8)}, scope)
    with pytest.raises(DeltaError, match="is missing"):
        from_files(Prefix(tokens=3), None, {}, scope)


def test_attention_that_ignores_a_prefix_is_found_out(tmp_path: Path) -> None:
    model, bank = adapted(tiny.save(tmp_path), "prefix")
    model.config._attn_implementation = "eager"
    with pytest.raises(MethodError, match="a function of its own"):
        losses(model, bank, rows_of(bank, (0, [sample(1, 9)])))

"""Deltas of every method in one continuous batch: each request answers as it does alone."""

import random
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from orchestrator.base.attention import use
from orchestrator.config import CausalLM
from orchestrator.config.method import IA3, BitFit, Bottleneck, Lora, Norms, Prefix, Prompt, Sparse
from orchestrator.data import Row, Sample, collate
from orchestrator.data.batch import NO_SLOT
from orchestrator.delta import save_delta
from orchestrator.errors import ServeError
from orchestrator.methods import Bank, to_files
from orchestrator.serve.request import Request
from orchestrator.serve.sampling import Sampling
from tests.serving_kit import model, solo
from tests.test_engine import answer, engine, mixed, prompt

KNOBS: list[Any] = [
    Lora(rank=2),
    Lora(rank=7, alpha=4, targets=("all-linear",)),
    Lora(rank=4, dora=True),
    Bottleneck(size=3, placement="houlsby", activation="gelu"),
    Bottleneck(size=6, placement="houlsby", activation="gelu", scale=0.5),
    Bottleneck(size=5, placement="parallel"),
    Prompt(tokens=3),
    Prompt(tokens=20, start="random"),
    Prefix(tokens=4, std=0.7),
    Prefix(tokens=19, std=0.7),
    BitFit(),
    Norms(),
    IA3(),
    Sparse(density=0.1),
]
"""A slot each; a method of more kinds is a line more."""
SLOW = ("gpt2", "gemma3")
PEFTS = [i for i, knobs in enumerate(KNOBS) if knobs.type in ("lora", "prompt", "prefix")]


def base_of(kind: str) -> Any:
    """A base that is moved by what its layers do, not by the embedding of the last token alone."""
    base = model(kind)
    if kind == "gemma3":
        base.get_input_embeddings().weight.data *= 0.1
    return base


def filled(kind: str) -> tuple[Any, Bank]:
    """A base and a bank of one slot for each of ``KNOBS``, whose deltas do something."""
    base = base_of(kind)
    use(base)
    bank = Bank(base)
    for slot, knobs in enumerate(KNOBS):
        bank.add(slot, knobs, seed=slot)
        generator = torch.Generator().manual_seed(slot)
        for parameter in bank.parameters(slot).values():
            parameter.data += torch.randn(parameter.shape, generator=generator) * (0.6 if kind == "gpt2" else 0.15)
    return base, bank


@torch.no_grad()
def alone(base: Any, bank: Bank, slot: int, tokens: list[int], count: int) -> list[int]:
    """Greedy tokens of one request by itself: the whole row anew for each, as in training, and no cache."""
    made: list[int] = []
    while len(made) < count:
        row = [*tokens, *made]
        batch = collate([Row(slot, [Sample(row, [True] * len(row), 0)], *bank.lead(slot))], pad_id=256)
        with bank.routed(batch.slot_BT, position_BT=batch.position_BT):
            logits = base(input_ids=batch.tokens_BT, position_ids=batch.position_BT, use_cache=False).logits
        made.append(int(logits[0, bank.lead(slot)[0] + len(row) - 1].argmax()))
        if made[-1] == 257:
            return made[:-1]
    return made


def wish(tokens: list[int], count: int, slot: int) -> Request:
    return Request(tokens, Sampling(count, temperature=0), slot)


@pytest.mark.parametrize("kind", ["llama", "mistral", *(pytest.param(k, marks=pytest.mark.slow) for k in SLOW)])
def test_every_method_in_one_batch_answers_as_alone(kind: str) -> None:
    base, bank = filled(kind)
    slots = [*range(len(KNOBS)), NO_SLOT]
    wishes = [(p, min(n, 12), slots[i % len(slots)]) for i, (p, n) in enumerate(mixed(2 * len(slots)))]
    expected = [alone(base, bank, slot, p, n) for p, n, slot in wishes]
    random.Random(0).shuffle(order := list(range(len(wishes))))
    for limits in ({"rows": 5, "prefill_chunk": 7}, {"rows": 12, "prefill_chunk": 64}):
        with engine(base, bank, **limits) as made:
            tickets = {}
            for i in order:
                (tickets[i],) = made.submit([wish(*wishes[i])])
                time.sleep(0.004)  # some arrive while others run, some leave before
            got = [answer(tickets[i]) for i in range(len(wishes))]
            assert made.stats.prompt_tokens == sum(len(p) for p, _, _ in wishes)
        assert [last.error for _, last in got] == [None] * len(wishes)
        assert [tokens for tokens, _ in got] == expected
    plain_base = base_of(kind)
    plain = [solo(plain_base, p, n) for p, n, _ in wishes]
    assert all(a == b for a, b, (_, _, slot) in zip(expected, plain, wishes, strict=True) if slot == NO_SLOT)
    assert sum(a != b for a, b in zip(expected, plain, strict=True)) > 0.6 * len(wishes)  # the deltas do something


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_one_batch_answers_as_pefts_generate(kind: str, tmp_path: Path) -> None:
    base, bank = filled(kind)
    expected, wishes = [], []
    for slot in PEFTS:
        tensors, config = to_files(bank.knobs(slot), CausalLM(), bank.tensors(slot), bank.sites(slot), bank.scope)
        save_delta(tmp_path / str(slot), tensors, None, config)
        theirs = peft.PeftModel.from_pretrained(base_of(kind), tmp_path / str(slot)).eval()
        for p, n in mixed(4)[1:]:
            wishes.append((p, n, slot))
            expected.append(solo(theirs, p, n))
    with engine(base, bank, rows=6, prefill_chunk=16) as made:
        tickets = made.submit([wish(*one) for one in wishes])
        assert [answer(t)[0] for t in tickets] == expected


def test_what_a_delta_puts_first_takes_room_but_is_not_counted_as_prompt() -> None:
    base, bank = filled("llama")
    with engine(base, bank, length=64) as made:
        for slot, lead in ((NO_SLOT, 0), (6, 3), (7, 20), (9, 19)):
            assert made.room(slot) == 64 - lead
            long = [wish(prompt(1, 40), 24 - lead, slot)]
            assert len(answer(made.submit(long)[0])[0]) <= 24 - lead
            with pytest.raises(ServeError, match=f"limit of {64 - lead} tokens"):
                made.submit([wish(prompt(1, 40), 25 - lead, slot)])
        assert made.stats.prompt_tokens == 4 * 40


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_broken_prompt_or_prefix_fails_its_own_rows_only(kind: str) -> None:
    base, bank = filled("llama")
    slot = 7 if kind == "prompt" else 9
    wishes = [(p, n, [slot, 0, NO_SLOT, 8][i % 4]) for i, (p, n) in enumerate(mixed(24))]
    expected = [alone(base, bank, s, p, n) for p, n, s in wishes]
    for parameter in bank.parameters(slot).values():
        parameter.data.fill_(float("nan"))
    with engine(base, bank, rows=4, prefill_chunk=16) as made:
        got = [answer(t) for t in made.submit([wish(*one) for one in wishes])]
    for (tokens, last), (_, _, own), alone_ in zip(got, wishes, expected, strict=True):
        assert (last.finish == "error") == (own == slot)
        assert own == slot or tokens == alone_


def test_a_prefix_that_cannot_be_read_fails_its_own_row_only() -> None:
    base, bank = filled("llama")
    read = bank.prefix

    def prefix(slot: int) -> Any:
        if slot == 9:
            raise MemoryError("no room for a prefix")
        return read(slot)

    bank.prefix = prefix  # type: ignore[method-assign]
    expected = [alone(base, bank, s, prompt(s, 9), 12) for s in (8, 6)]
    with engine(base, bank, rows=4) as made:
        tickets = made.submit([wish(prompt(s, 9), 12, s) for s in (9, 8, 9, 6)])
        got = [answer(t) for t in tickets]
    assert [got[0][1].error, got[2][1].error] == ["no room for a prefix"] * 2
    assert [got[1][0], got[3][0]] == expected

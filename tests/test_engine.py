import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from orchestrator.config import Lora
from orchestrator.errors import ServeError
from orchestrator.methods.bank import Bank
from orchestrator.serve.engine import Engine
from orchestrator.serve.request import BusyError, Request
from orchestrator.serve.sampling import Detokenizer, Draw, Sampling, pick
from tests.serving_kit import VOCABULARY, model, solo, tokenizer


@contextmanager
def engine(base, bank=None, **limits):
    made = Engine(base, tokenizer(), bank or Bank(base), **{"length": 256, **limits})
    try:
        yield made
    finally:
        made.close()
        assert not made._thread.is_alive()


def prompt(seed, length):
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def answer(ticket):
    events = list(ticket)
    return [e.picked.token for e in events if e.picked], events[-1]


def mixed(count):
    """Prompts and answers of many lengths, so that rows join and leave at different steps."""
    return [(prompt(i, 1 + (i * 37) % 90), 1 + (i * 13) % 40) for i in range(count)]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "gemma3"])
def test_mixed_requests_answer_as_each_alone(kind):
    base = model(kind)
    wishes = mixed(24)
    alone = [solo(base, p, n) for p, n in wishes]
    with engine(base, rows=5, prefill_chunk=16) as made:
        tickets = []
        for p, n in wishes:
            tickets += made.submit([Request(p, Sampling(max_tokens=n, temperature=0))])
            time.sleep(0.004)  # some arrive while others run
        answers = [answer(t) for t in tickets]
    assert [tokens for tokens, _ in answers] == alone
    assert {last.finish for _, last in answers} <= {"length", "stop"}
    assert max(len(a) for a in alone) > 20
    assert len({tuple(a) for a in alone}) > 12


def test_eager_attention_and_growth_answer_the_same():
    base = model("llama", attention="eager")
    wishes = [(prompt(3, 200), 50), (prompt(4, 2), 200)]
    alone = [solo(base, p, n, ends=False) for p, n in wishes]
    with engine(base, rows=3, prefill_chunk=64) as made:
        tickets = made.submit([Request(p, Sampling(n, temperature=0, ignore_eos=True)) for p, n in wishes])
        assert [answer(t)[0] for t in tickets] == alone


def adapters(base, ranks):
    """A bank with random LoRA deltas, and for each slot what peft itself makes of it."""
    bank = Bank(base)
    truths = {}
    for slot, rank in enumerate(ranks):
        knobs = Lora(rank=rank, alpha=2.0 * rank, targets=("q_proj", "v_proj", "down_proj"))
        bank.add(slot, knobs, seed=slot)
        generator = torch.Generator().manual_seed(slot)
        tensors = {n: torch.randn(t.shape, generator=generator) * 0.3 for n, t in bank.tensors(slot).items()}
        bank.remove(slot)
        bank.add(slot, knobs, tensors=tensors)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(knobs.targets), task_type="CAUSAL_LM")
        theirs = get_peft_model(model("llama"), config)
        state = theirs.state_dict()
        for name, value in tensors.items():
            site, _, rest = name.rpartition(".lora_")
            state[f"base_model.model.{site}.lora_{rest.replace('.weight', '.default.weight')}"].copy_(value)
        truths[slot] = theirs.eval()
    return bank, truths


def test_mixed_deltas_answer_as_peft_does():
    base = model("llama")
    bank, truths = adapters(base, [2, 4, 7])
    truths[-1] = model("llama")
    wishes = [(p, n, i % 4 - 1) for i, (p, n) in enumerate(mixed(20))]
    alone = [solo(truths[slot], p, n) for p, n, slot in wishes]
    with engine(base, bank, rows=6, prefill_chunk=32) as made:
        tickets = made.submit([Request(p, Sampling(n, temperature=0), slot) for p, n, slot in wishes])
        assert [answer(t)[0] for t in tickets] == alone
    same = [solo(truths[-1], p, n) for p, n, _ in wishes]
    assert sum(a != b for a, b in zip(alone, same, strict=True)) >= 12  # the deltas do something


def test_a_broken_delta_fails_its_own_rows_only():
    base = model("llama")
    bank, _ = adapters(base, [2, 4])
    bank.add(7, Lora(rank=2, targets=("q_proj",)))
    broken = {name: torch.full_like(t, float("nan")) for name, t in bank.tensors(7).items()}
    bank.remove(7)
    bank.add(7, Lora(rank=2, targets=("q_proj",)), tensors=broken)
    wishes = [(p, n, [0, 1, -1, 7][i % 4]) for i, (p, n) in enumerate(mixed(16))]
    with engine(base, bank, rows=4, prefill_chunk=16) as made:
        good = made.submit([Request(p, Sampling(n, temperature=0), s) for p, n, s in wishes if s != 7])
        expected = [answer(t)[0] for t in good]
        tickets = made.submit([Request(p, Sampling(n, temperature=0), s) for p, n, s in wishes])
        got = [answer(t) for t in tickets]
        assert made.stats.failed == 4
    assert [tokens for (tokens, _), w in zip(got, wishes, strict=True) if w[2] != 7] == expected
    for (_, last), w in zip(got, wishes, strict=True):
        assert (last.finish == "error") == (w[2] == 7)
        assert last.error is None or "not finite" in last.error


def test_a_forward_that_raises_fails_the_row_that_causes_it():
    base = model("llama")
    bank = Bank(base)

    class Touchy:
        def lead(self, slot):
            return 0, 0

        def changes_head(self, slot):
            return False

        @contextmanager
        def routed(self, slot_BT, *, position_BT=None, prefixed=True):
            if (slot_BT == 9).any():
                raise MemoryError("no room for slot 9")
            with bank.routed(slot_BT * 0 - 1, position_BT=position_BT):
                yield

    wishes = mixed(9)
    alone = [solo(base, p, n) for p, n in wishes]
    with engine(base, Touchy(), rows=9, prefill_chunk=512) as made:
        tickets = made.submit(
            [Request(p, Sampling(n, temperature=0), 9 if i == 4 else 0) for i, (p, n) in enumerate(wishes)]
        )
        got = [answer(t) for t in tickets]
    assert got[4][1].error == "no room for slot 9"
    assert [tokens for i, (tokens, _) in enumerate(got) if i != 4] == [a for i, a in enumerate(alone) if i != 4]


def test_cancelled_requests_leave_and_the_rest_is_untouched():
    base = model("llama")
    wishes = [(prompt(i, 30), 150) for i in range(12)]
    alone = [solo(base, p, n, ends=False) for p, n in wishes]
    done = []
    with engine(base, rows=4, prefill_chunk=16) as made:
        tickets = made.submit(
            [
                Request(p, Sampling(n, temperature=0, ignore_eos=True), on_done=lambda i=i: done.append(i))
                for i, (p, n) in enumerate(wishes)
            ]
        )
        next(iter(tickets[0]))
        for i in (0, 2, 9, 11):
            tickets[i].cancel()
        got = [answer(t) for t in tickets]
        assert made.stats.cancelled == 4
    assert sorted(done) == list(range(12))
    for i, (tokens, last) in enumerate(got):
        assert last.finish == ("cancelled" if i in (0, 2, 9, 11) else "length")
        assert last.finish == "cancelled" or tokens == alone[i]


def test_queue_is_bounded_and_bad_requests_are_refused():
    with engine(model("llama"), rows=2, max_queued=3, length=64) as made:
        gate = threading.Event()
        made.call(gate.wait)
        many = [Request([1], Sampling(5, temperature=0))] * 5
        tickets = made.submit(many)
        with pytest.raises(BusyError):
            made.submit(many[:1])
        gate.set()
        assert all(answer(t)[1].finish for t in tickets)
        for bad, message in [([], "empty"), ([1] * 60, "60 prompt tokens"), ([VOCABULARY], "outside")]:
            with pytest.raises(ServeError, match=message):
                made.submit([Request(bad, Sampling(5))])
        assert made.stats.rejected == 1
    with pytest.raises(ServeError, match="shutting down"):
        made.submit(many)


def test_a_seed_fixes_the_answer_whatever_runs_beside_it():
    base = model("llama")
    wish = Request(prompt(1, 12), Sampling(40, temperature=0.8, top_p=0.9, top_k=30, seed=11, ignore_eos=True))
    others = [Request(prompt(i, 20 + i), Sampling(30, temperature=1.2, seed=i)) for i in range(6)]
    with engine(base, rows=7) as made:
        (first,) = (answer(t)[0] for t in made.submit([wish]))
        tickets = made.submit([*others[:3], wish, *others[3:]])
        assert answer(tickets[3])[0] == first
        greedy = Request(wish.prompt, Sampling(40, temperature=0, ignore_eos=True))
        assert answer(made.submit([greedy])[0])[0] != first


def draws(params, logits, count=4000):
    draw = Draw(params)
    return torch.bincount(
        torch.tensor([pick(logits.unsqueeze(0), [draw])[0].token for _ in range(count)]), minlength=len(logits)
    )


def test_draws_follow_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])
    for temperature in (0.7, 1.5):
        share = draws(Sampling(1, temperature=temperature, seed=0), logits) / 4000
        assert (share - (logits / temperature).softmax(-1)).abs().max() < 0.03
    assert draws(Sampling(1, top_k=2, seed=0), logits)[2:].sum() == 0
    # 0.64 + 0.24 = 0.88 is the smallest set that reaches 0.7
    counts = draws(Sampling(1, top_p=0.7, seed=0), logits)
    assert counts[2:].sum() == 0
    assert abs(counts[0] / 4000 - 0.731) < 0.03


def test_penalties_biases_and_log_probabilities():
    logits = torch.tensor([[1.0, 0.9, 0.0]])
    draw = Draw(Sampling(9, temperature=0, presence_penalty=0.5, frequency_penalty=0.3, logprobs=2))
    assert [pick(logits, [draw])[0].token for _ in range(4)] == [0, 1, 0, 1]
    assert pick(logits, [Draw(Sampling(1, temperature=0, logit_bias=((2, 5.0),)))])[0].token == 2
    one = pick(logits, [draw])[0]
    truth = logits[0].log_softmax(-1)
    assert one.logprob == pytest.approx(float(truth[one.token]), abs=1e-6)
    assert [t for t, _ in one.top] == [0, 1]


def test_no_draw_returns_a_token_without_probability():
    logits = torch.full((64, 50), -float("inf"))
    logits[:, 17] = 0.0
    picked = pick(logits, [Draw(Sampling(1, temperature=t, seed=i)) for i, t in enumerate([1.0, 0.0] * 32)])
    assert {p.token for p in picked} == {17}


@pytest.mark.parametrize("text", ["plain", "žluťoučký kůň 🐎 скачет", "日本語🇯🇵!"])
def test_pieces_never_split_a_character_and_add_up(text):
    made = tokenizer()
    ids = made(text)["input_ids"]
    out = Detokenizer(made, made("prompt ")["input_ids"], ())
    pieces = [out.add(i) for i in ids]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + out.finish() == text


def test_broken_utf8_is_neither_lost_nor_held_for_ever():
    made = tokenizer()
    euro = made("€")["input_ids"]
    out = Detokenizer(made, [1], ())
    text = "".join(out.add(i) for i in [*euro[:2], *made("ok")["input_ids"], euro[0]]) + out.finish()
    assert text == made.decode([*euro[:2], *made("ok")["input_ids"], euro[0]])


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("one STOP two", ("STOP",), "one "),
        ("aab aaab end", ("aaab",), "aab "),
        ("no such thing", ("xyz", "ings"), "no such thing"),
        ("first A then B", ("B", "A"), "first "),
        ("kůň ů", ("ů",), "k"),
    ],
)
def test_stop_strings_end_the_text_and_are_never_sent(text, stop, kept):
    made = tokenizer()
    out = Detokenizer(made, [1], stop)
    pieces = []
    for i in made(text)["input_ids"]:
        pieces.append(out.add(i))
        assert kept.startswith("".join(pieces))
        if out.stopped:
            break
    assert "".join(pieces) + out.finish() == kept
    assert out.stopped == (kept != text)


def test_a_stop_string_ends_the_row():
    with engine(model("llama")) as made:
        letters = tuple((i, 100.0) for i in tokenizer()("abcdefgh")["input_ids"])
        wish = Sampling(60, temperature=0, ignore_eos=True, logit_bias=letters)
        text = "".join(e.text for e in made.submit([Request(prompt(5, 9), wish)])[0])
        stop = text[20:23]
        events = list(made.submit([Request(prompt(5, 9), replace(wish, stop=(stop,)))])[0])
    assert "".join(e.text for e in events) == text[: text.index(stop)]
    assert len(text) >= 60
    assert events[-1].finish == "stop"


def test_models_without_plain_attention_are_refused():
    base = model("llama")
    base.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ServeError, match="linear_attention"):
        Engine(base, tokenizer(), Bank(base))

"""Rows and micro-batches: nothing is lost, nothing leaks, every rank has as much to do."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from orchestrator.data import IGNORE, Sample, collate, deal, pack
from orchestrator.errors import DataError


def samples(n, *, longest=20, seed=0, start=0):
    draw = random.Random(seed)
    return [
        Sample([draw.randrange(2, 60) for _ in range(size)], [draw.random() < 0.6 for _ in range(size)], start + i)
        for i in range(n)
        for size in [draw.randrange(2, longest + 1)]
    ]


def losses(model, batches):
    """Summed loss and targets over micro-batches, by the model's own attention."""
    total, count = 0.0, 0
    for batch in batches:
        logits = model(input_ids=batch.tokens_BT, position_ids=batch.position_BT, use_cache=False).logits
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).double(), batch.labels_BT.flatten(), ignore_index=IGNORE, reduction="sum"
        ).item()
        count += int((batch.labels_BT != IGNORE).sum())
    return total, count


def tiny(kind, attention):
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64,
        )  # fmt: skip
    else:
        config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():  # large weights, so that what a token attends to matters
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    return model.eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_packed_and_unpacked_losses_are_equal(kind, attention):
    model = tiny(kind, attention)
    mine = samples(23)
    alone = 0.0
    for sample in mine:  # outside truth: one sequence at a time, nothing packed, nothing padded
        logits = model(input_ids=torch.tensor([sample.tokens])).logits[0, :-1].double()
        targets = torch.tensor([t if on else IGNORE for t, on in zip(sample.tokens, sample.trained, strict=True)][1:])
        alone += torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum").item()
    for packing in (True, False):
        rows = pack({0: mine}, length=48, packing=packing)
        assert (len(rows) < 10) == packing
        for ranks in (1, 3):
            dealt = [deal(rows, rank=r, ranks=ranks, rows_per_pass=2, pad_id=0) for r in range(ranks)]
            parts = [losses(model, batches) for batches in dealt]
            assert sum(p[0] for p in parts) == pytest.approx(alone, rel=1e-5)
            assert sum(p[1] for p in parts) == sum(s.targets for s in mine)


@torch.no_grad()
def test_a_leak_would_show():
    """The same rows with positions that run on: the loss moves, so the test above can tell."""
    model = tiny("llama", "sdpa")
    rows = pack({0: samples(23)}, length=48, packing=True)
    batch = collate(rows, pad_id=0)
    positions = torch.arange(batch.tokens_BT.shape[1]).expand_as(batch.tokens_BT)
    right, count = losses(model, [batch])
    logits = model(input_ids=batch.tokens_BT, position_ids=positions).logits
    wrong = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels_BT.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    assert abs(wrong.item() - right) / count > 0.01


def test_a_batch_by_hand():
    rows = pack(
        {7: [Sample([5, 6, 7], [True, False, True], 1), Sample([8, 9], [False, True], 2)]}, length=8, packing=True
    )
    (batch,) = deal(rows, rank=0, ranks=1, rows_per_pass=4, pad_id=3)
    assert batch.tokens_BT.tolist() == [[5, 6, 7, 8, 9, 3, 3, 3]]
    assert batch.labels_BT.tolist() == [[-100, 7, -100, 9, -100, -100, -100, -100]]
    assert batch.slot_BT.tolist() == [[7] * 8]
    assert batch.segment_BT.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]
    assert batch.position_BT.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch.sample_BT.tolist() == [[1, 1, 1, 2, 2, -1, -1, -1]]


def test_packing_keeps_every_sample_and_fills_rows():
    mine = {0: samples(200, longest=64), 5: samples(100, longest=30, seed=1, start=200), 2: []}
    rows = pack(mine, length=64, packing=True)
    kept = {slot: sorted(s.key for r in rows if r.slot == slot for s in r.samples) for slot in mine}
    assert kept == {slot: [s.key for s in own] for slot, own in mine.items()}
    assert all(0 < r.size <= 64 for r in rows)
    least = sum(-(-sum(len(s.tokens) for s in own) // 64) for own in mine.values())
    assert len(rows) <= 1.05 * least  # best fit, longest first: at most 11/9 of the best there is
    assert rows == pack(mine, length=64, packing=True)
    with pytest.raises(DataError, match="a row holds 8"):
        pack(mine, length=8, packing=True)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [1, 2, 5, 9, 40])
def test_ranks_share_rows_evenly(n, ranks):
    rows = pack({0: samples(n), 1: samples(n // 2, start=n)}, length=20, packing=False)
    dealt = [deal(rows, rank=r, ranks=ranks, rows_per_pass=3, pad_id=0) for r in range(ranks)]
    assert len({len(batches) for batches in dealt}) == 1
    keys = [
        k for batches in dealt for b in batches for row in b.sample_BT.tolist() for k in dict.fromkeys(row) if k >= 0
    ]
    assert sorted(keys) == list(range(n + n // 2))
    for batches in dealt:
        for batch in batches:
            assert batch.tokens_BT.shape[0] <= 3
            assert batch.tokens_BT.shape[1] % 8 == 0
            assert bool((batch.labels_BT[batch.sample_BT < 0] == IGNORE).all())
            assert set(batch.slot_BT.flatten().tolist()) <= {0, 1}
    work = [sum(int((b.sample_BT >= 0).sum()) for b in batches) for batches in dealt]
    assert max(work) - min(work) <= 2 * 20  # two of the longest rows
    widths = [[b.tokens_BT.shape[1] for b in batches if int((b.sample_BT >= 0).sum())] for batches in dealt]
    if n == 40:
        assert all(abs(a - b) <= 8 for pair in zip(*widths, strict=True) for a in pair for b in pair)

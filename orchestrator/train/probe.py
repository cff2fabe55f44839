"""What is not known of a model before it has run: looked at once, on a short row, before the first step."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from orchestrator.base.encoder import Reader, takes_blocks
from orchestrator.base.monitor import GatherWatch
from orchestrator.data import Batch, Row, Sample, collate
from orchestrator.errors import TrainError
from orchestrator.methods import Bank
from orchestrator.train.classify import Classifier
from orchestrator.train.loss import causal_lm_loss, plain_loss
from orchestrator.train.step import Loss

_LENGTH = 8


@dataclass(frozen=True)
class Probe:
    """What was found."""

    gathered_alive: int
    """Bytes of gathered weights that outlive a forward pass which a backward pass could follow."""
    packs: bool
    """Whether sequences in one row leave each other alone. Not where a model takes no positions or carries a state."""
    in_head: bool
    """Whether the loss may be computed in the head. Not where a model changes its logits after it."""


def probe(model: Any, bank: Bank, slot: int, device: torch.device, *, quantized: bool, vocabulary: int) -> Probe:
    """Look. Every rank must call it.

    Raises:
        TrainError: most of a quantized base stays gathered: its first step would un-shard it. (Dense expert tensors
            of a mixture-of-experts model are kept by torch's own matmul; that trains, in more memory.)
    """
    one, two = ([(7 * i + start) % vocabulary for i in range(_LENGTH)] for start in (3, 5))
    alone = short_row(bank, slot, [two], device)
    packed = short_row(bank, slot, [one, two], device)
    alive = _gathered_alive(model, bank, alone, quantized, plain_loss)
    with torch.no_grad():
        want = _losses(model, bank, alone, plain_loss)
        # A delta of the head adds to logits, of which there are none where the loss is computed in the head.
        in_head = not bank.changes_head(slot) and _close(_losses(model, bank, alone, causal_lm_loss), want)
        packs = _close(_losses(model, bank, packed, plain_loss)[-(_LENGTH - 1) :], want)
    return Probe(alive, packs, in_head)


def probe_classifier(
    model: Any, bank: Bank, slot: int, device: torch.device, *, encoder: bool, quantized: bool, vocabulary: int
) -> Probe:
    """The same for a bare transformer and the slot's own head.

    Raises:
        TrainError: see ``probe``; or the model counts positions in a way of its own.
    """
    packs = not encoder or takes_blocks(model)
    loss = Classifier(bank, encoder=encoder, packed=packs)
    one, two = ([(7 * i + start) % vocabulary for i in range(_LENGTH)] for start in (3, 5))
    alone, packed = (short_row(bank, slot, rows, device, label=0) for rows in ([two], [one, two]))
    alive = _gathered_alive(model, bank, alone, quantized, loss)
    with torch.no_grad():
        one_row = short_row(None, slot, [two], device, label=0)
        plain = model(input_ids=one_row.tokens_BT).last_hidden_state
        reader = Reader(model, encoder=encoder, packed=packs)
        ours, _ = reader(one_row.tokens_BT, one_row.position_BT, one_row.segment_BT, one_row.sample_BT < 0, None)
        if not _close(ours, plain):
            raise TrainError(
                f"{type(model).__name__} does not count positions as this project does; it cannot train it"
            )
        packs = packs and _close(_pooled(model, bank, packed, loss)[1:], _pooled(model, bank, alone, loss))
    return Probe(alive, packs, in_head=False)


def _pooled(model: Any, bank: Bank, batch: Batch, loss: Classifier) -> torch.Tensor:
    with bank.routed(batch.slot_BT, position_BT=batch.position_BT):
        return loss.pool(model, batch)


def short_row(
    bank: Bank | None, slot: int, rows: list[list[int]], device: torch.device, label: int | None = None
) -> Batch:
    """One row of some sequences, all of whose tokens are targets; with a label, texts to classify."""
    samples = [Sample(tokens, [True] * len(tokens), key, label) for key, tokens in enumerate(rows)]
    made = collate([Row(slot, samples, *(bank.lead(slot) if bank else ()))], pad_id=0)
    return replace(made.to(device), slot_BT=made.slot_BT)


def _losses(model: Any, bank: Bank, batch: Batch, loss: Any) -> torch.Tensor:
    with bank.routed(batch.slot_BT, position_BT=batch.position_BT):
        losses_N: torch.Tensor = loss(model, batch)[0]
        return losses_N


def _gathered_alive(model: Any, bank: Bank, batch: Batch, quantized: bool, loss: Loss) -> int:
    with GatherWatch(model) as watch, bank.routed(batch.slot_BT, position_BT=batch.position_BT):
        losses_N, _ = loss(model, batch)
        alive = watch.alive_bytes()
        if quantized and alive > watch.gathered_bytes / 2:
            raise TrainError(
                f"{alive:,} of {watch.gathered_bytes:,} gathered bytes outlive the forward pass: something in "
                f"{type(model).__name__} keeps its weights; train it with shard=0"
            )
        losses_N.sum().backward()  # type: ignore[no-untyped-call]
    bank.zero_grad()
    return alive


def _close(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Rounding, or another sum? A wrong mask or scale moves losses by far more than either tolerance."""
    scale = 1e-3 if want.dtype == torch.float32 and got.device.type == "cpu" else 0.05
    return bool(((got - want).abs().mean() <= scale * want.abs().mean()).item())

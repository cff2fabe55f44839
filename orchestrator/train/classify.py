"""Classification: hidden states pooled per text, the slot's own head, cross-entropy; predictions over a whole set.

Shapes: B rows, T tokens, H hidden size, P texts of a micro-batch, N texts of a set, C labels of the largest label set.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.base.encoder import Reader
from orchestrator.config import Classification
from orchestrator.data import IGNORE, Batch, Sample
from orchestrator.methods import Bank
from orchestrator.train.metrics import classification_metrics
from orchestrator.train.step import Evaluate, Stepper


@dataclass(frozen=True)
class Scored:
    """A micro-batch's texts."""

    logits_PC: Tensor
    """fp32; -inf beyond a slot's own labels."""
    label_P: Tensor
    """Index of each text's label."""
    slot_P: Tensor
    """Its slot."""
    sample_P: Tensor
    """Its number."""


@dataclass(frozen=True)
class Predictions:
    """What a slot says of the texts of a set, in their order; the same on every rank."""

    predicted_N: Tensor
    """Index of the most likely label."""
    label_N: Tensor
    """Index of the right one."""
    loss_N: Tensor
    """Cross-entropy of the right one, fp64."""
    logits_NC: Tensor | None
    """fp32, where they were asked for."""


class Classifier:
    """Scores micro-batches; as a ``Loss`` it gives the cross-entropy of each text.

    Args:
        bank: holds the heads, and each slot's pooling.
        encoder: whether the base reads both ways.
        packed: whether a row may hold several texts.
    """

    def __init__(self, bank: Bank, *, encoder: bool, packed: bool) -> None:
        self.bank, self.encoder, self.packed = bank, encoder, packed
        self._reader: Reader | None = None

    def __call__(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Losses [P] of the texts, fp32, and the slot [P] of each."""
        scored = self.score(model, batch)
        return nn.functional.cross_entropy(scored.logits_PC, scored.label_P, reduction="none"), scored.slot_P

    def score(self, model: Any, batch: Batch) -> Scored:
        """Logits of the texts of a micro-batch; within ``Bank.routed``.

        Args:
            model: the bare transformer.
            batch: on its device, except for the slots.
        """
        end_BT = batch.labels_BT != IGNORE
        slot_P = batch.slot_BT.to(end_BT.device)[end_BT]
        sample_P = batch.sample_BT[end_BT]
        pooled_PH = self.pool(model, batch)
        # Of padding alone there are none, but the backward pass goes through the base as on the other ranks.
        logits_PC = self.bank.classify(pooled_PH, slot_P, sample_P) if len(slot_P) else pooled_PH.float()
        return Scored(logits_PC, batch.labels_BT[end_BT], slot_P, sample_P)

    def pool(self, model: Any, batch: Batch) -> Tensor:
        """What each text's head sees: [P, H], as its slot's task says."""
        if self._reader is None or self._reader.model is not model:
            self._reader = Reader(model, encoder=self.encoder, packed=self.packed)
        end_BT = batch.labels_BT != IGNORE
        slot_P = batch.slot_BT.to(end_BT.device)[end_BT]
        # Of all slots, not of those here: ranks whose backward passes took other ways would wait for each other.
        kinds = {slot: self._pooling(slot) for slot in self.bank.slots}
        owner_BT, first_BT = self._texts(batch, end_BT)
        h_BTH, pooler_PH = self._reader(
            batch.tokens_BT,
            batch.position_BT,
            batch.segment_BT,
            batch.sample_BT < 0,
            first_BT if "pooler" in kinds.values() else None,
        )
        pooled_PH = h_BTH[end_BT]
        for kind in sorted(set(kinds.values()) - {"last"}):
            if kind == "pooler":
                assert pooler_PH is not None
                other_PH = pooler_PH
            else:
                other_PH = h_BTH[first_BT] if kind == "first" else _mean(h_BTH, owner_BT, len(slot_P))
            mine = torch.tensor([slot for slot, own in kinds.items() if own == kind], device=slot_P.device)
            pooled_PH = torch.where(torch.isin(slot_P, mine).unsqueeze(1), other_PH.to(pooled_PH.dtype), pooled_PH)
        return pooled_PH

    def _pooling(self, slot: int) -> str:
        task = self.bank.task(slot)
        pooling = task.pooling if isinstance(task, Classification) else "last"
        return pooling if pooling != "auto" else "mean" if self.encoder else "last"

    def _texts(self, batch: Batch, end_BT: Tensor) -> tuple[Tensor, Tensor]:
        """For each token the text [0, P) that it is of, -1 for padding and virtual tokens; and each text's first token.

        Texts follow one another by row and place, as their last tokens do.
        """
        place_BT = torch.arange(end_BT.shape[1], device=end_BT.device).expand_as(end_BT)
        begin_BT = place_BT.clone()
        begin_BT[:, 1:][batch.segment_BT[:, 1:] == batch.segment_BT[:, :-1]] = 0
        since_BT = place_BT - begin_BT.cummax(1).values
        leads = {slot: self.bank.lead(slot)[0] if slot >= 0 else 0 for slot in set(batch.slot_BT[:, 0].tolist())}
        virtual_B1 = torch.tensor([[leads[slot]] for slot in batch.slot_BT[:, 0].tolist()], device=end_BT.device)
        text_BT = (batch.sample_BT >= 0) & (since_BT >= virtual_B1)
        first_BT = text_BT & (since_BT == virtual_B1)
        owner_BT = torch.where(text_BT, first_BT.flatten().cumsum(0).view_as(first_BT) - 1, -1)
        return owner_BT, first_BT


def _mean(h_BTH: Tensor, owner_BT: Tensor, count: int) -> Tensor:
    """Mean [P, H] of each text's tokens, fp32."""
    mine_BT = owner_BT >= 0
    owner_K = owner_BT[mine_BT]
    sum_PH = h_BTH.new_zeros(count, h_BTH.shape[-1], dtype=torch.float32)
    sum_PH = sum_PH.index_add(0, owner_K, h_BTH[mine_BT].float())
    return sum_PH / torch.bincount(owner_K, minlength=count).unsqueeze(1)


def predict(
    stepper: Stepper, classifier: Classifier, slot: int, samples: Sequence[Sample], *, logits: bool = False
) -> Predictions:
    """What a slot says of labelled texts, without dropout or gradients. Every rank must call it, with the same texts.

    Args:
        stepper: packs the texts and deals them to the ranks; holds the bare transformer.
        classifier: scores them.
        slot: whose head.
        samples: the texts.
        logits: whether to keep all logits: N times C numbers.
    """
    return predict_all(stepper, classifier, {slot: samples}, logits=logits)[slot]


def predict_all(
    stepper: Stepper, classifier: Classifier, samples: Mapping[int, Sequence[Sample]], *, logits: bool = False
) -> dict[int, Predictions]:
    """The same for the texts of several slots, in shared passes."""
    engine, bank = stepper.engine, classifier.bank
    labels = {slot: _labels(bank, slot) for slot in samples}
    first, count = {}, 0
    for slot, own in samples.items():
        first[slot], count = count, count + len(own)
    predicted_N = torch.zeros(count, dtype=torch.long, device=engine.device)
    loss_N = torch.zeros(count, dtype=torch.float64, device=engine.device)
    logits_NC = torch.zeros(count, max(labels.values()), device=engine.device) if logits else None
    for batch in stepper.deal(_numbered(samples)):
        with torch.no_grad(), bank.routed(batch.slot_BT, position_BT=batch.position_BT):
            scored = classifier.score(stepper.model, batch.to(engine.device))
        losses_P = nn.functional.cross_entropy(scored.logits_PC, scored.label_P, reduction="none")
        if len(scored.sample_P):
            at_P = scored.sample_P + _lookup(first, scored.slot_P)
            loss_N[at_P] = losses_P.double()
            predicted_N[at_P] = scored.logits_PC.argmax(1)
            if logits_NC is not None:
                width = min(logits_NC.shape[1], scored.logits_PC.shape[1])
                logits_NC[at_P, :width] = scored.logits_PC[:, :width]
    # A text was on one rank; the others hold zeros for it.
    for value in (predicted_N, loss_N, *(() if logits_NC is None else (logits_NC,))):
        engine.sum_(value)
    found = {}
    for slot, own in samples.items():
        mine = slice(first[slot], first[slot] + len(own))
        kept = None if logits_NC is None else logits_NC[mine, : labels[slot]].cpu()
        label_N = torch.tensor([sample.label for sample in own])
        found[slot] = Predictions(predicted_N[mine].cpu(), label_N, loss_N[mine].cpu(), kept)
    return found


def _labels(bank: Bank, slot: int) -> int:
    task = bank.task(slot)
    assert isinstance(task, Classification)
    return len(task.labels or ())


def _numbered(samples: Mapping[int, Sequence[Sample]]) -> dict[int, list[Sample]]:
    """Each sample numbered by its place; slots of one set keep sharing it."""
    made: dict[int, list[Sample]] = {}
    for own in samples.values():
        if id(own) not in made:
            made[id(own)] = [replace(sample, key=number) for number, sample in enumerate(own)]
    return {slot: made[id(own)] for slot, own in samples.items()}


def _lookup(values: Mapping[int, int], slot_P: Tensor) -> Tensor:
    """Each slot's value [P]."""
    table = torch.zeros(max(values) + 1, dtype=torch.long)
    table[list(values)] = torch.tensor(list(values.values()))
    return table.to(slot_P.device)[slot_P]


def evaluator(stepper: Stepper, classifier: Classifier) -> Evaluate:
    """Of each slot's texts: ``eval_loss`` and ``classification_metrics``."""

    def evaluate(samples: Mapping[int, Sequence[Sample]]) -> dict[int, dict[str, float]]:
        found = {}
        for slot, said in predict_all(stepper, classifier, samples).items():
            measured = classification_metrics(said.label_N.tolist(), said.predicted_N.tolist())
            found[slot] = {"eval_loss": float(said.loss_N.mean()), **measured}
        return found

    return evaluate

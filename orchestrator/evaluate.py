"""``manta eval``: one delta, or the bare base, on one set of records; one process, on the CPU or one GPU.

Shapes: B rows, T tokens, N targets of a pass.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.base import FrozenBase, compute_dtype, is_encoder, load_base, load_tokenizer, source_identity
from orchestrator.base.load import empty_model
from orchestrator.base.model import bare, decoder_layers, text_config
from orchestrator.config import Base, CausalLM, Classification, Data, Evaluation, Identity, Task, Zero
from orchestrator.data import NO_SLOT, Sample, deal, pack
from orchestrator.data.labels import TextEncoder
from orchestrator.delta import Delta, check_base, load_delta
from orchestrator.errors import ConfigError, DataError, OutOfMemoryError, ServeError
from orchestrator.evaluate_set import EvalSet, labelled, need_references, prompts, read_set, targets
from orchestrator.evaluate_show import Show
from orchestrator.methods import Bank, from_files, method_of
from orchestrator.registry import Evaluation as Kept
from orchestrator.registry import Registry, Version
from orchestrator.scores import METRICS, answer_scores, check_metrics, fitting, perplexity
from orchestrator.serve.deltas import is_folder
from orchestrator.serve.engine import Engine as Decoder
from orchestrator.serve.request import Request
from orchestrator.serve.sampling import Sampling
from orchestrator.train.classify import Classifier, predict
from orchestrator.train.engine import Engine
from orchestrator.train.loss import plain_loss
from orchestrator.train.metrics import classification_metrics
from orchestrator.train.step import Layout, Stepper
from orchestrator.train.task import knobs_of, longest_text, task_of

BASE = "base"
"""What the bare base is called."""
_SLOT = 0
_LOSS_ROWS = 4
"""Rows of a pass that keeps all logits."""


@dataclass(frozen=True)
class Subject:
    """What is evaluated."""

    ref: str
    """``name:7``, a folder, or ``base``."""
    delta: Delta | None
    """None for the bare base."""
    version: Version | None
    """Where it is a registered one."""


@dataclass(frozen=True)
class Result:
    """What was found."""

    subject: Subject
    """What was evaluated."""
    base: Base
    """The base as it was held."""
    identity: Identity
    """Who it is."""
    data: EvalSet
    """The set."""
    metrics: dict[str, float]
    """Its metrics."""
    predictions: list[dict[str, Any]]
    """One record each, in the set's order."""

    def as_evaluation(self, config: Evaluation) -> Kept:
        """For the registry."""
        delta = self.subject.delta
        return Kept(
            ref=self.subject.ref,
            sha256=delta.sha256 if delta else None,
            base=self.identity.id,
            source_hash=self.identity.source_hash,
            recipe=self.identity.recipe,
            data=self.data.name,
            digest=self.data.digest,
            records=len(self.data.items),
            settings={key: getattr(config, key) for key in ("max_tokens", "length", "chat")},
            metrics=self.metrics,
        )


def subject_of(ref: str, registry: Registry) -> Subject:
    """A registered delta, a folder, or the bare base.

    Raises:
        DeltaError, RegistryError: there is no such delta, or it is damaged.
    """
    if ref == BASE:
        return Subject(BASE, None, None)
    if is_folder(ref):
        return Subject(ref, load_delta(Path(ref).expanduser()), None)
    version = registry.resolve(ref)
    return Subject(version.ref, load_delta(registry.fetch(version)), version)


def evaluate(config: Evaluation, subject: Subject, show: Show) -> Result:
    """Run it. What can be refused is refused before the base is loaded.

    Raises:
        ConfigError: a metric is unknown or does not fit.
        DataError: the set is empty, or a record lacks references or a label, or has an unknown label.
        WrongBaseError: the delta was made for other source weights.
        OutOfMemoryError: base or records do not fit.
    """
    delta = subject.delta
    task = task_of(delta) if delta else CausalLM()
    if config.metrics:
        check_metrics(config.metrics, task.type)
    base = base_of(config.base, delta)
    data = read_set(config.data, config.limit)
    names = _names(config, task, data)
    encoder = isinstance(task, Classification) and is_encoder(base)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unquantized = _unquantized(base, delta, encoder)
    identity = source_identity(base, dtype=compute_dtype(base, device), unquantized=unquantized)
    for warning in check_base(delta.manifest, identity) if delta else ():
        show.warn(warning)
    tokenizer = load_tokenizer(base)
    run: _Answering | _Classifying
    if isinstance(task, Classification):
        assert delta is not None
        run = _Classifying(
            config, data, names, tokenizer, task, longest_text(base, knobs_of(delta)) if encoder else None
        )
    else:
        run = _Answering(config, data, names, tokenizer, show)
    show.loading(base, identity)
    loaded = load_base(base, device=device, identity=identity, encoder=encoder, unquantized=unquantized)
    bank = Bank(loaded.model, device=device, base_id=base.id, fuse=device.type == "cuda")
    if delta:
        tensors = from_files(knobs_of(delta), task, delta.tensors, bank.scope)
        bank.add(_SLOT, knobs_of(delta), tensors=tensors, task=task)
    try:
        with torch.no_grad():
            metrics, predictions = run(loaded, bank, _SLOT if delta else NO_SLOT, show)
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"out of GPU memory: lower length ({config.length}) or rows ({config.rows}), or base.quantize=nf4"
        ) from error
    ordered = {name: metrics[name] for name in names}
    return Result(subject, base, identity, data, ordered, predictions)


def base_of(asked: Base, delta: Delta | None) -> Base:
    """The base as asked for; what was left out is as it was when the delta was trained.

    Raises:
        ConfigError: the delta does not say which base it was trained on.
    """
    if delta is None:
        return asked
    known: dict[str, Any] = {}
    if made := delta.manifest.base if delta.manifest else None:
        here = made.id == "demo" or Path(made.id).expanduser().exists()
        known = {"id": made.id, "revision": None if here or "id" in asked.model_fields_set else made.revision}
        found = re.match(r"(none|int8|nf4)(?:-double)?/(bf16|fp32)?", made.recipe)
        known["quantize"] = found.group(1) if found else "none"
        known["precision"] = (found and found.group(2)) or "auto"
    else:
        known = {"id": delta.peft_config.get("base_model_name_or_path"), "quantize": "none"}
    base = {**known, **{key: getattr(asked, key) for key in asked.model_fields_set}}
    if not base["id"]:
        raise ConfigError(f"{delta.path} does not say which base it was trained on; name it with --base")
    return Base.model_validate(base)


def _names(config: Evaluation, task: Task, data: EvalSet) -> list[str]:
    answers = all(item.references for item in data.items)
    names = list(dict.fromkeys(config.metrics)) or list(fitting(task.type, references=answers))
    check_metrics(names, task.type)
    if compared := [name for name in names if METRICS[name].needs == "answers"]:
        need_references(data.items, compared)
    return names


def _unquantized(base: Base, delta: Delta | None, encoder: bool) -> frozenset[int]:
    if delta is None:
        return frozenset()
    layers = len(decoder_layers(empty_model(base, torch.float32, encoder=encoder))[1])
    return method_of(knobs_of(delta)).unquantized(knobs_of(delta), layers)


class _Answering:
    """A causal language model: answers and the loss of the references."""

    def __init__(self, config: Evaluation, data: EvalSet, names: Sequence[str], tokenizer: Any, show: Show) -> None:
        chat = config.chat == "auto"
        self.config, self.data, self.names = config, data, names
        needs = {METRICS[name].needs for name in names}
        self.prompts = prompts(data.items, tokenizer, chat=chat) if "answers" in needs else []
        self.samples: list[Sample] = []
        if "loss" in needs:
            self.samples, cut = targets(data.items, tokenizer, chat=chat, length=config.length)
            if cut:
                show.warn(f"{cut} of {len(self.samples)} references are cut to length={config.length} tokens")
            if not any(sample.targets for sample in self.samples):
                raise DataError(f"{data.name}: no reference has a token within length={config.length}")

    def __call__(
        self, loaded: FrozenBase, bank: Bank, slot: int, show: Show
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        metrics: dict[str, float] = {}
        said: list[dict[str, Any]] = [
            {"record": item.place, "prompt": _prompt(item.example), "references": list(item.references)}
            for item in self.data.items
        ]
        if self.samples:
            sum_N, count_N = losses(loaded, bank, slot, self.samples, len(said), show)
            mean = float(sum_N.sum() / count_N.sum())
            metrics |= {"loss": mean, "perplexity": perplexity(mean)}
            for record, loss in zip(said, (sum_N / count_N).tolist(), strict=True):
                record["loss"] = loss if loss == loss else None  # nothing of it was within the length
        if self.prompts:
            answers = self._answers(loaded, bank, slot, show)
            metrics |= answer_scores(self.names, answers, [item.references for item in self.data.items])
            for record, answer in zip(said, answers, strict=True):
                record["prediction"] = answer
        return metrics, said

    def _answers(self, loaded: FrozenBase, bank: Bank, slot: int, show: Show) -> list[str]:
        config = self.config
        decoder = Decoder(
            loaded.model,
            loaded.tokenizer,
            bank,
            rows=min(config.rows, len(self.prompts)),
            length=config.length,
            max_queued=len(self.prompts),
        )
        try:
            room = decoder.room(slot)
            for item, prompt in zip(self.data.items, self.prompts, strict=True):
                if len(prompt) + config.max_tokens > room:
                    raise DataError(
                        f"{item.place}: the prompt has {len(prompt)} tokens; with max_tokens={config.max_tokens} it "
                        f"exceeds the {room} that there are: raise length, or lower max_tokens"
                    )
            greedy = Sampling(max_tokens=config.max_tokens, temperature=0.0)
            tickets = decoder.submit([Request(prompt, greedy, slot=slot) for prompt in self.prompts])
            answers = []
            for item, ticket in zip(self.data.items, show.track(tickets, "answering"), strict=True):
                events = list(ticket)
                if events[-1].finish == "error":
                    raise ServeError(f"{item.place}: {events[-1].error}")
                answers.append("".join(event.text for event in events))
            return answers
        finally:
            decoder.close()


def _prompt(example: Any) -> Any:
    return example.prompt if example.prompt is not None else (example.messages or [])[:-1] or example.text


def losses(
    loaded: FrozenBase, bank: Bank, slot: int, samples: Sequence[Sample], records: int, show: Show
) -> tuple[Tensor, Tensor]:
    """Of each record the summed loss of its targets, and how many there are: [records] each, fp64.

    One sample a row, and the model's own logits: right for every architecture.
    """
    longest = getattr(text_config(loaded.model), "max_position_embeddings", None)
    length = max(len(sample.tokens) for sample in samples)
    if longest and length + sum(bank.lead(slot)) > longest:
        raise DataError(f"a record has {length} tokens, the base knows {longest} positions: lower length")
    rows = pack({slot: samples}, length=length, packing=False, leads={slot: bank.lead(slot)})
    pad = loaded.tokenizer.pad_token_id
    batches = deal(rows, rank=0, ranks=1, rows_per_pass=_LOSS_ROWS, pad_id=0 if pad is None else pad)
    sum_N, count_N = torch.zeros(records, dtype=torch.float64), torch.zeros(records, dtype=torch.float64)
    for batch in show.track(batches, "reading the references"):
        with bank.routed(batch.slot_BT, position_BT=batch.position_BT):
            loss_N, _ = plain_loss(loaded.model, batch.to(bank.device))
        number_N = batch.sample_BT[batch.labels_BT >= 0]
        sum_N.index_add_(0, number_N, loss_N.double().cpu())
        count_N.index_add_(0, number_N, torch.ones(len(number_N), dtype=torch.float64))
    return sum_N, count_N


class _Classifying:
    """A classification: the delta's own head and labels."""

    def __init__(
        self,
        config: Evaluation,
        data: EvalSet,
        names: Sequence[str],
        tokenizer: Any,
        task: Classification,
        longest: int | None,
    ) -> None:
        self.task, self.data, self.rows = task, data, config.rows
        self.renderer = TextEncoder(tokenizer, Data(length=config.length), task.labels or (), longest)
        self.samples = labelled(data.items, self.renderer)

    def __call__(
        self, loaded: FrozenBase, bank: Bank, slot: int, show: Show
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        encoder = loaded.model is bare(loaded.model)
        classifier = Classifier(bank, encoder=encoder, packed=False)
        engine = Engine(Zero(stage=0), stage=0, device=bank.device, dtype=torch.float32)
        pad = loaded.tokenizer.pad_token_id
        layout = Layout(self.renderer.length, self.rows, packing=False, pad_id=0 if pad is None else pad)
        stepper = Stepper(bare(loaded.model), bank, engine, classifier, layout)
        with show.waiting(f"classifying {len(self.samples)} texts"):
            said = predict(stepper, classifier, slot, self.samples)
        labels = self.task.labels or ()
        metrics = classification_metrics(said.label_N.tolist(), said.predicted_N.tolist())
        metrics["loss"] = float(said.loss_N.mean())
        records = [
            {"record": item.place, "text": text, "label": label, "prediction": labels[at], "loss": loss}
            for item, at, loss in zip(self.data.items, said.predicted_N.tolist(), said.loss_N.tolist(), strict=True)
            for text, label in [item.example.labelled or ("", "")]
        ]
        return metrics, records

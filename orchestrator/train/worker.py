"""One rank of a run, from config to delta: a table of contents."""

from pathlib import Path

import torch

from orchestrator.base import load_tokenizer
from orchestrator.config import Run
from orchestrator.delta import check_base, load_delta
from orchestrator.errors import OutOfMemoryError
from orchestrator.methods import method_of
from orchestrator.train.checkpoint import read_checkpoint
from orchestrator.train.classify import Classifier, evaluator
from orchestrator.train.fill import fill_slot, importance_of
from orchestrator.train.graph import Graphs
from orchestrator.train.loop import Loop
from orchestrator.train.loss import causal_lm_loss, plain_loss
from orchestrator.train.reporter import Reporter
from orchestrator.train.setup import (
    Place,
    first_rank_first,
    freeze_randomness,
    identify,
    load,
    look,
    open_engine,
    recompute,
    total_steps,
)
from orchestrator.train.step import Evaluate, Layout, Loss, Stepper
from orchestrator.train.task import prepare_run
from orchestrator.train.trial import Trial
from orchestrator.train.writer import DeltaWriter

SLOT = 0


def work(run: Run, place: Place, reporter: Reporter, *, start: Path | None = None) -> str:
    """Train one delta on this rank.

    Args:
        run: what to do.
        place: which rank this is; a process group is up where there are several.
        reporter: hears events, keeps checkpoints.
        start: a delta folder to continue from, when there is no checkpoint.

    Returns:
        Why it ended: ``finished``, ``stopped early``, or what told it to stop.
    """
    freeze_randomness(run.train.seed)
    method_of(run.method)  # knows what the config alone cannot
    tokenizer = load_tokenizer(run.base)
    engine = open_engine(run, place, reporter.event)
    parent = load_delta(start) if start else None
    data = first_rank_first(engine, lambda: prepare_run(run, tokenizer, parent))
    reporter.event("data", {**data.report.as_dict(), "task": data.task.model_dump(mode="json")})
    origin = identify(run, engine, tokenizer)
    engine.same("data", data.digest)
    with reporter.restored() as folder:
        restored = read_checkpoint(folder, run.name) if folder else None
    for delta in (parent, restored.delta if restored else None):
        for warning in check_base(delta.manifest, origin.identity) if delta else ():
            reporter.event("warning", {"text": warning})
    ground = load(run, engine, origin)
    bank, model = ground.bank, ground.model
    measure = importance_of(ground, run, data, SLOT)
    knobs = fill_slot(bank, SLOT, run, data.task, restored, parent, measure)
    engine.broadcast(list(bank.windows(SLOT).values()), rank=0)  # singular vectors may differ between machines
    if run.train.recompute:
        recompute(ground)
    found = look(ground, run, SLOT, reporter.event)
    train = run.train.model_copy(update={"lr": run.lr})
    layout = Layout(run.data.length, run.train.rows_per_pass, run.data.packing and found.packs, tokenizer.pad_token_id)
    loss: Loss = causal_lm_loss if found.in_head else plain_loss
    if ground.classifies:
        loss = classifier = Classifier(bank, encoder=ground.encoder, packed=layout.packing)
    graphs = None
    if loss is causal_lm_loss and engine.stage != 3 and not run.train.recompute and not run.method.whole_base:
        graphs = Graphs.of(model, bank, place.device, run.data.length, reporter)
    stepper = Stepper(model, bank, engine, loss, layout, graphs)
    evaluate: Evaluate = evaluator(stepper, classifier) if ground.classifies else stepper.evaluate
    loop = Loop(
        train=train,
        stepper=stepper,
        trial=Trial(bank, engine, SLOT, train, total_steps(run, data)),
        source=data.train,
        held_out=data.eval,
        evaluate=evaluate,
        engine=engine,
        reporter=reporter,
        writer=DeltaWriter.of(run, ground.base.identity, bank, SLOT, knobs, data, parent),
    )
    if restored:
        loop.restore(restored)
    try:
        return loop.run()
    except torch.OutOfMemoryError as e:
        raise OutOfMemoryError(
            f"out of GPU memory in step {loop.trial.step + 1}: lower train.rows_per_pass ({run.train.rows_per_pass}), "
            f"or data.length ({run.data.length}), set train.recompute=true, or shard=3"
        ) from e
    finally:
        engine.close()

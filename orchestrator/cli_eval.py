"""``manta eval``: a delta or the bare base on a set of records; metrics, predictions, and a promotion on condition."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.config import Base, Evaluation, home
from orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from orchestrator.evaluate import Result, Subject
    from orchestrator.evaluate_show import Show
    from orchestrator.registry import Registry


def evaluate(
    ref: Annotated[str, typer.Argument(help="name, name:7, name@alias, a delta's folder, or base for the bare base")],
    data: Annotated[str, typer.Option(help="File, folder, glob, hub data set, or demo.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(help="Settings: base.quantize=nf4 data.split=test data.columns={prompt: q}", show_default=False),
    ] = None,
    metric: Annotated[list[str] | None, typer.Option(help="Metric; may be repeated; default: all that fit.")] = None,
    base: Annotated[str | None, typer.Option(help="Base: hub name or folder; default: the delta's own.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many records.", min=1)] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of an answer; default: 128.", min=1)] = None,
    output: Annotated[Path | None, typer.Option(help="Predictions (JSON lines); default: in $MANTA_HOME/runs.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    promote: Annotated[
        str | None, typer.Option(help="Make it champion if this metric is better than the champion's.")
    ] = None,
    uri: Annotated[str | None, typer.Option(help="Tracking URI; default: $MLFLOW_TRACKING_URI, else local.")] = None,
) -> None:
    """Evaluate a delta, or the bare base, on a set of records, here: on the CPU or one GPU.

    The base is held as it was in training, or as it will be served: base.quantize=none base.precision=bf16

    Metrics of generation: exact_match, bleu, rouge1, rouge2, rougeL, perplexity, loss; of classification: accuracy,
    f1, mcc, loss.
    """
    from orchestrator.config.load import load_evaluation
    from orchestrator.scores import check_metrics

    if wrong := [word for word in words or [] if "=" not in word]:
        raise ConfigError(f"{wrong[0]!r} is no setting; after the delta come settings as key=value")
    given: dict[str, Any] = {"delta": ref, "data.path": data, "base.id": base, "limit": limit, "max_tokens": max_tokens}
    named = list(dict.fromkeys([*(metric or []), *([promote] if promote and metric else [])]))
    given |= {"metrics": named or None, "tracking.uri": uri}
    config = load_evaluation([f"{k}={json.dumps(v)}" for k, v in given.items() if v is not None] + (words or []))
    check_metrics([*config.metrics, *([promote] if promote else [])])

    from orchestrator.evaluate import subject_of  # here and below, since it loads torch
    from orchestrator.evaluate_show import Show, check_output
    from orchestrator.registry import Registry
    from orchestrator.train.task import task_of

    output = check_output(output) if output else None
    show, registry = Show(), Registry(config.tracking)
    subject = subject_of(config.delta, registry)
    if promote and subject.version is None:
        raise ConfigError(f"--promote needs a registered delta, and {ref} is {'none' if subject.delta else 'the base'}")
    if promote and subject.delta:
        check_metrics([promote], task_of(subject.delta).type)
    result, told = run(config, subject, registry, show, output)
    if as_json:
        typer.echo(json.dumps(told, indent=2))
    else:
        for name, value in result.metrics.items():
            typer.echo(f"{name:<12}{value:.6g}")
    if promote:
        gate(config, result, promote, registry, show)


def run(
    config: Evaluation, subject: "Subject", registry: "Registry", show: "Show", output: Path | None
) -> tuple["Result", dict[str, Any]]:
    """Evaluate, and keep predictions and metrics; what was found, and the same in plain values."""
    from orchestrator.evaluate import evaluate as work
    from orchestrator.evaluate_show import write_predictions

    show.say(f"evaluate  {subject.ref} on {config.data.path}")
    result = work(config, subject, show)
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**6:06d}"
    file = output or home() / "runs" / f"eval-{stamp}" / "predictions.jsonl"
    write_predictions(file, result.predictions)
    done = result.as_evaluation(config)
    where = registry.log_evaluation(done, subject.version, file)
    show.say(f"records   {done.records} (digest {done.digest[:16]})")
    show.say(f"file      {file}")
    show.say(f"MLflow    {where}")
    told: dict[str, Any] = {"ref": done.ref, "data": done.data, "digest": done.digest, "records": done.records}
    told |= {"recipe": done.recipe, "metrics": dict(done.metrics), "predictions": str(file), "run": where}
    return result, told


def gate(config: Evaluation, result: "Result", metric: str, registry: "Registry", show: "Show") -> None:
    """Promote, after the champion has been evaluated in the same way, where it has not been."""
    from orchestrator.evaluate import subject_of
    from orchestrator.gate import holder_of, promote_if_better
    from orchestrator.registry import CHAMPION

    version = result.subject.version
    assert version is not None
    key = result.as_evaluation(config).key
    champion = holder_of(registry, version.name, CHAMPION)
    known = champion.evaluations.get(key, {"metrics": {}})["metrics"] if champion else {}
    if champion and champion.version != version.version and metric not in known:
        # Of the champion's own base, unless one was named; held as the candidate's was.
        asked = {key: getattr(config.base, key) for key in config.base.model_fields_set}
        held = {"quantize": result.base.quantize, "precision": result.base.precision}
        again = config.model_copy(update={"base": Base(**{**asked, **held}), "delta": champion.ref})
        theirs, _ = run(again, subject_of(champion.ref, registry), registry, show, None)
        show.say(f"champion  {champion.ref}: {metric} {theirs.metrics[metric]:.6g}")
    show.say(promote_if_better(registry, version.ref, metric, key=key).why)

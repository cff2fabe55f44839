"""``manta quickstart``: from nothing to a delta that answers beside its base, over HTTP."""

import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from openai import OpenAI
from rich.console import Console
from rich.table import Table

from orchestrator.config import Run, Serving
from orchestrator.config.load import load_run
from orchestrator.data.demo import demo_records
from orchestrator.errors import ServeError, TrainError
from orchestrator.launch.progress import ProgressPrinter
from orchestrator.launch.serve import serve
from orchestrator.launch.train import train
from orchestrator.report import tell

QUESTIONS = 50
SHOWN = 3
SETTINGS = (
    "name=quickstart",
    "shard=3",
    "data.eval_fraction=0.05",
    "data.length=256",
    "method={type: lora, rank: 16, alpha: 32}",
    "train={steps: 40, batch_size: 16, rows_per_pass: 8, lr: 3.0e-3, eval_every: 20, checkpoint_every: 20}",
    "cluster.workers=2",
    "cluster.gpus_per_worker=0",
)
"""``jobs/runs/quickstart.yaml``, for an installed package that has no such file; a test holds them equal."""


def quickstart(*, keep: bool) -> None:
    """Train on two sharded workers, register, serve, and ask base and delta the same held-out questions.

    Args:
        keep: leave the endpoint up until Ctrl-C.

    Raises:
        ServeError: the delta answers less than it was taught.
    """
    console = Console(highlight=False)
    begin = time.monotonic()
    console.rule("1  train: a frozen 4-bit base, sharded over two workers")
    with ProgressPrinter() as progress:
        outcome = train(quickstart_run(), listen=progress)
    tell(outcome, console)
    if outcome.version is None:
        raise TrainError(f"the training was {outcome.why}; begin again with: manta quickstart")
    console.rule("2  serve: the base and its delta, one copy of the weights")
    name = f"{outcome.version.name}:{outcome.version.version}"
    endpoint = serve(Serving(deltas=(name,), port=_port(), length=512), block=False)
    try:
        console.rule("3  ask: the same held-out questions to both")
        base = _ask(endpoint.url, "demo")
        tuned = _ask(endpoint.url, name)
        _show(console, base, tuned, name)
        console.print(f"took      {time.monotonic() - begin:.0f} s")
        console.print(f"MLflow    {outcome.tracking_uri}", soft_wrap=True)
        console.print(f"          mlflow ui --backend-store-uri {outcome.tracking_uri}", soft_wrap=True)
        console.print(f"endpoint  {endpoint.url}", soft_wrap=True)
        if _score(tuned) < 0.9:
            raise ServeError(f"the delta answers {_score(tuned):.0%} of the questions, at least 90% were expected")
        if keep:
            console.print(
                f"try it    manta chat {name} --url {endpoint.url}   (Ctrl-C ends the endpoint)", soft_wrap=True
            )
            with suppress(KeyboardInterrupt):
                threading.Event().wait()
    finally:
        endpoint.stop()


def quickstart_run() -> Run:
    """The run, also to be found as ``jobs/runs/quickstart.yaml`` in the repository."""
    return load_run(None, SETTINGS)


def _port(first: int = 8000) -> int:
    """8000, or the next port that nobody has."""
    for port in range(first, first + 100):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise ServeError(f"no free port from {first} to {first + 99}")


def _ask(url: str, model: str) -> list[tuple[str, str, str]]:
    """Question, wanted answer, and what the model said, at temperature 0."""
    client = OpenAI(base_url=url, api_key="none", max_retries=2)

    def one(record: dict[str, str]) -> tuple[str, str, str]:
        answer = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": record["prompt"]}], temperature=0, max_tokens=96
        )
        return record["prompt"], record["completion"], (answer.choices[0].message.content or "").strip()

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(one, demo_records("test", QUESTIONS)))


def _score(answers: Sequence[tuple[str, str, str]]) -> float:
    return sum(wanted == said for _, wanted, said in answers) / len(answers)


def _show(
    console: Console, base: Sequence[tuple[str, str, str]], tuned: Sequence[tuple[str, str, str]], name: str
) -> None:
    table = Table(show_lines=True)
    for title in ("question", "base", name):
        table.add_column(title, overflow="fold")
    for (question, _, plain), (_, _, better) in list(zip(base, tuned, strict=True))[:SHOWN]:
        table.add_row(question, plain, better)
    console.print(table)
    console.print(f"exact match on {len(base)} held-out questions: base {_score(base):.0%}, {name} {_score(tuned):.0%}")

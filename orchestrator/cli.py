"""The command ``manta``: one function per thing a user types; what is heavy is imported only where it is used."""

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator import __version__
from orchestrator.cli_deltas import app as deltas
from orchestrator.cli_eval import evaluate
from orchestrator.cli_plan import plan
from orchestrator.cli_tune import tune
from orchestrator.errors import ConfigError, MantaError

app = typer.Typer(
    name="manta",
    help="Many tuned adapters on one frozen base: train, track and serve deltas on Ray.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(deltas, name="deltas", help="List, show, import, promote, export and clean up deltas.")
app.command("eval")(evaluate)
app.command("tune")(tune)
app.command()(plan)

Words = Annotated[
    list[str] | None,
    typer.Argument(help="A YAML file and/or settings: method.rank=32 data=my.jsonl", show_default=False),
]
Address = Annotated[str | None, typer.Option(help="Ray cluster; default: the job's own, else a local one.")]


@app.command()
def train(
    words: Words = None,
    resume: Annotated[str | None, typer.Option(help="Go on with the run of this id.")] = None,
    address: Address = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show samples, sizes and the plan; start nothing.")
    ] = False,
) -> None:
    """Train a delta, track it in MLflow and register it.

    Without a file: manta train base=Qwen/Qwen3-0.6B data=my.jsonl
    """
    from orchestrator.config.load import load_run

    path, overrides = split(words or [])
    if resume and path:
        raise ConfigError("--resume takes the run as it was started; leave the file out")
    run = load_run(path, () if resume else overrides)
    if dry_run and resume:
        raise ConfigError("--dry-run shows a run that has not begun; leave --resume out")
    if dry_run:
        from orchestrator.preview import preview

        preview(run, address=address)
        return
    from orchestrator.launch.progress import ProgressPrinter
    from orchestrator.launch.train import train as launch
    from orchestrator.report import tell

    with ProgressPrinter() as progress:
        outcome = launch(run, resume=resume, overrides=overrides if resume else (), address=address, listen=progress)
    tell(outcome)
    if not outcome.complete:
        raise typer.Exit(130 if "SIGINT" in outcome.why else 143)


@app.command()
def serve(words: Words = None, address: Address = None) -> None:
    """Serve a base and its deltas behind an OpenAI-compatible endpoint.

    Such as: manta serve base=Qwen/Qwen3-0.6B deltas=support,sql@candidate port=8000
    """
    from orchestrator.config.load import load_serving
    from orchestrator.launch.serve import serve as launch

    path, overrides = split(words or [])
    launch(load_serving(path, overrides), address=address)


@app.command()
def chat(
    model: Annotated[str | None, typer.Argument(help="Delta or base; default: the first that is served.")] = None,
    url: Annotated[str, typer.Option(help="The endpoint.")] = "http://127.0.0.1:8000/v1",
    message: Annotated[str | None, typer.Option("--message", "-m", help="Ask once and exit.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
) -> None:
    """Talk to a served delta in the terminal."""
    from orchestrator.chat import ask, converse

    if message is not None:
        ask(message, model=model, url=url, system=system)
    else:
        converse(model=model, url=url, system=system)


@app.command()
def doctor(address: Address = None) -> None:
    """Say what is installed, what the machine and the cluster offer, and what would go wrong."""
    from orchestrator.doctor import examine

    if not examine(address):
        raise typer.Exit(1)


@app.command()
def quickstart(
    keep: Annotated[
        bool | None, typer.Option("--keep/--no-keep", help="Keep the endpoint up; default: on a terminal.")
    ] = None,
) -> None:
    """Train a delta on the demo base with two sharded workers, register it, serve it, and ask both."""
    from orchestrator.quickstart import quickstart as start

    start(keep=sys.stdin.isatty() if keep is None else keep)


@app.command()
def schema(kind: Annotated[str, typer.Argument(help="run, search or serving")] = "run") -> None:
    """Print the JSON Schema of a run, search or serving file, for editors."""
    from orchestrator.config.schema import MODELS, json_schema

    for known in MODELS:
        if kind == known:
            typer.echo(json.dumps(json_schema(known), indent=2))
            return
    raise ConfigError(f"schema: {kind!r} is none of {', '.join(MODELS)}")


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def split(words: list[str]) -> tuple[Path | None, list[str]]:
    """A file, if one is named, and the settings.

    Raises:
        ConfigError: two files, or a word that is neither.
    """
    files = [w for w in words if "=" not in w]
    if len(files) > 1:
        raise ConfigError(f"one file at most, then settings as key=value; got {', '.join(files)}")
    return (Path(files[0]) if files else None), [w for w in words if "=" in w]


def main(arguments: list[str] | None = None) -> None:
    """Run the command; an error of ours is one message and an exit code, with MANTA_DEBUG=1 a traceback too."""
    quiet()
    try:
        code: Any = app(args=arguments, standalone_mode=False)
    except MantaError as e:
        if os.environ.get("MANTA_DEBUG"):
            raise
        typer.secho(f"error: {e}", fg="red", err=True)
        code = e.exit_code
    except KeyboardInterrupt:
        code = 130
    except typer.Exit as e:
        code = e.exit_code
    except Exception as e:
        show = getattr(e, "show", None)  # wrong usage: typer's own message
        if show is None:
            raise
        show()
        code = getattr(e, "exit_code", 2)
    sys.exit(code if isinstance(code, int) else 0)


def quiet() -> None:
    """Keep other libraries' notices out of the way of the run's own lines."""
    if os.environ.get("MANTA_DEBUG"):
        return
    warnings.filterwarnings("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # tells of a kernel that this project does not use
    for name, value in {
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
        "RAY_SERVE_LOG_TO_STDERR": "0",
    }.items():
        os.environ.setdefault(name, value)


if __name__ == "__main__":
    main()

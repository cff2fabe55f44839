"""``manta tune``: search for the best delta."""

from typing import Annotated

import typer

from orchestrator.errors import ConfigError


def tune(
    words: Annotated[
        list[str] | None,
        typer.Argument(help="A YAML file and/or settings: methods=[lora,bottleneck] budget=24", show_default=False),
    ] = None,
    resume: Annotated[str | None, typer.Option(help="Go on with the search of this id.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster; default: the job's own, else a local one.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the space, the first trials and the packs; start nothing.")
    ] = False,
) -> None:
    """Search method, rank, learning rate and more; many trials train at once on one base, and the best is registered.

    Without a file: manta tune base=Qwen/Qwen3-0.6B data=my.jsonl methods=[lora,bottleneck,prompt] budget=24
    """
    from orchestrator.cli import split
    from orchestrator.config.load import load_search

    path, overrides = split(words or [])
    if resume and path:
        raise ConfigError("--resume takes the search as it was started; leave the file out")
    if dry_run and resume:
        raise ConfigError("--dry-run shows a search that has not begun; leave --resume out")
    search = load_search(path, () if resume else overrides)
    if dry_run:
        from orchestrator.tell_search import tell_plan

        tell_plan(search)
        return
    from orchestrator.launch.tune import tune as launch
    from orchestrator.leaderboard import Leaderboard
    from orchestrator.tell_search import tell

    with Leaderboard() as board:
        outcome = launch(search, resume=resume, overrides=overrides if resume else (), address=address, listen=board)
    tell(outcome)
    if not outcome.complete:
        raise typer.Exit(130 if "SIGINT" in outcome.why else 143)

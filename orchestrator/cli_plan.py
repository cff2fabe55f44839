"""``manta plan``."""

import json
from pathlib import Path
from typing import Annotated

import typer

Words = Annotated[
    list[str] | None,
    typer.Argument(help="A run's or a search's YAML file and/or settings: method.rank=32", show_default=False),
]


def plan(
    words: Words = None,
    gpu: Annotated[str | None, typer.Option(help="Plan for this GPU, such as h100, h200, a100, l4, rtx4090.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory of each GPU, such as 80GiB.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="How many, a worker on each.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster whose GPUs are asked for.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines: bytes and seconds.")] = False,
) -> None:
    """Predict memory, step time and pack size before anything starts, and propose settings that fit.

    Such as: manta plan run.yaml --gpu h100 --gpus 4
    """
    from orchestrator.cli import split
    from orchestrator.config.load import load_run, load_search
    from orchestrator.plan import plan as predict
    from orchestrator.plan_device import find_device
    from orchestrator.plan_show import show_plan

    path, overrides = split(words or [])
    work = load_search(path, overrides) if _is_search(path, overrides) else load_run(path, overrides)
    asked = work.cluster.gpus_per_worker
    device = find_device(
        work.cluster.workers.min,
        gpu=gpu,
        memory=memory,
        gpus=gpus,
        address=address,
        wants_gpu=None if asked == "auto" else asked == 1,
    )
    if as_json:
        typer.echo(json.dumps(predict(work, device).as_dict(), indent=2))
        return
    show_plan(work, device=device)


def _is_search(path: Path | None, overrides: list[str]) -> bool:
    """Whether file or settings have a key that only a search has."""
    from orchestrator.config import Run, Search
    from orchestrator.config.document import read_yaml

    own = set(Search.model_fields) - set(Run.model_fields)
    keys = {word.partition("=")[0].split(".")[0].strip() for word in overrides}
    if path is not None and path.is_file():
        document = read_yaml(path.read_text(), str(path)).value
        keys |= set(document) if isinstance(document, dict) else set()
    return bool(keys & own)

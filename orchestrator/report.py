"""What the command says at the end of a run."""

from rich.console import Console

from orchestrator.launch.train import Outcome
from orchestrator.registry import Version


def tell(outcome: Outcome, console: Console | None = None) -> None:
    """Where the delta is, how good it is, and what to type next."""
    console = console or Console(stderr=True, highlight=False)
    figures = ", ".join(f"{name} {value:.4f}" for name, value in outcome.metrics.items())
    console.print(f"[bold]{outcome.why}[/bold]{f': {figures}' if figures else ''}")
    console.print(f"delta     {outcome.delta}", soft_wrap=True)
    console.print(f"MLflow    {outcome.tracking_uri}", soft_wrap=True)
    if outcome.version is None:
        console.print(f"go on     manta train --resume {outcome.run_id}", soft_wrap=True)
        return
    name = f"{outcome.version.name}:{outcome.version.version}"
    aliases = "".join(f" @{alias}" for alias in outcome.version.aliases)
    console.print(f"version   {name}{aliases}", soft_wrap=True)
    for line in _uses(outcome.version):
        console.print(line, soft_wrap=True, markup=False)
    console.print(f"promote   manta deltas promote {name}", soft_wrap=True)


def _uses(version: Version) -> list[str]:
    """How to run it: an endpoint serves what gives texts and can stand beside other deltas."""
    if version.tags.get("manta.method") == "peft":
        folder = f"manta deltas export {version.ref} --peft DIR"
        return [f"try it    manta eval {version.ref} --data FILE", f"use it    with the peft library, from: {folder}"]
    if version.tags.get("manta.task") == "classification":
        return [f"try it    manta eval {version.ref} --data FILE"]
    return [f"serve it  manta serve deltas={version.ref}"]

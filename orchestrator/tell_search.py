"""What the command says of a search: before it begins, and at its end."""

from rich.console import Console

from orchestrator.config import Search
from orchestrator.launch.sizing import SLOTS_CPU
from orchestrator.launch.tune import SearchOutcome
from orchestrator.search.lanes import lanes
from orchestrator.search.points import dimensions, labels
from orchestrator.search.space import first_points, size

_SHOWN = 5


def tell(outcome: SearchOutcome, console: Console | None = None) -> None:
    """Which trial won, where its delta is, and what to type next."""
    console = console or Console(stderr=True, highlight=False)
    study, rows = outcome.study, list(outcome.study.rows.values())
    counts = {state: sum(row.state == state for row in rows) for state in ("finished", "stopped", "failed")}
    said = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    console.print(f"[bold]{outcome.why}[/bold]: {len(rows)} trials{f' ({said})' if said else ''}")
    for reason in sorted({row.reason for row in rows if row.reason})[:_SHOWN]:
        console.print(f"failed    {reason}", soft_wrap=True, markup=False)
    if outcome.winner is not None:
        values = ", ".join(f"{m} {v:.4f}" for m in study.metrics if (v := outcome.winner.value(m)) is not None)
        point = ", ".join(f"{key}={value}" for key, value in outcome.winner.params.items())
        console.print(f"best      {outcome.winner.trial}: {values}  ({point})", soft_wrap=True, markup=False)
    console.print(f"report    {outcome.report}", soft_wrap=True)
    console.print(f"MLflow    {outcome.tracking_uri}", soft_wrap=True)
    if outcome.version is None:
        console.print(f"go on     manta tune --resume {outcome.search_id}", soft_wrap=True)
        return
    name = f"{outcome.version.name}:{outcome.version.version}"
    aliases = "".join(f" @{alias}" for alias in outcome.version.aliases)
    console.print(f"delta     {outcome.delta}", soft_wrap=True)
    console.print(f"version   {name}{aliases}", soft_wrap=True)
    console.print(f"serve it  manta serve deltas={name}", soft_wrap=True)
    console.print(f"promote   manta deltas promote {name}", soft_wrap=True)


def tell_plan(search: Search, console: Console | None = None) -> None:
    """The space, the points that come first, and the packs; nothing is started."""
    console = console or Console(highlight=False, markup=False)
    count = size(search)
    console.print(f"search {search.name} on {search.base.id}: {f'{count:,} points' if count else 'a continuous space'}")
    first = first_points(search)
    for number, label in enumerate(labels(search)):
        console.print(f"  {label}", soft_wrap=True)
        for d in dimensions(search, number):
            ends = ", ".join(map(str, d.range.values))
            console.print(f"    {d.name:<28} {d.range.form} [{ends}], first {first[number][d.name]}", soft_wrap=True)
    budget = search.budget.model_dump(exclude_none=True)
    console.print(f"budget    {', '.join(f'{value:,} {key}' for key, value in budget.items()) or 'the whole grid'}")
    console.print(f"judged by {', '.join(o.metric for o in search.objective)}")
    asked = search.packs.slots
    slots = f"{SLOTS_CPU} trials at once on CPUs, on a GPU as many as fit" if asked == "auto" else f"{asked} at once"
    for lane, alone in lanes(search).items():
        console.print(f"pack      {lane}: {'one trial after the other' if alone else slots}")
    console.print("what fits where: manta plan, with the same file")

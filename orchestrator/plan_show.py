"""A plan as a table, and as lines to paste."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.config import Run, Search
from orchestrator.plan import Option, Plan, plan
from orchestrator.plan_device import Device, find_device

GIB = 2**30
_PARTS = (
    ("base", "base"),
    ("gathered", "base, gathered at once"),
    ("delta", "deltas and optimizer"),
    ("kept", "activations"),
    ("passing", "loss head, gradients, passing"),
    ("workspace", "cuBLAS"),
    ("own", "driver, allocator"),
)
"""Fields of ``Memory`` and what the table calls them."""


def show_plan(work: Run | Search, *, device: Device | None = None, console: Console | None = None) -> Plan:
    """Print the plan of a run or a search; ``device`` by default this machine's."""
    if device is None:
        asked = work.cluster.gpus_per_worker
        device = find_device(work.cluster.workers.min, wants_gpu=None if asked == "auto" else asked == 1)
    made = plan(work, device)
    console = console or Console()
    console.print(Text(title(made), "bold"))
    console.print(_table(made))
    for line in lines(made):
        console.print(Text(line), soft_wrap=True, highlight=False)
    return made


def title(made: Plan) -> str:
    """One line: what is planned for what."""
    d = made.device
    return f"{made.kind} {made.name}, {made.method}, on {d.count} x {d.name} ({d.memory / GIB:.1f} GiB)"


def lines(made: Plan) -> Iterator[str]:
    """What to know, and what to change."""
    yield from (f"note: {note}" for note in made.notes)
    if made.overrides:
        yield f"proposed: {' '.join(made.overrides)}"
    elif made.asked.fits:
        yield "proposed: nothing to change"


def verdict(option: Option, device: Device) -> str:
    """Whether it fits, and by how much."""
    room = (device.memory - option.memory.needed) / GIB
    return f"yes, {room:.1f} GiB free" if option.fits else f"no, {max(0.0, -room):.1f} GiB too much"


def step_time(option: Option) -> str:
    """A pass's time, and the tokens per second of all devices' deltas on one device."""
    if option.seconds is None:
        return "unknown"
    low, high = option.seconds
    slow, fast = (option.tokens_per_pass / s for s in (high, low))
    return f"{_ms(low)} to {_ms(high)} ({_round(slow)} to {_round(fast)} tokens/s)"


def _size(count: int) -> str:
    return f"{count / GIB:7.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:7.2f} MiB"


def _ms(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"


def _round(rate: float) -> str:
    return f"{float(f'{rate:.2g}'):,.0f}"


def _table(made: Plan) -> Table:
    options = [made.asked, *([made.proposed] if made.proposed else [])]
    table = Table(box=None, pad_edge=False, show_header=len(options) > 1)
    for head in ("", "as asked", "proposed")[: 1 + len(options)]:
        table.add_column(head, justify="left", overflow="fold")

    def row(label: str, values: list[str], style: str = "") -> None:
        table.add_row(f"  {label}", *values, style=style)

    if made.kind == "search" or any(o.slots > 1 for o in options):
        row("trials at once", [str(o.slots) for o in options])
    row("ZeRO stage", [f"{o.stage} ({'sharded' if o.stage == 3 else 'replicated'})" for o in options])
    row("rows of a pass", [f"{o.rows_per_pass} ({o.tokens_per_pass:,} tokens)" for o in options])
    row("recompute", ["yes" if o.recompute else "no" for o in options])
    for name, label in _PARTS:
        values = [getattr(o.memory, name) for o in options]
        if any(values):
            row(label, [_size(v) for v in values])
    row("needed in all", [_size(o.memory.needed) for o in options], "bold")
    if any(o.memory.graphs for o in options):
        row("CUDA graphs, where there is room", [_size(o.memory.graphs) for o in options])
    row("while loading", [_size(o.memory.loading) for o in options])
    row("fits", [verdict(o, made.device) for o in options], "bold")
    row("a pass", [step_time(o) for o in options])
    row("passes of a step", [f"up to {o.passes}" for o in options])
    return table

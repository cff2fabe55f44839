"""What ``manta plan`` predicts beside every figure of memory and time that was measured.

    python jobs/bench/plan.py --out jobs/bench/plan.md             # no GPU needed
    python jobs/bench/plan.py --measure --log jobs/bench/plan.jsonl  # on a GPU host, two minutes; goes on where it was

The measured figures are those of the tables in this folder, and of the log where there is one. None of them went into
the prediction of memory, which rehearses the run's code on shapes; those of time set the shares of a GPU's rates that
are reached (``orchestrator/train/devices.py``).
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpu import base_folder

from orchestrator.config import Base, CausalLM, Classification, Lora, Method, Zero
from orchestrator.train.devices import GPUS, find_gpu, step_seconds
from orchestrator.train.estimate import Estimator, Shape

HERE = Path(__file__).parent
GIB, MIB = 2**30, 2**20
ZERO_SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 42,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "tie_word_embeddings": False,
}
"""The model of ``zero_memory.py``."""


@dataclass(frozen=True)
class Row:
    """One figure."""

    source: str
    what: str
    predicted: float
    measured: float
    unit: str
    remark: str = ""

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class Time:
    """One step's time, and the range that was predicted, in ms."""

    source: str
    what: str
    low: float
    high: float
    measured: float


def cells(path: Path) -> Iterator[list[str]]:
    """Rows of a file's tables."""
    for line in path.read_text().splitlines():
        if line.startswith("|") and not line.startswith("|-"):
            yield [cell.strip() for cell in line.split("|")[1:-1]]


# ---- one GPU, a Llama shape


def llama(scratch: Path, shape: str, quantize: str, kernels: str = "auto") -> Estimator:
    """An estimator of a shape of ``gpu.py``."""
    folder = scratch / shape
    folder.mkdir(exist_ok=True)
    base = Base(id=str(base_folder(shape, folder)), random_init=0, quantize=quantize, kernels=kernels)
    return Estimator(base, CausalLM(), gpu=True)


def gpu_rows(scratch: Path) -> tuple[list[Row], list[Time]]:
    """``gpu.md``: this project's rows."""
    made, shape, rows, times = llama(scratch, "8b", "nf4"), None, [], []
    for line in (HERE / "gpu.md").read_text().splitlines():
        if line.startswith("## "):
            count, _, rest = line[3:].partition(" x ")
            shape = Shape(int(count), int(rest.split(",")[0]), recompute="recompute" in rest)
        if line.startswith("| Manta, replicated") and shape:
            cell = [c.strip() for c in line.split("|")[1:-1]]
            what = f"8b NF4, {shape.rows} x {shape.length}{', recompute' if shape.recompute else ''}"
            memory = made.memory((Lora(),), shape)
            rows.append(Row("gpu.md", what, memory.allocated / GIB, float(cell[4]), "GiB"))
            work, graphed = made.footprint((Lora(),), shape).work, made.graphed((Lora(),), shape)
            low, high = step_seconds(GPUS["h200"], work, passes=1, graphed=graphed)
            took = shape.rows * shape.length / float(cell[1].replace(",", ""))
            times.append(Time("gpu.md", what, low * 1e3, high * 1e3, took * 1e3))
    return rows, times


def memory_rows(scratch: Path) -> list[Row]:
    """``memory.md``, which was made without Liger's kernels: LoRA on a bf16 and an NF4 base, no CUDA graphs."""
    out = []
    shapes = [Shape(n, 2048, r, keep_gradients=False) for n in (1, 4) for r in (False, True)]
    for cell in cells(HERE / "memory.md"):
        if cell[1] not in ("LoRA on bf16", "QLoRA (NF4)"):
            continue
        quantize = "none" if "bf16" in cell[1] else "nf4"
        made = llama(scratch, cell[0], quantize, kernels="none")
        found = made.footprint((Lora(),), shapes[0])
        held = made.memory((Lora(),), shapes[0]).base + found.delta + found.moments + found.gradients + made.workspace
        what = f"{cell[0]} {'bf16' if quantize == 'none' else 'NF4'}"
        out.append(Row("memory.md", f"{what}, held", held / GIB, float(cell[3]), "GiB"))
        for shape, text in zip(shapes, cell[6:], strict=True):
            told = f"{what}, {shape.rows} x 2048{', recompute' if shape.recompute else ''}"
            memory = made.memory((Lora(),), shape)
            # Without graphs: that part of the sum is not taken there.
            allocated = memory.allocated - (found.gradients if made.graphed((Lora(),), shape) else 0)
            out.append(Row("memory.md", told, allocated / GIB, float(text.split()[0]), "GiB"))
    return out


# ---- an encoder, every method


def methods_rows(scratch: Path) -> list[Row]:
    """``methods.md``, column MiB: the MiniLM encoder in fp32, 32 texts of 128 tokens, on an H100."""
    from methods_settings import SETTINGS
    from transformers import BertConfig

    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    BertConfig(**shape).save_pretrained(scratch / "minilm")
    base = Base(id=str(scratch / "minilm"), random_init=0, quantize="none", precision="fp32", kernels="none")
    made = Estimator(base, Classification(labels=("no", "yes"), pooling="mean"), gpu=True, encoder=True)
    out = []
    for cell in cells(HERE / "methods.md"):
        if len(cell) == 11 and cell[0] in SETTINGS:
            memory = made.memory((SETTINGS[cell[0]].knobs,), Shape(32, 128))
            out.append(Row("methods.md", cell[0], memory.allocated / MIB, float(cell[10].replace(",", "")), "MiB"))
    return out


# ---- ZeRO-3 on CPU ranks


def zero_rows(scratch: Path) -> list[Row]:
    """``zero_memory.md``: what each rank holds of a sharded 4-bit base, and the peak while it is loaded."""
    from transformers import LlamaConfig

    folder = scratch / "zero"
    LlamaConfig(**ZERO_SHAPE).save_pretrained(folder)
    zero = Zero(stage=3)
    made = Estimator(Base(id=str(folder), random_init=0), CausalLM(), gpu=False, zero=zero)
    out = []
    for cell in cells(HERE / "zero_memory.md"):
        if len(cell) == 10 and cell[1] == "Manta":
            memory = made.memory((Lora(rank=8),), Shape(1, 8, stage=3, ranks=int(cell[0])))
            ranks = f"NF4 in {cell[0]} rank{'s' if cell[0] != '1' else ''}"
            out.append(
                Row("zero_memory.md", f"{ranks}, held", memory.base / MIB, float(cell[2].replace(",", "")), "MiB")
            )
            peak = float(cell[4].replace(",", ""))
            out.append(Row("zero_memory.md", f"{ranks}, peak of load", memory.loading / MIB, peak, "MiB"))
    return out


# ---- the log of --measure


def log_rows(scratch: Path, log: Path) -> tuple[list[Row], list[Time]]:
    """What ``--measure`` found."""
    if not log.is_file():
        return [], []
    from plan_measure import cases

    found = {one["case"]: one for one in map(json.loads, log.read_text().splitlines())}
    rows, times, made = [], [], {}
    for case in cases():
        if "allocated" not in (one := found.get(case.name, {})):
            continue
        if case.shape not in made:
            made[case.shape] = llama(scratch, case.shape, "nf4")
        slots: tuple[Method, ...] = case.slots
        count = case.rows * len(slots)
        shape = Shape(count, case.length, case.recompute, packed=case.packed)
        kind = find_gpu(one["device"].split(" 80GB")[0])
        memory, estimator = made[case.shape].memory(slots, shape), made[case.shape]
        rows.append(Row(f"plan.jsonl, {kind.name}", case.name, memory.allocated / GIB, one["allocated"] / GIB, "GiB"))
        work, graphed = estimator.footprint(slots, shape).work, estimator.graphed(slots, shape)
        low, high = step_seconds(kind, work, passes=1, graphed=graphed)
        times.append(Time(f"plan.jsonl, {kind.name}", case.name, low * 1e3, high * 1e3, one["seconds"] * 1e3))
    return rows, times


def compare(log: Path) -> tuple[list[Row], list[Time]]:
    """Every figure there is."""
    with tempfile.TemporaryDirectory(prefix="manta-plan-") as folder:
        scratch = Path(folder)
        rows, times = gpu_rows(scratch)
        more, later = log_rows(scratch, log)
        return rows + memory_rows(scratch) + methods_rows(scratch) + zero_rows(scratch) + more, times + later


def report(rows: list[Row], times: list[Time]) -> str:
    """Markdown."""
    worst = max(rows, key=lambda r: abs(r.error))
    lines = [
        "# The plan beside what was measured",
        "",
        "Memory as torch counts it (`max_memory_allocated`; on CPU ranks as `zero_memory.md` says), predicted without "
        "a GPU by running the pass on shapes. LoRA r16 on all linear layers where nothing else is said. The tables "
        "give one or no decimal, so small figures are off by their rounding. Made by `python jobs/bench/plan.py`.",
        "",
        f"Of {len(rows)} figures the furthest is {worst.error:+.1%} ({worst.source}: {worst.what}).",
        "",
        "| measured in | | predicted | measured | error |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        digits = 1 if r.unit == "GiB" else 0
        lines.append(
            f"| {r.source} | {r.what} | {r.predicted:,.{digits + 1}f} {r.unit} | {r.measured:,.{digits}f} {r.unit} | "
            f"{r.error:+.1%} |"
        )
    lines += [
        "",
        "Time of a step: the model's range beside what was measured.",
        "",
        "| measured in | | predicted, ms | measured, ms | |",
        "|---|---|---|---|---|",
    ]
    for t in times:
        inside = "inside" if t.low <= t.measured <= t.high else "OUTSIDE"
        lines.append(f"| {t.source} | {t.what} | {t.low:,.0f} to {t.high:,.0f} | {t.measured:,.0f} | {inside} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="markdown table to write")
    parser.add_argument("--log", type=Path, default=HERE / "plan.jsonl", help="what --measure found")
    parser.add_argument("--measure", action="store_true", help="measure on this host's GPU what the log lacks")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    args = parser.parse_args()
    if args.measure:
        from plan_measure import measure_all

        measure_all(args.log, args.device)
        return
    text = report(*compare(args.log))
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()

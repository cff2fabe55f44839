"""The plan: memory beside what was measured on GPUs, bytes beside a base that is really loaded, and what it refuses."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from orchestrator.base import load_base
from orchestrator.base.empty import bytes_of, empty_held
from orchestrator.cli import app
from orchestrator.config import (
    IA3,
    Base,
    BitFit,
    Bottleneck,
    CausalLM,
    Classification,
    Full,
    LastLayers,
    Lora,
    Method,
    Norms,
    Prefix,
    Prompt,
    Run,
    Search,
    Sparse,
    Train,
    Zero,
)
from orchestrator.errors import ConfigError, OutOfMemoryError
from orchestrator.launch.pool import Shape as PackShape
from orchestrator.methods import Bank
from orchestrator.plan import plan
from orchestrator.plan_device import Device, find_device, read_bytes
from orchestrator.plan_show import show_plan
from orchestrator.search.size import size_pack
from orchestrator.train.devices import GPUS, find_gpu
from orchestrator.train.engine import Engine
from orchestrator.train.estimate import Estimator, Shape
from orchestrator.train.trial import MOMENTS, Trial
from tests import tiny

BENCH = Path(__file__).parents[1] / "jobs" / "bench"
GIB = 2**30
METHODS: list[Method] = [
    Lora(rank=4),
    Lora(rank=4, dora=True),
    Lora(rank=4, start="pissa"),
    Full(),
    LastLayers(layers=1),
    BitFit(),
    Sparse(density=0.01, choose="random"),
    Norms(),
    Prompt(tokens=5),
    Prefix(tokens=5),
    Bottleneck(size=8),
    IA3(),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save(tmp_path_factory.mktemp("plan") / "llama"))


@pytest.fixture(scope="module")
def made(folder: str) -> Estimator:
    return Estimator(Base(id=folder), CausalLM(), gpu=True)


@pytest.fixture(scope="module")
def bench() -> Any:
    sys.path.insert(0, str(BENCH))
    try:
        import plan as module

        yield module
    finally:
        sys.path.remove(str(BENCH))


# ---- beside what was measured


@pytest.mark.parametrize("part", ["gpu", "methods", "zero"])
def test_within_a_tenth_of_what_was_measured(bench, tmp_path, part):
    rows = bench.gpu_rows(tmp_path)[0] if part == "gpu" else getattr(bench, f"{part}_rows")(tmp_path)
    assert len(rows) == {"gpu": 3, "methods": 16, "zero": 6}[part]
    assert {r.what: f"{r.error:+.1%}" for r in rows if abs(r.error) > 0.1} == {}


@pytest.mark.slow
def test_full_tables_within_a_tenth(bench):
    rows, times = bench.compare(BENCH / "plan.jsonl")
    assert len(rows) >= 45
    assert {(r.source, r.what): f"{r.error:+.1%}" for r in rows if abs(r.error) > 0.1} == {}
    assert [t.what for t in times if t.source == "gpu.md" and not t.low <= t.measured <= t.high] == []


# ---- beside what is really there


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_bytes_of_the_base_are_those_of_a_loaded_one(folder, quantize):
    base = Base(id=folder, quantize=quantize)
    empty = empty_held(base, torch.float32, gpu=False, encoder=False, unquantized=frozenset())
    loaded = load_base(base)
    held = loaded.report.bytes_total + (loaded.report.state_bytes if quantize == "nf4" else 0)
    assert bytes_of(empty) == pytest.approx(held, rel=0.02)


@pytest.mark.parametrize("knobs", METHODS, ids=lambda k: f"{k.type}-{getattr(k, 'dora', '')}{getattr(k, 'start', '')}")
def test_bytes_of_delta_and_optimizer_are_those_of_a_real_slot(folder, knobs):
    base = Base(id=folder, quantize="none")
    model = load_base(base).model
    bank = Bank(model)
    bank.add(0, knobs)
    engine = Engine(Zero(), stage=0, device=torch.device("cpu"), dtype=torch.float32)
    trial = Trial(bank, engine, 0, Train(lr=1e-3, steps=10), 10)
    for leaf in bank.leaves().values():
        leaf.grad = torch.ones_like(leaf)
    bank.hand_out_gradients()
    trial.update()
    moments = sum(trial.optimizer.state[p][m].nbytes for p in trial.parameters.values() for m in MOMENTS)
    found = Estimator(base, CausalLM(), gpu=False).footprint((knobs,), Shape(2, 32))
    assert found.moments == moments
    assert found.gradients == sum(leaf.grad.nbytes for leaf in bank.leaves().values() if leaf.grad is not None)
    assert found.delta == sum(t.nbytes for t in bank.held())


def test_what_is_kept_is_what_autograd_really_keeps(folder):
    """Truth: the storages that a real forward pass on the CPU hands to autograd."""
    base = Base(id=folder, quantize="none", kernels="none")
    model = load_base(base).model
    bank = Bank(model)
    bank.add(0, Lora(rank=4))
    seen: dict[int, int] = {}

    def see(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)  # so that no address is given out again
        return tensor

    kept: list[torch.Tensor] = []
    slot_BT, tokens_BT = torch.zeros(2, 32, dtype=torch.long), torch.randint(3, 300, (2, 32))
    with bank.routed(slot_BT, steps={0: 0}), torch.autograd.graph.saved_tensors_hooks(see, lambda t: t):
        model.model(input_ids=tokens_BT)
    held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *bank.held())}
    real = sum(size for key, size in seen.items() if key not in held)
    found = Estimator(base, CausalLM(), gpu=False).footprint((Lora(rank=4),), Shape(2, 32))
    assert found.kept == pytest.approx(real, rel=0.1)


# ---- how it grows


def test_memory_grows_with_rows_length_rank_and_slots(made):
    def kept(rows: int = 2, length: int = 64, rank: int = 8, slots: int = 1, **more: Any) -> int:
        return made.memory((Lora(rank=rank),) * slots, Shape(rows, length, **more)).needed

    assert kept() < kept(rows=4) < kept(rows=8)
    assert kept() < kept(length=128)
    assert kept() < kept(rank=64)
    assert kept(rows=8) > kept(rows=8, recompute=True)
    assert kept(rows=4, slots=2, keep_gradients=False) < kept(rows=4, slots=4, keep_gradients=False)
    assert kept(rows=4, slots=4, keep_gradients=False) < kept(rows=4, slots=4, keep_gradients=False, in_order=False)
    assert kept(packed=True) > kept()


def test_a_shard_holds_less_and_all_hold_the_state(folder):
    made = Estimator(Base(id=folder), CausalLM(), gpu=True, zero=Zero(stage=3, persistence_threshold=0))
    whole, half, quarter = (made.memory((Lora(),), Shape(1, 64, stage=3, ranks=n)).base for n in (1, 2, 4))
    assert whole > half > quarter > whole / 4


def test_a_rehearsal_leaves_no_trace_in_the_process(folder, made):
    made.footprint((Lora(),), Shape(1, 32))
    assert load_base(Base(id=folder)).report.quantized_fraction > 0.9
    q = torch.randn(1, 2, 8, 16, requires_grad=True)
    assert torch.nn.functional.scaled_dot_product_attention(q, q, q).isfinite().all()


def test_an_encoder_and_a_decoder_that_classify(tmp_path):
    task = Classification(labels=("a", "b"))
    for arch, encoder in (("bert", True), ("llama", False)):
        base = Base(id=str(tiny.save(tmp_path / arch, arch)), quantize="none")
        found = Estimator(base, task, gpu=True, encoder=encoder).footprint((Lora(),), Shape(4, 32))
        assert found.peak >= found.kept > 0


# ---- proposals


def small(run: Run, gib: float, count: int = 1) -> Device:
    return Device("test", True, round(gib * GIB), count, GPUS["h200"])


def test_what_does_not_fit_is_mended_by_what_is_proposed(folder):
    run = Run(base=Base(id=folder), train=Train(rows_per_pass=64, batch_size=64))
    device = small(run, 0.75)
    said = plan(run, device)
    assert not said.asked.fits
    assert said.proposed is not None
    assert said.proposed.fits
    assert any(o.startswith("train.rows_per_pass=") for o in said.overrides)
    changed = run.model_copy(
        update={
            "train": run.train.model_copy(
                update={"rows_per_pass": said.proposed.rows_per_pass, "recompute": said.proposed.recompute}
            )
        }
    )
    assert plan(changed, device).asked.fits


def test_nothing_fits_is_said(folder):
    said = plan(Run(base=Base(id=folder)), small(Run(), 0.3))
    assert said.proposed is None
    assert not said.asked.fits
    assert any("nothing that was tried fits" in note for note in said.notes)


def search(folder: str, **more: Any) -> Search:
    from orchestrator.config.load import load_search

    given = {"base": folder, "methods": "[lora]", "data.length": 128, **more}
    return load_search(None, [f"{key}={value}" for key, value in given.items()])


def test_a_pack_is_as_large_as_memory_allows(folder):
    one = search(folder, budget=64)
    sizes = [size_pack(one, round(gib * GIB)).slots for gib in (0.7, 0.75, 4)]
    assert 1 <= sizes[0] < sizes[1] < sizes[2] == 64
    assert size_pack(search(folder, budget=5), 4 * GIB).slots == 5
    found = size_pack(one, round(0.75 * GIB))
    assert found.memory.needed <= 0.75 * GIB
    assert found.dearest.rank == 64, "the high end of the prior"
    assert size_pack(one, round(0.75 * GIB), methods=[Lora(rank=4)]).slots > sizes[1]


@pytest.mark.parametrize(
    ("kinds", "budget", "slots"), [(("L4",), 64, 64), (("L4", "H100"), 5, 5), (("Abacus",), 64, 16), ((), 64, 16)]
)
def test_a_pack_on_a_cluster_is_sized_by_its_smallest_gpu(folder, kinds, budget, slots, monkeypatch, caplog):
    offers = {"GPU": 1.0, **{f"accelerator_type:{kind}": 1.0 for kind in kinds}}
    monkeypatch.setattr("ray.cluster_resources", lambda: offers)
    one = search(folder, budget=budget)
    made = PackShape.of(one, {"shared": False}, gpu=True)
    assert (made.slots, made.count, made.gpu) == (slots, 1, 1.0)
    assert made.tokens == (None if slots == 16 else size_pack(one, GPUS["l4"].memory).rows_per_pass * 128)
    assert ("packs.slots gives another number" in caplog.text) == (slots == 16), "a guess is said to be one"
    # Two lanes on one GPU have half of it each.
    half = PackShape.of(one, {"shared": False, "last": False}, gpu=True)
    assert half.gpu == 0.5


def test_the_predicted_pack_is_what_a_rehearsal_of_all_its_slots_says(folder):
    found = size_pack(search(folder, budget=12, **{"train.rows_per_pass": 12}), GIB)
    made = Estimator(Base(id=folder), CausalLM(), gpu=True)
    shape = Shape(12, 128, packed=True, keep_gradients=False)
    assert found.slots == 12
    real = made.memory((found.dearest,) * 12, shape)
    assert found.memory.needed - found.memory.own == pytest.approx(real.needed - real.own, rel=0.02)


def test_no_room_for_one_trial_is_refused(folder):
    with pytest.raises(OutOfMemoryError, match=r"a pack of one lora trial .* GiB are there"):
        size_pack(search(folder), round(0.4 * GIB))


# ---- devices


@pytest.mark.parametrize("name", ["h200", "NVIDIA H200", "H100", "NVIDIA H100 80GB HBM3", "4090", "NVIDIA L4"])
def test_a_gpu_is_found_by_what_people_and_drivers_call_it(name):
    assert find_gpu(name).name in ("h200", "h100", "rtx4090", "l4")


def test_an_unknown_gpu_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"'h20' is not known; did you mean h200\?; known: a10g, .*--memory"):
        find_gpu("h20")


@pytest.mark.parametrize(("text", "count"), [("80GiB", 80 * GIB), ("24 gb", 24 * 10**9), ("40", 40 * GIB)])
def test_amounts_of_memory(text, count):
    assert read_bytes(text) == count


@pytest.mark.parametrize("text", ["", "many", "0", "-3GiB", "3 bananas"])
def test_no_amount_of_memory(text):
    with pytest.raises(ConfigError, match="80GiB"):
        read_bytes(text)


def test_no_speed_is_made_up_for_an_unknown_device(folder):
    said = plan(Run(base=Base(id=folder)), find_device(1, memory="8GiB"))
    assert said.asked.seconds is None
    out = io.StringIO()
    show_plan(Run(base=Base(id=folder)), device=find_device(1, memory="8GiB"), console=Console(file=out, width=100))
    assert "unknown" in out.getvalue()


# ---- the command


def test_json_of_a_run(folder):
    done = CliRunner().invoke(app, ["plan", f"base={folder}", "--gpu", "h200", "--gpus", "2", "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert set(said) == {"name", "kind", "method", "device", "asked", "proposed", "overrides", "notes"}
    assert said["device"] == {"name": "h200", "gpu": True, "memory": GPUS["h200"].memory, "count": 2}
    assert "cluster.workers=2" in said["overrides"]
    memory = said["asked"]["memory"]
    parts = ("base", "gathered", "delta", "kept", "passing", "workspace")
    assert memory["allocated"] == max(sum(memory[p] for p in parts), memory["loading"])
    assert memory["needed"] == memory["allocated"] + memory["own"]
    low, high = said["asked"]["seconds"]
    assert 0 < low < high


def test_a_search_is_told_by_its_keys(folder, tmp_path):
    path = tmp_path / "search.yaml"
    path.write_text(f"base: {folder}\nmethods: [lora, ia3]\ndata: {{length: 64, eval_fraction: 0.1}}\nbudget: 6\n")
    done = CliRunner().invoke(app, ["plan", str(path), "--gpu", "l4"])
    assert done.exit_code == 0, done.output
    assert "search search, lora, ia3, on 1 x l4" in done.output
    assert "packs.slots=6" in done.output


def test_the_table_adds_up(made):
    memory = made.memory((Lora(),), Shape(2, 64))
    assert replace(memory, kept=memory.kept + GIB).needed == memory.needed + GIB

"""The memory of a sharded base: the pieces the bench rests on, and the bench itself at a tiny size."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from torch import nn

from orchestrator.base import load_base
from orchestrator.base.monitor import GatherWatch
from orchestrator.config import Base
from tests import tiny

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("shape", [(5632, 320), (70, 24000), (64, 64), (33, 50), (1, 7)])
def test_quantizing_in_slices_gives_the_bits_of_the_whole(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.base import linear

    monkeypatch.setattr(linear, "_SLICE", 2**17)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    made = linear.NF4Linear(weight, None, torch.float32)
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True, quant_storage=torch.uint8
    )
    assert torch.equal(made.weight, packed)
    for name in ("absmax", "offset", "code"):
        assert torch.equal(getattr(made.state, name), getattr(state, name)), name
    assert torch.equal(made.state.state2.absmax, state.state2.absmax)
    state.dtype = torch.float32
    assert torch.equal(made.dequantize(torch.float32), bnb.dequantize_4bit(packed, state))


def test_each_module_is_sharded_before_the_next_is_read(tmp_path: Path) -> None:
    """So neither a layer's linears nor embedding and head, the largest tensors of a small model, add up."""
    handed: list[str] = []
    load_base(Base(id=str(tiny.save(tmp_path))), sharder=lambda m: handed.append(type(m).__name__))
    layer = [*["NF4Linear"] * 7, "LlamaRMSNorm", "LlamaRMSNorm", "LlamaDecoderLayer"]
    assert handed == [*layer, *layer, "Embedding", "LlamaRMSNorm", "Linear", "LlamaForCausalLM"]


@pytest.mark.slow
def test_a_load_takes_a_layer_more_than_it_leaves(tmp_path: Path) -> None:
    """In a process of its own, by the kernel's count: heap that is freed and kept would show."""
    shape = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6}
    big, small = (str(tiny.save(tmp_path / n, **s)) for n, s in (("big", shape), ("small", {})))
    code = (
        "import sys, torch; sys.path.insert(0, 'jobs/bench'); torch.set_num_threads(1)\n"
        "from zero_memory_count import Peak, storage_bytes\n"
        "from orchestrator.base import load_base; from orchestrator.config import Base\n"
        f"load_base(Base(id={small!r}))\n"  # what is imported on first use
        f"identity = load_base(Base(id={small!r})).identity\n"
        f"peak = Peak(); base = load_base(Base(id={big!r}), identity=identity)\n"
        "found = [m for m in base.model.modules() if hasattr(m, 'state')]\n"
        "held = storage_bytes(base.model, [m.state for m in found])\n"
        "layer = sum(p.numel() * p.element_size() for p in base.model.model.layers[0].parameters())\n"
        "print('counted', peak.bytes() - held, layer, held)\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    counted = next(line for line in done.stdout.splitlines() if line.startswith("counted"))
    excess, layer, held = map(int, counted.split()[1:])
    assert held > 6 * layer
    assert excess < layer + 8 * 2**20, "one tensor as it is read, and what quantizing a slice of it takes"


class Keeps(nn.Module):
    """A layer whose "gather" makes a new storage; may hold on to it."""

    def __init__(self, keep: bool) -> None:
        super().__init__()
        self.weight: Any = nn.Parameter(torch.zeros(0), requires_grad=False)
        self.weight.ds_id, self.weight.ds_persist, self.weight.ds_tensor = 0, False, torch.ones(8)
        self.kept: list[torch.Tensor] | None = [] if keep else None
        self.register_forward_pre_hook(self.gather)

    def gather(self, module: nn.Module, args: Any) -> None:
        self.weight.data = torch.ones(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kept is not None:
            self.kept.append(self.weight.data[1:])
        y = x @ self.weight.data
        self.weight.data = torch.zeros(0)
        return y


def test_the_watch_sees_what_a_view_keeps_alive() -> None:
    keeper, clean = Keeps(True), Keeps(False)
    model = nn.Sequential(keeper, clean, nn.Linear(4, 4))
    with GatherWatch(model) as watch:
        model(torch.ones(1, 4))
        assert watch.gathered_bytes == 2 * 64
        assert watch.alive_bytes() == 64
        keeper.kept.clear()  # type: ignore[union-attr]
        assert watch.alive_bytes() == 0
        model(torch.ones(1, 4))
        model(torch.ones(1, 4))
        assert watch.alive_bytes() == 2 * 64
        watch.reset()
        assert (watch.gathered_bytes, watch.alive_bytes()) == (0, 0)
    model(torch.ones(1, 4))
    assert watch.gathered_bytes == 0


def test_the_watch_leaves_out_what_is_not_gathered() -> None:
    layer = Keeps(True)
    layer.weight.ds_persist = True
    plain = SimpleNamespace(modules=lambda: [layer, nn.Linear(2, 2)])
    watch = GatherWatch(plain)  # type: ignore[arg-type]
    layer(torch.ones(1, 4))
    assert watch.gathered_bytes == 0


@pytest.mark.slow
def test_the_bench_at_a_tiny_size(tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    command = [sys.executable, "jobs/bench/zero_memory.py", "--ranks", "1", "2", "--layers", "2", "--hidden", "256"]
    command += ["--intermediate", "512", "--threshold", "1000", "--steps", "3", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {
        (row["side"], row["ranks"]): row["of"]
        for row in (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    }
    whole = found["ours", 1][0]["storage"] - found["ours", 1][0]["state"]
    for rank in found["ours", 2]:
        assert rank["storage"] - rank["state"] == pytest.approx(whole / 2, rel=0.01)
        assert rank["gathered_plain"] > 0
        assert (rank["alive_plain"], rank["alive_recompute"]) == (0, 0)
    for rank in found["theirs", 2]:
        assert rank["storage"] - rank["state"] == pytest.approx(whole, rel=0.01)
        assert rank["alive_plain"] > 0
    text = out.read_text()
    assert "--threshold 1000" in text
    assert "Persistence threshold: 1,000 elements" in text
    assert "Within 0.0001: yes" in text

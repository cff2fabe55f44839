"""Where the time of a training step goes, on one GPU, and what each way of doing it costs.

    python jobs/bench/gpu_profile.py --sizes 4x2048,4x2048r,1x512 --ways before,added,now

The base is loaded once; every way is timed at every size on it, with the parts of a real run: bank, stepper, trial.
A size is rows x tokens, with ``r`` for recomputation and ``p`` for rows of four packed sequences. The ways are written
into WAYS; each is a patch of the program as it is. The last way of each size is profiled: its kernels by class. The
losses of ``graph``, which goes through CUDA graphs, must be those of ``now``.
"""

import argparse
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu import SHAPES, base_folder
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from orchestrator.base import load_base
from orchestrator.config import Base, Lora, Train, Zero
from orchestrator.data import Sample
from orchestrator.methods import Bank
from orchestrator.train import loss as loss_module
from orchestrator.train.engine import Engine
from orchestrator.train.graph import Graphs
from orchestrator.train.step import Layout, Stepper
from orchestrator.train.trial import Trial

CLASSES = (
    ("attention", r"flash|fmha|attention|cudnn.*sdpa|sdpa"),
    ("dense weights", r"dense_weight|kDequantize|dequantize|_kernel_dense"),
    ("loss", r"cross_entropy|log_?softmax|logsumexp|softmax"),
    ("norm, SwiGLU, rotary", r"rms_norm|rmsnorm|swiglu|silu|rope"),
    ("GEMM", r"gemm|nvjet|cutlass|wgmma|sm90_xmma|cublas|splitK|gemv"),
    ("optimizer", r"multi_tensor|adam|lpnorm|foreach"),
    ("copies, casts", r"memcpy|memset|copy|Cast|fill|index|gather|scatter|cat"),
    ("elementwise", r"elementwise|vectorized|reduce"),
)
"""Names of kernels by class, the first that matches."""


@dataclass(frozen=True)
class Size:
    """What one step sees."""

    rows: int
    length: int
    recompute: bool
    packed: bool

    @classmethod
    def of(cls, text: str) -> "Size":
        found = re.fullmatch(r"(\d+)x(\d+)(r?)(p?)", text)
        assert found, f"{text} is not like 4x2048, 4x2048r, 4x2048p"
        return cls(int(found[1]), int(found[2]), bool(found[3]), bool(found[4]))


# ---- ways


@contextmanager
def _torch_loss() -> Iterator[None]:
    """Softmax in passes over fp32 copies, as before."""
    kept = loss_module.cross_entropy_

    def plain(logits_CV: Tensor, labels_C: Tensor) -> Tensor:
        exact_CV = logits_CV.float()
        log_z_C = exact_CV.logsumexp(1)
        label_C1 = labels_C.unsqueeze(1)
        losses_C = log_z_C - exact_CV.gather(1, label_C1).squeeze(1)
        p_CV = exact_CV.sub_(log_z_C.unsqueeze(1)).exp_()
        p_CV.scatter_add_(1, label_C1, torch.full_like(label_C1, -1, dtype=p_CV.dtype))
        logits_CV.copy_(p_CV)
        return losses_C

    loss_module.cross_entropy_ = plain
    try:
        yield
    finally:
        loss_module.cross_entropy_ = kept


@contextmanager
def _chunks(megabytes: int) -> Iterator[None]:
    kept, loss_module._CHUNK_BYTES = loss_module._CHUNK_BYTES, megabytes * 2**20
    try:
        yield
    finally:
        loss_module._CHUNK_BYTES = kept


def _attention(*order: SDPBackend) -> AbstractContextManager[Any]:
    made: AbstractContextManager[Any] = sdpa_kernel(list(order), set_priority=True)
    return made


WAYS: dict[str, tuple[bool, Callable[[], AbstractContextManager[Any]]]] = {
    "before": (False, _torch_loss),
    "added": (True, _torch_loss),
    "now": (True, nullcontext),
    "graph": (True, nullcontext),
    "chunk512": (True, lambda: _chunks(512)),
    "chunk1024": (True, lambda: _chunks(1024)),
    "cudnn": (True, lambda: _attention(SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)),
    "flash": (True, lambda: _attention(SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)),
}
"""Name -> whether a lone slot is added into the weights, and a patch. ``graph`` goes through CUDA graphs, too."""


# ---- one way at one size


def set_recompute(model: Any, on: bool) -> None:
    """As a run does, or back."""
    if on:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    model.train(on)


def parts_of(
    model: Any, device: torch.device, size: Size, fuse: bool, graphed: bool = False
) -> tuple[Bank, Stepper, Trial]:
    """What trains a LoRA of rank 16 on a loaded base."""
    bank = Bank(model, device=device, fuse=fuse)
    bank.add(0, Lora())
    engine = Engine(Zero(), stage=0, device=device, dtype=torch.bfloat16, rows_per_pass=size.rows)
    layout = Layout(size.length, size.rows, size.packed, 0)
    graphs = Graphs(model, bank, device=device, length=size.length, warn=print) if graphed else None
    stepper = Stepper(model, bank, engine, loss_module.causal_lm_loss, layout, graphs)
    return bank, stepper, Trial(bank, engine, 0, Train(lr=1e-4, steps=1000), 1000)


def samples_of(size: Size, vocabulary: int) -> list[Sample]:
    """Random tokens, all of them targets."""
    generator = torch.Generator().manual_seed(0)
    pieces = 4 if size.packed else 1
    tokens = torch.randint(3, vocabulary, (size.rows * pieces, size.length // pieces), generator=generator)
    return [Sample(row, [True] * len(row), key) for key, row in enumerate(tokens.tolist())]


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(model: Any, device: torch.device, size: Size, way: str, steps: int, profiled: bool) -> dict[str, Any]:
    """Times, memory, losses of one way; the table of kernels where asked for."""
    fuse, patch = WAYS[way]
    set_recompute(model, size.recompute)
    bank, stepper, trial = parts_of(model, device, size, fuse, graphed=way == "graph" and not size.recompute)
    samples = samples_of(size, model.config.vocab_size)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    losses, seconds, launched = [], [], []

    def step() -> None:
        begin = time.perf_counter()
        found = stepper.start({0: samples}, {0: trial.step})
        launched.append(time.perf_counter() - begin)
        trial.update()
        losses.append(found()[0])
        _sync(device)
        seconds.append(time.perf_counter() - begin)

    try:
        with patch():
            for _ in range(steps):
                step()
            table = _profile(step, statistics.median(seconds[3:])) if profiled else ""
    finally:
        bank.detach()
    median = statistics.median(seconds[3:steps])
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    tokens = sum(len(s.tokens) for s in samples)
    return {
        "ms": median * 1e3,
        "launch_ms": statistics.median(launched[3:steps]) * 1e3,
        "tokens_per_s": tokens / median,
        "gib": peak,
        "losses": losses[:8],
        "table": table,
    }


def _profile(step: Callable[[], None], plain_s: float, steps: int = 2) -> str:
    """Kernels by class, per step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
    kernels: dict[str, list[float]] = {}
    for event in profiler.events() or ():
        if str(event.device_type).endswith("CUDA"):
            kernels.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1e3)
    classes: dict[str, tuple[float, int]] = {}
    for name, times in kernels.items():
        kind = next((k for k, pattern in CLASSES if re.search(pattern, name, re.IGNORECASE)), "other")
        before = classes.get(kind, (0.0, 0))
        classes[kind] = before[0] + sum(times) / steps, before[1] + len(times) // steps
    busy = sum(ms for ms, _ in classes.values())
    lines = [f"  unprofiled step {plain_s * 1e3:.1f} ms, kernels {busy:.1f} ms"]
    for kind, (ms, count) in sorted(classes.items(), key=lambda item: -item[1][0]):
        lines.append(f"  {kind:24s} {ms:8.2f} ms {ms / plain_s / 10:5.1f} % {count:6d} kernels")
    for name, times in sorted(kernels.items(), key=lambda item: -sum(item[1]))[:30]:
        lines.append(f"    {sum(times) / steps:8.2f} ms {len(times) // steps:5d} x {name[:110]}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--sizes", default="4x2048,4x2048r,1x512")
    parser.add_argument("--ways", default="before,added,now")
    parser.add_argument("--steps", type=int, default=10, help="of each way; the first three are not counted")
    parser.add_argument("--quantize", default="nf4", choices=["nf4", "none"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--no-profile", action="store_true", help="times only")
    parser.add_argument("--log", type=Path, help="one line of JSON for each way and size")
    args = parser.parse_args()
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory(prefix="manta-profile-") as scratch:
        begin = time.monotonic()
        base = Base(id=str(base_folder(args.shape, Path(scratch))), random_init=0, quantize=args.quantize)
        loaded = load_base(base, device=device)
        model = loaded.model
        _sync(device)
        liger = "with" if loaded.report.fused_kernels else "WITHOUT"
        seconds = time.monotonic() - begin
        print(f"{_name(device)}; torch {torch.__version__}; {liger} Liger; loaded in {seconds:.1f} s", flush=True)
    for text in args.sizes.split(","):
        ways = args.ways.split(",")
        for way in ways:
            profiled = way == ways[-1] and not args.no_profile and device.type == "cuda"
            try:
                found = measure(model, device, Size.of(text), way, args.steps, profiled)
            except Exception as e:  # the next way may tell more
                print(f"{text:8s} {way:10s} FAILED {type(e).__name__}: {str(e)[:2000]}", flush=True)
                continue
            table = found.pop("table")
            told = f"{found['ms']:8.1f} ms ({found['launch_ms']:.1f} to launch)"
            told += f" {found['tokens_per_s']:8,.0f} tok/s {found['gib']:6.1f} GiB"
            losses = " ".join(f"{x:.5f}" for x in found["losses"])
            print(f"{text:8s} {way:10s} {told} losses {losses}", *([table] if table else []), sep="\n", flush=True)
            if args.log:
                with args.log.open("a") as log:
                    log.write(json.dumps({"size": text, "way": way, "quantize": args.quantize, **found}) + "\n")


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "CPU"


if __name__ == "__main__":
    main()

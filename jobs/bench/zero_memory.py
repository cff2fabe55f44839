"""Memory of a ZeRO-3 sharded 4-bit base on CPU ranks, beside transformers + peft + DeepSpeed, in one run.

    python jobs/bench/zero_memory.py --out jobs/bench/zero_memory.md

Makes a model of random bf16 weights in files, then starts 1, 2 and 4 ranks (gloo) of either side in turn. Each rank
says what it holds after load, how high its resident memory rose, and how many gathered bytes outlive a forward pass.
At the end the demo base trains on each number of ranks, and losses are compared.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from zero_memory_count import Peak, distinct_bytes, elements, state_tensors, storage_bytes, weights
from zero_memory_table import NAMES, report

LORA_RANK = 8


def main() -> None:
    args = _parser().parse_args()
    if args.task:
        _rank_main(json.loads(args.task))
        return
    with tempfile.TemporaryDirectory(prefix="manta-zero-") as scratch:
        folder = args.base or Path(scratch, "base")
        begin = time.monotonic()
        shape = {k: getattr(args, k) for k in ("hidden", "intermediate", "layers", "vocab")}
        make_base(folder, **shape)
        make_base(Path(scratch, "small"), **{**shape, "layers": 1, "hidden": 256, "intermediate": 256})
        size = sum(p.stat().st_size for p in folder.glob("*.safetensors")) / 2**30
        print(f"base of {size:.2f} GiB in files, made in {time.monotonic() - begin:.0f} s", flush=True)
        common = {"base": str(folder), "small": str(Path(scratch, "small")), "threshold": args.threshold}
        memory: list[dict[str, Any]] = []
        for ranks in args.ranks:
            for side in args.sides:
                found = spawn(Path(scratch), ranks, work=side, tokens=args.tokens, **common)
                memory.append({"side": side, "ranks": ranks, "of": found})
                print(json.dumps(memory[-1]), flush=True)
        losses = {n: spawn(Path(scratch), n, work="losses", steps=args.steps) for n in args.ranks if args.steps}
    command = f"python jobs/bench/zero_memory.py{_asked(args)}"
    curves = {ranks: found[0]["losses"] for ranks, found in losses.items()}
    text = report(command, args.threshold, args.tokens, memory, curves)
    print(text)
    if args.out:
        args.out.write_text(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--sides", nargs="+", choices=NAMES, default=list(NAMES))
    for name, size in (("hidden", 2048), ("intermediate", 5632), ("layers", 42), ("vocab", 4096)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--tokens", type=int, default=8, help="tokens of each rank's forward pass")
    parser.add_argument("--threshold", type=int, default=100_000, help="elements up to which a tensor stays whole")
    parser.add_argument("--steps", type=int, default=20, help="training steps of the comparison of losses; 0: none")
    parser.add_argument("--base", type=Path, help="where to keep the model's files, or to find them again")
    parser.add_argument("--out", type=Path, help="markdown table to write")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    return parser


def _asked(args: argparse.Namespace) -> str:
    """The options that shape the result, where they are not the defaults."""
    plain = _parser().parse_args([])
    changed = {k: v for k, v in vars(args).items() if k not in ("base", "out", "task") and v != getattr(plain, k)}
    return "".join(f" --{k} {' '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in changed.items())


# ---- the model


def make_base(folder: Path, *, hidden: int, intermediate: int, layers: int, vocab: int) -> None:
    """A model directory: config, tokenizer, and random bf16 weights in a file per six layers."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from orchestrator.base.files import DEMO

    if (folder / "model.safetensors.index.json").is_file():
        return
    heads = hidden // 64
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        pad_token_id=0,
    )
    config.save_pretrained(folder)
    for path in DEMO.glob("*token*"):
        shutil.copy(path, folder)
    draw = torch.Generator().manual_seed(0)
    part: dict[str, torch.Tensor] = {}
    index: dict[str, str] = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        part[name] = torch.empty(rows, columns, dtype=torch.bfloat16).normal_(0, 0.02, generator=draw)

    def flush(name: str) -> None:
        save_file(part, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(part, name))
        part.clear()

    for at in range(layers):
        stem = f"model.layers.{at}."
        for name in ("q", "k", "v", "o"):
            matrix(f"{stem}self_attn.{name}_proj.weight", hidden, hidden)
        for name in ("gate", "up"):
            matrix(f"{stem}mlp.{name}_proj.weight", intermediate, hidden)
        matrix(f"{stem}mlp.down_proj.weight", hidden, intermediate)
        for name in ("input", "post_attention"):
            part[f"{stem}{name}_layernorm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        if at % 6 == 5:
            flush(f"model-{at:05}.safetensors")
    matrix("model.embed_tokens.weight", vocab, hidden)
    matrix("lm_head.weight", vocab, hidden)
    part["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    flush("model-rest.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


# ---- ranks


def spawn(scratch: Path, ranks: int, **task: Any) -> list[dict[str, Any]]:
    """Run a task once a rank in processes of their own; what each found."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment = {
            **os.environ,
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
            "MANTA_HOME": folder,  # the hash of the weights is computed again each time, as at a first run
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        free.close()
        started = []
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, "-W", "ignore", __file__, "--task", json.dumps({**task, "folder": folder})]
            with Path(folder, f"{rank}.log").open("w") as log:
                started.append(subprocess.Popen(command, env={**environment, **own}, stdout=log, stderr=log))
        try:
            while any(p.poll() is None for p in started) and not any(p.poll() for p in started):
                time.sleep(0.2)
        finally:
            failed = [rank for rank, process in enumerate(started) if process.poll()]
            for process in started:  # where one failed, the others would wait for it
                process.kill()
                process.wait()
        if failed:
            ended = Path(folder, f"{failed[0]}.log").read_text()[-6000:]
            raise SystemExit(f"{task['work']} on {ranks} ranks: rank {failed[0]} failed\n{ended}")
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]


def _rank_main(task: dict[str, Any]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {"ours": ours, "theirs": theirs, "losses": losses_of}[task["work"]](task)
    Path(task["folder"], f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def ours(task: dict[str, Any]) -> dict[str, Any]:
    """The way of a training worker: hash, load shard by shard, bank, forward."""
    import torch

    from orchestrator.base import load_base, source_identity
    from orchestrator.base.linear import NF4Linear
    from orchestrator.base.model import decoder_layers
    from orchestrator.base.monitor import GatherWatch
    from orchestrator.config import Base, Lora, Zero
    from orchestrator.data import Sample, deal, pack
    from orchestrator.methods import Bank
    from orchestrator.train.engine import Engine
    from orchestrator.train.loss import causal_lm_loss
    from orchestrator.train.setup import first_rank_first

    zero = Zero(stage=3, persistence_threshold=task["threshold"])
    engine = Engine(zero, stage=3, device=torch.device("cpu"), dtype=torch.float32)
    load_base(Base(id=task["small"]), sharder=engine.sharder)  # what is imported on first use
    engine.barrier()
    peak, begin = Peak(), time.monotonic()
    identity = first_rank_first(engine, lambda: source_identity(Base(id=task["base"]), dtype=torch.float32))
    hashed = peak.bytes()
    engine.barrier()
    base = load_base(Base(id=task["base"]), sharder=engine.sharder, identity=identity)
    _, layers = decoder_layers(base.model)
    quantized = [m for m in layers.modules() if isinstance(m, NF4Linear)]
    states = [m.state for m in quantized]
    found = {
        "peak": peak.bytes(),
        "peak_anonymous": peak.anonymous(),
        "peak_hash": hashed,
        "seconds": time.monotonic() - begin,
        "storage": storage_bytes(base.model, states),
        "four_bit": sum(elements(m.weight) for m in quantized),
        "state": distinct_bytes(state_tensors(states)),
        "total": base.report.bytes_total,
        "layer": sum(elements(p) * p.element_size() for p in layers[0].parameters()),
        "layer_source": sum(weights(m) * 2 for m in layers[0].modules()),
        "parameters": base.report.parameters,
    }
    bank = Bank(base.model)
    model = engine.start(base.model)
    found |= {"storage_ready": storage_bytes(base.model, states), "peak_ready": peak.bytes()}
    found["whole"] = sum(elements(p) * p.element_size() for p in base.model.parameters() if p.ds_persist)
    bank.add(0, Lora(rank=LORA_RANK, alpha=LORA_RANK))
    size = task["tokens"]
    samples = [Sample(list(range(3, 3 + size)), [True] * size, key=k) for k in range(engine.ranks)]
    rows = pack({0: samples}, length=size, packing=False)
    (batch,) = deal(rows, rank=engine.rank, ranks=engine.ranks, rows_per_pass=1, pad_id=0)
    model.train()
    with GatherWatch(model) as watch:
        for mode in ("plain", "recompute"):
            if mode == "recompute":
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            watch.reset()
            with bank.routed(batch.slot_BT, position_BT=batch.position_BT, sample_BT=batch.sample_BT, steps={0: 0}):
                losses_N, _ = causal_lm_loss(model, batch)
                found[f"alive_{mode}"] = watch.alive_bytes()  # losses_N holds the graph
                found[f"gathered_{mode}"] = watch.gathered_bytes
                assert losses_N.requires_grad
            del losses_N
    engine.close()
    return found


def theirs(task: dict[str, Any]) -> dict[str, Any]:
    """from_pretrained in 4 bits under HfDeepSpeedConfig, LoRA by peft, deepspeed.initialize at stage 3."""
    import bitsandbytes as bnb
    import deepspeed
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.integrations import HfDeepSpeedConfig

    from orchestrator.base.monitor import GatherWatch
    from orchestrator.config import Zero
    from orchestrator.train.zero import deepspeed_config

    # The same section of ZeRO settings as ours; an optimizer, as the plain path has one.
    config = deepspeed_config(Zero(stage=3, persistence_threshold=task["threshold"]), rows_per_pass=1, cpu=True)
    config |= {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "zero_force_ds_cpu_optimizer": False,
    }
    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.init_distributed("gloo")
    known = HfDeepSpeedConfig(config)  # alive while from_pretrained runs, or transformers does not know of stage 3
    held = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )

    def load(folder: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=held, dtype=torch.float32)

    load(task["small"])
    torch.distributed.barrier()
    peak, begin = Peak(), time.monotonic()
    base = load(task["base"])
    base.config.use_cache = False
    quantized = [m for m in base.modules() if isinstance(m, bnb.nn.Linear4bit)]
    states = [m.weight.quant_state for m in quantized]
    found = {
        "peak": peak.bytes(),
        "peak_anonymous": peak.anonymous(),
        "storage": storage_bytes(base, states),
        "state": distinct_bytes(state_tensors(states)),
        "seconds": time.monotonic() - begin,
    }
    wrapped = get_peft_model(base, LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules="all-linear"))
    del known
    engine, *_ = deepspeed.initialize(
        model=wrapped, config=config, model_parameters=[p for p in wrapped.parameters() if p.requires_grad]
    )
    found |= {"storage_ready": storage_bytes(base, states, skip="lora_"), "peak_ready": peak.bytes()}
    tokens = torch.arange(3, 3 + task["tokens"]).unsqueeze(0)
    engine.train()
    with GatherWatch(engine.module) as watch:
        for mode in ("plain", "recompute", "reentrant"):
            if mode != "plain":
                base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": mode == "reentrant"})
                base.enable_input_require_grads()
            watch.reset()
            loss = engine(input_ids=tokens, labels=tokens).loss
            found[f"alive_{mode}"] = watch.alive_bytes()
            found[f"gathered_{mode}"] = watch.gathered_bytes
            assert loss.requires_grad
            del loss
    return found


def losses_of(task: dict[str, Any]) -> dict[str, Any]:
    """Losses of the demo base's training on the demo task."""
    import torch

    from orchestrator.base import load_base
    from orchestrator.config import Base, Data, Lora, Train, Zero
    from orchestrator.data import prepare
    from orchestrator.methods import Bank
    from orchestrator.train.engine import Engine
    from orchestrator.train.loss import causal_lm_loss
    from orchestrator.train.setup import first_rank_first
    from orchestrator.train.step import Layout, Stepper
    from orchestrator.train.trial import Trial

    engine = Engine(Zero(stage=3), stage=3, device=torch.device("cpu"), dtype=torch.float32)
    base = load_base(Base(id="demo"), sharder=engine.sharder)
    data = first_rank_first(engine, lambda: prepare(Data(length=256), base.tokenizer, seed=0))
    bank = Bank(base.model)
    bank.add(0, Lora(rank=LORA_RANK, alpha=2 * LORA_RANK), seed=0)
    layout = Layout(length=256, rows_per_pass=1, packing=True, pad_id=base.tokenizer.pad_token_id)
    stepper = Stepper(engine.start(base.model), bank, engine, causal_lm_loss, layout)
    trial = Trial(bank, engine, 0, Train(lr=2e-3), total=task["steps"])
    losses = []
    for step in range(task["steps"]):
        losses.append(stepper.train({0: data.train.take(12)}, {0: step})[0])
        trial.update()
    engine.close()
    return {"losses": losses}


if __name__ == "__main__":
    main()

"""A real set: a delta trained by Manta against one trained by plain transformers + peft, by BLEU on E2E NLG.

Both sides: the run in ``jobs/runs/e2e.yaml``, the same base in NF4 computed in fp32, the same batches in the same
order, the same start values, AdamW, learning rates and clipping. Ours goes through ``orchestrator.launch.train``, as
``manta train`` does; theirs is a plain loop on ``from_pretrained``. Both deltas are then loaded by peft on the same
dense base and answer the same prompts greedily, so that only training differs. Each part runs in a process of its
own and is kept in ``--out``: a second call does only what is missing.
"""

import argparse
import hashlib
import json
import math
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from e2e_report import report
from e2e_watch import Watch, keep

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # two threads that spin on a shared machine take each other's core
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

HERE = Path(__file__).parent
RUN = HERE.parent / "runs" / "e2e.yaml"
ANSWER = 128
"""Most tokens of an answer."""
FOLDERS = ("--data", "--out", "--report")


def main() -> None:
    args = arguments()
    out = args.out.absolute()
    if args.part:
        name, _, seed = args.part.partition(":")
        part(args, out, name, int(seed))
        return
    out.mkdir(parents=True, exist_ok=True)
    arms = ["theirs", "own"] if args.own_start else ["theirs"]
    for seed in args.seeds:
        do(args, out, "prepare", seed)
        for arm in ("ours", *arms):
            do(args, out, arm, seed)
            do(args, out, f"judge-{arm}", seed)
    do(args, out, "judge-bare", args.seeds[0])
    command = shlex.join(["python", "jobs/bench/e2e.py", *shown(sys.argv[1:])])
    text = report(out, load(args, args.seeds[0]), held_out(args), args.seeds, args.own_start, command)
    args.report.write_text(text, encoding="utf-8")
    print(text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train_10k.jsonl and test_grouped.jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one pair of runs each (default: 0)")
    parser.add_argument("--prompts", type=int, default=630, help="prompts to answer (default: 630, all)")
    parser.add_argument("--own-start", action="store_true", help="a third run: peft with start values of its own")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the run")
    parser.add_argument("--out", type=Path, default=Path("out/e2e"), help="what the parts leave (default: out/e2e)")
    parser.add_argument("--report", type=Path, default=HERE / "e2e.md", help="the table (default: beside this script)")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # NAME:SEED, in a process of its own
    return parser.parse_args()


def shown(argv: list[str]) -> list[str]:
    """The command without this machine's folders."""
    short, hide = [], ""
    for word in argv:
        key, equals, _ = word.partition("=")
        short.append(hide or (f"{key}=DIR" if equals and key in FOLDERS else word))
        hide = "DIR" if word in FOLDERS else ""
    return short


def do(args: argparse.Namespace, out: Path, name: str, seed: int) -> None:
    """One part in its own process, unless its result is there."""
    key = hashlib.sha256(json.dumps([load(args, seed).model_dump(mode="json"), args.prompts]).encode()).hexdigest()
    stamp = out / f"{name}-{seed}.key"
    if stamp.exists() and stamp.read_text() == key:
        print(f"{name} (seed {seed}): kept", flush=True)
        return
    print(f"{name} (seed {seed}) ...", flush=True)
    begin = time.monotonic()
    argv = [sys.executable, __file__, *sys.argv[1:], "--part", f"{name}:{seed}"]
    threads = load(args, seed).cluster.workers.max if name != "ours" else 1
    subprocess.run(argv, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    stamp.write_text(key)
    print(f"{name} (seed {seed}): {time.monotonic() - begin:.0f} s", flush=True)


def load(args: argparse.Namespace, seed: int) -> Any:
    """The run of a seed."""
    from orchestrator.config.load import load_run

    here = [f"data.train={args.data / 'train_10k.jsonl'}", f"train.seed={seed}", "tracking.alias=null"]
    return load_run(RUN, [*here, *args.set])


# ---- what both sides get


def prepare_part(args: argparse.Namespace, out: Path, seed: int) -> None:
    """Writes the batches of every step, and the start values."""
    from safetensors.torch import save_file

    from orchestrator.base import load_base
    from orchestrator.data import prepare
    from orchestrator.methods import Bank
    from orchestrator.train.setup import total_steps

    os.environ["MANTA_HOME"] = str(out / "home")
    run = load(args, seed)
    base = load_base(run.base)
    data = prepare(run.data, base.tokenizer, seed=seed)
    steps = total_steps(run, data)
    batches = [
        [(s.tokens, [int(t) for t in s.trained]) for s in data.train.take(run.train.batch_size)] for _ in range(steps)
    ]
    (out / f"batches-{seed}.json").write_text(json.dumps(batches))
    bank = Bank(base.model)
    bank.add(0, run.method, seed=seed)
    save_file({k: v.contiguous() for k, v in bank.tensors(0).items()}, out / f"start-{seed}.safetensors")


# ---- the two sides


def ours_part(args: argparse.Namespace, out: Path, seed: int) -> None:
    """Through Ray Train, ZeRO-3 and the registry."""
    import shutil

    os.environ["MANTA_HOME"] = str(out / "home")
    from orchestrator.launch.progress import ProgressPrinter
    from orchestrator.launch.train import train

    begin = time.monotonic()
    steps: list[dict[str, float]] = []
    with ProgressPrinter() as printer, Watch("RayTrainWorker") as watch:

        def listen(kind: str, values: dict[str, Any]) -> None:
            printer(kind, values)
            if kind == "step":
                steps.append(values)
                if len(steps) == 1:
                    watch.begin()

        outcome = train(load(args, seed), listen=listen)
    shutil.rmtree(out / f"ours-{seed}", ignore_errors=True)
    shutil.copytree(outcome.delta, out / f"ours-{seed}")
    keep(out, "ours", seed, steps, watch, begin)


def theirs_part(args: argparse.Namespace, out: Path, seed: int, *, own: bool = False) -> None:
    """A plain loop on transformers, peft, bitsandbytes and torch."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from torch.nn.utils import clip_grad_norm_
    from torch.optim.lr_scheduler import LambdaLR

    run = load(args, seed)
    train, lora = run.train, run.method
    begin = time.monotonic()
    torch.manual_seed(seed)
    base, tokenizer = from_pretrained(run)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets[0] if lora.targets == ("all-linear",) else list(lora.targets),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config).train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not own:
        start = load_file(out / f"start-{seed}.safetensors")
        placed = {f"base_model.model.{n}".replace(".weight", ".default.weight"): t for n, t in start.items()}
        assert placed.keys() == trained.keys(), placed.keys() ^ trained.keys()
        for name, parameter in trained.items():
            parameter.data.copy_(placed[name])
    error = forward_error(base)
    batches = json.loads((out / f"batches-{seed}.json").read_text())
    optimizer = torch.optim.AdamW(
        trained.values(), lr=train.lr, betas=(train.beta1, train.beta2), eps=train.eps, weight_decay=train.weight_decay
    )
    schedule = LambdaLR(optimizer, lambda step: share(train, step, len(batches)))
    steps: list[dict[str, float]] = []
    with Watch() as watch:
        for batch in batches:
            at = time.perf_counter()
            ids, mask, labels = collate(batch, tokenizer.pad_token_id)
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            clip_grad_norm_(trained.values(), train.clip)
            lr = optimizer.param_groups[0]["lr"]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            seconds = time.perf_counter() - at
            speed = sum(len(tokens) for tokens, _ in batch) / seconds
            steps.append({"loss": loss.item(), "lr": lr, "tokens_per_s": speed, "seconds_per_step": seconds})
            if len(steps) == 1:
                watch.begin()
            if len(steps) % 50 == 0:
                print(f"step {len(steps)}/{len(batches)}  loss {loss.item():.4f}  {speed:,.0f} tok/s", flush=True)
    name = "own" if own else "theirs"
    model.save_pretrained(out / f"{name}-{seed}")
    keep(out, name, seed, steps, watch, begin, forward_error=error)


def forward_error(model: Any) -> float:
    """Largest difference of a 4-bit linear's output in training from the fp32 product with its dense weight."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    layer = next((m for m in model.modules() if isinstance(m, Linear4bit)), None)
    if layer is None:
        return 0.0
    x = torch.linspace(-3, 3, 64 * layer.in_features).view(64, -1).sin().requires_grad_()
    wanted = x @ dequantize_4bit(layer.weight.data, layer.weight.quant_state).float().T
    error: float = (layer(x) - wanted).abs().max().item()
    return error


def from_pretrained(run: Any, dense: bool = False) -> tuple[Any, Any]:
    """Base and tokenizer by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from orchestrator.base import base_dir

    folder = str(base_dir(run.base))
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    config = nf4 if run.base.quantize == "nf4" and not dense else None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    return model.requires_grad_(False), AutoTokenizer.from_pretrained(folder)


def share(train: Any, step: int, total: int) -> float:
    """Learning rate as a share of its peak: linear warm-up, then a cosine."""
    assert train.schedule == "cosine", "the peft side knows the cosine only"
    warm: int = round(train.warmup * total)
    if step < warm:
        return (step + 1) / warm
    left = (1 + math.cos(math.pi * min(1.0, (step - warm) / (total - warm)))) / 2
    floor: float = train.min_lr
    return floor + (1 - floor) * left


def collate(batch: list[tuple[list[int], list[int]]], pad_id: int) -> Any:
    """Tokens, mask and labels [B, T]: one sample per row, padded on the right."""
    import torch

    width = max(len(tokens) for tokens, _ in batch)
    ids = [tokens + [pad_id] * (width - len(tokens)) for tokens, _ in batch]
    mask = [[1] * len(tokens) + [0] * (width - len(tokens)) for tokens, _ in batch]
    labels = [[t if on else -100 for t, on in zip(*s, strict=True)] + [-100] * (width - len(s[0])) for s in batch]
    return torch.tensor(ids), torch.tensor(mask), torch.tensor(labels)


# ---- the judge


def judge_part(args: argparse.Namespace, out: Path, seed: int, arm: str) -> None:
    """Greedy answers and held-out loss of one delta on the dense base, in fp32, by transformers and peft alone."""
    import torch
    from peft import PeftModel

    model, tokenizer = from_pretrained(load(args, seed), dense=True)
    if arm != "bare":
        model = PeftModel.from_pretrained(model, str(out / f"{arm}-{seed}"))
    model.eval()
    tokenizer.padding_side = "left"
    records = held_out(args)
    asked = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": r["prompt"]}], tokenize=False, add_generation_prompt=True
        )
        for r in records
    ]
    answers: list[str] = []
    nats, targets = 0.0, 0
    for at in range(0, len(asked), 64):
        inputs = tokenizer(asked[at : at + 64], return_tensors="pt", padding=True, add_special_tokens=False)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        with torch.no_grad():
            made = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=ANSWER, do_sample=False, use_cache=True
            )
        answers += [a.strip() for a in tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)]
        nat, target = loss_of(model, tokenizer, asked[at : at + 64], records[at : at + 64])
        nats, targets = nats + nat, targets + target
    (out / f"answers-{arm}-{seed}.json").write_text(json.dumps({"answers": answers, "loss": nats / targets}))


def loss_of(model: Any, tokenizer: Any, asked: list[str], records: list[dict[str, Any]]) -> tuple[float, int]:
    """Summed loss of the first references, and how many tokens they are."""
    import torch

    batch = []
    for ask, record in zip(asked, records, strict=True):
        head = tokenizer(ask, add_special_tokens=False)["input_ids"]
        tail = [*tokenizer(record["references"][0], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        batch.append((head + tail, [0] * len(head) + [1] * len(tail)))
    ids, mask, labels = collate(batch, tokenizer.pad_token_id)
    targets = int((labels[:, 1:] != -100).sum())
    with torch.no_grad():
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        return float(loss) * targets, targets


def held_out(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Prompts with all their references; every n-th where fewer than all are wanted."""
    lines = (args.data / "test_grouped.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(lines[i * len(lines) // args.prompts]) for i in range(min(args.prompts, len(lines)))]


def part(args: argparse.Namespace, out: Path, name: str, seed: int) -> None:
    """One part, in this process."""
    if name.startswith("judge-"):
        judge_part(args, out, seed, name.removeprefix("judge-"))
    elif name == "own":
        theirs_part(args, out, seed, own=True)
    else:
        {"prepare": prepare_part, "ours": ours_part, "theirs": theirs_part}[name](args, out, seed)


if __name__ == "__main__":
    main()

"""The other side of gpu.py: peft's LoRA on transformers' model with bitsandbytes' linears, in a bare loop."""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
from gpu import LR, SKIP, Size, settings
from peft import LoraConfig, get_peft_model

from orchestrator.base import load_base, load_tokenizer
from orchestrator.data import Row, collate, prepare
from orchestrator.methods import Bank

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Theirs:
    """The weights, start values and samples of our run in peft's model, made once for all sizes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.cuda = args.device == "cuda"
        torch.set_float32_matmul_precision("high")  # peft computes its adapters in fp32
        run = settings(args, args.sizes.split(",")[0])
        plain = run.base.model_copy(update={"quantize": "none", "kernels": "none"})
        model: Any = load_base(plain, device=args.device).model
        for config in (model.config, model.config.get_text_config()):
            config._attn_implementation = "sdpa"
        bank = Bank(model)
        bank.add(0, run.method, seed=run.train.seed)
        self.start = bank.tensors(0)
        bank.detach()
        for layer in model.model.layers:
            for name, module in list(layer.named_modules()):
                if isinstance(module, torch.nn.Linear):
                    layer.set_submodule(name, _in_4_bits(module, args.device))
        if args.side == "peft-liger":
            from liger_kernel.transformers import _apply_liger_kernel_to_instance

            _apply_liger_kernel_to_instance(model=model)
        knobs: Any = run.method
        config = LoraConfig(r=knobs.rank, lora_alpha=knobs.alpha, target_modules=TARGETS, task_type="CAUSAL_LM")
        self.model: Any = get_peft_model(model, config)

    def measure(self, args: argparse.Namespace, text: str) -> dict[str, Any]:
        """Times, memory and losses of one size."""
        step, tokens = self.step_of(args, text), Size.of(text).rows * Size.of(text).length
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seconds, losses = [], []
        for _ in range(args.steps):
            begin = time.perf_counter()
            losses.append(step())
            seconds.append(time.perf_counter() - begin)
        return {
            "tokens_per_s": tokens / statistics.median(seconds[SKIP:]),
            "gib": torch.cuda.max_memory_allocated() / 2**30 if self.cuda else 0.0,
            "losses": losses,
        }

    def step_of(self, args: argparse.Namespace, text: str) -> Callable[[], float]:
        """From the start values a step of one size, which returns its loss."""
        size, run = Size.of(text), settings(args, text)
        data = prepare(run.data, load_tokenizer(run.base), seed=run.train.seed)
        self._restart(size.recompute)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=self.cuda)

        def step() -> float:
            rows = [Row(0, [sample]) for sample in data.train.take(size.rows)]
            x_BT = collate(rows, pad_id=0).tokens_BT.to(args.device)
            loss = self.model(input_ids=x_BT, labels=x_BT).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, run.train.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return float(loss.item())

        return step

    def _restart(self, recompute: bool) -> None:
        state = {f"base_model.model.{n.replace('.weight', '.default.weight')}": t for n, t in self.start.items()}
        unknown = self.model.load_state_dict(state, strict=False).unexpected_keys
        assert not unknown, unknown[:3]
        inner = self.model.base_model.model
        if recompute:
            inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            inner.gradient_checkpointing_disable()
        self.model.train()


def _in_4_bits(module: torch.nn.Linear, device: str) -> torch.nn.Module:
    dtype = module.weight.dtype
    held = bnb.nn.Linear4bit(
        module.in_features, module.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    held.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
    made: torch.nn.Module = held.to(device)
    return made

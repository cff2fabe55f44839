"""What the tests of the registry share: a small delta, and a run's metrics."""

from pathlib import Path
from typing import Any

import torch
from mlflow.tracking import MlflowClient

from orchestrator.config import Identity, Lora
from orchestrator.delta import save_delta

IDENTITY = Identity(id="tiny", source_hash="a" * 64, recipe="none/fp32")


def make(path: Path, seed: int, name: str = "support", **fields: Any) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "model.layers.0.q_proj.lora_A.weight": torch.randn(2, 8, generator=generator),
        "model.layers.0.q_proj.lora_B.weight": torch.randn(8, 2, generator=generator),
    }
    knobs = {"method": Lora(rank=2, targets=("q_proj",)), "data_digest": "d" * 64, "parent": "b" * 64, "owner": "ann"}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 32.0, "target_modules": ["q_proj"]}
    return save_delta(path, tensors, {"name": name, "base": IDENTITY, **knobs, **fields}, config).path


def history(client: MlflowClient, run: str, key: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in client.get_metric_history(run, key))

"""What the tests of a search's space share: a wide search, and points drawn of one."""

from pathlib import Path
from typing import Any

import optuna

from orchestrator.config import Search
from orchestrator.config.load import load_search
from orchestrator.search.space import sampler, suggest

optuna.logging.set_verbosity(optuna.logging.WARNING)

WIDE = """
methods:
  - lora
  - type: lora
    rank: {int: [2, 9]}
    targets: {choice: [all-linear, [q_proj, v_proj]]}
    rslora: {choice: [true, false]}
  - {type: lora, rank: 8, alpha: 4, ranks: {q_proj: {choice: [2, 4]}}, train.lr: {log: [1e-5, 1e-4]}}
  - bottleneck
  - {type: prompt, tokens: {log_int: [3, 40]}}
  - prefix
  - sparse
  - {type: last_layers, train.lr: 1e-5}
  - bitfit
  - norms
  - ia3
space:
  data.length: {choice: [256, 512]}
  train.warmup: {uniform: [0, 0.2]}
  train.schedule: {choice: [cosine, constant]}
objective: [eval_loss, parameters]
"""


def search_of(tmp_path: Path, text: str, *overrides: str) -> Search:
    path = tmp_path / "search.yaml"
    path.write_text(text)
    return load_search(path, overrides)


def drawn(search: Search, count: int, value: Any = None) -> list[dict[str, Any]]:
    """Points as optuna's own loop draws them, told ``value(point)``."""
    study = optuna.create_study(sampler=sampler(search))
    points = []
    for _ in range(count):
        trial = study.ask()
        suggest(search, trial)
        points.append(trial.params)
        study.tell(trial, value(trial.params) if value else 0.0)
    return points

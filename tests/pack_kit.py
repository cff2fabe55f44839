"""Packs in tests: leases that come and go at chosen steps, and what each trial of them would do alone."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from orchestrator.config import Run
from orchestrator.train.desk import Desk, Lease, Orders
from orchestrator.train.local_desk import LocalDesk
from orchestrator.train.pack import Limits, pack
from orchestrator.train.setup import Place
from tests.launch_kit import small, train_here

HERE = Place(rank=0, ranks=1, local_ranks=1, device=torch.device("cpu"))


class Played(LocalDesk):
    """A desk at which trials are offered and withdrawn at chosen steps of the pack; remembers what is told.

    Args:
        folder: of checkpoints.
        runs: trial -> its config.
        at: trial -> step of the pack at which it is offered; 0 where it is silent.
        until: trial -> its own step at which the search stops it.
    """

    def __init__(
        self,
        folder: Path,
        runs: Mapping[str, Run],
        at: Mapping[str, int] | None = None,
        until: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(Desk(), folder)
        self.runs, self.at, self.until = dict(runs), dict(at or {}), dict(until or {})
        self.offered: set[str] = set()
        self.asked = -1
        self.heard: list[tuple[str, str, dict[str, Any]]] = []
        self.shrunk: list[tuple[int, int]] = []
        self.listen: Callable[[str, str, Mapping[str, Any]], None] = lambda *_: None

    def orders(self, free: int) -> Orders | None:
        self.asked += 1
        for trial, run in self.runs.items():
            if trial not in self.offered and self.at.get(trial, 0) <= self.asked:
                self.offered.add(trial)
                self.desk.offer(Lease(trial, "", run.model_dump(mode="json")))
        if len(self.offered) == len(self.runs):
            self.desk.close()
        return super().orders(free)

    def tell(self, trial: str, kind: str, values: Mapping[str, Any]) -> None:
        self.heard.append((trial, kind, dict(values)))
        super().tell(trial, kind, values)
        if kind == "step" and self.until.get(trial) == values["step"]:
            self.desk.withdraw(trial)
        self.listen(trial, kind, values)

    def shrink(self, capacity: int, tokens: int) -> None:
        self.shrunk.append((capacity, tokens))
        super().shrink(capacity, tokens)

    def of(self, trial: str, kind: str, key: str) -> list[Any]:
        """What was told of a trial."""
        return [values[key] for t, k, values in self.heard if (t, k) == (trial, kind)]

    def ended(self, trial: str) -> dict[str, Any]:
        """How it ended; once."""
        (values,) = [values for t, k, values in self.heard if (t, k) == (trial, "ended")]
        return values


def pack_here(desk: Played, run: Run, limits: Limits | None = None) -> Played:
    """A pack in this process."""
    torch.set_num_threads(1)
    pack(run, HERE, desk, limits or Limits(slots=16, tokens=2048))
    return desk


def trial(base: Path, *overrides: str) -> Run:
    """A trial on a base."""
    return small(f"base={base}", "base.quantize=none", *overrides)


def alone(run: Run, folder: Path) -> dict[str, list[float]]:
    """A run's losses of its own, by the solo path."""
    told = train_here(run, folder)
    return {
        "loss": told.of("step", "loss"),
        "eval_loss": told.of("eval", "eval_loss"),
        "grad_norm": told.of("step", "grad_norm"),
    }


def assert_as_alone(desk: Played, name: str, run: Run, folder: Path, *, steps: int | None = None) -> None:
    """Every loss of a trial is that of its solo run."""
    want = alone(run, folder / name)
    for kind, key in (("step", "loss"), ("eval", "eval_loss"), ("step", "grad_norm")):
        got = desk.of(name, kind, key)
        expected = want[key] if steps is None else want[key][: len(got)]
        assert len(got) == len(expected)
        assert got, f"{name} told no {key}"
        rtol = 1e-5 if key != "grad_norm" else 1e-3
        torch.testing.assert_close(
            torch.tensor(got), torch.tensor(expected), rtol=rtol, atol=1e-7, msg=lambda m: f"{name}, {key}: {m}"
        )

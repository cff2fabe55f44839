"""Packs in tests: leases that come and go at chosen steps, and what each trial of them would do alone."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.config import Run
from orchestrator.train.desk import Desk, Lease, Orders
from orchestrator.train.local_desk import LocalDesk
from orchestrator.train.pack import Limits, pack
from orchestrator.train.setup import Place
from tests.launch_kit import Folder, small

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
        self.at, self.until = dict(at or {}), dict(until or {})
        self.leases = {trial: Lease(trial, "", run.model_dump(mode="json")) for trial, run in runs.items()}
        self.offered: set[str] = set()
        self.asked = -1
        self.heard: list[tuple[str, str, dict[str, Any]]] = []
        self.shrunk: list[tuple[int, int]] = []
        self.listen: Callable[[str, str, Mapping[str, Any]], None] = lambda *_: None

    def orders(self, free: int) -> Orders | None:
        self.asked += 1
        for trial, lease in self.leases.items():
            if trial not in self.offered and self.at.get(trial, 0) <= self.asked:
                self.offered.add(trial)
                self.desk.offer(lease)
        if len(self.offered) == len(self.leases):
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


WATCHED = (("step", "loss", 1e-5), ("eval", "eval_loss", 1e-5), ("step", "grad_norm", 1e-3))


def assert_same(desk: Played, name: str, told: Folder, *, first: int = 0, steps: int | None = None) -> None:
    """A trial's losses are those of its solo run, from its own step ``first`` on; as far as it came, with ``steps``."""
    assert desk.of(name, "step", "step"), f"{name} told no step"
    for kind, key, rtol in WATCHED:
        got = dict(zip(desk.of(name, kind, "step"), desk.of(name, kind, key), strict=True))
        got = {step: value for step, value in got.items() if step > first}  # what the checkpoint held is told again
        want = dict(zip(told.of(kind, "step"), told.of(kind, key), strict=True))
        want = {step: value for step, value in want.items() if first < step <= (steps or step)}
        assert got.keys() == want.keys(), f"{name}, {key}"
        assert got == pytest.approx(want, rel=rtol, abs=1e-7), f"{name}, {key}"

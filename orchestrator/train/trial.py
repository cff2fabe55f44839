"""One slot in training: its optimizer, schedule, clipping, step count and non-finite decision, its own alone."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from orchestrator.config import Train
from orchestrator.errors import CheckpointError, TrainError
from orchestrator.methods.bank import Bank
from orchestrator.train.engine import Engine
from orchestrator.train.schedule import lr_at

MOMENTS = ("exp_avg", "exp_avg_sq")
PATIENCE = 5
"""Non-finite steps in a row after which a trial has diverged."""


def diverged(step: int) -> str:
    """What is said of a trial whose patience is at its end."""
    return (
        f"the loss or its gradient was not finite {PATIENCE} times in a row, up to step {step}; "
        "lower train.lr, or look at the data of these steps"
    )


class Trial:
    """Training state of one slot."""

    def __init__(self, bank: Bank, engine: Engine, slot: int, train: Train, total: int) -> None:
        self.bank, self.engine, self.slot, self.train, self.total = bank, engine, slot, train, total
        self.step = 0
        self.bad_steps = 0
        self.bad_in_row = 0
        leaves = list(bank.leaves().values())
        at = {id(leaf): index for index, leaf in enumerate(leaves)}
        self._index = {name: at[id(leaf)] for name, leaf in bank.leaves_of(slot).items()}
        self.parameters = bank.parameters(slot)
        by_ratio: dict[float, list[Tensor]] = {}
        for name, ratio in bank.lr_ratios(slot).items():
            if engine.owns(self._index[name]):
                by_ratio.setdefault(ratio, []).append(self.parameters[name])
        groups = [{"params": own, "ratio": ratio} for ratio, own in by_ratio.items()]
        self.optimizer = torch.optim.AdamW(
            groups or [{"params": [torch.zeros(1)], "ratio": 1.0}],
            lr=train.lr or 0.0,
            betas=(train.beta1, train.beta2),
            eps=train.eps,
            weight_decay=train.weight_decay,
            fused=engine.device.type == "cuda",
        )

    @property
    def steps_left(self) -> int:
        """Steps still to do."""
        return self.total - self.step

    def update(self) -> dict[str, float]:
        """Clip and step with the gradients at hand; a non-finite one is skipped and counted.

        Returns:
            Gradient norm and learning rate.

        Raises:
            TrainError: too many non-finite steps in a row.
        """
        norm = self._norm()
        lr = lr_at(self.train, self.step, self.total)
        self.step += 1
        if not math.isfinite(norm):
            self.bad_steps += 1
            self.bad_in_row += 1
            if self.bad_in_row >= PATIENCE:
                raise TrainError(diverged(self.step))
            return {"grad_norm": norm, "lr": 0.0}
        self.bad_in_row = 0
        if self.train.clip and norm > self.train.clip and (grads := self._grads()):
            torch._foreach_mul_(grads, self.train.clip / norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["ratio"]
        self.optimizer.step()
        self._spread()
        if self.steps_left:  # what the last step chose anew, no step would train
            self._rechoose()
        return {"grad_norm": norm, "lr": lr}

    def _grads(self) -> list[Tensor]:
        own = [p for name, p in self.parameters.items() if self.engine.owns(self._index[name])]
        return [p.grad for p in own if p.grad is not None]

    def _norm(self) -> float:
        squares = torch.zeros((), device=self.engine.device, dtype=torch.float64)
        if grads := self._grads():  # none, on a rank that owns no tensor
            squares += torch.stack(torch._foreach_norm(grads)).double().square().sum()
        if self.engine.stage in (1, 2):
            self.engine.sum_(squares)
        return float(squares.sqrt())

    def _spread(self) -> None:
        if self.engine.stage in (1, 2):
            by_leaf = sorted((self._index[name], name) for name in self.parameters)
            for rank in range(self.engine.ranks):
                own = [self.parameters[n].data for index, n in by_leaf if self.engine.owner(index) == rank]
                self.engine.broadcast(own, rank)

    def _rechoose(self) -> None:
        """A method may choose its weights anew; the optimizer forgets what it knew of those that went."""
        for name, kept in self.bank.rechoose(self.slot, self.step).items():
            state = self.optimizer.state.get(self.parameters[name], {})
            for moment in MOMENTS:
                if moment in state:
                    state[moment].mul_(kept.to(state[moment].device))

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What resumes it: plain values, and full logical tensors. Every rank must call it at stages 1 and 2."""
        tensors = {}
        for name, parameter in self.parameters.items():
            for moment in MOMENTS:
                value = self.optimizer.state.get(parameter, {}).get(moment)
                value = torch.zeros_like(parameter.data) if value is None else value.clone()
                if self.engine.stage in (1, 2):
                    self.engine.broadcast([value], self.engine.owner(self._index[name]))
                tensors[f"{name}.{moment}"] = value.cpu()
        return {
            "step": self.step,
            "bad_steps": self.bad_steps,
            "bad_in_row": self.bad_in_row,
            "total": self.total,
        }, tensors

    def load_state(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from ``state``.

        Raises:
            CheckpointError: the tensors are not this slot's.
        """
        wanted = {f"{name}.{moment}" for name in self.parameters for moment in MOMENTS}
        if wanted != set(tensors):
            raise CheckpointError("the checkpoint's optimizer state is of another method, rank or base; start afresh")
        self.step, self.bad_steps, self.bad_in_row = values["step"], values["bad_steps"], values["bad_in_row"]
        if self.step == self.bad_steps:
            return  # no update yet: the optimizer makes its own zeros
        for name, parameter in self.parameters.items():
            if self.engine.owns(self._index[name]):
                state = self.optimizer.state[parameter]
                state["step"] = torch.tensor(float(self.step - self.bad_steps), device=self._step_device(parameter))
                for moment in MOMENTS:
                    state[moment] = tensors[f"{name}.{moment}"].to(parameter.device).clone()

    def _step_device(self, parameter: Tensor) -> torch.device:
        return parameter.device if self.optimizer.defaults["fused"] else torch.device("cpu")

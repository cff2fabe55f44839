"""What the bank knows of one slot: a method and its knobs, and the head that the slot's task may need."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orchestrator.config import Task
from orchestrator.methods.foreign import Foreign
from orchestrator.methods.method import Hook, Method, Shape
from orchestrator.methods.scope import Scope
from orchestrator.methods.wiring import hash_ints, hash_text


@dataclass
class Part:
    """A method in a slot: the slot's own, or the head that its task needs."""

    method: Method
    knobs: Any
    sites: dict[str, Hook]
    shared: dict[str, str]

    @classmethod
    def of(cls, method: Method, knobs: Any, scope: Scope) -> "Part":
        """On this base. Raises ``MethodError`` where it has not what the method needs."""
        return cls(method, knobs, method.sites(knobs, scope), method.shared(knobs, scope))

    @property
    def own(self) -> list[str]:
        """Sites with tensors of their own."""
        return [s for s in self.sites if s not in self.shared]

    @property
    def rechooses(self) -> bool:
        """Whether its method has a choice that it may make anew."""
        return type(self.method).rechosen is not Method.rechosen

    def key(self, site: str) -> str:
        """What it is known by at a site; slots may differ in where they hook in."""
        return f"{self.method.name}.{self.sites[site]}"

    def shapes(self, scope: Scope) -> dict[str, Shape]:
        """``<site>.<name>`` -> shape of its tensors."""
        return {
            f"{site}.{name}": shape
            for site in self.own
            for name, shape in self.method.shapes(self.knobs, site, scope).items()
        }

    def start(self, scope: Scope, seed: int) -> dict[str, Tensor]:
        """``<site>.<name>`` -> start value of its tensors."""
        return {
            f"{site}.{name}": value
            for site in self.own
            for name, value in self.method.start(self.knobs, site, scope, generator(seed, site)).items()
        }


@dataclass
class Slot:
    """One slot."""

    seed: int
    task: Task | None
    parts: list[Part]
    foreign: Foreign | None = None
    """What computes it in the bank's place; then it is the only slot."""


def generator(seed: int, site: str) -> torch.Generator:
    """Random numbers of a slot at a site."""
    return torch.Generator().manual_seed(hash_ints(seed, hash_text(site)))

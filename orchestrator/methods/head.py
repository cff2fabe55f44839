"""A classification head of a slot's own: ``logits = W h + b``, over what the task pools of the hidden states.

``W`` [C, H] starts uniform in +-1/sqrt(H) (torch's ``Linear``), ``b`` [C] at zero. Named as transformers' task models
name it: ``score``, without a bias, on a decoder; ``classifier`` on an encoder. Beyond a slot's own labels its logits
are -inf, so that slots of different label sets share a batch.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from orchestrator.config import Classification, Knobs
from orchestrator.errors import MethodError
from orchestrator.methods.method import Hook, Method, Params, Shape
from orchestrator.methods.scope import Scope


class Head(Method):
    """See the module. Its knobs are the task's."""

    name = "head"
    knobs = Knobs

    def sites(self, knobs: Classification, scope: Scope) -> dict[str, Hook]:
        """One, of no module of the base."""
        return {"score" if scope.head else "classifier": "head"}

    def shapes(self, knobs: Classification, site: str, scope: Scope) -> dict[str, Shape]:
        """W [C, H], and b [C] on an encoder."""
        if not knobs.labels:
            raise MethodError("a classification head needs the labels; name them in task.labels")
        shapes: dict[str, Shape] = {"weight": (len(knobs.labels), scope.width)}
        return shapes if scope.head else {**shapes, "bias": (len(knobs.labels),)}

    def start(self, knobs: Classification, site: str, scope: Scope, generator: torch.Generator) -> dict[str, Tensor]:
        """W uniform, b zero."""
        made = {name: torch.zeros(shape) for name, shape in self.shapes(knobs, site, scope).items()}
        made["weight"].uniform_(-(scope.width**-0.5), scope.width**-0.5, generator=generator)
        return made

    def numbers(self, knobs: Classification, site: str) -> dict[str, float]:
        """How many labels there are."""
        return {"labels": float(len(knobs.labels or ()))}

    def dropout(self, knobs: Classification) -> float:
        """On what the head sees."""
        return knobs.dropout

    def head(self, h_GMI: Tensor, p: Params) -> Tensor:
        """Logits in fp32."""
        h_GMI = h_GMI.float()
        logits_GMC = torch.bmm(p.drop(h_GMI) if p.drop else h_GMI, p.tensors["weight"].mT)
        if "bias" in p.tensors:
            logits_GMC = logits_GMC + p.tensors["bias"].unsqueeze(1)
        label_C = torch.arange(logits_GMC.shape[-1], device=logits_GMC.device)
        absent_GC = label_C >= p.numbers["labels"].unsqueeze(1)
        return logits_GMC.masked_fill(absent_GC.unsqueeze(1), float("-inf"))

    def weight_change(
        self, knobs: Any, site: str, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]
    ) -> dict[str, Tensor] | None:
        """None: it is no change of the base."""
        return None

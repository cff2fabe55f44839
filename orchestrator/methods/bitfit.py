"""BitFit: only bias terms are trained (Ben Zaken et al. 2021, arXiv:2106.10199).

``y = W x + (b + d)``, ``d`` [O] starts at zero. A layer without a bias gets one, which cannot be merged. The biases of
normalization layers are moved likewise, where they have one.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from orchestrator.base.linear import Linear
from orchestrator.config.method import BitFit as Knobs
from orchestrator.methods.method import Hook, Method, Params, Scope, Shape
from orchestrator.methods.targets import match


class BitFit(Method):
    """See the module."""

    name = "bitfit"
    knobs = Knobs

    def sites(self, knobs: Knobs, scope: Scope) -> dict[str, Hook]:
        """The linears that the targets name; with ``norms``, normalization layers that have a bias."""
        found = match(knobs.targets, scope.linears)
        if knobs.norms:
            found += [name for name in scope.norms if name in scope.biased]
        return dict.fromkeys(found, "output")

    def shapes(self, knobs: Knobs, site: str, scope: Scope) -> dict[str, Shape]:
        """d [O]."""
        return {"bias": (scope.norms[site] if site in scope.norms else scope.linears[site][0],)}

    def start(self, knobs: Knobs, site: str, scope: Scope, generator: torch.Generator) -> dict[str, Tensor]:
        """Zero."""
        return {name: torch.zeros(shape) for name, shape in self.shapes(knobs, site, scope).items()}

    def output(self, x_GMI: Tensor, y_GMO: Tensor | None, p: Params) -> Tensor:
        """``d``, for each token; for each head of it where a normalization layer works on heads."""
        bias_G1O = p.cast("bias", x_GMI).unsqueeze(1)
        heads = 1 if isinstance(p.module, Linear) else x_GMI.shape[-1] // bias_G1O.shape[-1]
        return bias_G1O.repeat(1, 1, heads).expand(-1, x_GMI.shape[1], -1)

    def weight_change(
        self, knobs: Knobs, site: str, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]
    ) -> dict[str, Tensor] | None:
        """``d``."""
        return {"bias": tensors["bias"].float()}

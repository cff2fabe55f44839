"""Bottleneck adapters: ``y + s (U act(D z + d) + u)`` at a block (Houlsby et al. 2019, arXiv:1902.00751).

``y`` is the output of an attention or feed-forward block before its residual is added, and z = y: at both blocks
(``houlsby``), at the feed-forward block alone (``pfeiffer``: Pfeiffer et al. 2020, arXiv:2005.00247). With ``parallel``
(He et al. 2021, arXiv:2110.04366) z is the input of the feed-forward block's first linear. ``D`` [R, I] starts uniform
(Kaiming, a = sqrt 5, as in He et al.), ``U`` [O, R] and the biases at zero, so the start is the base. A slot of smaller
width is padded with zeros: exact, since act(0) = 0.

Long, since there are three placements, and each activation is a kernel of its own.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.config.method import Bottleneck as BottleneckKnobs
from orchestrator.errors import MethodError
from orchestrator.methods.method import Hook, Method, Params, Scope, Shape
from orchestrator.methods.scope import SubLayer

D, D_BIAS, U, U_BIAS = "down.weight", "down.bias", "up.weight", "up.bias"
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
}


class Bottleneck(Method):
    """See the module. Each activation, and ``parallel``, is a kernel of its own."""

    knobs = BottleneckKnobs

    def __init__(self, activation: str = "relu", parallel: bool = False) -> None:
        self.name = "_".join(["bottleneck", activation, *(["parallel"] if parallel else [])])
        self._activate, self._parallel = _ACTIVATIONS[activation], parallel

    def variant(self, knobs: BottleneckKnobs) -> Method:
        """That of the activation and of what the adapter reads."""
        return _VARIANTS[knobs.activation, knobs.placement == "parallel"]

    def sites(self, knobs: BottleneckKnobs, scope: Scope) -> dict[str, Hook]:
        """The last linears of the blocks."""
        wanted = ("attention", "feed_forward") if knobs.placement == "houlsby" else ("feed_forward",)
        found = {site: sub for site, sub in scope.sublayers.items() if sub.block in wanted}
        for block in wanted:
            layers = {scope.layer_of(site) for site, sub in found.items() if sub.block == block}
            if missing := [i for i in range(scope.count) if i not in layers]:
                raise MethodError(
                    f"the method bottleneck acts behind the last linear of each {block.replace('_', '-')} block, and "
                    f"that of layer {missing[0]} is not known (fused experts, or a block of another kind)"
                )
        return dict.fromkeys(found, "sublayer")

    def shapes(self, knobs: BottleneckKnobs, site: str, scope: Scope) -> dict[str, Shape]:
        """D [R, I], d [R], U [O, R], u [O]."""
        out = scope.linears[site][0]
        sub: SubLayer = scope.sublayers[site]
        into = scope.linears[sub.first][1] if knobs.placement == "parallel" else out
        return {D: (knobs.size, into), D_BIAS: (knobs.size,), U: (out, knobs.size), U_BIAS: (out,)}

    def start(self, knobs: BottleneckKnobs, site: str, scope: Scope, generator: torch.Generator) -> dict[str, Tensor]:
        """D uniform, all else zero."""
        made = {name: torch.zeros(shape) for name, shape in self.shapes(knobs, site, scope).items()}
        nn.init.kaiming_uniform_(made[D], a=math.sqrt(5), generator=generator)
        return made

    def numbers(self, knobs: BottleneckKnobs, site: str) -> dict[str, float]:
        """The scale s."""
        return {"scale": knobs.scale}

    def dropout(self, knobs: BottleneckKnobs) -> float:
        """On z."""
        return knobs.dropout

    def sublayer(self, x_GMI: Tensor, y_GMO: Tensor, p: Params) -> Tensor:
        """``s (U act(D z + d) + u)``."""
        z_GMI = x_GMI if self._parallel else y_GMO
        z_GMI = p.drop(z_GMI) if p.drop else z_GMI
        h_GMR = torch.baddbmm(p.cast(D_BIAS, z_GMI).unsqueeze(1), z_GMI, p.cast(D, z_GMI).mT)
        up_GMO = torch.baddbmm(p.cast(U_BIAS, z_GMI).unsqueeze(1), self._activate(h_GMR), p.cast(U, z_GMI).mT)
        return up_GMO * p.number("scale", up_GMO)

    def weight_change(
        self, knobs: Any, site: str, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]
    ) -> dict[str, Tensor] | None:
        """None: it is not linear."""
        return None

    def resized(
        self,
        old: BottleneckKnobs,
        new: BottleneckKnobs,
        tensors: Mapping[str, Tensor],
        site: str,
        scope: Scope,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Grown: new units with nothing behind them. Shrunk: the units stay whose products of weights are largest."""
        scale = old.scale / new.scale
        norm_R = tensors[D].norm(dim=1) * tensors[U].norm(dim=0)
        keep = norm_R.topk(min(old.size, new.size)).indices.sort().values
        made = self.start(new, site, scope, generator)
        made[D][: len(keep)], made[D_BIAS][: len(keep)] = tensors[D][keep].cpu(), tensors[D_BIAS][keep].cpu()
        made[U][:, : len(keep)], made[U_BIAS] = tensors[U][:, keep].cpu() * scale, tensors[U_BIAS].cpu() * scale
        return made


_VARIANTS = {(act, parallel): Bottleneck(act, parallel) for act in _ACTIVATIONS for parallel in (False, True)}

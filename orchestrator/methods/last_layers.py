"""The outer layers only: ``W' = W + D``, and so for biases and scales, in the last k layers (Lee et al. 2019,
arXiv:1911.03090).

Every ``D`` starts at zero, so the start is the base. These layers are held unquantized. D is dense and each slot's own:
a slot costs as much memory as its layers, and a matrix product of its own size; one launch still serves all slots.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from orchestrator.base.norm import normalized
from orchestrator.config import Knobs as BaseKnobs
from orchestrator.config.method import LastLayers as Knobs
from orchestrator.errors import MethodError
from orchestrator.methods.method import Hook, Method, Params, Scope, Shape


class LastLayers(Method):
    """See the module."""

    name = "last_layers"
    knobs: type[BaseKnobs] = Knobs

    def sites(self, knobs: Knobs, scope: Scope) -> dict[str, Hook]:
        """Linears and normalization layers of the last layers, the final normalization, the head."""
        if knobs.layers > scope.count:
            raise MethodError(f"method.layers: got {knobs.layers}; this base has {scope.count} layers")
        last = self.unquantized(knobs, scope.count)
        found = [s for s in scope.linears if scope.layer_of(s) in last]
        if knobs.norms:
            final = [s for s in scope.norms if scope.layer_of(s) is None and "embed" not in s]
            found += [s for s in scope.norms if scope.layer_of(s) in last or s in final]
        if knobs.head:
            if scope.head is None:
                raise MethodError("method.head: this base has no language-model head; leave it out")
            found.append(scope.head)
        return dict.fromkeys(found, "output")

    def shapes(self, knobs: Knobs, site: str, scope: Scope) -> dict[str, Shape]:
        """Those of the site's own parameters."""
        if site in scope.norms:
            weight: Shape = (scope.norms[site],)
        elif site == scope.head:
            weight = (scope.embeddings[scope.words][0], scope.width)
        else:
            weight = scope.embeddings[site] if site in scope.embeddings else scope.linears[site]
        return {"weight": weight} | ({"bias": (weight[0],)} if site in scope.biased else {})

    def start(self, knobs: Knobs, site: str, scope: Scope, generator: torch.Generator) -> dict[str, Tensor]:
        """Zeros."""
        return {name: torch.zeros(shape) for name, shape in self.shapes(knobs, site, scope).items()}

    def constants(self, knobs: Knobs, site: str, scope: Scope) -> dict[str, Tensor]:
        """Of a normalization layer, whether it takes the mean off: 1 or 0."""
        if site not in scope.norms:
            return {}
        if site not in scope.takes_off_mean:
            raise MethodError(f"{site} is neither LayerNorm nor RMSNorm; train without it (method.norms: false)")
        return {"mean": torch.tensor([float(scope.takes_off_mean[site])])}

    def unquantized(self, knobs: Knobs, count: int) -> frozenset[int]:
        """The last layers."""
        return frozenset(range(max(0, count - knobs.layers), count))

    def output(self, x_GMI: Tensor, y_GMO: Tensor | None, p: Params) -> Tensor:
        """``D x + d`` of a linear, ``D o x`` of what a normalization layer normalized, rows of D at an embedding."""
        if isinstance(p.module, nn.Embedding):
            rows_GMH = _rows(p.tensors["weight"], x_GMI.squeeze(-1)).to(p.module.weight.dtype)
            return rows_GMH * getattr(p.module, "embed_scale", 1)  # Gemma scales its embeddings
        if "mean" in p.tensors:
            scale_GF = p.tensors["weight"]
            x_GMHF = x_GMI.reshape(*x_GMI.shape[:2], -1, scale_GF.shape[-1])
            hat_GMHF = normalized(p.module, x_GMHF, p.tensors["mean"].view(-1, 1, 1, 1))
            added = (hat_GMHF * scale_GF[:, None, None]).flatten(-2).to(x_GMI.dtype)
        else:
            added = torch.bmm(x_GMI, p.cast("weight", x_GMI).mT)
        return added + p.cast("bias", x_GMI).unsqueeze(1) if "bias" in p.tensors else added

    def weight_change(
        self, knobs: Knobs, site: str, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]
    ) -> dict[str, Tensor] | None:
        """D itself."""
        return {name: tensor.float() for name, tensor in tensors.items()}


def _rows(table_GVH: Tensor, token_GM: Tensor) -> Tensor:
    """Each slot's rows [G, M, H] of its own table."""
    slots, vocabulary, width = table_GVH.shape
    first_G1 = torch.arange(slots, device=token_GM.device).unsqueeze(1) * vocabulary
    return nn.functional.embedding(token_GM + first_G1, table_GVH.view(-1, width))

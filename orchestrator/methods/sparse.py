"""Sparse fine-tuning: ``y = (W + D) x`` with D zero but at K chosen entries (Guo et al. 2020, arXiv:2012.07463).

K is ``density`` of O I. Their values start at zero, so the start is the base. Chosen are the largest weights, those of
the highest Fisher information on the training data (FISH mask, Sung et al. 2021, arXiv:2111.09839: the mean squared
gradient of the loss of one sample), or drawn ones. With ``rechoose_every`` the least changed entries go back to the
base's, and as many drawn ones take their places (SET, Mocanu et al. 2018, arXiv:1707.04780).

``values`` [K] and ``index`` [K] (o I + i) are all that is kept. A smaller slot is padded with zeros that are added to
entry 0.

Long, since there are three ways to choose, and one to choose anew.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from orchestrator.base.linear import linear_shape
from orchestrator.config.method import Sparse as Knobs
from orchestrator.errors import DeltaError, MethodError
from orchestrator.methods.method import Hook, Method, Params, Scope, Shape
from orchestrator.methods.sparse_ops import SparseLinear, drawn, largest
from orchestrator.methods.targets import match

_VALUES, _INDEX = "values", "index"


class Sparse(Method):
    """See the module."""

    name = "sparse"
    knobs = Knobs

    def sites(self, knobs: Knobs, scope: Scope) -> dict[str, Hook]:
        """The linears that the targets name."""
        found = match(knobs.targets, scope.linears)
        if large := [site for site in found if _size(site, scope) > torch.iinfo(torch.int32).max]:
            raise MethodError(f"{large[0]} has more weights than 32 bits can number; name other layers")
        return dict.fromkeys(found, "output")

    def shapes(self, knobs: Knobs, site: str, scope: Scope) -> dict[str, Shape]:
        """Values [K] and their places [K]."""
        count = max(1, round(knobs.density * _size(site, scope)))
        return {_VALUES: (count,), _INDEX: (count,)}

    def start(self, knobs: Knobs, site: str, scope: Scope, generator: torch.Generator) -> dict[str, Tensor]:
        """Zeros, at the chosen places."""
        (count,) = self.shapes(knobs, site, scope)[_VALUES]
        if knobs.choose == "random":
            none = torch.empty(0, dtype=torch.int32)
            index_K = drawn(count, _size(site, scope), none, generator).sort().values
        elif knobs.choose == "fisher":
            index_K = largest(scope.importance(site), count)
        else:
            index_K = largest(scope.weights(site)["weight"].abs(), count)
        return {_VALUES: torch.zeros(count), _INDEX: index_K}

    def trained(self, knobs: Knobs, name: str, shape: Shape) -> Shape | None:
        """The values."""
        return shape if name == _VALUES else None

    def importance_samples(self, knobs: Knobs) -> int:
        """With ``choose: fisher``."""
        return knobs.fisher_samples if knobs.choose == "fisher" else 0

    def output(self, x_GMI: Tensor, y_GMO: Tensor | None, p: Params) -> Tensor:
        """``D x``."""
        out, _ = linear_shape(p.module)
        y: Tensor = SparseLinear.apply(x_GMI, p.tensors[_VALUES], p.tensors[_INDEX], out)  # type: ignore[no-untyped-call]
        return y

    def weight_change(
        self, knobs: Knobs, site: str, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]
    ) -> dict[str, Tensor] | None:
        """``D``."""
        flat = torch.zeros(base["weight"].numel())
        flat.index_add_(0, tensors[_INDEX].long(), tensors[_VALUES].float())
        return {"weight": flat.view_as(base["weight"])}

    def rechosen(
        self,
        knobs: Knobs,
        step: int,
        tensors: Mapping[str, Tensor],
        site: str,
        scope: Scope,
        generator: torch.Generator,
    ) -> dict[str, Tensor] | None:
        """The least changed go, in place; others, drawn among those not chosen, stand where they stood."""
        if knobs.rechoose_every is None or step % knobs.rechoose_every:
            return None
        values_K, index_K = tensors[_VALUES].cpu().clone(), tensors[_INDEX].cpu().clone()
        total = _size(site, scope)
        count = min(max(1, round(knobs.rechoose_share * len(values_K))), total - len(values_K))
        gone = values_K.abs().topk(count, largest=False).indices
        kept_K = torch.ones(len(values_K), dtype=torch.bool)
        kept_K[gone] = False
        values_K[gone], index_K[gone] = 0, drawn(count, total, index_K, generator)
        return {_VALUES: values_K, _INDEX: index_K, "kept": kept_K}

    def from_file(self, knobs: Knobs, tensors: Mapping[str, Tensor], scope: Scope) -> dict[str, Tensor]:
        """The tensors, each place looked at: one outside of the matrix would write elsewhere."""
        found = super().from_file(knobs, tensors, scope)
        for name, tensor in found.items():
            site, _, kind = name.rpartition(".")
            if kind != _INDEX or site not in scope.linears:
                continue
            if tensor.dtype != torch.int32 or int(tensor.min()) < 0 or int(tensor.max()) >= _size(site, scope):
                raise DeltaError(f"{name} is no list of places among the {_size(site, scope):,} weights of {site}")
        return found


def _size(site: str, scope: Scope) -> int:
    """O I."""
    out, into = scope.linears[site]
    return out * into

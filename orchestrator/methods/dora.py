"""DoRA: ``y = m / n o (W x + s B A x) + b`` with ``n = |W + s B A|`` per output (Liu et al. 2024, arXiv:2402.09353).

``m`` [O] starts as the norms of W's rows, so with B at zero the start is the base. As in the paper's section 4.3, no
gradient flows through n. n is had without a dense W + s B A, by ``|W|^2 + 2 s <W A^T, B> + s^2 |B A|^2`` per row.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from orchestrator.base.linear import project
from orchestrator.base.low_rank import LowRank
from orchestrator.config.method import Lora
from orchestrator.methods.lora import A, B, LoRA
from orchestrator.methods.method import Method, Params, Scope, Shape

M = "lora_magnitude_vector"
_SQUARES = "weight_squares"


class DoRA(LoRA):
    """See the module."""

    name = "dora"
    uses_base_output = True

    def variant(self, knobs: Lora) -> Method:
        """Itself."""
        return self

    def shapes(self, knobs: Lora, site: str, scope: Scope) -> dict[str, Shape]:
        """LoRA's, and m [O]."""
        return {**super().shapes(knobs, site, scope), M: (scope.linears[site][0],)}

    def start(self, knobs: Lora, site: str, scope: Scope, generator: torch.Generator) -> dict[str, Tensor]:
        """LoRA's, and the norms of W's rows."""
        return {**super().start(knobs, site, scope, generator), M: _squares(site, scope).sqrt()}

    def constants(self, knobs: Lora, site: str, scope: Scope) -> dict[str, Tensor]:
        """Squared norms [O] of W's rows."""
        return {_SQUARES: _squares(site, scope)}

    def output(self, x_GMI: Tensor, y_GMO: Tensor | None, p: Params) -> Tensor:
        """``(m/n - 1) o (y - b) + m/n o s B A x``."""
        assert y_GMO is not None
        factor_G1O = (p.tensors[M] / _norms(p)).unsqueeze(1).to(x_GMI.dtype)
        bias = getattr(p.module, "bias", None)
        plain_GMO = y_GMO if bias is None else y_GMO - bias
        if p.drop:
            plain_GMO = project(p.module, p.drop(x_GMI))  # as in peft, what is scaled anew sees what B A x sees
        return (factor_G1O - 1) * plain_GMO + factor_G1O * super().output(x_GMI, y_GMO, p)

    def weight_change(
        self, knobs: Lora, site: str, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]
    ) -> dict[str, Tensor] | None:
        """``m/n o (W + s B A) - W``."""
        change = super().weight_change(knobs, site, tensors, base)
        assert change is not None
        moved_OI = base["weight"] + change["weight"]
        factor_O1 = (tensors[M].float() / moved_OI.norm(dim=1)).unsqueeze(1)
        return {"weight": factor_O1 * moved_OI - base["weight"]}

    def low_rank(self, knobs: Lora, site: str, tensors: Mapping[str, Tensor]) -> LowRank | None:
        """The factor m/n makes it more than that."""
        return None


def _squares(site: str, scope: Scope) -> Tensor:
    return scope.weights(site)["weight"].square().sum(1)


def _norms(p: Params) -> Tensor:
    """n [G, O], fp32, without gradient."""
    with torch.no_grad():
        a_GRI, b_GOR, scale_G1 = p.tensors[A], p.tensors[B], p.numbers["scale"].unsqueeze(1)
        weight_a_GRO = project(p.module, a_GRI)
        cross_GO = (weight_a_GRO.mT * b_GOR).sum(-1)
        gram_GRR = torch.bmm(a_GRI, a_GRI.mT)
        square_GO = (torch.bmm(b_GOR, gram_GRR) * b_GOR).sum(-1)
        squares_GO = p.tensors[_SQUARES] + 2 * scale_G1 * cross_GO + scale_G1.square() * square_GO
        return squares_GO.clamp_min(0).sqrt()


DORA = DoRA()

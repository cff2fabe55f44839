"""LoRA: ``y = W x + s B A x`` (Hu et al. 2021, arXiv:2106.09685; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732).

``A`` [R, I] starts uniform (Kaiming, a = sqrt 5), ``B`` [O, R] at zero, so the start is the base. ``s`` is alpha / R,
or alpha / sqrt R with ``rslora``. A slot of smaller rank is padded with zero rows of A and zero columns of B: exact.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.config.method import Lora
from orchestrator.errors import MethodError
from orchestrator.methods.method import Hook, Method, Params, Scope, Shape
from orchestrator.methods.targets import match

A, B = "lora_A.weight", "lora_B.weight"
# peft options that change the function and that this method does not have.
_REFUSED = {
    "use_dora": "DoRA",
    "rank_pattern": "ranks per layer",
    "alpha_pattern": "scales per layer",
    "modules_to_save": "whole modules trained beside it",
    "lora_bias": "a bias in B",
    "layers_to_transform": "a choice of layers by index",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "targets that are not linear layers",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "replicated layers",
}


class LoRA(Method):
    """See the module."""

    knobs = Lora

    def sites(self, knobs: Lora, scope: Scope) -> dict[str, Hook]:
        """The linears that the targets name."""
        return dict.fromkeys(match(knobs.targets, scope.linears), "output")

    def shapes(self, knobs: Lora, site: str, scope: Scope) -> dict[str, Shape]:
        """A [R, I] and B [O, R]."""
        out, into = scope.linears[site]
        return {A: (knobs.rank, into), B: (out, knobs.rank)}

    def start(self, knobs: Lora, site: str, scope: Scope, generator: torch.Generator) -> dict[str, Tensor]:
        """A uniform, B zero."""
        shapes = self.shapes(knobs, site, scope)
        a_RI = nn.init.kaiming_uniform_(torch.empty(shapes[A]), a=math.sqrt(5), generator=generator)
        return {A: a_RI, B: torch.zeros(shapes[B])}

    def numbers(self, knobs: Lora) -> dict[str, float]:
        """The scale s."""
        return {"scale": knobs.scale}

    def dropout(self, knobs: Lora) -> float:
        """On the input of A."""
        return knobs.dropout

    def output(self, x_GMI: Tensor, y_GMO: Tensor | None, p: Params) -> Tensor:
        """``s B A x``."""
        a_GRI, b_GOR = (p.tensors[name].to(x_GMI.dtype) for name in (A, B))
        h_GMR = torch.bmm(p.drop(x_GMI) if p.drop else x_GMI, a_GRI.mT)
        return torch.bmm(h_GMR * p.numbers["scale"].to(h_GMR.dtype).view(-1, 1, 1), b_GOR.mT)

    def weight_change(self, knobs: Lora, tensors: Mapping[str, Tensor], weight_OI: Tensor) -> Tensor:
        """``s B A``."""
        return (tensors[B].float() @ tensors[A].float()) * knobs.scale

    def resized(
        self, old: Lora, new: Lora, tensors: Mapping[str, Tensor], site: str, scope: Scope, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Grown: new rows of A, zero columns of B. Shrunk: the best approximation of that rank (SVD)."""
        a_RI, b_OR = tensors[A].float(), tensors[B].float() * (old.scale / new.scale)
        if new.rank >= old.rank:
            grown = self.start(new, site, scope, generator)
            grown[A][: old.rank], grown[B][:, : old.rank] = a_RI, b_OR
            return grown
        u_OR, s_R, v_IR = torch.svd_lowrank(b_OR @ a_RI, q=old.rank, niter=4)
        root_R = s_R[: new.rank].sqrt()
        return {A: (v_IR[:, : new.rank] * root_R).T.contiguous(), B: u_OR[:, : new.rank] * root_R}

    def to_peft(self, knobs: Lora, sites: Sequence[str], scope: Scope) -> dict[str, Any]:
        """peft's ``LoraConfig``."""
        short = sorted({s.rsplit(".", 1)[-1] for s in sites})
        whole = [s for s in scope.linears if s.rsplit(".", 1)[-1] in short]
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": scope.base_id,
            "inference_mode": True,
            "r": knobs.rank,
            "lora_alpha": knobs.alpha,
            "lora_dropout": knobs.dropout,
            "use_rslora": knobs.rslora,
            "target_modules": short if whole == list(sites) else list(sites),
            "fan_in_fan_out": bool(sites) and all(s in scope.transposed for s in sites),
            "bias": "none",
        }

    def from_peft(self, config: Mapping[str, Any]) -> Lora:
        """Knobs of a plain LoRA."""
        asked = [why for key, why in _REFUSED.items() if config.get(key)]
        asked += ["trained biases"] if config.get("bias", "none") != "none" else []
        if asked:
            raise MethodError(f"this peft LoRA has {', '.join(asked)}, which the method lora does not do")
        targets = config.get("target_modules") or [_missing("target_modules")]
        return Lora(
            rank=int(config.get("r") or _missing("r")),
            alpha=float(config.get("lora_alpha") or _missing("lora_alpha")),
            rslora=bool(config.get("use_rslora")),
            dropout=float(config.get("lora_dropout") or 0.0),
            targets=(targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        )


def _missing(key: str) -> Any:
    raise MethodError(f"adapter_config.json has no {key}")

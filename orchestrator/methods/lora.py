"""LoRA: ``y = W x + s B A x`` (Hu et al. 2021, arXiv:2106.09685; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732).

``A`` [R, I] starts uniform (Kaiming, a = sqrt 5), ``B`` [O, R] at zero, so the start is the base. ``s`` is alpha / R,
or alpha / sqrt R with ``rslora``. A slot of smaller rank is padded with zero rows of A and zero columns of B: exact.

``start: pissa`` (Meng et al. 2024, arXiv:2404.02948): s B0 A0 are the first R singular directions of W. The base stays
as it is: the delta is s (B A - B0 A0), kept as one LoRA of rank 2R, [A; A0] and [B, -B0], whose second half is not
trained; so it starts as the base. ``start: loftq`` (Li et al. 2023, arXiv:2310.08659, one iteration): s B A are the
first R singular directions of what quantization took from W, so it starts nearer to the unquantized base.

Long, since peft's LoRA has many options that must come and go unchanged.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.base.low_rank import LowRank
from orchestrator.config.method import Lora
from orchestrator.errors import MethodError
from orchestrator.methods.method import Hook, Method, Params, Scope, Shape
from orchestrator.methods.targets import match, rematch, shortest

A, B = "lora_A.weight", "lora_B.weight"
# peft options that change the function and that this method does not have.
_REFUSED = {
    "modules_to_save": "whole modules trained beside it",
    "lora_bias": "a bias in B",
    "layers_to_transform": "a choice of layers by index",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "targets that are not linear layers",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "replicated layers",
    "exclude_modules": "layers that are left out",
    "use_qalora": "QALoRA's pooled inputs",
    "use_bdlora": "block-diagonal matrices",
    "arrow_config": "Arrow's routing",
    "kasa_config": "KaSA's singular values",
    "monteclora_config": "MonteCLoRA's sampling",
}
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Starts of peft's that change the base's own weights; what is saved of them stands on the changed base."""
_WHOLE_SVD = 1024
"""Up to this many rows or columns the singular directions are exact; beyond, by subspace iteration (peft's 16)."""


class LoRA(Method):
    """See the module."""

    name = "lora"
    knobs = Lora
    peft_type = "LORA"

    def variant(self, knobs: Lora) -> Method:
        """DoRA has another kernel."""
        from orchestrator.methods.dora import DORA  # it builds on this file

        return DORA if knobs.dora else self

    def sites(self, knobs: Lora, scope: Scope) -> dict[str, Hook]:
        """The linears that the targets name."""
        found = match(knobs.targets, scope.linears)
        for key in (*knobs.ranks, *knobs.alphas):
            match([key], found, "method.ranks and method.alphas")
        return dict.fromkeys(found, "output")

    def shapes(self, knobs: Lora, site: str, scope: Scope) -> dict[str, Shape]:
        """A [R, I] and B [O, R]; R is doubled with ``pissa``."""
        out, into = scope.linears[site]
        rank = _rank(knobs, site) * (2 if knobs.start == "pissa" else 1)
        return {A: (rank, into), B: (out, rank)}

    def start(self, knobs: Lora, site: str, scope: Scope, generator: torch.Generator) -> dict[str, Tensor]:
        """A uniform, B zero; or singular directions of the weight, or of its quantization error."""
        if knobs.start == "zero":
            shapes = self.shapes(knobs, site, scope)
            a_RI = nn.init.kaiming_uniform_(torch.empty(shapes[A]), a=math.sqrt(5), generator=generator)
            return {A: a_RI, B: torch.zeros(shapes[B])}
        weight_OI = scope.weights(site)["weight"]
        if knobs.start == "loftq":
            weight_OI = scope.source(site) - weight_OI
            if not weight_OI.any():
                raise MethodError(
                    f"start: loftq makes up for quantization, and {site} is not quantized; take start: zero"
                )
        b_OR, a_RI = directions(weight_OI / _scale(knobs, site), _rank(knobs, site), generator)
        if knobs.start == "loftq":
            return {A: a_RI, B: b_OR}
        return {A: torch.cat([a_RI, a_RI]), B: torch.cat([b_OR, -b_OR], dim=1)}

    def starts_as_base(self, knobs: Lora) -> bool:
        """All but LoftQ's start do."""
        return knobs.start != "loftq"

    def trained(self, knobs: Lora, name: str, shape: Shape) -> Shape | None:
        """All; with ``pissa`` the first half."""
        if knobs.start != "pissa":
            return shape
        return (shape[0] // 2, *shape[1:]) if name == A else (shape[0], shape[1] // 2) if name == B else shape

    def numbers(self, knobs: Lora, site: str) -> dict[str, float]:
        """The scale s."""
        return {"scale": _scale(knobs, site)}

    def dropout(self, knobs: Lora) -> float:
        """On the input of A."""
        return knobs.dropout

    def lr_ratio(self, knobs: Lora, name: str) -> float:
        """LoRA+: B learns faster than A."""
        return knobs.lr_ratio if name == B else 1.0

    def output(self, x_GMI: Tensor, y_GMO: Tensor | None, p: Params) -> Tensor:
        """``s B A x``."""
        h_GMR = torch.bmm(p.drop(x_GMI) if p.drop else x_GMI, p.cast(A, x_GMI).mT)
        return torch.bmm(h_GMR * p.number("scale", h_GMR), p.cast(B, x_GMI).mT)

    def weight_change(
        self, knobs: Lora, site: str, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]
    ) -> dict[str, Tensor] | None:
        """``s B A``."""
        return {"weight": (tensors[B].float() @ tensors[A].float()) * _scale(knobs, site)}

    def low_rank(self, knobs: Lora, site: str, tensors: Mapping[str, Tensor]) -> LowRank | None:
        """``s B A``."""
        return LowRank(tensors[A], tensors[B], _scale(knobs, site))

    def resized(
        self, old: Lora, new: Lora, tensors: Mapping[str, Tensor], site: str, scope: Scope, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Grown: new rows of A, zero columns of B. Shrunk: the best approximation of that rank (SVD)."""
        if old.start == "pissa" or new.start == "pissa":
            raise MethodError("a LoRA that started as pissa keeps its rank: half of it belongs to the start")
        rank_old, rank_new = _rank(old, site), _rank(new, site)
        a_RI, b_OR = tensors[A].float(), tensors[B].float() * (_scale(old, site) / _scale(new, site))
        if rank_new >= rank_old:
            grown = self.start(new.model_copy(update={"start": "zero"}), site, scope, generator)
            grown[A][:rank_old], grown[B][:, :rank_old] = a_RI, b_OR
            return grown
        u_OR, s_R, v_IR = torch.svd_lowrank(b_OR @ a_RI, q=rank_old, niter=4)
        root_R = s_R[:rank_new].sqrt()
        return {A: (v_IR[:, :rank_new] * root_R).T.contiguous(), B: u_OR[:, :rank_new] * root_R}

    def to_peft(self, knobs: Lora, sites: Sequence[str], scope: Scope) -> dict[str, Any]:
        """peft's ``LoraConfig``; a ``pissa`` start is a plain LoRA of twice the rank."""
        targets = shortest(sites, scope.modules)
        twice = 2 if knobs.start == "pissa" else 1
        rank, alpha = knobs.rank * twice, _alpha(knobs.alpha, knobs, twice)
        ranks = {s: _rank(knobs, s) * twice for s in sites}
        alphas = {s: _alpha(rematch(knobs.alphas, s, knobs.alpha), knobs, twice) for s in sites}
        return {
            "peft_type": "LORA",
            "base_model_name_or_path": scope.base_id,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": knobs.dropout,
            "use_rslora": knobs.rslora,
            "use_dora": knobs.dora,
            "rank_pattern": {f"{scope.prefix}{s}": r for s, r in ranks.items() if r != rank},
            "alpha_pattern": {f"{scope.prefix}{s}": a for s, a in alphas.items() if a != alpha},
            "target_modules": [s if "." not in s else f"{scope.prefix}{s}" for s in targets],
            "fan_in_fan_out": bool(sites) and all(s in scope.transposed for s in sites),
            "bias": "none",
        }

    def from_peft(self, config: Mapping[str, Any]) -> Lora:
        """Knobs of peft's LoRA, if what it holds is B A beside the base as it is."""
        asked = [why for key, why in _REFUSED.items() if config.get(key)]
        start = str(config.get("init_lora_weights", "")).lower()
        if start.startswith(_MOVES_BASE):
            raise MethodError(
                f"this peft LoRA started as {start}, which changes the base's own weights; peft makes it one for the "
                "base as it is with save_pretrained(..., path_initial_model_for_weight_conversion=...)"
            )
        asked += ["trained biases"] if config.get("bias", "none") != "none" else []
        if asked:
            raise MethodError(f"this peft LoRA has {', '.join(asked)}, which the method lora does not do")
        targets = config.get("target_modules") or [_missing("target_modules")]
        return Lora(
            rank=int(config.get("r") or _missing("r")),
            alpha=float(config.get("lora_alpha") or _missing("lora_alpha")),
            rslora=bool(config.get("use_rslora")),
            dora=bool(config.get("use_dora")),
            dropout=float(config.get("lora_dropout") or 0.0),
            ranks={_pattern(k): int(v) for k, v in (config.get("rank_pattern") or {}).items()},
            alphas={_pattern(k): float(v) for k, v in (config.get("alpha_pattern") or {}).items()},
            targets=(targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        )


def _rank(knobs: Lora, site: str) -> int:
    return rematch(knobs.ranks, site, knobs.rank)


def _scale(knobs: Lora, site: str) -> float:
    rank, alpha = _rank(knobs, site), rematch(knobs.alphas, site, knobs.alpha)
    return float(alpha / (rank**0.5 if knobs.rslora else rank))


def _alpha(alpha: float, knobs: Lora, times: int) -> float:
    """The alpha that keeps the scale where the rank is ``times`` as large."""
    return float(alpha * (times**0.5 if knobs.rslora else times))


def _pattern(key: str) -> str:
    """peft's pattern, which it looks for at the end of a name, as one over the whole name."""
    return rf"(?:.*\.)?(?:{key})"


def directions(weight_OI: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``B`` [O, R] and ``A`` [R, I], whose product is the best approximation of that rank (Eckart & Young 1936)."""
    if min(weight_OI.shape) <= max(_WHOLE_SVD, rank):
        u_OR, s_R, v_RI = torch.linalg.svd(weight_OI, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(1 << 62, (), generator=generator)))
            u_OR, s_R, v_IR = torch.svd_lowrank(weight_OI, q=rank, niter=16)
            v_RI = v_IR.T
    root_R = s_R[:rank].sqrt()
    b_OR, a_RI = u_OR[:, :rank] * root_R, root_R.unsqueeze(1) * v_RI[:rank]
    missing = rank - a_RI.shape[0]  # a rank above that of the weight
    if missing > 0:
        b_OR, a_RI = nn.functional.pad(b_OR, (0, missing)), nn.functional.pad(a_RI, (0, 0, 0, missing))
    return b_OR, a_RI


def _missing(key: str) -> Any:
    raise MethodError(f"adapter_config.json has no {key}")

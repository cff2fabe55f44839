"""IA3: learned factors on keys, values and feed-forward activations (Liu et al. 2022, arXiv:2205.05638).

``y = l o (W x + b)`` with l [O] at the projections to keys and values, ``y = W (l o x) + b`` with l [I] at the last
linear of a feed-forward block. ``l`` starts at one, so the start is the base. Where one linear makes queries, keys and
values (GPT-2, GPT-NeoX, Phi-3), all of its output is scaled, as in peft.

Long, since it acts at two hooks, and peft's directories come and go unchanged.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from orchestrator.config.method import IA3 as Knobs
from orchestrator.errors import MethodError
from orchestrator.methods.method import Hook, Method, Params, Scope, Shape
from orchestrator.methods.targets import match, shortest

_L = "ia3_l"
_AUTO = "auto"
_KEYS_VALUES = ("k_proj", "v_proj", "key", "value", "key_proj", "value_proj", "k_lin", "v_lin", "k", "v")
_FUSED = ("c_attn", "query_key_value", "qkv_proj", "Wqkv", "in_proj", "qkv")
"""What architectures call the projections to keys and to values, or the one to queries, keys and values."""
_REFUSED = ("modules_to_save", "exclude_modules")


class IA3(Method):
    """See the module."""

    name = "ia3"
    knobs = Knobs
    uses_base_output = True
    peft_type = "IA3"

    def sites(self, knobs: Knobs, scope: Scope) -> dict[str, Hook]:
        """Layers of ``feed_forward`` are scaled at their input, others of ``targets`` at their output."""
        inputs = _chosen(knobs.feed_forward, _feed_forward(scope), scope, "method.feed_forward")
        outputs = _chosen(knobs.targets, _keys_values(scope), scope, "method.targets")
        if not inputs | outputs:
            raise MethodError("ia3 with neither method.targets nor method.feed_forward has nothing to train")
        hooks: dict[str, Hook] = {**dict.fromkeys(outputs, "output"), **dict.fromkeys(inputs, "input")}
        return {site: hooks[site] for site in scope.linears if site in hooks}

    def shapes(self, knobs: Knobs, site: str, scope: Scope) -> dict[str, Shape]:
        """l, [O, 1] or [1, I] (peft's)."""
        out, into = scope.linears[site]
        return {_L: (out, 1) if self.sites(knobs, scope)[site] == "output" else (1, into)}

    def start(self, knobs: Knobs, site: str, scope: Scope, generator: torch.Generator) -> dict[str, Tensor]:
        """One."""
        return {name: torch.ones(shape) for name, shape in self.shapes(knobs, site, scope).items()}

    def output(self, x_GMI: Tensor, y_GMO: Tensor | None, p: Params) -> Tensor:
        """``(l - 1) o y``."""
        assert y_GMO is not None
        return y_GMO * (p.tensors[_L] - 1).to(y_GMO.dtype).mT

    def input(self, x_GMI: Tensor, p: Params) -> Tensor:
        """``(l - 1) o x``."""
        return x_GMI * (p.tensors[_L] - 1).to(x_GMI.dtype)

    def weight_change(
        self, knobs: Knobs, site: str, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]
    ) -> dict[str, Tensor] | None:
        """``(l - 1) o W`` along outputs or inputs; along outputs also ``(l - 1) o b``."""
        less_one = tensors[_L].float() - 1
        change = {"weight": less_one * base["weight"]}
        if "bias" in base and less_one.shape[1] == 1:
            change["bias"] = less_one.squeeze(1) * base["bias"]
        return change

    def to_peft(self, knobs: Knobs, sites: Sequence[str], scope: Scope) -> dict[str, Any]:
        """peft's ``IA3Config``."""
        hooks = self.sites(knobs, scope)
        named = {
            hook: [s if "." not in s else f"{scope.prefix}{s}" for s in shortest(found, scope.modules)]
            for hook in ("output", "input")
            for found in [[s for s in sites if hooks[s] == hook]]
        }
        return {
            "peft_type": "IA3",
            "base_model_name_or_path": scope.base_id,
            "inference_mode": True,
            "target_modules": [*named["output"], *named["input"]],
            "feedforward_modules": named["input"],
            "fan_in_fan_out": bool(sites) and all(s in scope.transposed for s in sites),
        }

    def from_peft(self, config: Mapping[str, Any]) -> Knobs:
        """Knobs of peft's IA3."""
        if asked := [key for key in _REFUSED if config.get(key)]:
            raise MethodError(f"this peft IA3 has {', '.join(asked)}, which the method ia3 does not do")
        if not config.get("target_modules"):
            raise MethodError("adapter_config.json has no target_modules")
        return Knobs(
            targets=_several(config["target_modules"]), feed_forward=_several(config.get("feedforward_modules"))
        )


def _chosen(targets: Sequence[str], auto: list[str], scope: Scope, key: str) -> set[str]:
    if _AUTO in targets and not auto:
        raise MethodError(f"{key}: auto finds nothing on this base; name the layers, or give []")
    found = match([t for t in targets if t != _AUTO], scope.linears, key)
    return {*found, *(auto if _AUTO in targets else ())}


def _keys_values(scope: Scope) -> list[str]:
    """Linears of attention that make keys or values; where there are none, those that make queries too."""
    for names in (_KEYS_VALUES, _FUSED):
        found = [s for s in scope.linears if s.rsplit(".", 1)[-1] in names]
        if found:
            return found
    return []


def _feed_forward(scope: Scope) -> list[str]:
    return [site for site, block in scope.sublayers.items() if block.block == "feed_forward"]


def _several(targets: str | Sequence[str] | None) -> tuple[str, ...]:
    return (targets,) if isinstance(targets, str) else tuple(sorted(targets or ()))

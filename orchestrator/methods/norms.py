"""Tuning of normalization layers: ``y = w o n(x) + b``, w and b trained (Zhao et al. 2023, arXiv:2312.11420).

n(x) is the layer's normalized input: LayerNorm's, or RMSNorm's without b. ``w`` and ``b`` [F] start as the base's own,
w0 and b0, so the start is the base; ``(w - w0) o n(x) + (b - b0)`` is added. Gemma's ``(1 + w) o n(x)`` adds the same.
A layer that works on heads (queries, keys) has the F of one head.

Long, since peft's directories come and go unchanged.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from orchestrator.base.norm import normalized
from orchestrator.config.method import Norms as Knobs
from orchestrator.errors import MethodError
from orchestrator.methods.method import Hook, Method, Params, Scope, Shape
from orchestrator.methods.targets import ALL_NORMS, match, shortest

_WEIGHT, _BIAS = "ln_tuning_layers.weight", "ln_tuning_layers.bias"
_REFUSED = ("modules_to_save", "exclude_modules")


class Norms(Method):
    """See the module."""

    name = "norms"
    knobs = Knobs
    peft_type = "LN_TUNING"

    def sites(self, knobs: Knobs, scope: Scope) -> dict[str, Hook]:
        """The normalization layers that the targets name."""
        found = match(knobs.targets, scope.norms, every=ALL_NORMS)
        odd = [name for name in found if name not in scope.takes_off_mean]
        if odd:
            raise MethodError(
                f"{odd[0]} is neither LayerNorm nor RMSNorm (a gate, or groups of features); name other layers in "
                "method.targets"
            )
        return dict.fromkeys(found, "output")

    def shapes(self, knobs: Knobs, site: str, scope: Scope) -> dict[str, Shape]:
        """w [F], and b [F] where the layer has one."""
        shape = (scope.norms[site],)
        return {_WEIGHT: shape, _BIAS: shape} if site in scope.biased else {_WEIGHT: shape}

    def start(self, knobs: Knobs, site: str, scope: Scope, generator: torch.Generator) -> dict[str, Tensor]:
        """The base's own."""
        base = scope.weights(site)
        return {name: base[name.rsplit(".", 1)[-1]] for name in self.shapes(knobs, site, scope)}

    def trained(self, knobs: Knobs, name: str, shape: Shape) -> Shape | None:
        """The weight, and the bias unless ``biases`` is off."""
        return None if name == _BIAS and not knobs.biases else shape

    def constants(self, knobs: Knobs, site: str, scope: Scope) -> dict[str, Tensor]:
        """w0 and b0, and whether the mean is taken off: 1 or 0."""
        return {**scope.weights(site), "mean": torch.tensor([float(scope.takes_off_mean[site])])}

    def output(self, x_GMI: Tensor, y_GMO: Tensor | None, p: Params) -> Tensor:
        """``(w - w0) o n(x) + (b - b0)``."""
        moved_GF = p.tensors[_WEIGHT] - p.tensors["weight"]
        x_GMHF = x_GMI.reshape(*x_GMI.shape[:2], -1, moved_GF.shape[-1])
        added_GMHF = normalized(p.module, x_GMHF, p.tensors["mean"].view(-1, 1, 1, 1)) * moved_GF[:, None, None]
        if _BIAS in p.tensors:
            added_GMHF = added_GMHF + (p.tensors[_BIAS] - p.tensors["bias"])[:, None, None]
        return added_GMHF.flatten(-2).to(x_GMI.dtype)

    def weight_change(
        self, knobs: Knobs, site: str, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]
    ) -> dict[str, Tensor] | None:
        """``w - w0`` and ``b - b0``."""
        short = {name.rsplit(".", 1)[-1]: tensor.float() for name, tensor in tensors.items()}
        return {name: tensor - base[name] for name, tensor in short.items()}

    def to_peft(self, knobs: Knobs, sites: Sequence[str], scope: Scope) -> dict[str, Any]:
        """peft's ``LNTuningConfig``."""
        targets = shortest(sites, scope.modules)
        return {
            "peft_type": "LN_TUNING",
            "base_model_name_or_path": scope.base_id,
            "inference_mode": True,
            "target_modules": [s if "." not in s else f"{scope.prefix}{s}" for s in targets],
        }

    def from_peft(self, config: Mapping[str, Any]) -> Knobs:
        """Knobs of peft's LN tuning."""
        if asked := [key for key in _REFUSED if config.get(key)]:
            raise MethodError(f"this peft LN tuning has {', '.join(asked)}, which the method norms does not do")
        targets = config.get("target_modules")
        if not targets:
            raise MethodError("adapter_config.json has no target_modules")
        return Knobs(targets=(targets,) if isinstance(targets, str) else tuple(sorted(targets)))

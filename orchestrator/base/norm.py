"""Normalization layers: what each does to its input before its own weight and bias.

Shapes: F features that it normalizes.
"""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

_SEEN = torch.tensor([[0.3, -1.2, 2.5], [1.0, 0.1, -0.4]])
"""What a layer is shown, repeated over its features."""


def is_norm(module: nn.Module) -> bool:
    """Whether it is a normalization layer with a weight."""
    weight = getattr(module, "weight", None)
    return "Norm" in type(module).__name__ and isinstance(weight, nn.Parameter) and not list(module.children())


def norm_features(module: Any) -> int:
    """F, whether or not its weight is here."""
    return int(getattr(module.weight, "ds_numel", module.weight.numel()))


def takes_off_mean(module: nn.Module) -> bool | None:
    """True for LayerNorm, False for RMSNorm, whatever the class is called; None where it is neither.

    A twin of the layer is asked, with weights of its own: with weight 1 less with weight 0 it gives the normalized
    input, also where a layer multiplies by 1 + w (Gemma). A layer that looks at more than its input (a gate) is
    neither.
    """
    if len(inspect.signature(type(module).forward).parameters) != 2:
        return None
    seen = _SEEN.repeat(1, -(-norm_features(module) // 3))[:, : norm_features(module)]
    try:
        found = _twin(module, 1.0)(seen) - _twin(module, 0.0)(seen)
        for with_mean in (True, False):
            if torch.allclose(found, normalized(module, seen, float(with_mean)), atol=1e-5):
                return with_mean
    except (AttributeError, RuntimeError, TypeError):  # it is shaped unlike either
        return None
    return None


def normalized(module: nn.Module, x: Tensor, mean: Tensor | float) -> Tensor:
    """``x`` over its root mean square, in fp32, along the last dimension; ``mean`` 1 takes the mean off before."""
    eps: Any = module.eps if hasattr(module, "eps") else module.variance_epsilon
    eps = torch.finfo(x.dtype).eps if eps is None else eps  # torch's own RMSNorm
    x = x.float()
    x = x - mean * x.mean(-1, keepdim=True)
    scaled: Tensor = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return scaled


def _twin(module: nn.Module, weight: float) -> Any:
    """The layer's own forward pass on a weight of its own: no hook, nothing sharded."""
    twin = copy.copy(module)
    features = norm_features(module)
    bias = None if getattr(module, "bias", None) is None else nn.Parameter(torch.zeros(features))
    own: dict[str, Any] = {"weight": nn.Parameter(torch.full((features,), weight)), "bias": bias}
    twin._parameters = {name: own[name] for name in module._parameters}
    return lambda x: type(module).forward(twin, x)

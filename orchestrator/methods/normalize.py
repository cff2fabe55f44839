"""What LayerNorm and RMSNorm make of their input before they scale it."""

from typing import Any

from torch import Tensor, nn

from orchestrator.errors import MethodError


def normalized(module: nn.Module, x_GMF: Tensor, scale_GD: Tensor) -> Tensor:
    """``scale o normalize(x)`` in x's dtype; computed in fp32, over the last D of the F features (a head's norm).

    Raises:
        MethodError: the module does not tell its epsilon.
    """
    named: Any = module
    eps = next((getattr(named, n) for n in ("variance_epsilon", "eps") if hasattr(named, n)), None)
    if eps is None:
        raise MethodError(f"{type(module).__name__} has no epsilon that can be read; its scale cannot be trained")
    size = scale_GD.shape[-1]
    x = x_GMF.float().view(*x_GMF.shape[:-1], -1, size)
    if "RMS" in type(module).__name__:
        hat = nn.functional.rms_norm(x, (size,), eps=eps)
    else:
        hat = nn.functional.layer_norm(x, (size,), eps=eps)
    return (hat * scale_GD.float()[:, None, None, :]).flatten(-2).to(x_GMF.dtype)

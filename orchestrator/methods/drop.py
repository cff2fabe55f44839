"""Dropout whose mask does not depend on where and with whom a token is computed.

Shapes: G slots, M tokens of each, I features.
"""

import torch
from torch import Tensor


class Drop:
    """Dropout whose mask depends only on seed, step, sample, position, site and feature.

    So the mask of a token is the same packed or alone, on any rank of any world size.
    """

    def __init__(self, rate_G: Tensor, key_GM: Tensor) -> None:
        self.rate_G, self.key_GM = rate_G, key_GM

    def __call__(self, x_GMI: Tensor) -> Tensor:
        """``x`` with features dropped and the rest scaled up."""
        feature_I = torch.arange(x_GMI.shape[-1], device=x_GMI.device)
        uniform = mix(self.key_GM.unsqueeze(-1) ^ mix(feature_I)).bitwise_and((1 << 24) - 1).float() / (1 << 24)
        keep = uniform >= self.rate_G.view(-1, 1, 1)
        return torch.where(keep, x_GMI / (1 - self.rate_G.view(-1, 1, 1)).to(x_GMI.dtype), 0)


def mix(key: Tensor) -> Tensor:
    """Scramble int64 keys (the finaliser of SplitMix64, Steele et al. 2014)."""
    key = (key ^ (key >> 30)) * -0x40A7B892E31B1A47
    key = (key ^ (key >> 27)) * -0x6B2FB644ECCEEE15
    return key ^ (key >> 31)

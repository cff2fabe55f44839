"""What a method is: which tensors it adds where, and what it computes at up to six hooks.

A hook sees the tokens of several slots at once, grouped: G slots with tokens in this batch, M tokens in each group
(padded with tokens of the same slot), I input and O output features, R rank. It returns what is *added*, never the
result, so that several methods can touch one site. The number of kernel launches must not grow with G.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from orchestrator.base.linear import is_transposed, linear_shape, linear_sites
from orchestrator.base.model import decoder_layers, text_config
from orchestrator.config.strict import Strict

Hook = Literal["input", "output", "sublayer", "embed", "key_value", "head"]
HOOKS: tuple[Hook, ...] = get_args(Hook)
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Scope:
    """What a method may know of the base before it is attached."""

    linears: dict[str, tuple[int, int]]
    """Every linear inside the transformer layers: name -> (O, I)."""
    transposed: frozenset[str]
    """Those that store their weight as [I, O] (GPT-2)."""
    layers: str
    """Name of the list of transformer layers."""
    count: int
    """Number of layers."""
    width: int
    """Hidden size."""
    base_id: str = ""
    """Name of the base, for the delta's own config."""

    @classmethod
    def of(cls, model: nn.Module, base_id: str = "") -> "Scope":
        """Read off a loaded or an empty model."""
        name, layers = decoder_layers(model)
        linears = dict(linear_sites(layers, name))
        return cls(
            linears={site: linear_shape(module) for site, module in linears.items()},
            transposed=frozenset(s for s, m in linears.items() if is_transposed(m)),
            layers=name,
            count=len(layers),
            width=text_config(model).hidden_size,
            base_id=base_id,
        )


@dataclass(frozen=True)
class Params:
    """One site's tensors of the slots in a group, stacked, with each slot's numbers."""

    tensors: Mapping[str, Tensor]
    """Name -> [G, ...], padded with zeros to the largest slot's shape."""
    numbers: Mapping[str, Tensor]
    """Name -> [G], such as ``scale``."""
    drop: "Drop | None" = field(default=None)
    """Dropout of this site, where any slot of the group has it."""


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


class Method(ABC):
    """One method of parameter-efficient fine-tuning. Holds no state: knobs and tensors are handed in."""

    knobs: type[Strict]
    """Its torch-free knobs in ``config``."""
    starts_as_base: bool = True
    """Whether the untrained delta changes nothing."""
    uses_base_output: bool = False
    """Whether the hook ``output`` looks at the base's output."""

    @abstractmethod
    def sites(self, knobs: Any, scope: Scope) -> dict[str, Hook]:
        """Where it acts: module name -> hook.

        Raises:
            MethodError: a target matches nothing.
        """

    @abstractmethod
    def shapes(self, knobs: Any, site: str, scope: Scope) -> dict[str, Shape]:
        """Its tensors at a site: name -> shape. A smaller slot is padded with zeros, which must change nothing."""

    @abstractmethod
    def start(self, knobs: Any, site: str, scope: Scope, generator: torch.Generator) -> dict[str, Tensor]:
        """Start values (fp32, CPU)."""

    def numbers(self, knobs: Any) -> dict[str, float]:
        """Per-slot constants that the hooks need."""
        return {}

    def dropout(self, knobs: Any) -> float:
        """Dropout rate."""
        return 0.0

    def virtual_tokens(self, knobs: Any) -> int:
        """Positions that it puts before each sequence."""
        return 0

    def input(self, x_GMI: Tensor, p: Params) -> Tensor:
        """Added to a layer's input."""
        raise NotImplementedError

    def output(self, x_GMI: Tensor, y_GMO: Tensor | None, p: Params) -> Tensor:
        """Added to a layer's output, given its input and, with ``uses_base_output``, the base's output."""
        raise NotImplementedError

    def sublayer(self, y_GMO: Tensor, p: Params) -> Tensor:
        """Added to the output of attention or feed-forward block."""
        raise NotImplementedError

    def embed(self, e_GMO: Tensor, position_GM: Tensor, p: Params) -> Tensor:
        """Added to the input embeddings."""
        raise NotImplementedError

    def key_value(self, p: Params) -> tuple[Tensor, Tensor]:
        """Keys and values put before a sequence's own, each [G, heads, virtual tokens, head size]."""
        raise NotImplementedError

    def head(self, h_GMI: Tensor, p: Params) -> Tensor:
        """Logits of the slot's own head."""
        raise NotImplementedError

    @abstractmethod
    def weight_change(self, knobs: Any, tensors: Mapping[str, Tensor], weight_OI: Tensor) -> Tensor | None:
        """What it adds to the dense weight [O, I] of a site; None where it is not a weight change."""

    def resized(
        self, old: Any, new: Any, tensors: Mapping[str, Tensor], site: str, scope: Scope, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The tensors at another size, the function kept where the new size can hold it."""
        raise NotImplementedError

    @abstractmethod
    def to_peft(self, knobs: Any, sites: Sequence[str], scope: Scope) -> dict[str, Any]:
        """Content of ``adapter_config.json``; peft's own where peft has the method."""

    @abstractmethod
    def from_peft(self, config: Mapping[str, Any]) -> Any:
        """Knobs from an ``adapter_config.json``.

        Raises:
            MethodError: it asks for something this method does not do.
        """

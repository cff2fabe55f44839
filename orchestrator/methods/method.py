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

from orchestrator.base.low_rank import LowRank
from orchestrator.config import Knobs
from orchestrator.errors import MethodError
from orchestrator.methods.drop import Drop
from orchestrator.methods.foreign import Foreign
from orchestrator.methods.scope import Scope as Scope  # methods import it from here

Hook = Literal["input", "output", "sublayer", "embed", "key_value", "head"]
HOOKS: tuple[Hook, ...] = get_args(Hook)
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Params:
    """One site's tensors of the slots in a group, stacked, with each slot's numbers."""

    tensors: Mapping[str, Tensor]
    """Name -> [G, ...], padded with zeros to the largest slot's shape. Constants are among them."""
    numbers: Mapping[str, Tensor]
    """Name -> [G], fp32, such as ``scale``."""
    module: nn.Module
    """The frozen module at the site; its weights are here while the hook runs, and are read only."""
    drop: Drop | None = field(default=None)
    """Dropout of this site, where any slot of the group has it."""

    def cast(self, name: str, like: Tensor) -> Tensor:
        """A tensor in the dtype of the activations."""
        return self.tensors[name].to(like.dtype)

    def number(self, name: str, like: Tensor) -> Tensor:
        """A number as [G, 1, 1] in the dtype of the activations."""
        return self.numbers[name].to(like.dtype).view(-1, 1, 1)


class Method(ABC):
    """One method of parameter-efficient fine-tuning. Holds no state: knobs and tensors are handed in."""

    name: str
    """Slots of one name share their tensors' stacks and kernels. The name in the table, or a variant's own."""
    knobs: type[Knobs]
    """Its torch-free knobs in ``config``."""
    packs: bool = True
    """Whether slots of it may share a base with others in training; else it runs solo."""
    mixes: bool = True
    """Whether its tensors lie in the bank's stacks, beside other slots'. Else ``inject`` makes what computes it."""
    uses_base_output: bool = False
    """Whether the hook ``output`` looks at the base's output."""
    peft_type: str | None = None
    """peft's name for it, where peft has it."""

    def starts_as_base(self, knobs: Any) -> bool:
        """Whether the untrained delta changes nothing."""
        return True

    def variant(self, knobs: Any) -> "Method":
        """The implementation for these knobs, where they ask for another kernel; else itself."""
        return self

    def inject(self, knobs: Any, model: nn.Module, scope: Scope, seed: int) -> Foreign:
        """Modules that compute it in the bank's place, put into the model; for a method that does not mix."""
        raise NotImplementedError

    @abstractmethod
    def sites(self, knobs: Any, scope: Scope) -> dict[str, Hook]:
        """Where it acts: module name -> hook, in the model's order.

        ``sublayer`` is named by the block's last linear (``Scope.sublayers``), ``embed`` by ``Scope.words``,
        ``key_value`` by a name in ``Scope.attention``.

        Raises:
            MethodError: a target matches nothing, or the base has not what the method needs.
        """

    @abstractmethod
    def shapes(self, knobs: Any, site: str, scope: Scope) -> dict[str, Shape]:
        """Its tensors at a site: name -> shape. A smaller slot is padded with zeros, which must change nothing."""

    @abstractmethod
    def start(self, knobs: Any, site: str, scope: Scope, generator: torch.Generator) -> dict[str, Tensor]:
        """Start values (fp32 or integers, CPU)."""

    def trained(self, knobs: Any, name: str, shape: Shape) -> Shape | None:
        """The leading part of a tensor that is trained; None where none of it is. The rest is saved, but stays."""
        return shape

    def constants(self, knobs: Any, site: str, scope: Scope) -> dict[str, Tensor]:
        """What its hooks need of the base, such as norms of its weights: held beside its tensors, not saved."""
        return {}

    def numbers(self, knobs: Any, site: str) -> dict[str, float]:
        """Per-slot constants that the hooks need."""
        return {}

    def dropout(self, knobs: Any) -> float:
        """Dropout rate."""
        return 0.0

    def lr_ratio(self, knobs: Any, name: str) -> float:
        """Learning rate of a tensor over that of the run."""
        return 1.0

    def shared(self, knobs: Any, scope: Scope) -> dict[str, str]:
        """Sites that use the tensors of another site: site -> the site that has them (a tied head)."""
        return {}

    def virtual_tokens(self, knobs: Any) -> int:
        """Tokens that it puts before each sequence, whose embeddings it gives (hook ``embed``)."""
        return 0

    def prefix_length(self, knobs: Any) -> int:
        """Keys and values that it puts before each sequence (hook ``key_value``); its positions begin after them."""
        return 0

    def unquantized(self, knobs: Any, count: int) -> frozenset[int]:
        """Layers, of ``count``, whose weights are to be held as they are."""
        return frozenset()

    def input(self, x_GMI: Tensor, p: Params) -> Tensor:
        """Added to a layer's input."""
        raise NotImplementedError

    def output(self, x_GMI: Tensor, y_GMO: Tensor | None, p: Params) -> Tensor:
        """Added to a layer's output, given its input and, with ``uses_base_output``, the base's output.

        At an embedding, ``x`` holds the token ids [G, M, 1].
        """
        raise NotImplementedError

    def sublayer(self, x_GMI: Tensor, y_GMO: Tensor, p: Params) -> Tensor:
        """Added to the output ``y`` of an attention or feed-forward block, given the block's input ``x``."""
        raise NotImplementedError

    def embed(self, e_GMO: Tensor, position_GM: Tensor, p: Params) -> Tensor:
        """Added to the input embeddings, in which virtual tokens, at positions below ``virtual_tokens``, are zero."""
        raise NotImplementedError

    def key_value(self, p: Params) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values before a sequence's own, each [G, heads, P, D], and how many of the P count: [G]."""
        raise NotImplementedError

    def head(self, h_GMI: Tensor, p: Params) -> Tensor:
        """Logits [G, M, C] of the slot's own head."""
        raise NotImplementedError

    @abstractmethod
    def weight_change(
        self, knobs: Any, site: str, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]
    ) -> dict[str, Tensor] | None:
        """What it adds to the parameters of a site: ``weight`` [O, I], ``bias`` [O]; None where it is no such change.

        ``base`` holds the site's own parameters, fp32. A bias that ``base`` has not is one that the site lacks.
        """

    def low_rank(self, knobs: Any, site: str, tensors: Mapping[str, Tensor]) -> LowRank | None:
        """The parts of a weight change ``s B A``, for a slot that has all tokens; None where it is no such change."""
        return None

    def resized(
        self, old: Any, new: Any, tensors: Mapping[str, Tensor], site: str, scope: Scope, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The tensors at another size, the function kept where the new size can hold it."""
        raise MethodError(f"a slot of {self.name} keeps its size; remove it and add another")

    def importance_samples(self, knobs: Any) -> int:
        """Training samples on which ``Scope.importance`` is to be measured before ``start``; 0 for none."""
        return 0

    def rechosen(
        self,
        knobs: Any,
        step: int,
        tensors: Mapping[str, Tensor],
        site: str,
        scope: Scope,
        generator: torch.Generator,
    ) -> dict[str, Tensor] | None:
        """After ``step`` steps: the site's tensors with another choice of weights; None to leave them.

        Beside the tensors, ``kept``: which entries of a trained one stayed, in the new order.
        """
        return None

    def to_peft(self, knobs: Any, sites: Sequence[str], scope: Scope) -> dict[str, Any]:
        """Content of ``adapter_config.json``; peft's own where peft has the method, else ours."""
        return {"peft_type": f"MANTA_{knobs.type.upper()}", "base_model_name_or_path": scope.base_id}

    def from_peft(self, config: Mapping[str, Any]) -> Any:
        """Knobs from an ``adapter_config.json``.

        Raises:
            MethodError: it asks for something this method does not do.
        """
        raise MethodError(f"{config.get('peft_type')} is not a type that the method {self.name} reads")

    def to_file(self, knobs: Any, tensors: Mapping[str, Tensor], scope: Scope) -> dict[str, Tensor]:
        """The tensors under the names, and in the layout, of the file; peft's where peft has the method."""
        return {f"{scope.prefix}{name}": tensor for name, tensor in tensors.items()}

    def from_file(self, knobs: Any, tensors: Mapping[str, Tensor], scope: Scope) -> dict[str, Tensor]:
        """Back from ``to_file``."""
        return {name.removeprefix(scope.prefix): tensor for name, tensor in tensors.items()}

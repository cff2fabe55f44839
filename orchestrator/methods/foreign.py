"""A slot whose tensors live in the peft library's modules, inside the model. Solo: no other slot stands beside it.

While it is there, every pass goes through it; ``Bank.routed`` refuses tokens of another slot or of the bare base.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from orchestrator.config import Peft
from orchestrator.errors import MethodError
from orchestrator.methods.fit import check_fit

_PREFIX = "base_model.model."


class Foreign:
    """See the module.

    Args:
        model: the dense base, changed in place; an empty one will do to look at sizes.
        config: peft's config object.
        options: what of it was asked for.
        seed: of start values and dropout.
    """

    def __init__(self, model: nn.Module, config: Any, options: Mapping[str, Any], seed: int) -> None:
        self._seed, self._model = seed, model
        self._before = dict(model.named_modules())
        before = config.to_dict()
        empty = any(p.is_meta for p in model.parameters())
        try:
            with _seeded(seed, _device(model)), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # such as that a Conv1D is transposed: peft then does what is right
                self._peft: Any = get_peft_model(model, config, low_cpu_mem_usage=empty)
        except NotImplementedError as error:
            reads = (
                "it reads the base's weights when it starts, so its size is not known before the run"
                if empty
                else error
            )
            raise MethodError(f"method.peft: peft cannot put {config.peft_type.value} here: {reads}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise MethodError(f"method.peft: peft cannot put {config.peft_type.value} here: {error}") from error
        found = self._peft.peft_config["default"].to_dict()
        learnt = {k: _plain(v) for k, v in found.items() if v != before[k] and k not in ("base_model_name_or_path",)}
        self.knobs = Peft(peft={"type": config.peft_type.value, **options, **learnt})
        """What was asked for, and what peft chose where that was silent."""
        named = model.named_modules()
        self._modules = {n: m for n, m in named if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)}
        self.sites = list(self._modules)
        """Modules of the base that peft's stand around."""
        own = {id(p) for m in self._before.values() for p in m.parameters(recurse=False)}
        self._trained_base = [
            (p, p.detach().clone()) for p in self._peft.parameters() if p.requires_grad and id(p) in own
        ]  # such as biases
        self.parameters = {
            n.removeprefix(_PREFIX).replace(".default", ""): p
            for n, p in self._peft.named_parameters()
            if p.requires_grad
        }
        """What is trained."""

    def windows(self) -> dict[str, Tensor]:
        """What peft would save, under peft's names without the prefix that all have."""
        state = get_peft_model_state_dict(self._peft, save_embedding_layers=False)
        return {name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take saved values.

        Raises:
            DeltaError: they are not those of this type on this base.
        """
        check_fit({n: tuple(t.shape) for n, t in self.windows().items()}, tensors)
        named = {n if n.startswith("base_model.") else f"{_PREFIX}{n}": t for n, t in tensors.items()}
        set_peft_model_state_dict(self._peft, named)

    def remove(self) -> None:
        """The model is as it was."""
        for name, module in self._before.items():
            if name and self._model.get_submodule(name) is not module:
                self._model.set_submodule(name, module)
        for parameter, value in self._trained_base:
            parameter.requires_grad_(False)
            parameter.data = value

    @contextmanager
    def running(self, slot: int, slot_BT: Tensor, step: int | None, sample_BT: Tensor | None) -> Iterator[None]:
        """A pass; with a step dropout is on, and its numbers depend on seed, step and samples alone."""
        if not bool((slot_BT == slot).all()):
            raise MethodError("peft's modules answer every token of a pass: none of another slot, or of the bare base")
        for module in self._modules.values():
            module.train(step is not None)
        if step is None or sample_BT is None:
            yield
            return
        key = hash((self._seed, step, *sample_BT[:, 0].tolist()))  # of integers: the same in every process
        with _seeded(key & ((1 << 63) - 1), sample_BT.device if sample_BT.is_cuda else _device(self._peft)):
            yield


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's own generators at a seed inside, as they were after it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value

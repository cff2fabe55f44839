"""What a delta adds to the parameters of a dense base, a module at a time, read off the base's files."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from orchestrator.base import base_dir, source_identity
from orchestrator.base.files import WeightReader
from orchestrator.base.load import empty_model
from orchestrator.base.names import origins
from orchestrator.config import Base
from orchestrator.delta import Delta, check_base
from orchestrator.errors import MethodError
from orchestrator.methods import Scope, from_files, knobs_from_peft, method_of


class Changes:
    """See the module.

    Args:
        delta: what changes.
        base: what is changed; its dense weights count, however it was held in training.

    Raises:
        WrongBaseError: the delta was made for other source weights.
        MethodError: the delta is no change of weights, or its layers are not in the base.
        BaseModelError: the base's files are unsound.
    """

    def __init__(self, delta: Delta, base: Base | Path | str) -> None:
        base = base if isinstance(base, Base) else Base(id=str(base))
        self.delta, self.base = delta, base.model_copy(update={"quantize": "none"})
        self.folder = base_dir(self.base)
        self.warnings = check_base(delta.manifest, source_identity(self.base))
        """What may matter, one sentence each."""
        model = empty_model(self.base, torch.float32)
        self.reader = WeightReader(self.folder)
        self.scope = Scope.of(model, self.base.id)
        self._where = origins(model, list(self.reader.names()))
        self.knobs = delta.manifest.method if delta.manifest else knobs_from_peft(delta.peft_config)
        self._method = method_of(self.knobs)
        if not self._method.mixes:
            raise MethodError(
                f"what the method {self.knobs.type} changes is known to the peft library alone: merge it with "
                "PeftModel.from_pretrained(base, folder).merge_and_unload()"
            )
        self.tensors = self._by_site(delta)
        """Site -> the delta's tensors there."""

    def _by_site(self, delta: Delta) -> dict[str, dict[str, Tensor]]:
        own = from_files(self.knobs, delta.manifest.task if delta.manifest else None, delta.tensors, self.scope)
        borrowed = self._method.shared(self.knobs, self.scope)
        found: dict[str, dict[str, Tensor]] = {}
        for site in self._method.sites(self.knobs, self.scope):
            names = () if site in borrowed else self._method.shapes(self.knobs, site, self.scope)
            if mine := {name: own.pop(f"{site}.{name}") for name in names if f"{site}.{name}" in own}:
                found[site] = mine
        if own or not found:
            strange = next(iter(own), "none of its tensors")
            raise MethodError(f"{delta.path}: {strange} belongs to no layer of the base")
        return found

    def of(self, site: str) -> dict[str, Tensor]:
        """What is added to a site's parameters, fp32: weight [O, I], bias [O]."""
        return self._change(site, self.parameters(site))

    def value(self, site: str, name: str) -> Tensor:
        """One parameter with the delta added, fp32; a weight as [O, I]."""
        base = self.parameters(site)
        return base[name] + self._change(site, base)[name]

    def parameters(self, site: str) -> dict[str, Tensor]:
        """The base's own, as ``of``."""
        found = {}
        for name in ("weight", "bias"):
            if f"{site}.{name}" in self._where:
                value = self.reader.read(self.source(site, name)).float()
                found[name] = value.T if name == "weight" and site in self.scope.transposed else value
        return found

    def source(self, site: str, name: str) -> str:
        """The name that a parameter has in the base's files."""
        origin = self._where.get(f"{site}.{name}")
        if origin is None:
            raise MethodError(
                f"the delta adds a {name} to {site}, which this architecture does not have there, so it cannot be "
                "merged; serve it as a delta"
            )
        if origin.converter is not None or len(origin.sources) != 1:
            raise MethodError(
                f"base {self.base.id} stores {site}.{name} together with other weights; it cannot be merged by file"
            )
        return origin.sources[0][0]

    def _change(self, site: str, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        change = self._method.weight_change(self.knobs, site, self.tensors[site], base)
        if change is None:
            raise MethodError(
                f"the method {self.knobs.type} is no change of weights, so it cannot be merged; serve it as a delta"
            )
        for name, value in change.items():
            if name in base and value.shape != base[name].shape:
                shapes = f"{tuple(value.shape)}, the base's {name} {tuple(base[name].shape)}"
                raise MethodError(f"{site}: the delta's change is {shapes}; it was made for another base")
        return change

"""From the names in a checkpoint to the names in the model, through transformers' own table of renames."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key


@dataclass
class Origin:
    """The tensors of a checkpoint that make one entry of the model."""

    sources: list[tuple[str, str]] = field(default_factory=list)
    """Checkpoint name and the converter's pattern that it matched."""
    converter: Any = None
    """transformers' converter, where the layout differs (fused experts)."""

    def tensors(self, target: str, read: Callable[[str], Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Model names and their tensors."""
        if self.converter is None:
            return {target: read(self.sources[0][0])}
        converter = copy.deepcopy(self.converter)
        for source, pattern in self.sources:
            converter.add_tensor(target, source, pattern, read(source))
        made = converter.convert(target, model=model, config=model.config)
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}


def origins(model: Any, names: list[str]) -> dict[str, Origin]:
    """Model name -> where it comes from, for each entry of the model that the checkpoint holds."""
    mapping = get_model_conversion_mapping(model)
    renames = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    wanted = model.state_dict()
    found: dict[str, Origin] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renames, converters, model.base_model_prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = name, None
        if target in wanted:
            origin = found.setdefault(target, Origin(converter=by_pattern[pattern] if pattern else None))
            origin.sources.append((name, pattern or name))
    return found

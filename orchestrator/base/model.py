"""Where the parts of a transformers model are, whatever its architecture calls them."""

from typing import Any

from torch import nn

from orchestrator.base.linear import linear_shape, linear_sites
from orchestrator.errors import BaseModelError


def text_config(model: Any) -> Any:
    """The config of the language model (multimodal models nest it)."""
    return model.config.get_text_config()


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the transformer layers.

    Raises:
        BaseModelError: no module list has as many entries as the config has layers.
    """
    count = text_config(model).num_hidden_layers
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not found:
        raise BaseModelError(f"{type(model).__name__}: no list of {count} transformer layers found")
    return min(found, key=lambda pair: pair[0].count("."))


def count_weights(model: nn.Module) -> tuple[int, int]:
    """Parameters of the model, and how many of them are weights of its layers' linears."""
    _, layers = decoder_layers(model)
    shapes = (linear_shape(module) for _, module in linear_sites(layers))
    return sum(p.numel() for p in model.parameters()), sum(o * i for o, i in shapes)


def bare(model: Any) -> Any:
    """The transformer without a language-model head; a bare one is itself."""
    return model.base_model


def head(model: Any) -> nn.Module:
    """The module that turns hidden states into logits."""
    module = model.get_output_embeddings()
    if not isinstance(module, nn.Module):
        raise BaseModelError(f"{type(model).__name__} has no language-model head; causal_lm needs one")
    return module

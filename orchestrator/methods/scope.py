"""What a method may know of the base: names, sizes and places of its parts, and its weights where a start needs them.

Shapes: O outputs, I inputs, V vocabulary, H hidden size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from orchestrator.base.attention import NAME
from orchestrator.base.encoder import POSITION_TABLE, sees_positions
from orchestrator.base.linear import dense_parameters, is_transposed, linear_shape, linear_sites
from orchestrator.base.model import decoder_layers, text_config
from orchestrator.base.norm import is_norm, norm_features, takes_off_mean
from orchestrator.errors import MethodError

_ATTENTION_OUT = ("o_proj", "out_proj", "c_proj", "dense", "Wo")
"""What architectures call the last linear of attention."""

Block = Literal["attention", "feed_forward"]


@dataclass(frozen=True)
class SubLayer:
    """An attention or feed-forward block, from its first linear to its last."""

    block: Block
    """Which of the two."""
    first: str
    """Name of the linear that reads the block's input."""


def _no_weights(site: str) -> dict[str, Tensor]:
    raise MethodError(f"the weights of {site} are not at hand")


def _not_measured(site: str) -> Tensor:
    raise MethodError(f"how much each weight of {site} matters was not measured: a training run does that at its start")


def _no_tokens(text: str) -> list[int]:
    raise MethodError("no tokenizer is at hand to read a text with")


@dataclass(frozen=True)
class Scope:
    """The base, as methods see it."""

    linears: dict[str, tuple[int, int]]
    """Every linear inside the transformer layers: name -> (O, I)."""
    transposed: frozenset[str]
    """Those that store their weight as [I, O] (GPT-2)."""
    biased: frozenset[str]
    """Linears and normalization layers that have a bias."""
    norms: dict[str, int]
    """Every normalization layer: name -> features."""
    takes_off_mean: dict[str, bool]
    """Those that are LayerNorm (True) or RMSNorm (False); others are neither."""
    embeddings: dict[str, tuple[int, int]]
    """Every embedding: name -> (V, H)."""
    words: str
    """Name of the embedding of the input tokens."""
    head: str | None
    """Name of the language-model head; None where the base has none."""
    tied: bool
    """Whether the head's weight is that of ``words``."""
    sublayers: dict[str, SubLayer]
    """Name of a block's last linear -> the block."""
    attention: dict[str, tuple[int, int]]
    """Attention modules whose keys and values can be prefixed: name -> (key-value heads, size of a head)."""
    layers: str
    """Name of the list of transformer layers."""
    count: int
    """Number of layers."""
    width: int
    """Hidden size H."""
    modules: frozenset[str] = frozenset()
    """Names of all modules."""
    others: tuple[str, ...] = ()
    """Parameters inside the layers that belong to no linear and no normalization layer, such as fused experts."""
    shared_inputs: frozenset[str] = frozenset()
    """Linears and normalization layers that see relative positions, which all rows of a pass share (DeBERTa)."""
    base_id: str = ""
    """Name of the base, for the delta's own config."""
    embed_scale: float = 1.0
    """What the embedding of the input tokens multiplies its weights by (Gemma 3)."""
    prefix: str = ""
    """What transformers' task models put before these names (``bert.``); empty where the base is one."""
    weights: Callable[[str], dict[str, Tensor]] = field(default=_no_weights, compare=False, repr=False)
    """A module's own parameters, dense, fp32, on the CPU: weight [O, I] (never transposed) and bias [O]. Where the base
    is sharded, every rank must ask."""
    source: Callable[[str], Tensor] = field(default=_no_weights, compare=False, repr=False)  # type: ignore[assignment]
    """A linear's weight [O, I] as it was before quantization, fp32, on the CPU."""
    importance: Callable[[str], Tensor] = field(default=_not_measured, compare=False, repr=False)
    """How much each of a linear's weights [O, I] matters to the training data, fp32, on the CPU."""
    encode: Callable[[str], list[int]] = field(default=_no_tokens, compare=False, repr=False)
    """Token ids of a text, without special tokens."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        base_id: str = "",
        *,
        source: Callable[[str], Tensor] | None = None,
        encode: Callable[[str], list[int]] | None = None,
    ) -> "Scope":
        """Read off a loaded or an empty model."""
        name, layers = decoder_layers(model)
        linears = dict(linear_sites(layers, name))
        modules = dict(model.named_modules())
        norms = {n: m for n, m in modules.items() if is_norm(m)}
        kinds = {n: kind for n, m in norms.items() if (kind := takes_off_mean(m)) is not None}
        tables = {n: m for n, m in modules.items() if isinstance(m, nn.Embedding)}
        embeddings = {n: m for n, m in tables.items() if not n.endswith(POSITION_TABLE)}
        named: Any = model
        words = next(n for n, m in embeddings.items() if m is named.get_input_embeddings())
        out = named.get_output_embeddings()
        return cls(
            linears={site: linear_shape(module) for site, module in linears.items()},
            transposed=frozenset(s for s, m in linears.items() if is_transposed(m)),
            biased=frozenset(n for n, m in {**linears, **norms}.items() if getattr(m, "bias", None) is not None),
            norms={n: norm_features(m) for n, m in norms.items()},
            takes_off_mean=kinds,
            embeddings={n: (m.num_embeddings, m.embedding_dim) for n, m in embeddings.items()},
            words=words,
            head=next((n for n, m in modules.items() if m is out), None) if out is not None else None,
            tied=out is not None and out.weight is embeddings[words].weight,
            sublayers={s: b for i in range(len(layers)) for s, b in _blocks(f"{name}.{i}.", linears, model)},
            attention=_attention(model, name),
            layers=name,
            count=len(layers),
            width=text_config(model).hidden_size,
            modules=frozenset(modules),
            others=tuple(
                f"{name}.{n}"
                for n, _ in layers.named_parameters()
                if f"{name}.{n}".rpartition(".")[0] not in {**linears, **norms}
            )
            + tuple(f"{n}.weight" for n in tables if n not in embeddings),
            shared_inputs=frozenset(n for n in (*linears, *norms) if sees_positions(model, n)),
            base_id=base_id,
            embed_scale=_embed_scale(embeddings[words]),
            prefix="" if out is not None else f"{named.base_model_prefix}.",
            weights=lambda site: dense_parameters(model.get_submodule(site)),
            source=source or _no_weights,  # type: ignore[arg-type]
            encode=encode or _no_tokens,
        )

    def layer_of(self, site: str) -> int | None:
        """Number of the layer that a module is in; None outside the layers."""
        head, _, rest = site.partition(f"{self.layers}.")
        return int(rest.split(".")[0]) if not head and rest else None


def _embed_scale(words: Any) -> float:
    # The plain number where there is one: a buffer of an empty model has no value.
    return float(getattr(words, "scalar_embed_scale", getattr(words, "embed_scale", 1.0)))


def _blocks(layer: str, linears: Mapping[str, nn.Module], model: nn.Module) -> list[tuple[str, SubLayer]]:
    """The blocks of one layer; one whose last linear cannot be told (fused experts) is left out."""
    mine = [n for n in linears if n.startswith(layer)]
    attention = [n for n in mine if any("att" in part for part in n.removeprefix(layer).split(".")[:-1])]
    feed_forward = [n for n in mine if n not in attention]
    width = text_config(model).hidden_size
    found: list[tuple[str, SubLayer]] = []
    if attention:
        ends = [n for n in attention if n.rsplit(".", 1)[-1] in _ATTENTION_OUT] or attention[-1:]
        starts = [n for n in attention if n not in ends]
        if starts:
            found.append((ends[-1], SubLayer("attention", starts[0])))
    ends = [n for n in feed_forward if linear_shape(linears[n])[0] == width]
    fused = any("Experts" in type(m).__name__ for n, m in model.named_modules() if n.startswith(layer))
    if not fused and ends and feed_forward[0] != ends[-1]:
        found.append((ends[-1], SubLayer("feed_forward", feed_forward[0])))
    return found


def _attention(model: Any, layers: str) -> dict[str, tuple[int, int]]:
    """Modules that hand their keys and values to the attention function that this project registers."""
    config = text_config(model)
    if not getattr(model, "_supports_sdpa", False) or config._attn_implementation not in ("sdpa", NAME):
        return {}
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    own: Sequence[str] = [
        n
        for n, m in model.named_modules()
        if n.startswith(f"{layers}.") and "Attention" in type(m).__name__ and any(linear_sites_of(m))
    ]
    return dict.fromkeys(own, (kv_heads, size))


def linear_sites_of(module: nn.Module) -> list[str]:
    """Names of the linears that are direct children."""
    return [n for n, _ in linear_sites(module) if n and "." not in n]

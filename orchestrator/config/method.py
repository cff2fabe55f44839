"""The torch-free knobs of each method; ``Method`` is their union, told apart by ``type``."""

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from orchestrator.config.strict import Strict


class Knobs(Strict):
    """What the knobs of all methods share."""

    default_lr: ClassVar[float] = 2e-4
    """Peak learning rate of AdamW where ``train.lr`` is silent."""
    whole_base: ClassVar[bool] = False
    """Whether it needs a base that is neither quantized nor sharded."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: object) -> object:
        if isinstance(value, dict) and isinstance(value.get("targets"), str):
            return {**value, "targets": [value["targets"]]}
        return value


class Full(Knobs):
    """Every parameter: the baseline to compare with. Dense base, solo."""

    default_lr: ClassVar[float] = 2e-5
    type: Literal["full"] = "full"
    """Method name."""


class LastLayers(Knobs):
    """The outer layers only, all of their parameters; these layers are held unquantized (Lee et al. 2019)."""

    default_lr: ClassVar[float] = 5e-5
    type: Literal["last_layers"] = "last_layers"
    """Method name."""
    layers: int = Field(default=2, ge=1)
    """How many layers, counted from the output."""
    norms: bool = True
    """Train their normalization layers, and the final one, too."""
    head: bool = False
    """Train the language-model head too."""


class BitFit(Knobs):
    """Bias terms (Ben Zaken et al. 2021, arXiv:2106.10199); added where the architecture has none."""

    default_lr: ClassVar[float] = 1e-3
    type: Literal["bitfit"] = "bitfit"
    """Method name."""
    targets: tuple[str, ...] = ("all-linear",)
    """Linear layers: ``all-linear``, names such as ``q_proj``, or regular expressions over full names."""
    norms: bool = True
    """Train the biases of normalization layers too, where they have any."""


class Sparse(Knobs):
    """A sparse subset of the weights (Guo et al. 2020, arXiv:2012.07463; Sung et al. 2021, arXiv:2111.09839)."""

    default_lr: ClassVar[float] = 5e-4
    type: Literal["sparse"] = "sparse"
    """Method name."""
    targets: tuple[str, ...] = ("all-linear",)
    """Linear layers: ``all-linear``, names such as ``q_proj``, or regular expressions over full names."""
    density: float = Field(default=0.005, gt=0, le=1)
    """Share of each layer's weights that is trained."""
    choose: Literal["magnitude", "fisher", "random"] = "magnitude"
    """Which weights: the largest, those of the highest Fisher information on the training data, or drawn ones."""
    fisher_samples: int = Field(default=64, ge=1)
    """Training samples that the Fisher information is taken from."""
    rechoose_every: int | None = Field(default=None, ge=1)
    """Steps between new choices (SET, Mocanu et al. 2018): the least changed go, others are drawn; default: never."""
    rechoose_share: float = Field(default=0.2, gt=0, le=1)
    """Share of the chosen weights that goes at each new choice."""


class Norms(Knobs):
    """Scales (and biases) of LayerNorm and RMSNorm (Zhao et al. 2023, arXiv:2312.11420)."""

    default_lr: ClassVar[float] = 1e-3
    type: Literal["norms"] = "norms"
    """Method name."""
    targets: tuple[str, ...] = ("all-norms",)
    """Normalization layers: ``all-norms``, names such as ``ln_1``, or regular expressions over full names."""
    biases: bool = True
    """Train their biases too, where they have any."""


class Prompt(Knobs):
    """Soft prompt: trained embeddings before each sequence (Lester et al. 2021, arXiv:2104.08691)."""

    default_lr: ClassVar[float] = 1e-1
    type: Literal["prompt"] = "prompt"
    """Method name."""
    tokens: int = Field(default=20, ge=1, le=4096)
    """Virtual tokens."""
    start: Literal["vocabulary", "text", "random"] = "vocabulary"
    """Start values: embeddings of drawn tokens, of ``text`` (repeated or cut to ``tokens``), or random ones."""
    text: str | None = None
    """What the prompt starts as, with ``start: text``."""

    @model_validator(mode="after")
    def _has_text(self) -> "Prompt":
        if (self.start == "text") != bool(self.text):
            raise ValueError("start: text and text go together; give both or neither")
        return self


class Prefix(Knobs):
    """Trained keys and values before each sequence, in every layer (Li & Liang 2021, arXiv:2101.00190)."""

    default_lr: ClassVar[float] = 1e-1
    type: Literal["prefix"] = "prefix"
    """Method name."""
    tokens: int = Field(default=20, ge=1, le=4096)
    """Virtual tokens."""
    std: float = Field(default=1.0, gt=0)
    """Standard deviation of the random start values; far below that of real keys and values it learns slowly."""


class Bottleneck(Knobs):
    """Adapters: a small feed-forward network at a sub-layer (Houlsby et al. 2019, arXiv:1902.00751)."""

    default_lr: ClassVar[float] = 1e-3
    type: Literal["bottleneck"] = "bottleneck"
    """Method name."""
    size: int = Field(default=32, ge=1, le=16384)
    """Width of the bottleneck."""
    placement: Literal["houlsby", "pfeiffer", "parallel"] = "pfeiffer"
    """After attention and feed-forward block; after the feed-forward block alone (Pfeiffer et al. 2020,
    arXiv:2005.00247); or beside the feed-forward block (He et al. 2021, arXiv:2110.04366)."""
    activation: Literal["relu", "gelu", "silu"] = "relu"
    """Between the two projections."""
    scale: float = Field(default=1.0, gt=0)
    """Factor on the adapter's output."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""


class IA3(Knobs):
    """Learned factors on keys, values and feed-forward activations (Liu et al. 2022, arXiv:2205.05638)."""

    default_lr: ClassVar[float] = 3e-3
    type: Literal["ia3"] = "ia3"
    """Method name."""
    targets: tuple[str, ...] = ("auto",)
    """Layers whose output is scaled; ``auto``: the projections to keys and values."""
    feed_forward: tuple[str, ...] = ("auto",)
    """Layers whose input is scaled; ``auto``: the last linear of each feed-forward block."""

    @model_validator(mode="before")
    @classmethod
    def _short_too(cls, value: object) -> object:
        if isinstance(value, dict) and isinstance(value.get("feed_forward"), str):
            return {**value, "feed_forward": [value["feed_forward"]]}
        return value


class Lora(Knobs):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685) and its derivatives."""

    type: Literal["lora"] = "lora"
    """Method name."""
    rank: int = Field(default=16, ge=1, le=4096)
    """Rank r of the update B A."""
    alpha: float = Field(default=32.0, gt=0)
    """Scale: alpha / r, or alpha / sqrt(r) with ``rslora``."""
    rslora: bool = False
    """Rank-stabilized scale (Kalajdzievski 2023, arXiv:2312.03732)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the input of A."""
    targets: tuple[str, ...] = ("all-linear",)
    """Layers: ``all-linear``, names such as ``q_proj``, or regular expressions over full names."""
    dora: bool = False
    """Train the magnitude of each output's weights apart from their direction (Liu et al. 2024, arXiv:2402.09353)."""
    lr_ratio: float = Field(default=1.0, gt=0)
    """Learning rate of B over that of A (LoRA+, Hayou et al. 2024, arXiv:2402.12354; there 16)."""
    start: Literal["zero", "pissa", "loftq"] = "zero"
    """Start of B A: zero; the weight's first r singular directions (PiSSA, Meng et al. 2024, arXiv:2404.02948), the
    base kept as it is; or what quantization took from the weight (LoftQ, Li et al. 2023, arXiv:2310.08659)."""
    ranks: dict[str, int] = {}
    """Other ranks for some layers: target -> rank."""
    alphas: dict[str, float] = {}
    """Other alphas for some layers: target -> alpha."""

    @model_validator(mode="after")
    def _goes_together(self) -> "Lora":
        if self.dora and self.start != "zero":
            raise ValueError(f"dora and start: {self.start} exclude each other; take start: zero")
        if low := [name for name, rank in self.ranks.items() if rank < 1]:
            raise ValueError(f"ranks: {', '.join(low)}: a rank is at least 1")
        return self


class Peft(Knobs):
    """Any method of the peft library, handed through; solo, on a dense base that is not sharded."""

    whole_base: ClassVar[bool] = True
    type: Literal["peft"] = "peft"
    """Method name."""
    peft: dict[str, Any]
    """peft's own ``type`` (such as ``VERA``) and options, named as peft names them."""

    @model_validator(mode="after")
    def _has_type(self) -> "Peft":
        if not isinstance(self.peft.get("type"), str):
            raise ValueError("peft: its type is missing; such as {type: VERA, r: 64}")
        return self


def _short(value: object) -> object:
    """``lora`` is ``{type: lora}``; knobs without a type are LoRA's; ``{peft: {...}}`` needs none."""
    if isinstance(value, str):
        return {"type": value}
    if isinstance(value, dict) and "type" not in value:
        return {"type": "peft" if "peft" in value else "lora", **value}
    return value


Method = Annotated[
    Lora | Full | LastLayers | BitFit | Sparse | Norms | Prompt | Prefix | Bottleneck | IA3 | Peft,
    Field(discriminator="type"),
    BeforeValidator(_short),
]
"""One method and its knobs."""

KINDS: dict[str, type[Knobs]] = {
    kind.model_fields["type"].default: kind for kind in get_args(get_args(Method)[0]) if issubclass(kind, Knobs)
}
"""The knobs of each method, by its name."""


def default_of(kind: type[Knobs], way: tuple[str, ...]) -> Any:
    """Default of the knob at ``way``; None where there is none."""
    field = kind.model_fields.get(way[0]) if len(way) == 1 else None
    return None if field is None or field.is_required() else field.default

"""Load a base shard by shard: read one layer, quantize it, hand it to the sharder, go on.

Peak memory is this rank's shard and one layer.
"""

import ctypes
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from orchestrator.base.attention import use
from orchestrator.base.files import WeightReader, base_dir, load_tokenizer
from orchestrator.base.identity import source_identity
from orchestrator.base.linear import HELD, Int8Linear, NF4Linear
from orchestrator.base.model import decoder_layers
from orchestrator.base.names import Origin, origins
from orchestrator.config import Base, Identity
from orchestrator.errors import BaseModelError, OutOfMemoryError

Sharder = Callable[[nn.Module], None]
"""Takes a freshly loaded module and leaves this rank's share of its parameters."""


@dataclass(frozen=True)
class LoadReport:
    """What the load did, on this rank."""

    parameters: int
    """Parameters of the base."""
    quantized_fraction: float
    """Share of the transformer layers' parameters held in 4 or 8 bits."""
    bytes_total: int
    """Bytes of the whole base as it is held."""
    bytes_here: int
    """Bytes of parameters that this rank holds."""
    state_bytes: int
    """Bytes of quantization state, on every rank."""
    fused_kernels: bool
    """Whether Liger's kernels took the place of the model's norms, activations and rotations."""
    peak_rss: int
    """Highest resident memory of the process so far, bytes."""
    seconds: float
    """Duration."""

    def as_dict(self) -> dict[str, float]:
        """Plain values, for tracking."""
        return asdict(self)


@dataclass
class FrozenBase:
    """A loaded base."""

    model: Any
    """transformers model, evaluation mode, nothing trainable."""
    tokenizer: Any
    """Its tokenizer."""
    identity: Identity
    """Who it is."""
    report: LoadReport
    """What the load did."""
    source: Callable[[str], Tensor]
    """A linear's weight [O, I] as it was before quantization, fp32; read from the files when asked for."""


def compute_dtype(base: Base, device: str | torch.device) -> torch.dtype:
    """bf16 on a GPU, fp32 on a CPU, unless the config says otherwise."""
    if base.precision == "auto":
        return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    return torch.bfloat16 if base.precision == "bf16" else torch.float32


def load_base(
    base: Base,
    *,
    device: str | torch.device = "cpu",
    sharder: Sharder | None = None,
    identity: Identity | None = None,
    encoder: bool = False,
    unquantized: frozenset[int] = frozenset(),
) -> FrozenBase:
    """Load, quantize and freeze a base.

    Args:
        base: which, and how it is held.
        device: where the weights go.
        sharder: called with each layer as soon as it is loaded, last with the whole model.
        identity: where already known (hashing reads all weights once).
        encoder: the bare transformer, such as BERT, that a classification head goes on, not a causal language model.
        unquantized: layers that are held as they are.

    Raises:
        BaseModelError: not there, broken, or it cannot be held as asked.
        OutOfMemoryError: it does not fit.
    """
    begin = time.monotonic()
    folder = base_dir(base)
    dtype = compute_dtype(base, device)
    try:
        model = empty_model(base, dtype, encoder=encoder)
        count = sum(p.numel() for p in model.parameters())
        source = _Random(base.random_init, torch.device(device)) if base.random_init is not None else None
        _fill(model, base, source or WeightReader(folder), torch.device(device), dtype, sharder, unquantized)
    except (torch.OutOfMemoryError, MemoryError) as e:
        raise OutOfMemoryError(
            f"base {base.id} does not fit on {device}: {str(e).splitlines()[0] if str(e) else 'out of memory'}. "
            "Hold it in fewer bits (base.quantize=nf4) or shard it over more workers (shard=3)"
        ) from e
    model.requires_grad_(False).eval()
    model.config.use_cache = False
    fused = _fuse_kernels(model, base, torch.device(device))
    use(model)
    return FrozenBase(
        model=model,
        tokenizer=load_tokenizer(base),
        identity=identity or source_identity(base, dtype=dtype, unquantized=unquantized),
        report=_report(model, base, count, time.monotonic() - begin, unquantized, fused),
        source=lambda site: _source_weight(base, site, encoder=encoder),
    )


def _source_weight(base: Base, site: str, *, encoder: bool) -> Tensor:
    """A linear's weight [O, I] off the files, fp32."""
    if base.random_init is not None:
        raise BaseModelError("a base of random weights keeps none of them as they were before quantization")
    model = empty_model(base, torch.float32, encoder=encoder)
    reader, name = WeightReader(base_dir(base)), f"{site}.weight"
    weight = origins(model, list(reader.names()))[name].tensors(name, reader.read, model)[name].float()
    return weight.T if isinstance(model.get_submodule(site), Conv1D) else weight


def empty_model(base: Base, dtype: torch.dtype, *, encoder: bool = False) -> Any:
    """The model on the meta device: its structure and no memory."""
    folder = base_dir(base)
    attention = None if base.attention == "auto" else base.attention
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=base.trust_remote_code)
        if getattr(config, "quantization_config", None) is not None:
            raise BaseModelError(
                f"base {base.id} is already quantized ({config.quantization_config.get('quant_method', 'unknown')}); "
                "name the original weights and let base.quantize hold them in fewer bits"
            )
        _without_dropout(config)
        with torch.device("meta"):
            model = (AutoModel if encoder else AutoModelForCausalLM).from_config(
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=base.trust_remote_code
            )
    except (OSError, ValueError, KeyError, ImportError) as e:
        if isinstance(e, BaseModelError):
            raise
        kind = "an encoder" if encoder else "a causal language model"
        raise BaseModelError(f"base {base.id}: not {kind} that transformers loads: {e}") from e
    pooled = encoder and getattr(model, "pooler", None) is not None and base.random_init is None
    if pooled and not any("pooler." in name for name in WeightReader(folder).names()):
        model.pooler = None  # it was not trained with the rest (RoBERTa)
    return model


def _without_dropout(config: Any) -> None:
    """The base is frozen: nothing of it is to be random, in training mode either (recomputed activations need it)."""
    for key, value in vars(config.get_text_config()).items():
        if ("dropout" in key or key.endswith("_pdrop")) and isinstance(value, int | float):
            setattr(config.get_text_config(), key, 0.0)


class _Random:
    """Random weights for benchmarks: N(0, 0.02), ones for scales, zeros for biases; made on the device."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.device = device

    def make(self, name: str, like: Tensor) -> Tensor:
        if like.dim() > 1:
            made = torch.empty(like.shape, dtype=torch.bfloat16, device=self.device)
            return made.normal_(0, 0.02, generator=self.generator)
        fill = torch.zeros if name.endswith("bias") else torch.ones
        return fill(like.shape, device=self.device)


def _fill(
    model: Any,
    base: Base,
    source: "WeightReader | _Random",
    device: torch.device,
    dtype: torch.dtype,
    sharder: Sharder | None,
    unquantized: frozenset[int],
) -> None:
    """Every parameter and buffer of ``model``, layer by layer, then the rest."""
    prefix, layers = decoder_layers(model)
    tied = set(model.all_tied_weights_keys)
    entries = {n: t for n, t in model.state_dict(keep_vars=True).items() if n not in tied}
    where = origins(model, list(source.names())) if isinstance(source, WeightReader) else {}
    made: dict[str, Tensor] = {}

    def tensor(name: str) -> Tensor:
        if isinstance(source, _Random):
            return source.make(name, entries[name])
        if name not in made:
            for target in _producers(where, name, base):
                made.update(where[target].tensors(target, source.read, model))
        return made.pop(name)

    if isinstance(source, WeightReader):
        _complete(model, entries, where, base)
    _buffers(model, device)
    held = HELD.get(base.quantize)

    def hand_over(module: nn.Module) -> None:
        if sharder:
            sharder(module)
        _give_back()

    for index, layer in enumerate(layers):
        here = None if index in unquantized else held
        _fill_module(layer, f"{prefix}.{index}.", tensor, here, device, dtype, hand_over)
        made.clear()
        hand_over(layer)
    _fill_module(model, "", tensor, None, device, dtype, None if tied else hand_over, skip=tied)
    model.tie_weights()
    hand_over(model)


def _give_back() -> None:
    """Return freed memory to the system: what each module leaves in glibc's heap adds up, to more than a layer."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _producers(where: dict[str, Origin], name: str, base: Base) -> list[str]:
    if name in where:
        return [name]
    # A converter may make several entries from one source; transformers files it under the first of them.
    stem = name.rsplit(".", 2)[0]
    if near := [t for t, o in where.items() if o.converter is not None and t.startswith(stem)]:
        return near
    raise BaseModelError(f"base {base.id}: the weight files have no {name}")


def _complete(model: Any, entries: dict[str, Tensor], where: dict[str, Origin], base: Base) -> None:
    converted = [t.rsplit(".", 2)[0] for t, o in where.items() if o.converter is not None]
    absent = [n for n in entries if n not in where and not any(n.startswith(stem) for stem in converted)]
    if absent:
        raise BaseModelError(
            f"base {base.id}: the weight files lack {len(absent)} of {len(entries)} tensors, such as {absent[0]}; "
            f"are they for {type(model).__name__}?"
        )


def _fill_module(
    root: nn.Module,
    prefix: str,
    tensor: Callable[[str], Tensor],
    held: type[NF4Linear | Int8Linear] | None,
    device: torch.device,
    dtype: torch.dtype,
    hand_over: Sharder | None,
    skip: set[str] | None = None,
) -> None:
    """Give each module under ``root`` that is still on the meta device its weights; quantize its linears.

    Each is handed over before the next is read: an embedding may be larger than a layer.
    """
    for name, module in list(root.named_modules()):
        full = f"{prefix}{name}." if name else prefix
        if held and isinstance(module, nn.Linear | Conv1D) and name:
            weight = _shaped(tensor(full + "weight"), full + "weight", module.weight).to(device)
            bias = tensor(full + "bias").to(device) if module.bias is not None else None
            parent, _, child = name.rpartition(".")
            weight = weight.T if isinstance(module, Conv1D) else weight
            made = held(weight, bias, dtype, isinstance(module, Conv1D))
            setattr(root.get_submodule(parent), child, made)
            if hand_over:
                hand_over(made)
            continue
        filled = False
        for own, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta and full + own not in (skip or ()):
                value = _own(_shaped(tensor(full + own), full + own, parameter), device, dtype)
                setattr(module, own, nn.Parameter(value, requires_grad=False))
                filled = True
        for own, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta and own not in module._non_persistent_buffers_set:
                module._buffers[own] = _own(tensor(full + own), device, buffer.dtype)
        if hand_over and filled and not list(module.children()):
            hand_over(module)


def _shaped(value: Tensor, name: str, like: Tensor) -> Tensor:
    if value.shape != like.shape:
        raise BaseModelError(
            f"{name} has shape {list(value.shape)}, not {list(like.shape)}: the weights are not those of config.json"
        )
    return value


def _own(value: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """On the device, in the dtype, in memory of its own (a read tensor may be a mapping of its file)."""
    moved = value.to(device, dtype)
    return moved.clone() if moved.data_ptr() == value.data_ptr() else moved


def _buffers(model: Any, device: torch.device) -> None:
    """Buffers that no checkpoint holds (rotary frequencies): the model's own initialiser computes them."""
    for module in model.modules():
        if own := [n for n in module._non_persistent_buffers_set if module._buffers.get(n) is not None]:
            for name in own:
                module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
            model._init_weights(module)


def _fuse_kernels(model: Any, base: Base, device: torch.device) -> bool:
    if base.kernels == "none" or (base.kernels == "auto" and device.type != "cuda"):
        return False
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError as e:
        if base.kernels == "liger":
            raise BaseModelError("base.kernels=liger needs the package liger-kernel (extra `gpu`)") from e
        return False
    _apply_liger_kernel_to_instance(model=model)
    modules = (getattr(m.forward, "__module__", "") for m in model.modules())
    return any(name.startswith("liger_kernel") for name in modules)  # it knows some architectures


def _report(model: Any, base: Base, count: int, seconds: float, unquantized: frozenset[int], fused: bool) -> LoadReport:
    _, layers = decoder_layers(model)
    wanted = nn.ModuleList(layer for index, layer in enumerate(layers) if index not in unquantized)
    held = [m for m in wanted.modules() if isinstance(m, NF4Linear | Int8Linear)]
    inside = sum(m.in_features * m.out_features for m in held)
    rest = sum(_elements(p) for p in wanted.parameters()) - sum(_elements(m.weight) for m in held)
    fraction = inside / (inside + rest) if held else 0.0
    if base.quantize != "none" and len(wanted) and fraction < 0.9:
        raise BaseModelError(
            f"base {base.id}: only {fraction:.0%} of its layers' weights could be held in {base.quantize}; the rest "
            "are fused expert tensors of a mixture-of-experts model, which stay 16-bit. Use base.quantize=none"
        )
    return LoadReport(
        parameters=count,
        quantized_fraction=fraction,
        bytes_total=sum(_elements(p) * p.element_size() for p in model.parameters()),
        bytes_here=sum(_here(p) for p in model.parameters()),
        state_bytes=sum(m.state_bytes() for m in held),
        fused_kernels=fused,
        peak_rss=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        seconds=seconds,
    )


def _elements(parameter: Tensor) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _here(parameter: Tensor) -> int:
    shard = getattr(parameter, "ds_tensor", None)
    whole = parameter.numel() * parameter.element_size()
    return whole if shard is None else whole + shard.numel() * shard.element_size()

"""Delta folders: peft's layout plus ``manta.json``, saved in one step, checked before use."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.config import Manifest
from orchestrator.delta.card import card
from orchestrator.delta.files import new_dir, read_file, write_file
from orchestrator.delta.manifest import draft
from orchestrator.delta.tensors import MAX_BYTES, WEIGHTS, dump_tensors, parse_tensors
from orchestrator.errors import DeltaError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
MANIFEST = "manta.json"
CARD = "README.md"
FILES = (CONFIG, WEIGHTS, MANIFEST, CARD)
"""Every file of a delta; nothing else is ever read, uploaded or downloaded."""

_PREFIX = "base_model.model."
_BARE = ("prompt_embeddings",)
"""Names that peft's prompt methods write without the prefix."""
_SHARED = "base_model."
"""Before the names of what peft keeps once for all layers (VeRA's projections), which have no ``model.`` in them."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,511}")
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin")
_MAX_JSON = 4 * 2**20


@dataclass(frozen=True)
class Delta:
    """A loaded delta.

    Attributes:
        tensors: ``<site>.lora_A.weight`` [R,I], ``<site>.lora_B.weight`` [O,R] and the like, on the CPU.
        manifest: Lineage; None for a plain peft folder.
        peft_config: Content of ``adapter_config.json``.
        sha256: Hash of ``adapter_model.safetensors``.
        path: The folder.
    """

    tensors: dict[str, Tensor]
    manifest: Manifest | None
    peft_config: dict[str, Any]
    sha256: str
    path: Path


def save_delta(
    directory: Path | str,
    tensors: Mapping[str, Tensor],
    manifest: Manifest | Mapping[str, Any] | None,
    peft_config: Mapping[str, Any],
) -> Delta:
    """Write a delta folder in one step; an older delta of that name stays until the new one is whole.

    ``manifest`` is a manifest or its fields; ``sha256`` is computed here, and so are ``parameters`` where they are left
    out (all that is saved). None writes a plain peft folder.

    Raises:
        DeltaError: nothing to save, a bad name or shape, a full disk, or a folder that cannot be written.
    """
    directory = Path(directory).absolute()
    if directory.is_dir() and any(directory.iterdir()) and not (directory / CONFIG).exists():
        raise DeltaError(f"{directory} holds something that is no delta, and is left alone; name another folder")
    config = dict(peft_config)
    _check_config(config, directory / CONFIG)
    _check_tensors(tensors, config, directory / WEIGHTS)
    content = dump_tensors({_in_file(name): tensor for name, tensor in tensors.items()}, directory / WEIGHTS)
    digest = hashlib.sha256(content).hexdigest()
    written = None
    if manifest is not None:
        made = draft(manifest)
        count = made.parameters or sum(t.numel() for t in tensors.values())
        written = made.model_copy(update={"sha256": digest, "parameters": count})
    with new_dir(directory, "the delta") as scratch:
        write_file(scratch / WEIGHTS, content)
        write_file(scratch / CONFIG, json.dumps(config, indent=2, sort_keys=True).encode())
        write_file(scratch / CARD, card(written, config).encode())
        if written is not None:
            write_file(scratch / MANIFEST, written.model_dump_json(indent=2).encode())
    kept = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    return Delta(kept, written, config, digest, directory)


def load_delta(directory: Path | str, *, max_bytes: int = MAX_BYTES, finite: bool = True) -> Delta:
    """Read and check a delta folder, ours or plain peft's, as untrusted input.

    Raises:
        DeltaError: missing, too large, truncated, corrupt, pickled, changed since it was made, or its tensors do
            not match its config; the message names the file and the reason.
    """
    directory = Path(directory).absolute()
    if not directory.is_dir():
        raise DeltaError(f"{directory}: no such folder; a delta is a folder with {CONFIG} and {WEIGHTS}")
    content = read_file(directory, WEIGHTS, most=max_bytes)
    if content is None:
        pickled = [name for name in _PICKLES if (directory / name).exists()]
        if pickled:
            raise DeltaError(
                f"{directory / pickled[0]}: pickled weights can run code when they are read, and are refused; "
                "save the adapter again with peft's save_pretrained(..., safe_serialization=True)"
            )
        raise DeltaError(f"{directory}: no {WEIGHTS} in it; a delta is a folder with {CONFIG} and {WEIGHTS}")
    config = _json(directory, CONFIG)
    if config is None:
        raise DeltaError(f"{directory}: no {CONFIG} in it; a delta is a folder with {CONFIG} and {WEIGHTS}")
    _check_config(config, directory / CONFIG)
    digest = hashlib.sha256(content).hexdigest()
    manifest = None
    if (fields := _json(directory, MANIFEST)) is not None:
        try:
            manifest = Manifest.model_validate(fields)
        except ValueError as error:
            raise DeltaError(f"{directory / MANIFEST}: not a manifest: {error}") from error
        if manifest.sha256 != digest:
            raise DeltaError(
                f"{directory / WEIGHTS}: sha256 is {digest}, but {MANIFEST} says {manifest.sha256}: "
                "the file is damaged or was exchanged"
            )
    named = parse_tensors(content, directory / WEIGHTS, finite=finite)
    for name in named:
        if not name.startswith(_SHARED) and name not in _BARE:
            raise DeltaError(f"{directory / WEIGHTS}: tensor {name[:200]!r} does not start with {_PREFIX!r}")
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in named.items()}
    _check_tensors(tensors, config, directory / WEIGHTS)
    return Delta(tensors, manifest, config, digest, directory)


def _in_file(name: str) -> str:
    return name if name in _BARE or name.startswith(_SHARED) else _PREFIX + name


def _json(directory: Path, name: str) -> dict[str, Any] | None:
    content = read_file(directory, name, most=_MAX_JSON)
    if content is None:
        return None
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DeltaError(f"{directory / name}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DeltaError(f"{directory / name}: not a JSON object")
    return value


def _check_config(config: Mapping[str, Any], where: Path) -> None:
    if not isinstance(config.get("peft_type"), str):
        raise DeltaError(f"{where}: no 'peft_type' in it, which names the method")
    if config["peft_type"] != "LORA":
        return
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= 65536:
        raise DeltaError(f"{where}: 'r' is {rank!r}; a rank of 1 or more is needed")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise DeltaError(f"{where}: 'lora_alpha' is {alpha!r}; a number is needed")


def _check_tensors(tensors: Mapping[str, Tensor], config: Mapping[str, Any], where: Path) -> None:
    if not tensors:
        raise DeltaError(f"{where}: no tensors in it")
    for name, tensor in tensors.items():
        if not _NAME.fullmatch(name) or ".." in name:
            raise DeltaError(f"{where}: tensor name {name[:200]!r} is not a path of module names")
        if tensor.numel() == 0:
            raise DeltaError(f"{where}: {name} is empty {tuple(tensor.shape)}; was it saved from a shard?")
    if config["peft_type"] == "LORA":
        for name, a_RI in tensors.items():
            if name.endswith(".lora_B.weight") and name.replace(".lora_B.", ".lora_A.") not in tensors:
                raise DeltaError(f"{where}: {name} has no lora_A beside it")
            if name.endswith(".lora_A.weight"):
                _check_pair(name, a_RI, tensors.get(name.replace(".lora_A.", ".lora_B.")), config, where)


def _check_pair(name: str, a_RI: Tensor, b_OR: Tensor | None, config: Mapping[str, Any], where: Path) -> None:
    if b_OR is None:
        raise DeltaError(f"{where}: {name} has no lora_B beside it")
    if a_RI.ndim != b_OR.ndim or a_RI.ndim < 2 or a_RI.shape[0] != b_OR.shape[1]:
        shapes = f"{tuple(a_RI.shape)} and {tuple(b_OR.shape)}"
        raise DeltaError(f"{where}: {name} and its lora_B have shapes {shapes}; [R,I] and [O,R] are needed")
    if not config.get("rank_pattern") and a_RI.shape[0] != config["r"]:
        raise DeltaError(f"{where}: {name} has rank {a_RI.shape[0]}, but the config says r = {config['r']}")

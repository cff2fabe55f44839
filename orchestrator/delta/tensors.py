"""Safetensors files, read as untrusted input: the bytes are bounded, parsed and checked before torch sees them."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.delta.files import read_file, sync_dir, write_file
from orchestrator.errors import DeltaError

if TYPE_CHECKING:
    from torch import Tensor

MAX_BYTES = 4 * 2**30
"""Largest file of tensors that is read or written, unless the caller says otherwise."""
WEIGHTS = "adapter_model.safetensors"

_MAX_HEADER = 16 * 2**20
_WIDTHS = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2},
    **{"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8},
}


def parse_header(content: bytes, size: int, where: Path) -> tuple[dict[str, Any], int]:
    """Header of a safetensors file and the offset at which its data starts.

    ``content`` holds at least the header; ``size`` is the length of the whole file in bytes.

    Raises:
        DeltaError: truncated, corrupt, or not safetensors; the message names the file.
    """
    if size < 8:
        raise DeltaError(f"{where}: truncated: {size} bytes is too short for a safetensors file")
    length = int.from_bytes(content[:8], "little")
    if length > _MAX_HEADER:
        raise DeltaError(f"{where}: not a safetensors file (its header would be {length:,} bytes)")
    start = 8 + length
    if start > size:
        raise DeltaError(f"{where}: truncated: the header ends at byte {start:,}, the file at {size:,}")
    try:
        header = json.loads(content[8:start])
    except (ValueError, RecursionError) as error:
        raise DeltaError(f"{where}: corrupt: its header is not JSON") from error
    if not isinstance(header, dict):
        raise DeltaError(f"{where}: corrupt: its header is not an object")
    spans = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            shape, (begin, end), width = entry["shape"], entry["data_offsets"], _WIDTHS[entry["dtype"]]
            count = 1
            for extent in shape:
                count *= extent
            sane = all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and end - begin == count * width
        except (KeyError, TypeError, ValueError):
            sane = False
        if not sane:
            raise DeltaError(f"{where}: corrupt: the header's entry for {name[:200]!r} makes no sense")
        spans.append((begin, end))
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise DeltaError(f"{where}: corrupt: its tensors overlap or leave holes at byte {start + at:,}")
        at = end
    if start + at != size:
        state = "truncated" if start + at > size else "corrupt"
        raise DeltaError(f"{where}: {state}: the header describes {start + at:,} bytes, the file has {size:,}")
    return header, start


def parse_tensors(content: bytes, where: Path, *, finite: bool = False) -> dict[str, Tensor]:
    """Tensors in the bytes of a safetensors file, on the CPU. ``finite`` refuses NaN and infinity."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    parse_header(content, len(content), where)
    try:
        tensors: dict[str, Tensor] = load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise DeltaError(f"{where}: corrupt: {error}") from error
    if finite:
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise DeltaError(f"{where}: {name} holds NaN or infinite values")
    return tensors


def dump_tensors(tensors: Mapping[str, Tensor], where: Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """Safetensors bytes of CPU copies of the tensors; the same tensors give the same bytes."""
    from safetensors.torch import save

    total = sum(t.numel() * t.element_size() for t in tensors.values())
    if total > max_bytes:
        raise DeltaError(f"{where}: {total:,} bytes of tensors, over the limit of {max_bytes:,}")
    plain = {name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}
    content: bytes = save(plain, metadata={"format": "pt"})
    return content


def read_tensors(path: Path | str, *, max_bytes: int = MAX_BYTES, finite: bool = False) -> dict[str, Tensor]:
    """Tensors of one safetensors file, under the names they have in it.

    Raises:
        DeltaError: missing, too large, truncated or corrupt; names the file and the reason.
    """
    path = Path(path)
    content = read_file(path.parent, path.name, most=max_bytes)
    if content is None:
        raise DeltaError(f"{path}: no such file")
    return parse_tensors(content, path, finite=finite)


def write_tensors(path: Path | str, tensors: Mapping[str, Tensor], *, max_bytes: int = MAX_BYTES) -> str:
    """Write one safetensors file in one step (an old one stays until the new one is whole). Returns its sha256."""
    path = Path(path)
    content = dump_tensors(tensors, path, max_bytes=max_bytes)
    scratch = path.with_name(f".{path.name}.tmp-{secrets.token_hex(6)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(scratch, content)
        scratch.replace(path)
        sync_dir(path.parent)
    except OSError as error:
        kept = "; what was there before is untouched" if path.exists() else ""
        raise DeltaError(f"cannot write {path}: {os.strerror(error.errno or 0).lower()}{kept}") from error
    finally:
        scratch.unlink(missing_ok=True)
    return hashlib.sha256(content).hexdigest()


def delta_hash(path: Path | str) -> str:
    """sha256 of a delta's ``adapter_model.safetensors``; ``path`` is that file or the folder that holds it."""
    path = Path(path)
    file = path / WEIGHTS if path.is_dir() else path
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DeltaError(f"{file}: cannot be read: {error.strerror or error}") from error

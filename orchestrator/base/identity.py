"""Who a base is: a hash of its source weights, whatever its file layout, and how it is held."""

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from orchestrator.base.files import WeightReader, base_dir
from orchestrator.config import Base, Identity, home


def source_identity(
    base: Base, *, dtype: torch.dtype | None = None, unquantized: frozenset[int] = frozenset()
) -> Identity:
    """Identity of a base (see ``Identity``), of which some layers may be held as they are.

    The hash covers each source tensor's name, dtype, shape and bytes, in the order of names, so that files split in
    another way give the same hash. It is kept in ``$MANTA_HOME/cache/hashes`` under the files' size and time.
    """
    folder = base_dir(base)
    template = folder / "chat_template.jinja"
    text = template.read_text() if template.is_file() else _template_in_config(folder)
    return Identity(
        id=base.id,
        revision=base.revision or _snapshot(folder),
        source_hash=_random_hash(base, folder) if base.random_init is not None else source_hash(folder),
        recipe=_recipe(base, dtype, unquantized),
        template_hash=hashlib.sha256(text.encode()).hexdigest() if text else None,
        licence=_licence(folder),
    )


def _recipe(base: Base, dtype: torch.dtype | None, unquantized: frozenset[int]) -> str:
    held = f"{'nf4-double' if base.quantize == 'nf4' else base.quantize}/{_short(dtype)}"
    numbers = ",".join(map(str, sorted(unquantized)))
    return held if base.quantize == "none" or not unquantized else f"{held}, layers {numbers} unquantized"


def source_hash(folder: Path) -> str:
    """sha256 over the weights in ``folder``; cached by the files' name, size and time of change."""
    reader = WeightReader(folder)
    stat = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in reader.files]
    cached = home() / "cache" / "hashes" / hashlib.sha256(json.dumps(stat).encode()).hexdigest()
    if cached.is_file() and re.fullmatch(r"[0-9a-f]{64}", value := cached.read_text()):
        return value
    names = sorted(reader.names())
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = pool.map(lambda name: _tensor_digest(reader, name), names)
        whole = hashlib.sha256(b"".join(digests)).hexdigest()
    cached.parent.mkdir(parents=True, exist_ok=True)
    part = cached.with_suffix(f".{os.getpid()}")
    part.write_text(whole)
    part.replace(cached)
    return whole


def _tensor_digest(reader: WeightReader, name: str) -> bytes:
    tensor = reader.read(name).contiguous()
    digest = hashlib.sha256(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _random_hash(base: Base, folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    return hashlib.sha256(json.dumps([config, base.random_init], sort_keys=True).encode()).hexdigest()


def _snapshot(folder: Path) -> str | None:
    return folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None


def _short(dtype: torch.dtype | None) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32", None: "any"}[dtype]


def _template_in_config(folder: Path) -> str | None:
    config = folder / "tokenizer_config.json"
    value = json.loads(config.read_text()).get("chat_template") if config.is_file() else None
    return value if isinstance(value, str) or value is None else json.dumps(value, sort_keys=True)


def _licence(folder: Path) -> str | None:
    card = folder / "README.md"
    found = re.search(r"^licen[cs]e:\s*(\S+)", card.read_text(errors="replace"), re.M) if card.is_file() else None
    return found.group(1) if found else None

"""A delta baked into a dense copy of its base, for servers that know nothing of deltas."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.base import base_dir, source_identity
from orchestrator.base.files import WeightReader
from orchestrator.base.load import empty_model
from orchestrator.base.names import Origin, origins
from orchestrator.config import Base
from orchestrator.delta import Delta, check_base, new_dir, parse_header, write_file
from orchestrator.errors import BaseModelError, DeltaError, MethodError
from orchestrator.methods.method import Method, Scope
from orchestrator.methods.table import METHODS

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NOT_COPIED = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"}


def merged(delta: Delta, base: Base | Path | str, out_dir: Path | str) -> list[str]:
    """Write the base with the delta added to its weights; same files, names and dtypes as the base has.

    The sum is taken in fp32, one tensor at a time, and rounded once to the base's dtype. ``out_dir`` appears whole
    or not at all. Returns what may matter, one sentence each.

    Raises:
        WrongBaseError: the delta was made for other source weights.
        MethodError: the delta is no change of weights, or its layers are not in the base.
        BaseModelError: the base is not dense, or its files are unsound.
        DeltaError: ``out_dir`` holds something already, or cannot be written.
    """
    base = base if isinstance(base, Base) else Base(id=str(base))
    base = base.model_copy(update={"quantize": "none"})
    out_dir = Path(out_dir).absolute()
    if out_dir.exists() and not (out_dir.is_dir() and not any(out_dir.iterdir())):
        raise DeltaError(f"{out_dir} exists already; name a new folder")
    folder = base_dir(base)
    warnings = check_base(delta.manifest, source_identity(base))
    method, knobs = _method(delta)
    model = empty_model(base, torch.float32)
    scope, reader = Scope.of(model), WeightReader(folder)
    where = origins(model, list(reader.names()))
    plan: dict[Path, dict[str, tuple[str, dict[str, Tensor]]]] = {path: {} for path in reader.files}
    for site, tensors in _by_site(delta, scope).items():
        source = _source(site, where.get(f"{site}.weight"), base)
        plan[reader.where[source]][source] = (site, tensors)
    with new_dir(out_dir, "the merged model") as scratch:
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.suffix not in _NOT_COPIED and path.name != "README.md":
                shutil.copyfile(path, scratch / path.name)
        for path, changes in plan.items():
            shutil.copyfile(path, scratch / path.name)
            _patch(scratch / path.name, changes, method, knobs, scope)
        write_file(scratch / "README.md", _card(delta, base).encode())
    return warnings


def _method(delta: Delta) -> tuple[Method, Any]:
    if delta.manifest:
        return METHODS[delta.manifest.method.type], delta.manifest.method
    kind = str(delta.peft_config["peft_type"]).lower()
    if kind not in METHODS:
        raise MethodError(f"peft type {delta.peft_config['peft_type']!r} has no counterpart here: {sorted(METHODS)}")
    return METHODS[kind], METHODS[kind].from_peft(delta.peft_config)


def _by_site(delta: Delta, scope: Scope) -> dict[str, dict[str, Tensor]]:
    """The delta's tensors by the linear that they belong to."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in delta.tensors.items():
        parts = name.split(".")
        sites = (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
        site = next((s for s in sites if s in scope.linears), None)
        if site is None:
            raise MethodError(f"{delta.path}: {name} belongs to no linear layer of the base")
        found.setdefault(site, {})[name.removeprefix(f"{site}.")] = tensor
    return found


def _source(site: str, origin: Origin | None, base: Base) -> str:
    if origin is None or origin.converter is not None or len(origin.sources) != 1:
        raise MethodError(f"base {base.id} stores {site} together with other weights; it cannot be merged file by file")
    return origin.sources[0][0]


def _patch(
    path: Path, changes: Mapping[str, tuple[str, dict[str, Tensor]]], method: Method, knobs: Any, scope: Scope
) -> None:
    """Change tensors of one safetensors file in place; shapes and dtypes stay, so does its header."""
    with path.open("r+b") as file:
        file.seek(0)
        length = 8 + int.from_bytes(file.read(8), "little")
        file.seek(0)
        header, start = parse_header(file.read(length), path.stat().st_size, path)
        for name, (site, tensors) in changes.items():
            entry = header[name]
            if entry["dtype"] not in _DTYPES:
                raise BaseModelError(f"{path}: {name} is {entry['dtype']}; a dense base (fp32, bf16, fp16) is needed")
            begin, end = entry["data_offsets"]
            file.seek(start + begin)
            raw = torch.frombuffer(bytearray(file.read(end - begin)), dtype=_DTYPES[entry["dtype"]])
            stored = raw.view(entry["shape"])
            flip = site in scope.transposed
            weight_OI = (stored.T if flip else stored).float()
            change_OI = method.weight_change(knobs, tensors, weight_OI)
            if change_OI is None:
                raise MethodError("this method is no change of weights, so it cannot be merged; serve it as a delta")
            if change_OI.shape != weight_OI.shape:
                shapes = f"{tuple(change_OI.shape)}, the base's weight {tuple(weight_OI.shape)}"
                raise MethodError(f"{site}: the delta's change is {shapes}; it was made for another base")
            total = weight_OI + change_OI
            stored.copy_(total.T if flip else total)
            file.seek(start + begin)
            file.write(raw.view(torch.uint8).numpy().data)


def _card(delta: Delta, base: Base) -> str:
    name = delta.manifest.name if delta.manifest else delta.path.name
    licence = delta.manifest.base.licence if delta.manifest else None
    front = {"base_model": base.id, "library_name": "transformers"} | ({"license": licence} if licence else {})
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", "", f"# {name}, merged"]
    lines += ["", f"`{base.id}` with the delta of sha256 `{delta.sha256}` added to its weights.", ""]
    return "\n".join(lines)

"""A delta baked into a dense copy of its base, for servers that know nothing of deltas."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from orchestrator.changes import Changes
from orchestrator.config import Base
from orchestrator.delta import Delta, new_dir, parse_header, write_file
from orchestrator.errors import BaseModelError, DeltaError, MethodError

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
    out_dir = Path(out_dir).absolute()
    if out_dir.exists() and not (out_dir.is_dir() and not any(out_dir.iterdir())):
        raise DeltaError(f"{out_dir} exists already; name a new folder")
    if delta.peft_config.get("task_type") == "SEQ_CLS":
        raise MethodError(
            f"{delta.path} classifies by a head of its own, which is no change of the base's weights; "
            "export it as a plain peft folder"
        )
    changes = Changes(delta, base)
    reader = changes.reader
    plan: dict[Path, dict[str, tuple[str, str]]] = {path: {} for path in reader.files}
    for site in changes.tensors:
        for name in changes.of(site):
            source = changes.source(site, name)
            plan[reader.where[source]][source] = (site, name)
    with new_dir(out_dir, "the merged model") as scratch:
        for path in sorted(changes.folder.iterdir()):
            if path.is_file() and path.suffix not in _NOT_COPIED and path.name != "README.md":
                shutil.copyfile(path, scratch / path.name)
        for path, places in plan.items():
            shutil.copyfile(path, scratch / path.name)
            _patch(scratch / path.name, places, changes)
        write_file(scratch / "README.md", _card(delta, changes.base).encode())
    return changes.warnings


def _patch(path: Path, places: Mapping[str, tuple[str, str]], changes: Changes) -> None:
    """Change tensors of one safetensors file in place; shapes and dtypes stay, so does its header."""
    with path.open("r+b") as file:
        file.seek(0)
        length = 8 + int.from_bytes(file.read(8), "little")
        file.seek(0)
        header, start = parse_header(file.read(length), path.stat().st_size, path)
        for source, (site, name) in places.items():
            entry = header[source]
            if entry["dtype"] not in _DTYPES:
                raise BaseModelError(f"{path}: {source} is {entry['dtype']}; a dense base (fp32, bf16, fp16) is needed")
            begin, end = entry["data_offsets"]
            file.seek(start + begin)
            raw = torch.frombuffer(bytearray(file.read(end - begin)), dtype=_DTYPES[entry["dtype"]])
            total = changes.value(site, name)
            raw.view(entry["shape"]).copy_(total.T if name == "weight" and site in changes.scope.transposed else total)
            file.seek(start + begin)
            file.write(raw.view(torch.uint8).numpy().data)


def _card(delta: Delta, base: Base) -> str:
    name = delta.manifest.name if delta.manifest else delta.path.name
    licence = delta.manifest.base.licence if delta.manifest else None
    front = {"base_model": base.id, "library_name": "transformers"} | ({"license": licence} if licence else {})
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", "", f"# {name}, merged"]
    lines += ["", f"`{base.id}` with the delta of sha256 `{delta.sha256}` added to its weights.", ""]
    return "\n".join(lines)

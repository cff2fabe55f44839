"""A delta baked into a dense copy of its base, for servers that know nothing of deltas."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from orchestrator.base import base_dir, source_identity
from orchestrator.base.files import WeightReader
from orchestrator.base.load import empty_model
from orchestrator.base.names import Origin, origins
from orchestrator.config import Base
from orchestrator.delta import Delta, check_base, new_dir, parse_header, write_file
from orchestrator.errors import BaseModelError, DeltaError, MethodError
from orchestrator.methods import Scope, from_files, knobs_from_peft, method_of

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
    if delta.peft_config.get("task_type") == "SEQ_CLS":
        raise MethodError(
            f"{delta.path} classifies by a head of its own, which is no change of the base's weights; "
            "export it as a plain peft folder"
        )
    folder = base_dir(base)
    warnings = check_base(delta.manifest, source_identity(base))
    model = empty_model(base, torch.float32)
    reader = WeightReader(folder)
    where = origins(model, list(reader.names()))
    changed = _Changed(delta, Scope.of(model), where, reader, base)
    plan: dict[Path, dict[str, tuple[str, str]]] = {path: {} for path in reader.files}
    for site in changed.tensors:
        for name in changed.names(site):
            source = _source(f"{site}.{name}", where.get(f"{site}.{name}"), base)
            plan[reader.where[source]][source] = (site, name)
    with new_dir(out_dir, "the merged model") as scratch:
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.suffix not in _NOT_COPIED and path.name != "README.md":
                shutil.copyfile(path, scratch / path.name)
        for path, changes in plan.items():
            shutil.copyfile(path, scratch / path.name)
            _patch(scratch / path.name, changes, changed)
        write_file(scratch / "README.md", _card(delta, base).encode())
    return warnings


class _Changed:
    """The base's parameters with the delta added, a site at a time."""

    def __init__(
        self, delta: Delta, scope: Scope, where: Mapping[str, Origin], reader: WeightReader, base: Base
    ) -> None:
        self._knobs = delta.manifest.method if delta.manifest else knobs_from_peft(delta.peft_config)
        self._method, self.scope = method_of(self._knobs), scope
        self._where, self._reader, self._base = where, reader, base
        own = from_files(self._knobs, delta.manifest.task if delta.manifest else None, delta.tensors, scope)
        borrowed = self._method.shared(self._knobs, scope)
        self.tensors: dict[str, dict[str, Tensor]] = {}
        for site in self._method.sites(self._knobs, scope):
            names = () if site in borrowed else self._method.shapes(self._knobs, site, scope)
            if mine := {name: own.pop(f"{site}.{name}") for name in names if f"{site}.{name}" in own}:
                self.tensors[site] = mine
        if own or not self.tensors:
            strange = next(iter(own), "none of its tensors")
            raise MethodError(f"{delta.path}: {strange} belongs to no layer of the base")

    def names(self, site: str) -> list[str]:
        """Which of a site's parameters change."""
        change = self._change(site, self._parameters(site))
        if absent := [n for n in change if f"{site}.{n}" not in self._where]:
            raise MethodError(
                f"the delta adds a {absent[0]} to {site}, which this architecture does not have there, so it cannot be "
                "merged; serve it as a delta"
            )
        return list(change)

    def value(self, site: str, name: str) -> Tensor:
        """One parameter, fp32; a weight as [O, I]."""
        base = self._parameters(site)
        return base[name] + self._change(site, base)[name]

    def _parameters(self, site: str) -> dict[str, Tensor]:
        found = {}
        for name in ("weight", "bias"):
            if (origin := self._where.get(f"{site}.{name}")) is not None:
                value = self._reader.read(_source(f"{site}.{name}", origin, self._base)).float()
                found[name] = value.T if name == "weight" and site in self.scope.transposed else value
        return found

    def _change(self, site: str, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        change = self._method.weight_change(self._knobs, site, self.tensors[site], base)
        if change is None:
            raise MethodError("this method is no change of weights, so it cannot be merged; serve it as a delta")
        for name, value in change.items():
            if name in base and value.shape != base[name].shape:
                shapes = f"{tuple(value.shape)}, the base's {name} {tuple(base[name].shape)}"
                raise MethodError(f"{site}: the delta's change is {shapes}; it was made for another base")
        return change


def _source(name: str, origin: Origin | None, base: Base) -> str:
    if origin is None or origin.converter is not None or len(origin.sources) != 1:
        raise MethodError(f"base {base.id} stores {name} together with other weights; it cannot be merged file by file")
    return origin.sources[0][0]


def _patch(path: Path, changes: Mapping[str, tuple[str, str]], changed: _Changed) -> None:
    """Change tensors of one safetensors file in place; shapes and dtypes stay, so does its header."""
    with path.open("r+b") as file:
        file.seek(0)
        length = 8 + int.from_bytes(file.read(8), "little")
        file.seek(0)
        header, start = parse_header(file.read(length), path.stat().st_size, path)
        for source, (site, name) in changes.items():
            entry = header[source]
            if entry["dtype"] not in _DTYPES:
                raise BaseModelError(f"{path}: {source} is {entry['dtype']}; a dense base (fp32, bf16, fp16) is needed")
            begin, end = entry["data_offsets"]
            file.seek(start + begin)
            raw = torch.frombuffer(bytearray(file.read(end - begin)), dtype=_DTYPES[entry["dtype"]])
            total = changed.value(site, name)
            raw.view(entry["shape"]).copy_(total.T if name == "weight" and site in changed.scope.transposed else total)
            file.seek(start + begin)
            file.write(raw.view(torch.uint8).numpy().data)


def _card(delta: Delta, base: Base) -> str:
    name = delta.manifest.name if delta.manifest else delta.path.name
    licence = delta.manifest.base.licence if delta.manifest else None
    front = {"base_model": base.id, "library_name": "transformers"} | ({"license": licence} if licence else {})
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", "", f"# {name}, merged"]
    lines += ["", f"`{base.id}` with the delta of sha256 `{delta.sha256}` added to its weights.", ""]
    return "\n".join(lines)

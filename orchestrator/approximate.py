"""A delta as a LoRA, for servers that know no other: the best of a rank for each layer, with what is lost told.

Of each linear layer's change the first R singular directions are kept (Eckart & Young 1936): no LoRA of that rank is
nearer to it. A change of rank R or less (a LoRA, a PiSSA of half the rank) is kept whole.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from orchestrator.changes import Changes
from orchestrator.config import Base, CausalLM, Lora
from orchestrator.delta import Delta, new_manifest, save_delta
from orchestrator.errors import DeltaError, MethodError
from orchestrator.methods import to_files
from orchestrator.methods.lora import A, B, directions


@dataclass(frozen=True)
class Loss:
    """What the LoRA does not have of the delta."""

    errors: dict[str, float]
    """Layer -> ``|D - B A| / |D|`` of its change D (Frobenius)."""
    total: float
    """The same over all of these layers at once."""
    left_out: list[str]
    """Parameters that the delta changes and a LoRA cannot."""
    warnings: list[str]
    """What else may matter, one sentence each."""

    @property
    def worst(self) -> tuple[str, float]:
        """Layer of the largest error, and the error."""
        return max(self.errors.items(), key=lambda pair: pair[1])

    @property
    def mean(self) -> float:
        """Mean error of a layer."""
        return sum(self.errors.values()) / len(self.errors)


def approximated(delta: Delta, base: Base | Path | str, out_dir: Path | str, *, rank: int) -> Loss:
    """Write the LoRA of rank ``rank`` that is nearest to a delta.

    Raises:
        WrongBaseError: the delta was made for other source weights.
        MethodError: the delta is no change of weights, or changes no linear layer's weight.
        DeltaError: ``out_dir`` holds something already, or cannot be written.
    """
    out_dir = Path(out_dir).absolute()
    if out_dir.exists() and not (out_dir.is_dir() and not any(out_dir.iterdir())):
        raise DeltaError(f"{out_dir} exists already; name a new folder")
    changes = Changes(delta, base)
    tensors: dict[str, Tensor] = {}
    errors, left_out = {}, []
    lost = whole = 0.0
    for site in changes.tensors:
        for name, change in changes.of(site).items():
            if name != "weight" or site not in changes.scope.linears:
                left_out.append(f"{site}.{name}")
                continue
            b_OR, a_RI = directions(change, rank, torch.Generator().manual_seed(0))
            tensors |= {f"{site}.{A}": a_RI.contiguous(), f"{site}.{B}": b_OR.contiguous()}
            square = float(change.double().square().sum())
            rest = float((change - b_OR @ a_RI).double().square().sum())
            errors[site] = (rest / square) ** 0.5 if square else 0.0
            lost, whole = lost + rest, whole + square
    if not errors:
        raise MethodError(
            f"the method {changes.knobs.type} changes no linear layer's weight here ({', '.join(left_out[:3])}), which "
            "is all that a LoRA can; merge it, or serve it as a delta"
        )
    found = Loss(errors, (lost / whole) ** 0.5 if whole else 0.0, left_out, changes.warnings)
    _save(out_dir, changes, Lora(rank=rank, alpha=float(rank), targets=tuple(errors)), tensors, found)
    return found


def _save(out_dir: Path, changes: Changes, knobs: Lora, tensors: dict[str, Tensor], found: Loss) -> None:
    made = changes.delta.manifest
    files, config = to_files(knobs, CausalLM(), tensors, list(found.errors), changes.scope)
    manifest = None
    if made is not None:
        manifest = new_manifest(
            name=made.name,
            base=made.base,
            method=knobs,
            parent=changes.delta.sha256,
            owner=made.owner,
            data_digest=made.data_digest,
            tags={**made.tags, "approximates": made.method.type, "relative_error": f"{found.total:.3g}"},
        )
    save_delta(out_dir, files, manifest, config)

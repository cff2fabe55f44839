"""Whether a delta's tensors are those that a method wants on this base."""

from collections.abc import Mapping

from torch import Tensor

from orchestrator.errors import DeltaError

_SAID = 3
"""Most mistakes that a message names."""


def check_fit(wanted: Mapping[str, tuple[int, ...]], values: Mapping[str, Tensor]) -> None:
    """Names and shapes have to be the same.

    Raises:
        DeltaError: names the first that are not.
    """
    wrong = [f"{n} is missing" for n in wanted if n not in values]
    wrong += [f"{n} is not one of this method's on this base" for n in values if n not in wanted]
    wrong += [
        f"{n} has shape {list(values[n].shape)}, not {list(shape)}"
        for n, shape in wanted.items()
        if n in values and tuple(values[n].shape) != tuple(shape)
    ]
    if wrong:
        more = f" (and {len(wrong) - _SAID} more)" if len(wrong) > _SAID else ""
        raise DeltaError(f"the delta's tensors do not fit: {'; '.join(wrong[:_SAID])}{more}")

"""From targets in a config to module names."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from orchestrator.errors import MethodError

T = TypeVar("T")
ALL_LINEAR = "all-linear"
ALL_NORMS = "all-norms"
_WHAT = {ALL_LINEAR: "linear layer", ALL_NORMS: "normalization layer"}


def match(
    targets: Sequence[str], sites: Iterable[str], key: str = "method.targets", every: str = ALL_LINEAR
) -> list[str]:
    """The sites that any target names, in the model's order.

    A target is ``every``, the end of a dotted name (``q_proj``, ``self_attn.q_proj``) or a regular expression that
    matches a whole name.

    Raises:
        MethodError: a target matches nothing; names the nearest, and ``key``, where the target stands.
    """
    known = list(sites)
    found: set[str] = set()
    wrong = []
    for target in targets:
        hits = known if target == every else [s for s in known if s == target or s.endswith(f".{target}")]
        if not hits:
            hits = [s for s in known if _full(target, s)]
        found.update(hits)
        if not hits:
            wrong.append(_unmatched(target, known, key, every))
    if wrong:
        raise MethodError("; ".join(wrong))
    return [s for s in known if s in found]


def _full(target: str, site: str) -> bool:
    try:
        return re.fullmatch(target, site) is not None
    except re.error as e:
        raise MethodError(f"target {target!r} is neither a layer name nor a regular expression ({e})") from e


def shortest(sites: Sequence[str], modules: Iterable[str]) -> list[str]:
    """Ends of names that match these sites and no other module, as peft matches; else the whole names."""
    ends = sorted({s.rsplit(".", 1)[-1] for s in sites})
    hits = {m for m in modules if m.rsplit(".", 1)[-1] in ends}
    return ends if hits == set(sites) else list(sites)


def rematch(choices: Mapping[str, T], site: str, default: T) -> T:
    """The value of the first target that names a site."""
    return next((value for target, value in choices.items() if _hits(target, site)), default)


def _hits(target: str, site: str) -> bool:
    return target == ALL_LINEAR or site == target or site.endswith(f".{target}") or _full(target, site)


def _unmatched(target: str, known: Sequence[str], key: str, every: str) -> str:
    short = sorted({s.rsplit(".", 1)[-1] for s in known})
    near = difflib.get_close_matches(target.rsplit(".", 1)[-1], short, n=1, cutoff=0.0)
    return (
        f"{key}: {target!r} matches no {_WHAT[every]} of this base; "
        f"nearest is {near[0]!r}, all are {', '.join(short)} or {every}"
    )

"""A promotion that has to be earned: the alias moves only to a version whose metric is better than its holder's.

Both figures are of evaluations that may be compared: same records, same way of holding the base, same settings.
"""

from dataclasses import dataclass
from typing import Any

from orchestrator.errors import NotBetterError, RegistryError
from orchestrator.registry import CHAMPION, Registry, Version
from orchestrator.scores import METRICS, better, check_metrics


@dataclass(frozen=True)
class Promotion:
    """What became of it."""

    version: Version
    """The version that holds the alias now."""
    why: str
    """One sentence."""


def holder_of(registry: Registry, name: str, alias: str) -> Version | None:
    """The version of a delta that an alias points to, if any."""
    return next((v for v in registry.versions(name) if alias in v.aliases), None)


def promote_if_better(
    registry: Registry,
    ref: str,
    metric: str,
    *,
    alias: str = CHAMPION,
    than: str | None = None,
    by: str | None = None,
    key: str | None = None,
) -> Promotion:
    """Move ``alias`` to a version if its metric is strictly better than that of ``than`` (default: ``alias``).

    Where nobody holds ``than`` yet, the version is promoted.

    Args:
        registry: where versions and their evaluations are.
        ref: the version to promote.
        metric: which; its direction is known.
        alias: what moves.
        than: whom it is compared with.
        by: who moves it.
        key: only this evaluation counts; default: the candidate's newest that the other has, too.

    Raises:
        NotBetterError: it is not better; names both figures.
        RegistryError: there is no such version, or there are no two evaluations to compare.
        ConfigError: there is no such metric.
    """
    check_metrics([metric])
    than = than or alias
    version = registry.resolve(ref)
    other = holder_of(registry, version.name, than)
    if other is None:
        moved = registry.promote(version, alias, by=by)
        return Promotion(moved, f"{moved.ref} is {alias}: there was no {than} to compare it with")
    if other.version == version.version:
        if alias == than:
            return Promotion(version, f"{version.ref} is {alias} already")
        raise NotBetterError(f"{version.ref} is {than} itself, so it cannot be better than {than}; {alias} stays")
    found = _common(version, other, metric, key)
    new, old = (v.evaluations[found]["metrics"][metric] for v in (version, other))
    way = "higher" if METRICS[metric].higher else "lower"
    on = f"{version.evaluations[found].get('data')} ({version.evaluations[found].get('records')} records)"
    if not better(metric, new, old):
        raise NotBetterError(
            f"{version.ref} is not promoted: its {metric} on {on} is {new:.6g}, that of {other.ref} ({than}) is "
            f"{old:.6g}, and {way} is better"
        )
    moved = registry.promote(version, alias, by=by)
    return Promotion(moved, f"{moved.ref} is {alias}: {metric} on {on} is {new:.6g}, that of {other.ref} was {old:.6g}")


def _common(version: Version, other: Version, metric: str, key: str | None) -> str:
    mine = {k: e for k, e in version.evaluations.items() if metric in e["metrics"] and key in (None, k)}
    if not mine:
        raise RegistryError(
            f"{version.ref} has no evaluation with {metric}; run: manta eval {version.ref} --data SET --metric {metric}"
        )
    both = [k for k in mine if metric in other.evaluations.get(k, {"metrics": {}})["metrics"]]
    if not both:
        newest: dict[str, Any] = max(mine.values(), key=_at)
        raise RegistryError(
            f"{other.ref} has no evaluation with {metric} that can be compared with one of {version.ref} (same "
            f"records, base held as {newest.get('recipe')}, same settings); run manta eval {other.ref} on "
            f"{newest.get('data')}, too, or manta eval {version.ref} with --promote {metric}"
        )
    return max(both, key=lambda k: _at(mine[k]))


def _at(evaluation: dict[str, Any]) -> str:
    return str(evaluation.get("at", ""))

"""Names of deltas, references to their versions, and aliases."""

import re

from orchestrator.config import NAME_PATTERN
from orchestrator.errors import RegistryError

CHAMPION = "champion"

_ALIAS = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_VERSION_LIKE = re.compile(r"v\d+")


def check_name(name: str) -> str:
    """The name, if it may be a delta's."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise RegistryError(
            f"{name!r} is not a delta name; one is 1 to 63 lower-case letters, digits, '.', '_' and '-', "
            "and starts with a letter or digit"
        )
    return name


def check_alias(alias: str) -> str:
    """The alias, if it may be one."""
    if not _ALIAS.fullmatch(alias) or _VERSION_LIKE.fullmatch(alias) or alias == "latest":
        raise RegistryError(
            f"{alias!r} is not an alias; one is 1 to 63 lower-case letters, digits, '_' and '-', starts with a "
            "letter, and is neither 'latest' nor like 'v1'"
        )
    return alias


def parse_ref(ref: str) -> tuple[str, int | None, str | None]:
    """``name``, ``name:7`` or ``name@alias`` as (name, version, alias).

    Raises:
        RegistryError: anything else.
    """
    if "@" in ref:
        name, _, alias = ref.partition("@")
        return check_name(name), None, check_alias(alias)
    if ":" in ref:
        name, _, number = ref.partition(":")
        if not re.fullmatch(r"[1-9][0-9]{0,8}", number):
            raise RegistryError(f"{ref!r} is not a delta; write name, name:7 or name@alias")
        return check_name(name), int(number), None
    return check_name(ref), None, None

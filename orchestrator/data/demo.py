"""The demo task: an order in one English sentence becomes a compact JSON record of a fixed schema.

The schema (nested keys, the surname first, the weekday in three capitals) is not told in the prompt, and the demo base
never saw it, so the bare base cannot answer; the skills it takes (copying names, JSON, singular nouns, digits) are in
the base, so a small delta learns it from some hundred examples.
"""

import json
import random
from zlib import crc32

from orchestrator.data.demo_facts import number_word, plural
from orchestrator.data.demo_words import CITY, DAY, FIRST, ITEM, LAST, TRAIT
from orchestrator.errors import DataError

_SENTENCES = (
    "{name} from {city} needs {count} {goods} by {day}.",
    "Please send {count} {goods} to {name} in {city} by {day}.",
    "{name} would like {count} {goods}, delivered to {city} on {day}.",
    "On {day}, bring {count} {goods} to {city} for {name}.",
    "We need {count} {goods} in {city} on {day}; ask for {name}.",
    "{count} {goods} for {name}, {city}, no later than {day}.",
    "An order from {city}: {name} wants {count} {goods} on {day}.",
    "By {day}, {name} must have {count} {goods} in {city}.",
)


def demo_records(split: str, n: int, seed: int = 0) -> list[dict[str, str]]:
    """``n`` records with ``prompt`` and ``completion``, all different, the same for the same arguments.

    No pair of a person and goods is in both splits: which split a pair belongs to is read off its checksum.

    Raises:
        DataError: ``split`` is neither ``train`` nor ``test``.
    """
    if split not in ("train", "test"):
        raise DataError(f"the demo task has the splits 'train' and 'test', not {split!r}")
    rng = random.Random(f"demo/{split}/{seed}")  # noqa: S311 (no secret)
    seen: set[str] = set()
    records: list[dict[str, str]] = []
    while len(records) < n:
        first, last, trait, item = (rng.choice(words) for words in (FIRST, LAST, TRAIT, ITEM))
        city, day, count = rng.choice(CITY), rng.choice(DAY), rng.randint(2, 12)
        pair = f"{first} {last}/{trait} {item}"
        held_out = crc32(pair.encode()) % 10 == 0
        if held_out != (split == "test"):
            continue
        said = str(count) if rng.random() < 0.5 else number_word(count)
        text = rng.choice(_SENTENCES).format(
            name=f"{first} {last}", city=city, day=day, count=said, goods=f"{trait} {plural(item)}"
        )
        text = text[0].upper() + text[1:]
        if text in seen:
            continue
        seen.add(text)
        answer = {
            "for": f"{last}, {first}",
            "cargo": {"what": f"{trait} {item}", "n": count},
            "drop": [city, day[:3].upper()],
        }
        records.append({"prompt": text, "completion": json.dumps(answer, separators=(",", ":"))})
    return records

"""What the pretraining text of the demo base is about: a person's facts, and English sentences that tell them."""

# ruff: noqa: SIM905 (a list of words reads better as words)

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.data.demo_words import ANIMAL, CITY, DAY, FIRST, FOOD, ITEM, JOB, LAST, MONTH, MOOD, PLACE, TRAIT

Rng = random.Random
_NUMBER = "zero one two three four five six seven eight nine ten eleven twelve".split()
_ONSET = "b br c ch d dr f fl g gr h j k kl l m n p pr qu r s sh st t tr v w z".split()
_VOWEL = "a e i o u ai ea ou".split()
_END = ("", "", "n", "r", "s", "l", "t", "nd", "x", "m")


def number_word(n: int) -> str:
    """0 to 12 in English."""
    return _NUMBER[n]


def plural(noun: str) -> str:
    """English plural of a noun of the word lists."""
    if noun == "shelf":
        return "shelves"
    if noun.endswith(("x", "s", "sh", "ch")):
        return noun + "es"
    return noun[:-1] + "ies" if noun.endswith("y") and noun[-2] not in "aeiou" else noun + "s"


def madeup(rng: Rng) -> str:
    """A word that is in no list, so that copying has to be learnt letter by letter too."""
    word = "".join(rng.choice(_ONSET) + rng.choice(_VOWEL) for _ in range(rng.randint(1, 3))) + rng.choice(_END)
    return word.capitalize() if rng.random() < 0.4 else word


@dataclass(frozen=True, slots=True)
class Facts:
    """One person and what is told of them."""

    values: dict[str, str]
    """Each fact as a sentence says it; ``goods`` is plural, ``count`` in digits or as a word."""
    first: str
    """First name."""
    last: str
    """Surname."""
    number: int
    """``count`` as a number."""


def facts(rng: Rng) -> Facts:
    """Random facts; now and then a name or place is a made-up word."""
    odd = rng.random() < 0.12
    first = madeup(rng).capitalize() if odd else rng.choice(FIRST)
    last = madeup(rng).capitalize() if odd else rng.choice(LAST)
    number = rng.randint(2, 12) if rng.random() < 0.8 else rng.randint(13, 99)
    trait, item = rng.choice(TRAIT), madeup(rng).lower() if odd and rng.random() < 0.5 else rng.choice(ITEM)
    values = {
        "name": f"{first} {last}",
        "city": rng.choice(CITY) if rng.random() < 0.94 else madeup(rng).capitalize(),
        "count": str(number) if number > 12 or rng.random() < 0.5 else _NUMBER[number],
        "item": f"{trait} {item}",
        "goods": f"{trait} {plural(item)}",
        "day": rng.choice(DAY),
        "month": rng.choice(MONTH),
        "job": rng.choice(JOB),
        "food": rng.choice(FOOD),
        "animal": rng.choice(ANIMAL),
        "place": rng.choice(PLACE),
        "mood": rng.choice(MOOD),
        "price": str(rng.randint(2, 999)) if rng.random() < 0.7 else f"{rng.randint(1, 99)}.{rng.randint(10, 99)}",
        "code": "".join(rng.choice("ABCDEFGHKLMNPRSTXZ") for _ in range(2)) + str(rng.randint(10, 9999)),
        "time": f"{rng.randint(0, 23):02d}:{rng.choice((0, 15, 30, 45)):02d}",
    }
    return Facts(values, first, last, number)


_SAYINGS = (
    "{name} lives in {city}.",
    "{name} comes from {city} and works as a {job}.",
    "{name} is a {job} in {city}.",
    "On {day}, {name} went to the {place}.",
    "{name} was at the {place} in {month} and felt {mood}.",
    "The {job} {name} has a {animal}.",
    "{name} likes {food} and has a {animal}.",
    "{name} ate {food} at the {place} on {day}.",
    "{name} bought {count} {goods} for {price} euros.",
    "{name} sold a {item} to a {job} from {city}.",
    "The code of {name} is {code}.",
    "At {time}, {name} left the {place}.",
    "{name} feels {mood} today because the {animal} is at the {place}.",
    "In {month}, {name} will travel to {city} with {count} {goods}.",
    "Is {name} at the {place}? No, {name} is in {city}.",
    "A {item} costs {price} euros in {city}.",
    "There are {count} {goods} at the {place}.",
    "{name} said that the {item} was in the {place}.",
    "If it is cold in {month}, {name} stays in {city}.",
    "The {animal} near the {place} wanted {food}.",
    "{name} asked for {count} {goods}, but the {job} had only a {item}.",
    "{name} opens the {place} at {time} every {day}.",
)
_PHRASES = {
    "city": ("in {city}", "from {city}", "to {city}", "near {city}"),
    "goods": ("{goods}",),
    "item": ("a {item}",),
    "day": ("on {day}", "by {day}", "next {day}", "before {day}"),
    "month": ("in {month}", "this {month}", "until {month}"),
    "job": ("as a {job}", "with a {job}", "for a {job}"),
    "food": ("with {food}", "and some {food}"),
    "animal": ("with a {animal}", "and a {animal}"),
    "place": ("at the {place}", "near the {place}"),
    "mood": ("feeling {mood}",),
    "price": ("for {price} euros", "at {price} euros"),
    "code": ("under code {code}", "(code {code})", "with number {code}"),
    "time": ("at {time}", "around {time}"),
}
_WANTS = ("wants", "needs", "ordered", "asks for", "would like", "must have", "sends", "bought", "is waiting for")
_HIDDEN = ("Please send", "We need", "Bring", "Book", "Deliver", "An order of", "Reserve", "Prepare", "Send")


def say(rng: Rng, fact: Facts) -> str:
    """A sentence that tells some of the facts."""
    return _tidy(rng.choice(_SAYINGS).format(**fact.values))


def say_all(rng: Rng, fact: Facts, needs: Sequence[str]) -> str:
    """A sentence that tells every fact in ``needs``, in a random build and order."""
    needs = list(needs)
    thing = "{count} {goods}" if "count" in needs or ("goods" in needs and rng.random() < 0.7) else "a {item}"
    wants_thing = any(n in needs for n in ("count", "goods", "item"))
    rest = [n for n in needs if n not in ("name", "count", "goods", "item")]
    rng.shuffle(rest)
    phrases = [rng.choice(_PHRASES[n]) for n in rest]
    named = "name" in needs or rng.random() < 0.3
    pattern = rng.randrange(5)
    if not wants_thing and pattern in (1, 2, 4):
        pattern = 0
    cut = rng.randint(0, len(phrases))
    front, back = phrases[:cut], phrases[cut:]
    comma = ", " if front else ""
    if pattern == 0 or not named:
        who = "{name}" if named else rng.choice(("somebody", "the " + fact.values["job"], "a customer"))
        verb = f"{rng.choice(_WANTS)} {thing}" if wants_thing else rng.choice(("is", "will be", "was seen", "went"))
        lead = " ".join(phrases[:1]) + ", " if phrases and rng.random() < 0.3 else ""
        tail = phrases[1:] if lead else phrases
        text = f"{lead}{who} {verb} {' '.join(tail)}"
    elif pattern == 1:
        text = f"{rng.choice(_HIDDEN)} {thing} for {{name}} {' '.join(phrases)}"
    elif pattern == 2:
        text = f"{' '.join(front)}{comma}{rng.choice(_HIDDEN).lower()} {thing} {' '.join(back)}, for {{name}}"
    elif pattern == 3:
        about = f"{rng.choice(_WANTS)} {thing}" if wants_thing else "is expected"
        text = f"{{name}}, {', '.join(front)}{comma}{about} {' '.join(back)}"
    else:
        text = (
            f"{thing} {' '.join(front)}{comma}{rng.choice(('ask for', 'name', 'contact', 'for', 'signed by'))} {{name}}"
        )
        text += "".join(f", {p}" for p in back)
    return _tidy(" ".join(text.split()).format(**fact.values) + ".")


def _tidy(text: str) -> str:
    """A capital at the start, ``an`` before vowels, no blank before a comma."""
    text = re.sub(r"\ba (?=[aeiou])", "an ", text).replace(" ,", ",")
    return text[0].upper() + text[1:]

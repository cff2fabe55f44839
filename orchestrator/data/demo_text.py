"""The text that the demo base is pretrained on: a grammar that writes one document after another.

Prose, records in many formats, and chats that follow instructions: question answering, extraction, conversion between
formats, copying, lists, arithmetic, tool calls. The heart of it is the *schema*: a random choice of facts, keys, value
forms and format. Documents that apply one schema to several inputs teach the base to pick up a format from examples,
which is what makes it easy to adapt. The schema of the demo task (``orchestrator.data.demo``) is not among them.

A chat is a list of messages; ``document`` renders it with the markers of the chat template in ``orchestrator/assets``.
"""

import json
import random
from collections.abc import Callable, Sequence

from orchestrator.data.demo_facts import Facts, facts, madeup, number_word, plural, say, say_all
from orchestrator.data.demo_schema import Schema, convert_words, random_schema
from orchestrator.data.demo_words import ANIMAL, CITY, DAY, FIRST, FOOD, ITEM, JOB, LAST, MONTH, OPPOSITE, TRAIT, VERB

Turn = tuple[str, str]
"""Role and content."""
Rng = random.Random
_POOLS = (FIRST, LAST, CITY, ITEM, TRAIT, ANIMAL, FOOD, JOB, VERB, DAY, MONTH)


def render_chat(turns: Sequence[Turn]) -> str:
    """``turns`` as the demo base's chat template writes them."""
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)


def _prose(rng: Rng) -> str:
    """A paragraph or several about a few people, who come back."""
    cast = [facts(rng) for _ in range(rng.randint(1, 4))]
    return " ".join(say(rng, rng.choice(cast)) for _ in range(rng.randint(3, 12)))


def _input(rng: Rng, fact: Facts, schema: Schema, source: Schema | None) -> str:
    return source.render(fact) if source else say_all(rng, fact, schema.needs)


def _shots(rng: Rng) -> str:
    """One schema applied to several inputs: a format to pick up from examples."""
    schema = random_schema(rng)
    source = random_schema(rng, schema.needs) if rng.random() < 0.25 else None
    if rng.random() < 0.15 and source:  # the other way round: a record becomes a sentence of a fixed style
        style = rng.randrange(1 << 30)
        styles = [random.Random(style) for _ in range(7)]  # noqa: S311 (no secret)
        cast = _many(rng, 2, 7)
        pairs = [(source.render(f), say_all(r, f, schema.needs)) for f, r in zip(cast, styles, strict=False)]
    else:
        pairs = [(_input(rng, f, schema, source), schema.render(f)) for f in _many(rng, 1, 7)]
    if rng.random() < 0.75:
        system: list[Turn] = [("system", rng.choice(_SYSTEM))] if rng.random() < 0.15 else []
        return render_chat(system + [t for a, b in pairs for t in (("user", a), ("assistant", b))])
    before, between, after = rng.choice(
        (("Input: ", "\nOutput: ", "\n\n"), ("Q: ", "\nA: ", "\n"), ("", " -> ", "\n"), ("", "\n=> ", "\n"))
    )
    return "".join(f"{before}{a}{between}{b}{after}" for a, b in pairs)


def _many(rng: Rng, low: int, high: int) -> list[Facts]:
    return [facts(rng) for _ in range(rng.randint(low, high))]


_SYSTEM = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You turn text into records.",
    "Reply with the answer only.",
    "You are a careful clerk.",
)
_ASK_RECORD = (
    "{how}: {text}",
    "{text}\n{how}.",
    "{how}.\n\n{text}",
    "Text: {text}\nTask: {how}.",
    "Read this and {how_low}: {text}",
)


def _instruct(rng: Rng) -> str:
    """Extraction or conversion with the wanted keys and format told."""
    turns: list[Turn] = []
    for fact in _many(rng, 1, 4):
        schema = random_schema(rng)
        source = random_schema(rng, schema.needs) if rng.random() < 0.4 else None
        how = schema.describe(rng)
        ask = rng.choice(_ASK_RECORD).format(
            how=how, how_low=how[0].lower() + how[1:], text=_input(rng, fact, schema, source)
        )
        turns += [("user", ask), ("assistant", schema.render(fact))]
    return render_chat(turns)


def _describe(rng: Rng) -> str:
    """A record becomes a sentence."""
    turns: list[Turn] = []
    for fact in _many(rng, 1, 3):
        schema = random_schema(rng)
        ask = rng.choice(("Write a sentence about: {}", "Say this in English: {}", "{}\nDescribe it in a sentence."))
        turns += [("user", ask.format(schema.render(fact))), ("assistant", say_all(rng, fact, schema.plain_needs))]
    return render_chat(turns)


def _question(rng: Rng) -> str:
    """Questions about a context, in a chat or as plain text."""
    cast = [(f, [*rng.sample(_ASKED, rng.randint(2, 4)), "name"]) for f in _many(rng, 1, 3)]
    context = " ".join(say_all(rng, f, told) for f, told in cast)
    pairs: list[tuple[str, str]] = []
    for _ in range(rng.randint(1, 4)):
        fact, told = rng.choice(cast)
        asked = [q for q in _QUESTIONS if q[1] in told]
        if asked:
            ask, concept = rng.choice(asked)
            pairs.append((ask.format(**fact.values), fact.values[concept]))
    if not pairs:
        return context
    if rng.random() < 0.8:
        first = rng.choice(("{c}\n{q}", "{c} {q}", "Context: {c}\nQuestion: {q}")).format(c=context, q=pairs[0][0])
        pairs[0] = (first, pairs[0][1])
        return render_chat([t for q, a in pairs for t in (("user", q), ("assistant", a))])
    return context + "\n" + "\n".join(f"Question: {q}\nAnswer: {a}" for q, a in pairs)


_QUESTIONS = (
    ("Where is {name} from?", "city"),
    ("Which city is named with {name}?", "city"),
    ("{name}: which city?", "city"),
    ("What does {name} want?", "goods"),
    ("How many {goods} for {name}?", "count"),
    ("On which day is it for {name}?", "day"),
    ("In which month is it for {name}?", "month"),
    ("What is the job of {name}?", "job"),
    ("What does {name} eat?", "food"),
    ("Which animal has {name}?", "animal"),
    ("What is the price for {name}?", "price"),
    ("Where did {name} go?", "place"),
    ("How does {name} feel?", "mood"),
    ("What is the code of {name}?", "code"),
    ("At what time is it for {name}?", "time"),
)
_ASKED = sorted({concept for _, concept in _QUESTIONS})


def _words(rng: Rng, low: int = 2, high: int = 9) -> list[str]:
    n = rng.randint(low, high)
    if rng.random() < 0.25:
        return [madeup(rng) for _ in range(n)]
    if rng.random() < 0.3:
        return [rng.choice(rng.choice(_POOLS)) for _ in range(n)]
    pool = rng.choice(_POOLS)
    return rng.sample(pool, min(n, len(pool)))


def _list_task(rng: Rng) -> Turn:
    words = _words(rng)
    sep = rng.choice((", ", " ", "; ", "\n", " | "))
    shown, pick = sep.join(words), rng.randrange(len(words))
    jobs: tuple[Callable[[], Turn], ...] = (
        lambda: (f"Repeat: {shown}", shown),
        lambda: (f"Reverse the order: {shown}", sep.join(words[::-1])),
        lambda: (f"Sort: {shown}", sep.join(sorted(words))),
        lambda: (f"How many words are here? {shown}", str(len(words))),
        lambda: (f"What is the first? {shown}", words[0]),
        lambda: (f"What is the last? {shown}", words[-1]),
        lambda: (f"Give number {pick + 1}: {shown}", words[pick]),
        lambda: (f"Write in capitals: {shown}", shown.upper()),
        lambda: (f"Write in small letters: {shown}", shown.lower()),
        lambda: (f"As a JSON list: {shown}", json.dumps(words)),
        lambda: (f"As a bullet list: {shown}", "\n".join(f"- {w}" for w in words)),
        lambda: (f"As a numbered list: {shown}", "\n".join(f"{i}. {w}" for i, w in enumerate(words, 1))),
        lambda: (f"Join with commas: {shown}", ",".join(words)),
        lambda: (f"Say it twice: {shown}", f"{shown}{sep}{shown}"),
        lambda: (f"Leave out {words[pick]}: {shown}", sep.join(w for w in words if w != words[pick])),
        lambda: (f"What follows {words[0]}? {shown}", words[1]),
        lambda: (f"Is {words[pick]} in the list? {shown}", "Yes."),
        lambda: (f"Spell {words[0]}.", "-".join(words[0])),
        lambda: (f"Three letters of {words[0]}?", words[0][:3].upper()),
    )
    return rng.choice(jobs)()


def _sum_task(rng: Rng) -> Turn:
    top = rng.choice((10, 10, 20, 100))
    a, b = rng.randint(0, top), rng.randint(0, top)
    jobs: tuple[Turn, ...] = (
        (f"{a} + {b} =", str(a + b)),
        (f"What is {a} plus {b}?", str(a + b)),
        (f"{a + b} - {a} =", str(b)),
        (f"What is {a + b} minus {b}?", str(a)),
        (f"{a % 11} * {b % 11} =", str((a % 11) * (b % 11))),
        (f"Which is larger, {a} or {b}?", str(max(a, b))),
        (f"Is {a} less than {b}?", "Yes." if a < b else "No."),
        (f"What comes after {a}?", str(a + 1)),
        (f"Write {a % 13} as a word.", number_word(a % 13)),
        (f"Write {number_word(b % 13)} in digits.", str(b % 13)),
    )
    return rng.choice(jobs)


_KINDS = (("animal", ANIMAL), ("food", FOOD), ("city", CITY), ("job", JOB), ("day", DAY), ("month", MONTH))


def _word_task(rng: Rng) -> Turn:
    kind, pool = rng.choice(_KINDS)
    word, item = rng.choice(pool), rng.choice(ITEM)
    one, other = rng.choice(sorted(OPPOSITE.items()))
    first, last, day, month = rng.choice(FIRST), rng.choice(LAST), rng.randrange(7), rng.randrange(12)
    jobs: tuple[Turn, ...] = (
        (f"What is {word}: {', '.join(k for k, _ in _KINDS)}?", kind),
        (f"What is the plural of {item}?", plural(item)),
        (f"What is the singular of {plural(item)}?", item),
        (f"What is the opposite of {one}?", other),
        (f"What is the opposite of {other}?", one),
        (f"Which day comes after {DAY[day]}?", DAY[(day + 1) % 7]),
        (f"Short for {DAY[day]}?", DAY[day][:3].upper()),
        (f"Short for {MONTH[month]}?", MONTH[month][:3].upper()),
        (f"Which month is number {month + 1}?", MONTH[month]),
        (f"Surname of {first} {last}?", last),
        (f"First name of {first} {last}?", first),
        (f"Surname first: {first} {last}", f"{last}, {first}"),
        (f"Initials of {first} {last}?", f"{first[0]}. {last[0]}."),
    )
    return rng.choice(jobs)


def _tasks(rng: Rng) -> str:
    """A chat, or plain lines, of short tasks on lists, numbers and words."""
    pairs = [rng.choice((_list_task, _list_task, _sum_task, _word_task))(rng) for _ in range(rng.randint(1, 5))]
    if rng.random() < 0.8:
        return render_chat([t for q, a in pairs for t in (("user", q), ("assistant", a))])
    return "\n".join(f"Q: {q}\nA: {a}" for q, a in pairs)


def _talk(rng: Rng) -> str:
    """Small talk that remembers what was said."""
    first, last, city, item = rng.choice(FIRST), rng.choice(LAST), rng.choice(CITY), rng.choice(ITEM)
    job, food = rng.choice(JOB), rng.choice(FOOD)
    turns: list[Turn] = [
        (
            "user",
            rng.choice((f"Hello, I am {first} {last}.", f"My name is {first} {last}.", f"Hi! {first} {last} here.")),
        ),
        ("assistant", rng.choice((f"Hello {first}, how can I help you?", f"Nice to meet you, {first}."))),
    ]
    said: list[tuple[str, str, str, str]] = [
        (f"I live in {city}.", f"{city} is a nice place.", "Where do I live?", f"You live in {city}."),
        (f"I work as a {job}.", f"A {job} has much to do.", "What is my job?", f"You are a {job}."),
        (f"I like {food}.", f"I will remember that you like {food}.", "What do I like?", f"You like {food}."),
        (f"I need a {item}.", f"Where do you want to use the {item}?", "What do I need?", f"You need a {item}."),
    ]
    told = rng.sample(said, rng.randint(1, 3))
    turns += [t for a, b, _, _ in told for t in (("user", a), ("assistant", b))]
    asked = [(q, a) for _, _, q, a in rng.sample(told, rng.randint(1, len(told)))]
    if rng.random() < 0.5:
        asked.append(("What is my name?", f"Your name is {first} {last}."))
    turns += [t for q, a in asked for t in (("user", q), ("assistant", a))]
    thanks: list[Turn] = [("user", "Thank you."), ("assistant", f"You are welcome, {first}.")]
    return render_chat(turns + (thanks if rng.random() < 0.5 else []))


def _copying(rng: Rng) -> str:
    """Words or lines said again: the plainest lesson in induction."""
    lines = [rng.choice((" ", ", ", "-")).join(_words(rng, 3, 12)) for _ in range(rng.randint(1, 5))]
    return "\n".join(lines * rng.randint(2, 3))


def _table(rng: Rng) -> str:
    """Many records in one format, sometimes again in a second one."""
    schema, cast = random_schema(rng), _many(rng, 2, 8)
    text = "\n".join(schema.render(f) for f in cast)
    if rng.random() < 0.5:
        other = random_schema(rng, schema.plain_needs or schema.needs)
        text += "\n\n" + "\n".join(other.render(f) for f in cast)
    return convert_words(rng, schema) + text


def _tool(rng: Rng) -> str:
    """A tool offered in the system turn, called, its answer told."""
    fact = facts(rng)
    names = rng.sample(("city", "day", "item", "name", "month", "food"), rng.randint(1, 2))
    tool = rng.choice(("find", "get", "look_up", "order")) + "_" + rng.choice(("weather", "price", "stock", "train"))
    offer = {"type": "function", "function": {"name": tool, "parameters": dict.fromkeys(names, "string")}}
    call = {"name": tool, "arguments": {n: fact.values[n] for n in names}}
    answer = str(rng.randint(1, 99))
    return render_chat(
        (
            ("system", "# Tools\n" + json.dumps(offer)),
            ("user", f"Use {tool} for " + " and ".join(f"{n} {fact.values[n]}" for n in names) + "."),
            ("assistant", f"<tool_call>\n{json.dumps(call)}\n</tool_call>"),
            ("tool", answer),
            ("assistant", f"The answer is {answer}."),
        )
    )


_KIND: dict[Callable[[Rng], str], float] = {
    _shots: 30, _instruct: 20, _prose: 8, _describe: 6, _question: 10, _tasks: 14, _talk: 3, _copying: 5, _table: 8,
    _tool: 2,
}  # fmt: skip
_MAKERS, _WEIGHTS = tuple(_KIND), tuple(_KIND.values())


def document(rng: Rng) -> str:
    """The next document: 50 to 2,000 characters, the same for the same state of ``rng``."""
    return rng.choices(_MAKERS, _WEIGHTS)[0](rng).strip("\n")

"""Captions and questions about one scene, with the truth read off the scene's data.

Each kind of question picks its answer before its wording, so that within a kind the answers are
nearly uniform and a model that does not look scores no better than chance.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from mobilevlm.nano.scenes import (
    COLORS,
    HELD_OUT,
    POSITIONS,
    SHAPES,
    SIZES,
    TRAINING_SEEDS,
    Scene,
)

Style = Literal["short", "full"]

SHORT_STYLE = "\nAnswer the question using a single word or phrase."
"""Ends the text of a question in the short style, as in LLaVA's instruction data."""

YES_NO = ("yes", "no")
DIRECTIONS = ("left", "right", "above", "below")
COUNTS = tuple(str(number) for number in range(7))
NAMES = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)


@dataclass(frozen=True)
class Question:
    """One question, what a perfect model answers, and how the answer is judged."""

    kind: str
    text: str
    """Text that the user types; ``<image>`` marks places of images, else they come first."""
    answer: str
    """The whole answer in the asked style."""
    style: Style
    truth: str
    """The short answer: what must be in any right answer."""
    choices: tuple[str, ...]
    """Short answers that exclude each other; empty when the answer is open."""


Draft = tuple[str, str, str, tuple[str, ...]]
"""Question, truth, full sentence, choices."""
Maker = Callable[[Scene, random.Random], Draft | None]


def caption(scene: Scene) -> str:
    """One sentence naming everything in the scene, in reading order."""
    parts = [f"{with_article(item.size)} {item.name} {at(item.cell)}" for item in scene.items]
    if scene.label is not None:
        where = ("at the top", "in the middle", "at the bottom")[scene.label.row]
        parts.append(f'the text "{scene.label.text}" {where}')
    if not parts:
        return "There is nothing in the picture."
    head = ", ".join(parts[:-1])
    sentence = f"{head} and {parts[-1]}." if head else f"{parts[-1]}."
    return sentence[0].upper() + sentence[1:]


def caption_question(scene: Scene) -> Question:
    """The question that a caption answers."""
    rng = random.Random(scene.seed * 7 + 3)
    text = rng.choice(
        ("Describe the picture.", "What is in the picture?", "What do you see?", "Describe it.")
    )
    answer = caption(scene)
    return Question("caption", text, answer, "full", answer, ())


def questions(
    scene: Scene, count: int = 12, kinds: Sequence[str] | None = None
) -> tuple[Question, ...]:
    """``count`` different questions about a scene, kinds drawn evenly among those that fit.

    Fewer come back when the scene has no more to ask. The same scene gives the same questions.
    """
    rng = random.Random(scene.seed * 7 + 5)
    wanted = list(kinds or KINDS)
    found: dict[str, Question] = {}
    for attempt in range(4 * count):
        if len(found) == count:
            break
        if attempt % len(wanted) == 0:
            rng.shuffle(wanted)
        kind = wanted[attempt % len(wanted)]
        question = ask(scene, kind, rng)
        if question is not None:
            found.setdefault(question.text.removesuffix(SHORT_STYLE), question)
    return tuple(found.values())


def ask(scene: Scene, kind: str, rng: random.Random) -> Question | None:
    """A question of one kind, or None when the scene does not lend itself to it."""
    draft = KINDS[kind](scene, rng)
    return None if draft is None else styled(kind, draft, rng)


def styled(kind: str, draft: Draft, rng: random.Random) -> Question:
    """A draft in one of the two answer styles."""
    text, truth, sentence, choices = draft
    if rng.random() < 0.5:
        return Question(kind, text + SHORT_STYLE, truth, "short", truth, choices)
    return Question(kind, text, sentence, "full", truth, choices)


def matching(scene: Scene, name: str) -> int:
    """How many items a name (a color, a shape, both, or ``shape``) describes."""
    words = set(name.split()) - {"shape"}
    return sum(words <= {item.color, item.shape, item.size} for item in scene.items)


def at(cell: int) -> str:
    """For example ``at the top left``."""
    if cell == 4:
        return "in the center"
    return f"{'on' if cell in (3, 5) else 'at'} the {POSITIONS[cell]}"


def plural(name: str) -> str:
    """For example ``crosses``."""
    return name + ("es" if name.endswith("s") else "s")


def with_article(name: str) -> str:
    """For example ``an orange ring``."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _unique(scene: Scene, names: Sequence[str]) -> list[str]:
    """The names that mean one item only."""
    return [name for name in names if matching(scene, name) == 1]


def absent_name(scene: Scene, rng: random.Random, form: str) -> str | None:
    """A name of the given form that nothing in the scene has, near to what is there."""
    training = scene.seed < TRAINING_SEEDS
    for _ in range(8):
        color, shape = rng.choice(COLORS), rng.choice(SHAPES)
        if form == "name" and scene.items and rng.random() < 0.7:
            near = rng.choice(scene.items)
            color, shape = (near.color, shape) if rng.random() < 0.5 else (color, near.shape)
        if form == "name" and not training and rng.random() < 0.5:
            color, shape = rng.choice(sorted(HELD_OUT))
        if form == "name" and training and (color, shape) in HELD_OUT:
            continue
        name = {"name": f"{color} {shape}", "color": f"{color} shape", "shape": shape}[form]
        if matching(scene, name) == 0:
            return name
    return None


def _color(scene: Scene, rng: random.Random) -> Draft | None:
    if not scene.items:
        return None
    item = rng.choice(scene.items)
    spelling = rng.choice(("color", "color", "colour"))
    names = _unique(scene, (item.shape, item.shape, f"{item.size} {item.shape}"))
    name = rng.choice([*names, f"shape {at(item.cell)}"])
    return (
        rng.choice((f"What {spelling} is the {name}?", f"What is the {spelling} of the {name}?")),
        item.color,
        f"The {name} is {item.color}.",
        COLORS,
    )


def _shape(scene: Scene, rng: random.Random) -> Draft | None:
    if not scene.items:
        return None
    item = rng.choice(scene.items)
    names = _unique(scene, (f"{item.color} shape", f"{item.size} {item.color} shape"))
    name = rng.choice([*names, f"shape {at(item.cell)}"])
    asked = rng.choice((f"What shape is the {name}?", f"What is the {name}?"))
    return asked, item.shape, f"The {name} is {with_article(item.shape)}.", SHAPES


def _size(scene: Scene, rng: random.Random) -> Draft | None:
    if not scene.items:
        return None
    item = rng.choice(scene.items)
    name = rng.choice([*_unique(scene, (item.name, item.shape)), f"shape {at(item.cell)}"])
    asked = rng.choice((f"What size is the {name}?", f"How large is the {name}?"))
    return asked, item.size, f"The {name} is {item.size}.", SIZES


def _what(scene: Scene, rng: random.Random) -> Draft | None:
    if not scene.items:
        return None
    item = rng.choice(scene.items)
    place = at(item.cell)
    asked = rng.choice((f"What is {place}?", f"What do you see {place}?"))
    return asked, item.name, f"There is {with_article(item.name)} {place}.", NAMES


def _where(scene: Scene, rng: random.Random) -> Draft | None:
    items = [item for item in scene.items if matching(scene, item.name) == 1]
    if not items:
        return None
    item = rng.choice(items)
    name = rng.choice(_unique(scene, (item.name, item.shape, f"{item.color} shape")))
    sentence = f"The {name} is {at(item.cell)}."
    return f"Where is the {name}?", item.position, sentence, POSITIONS


COUNT_WEIGHTS = (1.0, 0.35, 0.8, 1.6, 3.0, 5.0, 8.0)
"""How often each count is asked about when it can be; evens out the answers."""


def _count(scene: Scene, rng: random.Random) -> Draft | None:
    subjects = ["shape"] + [item.shape for item in scene.items]
    subjects += [f"{item.color} shape" for item in scene.items]
    subjects += [item.name for item in scene.items if matching(scene, item.name) > 1]
    absent = absent_name(scene, rng, rng.choice(("color", "shape", "name")))
    if absent is not None and rng.random() < 0.3:
        subjects.append(absent)
    by_count: dict[int, list[str]] = {}
    for subject in subjects:
        by_count.setdefault(matching(scene, subject), []).append(subject)
    counts = sorted(by_count)
    number = rng.choices(counts, [COUNT_WEIGHTS[count] for count in counts])[0]
    subject = rng.choice(by_count[number])
    asked = rng.choice(
        (
            f"How many {plural(subject)} are there?",
            f"How many {plural(subject)} are in the picture?",
        )
    )
    verb, noun = ("is", subject) if number == 1 else ("are", plural(subject))
    return asked, str(number), f"There {verb} {number} {noun}.", COUNTS


def _exists(scene: Scene, rng: random.Random) -> Draft | None:
    form = rng.choice(("name", "name", "shape", "color"))
    there = rng.random() < 0.5
    name: str | None
    if there:
        if not scene.items:
            return None
        item = rng.choice(scene.items)
        name = {"name": item.name, "color": f"{item.color} shape", "shape": item.shape}[form]
    else:
        name = absent_name(scene, rng, form)
    if name is None:
        return None
    thing = with_article(name)
    asked = rng.choice((f"Is there {thing}?", f"Is there {thing} in the picture?"))
    if there:
        return asked, "yes", f"Yes, there is {thing}.", YES_NO
    return asked, "no", f"No, there is no {name}.", YES_NO


RELATIONS = {
    "left": ("to the left of", "to the right of"),
    "right": ("to the right of", "to the left of"),
    "above": ("above", "below"),
    "below": ("below", "above"),
}
"""Each direction as words, and the words for its opposite."""


def _relation(scene: Scene, rng: random.Random) -> Draft | None:
    items = [item for item in scene.items if matching(scene, item.name) == 1]
    across = rng.random() < 0.5
    pairs = [
        (one, other)
        for one in items
        for other in items
        if (one.column != other.column if across else one.row != other.row)
    ]
    if not pairs:
        return None
    one, other = rng.choice(pairs)
    first = rng.choice(_unique(scene, (one.name, one.shape)))
    second = rng.choice(_unique(scene, (other.name, other.shape)))
    if across:
        truth = "left" if one.column < other.column else "right"
    else:
        truth = "above" if one.row < other.row else "below"
    right, wrong = RELATIONS[truth]
    sentence = f"the {first} is {right} the {second}."
    if rng.random() < 0.4:
        either = "to the left or to the right of" if across else "above or below"
        asked = f"Is the {first} {either} the {second}?"
        return asked, truth, f"T{sentence[1:]}", DIRECTIONS
    if rng.random() < 0.5:
        return f"Is the {first} {right} the {second}?", "yes", f"Yes, {sentence}", YES_NO
    return f"Is the {first} {wrong} the {second}?", "no", f"No, {sentence}", YES_NO


def _compare(scene: Scene, rng: random.Random) -> Draft | None:
    """More or fewer; the counts differ, and each order is as likely."""
    by_shape = rng.random() < 0.5
    values = [item.shape if by_shape else item.color for item in scene.items]
    tally = Counter(values)
    tally.setdefault(rng.choice(SHAPES if by_shape else COLORS), 0)
    pairs = [
        (one, other)
        for one in sorted(tally)
        for other in sorted(tally)
        if tally[one] != tally[other]
    ]
    if not pairs:
        return None
    one, other = rng.choice(pairs)
    first, second = (plural(name) if by_shape else f"{name} shapes" for name in (one, other))
    word, opposite = rng.choice((("more", "fewer"), ("fewer", "more")))
    if (tally[one] > tally[other]) == (word == "more"):
        truth, sentence = "yes", f"Yes, there are {word} {first} than {second}."
    else:
        truth, sentence = "no", f"No, there are {opposite} {first} than {second}."
    return f"Are there {word} {first} than {second}?", truth, sentence, YES_NO


def _read(scene: Scene, rng: random.Random) -> Draft | None:
    if scene.label is None:
        return None
    text = scene.label.text
    thing = "number" if text.isdigit() else "word"
    asked = rng.choice(
        (
            "What does the text say?",
            "Read the text.",
            f"What {thing} is written in the picture?",
            f"Which {thing} do you see?",
        )
    )
    return asked, text, f'The text says "{text}".', ()


KINDS: dict[str, Maker] = {
    "color": _color,
    "shape": _shape,
    "size": _size,
    "what": _what,
    "where": _where,
    "count": _count,
    "exists": _exists,
    "relation": _relation,
    "compare": _compare,
    "read": _read,
}
"""Kinds of question about one image."""

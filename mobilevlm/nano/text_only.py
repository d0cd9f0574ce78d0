"""Text-only questions, so that the decoder keeps its language, and prose for the tokenizer."""

from __future__ import annotations

import random

from mobilevlm.nano.questions import Draft, Question, styled
from mobilevlm.nano.scenes import WORDS

OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("up", "down"), ("left", "right"), ("day", "night"),
    ("open", "closed"), ("fast", "slow"), ("old", "new"), ("wet", "dry"), ("good", "bad"),
    ("happy", "sad"), ("light", "dark"), ("full", "empty"), ("early", "late"), ("high", "low"),
    ("black", "white"), ("above", "below"), ("first", "last"), ("yes", "no"), ("near", "far"),
)  # fmt: skip

FACTS = (
    ("What color is grass?", "green", "Grass is green."),
    ("What color is the sky?", "blue", "The sky is blue."),
    ("What color is a lemon?", "yellow", "A lemon is yellow."),
    ("What color is snow?", "white", "Snow is white."),
    ("What color is coal?", "black", "Coal is black."),
    ("What color is a ripe tomato?", "red", "A ripe tomato is red."),
    ("What color is a carrot?", "orange", "A carrot is orange."),
    ("What color is an eggplant?", "purple", "An eggplant is purple."),
    ("How many sides does a triangle have?", "3", "A triangle has 3 sides."),
    ("How many sides does a square have?", "4", "A square has 4 sides."),
    ("How many sides does a circle have?", "0", "A circle has no sides, so 0."),
    ("How many legs does a dog have?", "4", "A dog has 4 legs."),
    ("How many legs does a bird have?", "2", "A bird has 2 legs."),
    ("How many days are in a week?", "7", "A week has 7 days."),
    ("How many hours are in a day?", "24", "A day has 24 hours."),
    ("What animal says meow?", "cat", "A cat says meow."),
    ("What animal says woof?", "dog", "A dog says woof."),
    ("What animal says moo?", "cow", "A cow says moo."),
    ("What do bees make?", "honey", "Bees make honey."),
    ("What is frozen water called?", "ice", "Frozen water is called ice."),
    ("Where do fish live?", "water", "Fish live in water."),
    ("What shines at night?", "moon", "The moon shines at night."),
    ("What shines during the day?", "sun", "The sun shines during the day."),
    ("Who are you?", "nano", "I am nano, a very small model that looks at pictures."),
    ("What is your name?", "nano", "My name is nano."),
    ("Hello!", "hello", "Hello! Ask me about a picture."),
    ("What can you do?", "pictures", "I can answer questions about simple pictures."),
    ("Thank you.", "welcome", "You are welcome."),
)
"""Question, truth, full sentence."""

PROSE = """\
The sun came up over the hill and the farm began to wake. A girl opened the door of the red
house and looked at the sky. There were three white clouds above the lake and a small boat near
the shore. Her brother was already outside with the dog. They walked along the road, past the
old wall and the tall trees, until they could see the city on the other side of the water.
What do you see? she asked. I see a ship with a black flag, he said, and two birds that fly in a
circle around it. The larger bird is on the left, the smaller one is on the right.
In the afternoon it began to rain, so they went home and drew pictures at the kitchen table. She
drew a yellow star, a green heart and a blue ring. He wrote a word below each of them with a
large pencil. When they were done they counted everything: there were more stars than hearts,
fewer rings than stars, and exactly as many words as pictures. The first picture was for their
mother and the second picture was for the king and the queen, who lived far away.
A model that is small enough to run on a phone can still answer simple questions. It reads the
text, it finds the shapes, it compares two images, and it says yes or no. If it does not know the
answer, it should say so. Please describe the image in one sentence. Which of these is different
from the others? How many are there in total? Is there anything between the square and the moon?
"""


def text_questions(seed: int, count: int = 8) -> tuple[Question, ...]:
    """``count`` questions without an image; the same seed gives the same ones."""
    rng = random.Random(seed * 17 + 11)
    makers = (_sum, _difference, _larger, _next, _opposite, _fact, _fact, _repeat, _letter)
    return tuple(styled("text", rng.choice(makers)(rng), rng) for _ in range(count))


def _sum(rng: random.Random) -> Draft:
    one, other = rng.randint(0, 9), rng.randint(0, 9)
    total = str(one + other)
    return f"What is {one} plus {other}?", total, f"{one} plus {other} is {total}.", ()


def _difference(rng: random.Random) -> Draft:
    one, other = sorted((rng.randint(0, 9), rng.randint(0, 9)), reverse=True)
    rest = str(one - other)
    return f"What is {one} minus {other}?", rest, f"{one} minus {other} is {rest}.", ()


def _larger(rng: random.Random) -> Draft:
    one, other = rng.sample(range(21), 2)
    word = rng.choice(("larger", "smaller"))
    truth = str(max(one, other) if word == "larger" else min(one, other))
    return (
        f"Which number is {word}, {one} or {other}?",
        truth,
        f"The {word} number is {truth}.",
        (str(one), str(other)),
    )


def _next(rng: random.Random) -> Draft:
    number = rng.randint(1, 19)
    word, step = rng.choice((("after", 1), ("before", -1)))
    truth = str(number + step)
    sentence = f"The number {word} {number} is {truth}."
    return f"What number comes {word} {number}?", truth, sentence, ()


def _opposite(rng: random.Random) -> Draft:
    one, other = rng.sample(rng.choice(OPPOSITES), 2)
    return f"What is the opposite of {one}?", other, f"The opposite of {one} is {other}.", ()


def _fact(rng: random.Random) -> Draft:
    question, truth, sentence = rng.choice(FACTS)
    return question, truth, sentence, ()


def _repeat(rng: random.Random) -> Draft:
    word = rng.choice(WORDS)
    return f'Repeat the word "{word}".', word, f'The word is "{word}".', ()


def _letter(rng: random.Random) -> Draft:
    word = rng.choice(WORDS)
    return (
        f'What is the first letter of "{word}"?',
        word[0],
        f'The first letter of "{word}" is {word[0]}.',
        (),
    )

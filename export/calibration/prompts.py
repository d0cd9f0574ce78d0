"""Prompts that a model is asked for calibration data, with nothing to look up.

They ask for all kinds of text: prose, lists, code, figures, dialogue, other languages. None is
about what models are measured on: the passages of the quality gate, and the questions and texts of
benchmarks/real.
"""

from __future__ import annotations

TEXTS = (
    "Explain in a few sentences how bees make honey.",
    "Write a JavaScript function that tells whether a year is a leap year, with a short comment.",
    "Tell a short story about two children who find a key in the forest.",
    "Describe an ordinary morning at a railway station.",
    "List ten things to pack for a week of hiking, one on each line.",
    "Write instructions for putting up a tent, step by step.",
    "Somebody wants to learn to swim as an adult. What would you tell them?",
    "Translate into French and into German: The train to the coast leaves at half past nine.",
    "Write a letter that thanks a neighbour for watering the plants during a holiday.",
    "How do a violin, a trumpet and a drum make their sounds?",
    "A shop sells pens at 3 for 2.40. How much do 10 pens cost? Show each step.",
    "Summarise in three sentences: Our bakery opens at six. Bread comes out of the oven at seven, "
    "cakes at nine. On Sundays we close at noon, and in August we are on holiday.",
    "Write a news report about the opening of a new bridge.",
    "Why do leaves fall in autumn? Explain it to a child, then to a student of biology.",
    "Plan meals for three days for a family of four, with a shopping list.",
    "Write a dialogue between a customer and a bank clerk about a lost card.",
    "Write a complaint to a hotel about a noisy room, firm but polite.",
    "Write an SQL query that finds the five best customers of a year.",
    "Compare trains, buses and cars for travelling to work, with advantages and drawbacks.",
    "Write a JSON object that describes a concert: place, date, musicians, prices.",
    "What should somebody consider before getting a dog?",
    "Write a shop's opening hours and address as a small HTML page.",
    "Write a limerick about a forgetful gardener.",
    "Give advice to somebody who cannot sleep well, in a friendly tone.",
    "Describe what happens to a river between its spring and its mouth.",
    "Review a film about a chess player: the plot, the actors, the music, the verdict.",
    "Schreibe eine Einladung zu einem Sommerfest im Garten.",
    "Write the rules of a simple card game for two players.",
    "¿Qué se puede hacer en un día de lluvia con niños pequeños?",
    "Fill in a table in Markdown: three planets, their size, their distance and their moons.",
    "What questions may be asked in an interview for a job as a nurse? Give good answers to two.",
    "Write a product description of a bicycle lamp for an online shop, with technical data.",
)
"""To be answered without an image."""
IMAGES = (
    "Describe this image in detail.",
    "What is shown here? Answer in one sentence.",
    "Read all the text in the image.",
    "List the objects in the image with their colours and places.",
    "Is anything unusual in this image? Explain why.",
    "Write a caption for this image.",
    "How many things can be seen, and how are they arranged?",
    "Which colours are in the image, from the most to the least frequent?",
)
"""To be answered about an image."""

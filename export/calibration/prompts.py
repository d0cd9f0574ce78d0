"""Prompts that a model is asked for calibration data, with nothing to look up.

They ask for all kinds of text: prose, lists, code, figures, dialogue, other languages.
"""

from __future__ import annotations

TEXTS = (
    "Explain in a few sentences how a refrigerator keeps food cold.",
    "Write a Python function that counts the words of a text file, and explain how it works.",
    "Tell a short story about a lighthouse keeper and a lost whale.",
    "Describe what the parts of an operating system do and how programs use them.",
    "List ten things to pack for a week of hiking, one on each line.",
    "Write the reference page of a command that copies files: arguments, options and errors.",
    "What are the rights and duties of somebody who rents a flat? Answer formally.",
    "Translate into French and into German: The train to the coast leaves at half past nine.",
    "Write a polite e-mail that moves a meeting from Tuesday to Thursday, and give the reason.",
    "What is the difference between a list, a tuple and a dictionary in a programming language?",
    "A shop sells pens at 3 for 2.40. How much do 10 pens cost? Show each step.",
    "Summarise the history of printing, from wooden blocks to laser printers.",
    "Write a news report about a storm that closed the harbour of a small town.",
    "How do vaccines work? Explain it to a curious child, then to a student of medicine.",
    "Give the recipe of a vegetable soup: what one needs, and numbered steps.",
    "Write a dialogue between a customer and a bank clerk about a lost card.",
    "Explain the terms of a free software licence: copying, changing, passing on, warranty.",
    "Write an SQL query that finds the five best customers of a year, and explain each clause.",
    "Compare trains, buses and cars for travelling to work, with advantages and drawbacks.",
    "Write a JSON object that describes a book: title, authors, year, publisher, keywords.",
    "How does a class define methods and attributes, and what is inherited? Show an example.",
    "Who was Marie Curie, and what did she find out? Give names and dates.",
    "Write a poem of eight lines about rain in a big city.",
    "Give advice to somebody who cannot sleep well, in a friendly tone.",
    "Describe the way of water from the sea to a mountain stream and back.",
    "Review a film about a chess player: the plot, the actors, the music, the verdict.",
    "How is the value of an expression found when it has several operators? Explain the rules.",
    "Write the rules of a simple card game for two players.",
    "Name the capitals of six countries and say what each city is known for.",
    "Fill in a table in Markdown: three planets, their size, their distance and their moons.",
    "What happens when an exception is raised while another one is handled? Explain with code.",
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

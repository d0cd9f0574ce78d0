"""From a question to the text of its answer."""

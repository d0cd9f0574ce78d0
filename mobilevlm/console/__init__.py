"""Output for people: progress, tables, and text that a terminal can show safely."""

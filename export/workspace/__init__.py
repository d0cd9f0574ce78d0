"""The work folder of an export, and what it may remove."""

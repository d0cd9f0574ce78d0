"""Mixed precision found by measurement."""

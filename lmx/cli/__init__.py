"""Floor 6: the `lmx` command. It parses, calls a recipe and prints; what is computed is in `lmx.recipes`."""

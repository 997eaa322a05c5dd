"""Teachers that are loaded: exact ones, and those of other runs."""

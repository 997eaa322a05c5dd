"""Teachers that are loaded: exact ones, those of other runs, and masked language models of `transformers`."""

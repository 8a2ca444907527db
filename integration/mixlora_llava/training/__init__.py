"""A training run: its settings, what it will need, and the run itself."""

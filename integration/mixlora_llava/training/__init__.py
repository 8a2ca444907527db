"""A training run: its settings, an estimate of what it needs, and the run itself."""

"""LLaVA models: load them, patch them with an adapter, generate answers, compute digests."""

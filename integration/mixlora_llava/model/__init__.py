"""A LLaVA: loading, patching with an adapter, answering, and its digest."""

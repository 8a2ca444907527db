"""Weights in files of others: reading them safely, and the released MixLoRA checkpoints."""

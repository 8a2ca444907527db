"""Read weights from files safely, and convert the released MixLoRA checkpoints."""

"""MixLoRA in the training commands of TRL and ms-swift."""

"""MixLoRA in the training commands of other projects: TRL and ms-swift."""

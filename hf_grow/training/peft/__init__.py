"""LoRA on a grown model; adapters as plain checkpoints."""

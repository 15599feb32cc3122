"""GrowTrainer: its state, callbacks, monitor, checkpoints."""

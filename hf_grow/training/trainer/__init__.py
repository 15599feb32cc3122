"""BaseGrowTrainer: its state, callbacks, monitor, checkpoints."""

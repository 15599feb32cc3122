"""Training grown models. So far: carrying the optimizer state of an interrupted run through a growth."""

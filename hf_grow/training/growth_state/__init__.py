"""Optimizer and training state through a growth."""

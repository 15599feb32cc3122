"""Distillation from the source model."""

"""Freezing and learning-rate multipliers, parameter by parameter and row by row."""

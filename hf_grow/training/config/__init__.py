"""Training recipes: options and their defaults; no torch."""

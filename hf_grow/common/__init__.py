"""Helpers that are independent of models: untrusted files, YAML, progress bars, free memory, units, suggestions."""

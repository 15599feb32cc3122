"""Small helpers that know nothing of models: files of unknown origin, YAML, progress bars, free memory, units."""

"""hf-grow: grow a trained checkpoint into a larger one, and go on training it."""

"""Penalties that keep old weights (EWC, SI, L2-SP and others), and the Fisher information they use."""

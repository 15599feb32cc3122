"""Mixture-of-experts growth: upcycling a dense model, more experts for a mixture."""

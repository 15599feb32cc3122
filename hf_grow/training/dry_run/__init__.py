"""Dry run: memory and FLOP estimate."""

"""Sharded parameters: every process reads its own rows."""

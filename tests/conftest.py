"""Fixtures for all tests."""

from exact import exact_math

__all__ = ["exact_math"]

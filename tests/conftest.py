"""Fixtures for all tests."""

import signal

from exact import exact_math

__all__ = ["exact_math"]

# A shell's background job ignores Ctrl-C, and so would everything that the tests start: here it always interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

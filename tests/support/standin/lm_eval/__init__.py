"""A small stand-in for lm-evaluation-harness: the few calls that hf-grow makes of it, for tests where it is not installed.

`test_tasks.py` (slow) runs the same through the harness itself, and checks that it has what is stood in for here.
"""

__version__ = "0.0-standin"
RUNS = []  # one entry a model that was evaluated

"""Fixtures for all tests, and what makes one run like the other: threads, seeds, nothing left behind by the test before."""

import os
import signal
from collections.abc import Iterator

# Before torch is loaded, and for every process that a test starts. Tiny models are faster without a pool of threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait by running in circles take the processors from the others
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import perturbed
import pytest
import torch
from exact import exact_math

__all__ = ["exact_math"]

# A shell's background job ignores Ctrl-C, and so would everything that the tests start: here it always interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Not only the first time: which test that is depends on their order.
torch.set_warn_always(True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--perturb", type=int, metavar="SEED", help="other last bits in torch's arithmetic: tests/support/perturbed.py")
    parser.addoption("--perturb-by", type=float, default=1.0, metavar="UNITS", help="how far, in units in the last place")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.perturb is not None:
        perturbed.install(config.option.perturb, config.option.perturb_by)


def pytest_report_header(config: pytest.Config) -> str:
    other = "" if config.option.perturb is None else f", perturbed by seed {config.option.perturb}"
    return f"torch: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads{other}"


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Each test begins with the same random numbers and the same environment, and leaves the process as it found it."""
    torch.manual_seed(0)
    environment, state = dict(os.environ), _state()
    yield
    if os.environ != environment:  # transformers and accelerate leave their choices there
        os.environ.clear()
        os.environ.update(environment)
    assert _state() == state, "a test leaves working folder, dtype, threads, modes and handlers as they were"


def _state() -> dict[str, object]:
    return {
        "folder": os.getcwd(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "distributed": torch.distributed.is_available() and torch.distributed.is_initialized(),
        "interrupt": signal.getsignal(signal.SIGINT),
        "terminate": signal.getsignal(signal.SIGTERM),
    }

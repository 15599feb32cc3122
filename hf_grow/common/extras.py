"""Optional dependencies: packages that only training needs."""

from __future__ import annotations

from importlib.util import find_spec

from hf_grow.errors import InputError


def require_packages(*packages: str) -> None:
    """Raises InputError, with the install command, if any of `packages` (import names) is not installed."""
    missing = [p for p in packages if find_spec(p) is None]
    if missing:
        raise InputError(f"Training needs {' and '.join(missing)}, which is not installed.", hint="pip install 'hf-grow[train]'")

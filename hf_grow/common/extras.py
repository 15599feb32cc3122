"""The packages that only training needs, asked for where they are first used: planning and growing install without them."""

from __future__ import annotations

from importlib.util import find_spec

from hf_grow.errors import InputError


def require_packages(*packages: str) -> None:
    """Raises InputError that says how to install them, if any of `packages` (names to import) is missing."""
    missing = [p for p in packages if find_spec(p) is None]
    if missing:
        raise InputError(f"Training needs {' and '.join(missing)}, which is not installed.", hint="pip install 'hf-grow[train]'")

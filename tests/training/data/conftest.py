"""Fixtures for the tests of training data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from packed_texts import DOCS, write_texts
from replay_samples import base_model

from hf_grow.demo.small_model import build_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer(DOCS, 300)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One text file for each document, named in their order."""
    return write_texts(tmp_path / "texts", DOCS)


@pytest.fixture(scope="module")
def model() -> Any:
    return base_model()


@pytest.fixture
def saved(model: Any, tokenizer: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

"""Fixtures of the integration tests: a tiny project, once a test."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import transformers  # noqa: F401  (before the freeze)

import tinylmm.stages.evaluate
import tinylmm.stages.prepare
import tinylmm.stages.train  # noqa: F401  (before the freeze)
from tests.integration.project import Project, tiny_project


def pytest_collection_finish() -> None:
    """Commands that run in this process collect garbage after each model: they need not look at pytest and the libraries."""
    gc.freeze()


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return tiny_project(tmp_path)

"""Fixtures of the integration tests: a tiny project, once a test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.project import Project, tiny_project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return tiny_project(tmp_path)

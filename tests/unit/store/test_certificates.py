"""Certificates in a store: one a training, code and machine, found by the training's digest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tinylmm.errors import IntegrityError
from tinylmm.store.certificates import (
    Certificate,
    PathResult,
    code_digest,
    environment_of,
    find_certificate,
    read_certificate,
    write_certificate,
)

VERSIONS: dict[str, str | None] = {"tinylmm": "0.1.0", "git": "abc", "torch": "2.13.0"}
EQUAL = PathResult("packing", {"launch.packing": True}, "equal", "", {"loss": {"difference": 0.0, "tolerance": 1e-6}})
SKIPPED = PathResult("compile", {}, "not run here", "nothing compiles")
GOOD = Certificate(
    "pretrain", "a" * 64, "2026-01-01T00:00:00+00:00", VERSIONS, code_digest(), environment_of(), "cpu", "fp32", 8, 3,
    "1e-6", {}, ("a remark",), (EQUAL, SKIPPED),
)  # fmt: skip


def test_a_certificate_reads_back_as_it_was_written(tmp_path: Path) -> None:
    path = write_certificate(tmp_path, GOOD)
    assert path.parent == tmp_path / "certificates" and path.name.startswith("a" * 16)
    assert read_certificate(path) == GOOD and GOOD.passed
    found = find_certificate(tmp_path, GOOD.digest, VERSIONS)
    assert found is not None and found.same_versions and found.path == path


def test_another_machine_or_code_has_its_own_and_the_one_of_the_same_versions_is_found(tmp_path: Path) -> None:
    write_certificate(tmp_path, GOOD)
    later = replace(GOOD, code="other", versions=VERSIONS | {"git": "def"}, created="2027-01-01T00:00:00+00:00")
    write_certificate(tmp_path, later)
    write_certificate(tmp_path, replace(GOOD, device="NVIDIA H200"))
    assert len(list((tmp_path / "certificates").iterdir())) == 3
    found = find_certificate(tmp_path, GOOD.digest, VERSIONS)
    assert found is not None and found.certificate.versions == VERSIONS
    newest = find_certificate(tmp_path, GOOD.digest, {})
    assert newest is not None and newest.certificate == later and not newest.same_versions
    assert find_certificate(tmp_path, "b" * 64, VERSIONS) is None


@pytest.mark.parametrize("status", ["differs", "failed"])
def test_what_differs_is_named_in_the_verdict(status: str) -> None:
    bad = replace(GOOD, paths=(EQUAL, replace(EQUAL, name="ranks", status=status)))
    assert not bad.passed and bad.verdict == "NOT VERIFIED: pretrain: other than a plain reference: ranks"
    assert GOOD.verdict == "verified: pretrain: equal to a plain reference in 1 way of training it"


@pytest.mark.parametrize("content", ["", "{}", '{"format": 0, "passed": true}', "[]"])
def test_a_damaged_one_is_named(content: str, tmp_path: Path) -> None:
    path = write_certificate(tmp_path, GOOD)
    path.write_text(content)
    with pytest.raises(IntegrityError, match="is no certificate"):
        find_certificate(tmp_path, GOOD.digest, VERSIONS)

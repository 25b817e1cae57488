"""Certificates of `tinylmm verify`: that the fast paths of a training do what a plain one does. No torch.

One file a training, code and environment, `certificates/<digest>-<key>.json`: of another version of the code, or on another
machine, it is another certificate.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tinylmm.errors import IntegrityError
from tinylmm.store.integrity import write_atomic
from tinylmm.store.layout import KEY_DIGITS, StoreLayout

FORMAT = 1
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "flash-attn", "bitsandbytes")
"""Whose release may change what a step computes."""


@dataclass(frozen=True)
class PathResult:
    """One fast path.

    Attributes:
        name: of its row.
        fields: of the spec that turn it on.
        status: equal, differs, failed or `not run here`.
        why: of the last two, a reason; else what is to be known.
        compared: differences and tolerances, where it ran to its end.
    """

    name: str
    fields: dict[str, Any]
    status: str
    why: str = ""
    compared: dict[str, Any] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        """Whether it is not to blame."""
        return self.status in ("equal", "not run here")


@dataclass(frozen=True)
class Certificate:
    """What `tinylmm verify` found of one training.

    Attributes:
        stage, digest: of the training.
        created: ISO 8601.
        versions: as a stage's manifest has them. code: SHA-256 of the package's source. environment: of what it ran on.
        device: a GPU's name, or cpu.
        precision: that was compared in.
        samples: of a step. steps: of each way.
        tolerance: in words, with its reason.
        noise: the reference against itself.
        remarks: sentences.
        paths: results, the row without any fast path first.
    """

    stage: str
    digest: str
    created: str
    versions: dict[str, str | None]
    code: str
    environment: dict[str, str]
    device: str
    precision: str
    samples: int
    steps: int
    tolerance: str
    noise: dict[str, Any]
    remarks: tuple[str, ...]
    paths: tuple[PathResult, ...]

    @property
    def passed(self) -> bool:
        """Whether every path that ran is equal."""
        return all(path.good for path in self.paths)

    @property
    def verdict(self) -> str:
        """The whole in one line, which names what differs."""
        if self.passed:
            ran = sum(path.status == "equal" for path in self.paths)
            return f"verified: {self.stage}: equal to a plain reference in {ran} way{'s' * (ran > 1)} of training it"
        bad = ", ".join(path.name for path in self.paths if not path.good)
        return f"NOT VERIFIED: {self.stage}: other than a plain reference: {bad}"

    @property
    def key(self) -> str:
        """Of the file."""
        made = {"code": self.code, "environment": self.environment, "device": self.device}
        return f"{self.digest[:KEY_DIGITS]}-{_digest(made)[:KEY_DIGITS]}"

    def as_json(self) -> dict[str, Any]:
        """As it is kept and printed."""
        return {"format": FORMAT, "passed": self.passed, **asdict(self)}


@dataclass(frozen=True)
class Found:
    """A certificate on disk, and whether it is of the code and libraries that made a stage."""

    certificate: Certificate
    path: Path
    same_versions: bool


def write_certificate(root: Path, certificate: Certificate) -> Path:
    """Keep a certificate in a store; returns its file. An older one of the same training, code and machine makes way."""
    path = StoreLayout(root).certificates / f"{certificate.key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(certificate.as_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def read_certificate(path: Path) -> Certificate:
    """Read one.

    Raises:
        IntegrityError: it is none, or of another version of its format.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record.pop("passed")
        if record.pop("format") != FORMAT:
            raise ValueError("its format is of another version of tinylmm")
        paths = tuple(PathResult(**one) for one in record.pop("paths"))
        return Certificate(**record | {"remarks": tuple(record["remarks"]), "paths": paths})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{path} is no certificate: {error}. Delete it and give `tinylmm verify` again."
        ) from error


def find_certificate(root: Path, digest: str, versions: Mapping[str, Any]) -> Found | None:
    """The newest certificate of a training: one of the versions that made it, where there is one.

    Args:
        versions: of the stage's manifest.
    """
    found = []
    for path in sorted(StoreLayout(root).certificates.glob(f"{digest[:KEY_DIGITS]}-*.json")):
        certificate = read_certificate(path)
        if certificate.digest == digest:
            found.append(Found(certificate, path, certificate.versions == dict(versions)))
    return max(found, key=lambda one: (one.same_versions, one.certificate.created), default=None)


@cache
def code_digest() -> str:
    """SHA-256 of this package's source files."""
    package = Path(__file__).resolve().parents[1]
    files = sorted(package.rglob("*.py"))
    return _digest({str(path.relative_to(package)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files})


def environment_of() -> dict[str, str]:
    """Python, machine and libraries of this process."""
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()

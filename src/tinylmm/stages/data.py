"""The `data` stage: call the function that makes a data set's files."""

from __future__ import annotations

from typing import Any

from tinylmm.config.targets import resolve_target
from tinylmm.planning.specs import DataStage
from tinylmm.stages.job import StageJob


def run(job: StageJob[DataStage]) -> dict[str, Any]:
    """Make the files in `job.output`; return the function's summary for the manifest."""
    build = job.spec.build
    make = resolve_target(build.target, job.settings.trust, role="data")
    return dict(make(job.output, build.seed, **build.options))

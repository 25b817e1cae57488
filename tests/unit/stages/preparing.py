"""Runs what stands between a source's files and a training: the check of its images, and `prepare` behind it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tinylmm.planning.specs import ImagesStage
from tinylmm.stages import images, prepare
from tinylmm.stages.job import StageJob


def images_of(job: StageJob[Any]) -> StageJob[Any]:
    """The job that checks the images of a prepare job's source, whose output is the job's parent `images`."""
    spec = ImagesStage.model_validate({"source": job.spec.source.as_json()})
    found = replace(job, kind="images", spec=spec, folder=job.parents["images"].parent)
    found.output.mkdir(parents=True, exist_ok=True)
    return found


def prepared(job: StageJob[Any]) -> dict[str, Any]:
    """Check the images of a job's source, prepare it, and return both summaries."""
    return images.run(images_of(job)) | prepare.run(job)

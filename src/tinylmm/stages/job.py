"""What a stage's body works on: one stage of the graph, made concrete as a folder that every rank can read.

The parent writes `job.json` into the work folder; the body (in this process or in torchrun's ranks) reads it back and needs
nothing else: no Hydra, no planner, no store.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from tinylmm.config.identities import Recorded
from tinylmm.config.share import WHOLE, Share
from tinylmm.planning.kinds import KINDS
from tinylmm.planning.specs import Location, StageSettings
from tinylmm.store.claims import require_claim
from tinylmm.store.layout import JOB_FILE, METRICS_FILE, OUTPUT_FOLDER
from tinylmm.training.metrics import MetricsFile

Spec = TypeVar("Spec", bound=Recorded, covariant=True)


@dataclass(frozen=True)
class Observed:
    """How a training is looked at.

    Attributes:
        cut: the step behind which it is broken off; None where it runs to its end.
    """

    cut: int | None = None


@dataclass(frozen=True)
class StageJob(Generic[Spec]):
    """One stage about to run.

    Attributes:
        kind: key of `planning/kinds.py`.
        name: the stage's name in this run, for people ("finetune"); not part of its identity.
        digest: 64 hexadecimal digits.
        spec: every field that decides the result (what the digest is made of), as the kind's own model.
        parents: role -> `output` folder of the finished stage that plays it.
        settings: how to run it; decides no result.
        folder: the work folder; everything that shall be kept goes to `output`.
        store: root of the store, for features that stages share.
        claim: token of the claim under which this is done; empty outside a run.
        share: of this machine, where other stages run beside it.
        after_s: seconds that the run takes behind this stage, as far as that is known; said while it runs.
        observed: of a training that `tinylmm verify` looks at (`training/observe.py`).
    """

    kind: str
    name: str
    digest: str
    spec: Spec
    parents: dict[str, Path]
    settings: StageSettings
    folder: Path
    store: Path
    claim: str = ""
    share: Share = WHOLE
    after_s: float | None = None
    observed: Observed | None = None

    @property
    def output(self) -> Path:
        """What is published when the stage is done. The parent has created it."""
        return self.folder / OUTPUT_FOLDER

    @property
    def metrics(self) -> MetricsFile:
        """The stage's progress rows."""
        return MetricsFile(self.folder / METRICS_FILE)

    @property
    def locations(self) -> tuple[Location, ...]:
        """Where the stage's sources lie: one, or those of a mixture in its order."""
        if self.settings.locations is not None:
            return self.settings.locations
        assert self.settings.location is not None, f"{self.kind} stages have a location"
        return (self.settings.location,)

    def root_of(self, location: Location) -> Path:
        """The folder that a location's paths are below: its own, or the data stage's output."""
        return self.parents["data"] if location.root is None else Path(location.root)

    def require_claim(self) -> None:
        """Look whether the stage is still this run's to work on.

        Raises:
            ClaimLostError: another process has taken it over.
        """
        if self.claim:
            require_claim(self.store, self.folder.name, self.claim)

    def write(self) -> None:
        """Write `job.json` into the work folder."""
        record = {
            "kind": self.kind,
            "name": self.name,
            "digest": self.digest,
            "spec": self.spec.as_json(),
            "parents": {role: str(path) for role, path in self.parents.items()},
            "settings": self.settings.as_json(),
            "store": str(self.store),
            "claim": self.claim,
            "share": asdict(self.share),
            **({} if self.after_s is None else {"after_s": self.after_s}),
            **({} if self.observed is None else {"observed": asdict(self.observed)}),
        }
        (self.folder / JOB_FILE).write_text(json.dumps(record, indent=1), encoding="utf-8")


def make_job(
    kind: str,
    name: str,
    digest: str,
    spec: dict[str, Any],
    parents: dict[str, Path],
    settings: dict[str, Any],
    folder: Path,
    store: Path,
    claim: str = "",
    share: Share = WHOLE,
    after_s: float | None = None,
    observed: Observed | None = None,
) -> StageJob[Any]:
    """Return the job of a stage whose spec and settings are JSON.

    Raises:
        pydantic.ValidationError: they are not those of the kind.
    """
    typed = KINDS[kind].spec.model_validate(spec)
    typed_settings = StageSettings.model_validate(settings)
    return StageJob(kind, name, digest, typed, parents, typed_settings, folder, store, claim, share, after_s, observed)


def read_job(folder: Path) -> StageJob[Any]:
    """Read the job that `StageJob.write` left in `folder`."""
    record = cast(dict[str, Any], json.loads((folder / JOB_FILE).read_text(encoding="utf-8")))
    parents = {role: Path(path) for role, path in record.pop("parents").items()}
    share, observed = record.pop("share"), record.pop("observed", None)
    share = Share(tuple(share["gpus"]), share["cores"])
    located = {"parents": parents, "folder": folder, "store": Path(record["store"])}
    return make_job(**record | located, share=share, observed=None if observed is None else Observed(**observed))

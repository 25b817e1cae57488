"""The stage graph of a run: which stages there are, what each depends on, and what decides its result.

A stage's digest is made of its kind, the code version of the kind, the fields that decide its result (`planning/specs.py`)
and the digests of its parents. What is left out (names, paths, launch, tracking) is recorded but never decides. No torch
here: a laptop can plan any run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tinylmm.config.recipe import RecipeStage
from tinylmm.config.spec import DataSpec, EvalSpec, LLMSpec, PretrainedPart, RunSpec, SourceSpec
from tinylmm.evaluation.benchmarks.registry import get_benchmark
from tinylmm.planning.kinds import KINDS
from tinylmm.planning.specs import Content, StageSettings
from tinylmm.store.stage import Stage

Fields = dict[str, Any]
"""Fields of a stage's spec on their way into its typed model."""

TOWER_OUTPUT = {"select_layer", "select", "drop_first_token", "options"}
"""How a tower's output is read: decides training, not the tower's own weights."""

MISSING = "missing"
"""Key in the content of files that are not there."""
VIDEOS = "videos"
"""Key in the content of a source whose records name videos."""
LOCAL_FOLDER = "(local folder)"
"""Stands for the path in the identity of a checkpoint folder; the path itself is in the settings' `folders`."""


FOR_PLANS = {"gpu", "price", "slurm"}
"""Fields of `launch` that plans and queues read and no stage does."""
ANY_POLICY = {"on_bad": "fail", "max_bad": 0}
"""Stands in every source's identity: what is done about bad records decides whether a run goes on, not what is read of the
good ones. `planning/planner.py` holds reused stages to the policy asked for."""


NOT_OF_IMAGES = {"orientation", *ANY_POLICY}
"""Fields of a source that say nothing of which images it names and whether they can be decoded."""


class Fingerprints(Protocol):
    """Identity by content of files outside the store; `planning/planner.py` has the real one."""

    def source(self, data: DataSpec, name: str) -> Content:
        """Of a source's annotation file and images."""

    def benchmark(self, spec: EvalSpec) -> Content:
        """Of a benchmark's questions and images; of an optional one with the key `MISSING` where any of them is not there."""

    def checkpoint(self, path_or_id: str) -> Content:
        """Of a local checkpoint folder; empty for a hub id."""

    def model(self, folder: str) -> Content:
        """Of a trained model's folder."""

    def stage_of(self, model: str) -> Stage | None:
        """The finished stage of the store that made the model in a folder; None for models from elsewhere."""


class StageGraph:
    """Stages in an order in which each comes after its parents; a digest occurs once."""

    def __init__(self) -> None:
        self._stages: dict[str, Stage] = {}

    def add(self, kind: str, name: str, spec: Fields, parents: dict[str, str], settings: Fields) -> Stage:
        """Add a stage, or return the one with the same digest that is there already.

        Raises:
            pydantic.ValidationError: the fields are not those of the kind: a bug of whoever built them.
        """
        row = KINDS[kind]
        decides = row.spec.model_validate(spec).as_json()
        recorded = StageSettings.model_validate(settings).as_json()
        stage = Stage.of(kind, name, row.version, decides, parents, recorded)
        return self._stages.setdefault(stage.digest, stage)

    def take(self, stage: Stage) -> None:
        """Add a finished stage of an earlier run; its parents need not be there."""
        self._stages.setdefault(stage.digest, stage)

    def __iter__(self) -> Iterator[Stage]:
        return iter(self._stages.values())

    def __len__(self) -> int:
        return len(self._stages)

    def __getitem__(self, stage_digest: str) -> Stage:
        return self._stages[stage_digest]

    def __contains__(self, stage_digest: str) -> bool:
        return stage_digest in self._stages


def build_graph(run: RunSpec, fingerprints: Fingerprints) -> StageGraph:
    """Return the stages that `run` asks for, parents first."""
    return _Builder(run, fingerprints).build()


@dataclass(frozen=True)
class _Evaluated:
    """A model that benchmarks are asked of: its name, and how it stands in an evaluation's parents and fields."""

    name: str
    parents: dict[str, str]
    fields: Fields = field(default_factory=dict)


class _Builder:
    """Walks one run spec and adds its stages in order."""

    def __init__(self, run: RunSpec, fingerprints: Fingerprints) -> None:
        self.run = run
        self.fingerprints = fingerprints
        self.graph = StageGraph()
        self.settings: Fields = {
            "launch": _dump(run.launch, exclude=FOR_PLANS),
            "tracking": _dump(run.tracking),
            "trust": list(run.trust),
        }
        if run.trainer.as_arguments():
            self.settings["trainer"] = run.trainer.as_arguments()
        self.folders: dict[str, str] = {}

    def build(self) -> StageGraph:
        if self.run.recipe.stages:
            trained = self._trainings()
            self._evaluations([_Evaluated(name, {"model": stage.digest}) for name, stage in trained.items()])
        else:
            self._evaluations([self._finished_model()])
        return self.graph

    def _trainings(self) -> dict[str, Stage]:
        llm = self._part("llm", self.run.llm)
        tokenizer = self._tokenizer(self.run.llm)
        tower = self._part("vision_tower", self.run.vision_tower)
        trained: dict[str, Stage] = {}
        for name, stage in self.run.recipe.stages.items():
            parents: dict[str, str] = {}
            if stage.start == "parts":
                spec = self._from_parts(parents, llm=llm, tokenizer=tokenizer, vision_tower=tower)
            elif stage.start == "model":
                spec = self._from_model()
            else:
                spec, parents = {}, {"from": trained[stage.start].digest}
            spec |= _dump(stage, exclude={"start", "data", "template", "max_dropped", "image_mode", "fp8"})
            spec |= {"fp8": True} if stage.fp8 else {}
            spec |= self._image_mode(name, stage) | self._sampling(*stage.mixture)
            spec |= {"seed": self.run.seed, "trainer": self.run.trainer.deciding}
            located = self._mix(name, stage, tokenizer, spec, parents) | {"max_dropped": stage.max_dropped}
            trained[name] = self._add("train", name, spec, parents | self._data_parent(self.run.data), located)
        return trained

    def _finished_model(self) -> _Evaluated:
        """The model that is evaluated without any training: of a stage of the store, or identified by its content."""
        folder = self.run.recipe.from_model
        assert folder is not None  # RecipeSpec's validator holds this
        if (stage := self.fingerprints.stage_of(folder)) is not None:
            self.graph.take(stage)
            return _Evaluated(stage.name, {"model": stage.digest})
        self.folders["model"] = folder
        return _Evaluated(Path(folder).name, {}, {"model": {"content": self.fingerprints.model(folder)}})

    def _from_parts(self, parents: dict[str, str], **parts: Stage | Fields) -> Fields:
        """The fields of a training that starts from parts; those that a stage built are added to `parents`."""
        spec: Fields = {
            "connector": _dump(self.run.connector, exclude={"name"}),
            "tower_output": _dump(self.run.vision_tower, include=TOWER_OUTPUT),
            "chat_template": self.run.llm.template,
        }
        if self.run.llm.scale_image_features:  # only where it is set, so that it is in no other digest
            spec["scale_image_features"] = True
        for role, part in parts.items():
            _attach(spec, parents, role, part)
        return spec

    def _image_mode(self, name: str, stage: RecipeStage) -> Fields:
        """Only where the stage sees images in another mode than the model it starts from, so that it is in no other digest."""
        earlier = stage.start in self.run.recipe.stages
        before = self.run.image_of(stage.start) if earlier else self.run.vision_tower.image
        mode = self.run.image_of(name).mode
        return {} if mode == before.mode else {"image_mode": mode}

    def _sampling(self, *sources: str) -> Fields:
        """Only where a source has videos, or may have some since it is not built or not there yet: so in no other digest."""
        sampling = self.run.video.sampling
        if sampling is None or not any(self._may_have_videos(source) for source in sources):
            return {}
        return {"sampling": _dump(sampling)}

    def _may_have_videos(self, source: str) -> bool:
        data = self.run.data
        return data.build is not None or bool({VIDEOS, MISSING} & self.fingerprints.source(data, source).keys())

    def _from_model(self) -> Fields:
        folder = self.run.recipe.from_model
        assert folder is not None  # RecipeSpec's validator holds this
        self.folders["from"] = folder
        return {"model": {"content": self.fingerprints.model(folder)}}

    def _evaluations(self, models: Sequence[_Evaluated]) -> None:
        for benchmark, spec in self.run.eval.items():
            for model in models if spec.after == "every" else models[-1:]:
                self._evaluation(benchmark, spec, model)

    def _evaluation(self, benchmark: str, spec: EvalSpec, model: _Evaluated) -> None:
        template = self.run.llm.template if spec.template == "auto" else spec.template
        # what is later than the first digests is in them only where it is set
        optional = {name for name in ("limit_seed", "sampling", "frames") if not getattr(spec, name)}
        no_result = {"root", "after", "judge", "optional", *ANY_POLICY}
        fields = _dump(spec, exclude={"data", "source", "template", *no_result, *optional})
        fields |= {"template": template, "judge": None} | model.fields
        parents = dict(model.parents)
        if spec.data is not None and spec.source is not None:
            fields["source"] = self._source(spec.data, spec.source)
            parents |= self._data_parent(spec.data)
            location = _location(spec.data, spec.source)
        else:
            fields["content"] = self.fingerprints.benchmark(spec)
            if spec.optional and MISSING in fields["content"]:
                return
            location = {"root": spec.root, "source": {"images": ""}}
        if spec.allowed or spec.source is not None:  # a source's own policy is about records to train on
            location["source"] |= {"on_bad": spec.on_bad, "max_bad": spec.max_bad}
        self._answers_and_judging(f"{benchmark}@{model.name}", spec, fields, parents, location)

    def _answers_and_judging(
        self, name: str, spec: EvalSpec, fields: Fields, parents: dict[str, str], location: Fields
    ) -> None:
        """Add the stage that asks, and one that judges where the benchmark needs it or a judge is named.

        The judge has no part in the answers, nor has the variant where only a judge can score: another one asks nothing again.
        """
        chosen = get_benchmark(spec.benchmark, self.run.trust, **spec.options)
        needs_judge = chosen.judged
        rules = chosen.rules.get(spec.variant or chosen.variants[0], 1)
        scored = fields | ({"rules": rules} if rules > 1 else {})  # only where they were mended: in no other digest
        asked = fields | {"variant": None} if needs_judge else scored
        answers = self._add("eval", name, asked, parents, {"location": location})
        if spec.judge.model is None and (spec.optional or not needs_judge):
            return  # what nobody asked for by name waits for no judge
        judged = scored | {"judge": spec.judge.model}
        if spec.judge.runs > 1:  # only where it is set, so that it is in no other digest
            judged["judge_runs"] = spec.judge.runs
        located = {"location": location | {"judge_url": spec.judge.base_url}}
        self._add("judge", name, judged, parents | {"answers": answers.digest}, located)

    def _mix(
        self, name: str, stage: RecipeStage, tokenizer: Stage | Fields, spec: Fields, parents: dict[str, str]
    ) -> Fields:
        """Add the stage's sources, prepared and their images checked, to its `parents`, and weights to its `spec`.

        Returns where the images lie. A mixture is in the order of its parts' digests: names of sources decide nothing.
        """
        mixture = stage.mixture
        if list(mixture.values()) == [1.0]:
            (source,) = mixture
            prepared = self._prepare(name, source, stage, tokenizer)
            parents |= {"prepared": prepared.digest, "images": prepared.parents["images"]}
            return {"location": _location(self.run.data, source)}
        found = {source: self._prepare(f"{name}/{source}", source, stage, tokenizer) for source in mixture}
        order = sorted(mixture, key=lambda source: (found[source].digest, mixture[source]))
        for number, source in enumerate(order):
            prepared = found[source]
            parents |= {f"prepared.{number}": prepared.digest, f"images.{number}": prepared.parents["images"]}
        spec["mixture"] = [mixture[source] for source in order]
        return {"locations": [_location(self.run.data, source) for source in order]}

    def _prepare(self, name: str, source: str, stage: RecipeStage, tokenizer: Stage | Fields) -> Stage:
        template = self.run.llm.template if stage.template == "auto" else stage.template
        read, located = self._source(self.run.data, source), {"location": _location(self.run.data, source)}
        parents = self._data_parent(self.run.data)
        named = {field: value for field, value in read.items() if field not in NOT_OF_IMAGES}
        named = {"source": named} | self._sampling(source)
        images = self._add("images", f"images[{source}]", named, parents, located)
        spec: Fields = {"template": template, "source": read}
        parents = parents | {"images": images.digest}
        _attach(spec, parents, "tokenizer", tokenizer)
        return self._add("prepare", f"prepare[{name}]", spec, parents, located)

    def _source(self, data: DataSpec, name: str) -> Fields:
        """The fields of a source that decide what is read; for files outside the store, their content.

        Later ones are in it only where they are set, so that they are in no other digest.
        """
        source: SourceSpec = data.sources[name]
        optional = {"follow_links", "orientation"} - source.model_dump(exclude_defaults=True).keys()
        if data.build is not None:
            return (
                {"file": source.annotations}
                | _dump(source, exclude={"annotations", "how_to_get", *optional})
                | ANY_POLICY
            )
        fields = _dump(source, exclude={"annotations", "images", "how_to_get", *optional}) | ANY_POLICY
        return fields | {"content": self.fingerprints.source(data, name)}

    def _data_parent(self, data: DataSpec) -> dict[str, str]:
        if data.build is None:
            return {}
        return {"data": self._add("data", data.name, {"build": _dump(data.build)}, {}).digest}

    def _part(self, role: str, part: PretrainedPart) -> Stage | Fields:
        """A part-building stage, or the identity of a published or random part (which needs no stage)."""
        identity = _dump(
            part, exclude={"name", "build", "tokenizer", "template", "scale", "scale_image_features", *TOWER_OUTPUT}
        )
        if part.init == "random":
            return {**identity, "pretrained": None, "revision": None}
        if part.init == "pretrained":
            return self._published(role, identity)
        assert part.build is not None  # PretrainedPart's validator holds this
        spec = identity | {"role": role, "build": _dump(part.build, exclude={"data", "source"})}
        spec["source"] = self._source(part.build.data, part.build.source)
        parents = self._data_parent(part.build.data)
        if isinstance(part, LLMSpec):
            _attach(spec, parents, "tokenizer", self._tokenizer(self.run.llm))
        located = {"location": _location(part.build.data, part.build.source)}
        return self._add("parts", f"{role}/{part.name}", spec, parents, located)

    def _tokenizer(self, llm: LLMSpec) -> Stage | Fields:
        if llm.tokenizer.vocab_size is None:
            return self._published("tokenizer", _dump(llm.tokenizer))
        assert llm.build is not None, "compose.py refuses a trained tokenizer without llm.build"
        spec = {"role": "tokenizer", "vocab_size": llm.tokenizer.vocab_size, "pad_token": llm.tokenizer.pad_token}
        spec["source"] = self._source(llm.build.data, llm.build.source)
        located = {"location": _location(llm.build.data, llm.build.source)}
        return self._add("parts", f"tokenizer/{llm.name}", spec, self._data_parent(llm.build.data), located)

    def _published(self, role: str, identity: Fields) -> Fields:
        """A hub repository is identified by its id and revision, a local folder by its content wherever it lies."""
        content = self.fingerprints.checkpoint(identity["pretrained"])
        if not content:
            return identity
        self.folders[role] = identity["pretrained"]
        return {**identity, "pretrained": LOCAL_FOLDER, "content": content}

    def _add(self, kind: str, name: str, spec: Fields, parents: dict[str, str], located: Fields | None = None) -> Stage:
        settings = self.settings | {"folders": dict(self.folders)} | (located or {})
        return self.graph.add(kind, name, spec, parents, settings)


def _attach(spec: Fields, parents: dict[str, str], role: str, part: Stage | Fields) -> None:
    """Name a part among the parents where a stage built it, else in the spec."""
    if isinstance(part, Stage):
        parents[role] = part.digest
    else:
        spec[role] = part


def _location(data: DataSpec, source: str) -> Fields:
    """Where to read a source: paths are settings, content is identity. A `root` of None is the data stage's output."""
    return {"root": data.root, "source": _dump(data.sources[source])}


def _dump(model: Any, exclude: set[str] | None = None, include: set[str] | None = None) -> Fields:
    return dict(model.model_dump(mode="json", exclude=exclude, include=include))

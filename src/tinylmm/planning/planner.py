"""What a run will do before it does it: stages with their status, files that are missing, totals over a sweep. No torch."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from tinylmm.config.attention import FLASH, no_flash
from tinylmm.config.compose import run_name
from tinylmm.config.fields import Precision
from tinylmm.config.hub import pad_token_fault, unknown_numbers, unpinned
from tinylmm.config.spec import DataSpec, EvalSpec, RunSpec
from tinylmm.config.trainer import ADAMW
from tinylmm.config.weight_files import check_weights
from tinylmm.errors import ConfigError, DataError, TinyLMMError
from tinylmm.evaluation.benchmarks.registry import check_evaluation, get_benchmark
from tinylmm.planning.clips import clip_faults
from tinylmm.planning.fingerprints import (
    benchmark_fingerprint,
    checkpoint_fingerprint,
    model_fingerprint,
    source_fingerprint,
)
from tinylmm.planning.graph import MISSING, VIDEOS, StageGraph, build_graph
from tinylmm.planning.specs import Content, EvalStage, JudgeStage, StageSettings
from tinylmm.store.integrity import read_manifest
from tinylmm.store.layout import model_folder
from tinylmm.store.stage import Stage
from tinylmm.store.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Missing:
    """A file that a run needs and that is not there."""

    what: str
    looked_at: str
    how_to_get: str


Known = dict[tuple[str, ...], tuple[Content, list[Missing], list[Missing]]]
"""What was found of files outside the store, for the runs of a sweep: identity, and what of it is missing."""


@dataclass(frozen=True)
class RunPlan:
    """One run's graph against the store."""

    name: str
    overrides: list[str]
    run: RunSpec
    graph: StageGraph
    missing: list[Missing] = field(default_factory=list)
    not_found: list[Missing] = field(default_factory=list)
    """Files of optional benchmarks, which are left out for that."""
    unknown: list[str] = field(default_factory=list)
    """What cannot be known before the run starts, a sentence each."""
    warnings: list[str] = field(default_factory=list)
    """What the user may not have meant, a sentence each."""


def plan_runs(
    runs: Sequence[tuple[list[str], RunSpec]],
) -> Iterator[tuple[list[str], RunPlan | TinyLMMError]]:
    """Yield the words and the plan of every run of a sweep, or why it cannot be planned; no file is looked at twice.

    Args:
        runs: as `compose_all` returns them.
    """
    known: Known = {}
    for words, spec in runs:
        plan: RunPlan | TinyLMMError
        try:
            plan = plan_run(spec, run_name(spec), words, known)
        except TinyLMMError as error:
            plan = error
        yield words, plan


def plan_run(run: RunSpec, name: str, overrides: Sequence[str] = (), known: Known | None = None) -> RunPlan:
    """Build the run's graph; files that are missing are listed, not raised.

    Args:
        run: what is asked for.
        name: of the run.
        overrides: the user's words.
        known: what was found of files for other runs, which is taken over and added to.

    Raises:
        DataError: an annotation file is there but unreadable, or the store's samples leave out more bad records than
            the run allows.
        ConfigError: a benchmark cannot be asked like this, or a stage cannot compute with the attention asked for.
    """
    for key, evaluation in run.eval.items():
        check_evaluation(key, evaluation, run.trust)
    files = _Files(Store(run.store), run.trust, {} if known is None else known)
    graph = build_graph(run, files)
    _refuse_attention(run, graph)
    _refuse_left_out(run, graph)
    if faults := clip_faults(run, graph):
        raise ConfigError(faults)
    if fault := pad_token_fault(run.llm):
        raise ConfigError([fault])
    parts = (("llm", run.llm), ("vision_tower", run.vision_tower))
    unknown = [sentence for role, part in parts if (sentence := unknown_numbers(role, part))]
    warnings = [*_warnings(run), *filter(None, map(waits_for, graph))]
    if not any("precision" in word for word in overrides):
        warnings += _asked_in_another_precision(run, graph)
    return RunPlan(name, list(overrides), run, graph, files.missing, files.not_found, unknown, warnings)


def _warnings(run: RunSpec) -> list[str]:
    """Weights that are whatever the hub has at that moment, and samples that are longer than the LLM was trained on."""
    found = [sentence for role in ("llm", "vision_tower") if (sentence := unpinned(role, getattr(run, role)))]
    if run.trainer.optim not in ADAMW:
        found.append(
            f"trainer.optim={run.trainer.optim} is not the AdamW that published recipes were trained with: this run learns "
            "something else, and its figures differ from theirs for that reason too."
        )
    limit = run.llm.architecture.get("max_position_embeddings")
    for name, stage in run.recipe.stages.items():
        if stage.fp8:
            found.append(
                f"recipe.stages.{name}.fp8 is not exact: the frozen LLM computes in eight-bit floats, so the connector learns "
                "something else than in bf16, and figures differ for that reason too."
            )
        if isinstance(limit, int) and stage.max_length > limit:
            found.append(
                f"recipe.stages.{name}.max_length={stage.max_length} is more than the {limit} positions that "
                f"{run.llm.name} was trained on (max_position_embeddings): longer samples are read worse, or not at all."
            )
    return found


def _asked_in_another_precision(run: RunSpec, graph: StageGraph) -> Iterator[str]:
    """Evaluations to come that the store has in another precision: the same words on a machine with a GPU, and without one."""
    store = Store(run.store)
    for stage in graph:
        if stage.kind != "eval" or store.is_complete(stage):
            continue
        asked = EvalStage.model_validate(stage.spec).precision
        for precision in set(get_args(Precision)) - {asked}:
            spec = stage.spec | {"precision": precision}
            twin = Stage.of(stage.kind, stage.name, stage.version, spec, stage.parents, stage.settings)
            if store.is_complete(twin):
                yield (
                    f"{stage.name}: the store has its answers in {precision}, and this run asks in {asked} "
                    f"(precision: auto, by whether there is a GPU). To use them, set "
                    f"eval.{stage.name.partition('@')[0]}.precision={precision}."
                )


def _refuse_left_out(run: RunSpec, graph: StageGraph) -> None:
    """Hold what the store has to what this run allows to be left out: another run may have allowed more.

    Raises:
        DataError: more bad records, or more samples that are too long, were left out.
    """
    store = Store(run.store)
    for stage in graph:
        if stage.kind not in ("prepare", "train", "eval") or not store.is_complete(stage):
            continue
        settings = StageSettings.model_validate(stage.settings)
        summary = read_manifest(store.folder(stage))["summary"]
        if stage.kind == "prepare" and settings.location is not None:
            source, skipped = settings.location.source, summary.get("skipped", 0)
            if skipped > source.allowed:
                raise DataError(
                    f"{stage.name}: {store.folder(stage)} was prepared without {skipped} bad records (its report.json lists "
                    f"them), and {source.allowed} are allowed (on_bad={source.on_bad}). Set on_bad=skip and max_bad={skipped} "
                    "on the source to go on without them, or correct them."
                )
        elif stage.kind == "eval" and settings.location is not None:
            source, unreadable = settings.location.source, summary.get("unreadable", 0)
            if unreadable > source.allowed:
                key = f"eval.{stage.name.partition('@')[0]}"
                raise DataError(
                    f"{stage.name}: {store.folder(stage)} was asked without {unreadable} images or videos that could not be "
                    f"read (its faults.jsonl lists them), and {source.allowed} are allowed (on_bad={source.on_bad}). Set "
                    f"{key}.on_bad=skip and {key}.max_bad={unreadable} to go on, or put them right."
                )
        elif stage.kind == "train" and "data" in summary:
            samples, dropped = summary["data"]["samples"], summary["data"]["dropped"]
            if dropped > settings.max_dropped * (samples + dropped):
                raise DataError(
                    f"{stage.name}: {store.folder(stage)} was trained without {dropped:,} of {samples + dropped:,} samples, "
                    f"which max_length leaves no token to learn, and {settings.max_dropped:.1%} may be left out (max_dropped). "
                    f"Raise recipe.stages.{stage.name}.max_length or its max_dropped."
                )


def _refuse_attention(run: RunSpec, graph: StageGraph) -> None:
    """Refuse flash-attn for a stage to come that cannot compute with it, before another one has run for hours."""
    if run.launch.attention != FLASH:
        return
    for stage in graph:
        precision = stage.spec.get("precision") if stage.kind in ("train", "eval") else None
        if precision is None or stage_status(run.store, stage) == "complete":
            continue
        if precision == "fp32":
            raise no_flash(f"the precision of the stage {stage.name} is fp32")
        if run.launch.device == "cpu":
            raise no_flash(f"launch.device is cpu (the precision of the stage {stage.name} is {precision})")


def require_files(plan: RunPlan) -> None:
    """Stop before anything starts if files are missing.

    Raises:
        DataError: one screen with each missing file, where it was looked for and how to get it; or nothing is left to do.
    """
    if not plan.missing:
        if not plan.run.recipe.stages and not any(stage.kind == "eval" for stage in plan.graph):
            raise DataError(_asks_nothing(plan))
        return
    number = "1 thing" if len(plan.missing) == 1 else f"{len(plan.missing)} things"
    lines = [f"{number} needed by this run cannot be found; nothing was started."]
    for item in plan.missing:
        lines += [f"  {item.what}", f"    looked at:  {item.looked_at}", f"    how to get: {item.how_to_get}"]
    root = plan.run.data.root
    if root is not None:
        lines.append(
            f"Data is looked for under data.root={root} (environment variable TINYLMM_DATA, or data.root=FOLDER)."
        )
    raise DataError("\n".join(lines))


def _asks_nothing(plan: RunPlan) -> str:
    """Of a run that only evaluates: no benchmark is chosen, or the files of none are there."""
    lines = [
        f"this run trains nothing and asks nothing of {plan.run.recipe.from_model}; choose benchmarks: eval=[gqa,pope]."
    ]
    lines += [f"  not found: {item.what}, looked for at {item.looked_at}" for item in plan.not_found]
    return "\n".join(lines)


def plan_record(plans: Sequence[RunPlan]) -> dict[str, Any]:
    """The plan of one run or a sweep as plain JSON (`tinylmm plan --json`)."""
    distinct: dict[str, Stage] = {}
    runs = []
    asked: Counter[str] = Counter()
    for plan in plans:
        for stage in plan.graph:
            asked[stage.kind] += 1
            distinct.setdefault(stage.digest, stage)
        runs.append({"name": plan.name, "overrides": plan.overrides, "stages": [stage.digest for stage in plan.graph]})
    store = Store(plans[0].run.store)
    stages = [
        {
            "digest": stage.digest,
            "kind": stage.kind,
            "name": stage.name,
            "parents": sorted(set(stage.parents.values())),
            "status": "waits" if waits_for(stage) else store.status(stage),
        }
        for stage in distinct.values()
    ]
    totals: dict[str, Any] = {
        "runs": len(runs),
        "asked": dict(asked),
        "distinct": dict(Counter(stage.kind for stage in distinct.values())),
    }
    for status in ("complete", "todo", "waits"):
        totals[status] = dict(Counter(str(stage["kind"]) for stage in stages if stage["status"] == status))
    return {
        "runs": runs,
        "stages": stages,
        "totals": totals,
        "unknown": list(dict.fromkeys(sentence for plan in plans for sentence in plan.unknown)),
        "warnings": list(dict.fromkeys(sentence for plan in plans for sentence in plan.warnings)),
        "missing": _each_once(item for plan in plans for item in plan.missing),
        "not_found": _each_once(item for plan in plans for item in plan.not_found),
    }


def _each_once(items: Iterable[Missing]) -> list[dict[str, str]]:
    return [asdict(item) for item in dict.fromkeys(items)]


def stage_status(store_root: Path, stage: Stage) -> str:
    """`complete`, `waits` or `todo`; looks, touches nothing."""
    return "waits" if waits_for(stage) else Store(store_root).status(stage)


def waits_for(stage: Stage) -> str:
    """What only the user can give before the stage can run, in words; empty where nothing is."""
    if stage.kind != "judge" or (spec := JudgeStage.model_validate(stage.spec)).judge is not None:
        return ""
    benchmark, name = spec.benchmark, stage.name.partition("@")[0]
    return (
        f"{stage.name}: {benchmark} is scored by a judge, and none is named. Set eval.{name}.judge.base_url and "
        f"eval.{name}.judge.model and give the same command again: nothing is asked of the model twice. Or score the answers "
        f"with `tinylmm score {benchmark}`."
    )


class _Files:
    """Identities of files outside the store, each read once; notes what is missing on the way. See `graph.Fingerprints`."""

    def __init__(self, store: Store, trust: Sequence[str], known: Known) -> None:
        self.store = store
        self.cache = store.layout.fingerprints
        self.trust = trust
        self.missing: list[Missing] = []
        self.not_found: list[Missing] = []
        self._known = known
        self._asked: set[tuple[str, ...]] = set()

    def source(self, data: DataSpec, name: str) -> Content:
        key = f"{data.root}|{data.sources[name].model_dump_json()}"
        return self._once("source", key, lambda: self._source(data, name))

    def benchmark(self, spec: EvalSpec) -> Content:
        return self._once("benchmark", str(spec), lambda: self._benchmark(spec))

    def checkpoint(self, path_or_id: str) -> Content:
        return self._once("checkpoint", path_or_id, lambda: self._checkpoint(path_or_id))

    def model(self, folder: str) -> Content:
        return self._once("model", folder, lambda: model_fingerprint(folder, self.cache))

    def stage_of(self, model: str) -> Stage | None:
        folder = Path(model).resolve().parent.parent
        return self.store.stage_at(folder) if model_folder(folder) == Path(model).resolve() else None

    def _checkpoint(self, path_or_id: str) -> Content:
        for name in path_or_id.split("+"):
            if Path(name).is_dir():
                check_weights(Path(name))
        return checkpoint_fingerprint(path_or_id, self.cache)

    def _once(self, kind: str, key: str, read: Callable[[], Content]) -> Content:
        """What `read` finds, and what it then notes as missing; for another run both are known already."""
        where = (str(self.store.root), ",".join(self.trust), kind, key)
        if where not in self._known:
            missing, not_found = len(self.missing), len(self.not_found)
            content = read()
            self._known[where] = (content, self.missing[missing:], self.not_found[not_found:])
        elif where not in self._asked:
            self.missing += self._known[where][1]
            self.not_found += self._known[where][2]
        self._asked.add(where)
        return self._known[where][0]

    def _benchmark(self, spec: EvalSpec) -> Content:
        assert spec.root is not None  # EvalSpec's validator holds this
        root = Path(spec.root).absolute()
        missing = self.not_found if spec.optional else self.missing
        try:
            benchmark = get_benchmark(spec.benchmark, self.trust, **spec.options)
            found = benchmark_fingerprint(benchmark, spec, self.cache)
        except DataError as error:
            missing.append(Missing(f"questions of benchmark {spec.benchmark}", str(root), str(error)))
            return {MISSING: spec.benchmark}
        if found["num_missing"] > spec.allowed:
            shown = ", ".join(found["missing"][:3]) + (", ..." if found["num_missing"] > 3 else "")
            what = f"{found['num_missing']:,} of {found['num_images']:,} images of benchmark {spec.benchmark} ({shown})"
            how = "put them there, or set the `root` of this benchmark to the folder that has them"
            missing.append(Missing(what, str(root), how))
            if spec.optional:
                return {MISSING: spec.benchmark}
        return {"items": found["items"], "images": found["images"]}

    def _source(self, data: DataSpec, name: str) -> Content:
        assert data.root is not None  # sources of built data are identified by their stage
        source, root = data.sources[name], Path(data.root).absolute()
        annotations = root / source.annotations
        how = source.how_to_get or f"set data.sources.{name}.annotations to the file you have"
        if not annotations.exists():
            self.missing.append(Missing(f"annotations of {data.name}/{name}", str(annotations), how))
            return {MISSING: source.annotations}
        found = source_fingerprint(root, source, self.cache)
        if found["num_missing"] > (source.max_bad if source.on_bad == "skip" else 0):
            shown = ", ".join(found["missing"][:3])
            more = ", ..." if found["num_missing"] > 3 else ""
            counts = f"{found['num_missing']:,} of {found['num_images']:,}"
            what = f"{counts} images of {data.name}/{name} ({shown}{more})"
            self.missing.append(Missing(what, str(root / source.images), how))
        content = {"annotations": found["annotations"], "images": found["images"]}
        return content | ({VIDEOS: True} if found["videos"] else {})  # only where there are any: in no older digest

"""Whether a clip as it is sampled fits into a training's rows and the LLM's context: said when planning. No torch."""

from __future__ import annotations

from tinylmm.config.spec import RunSpec
from tinylmm.errors import Fault
from tinylmm.planning.graph import StageGraph
from tinylmm.planning.shapes import Shapes, shapes_of
from tinylmm.sizing.layers import UnknownShapeError


def clip_faults(run: RunSpec, graph: StageGraph) -> list[Fault]:
    """Return why no sample with a clip could be trained on; nothing where the size of the parts is not known."""
    sampling = run.video.sampling
    if sampling is None:
        return []
    frames = sampling.most or 1  # of clips whose length is the limit, the shortest
    names = [stage.name for stage in graph if stage.kind == "train" and "sampling" in stage.spec]
    for name in (name for name in names if name in run.recipe.stages):
        try:
            shapes = shapes_of(run, name)
        except UnknownShapeError:
            continue
        tokens, stage = shapes.clip_tokens(frames), run.recipe.stages[name]
        context = run.llm.architecture.get("max_position_embeddings")
        limits = [(f"recipe.stages.{name}.max_length is {stage.max_length}", stage.max_length)]
        if isinstance(context, int):
            limits.append((f"{run.llm.name} reads {context} at most (max_position_embeddings)", context))
        for words, limit in limits:
            if tokens >= limit:
                return [_fault(run, frames, tokens, limit, words, shapes)]
    return []


def _fault(run: RunSpec, frames: int, tokens: int, limit: int, words: str, shapes: Shapes) -> Fault:
    number = "1 frame takes" if frames == 1 else f"{frames} frames take"
    what = f"cannot be held: {number} {tokens:,} tokens with connector={run.connector.name}, but {words}."
    fixes = []
    if not shapes.together:
        fitting = (limit - 1) // shapes.frame_tokens
        fixes += [f"Show at most {fitting} frames"] if fitting else []
        fixes += ["take a connector with fewer tokens (group_resampler has 512 whatever the frames)"]
    fixes += [f"raise {words.split()[0]}"] if words.startswith("recipe") else []
    return Fault("video.sampling", what, _sentence(fixes))


def _sentence(fixes: list[str]) -> str:
    said = ", or ".join(fixes)
    return f"{said[:1].upper()}{said[1:]}." if said else ""

"""How often equal models are called different: the test over questions against the test over images, on simulated answers.

    python -m benchmarks.significance                       # three minutes
    python -m benchmarks.significance --repetitions 100     # seconds

Two models of equal worth answer 1, 6 or 20 questions about each image. Whether an answer is right depends on the image, on
the model's luck with the image, and on the question, so that answers about an image hang together, as they do in GQA or
POPE. A test at the 5 % level should call the two different in 5 % of the repetitions. Then two seeds of one recipe answer
twelve benchmarks 200 times (an A/A comparison): `tinylmm report --compare` should say "better" in 5 % of them at most,
whichever benchmark it is about.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.arguments import file_to_write, whole
from tinylmm.evaluation.statistics import SURE, paired_p_value
from tinylmm.reports.compare import compare_answers, corrected
from tinylmm.reports.stored import Generation

RESULT = Path(__file__).parent / "results" / "significance.json"
QUESTIONS = (1, 6, 20)
BENCHMARKS = (
    (300, 1),
    (200, 1),
    (400, 1),
    (100, 6),
    (80, 6),
    (60, 6),
    (50, 6),
    (40, 20),
    (30, 20),
    (25, 20),
    (120, 2),
    (90, 4),
)
"""Images, and questions an image, of the twelve benchmarks of an A/A comparison; small, so that it takes minutes."""
LUCK, NOISE = 0.6, 0.5
"""Standard deviations of a model's luck with an image, and of a single answer; that of the images' difficulty is 1."""


def main(words: Sequence[str] | None = None) -> int:
    """Simulate, write the result and its plot; 1 where equal models are told apart too often."""
    options = _options(words)
    generator = np.random.default_rng(options.seed)
    record = {
        "images": options.images,
        "repetitions": options.repetitions,
        "level": SURE,
        "false_positives": [_false_positives(generator, options, questions) for questions in QUESTIONS],
        "found_gains": [_found_gains(generator, options, questions) for questions in QUESTIONS],
        "a_a": _a_a(generator, options.runs),
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    _plot(record, options.out.with_suffix(".png"))
    worst = max(row["by_images"] for row in record["false_positives"])
    said = record["a_a"]["said_better"]
    sys.stdout.write(f"false positives at most {worst:.1%}; A/A comparisons that say 'better': {said:.1%}\n")
    return int(worst > 0.06 or said > SURE)


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=whole(1), default=100)
    parser.add_argument("--repetitions", type=whole(1), default=8000)
    parser.add_argument("--runs", type=whole(1), default=200, help="A/A comparisons")
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--out", type=file_to_write, default=RESULT)
    return parser.parse_args(words)


def _answers(generator: np.random.Generator, images: int, questions: int, gain: float = 0.0) -> NDArray[np.bool_]:
    """(2, images * questions): which answers of two models are right; `gain` is added to the second's luck everywhere."""
    image = generator.normal(0, 1, (1, images, 1))
    luck = generator.normal(0, LUCK, (2, images, 1)) + np.array([0.0, gain])[:, None, None]
    noise = generator.normal(0, NOISE, (2, images, questions))
    return (image + luck + noise > -0.5).reshape(2, -1)


def _p_values(generator: np.random.Generator, images: int, questions: int, gain: float = 0.0) -> tuple[float, float]:
    """Of one comparison: by questions (McNemar's exact test), and by images."""
    first, second = _answers(generator, images, questions, gain)
    differences = (second.astype(float) - first).tolist()
    clusters = np.repeat(np.arange(images), questions).tolist()
    return paired_p_value(differences, range(len(differences))), paired_p_value(differences, clusters)


def _rates(generator: np.random.Generator, options: argparse.Namespace, questions: int, gain: float) -> dict[str, Any]:
    found = np.array([_p_values(generator, options.images, questions, gain) for _ in range(options.repetitions)])
    by_questions, by_images = (found < SURE).mean(0)
    return {"questions_an_image": questions, "by_questions": float(by_questions), "by_images": float(by_images)}


def _false_positives(generator: np.random.Generator, options: argparse.Namespace, questions: int) -> dict[str, Any]:
    return _rates(generator, options, questions, 0.0)


def _found_gains(generator: np.random.Generator, options: argparse.Namespace, questions: int) -> dict[str, Any]:
    """How often a real gain (about ten points) is found: a test that finds nothing has no false positives either."""
    return _rates(generator, options, questions, 0.4)


def _a_a(generator: np.random.Generator, runs: int) -> dict[str, Any]:
    """How often a comparison of two seeds says "better" of any benchmark, with the correction and without."""
    said = uncorrected = 0
    for _ in range(runs):
        pairs = [compare_answers(_generations(_answers(generator, *sizes), sizes[1])) for sizes in BENCHMARKS]
        said += any(pair.better is not None for pair in corrected(pairs))
        uncorrected += any(pair.p_value is not None and pair.p_value < SURE for pair in pairs)
    return {"runs": runs, "benchmarks": len(BENCHMARKS), "said_better": said / runs, "uncorrected": uncorrected / runs}


def _generations(right: NDArray[np.bool_], questions: int) -> list[tuple[Generation, Generation]]:
    rows = [[_generation(n, bool(one), n // questions) for n, one in enumerate(side)] for side in right]
    return list(zip(*rows, strict=True))


def _generation(number: int, right: bool, image: int) -> Generation:
    text, name = "yes" if right else "no", str(number)
    return Generation(name, name, "", name, "yes", text, float(right), right, None, None, (), "", str(image))


def _plot(record: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    rows = record["false_positives"]
    for place, (name, label) in enumerate(
        (("by_questions", "by questions (McNemar)"), ("by_images", "by images (ours)"))
    ):
        values = [100 * row[name] for row in rows]
        bars = left.bar([n + 0.38 * (place - 0.5) for n in range(len(rows))], values, 0.36, label=label)
        left.bar_label(bars, fmt="%.1f", fontsize=8)
    left.set_xticks(range(len(rows)), [str(row["questions_an_image"]) for row in rows])
    left.set_xlabel("questions an image")
    left.set_ylabel("false positives, %")
    left.set_title("Two equal models called different", fontsize=10)
    a_a = record["a_a"]
    bars = right.bar(
        ["uncorrected", "Holm (ours)"], [100 * a_a["uncorrected"], 100 * a_a["said_better"]], 0.5, color=["C0", "C1"]
    )
    right.bar_label(bars, fmt="%.1f", fontsize=8)
    right.set_title(f"Two seeds on {a_a['benchmarks']} benchmarks: any 'better', %", fontsize=10)
    for axes in (left, right):
        axes.axhline(100 * record["level"], color="0.3", linewidth=0.8, linestyle="--")
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    sys.exit(main())

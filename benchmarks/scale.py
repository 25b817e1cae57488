"""What planning and preparing cost as the data grows: seconds, records a second, and peak memory, each in a process of its own.

    python -m benchmarks.scale                      # 10 thousand to 1 million records: twenty minutes
    python -m benchmarks.scale --sizes 1000         # seconds
    python -m benchmarks.scale --sizes 10000000 --kinds jsonl --pictures 1000    # an hour
    python -m benchmarks.scale --sizes 665000 --turns 7 --steps plan_cold plan_warm    # 1 GB: a minute

Records are made up: a caption-like question and answer, every picture asked about by some records. Pictures are generated,
and most of their names are hard links to a few of them, so that a million names need no disk. Each size is planned (the
identity of the source: cold, then from the cache), its images are checked, and its samples are prepared, by the stages
themselves, on all cores. Writes benchmarks/results/scale.json and scale.png; rows of other sizes stay. With --loaded the rows
say that the machine did other work meanwhile: their memory counts, their seconds are not drawn.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arguments import existing_folder, file_to_write, whole

RESULT = Path(__file__).parent / "results" / "scale.json"
STEPS = ("plan_cold", "plan_warm", "images", "prepare")
SIZES = (10_000, 100_000, 1_000_000)
LINKS = 50_000
"""Names of one file: some file systems allow 65,000."""
WORDS = "a the of red blue dog cat table near water man woman two three left right old street with on picture sky"
CAMERA = {"336 x 336": (336, 336), "640 x 480 (COCO)": (640, 480), "1500 x 2250 (SAM)": (1500, 2250)}


def main(words: Sequence[str] | None = None) -> int:
    """Measure and write the result and its plot."""
    options = _options(words)
    if options.child:
        sys.stdout.write(json.dumps(_child(options.child, options.folder, options.kind)) + "\n")
        return 0
    record: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {"rows": []}
    record |= {"cores": len(os.sched_getaffinity(0)), "one_core": _in_child("costs", str(options.folder), "")}
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        for size in options.sizes:
            for kind in options.kinds:
                row = _measured(Path(place) / "data", size, kind, options)
                same = {"records": size, "kind": kind, "turns": options.turns}
                record["rows"] = [r for r in record["rows"] if {k: r[k] for k in same} != same] + [row]
                sys.stdout.write(json.dumps(row) + "\n")
    record["rows"].sort(key=lambda row: (row["kind"], row["turns"], row["records"]))
    options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    _plot(record, options.output.with_suffix(".png"))
    return 0


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.scale")
    parser.add_argument("--sizes", type=whole(1), nargs="+", default=SIZES)
    parser.add_argument("--kinds", nargs="+", choices=("json", "jsonl"), default=("json", "jsonl"))
    parser.add_argument("--pictures", type=whole(1), default=350_000, help="most pictures that records name")
    parser.add_argument("--turns", type=whole(1), default=1, help="questions and answers of a record")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--loaded", action="store_true", help="other work ran beside this")
    parser.add_argument("--output", type=file_to_write, default=RESULT)
    place = Path(tempfile.gettempdir())
    parser.add_argument("--folder", type=existing_folder, default=place, help="where data is made up and prepared")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--kind", default="", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def _measured(data: Path, records: int, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """One size: make it up, plan it twice, check its images, prepare it."""
    shutil.rmtree(data, ignore_errors=True)
    _make_up(data, records, kind, options.pictures, options.turns)
    row: dict[str, Any] = {"records": records, "kind": kind, "turns": options.turns}
    row |= {"loaded": True} if options.loaded else {}
    row["bytes"] = (data / f"a.{kind}").stat().st_size
    for step in options.steps:
        row[step] = _in_child(step, str(data), kind)
    shutil.rmtree(data)
    return row


def _in_child(step: str, folder: str, kind: str) -> dict[str, Any]:
    words = [sys.executable, "-m", "benchmarks.scale", "--child", step, "--folder", folder, "--kind", kind]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


# ------------------------------------------------------------------------------------------------ made-up data


def _make_up(data: Path, records: int, kind: str, pictures: int, turns: int) -> None:
    from PIL import Image

    images, draw = data / "images", random.Random(0)
    images.mkdir(parents=True)
    count = min(max(1, records // 2), pictures)
    for number in range(count):
        folder = images / f"{number // 1000:05d}"
        folder.mkdir(exist_ok=True)
        path = folder / f"{number:09d}.jpg"
        if number % LINKS == 0:
            Image.effect_noise((160, 120), 40).convert("RGB").save(path)
            first = path
        else:
            os.link(first, path)
    with (data / f"a.{kind}").open("w", encoding="utf-8") as file:
        file.write("[" if kind == "json" else "")
        for number in range(records):
            separator = "" if not number else ",\n" if kind == "json" else "\n"
            file.write(separator + json.dumps(_record(number, number % count, draw, turns)))
        file.write("]\n" if kind == "json" else "\n")
    _tokenizer(data / "tokenizer", draw)


def _record(number: int, picture: int, draw: random.Random, turns: int = 1) -> dict[str, Any]:
    said = []
    for turn in range(turns):
        question, answer = " ".join(draw.choices(WORDS.split(), k=8)), " ".join(draw.choices(WORDS.split(), k=25))
        said.append({"from": "human", "value": f"{question}?" if turn else f"<image>\n{question}?"})
        said.append({"from": "gpt", "value": f"{answer}."})
    return {"id": f"{number:09d}", "image": f"{picture // 1000:05d}/{picture:09d}.jpg", "conversations": said}


def _tokenizer(folder: Path, draw: random.Random) -> None:
    from tinylmm.models.tokenizer import train_tokenizer

    texts = [_record(number, 0, draw)["conversations"][1]["value"] for number in range(500)]
    train_tokenizer(texts, 400, 2048).save_pretrained(folder)


# ------------------------------------------------------------------------------------------------ what is measured


def _child(step: str, folder: Path, kind: str) -> dict[str, Any]:
    """Do one step in this process, and say what it took: seconds, and the peak of this process and of its largest helper."""
    if step == "costs":
        return _costs()
    before = _peak(resource.RUSAGE_SELF)
    work: Callable[[Path, str], dict[str, Any]] = {"images": _images, "prepare": _prepare}.get(step, _plan)
    began = time.perf_counter()
    found = work(folder, kind)
    seconds = time.perf_counter() - began
    return {
        "seconds": round(seconds, 3),
        "peak_mib": _peak(resource.RUSAGE_SELF),
        "grown_mib": _peak(resource.RUSAGE_SELF) - before,
        "largest_helper_mib": _peak(resource.RUSAGE_CHILDREN),
        **found,
    }


def _peak(who: int) -> int:
    return resource.getrusage(who).ru_maxrss // 1024


def _plan(folder: Path, kind: str) -> dict[str, Any]:
    from tinylmm.config.spec import SourceSpec
    from tinylmm.planning.fingerprints import source_fingerprint

    found = source_fingerprint(folder, SourceSpec(annotations=f"a.{kind}", images="images"), folder / "cache")
    return {"pictures": found["num_images"]}


def _job(folder: Path, kind: str, stage: str, spec: dict[str, Any], parents: dict[str, Path]) -> Any:
    from tinylmm.stages.job import make_job

    source = {"format": "llava", "limit": None, "content": {}}
    location = {"root": str(folder), "source": {"annotations": f"a.{kind}", "images": "images"}}
    settings = {"launch": {}, "location": location, "folders": {}}
    job = make_job(
        stage,
        stage,
        "ab" * 32,
        {"source": source, **spec},
        parents,
        settings,
        folder / f"stage-{stage}",
        folder / "store",
    )
    job.output.mkdir(parents=True)
    return job


def _images(folder: Path, kind: str) -> dict[str, Any]:
    from tinylmm.stages import images

    return images.run(_job(folder, kind, "images", {}, {}))


def _prepare(folder: Path, kind: str) -> dict[str, Any]:
    from tinylmm.stages import prepare

    parents = {"images": folder / "stage-images" / "output", "tokenizer": folder / "tokenizer"}
    summary = prepare.run(_job(folder, kind, "prepare", {"template": "llama"}, parents))
    return {name: summary[name] for name in ("samples", "tokens")}


def _costs() -> dict[str, Any]:
    """Milliseconds of one core: rendering a record, and a picture from its JPEG to SigLIP-384's input, of which normalising."""
    import io

    from PIL import Image

    from tinylmm.data.chat import get_template
    from tinylmm.data.images import open_image
    from tinylmm.data.sample import Sample, parse_record
    from tinylmm.data.transform import ImageTransform
    from tinylmm.models.tokenizer import train_tokenizer

    draw = random.Random(0)
    records = [_record(number, 0, draw) for number in range(500)]
    tokenizer = train_tokenizer([one["conversations"][1]["value"] for one in records], 400, 2048)
    samples = [one for one in (parse_record(i, r) for i, r in enumerate(records)) if isinstance(one, Sample)]
    template, transform = get_template("llama"), ImageTransform(384, [0.5] * 3, [0.5] * 3, "squash")
    costs = {"render": _fastest(lambda: [template.render(one.turns, tokenizer) for one in samples]) / len(samples)}
    for name, size in CAMERA.items():
        buffer = io.BytesIO()
        Image.effect_noise(size, 60).convert("RGB").save(buffer, "JPEG")
        picture = buffer.getvalue()
        costs[name] = _fastest(lambda picture=picture: transform(open_image(Path("x"), picture)))  # type: ignore[misc]
    square = Image.fromarray(np.random.default_rng(0).integers(0, 255, (384, 384, 3), dtype=np.uint8))
    costs["of which normalising"] = _fastest(lambda: transform._normalised(square))
    return {name: round(1000 * seconds, 4) for name, seconds in costs.items()}


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of ten tries."""
    times = []
    for _ in range(10):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def _plot(record: dict[str, Any], path: Path) -> None:
    """Seconds and peak memory against the number of records."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (time_axes, memory_axes) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for kind, style in (("json", "--"), ("jsonl", "-")):
        of_kind = [row for row in record["rows"] if row["kind"] == kind and row["turns"] == 1]
        for number, step in enumerate(STEPS):
            rows = [row for row in of_kind if step in row]
            quiet = [row for row in rows if not row.get("loaded")]
            label = f"{step.replace('_', ', ')} ({kind})"
            look = {"color": f"C{number}", "linestyle": style, "marker": "o", "label": label}
            time_axes.loglog([row["records"] for row in quiet], [row[step]["seconds"] for row in quiet], **look)
            memory_axes.semilogx([row["records"] for row in rows], [row[step]["peak_mib"] for row in rows], **look)
    time_axes.set(xlabel="records", ylabel="seconds", title=f"Time, {record['cores']} cores")
    memory_axes.set(xlabel="records", ylabel="MiB", title="Peak memory of the process", ylim=(0, None))
    memory_axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    raise SystemExit(main())

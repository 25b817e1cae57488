"""What `tinylmm data` writes: one HTML file that needs nothing else, as `reports/html.py` does for runs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from tinylmm.data.check import SourceCheck
from tinylmm.reports.data_preview import SeenSample
from tinylmm.reports.data_text import histograms, image_caption, repetitions, source_counts, verdict, visible
from tinylmm.reports.pages import page_environment
from tinylmm.version import __version__

FAULTS_IN_PAGE = 20_000
GROUPS_IN_PAGE = 200


def render_check_page(name: str, checks: Sequence[SourceCheck]) -> str:
    """Return the page of a data set's check: every source with its counts, histograms, repetitions and faults."""
    return (
        page_environment()
        .get_template("data_check.html.j2")
        .render(name=name, sources=[_source(check) for check in checks], version=__version__, shown=FAULTS_IN_PAGE)
    )


def render_sample_page(seen: SeenSample) -> str:
    """Return the page of one sample: its tokens, those trained on marked, and its images as the tower gets them."""
    tokens = [
        {
            "text": f"image {token.image + 1}" if token.image is not None else visible(token.text),
            "kind": "image" if token.image is not None else "trained" if token.supervised else "plain",
        }
        for token in seen.tokens
    ]
    images = [
        {"caption": image_caption(number, image), "tiles": [_tile(tile) for tile in image.tiles]}
        for number, image in enumerate(seen.images)
    ]
    return (
        page_environment()
        .get_template("data_sample.html.j2")
        .render(seen=seen, tokens=tokens, images=images, version=__version__)
    )


def _source(check: SourceCheck) -> dict[str, Any]:
    charts = []
    for title, bins in histograms(check):
        most = max(count for _, count in bins)
        rows = [{"name": name, "count": count, "width": round(100 * count / most, 2)} for name, count in bins]
        charts.append({"title": title, "rows": rows})
    return {
        "check": check,
        "verdict": verdict(check),
        "counts": source_counts(check),
        "charts": charts,
        "repetitions": [
            {"what": what, "count": count, "groups": groups[:GROUPS_IN_PAGE]}
            for what, count, groups in repetitions(check)
        ],
        "faults": check.faults[:FAULTS_IN_PAGE],
    }


def _tile(image: Image.Image) -> dict[str, Any]:
    """A tile as PNG: exactly the pixels that the tower gets."""
    buffer = io.BytesIO()
    image.save(buffer, "png")
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"uri": f"data:image/png;base64,{data}", "width": image.width, "height": image.height}

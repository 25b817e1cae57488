"""html.py, plots.py and thumbnails.py: one page that needs nothing else, whatever the names and answers are."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tinylmm.evaluation.benchmarks.records import ImageRef
from tinylmm.reports.collect import collect_report
from tinylmm.reports.html import render_html
from tinylmm.reports.plots import loss_svg, smooth
from tinylmm.reports.thumbnails import ThumbnailError, thumbnail

from .conftest import StoreBuilder

HOSTILE = "</p><script>alert(1)</script><img src=x onerror=alert(2)>'\""
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Every tag with its attributes; fails on a tag that is closed out of turn."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page(store: StoreBuilder, *runs: str) -> str:
    return render_html(collect_report(store.root, list(runs)))


def test_page_loads_and_runs_nothing(store: StoreBuilder) -> None:
    store.whole()
    tags = Page(page(store)).tags
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in tags}
    loaded = [
        attributes[key] or "" for _, attributes in tags for key in ("src", "href", "xlink:href") if key in attributes
    ]
    assert loaded and all(address.startswith(("data:image/", "#")) for address in loaded)
    assert any("default-src 'none'" in (attributes.get("content") or "") for _, attributes in tags)


def test_ids_are_unique_over_all_curves(store: StoreBuilder) -> None:
    store.whole("a")
    store.run("b")
    ids = re.findall(r'\sid="([^"]+)"', page(store, "a", "b"))
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("key", ["text", "question", "truth", "category", "blind_text", "image", "question_id"])
def test_hostile_text_in_answers_is_shown_not_run(store: StoreBuilder, key: str) -> None:
    store.whole(**{key: HOSTILE})
    html = page(store)
    assert "<script" not in html
    assert not any("onerror" in attributes for _, attributes in Page(html).tags)


def test_hostile_names_are_shown_not_run(store: StoreBuilder) -> None:
    name = "<script>alert(1)<" + "b>"
    store.stage("train", name)
    store.losses(store.root / "stages" / store.key("train", name), 2.0, 5)
    store.run("<img src=x onerror=alert(1)>")
    html = page(store, "<img src=x onerror=alert(1)>")
    assert "<script" not in html
    assert "&lt;img src=x onerror=alert(1)&gt;" in html
    Page(html)


def test_page_shows_what_finetuning_brought(store: StoreBuilder) -> None:
    store.whole()
    html = page(store)
    assert "after pretrain</th>" in html and "after finetune</th>" in html
    assert "+50.0" in html


def test_page_has_a_card_a_question_with_its_picture(store: StoreBuilder) -> None:
    store.whole()
    html = page(store)
    # of ten questions a type two are wrong: all eight wrong ones are shown, and right ones fill up
    assert (html.count('<li class="card wrong">'), html.count('<li class="card right">')) == (8, 16)
    assert html.count('src="data:image/png;base64,') == 24


def test_missing_image_is_shown_as_such(store: StoreBuilder) -> None:
    store.whole(image="nowhere.png")
    html = page(store)
    assert html.count("image missing") == 24
    assert "nowhere.png" in html


def test_failed_run_shows_its_traceback(store: StoreBuilder) -> None:
    folder = store.stage("train", "pretrain")
    (store.root / "work" / folder.name).mkdir(parents=True)
    (store.root / "work" / folder.name / "error.txt").write_text("Traceback\nValueError: <b>\n")
    store.run("broken", status="failed", finished=None, pretrain="failed")
    html = page(store, "broken")
    assert "Stage pretrain failed." in html and "ValueError: &lt;b&gt;" in html
    Page(html)


def test_running_run_says_how_far_it_is(store: StoreBuilder) -> None:
    store.stage("train", "pretrain")
    store.run("slow", status="running", finished=None)
    assert "The run is still running: 1 of 1 stages are done." in page(store, "slow")


def test_several_runs_stand_side_by_side_and_in_full(store: StoreBuilder) -> None:
    store.whole("a")
    store.run("b")
    html = page(store, "a", "b")
    assert "2 runs side by side" in html and html.count("<article") == 2
    Page(html)


def test_spec_and_command_are_on_the_page(store: StoreBuilder) -> None:
    store.whole()
    html = page(store)
    assert "tinylmm-train llm=nano recipe=base" in html
    assert "pretrained: google/siglip-base" in html
    assert "LLM, vision tower from layer 0.5" in html


def test_page_is_the_same_every_time(store: StoreBuilder) -> None:
    store.whole()
    assert page(store) == page(store)


def test_curve_takes_the_pages_colours() -> None:
    svg = loss_svg([1, 2, 3], [3.0, 2.0, 1.0], "c")
    assert "var(--accent)" in svg
    assert "#0708" not in svg and "<style" not in svg


def test_smoothing_has_no_start_bias_and_keeps_constants() -> None:
    assert smooth([2.0] * 100) == pytest.approx([2.0] * 100)
    assert smooth([5.0, 1.0]) == [5.0, 1.0]


def test_small_image_stays_pixel_for_pixel_and_large_one_is_reduced(tmp_path: Path) -> None:
    Image.new("RGB", (32, 24)).save(tmp_path / "small.png")
    Image.new("RGB", (1600, 800)).save(tmp_path / "large.jpg")
    small, large = (thumbnail(ImageRef(tmp_path / name)) for name in ("small.png", "large.jpg"))
    assert (small.width, small.height, small.crisp) == (32, 24, True)
    assert (large.width, large.height, large.crisp) == (360, 180, False)


def test_bad_images_are_refused_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    Image.new("1", (9000, 8000)).save(tmp_path / "huge.png")
    for name, reason in (
        ("none.png", "image missing"),
        ("text.png", "not a readable JPEG, PNG, WEBP, GIF image"),
        ("huge.png", "image is too large .* at most 50,000,000 pixels"),
    ):
        with pytest.raises(ThumbnailError, match=reason):
            thumbnail(ImageRef(tmp_path / name))


def test_images_in_cells_of_a_parquet_file_are_shown(store: StoreBuilder) -> None:
    store.whole()
    folder = store.root / "stages" / store.key("data", "digits") / "output/images/test"
    cells = [{"bytes": path.read_bytes(), "path": path.name} for path in sorted(folder.glob("*.png"))]
    pq.write_table(pa.table({"image": cells}), folder / "test.parquet")
    for name in ("pretrain", "finetune"):
        answers = store.root / "stages" / store.key("eval", f"digits@{name}") / "output/generations.jsonl"
        rows = [json.loads(line) for line in answers.read_text().splitlines()]
        for number, row in enumerate(rows):
            row |= {"image": "test.parquet", "images": [{"path": "test.parquet", "row": number, "column": "image"}]}
        answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    html = page(store)
    assert html.count('src="data:image/png;base64,') == 24 and '<div class="missing">' not in html


def test_a_page_with_images_is_made_without_torch(store: StoreBuilder) -> None:
    store.whole()
    code = (
        "import sys; from pathlib import Path; from tinylmm.reports.write import write_report; "
        "write_report(Path(sys.argv[1])); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, store.root], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_page_names_the_model_of_every_finished_training_by_its_stage(store: StoreBuilder) -> None:
    store.whole()
    assert re.findall(r"<dt>(Model[^<]*)</dt>", page(store)) == ["Model after pretrain", "Model after finetune"]

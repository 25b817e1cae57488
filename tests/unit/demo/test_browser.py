"""The page in a real browser: with mouse, keyboard and finger, on a desk and on a phone, and without another host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

import tinylmm
from tests.browser import browser
from tests.unit.demo.showing import Showing, showing
from tests.unit.serving.process import BLUE, RED, endless_model, png, roomy_model
from tinylmm.demo.questions import Question, QuestionSet
from tinylmm.evaluation.benchmarks.records import ImageRef

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PATIENCE = 120_000
"""Milliseconds; a machine that does much else takes long, and nothing is decided by it."""
TEXTS = "els => els.map(e => e.innerText)"
ANSWERS = "#chat-{} [data-testid=bot] .message-content"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    RED.save(folder / "red.png")
    BLUE.save(folder / "blue.png")
    (folder / "damaged.png").write_bytes(png(RED)[:-40])
    return folder


@pytest.fixture(scope="module")
def shown(folder: Path) -> Iterator[Showing]:
    """Two models, the first of which never ends by itself, and questions of an evaluation."""
    colours = {"red": "red", "blue": "blue"}
    questions = [
        Question(
            f"What colour is it? {n}", "colour", (ImageRef(folder / f"{name}.png"),), colour, (f"<b>{n}</b>", None)
        )
        for n, (name, colour) in enumerate(colours.items())
    ]
    models = {"endless": endless_model(folder / "endless"), "wide": roomy_model(folder / "wide")}
    with showing(folder, models, [QuestionSet("colours", 100, tuple(questions))]) as running:
        yield running


@pytest.fixture(scope="module")
def started() -> Iterator[Browser]:
    with browser() as running:
        yield running


@pytest.fixture
def page(started: Browser, shown: Showing, request: pytest.FixtureRequest) -> Iterator[Page]:
    """The page, opened; at the end it has asked no host but the server, and said nothing of faults."""
    context = started.new_context(**{"viewport": {"width": 1200, "height": 1000}, **getattr(request, "param", {})})
    context.set_default_timeout(PATIENCE)
    opened = context.new_page()
    hosts, faults = set(), []
    opened.on("request", lambda asked: hosts.add(urlsplit(asked.url).netloc))
    opened.on("pageerror", lambda fault: faults.append(str(fault)))
    opened.on("console", lambda said: faults.append(said.text) if "Content Security Policy" in said.text else None)
    opened.goto(shown.url)
    opened.wait_for_selector("#question textarea")
    yield opened
    context.close()
    assert hosts - {""} == {urlsplit(shown.url).netloc} and faults == []
    shown.wait_until_idle()


def upload(page: Page, *files: Path) -> None:
    there = page.locator("#question .thumbnail-item").count()
    page.set_input_files("#question input[type=file]", files)
    page.locator("#question .thumbnail-item").nth(there + len(files) - 1).wait_for()


def limit(page: Page, tokens: int) -> None:
    page.click("#settings button")
    page.locator("#seed input").wait_for()  # the last of them is there, so none is made anew
    page.fill("#max-new-tokens input", str(tokens))
    page.press("#max-new-tokens input", "Tab")


def ended(page: Page) -> None:
    """Wait until no answer is being written: then the next question is taken."""
    page.locator("#stop:disabled").wait_for()


def ask(page: Page, question: str, *files: Path, early: bool = False) -> None:
    if not early:
        ended(page)
    if files:
        upload(page, *files)
    page.fill("#question textarea", question)
    page.press("#question textarea", "Enter")


def wait_for(page: Page, model: int, text: str) -> str:
    """Wait until the line below a model's answers holds a text, and return the line."""
    line = page.locator(f"#figures-{model}").filter(has_text=text)
    line.wait_for()
    return line.inner_text()


def answers(page: Page, model: int) -> list[str]:
    return [
        str(text) for text in page.locator(ANSWERS.format(model)).evaluate_all("els => els.map(e => e.textContent)")
    ]


@pytest.mark.slow
def test_upload_ask_stream_stop_ask_again_and_clear(page: Page, shown: Showing, folder: Path) -> None:
    ask(page, "Who are you?", folder / "red.png")
    wait_for(page, 0, "tokens/s")
    earlier = answers(page, 0)[0]
    page.wait_for_function(
        "([place, length]) => document.querySelector(place).textContent.length > length",
        arg=[ANSWERS.format(0), len(earlier)],
    )
    assert page.locator("#question textarea").input_value() == ""
    page.click("#stop")
    assert "image tokens · stopped" in wait_for(page, 0, "stopped").replace("of them ", "")
    shown.wait_until_idle()
    stopped = answers(page, 0)
    assert stopped[0].startswith(earlier)
    ended(page)
    limit(page, 5)
    ask(page, "And this?", folder / "blue.png")
    line = wait_for(page, 0, "ended by the limit")
    assert line.startswith("5 tokens") and "8 of them image tokens" in line
    assert answers(page, 0)[0] == stopped[0] and len(answers(page, 0)) == 2
    assert page.locator("#chat-0 [data-testid=user] img").count() == 2
    page.click("#new")
    page.locator("#chat-0 [data-testid=user]").first.wait_for(state="detached")
    assert answers(page, 0) == answers(page, 1) == []
    ask(page, "Who are you?")
    line = wait_for(page, 1, "0 of them image tokens")
    assert "prompt" in line


@pytest.mark.slow
def test_both_models_answer_what_they_answer_alone(page: Page, folder: Path) -> None:
    limit(page, 8)
    ask(page, "Which is red?", folder / "red.png", folder / "blue.png")
    for model, name in enumerate(("endless", "wide")):
        wait_for(page, model, "limit of new tokens") if name == "endless" else wait_for(page, model, "first token")
        alone = tinylmm.load(folder / name, device="cpu").stream("Which is red?", [RED, BLUE], max_new_tokens=8)
        expected = "".join(alone)
        page.wait_for_function(
            "([place, text]) => document.querySelector(place)?.textContent.trim() === text.trim()",
            arg=[ANSWERS.format(model), expected],
        )


@pytest.mark.slow
def test_a_damaged_image_is_told_in_a_sentence_and_the_question_stays(page: Page, folder: Path) -> None:
    ask(page, "What is it?", folder / "damaged.png")
    page.locator("#notice").filter(has_text="image 1 of the request: image is damaged or cut short").wait_for()
    assert page.locator("#question textarea").input_value() == "What is it?"
    assert page.locator("#chat-0 [data-testid=user]").count() == 0
    page.locator("#question").get_by_label("Remove file").click()
    limit(page, 3)
    ask(page, "What is it?", folder / "red.png")
    wait_for(page, 0, "3 tokens")
    assert page.locator("#notice").inner_text() == ""


@pytest.mark.slow
def test_a_held_out_question_is_asked_beside_its_truth_in_a_conversation_of_its_own(page: Page) -> None:
    limit(page, 4)
    ask(page, "Who are you?")
    wait_for(page, 0, "4 tokens")
    page.locator("#gallery button.thumbnail-item").nth(1).click()
    page.locator("#picked .truth").filter(has_text="blue").wait_for()
    for card in page.locator("#gallery button.thumbnail-item").all():
        image, caption = (card.locator(place).bounding_box() for place in ("img", ".caption-label"))
        assert image is not None and caption is not None
        assert image["height"] > 0 and image["y"] + image["height"] <= caption["y"] + 1, (
            "the question hides its picture"
        )
    assert page.locator("#picked dd").all_inner_texts() == ["blue", "<b>1</b>"]  # and nothing of it is markup
    page.click("#ask-picked")
    line = wait_for(page, 0, "truth: blue")
    assert "in its evaluation it said: <b>1</b>" in line
    assert "in its evaluation" not in wait_for(page, 1, "truth: blue")
    wait_for(page, 0, "4 tokens")
    assert (
        page.locator("#chat-0 [data-testid=user]").count() == 2
    )  # its image and its text; the question before is gone
    page.click("#take")
    page.locator("#question .thumbnail-item").wait_for()
    ask(page, "And in one word?")
    wait_for(page, 0, "8 of them image tokens")


@pytest.mark.slow
def test_everything_can_be_done_from_the_keyboard(page: Page, shown: Showing) -> None:
    def focus(place: str, key: str = "Tab") -> None:
        for _ in range(80):
            if page.evaluate("place => document.activeElement?.matches(place)", place):
                return
            page.keyboard.press(key)
        pytest.fail(f"{place} is not reached with {key}")

    focus("#question textarea")
    page.keyboard.type("Who are you?")
    page.keyboard.press("Enter")
    wait_for(page, 0, "tokens/s")
    page.keyboard.press("Escape")
    wait_for(page, 0, "stopped")
    shown.wait_until_idle()
    focus("#gallery button.thumbnail-item")
    page.keyboard.press("Enter")
    page.locator("#picked .truth").wait_for()
    focus("#ask-picked")
    page.keyboard.press("Enter")
    wait_for(page, 0, "truth: red")
    focus("#stop", "Shift+Tab")
    page.keyboard.press("Space")
    wait_for(page, 0, "stopped")
    focus("#new", "Tab")
    page.keyboard.press("Enter")
    page.locator("#chat-0 [data-testid=user]").first.wait_for(state="detached")


PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 800},
    "is_mobile": True,
    "has_touch": True,
    "color_scheme": "dark",
}


@pytest.mark.slow
@pytest.mark.parametrize("page", [PHONE], indirect=True, ids=["phone"])
def test_on_a_phone_the_answers_stand_below_each_other_and_nothing_is_cut_off(page: Page, folder: Path) -> None:
    ask(page, "Who are you?", folder / "red.png")
    wait_for(page, 0, "tokens/s")
    page.tap("#stop")
    wait_for(page, 0, "stopped")
    first, second = (page.locator(f"#chat-{model}").bounding_box() for model in (0, 1))
    assert first is not None and second is not None
    assert second["y"] >= first["y"] + first["height"] and first["x"] >= 0 and first["x"] + first["width"] <= 390
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    for place in ("#stop", "#new"):
        box = page.locator(place).bounding_box()
        assert box is not None and box["height"] >= 44  # a finger's size
    assert page.evaluate("document.body.classList.contains('dark')")


@pytest.mark.slow
def test_a_question_that_comes_too_early_is_told_so_and_stays(page: Page) -> None:
    ask(page, "Who are you?")
    wait_for(page, 0, "tokens/s")
    ask(page, "And you?", early=True)
    page.locator("#notice").filter(has_text="still being written").wait_for()
    assert page.locator("#question textarea").input_value() == "And you?"
    page.click("#stop")
    wait_for(page, 0, "stopped")
    assert page.locator("#chat-0 [data-testid=user]").count() == 1


@pytest.mark.slow
def test_who_closes_the_page_ends_the_answer(page: Page, shown: Showing) -> None:
    ask(page, "Who are you?")
    wait_for(page, 0, "tokens/s")
    page.close()
    shown.wait_until_idle()

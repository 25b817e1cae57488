"""The page without a browser: what its functions answer, and what the server behind it refuses."""

from __future__ import annotations

import json
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.demo.showing import Showing, ask_by_client, showing
from tests.unit.serving.process import BLUE, RED, N, png, wide_model
from tinylmm.cli.demo import NO_NETWORK, _names
from tinylmm.cli.main import main
from tinylmm.demo.questions import Question, QuestionSet
from tinylmm.evaluation.benchmarks.records import ImageRef
from tinylmm.generation.session import load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def page(folder: Path) -> Iterator[Showing]:
    with showing(folder, {"tiny": wide_model(folder / "tiny")}) as running:
        yield running


def reply(url: str, headers: dict[str, str] | None = None) -> tuple[int, Any, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers or {})) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()


def test_the_page_answers_as_the_model_does_alone_and_counts_image_tokens(page: Showing, folder: Path) -> None:
    RED.save(folder / "red.png")
    BLUE.save(folder / "blue.png")
    chat, figures, *_ = ask_by_client(page, "Which is red?", [folder / "red.png", folder / "blue.png"], N)
    expected = load(folder / "tiny", device="cpu").stream("Which is red?", [png(RED), png(BLUE)], max_new_tokens=N)
    assert chat[-1]["content"][0]["text"] == "".join(expected)
    assert [message["role"] for message in chat] == ["user", "user", "user", "assistant"]
    assert re.search(r"\d+ tokens? · .*first token after \d.* · prompt \d+ tokens, 8 of them image tokens", figures)


def test_a_damaged_image_is_named_in_a_sentence_and_asked_nothing(page: Showing, folder: Path) -> None:
    (folder / "damaged.png").write_bytes(png(RED)[:-40])
    *_, notice = ask_by_client(page, "What is it?", [folder / "damaged.png"], N)
    assert "image 1 of the request: image is damaged or cut short" in notice


@pytest.mark.parametrize(
    ("path", "refusal"),
    [
        ("https://images.example.org/red.png", "nothing is fetched from an address"),
        ("{folder}/red.png", "no file of the machine is read"),
    ],
    ids=["address", "file of this machine"],
)
def test_only_what_was_uploaded_is_an_image(page: Showing, folder: Path, path: str, refusal: str) -> None:
    RED.save(folder / "red.png")
    file = {"path": path.format(folder=folder), "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [{"text": "What is it?", "files": [file]}, N, 0, 1, None]}).encode()
    call = f"{page.url}/gradio_api/call/ask"
    asked = urllib.request.Request(call, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked) as answer:
        event = json.load(answer)["event_id"]
    _, _, text = reply(f"{call}/{event}")
    assert "event: error" in text and refusal in text, text
    assert reply(f"{page.url}/gradio_api/file=/etc/hostname")[0] == 403


def test_browsers_may_ask_no_other_host_and_no_other_name_leads_here(page: Showing) -> None:
    status, headers, text = reply(page.url)
    assert status == 200 and "tinylmm · tiny" in text
    assert "default-src 'self'" in headers["Content-Security-Policy"] and "connect-src 'self'" in text + str(headers)
    status, _, text = reply(page.url, {"Host": "images.example.org"})
    assert status == 403 and "--allow-host" in text
    status, _, text = reply(f"{page.url}/config", {"Origin": "https://images.example.org"})
    assert status == 403 and "may not ask" in text
    assert reply(f"{page.url}/config", {"Origin": page.url})[0] == 200
    assert reply(f"{page.url}/health")[2] == '{"status":"ok"}'


def test_questions_without_an_image_to_show_do_not_shift_those_with_one(page: Showing, folder: Path) -> None:
    from tinylmm.demo.page import Page

    RED.save(folder / "red.png")
    (folder / "broken.png").write_bytes(b"?")
    refs = [(ImageRef(folder / f"{name}.png"),) for name in ("broken", "red", "none")]
    asked = tuple(Question(f"question {n}", "", images, "", ("",)) for n, images in enumerate([(), *refs, refs[1]]))
    made = Page(page.services, [QuestionSet("set", 50, asked)], folder)
    assert [question.text for question in made.sets[0].questions] == ["question 2", "question 4"]
    assert [text for _, text in made.thumbnails[0]] == ["question 2", "question 4"]


def test_a_key_is_asked_where_there_is_one(folder: Path) -> None:
    model = wide_model(folder / "locked")
    with showing(folder / "locked", {"tiny": model}, key="secret") as locked:
        assert reply(f"{locked.url}/config")[0] == 401
        assert reply(f"{locked.url}/gradio_api/file=x")[0] in (401, 403)
        body = b"username=tinylmm&password="
        for word, status in ((b"wrong", 400), (b"secret", 200)):
            asked = urllib.request.Request(f"{locked.url}/login", body + word)
            try:
                with urllib.request.urlopen(asked) as answer:
                    found = answer.status
            except urllib.error.HTTPError as error:
                found = error.code
            assert found == status


def test_without_gradio_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("tinylmm.demo")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(sys, "argv", ["tinylmm", "demo", "nowhere"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert capsys.readouterr().err == "`tinylmm demo` needs gradio: pip install 'tinylmm[demo]'\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere is neither a folder nor the name of a run"),
        (["{folder}/tiny", "nowhere"], "nowhere is neither a folder nor the name of a run"),
        (["{folder}/tiny", "--questions", "-1"], "--questions is -1; it must be 0 or more."),
        (["{folder}/tiny", "--max-images", "-1"], "--max-images is -1; it must be 0 or more."),
    ],
    ids=["no such model", "no such second model", "questions", "limit"],
)
def test_what_the_command_cannot_do_is_one_sentence(
    page: Showing,
    folder: Path,
    words: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in NO_NETWORK.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        sys, "argv", ["tinylmm", "demo", "--port", "0", *[word.format(folder=folder) for word in words]]
    )
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        (["store/runs/a"], ["a"]),
        (["a@pretrain", "a"], ["a@pretrain", "a"]),
        (["x/model", "y/model"], ["x/model", "y/model"]),
        (["a", "a"], ["a (1)", "a (2)"]),
    ],
)
def test_two_models_are_called_differently(wanted: list[str], names: list[str]) -> None:
    assert _names(wanted) == names

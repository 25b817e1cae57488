"""Videos in chat: a file, its content, or frames with times, shown as the model was trained, in any place of a question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

from tests.builders import WIDTH, tiny_lmm, tiny_loaded
from tests.videos import decode_all, write_video
from tinylmm.cli.main import app
from tinylmm.errors import DataError, UserError
from tinylmm.generation.inputs import Clip, Exchange, Video, in_order, open_clip
from tinylmm.generation.session import ChatModel, _Loaded, load
from tinylmm.models.checkpoint import LoadedModel, save_model
from tinylmm.models.connectors import Connector, MLPConnector
from tinylmm.models.lmm import LMM
from tinylmm.models.video_connectors import GroupResamplerConnector

N = 12
RED = Image.new("RGB", (16, 16), (255, 0, 0))


def chatty(connector: Connector | None = None, sampling: dict[str, Any] | None = None) -> LoadedModel:
    """Weights far enough apart that every token of the context matters to the answer."""
    loaded = tiny_loaded()
    if connector is not None:
        model = tiny_lmm()
        loaded.model = LMM(model.llm, model.vision_tower, connector, "llama")
    torch.manual_seed(0)
    for module in (loaded.model.llm, loaded.model.connector, loaded.model.vision_tower):
        for parameter in module.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3)
    if sampling is not None:
        described = loaded.description.as_json() | {"sampling": sampling}
        loaded.description = type(loaded.description).model_validate(described)
    return loaded


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("videos")
    return {"long": write_video(folder / "long.mp4", 20), "short": write_video(folder / "short.mp4", 2)}


@pytest.fixture(scope="module")
def model() -> ChatModel:
    return ChatModel(chatty(sampling={"uniform": 4}))


def test_a_file_its_content_and_its_frames_are_one_video(model: ChatModel, files: dict[str, Path]) -> None:
    frames = decode_all(files["long"])
    timed = [(frame, number / 25) for number, frame in enumerate(frames)]
    chosen = [frames[number] for number in (0, 6, 12, 19)]
    ways: list[Any] = [
        files["long"],
        str(files["long"]),
        files["long"].read_bytes(),
        timed,
        chosen,
        Video(files["long"]),
    ]
    answers = {model.chat("What moves?", video=way, max_new_tokens=N) for way in ways}
    assert len(answers) == 1
    assert "".join(model.stream("What moves?", video=ways[0], max_new_tokens=N)).strip() in answers
    assert model.chat("What moves?", video=chosen[::-1], max_new_tokens=N) not in answers, "order in time matters"
    other = Video(files["long"], {"uniform": 2})
    assert model.chat("What moves?", video=other, max_new_tokens=N) == model.chat(
        "What moves?", video=[frames[0], frames[19]], max_new_tokens=N
    )


def by_hand(model: LMM, frames: list[Image.Image], transform: Any) -> Tensor:
    with torch.no_grad():
        return model.connector(model.tower_features(torch.stack([transform(frame) for frame in frames])))


def test_frames_lie_one_behind_the_other_in_time(model: ChatModel, files: dict[str, Path]) -> None:
    clip = open_clip(Video(files["long"]), model.loaded.description.sampling)
    assert [frame.size for frame in clip.frames] == [(64, 48)] * 4
    loaded = _Loaded()
    asked = model._prepare("", "What?", [clip], (), loaded)
    (key,) = asked.images
    assert loaded.pixels[key].shape == (4, 3, 16, 16) and loaded.sizes[key] == (0, 0, 4)
    extents = model.model.extents([loaded.sizes[key]])
    with torch.no_grad():
        seen = model.model.image_embeddings(loaded.pixels[key], None, **extents)
    assert seen is not None
    expected = by_hand(model.model, list(clip.frames), model.transform).flatten(0, 1)
    torch.testing.assert_close(seen.flatten(0, -2), expected)
    assert asked.ids.count(-200) == len(expected) == model.model.tokens_of(0, 0, 4)


@pytest.mark.parametrize("kind", ["mlp", "group_resampler"])
def test_a_batch_of_videos_images_and_text_answers_as_each_alone(files: dict[str, Path], kind: str) -> None:
    options: dict[str, Any] = {"num_queries": 6, "groups": 3, "heads": 2, "head_dim": 4, "depth": 1}
    vision = tiny_lmm().vision_tower.hidden_size
    made = MLPConnector(vision, WIDTH) if kind == "mlp" else GroupResamplerConnector(vision, WIDTH, **options)
    model = ChatModel(chatty(made, {"fps": 10, "max": 8}))
    videos = [files["long"], None, files["short"], None, files["long"]]
    images = [None, RED, RED, None, None]
    prompts = ["What moves?", "What is it?", "<image> or <video>?", "Who are you?", "What is red?"]
    together = model.chat(prompts, images, video=videos, max_new_tokens=N)
    rows = zip(prompts, images, videos, strict=True)
    alone = [model.chat(prompt, image, video=video, max_new_tokens=N) for prompt, image, video in rows]
    assert together == alone and len(set(alone)) == 5


def test_a_conversation_shows_a_video_to_all_later_questions(model: ChatModel, files: dict[str, Path]) -> None:
    talk = model.conversation(video=files["long"])
    first = talk.ask("What moves?", max_new_tokens=N)
    second = talk.ask("Which way?", max_new_tokens=N)
    history: list[Any] = [Exchange("What moves?", first, (Video(files["long"]),))]
    assert model.chat("Which way?", history=history, max_new_tokens=N) == second
    asked = [{"type": "video_url", "video_url": {"url": str(files["long"])}}, {"type": "text", "text": "What moves?"}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": first}]
    assert model.chat("Which way?", history=messages, max_new_tokens=N) == second


def test_a_slot_says_where_a_video_stands(files: dict[str, Path]) -> None:
    clip = Video(files["short"])
    assert in_order("<video> or <image>?", RED, clip) == ("<image> or <image>?", [clip, RED])
    assert in_order("Which?", RED, [clip, clip]) == ("Which?", [RED, clip, clip])
    assert in_order("<image> or <video>?", [Clip((RED,)), RED], None)[1] == [RED, Clip((RED,))]
    with pytest.raises(UserError, match="has 2 `<video>` and 0 `<image>`, but 1 videos and 0 images came with it"):
        in_order("<video> or <video>?", None, clip)


@pytest.mark.parametrize(
    ("source", "sampling", "words"),
    [
        ("nowhere.mp4", {"uniform": 2}, "nowhere.mp4: no such video file"),
        (b"no video", {"uniform": 2}, "the video: cannot be read as a video"),
        (3, {"uniform": 2}, "a video is given as int; allowed: a file's path or content, or a list of frames"),
        ([], None, "an empty list of frames"),
        ([RED, (RED, 1.0)], None, "some have a time and some have none"),
        ([(RED, 2.0), (RED, 1.0)], None, "in the order of their times"),
        ("nowhere.mp4", {"unifrom": 2}, "sampling.unifrom"),
        ("nowhere.mp4", None, "nowhere.mp4: no such video file"),
        (__file__, None, "trained on no videos, so nothing says which frames of one to show"),
    ],
)
def test_what_is_no_video_is_refused_in_a_sentence(source: Any, sampling: Any, words: str) -> None:
    with pytest.raises((UserError, DataError), match=words):
        open_clip(Video(source, sampling), None)


def test_the_command_takes_videos(files: dict[str, Path], tmp_path: Path) -> None:
    loaded = chatty(sampling={"uniform": 4})
    save_model(loaded, tmp_path / "model", None, {})
    assert load(tmp_path / "model").loaded.description.sampling is not None
    first = ["chat", str(tmp_path / "model"), "--max-new-tokens", "3"]
    asked = CliRunner().invoke(app, [*first, "--video", str(files["long"]), "--prompt", "What moves?"])
    assert asked.exit_code == 0, asked.output
    talk = CliRunner().invoke(app, first, input=f"/video {files['long']}\nWhat moves?\n/video nothing.mp4\n")
    assert talk.exit_code == 0 and asked.output.strip() in talk.output
    assert "nothing.mp4: no such video file" in talk.output.replace("\n", "")

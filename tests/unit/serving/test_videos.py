"""Videos that OpenAI's own client sends in vLLM's forms: answers are the model's own, and none takes more than its limits."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

import tinylmm
from tests.unit.generation.test_videos import chatty
from tests.unit.serving.process import BLUE, RED, N, Server, picture, png, serving, user, words
from tests.unit.serving.test_fetch import _Server, place, serve_files
from tests.videos import decode_all, write_sound, write_video
from tinylmm.config.video import SamplingSpec
from tinylmm.data.video import read_frames
from tinylmm.generation.inputs import Video
from tinylmm.generation.session import ChatModel
from tinylmm.models.checkpoint import save_model
from tinylmm.serving.errors import ApiError
from tinylmm.serving.media import VideoFile
from tinylmm.serving.videos import FrameReader, VideoLimits

FRAMES = 20
LIMITS = ("--max-frames", "8", "--max-pixels", "40000", "--body-mb", "1", "--max-images", "3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was trained with four frames of each clip."""
    folder = tmp_path_factory.mktemp("served") / "video"
    save_model(chatty(sampling={"uniform": 4}), folder, None, {})
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("clips") / "clip.mp4", FRAMES)


@pytest.fixture(scope="module")
def model(folder: Path) -> ChatModel:
    return tinylmm.load(folder, device="cpu")


@pytest.fixture(scope="module")
def host() -> Iterator[_Server]:
    yield from serve_files()


@pytest.fixture(scope="module")
def server(folder: Path, host: _Server) -> Iterator[Server]:
    with serving(folder, *LIMITS, "--allow-images-from", f"127.0.0.1:{host.server_port}") as running:
        yield running


def data(content: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def shown(url: str, kind: str = "video_url") -> dict[str, Any]:
    return {"type": kind, kind: {"url": url}}


def ask(server: Server, *parts: Any, **options: Any) -> str:
    reply = server.openai.chat.completions.create(
        model="video",
        messages=[user(*parts)],
        max_tokens=N,
        **options,  # type: ignore[arg-type]
    )
    return str(reply.choices[0].message.content)


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()


def test_a_video_gets_the_models_own_answer(server: Server, model: ChatModel, clip: Path) -> None:
    video, what = data(clip.read_bytes()), words("What moves?")
    expected = model.chat("What moves?", video=str(clip), max_new_tokens=N)
    assert expected not in {
        model.chat("What moves?", max_new_tokens=N),
        model.chat("What moves?", RED, max_new_tokens=N),
    }
    for part in (shown(video), {"type": "video_url", "video_url": video}, {"type": "video", "video": video}):
        assert ask(server, part, what) == expected
    assert ask(server, {"type": "file", "file": {"filename": "clip.mp4", "file_data": video}}, what) == expected
    stream = server.openai.chat.completions.create(
        model="video", messages=[user(shown(video), what)], max_tokens=N, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected
    both = model.chat("Is <video> like <image>?", RED, video=str(clip), max_new_tokens=N)
    assert ask(server, picture(RED), shown(video), words("Is <video> like <image>?")) == both
    assert ask(server, shown(video), words("like"), picture(BLUE)) == model.chat(
        "<video>\nlike\n<image>", BLUE, video=str(clip), max_new_tokens=N
    )


def test_frames_are_chosen_as_a_request_says_in_vllms_words(server: Server, model: ChatModel, clip: Path) -> None:
    part, what = shown(data(clip.read_bytes())), words("What moves?")
    for asked, sampling in {
        (("num_frames", 2),): {"uniform": 2, "distinct": True},
        (("fps", 8.0),): {"fps": 8.0, "distinct": True},
        (("fps", 8.0), ("num_frames", 3)): {"fps": 8.0, "max": 3, "distinct": True},
    }.items():
        expected = model.chat("What moves?", video=Video(str(clip), sampling), max_new_tokens=N)  # type: ignore[arg-type]
        assert ask(server, part, what, extra_body={"media_io_kwargs": {"video": dict(asked)}}) == expected, asked


def test_frames_may_be_sent_as_images_with_their_times_or_without(server: Server, model: ChatModel, clip: Path) -> None:
    frames, what = decode_all(clip), words("What moves?")
    some = [jpeg(frame) for frame in frames[:6]]
    joined = "data:video/jpeg;base64," + ",".join(base64.b64encode(file).decode() for file in some)
    expected = model.chat("What moves?", video=some, max_new_tokens=N)
    assert ask(server, shown(joined), what) == expected, "vLLM's form: all of them"
    listed = [data(file, "image/jpeg") for file in some]
    assert ask(server, {"type": "video", "video": listed}, what) == expected
    times = [0, 0.1, 0.2, 0.3, 0.4, 2.5]
    timed = model.chat("What moves?", video=list(zip(some, times, strict=True)), max_new_tokens=N)
    assert ask(server, {"type": "video", "video": listed, "times": times}, what) == timed != expected


def test_usage_counts_the_frames_and_responses_take_videos_too(server: Server, model: ChatModel, clip: Path) -> None:
    video = data(clip.read_bytes())
    reply = server.openai.chat.completions.create(
        model="video",
        messages=[user(shown(video), words("What moves?"))],
        max_tokens=N,  # type: ignore[arg-type]
    )
    assert reply.usage is not None and reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.model_dump()["image_tokens"] == 4 * 4
    expected = model.chat("What moves?", video=str(clip), max_new_tokens=N)
    for part in (
        {"type": "input_file", "filename": "clip.mp4", "file_data": video},
        {"type": "input_video", "video_url": video},
    ):
        content = [part, {"type": "input_text", "text": "What moves?"}]
        asked: Any = [{"role": "user", "content": content}]
        response = server.openai.responses.create(model="video", input=asked, max_output_tokens=N)
        assert response.output_text == expected


VIDEO = "messages[0].content[0].video_url"
LIST = {"type": "video", "video": [data(png(RED), "image/png")] * 2}
REFUSED: dict[str, tuple[Any, str, str | None, str | None]] = {
    "no file": (
        shown("/etc/passwd"),
        "videos come as data URIs (data:video/mp4;base64,...)",
        VIDEO,
        "invalid_video_url",
    ),
    "file URL": (shown("file:///etc/passwd"), "videos come as data URIs", VIDEO, "invalid_video_url"),
    "http": (shown("http://10.0.0.1/x.mp4"), "this server fetches from 127.0.0.1:", VIDEO, "invalid_video_url"),
    "image": (shown(data(png(RED), "image/png")), "must be data:video/...;base64,", VIDEO, "invalid_video_url"),
    "number": ({"type": "video_url", "video_url": 5}, "must be a data URI", VIDEO, "invalid_video_url"),
    "no base64": (shown("data:video/mp4;base64,!"), "is no base64", VIDEO, "invalid_base64_video"),
    "junk": (shown(data(b"hello")), "video 1 of the request: cannot be read as a video", "messages", "invalid_video"),
    "list": (shown(data(b"ffconcat version 1.0\nfile /etc/passwd\n")), "cannot be read", "messages", "invalid_video"),
    "no frames": ({"type": "video", "video": []}, "one at least", "messages[0].content[0].video", "invalid_video"),
    "times": (LIST | {"times": [1, 0]}, "ascending", "messages[0].content[0].times", "invalid_video"),
    "infinite": (LIST | {"times": [0, True]}, "from 0 on", "messages[0].content[0].times", "invalid_video"),
    "many frames": (LIST | {"video": LIST["video"] * 5}, "show 10 frames; at most 8", "messages", "video_too_large"),
    "torn frame": (
        LIST | {"video": [data(png(RED)[:60], "image/png")]},
        "frame 1 of video 1",
        "messages",
        "invalid_video",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_video_or_too_much_is_refused_with_its_field(server: Server, case: str) -> None:
    part, message, param, code = REFUSED[case]
    with pytest.raises(openai.BadRequestError) as caught:
        ask(server, part, words("What?"))
    assert message in caught.value.message and (caught.value.param, caught.value.code) == (param, code)
    assert "/tmp" not in caught.value.message


def test_files_are_held_to_the_limits_of_frames_pixels_and_bytes(server: Server, tmp_path: Path, clip: Path) -> None:
    url = shown(data(clip.read_bytes()))

    def refused(*parts: Any, kind: type[openai.APIStatusError] = openai.BadRequestError, **video: Any) -> str:
        with pytest.raises(kind) as caught:
            ask(server, *parts, words("?"), extra_body={"media_io_kwargs": {"video": video}} if video else None)
        return caught.value.message

    assert "show 9 frames; at most 8" in refused(url, num_frames=9)
    assert "show 12 frames; at most 8" in refused(url, url, url), "also those that are kept from before"
    assert "no video, only sound" in refused(shown(data(write_sound(tmp_path / "sound.mp4").read_bytes())))
    assert "4 images; this server takes 3 at most, videos counted in" in refused(url, url, url, url)
    assert "num_frames" in refused(url, num_frames=0) and "unknown" not in refused(url, frames=3)
    refused(shown(data(b"\0" * 1_000_000)), kind=openai.APIStatusError)
    with pytest.raises(openai.BadRequestError, match="1 times `<video>`"):
        ask(server, url, url, words("<video>?"))


def test_videos_of_named_hosts_are_fetched_and_no_image_for_one(
    server: Server, host: _Server, clip: Path, model: ChatModel
) -> None:
    host.files["/clip.mp4"] = ("video/mp4", clip.read_bytes())
    expected = model.chat("What moves?", video=str(clip), max_new_tokens=N)
    assert ask(server, shown(place(host, "/clip.mp4")), words("What moves?")) == expected
    for path, message in {"/red.png": "is image/png, no video", "/none": "status 404"}.items():
        with pytest.raises(openai.BadRequestError, match=message) as caught:
            ask(server, shown(place(host, path)), words("What moves?"))
        assert (caught.value.param, caught.value.code) == (VIDEO, "invalid_video_url")


def test_decoding_that_takes_too_long_is_ended(clip: Path) -> None:
    reader = FrameReader(SamplingSpec(uniform=4), VideoLimits(frames=64, pixels=10**9, seconds=1e-9))
    with pytest.raises(
        ApiError, match=r"video 1: to decode the request's videos takes too long; at most 1e-09 s"
    ) as caught:
        reader.read(VideoFile(clip.read_bytes()), "video 1", lambda image: image)
    assert caught.value.code == "video_too_large"
    long = FrameReader(SamplingSpec(uniform=4), VideoLimits(frames=64, pixels=10**9, seconds=60))
    found = long.read(VideoFile(clip.read_bytes()), "video 1", lambda image: image.tobytes())
    assert found == [image.tobytes() for image in read_frames(clip, [0, 6, 12, 19])]
    small = FrameReader(SamplingSpec(uniform=4), VideoLimits(frames=64, pixels=4 * 64 * 48 - 1, seconds=60))
    with pytest.raises(ApiError, match=r"have 12,288 pixels; at most 12,287"):
        small.read(VideoFile(clip.read_bytes()), "video 1", lambda image: image)


def test_a_model_that_saw_no_videos_says_how_to_ask(clip: Path) -> None:
    reader = FrameReader(None, VideoLimits(frames=64, pixels=10**9, seconds=60))
    with pytest.raises(ApiError, match='"media_io_kwargs"') as caught:
        reader.read(VideoFile(clip.read_bytes()), "video 1", lambda image: image)
    assert caught.value.param == "media_io_kwargs"

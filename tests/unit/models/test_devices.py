"""Devices by name: what is not there is refused, never replaced."""

from __future__ import annotations

import pytest
import torch

from tests.unit.models.llms import tiny_llm
from tinylmm.errors import UserError
from tinylmm.models.devices import named_device, to_precision

GPU = torch.cuda.is_available()


def test_auto_takes_a_gpu_where_there_is_one_and_cpu_is_always_there() -> None:
    assert named_device("auto").type == ("cuda" if GPU else "cpu")
    assert named_device("cpu") == torch.device("cpu")


@pytest.mark.skipif(GPU, reason="there is a GPU")
@pytest.mark.parametrize("wanted", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_refused(wanted: str) -> None:
    with pytest.raises(UserError, match=f"device is '{wanted}', but no CUDA GPU was found"):
        named_device(wanted)


@pytest.mark.parametrize("wanted", ["gpu", "cuda:x", "cpu:0", "mps:1"])
def test_a_device_of_another_name_is_refused_with_those_allowed(wanted: str) -> None:
    with pytest.raises(UserError, match=f"device is '{wanted}'; allowed: auto, cpu, cuda, cuda:N and mps"):
        named_device(wanted)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is an Apple GPU")
def test_an_apple_gpu_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"device is 'mps', but torch \S+ finds no Apple GPU.*Use device=cpu"):
        named_device("mps")


@pytest.mark.parametrize("name", ["tinyllama", "phi2", "qwen2_0_5b", "gemma", "gemma3_270m", "stablelm2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotary_frequencies_keep_their_precision_when_weights_are_cast(name: str, dtype: torch.dtype) -> None:
    llm = tiny_llm(name, seed=0)
    before = {key: buffer.clone() for key, buffer in llm.named_buffers() if "inv_freq" in key}
    to_precision(llm, torch.device("cpu"), dtype)
    after = {key: buffer for key, buffer in llm.named_buffers() if "inv_freq" in key}
    assert before and all(torch.equal(after[key], before[key]) and after[key].dtype == torch.float32 for key in before)
    assert {parameter.dtype for parameter in llm.parameters()} == {dtype}


@torch.no_grad()
def test_a_cast_model_says_nearer_what_it_said_far_into_a_text() -> None:
    exact, ours, plain = (tiny_llm("tinyllama", seed=0).eval() for _ in range(3))
    to_precision(ours, torch.device("cpu"), torch.bfloat16)
    plain.to(torch.bfloat16)
    ids = torch.arange(24)[None] % 50 + 3
    positions = torch.arange(24)[None] * 60  # a gap of 60 stands for a long text
    wanted = exact(input_ids=ids, position_ids=positions).logits
    off = [(one(input_ids=ids, position_ids=positions).logits.float() - wanted).abs().mean() for one in (ours, plain)]
    assert off[0] < 0.7 * off[1]

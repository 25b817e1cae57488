"""Devices by name: what is not there is refused, never replaced."""

from __future__ import annotations

import pytest
import torch

from tinylmm.errors import UserError
from tinylmm.models.devices import named_device

GPU = torch.cuda.is_available()


def test_auto_takes_a_gpu_where_there_is_one_and_cpu_is_always_there() -> None:
    assert named_device("auto").type == ("cuda" if GPU else "cpu")
    assert named_device("cpu") == torch.device("cpu")


@pytest.mark.skipif(GPU, reason="there is a GPU")
@pytest.mark.parametrize("wanted", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_refused(wanted: str) -> None:
    with pytest.raises(UserError, match=f"device is '{wanted}', but no CUDA GPU was found"):
        named_device(wanted)


@pytest.mark.parametrize("wanted", ["gpu", "cuda:x", "cpu:0", "mps"])
def test_a_device_of_another_name_is_refused_with_those_allowed(wanted: str) -> None:
    with pytest.raises(UserError, match=f"device is '{wanted}'; allowed: auto, cpu, cuda and cuda:N"):
        named_device(wanted)

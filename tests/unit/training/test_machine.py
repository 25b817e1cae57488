"""A training's process on a CPU keeps memory for its next tensor."""

from __future__ import annotations

import subprocess
import sys

import pytest

BLOCKS = """
import ctypes, torch
from tinylmm.training.machine import prepare_machine

class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    _fields_ = [(name, ctypes.c_size_t) for name in names]

info = ctypes.CDLL("libc.so.6").mallinfo2
info.restype = Info

def of_the_kernel():
    before = info().hblks
    tensor = torch.ones(5_000_000)
    return info().hblks - before

plain = of_the_kernel()
prepare_machine(torch.device("cpu"))
print(plain, of_the_kernel())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_a_tensor_is_no_longer_a_block_that_goes_back_to_the_kernel() -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKS], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "0"]

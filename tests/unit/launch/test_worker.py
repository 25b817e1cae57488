"""How a rank ends."""

from __future__ import annotations

import subprocess
import sys

INTERRUPTED = """
import sys

class Interrupted:
    def find_spec(self, name, path, target=None):
        if name == "torch._meta_registrations":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupted())
try:
    import torch
except KeyboardInterrupt:
    sys.meta_path.pop(0)
    from tinylmm.launch.worker import _leave_ranks
    _leave_ranks(75)
"""


def test_a_rank_that_is_stopped_while_it_imports_torch_ends_with_its_own_code() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (75, "")

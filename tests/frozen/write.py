"""Writes the frozen values anew, on purpose: `python -m tests.frozen.write [NAME...]`, from the repository's folder.

Do it only for a change of results that is meant and told in CHANGELOG.md: with other digests, what people have in their
stores is not found any more. Read the diff before you commit it. Tests never write.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from tests.frozen import product
from tests.frozen.record import FOLDER, RECORDS


def main(names: list[str]) -> int:
    """Write the named files, or all; each is made in an empty folder."""
    for variable in ("TINYLMM_STORE", "TINYLMM_DATA"):
        os.environ.pop(variable, None)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # as the tests compose
    product.freeze_versions(dict.__setitem__)
    home = Path.cwd()
    for name in names or RECORDS:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                text = json.dumps(RECORDS[name](Path(folder)), indent=1, ensure_ascii=False)
            finally:
                os.chdir(home)
        (FOLDER / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")
        sys.stdout.write(f"{name}.json is written\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Rows of parquet files as records, images embedded in them included (`datasets` writes them as {"bytes", "path"}).

The conversation is in `messages` (OpenAI), `conversations` (LLaVA, ShareGPT) or `texts` (the_cauldron), images in `image`
or `images`, paths of videos in `video` or `videos`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinylmm.errors import DataError

ROWS_AT_ONCE = 64
"""Rows in memory at a time: their images are in them."""
CONVERSATIONS = ("messages", "conversations", "texts")
COLUMNS = ("id", "system", "image", "images", "video", "videos", *CONVERSATIONS)


def parquet_files(path: Path) -> list[Path]:
    """Return the file itself, or a folder's `.parquet` files by name (`train-00000-of-00010.parquet`, ...).

    Raises:
        DataError: the folder has none.
    """
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.parquet"))
    if not files:
        raise DataError(f"{path}: the folder holds no .parquet file. Name the folder that does.")
    return files


def count_rows(path: Path) -> int:
    """Rows of a parquet file, or of all those in a folder; 0 for a file that cannot be read, which `read_rows` says."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return sum(int(pq.ParquetFile(file).metadata.num_rows) for file in parquet_files(path))
    except (pa.ArrowException, OSError):
        return 0


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a parquet file, or of all those in a folder, as plain records.

    Raises:
        DataError: a file is no parquet file, or has no column with conversations.
        OSError: a file is missing or unreadable.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in parquet_files(path):
        with file.open("rb") as handle:  # so that a missing file is an OSError like any other
            try:
                parquet = pq.ParquetFile(handle)
                names = [name for name in COLUMNS if name in parquet.schema_arrow.names]
                if not set(names) & set(CONVERSATIONS):
                    found = ", ".join(parquet.schema_arrow.names)
                    raise DataError(
                        f"{file}: has no column `conversations` (LLaVA, ShareGPT), `messages` (OpenAI) or `texts` "
                        f"(the_cauldron), but {found}. "
                        "Rename the column that holds the conversations."
                    )
                for batch in parquet.iter_batches(ROWS_AT_ONCE, columns=names):
                    yield from batch.to_pylist()
            except pa.ArrowException as error:
                raise DataError(f"{file}: no readable parquet file ({error}). Fetch or write it again.") from error

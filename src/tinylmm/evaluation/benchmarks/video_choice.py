"""Multiple choice about videos: what the readers and scorers of MVBench, Video-MME, MLVU, MMVU and LongVideoBench share.

All are asked and read as the scripts of TinyLLaVA-Video do, unless a variant says otherwise: options by letter, a suffix, its
parser, and where that reads nothing a guess, drawn from the item's id and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.choice import LETTER_SUFFIX, guess, lettered, listing, parse_leading
from tinylmm.evaluation.benchmarks.records import Answer, Item, ItemScore, Scores
from tinylmm.evaluation.benchmarks.scoring import Graded, Metrics, count_items, graded
from tinylmm.evaluation.benchmarks.video import VideoRef

Reading = Callable[[Item, str], ItemScore | None]
"""What an answer's text is worth; None where it says nothing, and the protocol draws a letter."""


def choices(record: Mapping[str, Any], where: str) -> tuple[dict[str, str], list[str]]:
    """Options by letter, and the letters whose text is the answer, of a record with `candidates` and `answer` in words.

    Raises:
        DataError: the candidates are no list, or the answer is none of them; `where` names file and record.
    """
    if not isinstance(record["candidates"], list):
        raise DataError(f"{where}: candidates {record['candidates']!r} are no list. Fetch the file again.")
    options = lettered(str(text) for text in record["candidates"])
    gold = [letter for letter, text in options.items() if text == str(record["answer"])]
    if not gold:
        raise DataError(f"{where}: answer {record['answer']!r} is no candidate. Fetch the file again.")
    return options, gold


def known_letter(letter: Any, options: Mapping[str, str], where: str) -> str:
    """The right letter as a file gives it.

    Raises:
        DataError: it is none of the options.
    """
    if letter not in options:
        raise DataError(f"{where}: answer {letter!r} is no option. Fetch the file again.")
    return str(letter)


def bracketed_prompt(question: str, options: Mapping[str, str]) -> str:
    """As MVBench and MLVU are asked: `(A) text` a line."""
    return f"{question}\n{listing(options, '({}) {}').rstrip()}\n{LETTER_SUFFIX}"


def numbered_item(
    task: str, number: int, question: str, options: Mapping[str, str], gold: str, video: VideoRef
) -> Item:
    """An item of a benchmark whose files have no ids: `<task>/<number>`."""
    return Item(
        item_id=f"{task}/{number}",
        question_id=f"{task}/{number}",
        prompt=bracketed_prompt(question, options),
        images=(video.shown,),
        category=task,
        reference={"options": options, "answer": gold, "question": question, "video": video},
        options=len(options),
    )


def by_leading_letter(item: Item, text: str) -> ItemScore | None:
    """TinyLLaVA-Video's reading."""
    letter = parse_leading(text, item.reference["options"])
    return None if letter is None else by_letter(item, letter)


def by_letter(item: Item, letter: str | None) -> ItemScore:
    """Right if it is the right letter."""
    return ItemScore(item.item_id, float(letter == item.reference["answer"]), letter)


def scores_of(
    benchmark: Benchmark,
    variant: str,
    items: Sequence[Item],
    answers: Mapping[str, Answer],
    read: Reading,
    metrics: Callable[[Graded], Metrics],
    **more: int,
) -> Scores:
    """Score every item: without an answer it is wrong, else by what is read.

    Args:
        read: of an answer. A row with a score of None leaves every metric, and is counted as `left_out` and `unparsed`.
        metrics: of the items that have a score.
        more: counts of the benchmark's own.
    """
    rows, guessed = [], 0
    for item in items:
        answer = answers.get(item.item_id)
        row = ItemScore(item.item_id, 0.0) if answer is None else read(item, answer.text)
        if row is None:
            guessed += 1
            drawn = guess(item.item_id, list(item.reference["options"]))
            row = ItemScore(item.item_id, float(drawn == item.reference["answer"]))
        rows.append(row)
    left_out = sum(row.score is None for row in rows)
    counts = count_items(items, answers, rows, guessed=guessed, left_out=left_out, **more)
    counts["unparsed"] += left_out
    found = metrics(graded(items, rows))
    return Scores(benchmark.name, variant, found.aggregate, tuple(rows), counts, found.bases)

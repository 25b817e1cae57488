"""The digests of all stages are those of before: finished stages in people's stores stay theirs whatever is moved here."""

from __future__ import annotations

import pytest

from tests.frozen.combinations import COMBINATIONS, NAMES_AND_PLACES, SPECIMENS
from tests.frozen.record import composed, digest_lines, frozen, identity


def test_every_combination_is_frozen() -> None:
    assert list(frozen("digests")) == list(COMBINATIONS)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_no_stage_of_a_combination_moved(name: str) -> None:
    before, now = frozen("digests")[name], digest_lines(composed(COMBINATIONS[name]))
    moved = [f"  - {line}" for line in before if line not in now] + [
        f"  + {line}" for line in now if line not in before
    ]
    assert not moved, "\n".join([f"stages of '{name}' moved (- frozen, + now):", *moved])
    assert now == before, f"stages of '{name}' are in another order"


@pytest.mark.parametrize("name", SPECIMENS)
def test_what_a_stage_is_identified_by_is_what_it_was(name: str) -> None:
    stages = composed(COMBINATIONS[name])
    found = {stage.name: identity(stage, stages) for stage in stages if stage.name in SPECIMENS[name]}
    assert found == frozen("specs")[name]


@pytest.mark.parametrize("what", NAMES_AND_PLACES)
def test_how_where_and_under_which_name_decides_nothing(what: str) -> None:
    same, words = NAMES_AND_PLACES[what]
    before = {line.split()[-1] for line in frozen("digests")[same]}
    assert {stage.digest for stage in composed(words)} == before, f"'{what}' decides a digest of '{same}'"

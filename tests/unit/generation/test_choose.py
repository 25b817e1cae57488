"""Choices follow the settings, and near-ties are seen whether tokens are the likeliest or drawn."""

from __future__ import annotations

import pytest
import torch

from tinylmm.generation.choose import Chooser, Sampling

CPU = torch.device("cpu")


def test_a_lead_that_rounding_explains_is_a_doubt_and_an_honest_one_is_none() -> None:
    logits = torch.tensor([[10.0, 9.9999, 0.0], [10.0, 9.9, 0.0]])
    tokens, doubts = Chooser(Sampling(), 2, CPU)(logits, [0, 1], [[], []])
    assert tokens.tolist() == [0, 0] and doubts == [True, False]
    assert Chooser(Sampling(), 2, CPU, doubts=False)(logits, [0, 1], [[], []])[1] == [False, False]
    assert Chooser(Sampling(), 2, CPU)(logits.bfloat16(), [0, 1], [[], []])[1] == [False, False]


def test_a_draw_is_torchs_own_and_each_row_draws_as_if_alone() -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(temperature=1.3, top_k=50, seed=4)
    choose, single = Chooser(sampling, 5, CPU), torch.Generator().manual_seed(4)
    chances = sampling.processors()(torch.empty(5, 0, dtype=torch.long), logits).softmax(-1)
    first, _ = choose(logits, range(5), [[]] * 5)
    assert int(first[2]) == int(torch.multinomial(chances[2], 1, generator=single))
    second, _ = choose(logits[[2, 4]], [2, -1], [[1]] * 5)
    assert int(second[0]) == int(torch.multinomial(chances[2], 1, generator=single))


def test_a_draw_that_rounding_could_turn_is_a_doubt() -> None:
    draws = [Chooser(Sampling(temperature=1.0, seed=seed), 1, CPU) for seed in range(400)]
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(0))
    moved = logits + 1e-6 * torch.randn(1, 300, generator=torch.Generator().manual_seed(1))
    for number, choose in enumerate(draws):
        token, (doubt,) = choose(logits, [0], [[]])
        again, _ = Chooser(Sampling(temperature=1.0, seed=number), 1, CPU)(moved, [0], [[]])
        assert doubt or int(token) == int(again)


def test_a_penalty_counts_the_answer_so_far_and_rows_that_have_ended_do_not_matter() -> None:
    logits = torch.tensor([[4.0, 3.0, 0.0], [4.0, 3.0, 0.0], [4.0, 3.0, 0.0]])
    choose = Chooser(Sampling(repetition_penalty=2.0), 4, CPU)
    tokens, _ = choose(logits, [3, -1, 0], [[1, 1], [], [0], [0, 2]])
    assert tokens[[0, 2]].tolist() == [1, 0]


def test_logits_that_are_not_finite_are_an_error_also_when_drawing() -> None:
    for sampling in (Sampling(), Sampling(temperature=1.0)):
        with pytest.raises(FloatingPointError, match="not finite"):
            Chooser(sampling, 1, CPU)(torch.tensor([[1.0, float("nan")]]), [0], [[]])


def test_settings_may_be_whole_numbers() -> None:
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(0))
    whole, real = (
        Sampling(temperature=2, top_p=1, repetition_penalty=3),
        Sampling(temperature=2.0, repetition_penalty=3.0),
    )
    assert Chooser(whole, 1, CPU)(logits, [0], [[4]])[0] == Chooser(real, 1, CPU)(logits, [0], [[4]])[0]

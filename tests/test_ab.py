"""The judgement of benchmarks/ab.py, over made-up rounds: what differs is said, and nothing else."""

import importlib.util
import random
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("ab", Path(__file__).parent.parent / "benchmarks" / "ab.py")
ab = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ab)


def rounds(*shifts, seed=1, count=24, noise=0.08):
    """So many rounds of a cell for each shift, B/A - 1, in which addresses are worth `noise`."""
    chance = random.Random(seed)
    return [{f"cell {i}": (1 + shift + chance.gauss(0, noise), 100.0, 100.0 * (1 + shift)) for i, shift in enumerate(shifts)}
            for _ in range(count)]  # fmt: skip


def verdicts(*shifts, effect=0.1, **options):
    return [row["verdict"] for row in ab.judge(rounds(*shifts, **options), effect)]


def test_what_does_not_differ_is_not_called_different():
    """In 200 comparisons of ten cells each none."""
    assert {verdict for seed in range(200) for verdict in verdicts(*[0] * 10, seed=seed)} == {"no difference shown"}


def test_what_differs_is_found():
    """Slower and faster, beside what is the same; also with the fewest rounds."""
    for seed in range(20):
        assert verdicts(0.35, 0, -0.3, 0, seed=seed) == ["slower", "no difference shown", "faster", "no difference shown"]
        assert verdicts(0.4, count=12, seed=seed) == ["slower"]


def test_a_sure_difference_below_the_effect_is_none():
    """It is shown with its interval all the same."""
    row, = ab.judge(rounds(0.05, noise=0.001), 0.1)
    assert row["verdict"] == "no difference shown"
    assert row["p"] < 0.001
    assert 1.04 < row["low"] <= row["ratio"] <= row["high"] < 1.06


def test_a_cell_that_one_revision_has_not_is_left_out():
    """measure() leaves it out of each round."""
    found = rounds(0.35, 0)
    assert [row["cell"] for row in ab.judge([{"cell 0": cells["cell 0"]} for cells in found], 0.1)] == ["cell 0"]


@pytest.mark.parametrize(
    ("differences", "p"),
    [([], 1.0), ([0.0] * 9, 1.0), ([1.0] * 3, 0.181), (list(range(1, 25)), 1.942e-5), ([1, -2, 3, -4, 5, -6], 0.834)])
def test_signed_rank(differences, p):
    """The normal approximation, continuity corrected, of Wilcoxon's test."""
    assert ab.signed_rank(differences) == pytest.approx(p, rel=0.01)

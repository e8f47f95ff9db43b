"""Importance of keys, where it is known which of them decides."""

from itertools import product

from tests.tuning.comparison.made import Made, folders
from tuning.comparison.comparing import Comparison, compare_runs
from tuning.comparison.importance import importances


def compared(decides: float) -> Comparison:
    """The learning rate decides by so much; the other key and chance by little."""
    rates, betas = ("1e-4", "1e-3", "1e-2", "1e-1"), ("0.9", "0.95", "0.99")
    made = [
        Made(f"r{a}-b{b}", (f"optimizer.lr={rate}", f"optimizer.beta2={beta}"), loss=3.0 + decides * a + _chance(a, b))
        for (a, rate), (b, beta) in product(enumerate(rates), enumerate(betas))
    ]
    return compare_runs(folders(*made), "a test")


def _chance(a: int, b: int) -> float:
    return 0.01 * ((5 * a + 7 * b) % 11)


def test_the_key_that_decides_is_the_first() -> None:
    found = importances(compared(0.4))
    assert [each.key for each in found.keys] == ["optimizer.lr", "optimizer.beta2"]
    assert found.keys[0].mean > 0.5
    assert abs(found.keys[1].mean) < 0.1
    assert found.words.startswith("A random forest on 12 runs of 12 configurations foretells ")


def test_where_no_key_decides_one_cannot_tell() -> None:
    found = importances(compared(0.0))
    assert found.keys == ()
    assert found.words.startswith("Cannot tell: a forest fitted to these runs foretells 0%")


def test_few_configurations_are_too_few() -> None:
    made = [Made(f"m{n}", (f"optimizer.lr={n + 1}e-3", f"optimizer.beta2=0.{90 + n}")) for n in range(9)]
    found = importances(compare_runs(folders(*made), "a test"))
    assert found.words == "Too few to tell: 9 configurations have an outcome, and it takes 10."


def test_a_single_key_has_nothing_to_be_compared_with() -> None:
    made = [Made(f"m{n}", (f"optimizer.lr={n + 1}e-3",)) for n in range(3)]
    assert importances(compare_runs(folders(*made), "a test")).words == "Nothing to tell: it takes two keys that vary."

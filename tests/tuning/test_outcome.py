"""What trials are asked of each other when a study ends."""

from pathlib import Path

import numpy as np
import pytest

from pipelines.run_folder import RunFolder
from pipelines.token_table import TokenTable
from tuning.outcome import complexities
from tuning.results import TrialKey

TOKENS = 4000


def trial(folder: Path, experts: np.ndarray | None, losses: np.ndarray | None = None) -> RunFolder:
    """A run of token 5 alone; no table at all without experts."""
    folder.mkdir()
    if experts is not None:
        losses = np.zeros(len(experts)) if losses is None else losses
        ids = np.full(len(experts), 5, np.int32)
        TokenTable(ids, losses.astype(np.float32), experts.astype(np.int32)).write(RunFolder(folder).tokens)
    return RunFolder(folder)


def test_experts_are_held_against_the_losses_of_the_reference_of_the_next_seed(tmp_path: Path) -> None:
    order = np.arange(TOKENS)
    # Of seed 0 the losses of seed 1 are asked, of seed 1 those of seed 4, of seed 4 those of seed 0.
    losses = {0: -order, 1: order, 4: np.random.default_rng(0).permutation(order)}
    found = complexities(
        "fixed",
        {
            **{TrialKey(seed, "fixed"): trial(tmp_path / f"f{seed}", order * 0, loss) for seed, loss in losses.items()},
            **{TrialKey(seed, "adaptive"): trial(tmp_path / f"a{seed}", order) for seed in losses},
        },
    )
    assert found[TrialKey(0, "adaptive")] == pytest.approx(1.0)
    assert found[TrialKey(1, "adaptive")] == pytest.approx(0.0, abs=0.05)
    assert found[TrialKey(4, "adaptive")] == pytest.approx(-1.0)
    assert found[TrialKey(0, "fixed")] == 0.0


def test_one_seed_and_trials_without_a_table_have_none(tmp_path: Path) -> None:
    order = np.arange(TOKENS)
    alone = {TrialKey(0, "fixed"): trial(tmp_path / "f", order, order), TrialKey(0, "b"): trial(tmp_path / "b", order)}
    assert complexities("fixed", alone) == {}
    two = {
        TrialKey(s, a): trial(tmp_path / f"{a}{s}", None if s == 1 else order) for s in (0, 1) for a in ("fixed", "b")
    }
    assert complexities("fixed", two) == {}

"""Figures of every validation token at the end of a run."""

from pathlib import Path

import numpy as np
import pytest

from pipelines.data import TokenDataset, ValidationBatches
from pipelines.prepare import prepare
from pipelines.run_folder import RunFolder
from pipelines.token_table import TokenTable
from tests.distributed import run_distributed
from tests.pipelines.small_run import metrics_of, run_loop, small_config

SETTINGS = (
    "validation.per_token=true",
    "model.moe.num_identity_experts=4",
    "model.moe.top_k=3",
    "stability.balance.kind=budget",
    # Windows that do not fill the last batch.
    "validation.max_tokens=2300",
)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEADYMOE_HOME", str(tmp_path / "home"))


def table_of(folder: Path) -> TokenTable:
    return TokenTable.read(RunFolder(folder).tokens)


def test_the_table_holds_the_validation_tokens_in_order_with_the_losses_that_were_reported(tmp_path: Path) -> None:
    run_loop(0, 1, tmp_path / "run", SETTINGS)
    table = table_of(tmp_path / "run")
    config = small_config(*SETTINGS)
    stream = prepare(config.data).validation
    windows = ValidationBatches(TokenDataset(stream, 64), config, 0, 1).windows
    assert table.ids_T.tolist() == [
        token for window in windows for token in stream.read(window * 64, window * 64 + 64).tolist()
    ]
    assert table.losses_T.mean() == pytest.approx(metrics_of(tmp_path / "run", "validation")[12]["val/loss"], rel=1e-5)
    assert 0 <= table.experts_T.min() < table.experts_T.max() <= 3


def test_any_number_of_ranks_leaves_the_same_table(tmp_path: Path) -> None:
    run_loop(0, 1, tmp_path / "one", SETTINGS)
    run_distributed(run_loop, 2, tmp_path / "two", (*SETTINGS, "parallel.expert_parallel=2"))
    one, two = table_of(tmp_path / "one"), table_of(tmp_path / "two")
    assert np.array_equal(one.ids_T, two.ids_T)
    assert np.array_equal(one.experts_T, two.experts_T)
    np.testing.assert_allclose(one.losses_T, two.losses_T, rtol=1e-4)


def test_without_being_asked_a_run_leaves_none(tmp_path: Path) -> None:
    run_loop(0, 1, tmp_path / "run", ())
    assert not RunFolder(tmp_path / "run").tokens.exists()

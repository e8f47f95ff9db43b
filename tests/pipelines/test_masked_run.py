"""A whole run with attention inside documents alone."""

from pathlib import Path

import pytest

from pipelines.outcome import Ending
from tests.distributed import run_distributed
from tests.pipelines.plain_corpus import write_corpus
from tests.pipelines.small_run import metrics_of, run_loop


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEADYMOE_HOME", str(tmp_path / "home"))


def test_it_trains_and_validates_the_same_on_two_ranks_and_otherwise_than_without(tmp_path: Path) -> None:
    # Documents of some 200 bytes, so that every other window of 64 tokens has a border in it.
    write_corpus(tmp_path / "texts")
    settings = (f"data.corpus.paths=[{tmp_path / 'texts'}]", "model.mtp.depth=1")
    masked_settings = (*settings, "data.intra_document_masking=true")
    assert run_loop(0, 1, tmp_path / "masked", masked_settings) == Ending("finished", 12)
    run_distributed(run_loop, 2, tmp_path / "pair", (*masked_settings, "parallel.expert_parallel=2"))
    run_loop(0, 1, tmp_path / "plain", settings)
    for kind, metric in (("train", "train/loss"), ("train", "train/mtp_loss"), ("validation", "val/loss")):
        masked, pair, plain = (metrics_of(tmp_path / name, kind) for name in ("masked", "pair", "plain"))
        assert sorted(masked) == sorted(pair) == sorted(plain)
        for step, metrics in masked.items():
            assert pair[step][metric] == pytest.approx(metrics[metric], rel=1e-5)
        last = max(masked)
        assert masked[last][metric] != pytest.approx(plain[last][metric], rel=1e-4)

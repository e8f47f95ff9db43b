"""Recipes stack on any model, say what they leave out, and train."""

import math
from pathlib import Path
from typing import Any

import pytest

from moe.parallel import join
from moe.trainer import Trainer
from pipelines.config import RunConfig
from pipelines.data import TokenDataset, TrainBatches
from pipelines.loading import PRESETS, load_config
from pipelines.prepare import prepare
from tests.distributed import run_distributed
from tests.pipelines.small_run import SETTINGS

RECIPES = sorted(path.stem for path in (PRESETS / "recipes").glob("*.yaml"))
AFTER_A_REPORT = [name for name in RECIPES if name not in ("plain", "recommended")]


@pytest.mark.parametrize("name", AFTER_A_REPORT)
def test_the_first_line_names_the_source_and_what_is_missing(name: str) -> None:
    first = (PRESETS / "recipes" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# After ")
    assert "Missing: " in first


@pytest.mark.parametrize("model", ["micro", "tiny", "small"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_stacks_on_every_small_model(name: str, model: str) -> None:
    config, below = load_config([model, f"recipes/{name}"]), load_config([model])
    assert config != below
    assert (config.data, config.schedule, config.parallel) == (below.data, below.schedule, below.parallel)
    assert config.optimizer.lr == below.optimizer.lr
    for key in ("hidden_size", "num_layers", "intermediate_size"):
        assert getattr(config.model, key) == getattr(below.model, key)


def test_recipes_are_those_of_the_readme() -> None:
    readme = (PRESETS.parents[1] / "README.md").read_text(encoding="utf-8")
    assert [name for name in RECIPES if f"`recipes/{name}`" not in readme] == []


def losses(rank: int, world: int, home: str, settings: tuple[str, ...]) -> list[float]:
    """Of some steps of the micro model under a recipe."""
    config: RunConfig = load_config(["micro", settings[0]], [*SETTINGS, *settings[1:]])
    shards = prepare(config.data)
    model = config.model.model_copy(update={"vocab_size": shards.manifest.tokenizer.vocab_size})
    config = config.model_copy(update={"model": model})
    ranks = join(config.parallel)
    dataset = TokenDataset(shards.train, config.data.sequence_length, config.model.mtp.depth)
    trainer = Trainer(config, ranks, TrainBatches(dataset, config, ranks.rank, ranks.world))
    return [trainer.step().metrics["train/loss"] for _ in range(12)]


# The two that switch most on; the others with the slow tests.
QUICK = ("deepseek-v4", "longcat-like")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name not in QUICK else ()) for name in AFTER_A_REPORT]
)
def test_a_recipe_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEADYMOE_HOME", str(tmp_path))
    found: list[Any] = losses(0, 1, str(tmp_path), (f"recipes/{name}",))
    assert all(math.isfinite(loss) for loss in found)
    assert found[-1] < found[0] - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", AFTER_A_REPORT)
def test_expert_parallel_ranks_train_a_recipe_like_one_process(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32, where only the order of sums differs; FP8 has a test of its own."""
    monkeypatch.setenv("STEADYMOE_HOME", str(tmp_path))
    settings = (f"recipes/{name}", "precision.compute=fp32", "precision.fp8.kind=none")
    alone = losses(0, 1, str(tmp_path), settings)
    pair = (*settings, "parallel.workers=2", "parallel.expert_parallel=2")
    for found in run_distributed(losses, 2, str(tmp_path), pair, timeout_s=120):
        assert found == pytest.approx(alone, rel=1e-3)

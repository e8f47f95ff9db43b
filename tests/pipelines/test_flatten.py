"""A config as MLflow parameters."""

import json

from pipelines.config import RunConfig
from pipelines.flatten import flatten
from pipelines.loading import load_config


def test_every_value_has_its_dotted_key() -> None:
    flat = flatten(load_config(["micro"], ["stability.clip.kind=none"]))
    assert flat["model.moe.num_experts"] == 8
    assert flat["stability.clip.kind"] == "none"
    assert "stability.clip.max_norm" not in flat
    assert flat["model.vocab_size"] is None


def test_the_flat_keys_are_the_settings_that_make_the_same_config() -> None:
    faults = (
        "faults=[{kind: corrupted_batches, share: 1e-5}, {kind: corrupted_batches, share: 1, content: shuffled_tokens}]"
    )
    config = load_config(["micro"], ["optimizer.lr=1e-5", "seed=7", faults])
    assert len(config.faults) == 2
    # A list is its JSON text already.
    lists = ("faults", "data.domains", "response.rungs", "validation.at_steps")
    settings = [f"{key}={value if key in lists else json.dumps(value)}" for key, value in flatten(config).items()]
    assert load_config([], settings) == config


def test_a_list_becomes_json_text() -> None:
    config = RunConfig.model_validate({"data": {"corpus": {"kind": "files", "paths": ["a", "b,c"]}}})
    assert flatten(config)["data.corpus.paths"] == '["a", "b,c"]'

"""Classes of documents: which token is of which, on every rank, in training and validation."""

from typing import Any

import pytest
import torch

from pipelines.config import RunConfig
from pipelines.data import TokenDataset, TrainBatches, ValidationBatches
from pipelines.domains import DocumentClasses
from pipelines.loading import load_config
from pipelines.shards import Shards
from tests.pipelines.plain_corpus import PlainCorpus

S = 32
# Neighbours in the stream differ often.
DOMAINS = [["*[02468].txt", "b/*1.txt"], ["b/*"]]


def config_of(world: int = 1, **changes: Any) -> RunConfig:
    tree = {
        "model": {"moe": {"bias_domains": 3}, "mtp": {"depth": 1}},
        "parallel": {"workers": world},
        "data": {"global_batch_size": 8, "micro_batch_size": 2, "sequence_length": S, "domains": DOMAINS},
        "validation": {"max_tokens": 5 * S},
    }
    return RunConfig.model_validate(tree | changes)


def plain_class(name: str) -> int:
    """The first list with a match, from 1; 0 without."""
    in_b, last = name.startswith("b/"), int(name.removesuffix(".txt")[-1])
    if last % 2 == 0 or (in_b and last == 1):
        return 1
    return 2 if in_b else 0


@pytest.mark.parametrize("stages", [False, True])
def test_every_token_of_a_batch_has_the_class_of_its_document(shards: Shards, plain: PlainCorpus, stages: bool) -> None:
    """Read by several ranks in micro-batches, also where samples are divided, with the token read ahead."""
    tokens, classes = zip(*((token, plain_class(name)) for name, token in plain.train()), strict=True)
    changes: dict[str, Any] = {}
    if stages:
        changes["schedule"] = {"kind": "stages", "stages": [{"steps": 40, "sequence_length": S // 8}]}
    length = S // 8 if stages else S
    seen = set()
    for rank in range(2):
        batches = TrainBatches(TokenDataset(shards.train, S, 1), config_of(2, **changes), rank, 2)
        for step in range(30):
            starts = [sample * S + at for sample in batches.sample_ids(step).tolist() for at in range(0, S, length)]
            mine = iter(starts[4 * rank : 4 * rank + 4])
            for batch in batches(step):
                assert batch.domains_BL is not None
                assert batch.domains_BL.dtype == torch.int64
                for ids, domains, start in zip(batch.ids_BL.tolist(), batch.domains_BL.tolist(), mine, strict=False):
                    window = slice(start, start + length + 2)
                    assert (ids, domains) == (list(tokens[window]), list(classes[window]))
                    seen |= set(domains)
            assert next(mine, None) is None
    assert seen == {0, 1, 2}


def test_validation_has_classes_too_and_padding_is_of_class_0(shards: Shards, plain: PlainCorpus) -> None:
    classes = [plain_class(name) for name, _ in plain.validation()]
    found = []
    for rank in range(2):
        held_out = ValidationBatches(TokenDataset(shards.validation, S, 1), config_of(2), rank, 2)
        for number, batch in enumerate(held_out):
            assert batch.domains_BL is not None
            assert batch.domains_BL.shape == batch.ids_BL.shape
            windows = held_out.windows[(number * 2 + rank) * 2 :][:2]
            for window, domains in zip(windows, batch.domains_BL.tolist(), strict=False):
                assert domains == classes[window * S : window * S + S + 2]
                found.append(window)
            if batch.real_BL is not None:
                assert not batch.domains_BL[~batch.real_BL].any()
                assert batch.domains_BL.any() == batch.real_BL.any(), "else the place of padding would not show"
    assert sorted(found) == held_out.windows


def test_without_classes_a_batch_has_none(shards: Shards) -> None:
    config = RunConfig.model_validate({"data": {"sequence_length": S, "global_batch_size": 4}})
    assert all(b.domains_BL is None for b in TrainBatches(TokenDataset(shards.train, S), config, 0, 1)(0))


def test_a_document_is_matched_once(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def match(name: str, pattern: str) -> bool:
        calls.append(name)
        return False

    monkeypatch.setattr("pipelines.domains.fnmatchcase", match)
    classes = DocumentClasses(shards.train, [["x"]])
    for _ in range(3):
        assert not classes.read(0, len(shards.train)).any()
    assert len(calls) == len(set(calls)) > 20


def test_classes_are_set_on_the_command_line() -> None:
    config = load_config(["micro"], ['data.domains=[["test/*", "*/tests/*"]]', "model.moe.bias_domains=2"])
    assert config.data.domains == [["test/*", "*/tests/*"]]


@pytest.mark.parametrize(
    ("domains", "biases", "named"),
    [
        (DOMAINS, 2, r"bias_domains \(2\) is not the number of classes: data.domains makes 3 .* set bias_domains to 3"),
        ([], 2, r"bias_domains \(2\) is not .* data.domains has none .* set bias_domains to 1, or give 1 list"),
        ([["a"]], 1, r"bias_domains \(1\) is not .* makes 2 classes"),
        ([[]], 2, "at least 1 item"),
    ],
)
def test_classes_and_biases_that_do_not_match_are_refused(domains: Any, biases: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        RunConfig.model_validate({"model": {"moe": {"bias_domains": biases}}, "data": {"domains": domains}})

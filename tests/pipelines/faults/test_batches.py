"""Batches that are corrupted on purpose: which, how, and that everything else stays as it was."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.batch import Batch
from moe.parallel import join
from moe.trainer import Trainer
from pipelines.config import RunConfig
from pipelines.data import TokenDataset, TrainBatches
from pipelines.faults.batches import corrupted_steps, with_faults
from pipelines.prepare import prepare
from pipelines.shards import Shards
from tests.pipelines.plain_corpus import write_corpus
from tests.pipelines.small_run import small_config

S = 32
STEPS = 40
HALF: dict[str, Any] = {"kind": "corrupted_batches", "share": 0.5}
SHUFFLED = {**HALF, "content": "shuffled_tokens"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    plain = write_corpus(tmp_path_factory.mktemp("texts"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEADYMOE_HOME", str(tmp_path_factory.mktemp("home")))
        return prepare(plain.config())


def _config(*faults: dict[str, Any], steps: int = STEPS, seed: int = 0, workers: int = 1, **data: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "seed": seed,
            "schedule": {"kind": "simple", "steps": steps, "warmup_steps": 1},
            "parallel": {"workers": workers},
            "data": {"global_batch_size": 8, "sequence_length": S, **data},
            "faults": [{"kind": "corrupted_batches", **fault} for fault in faults],
        }
    )


def _steps(*faults: dict[str, Any], **changes: Any) -> frozenset[int]:
    return corrupted_steps(_config(*faults, **changes))


def _clean(shards: Shards, config: RunConfig, rank: int = 0, lookahead: int = 0) -> TrainBatches:
    return TrainBatches(TokenDataset(shards.train, S, lookahead), config, rank, config.parallel.workers)


def _ids(batches: Sequence[Batch]) -> torch.Tensor:
    return torch.cat([batch.ids_BL for batch in batches])


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.97])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_share_is_met_as_independent_draws_meet_it(share: float, seed: int) -> None:
    steps = 20_000
    hit = _steps({"share": share}, steps=steps, seed=seed)
    # Five standard deviations of a binomial count, in the whole schedule and in its first quarter.
    for end in (steps, steps // 4):
        found = sum(step <= end for step in hit)
        assert abs(found - end * share) < 5 * math.sqrt(end * share * (1 - share))
    # Neighbours are hit independently of each other; the variance counts that pairs overlap.
    pairs = sum(step + 1 in hit for step in hit)
    assert abs(pairs - steps * share**2) < 5 * math.sqrt(steps * share**2 * (1 - share) * (1 + 3 * share))


def test_a_share_of_one_hits_every_step() -> None:
    assert _steps({"share": 1}) == frozenset(range(1, STEPS + 1))


def test_seeds_and_places_in_the_list_hit_different_steps_and_contents_the_same() -> None:
    hit = _steps(HALF, steps=1000)
    assert 400 < len(hit ^ _steps(HALF, steps=1000, seed=1)) < 600
    assert 200 < len(_steps(HALF, HALF, steps=1000) - hit) < 300
    assert _steps(SHUFFLED, steps=1000) == hit


def test_a_larger_share_a_later_start_and_a_longer_schedule_leave_the_other_choices_alone() -> None:
    hit = _steps(HALF, steps=1000)
    assert _steps({"share": 0.2}, steps=1000) < hit
    assert _steps({**HALF, "from_step": 301}, steps=1000) == {step for step in hit if step > 300}
    assert _steps(HALF, steps=500) == {step for step in hit if step <= 500}


def test_the_choices_stay_the_same_from_version_to_version() -> None:
    # A run that is resumed, and a study that goes on, rely on it.
    assert sorted(_steps({"share": 0.1}, seed=1, steps=100)) == [2, 7, 29, 46, 53, 55, 65, 93]


def test_no_fault_is_no_wrapper(shards: Shards) -> None:
    config = _config()
    clean = _clean(shards, config)
    assert with_faults(clean, config) is clean
    assert corrupted_steps(config) == frozenset()


@pytest.mark.parametrize("fault", [HALF, SHUFFLED, {**HALF, "from_step": 20}])
def test_the_steps_named_are_those_that_differ_and_the_others_are_untouched(
    shards: Shards, fault: dict[str, Any]
) -> None:
    config = _config(fault, micro_batch_size=2)
    clean = _clean(shards, config)
    faulty = with_faults(clean, config)
    assert len(faulty(0)) == 4
    differing = {step + 1 for step in range(STEPS) if not torch.equal(_ids(faulty(step)), _ids(clean(step)))}
    assert differing == corrupted_steps(config)
    assert 0 < len(differing) < STEPS


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2, None])
@pytest.mark.parametrize("faults", [(HALF,), (SHUFFLED,), (HALF, SHUFFLED)])
def test_ranks_together_read_the_batch_that_one_rank_reads(
    shards: Shards, world: int, micro: int | None, faults: tuple[dict[str, Any], ...]
) -> None:
    alone = _config(*faults)
    many = _config(*faults, workers=world, micro_batch_size=micro)
    whole = with_faults(_clean(shards, alone), alone)
    ranks = [with_faults(_clean(shards, many, rank), many) for rank in range(world)]
    assert corrupted_steps(alone) == corrupted_steps(many)
    for step in range(STEPS):
        assert torch.equal(torch.cat([_ids(rank(step)) for rank in ranks]), _ids(whole(step)))


def test_every_sequence_repeats_its_own_first_tokens_to_its_end(shards: Shards) -> None:
    for ngram, lookahead in ((1, 0), (4, 0), (4, 1), (5, 0), (16, 1)):
        config = _config({"share": 1, "ngram_tokens": ngram})
        clean = _clean(shards, config, lookahead=lookahead)
        rows = _ids(with_faults(clean, config)(3)).tolist()
        for row, before in zip(rows, _ids(clean(3)).tolist(), strict=True):
            expected: list[int] = []
            while len(expected) < S + 1 + lookahead:
                expected += before[:ngram]
            assert row == expected[: S + 1 + lookahead]


def test_shorter_sequences_of_a_stage_repeat_their_own_tokens(shards: Shards) -> None:
    stages = {"kind": "stages", "stages": [{"steps": 4, "sequence_length": 8}, {"steps": 4}]}
    config = RunConfig.model_validate(_config({"share": 1}).model_dump() | {"schedule": stages})
    clean = _clean(shards, config)
    assert _ids(clean(0)).shape == (8, 9)
    assert _ids(with_faults(clean, config)(0)).tolist() == [(row[:4] * 3)[:9] for row in _ids(clean(0)).tolist()]


def test_a_shuffle_keeps_every_sequences_tokens_and_not_their_order(shards: Shards) -> None:
    config = _config({"share": 1, "content": "shuffled_tokens"})
    clean = _clean(shards, config, lookahead=1)
    faulty = with_faults(clean, config)
    kept = total = 0
    for step in range(STEPS):
        for row, before in zip(_ids(faulty(step)).tolist(), _ids(clean(step)).tolist(), strict=True):
            assert Counter(row) == Counter(before)
            kept += sum(one == other for one, other in zip(row, before, strict=True))
            total += len(row)
    # The text has some ten different bytes, so that every fifth or so comes to stand where its like stood.
    assert kept < 0.4 * total


def test_each_step_is_shuffled_in_an_order_of_its_own() -> None:
    config = _config({"share": 1, "content": "shuffled_tokens"})
    faulty = with_faults(lambda step: [Batch(torch.arange(S)[None])], config)
    orders = {tuple(_ids(faulty(step))[0].tolist()) for step in range(STEPS)}
    assert len(orders) == STEPS


@pytest.mark.parametrize("content", ["repeated_ngram", "shuffled_tokens"])
def test_documents_stay_where_they_were(shards: Shards, content: str) -> None:
    config = _config({"share": 1, "content": content}, intra_document_masking=True)
    clean = _clean(shards, config)
    for faulty, before in zip(with_faults(clean, config)(0), clean(0), strict=True):
        assert faulty.documents_BL is not None
        assert before.documents_BL is not None
        assert torch.equal(faulty.documents_BL, before.documents_BL)
        assert faulty.real_BL is None


def test_a_batch_with_padding_is_refused() -> None:
    config = _config({"share": 1})
    ids_BL = torch.zeros((2, S + 1), dtype=torch.int64)
    faulty = with_faults(lambda step: [Batch(ids_BL, torch.ones_like(ids_BL, dtype=torch.bool))], config)
    with pytest.raises(ValueError, match="padding"):
        faulty(0)


BAD: dict[str, Any] = {"kind": "corrupted_batch", "step": 5}


@pytest.mark.parametrize("content", ["repeated_ngram", "shuffled_tokens"])
def test_the_samples_of_one_step_are_bad_text_at_that_step_alone(shards: Shards, content: str) -> None:
    config = _config({**BAD, "content": content}, micro_batch_size=2)
    clean = _clean(shards, config)
    faulty = with_faults(clean, config)
    # So few steps that no sample comes twice.
    assert len({sample for step in range(STEPS) for sample in clean.sample_ids(step).tolist()}) == 8 * STEPS
    differing = {step + 1 for step in range(STEPS) if not torch.equal(_ids(faulty(step)), _ids(clean(step)))}
    assert differing == corrupted_steps(config) == {5}
    rows, before = _ids(faulty(4)).tolist(), _ids(clean(4)).tolist()
    assert len(faulty(4)) == 4
    if content == "repeated_ngram":
        assert rows == [(row[:4] * 9)[: S + 1] for row in before]
    else:
        assert [Counter(row) for row in rows] == [Counter(row) for row in before]


def test_bad_samples_that_are_left_out_leave_a_clean_step_and_those_that_are_not_stay_bad(shards: Shards) -> None:
    config = _config(BAD)
    clean = _clean(shards, config)
    faulty = with_faults(clean, config)
    bad = clean.sample_ids(4).tolist()
    spoilt = _ids(faulty(4))
    assert torch.equal(_ids(faulty(4)), spoilt)
    clean.skip(bad[:3], 4)
    assert set(clean.sample_ids(4).tolist()) & set(bad) == set(bad[3:])
    assert torch.equal(_ids(faulty(4))[:3], _ids(clean(4))[:3])
    assert torch.equal(_ids(faulty(4))[3:], spoilt[3:])
    clean.skip(bad[3:], 4)
    assert torch.equal(_ids(faulty(4)), _ids(clean(4)))


def test_bad_samples_are_bad_in_every_epoch_and_wherever_they_are_read(shards: Shards) -> None:
    config = _config({**BAD, "content": "shuffled_tokens"}, steps=400)
    clean = _clean(shards, config)
    faulty = with_faults(clean, config)
    bad = clean.sample_ids(4).tolist()
    spoilt = dict(zip(bad, _ids(faulty(4)).tolist(), strict=True))
    read_again = 0
    for step in range(5, 400):
        for row, before, sample in zip(
            _ids(faulty(step)), _ids(clean(step)), clean.sample_ids(step).tolist(), strict=True
        ):
            assert row.tolist() == spoilt.get(sample, before.tolist())
            read_again += sample in spoilt
    assert read_again >= 8


@pytest.mark.parametrize(("world", "micro"), [(2, None), (4, 1)])
def test_ranks_together_read_the_bad_samples_that_one_rank_reads(shards: Shards, world: int, micro: int | None) -> None:
    stages = {"kind": "stages", "stages": [{"steps": 6, "sequence_length": 16}, {"steps": 4, "global_batch_size": 16}]}
    alone, many = (
        RunConfig.model_validate(_config(BAD, workers=w, micro_batch_size=m).model_dump() | {"schedule": stages})
        for w, m in ((1, None), (world, micro))
    )
    whole = with_faults(_clean(shards, alone), alone)
    ranks = [with_faults(_clean(shards, many, rank), many) for rank in range(world)]
    clean = _clean(shards, alone)
    for step in range(10):
        assert torch.equal(torch.cat([_ids(rank(step)) for rank in ranks]), _ids(whole(step)))
        assert torch.equal(_ids(whole(step)), _ids(clean(step))) == (step != 4)
    # Sequences of half a sample each repeat their own tokens.
    assert _ids(whole(4)).tolist() == [(row[:4] * 5)[:17] for row in _ids(clean(4)).tolist()]


def test_bad_samples_need_batches_that_know_their_samples() -> None:
    with pytest.raises(TypeError, match="unknown in function"):
        with_faults(lambda step: [], _config(BAD))


def _train(folder: Path, *settings: str) -> list[dict[str, float]]:
    """The metrics of every step of a small run."""
    config = small_config(f"data.corpus.paths=[{folder}]", "schedule.steps=8", *settings)
    shards = prepare(config.data)
    vocab_size = shards.manifest.tokenizer.vocab_size
    config = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": vocab_size})})
    dataset = TokenDataset(shards.train, config.data.sequence_length, config.model.mtp.depth)
    batches = with_faults(TrainBatches(dataset, config, 0, 1), config)
    trainer = Trainer(config, join(config.parallel), batches)
    trainer.check_start()
    return [trainer.step().metrics for _ in range(config.steps)]


@pytest.mark.parametrize("content", ["repeated_ngram", "shuffled_tokens"])
def test_a_run_with_faults_repeats_bit_for_bit_and_is_the_clean_one_until_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setenv("STEADYMOE_HOME", str(tmp_path / "home"))
    write_corpus(tmp_path / "texts")
    # Documents of some 200 bytes and an extra token to predict: all that a batch can hold.
    common = ("data.intra_document_masking=true", "model.mtp.depth=1")
    fault = f"faults=[{{kind: corrupted_batches, share: 0.5, from_step: 3, content: {content}}}]"
    first = _train(tmp_path / "texts", *common, fault)
    assert _train(tmp_path / "texts", *common, fault) == first
    clean = _train(tmp_path / "texts", *common)
    hit = min(corrupted_steps(small_config("schedule.steps=8", fault)))
    assert hit >= 3
    assert first[: hit - 1] == clean[: hit - 1]
    assert first[hit - 1]["train/loss"] != pytest.approx(clean[hit - 1]["train/loss"], rel=1e-4)


def test_the_start_check_passes_where_the_first_batch_is_corrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEADYMOE_HOME", str(tmp_path / "home"))
    write_corpus(tmp_path / "texts")
    metrics = _train(tmp_path / "texts", "faults=[{kind: corrupted_batches, share: 1}]")
    # Text of four tokens over and over is soon learnt.
    assert metrics[-1]["train/loss"] < metrics[0]["train/loss"]

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from moe.batch import Batch
from pipelines.config import RunConfig
from pipelines.data import TokenDataset, TrainBatches, ValidationBatches
from pipelines.errors import UserError
from pipelines.shards import Shards
from tests.pipelines.plain_corpus import PlainCorpus

S = 32


@pytest.fixture
def dataset(shards: Shards) -> TokenDataset:
    return TokenDataset(shards.train, S)


def _config(
    workers: int = 1,
    batch: int = 8,
    micro: int | None = None,
    seed: int = 0,
    max_tokens: int = 512,
    stages: Sequence[dict[str, int]] = (),
) -> RunConfig:
    schedule = {"schedule": {"kind": "stages", "stages": list(stages)}} if stages else {}
    return RunConfig.model_validate(
        {
            "seed": seed,
            "parallel": {"workers": workers},
            "data": {"global_batch_size": batch, "micro_batch_size": micro, "sequence_length": S},
            "validation": {"max_tokens": max_tokens},
            **schedule,
        }
    )


def _ids(batches: list[Batch]) -> torch.Tensor:
    assert all(batch.real_BL is None for batch in batches)
    return torch.cat([batch.ids_BL for batch in batches])


def _train(dataset: TokenDataset, world: int, rank: int = 0, **changes: Any) -> TrainBatches:
    return TrainBatches(dataset, _config(world, **changes), rank, world)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_samples_are_windows_of_the_stream(shards: Shards, plain: PlainCorpus, lookahead: int) -> None:
    dataset = TokenDataset(shards.train, S, lookahead)
    tokens = [token for _, token in plain.train()]
    ids = dataset.read(range(len(dataset)))
    assert ids.dtype == torch.int64
    assert ids.tolist() == [tokens[i * S : i * S + S + 1 + lookahead] for i in range(len(dataset))]
    assert len(tokens) - S <= len(dataset) * S + 2 <= len(tokens)


def test_number_of_samples_and_order_do_not_depend_on_multi_token_prediction(shards: Shards) -> None:
    for length in range(1, 200):
        without, ahead = TokenDataset(shards.validation, length, 0), TokenDataset(shards.validation, length, 1)
        assert len(without) == len(ahead)
        last = [len(ahead) - 1]
        assert torch.equal(ahead.read(last)[:, :-1], without.read(last))


def test_documents_of_a_sample_are_those_of_its_tokens(dataset: TokenDataset, plain: PlainCorpus) -> None:
    stream = plain.train()
    for sample in range(len(dataset)):
        window = stream[sample * S : sample * S + S + 1]
        spans = dataset.documents(sample)
        assert [span.name for span in spans] == list(dict.fromkeys(name for name, _ in window))
        text = [[*plain.documents[span.name], 256][span.start : span.end] for span in spans]
        assert sum(text, []) == [token for _, token in window]  # noqa: RUF017


def test_samples_out_of_range_are_refused(dataset: TokenDataset) -> None:
    for sample in (-1, len(dataset)):
        with pytest.raises(IndexError):
            dataset.read([sample])
        with pytest.raises(IndexError):
            dataset.documents(sample)


def test_stream_shorter_than_a_sample_is_refused(shards: Shards) -> None:
    with pytest.raises(UserError, match=r"data\.sequence_length \(1000000\) is too long: the train part"):
        TokenDataset(shards.train, 1_000_000)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2, None])
def test_batches_of_the_ranks_together_are_the_global_batch(
    dataset: TokenDataset, world: int, micro: int | None
) -> None:
    alone = TrainBatches(dataset, _config(), 0, 1)
    ranks = [TrainBatches(dataset, _config(world, micro=micro), rank, world) for rank in range(world)]
    for step in (0, 1, 17, 1000):
        shares = [rank(step) for rank in ranks]
        assert {tuple(batch.ids_BL.shape) for share in shares for batch in share} == {(micro or 8 // world, S + 1)}
        assert torch.equal(torch.cat([_ids(share) for share in shares]), _ids(alone(step)))
        assert torch.equal(_ids(alone(step)), dataset.read(alone.sample_ids(step)))
        for rank in ranks:
            np.testing.assert_array_equal(rank.sample_ids(step), alone.sample_ids(step))


def test_every_sample_is_read_once_an_epoch_though_batches_cross_its_border(dataset: TokenDataset) -> None:
    size = len(dataset)
    assert size % 8
    batches = _train(dataset, 1)
    read = np.concatenate([batches.sample_ids(step) for step in range(3 * size // 8 + 1)])
    epochs = [read[number * size : (number + 1) * size].tolist() for number in range(3)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_depends_on_the_step_alone_and_not_on_what_was_read_before(dataset: TokenDataset) -> None:
    first, second = _train(dataset, 1), _train(dataset, 1)
    for step in range(5):
        first(step)
    assert torch.equal(_ids(first(3)), _ids(second(3)))


def test_batch_size_regroups_the_same_order(dataset: TokenDataset) -> None:
    small, large = _train(dataset, 1, batch=4), _train(dataset, 1, batch=12)
    together = np.concatenate([small.sample_ids(step) for step in range(12)])
    np.testing.assert_array_equal(together, np.concatenate([large.sample_ids(step) for step in range(4)]))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_ramp_of_batch_and_sequence_length_reads_the_same_text_in_the_same_order(
    dataset: TokenDataset, world: int
) -> None:
    plain = _train(dataset, 1, batch=1)
    whole = dataset.sequence_length
    stages = [
        # 3 samples, which two or four ranks have to share.
        {"steps": 2, "global_batch_size": 12, "sequence_length": whole // 4},
        {"steps": 3, "global_batch_size": 4, "sequence_length": whole // 2},  # 2 samples
        {"steps": 2, "global_batch_size": 8},
    ]
    config = _config(batch=8, stages=stages, workers=world)
    ranks = [TrainBatches(dataset, config, rank, world) for rank in range(world)]
    samples = [plain.sample_ids(step)[0] for step in range(3 + 3 + 2 + 2 + 2 + 8 + 8)]
    position = 0
    for step, (sequences, parts) in enumerate([(12, 4)] * 2 + [(4, 2)] * 3 + [(8, 1)] * 2):
        here = samples[position : position + sequences // parts]
        position += sequences // parts
        assert ranks[0].sample_ids(step).tolist() == here
        expected = []
        for sample in here:
            start, length = sample * whole, whole // parts
            expected += [dataset.stream.read(start + n * length, start + (n + 1) * length + 1) for n in range(parts)]
        got = torch.cat([_ids(rank(step)) for rank in ranks])
        assert torch.equal(got, torch.tensor(np.stack(expected).astype(np.int64)))


def test_seed_changes_the_order(dataset: TokenDataset) -> None:
    assert _train(dataset, 1, seed=1).sample_ids(0).tolist() != _train(dataset, 1, seed=2).sample_ids(0).tolist()


def test_skipped_samples_are_replaced_where_they_stood(dataset: TokenDataset) -> None:
    before = _train(dataset, 1)
    bad = before.sample_ids(2)[[1, 5]].tolist()
    after = _train(dataset, 1)
    after.skip(bad, 0)
    for step in range(2 * len(dataset) // 8):
        old, new = before.sample_ids(step), after.sample_ids(step)
        np.testing.assert_array_equal(old != new, np.isin(old, bad))
        assert not np.isin(new, bad).any()


def test_samples_that_are_skipped_from_a_step_on_were_read_before_it(dataset: TokenDataset) -> None:
    before, after = _train(dataset, 1), _train(dataset, 1)
    epoch = len(dataset) // 8 + 1
    bad = before.sample_ids(2).tolist()
    after.skip(bad, epoch)
    assert all(after.sample_ids(step).tolist() == before.sample_ids(step).tolist() for step in range(epoch))
    assert not any(np.isin(after.sample_ids(step), bad).any() for step in range(epoch, 2 * epoch))


def test_documents_of_a_step_are_those_of_its_samples(dataset: TokenDataset) -> None:
    batches = _train(dataset, 1)
    documents = batches.documents(3)
    assert list(documents) == batches.sample_ids(3).tolist()
    assert all(spans == dataset.documents(sample) for sample, spans in documents.items())


def test_uneven_shares_are_refused(dataset: TokenDataset) -> None:
    with pytest.raises(ValueError, match="8 sequences does not divide into 3"):
        TrainBatches(dataset, _config(), 0, 3)
    with pytest.raises(ValueError, match="micro-batches of 4 sequences"):
        TrainBatches(dataset, _config(micro=4), 0, 4)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        TrainBatches(dataset, _config(), 2, 2)


def _targets(batches: ValidationBatches) -> list[tuple[int, ...]]:
    """Real rows; padding must be whole rows."""
    rows = []
    for batch in batches:
        real = torch.ones_like(batch.ids_BL, dtype=torch.bool) if batch.real_BL is None else batch.real_BL
        assert torch.equal(real.any(1), real.all(1))
        rows += [tuple(row) for row in batch.ids_BL[real.all(1)].tolist()]
    return rows


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(("micro", "max_tokens"), [(None, 10**6), (2, 10**6), (1, S * 13), (None, S * 5 + 3)])
def test_validation_predicts_each_held_out_token_once_on_any_number_of_ranks(
    shards: Shards, plain: PlainCorpus, world: int, micro: int | None, max_tokens: int
) -> None:
    dataset = TokenDataset(shards.validation, S)
    tokens = [token for _, token in plain.validation()]
    available = (len(tokens) - 2) // S
    windows = min(max_tokens // S, available)
    ranks = [
        ValidationBatches(dataset, _config(world, micro=micro, max_tokens=max_tokens), rank, world)
        for rank in range(world)
    ]
    shapes = [[tuple(batch.ids_BL.shape) for batch in rank] for rank in ranks]
    assert all(shape == shapes[0] for shape in shapes)
    assert {len(rank) for rank in ranks} == {len(shapes[0])}
    assert len(shapes[0]) == -(-windows // (world * (micro or 8 // world)))
    rows = sorted(row for rank in ranks for row in _targets(rank))
    spread = [math.floor(at * available / windows) for at in range(windows)]
    assert rows == sorted(tuple(tokens[at * S : at * S + S + 1]) for at in spread)
    assert {rank.num_targets for rank in ranks} == {windows * S}
    assert all(rank.windows == spread for rank in ranks)


def test_validation_reads_from_the_whole_held_out_part_however_few_tokens_it_takes(shards: Shards) -> None:
    dataset = TokenDataset(shards.validation, S)
    windows = ValidationBatches(dataset, _config(max_tokens=S * 4), 0, 1).windows
    gaps = [after - before for before, after in zip(windows, [*windows[1:], len(dataset)], strict=True)]
    assert max(gaps) - min(gaps) <= 1


def test_validation_counts_the_bytes_of_text_behind_its_targets(shards: Shards, plain: PlainCorpus) -> None:
    dataset = TokenDataset(shards.validation, S)
    for windows in range(1, len(dataset) + 1):
        batches = ValidationBatches(dataset, _config(max_tokens=S * windows), 0, 1)
        targets = [token for row in _targets(batches) for token in row[1:]]
        assert len(targets) == batches.num_targets == windows * S
        assert batches.text_bytes == sum(token != 256 for token in targets)


def test_bytes_of_text_behind_a_sample_are_those_of_its_targets_and_not_of_its_inputs(
    shards: Shards, plain: PlainCorpus
) -> None:
    tokens = [token for _, token in plain.validation()]
    for length in range(1, 20):
        dataset = TokenDataset(shards.validation, length)
        for sample in range(len(dataset)):
            targets = tokens[sample * length + 1 : (sample + 1) * length + 1]
            assert dataset.target_bytes(sample) == len(targets) - targets.count(256)


def test_padding_rows_of_validation_are_marked_and_readable(shards: Shards) -> None:
    dataset = TokenDataset(shards.validation, S, lookahead=1)
    batches = list(ValidationBatches(dataset, _config(4, max_tokens=S * 5), 3, 4))
    assert [batch.ids_BL.shape for batch in batches] == [(2, S + 2)]
    assert batches[0].real_BL is not None
    assert not batches[0].real_BL.any()
    assert torch.equal(batches[0].ids_BL, torch.full((2, S + 2), 256))


def test_training_and_validation_never_share_a_document(shards: Shards) -> None:
    names = [{span.name for span in stream.documents(0, len(stream))} for stream in (shards.train, shards.validation)]
    assert names[0]
    assert names[1]
    assert not names[0] & names[1]


def _masked(**changes: Any) -> RunConfig:
    config = _config(**changes)
    return config.model_copy(update={"data": config.data.model_copy(update={"intra_document_masking": True})})


@pytest.mark.parametrize("lookahead", [0, 1])
def test_documents_of_a_batch_are_those_that_its_tokens_were_read_from(shards: Shards, lookahead: int) -> None:
    dataset = TokenDataset(shards.train, S, lookahead)
    batches = TrainBatches(dataset, _masked(batch=8, micro=2), 0, 1)
    for step in range(20):
        rows = zip(batches.sample_ids(step).tolist(), _documents(batches(step)), strict=True)
        for sample, documents in rows:
            spans = shards.train.documents(sample * S, sample * S + S + 1 + lookahead)
            expected = [number for number, span in enumerate(spans) for _ in range(span.end - span.start)]
            assert documents.tolist() == expected


def _documents(batches: list[Batch]) -> torch.Tensor:
    return torch.cat([_given(batch.documents_BL) for batch in batches])


def _given(documents_BL: torch.Tensor | None) -> torch.Tensor:
    assert documents_BL is not None
    return documents_BL


def test_validation_batches_know_their_documents_and_are_otherwise_the_same(shards: Shards) -> None:
    dataset = TokenDataset(shards.validation, S)
    plain = list(ValidationBatches(dataset, _config(max_tokens=S * 13), 0, 1))
    masked = list(ValidationBatches(dataset, _masked(max_tokens=S * 13), 0, 1))
    assert any(batch.real_BL is not None for batch in masked)
    for one, other in zip(plain, masked, strict=True):
        assert one.documents_BL is None
        assert torch.equal(one.ids_BL, other.ids_BL)
        assert (one.real_BL is None) == (other.real_BL is None)
        # A document number rises exactly behind a document token.
        rises = _given(other.documents_BL).diff(dim=1)
        assert torch.equal(rises == 1, other.ids_BL[:, :-1] == 256)
        assert torch.equal(rises == 0, other.ids_BL[:, :-1] != 256)


def test_without_masking_a_batch_names_no_documents(dataset: TokenDataset) -> None:
    assert all(batch.documents_BL is None for batch in _train(dataset, 1)(0))

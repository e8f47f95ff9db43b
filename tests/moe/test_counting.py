from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.utils.flop_counter import FlopCounterMode

from moe.batch import Batch
from moe.config.model import ModelConfig
from moe.counting import count_parameters, training_flops_per_token
from tests.moe.build import build_model, random_ids, small_config

PRESETS = Path(__file__).parents[2] / "pipelines" / "presets"

PUBLISHED = {
    "deepseek-v3": (671.03, 37.55, 36.63),
    "deepseek-v2-lite": (15.71, 2.66, 2.45),
    "deepseek-moe-16b": (16.38, 2.83, 2.62),
}


def preset(name: str) -> ModelConfig:
    return ModelConfig.model_validate(yaml.safe_load((PRESETS / f"{name}.yaml").read_text())["model"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_presets_have_the_published_number_of_parameters(name: str) -> None:
    count = count_parameters(preset(name))
    billions = [round(n / 1e9, 2) for n in (count.total, count.active, count.active_without_embedding)]
    assert tuple(billions) == PUBLISHED[name]


def test_multi_token_prediction_is_not_counted() -> None:
    without, with_mtp = small_config(), small_config(mtp={"depth": 1})
    assert count_parameters(with_mtp) == count_parameters(without)
    assert count_parameters(without).total == sum(p.numel() for p in build_model(without).parameters())


@pytest.mark.parametrize(
    ("moe", "experts"),
    [
        ({"num_identity_experts": 8}, 4 * 16 / 24),
        ({"num_identity_experts": 8, "experts_per_token": 1.5}, 1.5),
        ({"selection": {"kind": "threshold"}}, 4),
    ],
)
def test_where_the_number_of_experts_varies_its_intended_mean_is_active(moe: dict[str, Any], experts: float) -> None:
    count, plain = count_parameters(small_config(moe=moe)), count_parameters(small_config())
    one = 2 * 3 * 32 * 24  # an expert in each of two layers
    router = 2 * 32 * moe.get("num_identity_experts", 0)
    assert count.total == plain.total + router
    assert count.active == plain.active + router + round((experts - 4) * one)
    flops = [training_flops_per_token(small_config(moe=change), 16) for change in (moe, {})]
    assert flops[0] - flops[1] == 6 * (router + round((experts - 4) * one))


@pytest.mark.parametrize(
    ("changes", "further"),
    [
        ({"norm_placement": "sandwich"}, 3 * 2 * 32),
        ({"norm_placement": "reordered"}, 0),
        ({"moe": {"output_norm": True}}, 2 * 32),
        ({"attention": {"qk_norm": True}}, 3 * 2 * (8 + 8)),
        ({"attention": {"kind": "mha", "num_heads": 2, "head_dim": 14, "qk_norm": True}}, 3 * 2 * 14),
        ({"attention": {"scale_latents": True}}, 0),
        ({"activation": {"kind": "situ_glu"}}, 0),
        # Six sub-layers read 4 + 4 + 16 numbers off 4 streams of 32, with a scale for each part, and the end reads 4.
        ({"residual": {"kind": "mhc"}}, 6 * (24 * (4 * 32 + 1) + 3) + 4 * (4 * 32 + 1) + 1),
    ],
)
def test_parameters_of_switches_are_counted_and_every_token_meets_them(changes: dict[str, Any], further: int) -> None:
    config = small_config(**changes)
    attention = changes.get("attention", {})
    without = small_config(attention={**attention, "qk_norm": False}) if "kind" in attention else small_config()
    count, before = count_parameters(config), count_parameters(without)
    assert count.total == sum(p.numel() for p in build_model(config).parameters())
    assert (count.total - before.total, count.active - before.active) == (further, further)


def test_experts_that_a_token_does_not_pass_are_idle() -> None:
    count = count_parameters(small_config())
    expert = 3 * 24 * 32
    assert count.total - count.active == 2 * (16 - 4) * expert  # two MoE layers
    assert count.active - count.active_without_embedding == 96 * 32


def test_every_parameter_of_a_dense_model_is_active() -> None:
    count = count_parameters(small_config(moe={"num_experts": 0}))
    assert count.total == count.active


def test_deepseek_v3_costs_250_gflop_a_token() -> None:
    """arXiv 2505.09343, table 2, sequences of 4096."""
    without_mtp = preset("deepseek-v3").model_copy(update={"mtp": small_config().mtp})
    assert training_flops_per_token(without_mtp, 4096) / 1e9 == pytest.approx(250, rel=0.01)


WIDTHS = {
    "mla": (None, 8 + 8, 12),
    "mla, normed heads": ({"qk_norm": True}, 8 + 8, 12),
    "mha": ({"kind": "mha", "num_heads": 2, "head_dim": 16}, 16, 16),
}
BY_ATTENTION = pytest.mark.parametrize(("attention", "query_width", "value_width"), WIDTHS.values(), ids=WIDTHS.keys())


def with_attention(attention: dict[str, object] | None, **changes: Any) -> ModelConfig:
    return small_config(**changes) if attention is None else small_config(attention=attention, **changes)


@pytest.mark.parametrize("depth", [0, 1])
@BY_ATTENTION
def test_flops_of_parameters_are_those_of_the_matrix_products(
    attention: dict[str, object] | None, query_width: int, value_width: int, depth: int
) -> None:
    """Counted by torch as they run, on a dense model."""
    config = with_attention(attention, moe={"num_experts": 0}, mtp={"depth": depth})
    model, sequences, length = build_model(config), 4, 16
    with FlopCounterMode(display=False) as counter:
        output = model(Batch(random_ids(sequences, length + 1 + depth)))
        sum(logits.sum() for logits in (output.logits, output.mtp_logits) if logits is not None).backward()
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.bmm"))
    gains = sum(p.numel() for p in model.parameters() if p.dim() == 1)  # norms are counted like matrices
    assert products == (training_flops_per_token(config, 0) - 6 * gains) * sequences * length


@pytest.mark.parametrize("depth", [0, 1])
def test_flops_of_streams_are_those_of_their_products(depth: int) -> None:
    """Torch counts what is read and mixed; writing to the streams is elementwise."""
    config = small_config(moe={"num_experts": 0}, mtp={"depth": depth}, residual={"kind": "mhc", "streams": 3})
    model, sequences, length = build_model(config), 4, 16
    with FlopCounterMode(display=False) as counter:
        output = model(Batch(random_ids(sequences, length + 1 + depth)))
        sum(logits.sum() for logits in (output.logits, output.mtp_logits) if logits is not None).backward()
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.bmm"))
    offsets = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    written = 2 * (3 + depth) * 3 * 32
    # The embedding needs a gradient and is no parameter of a product, so the first sub-layer's is as any other's.
    assert products == (training_flops_per_token(config, 0) - 6 * (offsets + written)) * sequences * length


@pytest.mark.parametrize("depth", [0, 1])
@BY_ATTENTION
def test_flops_of_attention_are_those_of_the_pairs_that_meet(
    attention: dict[str, object] | None, query_width: int, value_width: int, depth: int
) -> None:
    config, length = with_attention(attention, mtp={"depth": depth}), 1000
    pairs = sum(position + 1 for position in range(length))
    forward = (config.num_layers + depth) * 2 * pairs * config.attention.num_heads * (query_width + value_width)
    found = training_flops_per_token(config, length) - training_flops_per_token(config, 0)
    assert found * length == pytest.approx(3 * forward, rel=2e-3)

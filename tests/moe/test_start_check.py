"""A model starts where its config says, and one that does not is refused before its first step."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe.batch import Batch
from moe.config.model import ModelConfig
from moe.start_check import check_start, expected_start
from moe.trainer import Trainer
from tests.distributed import run_distributed
from tests.moe.build import small_config
from tests.moe.tiny import MTP, PADDED, assert_bit_identical, tiny_config, tiny_trainer, trained, weights

WIDE: dict[str, Any] = {"model": {"hidden_size": 64, "mtp": {"depth": 1}, "init": {"std": 0.02}}}
"""Large enough that every figure is judged."""

SWITCHES: dict[str, dict[str, Any]] = {
    "none": {},
    "sandwich": {"norm_placement": "sandwich"},
    "reordered": {"norm_placement": "reordered"},
    "normed heads, normed experts": {"attention": {"qk_norm": True}, "moe": {"output_norm": True}},
    "scaled latents": {"attention": {"scale_latents": True}},
    "small outputs, large embeddings": {"init": {"output_scale": "depth", "embedding_std": 1.0}},
    "tiny embeddings": {"init": {"embedding_std": 1e-4}},
    "clamped": {"activation": {"kind": "swiglu_clamp"}},
    "constrained streams": {"residual": {"kind": "mhc"}},
    "unconstrained streams, read much": {"residual": {"kind": "hyper", "alpha": 1.0}},
    "dense": {"moe": {"num_experts": 0}},
}


@pytest.mark.parametrize("std", [0.006, 0.06])
@pytest.mark.parametrize("changes", SWITCHES.values(), ids=SWITCHES.keys())
def test_every_switch_starts_where_the_config_says(changes: dict[str, Any], std: float) -> None:
    config = tiny_config(WIDE, {"model": changes}, {"model": {"init": {"std": std}}, "precision": {"compute": "bf16"}})
    trainer = tiny_trainer(config, (0,))
    trainer.check_start()
    found, expected = check_start(trainer.model, trainer.batches(0)[0], trainer.ranks), expected_start(config.model)
    assert found.embedding.rms == pytest.approx(expected.embedding_rms, rel=0.2)
    assert found.logit_rms == pytest.approx(expected.head_gain * found.head_input.rms, rel=0.2)
    for moe in found.moe:
        assert moe.router_logit_rms == pytest.approx(expected.router_gain * moe.router_input.rms, rel=0.35)


def test_the_expectation_is_std_times_the_root_of_the_width() -> None:
    config: ModelConfig = small_config(init={"std": 0.01, "embedding_std": 0.5})
    expected = expected_start(config)
    assert expected.embedding_rms == 0.5
    assert expected.router_gain == expected.head_gain == pytest.approx(0.01 * math.sqrt(32))
    assert expected_start(small_config(init={"std": 0.01})).embedding_rms == 0.01


def scaled(name: str, factor: float) -> Callable[[Trainer], None]:
    def alter(trainer: Trainer) -> None:
        with torch.no_grad():
            dict(trainer.model.named_parameters())[name].mul_(factor)

    return alter


@pytest.mark.parametrize(
    ("name", "factor", "named"),
    [
        ("embed.weight", 3.0, r"the RMS of the embedding is 0\.0\d+ before .* model\.init\.std=0\.02 gives 0\.02;"),
        ("layers.2.ffn.router.weight", 3.0, r"the RMS of the router logits of layer 2 is 0\.\d+ .* gives 0\.1[56]\d*;"),
        ("mtp.block.ffn.router.weight", 0.3, "the RMS of the router logits of the multi-token prediction block is "),
        ("head.weight", 0.3, r"the RMS of the logits is .*; model\.init\.check=false trains all the same$"),
        ("layers.1.attention.out_proj.weight", math.nan, "the .* of layer 1 is nan before the first step$"),
        ("layers.2.ffn.experts.w_up", 1e30, "the .* of .* layer 2 is (nan|inf) before|in layer 2 is (nan|inf) before"),
        ("layers.0.ffn.down.weight", math.inf, "the RMS of the residual stream after layer 0 is (nan|inf) before"),
    ],
)
def test_a_start_elsewhere_is_refused_by_layer_and_figure(name: str, factor: float, named: str) -> None:
    trainer = tiny_trainer(tiny_config(WIDE), PADDED)
    scaled(name, factor)(trainer)
    with pytest.raises(ValueError, match=named) as raised:
        trainer.check_start()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("factor", [0.7, 1.4])
def test_what_is_off_by_less_than_two_is_let_through(factor: float) -> None:
    trainer = tiny_trainer(tiny_config(WIDE))
    for name in ("embed.weight", "layers.2.ffn.router.weight", "head.weight"):
        scaled(name, factor)(trainer)
    trainer.check_start()


def test_a_batch_that_tells_too_little_is_not_judged() -> None:
    """Eight experts on one token again and again: eight numbers, which chance may well double."""
    trainer = tiny_trainer(tiny_config(WIDE))
    scaled("layers.1.ffn.router.weight", 3.0)(trainer)
    batch = Batch(torch.full((2, 18), 3))
    check_start(trainer.model, batch, trainer.ranks)
    with pytest.raises(ValueError, match="layer 1"):
        trainer.check_start()


def test_the_check_can_be_switched_off() -> None:
    trainer = tiny_trainer(tiny_config(WIDE, {"model": {"init": {"check": False}}}))
    scaled("head.weight", 10.0)(trainer)
    trainer.check_start()


def test_the_check_changes_not_a_bit_of_training() -> None:
    assert_bit_identical(trained([WIDE], Trainer.check_start), trained([WIDE]))


def refused(rank: int, world: int, parallel: dict[str, Any]) -> tuple[str, dict[str, torch.Tensor]]:
    """One rank alone holds the expert that is not finite."""
    trainer = tiny_trainer(tiny_config(MTP, {"parallel": {"workers": world, **parallel}}))
    if rank == world - 1:
        with torch.no_grad():
            trainer.model.moe_layers()[1].experts.w_down[-1].fill_(math.nan)
    with pytest.raises(ValueError) as raised:
        trainer.check_start()
    trainer.model.moe_layers()[1].experts.w_down.detach()[-1].zero_()
    assert trainer.step().taken, "the ranks are still in step"
    return str(raised.value), weights(trainer)


@pytest.mark.parametrize("dense", ["replicate", "shard"])
def test_all_ranks_refuse_alike_what_one_of_them_sees(dense: str) -> None:
    (message, _), (other, _) = run_distributed(refused, 2, {"expert_parallel": 2, "dense": dense})
    assert message == other
    assert "after layer 2 is nan" in message

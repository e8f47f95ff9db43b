"""Weights to and from the layout of Hugging Face's DeepseekV3 on disk (its config.json: `moe.config.hf`).

Every tensor here is one or more tensors there, laid end to end: a SwiGLU's ``gate_up`` is their gate_proj over their
up_proj, and all experts of a layer are one tensor here and one file entry per expert there. So the whole mapping is a
list of names, and both directions are read off it. Neither direction changes a number or a dtype.

The weights of multi-token prediction have no place in ``DeepseekV3ForCausalLM`` and stay behind.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from moe.config.hf import refuse_inexpressible
from moe.config.model import MlaConfig, ModelConfig
from moe.model import Transformer
from moe.parallel import Ranks

_THEIRS = "the Hugging Face checkpoint"


@dataclass(frozen=True)
class _Entry:
    """One tensor here and those that make it up there, in order; ``experts`` is the length of a leading axis."""

    ours: str
    theirs: tuple[str, ...]
    experts: int | None = None

    def split(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Our tensor -> theirs, as views."""
        rows = tensor if self.experts is None else tensor.flatten(0, 1)
        return dict(zip(self.theirs, rows.chunk(len(self.theirs)), strict=True))

    def join(self, state: Mapping[str, torch.Tensor], rows: slice = slice(None)) -> torch.Tensor:
        """Their tensors -> these rows of ours, with storage of its own; of experts only theirs are looked up."""
        if self.experts is None:
            whole: torch.Tensor = torch.cat([state[name] for name in self.theirs])
            return whole[rows]
        each = len(self.theirs) // self.experts
        start, stop, _ = rows.indices(self.experts)
        joined = torch.cat([state[name] for name in self.theirs[start * each : stop * each]])
        return joined.view(stop - start, -1, joined.shape[-1])


def _one(ours: str, theirs: str) -> _Entry:
    return _Entry(f"{ours}.weight", (f"{theirs}.weight",))


def _attention(config: MlaConfig) -> Iterator[_Entry]:
    if config.q_lora_rank is None:
        yield _one("q_proj", "q_proj")
    else:
        yield _one("q_proj.0", "q_a_proj")
        yield _one("q_proj.1", "q_a_layernorm")
        yield _one("q_proj.2", "q_b_proj")
    yield _one("kv_down", "kv_a_proj_with_mqa")
    yield _one("kv_norm", "kv_a_layernorm")
    yield _one("kv_up", "kv_b_proj")
    yield _one("out_proj", "o_proj")


def _swiglu() -> Iterator[_Entry]:
    yield _Entry("gate_up.weight", ("gate_proj.weight", "up_proj.weight"))
    yield _one("down", "down_proj")


def _moe(num_experts: int, has_shared: bool) -> Iterator[_Entry]:
    yield _one("router", "gate")
    yield _Entry("router.expert_bias_E", ("gate.e_score_correction_bias",))
    experts = [f"experts.{expert}" for expert in range(num_experts)]
    gate_up = tuple(f"{expert}.{part}_proj.weight" for expert in experts for part in ("gate", "up"))
    yield _Entry("experts.w_up", gate_up, num_experts)
    yield _Entry("experts.w_down", tuple(f"{expert}.down_proj.weight" for expert in experts), num_experts)
    if has_shared:
        yield from _inside("shared", "shared_experts", _swiglu())


def _inside(ours: str, theirs: str, entries: Iterator[_Entry]) -> Iterator[_Entry]:
    for entry in entries:
        yield _Entry(f"{ours}.{entry.ours}", tuple(f"{theirs}.{name}" for name in entry.theirs), entry.experts)


def _layer(config: ModelConfig, attention: MlaConfig, layer: int) -> Iterator[_Entry]:
    yield _one("attention_norm", "input_layernorm")
    yield from _inside("attention", "self_attn", _attention(attention))
    yield _one("ffn_norm", "post_attention_layernorm")
    moe = config.moe
    ffn = _moe(moe.num_experts, moe.num_shared_experts > 0) if config.is_moe_layer(layer) else _swiglu()
    yield from _inside("ffn", "mlp", ffn)


def _entries(config: ModelConfig) -> list[_Entry]:
    refuse_inexpressible(config)
    assert isinstance(config.attention, MlaConfig)
    entries = [_one("embed", "model.embed_tokens"), _one("norm", "model.norm"), _one("head", "lm_head")]
    for layer in range(config.num_layers):
        entries += _inside(f"layers.{layer}", f"model.layers.{layer}", _layer(config, config.attention, layer))
    return entries


def _absent_shared_experts(config: ModelConfig) -> dict[str, torch.Tensor]:
    """DeepseekV3 always builds a shared expert; without one it is a matrix of width 0, which the file must hold."""
    if config.moe.num_shared_experts:
        return {}
    parts = {
        "gate_proj": (0, config.hidden_size),
        "up_proj": (0, config.hidden_size),
        "down_proj": (config.hidden_size, 0),
    }
    layers = [layer for layer in range(config.num_layers) if config.is_moe_layer(layer)]
    return {
        f"model.layers.{layer}.mlp.shared_experts.{part}.weight": torch.empty(shape)
        for layer in layers
        for part, shape in parts.items()
    }


def _check_names(given: set[str], expected: set[str], what: str) -> None:
    for names, problem in ((expected - given, "lacks"), (given - expected, "has unknown")):
        if names:
            first = ", ".join(sorted(names)[:3])
            raise ValueError(f"{what} {problem} tensors ({len(names)}): {first}{', ...' if len(names) > 3 else ''}")


def to_hf(state: Mapping[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """The model's state dict -> the tensors of a DeepseekV3 checkpoint, one entry per expert.

    Arguments:
        state: every weight and expert bias by its name in ``Transformer.state_dict()``, whole (all experts, no shard).
        config: the model's.

    The results are views of ``state`` and keep its dtypes. Expert biases should stay fp32.

    Raises:
        ValueError: the model cannot be expressed, or a tensor is missing or unknown.
    """
    entries = _entries(config)
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("mtp.")}
    _check_names(set(kept), {entry.ours for entry in entries}, "the model's state")
    split = {name: part for entry in entries for name, part in entry.split(kept[entry.ours]).items()}
    return split | _absent_shared_experts(config)


def from_hf(state: Mapping[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """The inverse of ``to_hf``: a DeepseekV3 checkpoint's tensors -> our state dict without multi-token prediction.

    Raises:
        ValueError: the model cannot be expressed, or a tensor is missing or unknown.
    """
    entries = _entries(config)
    _check_names(set(state) - set(_absent_shared_experts(config)), {n for e in entries for n in e.theirs}, _THEIRS)
    return {entry.ours: entry.join(state) for entry in entries}


def rows_from_hf(
    state: Mapping[str, torch.Tensor], config: ModelConfig, rows: Mapping[str, slice]
) -> Iterator[tuple[str, torch.Tensor]]:
    """``from_hf`` for a rank that holds a part: of each of our tensors in ``rows``, those rows (not none), one by one.

    ``state`` may read a tensor when it is looked up: experts that are not asked for are not.
    """
    for entry in _entries(config):
        if entry.ours in rows:
            yield entry.ours, entry.join(state, rows[entry.ours])


def shapes_in_hf(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the model's DeepseekV3 checkpoint; takes no memory.

    Raises:
        ValueError: the model cannot be expressed, or has no vocabulary size.
    """
    meta = torch.device("meta")
    with meta:
        model = Transformer(config, Ranks(meta))
    return {name: tuple(tensor.shape) for name, tensor in to_hf(model.state_dict(), config).items()}

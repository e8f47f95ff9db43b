"""Weights to and from the layout of Hugging Face's DeepseekV3 on disk, and its config.json.

Every tensor here is one or more tensors there, laid end to end: a SwiGLU's ``gate_up`` is their gate_proj over their
up_proj, and all experts of a layer are one tensor here and one file entry per expert there. So the whole mapping is a
list of names, and both directions are read off it. Neither direction changes a number or a dtype.

The weights of multi-token prediction have no place in ``DeepseekV3ForCausalLM`` and stay behind.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from moe.config.model import EXPERTS_PER_GROUP_SCORE, MlaConfig, ModelConfig

_LATENT_NORM_EPS = 1e-6  # fixed in DeepseekV3's code for the norms of the latents, whatever rms_norm_eps says


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

    def join(self, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Their tensors -> ours, which has storage of its own."""
        rows = torch.cat([state[name] for name in self.theirs])
        return rows if self.experts is None else rows.unflatten(0, (self.experts, -1))


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


def refuse_inexpressible(config: ModelConfig) -> None:
    """Refuse a model that ``DeepseekV3ForCausalLM`` would compute differently.

    Raises:
        ValueError: names every option that has no counterpart there, and the values that have one.
    """
    moe = config.moe
    problems = []
    if not isinstance(config.attention, MlaConfig):
        problems.append(f"model.attention.kind={config.attention.kind} (only mla)")
    if config.norm_eps != _LATENT_NORM_EPS:
        problems.append(f"model.norm_eps={config.norm_eps} (only {_LATENT_NORM_EPS}, which it fixes for the latents)")
    if moe.num_experts and moe.affinity != "sigmoid":
        problems.append(f"model.moe.affinity={moe.affinity} (only sigmoid)")
    if 0 < moe.num_experts < EXPERTS_PER_GROUP_SCORE:
        problems.append(f"model.moe.num_experts={moe.num_experts} (only 0, or at least {EXPERTS_PER_GROUP_SCORE})")
    if problems:
        raise ValueError(f"Hugging Face's DeepseekV3 cannot express {'; '.join(problems)}")


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
    absent = _absent_shared_experts(config)
    kept = {name: tensor for name, tensor in state.items() if name not in absent}
    _check_names(set(kept), {name for entry in entries for name in entry.theirs}, "the Hugging Face checkpoint")
    return {entry.ours: entry.join(kept) for entry in entries}


def hf_config(config: ModelConfig) -> dict[str, object]:
    """The content of config.json for ``transformers.DeepseekV3Config``; ``config.vocab_size`` must be set.

    It says nothing about special tokens and the longest sequence, which belong to the tokenizer and the data.

    Raises:
        ValueError: the model cannot be expressed, or has no vocabulary size.
    """
    refuse_inexpressible(config)
    if config.vocab_size is None:
        raise ValueError("model.vocab_size must be set before the model is exported")
    attention, moe = config.attention, config.moe
    assert isinstance(attention, MlaConfig)
    # Where every group is chosen, groups decide nothing; one group says the same and may be of any size there.
    groups = (moe.num_groups, moe.top_groups) if moe.top_groups < moe.num_groups else (1, 1)
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_heads,
        "q_lora_rank": attention.q_lora_rank,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_interleave": True,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "n_shared_experts": moe.num_shared_experts,
        "moe_intermediate_size": moe.expert_size,
        "first_k_dense_replace": moe.first_dense_layers if moe.num_experts else config.num_layers,
        "n_group": groups[0],
        "topk_group": groups[1],
        "norm_topk_prob": moe.normalize_gates,
        "routed_scaling_factor": moe.routed_scaling_factor,
        "num_nextn_predict_layers": 0,
        "initializer_range": config.init.std,
        "tie_word_embeddings": False,
        # Their defaults are ids of DeepSeek's tokenizer; whoever knows this model's tokenizer fills them in.
        "bos_token_id": None,
        "eos_token_id": None,
    }

"""The architecture: DeepSeek-V3's transformer and the ancestors it grew from."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from moe.config.activation import ActivationConfig, SwigluConfig
from moe.config.base import Config
from moe.config.residual import PlainResidualConfig, ResidualConfig
from moe.config.selection import SelectionConfig, ThresholdSelectionConfig, TopKSelectionConfig

# DeepSeek-V3 scores a group by its two best experts (arXiv 2412.19437, section 2.1.2 and the released inference code).
EXPERTS_PER_GROUP_SCORE = 2

Affinity = Literal["sigmoid", "softmax", "sqrt_softplus"]


class MlaConfig(Config):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    kind: Literal["mla"] = "mla"
    num_heads: PositiveInt = 4
    q_lora_rank: PositiveInt | None = None
    """Width of the compressed query latent; null projects queries directly."""
    kv_lora_rank: PositiveInt = 64
    """Width of the compressed key-value latent."""
    qk_nope_head_dim: PositiveInt = 32
    """Width per head of the query-key part without position."""
    qk_rope_head_dim: PositiveInt = 16
    """Width per head of the query-key part with rotary position, shared by all heads on the key side."""
    v_head_dim: PositiveInt = 32
    qk_norm: bool = False
    """RMSNorm on every query head and every key head right before their products (after DeepSeek-V4)."""
    scale_latents: bool = False
    """Multiply the normed latents by sqrt(hidden_size / rank), queries' and key-values' (LongCat-Flash, arXiv
    2509.01322); queries that are projected directly have no latent."""

    @model_validator(mode="after")
    def _queries_are_scaled_or_normed(self) -> "MlaConfig":
        if self.scale_latents and self.qk_norm:
            raise ValueError("scale_latents does nothing to queries that qk_norm norms afterwards; set one of them")
        return self

    @model_validator(mode="after")
    def _rotary_pairs(self) -> "MlaConfig":
        for field in ("qk_nope_head_dim", "qk_rope_head_dim"):
            if getattr(self, field) % 2:
                raise ValueError(f"{field} must be even (dimensions are turned in pairs), got {getattr(self, field)}")
        return self


class MhaConfig(Config):
    """Plain multi-head attention with rotary position on the whole head (DeepSeekMoE 16B)."""

    kind: Literal["mha"] = "mha"
    num_heads: PositiveInt = 4
    head_dim: PositiveInt = 32
    qk_norm: bool = False
    """RMSNorm on every query head and every key head before rotary position (as in Qwen3)."""

    @model_validator(mode="after")
    def _rotary_pairs(self) -> "MhaConfig":
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (rotary pairs), got {self.head_dim}")
        return self


AttentionConfig = Annotated[MlaConfig | MhaConfig, Field(discriminator="kind")]


class MoeConfig(Config):
    """Shared and routed experts, and the router among them (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""

    num_experts: NonNegativeInt = 16
    """Routed experts per MoE layer; 0 makes every layer dense (then only model.intermediate_size counts)."""
    top_k: PositiveInt = 2
    """Routed experts that each token activates."""
    num_shared_experts: NonNegativeInt = 1
    """Experts that every token passes; their widths add up to one FFN."""
    expert_size: PositiveInt = 128
    """Hidden width of one expert."""
    first_dense_layers: NonNegativeInt = 1
    """The first layers keep a dense FFN of model.intermediate_size."""
    hash_layers: NonNegativeInt = 0
    """The first so many MoE layers take a token's experts from a fixed table by its id instead of choosing them; gates
    are still learnt (DeepSeek-V4 report: 3). Groups, expert biases and balance losses have no part in them."""
    affinity: Affinity = "sigmoid"
    """Function from router logits to affinities; sqrt_softplus is sqrt(softplus(x)) (DeepSeek-V4), unbounded above."""
    num_groups: PositiveInt = 1
    """Experts are divided into this many equal groups, contiguous by expert id."""
    top_groups: PositiveInt = 1
    """Groups that a token may choose experts from; a group's score is the sum of its two best affinities."""
    group_score: Literal["biased", "unbiased"] = "biased"
    """Whether the affinities that score a group include the expert bias (DeepSeek-V3's released inference code) or not
    (the words of its report, arXiv 2412.19437, section 2.1.2). Inside the groups the bias counts in any case."""
    bias_domains: PositiveInt = 1
    """Classes of documents with an expert bias of their own, each moved by the load of its own tokens (DeepSeek-V4.1
    report: one for text, one for images). A batch says which class each token is of: data.domains."""
    normalize_gates: bool = True
    """Divide the chosen affinities by their sum."""
    routed_scaling_factor: PositiveFloat = 1.0
    """The routed experts' output is multiplied by this."""
    output_norm: bool = False
    """RMSNorm on the routed experts' weighted sum, before the shared experts are added (Kimi K3, arXiv 2607.24653,
    unconfirmed; there it stands before an up-projection that this model does not have). What multiplies all gates of a
    token is normed away; their ratios are left."""
    selection: SelectionConfig = TopKSelectionConfig()
    num_identity_experts: NonNegativeInt = 0
    """Further experts, without weights, that give back what they are given (zero-computation experts, LongCat-Flash,
    arXiv 2509.01322, section 2.1). They are among those that top_k chooses from, so tokens differ in how many experts
    with weights they pass. Their gates count among those that normalize_gates divides."""
    experts_per_token: PositiveFloat | None = None
    """Mean number of experts with weights that a token is to pass, beside identity experts (K_e in LongCat-Flash):
    stability.balance.kind=budget holds it. Null takes the share of an even load over all experts,
    top_k * num_experts / (num_experts + num_identity_experts)."""

    @property
    def router_outputs(self) -> int:
        """Experts that the router chooses from; the last num_identity_experts of them are identities."""
        return self.num_experts + self.num_identity_experts

    @property
    def max_choices(self) -> int:
        """Most experts of one token, identities included."""
        if isinstance(self.selection, ThresholdSelectionConfig):
            return self.selection.max_experts or min(2 * self.top_k, self.num_experts)
        return self.top_k

    @property
    def mean_experts(self) -> float:
        """Experts with weights that a token is to pass on average."""
        if self.experts_per_token is not None:
            return self.experts_per_token
        return self.top_k * self.num_experts / self.router_outputs if self.num_identity_experts else self.top_k

    @property
    def experts_vary(self) -> bool:
        """Whether tokens differ in how many experts with weights they pass."""
        return self.num_identity_experts > 0 or isinstance(self.selection, ThresholdSelectionConfig)

    @model_validator(mode="after")
    def _options_of_the_choice_have_a_choice(self) -> "MoeConfig":
        if self.num_experts == 0 and (self.hash_layers or self.bias_domains > 1):
            key, off = ("hash_layers", 0) if self.hash_layers else ("bias_domains", 1)
            raise ValueError(f"{key} ({getattr(self, key)}) has no effect, since num_experts is 0; set {key}={off}")
        if self.group_score == "unbiased" and self.top_groups == self.num_groups:
            raise ValueError(
                f"group_score=unbiased has no effect where all groups may be chosen: set top_groups below num_groups "
                f"({self.num_groups}), or group_score=biased"
            )
        return self

    @model_validator(mode="after")
    def _output_norm_has_an_effect_and_no_rival(self) -> "MoeConfig":
        if self.output_norm and self.num_experts == 0:
            raise ValueError(
                "output_norm norms the routed experts' output, but num_experts is 0; set output_norm=false"
            )
        if self.output_norm and self.routed_scaling_factor != 1.0:
            raise ValueError(
                f"routed_scaling_factor ({self.routed_scaling_factor}) is normed away by output_norm; set it to 1"
            )
        return self

    @model_validator(mode="after")
    def _selection_is_possible(self) -> "MoeConfig":
        if self.num_experts == 0:
            return self
        if self.top_k > self.router_outputs:
            raise ValueError(f"top_k ({self.top_k}) is larger than num_experts ({self.num_experts})")
        if self.num_experts % self.num_groups:
            raise ValueError(f"num_experts ({self.num_experts}) is not divisible by num_groups ({self.num_groups})")
        if self.top_groups > self.num_groups:
            raise ValueError(f"top_groups ({self.top_groups}) is larger than num_groups ({self.num_groups})")
        per_group = self.num_experts // self.num_groups
        if self.top_groups < self.num_groups and self.top_k > self.top_groups * per_group:
            raise ValueError(
                f"top_k ({self.top_k}) is more than the {self.top_groups} chosen groups hold "
                f"({self.top_groups} x {per_group} experts)"
            )
        if self.top_groups < self.num_groups and per_group < EXPERTS_PER_GROUP_SCORE:
            raise ValueError(
                f"a group is scored by its {EXPERTS_PER_GROUP_SCORE} best experts, "
                f"but num_experts / num_groups is {per_group}"
            )
        return self

    @model_validator(mode="after")
    def _identity_experts_leave_a_choice(self) -> "MoeConfig":
        wanted, identities = self.experts_per_token, self.num_identity_experts
        if identities == 0:
            if wanted is not None:
                raise ValueError(
                    f"experts_per_token ({wanted}) has no effect, since num_identity_experts is 0 and every token "
                    f"passes top_k ({self.top_k}); leave it out"
                )
            return self
        if self.num_experts == 0:
            raise ValueError(f"num_identity_experts is {identities}, but num_experts is 0: set it to 0")
        if self.top_groups < self.num_groups:
            raise ValueError(
                f"num_identity_experts is {identities}, and identities are in no group: set top_groups to num_groups "
                f"({self.num_groups})"
            )
        if self.top_k >= self.router_outputs:
            raise ValueError(
                f"top_k ({self.top_k}) takes every expert, identities included; make it less than num_experts + "
                f"num_identity_experts ({self.router_outputs})"
            )
        least, most = max(0, self.top_k - identities), min(self.top_k, self.num_experts)
        if not least < self.mean_experts < most:
            raise ValueError(
                f"experts_per_token must be above {least} and below {most}, got {wanted}: of top_k ({self.top_k}) "
                f"choices at most num_identity_experts ({identities}) are identities"
            )
        return self

    @model_validator(mode="after")
    def _thresholds_can_be_held(self) -> "MoeConfig":
        if not isinstance(self.selection, ThresholdSelectionConfig):
            return self
        name, most = "selection.kind is threshold", self.selection.max_experts
        if self.num_experts == 0:
            raise ValueError(f"{name}, but num_experts is 0: set it to top_k")
        if self.num_identity_experts:
            raise ValueError(f"{name}, which varies the number of experts by itself; set num_identity_experts to 0")
        if self.top_groups < self.num_groups:
            raise ValueError(f"{name}, which knows no groups: set top_groups to num_groups ({self.num_groups})")
        if self.top_k >= self.num_experts:
            raise ValueError(f"{name}, but top_k is num_experts ({self.top_k}), so every expert is always taken")
        if most is not None and not self.top_k < most <= self.num_experts:
            raise ValueError(
                f"selection.max_experts ({most}) must be above top_k ({self.top_k}), the mean number, and at most "
                f"num_experts ({self.num_experts})"
            )
        return self

    @model_validator(mode="after")
    def _a_varying_number_of_experts_goes_alone(self) -> "MoeConfig":
        if not self.experts_vary:
            return self
        what = "num_identity_experts" if self.num_identity_experts else "selection.kind=threshold"
        if self.hash_layers:
            raise ValueError(f"hash_layers sends every token to top_k experts, which {what} varies; set hash_layers=0")
        if self.bias_domains > 1:
            raise ValueError(f"bias_domains is not defined with {what}, whose biases hold a budget; set bias_domains=1")
        return self


class MtpConfig(Config):
    """Multi-token prediction (DeepSeek-V3, section 2.2): an extra block that predicts the token after the next."""

    depth: Literal[0, 1] = 0
    """Extra tokens predicted per position; 0 is off."""
    loss_weight: PositiveFloat = 0.3
    """Weight of the extra loss (lambda)."""


class InitConfig(Config):
    """Starting weights."""

    std: PositiveFloat = 0.006
    """Standard deviation of every normally initialised matrix (DeepSeek-V3 uses 0.006)."""
    output_scale: Literal["none", "depth"] = "none"
    """depth divides the std of each sub-layer's last matrix (attention's output, FFN's and experts' down-projection) by
    sqrt(2 num_layers): small sub-layers (Spike No More, arXiv 2312.16903)."""
    embedding_std: PositiveFloat | None = None
    """Standard deviation of the embedding; null takes std. 1 gives the large shortcut of Spike No More (arXiv
    2312.16903). The paper multiplies embeddings by sqrt(hidden_size) in every forward; here they are drawn that large,
    so that the model stays one that others can load."""
    check: bool = True
    """Whether a run that draws its weights first compares embeddings and logits with what this section says they are,
    in one forward of one micro-batch, and stops where one is twice or half of it."""


class ModelConfig(Config):
    """The transformer."""

    vocab_size: PositiveInt | None = None
    """Entries of the embedding; null takes the tokenizer's size."""
    hidden_size: PositiveInt = 128
    num_layers: PositiveInt = 4
    intermediate_size: PositiveInt = 512
    """Hidden width of a dense layer."""
    activation: ActivationConfig = SwigluConfig()
    attention: AttentionConfig = MlaConfig()
    rope_theta: PositiveFloat = 10000.0
    norm_eps: PositiveFloat = 1e-6
    norm_placement: Literal["pre", "sandwich", "reordered"] = "pre"
    """RMSNorm on what a sub-layer (attention, feed-forward) reads; or on that and on what it gives, before it is added
    to the residual stream (Sandwich-LN, arXiv 2105.13290); or on what it gives alone (OLMo 2, arXiv 2501.00656).
    Reordered, a router reads the residual stream as it is."""
    residual: ResidualConfig = PlainResidualConfig()
    moe: MoeConfig = MoeConfig()
    mtp: MtpConfig = MtpConfig()
    init: InitConfig = InitConfig()

    def is_moe_layer(self, layer: int) -> bool:
        """Whether transformer layer ``layer`` (from 0; an MTP block counts as layer ``num_layers``) holds experts."""
        return self.moe.num_experts > 0 and layer >= self.moe.first_dense_layers

    def is_hash_layer(self, layer: int) -> bool:
        """Whether transformer layer ``layer`` (from 0) takes its experts from a table by token id."""
        return self.is_moe_layer(layer) and layer < self.moe.first_dense_layers + self.moe.hash_layers

    @property
    def num_moe_layers(self) -> int:
        """Layers with a router, those of the MTP block included."""
        return sum(self.is_moe_layer(layer) for layer in range(self.num_layers + self.mtp.depth))

    @property
    def num_choosing_layers(self) -> int:
        """MoE layers that choose experts, which is all but the hash layers; they come last."""
        return self.num_moe_layers - self.moe.hash_layers

    @property
    def num_biases(self) -> int:
        """Vectors of expert biases that take part in a choice: one per choosing layer and class of documents."""
        return self.num_choosing_layers * self.moe.bias_domains

    @model_validator(mode="after")
    def _no_norm_undoes_the_start(self) -> "ModelConfig":
        if self.init.output_scale != "none" and self.norm_placement != "pre":
            raise ValueError(
                f"init.output_scale={self.init.output_scale} is undone by norm_placement={self.norm_placement}, "
                "which norms what a sub-layer gives; set init.output_scale=none"
            )
        return self

    @model_validator(mode="after")
    def _has_the_layers_it_claims(self) -> "ModelConfig":
        if self.moe.num_experts and self.moe.first_dense_layers >= self.num_layers:
            raise ValueError(
                f"moe.first_dense_layers ({self.moe.first_dense_layers}) leaves none of the {self.num_layers} layers "
                "for the experts; set moe.num_experts=0 for a dense model"
            )
        trunk = self.num_layers - self.moe.first_dense_layers
        if self.moe.hash_layers > max(0, trunk):
            raise ValueError(
                f"moe.hash_layers ({self.moe.hash_layers}) is more than the {trunk} layers with experts (num_layers - "
                "moe.first_dense_layers; that of multi-token prediction always chooses)"
            )
        return self

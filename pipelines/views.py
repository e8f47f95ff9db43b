"""The saved views that every experiment gets.

A new view is an entry here. Titles of sections are numbered, names of metrics are the titles of their charts. What may
explode is on a logarithmic axis: on a linear one, a run at a loss of 60 flattens all others into one line.
"""

from pipelines.saved_view import BarChart, LineChart, Section, View
from pipelines.sweep_view import LOAD_BY_LAYER, SWEEPS

_COLUMNS = (
    "metrics.final/loss",
    "metrics.final/val_loss",
    "metrics.final/diverged",
    "params.optimizer.lr",
    "params.schedule.steps",
    "params.stability.balance.kind",
    "params.stability.balance.bias_update_rate",
    "params.stability.clip.kind",
    "params.parallel.workers",
    "params.seed",
    "attributes.Models",
)

TRAINING = View(
    key="training",
    name="Training",
    sections=(
        Section(
            "1 Loss",
            (
                LineChart("train/loss", "log"),
                LineChart("val/loss", "log"),
                LineChart("train/loss_max", "log"),
                LineChart("val/nats_per_byte", "log"),
            ),
        ),
        Section(
            "2 Gradients and learning rate",
            (
                LineChart("train/grad_norm", "log"),
                LineChart("train/update_norm", "log"),
                LineChart("train/lr"),
                LineChart("train/clip_factor"),
            ),
        ),
        Section(
            "3 Routing",
            (
                LineChart("moe/max_vio_batch"),
                LineChart("moe/max_vio_global"),
                LineChart("moe/dead_experts"),
                LineChart("moe/bias_abs_max"),
                LineChart("moe/router_entropy"),
                LineChart("moe/router_logit_max", "log"),
            ),
        ),
        Section("4 Speed", (LineChart("train/tokens_per_second"), LineChart("train/ep_bytes_per_token"))),
        Section("5 Final figures", (BarChart("final/loss"), BarChart("final/val_loss"))),
    ),
    columns=_COLUMNS,
    search="tags.role = 'train'",
)

ROUTING = View(
    key="routing",
    name="Routing",
    sections=(
        Section(
            "1 Load balance",
            (
                LineChart("moe/max_vio_batch"),
                LineChart("moe/max_vio_batch_worst"),
                LineChart("moe/max_vio_global"),
                LineChart("moe/max_vio_global_worst"),
                LineChart("moe/dead_experts"),
                LineChart("train/balance_loss"),
                *LOAD_BY_LAYER,
            ),
        ),
        Section(
            "2 Bias and router",
            (
                LineChart("moe/bias_abs_max"),
                LineChart("moe/router_entropy"),
                LineChart("moe/router_logit_max", "log"),
                LineChart("grad_norm/router", "log"),
            ),
        ),
        Section("3 What it costs", (LineChart("train/loss", "log"), LineChart("val/loss", "log"))),
    ),
    columns=_COLUMNS,
    search="tags.role = 'train'",
)

HEALTH = View(
    key="health",
    name="Health",
    sections=(
        Section(
            "1 Activations and attention",
            (
                LineChart("activation/expert_max", "log"),
                LineChart("activation/expert_kurtosis", "log"),
                LineChart("activation/residual_rms", "log"),
                LineChart("attention/logit_max", "log"),
            ),
        ),
        Section(
            "2 Clipping and updates",
            (
                LineChart("train/clip_factor"),
                LineChart("train/update_norm", "log"),
                LineChart("grad_norm/experts", "log"),
                LineChart("update_norm/experts", "log"),
                LineChart("grad_norm/dense", "log"),
                LineChart("update_norm/dense", "log"),
                LineChart("grad_norm/router", "log"),
                LineChart("update_norm/router", "log"),
            ),
        ),
        Section(
            "3 Routers",
            (
                LineChart("moe/router_similarity"),
                LineChart("moe/bias_range"),
                LineChart("moe/router_logit_max", "log"),
                LineChart("moe/router_entropy"),
            ),
        ),
        Section("4 What it costs", (LineChart("train/loss", "log"), LineChart("val/loss", "log"))),
    ),
    columns=_COLUMNS,
    search="tags.role = 'train'",
)

TECHNIQUES = View(
    key="techniques",
    name="Techniques",
    sections=(
        Section(
            "1 Compute by token",
            (
                LineChart("moe/real_experts_mean"),
                LineChart("moe/real_experts_std"),
                LineChart("moe/real_experts_none"),
                LineChart("moe/max_vio_batch"),
            ),
        ),
        Section("2 Anticipatory routing", (LineChart("moe/stale_share"), LineChart("moe/anticipation_lag"))),
        Section(
            "3 FP8",
            (
                LineChart("fp8/underflow_share_activations"),
                LineChart("fp8/saturated_share_activations"),
                LineChart("fp8/underflow_share_weights"),
                LineChart("fp8/saturated_share_weights"),
                LineChart("fp8/underflow_share_gradients"),
                LineChart("fp8/saturated_share_gradients"),
            ),
        ),
        Section("4 Between nodes", (LineChart("moe/nodes_per_token"), LineChart("train/ep_bytes_per_token"))),
        Section("5 QK-Clip", (LineChart("attention/logit_max", "log"), LineChart("train/qk_clipped_heads"))),
        Section(
            "6 Residual streams",
            (LineChart("activation/residual_gain_max", "log"), LineChart("activation/residual_gain_min", "log")),
        ),
        Section("7 What it costs", (LineChart("train/loss", "log"), LineChart("train/tokens_per_second"))),
    ),
    columns=_COLUMNS,
    search="tags.role = 'train'",
)

SPIKES = View(
    key="spikes",
    name="Spikes",
    sections=(
        Section(
            "1 Loss and its spikes",
            (
                # A point for every spike, and a staircase: both survive the sampling of a long run's chart.
                LineChart("train/loss_max", "log"),
                LineChart("spike/loss_at_spike", "log"),
                LineChart("spike/count"),
                LineChart("train/grad_norm", "log"),
            ),
        ),
        Section(
            "2 Scores",
            (LineChart("spike/score_loss"), LineChart("spike/score_grad_norm"), LineChart("spike/score_max_vio")),
        ),
        Section("3 Taken back", (LineChart("rewound/loss", "log"), LineChart("rewound/grad_norm", "log"))),
        Section("4 Final figures", (BarChart("final/spikes"), BarChart("final/steps_lost"))),
    ),
    columns=(
        "metrics.final/spikes",
        "metrics.final/steps_lost",
        "metrics.final/diverged",
        "metrics.final/val_loss",
        "params.response.kind",
        "params.optimizer.lr",
        "params.stability.clip.kind",
        "params.schedule.steps",
        "params.seed",
        "attributes.Models",
    ),
    search="tags.role = 'train'",
)

STUDIES = View(
    key="studies",
    name="Studies",
    sections=(
        Section(
            "1 What the arms come to",
            (
                BarChart("study/val_loss"),
                BarChart("study/max_vio_global"),
                BarChart("study/loss_spikes"),
                BarChart("study/diverged"),
            ),
        ),
        Section("2 On the way", (LineChart("train/loss", "log"), LineChart("moe/max_vio_batch"))),
    ),
    columns=(
        "tags.study",
        "tags.arm",
        "params.optimizer.lr",
        "params.seed",
        "metrics.study/val_loss",
        "metrics.study/diverged",
        "metrics.study/max_vio_global",
        "metrics.study/loss_spikes",
        "metrics.study/clip_rate",
        "attributes.Description",
    ),
    search="tags.role = 'study'",
    group_tag="arm_of_study",
)

REPLAYS = View(
    key="replays",
    name="Replays",
    sections=(
        Section(
            "1 The spike under treatments",
            (LineChart("train/loss", "log"), LineChart("train/grad_norm", "log"), LineChart("moe/max_vio_batch")),
        ),
        Section(
            "2 What the treatments come to",
            (
                BarChart("replay/score"),
                BarChart("replay/events"),
                BarChart("replay/train_loss"),
                BarChart("replay/val_loss"),
            ),
        ),
    ),
    columns=(
        "tags.replay",
        "tags.arm",
        "metrics.replay/events",
        "metrics.replay/score",
        "metrics.replay/peak",
        "metrics.replay/train_loss",
        "metrics.replay/val_loss",
        "attributes.Description",
    ),
    search="tags.role = 'replay'",
)

VIEWS = (TRAINING, SPIKES, ROUTING, HEALTH, TECHNIQUES, SWEEPS, STUDIES, REPLAYS)

# Ten that are easy to tell apart (matplotlib's tab10), as many as runs are on the charts at first. The UI's own choice
# gave two runs of five the same blue.
_RUN_COLOURS = (
    "#1f77b4",
    "#ff7f0e",
    "#2ca02c",
    "#d62728",
    "#9467bd",
    "#8c564b",
    "#e377c2",
    "#7f7f7f",
    "#bcbd22",
    "#17becf",
)


def run_colour(number: int) -> str:
    """The colour of a run in the UI: another one than that of the nine runs before it."""
    return _RUN_COLOURS[number % len(_RUN_COLOURS)]

"""Hyper-connections against plain loops, Hugging Face's DeepseekV4 and finite differences."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from moe.config.residual import HyperConfig, MhcConfig
from moe.layers.hyper_connections import Collapse, HyperConnection, sinkhorn

SIZE, EPS = 12, 1e-6
KINDS = {"hyper": HyperConfig(streams=3), "mhc": MhcConfig(streams=3)}
BY_KIND = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS.keys())


def filled(module: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Weights that read much off the streams: logits of a standard deviation of about 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(1.0 if name.endswith("scale") else 0.0, 0.2, generator=generator)
            if name.endswith("offset"):
                parameter.mul_(4)
    return module.to(dtype)


def streams(n: int = 3, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(2, 5, n, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sub_layer(x: torch.Tensor) -> torch.Tensor:
    return (2 * x).sin() + x.roll(1, dims=-1)


def around(connection: nn.Module, x_BSND: torch.Tensor) -> torch.Tensor:
    read, add = connection(x_BSND)
    added: torch.Tensor = add(sub_layer(read))
    return added


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def balanced(logits: list[list[float]], rounds: int) -> list[list[float]]:
    """Columns, then rows, divided by their sums, one number at a time."""
    n = len(logits)
    b = [[math.exp(value) for value in row] for row in logits]
    for _ in range(rounds):
        for j in range(n):
            total = sum(b[i][j] for i in range(n))
            for i in range(n):
                b[i][j] /= total
        b = [[value / sum(row) for value in row] for row in b]
    return b


def expected(connection: HyperConnection, x_ND: torch.Tensor) -> torch.Tensor:
    """X' of one token as the paper writes it."""
    n, config = len(x_ND), connection.config
    p = {name: parameter.double() for name, parameter in connection.connection.named_parameters()}
    flat = x_ND.double().flatten()
    normed = flat / (flat.square().mean() + EPS).sqrt()
    scales = [float(p["scale"][0])] * n + [float(p["scale"][1])] * n + [float(p["scale"][2])] * n * n
    read = [s * float(w @ normed) + float(o) for s, w, o in zip(scales, p["weight"], p["offset"], strict=True)]
    a, c, b = read[:n], read[n : 2 * n], [read[(2 + i) * n : (3 + i) * n] for i in range(n)]
    if isinstance(config, MhcConfig):
        a, c, b = [sigmoid(v) for v in a], [2 * sigmoid(v) for v in c], balanced(b, config.sinkhorn_rounds)
    y = sub_layer(torch.stack([a[i] * x_ND[i].double() for i in range(n)]).sum(dim=0))
    return torch.stack([sum((b[i][j] * x_ND[j].double() for j in range(n)), c[i] * y) for i in range(n)])


@BY_KIND
def test_streams_are_read_mixed_and_written_as_the_paper_says(config: HyperConfig | MhcConfig) -> None:
    connection, x = filled(HyperConnection(config, SIZE, EPS, 0)), streams()
    with torch.no_grad():
        want = torch.stack([expected(connection, token) for token in x.flatten(0, 1)])
        torch.testing.assert_close(around(connection, x).flatten(0, 1).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rounds", [1, 2, 20])
def test_sinkhorn_is_exp_and_alternating_division(rounds: int) -> None:
    logits = torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2
    found = sinkhorn(logits, rounds)
    for token in range(6):
        want = torch.tensor(balanced(logits[:, :, token].tolist(), rounds), dtype=torch.float64)
        torch.testing.assert_close(found[:, :, token], want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rounds", [1, 3, 20])
def test_the_gradient_through_all_rounds_is_that_of_finite_differences(rounds: int) -> None:
    logits = torch.randn(4, 4, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sinkhorn(x, rounds), logits)


@pytest.mark.parametrize(("deviation", "least", "most"), [(0.3, 1e-16, 1e-15), (1.0, 1e-5, 1e-3), (3.0, 2e-2, 1e-1)])
def test_twenty_rounds_leave_columns_as_near_to_1_as_the_docs_say(deviation: float, least: float, most: float) -> None:
    """The largest error of a thousand: 2e-16, 2e-4 and 5e-2. The median is 0, 4e-13 and 2e-4. Rows are exact."""
    logits = torch.randn(4, 4, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * deviation
    b_NNT = sinkhorn(logits, 20)
    assert least < float((b_NNT.sum(dim=0) - 1).abs().max()) < most
    torch.testing.assert_close(b_NNT.sum(dim=1), torch.ones(4, 1000, dtype=torch.float64), rtol=0, atol=1e-15)


def test_extreme_logits_give_finite_factors_and_gradients() -> None:
    logits = torch.zeros(3, 3, 2)
    logits[0, :, 0], logits[:, :, 1] = -300.0, torch.eye(3) * 1e4
    logits.requires_grad_()
    b_NNT = sinkhorn(logits, 20)
    (b_NNT * torch.arange(18.0).view(3, 3, 2)).sum().backward()
    assert b_NNT.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    torch.testing.assert_close(b_NNT[:, :, 1], torch.eye(3))


@BY_KIND
def test_gradients_of_weights_and_streams_are_those_of_finite_differences(config: HyperConfig | MhcConfig) -> None:
    connection = filled(HyperConnection(config, SIZE, EPS, 0), dtype=torch.float64)
    x = streams(dtype=torch.float64)[:1, :2].requires_grad_()
    names = [name for name, _ in connection.named_parameters()]

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        state = dict(zip(names, parameters, strict=True))
        read, add = torch.func.functional_call(connection, state, (x,))
        written: torch.Tensor = add(sub_layer(read))
        return written

    assert torch.autograd.gradcheck(run, (x, *connection.parameters()), fast_mode=True)


def theirs(n: int, eps: float = 0.0) -> Any:
    """What Hugging Face's modules read of a config. Its ``hc_eps`` of 1e-6 guards sums; the paper has none."""
    return SimpleNamespace(hc_mult=n, hc_sinkhorn_iters=20, hc_eps=eps, rms_norm_eps=EPS, hidden_size=SIZE)


def transposed(tensor: torch.Tensor, n: int) -> torch.Tensor:
    """Hugging Face's mixing matrix is (from, to): the rows that make it up in another order."""
    mixing = tensor[2 * n :].unflatten(0, (n, n)).transpose(0, 1).flatten(0, 1)
    return torch.cat((tensor[: 2 * n], mixing))


@pytest.mark.parametrize("n", [2, 4])
def test_factors_outputs_and_gradients_are_hugging_faces(n: int) -> None:
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

    ours = filled(HyperConnection(MhcConfig(streams=n), SIZE, EPS, 0))
    reference = DeepseekV4HyperConnection(theirs(n))
    read = ours.connection
    with torch.no_grad():
        reference.fn.copy_(transposed(read.weight, n))
        reference.base.copy_(transposed(read.offset, n))
        reference.scale.copy_(read.scale)
    x, other = streams(n).requires_grad_(), streams(n).requires_grad_()

    post, comb, collapsed = reference(other)
    _, b_NNT, c_NT = ours.mappings(x.flatten(0, 1))
    torch.testing.assert_close(ours(x)[0], collapsed, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(c_NT.t().view_as(post), post, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(b_NNT.permute(2, 1, 0).reshape_as(comb), comb, rtol=1e-5, atol=1e-5)

    # As its decoder layer puts them together.
    want = post.unsqueeze(-1) * sub_layer(collapsed).unsqueeze(-2) + comb.transpose(-1, -2) @ other
    found = around(ours, x)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    weights = streams(n, seed=4)
    (found * weights).sum().backward()
    (want * weights).sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(transposed(read.weight.grad, n), reference.fn.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(transposed(read.offset.grad, n), reference.base.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(read.scale.grad, reference.scale.grad, rtol=1e-5, atol=1e-5)


def test_the_guard_of_released_weights_changes_little() -> None:
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

    exact, guarded = (filled(DeepseekV4HyperConnection(theirs(4, eps))) for eps in (0.0, 1e-6))
    with torch.no_grad():
        for without, with_guard in zip(exact(streams(4)), guarded(streams(4)), strict=True):
            torch.testing.assert_close(without, with_guard, rtol=1e-5, atol=2e-5)


def test_the_streams_end_as_hugging_faces_do() -> None:
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperHead

    ours, reference = filled(Collapse(MhcConfig(), SIZE, EPS)), DeepseekV4HyperHead(theirs(4))
    pairs = [(ours.connection.weight, reference.hc_fn), (ours.connection.offset, reference.hc_base)]
    pairs.append((ours.connection.scale, reference.hc_scale))
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine)
    x, same = streams(4).requires_grad_(), streams(4).requires_grad_()
    torch.testing.assert_close(ours(x), reference(same), rtol=1e-5, atol=1e-5)
    ours(x).square().sum().backward()
    reference(same).square().sum().backward()
    torch.testing.assert_close(x.grad, same.grad, rtol=1e-5, atol=1e-5)
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-5)


@BY_KIND
def test_bf16_streams_are_rounded_once_a_sub_layer(config: HyperConfig | MhcConfig) -> None:
    connection, x = filled(HyperConnection(config, SIZE, EPS, 0)), streams(dtype=torch.bfloat16)
    y = streams(dtype=torch.bfloat16, seed=3)[:, :, 0]
    with torch.no_grad():
        (read, add), (wide_read, wide_add) = connection(x), connection(x.float())
        assert read.dtype == add(y).dtype == torch.bfloat16
        assert torch.equal(read, wide_read.bfloat16())
        assert torch.equal(add(y), wide_add(y.float()).bfloat16())


def started(module: HyperConnection | Collapse) -> Any:
    """With its initial values, and nothing read off the streams."""
    with torch.no_grad():
        for name, value in module.connection.initial_values().items():
            module.connection.get_parameter(name).copy_(value)
        module.connection.weight.zero_()
    return module


@pytest.mark.parametrize("n", [2, 4, 7])
@pytest.mark.parametrize("kind", [HyperConfig, MhcConfig])
def test_equal_streams_start_as_a_plain_residual(kind: type[HyperConfig | MhcConfig], n: int) -> None:
    x = streams(1).expand(-1, -1, n, -1)
    for sub_layer_number in range(n + 1):
        connection = started(HyperConnection(kind(streams=n), SIZE, EPS, sub_layer_number))
        with torch.no_grad():
            torch.testing.assert_close(around(connection, x), x + sub_layer(x))
            a_NT, b_NNT, _ = connection.mappings(x.flatten(0, 1))
        assert (a_NT.argmax(dim=0) == sub_layer_number % n).all()
        torch.testing.assert_close(b_NNT.sum(dim=0), torch.ones(n, 10))
        assert (b_NNT.diagonal() > 0.9).all()
    collapse = started(Collapse(kind(streams=n), SIZE, EPS))
    with torch.no_grad():
        torch.testing.assert_close(collapse(x), x[:, :, 0])


def test_both_arms_of_a_comparison_start_as_the_same_function() -> None:
    arms = [started(HyperConnection(kind(), SIZE, EPS, 1)) for kind in (HyperConfig, MhcConfig)]
    with torch.no_grad():
        torch.testing.assert_close(around(arms[0], streams(4)), around(arms[1], streams(4)))

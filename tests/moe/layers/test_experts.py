"""The experts of a rank against a loop over experts; ids, gates and placement drawn at random."""

import pytest
import torch
import torch.nn.functional as F

from moe.config.activation import ActivationConfig, SwigluConfig
from moe.layers.activation import build_activation
from moe.layers.experts import Experts, plan_experts, sum_rows

WIDTH, EXPERT = 12, 10
SWIGLU = SwigluConfig()


def experts_of(count: int, width: int = WIDTH, expert: int = EXPERT, activation: ActivationConfig = SWIGLU) -> Experts:
    generator = torch.Generator().manual_seed(11)
    experts = Experts(count, width, expert, build_activation(activation))
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(0.0, 0.4, generator=generator)
    return experts


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Uniform in [-1, 1], with gradient."""
    generator = torch.Generator().manual_seed(13)
    return (torch.rand(shape, generator=generator, dtype=dtype) * 2 - 1).requires_grad_()


def random_ids(rows: int, k: int, num_experts: int, elsewhere: float = 0.0) -> torch.Tensor:
    """Distinct ids per row, some replaced by -1."""
    generator = torch.Generator().manual_seed(12)
    ids = torch.rand(rows, num_experts, generator=generator).argsort(dim=1)[:, :k]
    return ids.masked_fill(torch.rand(rows, k, generator=generator) < elsewhere, -1)


def looped(
    x: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor, w_up: torch.Tensor, w_down: torch.Tensor
) -> torch.Tensor:
    """Every expert on every row, masked by the gates of the rows that chose it."""
    y = torch.zeros_like(x)
    for expert in range(len(w_up)):
        gate, up = (x @ w_up[expert].T).chunk(2, dim=-1)
        weight = (gates * (ids == expert)).sum(dim=1, keepdim=True)
        y = y + weight * ((gate * torch.sigmoid(gate) * up) @ w_down[expert].T)
    return y


CASES = {
    "even": random_ids(40, 2, 8),
    "some experts empty": random_ids(40, 2, 4),
    "one takes all": torch.full((40, 1), 5),
    "many elsewhere": random_ids(40, 3, 8, elsewhere=0.7),
    "all elsewhere": torch.full((6, 2), -1),
    "no rows": torch.zeros(0, 2, dtype=torch.long),
    "one row": random_ids(1, 4, 8),
    "every expert": random_ids(9, 8, 8),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("ids", CASES.values(), ids=CASES.keys())
def test_output_and_gradients_are_those_of_a_loop(ids: torch.Tensor, dtype: torch.dtype, tolerance: float) -> None:
    experts = experts_of(8)
    x, gates = drawn(len(ids), WIDTH).detach().to(dtype).requires_grad_(), drawn(*ids.shape)
    functional = torch.linspace(-1, 1, WIDTH).to(dtype)
    exact = [t.detach().double().requires_grad_() for t in (x, gates, experts.w_up, experts.w_down)]

    y = experts(x, ids, gates)
    expected = looped(exact[0], ids, *exact[1:])
    (y * functional).sum().backward()
    (expected * functional).sum().backward()

    assert y.dtype == dtype
    pairs = [(y, expected)] + [(a.grad, b.grad) for a, b in zip((x, gates, *experts.parameters()), exact, strict=True)]
    for found, reference in pairs:
        assert found is not None
        assert reference is not None
        assert (found - reference).norm() <= tolerance * reference.norm()
    assert experts.w_up.grad is not None
    assert experts.w_up.grad.dtype == torch.float32


@pytest.mark.parametrize("name", ["some experts empty", "one takes all", "all elsewhere", "no rows"])
def test_an_expert_without_rows_has_a_gradient_of_exact_zeros(name: str) -> None:
    ids, experts = CASES[name], experts_of(8)
    x, gates = drawn(len(ids), WIDTH), drawn(*ids.shape)
    experts(x, ids, gates).square().sum().backward()
    used = set(ids.flatten().tolist()) - {-1}
    for parameter in experts.parameters():
        assert parameter.grad is not None
        for expert, gradient in enumerate(parameter.grad):
            assert (gradient.abs().max() > 0) == (expert in used)


def test_a_choice_elsewhere_gives_its_gate_no_gradient_whatever_the_gate_is() -> None:
    ids, experts = CASES["many elsewhere"], experts_of(8)
    gates = drawn(*ids.shape).detach().masked_fill(ids < 0, float("nan")).requires_grad_()
    experts(drawn(len(ids), WIDTH), ids, gates).sum().backward()
    assert gates.grad is not None
    assert gates.grad[ids < 0].abs().max() == 0
    assert gates.grad[ids >= 0].isfinite().all()


def test_gradients_pass_finite_differences() -> None:
    experts = experts_of(4, width=3, expert=2).double()
    ids = random_ids(5, 2, 4, elsewhere=0.3)
    x, gates = drawn(5, 3, dtype=torch.float64), drawn(5, 2, dtype=torch.float64)

    def function(x: torch.Tensor, gates: torch.Tensor, w_up: torch.Tensor, w_down: torch.Tensor) -> torch.Tensor:
        weights = {"w_up": w_up, "w_down": w_down}
        y: torch.Tensor = torch.func.functional_call(experts, weights, (x, ids, gates))
        return y

    weights = [p.detach().requires_grad_() for p in experts.parameters()]
    assert torch.autograd.gradcheck(function, (x, gates, *weights))


@pytest.mark.parametrize("num_experts", [1, 8, 253, 254, 255, 256, 300])
def test_the_plan_sorts_choices_by_expert(num_experts: int) -> None:
    ids = random_ids(64, min(6, num_experts), num_experts, elsewhere=0.3)
    rows, k = ids.shape
    plan = plan_experts(ids, num_experts)
    flat = ids.flatten().tolist()
    expected = [position for e in range(num_experts) for position, chosen in enumerate(flat) if chosen == e]
    assert plan.pair_P.tolist() == expected
    assert plan.row_P.tolist() == [position // k for position in expected]
    assert plan.ends == [sum(0 <= chosen <= e for chosen in flat) for e in range(num_experts)]
    starts = plan.row_starts.tolist()
    assert len(starts) == rows + 1
    for row in range(rows):
        pairs = [expected[sorted_at] for sorted_at in plan.order_P[starts[row] : starts[row + 1]].tolist()]
        assert pairs == [position for position in range(row * k, row * k + k) if flat[position] >= 0]


def test_two_runs_give_the_same_bits() -> None:
    experts, ids = experts_of(8), random_ids(500, 4, 8)
    x, gates = drawn(500, WIDTH), drawn(500, 4)
    results = []
    for _ in range(2):
        y = experts(x, ids, gates)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, gates, *experts.parameters()))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_rows_of_bf16_are_summed_to_the_rounding_of_the_result() -> None:
    rows = drawn(64, WIDTH).detach().bfloat16()
    total = sum_rows(rows, torch.arange(64).flip(0), torch.tensor([0, 8, 8, 64]))
    exact = torch.stack([rows[56:].double().sum(0), torch.zeros(WIDTH).double(), rows[:56].double().sum(0)])
    # Half a unit in the last place of bf16; sums kept in bf16 would be off by several.
    assert ((total.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()


def test_a_swiglu_with_the_same_weights_agrees() -> None:
    experts, x = experts_of(1), drawn(7, WIDTH)
    y = experts(x, torch.zeros(7, 1, dtype=torch.long), torch.ones(7, 1))
    gate, up = F.linear(x, experts.w_up[0]).chunk(2, dim=-1)
    torch.testing.assert_close(y, F.linear(F.silu(gate) * up, experts.w_down[0]))

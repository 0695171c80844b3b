"""The EDP scripts' mathematics against closed forms. edp_iql has the networks and the diffusion of all three."""

import math

import numpy as np
import pytest
import torch
from conftest import CPU, error_of
from torch.testing import assert_close

import edp_crr
import edp_iql
import edp_td3


def make_diffusion(K=100, sampler="ddpm", steps=15, order=3):
    args = edp_iql.Args(diffusion_steps=K, sampler=sampler, sampler_steps=steps, solver_order=order)
    return edp_iql.Diffusion(args, CPU)


def linear_alpha_bar(K):
    """abar^1 ... abar^K of the linear schedule, by the definition."""
    beta = np.linspace(1e-4 * 1000 / K, 0.02 * 1000 / K, K)
    return np.array([np.prod(1 - beta[: k + 1]) for k in range(K)])


def test_mish():
    """Values and gradients are those of torch, for extreme x too."""
    z = torch.cat([3 * torch.randn(1_000), torch.tensor([-1e4, -100.0, -20.0, 0.0, 19.9, 20.1, 100.0, 1e4])])
    for x, tolerances in ((z.double(), {}), (z, {"atol": 2e-6, "rtol": 1e-6})):
        ours, theirs = (f(x.requires_grad_()) for f in (edp_iql.Mish(), torch.nn.functional.mish))
        assert_close(ours, theirs, **tolerances)
        assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (ours, theirs)), **tolerances)


def test_initial_weights():
    """LeCun normal, zero biases; no activation at the end."""
    layers = list(edp_iql.MLP(11, 3))
    assert [type(layer) for layer in layers] == [torch.nn.Linear, edp_iql.Mish] * 3 + [torch.nn.Linear]
    for layer in layers[::2]:
        assert abs(layer.weight.std() * layer.in_features**0.5 - 1) < 0.1 and (layer.bias == 0).all()


def test_forward_noising_and_action_approximation():
    """Each inverts the other; beyond the action range it is clipped, and has no gradient."""
    d, k = make_diffusion(), torch.arange(100)
    alpha_bar = torch.as_tensor(linear_alpha_bar(100), dtype=torch.float32)[:, None]
    a, epsilon = 2 * torch.rand(100, 3) - 1, torch.randn(100, 3)
    a_k = d.add_noise(a, k, epsilon)
    assert_close(a_k, alpha_bar.sqrt() * a + (1 - alpha_bar).sqrt() * epsilon)
    assert_close(d.approximate(a_k, k, epsilon), a, atol=2e-4, rtol=1e-4)
    epsilon_hat = torch.tensor([[-5.0, 0.1]], requires_grad=True)
    a_hat = d.approximate(torch.tensor([[0.5, 0.5]]), torch.tensor([5]), epsilon_hat)
    assert a_hat[0, 0] == 1 and -1 < a_hat[0, 1] < 1
    a_hat.sum().backward()
    assert epsilon_hat.grad[0, 0] == 0 and epsilon_hat.grad[0, 1] < 0


def test_elbo_weight():
    """beta^k / (2 alpha^k (1 - abar^{k-1})), Eq. of the paper's appendix; its first value uses abar^1."""
    d, alpha_bar = make_diffusion(), linear_alpha_bar(100)
    alpha = np.append(alpha_bar[0], alpha_bar[1:] / alpha_bar[:-1])
    expected = (1 - alpha) / (2 * alpha * (1 - np.append(alpha_bar[0], alpha_bar[:-1])))
    assert_close(d.elbo_weight, torch.as_tensor(expected, dtype=torch.float32))


# The data N(m, c^2): the optimal noise prediction and the exact solution of the probability-flow ODE are known.
MEAN, STD = 0.2, 0.3


class GaussianPolicy(torch.nn.Module):
    """E[epsilon | a^k] for actions N(m, c^2) and a step k, fractional too."""

    def __init__(self, alpha_bar):
        super().__init__()
        self.log_alpha = 0.5 * np.log(alpha_bar)

    def forward(self, s, a_k, k):
        log_alpha = np.interp(float(k), np.arange(len(self.log_alpha)), self.log_alpha)
        alpha, sigma2 = math.exp(log_alpha), -math.expm1(2 * log_alpha)
        return math.sqrt(sigma2) * (a_k - alpha * MEAN) / (alpha**2 * STD**2 + sigma2)


def sample_gaussian(d, alpha_bar, n=20_000):
    noise = torch.randn(d.num_noises, n, 1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return d.sample(GaussianPolicy(alpha_bar), torch.zeros(n, 1), noise)


@pytest.mark.parametrize("sampler, steps, order", [
    ("dpm-solver", 60, 3), ("dpm-solver", 200, 2), ("dpm-solver", 400, 1), ("ddpm", 15, 3),
])  # fmt: skip
def test_samplers_reproduce_gaussian_data(sampler, steps, order):
    """Mean and standard deviation, with enough steps: the default 15 calls leave this standard deviation at 0.25."""
    a = sample_gaussian(make_diffusion(1000, sampler, steps, order), linear_alpha_bar(1000))
    assert abs(a.mean() - MEAN) < 0.01 and abs(a.std() - STD) < 0.01


def test_other_schedules(monkeypatch, capsys):
    """DPM-Solver refuses a cosine schedule, whose abar^K is next to zero, and one with a coarse first step."""

    def set_beta(beta):
        """Diffusion's only call of linspace for K values."""
        monkeypatch.setattr(np, "linspace", lambda *args: beta if args[2] == len(beta) else linspace(*args))

    linspace, f = np.linspace, np.cos((np.arange(1_001) / 1_000 + 0.008) / 1.008 * np.pi / 2) ** 2
    beta = np.minimum(1 - f[1:] / f[:-1], 0.999)
    set_beta(beta)
    a = sample_gaussian(make_diffusion(1_000, "ddpm"), np.cumprod(1 - beta))
    assert abs(a.mean() - MEAN) < 0.01 and abs(a.std() - STD) < 0.02
    for K, other in ((1_000, beta), (100, np.full(100, 0.05))):
        set_beta(other)
        assert "--sampler ddpm" in error_of(capsys, lambda K=K: make_diffusion(K, "dpm-solver"))
    monkeypatch.undo()
    assert "--diffusion-steps 20" in error_of(capsys, lambda: make_diffusion(20))  # the last beta would be 1


@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_of_convergence(order):
    """Halving the step divides the global error by 2^order."""

    def error(steps):
        d = make_diffusion(1000, "dpm-solver", steps, order)
        alpha, sigma = np.array(d.alpha), np.array(d.sigma)
        scale = np.sqrt(alpha**2 * STD**2 + sigma**2)

        def epsilon(x, i):
            return sigma[i] * (x - alpha[i] * MEAN) / scale[i] ** 2

        # the exact flow keeps (x - alpha m) / scale; start where the schedule is smooth, end before it is steep
        start, end = steps // 4, steps // 4 + steps // 2
        x = torch.linspace(-2, 2, 9, dtype=torch.float64)
        exact = alpha[end] * MEAN + scale[end] / scale[start] * (x - alpha[start] * MEAN)
        for i in range(start, end, order):
            x = d.dpm_solver_step(epsilon, x, i, order)
        return (x - exact).abs().max().item()

    slope = math.log2(error(384) / error(768))
    assert abs(slope - order) < 0.3


@pytest.mark.parametrize("order, steps, expected", [
    (3, 15, [3, 3, 3, 3, 2, 1]), (3, 16, [3] * 5 + [1]), (3, 17, [3] * 5 + [2]), (2, 5, [2, 2, 1]), (1, 3, [1, 1, 1]),
])  # fmt: skip
def test_number_of_network_calls(order, steps, expected):
    d, calls = make_diffusion(1000, "dpm-solver", steps, order), []
    d.sample(lambda s, a, k: calls.append(float(k)) or a, torch.zeros(2, 1), torch.randn(1, 2, 1))
    assert d.orders == expected and len(calls) == steps
    assert calls == pytest.approx(d.t_index[:-1].tolist())  # each time once, from the noise to the actions
    d = make_diffusion(100, "dpm-solver")  # the official code ends at t = 1e-3, before the first step, and gives NaN
    assert_close(d.t_index[[0, -1]], torch.tensor([99.0, 0.0]))
    assert np.isfinite(d.lambda_).all()


def test_value_loss_and_weights():
    """Q in {0, 1}, each half of the time: the loss is minimal at the expectile, v = tau."""
    for tau in (0.5, 0.7, 0.9):
        v = torch.tensor(tau, requires_grad=True)
        edp_iql.value_loss(v.expand(2), torch.tensor([0.0, 1.0]), tau).backward()
        assert_close(v.grad, torch.tensor(0.0))
    q, v = torch.tensor([1.0, 0.0, 9.0]), torch.tensor([0.0, 1.0, 0.0])
    assert_close(edp_iql.iql_weight(q, v, 3.0, 100.0), torch.tensor([math.exp(3), math.exp(-3), 100.0]))
    assert_close(edp_iql.iql_weight(q, v, 0.0, 100.0), torch.ones(3))
    advantage = torch.tensor([1.0, -1.0, 9.0, 0.0])
    assert_close(edp_crr.crr_weight(advantage, 0.5, 20.0), torch.tensor([math.exp(2), math.exp(-2), 20.0, 1.0]))


def test_diffusion_ql_differentiates_the_whole_chain():
    """d a / d theta of a whole sample, through every step, by finite differences."""
    d = make_diffusion(25)
    noise, s = torch.randn(26, 8, 1, dtype=torch.float64) / 10, torch.zeros(8, 1, dtype=torch.float64)
    theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def sample(theta):
        return d.sample(lambda s, a, k: theta * a + 0.1 * theta, s, noise)

    assert (sample(theta).abs() < 1).all()  # where the clip has a gradient
    assert torch.autograd.gradcheck(lambda theta: sample(theta).sum(), theta)


def test_action_selection_frequencies():
    """Candidates are chosen in proportion to exp(min(Q1, Q2)), each the smaller one somewhere."""
    offers, energies = torch.tensor([-0.5, 0.0, 0.5]), torch.tensor([[0.0, 1.0, 2.0], [1.0, 2.0, 0.5]])

    diffusion, critic = edp_iql.Diffusion(edp_iql.Args(), CPU), edp_iql.Critic(1, 1)
    diffusion.sample = lambda policy, s, noise: offers.repeat(len(s) // 3)[:, None]
    critic.forward = lambda s, a: energies[:, (2 * a[:, 0] + 1).round().long()].unbind()
    parts = diffusion, edp_iql.Policy(1, 1), critic
    chosen = edp_iql.select_actions(*parts, torch.zeros(30_000, 1), 3)
    frequencies = torch.stack([(chosen == offer).float().mean() for offer in offers])
    assert_close(frequencies, energies.amin(0).softmax(0), atol=0.01, rtol=0)


@pytest.mark.parametrize("script, flags, noises", [
    (edp_iql, {}, {}), (edp_crr, {}, {"noise": (31, 64, 3), "z": (10, 64, 3)}),
    (edp_td3, {}, {"next_noise": (31, 64, 3)}),
    (edp_td3, {"action_approximation": False}, {"noise": (31, 64, 3), "next_noise": (31, 64, 3)}),
])  # fmt: skip
def test_draws(script, flags, noises):
    """Every step k is drawn, either critic half the time; all noise is standard normal, none of it twice."""
    args = script.Args(diffusion_steps=30, sampler="ddpm", batch_size=64, **flags)
    draws = [script.draw(args, script.Diffusion(args, CPU), 3, CPU) for _ in range(50)]
    count = torch.cat([one["k"] for one in draws]).bincount()
    assert len(count) == 30 and count.min() > 50  # 107 on average
    for name, shape in ({"epsilon": (64, 3)} | noises).items():
        noise = torch.stack([one[name] for one in draws])
        assert noise.shape[1:] == shape and len(noise.unique()) >= 0.8 * noise.numel()
        assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    if script is edp_td3:
        assert 0.2 < torch.stack([one["first_critic"] for one in draws]).float().mean() < 0.8

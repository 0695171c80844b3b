"""The EDP scripts' mathematics against closed forms."""

import importlib
import math

import numpy as np
import pytest
import torch
from conftest import EDP
from torch.testing import assert_close

import edp_crr
import edp_iql
import edp_td3

CPU = torch.device("cpu")


@pytest.fixture(params=EDP)
def script(request):
    return importlib.import_module(request.param)


def linear_alpha_bar(K):
    """abar^1 ... abar^K of the linear schedule, by the definition."""
    beta = np.linspace(1e-4 * 1000 / K, 0.02 * 1000 / K, K)
    return np.array([np.prod(1 - beta[: k + 1]) for k in range(K)])


def test_mish(script):
    x = (3 * torch.randn(1_000, dtype=torch.float64)).requires_grad_()
    assert_close(script.Mish.apply(x), torch.nn.functional.mish(x))
    assert torch.autograd.gradcheck(script.Mish.apply, x)
    assert_close(script.Mish.apply(x.detach()), torch.nn.functional.mish(x.detach()))  # another path without gradient
    extreme = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], requires_grad=True)
    script.Mish.apply(extreme).sum().backward()
    for x in (extreme, extreme.detach()):
        assert_close(script.Mish.apply(x), torch.nn.functional.mish(x), atol=2e-6, rtol=1e-6)
    assert_close(extreme.grad, torch.tensor([0.0, 0.0, 0.6, 1.0, 1.0]))


def test_flatten(script):
    """The vector and the parameters are one memory."""
    net = script.MLP(3, 2)
    before = [p.detach().clone() for p in net.parameters()]
    vector = script.flatten(net)
    assert_close(vector.detach(), torch.cat([p.flatten() for p in before]))
    vector.data.zero_()
    assert all((p == 0).all() for p in net.parameters())


def test_forward_noising(script):
    d, K = script.Diffusion(100, "ddpm", 15, 3, CPU), 100
    k = torch.tensor([0, 1, 37, 99])
    a, zero = torch.full((4, 2), 0.7), torch.zeros(4, 2)
    alpha_bar = torch.as_tensor(linear_alpha_bar(K)[k], dtype=torch.float32)[:, None]
    assert_close(d.forward_noising(a, k, zero), alpha_bar.sqrt() * a)
    assert_close(d.forward_noising(zero, k, a), (1 - alpha_bar).sqrt() * a)


def test_action_approximation_inverts_the_forward_noising(script):
    d = script.Diffusion(100, "ddpm", 15, 3, CPU)
    k = torch.arange(100)
    a, epsilon = 2 * torch.rand(100, 3) - 1, torch.randn(100, 3)
    assert_close(d.approximate_action(d.forward_noising(a, k, epsilon), k, epsilon), a, atol=2e-4, rtol=1e-4)


def test_action_approximation_is_clipped_without_gradient_outside(script):
    d = script.Diffusion(100, "ddpm", 15, 3, CPU)
    epsilon_hat = torch.tensor([[-5.0, 0.1]], requires_grad=True)
    a_hat = d.approximate_action(torch.tensor([[0.5, 0.5]]), torch.tensor([5]), epsilon_hat)
    assert a_hat[0, 0] == 1 and -1 < a_hat[0, 1] < 1
    a_hat.sum().backward()
    assert epsilon_hat.grad[0, 0] == 0 and epsilon_hat.grad[0, 1] < 0


def test_elbo_weight(script):
    """beta^k / (2 alpha^k (1 - abar^{k-1})), Eq. of the paper's appendix; its first value uses abar^1."""
    d, alpha_bar = script.Diffusion(100, "ddpm", 15, 3, CPU), linear_alpha_bar(100)
    alpha = np.append(alpha_bar[0], alpha_bar[1:] / alpha_bar[:-1])
    expected = (1 - alpha) / (2 * alpha * (1 - np.append(alpha_bar[0], alpha_bar[:-1])))
    assert_close(d.elbo_weight, torch.as_tensor(expected, dtype=torch.float32))
    assert torch.isfinite(d.elbo_weight).all()


# The data N(m, c^2): the optimal noise prediction and the exact solution of the probability-flow ODE are known.
MEAN, STD = 0.2, 0.3


class GaussianPolicy(torch.nn.Module):
    """E[epsilon | a^k] for actions N(m, c^2) and a step k, fractional too."""

    def __init__(self, d):
        super().__init__()
        self.act_dim, self.K, self.log_alpha = 1, d.K, 0.5 * np.log(linear_alpha_bar(d.K))

    def forward(self, s, a_k, k):
        log_alpha = np.interp(float(k), np.arange(self.K), self.log_alpha)
        alpha, sigma2 = math.exp(log_alpha), -math.expm1(2 * log_alpha)
        return math.sqrt(sigma2) * (a_k - alpha * MEAN) / (alpha**2 * STD**2 + sigma2)


@pytest.mark.parametrize("sampler, steps, order", [
    ("dpm-solver", 60, 3), ("dpm-solver", 200, 2), ("dpm-solver", 400, 1), ("ddim", 500, 3), ("ddpm", 15, 3),
])  # fmt: skip
def test_samplers_reproduce_gaussian_data(script, sampler, steps, order):
    """Mean and standard deviation, with enough steps: the default 15 calls leave this standard deviation at 0.25."""
    d = script.Diffusion(1000, sampler, steps, order, CPU)
    with torch.no_grad():
        noise = torch.randn(d.draws, 20_000, 1, generator=torch.Generator().manual_seed(0))
        a = d.sample(GaussianPolicy(d), torch.zeros(20_000, 1), noise)
    assert abs(a.mean() - MEAN) < 0.01
    assert abs(a.std() - STD) < 0.01


@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_of_convergence(script, order):
    """Halving the step divides the global error by 2^order."""

    def error(steps):
        d = script.Diffusion(1000, "dpm-solver", steps, order, CPU)
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
def test_number_of_network_calls(script, order, steps, expected):
    d = script.Diffusion(1000, "dpm-solver", steps, order, CPU)
    assert d.orders == expected and sum(d.orders) == steps


def test_solver_ends_at_the_first_discrete_step(script):
    """K = 100: the official code ends at t = 1e-3, before the first step, and gives NaN."""
    d = script.Diffusion(100, "dpm-solver", 15, 3, CPU)
    assert_close(d.t_index[[0, -1]], torch.tensor([99.0, 0.0]))
    assert np.isfinite(d.lambda_).all()


def test_value_loss_is_minimal_at_the_expectile():
    """Q in {0, 1}, each half of the time: the expectile tau is at v = tau."""
    q = torch.tensor([0.0, 1.0])
    for tau in (0.5, 0.7, 0.9):
        v = torch.tensor(tau, requires_grad=True)
        edp_iql.value_loss(v.expand(2), q, tau).backward()
        assert_close(v.grad, torch.tensor(0.0))


def test_iql_weight():
    q, v = torch.tensor([1.0, 0.0, 9.0]), torch.tensor([0.0, 1.0, 0.0])
    assert_close(edp_iql.iql_weight(q, v, 3.0, 100.0), torch.tensor([math.exp(3), math.exp(-3), 100.0]))
    assert_close(edp_iql.iql_weight(q, v, 0.0, 100.0), torch.ones(3))


@pytest.mark.parametrize("baseline, expected", [("mean", 1.0), ("max", -3.0)])
def test_crr_advantage(baseline, expected):
    """Q(s, a) = 2 a (min of 2 a and 2 a + 1): a = 1 against a' in {-1, 0, 2.5}."""

    class Linear(edp_crr.Critic):
        def forward(self, s, a):
            return 2 * a[:, 0] + 1, 2 * a[:, 0]

    s, q, a_hat_0 = torch.zeros(4, 2), torch.full((4,), 2.0), torch.full((4, 1), 0.5)
    z = torch.tensor([-1.5, -0.5, 2.0])[:, None, None].expand(3, 4, 1)
    assert_close(edp_crr.crr_advantage(Linear(2, 1), s, q, a_hat_0, z, baseline), torch.full((4,), expected))


def test_crr_weight():
    advantage = torch.tensor([1.0, -1.0, 9.0, 0.0])
    assert_close(edp_crr.crr_weight(advantage, "exp", 0.5, 20.0), torch.tensor([math.exp(2), math.exp(-2), 20.0, 1.0]))
    assert edp_crr.crr_weight(advantage, "binary", 0.5, 20.0).tolist() == [1, 0, 1, 0]


def test_q_loss():
    """-eta mean(Q) / mean|scale|, and no gradient through the scale."""
    q = torch.tensor([1.0, -3.0], requires_grad=True)
    assert_close(edp_td3.q_loss(q, torch.tensor([4.0, -4.0]), eta=2.0), torch.tensor(0.5))
    loss = edp_td3.q_loss(q, q, eta=2.0)
    assert_close(loss, torch.tensor(1.0))
    loss.backward()
    assert_close(q.grad, torch.tensor([-0.5, -0.5]))


def test_max_q_backup():
    q1, q2 = torch.tensor([[1.0, 5.0, 3.0]]), torch.tensor([[4.0, 0.0, 2.0]])
    assert edp_td3.max_q_backup(q1, q2, 1).tolist() == [4]
    assert edp_td3.max_q_backup(q1, q2, 2).tolist() == [2]


def test_diffusion_ql_differentiates_the_whole_chain():
    """d a / d theta of a whole sample, through every step, by finite differences."""
    d = edp_td3.Diffusion(5, "ddpm", 5, 3, CPU, "vp")
    noise, s = torch.randn(6, 8, 1, dtype=torch.float64) / 10, torch.zeros(8, 1, dtype=torch.float64)
    theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def sample(theta):
        return d.sample(lambda s, a, k: theta * a + 0.1 * theta, s, noise)

    assert (sample(theta).abs() < 1).all()  # where the clip has a gradient
    assert torch.autograd.gradcheck(lambda theta: sample(theta).sum(), theta)


@pytest.mark.parametrize("name", ["edp_td3", "edp_crr"])
def test_policy_target_moves_every_fifth_update(name):
    module = {"edp_td3": edp_td3, "edp_crr": edp_crr}[name]
    args = module.Args(policy_target_start=10)
    moves = [step for step in range(22) if module.schedule(args, step, CPU)["policy_tau"] > 0]
    assert moves == [14, 19]  # updates 15 and 20, counted from 1


def test_critic_losses(script):
    r, mask, next_v = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]), torch.tensor([10.0, 10.0])
    target = torch.tensor([1 + 0.5 * 10, 2.0])
    losses = script.critic_losses(target + 1, target - 2, r, mask, next_v, gamma=0.5)
    assert_close(torch.stack(losses), torch.tensor([1.0, 4.0]))


@pytest.mark.parametrize("likelihood", ["mse", "elbo"])
def test_reconstruction_and_weighted_regression(script, likelihood):
    """Against the formulas, for a policy that always predicts no noise."""
    d = script.Diffusion(100, "ddpm", 15, 3, CPU)
    s, a, epsilon = torch.zeros(4, 1), torch.rand(4, 2) - 0.5, torch.randn(4, 2) / 10
    k, f = torch.tensor([3, 20, 40, 60]), torch.tensor([0.0, 1.0, 2.0, 3.0])
    error, a_hat_0 = script.reconstruct(d, lambda s, a, k: 0 * a, s, a, k, epsilon)
    assert_close(error, epsilon**2)
    alpha_bar = torch.as_tensor(linear_alpha_bar(100), dtype=torch.float32)[k]
    assert_close(a_hat_0, (a + (1 / alpha_bar - 1).sqrt()[:, None] * epsilon).clamp(-1, 1))
    if not hasattr(script, "weighted_regression"):
        return
    guidance = script.weighted_regression(d, error, a, a_hat_0, k, f, likelihood)
    if likelihood == "mse":
        expected = (f * ((a - a_hat_0) ** 2).sum(1) / 2).mean()
    else:
        expected = (f * d.elbo_weight[k] * (epsilon**2).sum(1)).mean()
    assert_close(guidance, expected)


def test_action_selection_frequencies(script):
    """Candidates are chosen in proportion to exp(min(Q1, Q2)), each the smaller one somewhere."""
    offers, energies = torch.tensor([-0.5, 0.0, 0.5]), torch.tensor([[0.0, 1.0, 2.0], [1.0, 2.0, 0.5]])

    class Offers(script.Diffusion):
        def sample(self, policy, s, noise):
            return offers.repeat(len(s) // 3)[:, None]

    class Energies(script.Critic):
        def forward(self, s, a):
            return energies[:, (2 * a[:, 0] + 1).round().long()].unbind()

    args = (Offers(100, "ddim", 15, 3, CPU), script.Policy(1, 1), Energies(1, 1))
    chosen = script.select_actions(*args, torch.zeros(30_000, 1), 3, torch.Generator().manual_seed(0))
    frequencies = torch.stack([(chosen == offer).float().mean() for offer in offers])
    assert_close(frequencies, energies.amin(0).softmax(0), atol=0.01, rtol=0)


@pytest.mark.parametrize("script, flags, noises", [
    (edp_iql, {}, {}), (edp_crr, {}, {"noise": (31, 64, 3), "z": (10, 64, 3)}),
    (edp_td3, {}, {"noise": (0, 64, 3), "next_noise": (31, 64, 3)}),
    (edp_td3, {"action_approximation": False, "max_q_backup": True},
     {"noise": (31, 64, 3), "next_noise": (31, 640, 3)}),
])  # fmt: skip
def test_draws(script, flags, noises):
    """Every step k is drawn, either critic half the time; all noise is standard normal, none of it twice."""
    args, d = script.Args(diffusion_steps=30, batch_size=64, **flags), script.Diffusion(30, "ddpm", 15, 3, CPU)
    draws = [script.draw(args, d, 3, CPU) for _ in range(50)]
    count = torch.cat([chance["k"] for chance in draws]).bincount()
    assert len(count) == 30 and count.min() > 50  # 107 on average
    for name, shape in ({"epsilon": (64, 3)} | noises).items():
        noise = torch.stack([chance[name] for chance in draws])
        assert noise.shape[1:] == shape and len(noise.unique()) >= 0.8 * noise.numel()
        assert not noise.numel() or (abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05)
    if script is edp_td3:
        assert 0.2 < torch.stack([chance["first_critic"] for chance in draws]).float().mean() < 0.8


def test_twin_minimum(script):
    critic, s, a = script.Critic(2, 1), torch.randn(50, 2), torch.randn(50, 1)
    q1, q2 = critic(s, a)
    assert_close(critic.min(s, a), torch.where(q1 < q2, q1, q2))
    assert (q1 < q2).any() and (q1 > q2).any()

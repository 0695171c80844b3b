"""EDIS against closed forms: sampler, guidance, energies, inpainting, returns."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import edis_sac as edis

CPU = torch.device("cpu")
ARGS = edis.Args()


class GaussianDenoiser:
    """D(x; sigma) = E[x | x + sigma n] of N(mean, cov), with the first `held` columns given without noise."""

    def __init__(self, mean, cov):
        self.mean, self.cov = torch.tensor(mean), torch.tensor(cov)

    def __call__(self, x, sigma, held=0):
        h, sigma = held, torch.as_tensor(sigma).reshape(-1)[0]
        gain = self.cov[h:, :h] @ torch.linalg.inv(self.cov[:h, :h]) if h else torch.zeros(len(self.mean), 0)
        mean = self.mean[h:] + (x[:, :h] - self.mean[:h]) @ gain.T
        cov = self.cov[h:, h:] - gain @ self.cov[:h, h:]
        posterior = cov @ torch.linalg.inv(cov + sigma**2 * torch.eye(len(cov)))
        return torch.cat([x[:, :h], mean + (x[:, h:] - mean) @ posterior.T], dim=1)


COV = [[1.0, 0.6, -0.3], [0.6, 0.8, 0.2], [-0.3, 0.2, 0.5]]


@pytest.mark.parametrize("churn", [0.0, 80.0])
@pytest.mark.parametrize("mean, cov", [([0.4], [[0.25]]), ([0.4, -1.0, 0.0], COV)])
def test_unguided_sampling_gives_mean_and_covariance(mean, cov, churn):
    torch.manual_seed(0)
    x = edis.EDM(64, churn, CPU).sample(GaussianDenoiser(mean, cov), torch.randn(30_000, len(mean)))
    assert_close(x.mean(0), torch.tensor(mean), atol=0.02, rtol=0)
    assert_close(x.T.cov().reshape(len(mean), -1), torch.tensor(cov), atol=0.06, rtol=0)


@pytest.mark.parametrize("held", [1, 2])
def test_given_columns_condition_the_rest(held):
    """p(a | s) of a correlated Gaussian: conditional mean and variance, and the given columns as they were."""
    torch.manual_seed(0)
    given = torch.tensor([[1.5, -1.0]])[:, :held].expand(30_000, -1)
    x = torch.cat([given, torch.randn(30_000, 3 - held)], dim=1)
    x = edis.EDM(64, 80.0, CPU).sample(GaussianDenoiser([0.0] * 3, COV), x, held=held)
    cov = torch.tensor(COV)
    gain = cov[held:, :held] @ torch.linalg.inv(cov[:held, :held])
    assert_close(x[:, :held], given)
    assert_close(x[:, held:].mean(0), gain @ given[0], atol=0.03, rtol=0)
    rest = (cov[held:, held:] - gain @ cov[:held, held:]).reshape(3 - held, -1)
    assert_close(x[:, held:].T.cov().reshape(3 - held, -1), rest, atol=0.03, rtol=0)


def test_replacement_is_no_conditioning():
    """Why the denoiser is told what is given: s + sigma epsilon in an unconditional sampler misses p(a|s)."""
    torch.manual_seed(0)
    joint, edm = GaussianDenoiser([0.0, 0.0], [[1.0, 0.8], [0.8, 1.0]]), edis.EDM(64, 80.0, CPU)

    def replaced(x, sigma, held):
        return joint(torch.cat([1.5 + sigma * torch.randn_like(x[:, :1]), x[:, 1:]], dim=1), sigma)

    x = edm.sample(replaced, torch.randn(20_000, 2))
    assert x[:, 1].mean() < 1.0  # 0.8 * 1.5 = 1.2 is right


def test_denoiser_learns_joint_and_conditionals():
    """The trained network, told what is given, has the optimal denoiser's values for all three of its tasks."""
    torch.manual_seed(0)
    args = edis.dataclasses.replace(ARGS, denoiser_updates=2_500, denoiser_ema=0.99, denoiser_lr=2e-3)
    x = torch.randn(20_000, 3) @ torch.linalg.cholesky(torch.tensor(COV)).T
    denoiser = edis.Denoiser(3, 64, 2, (0, 1, 2))
    ema = edis.copy.deepcopy(denoiser).requires_grad_(False)
    edis.train_denoiser(args, denoiser, ema, denoiser, x)
    exact, test = GaussianDenoiser([0.0] * 3, COV), x[:2_000]
    for held in (0, 1, 2):
        for sigma in (0.1, 0.5, 2.0):
            noised = torch.cat([test[:, :held], (test + sigma * torch.randn_like(test))[:, held:]], dim=1)
            with torch.no_grad():
                error = ema(noised, torch.tensor(sigma), held) - exact(noised, sigma, held)
            assert error.square().mean().sqrt() < 0.08, (held, sigma)
            assert (error[:, :held] == 0).all()


def test_preconditioning():
    """c_skip, c_out, c_in, c_noise of Karras et al. with sigma_data = 1; a given column is not scaled."""
    denoiser, sigma = edis.Denoiser(2, 8, 1, (0, 1)), torch.tensor([0.5, 3.0])
    seen = []
    denoiser.first.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    denoiser.last.weight.data.zero_()
    denoiser.last.bias.data.fill_(1.0)
    x = torch.ones(2, 2)
    total = sigma**2 + 1
    assert_close(denoiser(x, sigma), (1 / total + sigma / total.sqrt())[:, None].expand(2, 2))
    assert_close(seen[0][:, :2], total.rsqrt()[:, None].expand(2, 2))
    assert_close(seen[0][:, 2:10], torch.cos(sigma.log()[:, None] / 4 * denoiser.frequencies))
    assert (denoiser(x, sigma, 1)[:, 0] == 1).all() and (seen[1][:, 0] == 1).all()


def test_edm_loss():
    """(sigma^2 + 1) / sigma^2 times the squared error of what is not given."""
    x, sigma, noise = torch.zeros(2, 3), torch.tensor([0.5, 2.0]), torch.ones(2, 3)
    loss = edis.edm_loss(lambda noised, sigma, held: noised, x, sigma, noise)  # error sigma
    assert_close(loss, (sigma**2 + 1).mean())
    seen = []
    edis.edm_loss(lambda noised, sigma, held: seen.append(noised) or noised, x, sigma, noise, held=2)
    assert_close(seen[0], torch.tensor([[0.0, 0.0, 0.5], [0.0, 0.0, 2.0]]))


# p = N(0, 1), q = N(1, 0.5^2): E = log p_sigma / q_sigma at every level is known
def exact_gradient(x, sigma):
    """grad log (p_sigma / q_sigma)."""
    return -x / (1 + sigma**2) + (x - 1) / (0.25 + sigma**2)


def moments(guidance, churn=80.0):
    torch.manual_seed(0)
    x = edis.EDM(64, churn, CPU).sample(GaussianDenoiser([0.0], [[1.0]]), torch.randn(20_000, 1), guidance)
    return x.mean().item(), x.std().item()


def near_target(guidance, tolerance, **kwargs):
    mean, std = moments(guidance, **kwargs)
    return abs(mean - 1) < tolerance and abs(std - 0.5) < tolerance


@pytest.mark.parametrize("churn", [0.0, 80.0])
def test_exact_energies_give_the_target(churn):
    assert near_target(exact_gradient, 0.02, churn=churn)


def test_wrong_guidance_misses():
    """Without the factor sigma; with the gradient in coordinates that are twice as large."""
    assert not near_target(lambda x, sigma: exact_gradient(x, sigma) / sigma, 0.1)
    assert not near_target(lambda x, sigma: 2 * exact_gradient(x, sigma), 0.1)


class RawEnergies(torch.nn.Module):
    """The exact energy, of raw coordinates y = 3 + 2 x: autograd owes the chain rule."""

    ends = (1, 2, 3)

    def forward(self, i, x, sigma):
        y, sigma = 3 + 2 * x[:, i], 2 * sigma
        p, q = -((y - 3) ** 2) / (2 * (4 + sigma**2)), -((y - 5) ** 2) / (2 * (1 + sigma**2))
        return p - q


@pytest.mark.parametrize("i", range(3))
def test_guidance_is_the_gradient_in_normalised_coordinates(i):
    scales = tuple(float(i == j) for j in range(3))
    guidance = edis.make_guidance(RawEnergies(), scales, False, 1e9)
    x, sigma = torch.randn(50, 3), torch.tensor(0.7)
    expected = torch.zeros(50, 3)
    expected[:, i] = exact_gradient(x[:, i], sigma)
    assert_close(guidance(x, sigma), expected, atol=1e-5, rtol=1e-4)


def test_own_blocks_and_clip():
    energies = edis.Energies(2, 1)
    x, sigma = torch.randn(5, 5), torch.tensor(0.5)

    def gradient(scales, full=False, clip=1e9):
        return edis.make_guidance(energies, scales, full, clip)(x, sigma)

    for scales, columns in (((1, 0, 0), [0, 1]), ((0, 1, 0), [2]), ((0, 0, 1), [3, 4])):
        moved = gradient(scales).abs().sum(0) > 0
        assert moved.nonzero()[:, 0].tolist() == columns
    assert (gradient((0, 0, 1), full=True).abs().sum(0) > 0).all()
    assert_close(gradient((2.0, 0, 0)), 2 * gradient((1.0, 0, 0)))
    free = gradient((1, 1, 1))
    bound = float(free.norm(dim=1).median()) / math.sqrt(5)
    clipped = gradient((1, 1, 1), clip=bound)
    assert (clipped.norm(dim=1) <= bound * math.sqrt(5) * (1 + 1e-5)).all()
    small = free.norm(dim=1) < bound * math.sqrt(5)
    assert small.any() and not small.all()
    assert_close(clipped[small], free[small])


def test_info_nce_recovers_a_log_density_ratio():
    """mu = N(1, 0.5^2), nu = N(0, 1): E - log(nu / mu) is constant, and the sign is that of e^E = nu / mu."""
    torch.manual_seed(0)
    net = edis.MLP(1, 1, hidden=(64, 64))
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(2_000):
        positive, negatives = 1 + 0.5 * torch.randn(256, 1), torch.randn(256, 10, 1)
        loss, _ = edis.info_nce(net(positive)[:, 0], net(negatives)[..., 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = torch.linspace(-0.5, 2, 26)[:, None]
    with torch.no_grad():
        difference = net(x)[:, 0] - (-0.5 * x**2 + 0.5 * ((x - 1) / 0.5) ** 2)[:, 0]
    assert difference.std() < 0.15


def test_a_positive_is_contrasted_with_its_own_negatives():
    """Permuting whole groups changes nothing; permuting negatives between groups does."""
    positive, negatives, order = torch.randn(64), 3 * torch.randn(64, 10), torch.randperm(64)
    loss, found = edis.info_nce(positive, negatives)
    assert_close(edis.info_nce(positive[order], negatives[order])[0], loss)
    assert (edis.info_nce(positive, negatives[order])[0] - loss).abs() > 1e-3
    assert_close(found, positive < negatives.amin(1))


def small_round(**flags):
    """A Round in one dimension each, x = (s, a, s') ~ N(0, 1), independent, and its recent transitions."""
    torch.manual_seed(0)
    args = edis.dataclasses.replace(
        ARGS, pool=2_000, energy_updates=2_000, energy_batch=128, energy_lr=3e-3, samples=4_000, **flags
    )
    networks = {"energies": edis.Energies(1, 1), "actor": None}
    networks["energies"].nets = torch.nn.ModuleList(edis.MLP(end + 1, 1, hidden=(64, 64)) for end in (1, 2, 3))
    return edis.Round(args, networks, edis.EDM(64, 80.0, CPU), torch.zeros(3), torch.ones(3), None)


def test_trained_energies_give_the_target(monkeypatch):
    """States to N(1, 0.5^2), actions to pi(a|s) = N(s / 2, 0.3^2), next states to N(s + a, 0.4^2)."""
    work = small_round()
    exact = GaussianDenoiser([0.0] * 3, torch.eye(3).tolist())
    s = 1 + 0.5 * torch.randn(8_000, 1)

    def policy(self, s):
        return 0.5 * s + 0.3 * torch.randn_like(s)

    monkeypatch.setattr(edis.Round, "policy", policy)
    a = policy(None, s)
    recent = torch.cat([s, a, s + a + 0.4 * torch.randn_like(s)], dim=1)
    accuracies = work.train_energies(recent, exact)
    assert accuracies["state_accuracy_sigma_0.1"] > 0.2 and accuracies["state_accuracy_sigma_80"] < 0.2  # chance: 1/11
    guidance = edis.make_guidance(work.networks["energies"], (1.0, 1.0, 1.0), True, 10.0)
    x = work.generate(4_000, exact, guidance)
    assert abs(x[:, 0].mean() - 1) < 0.1 and abs(x[:, 0].std() - 0.5) < 0.1
    residual = x[:, 1] - 0.5 * x[:, 0]
    assert abs(residual.mean()) < 0.1 and abs(residual.std() - 0.3) < 0.1
    residual = x[:, 2] - x[:, 0] - x[:, 1]
    assert abs(residual.mean()) < 0.1 and abs(residual.std() - 0.4) < 0.15  # the third link: errors add up
    x = work.generate(4_000, exact, edis.make_guidance(work.networks["energies"], (1.0, 1.0, 1.0), False, 10.0))
    assert (x[:, 2] - x[:, 0] - x[:, 1]).std() > 0.7  # each on its own block only: dependence is lost


def test_pools_are_samples_at_their_levels():
    """Negatives at level i have the variance of p plus sigma_i^2, and share the condition of their positive."""
    torch.manual_seed(0)
    args = edis.dataclasses.replace(ARGS, negatives=4, chunk=1_000)
    energies, edm, cov = edis.Energies(1, 1), edis.EDM(64, 80.0, CPU), torch.tensor(COV)
    conditions = torch.randn(3_000, 3) @ torch.linalg.cholesky(cov).T
    pools = edis.make_pools(args, edm, GaussianDenoiser([0.0] * 3, COV), conditions, energies)
    assert [pool.shape for pool in pools] == [(64, 3_000, 1), (64, 3_000, 4, 1), (64, 3_000, 4, 1)]
    for level in (25, 40, 63):
        sigma = edm.sigma_hat[level]
        assert_close(pools[0][level].var(), cov[0, 0] + sigma**2, rtol=0.1, atol=0)
        residual = pools[1][level, :, :, 0] - cov[0, 1] * conditions[:, :1]
        assert_close(residual.var(), cov[1, 1] - cov[0, 1] ** 2 + sigma**2, rtol=0.1, atol=0)
        gain = cov[2, :2] @ torch.linalg.inv(cov[:2, :2])
        residual = pools[2][level, :, :, 0] - (conditions[:, :2] @ gain)[:, None]
        assert_close(residual.var(), cov[2, 2] - gain @ cov[:2, 2] + sigma**2, rtol=0.1, atol=0)


def test_energy_batches():
    """Positives are noised at their level; negatives carry the condition of their own positive, noised as well."""
    torch.manual_seed(0)
    edm, energies, P, K = edis.EDM(8, 0.0, CPU), edis.Energies(2, 1), 50, 3
    conditions = 100.0 * torch.arange(P)[:, None].expand(P, 5) + torch.zeros(P, 5)
    pools = [torch.zeros(8, P, 2), *(torch.arange(P).view(1, P, 1, 1).expand(8, P, K, n) * 100.0 for n in (1, 2))]
    level = torch.full((200,), 7)  # sigma = 0.002
    for i, end in ((1, 3), (2, 5)):
        batch = edis.energy_batch(i, edm, energies, pools, conditions, conditions[:, :end], level, K)
        positive, (own, other) = batch
        assert positive.shape == (200, end) and own.shape == other.shape == (200, K, end)
        assert_close(own, positive[:, None].expand(-1, K, -1), atol=0.05, rtol=0)
        assert_close(other, other[..., :1].expand(-1, -1, end), atol=0.05, rtol=0)  # conditions with their own samples
        same = (other[..., 0] - positive[:, None, 0]).abs() < 1
        assert same.float().mean() < 0.1 and len(positive[:, 0].round().unique()) > 10
    level = torch.zeros(4_000, dtype=torch.long)  # sigma = 80
    positive, (negatives,) = edis.energy_batch(0, edm, energies, pools, conditions, torch.zeros(10, 2), level, K)
    assert_close(positive.std(), torch.tensor(80.0), rtol=0.05, atol=0)
    assert (negatives == 0).all()


def test_normalisation_round_trip():
    """Round.policy and Round.rows speak raw coordinates to the agent and normalised ones to the denoiser."""
    mean, std = torch.tensor([1.0, 2.0, 0.1, -1.0, 3.0]), torch.tensor([2.0, 0.5, 0.3, 4.0, 1.0])
    model, S = edis.TransitionModel(5), 2

    class Echo(torch.nn.Module):
        def forward(self, s, epsilon):
            return s.sum(1, keepdim=True), None

    networks = {"energies": edis.Energies(2, 1), "actor": Echo(), "model": model}
    work = edis.Round(ARGS, networks, edis.EDM(4, 0.0, CPU), mean, std, None)
    raw = torch.randn(6, 5) / 5
    x = work.normalize(raw)
    rows = work.rows(x)
    assert_close(rows[:, :5], raw, atol=1e-5, rtol=1e-4)
    reward, logit = model(x)
    assert_close(rows[:, 5], reward)
    assert_close(rows[:, 6], (logit < 0).float())
    assert rows.shape == (6, 8) and (rows[:, 7] == -math.inf).all()
    assert_close(work.policy(x[:, :S]) * std[2] + mean[2], raw[:, :S].sum(1, keepdim=True))


# -------------------------------------------------------------------------------------------------------- SAC and CQL
def test_actor_density():
    """log pi integrates to one over the action range, and actions are tanh of mean + std epsilon."""
    torch.manual_seed(0)
    actor, s = edis.Actor(2, 1), torch.randn(1, 2)
    epsilon = torch.linspace(-6, 6, 20_001)[:, None]
    a, log_pi = actor(s.expand(len(epsilon), -1), epsilon)
    assert_close(torch.trapezoid(log_pi.exp(), a[:, 0]), torch.tensor(1.0), atol=1e-3, rtol=0)
    assert_close(actor.mode(s), actor(s, torch.zeros(1, 1))[0])


def test_cql_penalty():
    """For Q constant over actions and a uniform density 1/2, log E exp Q / (1/2) * ... = Q + log 2."""
    q, q_data = torch.full((8, 5), 3.0), torch.full((5,), 1.0)
    assert_close(edis.cql_penalty(q, torch.full((8, 5), math.log(0.5)), q_data), torch.tensor(2.0 + math.log(2)))
    assert_close(edis.cql_penalty(q, torch.zeros(8, 5), q_data), torch.tensor(2.0))


@pytest.mark.parametrize("calibrate", [True, False])
def test_calibration(calibrate):
    """Cal-QL: two of three actions are the policy's, worth the Monte-Carlo return where that is more."""
    torch.manual_seed(0)
    args = edis.dataclasses.replace(ARGS, calibrate=calibrate, denoiser_width=8)
    update, _ = edis.make_update(args, edis.make_networks(2, 1, args, CPU))
    zeros = torch.zeros(64)
    batch = [torch.randn(64, 2), torch.rand(64, 1), torch.randn(64, 2), zeros, zeros]
    penalty = update(*batch, torch.full((64,), 1_000.0), 1.0)["losses/cql_loss"]
    assert (penalty > 1_900) == calibrate  # both critics


def test_actor_and_temperature_losses():
    q, log_pi = torch.tensor([1.0, 3.0]), torch.tensor([-1.0, 2.0])
    assert_close(edis.actor_loss(q, log_pi, torch.tensor(0.5)), torch.tensor(0.25 - 2.0))
    log_alpha = torch.tensor(0.0, requires_grad=True)
    edis.temperature_loss(log_alpha, torch.tensor([-5.0]), -3).backward()  # entropy 5, above its target -A = -3
    assert log_alpha.grad > 0  # so alpha falls


def test_monte_carlo_returns():
    """Across a terminal, a timeout and the file's end."""
    rewards = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    ends = np.array([False, True, True, False, False])
    np.testing.assert_allclose(edis.monte_carlo_returns(rewards, ends, 0.5), [2, 2, 3, 6.5, 5])


def test_energy_distance():
    """Zero for equal distributions; for points 0 and d it is 2 d."""
    torch.manual_seed(0)
    assert edis.energy_distance(torch.randn(2_000, 2), torch.randn(2_000, 2)).abs() < 0.01
    assert_close(edis.energy_distance(torch.zeros(5, 2), torch.tensor([[3.0, 4.0]]).expand(7, 2)), torch.tensor(10.0))


def test_model_loss():
    loss = edis.model_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([3.0]), torch.tensor([0.0]))
    assert_close(loss, torch.tensor(4 + math.log(2)))
    certain = edis.model_loss(torch.tensor([0.0]), torch.tensor([9.0]), torch.tensor([0.0]), torch.tensor([0.0]))
    assert certain < 1e-3  # a positive logit is a termination, mask 0


def test_buffer():
    buffer = edis.Buffer(5, 1, CPU)
    buffer.add(torch.arange(3.0)[:, None])
    assert len(buffer) == 3 and buffer.recent(2)[:, 0].tolist() == [1, 2]
    buffer.add(torch.arange(3.0, 7.0)[:, None])
    assert len(buffer) == 5 and buffer.recent(9)[:, 0].tolist() == [2, 3, 4, 5, 6]
    other = edis.Buffer(5, 1, CPU)
    other.load_state_dict(buffer.state_dict())
    buffer.add(torch.tensor([[7.0]]))
    other.add(torch.tensor([[7.0]]))
    assert other.recent(5).tolist() == buffer.recent(5).tolist() and other.rows.tolist() == buffer.rows.tolist()
    assert set(other.sample(100)[:, 0].tolist()) == {3, 4, 5, 6, 7}

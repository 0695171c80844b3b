"""EDIS against closed forms: sampler, guidance, energies, returns, SAC and CQL."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CPU, keep_gradients, make_columns
from torch.testing import assert_close

import edis_sac as edis

ARGS = edis.Args()


def make_edm(steps, churn=80.0, **flags):
    return edis.EDM(replace(ARGS, sampling_steps=steps, churn=churn, **flags), CPU)


def make_coordinates(dim, obs_dim, mean=0.0, std=1.0):
    """With this shift and scale of each dimension."""
    coordinates = edis.Coordinates(torch.zeros(2, dim), obs_dim)
    coordinates.mean, coordinates.std = torch.zeros(dim) + mean, torch.ones(dim) * std
    return coordinates


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class GaussianDenoiser:
    """D(x; sigma) = E[x | x + sigma n] of N(mean, cov)."""

    def __init__(self, mean, cov):
        self.mean, self.cov = torch.tensor(mean), torch.tensor(cov)

    def __call__(self, x, sigma):
        posterior = self.cov @ torch.linalg.inv(self.cov + sigma**2 * torch.eye(len(self.cov)))
        return self.mean + (x - self.mean) @ posterior.T


COV = [[1.0, 0.6, -0.3], [0.6, 0.8, 0.2], [-0.3, 0.2, 0.5]]
ZERO = [0.0] * 3
BUNDLED = edis.EDM(replace(ARGS, **edis.MINI), CPU)


@pytest.mark.parametrize("edm, bound", [(make_edm(64, 0.0), 0.04), (make_edm(64), 0.1), (BUNDLED, 0.2)])
@pytest.mark.parametrize("mean, cov", [([0.4], [[0.25]]), ([0.4, -1.0, 0.0], COV)])
def test_unguided_sampling_gives_mean_and_covariance(mean, cov, edm, bound):
    """In the narrow directions too: of the whitened samples. Few steps that add noise widen them."""
    x = edm.sample(GaussianDenoiser(mean, cov), torch.randn(30_000, len(mean)))
    assert_close(x.mean(0), torch.tensor(mean), atol=0.02, rtol=0)
    whitened = torch.linalg.solve(torch.linalg.cholesky(torch.tensor(cov)), (x - torch.tensor(mean)).T)
    assert_close(whitened.cov().reshape(len(mean), -1), torch.eye(len(mean)), atol=bound, rtol=0)


@pytest.mark.parametrize("H", [1, 2])
def test_inpainting_gives_the_conditional(H):
    """p(rest | held) of a correlated Gaussian; where each level is gone through once only, it misses."""
    cov, held = torch.tensor(COV), torch.tensor([3.0, 1.0])[:H]
    slope = cov[H:, :H] @ torch.linalg.inv(cov[:H, :H])
    mean, conditional = slope @ held, cov[H:, H:] - slope @ cov[:H, H:]
    edm, root = make_edm(128), torch.linalg.cholesky(conditional)

    def whitened(repeats):
        x = torch.randn(8_000, 3)
        x = edm.sample(GaussianDenoiser(ZERO, COV), x, held=held.expand(len(x), H), repeats=repeats)
        return torch.linalg.solve(root, (x[:, H:] - mean).T)

    rest = whitened(10)
    assert rest.mean(1).abs().max() < 0.2
    assert_close(rest.cov().reshape(3 - H, -1), torch.eye(3 - H), atol=0.15, rtol=0)
    assert whitened(1).mean(1).abs().max() > 0.4


def test_what_is_held_has_the_noise_of_each_level():
    edm, held, visited = make_edm(16), torch.full((4_000, 2), 3.0), torch.empty(16, 4_000, 3)
    edm.sample(GaussianDenoiser(ZERO, COV), torch.randn(4_000, 3), visited=visited, held=held, repeats=2)
    for x, sigma in zip(visited, edm.sigma, strict=False):
        assert_close(((x[:, :2] - held) / sigma).T.cov(), torch.eye(2), atol=0.1, rtol=0)


def test_denoiser_learns():
    """The trained network has the optimal denoiser's values."""
    args = replace(ARGS, denoiser_updates=1_500, denoiser_ema=0.99, denoiser_lr=2e-3)
    x = torch.randn(20_000, 3) @ torch.linalg.cholesky(torch.tensor(COV)).T
    denoiser = edis.Denoiser(3, 64, 2)
    ema = copy.deepcopy(denoiser).requires_grad_(False)
    edis.train_denoiser(args, denoiser, ema, x, len(x))
    exact, test = GaussianDenoiser(ZERO, COV), x[:2_000]
    narrow = torch.linalg.eigh(torch.tensor(COV))[1][:, 0]
    for sigma, bound in torch.tensor([[0.1, 0.008], [0.5, 0.06], [2.0, 0.09]]):
        noised = test + sigma * torch.randn_like(test)
        with torch.no_grad():
            error = ema(noised, sigma) - exact(noised, sigma)
        assert error.square().mean().sqrt() < bound and (error @ narrow).square().mean().sqrt() < bound, sigma


def test_preconditioning():
    """c_skip, c_out, c_in, c_noise, and the weight (sigma^2 + 1) / sigma^2, of Karras et al. with sigma_data = 1."""
    denoiser, sigma, seen = edis.Denoiser(2, 8, 1), torch.tensor([0.5, 3.0]), []
    loss = edis.edm_loss(lambda noised, sigma: noised, torch.zeros(2, 3), sigma, torch.ones(2, 3))  # error sigma
    assert_close(loss, (sigma**2 + 1).mean())
    denoiser.first.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    denoiser.last.weight.data.zero_()
    denoiser.last.bias.data.fill_(1.0)
    total = sigma**2 + 1
    assert_close(denoiser(torch.ones(2, 2), sigma), (1 / total + sigma / total.sqrt())[:, None].expand(2, 2))
    assert_close(seen[0][:, :2], total.rsqrt()[:, None].expand(2, 2))
    assert_close(seen[0][:, 2:10], torch.cos(sigma.log()[:, None] / 4 * denoiser.frequencies))


# p = N(0, 1), q = N(1, 0.5^2): E = log p_sigma / q_sigma at every level is known
def exact_gradient(x, sigma):
    """grad log (p_sigma / q_sigma)."""
    return -x / (1 + sigma**2) + (x - 1) / (0.25 + sigma**2)


def near_target(guidance, edm, tolerance):
    x = edm.sample(GaussianDenoiser([0.0], [[1.0]]), torch.randn(20_000, 1), guidance)
    return abs(x.mean() - 1) < tolerance and abs(x.std() - 0.5) < tolerance


@pytest.mark.parametrize("edm, bound", [(make_edm(64, 0.0), 0.02), (make_edm(64), 0.02), (BUNDLED, 0.04)])
def test_exact_energies_give_the_target(edm, bound):
    """Guidance without the factor sigma, or twice as strong, misses it."""
    assert near_target(exact_gradient, edm, bound)
    assert not near_target(lambda x, sigma: exact_gradient(x, sigma) / sigma, edm, 0.1)
    assert not near_target(lambda x, sigma: 2 * exact_gradient(x, sigma), edm, 0.1)


class RawEnergies:
    """Exact energies of p = N(0, 1), q = N(1, std^2), of raw coordinates y = 3 + 2 x: autograd owes the chain rule."""

    ends, __call__ = (1, 2, 3), edis.Energies.forward

    def __init__(self, std=0.5):
        self.variance = (2 * std) ** 2

    def energy(self, i, x, sigma):
        y, noise = 3 + 2 * x[:, i], (2 * sigma) ** 2
        return -((y - 3) ** 2) / (2 * (4 + noise)) + (y - 5) ** 2 / (2 * (self.variance + noise))


def guide(energies, scales, full=False, clip=1e9):
    names = ("state_scale", "policy_scale", "transition_scale")
    args = replace(ARGS, full_gradient=full, guidance_clip=clip, **dict(zip(names, scales, strict=True)))
    return edis.make_guidance(args, energies)


@pytest.mark.parametrize("i", range(3))
def test_guidance_is_the_gradient_in_normalised_coordinates(i):
    guidance = guide(RawEnergies(), [float(i == j) for j in range(3)])
    x, sigma = torch.randn(50, 3), torch.tensor(0.7)
    assert_close(guidance(x, sigma), exact_gradient(x, sigma) * torch.eye(3)[i], atol=1e-5, rtol=1e-4)


def test_the_clip_leaves_narrow_targets_alone():
    """Bounding the gradient itself by 10 sqrt(D), as the published code does, misses."""
    guidance = guide(RawEnergies(0.03), (1, 1, 1), clip=ARGS.guidance_clip)
    x = make_edm(128).sample(GaussianDenoiser(ZERO, torch.eye(3).tolist()), torch.randn(2_000, 3), guidance)
    assert_close(x.mean(0), torch.ones(3), atol=0.02, rtol=0)
    assert_close(x.std(0), torch.full((3,), 0.03), atol=0.005, rtol=0)


def test_own_blocks_switches_and_clip():
    energies = edis.Energies(2, 1, 16)
    x, sigma = torch.randn(5, 5), torch.tensor(0.5)
    for scales, columns in (((1, 0, 0), [0, 1]), ((0, 1, 0), [2]), ((0, 0, 1), [3, 4])):
        moved = guide(energies, scales)(x, sigma).abs().sum(0) > 0
        assert moved.nonzero()[:, 0].tolist() == columns
    assert (guide(energies, (0, 0, 1), full=True)(x, sigma).abs().sum(0) > 0).all()
    assert_close(guide(energies, (2, 0, 0))(x, sigma), 2 * guide(energies, (1, 0, 0))(x, sigma))
    assert guide(energies, (0, 0, 0)) is None
    free = guide(energies, (1, 1, 1))(x, sigma)
    bound = float(free.norm(dim=1).median())
    clipped = guide(energies, (1, 1, 1), clip=bound * 0.5 / math.sqrt(5))(x, sigma)  # of sigma times the gradient
    assert (clipped.norm(dim=1) <= bound * (1 + 1e-5)).all()
    small = free.norm(dim=1) < bound
    assert_close(clipped[small], free[small])


def test_conditional_losses():
    """The paper's: E2 and E3 by themselves, a and s' of the negatives in the positive's own s, its own (s, a)."""
    energies, sigma = edis.Energies(2, 1, 16), torch.full((6,), 0.5)
    states, chosen, acted, negatives = torch.randn(6, 2), torch.randn(6, 3), torch.randn(6, 5), torch.randn(6, 4, 5)
    losses = list(edis.energy_losses(energies, states, chosen, acted, negatives, sigma, joint=False).values())
    for i, (positive, start) in enumerate(((states, 0), (chosen, 2), (acted, 3))):
        rows = []
        for b in range(6):
            x = positive[b].repeat(5, 1)
            x[1:, start:] = negatives[b, :, start : x.shape[1]]
            rows.append(energies.energy(i, x, torch.full((5,), 0.5)))
        assert_close(losses[i][0], edis.info_nce(torch.stack(rows))[0])


# p: s ~ N(0, 1), a = 0.8 s + 0.6 e, s' = (s + a) / 2 + 0.4 e; q: s ~ N(1, 0.5^2), a = 0.4 s + 0.4 e,
# s' = 0.8 s + 0.5 a + 0.3 e. In p, s and a depend on each other: a noised a tells of s.
P_ROOT = torch.tensor([[1.0, 0, 0], [0.8, 0.6, 0], [0.9, 0.3, 0.4]])
Q_ROOT = torch.tensor([[0.5, 0, 0], [0.2, 0.4, 0], [0.5, 0.2, 0.3]])
Q_MEAN = torch.tensor([1.0, 0.4, 1.0])


@pytest.mark.slow
def test_trained_energies():
    """They are log density ratios of noised x, up to a constant: E2(a|s), E3(s'|s, a) too; and they give the target."""
    args = replace(ARGS, pool=4_000, energy_updates=1_200, energy_batch=128, energy_lr=3e-3)
    energies, denoiser = edis.Energies(1, 1, 64), GaussianDenoiser(ZERO, (P_ROOT @ P_ROOT.T).tolist())
    networks = {"energies": energies, "denoiser_ema": denoiser, "actor": lambda s, e: (0.4 * s + 0.4 * e, None)}
    recent = Q_MEAN + torch.randn(8_000, 3) @ Q_ROOT.T  # of q; the denoiser is the exact one of p
    found = edis.train_energies(args, make_edm(64), networks, make_coordinates(3, 1), recent)
    assert 0.11 < found["energies/state_accuracy"] < 0.3  # by chance 1 / 11

    for sigma in (0.05, 0.5, 2.0):
        x = Q_MEAN + torch.randn(4_000, 3) @ Q_ROOT.T + sigma * torch.randn(4_000, 3)
        ratios = [torch.zeros(4_000)]  # log p_sigma / q_sigma of the first coordinates
        for n in (1, 2, 3):
            p, q = (
                torch.distributions.MultivariateNormal(mean[:n], (root @ root.T + sigma**2 * torch.eye(3))[:n, :n])
                for mean, root in ((torch.zeros(3), P_ROOT), (Q_MEAN, Q_ROOT))
            )
            ratios.append(p.log_prob(x[:, :n]) - q.log_prob(x[:, :n]))
            with torch.no_grad():
                energy = energies.energy(n - 1, x[:, :n], torch.full((len(x),), sigma))
            exact = ratios[n] - ratios[n - 1]
            assert (energy - exact).std() < 0.35 * exact.std(), (n, sigma)

    def sample(*scales):
        return edis.generate(make_edm(64), denoiser, 3_000, 3, guide(energies, scales, full=True, clip=10.0))

    whitened = torch.linalg.solve(Q_ROOT, (sample(1, 1, 1) - Q_MEAN).T)  # N(0, I)
    e = whitened * torch.tensor([[0.5], [0.4], [0.3]])  # the links' own noise: s - 1, a - 0.4 s, s' - 0.8 s - 0.5 a
    assert (e.mean(1).abs() < 0.1).all()
    assert_close(e.std(1), torch.tensor([0.5, 0.4, 0.3]), atol=0.1, rtol=0)
    assert_close(whitened.cov(), torch.eye(3), atol=0.2, rtol=0)  # slopes too
    cov = sample(1, 0, 0)[:, :2].T.cov()
    assert cov[0, 1] / cov[0, 0] > 0.7  # the policy's 0.4 s is E2's doing
    assert sample(0, 1, 1)[:, 0].mean() < 0.45  # the recent states are E1's


def a_world(n):
    """x = (s, a, s') of curved dynamics, rewards and terminations."""
    s, a = torch.randn(n, 2), torch.rand(n, 1) * 2 - 1
    x = torch.cat([s, a, s + s.tanh() * a], dim=1)
    return x, x[:, 0] + x[:, 4], (x[:, 3] > -1).float()


def test_a_share_of_the_batches_is_recent(monkeypatch):
    """Half for the models, as asked for the denoiser; the rest is of all rows alike."""
    args = replace(ARGS, model_updates=40, denoiser_updates=40, denoiser_recent=0.2)
    x, seen, edm_loss = torch.arange(1_000.0)[:, None].expand(-1, 5) / 1_000, {0.5: [], 0.2: []}, edis.edm_loss
    model, denoiser = edis.MLP(5, 2), edis.Denoiser(5, 8, 1)
    model.register_forward_pre_hook(lambda module, inputs: seen[0.5].append(inputs[0][:, 0]))
    monkeypatch.setattr(edis, "edm_loss", lambda *inputs: seen[0.2].append(inputs[1][:, 0]) or edm_loss(*inputs))
    edis.train_model(args, model, edis.Energies(2, 1, 8), x, x, x[:, 0], x[:, 0], 10)
    edis.train_denoiser(args, denoiser, copy.deepcopy(denoiser), x, 10)
    for share, batches in seen.items():
        places = torch.cat(batches)
        assert len(places) == 40 * 256
        assert (places >= 0.99).float().mean() == pytest.approx(share + 0.01 * (1 - share), abs=0.02)
        assert (places < 0.5).float().mean() == pytest.approx(0.5 * (1 - share), abs=0.03)


def test_the_learned_dynamics_show_errors_to_the_transition_energy(monkeypatch):
    """Models learn reward, termination and s'; then E3 finds true next states among some that are 0.1 off."""
    flags = {"model_updates": 1_000, "energy_updates": 400, "energy_batch": 128, "pool": 4_000, "energy_lr": 3e-3}
    args, coordinates = replace(ARGS, **flags), make_coordinates(5, 2)
    energies, model, (x, r, mask) = edis.Energies(2, 1, 64), edis.MLP(5, 2), a_world(20_000)
    edis.train_model(args, model, energies, coordinates.normalize(x), x, r, mask, len(x))
    test, r, mask = a_world(2_000)
    with torch.no_grad():
        reward, logit = model(test).unbind(1)
        assert (reward - r).square().mean().sqrt() < 0.1
        assert ((logit > 0) == (mask == 0)).float().mean() > 0.98
        error = test[:, :2] + energies.dynamics(test[:, :3]) - test[:, 3:]
        assert error.square().mean().sqrt() < 0.03

    edm = make_edm(32, sigma_max=1.0)

    def make_pool(*_):
        off, _, _ = a_world(args.pool)
        off[:, 3:] += 0.1 * torch.randn(args.pool, 2)
        return coordinates.normalize(off) + edm.sigma[:-1, None, None] * torch.randn(32, args.pool, 5)

    monkeypatch.setattr(edis, "make_pool", make_pool)
    networks = {"energies": energies, "denoiser_ema": None, "actor": lambda s, _: (torch.rand(len(s), 1) * 2 - 1, None)}
    found = edis.train_energies(args, edm, networks, coordinates, coordinates.normalize(x[:8_000]))
    assert found["energies/transition_accuracy"] > 0.25  # by chance 1 / 11
    assert max(found[f"energies/{name}_accuracy"] for name in ("state", "policy", "behavior")) < 0.15


def test_normalisation_round_trip():
    """The agent sees raw coordinates, the denoiser normalised ones."""
    mean, std = torch.tensor([1.0, 2.0, 0.1, -1.0, 3.0]), torch.tensor([2.0, 0.5, 0.3, 4.0, 1.0])
    model, raw, work = edis.MLP(5, 2), torch.randn(6, 5) / 5, make_coordinates(5, 2, mean, std)
    x = work.normalize(raw)
    rows = edis.make_rows(model, work, x)
    assert_close(rows[:, :5], raw, atol=1e-5, rtol=1e-4)
    difference = torch.cat([raw[:, :3], raw[:, 3:] - raw[:, :2]], dim=1)
    assert_close(x, (difference - mean) / std, atol=1e-5, rtol=1e-4)
    units = mean[[0, 1, 2, 0, 1]], std[[0, 1, 2, 0, 1]]  # the model sees s' in those of s
    reward, logit = model((raw - units[0]) / units[1]).unbind(1)
    assert_close(rows[:, 5:], torch.stack([reward, torch.sigmoid(-logit), torch.full((6,), -math.inf)], dim=1))
    # The model sees the action that the row holds, a clamped one
    beyond = torch.cat([raw[:, :2], torch.full((6, 1), 3.0), raw[:, 3:]], dim=1)
    assert_close(*(edis.make_rows(model, work, work.normalize(rows)) for rows in (beyond, beyond.clamp(max=0.999))))
    echo = work.policy(lambda s, epsilon: (s.sum(1, keepdim=True), None), x[:, :2])
    assert_close(echo * std[2] + mean[2], raw[:, :2].sum(1, keepdim=True))


def test_actor_density():
    """log pi integrates to one over the action range, and actions are tanh of mean + std epsilon."""
    actor, s = edis.Actor(2, 1), torch.randn(1, 2)
    epsilon = torch.linspace(-6, 6, 20_001)[:, None]
    a, log_pi = actor(s.expand(len(epsilon), -1), epsilon)
    assert_close(torch.trapezoid(log_pi.exp(), a[:, 0]), torch.tensor(1.0), atol=1e-3, rtol=0)
    assert_close(actor.distribution(s).mean.tanh(), actor(s, torch.zeros(1, 1))[0])


class Recorder(torch.nn.Module):
    """A critic with Q(s, a) = level + slope * a[0], which keeps what it was asked."""

    def __init__(self, level=0.0, slope=0.0):
        super().__init__()
        self.level, self.slope = (torch.nn.Parameter(torch.tensor(x)) for x in (level, slope))
        self.asked = []

    def forward(self, s, a):
        self.asked.append((s, a))
        return self.level + self.slope * a[..., 0], self.level + self.slope * a[..., 0] + 1


def agent(critic, target, **flags):
    """An update with these critics, of states (B, 2) and actions (B, 1)."""
    args = replace(ARGS, denoiser_width=8, **flags)
    networks = edis.make_networks(2, 1, args)
    networks["critic"], networks["critic_target"] = critic, target.requires_grad_(False)
    update, optimizer = edis.make_update(args, networks)
    keep_gradients(optimizer)
    return update, networks


def a_batch(B=64):
    return [torch.randn(B, 2), torch.rand(B, 1), torch.randn(B, 2), torch.rand(B), (torch.rand(B) > 0.3).float()]


@pytest.mark.parametrize("cql_alpha", [0.0, 1.0])
def test_sac_update(cql_alpha):
    """Targets r + gamma mask (min Q'(s', a') - alpha log pi), no entropy beside CQL; target rate; the actor's way."""
    batch, minus_infinity = a_batch(), torch.full((64,), -math.inf)
    flags = {"gamma": 0.9, "tau": 0.1, "cql_actions": 1, "cql_alpha": cql_alpha}
    update, networks = agent(Recorder(2.0), Recorder(5.0, slope=3.0), **flags)
    networks["temperature"]["log_alpha"].data.fill_(math.log(0.5))
    torch.manual_seed(1)
    with torch.no_grad():
        a, log_pi = networks["actor"](batch[2], torch.randn_like(batch[1]))
    target = batch[3] + 0.9 * batch[4] * (5 + 3 * a[:, 0] - 0.5 * log_pi * (cql_alpha == 0))
    torch.manual_seed(1)
    losses = update(*batch, minus_infinity, cql_alpha)
    assert_close(losses["losses/qf1_loss"], (2 - target).square().mean())
    assert_close(losses["losses/qf2_loss"], (3 - target).square().mean())
    assert -1 < losses["losses/entropy"] < 1 and networks["temperature"]["log_alpha"] < math.log(0.5)  # target -A = -1
    level = networks["critic"].level.item()
    assert level > 2 and abs(networks["critic_target"].level.item() - (5 + 0.1 * (level - 5))) < 1e-5

    update, networks = agent(Recorder(0.0, slope=100.0), Recorder(0.0), actor_lr=1e-2)
    before = networks["actor"].distribution(batch[0]).mean
    for _ in range(3):
        update(*batch, minus_infinity, cql_alpha)
    assert (networks["actor"].distribution(batch[0]).mean - before).mean() > 0.2  # larger actions are better


def test_cql_is_in_the_critics_loss():
    """Its gradient, in proportion to its coefficient: Q of the data's actions, above 0 here, up against all others'."""
    batch, gradients = a_batch(2_000), []
    for cql_alpha in (1.0, 3.0, 5.0):
        torch.manual_seed(0)
        critic = Recorder()
        update, _ = agent(critic, copy.deepcopy(critic), calibrate=False)
        update(*batch, torch.full((2_000,), -math.inf), cql_alpha)
        gradients.append(critic.slope.kept.item())
    mean = batch[1].mean().item()
    assert gradients[1] - gradients[0] == pytest.approx(-2 * 2 * mean, abs=0.4)  # two critics
    assert gradients[2] - gradients[0] == pytest.approx(2 * (gradients[1] - gradients[0]), rel=1e-3)


@pytest.mark.parametrize("calibrate", [True, False])
def test_cql_wiring(calibrate):
    """M uniform actions, M of the policy in s, M of it in s'; Q at s for all; Cal-QL lifts the policy's to returns."""
    (s, a, next_s, r, mask), M = a_batch(), 500
    critic = Recorder(7.0)
    update, networks = agent(critic, Recorder(0.0), calibrate=calibrate, cql_actions=M)
    networks["actor"].net[-1].weight.data.zero_()  # one density for every state
    seen = []
    networks["actor"].register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    penalty = update(s, a, next_s, r, mask, torch.full((64,), 1_000.0), 1.0)["losses/cql_loss"]
    asked_s, asked_a = next(pair for pair in critic.asked if len(pair[0]) == 3 * M * 64)
    assert_close(asked_s.view(3 * M, 64, 2), s.expand(3 * M, -1, -1))
    blocks = asked_a.view(3, M * 64)
    assert blocks[0].abs().max() <= 1 and abs(blocks[0].std() - 3**-0.5) < 0.01
    (at, ours), (at_next, theirs) = ((x, out) for x, out in seen if out[0].dim() == 3)
    assert at is s and at_next is next_s
    assert_close(asked_a.view(3, M, 64, 1)[1:], torch.stack([ours[0], theirs[0]]))
    log_density = torch.cat([torch.full((M, 64), -math.log(2)), ours[1], theirs[1]])
    lifted = torch.arange(3 * M)[:, None] >= M if calibrate else torch.tensor(False)
    values = [torch.where(lifted, 1_000.0, q) - log_density for q in (7.0, 8.0)]
    assert_close(penalty, sum(v.logsumexp(0).mean() for v in values) - 2 * math.log(3 * M) - 15)


def test_returns_to_go():
    """Across a terminal, a timeout and the file's end; cut episodes bound no value where rewards can be negative."""
    terminals, ends = np.array([[0, 1, 0, 0, 0], [0, 1, 1, 0, 0]], bool)
    for negative, expected in ((False, [2, 2, 3, 6.5, 5]), (True, [2, 2, -math.inf, -math.inf, -math.inf])):
        found = edis.returns_to_go(np.arange(1.0, 6.0), terminals, ends, 0.5, negative)
        np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize("drop", ["", "timeouts", "next_observations"])
def test_returns_end_with_the_episodes_of_a_file(drop):
    columns = make_columns()
    columns["next_observations"] = np.roll(columns["observations"], -1, axis=0) + columns["timeouts"][:, None]
    columns.pop(drop, None)
    edis.check(columns)
    flags = columns["terminals"], columns["ends"]
    assert edis.returns_to_go(np.ones(600), *flags, 1.0, False).max() == 50
    bounds = np.isfinite(edis.returns_to_go(np.full(600, -1.0), *flags, 1.0, True))
    assert bounds.mean() == 0.5  # every other episode is cut

"""EDIS against closed forms: sampler, guidance, energies, returns, SAC and CQL."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.testing import assert_close

import edis_sac as edis

CPU = torch.device("cpu")
ARGS = edis.Args()
KARRAS = (ARGS.sigma_min, ARGS.sigma_max)


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


PRESET = edis.parse_args([])
BUNDLED = (PRESET.sampling_steps, PRESET.churn, CPU, PRESET.sigma_min, PRESET.sigma_max)


@pytest.mark.parametrize(
    "levels, bound", [((64, 0.0, CPU, *KARRAS), 0.04), ((64, 80.0, CPU, *KARRAS), 0.1), (BUNDLED, 0.2)]
)
@pytest.mark.parametrize("mean, cov", [([0.4], [[0.25]]), ([0.4, -1.0, 0.0], COV)])
def test_unguided_sampling_gives_mean_and_covariance(mean, cov, levels, bound):
    """In the narrow directions too: of the whitened samples. Few steps that add noise widen them."""
    x = edis.EDM(*levels).sample(GaussianDenoiser(mean, cov), torch.randn(30_000, len(mean)))
    assert_close(x.mean(0), torch.tensor(mean), atol=0.02, rtol=0)
    whitened = torch.linalg.solve(torch.linalg.cholesky(torch.tensor(cov)), (x - torch.tensor(mean)).T)
    assert_close(whitened.cov().reshape(len(mean), -1), torch.eye(len(mean)), atol=bound, rtol=0)


@pytest.mark.parametrize("H", [1, 2])
def test_inpainting_gives_the_conditional(H):
    """p(rest | held) of a correlated Gaussian; where each level is gone through once only, it misses."""
    cov, held = torch.tensor(COV), torch.tensor([3.0, 1.0])[:H]
    slope = cov[H:, :H] @ torch.linalg.inv(cov[:H, :H])
    mean, conditional = slope @ held, cov[H:, H:] - slope @ cov[:H, H:]
    edm, root = edis.EDM(128, 80.0, CPU, *KARRAS), torch.linalg.cholesky(conditional)

    def whitened(repeats):
        x = torch.randn(8_000, 3)
        x = edm.sample(GaussianDenoiser([0.0] * 3, COV), x, held=held.expand(len(x), H), repeats=repeats)
        return torch.linalg.solve(root, (x[:, H:] - mean).T)

    rest = whitened(10)
    assert rest.mean(1).abs().max() < 0.2
    assert_close(rest.cov().reshape(3 - H, -1), torch.eye(3 - H), atol=0.15, rtol=0)
    assert whitened(1).mean(1).abs().max() > 0.4


def test_what_is_held_has_the_noise_of_each_level():
    edm, held, seen = edis.EDM(16, 80.0, CPU, *KARRAS), torch.full((4_000, 2), 3.0), []
    edm.sample(
        GaussianDenoiser([0.0] * 3, COV), torch.randn(4_000, 3), visit=lambda *v: seen.append(v), held=held, repeats=2
    )
    assert [level for level, _ in seen] == [level for level in range(16) for _ in range(2)]
    for level, x in seen:
        noise = (x[:, :2] - held) / edm.sigma[level]
        assert_close(noise.T.cov(), torch.eye(2), atol=0.1, rtol=0)
        assert noise.mean().abs() < 0.05


def test_denoiser_learns():
    """The trained network has the optimal denoiser's values."""
    args = edis.dataclasses.replace(ARGS, denoiser_updates=1_500, denoiser_ema=0.99, denoiser_lr=2e-3)
    x = torch.randn(20_000, 3) @ torch.linalg.cholesky(torch.tensor(COV)).T
    denoiser = edis.Denoiser(3, 64, 2)
    ema = edis.copy.deepcopy(denoiser).requires_grad_(False)
    edis.train_denoiser(args, denoiser, ema, x, len(x))
    exact, test = GaussianDenoiser([0.0] * 3, COV), x[:2_000]
    narrow = torch.linalg.eigh(torch.tensor(COV))[1][:, 0]
    for sigma, bound in torch.tensor([[0.1, 0.008], [0.5, 0.06], [2.0, 0.09]]):
        noised = test + sigma * torch.randn_like(test)
        with torch.no_grad():
            error = ema(noised, sigma) - exact(noised, sigma)
        assert error.square().mean().sqrt() < bound and (error @ narrow).square().mean().sqrt() < bound, sigma


def test_preconditioning():
    """c_skip, c_out, c_in, c_noise of Karras et al. with sigma_data = 1."""
    denoiser, sigma, seen = edis.Denoiser(2, 8, 1), torch.tensor([0.5, 3.0]), []
    denoiser.first.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    denoiser.last.weight.data.zero_()
    denoiser.last.bias.data.fill_(1.0)
    total = sigma**2 + 1
    assert_close(denoiser(torch.ones(2, 2), sigma), (1 / total + sigma / total.sqrt())[:, None].expand(2, 2))
    assert_close(seen[0][:, :2], total.rsqrt()[:, None].expand(2, 2))
    assert_close(seen[0][:, 2:10], torch.cos(sigma.log()[:, None] / 4 * denoiser.frequencies))


def test_edm_loss():
    """(sigma^2 + 1) / sigma^2 times the mean squared error."""
    sigma = torch.tensor([0.5, 2.0])
    loss = edis.edm_loss(lambda noised, sigma: noised, torch.zeros(2, 3), sigma, torch.ones(2, 3))  # error sigma
    assert_close(loss, (sigma**2 + 1).mean())


# p = N(0, 1), q = N(1, 0.5^2): E = log p_sigma / q_sigma at every level is known
def exact_gradient(x, sigma):
    """grad log (p_sigma / q_sigma)."""
    return -x / (1 + sigma**2) + (x - 1) / (0.25 + sigma**2)


def moments(guidance, levels=(64, 80.0, CPU, *KARRAS)):
    torch.manual_seed(0)
    x = edis.EDM(*levels).sample(GaussianDenoiser([0.0], [[1.0]]), torch.randn(20_000, 1), guidance)
    return x.mean().item(), x.std().item()


def near_target(guidance, tolerance, **kwargs):
    mean, std = moments(guidance, **kwargs)
    return abs(mean - 1) < tolerance and abs(std - 0.5) < tolerance


@pytest.mark.parametrize(
    "levels, bound", [((64, 0.0, CPU, *KARRAS), 0.02), ((64, 80.0, CPU, *KARRAS), 0.02), (BUNDLED, 0.04)]
)
def test_exact_energies_give_the_target(levels, bound):
    assert near_target(exact_gradient, bound, levels=levels)


def test_wrong_guidance_misses():
    """Without the factor sigma; with the gradient in coordinates that are twice as large."""
    assert not near_target(lambda x, sigma: exact_gradient(x, sigma) / sigma, 0.1)
    assert not near_target(lambda x, sigma: 2 * exact_gradient(x, sigma), 0.1)


class RawEnergies(torch.nn.Module):
    """Exact energies of p = N(0, 1), q = N(1, std^2), of raw coordinates y = 3 + 2 x: autograd owes the chain rule."""

    ends, nets = (1, 2, 3), (0, 1, 2)
    forward = edis.Energies.forward

    def __init__(self, std=0.5):
        super().__init__()
        self.variance = (2 * std) ** 2

    def energy(self, i, x, sigma):
        y, noise = 3 + 2 * x[:, i], (2 * sigma) ** 2
        return -((y - 3) ** 2) / (2 * (4 + noise)) + (y - 5) ** 2 / (2 * (self.variance + noise))


@pytest.mark.parametrize("i", range(3))
def test_guidance_is_the_gradient_in_normalised_coordinates(i):
    scales = tuple(float(i == j) for j in range(3))
    guidance = edis.make_guidance(RawEnergies(), scales, False, 1e9)
    x, sigma = torch.randn(50, 3), torch.tensor(0.7)
    expected = torch.zeros(50, 3)
    expected[:, i] = exact_gradient(x[:, i], sigma)
    assert_close(guidance(x, sigma), expected, atol=1e-5, rtol=1e-4)


def test_the_clip_leaves_narrow_targets_alone():
    """Bounding the gradient itself by 10 sqrt(D), as the published code does, misses."""
    guidance = edis.make_guidance(RawEnergies(0.03), (1.0, 1.0, 1.0), False, ARGS.guidance_clip)
    exact = GaussianDenoiser([0.0] * 3, torch.eye(3).tolist())
    x = edis.EDM(128, 80.0, CPU, *KARRAS).sample(exact, torch.randn(2_000, 3), guidance)
    assert_close(x.mean(0), torch.ones(3), atol=0.02, rtol=0)
    assert_close(x.std(0), torch.full((3,), 0.03), atol=0.005, rtol=0)


def test_own_blocks_and_clip():
    energies = edis.Energies(2, 1, 16)
    x, sigma = torch.randn(5, 5), torch.tensor(0.5)

    def gradient(scales, full=False, clip=1e9):
        return edis.make_guidance(energies, scales, full, clip)(x, sigma)

    for scales, columns in (((1, 0, 0), [0, 1]), ((0, 1, 0), [2]), ((0, 0, 1), [3, 4])):
        moved = gradient(scales).abs().sum(0) > 0
        assert moved.nonzero()[:, 0].tolist() == columns
    assert (gradient((0, 0, 1), full=True).abs().sum(0) > 0).all()
    assert_close(gradient((2.0, 0, 0)), 2 * gradient((1.0, 0, 0)))
    free = gradient((1, 1, 1))
    bound = float(free.norm(dim=1).median())
    clipped = gradient((1, 1, 1), clip=bound * 0.5 / math.sqrt(5))  # of sigma times the gradient
    assert (clipped.norm(dim=1) <= bound * (1 + 1e-5)).all()
    small = free.norm(dim=1) < bound
    assert small.any() and not small.all()
    assert_close(clipped[small], free[small])


def test_info_nce_recovers_a_log_density_ratio():
    """mu = N(1, 0.5^2), nu = N(0, 1): E - log(nu / mu) is constant, and the sign is that of e^E = nu / mu."""
    torch.manual_seed(0)
    net = edis.MLP(1, 1, hidden=(64, 64))
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(2_000):
        positive, negatives = 1 + 0.5 * torch.randn(256, 1), torch.randn(256, 10, 1)
        loss, _ = edis.info_nce(torch.cat([net(positive), net(negatives)[..., 0]], dim=1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = torch.linspace(-0.5, 2, 26)[:, None]
    with torch.no_grad():
        difference = net(x)[:, 0] - (-0.5 * x**2 + 0.5 * ((x - 1) / 0.5) ** 2)[:, 0]
    assert difference.std() < 0.15


def test_a_positive_is_contrasted_with_its_own_negatives():
    """Permuting whole groups changes nothing; permuting negatives between groups does."""
    center, order = 5 * torch.randn(64, 1), torch.randperm(64)
    positive, negatives = center, center + torch.randn(64, 10)
    loss, found = edis.info_nce(torch.cat([positive, negatives], dim=1))
    assert_close(edis.info_nce(torch.cat([positive, negatives], dim=1)[order])[0], loss)
    assert (edis.info_nce(torch.cat([positive, negatives[order]], dim=1))[0] - loss).abs() > 1
    assert_close(found, positive[:, 0] < negatives.amin(1))


def test_energies_are_trained_on_top_of_each_other():
    """Each loss moves its own network only; positives come first, each with the negatives of its row."""
    energies, sigma = edis.Energies(2, 1, 16), torch.full((6,), 0.5)
    acted, chosen, negatives = torch.randn(6, 5), torch.randn(6, 3), torch.randn(6, 4, 5)
    losses = edis.energy_losses(energies, acted, chosen, negatives, sigma)
    networks = [energies.nets[0], energies.nets[1], energies.behavior, energies.nets[2]]
    for i, (loss, _) in enumerate(losses):
        for j, network in enumerate(networks):
            gradients = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True, allow_unused=True)
            assert any(g is not None and g.abs().sum() > 0 for g in gradients) == (i == j)

    def e(network, x):
        return energies.energy(network, x, torch.full(x.shape[:-1], 0.5))

    x = torch.cat([acted[:, None], negatives], dim=1)
    assert_close(losses[3][0], edis.info_nce(e(energies.behavior, x[..., :3]) + e(energies.nets[2], x))[0])
    x = torch.cat([chosen[:, None], negatives[..., :3]], dim=1)
    assert_close(losses[0][0], edis.info_nce(e(energies.nets[0], x[..., :2]))[0])
    assert_close(losses[1][0], edis.info_nce(e(energies.nets[0], x[..., :2]) + e(energies.nets[1], x))[0])


def test_conditional_losses():
    """The paper's: E2 and E3 by themselves, a and s' of the negatives in the positive's own s, its own (s, a)."""
    energies, sigma = edis.Energies(2, 1, 16), torch.full((6,), 0.5)
    states, chosen, acted, negatives = torch.randn(6, 2), torch.randn(6, 3), torch.randn(6, 5), torch.randn(6, 4, 5)
    losses = edis.conditional_losses(energies, states, chosen, acted, negatives, sigma)
    for i, (positive, start) in enumerate(((states, 0), (chosen, 2), (acted, 3))):
        rows = []
        for b in range(6):
            x = positive[b].repeat(5, 1)
            x[1:, start:] = negatives[b, :, start : x.shape[1]]
            rows.append(energies.energy(energies.nets[i], x, torch.full((5,), 0.5)))
        assert_close(losses[i][0], edis.info_nce(torch.stack(rows))[0])


# p: s ~ N(0, 1), a = 0.8 s + 0.6 e, s' = (s + a) / 2 + 0.4 e; q: s ~ N(1, 0.5^2), a = 0.4 s + 0.4 e,
# s' = 0.8 s + 0.5 a + 0.3 e. In p, s and a depend on each other: a noised a tells of s.
P_ROOT = torch.tensor([[1.0, 0, 0], [0.8, 0.6, 0], [0.9, 0.3, 0.4]])
Q_ROOT = torch.tensor([[0.5, 0, 0], [0.2, 0.4, 0], [0.5, 0.2, 0.3]])
Q_MEAN = torch.tensor([1.0, 0.4, 1.0])


def train(**flags):
    """A Round whose energies were trained for q by an actor 0.4 s + 0.4 e, and the exact denoiser of p."""
    torch.manual_seed(0)
    flags |= {"pool": 4_000, "energy_updates": 2_000, "energy_batch": 128, "energy_lr": 3e-3, "energy_width": 64}
    args = edis.dataclasses.replace(ARGS, **flags)

    class Policy(torch.nn.Module):
        def forward(self, s, epsilon):
            return 0.4 * s + 0.4 * epsilon, None

    networks = {"energies": edis.Energies(1, 1, args.energy_width), "actor": Policy()}
    work = edis.Round(args, networks, edis.EDM(64, 80.0, CPU, *KARRAS), torch.zeros(3), torch.ones(3), None)
    denoise = GaussianDenoiser([0.0] * 3, (P_ROOT @ P_ROOT.T).tolist())
    recent = Q_MEAN + torch.randn(8_000, 3) @ Q_ROOT.T
    accuracies = work.train_energies(recent, denoise)
    assert accuracies["state_accuracy_sigma_0.1"] > 0.15 and accuracies["state_accuracy_sigma_inf"] < 0.15  # 1 / 11
    return work, denoise


def test_accuracies_are_of_levels_that_there_are():
    args = edis.dataclasses.replace(ARGS, pool=20, energy_updates=2)

    class Policy(torch.nn.Module):
        def forward(self, s, epsilon):
            return 0.4 * s + 0.4 * epsilon, None

    networks = {"energies": edis.Energies(1, 1, 8), "actor": Policy()}
    work = edis.Round(args, networks, edis.EDM(4, 0.0, CPU, 0.25, 5), torch.zeros(3), torch.ones(3), None)
    accuracies = work.train_energies(torch.randn(20, 3), GaussianDenoiser([0.0] * 3, COV))
    blocks = ("state", "policy", "behavior", "transition")
    assert accuracies.keys() == {f"{block}_accuracy_sigma_{end}" for block in blocks for end in (1, 10)}


@pytest.fixture(scope="module")
def trained():
    return train()


def of_first(d, n):
    """The distribution of the first n coordinates."""
    return torch.distributions.MultivariateNormal(d.mean[:n], d.covariance_matrix[:n, :n])


def noised_targets(sigma):
    noise = sigma**2 * torch.eye(3)
    return (
        torch.distributions.MultivariateNormal(torch.zeros(3), P_ROOT @ P_ROOT.T + noise),
        torch.distributions.MultivariateNormal(Q_MEAN, Q_ROOT @ Q_ROOT.T + noise),
    )


@pytest.mark.parametrize("sigma", [0.05, 0.5, 2.0])
def test_energies_are_the_log_density_ratios(trained, sigma):
    """E1, E2(a|s) and E3(s'|s, a) of noised x, up to a constant: the conditional ones too."""
    energies, (p, q) = trained[0].networks["energies"], noised_targets(sigma)
    x = q.sample((4_000,))

    def log_ratio(n):
        """log p_sigma / q_sigma of the first n coordinates."""
        return of_first(p, n).log_prob(x[:, :n]) - of_first(q, n).log_prob(x[:, :n])

    for i in range(3):
        with torch.no_grad():
            energy = energies.energy(energies.nets[i], x[:, : i + 1], torch.full((len(x),), sigma))
        exact = log_ratio(i + 1) - (log_ratio(i) if i else 0)
        assert (energy - exact).std() < 0.35 * exact.std(), i


def test_trained_energies_give_the_target(trained):
    work, denoise = trained
    x = work.generate(6_000, denoise, edis.make_guidance(work.networks["energies"], (1.0, 1.0, 1.0), True, 10.0))
    whitened = torch.linalg.solve(Q_ROOT, (x - Q_MEAN).T)  # N(0, I)
    e = whitened * torch.tensor([[0.5], [0.4], [0.3]])  # the links' own noise: s - 1, a - 0.4 s, s' - 0.8 s - 0.5 a
    assert (e.mean(1).abs() < 0.1).all()
    assert_close(e.std(1), torch.tensor([0.5, 0.4, 0.3]), atol=0.1, rtol=0)
    assert_close(whitened.cov(), torch.eye(3), atol=0.2, rtol=0)  # slopes too
    x = work.generate(6_000, denoise, edis.make_guidance(work.networks["energies"], (1.0, 0.0, 0.0), True, 10.0))
    cov = x[:, :2].T.cov()
    assert cov[0, 1] / cov[0, 0] > 0.7  # the policy's 0.4 s is E2's doing
    x = work.generate(6_000, denoise, edis.make_guidance(work.networks["energies"], (0.0, 1.0, 1.0), True, 10.0))
    assert x[:, 0].mean() < 0.45  # the recent states are E1's


def test_inpainted_energies_are_exact_as_sigma_falls(trained):
    """E2 and E3 have exact own-block gradients as sigma -> 0; above, those of joint negatives are nearer."""
    inpainted, _ = train(conditional_negatives="inpainted", full_gradient=False)

    def error(work, sigma):
        """Of sigma-noised samples of q: relative error of each own-block gradient, root mean square."""
        p, q = noised_targets(sigma)
        x, exact = q.sample((4_000,)).requires_grad_(), []
        for n in (1, 2, 3):
            log_ratio = of_first(p, n).log_prob(x[:, :n]) - of_first(q, n).log_prob(x[:, :n])
            exact.append(torch.autograd.grad(log_ratio.sum(), x)[0][:, n - 1])
        exact = torch.stack(exact, dim=1)
        guidance = edis.make_guidance(work.networks["energies"], (1.0, 1.0, 1.0), False, 1e9)
        return (guidance(x, torch.tensor(sigma)) - exact).norm(dim=0) / exact.norm(dim=0)

    assert (error(inpainted, 0.05) < torch.tensor([0.2, 0.25, 0.45])).all()
    assert (error(inpainted, 2.0)[1:] > 1.4 * error(trained[0], 2.0)[1:]).all()


def a_world(n):
    """x = (s, a, s') of curved dynamics, rewards and terminations."""
    s, a = torch.randn(n, 2), torch.rand(n, 1) * 2 - 1
    x = torch.cat([s, a, s + s.tanh() * a], dim=1)
    return x, x[:, 0] + x[:, 4], (x[:, 3] > -1).float()


@pytest.mark.parametrize("share", [0.5, 0.2, 0.0])
def test_a_share_of_what_is_trained_on_is_recent(share, monkeypatch):
    """Half for the models, as asked for the denoiser; the rest is of all rows alike."""
    seen, (x, r, mask), energies = [], a_world(1_000), edis.Energies(2, 1, 8)
    x[:, 0] = torch.arange(1_000)

    class Model(edis.MLP):
        def forward(self, y):
            seen.append(y[:, 0])
            return super().forward(y)

    def edm_loss(denoise, x, sigma, noise):
        seen.append(x[:, 0])
        return loss(denoise, x / 1_000, sigma, noise)

    loss, args = edis.edm_loss, edis.dataclasses.replace(ARGS, model_updates=40, denoiser_updates=40)
    args = edis.dataclasses.replace(args, denoiser_batch=256, denoiser_recent=share)
    monkeypatch.setattr(edis, "edm_loss", edm_loss)
    if share == 0.5:
        edis.train_model(args, Model(5, 2), energies, x, x, r, mask, 10)
        assert len(torch.cat(seen)) == 40 * args.batch_size
    denoiser = edis.Denoiser(5, 8, 1)
    edis.train_denoiser(args, denoiser, edis.copy.deepcopy(denoiser), x, 10)
    counts = torch.cat(seen).int().bincount(minlength=1_000) / len(torch.cat(seen))
    assert counts[-10:].sum() == pytest.approx(share + 0.01 * (1 - share), abs=0.02)
    assert counts[-10:].max() < share / 10 + 0.03
    assert counts[:500].sum() == pytest.approx(0.5 * (1 - share), abs=0.03)


def test_the_learned_dynamics_show_errors_to_the_transition_energy(monkeypatch):
    """Models learn reward, termination and s'; then E3 finds true next states among some that are 0.1 off."""
    flags = {"model_updates": 1_500, "energy_updates": 400, "energy_width": 64, "energy_batch": 128, "pool": 4_000}
    args = edis.dataclasses.replace(ARGS, **flags, energy_lr=3e-3)
    energies, model, (x, r, mask) = edis.Energies(2, 1, 64), edis.MLP(5, 2), a_world(20_000)
    edis.train_model(args, model, energies, edis.Round.differences(x, 2), x, r, mask, len(x))
    test, r, mask = a_world(2_000)
    with torch.no_grad():
        reward, logit = model(test).unbind(1)
        assert (reward - r).square().mean().sqrt() < 0.1
        assert ((logit > 0) == (mask == 0)).float().mean() > 0.98
        error = test[:, :2] + energies.dynamics(test[:, :3]) - test[:, 3:]
        assert error.square().mean().sqrt() < 0.03

    class Policy(torch.nn.Module):
        def forward(self, s, epsilon):
            return torch.rand(len(s), 1) * 2 - 1, None

    networks = {"energies": energies, "actor": Policy()}
    work = edis.Round(args, networks, edis.EDM(32, 80.0, CPU, *KARRAS), torch.zeros(5), torch.ones(5), None)

    def pool(self, denoise):
        off, _, _ = a_world(args.pool)
        off[:, 3:] += 0.1 * torch.randn(args.pool, 2)
        return self.normalize(off) + self.edm.sigma[:-1, None, None] * torch.randn(32, args.pool, 5)

    monkeypatch.setattr(edis.Round, "make_pool", pool)
    accuracies = work.train_energies(work.normalize(x[:8_000]), None)
    assert accuracies["transition_accuracy_sigma_0.1"] > 0.4  # by chance 1 / 11
    assert max(accuracies[f"{name}_accuracy_sigma_0.1"] for name in ("state", "policy", "behavior")) < 0.15


def test_the_pool_has_its_levels_noise():
    args = edis.dataclasses.replace(ARGS, pool=3_000, chunk=1_000)
    work = edis.Round(args, {}, edis.EDM(64, 80.0, CPU, *KARRAS), torch.zeros(3), torch.ones(3), None)
    pool = work.make_pool(GaussianDenoiser([0.0] * 3, COV))
    assert pool.shape == (64, 3_000, 3)
    for level in (25, 40, 63):
        variance = work.edm.sigma[level] ** 2
        expected = torch.tensor(COV) + variance * torch.eye(3)
        assert_close(pool[level].T.cov(), expected, rtol=0, atol=0.12 * (1 + variance.item()))


def test_normalisation_round_trip():
    """Round.policy and Round.rows speak raw coordinates to the agent and normalised ones to the denoiser."""
    mean, std = torch.tensor([1.0, 2.0, 0.1, -1.0, 3.0]), torch.tensor([2.0, 0.5, 0.3, 4.0, 1.0])
    model, S = edis.MLP(5, 2), 2

    class Echo(torch.nn.Module):
        def forward(self, s, epsilon):
            return s.sum(1, keepdim=True), None

    networks = {"energies": edis.Energies(2, 1, 8), "actor": Echo(), "model": model}
    work = edis.Round(ARGS, networks, edis.EDM(4, 0.0, CPU, *KARRAS), mean, std, None)
    raw = torch.randn(6, 5) / 5
    x = work.normalize(raw)
    rows = work.rows(x)
    assert_close(rows[:, :5], raw, atol=1e-5, rtol=1e-4)
    difference = torch.cat([raw[:, :3], raw[:, 3:] - raw[:, :2]], dim=1)
    assert_close(x, (difference - mean) / std, atol=1e-5, rtol=1e-4)
    units = mean[[0, 1, 2, 0, 1]], std[[0, 1, 2, 0, 1]]  # the model sees s' in those of s
    reward, logit = model((raw - units[0]) / units[1]).unbind(1)
    assert_close(rows[:, 5], reward)
    assert_close(rows[:, 6], torch.sigmoid(-logit))
    beyond = raw.clone()
    beyond[:, S] = 3.0  # the model sees the action that the row holds
    clamped = torch.cat([raw[:, :S], torch.full((6, 1), 0.999), raw[:, S + 1 :]], dim=1)
    assert_close(work.rows(work.normalize(beyond)), work.rows(work.normalize(clamped)))
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
    """For Q constant over actions of density 1/2: log mean exp(Q) / (1/2) = Q + log 2, above Q of the data."""
    q, q_data = torch.full((8, 5), 3.0), torch.full((5,), 1.0)
    assert_close(edis.cql_penalty(q, torch.full((8, 5), math.log(0.5)), q_data), torch.tensor(2.0 + math.log(2)))
    assert_close(edis.cql_penalty(q, torch.zeros(8, 5), q_data), torch.tensor(2.0))


class Recorder(torch.nn.Module):
    """A critic with Q(s, a) = level + slope * a[0], which keeps what it was asked."""

    def __init__(self, level=0.0, slope=0.0):
        super().__init__()
        self.level, self.slope = torch.nn.Parameter(torch.tensor(level)), slope
        self.asked = []

    def forward(self, s, a):
        self.asked.append((s, a))
        q = self.level + self.slope * a[..., 0]
        return q, q + 1

    min = edis.Critic.min


def agent(critic, target, **flags):
    """An update with these critics, of states (B, 2) and actions (B, 1)."""
    args = edis.dataclasses.replace(ARGS, denoiser_width=8, **flags)
    networks = edis.make_networks(2, 1, args, CPU)
    networks["critic"], networks["critic_target"] = critic, target.requires_grad_(False)
    return edis.make_update(args, networks)[0], networks


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
    before = networks["actor"].mode(batch[0])
    for _ in range(3):
        update(*batch, minus_infinity, cql_alpha)
    assert (networks["actor"].mode(batch[0]) - before).mean() > 0.2  # larger actions are better


def test_cql_is_in_the_critics_loss():
    """Its gradient, in proportion to its coefficient: Q of the data's actions, above 0 here, up against all others'."""
    batch, gradients = a_batch(2_000), []
    for cql_alpha in (0.0, 2.0, 4.0):
        torch.manual_seed(0)
        critic = Recorder(0.0)
        critic.slope = torch.nn.Parameter(torch.tensor(0.0))
        update, _ = agent(critic, copy.deepcopy(critic), calibrate=False)
        update(*batch, torch.full((2_000,), -math.inf), cql_alpha)
        gradients.append(critic.slope.grad.item())
    mean = batch[1].mean().item()
    assert gradients[1] - gradients[0] == pytest.approx(-2 * 2 * mean, abs=0.4)  # two critics
    assert gradients[2] - gradients[0] == pytest.approx(2 * (gradients[1] - gradients[0]), rel=1e-3)


@pytest.mark.parametrize("calibrate", [True, False])
def test_cql_wiring(calibrate):
    """M uniform actions, M of the policy in s, M of it in s'; Q at s for all; Cal-QL lifts the policy's to the return.

    Densities: with one critic value everywhere, and the policy's actions lifted far above, or not, what is left is the
    log mean of 1 / density, or their share.
    """
    (s, a, next_s, r, mask), M = a_batch(), 500
    critic = Recorder(7.0)
    update, networks = agent(critic, Recorder(0.0), calibrate=calibrate, cql_actions=M)
    net = networks["actor"].net.layers[-1]
    net.weight.data.zero_()
    net.bias.data.copy_(torch.tensor([0.0, 0.0]))  # one density for every state
    seen = []
    networks["actor"].register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    penalty = update(s, a, next_s, r, mask, torch.full((64,), 1_000.0), 1.0)["losses/cql_loss"]
    asked_s, asked_a = next(pair for pair in critic.asked if len(pair[0]) == 3 * M * 64)
    assert_close(asked_s.view(3 * M, 64, 2), s.expand(3 * M, -1, -1))
    blocks = asked_a.view(3, M * 64)
    assert blocks[0].abs().max() <= 1 and abs(blocks[0].std() - 3**-0.5) < 0.01
    (_, ours), (_, theirs) = ((x, out) for x, out in seen if out[0].dim() == 3)
    assert [x is y for x, y in zip((x for x, out in seen if out[0].dim() == 3), (s, next_s), strict=True)] == [True] * 2
    assert_close(asked_a.view(3, M, 64, 1)[1:], torch.stack([ours[0], theirs[0]]))
    log_density = torch.cat([torch.full((M, 64), -math.log(2)), ours[1], theirs[1]])
    expected = 0.0
    for q in (7.0, 8.0):
        value = torch.full((3 * M, 64), q)
        value[M:] = 1_000.0 if calibrate else q
        expected += ((value - log_density).logsumexp(0) - math.log(3 * M) - q).mean()
    assert_close(penalty, expected)


def test_distances():
    """Least where the states are the recent ones, the actions the policy's, the next states the environment's."""

    mean, std = torch.tensor([1.0, 0.5, 2.0]), torch.tensor([2.0, 0.5, 3.0])
    networks = {"energies": edis.Energies(1, 1, 8), "actor": edis.Actor(1, 1), "model": edis.MLP(3, 2)}

    def simulate(s, a):
        with torch.no_grad():
            reward, logit = networks["model"](work.inputs(torch.cat([s, a, s + a], dim=1))).unbind(1)
        return torch.stack([(s + a)[:, 0], reward + 0.25, torch.sigmoid(-logit) - 0.125], dim=1)

    work = edis.Round(ARGS, networks, edis.EDM(4, 0.0, CPU, *KARRAS), mean, std, simulate)
    s = torch.randn(3_000, 1)
    with torch.no_grad():
        a, _ = networks["actor"](s, torch.randn(3_000, 1))
    recent = work.normalize(torch.cat([s, a, s + a], dim=1))
    right = work.distances(recent, recent)
    copies = work.distances(recent + 1e-4, recent)["nearest"]
    assert 0 < copies < 0.1 * right["nearest"] and right["nearest"] < 0.2
    assert abs(right["state"]) < 0.02 and abs(right["policy"]) < 0.02 and right["dynamics"] < 1e-5
    mean_s = s + 2 + 3 * networks["energies"].dynamics(recent[:, :2]).detach()  # s plus the difference that is learned
    assert_close(right["learned_dynamics"], ((s + a - mean_s) / 2).abs().mean())
    assert right["reward_rms"] == pytest.approx(0.25, abs=1e-4) and right["mask_bias"] == pytest.approx(0.125, abs=1e-4)
    for column, name in enumerate(("state", "policy", "dynamics")):
        wrong = recent.clone()
        wrong[:, column] += 0.5
        assert work.distances(wrong, recent)[name] > right[name] + 0.03
    wrong[::2, 2] = recent[::2, 2]  # half is right: mean off / 2, root mean square off / sqrt(2)
    found = work.distances(wrong, recent)
    off = 0.5 * 3 / 2  # from deviations of s' - s to those of s
    assert_close(torch.stack([found["dynamics"], found["dynamics_rms"]]), torch.tensor([off / 2, off / 2**0.5]))


def test_simulator_is_the_environment():
    """A step of Hopper from its own state, through a transform of the observations."""
    import gymnasium as gym

    env, transform = (
        gym.make("Hopper-v4"),
        edis.Transform(obs_shift=np.full(11, -0.3), obs_scale=np.full(11, 2.0), reward_scale=3.0),
    )
    simulate = edis.make_simulator(gym.make("Hopper-v4"), transform, 11)
    obs, _ = env.reset(seed=0)
    for _ in range(10):
        action = env.action_space.sample()
        next_obs, reward, terminated, *_ = env.step(action)
        s, a = (torch.as_tensor(x, dtype=torch.float32)[None] for x in (transform.obs(obs), action))
        expected = [*transform.obs(next_obs), transform.reward(reward), 1.0 - terminated]
        assert_close(simulate(s, a)[0], torch.tensor(expected).float(), atol=1e-4, rtol=1e-4)
        obs = next_obs


def test_actor_and_temperature_losses():
    q, log_pi = torch.tensor([1.0, 3.0]), torch.tensor([-1.0, 2.0])
    assert_close(edis.actor_loss(q, log_pi, torch.tensor(0.5)), torch.tensor(0.25 - 2.0))
    log_alpha = torch.tensor(0.0, requires_grad=True)
    edis.temperature_loss(log_alpha, torch.tensor([-5.0]), -3).backward()  # entropy 5, above its target -A = -3
    assert log_alpha.grad > 0  # so alpha falls


def test_the_preset_can_tell_that_the_medium_policy_falls():
    """Mean discounted returns of episodes of the medium and, from the file's middle on, of the expert policy."""
    columns = edis.read_hdf5(ROOT / "datasets" / "hopper-medium-expert-mini.hdf5")
    ends = columns["terminals"].astype(bool) | columns["timeouts"].astype(bool)
    starts = np.append(True, ends[:-1])
    expert = np.arange(len(ends)) > len(ends) / 2

    def medium_and_expert(gamma):
        returns = edis.monte_carlo_returns(columns["rewards"].astype(np.float64), ends, gamma)
        return returns[starts & ~expert].mean(), returns[starts & expert].mean()

    medium, best = medium_and_expert(1.0)
    assert best > 2 * medium
    medium, best = medium_and_expert(edis.Args.gamma)
    assert best < medium
    medium, best = medium_and_expert(edis.MINI["gamma"])
    assert best > 1.2 * medium


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

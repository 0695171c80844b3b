"""The EDP scripts against values computed with the official EDP code (tests/golden)."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import edp_iql

CPU = torch.device("cpu")


def T(array):
    return torch.as_tensor(np.asarray(array))


def near(ours, golden, rtol=1e-4):
    assert_close(torch.as_tensor(ours, dtype=torch.float32), T(golden).float(), rtol=rtol, atol=1e-5)


@pytest.fixture
def dpm(script):
    return script.Diffusion(1000, "dpm-solver", 15, 3, CPU)


@pytest.fixture
def batch(golden):
    names = ("observations", "actions", "rewards", "next_observations", "dones")
    return {name: T(golden[f"batch/{name}"]) for name in names}


@pytest.mark.parametrize("K", [100, 1000])
def test_schedule(script, golden, K):
    d = script.Diffusion(K, "ddpm", 15, 3, CPU)
    g = {name.split("/")[-1]: golden[name] for name in golden.files if name.startswith(f"schedule/linear{K}/")}
    near(d.sqrt_alpha_bar, g["sqrt_alphas_cumprod"])
    near(d.sqrt_one_minus_alpha_bar, g["sqrt_one_minus_alphas_cumprod"])
    # ours are computed in float64; theirs in float32, where 1 - abar^1 = 1e-4 has 2e-4 of relative error
    near(d.posterior_a0, g["posterior_mean_coef1"], rtol=5e-4)
    near(d.posterior_ak, g["posterior_mean_coef2"], rtol=5e-4)
    near(d.posterior_std**2, g["posterior_variance"], rtol=5e-4)
    # the official ELBO weight has 1 - abar^k where the paper, and we, have 1 - abar^{k-1}
    alpha_bar = g["alphas_cumprod"].astype(np.float64)
    previous = np.append(alpha_bar[0], alpha_bar[:-1])
    near(d.elbo_weight * T((1 - previous) / (1 - alpha_bar)), g["ts_weights"], rtol=5e-4)


def test_time_embedding(script, golden, networks):
    policy = networks[0]
    for steps, expected in (("embed/t", "embed/sinusoidal_dim16"), ("embed/t_frac", "embed/sinusoidal_dim16_frac")):
        angles = T(golden[steps]).float()[:, None] * policy.frequencies
        # angles reach 999 radians: float32 leaves 6e-5 of absolute error
        assert_close(torch.cat([angles.cos(), angles.sin()], 1), T(golden[expected]), atol=1e-4, rtol=0)
        if steps == "embed/t":
            out = policy.time_mlp(torch.cat([angles.cos(), angles.sin()], 1))
            assert_close(out, T(golden["embed/time_mlp_out"]), atol=2e-4, rtol=1e-4)


def test_continuous_schedule(script, golden):
    """alpha, sigma, lambda between the discrete steps, against the official solver's own functions at 41 times."""
    d = script.Diffusion(1000, "dpm-solver", 40, 3, CPU)
    for ours, name in ((d.alpha, "alpha"), (d.sigma, "std"), (d.lambda_, "lambda")):
        # at the last times 1 - alpha^2 is 1e-4: float32 leaves theirs 1e-3
        np.testing.assert_allclose(ours, golden[f"dpm1000/ns_marginal_{name}"], rtol=2e-3)


def test_network_calls_of_the_solver(dpm, golden):
    near(dpm.t_index[:15], golden["dpm1000/dpm_nfe_t"][:, 0] * 1000 - 1, rtol=1e-5)
    assert dpm.orders == golden["dpm1000/dpm_update_s_t_order_r1_r2"][:, 2].tolist() == [3, 3, 3, 3, 2, 1]


@pytest.mark.parametrize("index", range(6))
def test_solver_updates(dpm, golden, index):
    """Each of the six updates, from the official code's state and noise predictions."""
    eps, x = T(golden["dpm1000/dpm_nfe_eps"]), T(golden["dpm1000/dpm_update_x"])
    start, order = sum(dpm.orders[:index]), dpm.orders[index]
    before = T(golden["dpm1000/in/x_T"]) if index == 0 else x[index - 1]
    assert_close(dpm.dpm_solver_step(lambda _, j: eps[j], before, start, order), x[index], rtol=1e-4, atol=1e-4)


def test_samples(script, dpm, golden, networks, batch):
    """DPM-Solver with the official noise clip (schedule at truncated steps) and with ours (at the exact time)."""
    policy, s = networks[0], batch["observations"]
    x_T, expected = T(golden["dpm1000/in/x_T"]), T(golden["dpm1000/dpm_sample"])

    class Official(script.Diffusion):
        def clip_noise(self, epsilon, x, i):
            k = int(np.int32(np.float32(golden["dpm1000/dpm_nfe_t"][i, 0] - np.float32(1e-3)) * np.float32(1000)))
            a, b = self.sqrt_alpha_bar[k], self.sqrt_one_minus_alpha_bar[k]
            return (x - a * ((x - b * epsilon) / a).clamp(-1, 1)) / b

    with torch.no_grad():
        official = Official(1000, "dpm-solver", 15, 3, CPU).dpm_solver(policy, s, x_T)
        ours = dpm.dpm_solver(policy, s, x_T)
    assert (official - expected).abs().max() < 1e-4
    assert 1e-4 < (ours - expected).abs().max() < 2e-2


def test_ddim_and_ddpm_samples(script, golden, networks, batch):
    policy, s = networks[0], batch["observations"]
    with torch.no_grad():
        d = script.Diffusion(100, "ddim", 100, 3, CPU)
        near(d.ddim(policy, s, T(golden["ddpm100/in/x_T"])), golden["ddpm100/ddim_sample"], rtol=1e-3)
        noise = [T(golden["ddpm100/in/x_T"]), *T(golden["ddpm100/in/step_noise"])]
        near(d.ddpm(policy, s, noise), golden["ddpm100/ddpm_sample"], rtol=1e-3)


def test_action_selection(script, golden, networks, batch):
    """Q of the official candidates, and the probability of each."""
    critic = networks[2]
    actions = T(golden["dpm1000/eas_actions"])
    s = batch["observations"][: len(actions)].repeat_interleave(50, 0)
    with torch.no_grad():
        q = torch.minimum(*critic(s, actions.flatten(0, 1))).view(-1, 50)
    near(q, golden["dpm1000/eas_q"])
    near(q.softmax(1), golden["dpm1000/eas_prob"])


@pytest.mark.parametrize(
    "config, variant, flags",
    [
        ("dpm1000", "iql", {}),
        ("ddpm100", "iql", {"diffusion_steps": 100}),
        ("dpm1000", "iql_expectile09", {"expectile": 0.9, "inverse_temperature": 10.0}),
    ],
)
def test_iql_update(golden, networks, batch, config, variant, flags):
    """A whole update: V moves first, policy and critics use the new V, each network is clipped on its own."""
    g = {
        n.removeprefix(f"{config}/{variant}/"): golden[n] for n in golden.files if n.startswith(f"{config}/{variant}/")
    }
    args = edp_iql.Args(max_grad_norm=float(golden["meta/max_grad_norm"]), **flags)
    diffusion = edp_iql.Diffusion(args.diffusion_steps, "ddpm", 15, 3, CPU)
    names = ("policy", "value", "critic", "critic_target")
    update, _ = edp_iql.make_update(args, diffusion, dict(zip(names, networks, strict=True)))
    s, a, next_s = batch["observations"], batch["actions"], batch["next_observations"]
    k, epsilon = T(golden[f"{config}/in/ts"]), T(golden[f"{config}/in/noise"])
    metrics = update(s, a, next_s, batch["rewards"], 1 - batch["dones"], k, epsilon)

    near(metrics["losses/value_loss"], g["metric/vf_loss"])
    near(metrics["losses/v_mean"], g["policy/v_pred"].mean())
    near(metrics["losses/weight_mean"], g["policy/exp_a"].mean(), rtol=1e-3)
    near(metrics["losses/diffusion_loss"], g["metric/diff_loss"])
    # the official guidance is the whole negative log-likelihood of a unit Gaussian; the constant has no gradient
    constant = 0.5 * math.log(2 * math.pi) * a.shape[1] * g["policy/exp_a"].mean()
    near(metrics["losses/guidance_loss"] + constant, g["metric/guide_loss"])
    for i in (1, 2):
        near(metrics[f"losses/qf{i}_loss"], g[f"metric/qf{i}_loss"])
    # gradients are left clipped: 9 was never reached
    for vector, norm in zip(
        (*networks[:2], networks[2].q1, networks[2].q2),
        ("policy_grad_norm", "vf_grad", "qf1_grad_norm", "qf2_grad_norm"),
        strict=True,
    ):
        gradient = torch.cat([p.grad.flatten() for p in vector.parameters()])
        near(gradient.norm(), g[f"metric/{norm}"], rtol=1e-3)
    near(networks[1](s)[:, 0], g["policy/v_pred"], rtol=1e-3)


@pytest.mark.parametrize("config", ["dpm1000", "ddpm100"])
def test_action_approximation(script, golden, networks, batch, config):
    d, policy = script.Diffusion(int(config.strip("dpm")), "ddpm", 15, 3, CPU), networks[0]
    k, epsilon = T(golden[f"{config}/in/ts"]), T(golden[f"{config}/in/noise"])
    a_k = d.forward_noising(batch["actions"], k, epsilon)
    near(a_k, golden[f"{config}/iql/policy/terms/x_t"])
    a_hat_0 = d.approximate_action(a_k, k, policy(batch["observations"], a_k, k))
    near(a_hat_0, golden[f"{config}/iql/policy/pred_astart"], rtol=1e-3)


def test_elbo_terms(golden, networks, batch):
    """Per-sample ELBO terms of the official CRR step, up to its weight's shift by one step."""
    d, policy = edp_iql.Diffusion(1000, "ddpm", 15, 3, CPU), networks[0]
    k, epsilon = T(golden["dpm1000/in/ts"]), T(golden["dpm1000/in/noise"])
    weights, mse = T(golden["dpm1000/crr_elbo/policy/terms/ts_weights"]), T(golden["dpm1000/crr_elbo/policy/terms/mse"])
    f = torch.rand(32, generator=torch.Generator().manual_seed(0)) * weights / d.elbo_weight[k]
    _, guidance = edp_iql.policy_losses(d, policy, batch["observations"], batch["actions"], k, epsilon, f, "elbo")
    expected = (f * d.elbo_weight[k] * mse * 3).mean()  # theirs is the mean over the 3 dimensions, the paper's the sum
    near(guidance, expected.detach())

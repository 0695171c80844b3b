"""The EDP scripts against values computed with the official EDP code (tests/golden)."""

import importlib
import itertools
import math
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import EDP, golden_networks
from torch.testing import assert_close

import edp_crr
import edp_iql
import edp_td3

CPU = torch.device("cpu")


@pytest.fixture(params=EDP)
def script(request):
    return importlib.import_module(request.param)


def T(array):
    return torch.as_tensor(np.asarray(array))


def near(ours, golden, rtol=1e-4, atol=1e-5):
    assert_close(torch.as_tensor(ours, dtype=torch.float32), T(golden).float(), rtol=rtol, atol=atol)


def near_table(ours, golden):
    """A schedule's table, (K,). Ours is computed in float64; theirs in float32, where 1 - abar^1 can be 1e-4."""
    rounded = 5 if len(golden) == 1000 else 0
    near(ours[:rounded], golden[:rounded], rtol=2e-4, atol=0)
    near(ours[rounded:], golden[rounded:], atol=0)


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
    near_table(d.sqrt_alpha_bar, g["sqrt_alphas_cumprod"])
    near_table(d.sqrt_one_minus_alpha_bar, g["sqrt_one_minus_alphas_cumprod"])
    near_table(d.posterior_a0, g["posterior_mean_coef1"])
    near_table(d.posterior_ak, g["posterior_mean_coef2"])
    near_table(d.posterior_std**2, g["posterior_variance"])
    # the official ELBO weight has 1 - abar^k where the paper, and we, have 1 - abar^{k-1}
    alpha_bar = g["alphas_cumprod"].astype(np.float64)
    previous = np.append(alpha_bar[0], alpha_bar[:-1])
    near_table(d.elbo_weight * T((1 - previous) / (1 - alpha_bar)), g["ts_weights"])


def test_time_embedding(script, golden, networks):
    policy = networks["policy"]
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
        np.testing.assert_allclose(ours, golden[f"dpm1000/ns_marginal_{name}"], rtol=1e-4)


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


def official(script, golden):
    """DPM-Solver with the official noise clip, the schedule at truncated steps; ours is at the exact time."""

    class Official(script.Diffusion):
        def clip_noise(self, epsilon, x, i):
            k = int(np.int32(np.float32(golden["dpm1000/dpm_nfe_t"][i, 0] - np.float32(1e-3)) * np.float32(1000)))
            a, b = self.sqrt_alpha_bar[k], self.sqrt_one_minus_alpha_bar[k]
            return (x - a * ((x - b * epsilon) / a).clamp(-1, 1)) / b

    return Official(1000, "dpm-solver", 15, 3, CPU)


def test_samples(script, dpm, golden, networks, batch):
    policy, s = networks["policy"], batch["observations"]
    x_T, expected = T(golden["dpm1000/in/x_T"]), T(golden["dpm1000/dpm_sample"])
    with torch.no_grad():
        assert (official(script, golden).dpm_solver(policy, s, x_T) - expected).abs().max() < 1e-4
        assert 1e-4 < (dpm.dpm_solver(policy, s, x_T) - expected).abs().max() < 2e-2


def test_ddim_and_ddpm_samples(script, golden, networks, batch):
    policy, s = networks["policy"], batch["observations"]
    with torch.no_grad():
        d = script.Diffusion(100, "ddim", 100, 3, CPU)
        near(d.ddim(policy, s, T(golden["ddpm100/in/x_T"])), golden["ddpm100/ddim_sample"])
        noise = [T(golden["ddpm100/in/x_T"]), *T(golden["ddpm100/in/step_noise"])]
        near(d.ddpm(policy, s, torch.stack(noise)), golden["ddpm100/ddpm_sample"])


def test_action_selection(script, golden, networks, batch):
    """Candidates from the official noise, Q and probability of each; but ours are clipped before Q sees them."""
    s, probabilities = batch["observations"][:4], []

    def choose(p, n, generator):
        probabilities.append(p)
        return p.argmax(1, keepdim=True)

    x_T, d = T(golden["dpm1000/in/eas_x_T"]).flatten(0, 1), official(script, golden)
    actions = T(golden["dpm1000/eas_actions"])
    with mock.patch.object(torch, "randn", lambda *_, **__: x_T[None]), mock.patch.object(torch, "multinomial", choose):
        chosen = script.select_actions(d, networks["policy"], networks["critic"], s, 50, torch.Generator())
    (p,) = probabilities
    assert_close(p, T(golden["dpm1000/eas_prob"]), rtol=0, atol=1e-4)  # clipped: 5e-5
    assert_close(chosen, actions[torch.arange(4), p.argmax(1)].clamp(-1, 1), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        q = networks["critic"].min(s.repeat_interleave(50, 0), actions.flatten(0, 1)).view(-1, 50)
    near(q, golden["dpm1000/eas_q"])
    near(q.softmax(1), golden["dpm1000/eas_prob"])


def values(golden, prefix):
    return {name.removeprefix(prefix): golden[name] for name in golden.files if name.startswith(prefix)}


def run_update(script, golden, batch, config, chance, **flags):
    """One update from the golden weights: its metrics, V(s') among them, and the networks, with their gradients."""
    K, sampler = (1000, "dpm-solver") if config == "dpm1000" else (100, "ddpm")
    flags = {"max_grad_norm": float(golden["meta/max_grad_norm"]), **flags}
    args = script.Args(diffusion_steps=K, sampler=sampler, **flags)
    diffusion = official(script, golden) if K == 1000 else script.Diffusion(K, sampler, 15, 3, CPU)
    networks, every = script.make_networks(11, 3, CPU), golden_networks(script)
    networks = {name: every[name] for name in networks}
    update, optimizers = script.make_update(args, diffusion, networks)
    critic_losses, seen = script.critic_losses, {}

    def spied(q1, q2, r, mask, next_v, gamma):
        seen["next_v"] = next_v
        return critic_losses(q1, q2, r, mask, next_v, gamma)

    transition = [batch[name] for name in ("observations", "actions", "next_observations", "rewards")]
    k, epsilon = T(golden[f"{config}/in/ts"]), T(golden[f"{config}/in/noise"])
    with mock.patch.object(script, "critic_losses", spied):
        metrics = update(*transition, 1 - batch["dones"], k=k, epsilon=epsilon, **chance) | seen
    for name, optimizer in optimizers.items():
        parameters = list(networks[name].parameters())
        gradient = torch.cat([vector.grad for vector in optimizer.param_groups[0]["params"]])
        for parameter, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)
    return metrics, networks


def near_critics_and_norms(metrics, networks, g):
    """Losses, and norms of gradients and of the weights after the step; 9, the clip, was never reached."""
    modules = {"policy": networks["policy"], "qf1": networks["critic"].q1, "qf2": networks["critic"].q2}
    for name, module in modules.items():
        near(gradient_norm(module), g[f"metric/{name}_grad_norm"])
        weights = torch.cat([p.detach().double().flatten() for p in module.parameters()])
        assert abs(weights.norm() - g[f"metric/{name}_weight_norm"]) < 5e-6  # it moved by 2.5e-5 or more
    near(metrics["losses/qf1_loss"], g["metric/qf1_loss"])
    near(metrics["losses/qf2_loss"], g["metric/qf2_loss"])
    near(metrics["losses/diffusion_loss"], g["metric/diff_loss"])


def gradient_norm(module):
    return torch.cat([p.grad.flatten() for p in module.parameters()]).norm()


# The official regression is the whole negative log-likelihood of a unit Gaussian; the constant has no gradient.
CONSTANT = 0.5 * math.log(2 * math.pi) * 3


@pytest.mark.parametrize("config, variant, flags", [
    ("dpm1000", "iql", {}), ("ddpm100", "iql", {}),
    ("dpm1000", "iql_expectile09", {"expectile": 0.9, "inverse_temperature": 10.0}),
])  # fmt: skip
def test_iql_update(golden, batch, config, variant, flags):
    """A whole update: V moves first, policy and critics use the new V, each network is clipped on its own."""
    g = values(golden, f"{config}/{variant}/")
    metrics, networks = run_update(edp_iql, golden, batch, config, {}, **flags)
    near(metrics["losses/value_loss"], g["metric/vf_loss"])
    near(metrics["losses/v_mean"], g["policy/v_pred"].mean())
    near(metrics["losses/weight_mean"], g["policy/exp_a"].mean())
    near(metrics["losses/guidance_loss"], g["metric/guide_loss"] - CONSTANT * g["policy/exp_a"].mean())
    near(metrics["losses/policy_loss"], g["metric/policy_loss"] - CONSTANT * g["policy/exp_a"].mean())
    near(metrics["next_v"], g["critic/next_v"])
    near_critics_and_norms(metrics, networks, g)
    near(gradient_norm(networks["value"]), g["metric/vf_grad"])
    near(networks["value"](batch["observations"])[:, 0], g["policy/v_pred"])


def sampler_noise(golden, config):
    """a^K, and for DDPM the noise of each step."""
    x_T, steps = T(golden[f"{config}/in/x_T"]), T(golden[f"{config}/in/step_noise"])
    return torch.cat([x_T[None], steps])


@pytest.mark.parametrize("config, variant, flags", [
    ("dpm1000", "crr", {}), ("ddpm100", "crr", {}), ("dpm1000", "crr_heaviside", {"weight": "binary"}),
    ("dpm1000", "crr_max", {"advantage_baseline": "max"}),
])  # fmt: skip
def test_crr_update(golden, batch, config, variant, flags):
    """A whole update: targets from a whole sample of the target policy, weights from the critics before their step."""
    g = values(golden, f"{config}/{variant}/")
    chance = {"noise": sampler_noise(golden, config), "z": T(golden[f"{config}/in/crr_normals"])}
    metrics, networks = run_update(edp_crr, golden, batch, config, chance | {"policy_tau": torch.tensor(0.0)}, **flags)
    near(metrics["losses/advantage_mean"], g["policy/adv"].mean())
    near(metrics["losses/weight_mean"], g["policy/lmbda"].mean())
    near(metrics["losses/guidance_loss"], g["metric/guide_loss"] - CONSTANT * g["policy/lmbda"].mean())
    near(metrics["losses/policy_loss"], g["metric/policy_loss"] - CONSTANT * g["policy/lmbda"].mean())
    near(metrics["next_v"], np.minimum(g["q/tgt_q1"], g["q/tgt_q2"]))
    near_critics_and_norms(metrics, networks, g)


@pytest.mark.parametrize("script", [edp_crr, edp_iql])
@pytest.mark.parametrize("likelihood", ["mse", "elbo"])
def test_policy_loss(script, golden, batch, likelihood):
    """Each loss has its own coefficient, and the regression the chosen form."""
    chance, g = {}, values(golden, "dpm1000/iql/policy/")
    f = g.get("exp_a")
    if script is edp_crr:
        chance = {"noise": sampler_noise(golden, "dpm1000"), "z": T(golden["dpm1000/in/crr_normals"])}
        chance["policy_tau"], f = torch.tensor(0.0), golden["dpm1000/crr/policy/lmbda"]
    flags = {"diffusion_coef": 0.5, "guidance_coef": 2.0, "likelihood": likelihood}
    metrics, _ = run_update(script, golden, batch, "dpm1000", chance, **flags)
    squared = (
        (g["terms/model_output"] - golden["dpm1000/in/noise"]) ** 2,
        (g["terms/pred_astart"] - batch["actions"].numpy()) ** 2,
    )
    k = golden["dpm1000/in/ts"]
    elbo = script.Diffusion(1000, "ddpm", 15, 3, CPU).elbo_weight[k].numpy()
    guidance = {"elbo": f * elbo * squared[0].sum(1), "mse": f * squared[1].sum(1) / 2}[likelihood].mean()
    near(metrics["losses/guidance_loss"], guidance)
    near(metrics["losses/policy_loss"], 0.5 * squared[0].mean() + 2 * guidance)


@pytest.mark.parametrize("config, variant, baseline, weight", [
    ("dpm1000", "crr", "mean", "exp"), ("ddpm100", "crr", "mean", "exp"), ("dpm1000", "crr_max", "max", "exp"),
    ("dpm1000", "crr_heaviside", "mean", "binary"),
])  # fmt: skip
@pytest.mark.parametrize("script", [edp_crr])
def test_crr_advantage_and_weight(script, golden, networks, batch, config, variant, baseline, weight):
    g = values(golden, f"{config}/{variant}/policy/")
    s, a, z = batch["observations"], batch["actions"], T(golden[f"{config}/in/crr_normals"])
    with torch.no_grad():
        q = networks["critic"].min(s, a)
        advantage = edp_crr.crr_advantage(networks["critic"], s, q, T(g["terms/pred_astart"]), z, baseline)
    near(advantage, g["adv"])
    near(edp_crr.crr_weight(advantage, weight, 1.0, 20.0), g["lmbda"])


@pytest.mark.parametrize("config, variant", itertools.product(("dpm1000", "ddpm100"), ("crr", "td3_qf1")))
@pytest.mark.parametrize("script", [edp_crr, edp_td3])
def test_td_target_parts(script, golden, networks, batch, config, variant):
    """a', the twin target critics and r + gamma min Q'; the updates' tests hold min Q' against the same values."""
    g, s = values(golden, f"{config}/{variant}/q/"), batch["next_observations"]
    d = official(script, golden) if config == "dpm1000" else script.Diffusion(100, "ddpm", 15, 3, CPU)
    with torch.no_grad():
        a = d.sample(networks["policy_target"], s, sampler_noise(golden, config))
        q1, q2 = networks["critic_target"](s, a)
    near(a, g["next_action"], atol=1e-4)
    near(q1, g["tgt_q1"])
    near(q2, g["tgt_q2"])
    target, mask = T(g["tgt_q"]), 1 - batch["dones"]
    losses = script.critic_losses(target, target, batch["rewards"], mask, torch.minimum(q1, q2), 0.99)
    assert max(losses) < (1e-4 * target).square().mean()


@pytest.mark.parametrize("config", ["dpm1000", "ddpm100"])
@pytest.mark.parametrize("first", [True, False])
def test_td3_update(golden, batch, config, first):
    """A whole update, with either critic in the policy's objective and in lambda."""
    g = values(golden, f"{config}/td3_qf{1 if first else 2}/")
    noise = sampler_noise(golden, config)
    chance = {"noise": noise, "next_noise": noise, "first_critic": torch.tensor(first)}
    metrics, networks = run_update(edp_td3, golden, batch, config, chance | {"policy_tau": torch.tensor(0.0)})
    near(metrics["losses/guidance_loss"], g["metric/guide_loss"])
    near(metrics["losses/policy_loss"], g["metric/policy_loss"])
    near(metrics["losses/q_mean"], g["metric/cur_q1"])
    near(metrics["next_v"], np.minimum(g["q/tgt_q1"], g["q/tgt_q2"]))
    near_critics_and_norms(metrics, networks, g)
    chance["policy_tau"] = torch.tensor(0.0)
    metrics, _ = run_update(edp_td3, golden, batch, config, chance, diffusion_coef=0.5)
    near(metrics["losses/policy_loss"], 0.5 * g["metric/diff_loss"] + g["metric/guide_loss"])


def test_gradients_are_clipped(golden, batch):
    """Each network on its own: the norm is at most that of the flag."""
    g, noise = values(golden, "dpm1000/td3_qf1_clip0.5/"), sampler_noise(golden, "dpm1000")
    chance = {"noise": noise, "next_noise": noise, "first_critic": torch.tensor(True), "policy_tau": torch.tensor(0.0)}
    _, networks = run_update(edp_td3, golden, batch, "dpm1000", chance, max_grad_norm=0.5)
    for module, name in (
        (networks["policy"], "policy"),
        (networks["critic"].q1, "qf1"),
        (networks["critic"].q2, "qf2"),
    ):
        assert g[f"metric/{name}_grad_norm"] > 0.5
        near(gradient_norm(module), torch.tensor(0.5))


@pytest.mark.parametrize("top_k", [1, 2])
def test_td3_update_with_max_q_backup(golden, batch, top_k):
    g, noise = values(golden, "dpm1000/td3_qf1/"), sampler_noise(golden, "dpm1000")
    chance = {"noise": noise, "next_noise": T(golden["dpm1000/in/max_q_x_T"]).flatten(0, 1)[None]}
    chance |= {"first_critic": torch.tensor(True), "policy_tau": torch.tensor(0.0)}
    flags = {"max_q_backup": True, "max_q_top_k": top_k}
    metrics, _ = run_update(edp_td3, golden, batch, "dpm1000", chance, **flags)
    for i in (1, 2):
        error = g[f"q/cur_q{i}"] - golden[f"dpm1000/max_q_topk{top_k}/tgt_q"]
        near(metrics[f"losses/qf{i}_loss"], (error**2).mean())


@pytest.mark.parametrize("script", [edp_crr, edp_td3])
def test_targets_move(golden, batch, script):
    noise = sampler_noise(golden, "dpm1000")
    chance = {"noise": noise, "policy_tau": torch.tensor(0.3)}
    if script is edp_crr:
        chance["z"] = T(golden["dpm1000/in/crr_normals"])
    else:
        chance |= {"next_noise": noise, "first_critic": torch.tensor(True)}
    before = golden_networks(script)
    _, after = run_update(script, golden, batch, "dpm1000", chance)
    for name, rate in (("critic", 0.005), ("policy", 0.3)):
        triples = zip(
            *(n.parameters() for n in (before[f"{name}_target"], after[name], after[f"{name}_target"])), strict=True
        )
        for old, new, target in triples:
            assert_close(target, old.lerp(new, rate), check_device=False)


@pytest.mark.parametrize("first", [True, False])
def test_diffusion_ql_update(golden, batch, first):
    """The policy's gradient is that of the formula: through a whole sample, lambda from the other critic."""
    noise, next_noise = sampler_noise(golden, "ddpm100"), torch.randn(101, 32, 3)
    chance = {"noise": noise, "next_noise": next_noise, "first_critic": torch.tensor(first)}
    chance["policy_tau"] = torch.tensor(0.0)
    flags = {"action_approximation": False, "eta": 1.0, "max_grad_norm": 1e9}
    metrics, networks = run_update(edp_td3, golden, batch, "ddpm100", chance, **flags)
    before, d = golden_networks(edp_td3), edp_td3.Diffusion(100, "ddpm", 15, 3, CPU)
    policy, s, a = before["policy"], batch["observations"], batch["actions"]
    k, epsilon = T(golden["ddpm100/in/ts"]), T(golden["ddpm100/in/noise"])
    loss = (epsilon - policy(s, d.forward_noising(a, k, epsilon), k)).square().mean()
    q1, q2 = before["critic"](s, d.ddpm(policy, s, noise))
    loss = loss - (q1.mean() / q2.abs().mean().detach() if first else q2.mean() / q1.abs().mean().detach())
    loss.backward()
    near(metrics["losses/policy_loss"], loss.detach())
    for ours, expected in zip(networks["policy"].parameters(), policy.parameters(), strict=True):
        assert_close(ours.grad, expected.grad, rtol=1e-3, atol=1e-5)


def test_diffusion_ql_clips_target_actions(golden, batch):
    """As its own code does; DPM-Solver's samples can lie outside."""
    noise, a = sampler_noise(golden, "dpm1000"), T(golden["dpm1000/td3_qf1/q/next_action"])
    chance = {"noise": noise, "next_noise": noise, "first_critic": torch.tensor(True), "policy_tau": torch.tensor(0.0)}
    metrics, _ = run_update(edp_td3, golden, batch, "dpm1000", chance, action_approximation=False)
    assert (a.abs() > 1.001).any()
    expected = golden_networks(edp_td3)["critic_target"].min(batch["next_observations"], a.clamp(-1, 1)).detach()
    assert_close(metrics["next_v"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", ["dpm1000", "ddpm100"])
@pytest.mark.parametrize("critic", [1, 2])
def test_td3_lambda(golden, networks, batch, config, critic):
    g, s = values(golden, f"{config}/td3_qf{critic}/policy/"), batch["observations"]
    q = networks["critic"](s, T(g["pred_astart"]))[critic - 1]
    near(-edp_td3.q_loss(q, q, 2.0) / q.mean(), g["lmbda"])


@pytest.mark.parametrize("top_k", [1, 2])
def test_max_q_backup(golden, networks, batch, top_k):
    s = batch["next_observations"].repeat_interleave(10, 0)
    with torch.no_grad():
        a = official(edp_td3, golden).dpm_solver(
            networks["policy_target"], s, T(golden["dpm1000/in/max_q_x_T"]).flatten(0, 1)
        )
        q1, q2 = (q.view(-1, 10) for q in networks["critic_target"](s, a.clamp(-1, 1)))
    target = batch["rewards"] + 0.99 * (1 - batch["dones"]) * edp_td3.max_q_backup(q1, q2, top_k)
    near(target, golden[f"dpm1000/max_q_topk{top_k}/tgt_q"])


@pytest.mark.parametrize("K", [5, 100])
def test_vp_schedule(script, golden, K):
    d = script.Diffusion(K, "ddpm", 15, 3, CPU, "vp")
    near_table(d.sqrt_alpha_bar, golden[f"schedule/vp{K}/sqrt_alphas_cumprod"])
    near_table(d.posterior_a0, golden[f"schedule/vp{K}/posterior_mean_coef1"])


@pytest.mark.parametrize("config", ["dpm1000", "ddpm100"])
def test_action_approximation(script, golden, networks, batch, config):
    d, policy = script.Diffusion(int(config.strip("dpm")), "ddpm", 15, 3, CPU), networks["policy"]
    k, epsilon = T(golden[f"{config}/in/ts"]), T(golden[f"{config}/in/noise"])
    a_k = d.forward_noising(batch["actions"], k, epsilon)
    near(a_k, golden[f"{config}/iql/policy/terms/x_t"])
    a_hat_0 = d.approximate_action(a_k, k, policy(batch["observations"], a_k, k))
    near(a_hat_0, golden[f"{config}/iql/policy/pred_astart"])


@pytest.mark.parametrize("script", [edp_crr, edp_iql])
def test_elbo_terms(script, golden, networks, batch):
    """The official CRR step's ELBO, with its own weight at each step and its mean over the 3 dimensions."""
    d = script.Diffusion(1000, "ddpm", 15, 3, CPU)
    d.elbo_weight = T(golden["schedule/linear1000/normalized_ts_weights"]).float()
    s, a, k, epsilon = (
        batch["observations"],
        batch["actions"],
        T(golden["dpm1000/in/ts"]),
        T(golden["dpm1000/in/noise"]),
    )
    error, a_hat_0 = script.reconstruct(d, networks["policy"], s, a, k, epsilon)
    f = T(golden["dpm1000/crr_elbo/policy/lmbda"])
    guidance = script.weighted_regression(d, error, a, a_hat_0, k, f, "elbo")
    near(guidance.detach() / 3, golden["dpm1000/crr_elbo/metric/guide_loss"])

"""The EDP scripts against values computed with the official EDP code (tests/golden)."""

import math

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, golden_networks, keep_gradients
from torch.testing import assert_close

import edp_crr
import edp_iql
import edp_td3

GOLDEN = np.load(ROOT / "tests" / "golden" / "edp_golden.npz")
# The official regression is the whole negative log-likelihood of a unit Gaussian; the constant has no gradient.
CONSTANT = 0.5 * math.log(2 * math.pi) * 3


def T(array):
    return torch.as_tensor(np.asarray(array))


def near(ours, golden, rtol=1e-4, atol=1e-5):
    assert_close(torch.as_tensor(ours, dtype=torch.float32), T(golden).float(), rtol=rtol, atol=atol)


def near_table(ours, golden):
    """A schedule's table, (K,). Ours is computed in float64; theirs in float32, where 1 - abar^1 can be 1e-4."""
    rounded = 5 if len(golden) == 1000 else 0
    near(ours[:rounded], golden[:rounded], rtol=2e-4, atol=0)
    near(ours[rounded:], golden[rounded:], atol=0)


def values(prefix):
    return {name.removeprefix(prefix): GOLDEN[name] for name in GOLDEN.files if name.startswith(prefix)}


BATCH = {name: T(column) for name, column in values("batch/").items()}


def make_diffusion(script=edp_iql, K=1000, sampler="dpm-solver", **flags):
    return script.Diffusion(script.Args(diffusion_steps=K, sampler=sampler, **flags), CPU)


def official(script):
    """DPM-Solver with the official noise clip, the schedule at truncated steps; ours is at the exact time."""

    class Official(script.Diffusion):
        def dpm_solver(self, policy, s, noise):
            (a,) = noise

            def epsilon(x, i):
                t = np.float32(GOLDEN["dpm1000/dpm_nfe_t"][i, 0] - np.float32(1e-3))
                k = int(np.int32(t * np.float32(1000)))
                alpha, sigma = self.sqrt_alpha_bar[k], self.sqrt_one_minus_alpha_bar[k]
                a0 = ((x - sigma * policy(s, x, self.t_index[i])) / alpha).clamp(-1, 1)
                return (x - alpha * a0) / sigma

            for i, order in ((0, 3), (3, 3), (6, 3), (9, 3), (12, 2), (14, 1)):
                a = self.dpm_solver_step(epsilon, a, i, order)
            return a

    return Official(script.Args(diffusion_steps=1000, sampler="dpm-solver"), CPU)


@pytest.mark.parametrize("K", [100, 1000])
def test_schedule(K):
    d, g = make_diffusion(K=K, sampler="ddpm"), values(f"schedule/linear{K}/")
    near_table(d.sqrt_alpha_bar, g["sqrt_alphas_cumprod"])
    near_table(d.sqrt_one_minus_alpha_bar, g["sqrt_one_minus_alphas_cumprod"])
    near_table(d.posterior_a0, g["posterior_mean_coef1"])
    near_table(d.posterior_ak, g["posterior_mean_coef2"])
    near_table(d.posterior_std**2, g["posterior_variance"])
    # the official ELBO weight has 1 - abar^k where the paper, and we, have 1 - abar^{k-1}
    alpha_bar = g["alphas_cumprod"].astype(np.float64)
    previous = np.append(alpha_bar[0], alpha_bar[:-1])
    near_table(d.elbo_weight * T((1 - previous) / (1 - alpha_bar)), g["ts_weights"])


def test_time_embedding():
    policy, g = golden_networks(edp_iql)["policy"], values("embed/")
    for steps, expected in (("t", "sinusoidal_dim16"), ("t_frac", "sinusoidal_dim16_frac")):
        angles = T(g[steps]).float()[:, None] * policy.frequencies
        # angles reach 999 radians: float32 leaves 6e-5 of absolute error
        assert_close(torch.cat([angles.cos(), angles.sin()], 1), T(g[expected]), atol=1e-4, rtol=0)
    assert_close(policy.time_mlp(T(g["sinusoidal_dim16"])), T(g["time_mlp_out"]), atol=2e-4, rtol=1e-4)


def test_continuous_schedule():
    """alpha, sigma, lambda between the discrete steps, against the official solver's own functions at 41 times."""
    d = make_diffusion(sampler_steps=40)
    for ours, name in ((d.alpha, "alpha"), (d.sigma, "std"), (d.lambda_, "lambda")):
        np.testing.assert_allclose(ours, GOLDEN[f"dpm1000/ns_marginal_{name}"], rtol=1e-4)


def test_solver():
    """Its network calls, and each of the six updates from the official code's state and noise predictions."""
    d = make_diffusion()
    near(d.t_index[:15], GOLDEN["dpm1000/dpm_nfe_t"][:, 0] * 1000 - 1, rtol=1e-5)
    assert d.orders == GOLDEN["dpm1000/dpm_update_s_t_order_r1_r2"][:, 2].tolist() == [3, 3, 3, 3, 2, 1]
    eps, x = T(GOLDEN["dpm1000/dpm_nfe_eps"]), T(GOLDEN["dpm1000/dpm_update_x"])
    before = [T(GOLDEN["dpm1000/in/x_T"]), *x]
    for index, order in enumerate(d.orders):
        after = d.dpm_solver_step(lambda _, j: eps[j], before[index], sum(d.orders[:index]), order)
        assert_close(after, x[index], rtol=1e-4, atol=1e-4)


def test_samples():
    policy, s = golden_networks(edp_iql)["policy"], BATCH["observations"]
    x_T, expected = T(GOLDEN["dpm1000/in/x_T"]), T(GOLDEN["dpm1000/dpm_sample"])
    noise = torch.stack([T(GOLDEN["ddpm100/in/x_T"]), *T(GOLDEN["ddpm100/in/step_noise"])])
    with torch.no_grad():
        assert (official(edp_iql).sample(policy, s, x_T[None]) - expected).abs().max() < 1e-4
        assert 1e-4 < (make_diffusion().sample(policy, s, x_T[None]) - expected).abs().max() < 2e-2
        near(make_diffusion(K=100, sampler="ddpm").sample(policy, s, noise), GOLDEN["ddpm100/ddpm_sample"])
        d = make_diffusion(K=100, sampler_steps=99, solver_order=1)  # DDIM, up to its last step
        a, k = d.sample(policy, s, noise[:1]), torch.zeros(32, dtype=torch.long)
        near(d.approximate(a, k, policy(s, a, d.t_index[-1])), GOLDEN["ddpm100/ddim_sample"], atol=5e-5)


def test_action_selection(monkeypatch):
    """Candidates from the official noise, Q and probability of each; but ours are clipped before Q sees them."""
    s, probabilities, networks = BATCH["observations"][:4], [], golden_networks(edp_iql)

    def choose(p, n):
        probabilities.append(p)
        return p.argmax(1, keepdim=True)

    x_T, actions = T(GOLDEN["dpm1000/in/eas_x_T"]).flatten(0, 1), T(GOLDEN["dpm1000/eas_actions"])
    monkeypatch.setattr(torch, "randn", lambda *_, **__: x_T[None])
    monkeypatch.setattr(torch, "multinomial", choose)
    d = official(edp_iql)
    chosen = edp_iql.select_actions(d, networks["policy"], networks["critic"], s, 50)
    (p,) = probabilities
    assert_close(p, T(GOLDEN["dpm1000/eas_prob"]), rtol=0, atol=1e-4)  # clipped: 5e-5
    assert_close(chosen, actions[torch.arange(4), p.argmax(1)].clamp(-1, 1), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        q = torch.minimum(*networks["critic"](s.repeat_interleave(50, 0), actions.flatten(0, 1)))
    near(q.view(4, 50), GOLDEN["dpm1000/eas_q"])


def sampler_noise(config):
    """a^K, and for DDPM the noise of each step."""
    return torch.cat([T(GOLDEN[f"{config}/in/x_T"])[None], T(GOLDEN[f"{config}/in/step_noise"])])


def run_update(script, config, count=1, draws=None, **flags):
    """One update from the golden weights and draws: its metrics, and the networks, with their gradients."""
    K, sampler = (1000, "dpm-solver") if config == "dpm1000" else (100, "ddpm")
    flags = {"max_grad_norm": float(GOLDEN["meta/max_grad_norm"]), **flags}
    args = script.Args(diffusion_steps=K, sampler=sampler, **flags)
    diffusion = official(script) if K == 1000 else script.Diffusion(args, CPU)
    networks = golden_networks(script)
    update, optimizer = script.make_update(args, diffusion, networks)
    keep_gradients(optimizer)
    transition = [BATCH[name] for name in ("observations", "actions", "next_observations", "rewards")]
    given = {"k": T(GOLDEN[f"{config}/in/ts"]), "epsilon": T(GOLDEN[f"{config}/in/noise"])}
    if script is not edp_iql:
        given["noise"] = sampler_noise(config)
    if script is edp_crr:
        given["z"] = T(GOLDEN[f"{config}/in/crr_normals"])
    if script is edp_td3:
        given |= {"next_noise": given["noise"], "first_critic": torch.tensor(True)}
    return update(*transition, 1 - BATCH["dones"], torch.tensor(count), **given | (draws or {})), networks


def near_critics_and_norms(metrics, networks, g, clip=9.0):
    """Losses, clipped norms of gradients, and norms of the weights after the step."""
    modules = {"policy": networks["policy"], "qf1": networks["critic"].q1, "qf2": networks["critic"].q2}
    for name, module in modules.items():
        gradient = torch.cat([p.kept.flatten() for p in module.parameters()])
        near(gradient.norm(), np.minimum(g[f"metric/{name}_grad_norm"], clip))
        weights = torch.cat([p.detach().double().flatten() for p in module.parameters()])
        assert abs(weights.norm() - g[f"metric/{name}_weight_norm"]) < 5e-6  # it moved by 2.5e-5 or more
    near(metrics["losses/qf1_loss"], g["metric/qf1_loss"])  # with the official target
    near(metrics["losses/qf2_loss"], g["metric/qf2_loss"])
    near(metrics["losses/diffusion_loss"], g["metric/diff_loss"])


@pytest.mark.parametrize("config, variant, flags", [
    ("dpm1000", "iql", {}), ("ddpm100", "iql", {}),
    ("dpm1000", "iql_expectile09", {"expectile": 0.9, "inverse_temperature": 10.0}),
    ("dpm1000", "crr", {}), ("ddpm100", "crr", {}),
])  # fmt: skip
def test_weighted_update(config, variant, flags):
    """IQL: policy and critics use the new V. CRR: targets from a whole sample, weights from the old critics."""
    script, g = edp_iql if "iql" in variant else edp_crr, values(f"{config}/{variant}/")
    metrics, networks = run_update(script, config, **flags)
    f = g["policy/exp_a" if script is edp_iql else "policy/lmbda"].mean()
    near(metrics["losses/weight_mean"], f)
    near(metrics["losses/guidance_loss"], g["metric/guide_loss"] - CONSTANT * f)
    near(metrics["losses/policy_loss"], g["metric/policy_loss"] - CONSTANT * f)
    near_critics_and_norms(metrics, networks, g)
    if script is edp_crr:
        near(metrics["losses/advantage_mean"], g["policy/adv"].mean())
        return
    near(metrics["losses/value_loss"], g["metric/vf_loss"])
    near(metrics["losses/v_mean"], g["policy/v_pred"].mean())
    near(torch.cat([p.kept.flatten() for p in networks["value"].parameters()]).norm(), g["metric/vf_grad"])
    near(networks["value"](BATCH["observations"])[:, 0], g["policy/v_pred"])


@pytest.mark.parametrize("config, variant, first, flags", [
    ("dpm1000", "td3_qf1", True, {}), ("dpm1000", "td3_qf2", False, {}), ("ddpm100", "td3_qf1", True, {}),
    ("ddpm100", "td3_qf2", False, {}), ("dpm1000", "td3_qf1_clip0.5", True, {"max_grad_norm": 0.5}),
])  # fmt: skip
def test_td3_update(config, variant, first, flags):
    """A whole update, with either critic in the policy's objective and in lambda; each network clipped on its own."""
    g, draws = values(f"{config}/{variant}/"), {"first_critic": torch.tensor(first)}
    metrics, networks = run_update(edp_td3, config, draws=draws, **flags)
    near(metrics["losses/guidance_loss"], g["metric/guide_loss"])
    near(metrics["losses/policy_loss"], g["metric/policy_loss"])
    near(metrics["losses/q_mean"], g["metric/cur_q1"])
    near_critics_and_norms(metrics, networks, g, flags.get("max_grad_norm", 9.0))
    metrics, _ = run_update(edp_td3, config, draws=draws, diffusion_coef=0.5)
    near(metrics["losses/policy_loss"], 0.5 * g["metric/diff_loss"] + g["metric/guide_loss"])


@pytest.mark.parametrize("script", [edp_crr, edp_iql])
@pytest.mark.parametrize("likelihood", ["mse", "elbo", "simple"])
def test_policy_loss(script, likelihood):
    """Each loss has its own coefficient, and the regression the chosen form."""
    g, k = values("dpm1000/iql/policy/"), GOLDEN["dpm1000/in/ts"]
    f = g["exp_a"] if script is edp_iql else GOLDEN["dpm1000/crr/policy/lmbda"]
    flags = {"diffusion_coef": 0.5, "guidance_coef": 2.0, "likelihood": likelihood}
    metrics, _ = run_update(script, "dpm1000", **flags)
    noise_error = (g["terms/model_output"] - GOLDEN["dpm1000/in/noise"]) ** 2
    action_error = (g["terms/pred_astart"] - BATCH["actions"].numpy()) ** 2
    elbo = make_diffusion().elbo_weight[k].numpy()  # see test_schedule
    forms = {"elbo": f * elbo * noise_error.sum(1), "mse": f * action_error.sum(1) / 2}
    guidance = (forms | {"simple": f / f.mean() * noise_error.mean(1)})[likelihood].mean()
    near(metrics["losses/guidance_loss"], guidance, rtol=5e-4)
    near(metrics["losses/policy_loss"], 0.5 * noise_error.mean() + 2 * guidance, rtol=5e-4)


@pytest.mark.parametrize("script", [edp_iql, edp_crr, edp_td3])
def test_targets_move(script):
    """The critics' at each update, the policy's at every fifth after a start."""
    before = golden_networks(script)
    for count in (1_000, 1_004, 1_005):
        _, after = run_update(script, "dpm1000", count, tau=0.3)
        for name, rate in (("critic", 0.3), ("policy", 0.3 * (count == 1_005))):
            if f"{name}_target" in after:
                networks = before[f"{name}_target"], after[name], after[f"{name}_target"]
                for old, new, target in zip(*(network.parameters() for network in networks), strict=True):
                    assert_close(target.data, old.data.lerp(new.data, rate))


@pytest.mark.parametrize("first", [True, False])
def test_diffusion_ql_update(first):
    """The policy's gradient is that of the formula: through a whole sample, lambda from the other critic."""
    draws = {"next_noise": torch.randn(101, 32, 3), "first_critic": torch.tensor(first)}
    flags = {"action_approximation": False, "eta": 1.0, "max_grad_norm": 1e9}
    metrics, networks = run_update(edp_td3, "ddpm100", draws=draws, **flags)
    before, d = golden_networks(edp_td3), make_diffusion(edp_td3, 100, "ddpm")
    policy, s, a = before["policy"], BATCH["observations"], BATCH["actions"]
    k, epsilon = T(GOLDEN["ddpm100/in/ts"]), T(GOLDEN["ddpm100/in/noise"])
    loss = (epsilon - policy(s, d.add_noise(a, k, epsilon), k)).square().mean()
    q1, q2 = before["critic"](s, d.ddpm(policy, s, sampler_noise("ddpm100")))
    loss = loss - (q1.mean() / q2.abs().mean().detach() if first else q2.mean() / q1.abs().mean().detach())
    loss.backward()
    near(metrics["losses/policy_loss"], loss.detach())
    for ours, expected in zip(networks["policy"].parameters(), policy.parameters(), strict=True):
        assert_close(ours.kept, expected.grad, rtol=1e-3, atol=1e-5)


def test_diffusion_ql_clips_target_actions():
    """As its own code does; DPM-Solver's samples can lie outside."""
    a = T(GOLDEN["dpm1000/td3_qf1/q/next_action"])
    assert (a.abs() > 1.001).any()
    networks = golden_networks(edp_td3)
    metrics, _ = run_update(edp_td3, "dpm1000", action_approximation=False)
    with torch.no_grad():
        next_q = torch.minimum(*networks["critic_target"](BATCH["next_observations"], a.clamp(-1, 1)))
        target = BATCH["rewards"] + 0.99 * (1 - BATCH["dones"]) * next_q
        expected = (networks["critic"](BATCH["observations"], BATCH["actions"])[0] - target).square().mean()
    near(metrics["losses/qf1_loss"], expected)

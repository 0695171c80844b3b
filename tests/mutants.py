"""Break the scripts on purpose and see a test fail: python tests/mutants.py [part of the mutants' names]

Each mutant replaces one piece of a script's source, in a copy of the repository, and runs the mathematics tests there,
or for the mutants of data and runs those tests that are named.
"""

import functools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MUTANTS: dict[str, tuple[str, ...]] = {  # name: (script, original, mutant, tests if not those of mathematics)
    "sign in a_hat^0": ("edp_iql.py", "(a_k - self.sqrt_one_minus_alpha_bar", "(a_k + self.sqrt_one_minus_alpha_bar"),
    "abar^{k-1} in the forward noising": (
        "edp_iql.py",
        "return self.sqrt_alpha_bar[k, None] * a0 + self.sqrt_one_minus_alpha_bar[k, None]",
        "return self.sqrt_alpha_bar[k - 1, None] * a0 + self.sqrt_one_minus_alpha_bar[k - 1, None]",
    ),
    "no clip of a_hat^0": ("edp_iql.py", "return a0.clamp(-1, 1)", "return a0"),
    "order 2 for order 3 in the solver": ("edp_iql.py", "if order == 2:", "if order >= 2:"),
    "max for min over the critics": ("edp_iql.py", "torch.minimum(*self(s, a))", "torch.maximum(*self(s, a))"),
    "expectile 1 - tau": ("edp_iql.py", "(q > v, expectile, 1 - expectile)", "(q > v, 1 - expectile, expectile)"),
    "weight of V - Q": ("edp_iql.py", "(inverse_temperature * (q - v))", "(inverse_temperature * (v - q))"),
    "old V for policy and critics": (
        "edp_iql.py",
        'step("value")\n',
        "v, next_v = value(torch.cat([s, next_s])).detach()[:, 0].chunk(2)\n        step('value')\n",
    ),
    "no mask in the target": ("edp_iql.py", "r + gamma * mask * next_v", "r + gamma * next_v"),
    "sum for mean in the diffusion loss": (
        "edp_iql.py",
        "diffusion_loss = error.mean()",
        "diffusion_loss = error.sum()",
    ),
    "step off by one in the solver": ("edp_iql.py", "table(K * t - 1)", "table(K * t)"),
    "selection by exp(-Q)": ("edp_iql.py", "q.nan_to_num().softmax(dim=1)", "(-q).softmax(dim=1)"),
    "sine before cosine": ("edp_iql.py", "[angles.cos(), angles.sin()]", "[angles.sin(), angles.cos()]"),
    "CRR: advantage against a_hat^0 alone": ("edp_crr.py", "(a_hat_0 + z)", "(a_hat_0 + 0 * z)"),
    "CRR: sign of the advantage": (
        "edp_crr.py",
        "return (advantage / temperature)",
        "return (-advantage / temperature)",
    ),
    "CRR: no cap": ("edp_crr.py", ".exp().clamp(max=cap)", ".exp()"),
    "CRR: max for mean": ("edp_crr.py", 'if baseline == "mean"', 'if baseline == "max"'),
    "CRR: target from the policy itself": ("edp_crr.py", "sample(policy_target,", "sample(policy,"),
    "CRR: policy target at once": ("edp_crr.py", "step + 1 > args.policy_target_start and ", ""),
    "CRR: ascent": ("edp_crr.py", "vector.grad = part", "vector.grad = -part"),
    "CRR: coefficients of each other's loss": (
        "edp_crr.py",
        "args.diffusion_coef * diffusion_loss + args.guidance_coef * guidance_loss",
        "args.guidance_coef * diffusion_loss + args.diffusion_coef * guidance_loss",
    ),
    "CRR: one likelihood": ("edp_crr.py", "k, f, args.likelihood)", 'k, f, "mse")'),
    "CRR: no noise around a_hat^0": ("edp_crr.py", '"z": torch.randn(', '"z": 0 * torch.randn('),
    "CRR: the first step is never drawn": ("edp_crr.py", "randint(args.diff", "randint(1, args.diff"),
    "CRR: selection by one critic": ("edp_crr.py", "critic.min(s, a).view(-1", "critic(s, a)[0].view(-1"),
    "TD3: always the second critic": ("edp_td3.py", "device=device) < 0.5", "device=device) < 0"),
    "TD3: candidates of the same noise": (
        "edp_td3.py",
        "args.batch_size * candidates, act_dim, device=device)",
        "args.batch_size, act_dim, device=device).repeat(1, candidates, 1)",
    ),
    "TD3: coefficient of the other loss": (
        "edp_td3.py",
        "args.diffusion_coef * diffusion_loss + guidance_loss",
        "diffusion_loss + args.diffusion_coef * guidance_loss",
    ),
    "TD3: gradient through lambda": ("edp_td3.py", "scale.detach().abs()", "scale.abs()"),
    "TD3: lambda eta mean|Q|": ("edp_td3.py", "-eta / scale", "-eta * scale"),
    "TD3: the other critic": ("edp_td3.py", "q, other = torch.where", "other, q = torch.where"),
    "TD3: policy target does not move": (
        "edp_td3.py",
        '            policy_target_vector.lerp_(vectors["policy"][0], policy_tau)\n',
        "",
    ),
    "TD3: critic target does not move": (
        "edp_td3.py",
        "                target.lerp_(vector, args.tau)\n",
        "                pass\n",
    ),
    "TD3: candidates of another state": (
        "edp_td3.py",
        "next_s.repeat_interleave(args.max_q_candidates, dim=0)",
        "next_s.repeat(args.max_q_candidates, 1)",
    ),
    "TD3: no clip of the gradient": (
        "edp_td3.py",
        "if args.max_grad_norm > 0:",
        "if args.max_grad_norm < 0:",
    ),
    "Diffusion-QL: no gradient through the sample": (
        "edp_td3.py",
        "a_hat_0 = diffusion.sample(policy, s, noise).clamp(-1, 1)",
        "a_hat_0 = diffusion.sample(policy, s, noise).clamp(-1, 1).detach()",
    ),
    "Diffusion-QL: lambda of the same critic": ("edp_td3.py", "q if args.action_approximation else other", "q"),
    "TD3: best for k-th best": ("edp_td3.py", "values[:, -1]", "values[:, 0]"),
    "TD3: max for min in the backup": (
        "edp_td3.py",
        "torch.minimum(*(q.topk(",
        "torch.maximum(*(q.topk(",
    ),
    "TD3: target from the critic itself": (
        "edp_td3.py",
        "next_v = critic_target.min(",
        "next_v = critic.min(",
    ),
    "Diffusion-QL: only the last step": (
        "edp_td3.py",
        "a0 = self.approximate_action(a, k, policy(s, a, self.index[k]))\n            a = self.posterior",
        "a0 = self.approximate_action(a, k, policy(s, a.detach(), self.index[k])).detach() if k else "
        "self.approximate_action(a, k, policy(s, a, self.index[k]))\n            a = self.posterior",
    ),
    "EDIS: no factor sigma": ("edis_sac.py", "d + sigma * guidance(x, sigma)", "d + guidance(x, sigma)"),
    "EDIS: Euler for Heun": ("edis_sac.py", "(d + derivative(x_next, sigma_next)) / 2", "d"),
    "EDIS: c_skip": ("edis_sac.py", "1 / total, sigma / total.sqrt()", "1 / total.sqrt(), sigma / total.sqrt()"),
    "EDIS: loss weight": ("edis_sac.py", "(sigma.square() + 1) / sigma.square() * error", "error"),
    "EDIS: sign of the energies": ("edis_sac.py", "(-energy).log_softmax(1)", "energy.log_softmax(1)"),
    "EDIS: negatives of another positive": (
        "edis_sac.py",
        "torch.cat([x[:, None], negatives[..., : x.shape[1]]], dim=1)",
        "torch.cat([x[:, None], negatives.flip(0)[..., : x.shape[1]]], dim=1)",
    ),
    "EDIS: E2 without E1": ("edis_sac.py", "e1.detach() + e2", "e2"),
    "EDIS: E3 upon the policy's pairs": ("edis_sac.py", "behavior.detach() + e3", "(e1 + e2).detach() + e3"),
    "EDIS: E3 without the residual": ("edis_sac.py", "* squared / (1 + squared / 25)", "* 0 * squared"),
    "EDIS: E3 without the dynamics": ("edis_sac.py", "x[..., SA:] - self.dynamics(scaled[..., :SA])", "x[..., SA:]"),
    "EDIS: dynamics not trained": (
        "edis_sac.py",
        "[*model.parameters(), *energies.dynamics.parameters()], ene",
        "[*model.parameters()], ene",
    ),
    "EDIS: positives without noise": ("edis_sac.py", "acted = acted + sigma[:, None] *", "acted = acted + 0 *"),
    "EDIS: CQL not in the loss": ("edis_sac.py", "qf1_loss + qf2_loss + cql_alpha * cql_loss", "qf1_loss + qf2_loss"),
    "EDIS: target entropy A": ("edis_sac.py", "log_pi, -a.shape[1]", "log_pi, a.shape[1]"),
    "EDIS: negatives with too little noise": ("edis_sac.py", "negatives + added *", "negatives + 0 *"),
    "EDIS: clip of the gradient itself": ("edis_sac.py", "math.sqrt(x.shape[1]) / sigma", "math.sqrt(x.shape[1])"),
    "EDIS: old actions for E2": ("edis_sac.py", "torch.cat([s, self.policy(s)]", "torch.cat([s, 0.8 * s]"),
    "EDIS: policy not normalised": (
        "edis_sac.py",
        "return (a - self.mean[S : S + A]) / self.std[S : S + A]",
        "return a",
    ),
    "EDIS: own block only": ("edis_sac.py", "x[:, :start] if full else", "x[:, :start].detach() if full else"),
    "EDIS: no clip": ("edis_sac.py", ".clamp(min=1e-12)).clamp(max=1)", ".clamp(min=1e-12)).clamp(min=1, max=1)"),
    "EDIS: returns across episodes": ("edis_sac.py", "total * (not ends[i])", "total"),
    "EDIS: tanh without its slope": ("edis_sac.py", "(normal.log_prob(u) - log_slope)", "normal.log_prob(u)"),
    "EDIS: alpha rises with entropy": ("edis_sac.py", "return -(log_alpha.exp()", "return (log_alpha.exp()"),
    "EDIS: no calibration": ("edis_sac.py", "q[M:].maximum(mc)", "q[M:]"),
    "EDIS: the policy's actions of one state only": (
        "edis_sac.py",
        "for states in (s, next_s)]",
        "for states in (s, s)]",
    ),
    "EDIS: calibrated uniform actions": ("edis_sac.py", "torch.cat([q[:M], q[M:].maximum(mc)])", "q.maximum(mc)"),
    "EDIS: uniform density": ("edis_sac.py", "-A * math.log(2)", "A * math.log(2)"),
    "EDIS: entropy's sign in the target": (
        "edis_sac.py",
        "next_v - alpha * next_log_pi",
        "next_v + alpha * next_log_pi",
    ),
    "EDIS: online critic in the target": ("edis_sac.py", "critic_target.min(next_s", "critic.min(next_s"),
    "EDIS: actor against Q": ("edis_sac.py", "actor_loss(critic.min(", "actor_loss(-critic.min("),
    "EDIS: no target update": ("edis_sac.py", "target.lerp_(parameter, args.tau)", "pass"),
    "EDIS: simulator in normalised states": (
        "edis_sac.py",
        "truth = self.simulate(raw[:, :S],",
        "truth = self.simulate(x[:, :S],",
    ),
    "EDIS: reward of the simulator as it is": (
        "edis_sac.py",
        "transform.reward(reward), 1.0 - terminated]",
        "reward, 1.0 - terminated]",
    ),
    "EDIS: denoiser sees all data alike": (
        "edis_sac.py",
        "index[:share] = torch.randint(len(x) - recent",
        "index[:share] = torch.randint(0",
    ),
    "EDIS: inpainting without noise": ("edis_sac.py", "held + sigma *", "held + 0 *"),
    "EDIS: inpainting at once": ("edis_sac.py", "self.args.inpainting_repeats if start else 1", "1"),
    "EDIS: negatives of another condition": ("edis_sac.py", "drawn = own[:, None]", "drawn = own.flip(0)[:, None]"),
    "EDIS: E2's own s for the positive only": (
        "edis_sac.py",
        "torch.cat([given, blocks], dim=2)",
        "torch.cat([x[:, None], negatives[..., :end]], dim=1)",
    ),
    "EDIS: negatives of other levels": ("edis_sac.py", "pool[level[:, None],", "pool[level.flip(0)[:, None],"),
    "EDIS: another spread of the training noise": (
        "edis_sac.py",
        "(1.2 * torch.randn(len(batch)",
        "(0.2 * torch.randn(len(batch)",
    ),
    "EDIS: half the churn": (
        "edis_sac.py",
        "min(churn / steps, math.sqrt(2) - 1)",
        "min(churn / steps, math.sqrt(2) - 1) / 2",
    ),
    "EDIS run: an episode goes on after a timeout": (
        "edis_sac.py",
        "ends, keep = terminals | timeouts,",
        "ends, keep = terminals,",
        "offline_batches",
    ),
    "EDIS run: the switch of E3 for E2": (
        "edis_sac.py",
        "args.policy_scale * args.policy_energy,",
        "args.policy_scale * args.transition_energy,",
        "online_batches",
    ),
    "EDIS: simulator's transform": ("edis_sac.py", "/ transform.obs_scale -", "* transform.obs_scale -"),
    "EDIS: the difference for s'": ("edis_sac.py", "x[:, -S:] + x[:, :S]]", "x[:, -S:]]"),
    "EDIS: the difference for the model": (
        "edis_sac.py",
        'self.networks["model"](self.inputs(transitions))',
        'self.networks["model"](self.normalize(transitions))',
    ),
    "EDIS: termination for survival": ("edis_sac.py", "torch.sigmoid(-logit)", "torch.sigmoid(logit)"),
    "EDIS: no importance weights": ("edis_sac.py", "((q - log_density).logsumexp(0)", "(q.logsumexp(0)"),
    "vp: beta at the step's end": ("edp_td3.py", "(2 * np.arange(K) + 1)", "(2 * np.arange(K) + 2)"),
    "data: scalar columns": ("edp_iql.py", "or columns[key].ndim == 0]", "]", "bad_content or odd_columns"),
    "data: empty columns": ("edp_iql.py", " or not column.size:", ":", "bad_content or odd_columns"),
    "data: -128 as int8": (
        "edp_iql.py",
        'np.abs(columns["actions"].astype(np.float64))',
        'np.abs(columns["actions"])',
        "odd_columns",
    ),
    "data: equal returns": ("edp_iql.py", "if spread > 1e-6 * np.abs(returns).max()", "if spread > 0", "equal_returns"),
    "data: actions out of range": ("edp_iql.py", ".max()) > 1.001:", ".max()) > 1e9:", "bad_content"),
    "run: half a row": (
        "edp_iql.py",
        "if (file.write(data) or 0) < len(data):",
        "if not file.write(data):",
        "full_disk",
    ),
    "run: checkpoint in place": ("edp_iql.py", '"checkpoint.tmp"', '"checkpoint.pt"', "full_disk"),
    "run: a failed TensorBoard writer is kept": (
        "edp_iql.py",
        "writer, self.writer = self.writer or self.open_writer(), None",
        "writer = self.writer = self.writer or self.open_writer()",
        "tensorboard_goes_on",
    ),
    "run: closed pipe": ("edp_iql.py", "except BrokenPipeError:", "except ZeroDivisionError:", "reader_that_goes"),
    "run: no lock": ("edp_iql.py", 'fail(f"{self.dir} is in use by another process")', "pass", "spoil"),
    "run: damaged checkpoint": ("edp_iql.py", "zipfile.ZipFile(file).testzip()", "None", "foreign or spoil"),
    "run: any file of checkpoints": ("edp_iql.py", 'if file.name != "checkpoint.pt":', "if False:", "foreign or spoil"),
    "run: failing wandb": (
        "edp_iql.py",
        "except Exception as error:  # the run",
        "except OSError as error:  #",
        "wandb",
    ),
    "run: changes forgotten": (
        "edp_iql.py",
        'about["resumed_from"].append({"step": self.step, **changed, "args": was})',
        "pass",
        "what_changed",
    ),
    "run: evaluation by the targets": (
        "edp_crr.py",
        'networks["policy"], networks["critic"], s,',
        'networks["policy_target"], networks["critic_target"], s,',
        "current_networks",
    ),
    "run: names with a slash": ("edp_iql.py", 're.sub(r"[^\\w.-]", "_", name)', "name", "nothing_is_written"),
    "run: MuJoCo's log": ("edp_iql.py", "mujoco.set_mju_user_warning(lambda", "str(lambda", "nothing_is_written"),
    "run: early signals": (
        "edp_iql.py",
        "lambda number, _: sys.exit(128 + number)",
        "signal.SIG_IGN",
        "before_the_first",
    ),
    "run: a critic that a graph freezes": (
        "edp_td3.py",
        "torch.where(first_critic, q1, q2), torch.where(first_critic, q2, q1)",
        "(q1, q2) if first_critic else (q2, q1)",
        "captured or waits",
    ),
    "run: a schedule that a graph freezes": ("edp_crr.py", ", policy_tau)\n", ", float(policy_tau))\n", "captured"),
    "run: a graph that knows the update's number": (
        "edp_crr.py",
        "**chance, **scheduled)",
        "**chance, **schedule(args, run.step, device))",
        "captured_run",
    ),
    "run: a graph that sees one batch": ("edp_iql.py", "self.inputs[name].copy_(x)", "pass", "captured"),
    "run: a graph of other tensors than before": (
        "edp_iql.py",
        "self.inputs[name].copy_(x)",
        "self.inputs[name] = x",
        "captured",
    ),
    "run: pages where there is no graph": (
        "edp_iql.py",
        "(str(cause) or repr(cause)).splitlines()[0]",
        "cause",
        "capture",
    ),
    "run: the gradient of one critic for both": (
        "edp_iql.py",
        "gradient.chunk(len(vectors[name]))",
        "gradient.chunk(len(vectors[name]))[::-1]",
    ),
    "run: the optimiser of another device": (
        "edp_iql.py",
        'group.update(fused=own["fused"], capturable=own["capturable"])',
        "pass",
        "another_device",
    ),
    "run: precision ignored": (
        "edp_iql.py",
        "torch.set_float32_matmul_precision(args.matmul_precision)",
        "pass",
        "precision",
    ),
    "run: source of a checkpoint's values": ("edp_iql.py", 'saved.get("args", {}), {}', "{}, {}", "what_changed"),
    "data: no word of the default id": ("edp_iql.py", "args.env_id == Args.env_id:", "False:", "default_id_is_told"),
    "run: a sampler that waits": ("edp_iql.py", "zip(range(self.K - 1, -1, -1)", "zip(self.index.flip(0)", "waits"),
    "EDIS run: an update that waits": ("edis_sac.py", "exp(), validate_args=False)", "exp())", "waits"),
    "run: gradients outside of what is compiled": (
        "edp_iql.py",
        "torch._dynamo.config.trace_autograd_ops = True",
        "pass",
        "compiled_update_agrees",
    ),
    "run: a signal waits for the compiler": (
        "edp_td3.py",
        "run.nothing_to_save = not metrics",
        "run.nothing_to_save = False",
        "while_compiling",
    ),
    "EDIS run: the compiler's own noise": (
        "edis_sac.py",
        "torch._inductor.config.fallback_random = True",
        "pass",
        "compiled_update_agrees",
    ),
    "run: bfloat16 into and out of a network": (
        "edp_iql.py",
        "(Linear if 0 < len(self.layers) < len(hidden) else nn.Linear)",
        "Linear",
        "bfloat16",
    ),
    "EDIS run: bfloat16 nowhere in the denoiser": (
        "edis_sac.py",
        "nn.SiLU(), Linear(width, width)",
        "nn.SiLU(), nn.Linear(width, width)",
        "bfloat16",
    ),
    "run: numbers compiled as variables": (
        "edp_iql.py",
        "torch._dynamo.config.specialize_float = True",
        "torch._dynamo.config.specialize_float = False",
        "compiled_as_a_constant",
    ),
    "run: short runs compiled": ("edp_iql.py", "args.num_updates >= 10_000", "True", "what_is_compiled"),
    "run: pages where there is no compiler": (
        "edp_iql.py",
        "(str(error) or repr(error)).splitlines()[0]}; goes",
        "error}; goes",
        "compil",
    ),
    "EDIS run: a stop waits for the round": (
        "edis_sac.py",
        "run.nothing_to_save = due",
        "run.nothing_to_save = False",
        "stop_during_a_round",
    ),
    "EDIS run: online settings fixed": ("edis_sac.py", "RESUMABLE | ONLINE)", "RESUMABLE)", "share_a_pretrained"),
    "EDIS run: the episode restarts": (
        "edis_sac.py",
        "            self.step(action)",
        "            pass",
        "resume_is_exact",
    ),
    "EDIS run: unguided": ("edis_sac.py", "self.generate(args.samples, ema, guidance)", "plain", "online_batches"),
    "EDIS run: another range of noise": (
        "edis_sac.py",
        "device, args.sigma_min, args.sigma_max)",
        "device, 0.002, 80.0)",
        "online_batches",
    ),
    "EDIS run: synthetic rows unused": ("edis_sac.py", "synthetic.sample(n)", "online.sample(n)", "online_batches"),
    "EDIS run: no termination online": ("edis_sac.py", "1.0 - terminated, -math", "1.0, -math", "online_rows"),
    "EDIS run: energies trained on old data": (
        "edis_sac.py",
        "online.recent(args.positive_buffer)[:, :D]",
        "data[:, :D]",
        "online_batches",
    ),
}


@functools.cache
def passes(files: tuple[str, ...], chosen: str, script: str = "", source: str = "") -> bool:
    """Whether these tests pass in a copy of the repository, in which a script can have another source."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "tests", Path(folder) / "tests")
        (Path(folder) / "datasets").symlink_to(ROOT / "datasets")
        for path in (ROOT / "pyproject.toml", *ROOT.glob("*.py")):
            shutil.copy(path, folder)
        if script:
            (Path(folder) / script).write_text(source)
        command = [sys.executable, "-m", "pytest", "-qx", *files, "-k", chosen]
        code = subprocess.run(command, cwd=folder, capture_output=True).returncode
        if code not in (0, 1):
            raise SystemExit(f"pytest ended with {code}: no test is named {chosen}?")
        return code == 0


def survives(script: str, original: str, mutant: str, tests: str = "") -> bool:
    """Whether the tests pass with the mutant in place; without it they must."""
    source = (ROOT / script).read_text()
    if source.count(original) != 1:
        raise SystemExit(f"{script}: found {source.count(original)} times, not once: {original!r}")
    mutated = source.replace(original, mutant)
    if "v, next_v = value(torch.cat([s, next_s])).detach()" in mutant:  # and drop the right one
        mutated = mutated.replace("            v, next_v = value(torch.cat([s, next_s]))[:, 0].chunk(2)\n", "")
    names = ["edis_math"] if script == "edis_sac.py" else ["edp_math", "edp_golden"]
    files = tuple(f"tests/test_{name}.py" for name in (("data", "run", "acceleration") if tests else names))
    chosen = f"({tests}) and ({script[:-3]} or not (edp_ or edis_))" if tests else ""
    if not passes(files, chosen):
        raise SystemExit(f"{' '.join(files)} {chosen}: fails without a mutant")
    return passes(files, chosen, script, mutated)


def main() -> None:
    alive = 0
    for name, mutant in MUTANTS.items():
        if " ".join(sys.argv[1:]) not in name:
            continue
        survived = survives(*mutant)
        alive += survived
        print(f"{'SURVIVES' if survived else 'killed  '} {name}", flush=True)
    raise SystemExit(bool(alive))


if __name__ == "__main__":
    main()

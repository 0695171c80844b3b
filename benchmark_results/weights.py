"""Compare the policy losses of EDP-IQL: policies trained beside one critic, played with one candidate and with ten.

python benchmark_results/weights.py hopper-medium-replay-mini --seed 10

The critics of IQL do not depend on the policy, so all policies of a run share them, and batches, steps k and noise too.
Writes weights/{data}__{seed}.json, of which report.py makes a table. One core needs about an hour.
"""

import copy
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import edp_iql as edp  # noqa: E402

# name: likelihood, its coefficient, coefficient of the diffusion loss, beta, cap of the weights, learning rate
LOSSES: dict[str, tuple[str, float, float, float, float, float]] = {
    "cloning": ("mse", 0, 1, 3, 100, 1e-3),
    "mse 0.01 b3": ("mse", 0.01, 1, 3, 100, 1e-3),
    "mse 0.1 b3": ("mse", 0.1, 1, 3, 100, 1e-3),
    "mse 1 b1": ("mse", 1, 1, 1, 100, 1e-3),
    "mse 1 b3": ("mse", 1, 1, 3, 100, 1e-3),
    "mse 1 b3 lr3e-4": ("mse", 1, 1, 3, 100, 3e-4),
    "elbo 1 b3": ("elbo", 1, 1, 3, 100, 1e-3),
    "simple b1": ("simple", 1, 0, 1, 100, 1e-3),
    "simple b3": ("simple", 1, 0, 3, 100, 1e-3),
    "simple b3 cap20": ("simple", 1, 0, 3, 20, 1e-3),
    "simple b3 lr3e-4": ("simple", 1, 0, 3, 100, 3e-4),
    "simple b10": ("simple", 1, 0, 10, 100, 1e-3),
}


@dataclass
class Args:
    """Compare the policy losses of EDP-IQL on one data set."""

    env_id: tyro.conf.Positional[str]
    """data set"""
    seed: int = 10
    """seed of everything; the results page has seeds 0 to 2, so choose settings with others"""
    updates: int = 16_000
    """updates of critics and policies; played after one half, three quarters and the whole of them"""
    episodes: int = 20
    """episodes per policy, number of candidates and time"""


def policy_loss(name: str, policy: Any, diffusion: Any, s: Any, a: Any, q: Any, v: Any, k: Any, epsilon: Any) -> Any:
    likelihood, coefficient, diffusion_coef, beta, cap, _ = LOSSES[name]
    a_k = diffusion.add_noise(a, k, epsilon)
    epsilon_hat = policy(s, a_k, k)
    error, f = (epsilon - epsilon_hat).square(), edp.iql_weight(q, v, beta, cap)
    if likelihood == "mse":
        guidance = 0.5 * (f * (a - diffusion.approximate(a_k, k, epsilon_hat)).square().sum(1)).mean()
    elif likelihood == "elbo":
        guidance = (f * diffusion.elbo_weight[k] * error.sum(1)).mean()
    else:
        guidance = (f / f.mean() * error.mean(1)).mean()
    return diffusion_coef * error.mean() + coefficient * guidance


def main(args: Args) -> None:
    script = edp.parse_args(["--env-id", args.env_id, "--seed", str(args.seed), "--eval-episodes", str(args.episodes)])
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    columns, make_env, _ = edp.load_task(script)
    transitions, transform = edp.make_transitions(columns, script)
    data, S, A = torch.as_tensor(transitions), columns["observations"].shape[1], columns["actions"].shape[1]
    assert make_env
    envs = [make_env() for _ in range(args.episodes)]
    diffusion, networks = edp.Diffusion(script, torch.device("cpu")), edp.make_networks(S, A)
    value, critic, target = (networks[name] for name in ("value", "critic", "critic_target"))
    policies = {name: copy.deepcopy(networks["policy"]) for name in LOSSES}
    moves = {name: torch.optim.Adam(policies[name].parameters(), LOSSES[name][-1], fused=True) for name in LOSSES}
    critics_move = torch.optim.Adam([*value.parameters(), *critic.parameters()], script.lr, fused=True)

    def play(policy: Any, candidates: int, step: int) -> dict[str, float]:
        def act(obs: np.ndarray) -> np.ndarray:
            s = torch.as_tensor((obs - transform["mean"]) / transform["std"], dtype=torch.float32)
            return edp.select_actions(diffusion, policy, critic, s, candidates).numpy()

        seeds = np.random.default_rng([args.seed, step]).integers(2**31, size=args.episodes).tolist()
        with torch.random.fork_rng():
            torch.manual_seed(args.seed)
            returns = edp.evaluate(act, envs, seeds, [])["episodic_return"]
        return {"return": float(returns.mean()), "standard_error": float(returns.std() / args.episodes**0.5)}

    rows: list[dict[str, Any]] = []
    start = time.time()
    for step in range(1, args.updates + 1):
        s, a, next_s, r, mask = data[torch.randint(len(data), (256,))].split([S, A, S, 1, 1], dim=1)
        with torch.no_grad():
            q, next_v = torch.minimum(*target(s, a)), value(next_s)[:, 0]
        goal = r[:, 0] + script.gamma * mask[:, 0] * next_v
        loss = edp.value_loss(value(s)[:, 0], q, script.expectile)
        loss = loss + sum((q_data - goal).square().mean() for q_data in critic(s, a))
        critics_move.zero_grad()
        loss.backward()
        for network in (value, critic.q1, critic.q2):
            nn.utils.clip_grad_norm_(network.parameters(), script.max_grad_norm)
        critics_move.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(target.parameters()), list(critic.parameters()), script.tau)
            v = value(s)[:, 0]
        k, epsilon = torch.randint(diffusion.K, (256,)), torch.randn(256, A)
        for name, policy in policies.items():
            moves[name].zero_grad()
            policy_loss(name, policy, diffusion, s, a, q, v, k, epsilon).backward()
            nn.utils.clip_grad_norm_(policy.parameters(), script.max_grad_norm)
            moves[name].step()
        if step % 1_000 == 0:
            print(f"update {step}/{args.updates}: V {float(v.mean()):.1f}, {time.time() - start:.0f} s", flush=True)
        if step in (args.updates // 2, 3 * args.updates // 4, args.updates):
            for name, policy in policies.items():
                rows += [{"step": step, "loss": name, "candidates": n, **play(policy, n, step)} for n in (1, 10)]
                print(json.dumps(rows[-2:]), flush=True)
    about = {"args": vars(args), "losses": LOSSES, "torch": str(torch.__version__)}
    path = ROOT / "benchmark_results" / "weights" / f"{args.env_id}__{args.seed}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))

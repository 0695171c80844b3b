"""What the policies of EDP-IQL's parts offer to the selection by Q: python benchmark_results/candidates.py

Takes the checkpoints that launch.py left in runs/benchmark of the runs in raw, of the variants below, draws ten
candidates in each of 2000 states of the run's data, and measures how they differ from each other and from the action of
the data, what the run's own critics say of them, and how much of the data the run's weights leave. Then plays 20
episodes, as evaluation does with ten candidates, and compares what the critics promise for each action with the return
that follows. Writes candidates.json; then report.py for the table.
"""

import json
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import edp_iql as edp  # noqa: E402

VARIANTS = ("bc_q", "edp_iql_1", "edp_iql", "weighted", "elbo")  # edp_iql_1: the policy of edp_iql of the same seed


@dataclass
class Args:
    """Measure the candidates of finished runs."""

    runs_dir: Path = HERE.parent / "runs" / "benchmark"
    """where launch.py made the runs"""
    states: int = 2_000
    """states of the data, the same for all runs on it"""
    candidates: int = 10
    """actions per state"""
    episodes: int = 20
    """episodes played"""


def effective(f: Tensor) -> float:
    """Effective sample size of weights (n,), as a share of n."""
    return round((f.sum().square() / f.square().sum() / len(f)).item(), 4)


def measure(x: Tensor, q: Tensor, a: Tensor, q_a: Tensor) -> dict[str, float]:
    """Of candidates (n, N, A) with Q (n, N) and the data's actions (n, A) with Q (n,): means over the states.

    deviation: of the candidates around their mean, per dimension. distance: to the data's action. gain: Q less that of
    the data's action, of all candidates and of the one that Q selects, by exp(Q) as in evaluation.
    """
    gain = q - q_a[:, None]
    values = {
        "deviation": x.std(dim=1),
        "distance": (x - a[:, None]).norm(dim=-1),
        "q": q_a,
        "gain": gain,
        "selected_gain": (q.softmax(dim=1) * gain).sum(dim=1),
    }
    return {name: round(value.mean().item(), 4) for name, value in values.items()}


def returns_to_go(rewards: list[float], gamma: float, terminated: bool) -> list[float]:
    """Discounted returns from each step on. Of an episode cut short: where what is missing weighs at most 1 %."""
    g, found = 0.0, []
    for r in reversed(rewards):
        found.append(g := r + gamma * g)
    found.reverse()
    return found if terminated else [g for t, g in enumerate(found) if gamma ** (len(found) - t) <= 0.01]


class Recorded(gym.Wrapper):  # type: ignore[type-arg]
    """Keeps the rewards of its one episode, and how that ended."""

    def reset(self, **options: Any) -> Any:
        self.rewards: list[float] = []
        self.terminated, self.over = False, False
        return self.env.reset(**options)

    def step(self, action: Any) -> Any:
        obs, reward, self.terminated, truncated, info = self.env.step(action)
        self.rewards.append(float(reward))
        self.over = self.terminated or truncated
        return obs, reward, self.terminated, truncated, info


def play(
    select: Any, critic: edp.Critic, envs: list[Recorded], transform: edp.Transform, gamma: float
) -> dict[str, float]:
    """Episodes of the policy, in the critics' units: means over their steps of Q of the action taken and of the
    discounted return from there on. And the mean return, as evaluation has it.
    """
    promised: list[list[float]] = [[] for _ in envs]

    def act(obs: np.ndarray) -> np.ndarray:
        s = torch.as_tensor(transform.obs(obs), dtype=torch.float32)
        a = select(s)
        running = [values for values, env in zip(promised, envs, strict=True) if not env.over]
        for values, q in zip(running, critic.min(s, a).tolist(), strict=True):
            values.append(q)
        return a.numpy()

    edp.evaluate(act, [*envs], list(range(len(envs))), [])
    pairs: list[tuple[float, float]] = []
    for values, env in zip(promised, envs, strict=True):
        rewards = [transform.reward(r) for r in env.rewards]
        pairs += zip(values, returns_to_go(rewards, gamma, env.terminated), strict=False)
    q, g = np.mean(pairs, axis=0).tolist() if pairs else (float("nan"), float("nan"))
    played = {"promised": q, "delivered": g, "return": float(np.mean([sum(env.rewards) for env in envs]))}
    return {name: round(value, 4) for name, value in played.items()}


@torch.no_grad()
def measure_run(saved: dict[str, Any], states: int, candidates: int, episodes: int) -> dict[str, float]:
    """The candidates of a checkpoint's policy, by its own critics, and what becomes of the selected ones."""
    device, args = edp.set_up(edp.Args(device="cpu")), edp.Args(**saved["args"])
    columns, make_env, _, source = edp.load_task(args)
    if not make_env or source["sha256"] != saved["dataset"]["sha256"]:
        raise ValueError("its data are no longer there")
    obs_dim, act_dim = columns["observations"].shape[1], columns["actions"].shape[1]
    rows, transform = edp.make_transitions(columns, args)
    transitions = torch.as_tensor(rows)
    generator = torch.Generator().manual_seed(0)
    s, a = transitions[torch.randint(len(transitions), (states,), generator=generator)].split(
        [obs_dim, act_dim, obs_dim + 2], dim=1
    )[:2]
    networks = edp.make_networks(obs_dim, act_dim, device)
    for name, network in networks.items():
        network.load_state_dict(saved[name])
    diffusion = edp.Diffusion(
        args.diffusion_steps, args.sampler, args.sampler_steps, args.solver_order, device, args.beta_schedule
    )
    every = s.repeat_interleave(candidates, dim=0)
    noise = torch.randn(diffusion.draws, len(every), act_dim, generator=generator)
    x, critic = diffusion.sample(networks["policy"], every, noise).clamp(-1, 1), networks["critic"]
    q, q_a = critic.min(every, x).view(states, candidates), critic.min(s, a)
    v = networks["value"](s)[:, 0]
    f = edp.iql_weight(networks["critic_target"].min(s, a), v, args.inverse_temperature, args.weight_cap)
    found = {"effective": effective(f), **measure(x.view(states, candidates, act_dim), q, a, q_a)}
    envs = [Recorded(env) for env in edp.make_envs(make_env, replace(args, eval_episodes=episodes))]
    select = partial(
        edp.select_actions, diffusion, networks["policy"], critic, candidates=candidates, generator=generator
    )
    return found | play(select, critic, envs, transform, args.gamma)


def main(args: Args) -> None:
    about = {"states": args.states, "candidates": args.candidates, "episodes": args.episodes}
    file = HERE / "candidates.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    kept: dict[str, dict[str, float]] = before.pop("runs", {})
    found: dict[str, dict[str, float]] = {}
    for folder in sorted(args.runs_dir.glob("*__*__*")):
        runs = sorted(folder.glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
        if runs and folder.name.split("__")[1] in VARIANTS:
            raw = HERE / "raw" / folder.name
            try:
                saved = edp.load_checkpoint(str(runs[-1]))
                result, made = (json.loads((raw / f"{name}.json").read_text()) for name in ("result", "args"))
                if (saved["progress"]["step"], saved["dataset"]["sha256"]) != (
                    result["updates"], made["dataset"]["sha256"],
                ):  # fmt: skip
                    raise ValueError("not the run in raw")
                found[folder.name] = measure_run(saved, **about)
                print(folder.name, found[folder.name])
            except (OSError, ValueError, SystemExit) as error:  # the last of edp, which has told why
                print(f"{folder.name}: left out: {error}", file=sys.stderr)
                if isinstance(error, ValueError):  # what was measured was another run
                    kept.pop(folder.name, None)
    if not found:
        print(f"candidates.py: error: no finished run of {', '.join(VARIANTS)} in {args.runs_dir}", file=sys.stderr)
        raise SystemExit(2)
    found = {**(kept if before == about else {}), **found}  # checkpoints are large: those of some runs can be gone
    file.write_text(json.dumps({**about, "runs": dict(sorted(found.items()))}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))

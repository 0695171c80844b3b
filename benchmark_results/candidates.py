"""What policies offer to the selection by Q, of EDP-IQL's parts and EDP-TD3: python benchmark_results/candidates.py

Takes the checkpoints that launch.py left in runs/benchmark of the runs in raw, of the variants below, draws ten
candidates in each of 2000 states of the run's data, and measures how they differ from each other and from the action of
the data, what the run's own critics say of them, and how much of the data the run's weights leave. Then plays 20
episodes, as evaluation does with ten candidates, and compares what the critics promise for each action with the return
that follows. And 20 with one candidate, and with ten that the critics of other runs on the same data and seed select.
Writes candidates.json; then report.py for the tables.
"""

import importlib
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

# and their scripts; edp_iql_1: on the same device, the policy of edp_iql of the same seed
VARIANTS = dict.fromkeys(("bc_q", "edp_iql_1", "edp_iql", "weighted", "elbo"), "edp_iql") | {"edp_td3": "edp_td3"}
JUDGES = ("bc_q", "edp_td3")  # whose critics select among every policy's candidates


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


def load_networks(variant: str, saved: dict[str, Any], obs_dim: int, act_dim: int) -> dict[str, Any]:
    networks = importlib.import_module(VARIANTS[variant]).make_networks(obs_dim, act_dim, torch.device("cpu"))
    for name, network in networks.items():
        network.load_state_dict(saved[name])
    return dict(networks)


@torch.no_grad()
def measure_run(
    variant: str, found: dict[str, dict[str, Any]], states: int, candidates: int, episodes: int
) -> dict[str, float]:
    """The candidates of a variant's policy, by its own critics, and what becomes of the selected ones; alone: of one.

    Of the checkpoints found, by variant, the judges' critics select too, if they see states and rewards alike.
    """
    device, saved = edp.set_up(edp.Args(device="cpu")), found[variant]
    args = importlib.import_module(VARIANTS[variant]).Args(**saved["args"])
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
    networks = load_networks(variant, saved, obs_dim, act_dim)
    diffusion = edp.Diffusion(
        args.diffusion_steps, args.sampler, args.sampler_steps, args.solver_order, device, args.beta_schedule
    )
    every = s.repeat_interleave(candidates, dim=0)
    noise = torch.randn(diffusion.draws, len(every), act_dim, generator=generator)
    x, critic = diffusion.sample(networks["policy"], every, noise).clamp(-1, 1), networks["critic"]
    q, q_a = critic.min(every, x).view(states, candidates), critic.min(s, a)
    f = torch.ones(states)  # EDP-TD3 has no weights
    if "value" in networks:
        v = networks["value"](s)[:, 0]
        f = edp.iql_weight(networks["critic_target"].min(s, a), v, args.inverse_temperature, args.weight_cap)
    values = {"effective": effective(f), **measure(x.view(states, candidates, act_dim), q, a, q_a)}
    envs = [Recorded(env) for env in edp.make_envs(make_env, replace(args, eval_episodes=episodes), columns)]

    def played(critic: Any, n: int) -> dict[str, float]:
        select = partial(
            edp.select_actions, diffusion, networks["policy"], critic, candidates=n, generator=generator.manual_seed(1)
        )
        return play(select, critic, envs, transform, args.gamma)

    values |= played(critic, candidates) | {"alone": played(critic, 1)["return"]}
    for judge in JUDGES:
        if judge == variant:
            values[f"by_{judge}"] = values["return"]
        elif judge in found and all(map(torch.equal, found[judge]["transform"], saved["transform"])):
            critic = load_networks(judge, found[judge], obs_dim, act_dim)["critic"]
            values[f"by_{judge}"] = played(critic, candidates)["return"]
    return values


def main(args: Args) -> None:
    about = {"states": args.states, "candidates": args.candidates, "episodes": args.episodes}
    file = HERE / "candidates.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    kept: dict[str, dict[str, float]] = before.pop("runs", {})
    found: dict[str, dict[str, float]] = {}

    def leave_out(name: str, error: BaseException) -> None:
        """SystemExit: the script has told why."""
        print(f"{name}: left out: {error}", file=sys.stderr)
        if isinstance(error, ValueError):  # what was measured was another run
            kept.pop(name, None)

    checkpoints: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}  # of a data set and seed, by variant
    for folder in sorted(args.runs_dir.glob("*__*__*")):
        env_id, variant, seed, *_ = folder.name.split("__")
        runs = sorted(folder.glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
        if runs and variant in VARIANTS:
            raw = HERE / "raw" / folder.name
            try:
                saved = importlib.import_module(VARIANTS[variant]).load_checkpoint(str(runs[-1]))
                result, made = (json.loads((raw / f"{name}.json").read_text()) for name in ("result", "args"))
                if (saved["progress"]["step"], saved["dataset"]["sha256"]) != (
                    result["updates"], made["dataset"]["sha256"],
                ):  # fmt: skip
                    raise ValueError("not the run in raw")
                checkpoints.setdefault((env_id, seed), {})[variant] = saved
            except (OSError, ValueError, SystemExit) as error:
                leave_out(folder.name, error)
    for (env_id, seed), variants in checkpoints.items():
        for variant in variants:
            name = f"{env_id}__{variant}__{seed}"
            try:
                found[name] = measure_run(variant, variants, **about)
                print(name, found[name])
            except (OSError, ValueError, SystemExit) as error:
                leave_out(name, error)
    if not found:
        print(f"candidates.py: error: no finished run of {', '.join(VARIANTS)} in {args.runs_dir}", file=sys.stderr)
        raise SystemExit(2)
    if before == about:  # checkpoints are large: those of some runs can be gone, and of some that judged
        for name, values in found.items():
            if values["q"] == kept.get(name, {}).get("q"):  # of the same run
                found[name] = {**kept[name], **values}
        found = {**kept, **found}
    file.write_text(json.dumps({**about, "runs": dict(sorted(found.items()))}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))

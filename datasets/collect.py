"""Make small data sets: train SAC, roll out its policies, write D4RL's HDF5 layout.

    pip install -r datasets/requirements.txt          # a development environment of its own, not the project's
    python datasets/collect.py train                  # Hopper, about an hour on one core; writes WORK_DIR
    python datasets/collect.py write                  # three HDF5 files and a histogram beside this file
    python datasets/collect.py train --agent walker2d # and halfcheetah

The protocol is D4RL's (Fu et al., 2020, arXiv 2004.07219): "medium" is a SAC policy stopped at about a third of the
expert's return, "medium-replay" everything the learner saw until then, "medium-expert" half medium, half expert
rollouts. Rollouts sample from the policy (they do not take its mode), as D4RL's do.
"""

import csv
import json
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import h5py
import numpy as np
import tyro

AGENTS = {  # environment and D4RL's reference_max, against which "a third of the expert" is measured
    "hopper": ("Hopper-v4", 3234.3),
    "walker2d": ("Walker2d-v4", 4592.3),
    "halfcheetah": ("HalfCheetah-v4", 12135.0),
}


@dataclass
class Args:
    """Train SAC, or write the three data sets from what `train` left."""

    stage: tyro.conf.Positional[Literal["train", "write"]]
    """train: run SAC, keep every transition and a policy every `eval_every` steps; write: the HDF5 files"""
    agent: Literal["hopper", "walker2d", "halfcheetah"] = "hopper"
    """which robot"""
    seed: int = 0
    """seed of SAC, of the environment and of the rollouts"""
    steps: int = 320_000
    """environment steps of SAC"""
    eval_every: int = 5_000
    """environment steps between two saved and evaluated policies"""
    eval_episodes: int = 5
    """episodes an evaluation averages"""
    rows: int = 100_000
    """transitions a file holds, about: whole episodes, of replay data not more"""
    work_dir: Path = Path("sac")
    """where `train` writes its policies, transitions and evaluations; one folder per agent and seed below it"""
    out_dir: Path = Path(__file__).parent
    """where `write` puts the HDF5 files"""


class Recorder(gym.Wrapper):
    """Keep every transition in D4RL's columns; `infos/qpos` and `infos/qvel` are the state *before* the step."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.rows: list[tuple] = []

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        self.obs, info = self.env.reset(**kwargs)
        return self.obs, info

    def step(self, action: np.ndarray) -> tuple:
        data = self.unwrapped.data  # type: ignore[attr-defined]
        qpos, qvel = data.qpos.copy(), data.qvel.copy()
        next_obs, reward, terminated, truncated, info = self.env.step(action)
        # a fall at the last allowed step is a terminal, not a timeout: D4RL drops timeout rows
        timeout = truncated and not terminated
        self.rows.append((self.obs, np.asarray(action), reward, terminated, timeout, next_obs, qpos, qvel))
        self.obs = next_obs
        return next_obs, reward, terminated, truncated, info

    def columns(self, limit: int | None = None) -> dict[str, np.ndarray]:
        """The first `limit` transitions as D4RL's arrays, (N, ...) float32 and (N,) bool."""
        names = (
            "observations",
            "actions",
            "rewards",
            "terminals",
            "timeouts",
            "next_observations",
            "infos/qpos",
            "infos/qvel",
        )
        cols = {name: np.asarray(col) for name, col in zip(names, zip(*self.rows[:limit], strict=True), strict=True)}
        return {k: v if v.dtype == bool else v.astype(np.float32) for k, v in cols.items()}


def rollout(policy: Any, env: Recorder, episodes: int = 0, rows: int = 0, mode: bool = False) -> None:
    """Whole episodes of `policy`, sampled or its mode, until `episodes` and `rows` transitions are recorded."""
    done = 0
    while done < episodes or len(env.rows) < rows:
        obs, _ = env.reset()
        ended = False
        while not ended:
            action, _ = policy.predict(obs, deterministic=mode)
            obs, _, terminated, truncated, _ = env.step(action)
            ended = terminated or truncated
        done += 1


def episode_returns(cols: dict[str, np.ndarray]) -> np.ndarray:
    """Undiscounted returns of the complete episodes in the file order."""
    ends = np.flatnonzero(cols["terminals"] | cols["timeouts"])
    totals = np.cumsum(cols["rewards"], dtype=np.float64)[ends]
    return np.diff(totals, prepend=0.0)


def train(args: Args) -> None:
    from sbx import SAC  # JAX: twice the speed of PyTorch's SAC on one core

    folder, env_id = args.work_dir / args.agent / str(args.seed), AGENTS[args.agent][0]
    folder.mkdir(parents=True, exist_ok=True)
    env, eval_env = Recorder(gym.make(env_id)), Recorder(gym.make(env_id))
    eval_env.reset(seed=args.seed + 1_000)
    # eight environment steps, then eight updates: the same ratio as SAC's one to one, with less overhead
    model = SAC("MlpPolicy", env, seed=args.seed, learning_starts=5_000, batch_size=128, train_freq=8, gradient_steps=8)
    with open(folder / "evaluations.csv", "w", newline="") as file:
        log = csv.writer(file)
        log.writerow(["step", "return_mean", "return_std", "length_mean"])
        for step in range(args.eval_every, args.steps + 1, args.eval_every):
            model.learn(args.eval_every, reset_num_timesteps=False)
            eval_env.rows.clear()
            rollout(model, eval_env, episodes=args.eval_episodes)
            returns = episode_returns(eval_env.columns())
            log.writerow([step, round(returns.mean(), 1), round(returns.std(), 1), len(eval_env.rows) / len(returns)])
            file.flush()
            model.save(folder / f"policy_{step}.zip")
            if step % 50_000 == 0 or step == args.steps:
                np.savez(folder / "transitions.npz", **env.columns())  # type: ignore[arg-type]


def write(args: Args) -> None:
    from sbx import SAC

    folder, (env_id, expert_reference) = args.work_dir / args.agent / str(args.seed), AGENTS[args.agent]
    with open(folder / "evaluations.csv") as file:
        evaluations = [(int(row["step"]), float(row["return_mean"])) for row in csv.DictReader(file)]
    # medium: the first policy past a third of the expert's return; expert: the best evaluation
    good = [step for step, mean in evaluations if mean >= expert_reference / 3]
    if not good:
        raise SystemExit(f"no policy in {folder} reached a third of the expert's {expert_reference}: train longer")
    medium_step = good[0]
    expert_step = max(evaluations, key=lambda row: row[1])[0]

    rollouts, policy_returns = {}, {}
    for name, step in {"medium": medium_step, "expert": expert_step}.items():
        policy = SAC.load(folder / f"policy_{step}.zip")
        modes, env = Recorder(gym.make(env_id)), Recorder(gym.make(env_id))
        for recorder in (modes, env):
            recorder.reset(seed=args.seed + 2_000)
        rollout(policy, modes, episodes=10, mode=True)
        rollout(policy, env, rows=args.rows)
        rollouts[name] = env
        means = (episode_returns(recorder.columns()).mean() for recorder in (env, modes))
        policy_returns[name] = dict(zip(("sampled", "mode"), (round(float(mean), 1) for mean in means), strict=True))
    with np.load(folder / "transitions.npz") as stored:
        replay = {k: stored[k][:medium_step] for k in stored.files}
    # the buffer may be larger than the file: every n-th episode, evenly over all of the training
    ends = replay["terminals"] | replay["timeouts"]
    episode = np.cumsum(ends) - ends
    replay = {k: v[episode % max(1, round(medium_step / args.rows)) == 0] for k, v in replay.items()}

    half = {name: env.columns() for name, env in rollouts.items()}
    for name, cols in half.items():  # half of the rows, cut after a whole episode
        ends = np.flatnonzero(cols["terminals"] | cols["timeouts"])
        stop = int(ends[np.searchsorted(ends, args.rows // 2)]) + 1
        half[name] = {k: v[:stop] for k, v in cols.items()}
    files = {
        f"{args.agent}-medium-mini": (rollouts["medium"].columns(), "medium"),
        f"{args.agent}-medium-replay-mini": (replay, "replay buffer up to medium"),
        f"{args.agent}-medium-expert-mini": (
            {k: np.concatenate([half["medium"][k], half["expert"][k]]) for k in half["medium"]},
            "half medium, half expert",
        ),
    }
    path = args.out_dir / "statistics.json"  # of all agents
    statistics: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    for name, (cols, policy) in files.items():
        returns = episode_returns(cols)
        statistics[name] = {
            "transitions": len(cols["rewards"]),
            "episodes": len(returns),
            "return_mean": round(float(returns.mean()), 1),
            "return_std": round(float(returns.std()), 1),
            "return_min": round(float(returns.min()), 1),
            "return_max": round(float(returns.max()), 1),
        }
        metadata = {
            "env_id": env_id,
            "algorithm": f"SAC (sbx-rl {version('sbx-rl')})",
            "policy": policy,
            "medium_step": medium_step,
            "expert_step": expert_step,
            "policy_returns": json.dumps(policy_returns),
            "seed": args.seed,
            "versions": json.dumps(
                {p: version(p) for p in ("gymnasium", "mujoco", "numpy", "jax", "stable-baselines3")}
            ),
            "python": platform.python_version(),
            "license": "CC-BY-4.0",
        }
        with h5py.File(args.out_dir / f"{name}.hdf5", "w") as out:
            for key, col in cols.items():
                out.create_dataset(key, data=col, compression="gzip", compression_opts=9, shuffle=True)
            for key, value in metadata.items():
                out[f"metadata/{key}"] = value
    policies = {"medium_step": medium_step, "expert_step": expert_step, "returns": policy_returns}
    statistics[f"{args.agent} policies"] = policies
    path.write_text(json.dumps(statistics, indent=1) + "\n")
    plot(files, args.out_dir / f"{args.agent}.png")
    print(json.dumps(statistics, indent=1))


def plot(files: dict, path: Path) -> None:
    """Histogram of the episode returns of the three files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(files), figsize=(12, 3), sharex=True, constrained_layout=True)
    every = {name: episode_returns(cols) for name, (cols, _) in files.items()}
    span = (min(0.0, *map(np.min, every.values())), 1.15 * max(map(np.max, every.values())))
    for ax, (name, returns) in zip(axes, every.items(), strict=True):
        ax.hist(returns, bins=40, range=span, color="#4477aa")
        ax.axvline(returns.mean(), color="#cc6677", label=f"mean {returns.mean():.0f}")
        ax.set(title=name, xlabel="episode return")
        ax.legend(frameon=False)
    axes[0].set_ylabel("episodes")
    fig.savefig(path, dpi=110)


if __name__ == "__main__":
    args = tyro.cli(Args)
    {"train": train, "write": write}[args.stage](args)

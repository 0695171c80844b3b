# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch==2.13.0", "numpy==2.2.6", "gymnasium[mujoco]==1.4.0", "mujoco==3.17.0", "h5py==3.16.0", "pooch==1.9.0",
#     "tyro==1.0.17", "tqdm==4.70.1", "tensorboard==2.21.0", "wandb==0.31.0", "moviepy==2.2.1",
#     "filelock==3.32.7",
# ]
# ///
"""EDP-CRR: an efficient diffusion policy trained by critic-regularised regression.

Kang et al., Efficient Diffusion Policies for Offline RL, NeurIPS 2023, arXiv 2305.20081; weights of Wang et al., Critic
Regularized Regression, 2020, arXiv 2006.15134. The policy is a diffusion model of the actions; weighted regression acts
on its one-step reconstruction a_hat^0, so that no gradient goes through the sampling chain.

    forward noising       a^k = sqrt(abar^k) a^0 + sqrt(1 - abar^k) epsilon                   Diffusion.forward_noising
    action approximation  a_hat^0 = (a^k - sqrt(1 - abar^k) epsilon_theta(a^k, k; s)) / sqrt(abar^k) .approximate_action
    diffusion loss        E ||epsilon - epsilon_theta(a^k, k; s)||^2                          reconstruct
    weighted regression   E f_CRR ||a - a_hat^0||^2 (mse), or the weighted ELBO               weighted_regression
    advantage             Q(s, a) - E Q(s, a'), a' ~ N(a_hat^0, I)                            crr_advantage
    CRR weight            f_CRR = exp(advantage / tau_CRR), or 1(advantage > 0)               crr_weight
    critics               Q on r + gamma min Q'(s', a'), a' a whole sample of the target      critic_losses
    sampler               DPM-Solver-1, -2, -3 (Lu et al., 2022, arXiv 2206.00927)            Diffusion.dpm_solver_step
    evaluation            one of N actions, drawn with probability ~ exp(Q(s, a))             select_actions

Deviations:           paper                      official code (sail-sg/edp)            here
    K, sampler        1000, DPM-Solver 15        DDPM 100, DPM-Solver by flag           paper; bundled data K = 100
    candidates N      10                         50, not clipped                        50, clipped; bundled data 10
    advantage         E Q over pi_hat            min of the twin critics, 10 samples    as the code
    f_CRR             as written                 at most 20                             as the code
    gradient clip     5                          per data set, each network alone       as the code; 5 elsewhere
    unweighted loss   -                          diffusion loss, added                  as the code
    guidance_coef     1                          1; a fork (SEEM, see README) 0.01      0.01 on locomotion, else 1
    ||a - a_hat^0||^2 as written                 halved (unit-variance log-likelihood)  halved
    a_hat^0           as written                 clipped to [-1, 1]: no gradient beyond clipped
    losses' norms     sums over dimensions       diffusion loss and ELBO: means         diffusion loss: mean; ELBO: sum
    ELBO weight       1 - abar^{k-1}: 0 at k = 1 1 - abar^k, scaled to a mean of 1      paper; 1 - abar^1 at k = 1
    policy target     -                          every 5 updates after update 1000      as the code
    max-Q backup      -                          by a flag                              only in edp_td3.py
    noise clip (DPM)  -                          schedule at a truncated step           at the exact time: 7e-3 apart
    DPM-Solver's end  t = 1e-3                   the same: NaN for K < 1000             max(1e-3, 1/K): the first step
"""

import copy
import csv
import ctypes
import dataclasses
import difflib
import hashlib
import io
import itertools
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import filelock
import gymnasium as gym
import h5py
import numpy as np
import torch
import torch.nn as nn
import tyro
from torch import Tensor
from tqdm import tqdm


# ---------------------------------------------------------------------------------------------------------------- Args
@dataclass
class Args:
    """EDP-CRR: an efficient diffusion policy trained offline by critic-regularised regression."""

    # experiment
    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run folder's name
    seed: int = 0  # seed of networks, batches, noise and evaluation
    device: str = "auto"  # auto (cuda if there is one, else cpu), cpu, cuda, cuda:1, mps, ...
    num_updates: int = 2_000_000  # gradient updates in all
    log_every: int = 1_000  # updates between two rows of metrics, where losses are checked to be finite
    save_every: int = 10_000  # updates between two checkpoints; each replaces the one before
    resume: str | None = None  # run folder to go on with; the algorithm's arguments come from it
    runs_dir: str = "runs"  # where run folders are made
    track: bool = False  # log to Weights & Biases too
    wandb_project: str = "edp"  # Weights & Biases project
    wandb_entity: str | None = None  # Weights & Biases user or team
    wandb_group: str | None = None  # Weights & Biases group
    wandb_mode: Literal["online", "offline", "disabled"] = "online"  # Weights & Biases mode
    # data
    env_id: str = "hopper-medium-replay-mini"  # bundled, D4RL or Minari id; with --dataset-path any name
    dataset_path: str | None = None  # HDF5 file in D4RL's layout to train on instead of the id's own data
    reward_transform: Literal["none", "return-range", "minus-one", "times-four", "min-max"] = "none"
    """none; r * 1000 / (max - min episode return); r - 1 or 4 (r - 0.5) (AntMaze); r to [-1, 1] (Adroit, kitchen)"""
    observation_transform: Literal["none", "scalar", "per-dimension"] = "none"
    """none; by one mean and standard deviation over all dimensions; by one per dimension"""
    # evaluation
    eval_every: int = 10_000  # updates between two evaluations
    eval_episodes: int = 10  # episodes per evaluation, all run side by side
    eval_candidates: int = 50  # N of energy-based action selection; 1: no selection
    capture_video: bool = False  # record each evaluation's first episode to RUN/videos (set MUJOCO_GL if headless)
    # algorithm
    batch_size: int = 256  # transitions per update
    lr: float = 3e-4  # Adam's learning rate, all networks
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # rate of the target networks
    max_grad_norm: float = 5.0  # clip of each network's gradient norm; 0: none
    diffusion_steps: int = 1_000  # K, steps of the noise schedule; below 21 with the schedule vp
    beta_schedule: Literal["linear", "vp"] = "linear"  # vp: Diffusion-QL's, for few steps
    sampler: Literal["dpm-solver", "ddim", "ddpm"] = "dpm-solver"  # how actions are sampled
    sampler_steps: int = 15  # network calls per sample of dpm-solver and ddim; ddpm takes K
    solver_order: Literal[1, 2, 3] = 3  # order of dpm-solver
    diffusion_coef: float = 1.0  # coefficient of the unweighted diffusion (behaviour-cloning) loss
    guidance_coef: float = 1.0  # coefficient of the weighted regression
    likelihood: Literal["mse", "elbo"] = "mse"  # weighted regression: Gaussian, or ELBO with a larger guidance_coef
    advantage_samples: int = 10  # actions around a_hat^0 that the advantage compares with
    advantage_baseline: Literal["mean", "max"] = "mean"  # of their Q
    weight: Literal["exp", "binary"] = "exp"  # exp(advantage / temperature), or 1 where the advantage is positive
    temperature: float = 1.0  # tau of the CRR weight, exp only
    weight_cap: float = 20.0  # upper bound of the CRR weight, exp only
    policy_target_start: int = 1_000  # updates before the policy's target moves
    policy_target_every: int = 5  # updates between two moves of the policy's target
    # speed
    num_threads: int = 1  # CPU threads; a second one pays only on an otherwise idle machine
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the update, on cuda in a graph, and of sampling too; auto: cuda, or 10 000 updates on a CPU"""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """of products: high for TF32, medium for bfloat16 between hidden layers, slow where the processor has none"""


# ------------------------------------------------------------------------------------------------------------- PRESETS
# Command line > preset > default. Norm clips and rewards: the official code's; updates: the paper's. The ids of
# AntMaze, Adroit and kitchen go with --dataset-path; without their environments there is no evaluation.
CLIPS = {
    "halfcheetah-medium-v2": 9, "halfcheetah-medium-replay-v2": 2, "halfcheetah-medium-expert-v2": 7,
    "hopper-medium-v2": 9, "hopper-medium-replay-v2": 4, "hopper-medium-expert-v2": 5,
    "walker2d-medium-v2": 1, "walker2d-medium-replay-v2": 4, "walker2d-medium-expert-v2": 5,
    "antmaze-umaze-v0": 2, "antmaze-umaze-diverse-v0": 3, "antmaze-medium-play-v0": 2, "antmaze-medium-diverse-v0": 1,
    "antmaze-large-play-v0": 10, "antmaze-large-diverse-v0": 7, "pen-human-v1": 7, "pen-cloned-v1": 8,
    "kitchen-complete-v0": 9, "kitchen-partial-v0": 10, "kitchen-mixed-v0": 10,
}  # fmt: skip
LOCOMOTION: dict[str, Any] = {"guidance_coef": 0.01}  # a fork's, for hopper-medium-v2 (see README)
SPARSE: dict[str, Any] = {"reward_transform": "min-max", "num_updates": 1_000_000}
FAMILIES = {
    **{"halfcheetah": LOCOMOTION, "hopper": LOCOMOTION, "walker2d": LOCOMOTION, "pen": SPARSE, "kitchen": SPARSE},
    "antmaze": {**SPARSE, "reward_transform": "times-four"},
}
PRESETS = {name: {**FAMILIES[name.split("-")[0]], "max_grad_norm": float(clip)} for name, clip in CLIPS.items()}
PRESETS |= {f"{name[:-1]}{n}": PRESETS[name] for name in CLIPS if "antmaze" in name for n in (1, 2)}  # corrected files
# Small sets: ours, found by trying on Hopper (the others have medium-replay's), for a run of minutes on a CPU. Its
# medium policy is the faster one and falls after some 340 steps, so the critics must look further than gamma = 0.99
# does, and soon (tau); not in medium-replay, which is noisier: there looking far misleads.
# With the full guidance, noise at high k and uneven weights drown the diffusion loss for tens of thousands of updates.
MINI = {
    "reward_transform": "return-range", "observation_transform": "per-dimension", "num_updates": 20_000, "lr": 1e-3,
    "gamma": 0.99, "tau": 0.005, "diffusion_steps": 100, "guidance_coef": 0.01, "eval_every": 5_000,
    "eval_candidates": 10, "log_every": 250, "save_every": 2_500,
}  # fmt: skip
PRESETS |= {f"hopper-{level}-mini": {**MINI, "gamma": 0.995, "tau": 0.05} for level in ("medium", "medium-expert")}

# What --resume lets change: nothing that alters an update by more than rounding; another device draws other numbers
RESUMABLE = {
    "resume", "num_updates", "device", "log_every", "save_every", "runs_dir", "track", "wandb_project", "wandb_entity",
    "wandb_group", "wandb_mode", "dataset_path", "eval_every", "eval_episodes", "eval_candidates", "capture_video",
    "num_threads", "compile", "matmul_precision",
}  # fmt: skip


def fail(message: object) -> NoReturn:
    """Bad arguments or data: one line on stderr, exit code 2."""
    print(f"{Path(__file__).name}: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def parse_args(argv: list[str] | None = None) -> Args:
    """Command line > checkpoint (with --resume) > preset > default."""
    argv = sys.argv[1:] if argv is None else argv
    given = tyro.cli(Args, args=[flag for flag in argv if flag not in ("-h", "--help")])
    saved = load_checkpoint(given.resume)["args"] if given.resume is not None else {}
    defaults = {**PRESETS.get(given.env_id, {}), "env_id": given.env_id, **saved, "resume": given.resume}
    args = tyro.cli(Args, args=argv, default=Args(**defaults))
    for name in saved.keys() - RESUMABLE:
        if getattr(args, name) != saved[name]:
            fail(f"--{name.replace('_', '-')} cannot change on resume (the run has {saved[name]})")
    return args


def check_args(args: Args) -> None:
    """Refuse values that cannot work, naming the argument."""
    # The linear schedule's last beta is 20 / K; DPM-Solver leaves the first step's noise, much with few steps
    least = {"linear": 21, "vp": 100 if args.sampler == "dpm-solver" else 2}[args.beta_schedule]
    counts = ("num_updates", "log_every", "save_every", "eval_every")
    bounds: dict[str, Any] = dict.fromkeys(counts, (1, 1e12)) | {"diffusion_steps": (least, 1e5)}
    bounds |= dict.fromkeys(("batch_size", "eval_candidates"), (1, 1e5)) | {"seed": (0, 2**32)}
    bounds |= dict.fromkeys(("eval_episodes", "num_threads"), (1, 1e3)) | dict.fromkeys(("gamma", "tau"), (0, 1))
    bounds |= {"sampler_steps": (1, args.diffusion_steps if args.sampler != "ddpm" else 1e5), "lr": (1e-12, math.inf)}
    bounds |= dict.fromkeys(("max_grad_norm", "diffusion_coef"), (0, math.inf))
    bounds |= {"weight_cap": (1e-12, 1e30), "temperature": (1e-12, math.inf), "guidance_coef": (0, math.inf)}
    bounds |= {"policy_target_every": (1, 1e12), "policy_target_start": (0, 1e12), "advantage_samples": (1, 1e3)}
    where = {"diffusion_steps": f" with --beta-schedule {args.beta_schedule} and --sampler {args.sampler}"}
    for name, (low, high) in bounds.items():
        if not (low <= (value := getattr(args, name)) <= high) or math.isinf(value):
            flag = f"--{name.replace('_', '-')}"
            fail(f"{flag} must lie between {low:g} and {high:g}{where.get(name, '')}, got {value}")


# ---------------------------------------------------------------------------------------------------------------- Data
D4RL = {  # agent: Gymnasium environment, D4RL's returns of a random and an expert policy
    "hopper": ("Hopper-v4", (-20.272305, 3234.3)),
    "walker2d": ("Walker2d-v4", (1.629008, 4592.3)),
    "halfcheetah": ("HalfCheetah-v4", (-280.178953, 12135.0)),
    "ant": ("Ant-v4", (-325.6, 3879.7)),
}
LEVELS = ("random", "medium", "medium-replay", "medium-expert", "full-replay", "expert")
D4RL_IDS = [f"{agent}-{level}-v2" for agent in D4RL for level in LEVELS]
MINI_IDS = [f"{agent}-{level}-mini" for agent in ("hopper", "walker2d", "halfcheetah") for level in LEVELS[1:4]]
PRESETS = dict.fromkeys(D4RL_IDS, LOCOMOTION) | dict.fromkeys(MINI_IDS, MINI) | PRESETS  # ids that are not above
D4RL_URLS = (  # tried in this order
    "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/{}",
    "https://huggingface.co/datasets/imone/D4RL/resolve/main/{}",
)
Columns = dict[str, np.ndarray]  # D4RL's arrays: observations (N, S), actions (N, A), rewards (N,), terminals (N,), ...


class Transform(NamedTuple):
    """How the networks see observations and rewards, the same for data and evaluation."""

    obs_shift: Any = 0.0  # a number or (S,)
    obs_scale: Any = 1.0
    reward_shift: float = 0.0
    reward_scale: float = 1.0

    def obs(self, s: Any) -> Any:
        return (s + self.obs_shift) * self.obs_scale

    def reward(self, r: Any) -> Any:
        return (r + self.reward_shift) * self.reward_scale


KEYS = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")


def read_hdf5(path: Path) -> Columns:
    """Read and check a file in D4RL's layout. OSError: missing, not HDF5, truncated; ValueError: bad content."""
    try:
        with h5py.File(path, "r") as file:
            columns = {key: np.asarray(file[key][()]) for key in KEYS if isinstance(file.get(key), h5py.Dataset)}
    except Exception as error:  # a damaged file can raise anything
        raise OSError(f"cannot be read as HDF5: {error}") from error
    return check(columns)


@np.errstate(all="ignore")  # what a damaged file holds can overflow
def check(columns: Columns) -> Columns:
    """The same columns, if their shapes fit together and their values can be trained on; else ValueError."""
    if missing := [key for key in KEYS[:4] if key not in columns or columns[key].ndim == 0]:
        raise ValueError(f"no {', '.join(missing)}")
    for key, column in columns.items():
        expected = (len(columns["rewards"]), *columns["observations" if "obs" in key else key].shape[1:])
        if column.shape != expected or column.ndim != (2 if "obs" in key or key == "actions" else 1) or not column.size:
            raise ValueError(f"{key} has shape {column.shape} for {len(columns['rewards'])} rewards")
        if column.dtype.kind not in "fiub" or not (np.abs(column.astype(np.float64)) < 1e8).all():
            raise ValueError(f"{key} has values that are not finite numbers below 1e8")
    if (largest := np.abs(columns["actions"].astype(np.float64)).max()) > 1.001:
        raise ValueError(f"actions reach {largest:.4g}, expected [-1, 1]")
    return columns


def download_d4rl(name: str) -> Path:
    """Path of a D4RL file in D4RL_DATASET_DIR (default ~/.d4rl/datasets), downloaded where it is missing."""
    import pooch

    folder = Path(os.path.expanduser(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets"))
    errors = []

    def download(url: str, output: Any, fetcher: Any) -> None:
        pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=30)(url, output, fetcher)
        read_hdf5(Path(output))  # half a file or an error page must not take the data's place

    pooch.get_logger().setLevel("WARNING")
    for url in (template.format(name) for template in D4RL_URLS):
        try:
            fetcher = pooch.create(folder, "", registry={name: None}, urls={name: url}, retry_if_failed=1)
            return Path(fetcher.fetch(name, downloader=download))
        except (OSError, ValueError) as error:  # those of requests are OSErrors
            errors.append(f"{url}: {str(error)[:150]}")
    fail(f"cannot download {name} ({'; '.join(errors)}); put the file into {folder} or set D4RL_DATASET_DIR")


def load_minari(env_id: str) -> tuple[Columns, Callable[..., gym.Env], tuple[float, float] | None]:
    """Columns, environment and reference returns of a Minari set; Dict observations flattened in sorted key order."""

    def flat(obs: Any) -> np.ndarray:
        parts = [flat(obs[key]) for key in sorted(obs)] if isinstance(obs, dict) else [obs.reshape(len(obs), -1)]
        return np.concatenate(parts, axis=1)

    def make_env(**kwargs: Any) -> gym.Env:
        return gym.wrappers.FlattenObservation(dataset.recover_environment(eval_env=True, **kwargs))  # the same order

    try:
        import minari

        dataset, episodes = minari.load_dataset(env_id, download=True), []
        for e in dataset.iterate_episodes():
            obs, timeouts = flat(e.observations), e.truncations & ~e.terminations
            episodes.append((obs[:-1], e.actions, e.rewards, e.terminations, timeouts, obs[1:]))
        columns = check(
            {key: np.concatenate(parts) for key, parts in zip(KEYS, zip(*episodes, strict=True), strict=True)}
        )
    except ImportError:
        fail(f"{env_id} is a Minari id: pip install 'minari[all]'")
    except Exception as error:  # Minari raises many kinds: no such set, no network, a format that is not ours
        fail(f"Minari data set {env_id}: {error!r}")
    scores = [dataset.storage.metadata.get(key) for key in ("ref_min_score", "ref_max_score")]
    return columns, make_env, None if None in scores else (float(scores[0]), float(scores[1]))


def load_task(args: Args) -> tuple[Columns, Callable[..., gym.Env] | None, tuple[float, float] | None, dict[str, str]]:
    """Data, evaluation environment, reference returns and file of --env-id and --dataset-path; exit 2 if unusable."""
    if args.dataset_path is None and "/" in args.env_id:
        found = load_minari(args.env_id)
        digest = hashlib.sha256(b"".join(column.tobytes() for column in found[0].values())).hexdigest()
        return *found, {"file": f"minari:{args.env_id}", "sha256": digest}
    make_env, reference = None, None
    if args.dataset_path is not None:
        path = Path(args.dataset_path)
    elif args.env_id in MINI_IDS:
        path = Path(__file__).parent / "datasets" / f"{args.env_id}.hdf5"
        if not path.exists():
            origin = "copy it from datasets/" if "hopper" in args.env_id else "make it by datasets/collect.py"
            fail(f"{path} is missing: {origin} of this script's repository, or give --dataset-path or a D4RL id")
    elif args.env_id in D4RL_IDS:
        path = download_d4rl(f"{args.env_id[:-3].replace('-', '_')}-v2.hdf5")
    else:
        close = difflib.get_close_matches(args.env_id, MINI_IDS + D4RL_IDS, n=3, cutoff=0.0)
        fail(f"unknown --env-id {args.env_id}; close to it: {', '.join(close)}; for your own data give --dataset-path")
    try:
        if not path.is_file():
            raise OSError("not a file")
        columns = read_hdf5(path)
        source = {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    except (OSError, ValueError) as error:
        fail(f"{path}: {error}")

    gym_id, options = args.env_id, {}
    if args.env_id in MINI_IDS + D4RL_IDS:
        gym_id, reference = D4RL[args.env_id.split("-")[0]]
        options = {"use_contact_forces": True} if gym_id == "Ant-v4" else {}  # D4RL's 111 dimensions
    if gym_id in gym.registry:
        warnings.filterwarnings("ignore", message=".*out of date|MuJoCo: .*deprecated")  # v4's rewards are D4RL's
        make_env, limit = partial(gym.make, gym_id, **options), gym.registry[gym_id].max_episode_steps
        if "timeouts" not in columns and limit:
            columns["timeouts"] = timeouts_by_limit(columns["terminals"].astype(bool), limit)
    if args.dataset_path is not None and args.env_id == Args.env_id:
        print(f"note: {path} with presets and environment of the default --env-id, {args.env_id}", file=sys.stderr)
    return columns, make_env, reference, source


def timeouts_by_limit(terminals: np.ndarray, limit: int) -> np.ndarray:
    """(N,) bool, the rows that D4RL's qlearning_dataset takes for timeouts where the file does not say.

    Its step counter starts at 1, not 0, after a terminal row that is kept; so does this one, for the same rows.
    """
    timeouts, start, counter = np.zeros(len(terminals), bool), 0, 0
    for end in [*np.flatnonzero(terminals), len(terminals) - 1]:
        timeouts[start : end + 1] = np.arange(counter, counter + end + 1 - start) % limit == limit - 1
        start, counter = end + 1, int(not timeouts[end])
    return timeouts


def make_transitions(columns: Columns, args: Args, limit: int = 1_000) -> tuple[np.ndarray, Transform]:
    """Rows [s, a, s', r, mask] of D4RL's qlearning_dataset, (N, S+A+S+2) float32, and the transform they went through.

    Timeout rows and the last row are dropped, terminal rows kept; mask is 0 on terminal rows, else 1.
    """
    obs, rewards, terminals = columns["observations"], columns["rewards"], columns["terminals"].astype(bool)
    timeouts = columns["timeouts"].astype(bool) if "timeouts" in columns else timeouts_by_limit(terminals, limit)
    keep = ~timeouts & (np.arange(len(obs)) < len(obs) - 1)
    next_obs = columns.get("next_observations", np.roll(obs, -1, axis=0))
    transform = Transform()
    if args.reward_transform == "return-range":
        starts = np.flatnonzero(np.append(True, (terminals | timeouts)[:-1]))
        returns = np.add.reduceat(rewards.astype(np.float64), starts)
        spread = float(np.ptp(returns))  # equal but for rounding: as they are
        transform = transform._replace(reward_scale=1_000 / spread if spread > 1e-6 * np.abs(returns).max() else 1.0)
    elif args.reward_transform == "minus-one":
        transform = transform._replace(reward_shift=-1.0)
    elif args.reward_transform == "times-four":
        transform = transform._replace(reward_shift=-0.5, reward_scale=4.0)
    elif args.reward_transform == "min-max":
        low, high = float(rewards.min()), float(rewards.max())
        transform = transform._replace(reward_shift=-(low + high) / 2, reward_scale=2 / max(high - low, 1e-6))
    if args.observation_transform != "none":
        axis = 0 if args.observation_transform == "per-dimension" else None
        mean, std = obs.mean(axis, dtype=np.float64), obs.std(axis, dtype=np.float64)
        transform = transform._replace(obs_shift=-mean, obs_scale=1 / std.clip(1e-3))
    r, mask = transform.reward(rewards)[:, None], ~terminals[:, None]
    actions = columns["actions"].clip(-0.999, 0.999)  # as the official code
    parts = (transform.obs(obs), actions, transform.obs(next_obs), r, mask)
    return np.concatenate([part[keep].astype(np.float32) for part in parts], axis=1), transform


# ------------------------------------------------------------------------------------------------------------ Networks
class Mish(torch.autograd.Function):
    """x tanh(softplus(x)) = x - 2 x / ((1 + e^x)^2 + 1): nn.Mish, on a CPU three times as fast, in few buffers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if not ctx.needs_input_grad[0]:
            v = x.exp().add_(1).square_().add_(1)
            return torch.addcdiv(x, x, v, value=-2, out=v)
        p = torch.sigmoid(x)
        w = (p - 1).square_().add_(1).reciprocal_()  # 1 - 1 / v, and finite for every x
        p.mul_(x).mul_(w).addcmul_(p, w, value=-1)  # p x (w - w^2)
        w.mul_(2).sub_(1)
        y = w * x
        ctx.save_for_backward(w.add_(p, alpha=4))  # dy/dx
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0]


class Linear(nn.Linear):
    """Between hidden layers. With --matmul-precision medium products take and give bfloat16, on every device.

    PyTorch's own switch does so where the hardware can for float32 tensors: of CPUs, those with AMX.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.coarse = torch.get_float32_matmul_precision() == "medium"  # asked here: the compiler cannot

    def forward(self, x: Tensor) -> Tensor:
        if not self.coarse:
            return super().forward(x)
        return nn.functional.linear(x.bfloat16(), self.weight.bfloat16()).float() + self.bias


class MLP(nn.Module):
    """Mish network, initialised like the official code's (flax: LeCun normal, there truncated, zero bias)."""

    def __init__(self, inputs: int, outputs: int, hidden: tuple[int, ...] = (256, 256, 256)) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for fan_in, fan_out in zip((inputs, *hidden), (*hidden, outputs), strict=True):
            layer = (Linear if 0 < len(self.layers) < len(hidden) else nn.Linear)(fan_in, fan_out)
            nn.init.normal_(layer.weight, std=fan_in**-0.5)
            nn.init.zeros_(layer.bias)
            self.layers.append(layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = Mish.apply(layer(x))
        return self.layers[-1](x)


def flatten(network: nn.Module) -> nn.Parameter:
    """All parameters of a network as one vector that they become views of: one tensor for Adam, clip and target."""
    parameters = list(network.parameters())
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
    for p, values in zip(parameters, flat.data.split([p.numel() for p in parameters]), strict=True):
        p.data = values.view_as(p)
    return flat


class Policy(nn.Module):
    """epsilon_theta(a^k, k; s): states (B, S), noised actions (B, A), steps (B,) or () from 0 -> noise (B, A)."""

    def __init__(self, obs_dim: int, act_dim: int, time_dim: int = 16) -> None:
        super().__init__()
        self.act_dim = act_dim
        self.frequencies = nn.Buffer(10_000 ** (-torch.arange(time_dim // 2) / (time_dim // 2)), persistent=False)
        self.time_mlp = MLP(time_dim, time_dim, hidden=(2 * time_dim,))
        self.net = MLP(obs_dim + act_dim + time_dim, act_dim)

    def forward(self, s: Tensor, a_k: Tensor, k: Tensor) -> Tensor:
        angles = k[..., None] * self.frequencies
        embedding = self.time_mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))
        return self.net(torch.cat([s, a_k, embedding.expand(len(s), -1)], dim=1))


class Critic(nn.Module):
    """Twin Q(s, a): (B, S), (B, A) -> (B,), (B,)."""

    def __init__(self, obs_dim: int, act_dim: int) -> None:
        super().__init__()
        self.q1, self.q2 = MLP(obs_dim + act_dim, 1), MLP(obs_dim + act_dim, 1)

    def forward(self, s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        sa = torch.cat([s, a], dim=1)
        return self.q1(sa)[:, 0], self.q2(sa)[:, 0]

    def min(self, s: Tensor, a: Tensor) -> Tensor:
        return torch.minimum(*self(s, a))


# ----------------------------------------------------------------------------------------------------------- Diffusion
class Diffusion:
    """Schedule, forward noising, action approximation and samplers.

    Tables are (K,) float32; step k of the paper, from 1 to K, is index k - 1. Actions lie in [-1, 1].
    """

    def __init__(
        self, K: int, sampler: str, steps: int, solver_order: int, device: torch.device, schedule: str = "linear"
    ) -> None:
        beta = np.linspace(0.1 / K, 20 / K, K)  # 1e-4 to 0.02 at K = 1000
        if schedule == "vp":  # the continuous process of the linear schedule, in K steps
            beta = -np.expm1(-0.1 / K - 0.5 * (10 - 0.1) * (2 * np.arange(K) + 1) / K**2)
        alpha_bar = np.cumprod(1 - beta)
        alpha_bar_prev = np.append(1.0, alpha_bar[:-1])

        def table(values: Any) -> Tensor:
            return torch.as_tensor(np.asarray(values), dtype=torch.float32, device=device)

        self.K, self.sampler, self.steps = K, sampler, steps
        self.index = torch.arange(K, device=device)  # steps as the network is given them
        self.draws = K + 1 if sampler == "ddpm" else 1  # Gaussian vectors that a sample takes
        self.sqrt_alpha_bar, self.sqrt_one_minus_alpha_bar = table(alpha_bar**0.5), table((1 - alpha_bar) ** 0.5)
        # Weight of the ELBO; 1 - abar^0 = 0 is replaced by 1 - abar^1, as is usual for the posterior's variance
        self.elbo_weight = table(beta / (2 * (1 - beta) * np.maximum(1 - alpha_bar_prev, 1 - alpha_bar[0])))
        # q(a^{k-1} | a^k, a^0)
        self.posterior_a0 = table(beta * alpha_bar_prev**0.5 / (1 - alpha_bar))
        self.posterior_ak = table((1 - alpha_bar_prev) * (1 - beta) ** 0.5 / (1 - alpha_bar))
        self.posterior_std = table((beta * (1 - alpha_bar_prev) / (1 - alpha_bar)) ** 0.5)
        self.ddim_steps = np.linspace(K - 1, 0, steps).round().astype(int).tolist()
        # DPM-Solver's network calls, uniform in time from 1 to the end; log alpha_t is linear between t = k / K
        t = np.linspace(1.0, max(1e-3, 1 / K), steps + 1)
        log_alpha = np.interp(t, np.arange(1, K + 1) / K, 0.5 * np.log(alpha_bar))
        self.alpha, self.sigma = np.exp(log_alpha).tolist(), np.sqrt(1 - np.exp(2 * log_alpha)).tolist()
        self.lambda_ = (log_alpha - np.log(self.sigma)).tolist()
        self.t_index = table(K * t - 1)  # what the network is given: fractional steps
        n, rest = divmod(steps, solver_order)
        self.orders = [solver_order] * n + [rest] * (rest > 0)
        if solver_order == 3 and rest == 0:  # the last steps are where order 3 is least stable
            self.orders[-1:] = [2, 1]

    def forward_noising(self, a0: Tensor, k: Tensor, epsilon: Tensor) -> Tensor:
        """a^k of actions (B, A), steps (B,) and noise (B, A)."""
        return self.sqrt_alpha_bar[k, None] * a0 + self.sqrt_one_minus_alpha_bar[k, None] * epsilon

    def approximate_action(self, a_k: Tensor, k: Tensor | int, epsilon: Tensor) -> Tensor:
        """a_hat^0 (B, A); clipped to the action range as in the official code: no gradient from beyond."""
        a0 = (a_k - self.sqrt_one_minus_alpha_bar[k, None] * epsilon) / self.sqrt_alpha_bar[k, None]
        return a0.clamp(-1, 1)

    def sample(self, policy: Policy, s: Tensor, noise: Tensor) -> Tensor:
        """Actions (B, A) for states (B, S) by the chosen sampler, from noise (draws, B, A)."""
        if self.sampler == "dpm-solver":
            return self.dpm_solver(policy, s, noise[0])
        return self.ddim(policy, s, noise[0]) if self.sampler == "ddim" else self.ddpm(policy, s, noise)

    def ddpm(self, policy: Policy, s: Tensor, noise: Tensor) -> Tensor:
        """Ancestral sampling; noise (K + 1, B, A): a^K, then one per step."""
        a = noise[0]
        for k, z in zip(range(self.K - 1, -1, -1), noise[1:], strict=True):
            a0 = self.approximate_action(a, k, policy(s, a, self.index[k]))
            a = self.posterior_a0[k] * a0 + self.posterior_ak[k] * a + self.posterior_std[k] * z  # std is 0 at the end
        return a

    def ddim(self, policy: Policy, s: Tensor, a: Tensor) -> Tensor:
        """Deterministic (eta = 0) sampling from a^K (B, A) over evenly spaced steps."""
        for k, k_next in itertools.pairwise(self.ddim_steps):
            a0 = self.approximate_action(a, k, policy(s, a, self.index[k]))
            epsilon = (a - self.sqrt_alpha_bar[k] * a0) / self.sqrt_one_minus_alpha_bar[k]
            a = self.sqrt_alpha_bar[k_next] * a0 + self.sqrt_one_minus_alpha_bar[k_next] * epsilon
        last = self.ddim_steps[-1]
        return self.approximate_action(a, last, policy(s, a, self.index[last]))

    def dpm_solver(self, policy: Policy, s: Tensor, a: Tensor) -> Tensor:
        """Singlestep DPM-Solver from a^K (B, A)."""
        i = 0
        for order in self.orders:
            a = self.dpm_solver_step(lambda x, j: self.clip_noise(policy(s, x, self.t_index[j]), x, j), a, i, order)
            i += order
        return a

    def clip_noise(self, epsilon: Tensor, x: Tensor, i: int) -> Tensor:
        """Noise (B, A) clipped so that the action it implies at time t_i lies in [-1, 1]."""
        a0 = ((x - self.sigma[i] * epsilon) / self.alpha[i]).clamp(-1, 1)
        return (x - self.alpha[i] * a0) / self.sigma[i]

    def dpm_solver_step(self, epsilon: Callable[[Tensor, int], Tensor], x: Tensor, i: int, order: int) -> Tensor:
        """x at t_i -> x at t_{i + order}, with `order` calls of epsilon(x, j), the noise at t_j."""
        alpha, sigma, lambda_, j = self.alpha, self.sigma, self.lambda_, i + order
        h = lambda_[j] - lambda_[i]
        e0 = epsilon(x, i)
        if order == 1:  # DPM-Solver-1, which is DDIM
            return alpha[j] / alpha[i] * x - sigma[j] * math.expm1(h) * e0
        r1h = lambda_[i + 1] - lambda_[i]
        u1 = alpha[i + 1] / alpha[i] * x - sigma[i + 1] * math.expm1(r1h) * e0
        d1 = epsilon(u1, i + 1) - e0
        if order == 2:  # DPM-Solver-2
            return alpha[j] / alpha[i] * x - sigma[j] * math.expm1(h) * (e0 + h / (2 * r1h) * d1)
        r2h = lambda_[i + 2] - lambda_[i]  # DPM-Solver-3
        u2 = alpha[i + 2] / alpha[i] * x - sigma[i + 2] * (math.expm1(r2h) * e0 + (math.expm1(r2h) - r2h) / r1h * d1)
        d2 = epsilon(u2, i + 2) - e0
        return alpha[j] / alpha[i] * x - sigma[j] * (math.expm1(h) * e0 + (math.expm1(h) - h) / r2h * d2)


# -------------------------------------------------------------------------------------------------------------- Losses
def critic_losses(q1: Tensor, q2: Tensor, r: Tensor, mask: Tensor, next_v: Tensor, gamma: float) -> list[Tensor]:
    """Mean squared error of each critic against r + gamma mask V(s'), all (B,)."""
    target = r + gamma * mask * next_v
    return [(q - target).square().mean() for q in (q1, q2)]


def crr_advantage(critic: Critic, s: Tensor, q: Tensor, a_hat_0: Tensor, z: Tensor, baseline: str) -> Tensor:
    """q = Q(s, a) - mean or max of Q(s, a_hat^0 + z) over z (M, B, A), standard normal; (B,)."""
    v = critic.min(s.repeat(len(z), 1), (a_hat_0 + z).flatten(0, 1)).view(len(z), -1)
    return q - (v.mean(0) if baseline == "mean" else v.amax(0))


def crr_weight(advantage: Tensor, weight: str, temperature: float, cap: float) -> Tensor:
    """f_CRR = exp(advantage / tau) or 1(advantage > 0), (B,); the cap is the official code's."""
    return (advantage / temperature).exp().clamp(max=cap) if weight == "exp" else (advantage > 0).float()


def reconstruct(
    diffusion: Diffusion, policy: Policy, s: Tensor, a: Tensor, k: Tensor, epsilon: Tensor
) -> tuple[Tensor, Tensor]:
    """Squared noise error, whose mean is the diffusion loss, and a_hat^0, both (B, A), at steps k (B,)."""
    a_k = diffusion.forward_noising(a, k, epsilon)
    epsilon_hat = policy(s, a_k, k)
    return (epsilon - epsilon_hat).square(), diffusion.approximate_action(a_k, k, epsilon_hat)


def weighted_regression(
    diffusion: Diffusion, error: Tensor, a: Tensor, a_hat_0: Tensor, k: Tensor, f: Tensor, likelihood: str
) -> Tensor:
    """E f ||a - a_hat^0||^2 / 2 (mse) or the weighted ELBO, with weights f (B,)."""
    if likelihood == "elbo":
        return (diffusion.elbo_weight[k] * f * error.sum(1)).mean()
    return 0.5 * (f * (a - a_hat_0).square().sum(1)).mean()  # -log N(a; a_hat^0, I) up to a constant, as official


# -------------------------------------------------------------------------------------------------------------- Update
def make_networks(obs_dim: int, act_dim: int, device: torch.device) -> dict[str, Any]:
    """The networks and their target copies."""
    networks: dict[str, Any] = {"policy": Policy(obs_dim, act_dim), "critic": Critic(obs_dim, act_dim)}
    networks |= {f"{name}_target": copy.deepcopy(net).requires_grad_(False) for name, net in networks.items()}
    return {name: network.to(device) for name, network in networks.items()}


def draw(args: Args, diffusion: Diffusion, act_dim: int, device: torch.device) -> dict[str, Tensor]:
    """What chance decides in one update, apart from the batch."""
    return {
        "k": torch.randint(args.diffusion_steps, (args.batch_size,), device=device),
        "epsilon": torch.randn(args.batch_size, act_dim, device=device),
        "noise": torch.randn(diffusion.draws, args.batch_size, act_dim, device=device),
        "z": torch.randn(args.advantage_samples, args.batch_size, act_dim, device=device),
    }


def schedule(args: Args, step: int, device: torch.device) -> dict[str, Tensor]:
    """What an update is given by its number: the rate of the policy's target."""
    moves = step + 1 > args.policy_target_start and (step + 1) % args.policy_target_every == 0
    return {"policy_tau": torch.full((), args.tau if moves else 0.0, device=device)}


class Captured:
    """A function as one CUDA graph: three calls as they are, the fourth is captured, and replayed from then on.

    Tensor arguments are copied in; networks, optimisers and torch's generator are shared; all else is as captured.
    """

    def __init__(self, update: Callable[..., dict[str, Tensor]]) -> None:
        self.update, self.calls, self.graph, self.stream = update, 0, None, torch.cuda.Stream()
        warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")  # for the three calls

    def capture(self) -> None:
        graph: Any = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        try:  # records, computes nothing; a compiler that began anew would wait for the device
            with torch.compiler.set_stance("fail_on_recompile"), torch.cuda.graph(graph, stream=self.stream):
                self.metrics = self.update(**self.inputs)
            self.graph = graph
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # which a failed capture does not
            self.failed, cause = graph, error.__context__ or error  # an error in the capture fails its end too
            told = (str(cause) or repr(cause)).splitlines()[0]
            print(f"warning: no CUDA graph: {told}; goes on without", file=sys.stderr)

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls == 1:  # the same tensors for all calls: others would be compiled for anew
            self.inputs = {name: x.clone(memory_format=torch.contiguous_format) for name, x in inputs.items()}
        for name, x in inputs.items():
            self.inputs[name].copy_(x)
        if self.calls == 4:
            self.capture()
        if self.graph:
            self.graph.replay()
            return self.metrics
        if self.calls >= 4:
            return self.update(**self.inputs)
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):  # where compiler, cuBLAS and autograd set themselves up for the capture
            metrics = self.update(**self.inputs)
        current.wait_stream(self.stream)
        return metrics


def accelerate(args: Args, update: Callable, networks: Iterable[nn.Module], device: torch.device) -> Callable:
    """The update compiled, where a compiler works; on cuda networks compiled for sampling too.

    auto: on a CPU the run must have enough updates to earn the compiling back.
    """
    cuda, worth = device.type == "cuda", device.type == "cpu" and args.num_updates >= 10_000
    if args.compile == "off" or (args.compile == "auto" and not (cuda or worth)):
        return update
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
        torch._dynamo.config.trace_autograd_ops = True  # gradients in the same code as their loss
        torch._dynamo.config.suppress_errors = True  # a slower run rather than none
        torch._dynamo.config.specialize_float = True  # numbers are constants, whichever came first
        torch._inductor.config.fallback_random = True  # the same noise as without
        for network in networks if cuda else ():
            network.compile()
        update = torch.compile(update)
        say("--compile: the first update may take minutes")
    except Exception as error:  # every backend has its own kind
        print(f"warning: --compile: {(str(error) or repr(error)).splitlines()[0]}; goes on without", file=sys.stderr)
    return update


def capture(args: Args, function: Callable, device: torch.device) -> Callable:
    """The function in one CUDA graph, on cuda; nothing in it may depend on numbers that change between calls."""
    return Captured(function) if device.type == "cuda" and args.compile != "off" else function


def make_update(args: Args, diffusion: Diffusion, networks: dict[str, Any]) -> tuple[Callable, dict[str, Any]]:
    """The update of Algorithm 1 with CRR's weights, a batch and its random draws -> metrics, and its optimisers."""
    policy, critic, policy_target, critic_target = networks.values()
    # One vector per network: each is clipped on its own, as in the official code
    critic_vectors, target_vectors = ([flatten(c.q1), flatten(c.q2)] for c in (critic, critic_target))
    vectors = {"policy": [flatten(policy)], "critic": critic_vectors}
    policy_target_vector = flatten(policy_target)
    parameters = {name: list(networks[name].parameters()) for name in vectors}
    device = vectors["policy"][0].device
    capturable = device.type == "cuda" and args.compile != "off"
    adam = partial(torch.optim.Adam, lr=args.lr, fused=device.type in ("cpu", "cuda"), capturable=capturable)
    optimizers = {name: adam(vector) for name, vector in vectors.items()}

    def differentiate(name: str, loss: Tensor) -> None:
        """The clipped gradient of each vector of a network."""
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters[name])])
        for vector, part in zip(vectors[name], gradient.chunk(len(vectors[name])), strict=True):
            vector.grad = part
            if args.max_grad_norm > 0:
                nn.utils.clip_grad_norm_(vector, args.max_grad_norm)

    @torch.compiler.disable  # what lies between two of these is compiled as a whole, if no graph of gradients crosses
    def step(*names: str) -> None:
        for name in names:
            optimizers[name].step()

    def update(
        s: Tensor, a: Tensor, next_s: Tensor, r: Tensor, mask: Tensor,
        k: Tensor, epsilon: Tensor, noise: Tensor, z: Tensor, policy_tau: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        with torch.no_grad():
            next_a = diffusion.sample(policy_target, next_s, noise)  # not clipped, as in the official code
            next_v = critic_target.min(next_s, next_a)

        q1, q2 = critic(s, a)
        error, a_hat_0 = reconstruct(diffusion, policy, s, a, k, epsilon)
        with torch.no_grad():
            advantage = crr_advantage(critic, s, torch.minimum(q1, q2), a_hat_0, z, args.advantage_baseline)
            f = crr_weight(advantage, args.weight, args.temperature, args.weight_cap)
        diffusion_loss = error.mean()
        guidance_loss = weighted_regression(diffusion, error, a, a_hat_0, k, f, args.likelihood)
        policy_loss = args.diffusion_coef * diffusion_loss + args.guidance_coef * guidance_loss

        qf1_loss, qf2_loss = critic_losses(q1, q2, r, mask, next_v, args.gamma)
        losses = {"qf1_loss": qf1_loss, "qf2_loss": qf2_loss, "policy_loss": policy_loss}
        losses |= {"diffusion_loss": diffusion_loss, "guidance_loss": guidance_loss, "weight_mean": f.mean()}
        losses |= {"q_mean": q1.mean(), "q_max": q1.max(), "advantage_mean": advantage.mean()}
        metrics = {f"losses/{name}": loss.detach() for name, loss in losses.items()}

        differentiate("policy", policy_loss)
        differentiate("critic", qf1_loss + qf2_loss)
        step("policy", "critic")
        with torch.no_grad():
            for target, vector in zip(target_vectors, critic_vectors, strict=True):
                target.lerp_(vector, args.tau)
            policy_target_vector.lerp_(vectors["policy"][0], policy_tau)
        return metrics

    if (args.diffusion_steps if args.sampler == "ddpm" else args.sampler_steps) > 20:
        # Its calls of the policy would be unrolled and compiled for minutes. A partial: torch.compile undoes `disable`
        return partial(torch.compiler.disable(update)), optimizers
    return update, optimizers


# ---------------------------------------------------------------------------------------------------------- Evaluation
def make_envs(make_env: Callable[..., gym.Env], args: Args, columns: Columns) -> list[gym.Env]:
    """One environment per evaluation episode, which must fit the data; with --capture-video the first can render."""
    try:
        envs = [make_env() for _ in range(args.eval_episodes)]
    except Exception as error:  # a dependency of the environment is missing
        fail(f"environment of {args.env_id}: {error!r}")
    for key, space in (("observations", envs[0].observation_space), ("actions", envs[0].action_space)):
        if columns[key].shape[1:] != space.shape:
            fail(f"{key} {columns[key].shape[1:]} do not fit {envs[0].unwrapped}'s {space.shape}: is --env-id right?")
    if not isinstance(space, gym.spaces.Box) or (space.low != -1).any() or (space.high != 1).any():
        fail(f"{envs[0].unwrapped}: actions must be a Box from -1 to 1, as the data's; rescale both (RescaleAction)")
    if args.capture_video:
        try:
            envs[0] = make_env(render_mode="rgb_array")
            envs[0].reset()
            envs[0].render()
        except Exception as error:  # every GL backend has its own kind
            fail(f"--capture-video cannot render: {error!r}; without a display try MUJOCO_GL=egl or MUJOCO_GL=osmesa")
    return envs


@torch.no_grad()
def select_actions(
    diffusion: Diffusion, policy: Policy, critic: Critic, s: Tensor, candidates: int, generator: torch.Generator
) -> Tensor:
    """Energy-based action selection: of N actions per state (n, S), one (n, A) with probability ~ exp(min Q)."""
    s = s.repeat_interleave(candidates, dim=0)
    noise = torch.randn(diffusion.draws, len(s), policy.act_dim, generator=generator, device=s.device)
    a = diffusion.sample(policy, s, noise).clamp(-1, 1)
    q = critic.min(s, a).view(-1, candidates)
    choice = torch.multinomial(q.nan_to_num().softmax(dim=1), 1, generator=generator)[:, 0]
    return a.view(len(q), candidates, -1)[torch.arange(len(q), device=s.device), choice]


def evaluate(act: Callable, envs: list[gym.Env], seeds: list[int], stop: list[int]) -> list[dict[str, Any]]:
    """One episode per environment, side by side; act maps observations (n, S) to actions. [] once `stop` fills."""
    obs = [env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=True)]
    rows = [{"episode": i, "seed": seed, "return": 0.0, "length": 0} for i, seed in enumerate(seeds)]
    running = list(range(len(envs)))
    while running:
        if stop:
            return []
        for i, action in zip(list(running), act(np.stack([obs[i] for i in running])), strict=True):
            obs[i], reward, terminated, truncated, info = envs[i].step(action)
            rows[i]["return"] += float(reward)
            rows[i]["length"] += 1
            if "success" in info:  # Adroit, AntMaze: reached at any step
                rows[i]["success"] = int(bool(info["success"]) or rows[i].get("success", 0))
            if terminated or truncated:
                running.remove(i)
    return rows


# ----------------------------------------------------------------------------------------------------------- Run files
def say(*lines: object) -> None:
    """Print; a reader that went away (`| head`) does not end the run."""
    try:
        print(*lines, sep="\n  ", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def load_checkpoint(path: str) -> dict[str, Any]:
    """The checkpoint of a run folder, or that file; exit 2 if there is none."""
    try:
        file = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
        if file.name != "checkpoint.pt":
            raise ValueError("must be a run folder, or the checkpoint.pt in it")
        if damaged := zipfile.ZipFile(file).testzip():  # torch.load does not look
            raise ValueError(f"{damaged} is damaged")
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        if unknown := checkpoint["args"].keys() - vars(Args()).keys():
            raise ValueError(f"of another script or version, with {', '.join(sorted(unknown))}")
        return {**checkpoint, "run_dir": str(file.parent)}
    except Exception as error:  # whatever torch.load raises: this is no checkpoint of ours
        fail(f"--resume {path}: {str(error) or type(error).__name__}")


def describe(args: Args, source: dict[str, str], device: torch.device, saved: dict[str, Any]) -> dict[str, Any]:
    """What args.json holds: arguments and where each came from, versions, device, commit, data file."""
    preset, resumed, arguments = PRESETS.get(args.env_id, {}), saved.get("args", {}), {}
    for field in dataclasses.fields(Args):
        value, expected = getattr(args, field.name), {field.name: field.default, **preset, **resumed}[field.name]
        origin = "checkpoint" if field.name in resumed else "preset" if field.name in preset else "default"
        origin = origin if value == expected else "command line"
        arguments[field.name] = {"value": value, "source": origin}
    about = {name: version(name) for name in ("torch", "gymnasium", "mujoco", "numpy", "h5py")}
    cpu = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", cpu.read_text()) if cpu.exists() else []
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else (*models, platform.machine())[0]
    about |= {"python": platform.python_version(), "device": f"{device}, {hardware}"}
    git, folder = "git describe --always --dirty --abbrev=40", Path(__file__).resolve().parent
    done = subprocess.run(git, shell=True, cwd=folder, capture_output=True, text=True)  # a shell: git may be missing
    return {"args": arguments, **about, "commit": done.stdout.strip() or None, "dataset": source}


class Run:
    """Folder, metrics, checkpoints, progress and signals of one run."""

    def __init__(self, args: Args, source: dict[str, str], device: torch.device, saved: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.exits = ExitStack()  # leaves loggers, terminal, signal handlers and lock as they were
        self.args, self.source, self.device, self.saved = args, source, device, saved
        name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns() // 1_000_000}"  # ms: two in one second
        self.dir = Path(saved["run_dir"]) if saved else Path(args.runs_dir) / re.sub(r"[^\w.-]", "_", name)
        try:
            self.dir.mkdir(parents=True, exist_ok=bool(saved))
        except OSError as error:
            fail(f"the run's folder, of --runs-dir and --exp-name: {error}")
        times = {"train": 0.0, "eval": 0.0, "save": 0.0}
        self.progress = saved.get("progress", {"step": 0, "evaluations": {}, "times": times})
        try:
            self.exits.callback(filelock.FileLock(self.dir / ".lock").acquire(timeout=0).lock.release)
        except filelock.Timeout:
            fail(f"{self.dir} is in use by another process")
        except (OSError, NotImplementedError) as error:  # a file system without locks, a full disk
            print(f"warning: {self.dir} not locked: {error}", file=sys.stderr)
        for path in (self.dir / "metrics.jsonl", self.dir / "evaluations.csv"):
            if path.exists():  # forget what a killed run logged after its checkpoint: it will come again
                rows = re.findall(r"([^\d\n]*(\d*).*\n)", path.read_text())  # whole rows, their first number: the step
                self.replace(path.name, "".join(row for row, step in rows if int(step or 0) <= self.step))
        about = describe(args, source, device, saved)
        before: dict[str, Any] = {}
        with suppress(OSError, ValueError):  # a resume: what the run began with stays in the file
            before = json.loads((self.dir / "args.json").read_text())
        about["resumed_from"], given = before.pop("resumed_from", []), before.pop("args", {})
        changed = {name: value for name, value in before.items() if value != about.get(name)}
        if saved:
            was = {name: given[name]["value"] for name in given.keys() & vars(args).keys() - {"resume"}}
            was = {name: value for name, value in sorted(was.items()) if value != getattr(args, name)}
            about["resumed_from"].append({"step": self.step, **changed, "args": was})
        if changed:
            print(f"warning: the run began with {changed}; see {self.dir}/args.json", file=sys.stderr)
        self.replace("args.json", json.dumps(about, indent=1) + "\n")
        arguments = (f"{name} = {entry['value']} ({entry['source']})" for name, entry in about["args"].items())
        say(self.dir, *arguments)
        if args.track:
            import wandb

            self.exits.callback(wandb.finish)
            names = {"project": args.wandb_project, "entity": args.wandb_entity, "group": args.wandb_group}
            options: dict[str, Any] = {**names, "mode": args.wandb_mode, "config": vars(args), "dir": str(self.dir)}
            try:
                wandb.init(**options, id=self.dir.name, resume="allow", sync_tensorboard=True)
            except Exception as error:  # the run folder has everything too
                print(f"warning: not logged to Weights & Biases: {error}", file=sys.stderr)
        self.writer: Any = None
        self.open_writer = partial(SummaryWriter, str(self.dir), purge_step=self.step + 1)
        self.exits.callback(self.close_writer)
        self.bar = tqdm(total=args.num_updates, initial=self.step, disable=not sys.stderr.isatty(), unit="update")
        self.exits.callback(self.bar.close)
        self.stop: list[int] = []  # signals that came
        self.nothing_to_save = False  # a signal need not wait for the loop
        for n in (signal.SIGINT, signal.SIGTERM):
            self.exits.callback(signal.signal, n, signal.signal(n, self.on_signal))
        self.clock, self.lap_start = time.time(), (self.step, self.progress["times"]["train"])

    @property
    def step(self) -> int:
        return self.progress["step"]

    def on_signal(self, signum: int, frame: Any) -> None:
        """Let the loop save and end; the same signal again ends the process at once."""
        self.stop.append(signum)
        signal.signal(signum, signal.SIG_DFL)
        if self.nothing_to_save:
            self.leave()

    def leave(self) -> NoReturn:
        """End because of a signal, with the checkpoint as it is."""
        self.exits.close()
        hint = f"; go on with --resume {self.dir}" if (self.dir / "checkpoint.pt").exists() else ""
        print(f"stopped at update {self.step}{hint}", file=sys.stderr)
        raise SystemExit(128 + self.stop[0])

    def lap(self, name: str) -> None:
        """Book the time since the last call under `name`."""
        now, times = time.time(), self.progress["times"]
        times[name] = times.get(name, 0.0) + now - self.clock
        self.clock = now

    @contextmanager
    def tolerate(self, what: str) -> Iterator[None]:
        """A full disk costs a row or a checkpoint, not the run."""
        try:
            yield
        except (OSError, RuntimeError) as error:  # torch.save tells of a full disk by a RuntimeError
            print(f"warning: {what} not written at update {self.step}: {error}", file=sys.stderr)

    def append(self, name: str, text: str) -> None:
        """Add whole rows or none."""
        with self.tolerate(name), open(self.dir / name, "ab", buffering=0) as file:
            end, data = file.tell(), text.encode()
            if (file.write(data) or 0) < len(data):
                file.truncate(end)
                raise OSError("no space left")

    def replace(self, name: str, text: str) -> None:
        """Write beside, then replace: a kill or a full disk leaves the file that was there."""
        temporary = self.dir / f"{name}.tmp"
        with self.tolerate(name):
            temporary.write_text(text)
            os.replace(temporary, self.dir / name)
        temporary.unlink(missing_ok=True)

    def close_writer(self) -> None:
        with self.tolerate("TensorBoard events"):
            if self.writer:
                self.writer.close()

    def write(self, values: dict[str, float]) -> None:
        """A row to metrics.jsonl, TensorBoard and a plain line; wandb reads TensorBoard's."""
        row = {"step": self.step, "time": round(sum(self.progress["times"].values()), 2), **values}
        self.append("metrics.jsonl", json.dumps(row) + "\n")
        with self.tolerate("TensorBoard events"):  # its writer does not survive a failure: then the next row opens one
            writer, self.writer = self.writer or self.open_writer(), None
            for name, value in values.items():
                writer.add_scalar(name, value, self.step)
            self.writer, self.open_writer = writer, partial(self.open_writer, purge_step=None)
        if self.bar.disable:
            charts = ", ".join(f"{name[7:]} {value:.1f}" for name, value in values.items() if "charts/" in name)
            say(f"update {self.step}/{self.args.num_updates}: {charts}")

    def log(self, metrics: dict[str, Tensor]) -> None:
        """Log the last update; exit 3 if a value is not finite, with the last checkpoint as it was."""
        values = {name: float(tensor) for name, tensor in metrics.items()}
        self.lap("train")
        train = self.progress["times"]["train"]
        values["charts/SPS"] = (self.step - self.lap_start[0]) / max(train - self.lap_start[1], 1e-9)
        values["charts/minutes_left"] = (self.args.num_updates - self.step) / values["charts/SPS"] / 60
        self.lap_start = (self.step, train)
        self.write(values)
        if diverged := [name for name, value in values.items() if not math.isfinite(value)]:
            self.replace("diagnostics.json", json.dumps({"step": self.step, **values}, indent=1) + "\n")
            print(f"diverged at update {self.step}: {', '.join(diverged)} not finite, see {self.dir}", file=sys.stderr)
            self.exits.close()
            raise SystemExit(3)

    def log_evaluation(self, episodes: list[dict[str, Any]], reference: tuple[float, float] | None) -> None:
        """A row per episode to evaluations.csv, the means to the metrics."""
        columns = ("step", "episode", "seed", "return", "length", "normalized_score", "success")
        for row in episodes:
            row["step"] = self.step
            if reference:
                row["normalized_score"] = 100 * (row["return"] - reference[0]) / (reference[1] - reference[0])
        table = csv.DictWriter(text := io.StringIO(), columns, lineterminator="\n")
        path = self.dir / "evaluations.csv"
        if not (path.exists() and path.stat().st_size):
            table.writeheader()
        table.writerows(episodes)
        self.append("evaluations.csv", text.getvalue())
        names = {"return": "episodic_return", "length": "episodic_length", "normalized_score": "normalized_score"}
        mean = {key: float(np.mean([row[key] for row in episodes])) for key in names if key in episodes[0]}
        self.lap("eval")
        self.write({f"charts/{names[key]}": value for key, value in mean.items()})
        self.bar.set_postfix_str(f"return {mean['return']:.0f}")
        self.progress["evaluations"][self.step] = mean

    def save(self, state: dict[str, Any], transform: Transform) -> None:
        """Write beside, flush, replace: a kill or a full disk leaves the checkpoint that was there."""
        self.lap("train")
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type != "cpu":
            rng[self.device.type] = torch.get_device_module(self.device).get_rng_state(self.device)
        about: dict[str, Any] = {"args": vars(self.args), "dataset": self.source, "rng": rng}
        about |= {"transform": list(map(torch.as_tensor, transform))}
        parts = {name: part.state_dict() for name, part in state.items()}
        temporary = self.dir / "checkpoint.tmp"
        with self.tolerate("checkpoint"):
            with open(temporary, "wb") as file:
                torch.save({**parts, **about, "progress": self.progress}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.dir / "checkpoint.pt")
        temporary.unlink(missing_ok=True)
        self.lap("save")

    def restore(self, state: dict[str, Any]) -> None:
        """Networks, optimisers and random generators as the checkpoint has them."""
        try:
            for name, part in state.items():
                groups = self.saved[name].get("param_groups", [])
                for group, own in zip(groups, getattr(part, "param_groups", []), strict=True):
                    group.update(fused=own["fused"], capturable=own["capturable"])  # of this device
                part.load_state_dict(self.saved[name])
        except (KeyError, RuntimeError, ValueError) as error:  # of a script whose networks were changed
            fail(f"--resume {self.dir}: the checkpoint does not fit: {error}")
        torch.set_rng_state(self.saved["rng"]["cpu"])
        if self.device.type != "cpu" and (rng := self.saved["rng"].get(self.device.type)) is not None:
            torch.get_device_module(self.device).set_rng_state(rng, self.device)

    def finish(self) -> dict[str, Any]:
        """Write and return the result: last, mean of the last ten (the paper's RAT) and best (its OMS) evaluation."""
        times = self.progress["times"]
        result = {"updates": self.step, "updates_per_second": self.step / times["train"], "run_dir": str(self.dir)}
        for name in ("return", "normalized_score"):
            v = [mean[name] for mean in self.progress["evaluations"].values() if name in mean]
            result[name] = {"last": v[-1], "mean_of_last_10": float(np.mean(v[-10:])), "best": max(v)} if v else None
        result |= {"wall_time": sum(times.values()), "evaluation_time": times["eval"]}
        self.replace("result.json", json.dumps(result, indent=1) + "\n")
        self.exits.close()
        say(json.dumps(result, indent=1))
        return result


# ---------------------------------------------------------------------------------------------------------------- main
def set_up(args: Args) -> torch.device:
    """Login, device, threads and seed, before any data is loaded; exit 2 where one cannot be had."""
    if args.track and args.wandb_mode == "online":
        import wandb

        try:
            problem = "" if wandb.login(prompt=False) else "no key"
        except Exception as error:  # a key that is malformed or refused, no network
            problem = str(error)
        if problem:
            fail(f"--track: {problem}; `wandb login`, set WANDB_API_KEY, or --wandb-mode offline")
    try:
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.zeros(1, device=auto if args.device == "auto" else args.device).device
        torch.Generator(device)
    except Exception as error:  # every backend has its own kind
        fail(f"--device {args.device}: {(str(error) or repr(error)).splitlines()[0]}")
    torch.set_num_threads(args.num_threads)
    torch.set_float32_matmul_precision(args.matmul_precision)
    if args.matmul_precision == "medium" and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        print("warning: --matmul-precision medium is slow on this processor: it has no bfloat16", file=sys.stderr)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if sys.platform == "linux":  # keep freed activations: glibc gives them back, and each update faults them in anew
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(option, 32 << 20)
    with suppress(Exception):  # else MuJoCo writes a MUJOCO_LOG.TXT into the working directory
        import mujoco

        mujoco.set_mju_user_warning(lambda text: warnings.warn(f"MuJoCo: {text.split(' Time')[0]}", stacklevel=2))
    torch.manual_seed(args.seed)
    return device


def main(args: Args) -> dict[str, Any]:
    """Train and evaluate; returns what result.json holds."""
    check_args(args)
    device = set_up(args)

    # Data and environments
    saved = load_checkpoint(args.resume) if args.resume is not None else {}
    columns, make_env, reference, source = load_task(args)
    if saved and saved["dataset"].get("sha256") != source.get("sha256"):
        fail(f"{source['file']} is not the data that the resumed run was trained on")
    if saved and saved["progress"]["step"] > args.num_updates:
        fail(f"--num-updates {args.num_updates}: the run is at update {saved['progress']['step']} already")
    transitions, transform = make_transitions(columns, args)
    if not len(transitions):
        fail(f"{source['file']} holds no transition: D4RL's rule drops timeout rows and the last one")
    data = torch.as_tensor(transitions, device=device)
    obs_dim, act_dim = columns["observations"].shape[1], columns["actions"].shape[1]
    envs = make_envs(make_env, args, columns) if make_env else []
    del columns, transitions
    run = Run(args, source, device, saved)
    say(f"{len(data)} transitions of {source['file']} on {device}")
    if not envs:
        say(f"no environment is known for {args.env_id}: training without evaluation")
    elif args.capture_video:
        prefix = f"from-update-{run.step}"  # not over older ones
        envs[0] = gym.wrappers.RecordVideo(envs[0], str(run.dir / "videos"), lambda _: True, name_prefix=prefix)
    for env in envs:
        run.exits.callback(env.close)  # which writes the last video

    # Networks, optimisers, update
    K, sampler, steps, order = args.diffusion_steps, args.sampler, args.sampler_steps, args.solver_order
    diffusion = Diffusion(K, sampler, steps, order, device, args.beta_schedule)
    networks = make_networks(obs_dim, act_dim, device)
    update, optimizers = make_update(args, diffusion, networks)
    update = accelerate(args, update, networks.values(), device)
    state = networks | {f"{name}_optimizer": optimizer for name, optimizer in optimizers.items()}
    if saved:
        run.restore(state)

    generator = torch.Generator(device)  # training has its own

    def act(obs: np.ndarray) -> np.ndarray:
        s = torch.as_tensor(transform.obs(obs), dtype=torch.float32, device=device)
        a = select_actions(diffusion, networks["policy"], networks["critic"], s, args.eval_candidates, generator)
        return a.cpu().numpy()

    def draw_and_update(**scheduled: Tensor) -> dict[str, Tensor]:
        index = torch.randint(len(data), (args.batch_size,), device=device)
        s, a, next_s, r, mask = data[index].split([obs_dim, act_dim, obs_dim, 1, 1], dim=1)
        chance = draw(args, diffusion, act_dim, device)
        return update(s=s, a=a, next_s=next_s, r=r[:, 0], mask=mask[:, 0], **chance, **scheduled)

    # Loop
    train = capture(args, draw_and_update, device)
    metrics: dict[str, Tensor] = {}
    while True:
        step, last = run.step, run.step >= args.num_updates
        listed = any(step % n == 0 for n in (args.log_every, args.eval_every, args.save_every))
        if metrics and (run.stop or last or listed):
            parameters = [p for network in networks.values() for p in network.parameters()]
            run.log(metrics | {"losses/parameter_norm": nn.utils.get_total_norm(parameters)})
        episodes: list[dict[str, Any]] = []
        if envs and step > 0 and (last or step % args.eval_every == 0) and step not in run.progress["evaluations"]:
            generator.manual_seed(args.seed + 1_000_003 * step)
            seeds = np.random.default_rng([args.seed, step]).integers(2**31, size=len(envs)).tolist()
            if episodes := evaluate(act, envs, seeds, run.stop):
                run.log_evaluation(episodes, reference)
        if episodes or (metrics and (run.stop or last or step % args.save_every == 0)):
            run.save(state, transform)
        if run.stop:
            run.leave()
        if last:
            return run.finish()

        run.nothing_to_save = not metrics  # the first update, which may compile for long
        metrics = train(**schedule(args, step, device))
        run.nothing_to_save = False
        run.progress["step"] += 1
        run.bar.update()


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # until the run has its own
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    main(parse_args())

# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = [
#     "torch==2.13.0", "numpy==2.2.6", "gymnasium[mujoco]==1.4.0", "mujoco==3.17.0", "h5py==3.16.0", "pooch==1.9.0",
#     "tyro==1.0.17", "tqdm==4.70.1", "tensorboard==2.21.0", "wandb==0.31.0", "moviepy==2.2.1",
#     "filelock==3.32.7",
# ]
# ///
"""EDIS: energy-guided diffusion sampling for offline-to-online reinforcement learning, on SAC.

Liu et al., Energy-Guided Diffusion Sampling for Offline-to-Online RL, ICML 2024, arXiv 2407.12448. SAC is pre-trained
offline with CQL or Cal-QL; online, a diffusion model of transitions, steered by three energies to the states, actions
and dynamics of now, makes synthetic transitions that are mixed into the batches.

    diffusion          p_theta(x), x = (s, a, s'); Karras et al., 2022, arXiv 2206.00364            Denoiser, edm_loss
    energies           q ~ p_theta exp(-E1(s) - E2(a|s) - E3(s'|s, a)), e^E = nu / mu               Energies, info_nce
    guided sampling    dx / dsigma = (x - D(x)) / sigma + sigma sum lambda_i grad E_i               EDM.sample, guidance
    state energy       mu: states of the most recent transitions; nu: of unguided samples           energy_losses
    policy energy      mu: actions of the policy; nu: of unguided samples                           energy_losses
    transition energy  mu: next states of the environment; nu: of unguided samples                  energy_losses
    SAC, CQL, Cal-QL   Haarnoja 2018; Kumar 2020, arXiv 2006.04779; Nakamoto 2023, arXiv 2303.05479 Losses

Where the noise n of level sigma is in s, a and s' alike, the sampler needs grad log (p_sigma / q_sigma) of the noised
x = (s, a, s'). It splits by the chain rule of probability, at every sigma, into

    E1(s)       = log p_sigma(s) / q_sigma(s)
    E2(a|s)     = log p_sigma(s, a) / q_sigma(s, a) - E1(s)
    E3(s'|s, a) = log p_sigma(s, a, s') / q_sigma(s, a, s') - E1(s) - E2(a|s)

and so InfoNCE trains them: E1 by states, E1 + E2 by pairs with E1 held fixed, and E3 on top of an energy of the recent
pairs (`behavior`), as the policy's new actions have no s' yet. The negatives of each positive are noised transitions
that the unguided sampler went through. As sigma -> 0, E2 is log p(a|s) / pi(a|s) and E3 log p(s'|s, a) / T(s'|s, a), as
in the paper. Above, negatives of the positive's own clean s, a ~ p_theta(a | s), are not enough: a noised s and a leave
open which s they were of, which such negatives have guessed by the recent states, where the sampler needs p_theta's.
`--conditional-negatives inpainted` takes them all the same: the paper's form, exact as sigma -> 0 only.
For the same reason E3 is exact there only as far as the policy is that of the recent transitions, and with an energy
switched off or scaled, the others are not the ratios of what is left: q ~ p_theta exp(-E2 - E3) only as sigma -> 0.

Deviations:           paper                       published code (liuxhym/EDIS)       here
    negatives of E2   of the same s               a vector with zeros, of other       of the unguided sampler: pairs
    and E3            (and a)                     positives                           (a flag: inpainted, as the paper)
    factor sigma      -                           missing                             as derived
    energies' levels  every t                     one (state), two of another         all, the sampler's and those
                                                  schedule (others)                   between
    network of E3     -                           an MLP                              an MLP and the residual of s'
    scales lambda_i   -                           per data set, 0.01 to 2             1, as derived
    guidance clip     -                           10 sqrt(D) of the gradient          of sigma times the gradient
    s' in x           s'                          s'                                  s' - s: errors of a step's size
    reward            known or learned            diffused                            learned, as is termination
    positives         recent transitions          the whole online buffer             the last --positive-buffer
    denoiser's data   offline and online          all alike                           the same; bundled: half recent
    grad of an energy -                           -                                   moves its condition too (flag)
    synthetic mask    -                           1                                   probability of going on
    each round        -                           denoiser anew, 20 energy updates    denoiser goes on, 2000 updates
    first round       -                           at the start                        after 1000 steps, until then
                                                                                      real offline data stand in
    CQL               -                           alpha by a Lagrange multiplier      fixed alpha, online too
    entropy in target -                           none                                none; SAC's where cql_alpha is 0
    critics           -                           2 hidden layers (MuJoCo)            3, as in the other scripts
    activations       -                           ReLU                                Mish, as in the other scripts
"""

import copy
import csv
import ctypes
import dataclasses
import difflib
import hashlib
import io
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
    """EDIS: SAC, offline then online, with energy-guided synthetic transitions."""

    # experiment
    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run folder's name
    seed: int = 0  # seed of networks, batches, noise and evaluation
    device: str = "auto"  # auto (cuda if there is one, else cpu), cpu, cuda, cuda:1, mps, ...
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
    env_id: str = "hopper-medium-mini"  # bundled, D4RL or Minari id; with --dataset-path any Gymnasium id
    dataset_path: str | None = None  # HDF5 file in D4RL's layout to train on instead of the id's own data
    reward_transform: Literal["none", "return-range", "minus-one", "times-four", "min-max"] = "none"
    """none; r * 1000 / (max - min episode return); r - 1 or 4 (r - 0.5) (AntMaze); r to [-1, 1] (Adroit, kitchen)"""
    observation_transform: Literal["none", "scalar", "per-dimension"] = "none"
    """none; by one mean and standard deviation over all dimensions; by one per dimension"""
    # evaluation
    eval_every: int = 10_000  # updates between two evaluations
    eval_episodes: int = 10  # episodes per evaluation, all run side by side
    capture_video: bool = False  # record each evaluation's first episode to RUN/videos (set MUJOCO_GL if headless)
    # agent
    offline_updates: int = 300_000  # updates before the first step in the environment
    online_steps: int = 200_000  # steps in the environment, one update each
    batch_size: int = 256  # transitions per update
    actor_lr: float = 1e-4  # Adam's learning rate, policy and temperature
    critic_lr: float = 3e-4  # Adam's learning rate, critics
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # rate of the target networks
    cql_alpha: float = 5.0  # coefficient of the CQL penalty offline; 0: plain SAC
    cql_alpha_online: float = 5.0  # coefficient of the CQL penalty online
    cql_actions: int = 10  # actions per state of each of the penalty's three samples
    calibrate: bool = True  # Cal-QL: the penalty stops at the data's Monte-Carlo return
    # synthetic data
    augmentation: Literal["edis", "synther", "offline", "none"] = "edis"
    """synthetic data with energies; without (SynthER); real offline data, as RLPD; online data only"""
    synthetic_ratio: float = 0.2  # share of the augmentation in an online batch
    round_every: int = 10_000  # online steps between two rounds of training denoiser, models, energies and generating
    first_round: int = 1_000  # online steps before the first round
    samples: int = 100_000  # synthetic transitions per round, which replace the last round's
    chunk: int = 10_000  # of them at once: bounds the memory
    denoiser_updates: int = 10_000  # updates of the denoiser per round
    denoiser_batch: int = 256  # transitions per update of the denoiser
    denoiser_recent: float = 0.0  # share of them from the positive buffer; exp(-E1) is then at most its inverse
    denoiser_width: int = 1_024  # width of the residual network
    denoiser_layers: int = 6  # its residual blocks
    denoiser_lr: float = 3e-4  # AdamW's learning rate, falling to 0 by a cosine in each round
    denoiser_ema: float = 0.999  # decay of the averaged weights that sample
    sampling_steps: int = 128  # noise levels of the sampler
    sigma_min: float = 0.002  # lowest noise level, in deviations of x
    sigma_max: float = 80.0  # highest noise level
    churn: float = 80.0  # S_churn, noise added while sampling
    model_updates: int = 5_000  # updates of reward, termination and mean dynamics per round (--batch-size)
    energy_updates: int = 2_000  # updates of the energies per round
    energy_batch: int = 256  # positives per update of the energies
    energy_width: int = 256  # width of the three hidden layers of energies and mean dynamics
    energy_lr: float = 1e-3  # Adam's learning rate, energies and models, falling to 0 by a cosine in each round
    negatives: int = 10  # negatives of each positive
    conditional_negatives: Literal["joint", "inpainted"] = "joint"
    """of E2 and E3: noised samples of p(s, a, s') (see the header); the paper's, a of p(a|s) and s' of p(s'|s, a)"""
    inpainting_repeats: int = 10  # times that each level of noise is gone through for inpainted negatives
    positive_buffer: int = 10_000  # most recent transitions that the energies' positives come from
    pool: int = 10_000  # unguided samples that negatives come from; inpainted, of pool / negatives conditions
    state_energy: bool = True  # use E1, of states
    policy_energy: bool = True  # use E2, of actions given states
    transition_energy: bool = True  # use E3, of next states given both
    state_scale: float = 1.0  # lambda_1, how strongly E1 guides
    policy_scale: float = 1.0  # lambda_2, how strongly E2 guides
    transition_scale: float = 1.0  # lambda_3, how strongly E3 guides
    full_gradient: bool = True  # let E2 and E3 move their conditions too; off: only a, only s'
    guidance_clip: float = 10.0  # bound of the norm of sigma sum lambda_i grad E_i, in units of sqrt(dim x)
    # speed
    num_threads: int = 1  # CPU threads; a second one pays only on an otherwise idle machine
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the update, on cuda in a graph, and of sampling too; auto: cuda, or 10 000 updates on a CPU"""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """of products: high for TF32, medium for bfloat16 between hidden layers, slow where the processor has none"""

    @property
    def num_updates(self) -> int:
        """Updates in all."""
        return self.offline_updates + self.online_steps


# ------------------------------------------------------------------------------------------------------------- PRESETS
# Command line > preset > default. The defaults, for D4RL's ids, are the published code's sizes but for what the table
# above names; its scales belong to other energies.
# Small sets: found on Hopper, for half an hour on a CPU. CQL: in so few updates Q stays below the data's returns, where
# Cal-QL leaves the policy's actions alone; without a penalty online Q outgrows what can be reached. At a gamma of 0.99
# the medium policy, which falls after some 340 steps, is worth as much as the expert. The first 1000 online transitions
# are 1 % of the data: guided there, a denoiser that sees all alike errs more in s'. Of the noises that it trains on,
# 1 of 250 is outside the levels' range. Episodes of one evaluation hardly differ, evaluations do: many of few episodes.
MINI = {
    "observation_transform": "per-dimension", "offline_updates": 4_000, "online_steps": 10_000, "actor_lr": 3e-4,
    "gamma": 0.997, "tau": 0.05, "cql_alpha": 10.0, "cql_alpha_online": 10.0, "cql_actions": 1, "calibrate": False,
    "synthetic_ratio": 0.5, "round_every": 3_000, "samples": 10_000, "sampling_steps": 20, "sigma_min": 0.01,
    "sigma_max": 10.0, "denoiser_recent": 0.5, "denoiser_width": 256, "denoiser_layers": 3, "denoiser_lr": 1e-3,
    "model_updates": 5_000, "energy_width": 128, "energy_batch": 128, "pool": 5_000, "eval_every": 250,
    "eval_episodes": 5, "log_every": 250, "save_every": 5_000,
}  # fmt: skip

# What --resume lets change: nothing that alters an update by more than rounding; another device draws other numbers
RESUMABLE = {
    "resume", "online_steps", "device", "log_every", "save_every", "runs_dir", "track", "wandb_project", "wandb_entity",
    "wandb_group", "wandb_mode", "dataset_path", "eval_every", "eval_episodes", "capture_video", "num_threads",
    "compile", "matmul_precision",
}  # fmt: skip
# And before the first online step, so that several runs can go on from one pre-trained agent
ONLINE = {
    "exp_name", "cql_alpha_online", "augmentation", "synthetic_ratio", "round_every", "first_round", "samples", "chunk",
    "denoiser_updates", "denoiser_batch", "denoiser_recent", "denoiser_lr", "denoiser_ema", "sampling_steps",
    "sigma_min", "sigma_max", "churn", "model_updates", "energy_updates", "energy_batch", "energy_lr", "negatives",
    "conditional_negatives", "inpainting_repeats", "positive_buffer", "pool", "state_energy", "policy_energy",
    "transition_energy", "state_scale", "policy_scale", "transition_scale", "full_gradient", "guidance_clip",
}  # fmt: skip


def fail(message: object) -> NoReturn:
    """Bad arguments or data: one line on stderr, exit code 2."""
    print(f"{Path(__file__).name}: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def parse_args(argv: list[str] | None = None) -> Args:
    """Command line > checkpoint (with --resume) > preset > default."""
    argv = sys.argv[1:] if argv is None else argv
    given = tyro.cli(Args, args=[flag for flag in argv if flag not in ("-h", "--help")])
    checkpoint = load_checkpoint(given.resume) if given.resume is not None else {"args": {}, "progress": {"step": 0}}
    saved, online = checkpoint["args"], checkpoint["progress"]["step"] > checkpoint["args"].get("offline_updates", 0)
    defaults = {**PRESETS.get(given.env_id, {}), "env_id": given.env_id, **saved, "resume": given.resume}
    args = tyro.cli(Args, args=argv, default=Args(**defaults))
    for name in saved.keys() - (RESUMABLE if online else RESUMABLE | ONLINE):
        if getattr(args, name) != saved[name]:
            fail(f"--{name.replace('_', '-')} cannot change on resume (the run has {saved[name]})")
    return args


def check_args(args: Args) -> None:
    """Refuse values that cannot work, naming the argument."""
    sizes = ("batch_size", "denoiser_batch", "energy_batch", "chunk", "pool")
    bounds: dict[str, Any] = dict.fromkeys(sizes, (1, 1e7)) | {"online_steps": (0, 1e8)}
    bounds |= dict.fromkeys(("log_every", "save_every", "eval_every", "round_every"), (1, 1e12))
    counts = ("eval_episodes", "num_threads", "cql_actions", "denoiser_layers", "inpainting_repeats")
    bounds |= dict.fromkeys(counts, (1, 1e3))
    bounds |= dict.fromkeys(("denoiser_width", "energy_width", "negatives"), (1, 1e4))
    bounds |= dict.fromkeys(("offline_updates", "denoiser_updates", "model_updates", "energy_updates"), (0, 1e12))
    bounds |= dict.fromkeys(("actor_lr", "critic_lr", "denoiser_lr", "energy_lr"), (1e-12, math.inf))
    bounds |= {"sigma_max": (1e-2, 1e4), "sigma_min": (1e-5, args.sigma_max)}
    free = ["cql_alpha", "cql_alpha_online", "churn", "state_scale", "policy_scale", "transition_scale"]
    bounds |= dict.fromkeys((*free, "guidance_clip"), (0, math.inf))
    bounds |= dict.fromkeys(("gamma", "tau", "synthetic_ratio", "denoiser_recent", "denoiser_ema"), (0, 1))
    bounds |= {"sampling_steps": (2, 1e4), "seed": (0, 2**32)}
    bounds |= {"samples": (2, 1e7), "positive_buffer": (2, 1e7), "first_round": (2, 1e12)}  # that distances exist
    for name, (low, high) in bounds.items():
        if not (low <= getattr(args, name) <= high) or math.isinf(getattr(args, name)):
            fail(f"--{name.replace('_', '-')} must lie between {low:g} and {high:g}, got {getattr(args, name)}")
    if not args.num_updates:
        fail("--offline-updates and --online-steps are both 0")
    if args.conditional_negatives == "inpainted" and args.full_gradient:
        fail("--conditional-negatives inpainted leaves E2 and E3 free up to their conditions: add --no-full-gradient")
    if args.conditional_negatives == "inpainted" and args.pool < args.negatives:
        fail(f"--pool must hold the {args.negatives} --negatives of one condition, got {args.pool}")


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
PRESETS = dict.fromkeys(MINI_IDS, MINI)
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


class Actor(nn.Module):
    """Tanh-Gaussian policy: states (B, S), standard normal noise (..., B, A) -> actions, log pi(a|s) (..., B)."""

    def __init__(self, obs_dim: int, act_dim: int) -> None:
        super().__init__()
        self.net = MLP(obs_dim, 2 * act_dim)

    def distribution(self, s: Tensor) -> torch.distributions.Normal:
        """Of u, where a = tanh(u)."""
        mean, log_std = self.net(s).chunk(2, dim=-1)
        return torch.distributions.Normal(mean, log_std.clamp(-5, 2).exp(), validate_args=False)  # SAC's own code: -20

    def forward(self, s: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
        normal = self.distribution(s)
        u = normal.mean + normal.stddev * epsilon
        log_slope = 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))  # log(1 - tanh(u)^2)
        return u.tanh(), (normal.log_prob(u) - log_slope).sum(-1)

    def mode(self, s: Tensor) -> Tensor:
        return self.distribution(s).mean.tanh()


class Denoiser(nn.Module):
    """D_theta(x; sigma) of Karras et al.: x = (s, a, s') (B, D), normalised and noised, sigma (B,) or () -> (B, D)."""

    def __init__(self, dim: int, width: int, layers: int) -> None:
        super().__init__()
        self.first = nn.Linear(dim + 16, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.SiLU(), Linear(width, width)) for _ in range(layers)
        )
        self.last = nn.Linear(width, dim)
        self.frequencies = nn.Buffer(math.pi * 2.0 ** torch.arange(-2, 6), persistent=False)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma.expand(len(x))[:, None]
        total = sigma.square() + 1  # sigma_data = 1: x is normalised
        c_skip, c_out, c_in, c_noise = 1 / total, sigma / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4
        angles = c_noise * self.frequencies
        h = self.first(torch.cat([c_in * x, angles.cos(), angles.sin()], dim=1))
        for block in self.blocks:
            h = h + block(h)
        return c_skip * x + c_out * self.last(h)


class Energies(nn.Module):
    """E1(s), E2(a|s), E3(s'|s, a) of noised x = (s, a, s') at sigma, and what E3 stands on.

    E3 sees the residual of s' from its learned mean, each dimension with a precision of its own: errors of a denoiser
    that has learned the dynamics are too small for a plain network to find. T is deterministic, and log p / T without
    bound: what is learned counts errors below a floor of 0.03 less, and those beyond five times the noise ever less.
    """

    def __init__(self, obs_dim: int, act_dim: int, width: int) -> None:
        super().__init__()
        self.ends = (obs_dim, obs_dim + act_dim, 2 * obs_dim + act_dim)  # of s, a, s' in x
        hidden, outputs = (width,) * 3, (1, 1, 1 + obs_dim)
        self.nets = nn.ModuleList(MLP(end + 1, n, hidden) for end, n in zip(self.ends, outputs, strict=True))
        self.behavior = MLP(self.ends[1] + 1, 1, hidden)  # log p_sigma / q_sigma of pairs (s, a) that were acted
        self.dynamics = MLP(self.ends[1], obs_dim, hidden)  # E[s' | s, a] as x has it, without noise

    def energy(self, net: nn.Module, x: Tensor, sigma: Tensor) -> Tensor:
        """The net's energy (...) of x (..., end) at sigma (...)."""
        scaled = x / (sigma.square() + 1).sqrt()[..., None]
        out = net(torch.cat([scaled, sigma.log()[..., None] / 4], dim=-1))
        if net is not self.nets[2]:
            return out[..., 0]
        SA = self.ends[1]
        residual = x[..., SA:] - self.dynamics(scaled[..., :SA])
        squared = residual.square() / (sigma.square() + 1e-3)[..., None]  # 1e-3: the mean's own error
        return out[..., 0] + (nn.functional.softplus(out[..., 1:]) * squared / (1 + squared / 25)).sum(-1)

    @torch.enable_grad()
    def forward(self, x: Tensor, sigma: Tensor, scales: tuple[float, ...], full: bool) -> Tensor:
        """sum lambda_i grad E_i (B, D) at x (B, D), sigma (); each on its own block, s, a or s', unless `full`."""
        x = x.detach().requires_grad_()
        total, start = torch.zeros((), device=x.device), 0
        for net, end, scale in zip(self.nets, self.ends, scales, strict=True):
            if scale:
                given = x[:, :start] if full else x[:, :start].detach()
                seen = torch.cat([given, x[:, start:end]], dim=1)
                total = total + scale * self.energy(net, seen, sigma.expand(len(x))).sum()
            start = end
        return torch.autograd.grad(total, x)[0]


# ----------------------------------------------------------------------------------------------------------- Diffusion
Guidance = Callable[[Tensor, Tensor], Tensor]  # x (B, D), sigma () -> sum lambda_i grad E_i (B, D)


class EDM:
    """Noise levels and stochastic Heun sampler of Karras et al., Algorithm 2, with guidance."""

    def __init__(self, steps: int, churn: float, device: torch.device, low: float, high: float) -> None:
        rho = 7
        sigma = (np.linspace(high ** (1 / rho), low ** (1 / rho), steps)) ** rho
        gamma = np.where((sigma >= 0.05) & (sigma <= 50), min(churn / steps, math.sqrt(2) - 1), 0)
        self.sigma = torch.as_tensor(np.append(sigma, 0), dtype=torch.float32, device=device)
        self.sigma_hat = torch.as_tensor(sigma * (1 + gamma), dtype=torch.float32, device=device)  # after churning

    @torch.no_grad()
    def sample(
        self, denoise: Callable[..., Tensor], x: Tensor, guidance: Guidance | None = None,
        visit: Callable[[int, Tensor], None] | None = None, held: Tensor | None = None, repeats: int = 1,
    ) -> Tensor:  # fmt: skip
        """Standard normal x (B, D) -> samples (B, D); `visit` is shown the noised x at each sigma.

        Inpainting: the first dimensions are `held` (B, H), noised anew at each sigma. The others then follow
        p(rest | held) as far as each sigma is gone through often enough (RePaint, Lugmayr et al. 2022, arXiv
        2201.09865); after one pass they are far too near to what they are without a condition.
        """

        def derivative(x: Tensor, sigma: Tensor) -> Tensor:  # dx / dsigma
            d = (x - denoise(x, sigma)) / sigma
            return d if guidance is None else d + sigma * guidance(x, sigma)

        x = x * self.sigma[0]
        for i, sigma_hat in enumerate(self.sigma_hat):
            sigma, sigma_next = self.sigma[i], self.sigma[i + 1]
            added = (sigma_hat.square() - sigma.square()).clamp(min=0).sqrt()
            for repeat in range(repeats):
                if repeat:  # back from sigma_next
                    x = x + (sigma.square() - sigma_next.square()).sqrt() * torch.randn_like(x)
                if held is not None:
                    x = torch.cat([held + sigma * torch.randn_like(held), x[:, held.shape[1] :]], dim=1)
                if visit is not None:
                    visit(i, x)
                x = x + 1.003 * added * torch.randn_like(x)  # S_noise
                d = derivative(x, sigma_hat)
                x_next = x + (sigma_next - sigma_hat) * d
                if i + 1 < len(self.sigma_hat):  # Heun's correction, but for the step to sigma = 0
                    x_next = x + (sigma_next - sigma_hat) * (d + derivative(x_next, sigma_next)) / 2
                x = x_next
        return x


def make_guidance(energies: Energies, scales: tuple[float, ...], full: bool, clip: float) -> Guidance:
    """sum lambda_i grad E_i (B, D) in normalised coordinates; sigma times its norm is at most clip sqrt(D)."""

    def guidance(x: Tensor, sigma: Tensor) -> Tensor:
        gradient = energies(x, sigma, scales, full)
        bound = clip * math.sqrt(x.shape[1]) / sigma
        return gradient * (bound / gradient.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1)

    return guidance


# -------------------------------------------------------------------------------------------------------------- Losses
def critic_losses(q1: Tensor, q2: Tensor, r: Tensor, mask: Tensor, next_v: Tensor, gamma: float) -> list[Tensor]:
    """Mean squared error of each critic against r + gamma mask V(s'), all (B,)."""
    target = r + gamma * mask * next_v
    return [(q - target).square().mean() for q in (q1, q2)]


def cql_penalty(q: Tensor, log_density: Tensor, q_data: Tensor) -> Tensor:
    """CQL(H): log of the importance-sampled mean of exp Q over M actions, (M, B), above Q of the data, (B,)."""
    return ((q - log_density).logsumexp(0) - math.log(len(q)) - q_data).mean()


def actor_loss(q: Tensor, log_pi: Tensor, alpha: Tensor) -> Tensor:
    """SAC: alpha log pi - Q, (B,) -> ()."""
    return (alpha * log_pi - q).mean()


def temperature_loss(log_alpha: Tensor, log_pi: Tensor, target_entropy: float) -> Tensor:
    """alpha falls while the entropy exceeds its target, -A."""
    return -(log_alpha.exp() * (log_pi.detach() + target_entropy)).mean()


def edm_loss(denoise: Callable[..., Tensor], x: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Karras et al.: (sigma^2 + 1) / sigma^2 ||D(x + sigma n; sigma) - x||^2, mean over dimensions; sigma (B,)."""
    error = (denoise(x + sigma[:, None] * noise, sigma) - x).square().mean(1)
    return ((sigma.square() + 1) / sigma.square() * error).mean()


def info_nce(energy: Tensor) -> tuple[Tensor, Tensor]:
    """InfoNCE of energies (B, 1 + K), a positive and its own negatives; and (B,) where the positive is found."""
    return -(-energy).log_softmax(1)[:, 0].mean(), energy.argmin(1) == 0


def energy_losses(
    energies: Energies, acted: Tensor, chosen: Tensor, negatives: Tensor, sigma: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """InfoNCE of E1, E1 + E2, pairs acted, and these + E3, with what each is trained on top of held fixed.

    Noised at sigma (B,): recent transitions (s, a, s') as acted (B, D), recent states with actions as chosen by the
    policy now (B, S + A), K unguided samples for each (B, K, D).
    """
    S, SA = energies.ends[:2]
    acted, chosen = (torch.cat([x[:, None], negatives[..., : x.shape[1]]], dim=1) for x in (acted, chosen))
    sigma = sigma[:, None].expand(acted.shape[:2])
    e1, e2, e3 = (
        energies.energy(net, x, sigma) for net, x in zip(energies.nets, (chosen[..., :S], chosen, acted), strict=True)
    )
    behavior = energies.energy(energies.behavior, acted[..., :SA], sigma)
    return [info_nce(e) for e in (e1, e1.detach() + e2, behavior, behavior.detach() + e3)]


def conditional_losses(
    energies: Energies, states: Tensor, chosen: Tensor, acted: Tensor, negatives: Tensor, sigma: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """The paper's: InfoNCE of each energy by itself, a and s' among negatives of the same s, of the same (s, a).

    Noised at sigma (B,): recent states (B, S), others with actions of the policy now (B, S + A), recent transitions
    (B, D), and for each K negatives (B, K, D): s unguided, a by that s of `chosen`, s' by that (s, a) of `acted`.
    """
    losses, start, sigma = [], 0, sigma[:, None].expand(-1, 1 + negatives.shape[1])
    for net, x, end in zip(energies.nets, (states, chosen, acted), energies.ends, strict=True):
        blocks = torch.cat([x[:, None, start:end], negatives[..., start:end]], dim=1)
        given = x[:, None, :start].expand(-1, blocks.shape[1], -1)
        losses.append(info_nce(energies.energy(net, torch.cat([given, blocks], dim=2), sigma)))
        start = end
    return losses


def model_loss(reward: Tensor, logit: Tensor, r: Tensor, mask: Tensor) -> Tensor:
    """Squared error of the reward and cross-entropy of the termination, all (B,)."""
    return (reward - r).square().mean() + nn.functional.binary_cross_entropy_with_logits(logit, 1 - mask)


def monte_carlo_returns(rewards: np.ndarray, ends: np.ndarray, gamma: float) -> np.ndarray:
    """(N,) discounted return to go; an episode ends at a terminal, a timeout (ends) and at the file's end.

    Cut at the end of time, it bounds the value from below only where rewards are not negative.
    """
    returns, total = np.zeros(len(rewards)), 0.0
    for i in range(len(rewards) - 1, -1, -1):
        total = rewards[i] + gamma * total * (not ends[i])
        returns[i] = total
    return returns


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """2 E|x - y| - E|x - x'| - E|y - y'| (Szekely) of samples (N, D), (M, D): 0 for equal distributions."""
    distance = partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")  # which TF32 would blur
    within = [distance(z, z).sum() / (len(z) * (len(z) - 1)) for z in (x, y)]
    return 2 * distance(x, y).mean() - within[0] - within[1]


# -------------------------------------------------------------------------------------------------------------- Update
class Buffer:
    """Rows (capacity, D) on the device; the oldest are overwritten."""

    def __init__(self, capacity: int, dim: int, device: torch.device) -> None:
        self.rows, self.count = torch.zeros(capacity, dim, device=device), 0

    def __len__(self) -> int:
        return min(self.count, len(self.rows))

    def add(self, rows: Tensor) -> None:
        self.rows[(self.count + torch.arange(len(rows), device=rows.device)) % len(self.rows)] = rows
        self.count += len(rows)

    def recent(self, n: int) -> Tensor:
        """The last n rows or fewer, oldest first."""
        n = min(n, len(self))
        return self.rows[(self.count - n + torch.arange(n, device=self.rows.device)) % len(self.rows)]

    def sample(self, n: int) -> Tensor:
        return self.rows[torch.randint(len(self), (n,), device=self.rows.device)]

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows[: len(self)].clone(), "count": self.count}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.rows[: len(saved["rows"])], self.count = saved["rows"], saved["count"]


class Interaction:
    """The online environment. Its state is the episode's number and actions so far, which a resume plays again."""

    def __init__(self, env: gym.Env, seed: int) -> None:
        self.env, self.seed, self.episode = env, seed, -1
        self.start()

    def start(self) -> None:
        self.episode += 1
        self.obs, _ = self.env.reset(seed=int(np.random.default_rng([self.seed, self.episode]).integers(2**31)))
        self.actions: list[np.ndarray] = []
        self.rewards: list[float] = []

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
        """Next observation, reward, terminated, episode's end."""
        self.obs, reward, terminated, truncated, _ = self.env.step(action)
        self.actions.append(action)
        self.rewards.append(float(reward))
        return self.obs, float(reward), terminated, terminated or truncated

    def state_dict(self) -> dict[str, Any]:
        return {"episode": self.episode, "actions": torch.as_tensor(np.array(self.actions))}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.episode = saved["episode"] - 1
        self.start()
        for action in saved["actions"].numpy():
            self.step(action)


def make_networks(obs_dim: int, act_dim: int, args: Args, device: torch.device) -> dict[str, Any]:
    """The agent's networks, then those of the synthetic data."""
    dim, critic = 2 * obs_dim + act_dim, Critic(obs_dim, act_dim)
    networks: dict[str, Any] = {"actor": Actor(obs_dim, act_dim), "critic": critic}
    networks["critic_target"] = copy.deepcopy(critic).requires_grad_(False)
    networks["temperature"] = nn.ParameterDict({"log_alpha": torch.zeros(())})
    networks["denoiser"] = Denoiser(dim, args.denoiser_width, args.denoiser_layers)
    networks["denoiser_ema"] = copy.deepcopy(networks["denoiser"]).requires_grad_(False)
    networks["energies"] = Energies(obs_dim, act_dim, args.energy_width)
    networks["model"] = MLP(dim, 2)  # reward and logit of termination of (s, a, s'), s' in the units of s
    return {name: network.to(device) for name, network in networks.items()}


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


def make_update(args: Args, networks: dict[str, Any]) -> tuple[Callable, dict[str, Any]]:
    """The update of SAC with CQL's penalty, rows and its coefficient -> metrics, and its optimisers."""
    actor, critic, critic_target = (networks[name] for name in ("actor", "critic", "critic_target"))
    log_alpha = networks["temperature"]["log_alpha"]
    rates = {"actor": args.actor_lr, "critic": args.critic_lr, "temperature": args.actor_lr}
    parameters = {name: list(networks[name].parameters()) for name in rates}
    device = log_alpha.device
    fused, capturable = device.type in ("cpu", "cuda"), device.type == "cuda" and args.compile != "off"
    optimizers = {
        name: torch.optim.Adam(parameters[name], lr, fused=fused, capturable=capturable) for name, lr in rates.items()
    }

    def differentiate(name: str, loss: Tensor) -> None:
        for parameter, gradient in zip(parameters[name], torch.autograd.grad(loss, parameters[name]), strict=True):
            parameter.grad = gradient

    @torch.compiler.disable  # what lies between two of these is compiled as a whole, if no graph of gradients crosses
    def step(*names: str) -> None:
        for name in names:
            optimizers[name].step()

    def penalty(s: Tensor, next_s: Tensor, mc: Tensor, q1: Tensor, q2: Tensor) -> Tensor:
        """CQL's penalty of both critics; Cal-QL: the policy's actions are worth at least the Monte-Carlo return."""
        M, (B, A) = args.cql_actions, (len(s), actor.net.layers[-1].out_features // 2)
        with torch.no_grad():
            uniform = 2 * torch.rand(M, B, A, device=s.device) - 1
            pairs = [actor(states, torch.randn(M, B, A, device=s.device)) for states in (s, next_s)]
            actions = torch.cat([uniform, *(a for a, _ in pairs)])
            log_density = torch.cat([torch.full((M, B), -A * math.log(2), device=s.device), *(p for _, p in pairs)])
        penalties = []
        for q, q_data in zip(critic(s.repeat(3 * M, 1), actions.flatten(0, 1)), (q1, q2), strict=True):
            q = q.view(3 * M, B)
            if args.calibrate:
                q = torch.cat([q[:M], q[M:].maximum(mc)])
            penalties.append(cql_penalty(q, log_density, q_data))
        return sum(penalties, torch.zeros((), device=s.device))

    def update(
        s: Tensor, a: Tensor, next_s: Tensor, r: Tensor, mask: Tensor, mc: Tensor, cql_alpha: float
    ) -> dict[str, Tensor]:
        alpha = log_alpha.exp().detach()
        with torch.no_grad():
            next_a, next_log_pi = actor(next_s, torch.randn_like(a))
            next_v = critic_target.min(next_s, next_a)
            if not args.cql_alpha:  # CQL's and Cal-QL's code leave the entropy out of the target, online too
                next_v = next_v - alpha * next_log_pi
        q1, q2 = critic(s, a)
        qf1_loss, qf2_loss = critic_losses(q1, q2, r, mask, next_v, args.gamma)
        cql_loss = penalty(s, next_s, mc, q1, q2) if cql_alpha else torch.zeros((), device=s.device)
        losses = {"qf1_loss": qf1_loss, "qf2_loss": qf2_loss, "cql_loss": cql_loss}
        losses |= {"alpha": alpha, "q_mean": q1.mean(), "q_max": q1.max()}
        metrics = {f"losses/{name}": loss.detach() for name, loss in losses.items()}
        differentiate("critic", qf1_loss + qf2_loss + cql_alpha * cql_loss)
        step("critic")

        new_a, log_pi = actor(s, torch.randn_like(a))
        policy_loss = actor_loss(critic.min(s, new_a), log_pi, alpha)
        metrics |= {"losses/policy_loss": policy_loss.detach(), "losses/entropy": -log_pi.detach().mean()}
        differentiate("actor", policy_loss)
        differentiate("temperature", temperature_loss(log_alpha, log_pi, -a.shape[1]))
        step("actor", "temperature")
        with torch.no_grad():
            for target, parameter in zip(critic_target.parameters(), critic.parameters(), strict=True):
                target.lerp_(parameter, args.tau)
        return metrics

    return update, optimizers


def train_denoiser(args: Args, denoiser: Denoiser, ema: Denoiser, x: Tensor, recent: int) -> Tensor:
    """Train on normalised transitions x (N, D) of one round, from where the last one ended; the mean loss.

    A share of each batch comes from the last `recent` rows.
    """
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=args.denoiser_lr, fused=x.device.type in ("cpu", "cuda"))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(args.denoiser_updates, 1))
    mean, share = torch.zeros((), device=x.device), round(args.denoiser_recent * args.denoiser_batch)
    for _ in range(args.denoiser_updates):
        index = torch.randint(len(x), (args.denoiser_batch,), device=x.device)
        index[:share] = torch.randint(len(x) - recent, len(x), (share,), device=x.device)
        batch = x[index]
        sigma = (1.2 * torch.randn(len(batch), device=x.device) - 1.2).exp()  # P_mean, P_std of Karras et al.
        loss = edm_loss(denoiser, batch, sigma, torch.randn_like(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for averaged, parameter in zip(ema.parameters(), denoiser.parameters(), strict=True):
                averaged.lerp_(parameter, 1 - args.denoiser_ema)
            mean += loss / args.denoiser_updates
    return mean.detach()


def train_model(
    args: Args, model: MLP, energies: Energies, x: Tensor, y: Tensor, r: Tensor, mask: Tensor, recent: int
) -> Tensor:
    """Train rewards, terminations (on y) and mean next states (on x) of transitions (N, D), (N,); the mean loss.

    Half of each batch comes from the last `recent` rows, of which the energies' positives are.
    """
    parameters, SA = [*model.parameters(), *energies.dynamics.parameters()], energies.ends[1]
    optimizer = torch.optim.Adam(parameters, lr=args.energy_lr, fused=x.device.type in ("cpu", "cuda"))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(args.model_updates, 1))
    mean, half = torch.zeros((), device=x.device), args.batch_size // 2
    for _ in range(args.model_updates):
        index = torch.randint(len(x), (args.batch_size,), device=x.device)
        index[:half] = torch.randint(len(x) - recent, len(x), (half,), device=x.device)
        reward, logit = model(y[index]).unbind(1)
        residual = energies.dynamics(x[index, :SA]) - x[index, SA:]
        loss = model_loss(reward, logit, r[index], mask[index]) + residual.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        mean += loss.detach() / args.model_updates
    return mean


class Round(NamedTuple):
    """What a round of training and generation works on."""

    args: Args
    networks: dict[str, Any]
    edm: EDM
    mean: Tensor  # of (s, a, s' - s), (D,), offline data
    std: Tensor
    simulate: Callable[[Tensor, Tensor], Tensor] | None  # s, a -> [s', r, mask] by the environment itself

    @property
    def obs_dim(self) -> int:
        return self.networks["energies"].ends[0]

    @staticmethod
    def differences(raw: Tensor, S: int) -> Tensor:
        """(s, a, s') -> (s, a, s' - s): a step is far smaller than what states differ by, errors in s' as well."""
        return torch.cat([raw[:, :-S], raw[:, -S:] - raw[:, :S]], dim=1)

    def normalize(self, raw: Tensor) -> Tensor:
        """(s, a, s') (B, D) -> x, in the coordinates that are diffused: each dimension of mean 0, deviation 1."""
        return (self.differences(raw, self.obs_dim) - self.mean) / self.std

    def denormalize(self, x: Tensor) -> Tensor:
        x, S = x * self.std + self.mean, self.obs_dim
        return torch.cat([x[:, :-S], x[:, -S:] + x[:, :S]], dim=1)

    def inputs(self, raw: Tensor) -> Tensor:
        """(s, a, s') (B, D) -> the same for the transition model: a fall is told by s', not by s' - s."""
        mean, std = (torch.cat([v[: -self.obs_dim], v[: self.obs_dim]]) for v in (self.mean, self.std))
        return (raw - mean) / std

    def policy(self, s: Tensor) -> Tensor:
        """Actions (B, A) of the current policy in normalised states (B, S), normalised."""
        S, actor = s.shape[1], self.networks["actor"]
        A = len(self.mean) - 2 * S
        with torch.no_grad():
            a, _ = actor(s * self.std[:S] + self.mean[:S], torch.randn(len(s), A, device=s.device))
        return (a - self.mean[S : S + A]) / self.std[S : S + A]

    def make_pool(self, denoise: Callable[..., Tensor], conditions: Tensor | None = None) -> Tensor:
        """What one unguided pass of the sampler goes through, (levels, P, D): negatives for every level.

        With conditions (P, D): s of that pass, a of one that holds the conditions' s, s' of one that holds both.
        """
        edm, n = self.edm, self.args.pool if conditions is None else len(conditions)
        pool = torch.empty(len(edm.sigma_hat), n, len(self.mean), device=self.mean.device)
        for start in (0,) if conditions is None else (0, *self.networks["energies"].ends[:2]):
            repeats = self.args.inpainting_repeats if start else 1
            for i in range(0, n, self.args.chunk):
                part = pool[:, i : i + self.args.chunk]
                held = conditions[i : i + self.args.chunk, :start] if conditions is not None and start else None

                def visit(level: int, x: Tensor, start: int = start, part: Tensor = part) -> None:
                    part[level, :, start:] = x[:, start:]

                edm.sample(denoise, torch.randn_like(part[0]), visit=visit, held=held, repeats=repeats)
        return pool

    def train_energies(self, recent: Tensor, denoise: Callable[..., Tensor]) -> dict[str, Tensor]:
        """Train with recent transitions (M, D) as positives; the accuracies by noise level."""
        args, edm, energies = self.args, self.edm, self.networks["energies"]
        (S, SA, D), B, K, device = energies.ends, args.energy_batch, args.negatives, recent.device
        joint, conditions = args.conditional_negatives == "joint", recent
        if joint:
            pool = self.make_pool(denoise)
        else:
            conditions = recent[torch.randint(len(recent), (args.pool // K,), device=device)]
            pool = self.make_pool(denoise, conditions.repeat_interleave(K, dim=0))
        parameters = [*energies.nets.parameters(), *energies.behavior.parameters()]  # the dynamics are learned before
        optimizer = torch.optim.Adam(parameters, lr=args.energy_lr, fused=device.type in ("cpu", "cuda"))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(args.energy_updates, 1))
        upper = edm.sigma_hat.maximum(edm.sigma[:-1].roll(1))  # where the range of the level above begins
        upper[0] = edm.sigma_hat[0]
        edges = torch.tensor([0.1, 1.0, 10.0], device=device)  # of sigma, for the accuracies
        blocks = ("state", "policy", "behavior", "transition") if joint else ("state", "policy", "transition")
        hits, tries = torch.zeros(len(blocks), 4, device=device), torch.zeros(4, device=device)
        for update in range(args.energy_updates):
            level = torch.randint(len(edm.sigma_hat), (B,), device=device)
            low = edm.sigma[level]
            sigma = low * (upper[level] / low) ** torch.rand(B, device=device)  # between the levels too
            own = torch.randint(len(conditions), (B,), device=device)
            acted = conditions[own]
            acted = acted + sigma[:, None] * torch.randn(B, D, device=device)
            states = recent[torch.randint(len(recent), (B,), device=device), :S]
            s = states if joint else conditions[own, :S]
            chosen = torch.cat([s, self.policy(s)], dim=1)
            chosen = chosen + sigma[:, None] * torch.randn(B, SA, device=device)
            if joint:
                drawn = torch.randint(args.pool, (B, K), device=device)
            else:
                drawn = own[:, None] * K + torch.arange(K, device=device)
            negatives = pool[level[:, None], drawn]
            added = (sigma.square() - low.square()).clamp(min=0).sqrt()[:, None, None]
            negatives = negatives + added * torch.randn_like(negatives)
            if joint:
                results = energy_losses(energies, acted, chosen, negatives, sigma)
            else:
                states = states + sigma[:, None] * torch.randn(B, S, device=device)
                results = conditional_losses(energies, states, chosen, acted, negatives, sigma)
            losses, found = zip(*results, strict=True)
            optimizer.zero_grad()
            torch.stack(losses).sum().backward(inputs=parameters)
            optimizer.step()
            schedule.step()
            if 2 * update >= args.energy_updates:
                bins = torch.bucketize(sigma, edges)
                hits.index_add_(1, bins, torch.stack(found).float())
                tries.index_add_(0, bins, torch.ones_like(sigma))
        names = [f"{block}_accuracy_sigma_{end}" for block in blocks for end in (0.1, 1, 10, math.inf)]
        seen = (tries > 0).tolist() * len(blocks)  # the range of levels need not reach into each
        return {name: share for name, share, any_ in zip(names, (hits / tries).flatten(), seen, strict=True) if any_}

    def generate(self, n: int, denoise: Callable[..., Tensor], guidance: Guidance | None) -> Tensor:
        """(n, D) synthetic transitions, normalised, in chunks that bound the memory."""
        sizes = [min(self.args.chunk, n - done) for done in range(0, n, self.args.chunk)]
        noise = (torch.randn(size, len(self.mean), device=self.mean.device) for size in sizes)
        return torch.cat([self.edm.sample(denoise, x, guidance) for x in noise])

    def rows(self, x: Tensor) -> Tensor:
        """Rows [s, a, s', r, mask, Monte-Carlo return] of synthetic transitions x (N, D); the return is not known.

        The mask is the probability of going on, which the target is linear in.
        """
        S = self.obs_dim
        s, a, next_s = self.denormalize(x).split([S, x.shape[1] - 2 * S, S], dim=1)
        transitions = torch.cat([s, a.clamp(-0.999, 0.999), next_s], dim=1)
        with torch.no_grad():
            reward, logit = self.networks["model"](self.inputs(transitions)).unbind(1)
        tail = [reward, torch.sigmoid(-logit), torch.full_like(reward, -math.inf)]
        return torch.cat([transitions, torch.stack(tail, dim=1)], dim=1)

    def distances(self, x: Tensor, recent: Tensor) -> dict[str, Tensor]:
        """How far transitions x (N, D) are from the recent states, the policy's actions and the environment's dynamics.

        state: energy distance of the states; policy: of the actions' quantiles under the policy in their states, from
        those of its own actions; dynamics: how far s' is from the environment's, per dimension and in standard
        deviations of the data, the mean over transitions and, led by the few that make or break contact, the root mean
        square; learned_dynamics: the former, of the mean s' that E3 knows of. reward_rms, mask_bias: what the model
        says of x less what the environment gives after s and a. nearest: the median distance to the nearest other
        recent transition; far below that of real ones, the denoiser copies.
        """
        S = self.obs_dim
        s = x[:, :S]

        def quantiles(a: Tensor) -> Tensor:  # uniform for the policy's actions, whatever the state
            a = (a * self.std[S:-S] + self.mean[S:-S]).clamp(-0.999, 0.999)
            with torch.no_grad():
                return self.networks["actor"].distribution(s * self.std[:S] + self.mean[:S]).cdf(a.atanh())

        found = {"state": energy_distance(s, recent[torch.randperm(len(recent), device=s.device)[: len(s)], :S])}
        apart = torch.cdist(x, recent, compute_mode="donot_use_mm_for_euclid_dist")  # exact: 0 is a row itself
        found["nearest"] = apart.where(apart > 0, math.inf).amin(1).median()
        found["policy"] = energy_distance(quantiles(x[:, S:-S]), quantiles(self.policy(s)))
        if self.simulate:
            raw, tail = self.rows(x)[:, :-1].tensor_split([x.shape[1]], dim=1)
            truth = self.simulate(raw[:, :S], raw[:, S:-S])
            with torch.no_grad():
                mean = self.networks["energies"].dynamics(x[:, :-S]) * self.std[-S:] + self.mean[-S:] + raw[:, :S]
            error, learned = (((truth[:, :S] - y) / self.std[:S]).square().mean(1) for y in (raw[:, -S:], mean))
            reward, mask = (tail - truth[:, S:]).unbind(1)
            found["learned_dynamics"] = learned.sqrt().mean()
            found |= {"dynamics": error.sqrt().mean(), "dynamics_rms": error.mean().sqrt()}
            found |= {"reward_rms": reward.square().mean().sqrt(), "mask_bias": mask.mean()}
        return found

    def __call__(self, x: Tensor, r: Tensor, mask: Tensor, recent: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Train on transitions x (N, D), steer towards the recent ones (M, D); synthetic rows and metrics."""
        args, energies, ema = self.args, self.networks["energies"], self.networks["denoiser_ema"]
        x, y, recent = self.normalize(x), self.inputs(x), self.normalize(recent)
        metrics = {"losses/denoiser_loss": train_denoiser(args, self.networks["denoiser"], ema, x, len(recent))}
        metrics["losses/model_loss"] = train_model(args, self.networks["model"], energies, x, y, r, mask, len(recent))
        plain, guidance = self.generate(min(args.samples, 2_000), ema, None), None
        metrics |= {f"unguided/{name}": value for name, value in self.distances(plain, recent).items()}
        real = recent[torch.randint(len(recent), (len(plain),), device=recent.device)]
        metrics |= {f"recent/{name}": value for name, value in self.distances(real, recent).items()}
        scales = (
            args.state_scale * args.state_energy,
            args.policy_scale * args.policy_energy,
            args.transition_scale * args.transition_energy,
        )

        def steer(scales: tuple[float, ...]) -> Guidance | None:
            return make_guidance(energies, scales, args.full_gradient, args.guidance_clip) if any(scales) else None

        if args.augmentation == "edis" and any(scales):
            metrics |= {f"energies/{name}": value for name, value in self.train_energies(recent, ema).items()}
            guidance = steer(scales)
        begin = time.time()
        made = self.generate(args.samples, ema, guidance)
        made[-1].tolist()  # waits for the device
        metrics["charts/generated_per_second"] = torch.tensor(len(made) / (time.time() - begin))
        if guidance:
            metrics |= {f"guided/{name}": value for name, value in self.distances(made[: len(plain)], recent).items()}
            for off, energy in enumerate(("state", "policy", "transition")):  # what each does beside the others
                others = self.generate(len(plain), ema, steer((*scales[:off], 0.0, *scales[off + 1 :])))
                metrics |= {f"{energy}_off/{name}": value for name, value in self.distances(others, recent).items()}
        return self.rows(made), metrics


def make_simulator(env: gym.Env, transform: Transform, obs_dim: int) -> Callable[[Tensor, Tensor], Tensor] | None:
    """(states (N, S), actions (N, A)) -> [s', r, mask] (N, S + 2) by a MuJoCo environment; None without qpos, qvel."""
    core: Any = env.unwrapped
    if not hasattr(core, "set_state") or core.model.nq - 1 + core.model.nv != obs_dim:
        return None

    def simulate(states: Tensor, actions: Tensor) -> Tensor:
        raw = states.cpu().numpy() / transform.obs_scale - transform.obs_shift
        found = []
        for obs, action in zip(raw, actions.cpu().numpy(), strict=True):
            qpos = np.append(0.0, obs[: core.model.nq - 1])  # the root's position along x is not observed
            core.set_state(qpos, obs[core.model.nq - 1 :])
            next_obs, reward, terminated, *_ = core.step(action)
            found.append([*transform.obs(next_obs), transform.reward(reward), 1.0 - terminated])
        return torch.as_tensor(np.array(found), dtype=torch.float32, device=states.device)

    env.reset(seed=0)
    return simulate


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
    """Train offline, then online, and evaluate; returns what result.json holds."""
    check_args(args)
    device = set_up(args)

    # Data and environments
    saved = load_checkpoint(args.resume) if args.resume is not None else {}
    columns, make_env, reference, source = load_task(args)
    if make_env is None:
        fail(f"no environment is known for {args.env_id}: the online phase needs one")
    if saved and saved["dataset"].get("sha256") != source.get("sha256"):
        fail(f"{source['file']} is not the data that the resumed run was trained on")
    if saved and saved["progress"]["step"] > args.num_updates:
        fail(f"--online-steps {args.online_steps}: the run is at update {saved['progress']['step']} already")
    terminals = columns["terminals"].astype(bool)
    timeouts = columns.setdefault("timeouts", timeouts_by_limit(terminals, 1_000)).astype(bool)
    transitions, transform = make_transitions(columns, args)
    if not len(transitions):
        fail(f"{source['file']} holds no transition: D4RL's rule drops timeout rows and the last one")
    ends, keep = terminals | timeouts, ~timeouts & (np.arange(len(timeouts)) < len(timeouts) - 1)  # the same rows
    returns = monte_carlo_returns(transform.reward(columns["rewards"].astype(np.float64)), ends, args.gamma)[keep]
    data = torch.as_tensor(np.column_stack([transitions, returns]), dtype=torch.float32, device=device)
    obs_dim, act_dim = columns["observations"].shape[1], columns["actions"].shape[1]
    true_next = "next_observations" in columns  # else that of a terminal row is not the environment's
    D = 2 * obs_dim + act_dim
    diffused = data if true_next else data[data[:, D + 1] > 0]
    if len(diffused) < 2:
        fail(f"{source['file']} holds no two transitions with a next state for the denoiser")
    if not true_next:
        print(f"warning: {source['file']} has no next_observations: no termination to learn from it", file=sys.stderr)
    envs = make_envs(make_env, args, columns)
    del columns, transitions
    run = Run(args, source, device, saved)
    say(f"{len(data)} transitions of {source['file']} on {device}")
    if args.capture_video:
        prefix = f"from-update-{run.step}"  # not over older ones
        envs[0] = gym.wrappers.RecordVideo(envs[0], str(run.dir / "videos"), lambda _: True, name_prefix=prefix)

    # Networks, optimisers, buffers
    networks = make_networks(obs_dim, act_dim, args, device)
    update, optimizers = make_update(args, networks)
    sampled = [networks[name] for name in ("denoiser", "denoiser_ema", "energies")]
    updates = {
        alpha: capture(args, accelerate(args, partial(update, cql_alpha=alpha), sampled, device), device)
        for alpha in {args.cql_alpha, args.cql_alpha_online}
    }
    online = Buffer(args.online_steps + 1, data.shape[1], device)
    synthetic = Buffer(args.samples, data.shape[1], device)
    interaction = Interaction(make_env(), args.seed)
    for env in (*envs, interaction.env):
        run.exits.callback(env.close)  # which writes the last video
    state = networks | {f"{name}_optimizer": optimizer for name, optimizer in optimizers.items()}
    state |= {"online": online, "synthetic": synthetic, "interaction": interaction}
    if saved:
        run.restore(state)
    differences = Round.differences(diffused[:, :D], obs_dim)
    mean, std = differences.mean(0), differences.std(0).clamp(min=1e-3)
    edm = EDM(args.sampling_steps, args.churn, device, args.sigma_min, args.sigma_max)
    make_round = Round(args, networks, edm, mean, std, make_simulator(make_env(), transform, obs_dim))
    actor, generative = networks["actor"], args.augmentation in ("edis", "synther")
    if generative and 0 < args.online_steps <= args.first_round:
        print(f"warning: no synthetic data: --first-round {args.first_round} is past --online-steps", file=sys.stderr)

    def observe(obs: np.ndarray) -> Tensor:
        return torch.as_tensor(transform.obs(obs), dtype=torch.float32, device=device)

    def act(obs: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return actor.mode(observe(obs)).cpu().numpy()

    def interact() -> None:
        """One step of the policy in the environment, into the online buffer."""
        s = observe(interaction.obs)
        with torch.no_grad():
            a, _ = actor(s[None], torch.randn(1, act_dim, device=device))
        a = a[0].clamp(-0.999, 0.999)
        obs, reward, terminated, end = interaction.step(a.cpu().numpy())
        tail = torch.tensor([transform.reward(reward), 1.0 - terminated, -math.inf], device=device)
        online.add(torch.cat([s, a, observe(obs), tail])[None].float())
        if end:
            rewards = transform.reward(np.array(interaction.rewards))
            returns = monte_carlo_returns(rewards, np.zeros(len(rewards), bool), args.gamma)
            online.rows[online.count - len(returns) : online.count, -1] = torch.as_tensor(returns).to(online.rows)
            notes.update({"charts/online_return": sum(interaction.rewards), "charts/online_length": len(rewards)})
            interaction.start()

    # Loop
    metrics: dict[str, Tensor] = {}
    notes: dict[str, float] = {}  # rows of the next step: what a kill loses with it
    while True:
        step, last = run.step, run.step >= args.num_updates
        since = step - args.offline_updates - args.first_round
        due = generative and since >= 0 and since % args.round_every == 0 and not last
        listed = any(step % n == 0 for n in (args.log_every, args.eval_every, args.save_every))
        if metrics and (run.stop or last or due or listed):
            parameters = [p for network in networks.values() for p in network.parameters()]
            run.log(metrics | {"losses/parameter_norm": nn.utils.get_total_norm(parameters)})
        episodes: list[dict[str, Any]] = []
        if step > 0 and (last or step % args.eval_every == 0) and step not in run.progress["evaluations"]:
            seeds = np.random.default_rng([args.seed, step]).integers(2**31, size=len(envs)).tolist()
            if episodes := evaluate(act, envs, seeds, run.stop):
                run.log_evaluation(episodes, reference)
        if episodes or (metrics and (run.stop or last or due or step % args.save_every == 0)):
            run.save(state, transform)
        run.nothing_to_save = due  # a stop or a kill during a round: the resume makes it again
        if due and not run.stop:
            x = torch.cat([diffused, online.recent(len(online))])
            rows, found = make_round(x[:, :D], x[:, D], x[:, D + 1], online.recent(args.positive_buffer)[:, :D])
            synthetic.add(rows)
            notes.update({name: float(value) for name, value in found.items()})
            run.nothing_to_save = False
            run.lap("round")
        if run.stop:
            run.leave()
        if last:
            return run.finish()

        if step >= args.offline_updates:
            interact()
        offline = step < args.offline_updates or len(online) < args.batch_size
        share = 0 if args.augmentation == "none" else args.synthetic_ratio
        n = args.batch_size if offline else round(share * args.batch_size)
        if generative and not offline and len(synthetic):
            batch = synthetic.sample(n)
        else:  # real offline data, before the first round for edis and synther too
            batch = data[torch.randint(len(data), (n,), device=device)]
        if not offline:
            batch = torch.cat([batch, online.sample(args.batch_size - n)])
        s, a, next_s, r, mask, mc = batch.split([obs_dim, act_dim, obs_dim, 1, 1, 1], dim=1)
        update = updates[args.cql_alpha if offline else args.cql_alpha_online]
        run.nothing_to_save = not metrics  # the first update, which may compile for long
        metrics = update(s=s, a=a, next_s=next_s, r=r[:, 0], mask=mask[:, 0], mc=mc[:, 0])
        run.nothing_to_save = False
        run.progress["step"] += 1
        run.bar.update()
        if notes:
            run.write(notes)
            notes.clear()


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # until the run has its own
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    main(parse_args())

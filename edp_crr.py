"""EDP-CRR: an efficient diffusion policy trained by critic-regularised regression.

Kang et al., Efficient Diffusion Policies for Offline RL, NeurIPS 2023, arXiv 2305.20081
Wang et al., Critic Regularized Regression, 2020, arXiv 2006.15134 (the weights)

    forward noising       a^k = sqrt(abar^k) a^0 + sqrt(1 - abar^k) epsilon                      Diffusion.add_noise
    action approximation  a_hat^0 = (a^k - sqrt(1 - abar^k) epsilon_theta) / sqrt(abar^k)        Diffusion.approximate
    diffusion loss        E ||epsilon - epsilon_theta(a^k, k; s)||^2                             make_update
    weighted regression   E f ||a - a_hat^0||^2, or noise loss weighted by f (and elbo_weight)   make_update, Diffusion
    advantage             Q(s, a) - E Q(s, a'), a' ~ N(a_hat^0, I)                               crr_advantage
    weight                f_CRR = exp(advantage / tau_CRR)                                       crr_weight
    critics               Q on r + gamma min Q'(s', a'), a' a sample of the target policy        make_update
    sampler               DPM-Solver (Lu et al., 2022, arXiv 2206.00927)                         dpm_solver_step
    evaluation            one of N samples, drawn with probability ~ exp(Q(s, a))                select_actions

Where this differs from the paper and from the official code (github.com/sail-sg/edp), a comment says so.
Python 3.10 to 3.13; packages: pip install -r requirements.txt of this script's repository, github.com/OWNER/REPOSITORY.
"""

import copy
import ctypes
import difflib
import hashlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

import gymnasium as gym
import h5py
import numpy as np
import pooch
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
    log_every: int = 1_000  # updates between two rows of metrics
    save_every: int = 10_000  # updates between two checkpoints; each replaces the one before
    resume: str | None = None  # run folder to continue; its arguments are the defaults
    runs_dir: str = "runs"  # where run folders are made
    track: bool = False  # log to Weights & Biases; WANDB_* environment variables set entity, group and mode
    wandb_project: str = "edp"  # Weights & Biases project
    # data
    env_id: str = "hopper-medium-replay-mini"  # id of bundled data, D4RL or Minari; any environment with --dataset-path
    dataset_path: str | None = None  # HDF5 file in D4RL's layout to train on instead of the id's own data
    reward_transform: Literal["none", "return-range", "minus-one", "times-four", "min-max"] = "none"
    """r; 1000 r / (best - worst return); r - 1 or 4 (r - 0.5), for AntMaze; r scaled to [-1, 1], for Adroit, kitchen"""
    normalize_observations: bool = False  # scale each dimension to mean 0 and standard deviation 1
    # evaluation
    eval_only: bool = False  # evaluate without training: the run of --resume, into a new run folder
    eval_every: int = 10_000  # updates between two evaluations
    eval_episodes: int = 10  # episodes per evaluation, all run side by side; 0: no evaluation
    eval_candidates: int = 50  # N, actions sampled per step; Q selects one of them; 1: no selection
    capture_video: bool = False  # record the first episode of each evaluation to RUN/videos
    # algorithm
    batch_size: int = 256  # transitions per update
    lr: float = 3e-4  # Adam's learning rate, all networks
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # update rate of the target networks
    max_grad_norm: float = 5.0  # gradient-norm clip of each network; 0: none
    diffusion_steps: int = 1_000  # K, steps of the noise schedule
    sampler: Literal["dpm-solver", "ddpm"] = "dpm-solver"  # how actions are sampled
    sampler_steps: int = 15  # network calls per sample of dpm-solver; ddpm takes K
    solver_order: Literal[1, 2, 3] = 3  # order of dpm-solver; 1 is DDIM
    diffusion_coef: float = 1.0  # coefficient of the diffusion (behaviour-cloning) loss
    guidance_coef: float = 1.0  # coefficient of the weighted regression
    likelihood: Literal["mse", "elbo", "simple"] = "mse"
    """mse: f times error of a_hat^0; elbo: f times the ELBO's weight, simple: f / mean f, times that of the noise"""
    advantage_samples: int = 10  # actions around a_hat^0 that the advantage compares with
    temperature: float = 1.0  # tau of the weights f_CRR
    weight_cap: float = 20.0  # upper bound of the weights
    # speed
    num_threads: int = 1  # CPU threads; a second one helps only on an idle machine
    compile: Literal["auto", "on", "off"] = "auto"  # compile the update; auto: on cuda, or for 10 000 or more updates
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # high: TF32, medium: bfloat16

    def __post_init__(self) -> None:
        free = "seed eval_episodes max_grad_norm diffusion_coef guidance_coef gamma tau"
        for name, value in vars(self).items():
            low: float = 0 if name in free.split() else 1 if type(value) is int else 1e-12
            high: float = 1 if name in ("gamma", "tau") else 1e12
            if type(value) in (int, float) and not low <= value <= high:  # also rejects NaN
                fail(f"--{name.replace('_', '-')} must lie in [{low:g}, {high:g}], got {value}")


# ------------------------------------------------------------------------------------------------------------ Networks
class Mish(nn.Module):
    """x tanh(softplus(x)) = x - 2 x / ((1 + e^x)^2 + 1): with one exponential, which the compiler can fuse."""

    def forward(self, x: Tensor) -> Tensor:
        v = (x.clamp(max=20).exp() + 1).square() + 1  # Mish(x) is x from 20 on
        return torch.addcdiv(x, x, v, value=-2)


class MLP(nn.Sequential):
    """Layers with Mish between them, initialised as in the official code: LeCun normal weights, zero biases."""

    def __init__(self, inputs: int, outputs: int, hidden: tuple[int, ...] = (256, 256, 256)) -> None:
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise((inputs, *hidden, outputs)):
            layer = nn.Linear(fan_in, fan_out)
            nn.init.normal_(layer.weight, std=fan_in**-0.5)
            nn.init.zeros_(layer.bias)
            layers += [layer, Mish()]
        super().__init__(*layers[:-1])


class Policy(nn.Module):
    """epsilon_theta(a^k, k; s): states (B, S), noised actions (B, A), k - 1 (B,) or () -> noise (B, A)."""

    def __init__(self, obs_dim: int, act_dim: int, time_dim: int = 16) -> None:
        super().__init__()
        self.act_dim, half = act_dim, time_dim // 2
        self.frequencies = nn.Buffer(10_000 ** (-torch.arange(half) / half), persistent=False)
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


# ----------------------------------------------------------------------------------------------------------- Diffusion
class Diffusion:
    """Noise schedule, forward noising, action approximation, samplers. Step k of the paper is index k - 1 of (K,)."""

    def __init__(self, args: Args, device: torch.device) -> None:
        self.K, steps, order = args.diffusion_steps, args.sampler_steps, args.solver_order
        table, k = partial(torch.as_tensor, dtype=torch.float32, device=device), np.arange(1, self.K + 1)
        beta = np.linspace(0.1 / self.K, 20 / self.K, self.K)  # 1e-4 to 0.02 at K = 1000
        alpha_bar = np.cumprod(1 - beta)
        # DPM-Solver ends at abar^1, which must be near 1, and starts at abar^K, which must not be tiny
        if beta[-1] >= 1 or (args.sampler == "dpm-solver" and (alpha_bar[0] < 0.98 or alpha_bar[-1] < 1e-6)):
            fail(f"--diffusion-steps {self.K}: no schedule for {args.sampler} (linear: 30 or more; --sampler ddpm: 21)")
        alpha_bar_prev = np.append(1.0, alpha_bar[:-1])
        self.sample, self.num_noises, self.k_index = self.dpm_solver, 1, table(k - 1)
        if args.sampler == "ddpm":  # to compile more than 20 unrolled steps takes minutes
            self.sample = torch.compiler.disable(self.ddpm) if self.K > 20 else self.ddpm
            self.num_noises = self.K + 1
        self.sqrt_alpha_bar = table(alpha_bar**0.5)
        self.sqrt_one_minus_alpha_bar = table((1 - alpha_bar) ** 0.5)
        # The paper's ELBO weight divides by 1 - abar^{k-1}, which is 0 at k = 1: there, by 1 - abar^1
        self.elbo_weight = table(beta / (2 * (1 - beta) * np.maximum(1 - alpha_bar_prev, 1 - alpha_bar[0])))
        # DDPM: mean and deviation of q(a^{k-1} | a^k, a^0)
        self.posterior_a0 = table(beta * alpha_bar_prev**0.5 / (1 - alpha_bar))
        self.posterior_ak = table((1 - alpha_bar_prev) * (1 - beta) ** 0.5 / (1 - alpha_bar))
        self.posterior_std = table((beta * (1 - alpha_bar_prev) / (1 - alpha_bar)) ** 0.5)
        # DPM-Solver calls the network at times t from 1 to 1e-3, or to the first step; log alpha_t is linear between
        # the t = k / K. The official code always ends at 1e-3, which gives NaN for small K
        t = np.linspace(1.0, max(1e-3, 1 / self.K), steps + 1)
        log_alpha = np.interp(t, k / self.K, 0.5 * np.log(alpha_bar))
        log_sigma = 0.5 * np.log(1 - np.exp(2 * log_alpha))
        self.alpha, self.sigma = np.exp(log_alpha).tolist(), np.exp(log_sigma).tolist()
        self.lambda_ = (log_alpha - log_sigma).tolist()
        self.t_index = table(self.K * t - 1)  # fractional steps
        self.orders = [order] * (steps // order) + [steps % order] * (steps % order > 0)
        if order == 3 and steps % 3 == 0:  # lower orders at the end, for stability
            self.orders[-1:] = [2, 1]

    def add_noise(self, a0: Tensor, k: Tensor, epsilon: Tensor) -> Tensor:
        """a^k of actions (B, A), steps (B,) and noise (B, A)."""
        return self.sqrt_alpha_bar[k, None] * a0 + self.sqrt_one_minus_alpha_bar[k, None] * epsilon

    def approximate(self, a_k: Tensor, k: Tensor | int, epsilon: Tensor) -> Tensor:
        """a_hat^0 (B, A); clipped to [-1, 1] as in the official code: no gradient outside."""
        a0 = (a_k - self.sqrt_one_minus_alpha_bar[k, None] * epsilon) / self.sqrt_alpha_bar[k, None]
        return a0.clamp(-1, 1)

    def ddpm(self, policy: Policy, s: Tensor, noise: Tensor) -> Tensor:
        """Ancestral sampling; noise (K + 1, B, A): a^K, then one per step."""
        a = noise[0]
        for k, z in zip(reversed(range(self.K)), noise[1:], strict=True):
            a0 = self.approximate(a, k, policy(s, a, self.k_index[k]))
            a = self.posterior_a0[k] * a0 + self.posterior_ak[k] * a + self.posterior_std[k] * z  # std is 0 at k = 1
        return a

    def dpm_solver(self, policy: Policy, s: Tensor, noise: Tensor) -> Tensor:
        """Singlestep DPM-Solver; noise (1, B, A): a^K."""

        def epsilon(x, i):
            """Predicted noise at t_i, clipped so that its a_hat^0 is in [-1, 1]."""
            predicted = policy(s, x, self.t_index[i])
            a0 = ((x - self.sigma[i] * predicted) / self.alpha[i]).clamp(-1, 1)
            return (x - self.alpha[i] * a0) / self.sigma[i]

        a, i = noise[0], 0
        for order in self.orders:
            a = self.dpm_solver_step(epsilon, a, i, order)
            i += order
        return a

    def dpm_solver_step(self, epsilon: Callable, x: Tensor, i: int, order: int) -> Tensor:
        """x at t_i -> x at t_{i + order}, with `order` calls of epsilon(x, j), the noise at t_j."""
        e0, alpha, sigma = epsilon(x, i), self.alpha[i:], self.sigma[i:]
        h = [lambda_ - self.lambda_[i] for lambda_ in self.lambda_[i:]]  # r_1 h, r_2 h and h of the paper

        def move(j, correction=0.0):
            return alpha[j] / alpha[0] * x - sigma[j] * (math.expm1(h[j]) * e0 + correction)

        if order == 1:  # DPM-Solver-1, which is DDIM
            return move(1)
        d1 = epsilon(move(1), i + 1) - e0
        if order == 2:  # DPM-Solver-2
            return move(2, math.expm1(h[2]) * h[2] / (2 * h[1]) * d1)
        d2 = epsilon(move(2, (math.expm1(h[2]) - h[2]) / h[1] * d1), i + 2) - e0  # DPM-Solver-3
        return move(3, (math.expm1(h[3]) - h[3]) / h[2] * d2)


# ----------------------------------------------------------------------------------------------------------- Algorithm
def crr_advantage(critic: Critic, s: Tensor, q: Tensor, a_hat_0: Tensor, z: Tensor) -> Tensor:
    """Q(s, a), given as q (B,), less the mean of Q(s, a_hat^0 + z) over normal z (M, B, A), not clipped."""
    q_samples = torch.minimum(*critic(s.repeat(len(z), 1), (a_hat_0 + z).flatten(0, 1)))
    return q - q_samples.view(len(z), -1).mean(0)


def crr_weight(advantage: Tensor, temperature: float, cap: float) -> Tensor:
    """f_CRR = exp(advantage / tau), (B,); cap as in the official code."""
    return (advantage / temperature).exp().clamp(max=cap)


def make_networks(obs_dim: int, act_dim: int) -> dict:
    """The networks and their target copies."""
    networks: dict[str, Any] = {"policy": Policy(obs_dim, act_dim), "critic": Critic(obs_dim, act_dim)}
    return networks | {f"{name}_target": copy.deepcopy(net).requires_grad_(False) for name, net in networks.items()}


def draw(args: Args, diffusion: Diffusion, act_dim: int, device: torch.device) -> dict:
    """Random draws of one update: diffusion steps k and noise epsilon; noise of next actions; z of the advantage."""
    k, shape = torch.randint(diffusion.K, (args.batch_size,), device=device), (args.batch_size, act_dim)
    sizes = {"epsilon": shape, "noise": (diffusion.num_noises, *shape), "z": (args.advantage_samples, *shape)}
    return {"k": k} | {name: torch.randn(size, device=device) for name, size in sizes.items()}


def make_update(args: Args, diffusion: Diffusion, networks: dict) -> tuple:
    """Algorithm 1 with CRR's weights: update(batch, its number, draws) -> metrics; and the optimiser."""
    policy, critic, policy_target, critic_target = networks.values()
    backward, step, optimizer = make_optimizer(args, networks)

    def update(s, a, next_s, r, mask, count, k, epsilon, noise, z):
        # Q: TD target from a whole sample of the target policy. The official code does not clip it either
        with torch.no_grad():
            next_v = torch.minimum(*critic_target(next_s, diffusion.sample(policy_target, next_s, noise)))
        q1, q2 = critic(s, a)
        target = r + args.gamma * mask * next_v
        qf1_loss, qf2_loss = nn.functional.mse_loss(q1, target), nn.functional.mse_loss(q2, target)

        # Policy: diffusion loss, and weighted regression of the action approximation
        a_k = diffusion.add_noise(a, k, epsilon)
        epsilon_hat = policy(s, a_k, k)
        a_hat_0 = diffusion.approximate(a_k, k, epsilon_hat)
        error = (epsilon - epsilon_hat).square()
        diffusion_loss = error.mean()  # over dimensions too; not in the paper's objective: the official code adds it
        with torch.no_grad():  # Q is the minimum of both critics, as in the official code
            advantage = crr_advantage(critic, s, torch.minimum(q1, q2), a_hat_0, z)
            f = crr_weight(advantage, args.temperature, args.weight_cap)
        if args.likelihood == "mse":  # -log N(a; a_hat^0, I) up to a constant, as the official code
            guidance_loss = 0.5 * (f * (a - a_hat_0).square().sum(1)).mean()
        elif args.likelihood == "elbo":
            guidance_loss = (f * diffusion.elbo_weight[k] * error.sum(1)).mean()
        else:  # not in the paper: DAWR (Ren et al. 2024, arXiv 2409.00588), with weights of mean 1
            guidance_loss = (f / f.mean() * error.mean(1)).mean()
        policy_loss = args.diffusion_coef * diffusion_loss + args.guidance_coef * guidance_loss

        # Detach now: if a loss is used after autograd.grad, the compiler splits the update into several graphs
        losses = {"policy_loss": policy_loss, "diffusion_loss": diffusion_loss, "guidance_loss": guidance_loss}
        losses |= {"qf1_loss": qf1_loss, "qf2_loss": qf2_loss, "q_mean": q1.mean()}
        losses |= {"advantage_mean": advantage.mean(), "weight_mean": f.mean()}
        metrics = {f"losses/{name}": loss.detach() for name, loss in losses.items()}
        backward(policy, policy_loss)
        backward(critic.q1, qf1_loss)
        backward(critic.q2, qf2_loss)
        step()
        with torch.no_grad():
            torch._foreach_lerp_(list(critic_target.parameters()), list(critic.parameters()), args.tau)
            moves = (count > 1_000) & (count % 5 == 0)  # as in the official code
            for target, parameter in zip(policy_target.parameters(), policy.parameters()):
                target.lerp_(parameter, moves * args.tau)
        return metrics

    return update, optimizer


@torch.no_grad()
def select_actions(diffusion: Diffusion, policy: Policy, critic: Critic, s: Tensor, candidates: int) -> Tensor:
    """Energy-based action selection: s (n, S) -> (n, A), one of N samples, drawn with probability ~ exp(min Q)."""
    s = s.repeat_interleave(candidates, dim=0)
    noise = torch.randn(diffusion.num_noises, len(s), policy.act_dim, device=s.device)
    a = diffusion.sample(policy, s, noise).clamp(-1, 1)  # the official code does not clip, DPM-Solver can exceed 1
    q = torch.minimum(*critic(s, a)).view(-1, candidates)
    choice = torch.multinomial(q.nan_to_num().softmax(dim=1), 1)
    return a.view(*q.shape, -1).take_along_dim(choice[..., None], dim=1)[:, 0]


# ---------------------------------------------------------------------------------------------------------------- Data
# Presets of the families of D4RL's and Minari's ids. Rewards and bounds of the gradient norm are the official code's.
LOCOMOTION: dict = {}  # a fork (yueyang130/SEEM) has a guidance_coef of 0.01
SPARSE = {"reward_transform": "min-max", "num_updates": 1_000_000}
ANTMAZE = SPARSE | {"reward_transform": "times-four"}
CLIPS = {  # those other than 5
    "halfcheetah-medium": 9, "halfcheetah-medium-replay": 2, "halfcheetah-medium-expert": 7,
    "hopper-medium": 9, "hopper-medium-replay": 4, "walker2d-medium": 1, "walker2d-medium-replay": 4,
    "antmaze-umaze": 2, "antmaze-umaze-diverse": 3, "antmaze-medium-play": 2, "antmaze-medium-diverse": 1,
    "antmaze-large-play": 10, "antmaze-large-diverse": 7, "pen-human": 7, "pen-cloned": 8,
    "kitchen-complete": 9, "kitchen-partial": 10, "kitchen-mixed": 10,
}  # fmt: skip
# The small sets are ours, and so are their settings: tuned on Hopper, for short runs on a CPU.
MINI = {
    "reward_transform": "return-range", "num_updates": 20_000, "lr": 1e-3, "normalize_observations": True,
    "diffusion_steps": 100, "eval_every": 5_000, "eval_candidates": 10, "log_every": 250, "save_every": 2_500,
    "guidance_coef": 0.01,  # with the paper's 1, the noisy regression loss dominates the diffusion loss
}  # fmt: skip
# Hopper's medium policy is fast but falls after about 340 steps: critics need a longer horizon to see it.
FAR_SIGHTED = {"gamma": 0.995, "tau": 0.05}
TASKS: dict[str, Any] = {  # name: preset, environment, its options, D4RL's returns of a random and an expert policy
    "hopper": (LOCOMOTION, "Hopper-v4", {}, (-20.272305, 3234.3)),
    "walker2d": (LOCOMOTION, "Walker2d-v4", {}, (1.629008, 4592.3)),
    "halfcheetah": (LOCOMOTION, "HalfCheetah-v4", {}, (-280.178953, 12135.0)),
    "ant": (LOCOMOTION, "Ant-v4", {"use_contact_forces": True}, (-325.6, 3879.7)),  # D4RL's 111 dimensions
    "pen": (SPARSE, "gymnasium_robotics:AdroitHandPen-v1", {"max_episode_steps": 100}, (96.262799, 3076.833102)),
    "door": (SPARSE, "gymnasium_robotics:AdroitHandDoor-v1", {}, (-56.512833, 2880.569309)),
    "hammer": (SPARSE, "gymnasium_robotics:AdroitHandHammer-v1", {}, (-274.856578, 12794.134825)),
    "relocate": (SPARSE, "gymnasium_robotics:AdroitHandRelocate-v1", {}, (-6.425911, 4233.877798)),
    "antmaze": (ANTMAZE, None, {}, None),  # the environments of D4RL's data are not those of today
    "kitchen": (SPARSE, None, {}, None),
}
LEVELS = ("random", "medium", "medium_replay", "medium_expert", "full_replay", "expert")
D4RL = {f"{a}-{b.replace('_', '-')}-v2": f"gym_mujoco_v2/{a}_{b}-v2.hdf5" for a in [*TASKS][:4] for b in LEVELS}
D4RL |= {f"{a}-{b}-v1": f"hand_dapg_v1/{a}-{b}-v1.hdf5" for a in [*TASKS][4:8] for b in ("human", "cloned", "expert")}
D4RL_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
MIRROR = "https://huggingface.co/datasets/imone/D4RL/resolve/main/"
KEYS = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")


def find_preset(given: Args) -> dict:
    """Settings of a data set, by its id or its family's."""
    if re.fullmatch("(hopper|walker2d|halfcheetah)-medium(-replay|-expert)?-mini", given.env_id):
        return MINI | (FAR_SIGHTED if re.search("hopper-medium-(mini|expert)", given.env_id) else {})
    name = re.sub(r"^\w+/|-v\d+$", "", given.env_id).replace("/", "-")  # Minari's D4RL/antmaze/umaze-v1 too
    return TASKS.get(name.split("-")[0], ({},))[0] | {"max_grad_norm": float(CLIPS.get(name, 5))}


def flatten(obs, rows: int) -> np.ndarray:
    """Observations as (rows, S); dictionaries in sorted key order."""
    if isinstance(obs, dict):
        return np.concatenate([flatten(obs[key], rows) for key in sorted(obs)], axis=1)
    return np.reshape(obs, (rows, -1))


def read_minari(env_id: str) -> tuple:
    """Columns, environment and reference returns of a Minari set."""
    import minari  # pip install 'minari[all]'

    dataset, episodes = minari.load_dataset(env_id, download=True), []
    meta = dataset.storage.metadata
    if meta.get("eval_env_spec") not in (None, meta.get("env_spec")):
        say(f"note: {env_id} is evaluated in another environment than that of its data")
    for e in dataset.iterate_episodes():
        obs, timeouts = flatten(e.observations, len(e.rewards) + 1), e.truncations & ~e.terminations
        timeouts[-1] = not e.terminations[-1]  # an episode may end with neither flag
        episodes.append((obs[:-1], e.actions, e.rewards, e.terminations, timeouts, obs[1:]))
    columns = dict(zip(KEYS, map(np.concatenate, zip(*episodes))))
    reference = (meta.get("ref_min_score"), meta.get("ref_max_score"))
    return columns, partial(dataset.recover_environment, eval_env=True), None if None in reference else reference


def read_hdf5(args: Args) -> dict:
    """Columns of --dataset-path, a bundled file, or D4RL's in D4RL_DATASET_DIR, downloaded where it is missing."""
    path = Path(args.dataset_path or Path(__file__).with_name("datasets") / f"{args.env_id}.hdf5")
    if args.env_id in D4RL and not args.dataset_path:
        path = Path(os.environ.get("D4RL_DATASET_DIR", Path.home() / ".d4rl/datasets"), Path(D4RL[args.env_id]).name)
        for url in (D4RL_URL + D4RL[args.env_id], MIRROR + path.name):
            with suppress(OSError):  # requests raises OSErrors
                pooch.retrieve(url, None, path.name, path.parent)  # skipped if the file exists
    if not path.is_file():
        raise OSError(f"{path} is missing. See github.com/OWNER/REPOSITORY, {D4RL_URL}, or give --dataset-path")
    with h5py.File(path, "r", locking=False) as file:  # some file systems have no locks
        columns = {key: np.asarray(file[key]) for key in KEYS if key in KEYS[:4] or key in file}
        for key in file.keys() & {"episode_terminals", "truncations", "truncated"}:  # names in other tools
            columns.setdefault("timeouts", np.ravel(file[key]) > np.ravel(file["terminals"]))
    return columns


def check(columns: dict) -> None:
    """Bring columns into shape; add "ends", the last rows of episodes. ValueError if they are unusable."""
    if not columns.keys() & {"timeouts", "next_observations"}:
        raise ValueError("needs timeouts or next_observations, to tell which rows follow each other")
    n, widths = columns["rewards"].size, {key: columns[key].shape[-1:] for key in ("observations", "actions")}
    for key, column in columns.items():
        shape, flag = (n, *widths.get(key.removeprefix("next_"), ())), key in ("terminals", "timeouts")
        if column.shape not in (shape, (*shape, 1)):
            raise ValueError(f"{key} has shape {column.shape}, expected {shape}")
        valid = np.isin(column, (0, 1)) if flag else column.dtype.kind in "fiub" and np.abs(column) < np.float32(1e8)
        if not np.all(valid):
            raise ValueError(f"{key} has values that are not {'0 or 1' if flag else 'finite numbers up to 1e8'}")
        columns[key] = column.reshape(shape).astype(bool if flag else column.dtype)
    if columns["terminals"].mean() > 0.5:
        say("warning: more than half of the rows are terminal. Does the file store 1 - terminal?", sys.stderr)
    if "timeouts" not in columns:  # as d4rl.qlearning_dataset returns them
        follows = np.isclose(columns["next_observations"], np.roll(columns["observations"], -1, axis=0), atol=1e-6)
        columns["timeouts"], columns["ends"] = np.zeros(n, bool), ~np.all(follows, axis=1)
    columns["ends"] = columns["terminals"] | columns.get("ends", columns["timeouts"])


def load_task(args: Args) -> tuple:
    """Columns, environment and reference returns of --env-id, both with actions in [-1, 1]; exit 2 if unusable."""
    _, gym_id, options, reference = TASKS.get(args.env_id.split("-")[0], ({}, args.env_id, {}, None))
    make, hint = partial(gym.make, gym_id, **options), ""
    warnings.filterwarnings("ignore", ".*(out of date|GLFW|X11)")  # D4RL's tasks are of version 4

    def make_env(**options):
        env: Any = gym.wrappers.RescaleAction(make(**options), np.float32(-1), np.float32(1))
        space = gym.spaces.flatten_space(env.observation_space)
        env = gym.wrappers.TransformObservation(env, lambda obs: flatten(obs, 1)[0], space)
        return gym.wrappers.TimeLimit(env, env.spec.max_episode_steps or longest)  # of the data's episodes

    try:
        if "/" in args.env_id and not args.dataset_path:
            columns, make, reference = read_minari(args.env_id)
        else:
            columns = read_hdf5(args)
        check(columns)
        longest = int(np.diff(np.flatnonzero(columns["ends"]), prepend=-1, append=len(columns["ends"]) - 1).max())
        if evaluated := gym_id and args.eval_episodes:
            hint = "; does it need gymnasium-robotics, mujoco<3.12 (kitchen), or MUJOCO_GL=egl or osmesa (videos)?"
            env = make_env(**{"render_mode": "rgb_array"} if args.capture_video else {})
            if args.capture_video:
                env.reset()
                env.render()
            hint, shapes = "", env.observation_space.shape + env.action_space.shape
            if shapes != (ours := columns["observations"].shape[1:] + columns["actions"].shape[1:]):
                raise ValueError(f"{env.spec.id} has observations and actions of shapes {shapes}, the data {ours}")
            if env.unwrapped.spec.max_episode_steps is None:
                say(f"note: {env.spec.id} has no step limit: episodes end after {longest} steps, the data's longest")
            box = env.unwrapped.action_space
            columns["actions"] = (columns["actions"] - (box.high + box.low) / 2) / ((box.high - box.low) / 2)
        elif gym_id is None:
            say(f"note: no evaluation: today's environments differ from that of {args.env_id}")
        if beyond := (np.abs(columns["actions"]) > 1.001).mean():
            if not evaluated:
                raise ValueError("actions exceed [-1, 1], and no environment gives their range")
            say(f"warning: {beyond:.1%} of the actions are out of the environment's range and are clipped", sys.stderr)
    except Exception as error:  # damaged file, network, Minari: many types
        close = difflib.get_close_matches(args.env_id, [*D4RL, *gym.registry], cutoff=0.9)
        hint += f"; close ids: {', '.join(close)}" if close and args.env_id not in close else ""
        fail(f"{args.dataset_path or args.env_id}: {str(error) or repr(error)}{hint}")
    return columns, make_env if evaluated else None, reference


def make_transitions(columns: dict, args: Args) -> tuple[np.ndarray, dict]:
    """Float32 rows [s, a, s', r, mask] of D4RL's qlearning_dataset; transform (s - mean) / std, scale (r + shift)."""
    obs, r = columns["observations"], columns["rewards"].astype(np.float64)
    keep = ~columns["timeouts"] & (np.arange(len(r)) < len(r) - 1)  # terminal rows are kept, with a mask of 0
    if not keep.any():
        fail("the data hold no transition: timeout rows and the last row are dropped")
    returns = np.add.reduceat(r, np.flatnonzero(np.append(True, columns["ends"][:-1])))
    spread = np.ptp(returns)  # if all returns are equal, rewards are not scaled
    shift, scale = {
        "none": (0.0, 1.0),
        "return-range": (0.0, 1_000 / spread if spread > 1e-6 * np.abs(returns).max() else 1.0),
        "minus-one": (-1.0, 1.0),
        "times-four": (-0.5, 4.0),
        "min-max": (-(r.min() + r.max()) / 2, 2 / max(np.ptp(r), 1e-6)),
    }[args.reward_transform]
    mean, std = np.zeros(obs.shape[1]), np.ones(obs.shape[1])
    if args.normalize_observations:
        mean, std = obs.mean(0, dtype=np.float64), obs.std(0, dtype=np.float64).clip(1e-3)
    next_obs = columns.get("next_observations", np.roll(obs, -1, axis=0))
    actions = columns["actions"].clip(-0.999, 0.999)  # as the official code
    parts = ((obs - mean) / std, actions, (next_obs - mean) / std, scale * (r + shift), ~columns["terminals"])
    transitions = np.column_stack([part[keep].astype(np.float32) for part in parts])
    return transitions, {"mean": mean.tolist(), "std": std.tolist(), "shift": float(shift), "scale": float(scale)}


# ---------------------------------------------------------------------------------------------------------- Evaluation
def evaluate(act: Callable, envs: list, seeds: list, stop: list) -> dict:
    """One episode per environment, side by side; act maps observations (n, S) to actions. {} if a signal came."""
    obs = np.stack([env.reset(seed=seed)[0] for env, seed in zip(envs, seeds)])
    found = {"episodic_return": np.zeros(len(envs)), "episodic_length": np.zeros(len(envs))}
    running = list(range(len(envs)))
    while running and not stop:
        actions = act(obs)  # finished episodes too, to keep shapes fixed
        for i in list(running):
            obs[i], reward, terminated, truncated, info = envs[i].step(actions[i])
            found["episodic_return"][i] += reward
            found["episodic_length"][i] += 1
            for key in info.keys() & {"success", "is_success"}:  # Adroit, AntMaze: success at any step
                success = found.setdefault("success", np.zeros(len(envs)))
                success[i] = max(success[i], info[key])
            if terminated or truncated:
                running.remove(i)
    return {} if stop else found


# -------------------------------------------------------------------------------------------------- Speed, checkpoints
def make_optimizer(args: Args, networks: dict) -> tuple:
    """backward(network, loss) sets clipped gradients, step() updates the networks that have them; and the Adam."""
    trained = [p for network in networks.values() for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, args.lr, fused=True, capturable=trained[0].is_cuda)

    def backward(network, loss):
        parameters = list(network.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)  # of each network, as the official code

    @torch.compiler.disable  # the code between two steps compiles as one piece
    def step():
        optimizer.step()
        optimizer.zero_grad()

    return backward, step, optimizer


def graphed(function: Callable) -> Iterator:
    """Results of function() by a CUDA graph: Python numbers are frozen, and all results share one buffer."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    for _ in range(3):  # warm-up on a side stream, before the capture
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = function()
        torch.cuda.current_stream().wait_stream(stream)
        yield result
    with torch.cuda.graph(graph, stream=stream):
        result = function()
    while True:
        graph.replay()
        yield result


def load_checkpoint(folder: str) -> dict:
    """The checkpoint of a run folder; exit 2 if there is none."""
    try:
        checkpoint = torch.load(Path(folder) / "checkpoint.pt", map_location="cpu", weights_only=True)
        Args(**checkpoint["args"]), checkpoint["optimizer"]  # fails for another script or version
        return checkpoint
    except Exception as error:  # whatever torch.load raises
        fail(f"--resume {folder}: {error!r}")


# ---------------------------------------------------------------------------------------------------------------- main
def say(text, file=None) -> None:
    """Print above the progress bar. Never fails: not on a closed terminal, nor on a full disk."""
    file = file or sys.stdout
    try:
        tqdm.write(str(text), file=file)
        file.flush()
    except OSError:  # avoid a second error when Python flushes at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def fail(message, code: int = 2) -> NoReturn:
    """End with one line on stderr; exit code 2: bad arguments or data."""
    say(f"{Path(__file__).name}: error: {' '.join(str(message).split())}", sys.stderr)
    raise SystemExit(code)


def parse_args(argv: list[str]) -> Args:
    """In this order: command line, resumed checkpoint, preset of the data set, default."""
    given = tyro.cli(Args, args=[flag for flag in argv if flag not in ("-h", "--help")])
    saved = load_checkpoint(given.resume)["args"] if given.resume else {}
    preset = find_preset(given)
    about = f"{Args.__doc__} Defaults from the preset of {given.env_id}: {', '.join(preset) or 'none'}."
    default = Args(**(preset | {"env_id": given.env_id} | saved | {"resume": given.resume}))
    return tyro.cli(Args, args=argv, default=default, description=about)


def main(args: Args) -> dict:
    """Train and evaluate; returns what result.json holds."""
    with ExitStack() as exits:  # leaves files, terminal and signals as they were
        return run(args, exits)


def run(args: Args, exits: ExitStack) -> dict:
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    try:
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.zeros(1, device=args.device.replace("auto", auto)).device
    except Exception as error:  # backends raise different types
        fail(f"--device {args.device}: {error}")
    torch.set_num_threads(args.num_threads)
    torch.set_float32_matmul_precision(args.matmul_precision)
    torch.manual_seed(args.seed)
    for option in (-1, -3) if sys.platform == "linux" else ():  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: stop glibc
        ctypes.CDLL(None).mallopt(option, 32 << 20)  # returning freed memory; uncompiled, page faults cost a tenth

    # Data and environments
    saved = load_checkpoint(args.resume or "(--eval-only needs it)") if args.resume or args.eval_only else {}
    columns, make_env, reference = load_task(args)
    transitions, transform = make_transitions(columns, args)
    digest = hashlib.sha256(transitions.tobytes()).hexdigest()
    if saved.get("data", digest) != digest:
        fail("the data differ from those of the resumed run")
    obs_dim, act_dim = columns["observations"].shape[1], columns["actions"].shape[1]
    data = torch.as_tensor(transitions, device=device)
    name = re.sub(r"[^\w.-]", "_", f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns() // 1_000_000}")
    folder = Path(args.resume if args.resume and not args.eval_only else Path(args.runs_dir, name)).resolve()
    envs = [exits.enter_context(make_env()) for _ in range(args.eval_episodes)] if make_env else []
    if envs and args.capture_video:
        film = partial(gym.wrappers.RecordVideo, name_prefix=f"from-{saved.get('step', 0)}")  # not over older ones
        envs[0] = exits.enter_context(film(make_env(render_mode="rgb_array"), str(folder / "videos"), lambda _: True))

    # Networks, optimisers, update
    diffusion = Diffusion(args, device)
    networks = {name: network.to(device) for name, network in make_networks(obs_dim, act_dim).items()}
    update, optimizer = make_update(args, diffusion, networks)
    state = networks | {"optimizer": optimizer}
    if saved:
        saved["optimizer"]["param_groups"] = optimizer.state_dict()["param_groups"]  # this device's options
        for name, part in state.items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["rng"][0])
        torch.cuda.set_rng_state_all(saved["rng"][1 : 1 + torch.cuda.device_count()])
    step, seconds = saved.get("step", 0), saved.get("seconds", 1e-9)
    evaluations, logged = ({}, 0) if args.eval_only else (saved.get("evaluations", {}), saved.get("logged", 0))
    count = torch.full((), step, device=device)  # of updates; a tensor, as CUDA graphs freeze numbers

    def train():
        count.add_(1)
        index = torch.randint(len(data), (args.batch_size,), device=device)
        s, a, next_s, r, mask = data[index].split([obs_dim, act_dim, obs_dim, 1, 1], dim=1)
        return update(s, a, next_s, r[:, 0], mask[:, 0], count, **draw(args, diffusion, act_dim, device))

    observed = torch.zeros(args.eval_episodes, obs_dim, device=device)
    select = partial(select_actions, diffusion, networks["policy"], networks["critic"], observed, args.eval_candidates)

    def act(obs):
        observed.copy_(torch.as_tensor((obs - transform["mean"]) / transform["std"]))
        return select().cpu().numpy()

    # Acceleration: without this block the results are the same
    if args.compile == "on" or (args.compile == "auto" and (device.type == "cuda" or args.num_updates >= 10_000)):
        say("compiling: the first update may take a minute")
        torch._dynamo.config.trace_autograd_ops = True  # a loss and its gradient in one piece
        torch._dynamo.config.suppress_errors = True  # without a compiler, run uncompiled
        torch._inductor.config.fallback_random = True  # the same noise as without
        update = torch.compile(update)
        if device.type == "cuda":
            for name in ("policy", "critic"):
                networks[name].compile()
            train, select = graphed(train).__next__, graphed(select).__next__  # type: ignore[assignment]

    # Run files
    writer = exits.enter_context(SummaryWriter(str(folder), purge_step=step + 1))
    about = {"args": vars(args), "data": digest, "torch": str(torch.__version__), "device": str(device)}
    about["commit"] = subprocess.getoutput(f'git -C "{Path(__file__).parent}" describe --always --dirty 2>/dev/null')
    (folder / f"args{f'-{step}' if logged else ''}.json").write_text(json.dumps(about, indent=1) + "\n")
    say(f"{folder}: {len(data)} transitions, {json.dumps(about, indent=1)}")
    rows = exits.enter_context(open(folder / "metrics.jsonl", "a"))  # noqa: SIM115
    rows.truncate(logged)  # drop rows logged after the checkpoint
    if args.track:
        import wandb

        try:
            group = os.environ.get("WANDB_RUN_GROUP", folder.name)  # each start is a new run there
            wandb.init(project=args.wandb_project, group=group, name=folder.name, config=vars(args), dir=folder.parent)
            exits.enter_context(wandb.run)  # type: ignore[arg-type]
        except Exception as error:  # no key, no network
            fail(f"--track: {error}; `wandb login`, or set WANDB_API_KEY or WANDB_MODE=offline")
    bar = exits.enter_context(tqdm(total=args.num_updates, initial=step, disable=not sys.stderr.isatty()))

    def log(numbers, episodes):
        """A row to metrics.jsonl; its numbers to TensorBoard, Weights & Biases and the terminal."""
        print(json.dumps({"step": step, **numbers, **episodes}), file=rows, flush=True)
        try:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)
            if args.track:
                wandb.log(numbers | {"global_step": step})
        except Exception as error:  # the file has everything
            say(f"warning: update {step} not logged to TensorBoard or Weights & Biases: {error!r}", sys.stderr)
        told = [name for name in numbers if re.search("charts|diffusion|q_mean", name)]
        shown = ", ".join(f"{name.split('/')[1]} {numbers[name]:.4g}" for name in told)
        bar.set_postfix_str(shown)
        say(f"update {step}/{args.num_updates}: {shown}")

    stop: list[int] = []  # signals received
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) != signal.SIG_IGN:  # of nohup
            exits.callback(signal.signal, number, signal.signal(number, lambda number, frame: stop.append(number)))

    # Loop
    metrics, begin, start = dict[str, Tensor](), step, 0.0
    while True:
        last = args.eval_only or step >= args.num_updates
        stopping = bool(stop)  # later signals wait for the next save
        evaluating = envs and (last or step % args.eval_every == 0 < step)
        saving = metrics and (last or stopping or evaluating or step % args.save_every == 0)
        logging = metrics and (saving or step % args.log_every == 0)
        if logging:
            values = {name: float(value) for name, value in metrics.items()}  # waits for the device
            seconds += (time.perf_counter() - start) * (step > begin + 1)
            log(values | {"charts/SPS": step / seconds}, {})
            if not all(map(math.isfinite, values.values())):
                fail(f"diverged at update {step}; {folder} keeps the checkpoint before", code=3)
        if saving:  # before an evaluation, in which an environment may fail
            checkpoint = about | {name: part.state_dict() for name, part in state.items()}
            checkpoint |= {"step": step, "evaluations": evaluations, "seconds": seconds, "logged": rows.tell()}
            checkpoint |= {"transform": transform, "rng": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]}
            with open(folder / "checkpoint.tmp", "wb") as file:  # a temporary file: a kill or a full disk is harmless
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(file.name, folder / "checkpoint.pt")
        if evaluating and not stopping:
            seeds = np.random.default_rng([args.seed, step]).integers(2**31, size=args.eval_episodes).tolist()
            with torch.random.fork_rng(range(torch.cuda.device_count())):  # evaluations do not disturb training
                torch.manual_seed(args.seed + 1_000_003 * step)
                episodes = evaluate(act, envs, seeds, stop)
            if episodes:
                if reference:
                    worst, best = reference
                    episodes["normalized_score"] = 100 * (episodes["episodic_return"] - worst) / (best - worst)
                for name, column in episodes.items():
                    evaluations.setdefault(name, []).append(float(column.mean()))
                each = {f"episodes/{name}": column.tolist() for name, column in episodes.items()}
                log({f"charts/{name}": means[-1] for name, means in evaluations.items()}, each)
        if stopping or (stop and evaluating):
            say(f"stopped at update {step}; continue with --resume {folder}", sys.stderr)
            raise SystemExit(128 + stop[0])
        if last:
            break
        if logging or evaluating or step <= begin + 1:  # SPS without evaluations, and without compiling
            start = time.perf_counter()
        metrics = train()
        step += 1
        bar.update()

    result = {"updates": step, "updates_per_second": step / seconds, "run_dir": str(folder)}
    for name, means in evaluations.items():
        last_10 = float(np.mean(means[-10:]))  # the paper's RAT; best is its OMS
        result[name] = {"last": means[-1], "mean_of_last_10": last_10, "best": max(means), "evaluations": len(means)}
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    say(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    try:
        main(parse_args(sys.argv[1:]))
    except OSError as error:
        fail(f"stopped; the last checkpoint is intact: {error}", code=1)

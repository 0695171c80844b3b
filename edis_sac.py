"""EDIS: energy-guided diffusion sampling for offline-to-online reinforcement learning, on SAC.

Liu et al., Energy-Guided Diffusion Sampling for Offline-to-Online RL, ICML 2024, arXiv 2407.12448
SAC (Haarnoja et al. 2018) is pre-trained offline with CQL (Kumar et al. 2020, arXiv 2006.04779) or Cal-QL (Nakamoto et
al. 2023, arXiv 2303.05479). Online, a diffusion model guided by three energies adds synthetic transitions to the data.

    diffusion          p_theta(x) of x = (s, a, s' - s), EDM (Karras et al. 2022, 2206.00364)    Denoiser, edm_loss
    energies           q ~ p_theta exp(-E1(s) - E2(a|s) - E3(s'|s, a)), e^E = nu / mu            Energies, info_nce
    guided sampling    dx / dsigma = (x - D(x)) / sigma + sigma sum_i lambda_i grad E_i          EDM, Energies.forward
    state energy       mu: states of the most recent transitions; nu: of unguided samples        energy_losses
    policy energy      mu: actions of the policy; nu: of unguided samples                        energy_losses
    transition energy  mu: next states of the environment; nu: of unguided samples               energy_losses
    SAC with CQL       Q on r + gamma V(s'), with the penalty; then policy and temperature       make_update
    Cal-QL             the policy's actions are worth at least the Monte-Carlo return            make_update
    rounds             denoiser, models, energies, then synthetic transitions                    make_round
    batches            of online and synthetic transitions                                       run

Why the energies are trained by the chain rule of probability. At noise level sigma the sampler needs the gradient of
log p_sigma(x) / q_sigma(x) of the noised x = (s, a, s'). This log ratio is the sum E1(s) + E2(a|s) + E3(s'|s, a), where
E1 is the log ratio of noised states and E1 + E2 that of noised pairs (s, a). So InfoNCE trains E1 on states, E1 + E2 on
pairs with E1 fixed, and E3 on top of an energy of recent pairs, as new actions have no observed s' yet. The paper draws
negatives for the clean s. But the energy sees only the noised s, so it averages over the recent states, where the
sampler needs p_theta's states. Both agree only as sigma -> 0 (--conditional-negatives inpainted: the paper's).

Where this differs from the paper and from the published code (github.com/liuxhym/EDIS), a comment says so.
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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

import gymnasium as gym
import h5py
import numpy as np
import pooch
import torch
import torch.nn as nn
import torch.nn.functional as F
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
    log_every: int = 1_000  # updates between two rows of metrics
    save_every: int = 10_000  # updates between two checkpoints; each replaces the one before
    resume: str | None = None  # run folder to continue; its arguments are the defaults
    runs_dir: str = "runs"  # where run folders are made
    track: bool = False  # log to Weights & Biases; WANDB_* environment variables set entity, group and mode
    wandb_project: str = "edp"  # Weights & Biases project
    # data
    env_id: str = "hopper-medium-mini"  # id of bundled data, D4RL or Minari; any environment with --dataset-path
    dataset_path: str | None = None  # HDF5 file in D4RL's layout to train on instead of the id's own data
    reward_transform: Literal["none", "return-range", "minus-one", "times-four", "min-max"] = "none"
    """r; 1000 r / (best - worst return); r - 1 or 4 (r - 0.5), for AntMaze; r scaled to [-1, 1], for Adroit, kitchen"""
    normalize_observations: bool = False  # scale each dimension to mean 0 and standard deviation 1
    # evaluation
    eval_only: bool = False  # evaluate without training: the run of --resume, into a new run folder
    eval_every: int = 10_000  # updates between two evaluations
    eval_episodes: int = 10  # episodes per evaluation, all run side by side; 0: no evaluation
    capture_video: bool = False  # record the first episode of each evaluation to RUN/videos
    # agent
    offline_updates: int = 300_000  # updates before the first step in the environment
    online_steps: int = 200_000  # steps in the environment, one update each
    batch_size: int = 256  # transitions per update
    actor_lr: float = 1e-4  # Adam's learning rate, policy and temperature
    critic_lr: float = 3e-4  # Adam's learning rate, critics
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # update rate of the target networks
    cql_alpha: float = 5.0  # coefficient of the CQL penalty offline; 0: plain SAC; EDIS's code: 10 on MuJoCo
    cql_alpha_online: float = 5.0  # coefficient of the CQL penalty online; EDIS's code adapts it (Lagrange)
    cql_actions: int = 10  # actions per state of each of the penalty's three samples
    calibrate: bool = True  # Cal-QL: the penalty stops at the data's Monte-Carlo return; EDIS's code: offline only
    # synthetic data
    augmentation: Literal["edis", "synther", "offline", "none"] = "edis"
    """synthetic data with energies; without (SynthER); real offline data (as RLPD); online data only"""
    synthetic_ratio: float = 0.2  # share of the augmentation in an online batch; EDIS's code: 0.1 to 0.5, per data set
    round_every: int = 10_000  # online steps between two rounds of training the models and generating
    first_round: int = 1_000  # online steps before the first round (EDIS's code: 1); real offline data until then
    samples: int = 100_000  # synthetic transitions per round, which replace those of the last round
    denoiser_updates: int = 10_000  # updates of the denoiser per round
    denoiser_batch: int = 256  # transitions per update of the denoiser
    denoiser_recent: float = 0.0  # share p of recent transitions in each batch; then exp(-E1) <= 1 / p
    denoiser_width: int = 1_024  # width of the residual network
    denoiser_layers: int = 6  # its residual blocks
    denoiser_lr: float = 3e-4  # AdamW's learning rate, with cosine decay to 0 in each round
    denoiser_ema: float = 0.999  # decay of the averaged weights, which are used for sampling
    sampling_steps: int = 128  # noise levels of the sampler
    sigma_min: float = 0.002  # lowest noise level, in standard deviations of x
    sigma_max: float = 80.0  # highest noise level
    churn: float = 80.0  # S_churn, noise added while sampling
    model_updates: int = 5_000  # updates of the reward, termination and mean dynamics models per round
    energy_updates: int = 2_000  # updates of the energies per round; the published code: 20
    energy_batch: int = 256  # positives per update of the energies
    energy_width: int = 256  # width of the three hidden layers of energies and mean dynamics
    energy_lr: float = 1e-3  # Adam's learning rate, energies and models, with cosine decay to 0 in each round
    negatives: int = 10  # negatives of each positive
    conditional_negatives: Literal["joint", "inpainted"] = "joint"
    """negatives of E2 and E3: samples of p(s, a, s'), see the header; the paper's: a from p(a|s), s' from p(s'|s, a)"""
    inpainting_repeats: int = 10  # repeats of each noise level for inpainted negatives (RePaint)
    positive_buffer: int = 10_000  # most recent transitions, the energies' positives; the published code: all online
    pool: int = 10_000  # unguided samples used as negatives; inpainted: of pool / negatives conditions
    state_scale: float = 1.0  # lambda_1, how strongly E1 guides; 0: off; the published code: 0.01 to 2, per data set
    policy_scale: float = 1.0  # lambda_2, how strongly E2 guides; 0: off
    transition_scale: float = 1.0  # lambda_3, how strongly E3 guides; 0: off
    full_gradient: bool = True  # gradients of E2 and E3 for all their inputs; off: E2 moves only a, E3 only s'
    guidance_clip: float = 10.0  # bound of the norm of sigma sum lambda_i grad E_i, in units of sqrt(dim x)
    # speed
    num_threads: int = 1  # CPU threads; a second one helps only on an idle machine
    compile: Literal["auto", "on", "off"] = "auto"  # compile the update; auto: on cuda, or for 10 000 or more updates
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # high: TF32, medium: bfloat16

    @property
    def num_updates(self) -> int:
        return self.offline_updates + self.online_steps

    def __post_init__(self) -> None:
        shares = ("gamma", "tau", "synthetic_ratio", "denoiser_recent", "denoiser_ema")
        free = "seed eval_episodes offline_updates online_steps denoiser_updates model_updates energy_updates cql_alpha"
        free += " cql_alpha_online churn state_scale policy_scale transition_scale guidance_clip"
        for name, value in vars(self).items():
            low: float = 0 if name in (*shares, *free.split()) else 1 if type(value) is int else 1e-12
            high: float = 1 if name in shares else 1e12
            if type(value) in (int, float) and not low <= value <= high:  # also rejects NaN
                fail(f"--{name.replace('_', '-')} must lie in [{low:g}, {high:g}], got {value}")
        if self.num_updates < 1 or self.sampling_steps < 2 or self.sigma_min > self.sigma_max:
            fail("need at least 1 update, --sampling-steps >= 2 and --sigma-min <= --sigma-max")
        if self.conditional_negatives == "inpainted" and (self.full_gradient or self.pool < self.negatives):
            # E2 and E3 are then defined only up to a function of their conditions
            fail("--conditional-negatives inpainted needs --no-full-gradient, and a --pool of at least --negatives")


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


class Critic(nn.Module):
    """Twin Q(s, a): (B, S), (B, A) -> (B,), (B,)."""

    def __init__(self, obs_dim: int, act_dim: int) -> None:
        super().__init__()
        self.q1, self.q2 = MLP(obs_dim + act_dim, 1), MLP(obs_dim + act_dim, 1)

    def forward(self, s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        sa = torch.cat([s, a], dim=1)
        return self.q1(sa)[:, 0], self.q2(sa)[:, 0]


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
        log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u)^2)
        return u.tanh(), (normal.log_prob(u) - log_slope).sum(-1)


class Denoiser(nn.Module):
    """D_theta(x; sigma) of Karras et al.: normalised and noised x (B, D), sigma (B,) or () -> (B, D)."""

    def __init__(self, dim: int, width: int, layers: int) -> None:
        super().__init__()
        self.first = nn.Linear(dim + 16, width)
        blocks = (nn.Sequential(nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, width)) for _ in range(layers))
        self.blocks = nn.ModuleList(blocks)
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
    """E1(s), E2(a|s), E3(s'|s, a) of noised x = (s, a, s') at sigma, and the base energy of E3.

    E3 is an MLP, as in the published code, plus a term of the residual of s' from its learned mean, with a precision
    per dimension: a plain network misses the small errors of a well-trained denoiser. The dynamics T are
    deterministic, so log p / T is unbounded: errors far below 0.03, or above five times the noise, are damped.
    """

    def __init__(self, obs_dim: int, act_dim: int, width: int) -> None:
        super().__init__()
        S, SA, D = self.ends = (obs_dim, obs_dim + act_dim, 2 * obs_dim + act_dim)  # of s, a, s' in x
        sizes = ((S, 1), (SA, 1), (D, 1 + S), (SA, 1))  # E1, E2, E3, and log p_sigma / q_sigma of recent pairs (s, a)
        self.nets = nn.ModuleList(MLP(end + 1, outputs, (width,) * 3) for end, outputs in sizes)
        self.dynamics = MLP(SA, S, (width,) * 3)  # E[s' | s, a] in the coordinates of x, learned without noise

    def energy(self, i: int, x: Tensor, sigma: Tensor) -> Tensor:
        """The energy (...) of net i, of x (..., end) at sigma (...)."""
        scaled = x / (sigma.square() + 1).sqrt()[..., None]
        out = self.nets[i](torch.cat([scaled, sigma.log()[..., None] / 4], dim=-1))
        if i != 2:
            return out[..., 0]
        SA = self.ends[1]
        residual = x[..., SA:] - self.dynamics(scaled[..., :SA])
        squared = residual.square() / (sigma.square() + 1e-3)[..., None]  # 1e-3: error of the mean
        return out[..., 0] + (F.softplus(out[..., 1:]) * squared / (1 + squared / 25)).sum(-1)

    @torch.enable_grad()
    def forward(self, x: Tensor, sigma: Tensor, scales: tuple[float, ...], full: bool, clip: float) -> Tensor:
        """The guidance sum lambda_i grad E_i (B, D) at x (B, D), sigma ().

        Unless `full`, E1 moves only s, E2 only a, E3 only s'. sigma times the norm of the sum is at most
        clip sqrt(D); the published code clips the norm itself.
        """
        x = x.detach().requires_grad_()
        total, start = torch.zeros((), device=x.device), 0
        for i, (end, scale) in enumerate(zip(self.ends, scales, strict=True)):
            if scale:
                condition = x[:, :start] if full else x[:, :start].detach()
                seen = torch.cat([condition, x[:, start:end]], dim=1)
                total = total + scale * self.energy(i, seen, sigma.expand(len(x))).sum()
            start = end
        gradient = torch.autograd.grad(total, x)[0]
        bound = clip * math.sqrt(x.shape[1]) / sigma
        return gradient * (bound / gradient.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1)


def make_networks(obs_dim: int, act_dim: int, args: Args) -> dict:
    """The agent's networks, then those of the synthetic data. EDIS's code: ReLU, critics of 2 to 5 layers."""
    dim, critic = 2 * obs_dim + act_dim, Critic(obs_dim, act_dim)
    networks: dict = {"actor": Actor(obs_dim, act_dim), "critic": critic}
    networks["critic_target"] = copy.deepcopy(critic).requires_grad_(False)
    networks["temperature"] = nn.ParameterDict({"log_alpha": torch.zeros(())})
    networks["denoiser"] = Denoiser(dim, args.denoiser_width, args.denoiser_layers)
    networks["denoiser_ema"] = copy.deepcopy(networks["denoiser"]).requires_grad_(False)
    networks["energies"] = Energies(obs_dim, act_dim, args.energy_width)
    networks["model"] = MLP(dim, 2)  # reward, logit of termination; published code: reward diffused, no termination
    return networks


# ----------------------------------------------------------------------------------------------------------- Diffusion
class Coordinates:
    """What is diffused: x = (s, a, s' - s), each dimension with mean 0 and deviation 1 in the offline data.

    The paper diffuses s': as a difference, errors are relative to the size of a step.
    """

    def __init__(self, raw: Tensor, obs_dim: int) -> None:
        self.S = obs_dim
        differences = self.differences(raw)
        self.mean, self.std = differences.mean(0), differences.std(0).clamp(min=1e-3)

    def differences(self, raw: Tensor) -> Tensor:
        return torch.cat([raw[:, : -self.S], raw[:, -self.S :] - raw[:, : self.S]], dim=1)

    def normalize(self, raw: Tensor) -> Tensor:
        """(s, a, s') (B, D) -> x."""
        return (self.differences(raw) - self.mean) / self.std

    def denormalize(self, x: Tensor) -> Tensor:
        x = x * self.std + self.mean
        return torch.cat([x[:, : -self.S], x[:, -self.S :] + x[:, : self.S]], dim=1)

    def model_inputs(self, raw: Tensor) -> Tensor:
        """(s, a, s') (B, D), normalised: a fall shows in s', not in s' - s."""
        mean, std = (torch.cat([v[: -self.S], v[: self.S]]) for v in (self.mean, self.std))
        return (raw - mean) / std

    @torch.no_grad()
    def policy(self, actor: Actor, s: Tensor) -> Tensor:
        """Normalised actions (B, A) of the actor in normalised states (B, S)."""
        S, mean, std = self.S, self.mean, self.std
        a, _ = actor(s * std[:S] + mean[:S], torch.randn(len(s), len(mean) - 2 * S, device=s.device))
        return (a - mean[S:-S]) / std[S:-S]


def edm_loss(denoise: Callable, x: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Karras et al.: (sigma^2 + 1) / sigma^2 ||D(x + sigma n; sigma) - x||^2, mean over dimensions; sigma (B,)."""
    error = (denoise(x + sigma[:, None] * noise, sigma) - x).square().mean(1)
    return ((sigma.square() + 1) / sigma.square() * error).mean()


CHUNK = 10_000  # transitions sampled at once: bounds the memory


class EDM:
    """Noise levels and stochastic Heun sampler of Karras et al., Algorithm 2, with guidance."""

    def __init__(self, args: Args, device: torch.device) -> None:
        steps, rho = args.sampling_steps, 7
        sigma = np.linspace(args.sigma_max ** (1 / rho), args.sigma_min ** (1 / rho), steps) ** rho
        gamma = np.where((sigma >= 0.05) & (sigma <= 50), min(args.churn / steps, math.sqrt(2) - 1), 0)
        self.sigma = torch.as_tensor(np.append(sigma, 0), dtype=torch.float32, device=device)
        self.sigma_hat = torch.as_tensor(sigma * (1 + gamma), dtype=torch.float32, device=device)  # after churning

    @torch.no_grad()
    def sample(self, denoise: Callable, x: Tensor, guidance=None, visited=None, held=None, repeats: int = 1) -> Tensor:
        """Standard normal x (B, D) -> samples (B, D); `visited` stores the last dimensions of x at each sigma.

        Inpainting: the first dimensions are `held` (B, H), noised anew at each sigma. The others follow p(rest | held)
        only if each sigma is passed several times (RePaint, Lugmayr et al. 2022, arXiv 2201.09865).
        """

        def derivative(x: Tensor, sigma: Tensor) -> Tensor:
            """dx / dsigma, guided; the published code has no factor sigma."""
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
                if visited is not None:
                    visited[i] = x[:, -visited.shape[2] :]
                x = x + 1.003 * added * torch.randn_like(x)  # S_noise
                d = derivative(x, sigma_hat)
                x_next = x + (sigma_next - sigma_hat) * d
                if i + 1 < len(self.sigma_hat):  # Heun's correction, except at the last step
                    x_next = x + (sigma_next - sigma_hat) * (d + derivative(x_next, sigma_next)) / 2
                x = x_next
        return x


def make_guidance(args: Args, energies: Energies) -> Callable | None:
    """x (B, D), sigma () -> sum lambda_i grad E_i (B, D), in normalised coordinates; None without energies."""
    scales = (args.state_scale, args.policy_scale, args.transition_scale)
    return partial(energies, scales=scales, full=args.full_gradient, clip=args.guidance_clip) if any(scales) else None


def generate(edm: EDM, denoise: Callable, n: int, D: int, guidance: Callable | None) -> Tensor:
    """(n, D) synthetic transitions, normalised."""
    sizes = [min(CHUNK, n - done) for done in range(0, n, CHUNK)]
    return torch.cat([edm.sample(denoise, torch.randn(m, D, device=edm.sigma.device), guidance) for m in sizes])


# ----------------------------------------------------------------------------------------------------------- Algorithm
def cql_penalty(q: Tensor, log_density: Tensor, q_data: Tensor) -> Tensor:
    """CQL(H): log of the importance-sampled mean of exp Q over M actions, (M, B), minus Q of the data (B,)."""
    return ((q - log_density).logsumexp(0) - math.log(len(q)) - q_data).mean()


def make_update(args: Args, networks: dict) -> tuple:
    """The update of SAC with CQL's penalty, (batch, its coefficient) -> metrics; its optimiser."""
    actor, critic, critic_target = (networks[name] for name in ("actor", "critic", "critic_target"))
    log_alpha = networks["temperature"]["log_alpha"]
    rates = {"actor": args.actor_lr, "critic": args.critic_lr, "temperature": args.actor_lr}
    groups = [{"params": networks[name].parameters(), "lr": lr} for name, lr in rates.items()]
    optimizer = torch.optim.Adam(groups, fused=True, capturable=log_alpha.is_cuda)

    def backward(network, loss):
        parameters = list(network.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient

    @torch.compiler.disable  # the code between two steps compiles as one piece
    def step():
        optimizer.step()
        optimizer.zero_grad()

    def penalty(s, next_s, mc, q_data, A):
        """CQL's penalty of both critics; Cal-QL: the policy's actions are worth at least the Monte-Carlo return."""
        M, B = args.cql_actions, len(s)
        with torch.no_grad():
            uniform = 2 * torch.rand(M, B, A, device=s.device) - 1
            (a, log_pi), (next_a, next_log_pi) = (actor(x, torch.randn_like(uniform)) for x in (s, next_s))
            actions = torch.cat([uniform, a, next_a])
            log_density = torch.cat([torch.full((M, B), -A * math.log(2), device=s.device), log_pi, next_log_pi])
        total = torch.zeros((), device=s.device)
        for q, q_a in zip(critic(s.repeat(3 * M, 1), actions.flatten(0, 1)), q_data, strict=True):
            q = q.view(3 * M, B)
            if args.calibrate:
                q = torch.cat([q[:M], q[M:].maximum(mc)])
            total = total + cql_penalty(q, log_density, q_a)
        return total

    def update(s, a, next_s, r, mask, mc, cql_alpha):
        # Q: regression on r + gamma V(s'), and CQL's penalty
        alpha = log_alpha.exp().detach()
        with torch.no_grad():
            next_a, next_log_pi = actor(next_s, torch.randn_like(a))
            next_v = torch.minimum(*critic_target(next_s, next_a))
            if not cql_alpha:  # no entropy beside CQL, as in CQL's and Cal-QL's code; EDIS's code subtracts it
                next_v = next_v - alpha * next_log_pi
        q1, q2 = critic(s, a)
        target = r + args.gamma * mask * next_v
        qf1_loss, qf2_loss = F.mse_loss(q1, target), F.mse_loss(q2, target)
        cql_loss = penalty(s, next_s, mc, (q1, q2), a.shape[1]) if cql_alpha else torch.zeros((), device=s.device)
        losses = {"qf1_loss": qf1_loss, "qf2_loss": qf2_loss, "cql_loss": cql_loss}
        losses |= {"alpha": alpha, "q_mean": q1.mean()}
        # Detach before step(): otherwise the compiler keeps the graph for a second backward pass
        metrics = {f"losses/{name}": loss.detach() for name, loss in losses.items()}
        backward(critic, qf1_loss + qf2_loss + cql_alpha * cql_loss)
        step()

        # Policy and temperature
        new_a, log_pi = actor(s, torch.randn_like(a))
        policy_loss = (alpha * log_pi - torch.minimum(*critic(s, new_a))).mean()
        metrics |= {"losses/policy_loss": policy_loss.detach(), "losses/entropy": -log_pi.detach().mean()}
        backward(actor, policy_loss)
        excess = (a.shape[1] - log_pi).detach()  # entropy above the target -A lowers alpha
        backward(networks["temperature"], (log_alpha.exp() * excess).mean())
        step()
        with torch.no_grad():
            torch._foreach_lerp_(list(critic_target.parameters()), list(critic.parameters()), args.tau)
        return metrics

    return update, optimizer


def info_nce(energy: Tensor) -> tuple[Tensor, Tensor]:
    """InfoNCE of energies (B, 1 + K), a positive and its own negatives; the share of positives found."""
    return -(-energy).log_softmax(1)[:, 0].mean(), (energy.argmin(1) == 0).float().mean()


def energy_losses(energies: Energies, states, chosen, acted, negatives, sigma, joint: bool) -> dict:
    """InfoNCE of the energies, each positive against K negatives; the published code: negatives of other positives.

    Joint: of E1; E1 + E2; the energy of recent pairs; that + E3. The first term of each sum is fixed. Not joint, as in
    the paper: of each energy alone; negatives of a share s, negatives of s' share (s, a).
    Noised at sigma (B,): recent states (B, S), states with actions of the current policy (B, S + A), recent
    transitions (s, a, s') as acted (B, D), K unguided samples for each (B, K, D).
    """
    S, SA, _ = energies.ends
    sigma = sigma[:, None].expand(-1, 1 + negatives.shape[1])

    def energy(i: int, x: Tensor, start: int = 0) -> Tensor:
        """(B, 1 + K) of positives x (B, end), then with the dimensions from `start` on replaced by negatives."""
        blocks = torch.cat([x[:, None, start:], negatives[..., start : x.shape[1]]], dim=1)
        condition = x[:, None, :start].expand(-1, blocks.shape[1], -1)
        return energies.energy(i, torch.cat([condition, blocks], dim=2), sigma)

    if joint:
        e1, e2, e3, behavior = energy(0, states), energy(1, chosen), energy(2, acted), energy(3, acted[:, :SA])
        summed = {"state": e1, "policy": e1.detach() + e2, "behavior": behavior, "transition": behavior.detach() + e3}
    else:
        summed = {"state": energy(0, states), "policy": energy(1, chosen, S), "transition": energy(2, acted, SA)}
    return {name: info_nce(e) for name, e in summed.items()}


def make_fit(optimizer: Any, parameters: list[Any], lr: float, updates: int) -> Callable:
    """A step on a loss, with a learning rate that falls to 0 by a cosine."""
    moves = optimizer(parameters, lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(moves, max(updates, 1))

    def fit(loss: Tensor) -> None:
        moves.zero_grad()
        loss.backward(inputs=parameters)
        moves.step()
        schedule.step()

    return fit


def train_denoiser(args: Args, denoiser: Denoiser, ema: Denoiser, x: Tensor, recent: int) -> Tensor:
    """Train on normalised transitions x (N, D) of one round, from where the last one ended; the mean loss.

    A share of each batch comes from the last `recent` rows. The published code begins anew each round.
    """
    fit = make_fit(torch.optim.AdamW, list(denoiser.parameters()), args.denoiser_lr, args.denoiser_updates)
    mean, share = torch.zeros((), device=x.device), round(args.denoiser_recent * args.denoiser_batch)
    for _ in range(args.denoiser_updates):
        index = torch.randint(len(x), (args.denoiser_batch,), device=x.device)
        index[:share] = torch.randint(len(x) - recent, len(x), (share,), device=x.device)
        batch = x[index]
        sigma = (1.2 * torch.randn(len(batch), device=x.device) - 1.2).exp()  # P_mean, P_std of Karras et al.
        loss = edm_loss(denoiser, batch, sigma, torch.randn_like(batch))
        fit(loss)
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(denoiser.parameters()), 1 - args.denoiser_ema)
            mean += loss / args.denoiser_updates
    return mean


def train_model(args: Args, model: MLP, energies: Energies, x, y, r, mask, recent: int) -> Tensor:
    """Train rewards, terminations (on y) and mean next states (on x) of transitions (N, D), (N,); the mean loss.

    Half of each batch comes from the last `recent` rows, which are the energies' positives.
    """
    SA = energies.ends[1]
    parameters = [*model.parameters(), *energies.dynamics.parameters()]
    fit = make_fit(torch.optim.Adam, parameters, args.energy_lr, args.model_updates)
    mean, half = torch.zeros((), device=x.device), args.batch_size // 2
    for _ in range(args.model_updates):
        index = torch.randint(len(x), (args.batch_size,), device=x.device)
        index[:half] = torch.randint(len(x) - recent, len(x), (half,), device=x.device)
        reward, logit = model(y[index]).unbind(1)
        residual = energies.dynamics(x[index, :SA]) - x[index, SA:]
        loss = F.mse_loss(reward, r[index]) + F.binary_cross_entropy_with_logits(logit, 1 - mask[index])
        loss = loss + residual.square().mean()
        fit(loss)
        mean += loss.detach() / args.model_updates
    return mean


def make_pool(args: Args, edm: EDM, denoise: Callable, conditions: Tensor, starts: list[int]) -> Tensor:
    """Noised x of the unguided sampler at every level, (levels, P, D): the negatives.

    One pass per start: dimensions before it are fixed to the conditions (P, D), the others are sampled.
    """
    pool = torch.empty(len(edm.sigma_hat), *conditions.shape, device=conditions.device)
    for start in starts:
        repeats = args.inpainting_repeats if start else 1
        for part, held in zip(pool.split(CHUNK, dim=1), conditions[:, :start].split(CHUNK), strict=True):
            edm.sample(denoise, torch.randn_like(part[0]), visited=part[..., start:], held=held, repeats=repeats)
    return pool


def train_energies(args: Args, edm: EDM, networks: dict, coordinates: Coordinates, recent: Tensor) -> dict:
    """Train with recent transitions (M, D) as positives; the mean losses and accuracies.

    At all levels of the sampler and between them; the published code: one level, or two of another schedule.
    """
    energies, joint, device = networks["energies"], args.conditional_negatives == "joint", recent.device
    (S, SA, D), B, K = energies.ends, args.energy_batch, args.negatives
    acting, held, starts = recent, recent.new_empty(args.pool, D), [0]  # no conditions
    if not joint:
        acting = recent[torch.randint(len(recent), (args.pool // K,), device=device)]
        held, starts = acting.repeat_interleave(K, dim=0), [0, S, SA]
    pool = make_pool(args, edm, networks["denoiser_ema"], held, starts)
    # Without the dynamics, which train_model has trained
    fit = make_fit(torch.optim.Adam, list(energies.nets.parameters()), args.energy_lr, args.energy_updates)
    upper = edm.sigma_hat.maximum(edm.sigma[:-1].roll(1))  # upper end of each level's range of sigma
    found: dict[str, Tensor] = {}
    for _ in range(args.energy_updates):
        level = torch.randint(len(edm.sigma_hat), (B,), device=device)
        low = edm.sigma[level]
        sigma = low * (upper[level] / low) ** torch.rand(B, device=device)
        own = torch.randint(len(acting), (B,), device=device)
        acted = acting[own] + sigma[:, None] * torch.randn(B, D, device=device)
        states = recent[torch.randint(len(recent), (B,), device=device), :S]
        s = states if joint else acting[own, :S]
        chosen = torch.cat([s, coordinates.policy(networks["actor"], s)], dim=1)
        chosen = chosen + sigma[:, None] * torch.randn_like(chosen)
        if joint:
            drawn = torch.randint(args.pool, (B, K), device=device)
        else:
            drawn = own[:, None] * K + torch.arange(K, device=device)
        added = (sigma.square() - low.square()).clamp(min=0).sqrt()[:, None, None]
        negatives = pool[level[:, None], drawn]
        negatives = negatives + added * torch.randn_like(negatives)
        states = chosen[:, :S] if joint else states + sigma[:, None] * torch.randn(B, S, device=device)
        results = energy_losses(energies, states, chosen, acted, negatives, sigma, joint)
        fit(torch.stack([loss for loss, _ in results.values()]).sum())
        for name, values in results.items():
            for key, value in zip((f"losses/{name}_energy_loss", f"energies/{name}_accuracy"), values, strict=True):
                found[key] = found.get(key, 0) + value.detach() / args.energy_updates
    return found


def make_rows(model: MLP, coordinates: Coordinates, x: Tensor) -> Tensor:
    """Rows [s, a, s', r, mask, Monte-Carlo return] of synthetic transitions x (N, D); the return is not known.

    The mask is P(not terminal), as the target is linear in it; the published code: 1.
    """
    S = coordinates.S
    transitions = coordinates.denormalize(x)
    transitions[:, S:-S].clamp_(-0.999, 0.999)
    with torch.no_grad():
        reward, logit = model(coordinates.model_inputs(transitions)).unbind(1)
    tail = [reward, torch.sigmoid(-logit), torch.full_like(reward, -math.inf)]
    return torch.cat([transitions, torch.stack(tail, dim=1)], dim=1)


def make_round(args: Args, edm: EDM, networks: dict, coordinates: Coordinates, data: Tensor, recent: int) -> tuple:
    """A round: train on rows [s, a, s', r, mask, ...], of which the last are recent; synthetic rows and metrics."""
    energies, model, ema = (networks[name] for name in ("energies", "model", "denoiser_ema"))
    D = energies.ends[2]
    raw, r, mask = data[:, :D], data[:, D], data[:, D + 1]
    x, y = coordinates.normalize(raw), coordinates.model_inputs(raw)
    metrics = {"losses/denoiser_loss": train_denoiser(args, networks["denoiser"], ema, x, recent)}
    metrics["losses/model_loss"] = train_model(args, model, energies, x, y, r, mask, recent)
    guidance = make_guidance(args, energies) if args.augmentation == "edis" else None
    if guidance:
        metrics |= train_energies(args, edm, networks, coordinates, x[len(x) - recent :])
    begin = time.time()
    rows = make_rows(model, coordinates, generate(edm, ema, args.samples, D, guidance))
    rows[-1].tolist()  # waits for the device
    metrics["charts/generated_per_second"] = torch.tensor(len(rows) / (time.time() - begin))
    return rows, metrics


class Interaction:
    """The online environment, which replays the current episode's actions after a resume."""

    def __init__(self, env: gym.Env, seed: int, episode: int, actions: np.ndarray) -> None:
        self.env, self.seed = env, seed
        self.start(episode)
        for action in actions:
            self.step(action)

    def start(self, episode: int) -> None:
        self.episode = episode
        self.rewards: list[float] = []
        self.obs, _ = self.env.reset(seed=int(np.random.default_rng([self.seed, episode]).integers(2**31)))

    def step(self, action: np.ndarray) -> tuple[bool, bool]:
        """Terminated, end of the episode; the next observation is `obs`."""
        self.obs, reward, terminated, truncated, _ = self.env.step(action)
        self.rewards.append(float(reward))
        return terminated, terminated or truncated


# ---------------------------------------------------------------------------------------------------------------- Data
# Presets of the families of D4RL's and Minari's ids
LOCOMOTION: dict = {}  # EDIS's code normalises rewards and states of MuJoCo and AntMaze
SPARSE = {"reward_transform": "min-max"}
ANTMAZE = {"reward_transform": "minus-one"}
# The defaults, for D4RL's ids, are the published code's sizes where no comment or table of the README says otherwise.
# The small sets are ours, and so are their settings: found by trying on Hopper, for half an hour on a CPU.
MINI = {
    "normalize_observations": True, "offline_updates": 4_000, "online_steps": 10_000, "actor_lr": 3e-4,
    # Hopper's medium policy falls after about 340 steps: with gamma 0.99 its value equals the expert's.
    "gamma": 0.997, "tau": 0.05,
    # After so few updates Q is below the data's returns, where Cal-QL does not penalise the policy's actions. Without
    # a penalty online, Q is overestimated.
    "cql_alpha": 10.0, "cql_alpha_online": 10.0, "cql_actions": 1, "calibrate": False,
    "synthetic_ratio": 0.5, "round_every": 3_000, "samples": 10_000, "sampling_steps": 20, "sigma_min": 0.01,
    # The first 1000 online transitions are 1 % of the data, too few for uniform sampling.
    "sigma_max": 10.0, "denoiser_recent": 0.5, "denoiser_width": 256, "denoiser_layers": 3, "denoiser_lr": 1e-3,
    "energy_width": 128, "energy_batch": 128, "pool": 5_000,
    "eval_every": 250, "eval_episodes": 5, "log_every": 250, "save_every": 5_000,
}  # fmt: skip
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
    name = re.sub(r"^\w+/|-v\d+$", "", given.env_id).replace("/", "-")  # Minari's D4RL/antmaze/umaze-v1 too
    ours = re.fullmatch("(hopper|walker2d|halfcheetah)-medium(-replay|-expert)?-mini", given.env_id)
    return MINI if ours else TASKS.get(name.split("-")[0], ({},))[0]


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


def returns_to_go(r: np.ndarray, terminals: np.ndarray, ends: np.ndarray, gamma: float, negative: bool) -> np.ndarray:
    """Discounted return to go of each row (N,), a lower bound of its value.

    A truncated episode misses later rewards. If rewards can be negative, its return is no lower bound: -inf.
    """
    returns, total, bounds = np.zeros(len(r)), 0.0, False
    for i in reversed(range(len(r))):
        if ends[i] or i + 1 == len(r):
            total, bounds = 0.0, terminals[i] or not negative
        total = r[i] + gamma * total
        returns[i] = total if bounds else -math.inf
    return returns


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
    filmed = args.capture_video and args.eval_episodes > 0
    task = replace(args, eval_episodes=max(args.eval_episodes, 1), capture_video=filmed)
    columns, make_env, reference = load_task(task)
    if make_env is None:
        fail(f"no environment is known for {args.env_id}: the online phase needs one")
    transitions, transform = make_transitions(columns, args)
    digest = hashlib.sha256(transitions.tobytes()).hexdigest()
    if saved.get("data", digest) != digest:
        fail("the data differ from those of the resumed run")
    fixed = ["offline_updates", "gamma", "denoiser_width", "denoiser_layers", "energy_width"]
    for name in fixed if saved else ():  # online, other arguments may be new: many runs can share one offline agent
        if getattr(args, name) != saved["args"][name]:
            fail(f"--{name.replace('_', '-')} cannot change on resume; the run has {saved['args'][name]}")
    obs_dim, act_dim = columns["observations"].shape[1], columns["actions"].shape[1]
    D = 2 * obs_dim + act_dim  # of (s, a, s')
    rewards = transform["scale"] * (columns["rewards"].astype(np.float64) + transform["shift"])
    negative = bool(rewards.min() < 0)
    returns = returns_to_go(rewards, columns["terminals"], columns["ends"], args.gamma, negative)
    kept = np.append(~columns["timeouts"][:-1], False)  # by make_transitions
    data = torch.as_tensor(np.column_stack([transitions, returns[kept]]), dtype=torch.float32, device=device)
    # Without next_observations, the next state of a terminal row is not the environment's
    diffused = data if "next_observations" in columns else data[data[:, D + 1] > 0]
    name = re.sub(r"[^\w.-]", "_", f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns() // 1_000_000}")
    folder = Path(args.resume if args.resume and not args.eval_only else Path(args.runs_dir, name)).resolve()
    envs = [exits.enter_context(make_env()) for _ in range(args.eval_episodes)]
    options = {"eval_env": False} if "/" in args.env_id and not args.dataset_path else {}  # Minari: the data's own
    online_env = exits.enter_context(make_env(**options))
    if envs and args.capture_video:
        film = partial(gym.wrappers.RecordVideo, name_prefix=f"from-{saved.get('step', 0)}")  # not over older ones
        envs[0] = exits.enter_context(film(make_env(render_mode="rgb_array"), str(folder / "videos"), lambda _: True))

    # Networks, optimisers, update, online and synthetic transitions
    networks = {name: network.to(device) for name, network in make_networks(obs_dim, act_dim, args).items()}
    update, optimizer = make_update(args, networks)
    edm, coordinates, actor = EDM(args, device), Coordinates(diffused[:, :D], obs_dim), networks["actor"]
    state = networks | {"optimizer": optimizer}
    if saved:
        saved["optimizer"]["param_groups"] = optimizer.state_dict()["param_groups"]  # this device's options
        for name, part in state.items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["rng"][0])
        torch.cuda.set_rng_state_all(saved["rng"][1 : 1 + torch.cuda.device_count()])
    step, seconds = saved.get("step", 0), saved.get("seconds", 1e-9)
    count = max(step - args.offline_updates, 0)  # of transitions in `online`
    online = torch.zeros(args.online_steps, data.shape[1], device=device)
    online[:count] = saved.get("online", data[:0])
    synthetic = saved.get("synthetic", torch.zeros(0, data.shape[1])).to(device)
    episode, length = saved.get("interaction", (0, 0))
    actions = online[count - length : count, obs_dim : obs_dim + act_dim].cpu().numpy()
    interaction = Interaction(online_env, args.seed, episode, actions)
    evaluations, logged = ({}, 0) if args.eval_only else (saved.get("evaluations", {}), saved.get("logged", 0))
    generative = args.augmentation in ("edis", "synther")
    if generative and 0 < args.online_steps <= args.first_round:
        say(f"warning: no synthetic data: --first-round {args.first_round} is not below --online-steps", sys.stderr)

    def observe(obs):
        return torch.as_tensor((obs - transform["mean"]) / transform["std"], dtype=torch.float32, device=device)

    @torch.no_grad()
    def interact():
        """One step of the policy in the environment, into row `count` of the online transitions."""
        s = observe(interaction.obs)
        a = actor(s[None], torch.randn(1, act_dim, device=device))[0][0].clamp(-0.999, 0.999)
        terminated, end = interaction.step(a.cpu().numpy())
        rewards = transform["scale"] * (np.array(interaction.rewards) + transform["shift"])
        tail = torch.tensor([rewards[-1], 1.0 - terminated, -math.inf], dtype=torch.float32, device=device)
        online[count] = torch.cat([s, a, observe(interaction.obs), tail])
        if end:
            n = len(rewards)
            returns = returns_to_go(rewards, np.full(n, terminated), np.zeros(n, bool), args.gamma, negative)
            online[count + 1 - n : count + 1, -1] = torch.as_tensor(returns)
            log({"charts/online_return": sum(interaction.rewards), "charts/online_length": float(n)}, {})
            interaction.start(interaction.episode + 1)

    batch = torch.zeros(args.batch_size, data.shape[1], device=device)  # one for all updates, as a CUDA graph needs it

    def train(cql_alpha):
        s, a, next_s, tail = batch.split([obs_dim, act_dim, obs_dim, 3], dim=1)
        return update(s, a, next_s, *tail.unbind(1), cql_alpha)

    trains: dict = {alpha: partial(train, alpha) for alpha in (args.cql_alpha, args.cql_alpha_online)}
    observed = torch.zeros(args.eval_episodes, obs_dim, device=device)

    @torch.no_grad()
    def select():
        return actor.distribution(observed).mean.tanh()  # without noise

    def act(obs):
        observed.copy_(torch.as_tensor((obs - transform["mean"]) / transform["std"]))
        return select().cpu().numpy()

    # Acceleration: without this block the results are the same
    if args.compile == "on" or (args.compile == "auto" and (device.type == "cuda" or args.num_updates >= 10_000)):
        say("compiling: the first update may take a minute")
        torch._dynamo.config.trace_autograd_ops = True  # a loss and its gradient in one piece
        torch._dynamo.config.suppress_errors = True  # without a compiler, run uncompiled
        torch._dynamo.config.specialize_float = True  # cql_alpha is a constant
        torch._inductor.config.fallback_random = True  # the same noise as without
        update = torch.compile(update)
        if device.type == "cuda":
            for name in ("denoiser", "denoiser_ema", "energies"):
                networks[name].compile()
            trains = {alpha: graphed(function).__next__ for alpha, function in trains.items()}
            select = graphed(select).__next__

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
    interruptible = False  # in a round: stop at once, as a resume repeats the round

    def leave() -> NoReturn:
        say(f"stopped at update {step}; continue with --resume {folder}", sys.stderr)
        raise SystemExit(128 + stop[0])

    def on_signal(number, frame):
        stop.append(number)
        if interruptible:
            leave()

    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) != signal.SIG_IGN:  # of nohup
            exits.callback(signal.signal, number, signal.signal(number, on_signal))

    # Loop
    metrics, begin, start = dict[str, Tensor](), step, 0.0
    while True:
        last = args.eval_only or step >= args.num_updates
        stopping = bool(stop)  # later signals wait for the next save
        evaluating = envs and (last or step % args.eval_every == 0 < step)
        since = step - args.offline_updates - args.first_round
        due = generative and since >= 0 and since % args.round_every == 0 and not last
        saving = metrics and (last or stopping or evaluating or due or step % args.save_every == 0)
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
            checkpoint |= {"online": online[:count].clone(), "synthetic": synthetic}  # a view would save all its rows
            checkpoint |= {"interaction": (interaction.episode, len(interaction.rewards))}
            checkpoint |= {"transform": transform, "rng": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]}
            with open(folder / "checkpoint.tmp", "wb") as file:  # a temporary file: a kill or a full disk is harmless
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(file.name, folder / "checkpoint.pt")
        if evaluating and not stopping:
            seeds = np.random.default_rng([args.seed, step]).integers(2**31, size=args.eval_episodes).tolist()
            if episodes := evaluate(act, envs, seeds, stop):
                if reference:
                    worst, best = reference
                    episodes["normalized_score"] = 100 * (episodes["episodic_return"] - worst) / (best - worst)
                for name, column in episodes.items():
                    evaluations.setdefault(name, []).append(float(column.mean()))
                each = {f"episodes/{name}": column.tolist() for name, column in episodes.items()}
                log({f"charts/{name}": means[-1] for name, means in evaluations.items()}, each)
        interruptible = due
        if stopping or (stop and (evaluating or due)):
            leave()
        if last:
            break
        if due:
            say(f"update {step}: a round, which trains the models and makes {args.samples} transitions")
            seen, recent = torch.cat([diffused, online[:count]]), min(args.positive_buffer, count)
            synthetic, found = make_round(args, edm, networks, coordinates, seen, recent)
            log({name: float(value) for name, value in found.items()}, {})
            interruptible = False

        if logging or evaluating or due or step <= begin + 1:  # SPS without evaluations, rounds and compiling
            start = time.perf_counter()
        if step == args.offline_updates:
            say(f"update {step}: from here on, the policy acts in the environment: one step per update")
        if step >= args.offline_updates:
            interact()
            count += 1
        offline = count < args.batch_size  # until one batch of online data is there
        share = 0 if args.augmentation == "none" else args.synthetic_ratio
        n = args.batch_size if offline else round(share * args.batch_size)
        # A batch of synthetic and online rows; real offline data until the first round, for edis and synther too
        source = synthetic if generative and not offline and len(synthetic) else data
        batch[:n] = source[torch.randint(len(source), (n,), device=device)]
        if not offline:
            batch[n:] = online[torch.randint(count, (args.batch_size - n,), device=device)]
        metrics = trains[args.cql_alpha if offline else args.cql_alpha_online]()
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

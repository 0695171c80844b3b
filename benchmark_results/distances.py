"""How far the synthetic transitions of a run of edis_sac.py are from where they should be.

python benchmark_results/distances.py RUN    # JSON on the terminal, and in RUN/distances.json

The models of the last round, as the checkpoint has them, make samples without energies (unguided), with all of them
(guided) and with one off (state_off, policy_off, transition_off). Real recent transitions (recent) are the reference.

    state      energy distance of the states from those of the most recent transitions
    policy     energy distance of the actions' quantiles under the policy from those of its own actions
    dynamics   distance of s' from the environment's, in standard deviations of the data: mean over transitions
    dynamics_rms, learned_dynamics   root mean square of it; the same for the mean s' that E3 knows
    reward_rms, mask_bias            the model's reward and mask, less what the environment gives after s and a
    nearest    median distance to the nearest other recent transition: far below that of real ones, the denoiser copies

The distance to the environment needs one of MuJoCo whose observations are its positions but the first, and velocities.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import edis_sac as edis

Simulator = Callable[[Tensor, Tensor], Tensor]  # states (N, S), actions (N, A) -> [s', r, mask] (N, S + 2)
exact_cdist = partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")  # products would blur small distances


@dataclass
class Args:
    """Distances of a run's synthetic transitions."""

    run: tyro.conf.Positional[Path]
    """run folder of edis_sac.py, after its first round"""
    samples: int = 2_000
    """transitions per comparison"""
    seed: int = 0
    """seed of the samples"""
    device: str = "cpu"
    """where to compute"""


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """2 E|x - y| - E|x - x'| - E|y - y'| (Szekely) of samples (N, D), (M, D): 0 for equal distributions."""
    within = [exact_cdist(z, z).sum() / (len(z) * (len(z) - 1)) for z in (x, y)]
    return 2 * exact_cdist(x, y).mean() - within[0] - within[1]


def make_simulator(env: gym.Env, transform: dict[str, Any], obs_dim: int) -> Simulator | None:
    """A step of a MuJoCo environment from any state; None for one whose state is not observed."""
    core: Any = env.unwrapped
    if not hasattr(core, "set_state") or core.model.nq - 1 + core.model.nv != obs_dim:
        return None

    def simulate(states: Tensor, actions: Tensor) -> Tensor:
        raw, found = states.cpu().numpy() * transform["std"] + transform["mean"], []
        for obs, action in zip(raw, actions.cpu().numpy(), strict=True):
            qpos = np.append(0.0, obs[: core.model.nq - 1])  # the root's position along x is not observed
            core.set_state(qpos, obs[core.model.nq - 1 :])
            next_obs, reward, terminated, *_ = core.step(action)
            reward = transform["scale"] * (reward + transform["shift"])
            found.append([*(next_obs - transform["mean"]) / transform["std"], reward, 1.0 - terminated])
        return torch.as_tensor(np.array(found), dtype=torch.float32, device=states.device)

    env.reset(seed=0)
    return simulate


@torch.no_grad()
def distances(
    networks: dict[str, Any], coordinates: edis.Coordinates, simulate: Simulator | None, x: Tensor, recent: Tensor
) -> dict[str, Tensor]:
    """Of transitions x (N, D) from recent ones (M, D), both normalised, from the policy and the environment."""
    S, mean, std, actor = coordinates.S, coordinates.mean, coordinates.std, networks["actor"]
    s = x[:, :S]

    def quantiles(a: Tensor) -> Tensor:  # uniform for the policy's actions, whatever the state
        a = (a * std[S:-S] + mean[S:-S]).clamp(-0.999, 0.999)
        return actor.distribution(s * std[:S] + mean[:S]).cdf(a.atanh())

    apart = exact_cdist(x, recent)
    found = {"nearest": apart.where(apart > 0, float("inf")).amin(1).median()}  # 0 is a row itself
    found["state"] = energy_distance(s, recent[torch.randperm(len(recent), device=s.device)[: len(s)], :S])
    found["policy"] = energy_distance(quantiles(x[:, S:-S]), quantiles(coordinates.policy(actor, s)))
    if simulate:
        rows = edis.make_rows(networks["model"], coordinates, x)
        raw, tail = rows[:, : x.shape[1]], rows[:, x.shape[1] : -1]
        truth = simulate(raw[:, :S], raw[:, S:-S])
        learned = networks["energies"].dynamics(x[:, :-S]) * std[-S:] + mean[-S:] + raw[:, :S]
        error, off = (((truth[:, :S] - y) / std[:S]).square().mean(1) for y in (raw[:, -S:], learned))
        reward, mask = (tail - truth[:, S:]).unbind(1)
        found |= {"dynamics": error.sqrt().mean(), "dynamics_rms": error.mean().sqrt()}
        found["learned_dynamics"] = off.sqrt().mean()
        found |= {"reward_rms": reward.square().mean().sqrt(), "mask_bias": mask.mean()}
    return found


def main(options: Args) -> dict[str, dict[str, float]]:
    saved, device = edis.load_checkpoint(str(options.run)), torch.device(options.device)
    args = edis.Args(**saved["args"])
    torch.manual_seed(options.seed)
    columns, make_env, _ = edis.load_task(args)
    data, transform = edis.make_transitions(columns, args)
    S, A = columns["observations"].shape[1], columns["actions"].shape[1]
    D = 2 * S + A
    diffused = data if "next_observations" in columns else data[data[:, D + 1] > 0]
    coordinates = edis.Coordinates(torch.as_tensor(diffused[:, :D], device=device), S)
    networks = {name: network.to(device) for name, network in edis.make_networks(S, A, args).items()}
    for name, network in networks.items():
        network.load_state_dict(saved[name])
    if not make_env or not len(saved["synthetic"]):
        edis.fail(f"{options.run}: the run has made no synthetic transitions yet")
    recent = coordinates.normalize(saved["online"][-args.positive_buffer :, :D].to(device))
    simulate, edm = make_simulator(make_env(), transform, S), edis.EDM(args, device)

    def compare(x: Tensor) -> dict[str, float]:
        return {name: float(value) for name, value in distances(networks, coordinates, simulate, x, recent).items()}

    def sample(**scales: Any) -> Tensor:
        guidance = edis.make_guidance(replace(args, **scales), networks["energies"])
        return edis.generate(edm, networks["denoiser_ema"], options.samples, D, guidance)

    none = {f"{energy}_scale": 0.0 for energy in ("state", "policy", "transition")}
    real = recent[torch.randint(len(recent), (options.samples,), device=device)]
    found = {"recent": compare(real), "unguided": compare(sample(**none))}
    if args.augmentation == "edis" and any(getattr(args, name) for name in none):
        found["guided"] = compare(sample())
        for name in none:  # what each energy does beside the others
            found[name.replace("scale", "off")] = compare(sample(**{name: 0.0}))
    text = json.dumps({"step": saved["step"], **found}, indent=1)
    (options.run / "distances.json").write_text(text + "\n")
    print(text)
    return found


if __name__ == "__main__":
    main(tyro.cli(Args))

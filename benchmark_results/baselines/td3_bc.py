"""TD3+BC: edp_td3.py with a feed-forward policy, same critics, data, evaluation and run files.

python benchmark_results/baselines/td3_bc.py --env-id hopper-medium-expert-mini

Fujimoto and Gu, 2021, arXiv 2106.06860: E ||a - pi(s)||^2 - lambda E Q(s, pi(s)), lambda = eta / E |Q|, eta = 2.5, and
targets at the target policy's action with clipped noise. Here, as in edp_td3.py, one of the two critics by chance is
maximised, at every update, and the policy's target moves on its own schedule. States are normalised, as there. Unlike
there, networks are edp_td3.py's in width, depth and activation, and its preset's learning rate and clipping of
gradients stay. Takes edp_td3.py's arguments; those of the diffusion have no effect.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import edp_td3 as edp


class Policy(edp.MLP):
    """Actions (B, A) of states (B, S)."""

    def __init__(self, obs_dim: int, act_dim: int) -> None:
        super().__init__(obs_dim, act_dim)
        self.act_dim = act_dim

    def forward(self, s: Tensor) -> Tensor:
        return super().forward(s).tanh()


def reconstruct(diffusion: Any, policy: Policy, s: Tensor, a: Tensor, *noise: Tensor) -> tuple[Tensor, Tensor]:
    """The regression's error and the action where Q is maximised, both (B, A)."""
    action = policy(s)
    return (a - action).square(), action


def sample(diffusion: Any, policy: Policy, s: Tensor, noise: Tensor) -> Tensor:
    """The targets' action: with noise of deviation 0.2, clipped at 0.5."""
    return (policy(s) + (0.2 * noise[0]).clamp(-0.5, 0.5)).clamp(-1, 1)


@torch.no_grad()
def select_actions(diffusion: Any, policy: Policy, critic: Any, s: Tensor, *selection: Any) -> Tensor:
    return policy(s)


edp.Policy, edp.reconstruct, edp.select_actions = Policy, reconstruct, select_actions  # type: ignore[misc, assignment]
edp.Diffusion.sample = sample  # type: ignore[method-assign, assignment]

if __name__ == "__main__":
    flags = ["--exp-name", "td3_bc", "--eta", "2.5", "--observation-transform", "per-dimension"]
    edp.main(edp.parse_args([*flags, *sys.argv[1:]]))

"""TD3+BC: edp_td3.py with a feed-forward policy, same critics, data, evaluation and run files.

python benchmark_results/baselines/td3_bc.py --env-id hopper-medium-expert-mini

Fujimoto and Gu, 2021, arXiv 2106.06860: E ||a - pi(s)||^2 - lambda E Q(s, pi(s)), lambda = eta / E |Q|, eta = 2.5, and
targets at the target policy's action with clipped noise. States are normalised, as there. As in edp_td3.py, one of the
two critics by chance is maximised, at every update, and networks, the clip of gradients and the schedule of the
policy's target are its own. Takes edp_td3.py's arguments; those of the diffusion have no effect.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import edp_td3 as edp


class Policy(edp.MLP):
    """Actions (B, A) of states (B, S); noised actions and steps are ignored."""

    def __init__(self, obs_dim: int, act_dim: int) -> None:
        super().__init__(obs_dim, act_dim)
        self.act_dim = act_dim

    def forward(self, s: Tensor, *noised: Any) -> Tensor:
        return super().forward(s).tanh()


class Direct(edp.Diffusion):
    """What the policy gives is the action itself; the loss of cloning is its squared error."""

    def add_noise(self, a: Tensor, k: Any, epsilon: Tensor) -> Tensor:
        return epsilon.copy_(a)  # what the policy's output is compared with

    def approximate(self, a_k: Tensor, k: Any, action: Tensor) -> Tensor:
        return action

    def sample(self, policy: Any, s: Tensor, noise: Tensor) -> Tensor:
        """The targets' action: with noise of deviation 0.2, clipped at 0.5."""
        return (policy(s) + (0.2 * noise[0]).clamp(-0.5, 0.5)).clamp(-1, 1)


@torch.no_grad()
def select_actions(diffusion: Any, policy: Policy, critic: Any, s: Tensor, *selection: Any) -> Tensor:
    return policy(s)


edp.Policy, edp.Diffusion, edp.select_actions = Policy, Direct, select_actions  # type: ignore[misc, assignment]

if __name__ == "__main__":
    flags = ["--exp-name", "td3_bc", "--eta", "2.5", "--normalize-observations"]
    edp.main(edp.parse_args([*flags, *sys.argv[1:]]))

"""IQL with a feed-forward policy: edp_iql.py with another policy, same critics, data, evaluation and run files.

python benchmark_results/baselines/iql.py --env-id hopper-medium-expert-mini

Kostrikov et al., 2021, arXiv 2110.06169: advantage-weighted regression of a Gaussian policy with tanh mean and fixed,
equal deviations, so that -log pi is the squared error; its mean is evaluated. Networks, the clip of gradients and the
constant learning rate are edp_iql.py's. Takes edp_iql.py's arguments; those of the diffusion have no effect.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import edp_iql as edp


class Policy(edp.MLP):
    """Mean actions (B, A) of states (B, S); noised actions and steps are ignored."""

    def __init__(self, obs_dim: int, act_dim: int) -> None:
        super().__init__(obs_dim, act_dim)
        self.act_dim = act_dim

    def forward(self, s: Tensor, *noised: Any) -> Tensor:
        return super().forward(s).tanh()


class Direct(edp.Diffusion):
    """What the policy gives is the action itself."""

    def approximate(self, a_k: Tensor, k: Any, action: Tensor) -> Tensor:
        return action


@torch.no_grad()
def select_actions(diffusion: Any, policy: Policy, critic: Any, s: Tensor, *selection: Any) -> Tensor:
    return policy(s)


edp.Policy, edp.Diffusion, edp.select_actions = Policy, Direct, select_actions  # type: ignore[misc, assignment]

if __name__ == "__main__":
    flags = ["--exp-name", "iql", "--guidance-coef", "1", "--diffusion-coef", "0"]  # the weighted regression alone
    edp.main(edp.parse_args([*flags, *sys.argv[1:]]))

"""edis_sac.py with what its energies aim at in place of generated samples: how far a perfect generator would get.

python benchmark_results/baselines/exact.py
python benchmark_results/baselines/exact.py --no-state-energy   # of all the data's states, not of recent ones

Recent states, the current policy's actions there, the simulator's next states; rewards and terminations stay learned.
Without E1 the states are those of all data (an unguided sampler's are so only with --denoiser-recent 0), without E2
the actions are the stored ones. Takes edis_sac.py's arguments; what else belongs to denoiser and energies is without
effect.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import edis_sac as edis


class Exact(edis.Round):
    """A round whose transitions are samples of q itself."""

    def __call__(self, x: Tensor, r: Tensor, mask: Tensor, recent: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.simulate
        energies, recent, S = self.networks["energies"], self.normalize(recent), self.obs_dim
        data = (self.normalize(x), self.inputs(x), r, mask)
        loss = edis.train_model(self.args, self.networks["model"], energies, *data, len(recent))
        rows = recent if self.args.state_energy else data[0]
        rows = rows[torch.randint(len(rows), (self.args.samples,), device=rows.device)]
        s = rows[:, :S]
        a = self.policy(s) if self.args.policy_energy else rows[:, S:-S]
        raw = torch.cat([s, a], dim=1) * self.std[:-S] + self.mean[:-S]
        next_s = self.simulate(raw[:, :S], raw[:, S:].clamp(-0.999, 0.999))[:, :S]
        made = self.normalize(torch.cat([raw, next_s], dim=1))
        found = {f"exact/{name}": value for name, value in self.distances(made[:2_000], recent).items()}
        return self.rows(made), {"losses/model_loss": loss, **found}


def make_simulator(env: gym.Env, *about: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """As edis_sac.py's, which can do without one."""
    told = f"{env.spec and env.spec.id}: only for a simulator whose state can be set from an observation"
    return simulator(env, *about) or edis.fail(told)


simulator, edis.make_simulator = edis.make_simulator, make_simulator  # type: ignore[assignment]
edis.Round = Exact  # type: ignore[misc]

if __name__ == "__main__":
    edis.main(edis.parse_args(["--exp-name", "exact", *sys.argv[1:]]))

"""Fixtures: the scripts as modules, golden values, small data sets in D4RL's layout."""

import importlib
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("ed*_*.py"))
EDP = [name for name in SCRIPTS if name.startswith("edp_")]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)


@pytest.fixture(params=SCRIPTS)
def script(request):
    """Each script in turn, imported."""
    return importlib.import_module(request.param)


@pytest.fixture(scope="session")
def golden():
    return np.load(ROOT / "tests" / "golden" / "edp_golden.npz")


def load_flax(module, tree):
    """Copy flax weights {layer: {kernel (in, out), bias}} of one MLP into an MLP of ours."""
    for i, layer in enumerate(module.layers):
        layer.weight.data = torch.as_tensor(tree[f"Dense_{i}/kernel"]).T.contiguous()
        layer.bias.data = torch.as_tensor(tree[f"Dense_{i}/bias"])


def golden_networks(script):
    """Policy, value, critic and target networks with the golden weights."""
    params = np.load(ROOT / "tests" / "golden" / "edp_params.npz")

    def tree(prefix):
        return {name.removeprefix(prefix): params[name] for name in params.files if name.startswith(prefix)}

    networks = {"policy": script.Policy(11, 3), "value": script.MLP(11, 1), "critic": script.Critic(11, 3)}
    networks |= {"policy_target": script.Policy(11, 3), "critic_target": script.Critic(11, 3)}
    load_flax(networks["value"], tree("params/vf/params/"))
    for group, suffix in (("params", ""), ("target", "_target")):
        policy, critic = networks[f"policy{suffix}"], networks[f"critic{suffix}"]
        load_flax(policy.net, tree(f"{group}/policy/params/base_net/"))
        load_flax(policy.time_mlp, tree(f"{group}/policy/params/base_net/TimeEmbedding_0/"))
        load_flax(critic.q1, tree(f"{group}/qf1/params/"))
        load_flax(critic.q2, tree(f"{group}/qf2/params/"))
    return networks


@pytest.fixture
def networks(script):
    return golden_networks(script)


def make_columns(rows=600, obs_dim=11, act_dim=3, seed=0):
    """Random D4RL columns: an episode ends every 50 rows, in turn by a terminal and by a timeout."""
    rng = np.random.default_rng(seed)
    end = np.arange(rows) % 50 == 49
    terminal = end & (np.arange(rows) // 50 % 2 == 0)
    return {
        "observations": rng.normal(size=(rows, obs_dim)).astype(np.float32),
        "actions": rng.uniform(-1, 1, size=(rows, act_dim)).astype(np.float32),
        "rewards": rng.uniform(size=rows).astype(np.float32),
        "terminals": terminal,
        "timeouts": end & ~terminal,
        "next_observations": rng.normal(size=(rows, obs_dim)).astype(np.float32),
    }


def write_hdf5(path, columns):
    with h5py.File(path, "w") as file:
        for key, column in columns.items():
            file[key] = column
    return path


@pytest.fixture
def hopper_file(tmp_path):
    """A small file that fits Hopper."""
    return write_hdf5(tmp_path / "hopper.hdf5", make_columns())

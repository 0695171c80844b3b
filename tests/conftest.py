"""Helpers: golden networks, small data sets in D4RL's layout and Minari's, short runs and their comparison."""

import importlib
import json
import runpy
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
EDP = ("edp_crr", "edp_iql", "edp_td3")
SCRIPTS = ("edis_sac", *EDP)
CPU = torch.device("cpu")
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)


@pytest.fixture(params=EDP)
def script(request):
    """Each EDP script in turn, imported. edis_sac has test_edis_run.py."""
    return importlib.import_module(request.param)


def load_flax(module, tree):
    """Copy flax weights {layer: {kernel (in, out), bias}} of one MLP into an MLP of ours."""
    for i, layer in enumerate(layer for layer in module if isinstance(layer, torch.nn.Linear)):
        layer.weight.data = torch.as_tensor(tree[f"Dense_{i}/kernel"]).T.contiguous()
        layer.bias.data = torch.as_tensor(tree[f"Dense_{i}/bias"])


def golden_networks(script):
    """The script's networks, in its order, with the golden weights."""
    params = np.load(ROOT / "tests" / "golden" / "edp_params.npz")

    def tree(prefix):
        return {name.removeprefix(prefix): params[name] for name in params.files if name.startswith(prefix)}

    networks = script.make_networks(11, 3)
    for name, network in networks.items():
        group = "target" if name.endswith("_target") else "params"
        if name.startswith("policy"):
            load_flax(network.net, tree(f"{group}/policy/params/base_net/"))
            load_flax(network.time_mlp, tree(f"{group}/policy/params/base_net/TimeEmbedding_0/"))
        elif name.startswith("critic"):
            load_flax(network.q1, tree(f"{group}/qf1/params/"))
            load_flax(network.q2, tree(f"{group}/qf2/params/"))
        else:
            load_flax(network, tree("params/vf/params/"))
    return networks


def keep_gradients(optimizer):
    """Let each parameter have the gradient of its last step as `kept`."""

    def zero_grad():
        for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
            parameter.kept, parameter.grad = parameter.grad, None

    optimizer.zero_grad = zero_grad


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


def error_of(capsys, call, code=2):
    """Run, expect this exit code, return the one line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        call()
    assert caught.value.code == code
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1, lines
    return lines[0]


def record_minari(name, env, episodes, steps, cut=(), **options):
    """A Minari set of episodes of random steps; in those of `cut`, the end is not marked."""
    import minari
    from minari.data_collector import EpisodeBuffer

    buffers = []
    env.action_space.seed(0)
    for seed in range(episodes):
        obs, actions = [env.reset(seed=seed)[0]], [env.action_space.sample() for _ in range(steps)]
        taken = [env.step(action) for action in actions]
        obs += [step[0] for step in taken]
        columns = [np.array([step[column] for step in taken]) for column in (1, 2, 3)]
        columns[2] &= seed not in cut
        if isinstance(obs[0], dict):
            obs = {key: np.stack([o[key] for o in obs]) for key in obs[0]}
        buffers.append(EpisodeBuffer(seed, seed, None, obs, np.array(actions), *columns))
    minari.create_dataset_from_buffers(name, buffers, env=env, algorithm_name="random", **options)


FAST = "--log-every 2 --eval-every 4 --save-every 3 --eval-episodes 2"
FAST_EDP = f"{FAST} --batch-size 8 --diffusion-steps 30 --sampler-steps 6 --eval-candidates 2 --num-updates 6"
FAST_EDIS = f"{FAST} --batch-size 2 --cql-actions 2 --denoiser-updates 2 --denoiser-width 16 --denoiser-layers 1"
FAST_EDIS += " --samples 20 --sampling-steps 3 --pool 4 --negatives 2 --model-updates 2 --energy-updates 2"
FAST_EDIS += " --energy-batch 4 --first-round 2 --round-every 2 --synthetic-ratio 0.5"
FAST_EDIS += " --offline-updates 3 --online-steps 6"


def argv_of(script, *flags):
    """Flags of a run of 6 updates, or of 9 of edis_sac, with rounds at 5 and 7."""
    return [*(FAST_EDIS if script.__name__ == "edis_sac" else FAST_EDP).split(), *map(str, flags)]


@pytest.fixture
def run(hopper_file, tmp_path, monkeypatch):
    """Run a script in this process on a small file, as `python script.py` does or by calls; returns its result."""

    def call(script, *flags, env_id="hopper-medium-v2", as_main=False):
        if script.__name__ == "edis_sac":
            monkeypatch.setattr(script, "CHUNK", 8)
        data = ("--env-id", env_id, "--dataset-path", hopper_file, "--runs-dir", tmp_path / "runs")
        argv = argv_of(script, *data, *flags)
        monkeypatch.setattr(sys, "argv", [script.__file__, *argv])
        return runpy.run_path(sys.argv[0], {}, "__main__") if as_main else script.main(script.parse_args(argv))

    return call


def resume(script, folder, *flags):
    return script.main(script.parse_args(["--resume", str(folder), *map(str, flags)]))


def newest(tmp_path):
    return max((tmp_path / "runs").iterdir(), key=lambda path: path.name)


def step_of(script, folder):
    return script.load_checkpoint(str(folder))["step"]


def rows_of(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def flat(value, prefix=""):
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for name, item in items for k, v in flat(item, f"{prefix}/{name}").items()}
    return {prefix: value}


def same_run(script, a, b, logs=True):
    """Both runs ended with the same weights, optimisers, generators, evaluations and logs."""
    left, right = (flat(script.load_checkpoint(result["run_dir"])) for result in (a, b))
    differs = ("/seconds", "/logged", "/args", "/times")  # times, and bytes of rows that hold them
    left, right = ({k: v for k, v in side.items() if not k.startswith(differs)} for side in (left, right))
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]) if isinstance(value, torch.Tensor) else value == right[name], name
    drop = ("charts/SPS", "charts/generated_per_second")
    rows = [[{k: v for k, v in row.items() if k not in drop} for row in rows_of(r["run_dir"])] for r in (a, b)]
    assert rows[0] == rows[1] or not logs

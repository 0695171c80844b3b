"""Whole runs: every branch, run files, resume, signals, bad arguments."""

import csv
import importlib
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import typing
from functools import partial
from pathlib import Path
from typing import Literal

import filelock
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import EDP, ROOT, SCRIPTS, make_columns, write_hdf5
from test_data import error_of

FAST = "--batch-size 8 --diffusion-steps 30 --sampler-steps 4 --eval-candidates 2 --eval-episodes 2 --num-updates 6"
FAST += " --log-every 2 --eval-every 4 --save-every 3"
FAST_EDIS = "--batch-size 2 --cql-actions 2 --denoiser-updates 2 --denoiser-width 16 --denoiser-layers 1 --samples 20"
FAST_EDIS += " --sampling-steps 3 --chunk 8 --pool 4 --negatives 2 --model-updates 2 --energy-updates 2"
FAST_EDIS += " --energy-batch 4 --first-round 2 --round-every 2 --synthetic-ratio 0.5 --eval-episodes 2 --num-updates 6"
FAST_EDIS += " --log-every 2 --eval-every 4 --save-every 3"


def fast(script):
    """Flags of a run of 6 updates."""
    return FAST_EDIS if script.__name__ == "edis_sac" else FAST


def flags_of(script, argv):
    """The siblings' flags as EDIS has them: of N updates, 3 are offline."""
    argv = [str(flag) for flag in argv]
    if script.__name__ == "edis_sac":
        argv = ["--critic-lr" if flag == "--lr" else flag for flag in argv]
        while "--num-updates" in argv:
            i = argv.index("--num-updates")
            argv[i : i + 2] = ["--offline-updates", "3", "--online-steps", str(int(argv[i + 1]) - 3)]
    return argv


def parse(script, *argv):
    return script.parse_args(flags_of(script, argv))


@pytest.fixture
def run(script, hopper_file, tmp_path):
    """Run the script in this process on a small file; returns its result."""
    default = fast(script)

    def call(*flags, fast=None, data=("--env-id", "hopper-medium-v2", "--dataset-path", str(hopper_file))):
        argv = (fast or default).split()
        return script.main(parse(script, *argv, *data, "--runs-dir", tmp_path / "runs", *flags))

    return call


@pytest.fixture
def run_edis(hopper_file, tmp_path):
    """Run EDIS on a small file; returns its checkpoint and the rows [s, a, s', r, mask] of the file."""
    import edis_sac

    def call(*flags):
        data = f"--env-id hopper-medium-v2 --dataset-path {hopper_file} --runs-dir {tmp_path / 'runs'}"
        args = edis_sac.parse_args([*FAST_EDIS.replace("--num-updates 6", "").split(), *data.split(), *flags])
        rows = edis_sac.make_transitions(edis_sac.load_task(args)[0], args)[0]
        return edis_sac.load_checkpoint(edis_sac.main(args)["run_dir"]), torch.as_tensor(rows)

    return call


@pytest.fixture
def start(tmp_path):
    """Start a script as a process of its own; whatever still runs at the test's end is killed."""
    processes = []

    def call(script_name, *flags):
        env = {**os.environ, "HOME": str(tmp_path), "WANDB_API_KEY": ""}
        command = [sys.executable, str(ROOT / f"{script_name}.py"), *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=tmp_path, env=env, **pipes))
        return processes[-1]

    yield call
    for process in processes:
        process.kill()
        process.communicate()


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_run_files(run, script, tmp_path):
    result = run("--seed", 3)
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith(f"hopper-medium-v2__{script.__name__}__3__") and result["run_dir"] == str(folder)
    assert json.loads((folder / "result.json").read_text()) == result
    assert result["updates"] == 6 and result["updates_per_second"] > 0

    about = json.loads((folder / "args.json").read_text())
    assert about["args"]["seed"] == {"value": 3, "source": "command line"}
    if script.__name__ != "edis_sac":
        assert about["args"]["max_grad_norm"] == {"value": 9.0, "source": "preset"}
    assert about["args"]["tau"] == {"value": 0.005, "source": "default"}
    assert {"torch", "gymnasium", "mujoco", "numpy", "python", "device", "commit", "dataset"} <= set(about)
    assert len(about["dataset"]["sha256"]) == 64

    metrics = rows_of(folder / "metrics.jsonl")
    losses = [row for row in metrics if "losses/qf1_loss" in row]
    rounds = [5] if script.__name__ == "edis_sac" else []
    assert [row["step"] for row in losses] == sorted([2, 3, 4, 6, *rounds])  # log, save, log and evaluation, end
    assert all(math.isfinite(value) for row in metrics for value in row.values())
    assert [row["step"] for row in metrics if "charts/episodic_return" in row] == [4, 6]

    with open(folder / "evaluations.csv") as file:
        episodes = list(csv.DictReader(file))
    assert list(episodes[0]) == ["step", "episode", "seed", "return", "length", "normalized_score", "success"]
    assert [(row["step"], row["episode"]) for row in episodes] == [("4", "0"), ("4", "1"), ("6", "0"), ("6", "1")]
    assert len({row["seed"] for row in episodes}) == 4
    last = [float(row["return"]) for row in episodes[2:]]
    score = [100 * (r + 20.272305) / (3234.3 + 20.272305) for r in last]
    assert result["return"]["last"] == pytest.approx(np.mean(last))
    assert result["normalized_score"]["last"] == pytest.approx(np.mean(score))
    assert result["return"]["best"] >= result["return"]["mean_of_last_10"]
    assert list(folder.glob("events.out.tfevents.*"))
    transform = script.load_checkpoint(str(folder))["transform"]
    assert len(transform) == 4 and (transform[3] > 1) == (script.__name__ == "edp_iql")  # return-range


BRANCHES = [
    "--sampler ddpm", "--sampler ddim", "--solver-order 1", "--solver-order 2", "--likelihood elbo",
    "--max-grad-norm 0", "--observation-transform scalar --reward-transform min-max", "--reward-transform none",
    "--observation-transform per-dimension --reward-transform times-four", "--beta-schedule vp --sampler ddpm",
    "--reward-transform minus-one", "--reward-transform return-range",
    "--expectile 0.9", "--inverse-temperature 0 --eval-candidates 1",
    "--diffusion-coef 0", "--guidance-coef 0", "--num-threads 2", "--weight binary", "--advantage-baseline max",
    "--policy-target-start 0 --policy-target-every 2", "--max-q-backup --max-q-candidates 3 --max-q-top-k 2",
    "--augmentation synther", "--augmentation offline", "--augmentation none", "--no-state-energy",
    "--state-scale 0 --no-policy-energy --no-transition-energy",
    "--no-policy-energy", "--no-transition-energy", "--no-full-gradient", "--cql-alpha 0", "--cql-alpha-online 1",
    "--conditional-negatives inpainted --no-full-gradient --inpainting-repeats 2",
    "--no-calibrate", "--churn 0", "--first-round 2 --online-steps 9", "--guidance-clip 0",
    "--no-action-approximation --sampler ddpm --beta-schedule vp --diffusion-steps 5", "--no-action-approximation",
]  # fmt: skip


def has(script, flag):
    """Whether the script has this flag: the siblings share the tests, not every argument."""
    name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
    return name in {field.name for field in script.dataclasses.fields(script.Args)}


@pytest.mark.parametrize("name, flags", [
    (name, flags) for name in SCRIPTS for flags in BRANCHES if has(importlib.import_module(name), flags.split()[0])
])  # fmt: skip
def test_every_branch(name, flags, hopper_file, tmp_path):
    script, data = importlib.import_module(name), ["--env-id", "hopper-medium-v2", "--dataset-path", str(hopper_file)]
    argv = [*fast(script).split(), *data, "--runs-dir", tmp_path / "runs", *flags.split()]
    assert script.main(parse(script, *argv))["return"] is not None


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_choice_is_a_branch(name):
    """Each value of each Literal, and each switch, is reached above or in a test of its own."""
    elsewhere = {"--compile", "--matmul-precision", "--wandb-mode", "--track", "--capture-video"}
    script, flags = importlib.import_module(name), " ".join(BRANCHES) + " "
    for field in script.dataclasses.fields(script.Args):
        flag, choices = f"--{field.name.replace('_', '-')}", typing.get_args(field.type)
        if flag in elsewhere:
            continue
        if typing.get_origin(field.type) is Literal:
            assert all(choice == field.default or f"{flag} {choice} " in flags for choice in choices), flag
        elif field.type is bool:
            assert f"--{'no-' if field.default else ''}{flag[2:]} " in flags, flag


# Compiled pieces: the compiler's trial, what lies before and between optimisers' steps, the targets' move; only the
# first where many calls of the policy would have to be unrolled
@pytest.mark.parametrize(
    "script, flags, pieces",
    [
        (importlib.import_module(name), flags, pieces)
        for name, flags, pieces in (
            ("edp_iql", "", 4), ("edp_crr", "--sampler ddim", 3), ("edp_td3", "", 3), ("edis_sac", "", 4),
            ("edp_crr", "--sampler ddpm", 1), ("edp_td3", "--no-action-approximation --sampler ddpm", 1),
        )
    ],
)  # fmt: skip
def test_compiled_update_agrees_with_eager(run, script, flags, pieces, capsys):
    """Metrics and weights of compiled and eager runs, to float32 rounding; and that one is compiled in few pieces."""
    from torch._dynamo.utils import counters

    longer = () if script.__name__ == "edis_sac" else ("--num-updates", "50", "--eval-every", "50")
    logs, states = [], []
    for mode in ("off", "on"):
        torch._dynamo.reset()
        counters.clear()
        folder = script.Path(run("--compile", mode, *longer, *flags.split())["run_dir"])
        assert counters["stats"]["unique_graphs"] == (pieces if mode == "on" else 0)
        logs.append(rows_of(folder / "metrics.jsonl"))
        states.append(torch.load(folder / "checkpoint.pt", weights_only=True))
    assert "warning" not in capsys.readouterr().err
    for eager, compiled in zip(*logs, strict=True):
        for name in (name for name in eager if name.startswith("losses/")):
            assert compiled[name] == pytest.approx(eager[name], rel=1e-3, abs=1e-5)
    for name in {"policy", "value", "critic", "actor", "denoiser"} & states[0].keys():
        eager, compiled = (torch.cat([x.flatten() for x in state[name].values()]) for state in states)
        assert (compiled - eager).norm() < 1e-5 * eager.norm()


@pytest.mark.parametrize("script", [importlib.import_module("edp_iql")])
def test_bfloat16_is_compiled_as_float32_is(run, script):
    """In as few pieces. Rounding grows from update to update: the losses of the first one are compared."""
    from torch._dynamo.utils import counters

    rows = []
    for mode in ("off", "on"):
        torch._dynamo.reset()
        counters.clear()
        found = run("--compile", mode, "--matmul-precision", "medium", "--log-every", "1")
        rows.append(rows_of(script.Path(found["run_dir"]) / "metrics.jsonl")[0])
    torch.set_float32_matmul_precision("highest")  # as it was
    assert counters["stats"]["unique_graphs"] == 4
    for name in (name for name in rows[0] if name.startswith("losses/")):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=0.02, abs=0.02)


@pytest.mark.parametrize("mode", ["auto", "on", "off"])
def test_what_is_compiled(script, monkeypatch, mode):
    """By default on a CPU: the update of a run that is long enough."""
    monkeypatch.setattr(torch, "compile", lambda f: lambda *x: (f(*x), "compiled"))
    for updates, longer in ((9_999, False), (10_000, True)):
        args, cpu = parse(script, "--compile", mode, "--num-updates", updates), torch.device("cpu")
        update = script.accelerate(args, str.upper, [], cpu)
        assert update("x") == (("X", "compiled") if mode == "on" or (mode == "auto" and longer) else "X")


def test_each_number_is_compiled_as_a_constant(script):
    """As EDIS's coefficients of CQL offline and online: a resume may need the second one first, and the same bits."""
    from torch._dynamo.utils import counters

    def scaled(x, alpha):
        return alpha * x

    torch._dynamo.reset()
    counters.clear()
    for alpha in (5.0, 1.0, 0.5):
        args, update = parse(script, "--compile", "on"), partial(scaled, alpha=alpha)
        assert script.accelerate(args, update, [], torch.device("cpu"))(torch.ones(())) == alpha
    assert counters["stats"]["unique_graphs"] == 1 + 3  # the trial's too


@pytest.mark.parametrize("message, told", [("no compiler\nand pages of log", "no compiler"), ("", "RuntimeError('')")])
def test_compiling_that_fails_is_one_line(run, script, monkeypatch, capsys, message, told):
    def fail(function):
        raise RuntimeError(message)

    monkeypatch.setattr(torch, "compile", fail)
    run("--compile", "on")
    warnings = [line for line in capsys.readouterr().err.splitlines() if "compile" in line]
    assert warnings == [f"warning: --compile: {told}; goes on without"]


@pytest.mark.parametrize("name", ["walker2d-medium-v2", "halfcheetah-expert-v2"])
def test_other_environments(run, script, tmp_path, name):
    path = write_hdf5(tmp_path / "own.hdf5", make_columns(obs_dim=17, act_dim=6))
    short = fast(script).replace("--eval-every 4", "--eval-every 9").replace("--num-updates 6", "--num-updates 4")
    assert run(fast=short, data=("--env-id", name, "--dataset-path", str(path)))["normalized_score"] is not None


def test_gymnasium_id_has_no_score(run, hopper_file):
    result = run(data=("--env-id", "Hopper-v5", "--dataset-path", str(hopper_file)))
    assert result["return"] is not None and result["normalized_score"] is None


def test_without_environment(run, script, hopper_file, capsys):
    if script.__name__ == "edis_sac":
        data = ("--env-id", "my-robot", "--dataset-path", str(hopper_file))
        assert "online phase needs one" in error_of(capsys, lambda: run(data=data))
        return
    result = run(data=("--env-id", "my-robot", "--dataset-path", str(hopper_file)))
    assert result["updates"] == 6 and result["return"] is None and result["normalized_score"] is None
    assert "training without evaluation" in capsys.readouterr().out


def test_d4rl_directory(run, script, hopper_file, tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    shutil.copy(hopper_file, tmp_path / "hopper_medium-v2.hdf5")
    assert run(data=("--env-id", "hopper-medium-v2"))["normalized_score"] is not None


def test_success_is_kept(script):
    class Env(gym.Env):
        action_space, observation_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(-1, 1, (1,))

        def reset(self, *, seed=None, options=None):
            self.t = 0
            return np.zeros(1), {}

        def step(self, action):
            self.t += 1
            return np.zeros(1), 1.0, False, self.t == 5, {"success": self.t == 3}

    rows = script.evaluate(lambda obs: np.zeros((len(obs), 1)), [Env(), Env()], [1, 2], [])
    assert rows[1] == {"episode": 1, "seed": 2, "return": 5.0, "length": 5, "success": 1}


# ----------------------------------------------------------------------------------------------------------- presets
def test_presets(script):
    if script.__name__ == "edis_sac":
        assert script.parse_args(["--env-id", "walker2d-medium-replay-v2"]).num_updates == 500_000
        assert script.parse_args([]).num_updates < 100_000
        return
    assert script.parse_args(["--env-id", "hopper-medium-replay-v2"]).max_grad_norm == 4.0
    assert script.parse_args(["--env-id", "hopper-medium-replay-v2", "--max-grad-norm", "5"]).max_grad_norm == 5.0
    assert script.parse_args(["--env-id", "ant-medium-v2"]).max_grad_norm == 5.0  # default: not in the official table
    antmaze = script.parse_args(["--env-id", "antmaze-large-diverse-v0"])
    if script.__name__ == "edp_iql":
        assert antmaze.expectile == 0.9 and antmaze.reward_transform == "minus-one"
    else:
        assert antmaze.reward_transform == "times-four"
    for version in ("v1", "v2"):  # corrected files of the same tasks
        later = script.parse_args(["--env-id", f"antmaze-large-diverse-{version}"])
        assert later == script.dataclasses.replace(antmaze, env_id=later.env_id)
    assert script.parse_args([]).num_updates < 100_000
    fields = {field.name for field in script.dataclasses.fields(script.Args)}
    assert all(set(preset) <= fields for preset in script.PRESETS.values())


# ------------------------------------------------------------------------------------------------- checkpoint, resume
def same_run(script, a, b):
    """Both runs ended with the same weights, optimisers, generators, metrics and evaluations."""

    def flat(value, prefix=""):
        if isinstance(value, dict):
            return {k: v for name, item in value.items() for k, v in flat(item, f"{prefix}/{name}").items()}
        return {prefix: value}

    left, right = (flat(script.load_checkpoint(r["run_dir"])) for r in (a, b))
    for side in (left, right):
        for name in [name for name in side if name.startswith(("/progress/times", "/args", "/run_dir"))]:
            del side[name]
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]) if isinstance(value, torch.Tensor) else value == right[name], name
    for name in ("metrics.jsonl", "evaluations.csv"):
        texts = [(script.Path(r["run_dir"]) / name).read_text() for r in (a, b)]
        if name == "metrics.jsonl":
            drop = ("time", "charts/SPS", "charts/minutes_left", "charts/generated_per_second")
            texts = [[{k: v for k, v in json.loads(x).items() if k not in drop} for x in t.splitlines()] for t in texts]
        assert texts[0] == texts[1], name


# Compiled for two scripts: the siblings' update and EDIS's, with noise of its own, are compiled alike
@pytest.mark.parametrize(
    "script, killed_at, mode",
    [(importlib.import_module(name), at, "off") for name in SCRIPTS for at in (4, 5, 7)]
    + [(importlib.import_module(name), 5, "on") for name in ("edp_iql", "edis_sac")],
)
def test_resume_is_exact(run, script, monkeypatch, killed_at, mode):
    whole = run("--num-updates", 10, "--compile", mode)

    class Killed(BaseException):
        pass

    log = script.Run.log

    def dying_log(self, metrics):
        if self.progress["step"] >= killed_at:
            self.exits.close()  # as the end of the process lets the run folder go
            raise Killed
        log(self, metrics)

    monkeypatch.setattr(script.Run, "log", dying_log)
    with pytest.raises(Killed):
        run("--num-updates", 10, "--compile", mode)
    monkeypatch.setattr(script.Run, "log", log)
    torch._dynamo.reset()  # as another process begins
    folder = max(script.Path(whole["run_dir"]).parent.iterdir(), key=lambda p: p.name)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "half a row')  # what a kill can leave
    resumed = script.main(parse(script, "--resume", folder))
    same_run(script, whole, resumed)


def test_a_run_goes_on_on_another_device(run, script):
    """With the optimisers' options of this device, not of the one that saved."""
    checkpoint = script.Path(run()["run_dir"]) / "checkpoint.pt"
    saved = torch.load(checkpoint)
    optimizers = [part for name, part in saved.items() if "optimizer" in name]
    for part in optimizers:
        part["param_groups"][0].update(capturable=True, fused=False)
    torch.save(saved, checkpoint)
    script.main(
        parse(
            script, "--resume", checkpoint.parent, "--num-updates" if "edp" in script.__name__ else "--online-steps", 12
        )
    )
    saved = torch.load(checkpoint)
    options = [part["param_groups"][0] for name, part in saved.items() if "optimizer" in name]
    assert [(group["capturable"], group["fused"]) for group in options] == [(False, True)] * len(optimizers)


def test_a_finished_run_can_go_on(run, script):
    whole = run("--num-updates", 8)
    first = run("--num-updates", 4)
    same_run(script, whole, script.main(parse(script, "--resume", first["run_dir"], "--num-updates", 8)))


def test_resume_refuses_other_settings_and_data(run, script, tmp_path, capsys):
    folder = run()["run_dir"]
    line = error_of(capsys, lambda: parse(script, "--resume", folder, "--lr", "1e-2"))
    assert "-lr cannot change" in line
    write_hdf5(tmp_path / "hopper.hdf5", make_columns(seed=1))  # the same name, other data
    assert "is not the data" in error_of(capsys, lambda: script.main(parse(script, "--resume", folder)))
    for bad in (tmp_path / "nowhere", tmp_path / "hopper.hdf5"):
        assert "--resume" in error_of(capsys, lambda: parse(script, "--resume", bad))  # noqa: B023
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    assert "--resume" in error_of(capsys, lambda: parse(script, "--resume", tmp_path / "other.pt"))


def test_resume_refuses_what_it_would_spoil(start, run, script, tmp_path, capsys):
    """A damaged checkpoint, one that is not in a run folder, a run that somebody else goes on with, one further on."""

    def refused(path, *flags):
        return error_of(capsys, lambda: script.main(parse(script, "--resume", path, *flags)))

    folder = script.Path(run()["run_dir"])
    assert "already" in refused(folder, "--num-updates", 4)
    shutil.copy(folder / "checkpoint.pt", tmp_path / "backup.pt")
    assert "checkpoint.pt" in refused(tmp_path / "backup.pt")
    assert "--resume" in refused("")
    with filelock.FileLock(folder / ".lock"):
        other = start(script.__name__, "--resume", str(folder))
        _, err = other.communicate()
        assert other.returncode == 2 and "in use by another process" in err
    content = bytearray((folder / "checkpoint.pt").read_bytes())
    for i in range(len(content) // 2, len(content) // 2 + 200):
        content[i] ^= 255
    (folder / "checkpoint.pt").write_bytes(content)
    assert "damaged" in refused(folder)


class Malicious:
    """Pickled, it runs a command when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_resume_refuses_foreign_checkpoints(run, script, tmp_path, capsys):
    """A pickle that runs code, another script's checkpoint, other networks."""
    torch.save({"args": {}, "progress": Malicious(tmp_path / "ran")}, tmp_path / "bad.pt")
    assert "--resume" in error_of(capsys, lambda: parse(script, "--resume", tmp_path / "bad.pt"))
    assert not (tmp_path / "ran").exists()
    file = script.Path(run()["run_dir"]) / "checkpoint.pt"
    for other in map(importlib.import_module, SCRIPTS):
        if other is not script:
            assert "of another script" in error_of(capsys, lambda o=other: o.load_checkpoint(str(file)))
    checkpoint = torch.load(file, weights_only=True)
    name = next(name for name in checkpoint["critic"] if name.endswith("weight"))
    checkpoint["critic"][name] = checkpoint["critic"][name][:5]
    torch.save(checkpoint, file)
    assert "does not fit" in error_of(capsys, lambda: script.main(parse(script, "--resume", file)))


def test_no_transitions(run, tmp_path, capsys):
    path = write_hdf5(tmp_path / "one.hdf5", make_columns(rows=1))
    assert "no transition" in error_of(
        capsys, lambda: run(data=("--env-id", "hopper-medium-v2", "--dataset-path", str(path)))
    )


def test_full_disk_keeps_the_old_checkpoint(run, script, monkeypatch, capsys):
    save, calls = torch.save, []

    def full(state, file):
        calls.append(1)
        if len(calls) > 1:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", full)
    result = run()
    assert len(calls) > 2 and "No space left" in capsys.readouterr().err
    assert script.load_checkpoint(result["run_dir"])["progress"]["step"] == 3
    assert not list(script.Path(result["run_dir"]).glob("*.tmp"))


def test_full_disk_costs_rows_not_the_run(run, monkeypatch, capsys):
    import builtins

    real = builtins.open

    def full(file, *args, **kwargs):
        if str(file).endswith((".jsonl", ".csv")):
            raise OSError(28, "No space left on device")
        return real(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", full)
    assert run()["updates"] == 6
    assert "warning: metrics.jsonl not written at update 2" in capsys.readouterr().err


def test_tensorboard_goes_on_after_a_full_disk(run, monkeypatch, capsys):
    """A writer whose thread met a full disk is dead: the next row opens another."""
    from torch.utils.tensorboard import SummaryWriter

    add_scalar, writers, steps = SummaryWriter.add_scalar, [], set()

    def full(self, name, value, step):
        writers.append(self)
        if self is writers[0]:
            raise OSError(28, "No space left on device")
        steps.add(step)
        add_scalar(self, name, value, step)

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    run()
    assert 2 not in steps and {4, 6} <= steps and capsys.readouterr().err.count("TensorBoard events not written") == 1


def test_evaluations_have_their_header_after_a_full_disk(run, script, tmp_path, monkeypatch):
    """A first row that failed leaves an empty file."""
    append, failed = script.Run.append, []

    def full(self, name, text):
        if name == "evaluations.csv" and not failed:
            failed.append((self.dir / name).touch())
        else:
            append(self, name, text)

    monkeypatch.setattr(script.Run, "append", full)
    lines = (script.Path(run()["run_dir"]) / "evaluations.csv").read_text().splitlines()
    assert lines[0].startswith("step,episode") and len(lines) == 3


@pytest.mark.parametrize("limit", [0, 1_000])
def test_full_disk_from_the_start(run, script, tmp_path, hopper_file, limit):
    """No file grows beyond `limit` bytes: a new run ends well, a resumed one loses no row, no half row stays."""
    done = run()["run_dir"]
    kept = {name: (script.Path(done) / name).read_text() for name in ("metrics.jsonl", "evaluations.csv")}
    data = ["--env-id", "hopper-medium-v2", "--dataset-path", str(hopper_file), "--runs-dir", str(tmp_path / "new")]
    more = [f"--{'online-steps' if script.__name__ == 'edis_sac' else 'num-updates'}", "9"]
    for flags in ([*flags_of(script, [*fast(script).split(), *data])], ["--resume", done, *more]):
        command = [sys.executable, "-B", str(ROOT / f"{script.__name__}.py"), *flags]
        prepare = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
        process = subprocess.run(command, capture_output=True, text=True, preexec_fn=prepare, cwd=tmp_path)
        assert process.returncode == 0 and "warning: checkpoint not written" in process.stderr, process.stderr
    for name, text in kept.items():
        assert (script.Path(done) / name).read_text().startswith(text)
    (new,) = (tmp_path / "new").iterdir()
    if (new / "metrics.jsonl").exists():
        assert all(row["step"] for row in rows_of(new / "metrics.jsonl"))


def test_a_reader_that_goes_away(start, tmp_path, hopper_file, script):
    """python script.py | head -1"""
    data = ["--env-id", "hopper-medium-v2", "--dataset-path", str(hopper_file)]
    process = start(script.__name__, *flags_of(script, [*fast(script).split(), *data]))
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait() == 0 and "BrokenPipe" not in err
    assert list((tmp_path / "runs").glob("*/result.json"))


def test_stop_during_an_evaluation(run, script, monkeypatch):
    """The evaluation is made after the resume, once, and its rows survive a further kill."""
    whole = run("--num-updates", 8)
    evaluate = script.evaluate
    monkeypatch.setattr(script, "evaluate", lambda act, envs, seeds, stop: stop.append(15) or [])
    with pytest.raises(SystemExit) as caught:
        run("--num-updates", 8)
    assert caught.value.code == 143
    monkeypatch.setattr(script, "evaluate", evaluate)
    folder = max(script.Path(whole["run_dir"]).parent.iterdir(), key=lambda p: p.name)
    assert script.load_checkpoint(str(folder))["progress"]["step"] == 4
    same_run(script, whole, script.main(parse(script, "--resume", folder)))


def test_divergence_ends_with_3(run, script, tmp_path, capsys, monkeypatch):
    closed = []
    monkeypatch.setattr("gymnasium.Wrapper.close", lambda env: closed.append(env))  # writes the video
    with pytest.raises(SystemExit) as caught:
        run(
            "--lr", "1e30", "--num-updates", "50", *(["--max-grad-norm", "0"] if has(script, "--max-grad-norm") else [])
        )
    assert caught.value.code == 3 and len(closed) >= 2  # those of evaluation
    (folder,) = (tmp_path / "runs").iterdir()
    message, found = capsys.readouterr().err, json.loads((folder / "diagnostics.json").read_text())
    first = next(name for name, value in found.items() if not math.isfinite(value))
    assert f"diverged at update {found['step']}: {first}" in message and first.startswith("losses/")
    checkpoint = folder / "checkpoint.pt"
    assert not checkpoint.exists() or all(
        torch.isfinite(value).all() for value in script.load_checkpoint(str(folder))["critic"].values()
    )


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(start, name, signum, code, tmp_path, hopper_file):
    """A signal saves and exits; the run goes on from the very update."""
    data = ["--env-id", "hopper-medium-v2", "--dataset-path", str(hopper_file)]
    script = importlib.import_module(name)
    never = fast(script).replace("--save-every 3", "--save-every 1000000").replace("updates 6", "updates 9000")
    process = start(name, *flags_of(script, [*never.split(), *data]))
    for line in process.stdout:  # first progress
        if line.startswith("update"):
            break
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and "--resume" in err and "Traceback" not in err
    (folder,) = (tmp_path / "runs").iterdir()
    step = script.load_checkpoint(str(folder))["progress"]["step"]
    assert step > 0
    result = script.main(parse(script, "--resume", folder, "--num-updates", step + 3))
    assert result["updates"] == step + 3


def test_a_signal_while_compiling(start, tmp_path, hopper_file, monkeypatch):
    """Nothing is there to save: the run ends at once, without the compiler's pages."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    process = start("edp_td3", "--compile", "on", "--env-id", "hopper-medium-v2", "--dataset-path", str(hopper_file))
    while not process.stdout.readline().startswith("--compile"):
        assert process.poll() is None
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "stopped at update 0\n")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_signal_before_the_first_update(start, name, tmp_path, monkeypatch):
    """Here while a download waits for a server that says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "data"))
        process = start(name, "--env-id", "hopper-medium-v2")
        server.settimeout(60)
        connection, _ = server.accept()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        connection.close()
    assert process.returncode == 130 and "Traceback" not in err
    assert not any((tmp_path / "data").glob("*.hdf5"))


def test_a_stop_during_a_round_does_not_wait(start, tmp_path, hopper_file):
    """EDIS has saved before the round, which would take minutes here; a resume makes it again."""
    import edis_sac

    data = ["--env-id", "hopper-medium-v2", "--dataset-path", str(hopper_file)]
    flags = flags_of(edis_sac, [*FAST_EDIS.split(), *data, "--denoiser-updates", "1000000"])
    process = start("edis_sac", *flags)
    for line in process.stdout:
        if line.startswith("update 5/"):  # logged with the checkpoint, right before the round
            break
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 143 and "stopped at update 5; go on with --resume" in err
    (folder,) = (tmp_path / "runs").iterdir()
    assert edis_sac.load_checkpoint(str(folder))["progress"]["step"] == 5


@pytest.mark.parametrize("script", map(importlib.import_module, EDP))
def test_evaluation_acts_with_the_current_networks(script, run, monkeypatch):
    """And not with their targets."""
    select_actions, used = script.select_actions, {}

    def spied(diffusion, policy, critic, *rest):
        for name, network in (("policy", policy), ("critic", critic)):
            used[name] = torch.cat([p.detach().flatten() for p in network.parameters()])
        return select_actions(diffusion, policy, critic, *rest)

    monkeypatch.setattr(script, "select_actions", spied)
    saved = script.load_checkpoint(run()["run_dir"])
    for name, weights in used.items():
        assert torch.equal(weights, torch.cat([p.flatten() for p in saved[name].values()]))


def test_edis_smoke(tmp_path, hopper_file):
    """2000 online steps through two rounds: every phase, every metric, synthetic rows in the batches."""
    import edis_sac

    flags = (
        "--offline-updates 100 --online-steps 2000 --batch-size 32 --first-round 500 --round-every 1000 --samples 200"
    )
    flags += " --denoiser-updates 100 --denoiser-width 32 --denoiser-layers 1 --sampling-steps 8 --model-updates 50"
    flags += " --energy-updates 50 --energy-width 32 --energy-batch 16 --pool 100 --cql-actions 2"
    flags += " --cql-alpha-online 0 --eval-episodes 2"
    data = ["--env-id", "hopper-medium-v2", "--dataset-path", str(hopper_file), "--runs-dir", str(tmp_path / "runs")]
    begin = time.process_time()  # other processes do not count
    result = edis_sac.main(edis_sac.parse_args([*flags.split(), *data]))
    assert time.process_time() - begin < 60
    folder = edis_sac.Path(result["run_dir"])
    rounds = [row for row in rows_of(folder / "metrics.jsonl") if "guided/state" in row]
    assert [row["step"] for row in rounds] == [601, 1601]
    distances = ("state", "policy", "dynamics", "dynamics_rms", "learned_dynamics", "reward_rms", "mask_bias")
    names = {f"{kind}/{name}" for kind in ("guided", "unguided", "recent") for name in distances}
    names |= {f"{energy}_off/{name}" for energy in ("state", "policy", "transition") for name in distances}
    names |= {"charts/generated_per_second", "losses/denoiser_loss", "losses/model_loss"}
    names |= {f"energies/{name}_accuracy_sigma_1" for name in ("state", "policy", "behavior", "transition")}
    assert all(names <= set(row) and all(map(math.isfinite, row.values())) for row in rounds)
    saved = edis_sac.load_checkpoint(str(folder))
    assert saved["online"]["count"] == 2_000 and saved["synthetic"]["count"] == 400


def test_online_rows_are_the_environments(run_edis):
    """s, a, s', r, mask and Monte-Carlo return of every online row, played again from the episodes' seeds."""
    saved = run_edis("--offline-updates", "1", "--online-steps", "115", "--augmentation", "none")[0]
    rows, env, episode, i = saved["online"]["rows"], gym.make("Hopper-v4"), -1, 0
    s, a, next_s, r, mask, returns = rows.split([11, 3, 11, 1, 1, 1], dim=1)
    assert len(rows) == 115 and saved["interaction"]["episode"] > 0
    while i < len(rows):
        episode += 1
        obs, _ = env.reset(seed=int(np.random.default_rng([0, episode]).integers(2**31)))
        start, end = i, False
        while i < len(rows) and not end:
            assert torch.equal(s[i], torch.as_tensor(obs).float())
            obs, reward, terminated, truncated, _ = env.step(a[i].numpy())
            assert torch.equal(next_s[i], torch.as_tensor(obs).float())
            assert r[i].item() == np.float32(reward) and mask[i].item() == (not terminated)
            end, i = terminated or truncated, i + 1
        for j in range(start, i):
            to_go = sum(0.99 ** (t - j) * r[t].item() for t in range(j, i)) if end else -math.inf
            assert returns[j].item() == pytest.approx(to_go, rel=1e-5)
    assert not end and saved["interaction"]["episode"] == episode


@pytest.mark.parametrize(
    "augmentation", ["edis", "edis-without-energies", "edis-without-policy", "synther", "offline", "none"]
)
def test_what_online_batches_are_made_of(run_edis, augmentation, monkeypatch):
    """Online rows beside the last round's synthetic ones, which are guided, or real ones where there are none."""
    import edis_sac

    batches, made, given = [], [], []
    make_update, generate, make_round = edis_sac.make_update, edis_sac.Round.generate, edis_sac.Round.__call__
    make_guidance = edis_sac.make_guidance

    def spied_make_update(*args):
        update, optimizers = make_update(*args)

        def spied(cql_alpha, **batch):
            batches.append((torch.column_stack([batch[name] for name in ("s", "a", "next_s", "r", "mask")]), cql_alpha))
            return update(cql_alpha=cql_alpha, **batch)

        return spied, optimizers

    def spied_make_guidance(energies, scales, full, clip):
        return scales, make_guidance(energies, scales, full, clip)

    def spied_generate(self, n, denoise, guidance):
        scales, guidance = guidance or (None, None)
        x = generate(self, n, denoise, guidance)
        made.append((n, scales, self.rows(x)[:, :27]))
        return x

    def spied_round(self, x, r, mask, recent):
        given.append((x, recent))
        assert self.edm.sigma[[0, -2]].tolist() == pytest.approx([5.0, 0.25])
        return make_round(self, x, r, mask, recent)

    monkeypatch.setattr(edis_sac, "make_update", spied_make_update)
    monkeypatch.setattr(edis_sac, "make_guidance", spied_make_guidance)
    monkeypatch.setattr(edis_sac.Round, "generate", spied_generate)
    monkeypatch.setattr(edis_sac.Round, "__call__", spied_round)
    flags = (
        "--batch-size 4 --online-steps 17 --positive-buffer 10 --first-round 9 --round-every 4 --synthetic-ratio 0.25"
    )
    flags = f"{flags} --cql-alpha-online 0.5 --augmentation {augmentation.split('-')[0]}".split()
    flags += ["--state-scale", "2", "--policy-scale", "3", "--transition-scale", "4"]
    flags += ["--sigma-max", "5", "--sigma-min", "0.25"]
    off = {"edis-without-energies": (0, 1, 2), "edis-without-policy": (1,)}.get(augmentation, ())
    flags += [f"--no-{name}-energy" for i, name in enumerate(("state", "policy", "transition")) if i in off]
    saved, data = run_edis("--offline-updates", "3", *flags)
    online = saved["online"]["rows"][:, :27]
    guided = augmentation in ("edis", "edis-without-policy")
    size = 5 if guided else 2  # to compare with: unguided; the rows; to compare with: each energy off
    rounds = [made[i : i + size] for i in range(0, len(made), size)]

    def among(rows, others):
        return (rows[:, None] == others).all(2).any(1).tolist()

    assert len(batches) == 3 + 17 and len(rounds) == len(given) == (0 if augmentation in ("offline", "none") else 2)
    for n, (x, recent) in zip((9, 13), given, strict=False):
        assert torch.equal(recent, online[max(0, n - 10) : n, :25]) and torch.equal(x[-n:], online[:n, :25])
        assert torch.equal(x[:-n], data[:, :25])  # all offline and all online data
    for i, (batch, cql_alpha) in enumerate(batches):
        offline = i < 3 + 3  # until a batch's worth is online
        assert cql_alpha == (5.0 if offline else 0.5)
        if offline:
            assert among(batch, data) == [True] * 4
            continue
        share = 0 if augmentation == "none" else 1
        assert among(batch[share:], online[: i - 2]) == [True] * (4 - share) and len(batch) == 4
        if share and rounds and i >= 3 + 9:
            all_scales = [scales for _, scales, _ in rounds[(i - 3 - 9) // 4]]
            scales = [tuple(0 if j in (*off, without) else j + 2 for j in range(3)) for without in (None, 0, 1, 2)]
            assert all_scales == ([None, *scales] if guided else [None, None])
            n, _, rows = rounds[(i - 3 - 9) // 4][1]
            assert n == 20 and among(batch[:1], rows) == [True]
        elif share:
            assert among(batch[:1], data) == [True]


def test_offline_batches_know_their_returns(run_edis, monkeypatch):
    """Monte-Carlo returns to go of the file's rows, which end at terminals and timeouts."""
    import edis_sac

    seen, make_update, columns = [], edis_sac.make_update, make_columns()

    def spied_make_update(*args):
        update, optimizers = make_update(*args)

        def spied(**batch):
            seen.append(torch.column_stack([batch["s"], batch["mc"]]))
            return update(**batch)

        return spied, optimizers

    monkeypatch.setattr(edis_sac, "make_update", spied_make_update)
    run_edis("--offline-updates", "20", "--online-steps", "0", "--gamma", "0.9", "--batch-size", "32")
    expected = {}
    for start in range(0, 600, 50):  # its episodes, which end in turn by a terminal and by a timeout
        for i in range(start, start + 50):
            rewards = columns["rewards"][i : start + 50]
            expected[columns["observations"][i].tobytes()] = sum(0.9**n * r for n, r in enumerate(rewards))
    rows = torch.cat(seen).numpy()
    assert len({row[:11].tobytes() for row in rows}) > 100
    assert [row[11] for row in rows] == pytest.approx([expected[row[:11].tobytes()] for row in rows], rel=1e-5)


def test_online_runs_share_a_pretrained_agent(tmp_path, hopper_file, capsys):
    """A copy of a run that ended with its offline updates goes on like a whole run of the other settings."""
    import edis_sac

    def run(*flags):
        data = ["--env-id", "hopper-medium-v2", "--dataset-path", str(hopper_file)]
        argv = flags_of(edis_sac, [*FAST_EDIS.split(), *data, "--runs-dir", tmp_path / "runs", *flags])
        return edis_sac.main(edis_sac.parse_args(argv))

    whole = run("--augmentation", "synther")
    pretrained = run("--online-steps", "0")["run_dir"]
    shutil.copytree(pretrained, tmp_path / "copy")
    flags = ["--resume", str(tmp_path / "copy"), "--online-steps", "3", "--augmentation", "synther"]
    forked = edis_sac.main(edis_sac.parse_args(flags))
    assert forked["run_dir"] == str(tmp_path / "copy")
    left, right = (edis_sac.load_checkpoint(result["run_dir"]) for result in (whole, forked))
    assert left["online"]["count"] == right["online"]["count"] == 3
    for name in ("actor", "critic", "denoiser", "synthetic"):
        for key, value in left[name].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(right[name][key])), (name, key)
    late = ["--resume", str(tmp_path / "copy"), "--augmentation", "none"]
    assert "--augmentation cannot change" in error_of(capsys, lambda: edis_sac.parse_args(late))


def test_what_changed_on_resume_is_told_and_kept(run, script, monkeypatch, capsys):
    """Versions and commit of every part of a run stay in args.json."""
    first = run("--num-updates", 4)
    path = script.Path(first["run_dir"]) / "args.json"
    before = json.loads(path.read_text())
    assert before["resumed_from"] == []
    for commit in ("other", "third"):
        describe = script.describe
        monkeypatch.setattr(script, "describe", lambda *a, c=commit, d=describe: {**d(*a), "commit": c})
        script.main(parse(script, "--resume", first["run_dir"], "--num-updates", 5))
    about = json.loads(path.read_text())
    assert about["commit"] == "third" and "the run began with {'commit'" in capsys.readouterr().err
    fewer = {name: entry["value"] for name, entry in before["args"].items() if name in ("num_updates", "online_steps")}
    assert about["resumed_from"] == [
        {"step": 4, "commit": before["commit"], "args": fewer},
        {"step": 5, "commit": "other", "args": {}},
    ]
    assert about["args"]["batch_size"]["source"] == "checkpoint"


def test_a_state_is_saved_once(run, monkeypatch):
    """Where an evaluation and --save-every fall on the same update too."""
    steps, save = [], torch.save
    monkeypatch.setattr(torch, "save", lambda x, file: (steps.append(x["progress"]["step"]), save(x, file)))
    run("--save-every", "1", "--eval-every", "2")
    assert steps == sorted({*steps}) and len(steps) >= 6, steps


def test_slow_products_are_told(script, monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)  # for the tests that follow
    for capability in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        script.set_up(parse(script, "--matmul-precision", "medium", "--device", "cpu"))
        assert ("no bfloat16" in capsys.readouterr().err) == (capability == "AVX2")


def test_a_phase_without_a_round_is_told(run_edis, capsys):
    for steps in (2, 3):  # the first round is after two
        run_edis("--offline-updates", "1", "--online-steps", str(steps))
        assert ("no synthetic data" in capsys.readouterr().err) == (steps == 2)


def test_nothing_is_written_elsewhere(run, script, tmp_path, monkeypatch):
    """Names cannot leave the runs folder; MuJoCo writes no log of its own."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    run("--exp-name", "../..\n/outside")
    (folder,) = (tmp_path / "runs").iterdir()
    assert ".._..__outside" in folder.name
    core = gym.make("Hopper-v4").unwrapped
    core.set_state(np.full(6, np.nan), np.zeros(6))
    with pytest.warns(UserWarning, match="MuJoCo: Nan"):
        core.step(np.zeros(3))
    assert not list((tmp_path / "cwd").iterdir())
    assert {path.name for path in tmp_path.iterdir()} <= {"cwd", "runs", "hopper.hdf5"}


def test_an_old_model_is_not_complained_of(hopper_file, tmp_path):
    """HalfCheetah-v4's, by MuJoCo: neither on stderr nor in a log of its own. The file is another robot's."""
    flags = ["--env-id", "halfcheetah-medium-v2", "--dataset-path", str(hopper_file), "--device", "cpu"]
    command = [sys.executable, str(ROOT / "edp_iql.py"), *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done
    assert "HalfCheetah-v4" in done.stderr and "do not fit" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["hopper.hdf5"]


def test_a_failing_wandb_does_not_stop_the_run(run, script, monkeypatch, capsys):
    import wandb

    def fail(**options):
        raise wandb.errors.CommError("no answer")

    monkeypatch.setattr(wandb, "init", fail)
    assert run("--track", "--wandb-mode", "offline")["updates"] == 6
    assert "no answer" in capsys.readouterr().err


def test_evaluation_does_not_disturb_training(run, script):
    """Another --eval-every, the same weights; another seed, other weights."""
    runs = [run("--eval-every", 2), run("--eval-every", 5), run("--seed", 1)]
    a, b, c = (script.load_checkpoint(result["run_dir"])["critic"] for result in runs)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


# ------------------------------------------------------------------------------------------------------ command line
BAD = {
    "--num-updates": 0, "--batch-size": -1, "--lr": "nan", "--gamma": 1.5, "--expectile": -0.1,
    "--diffusion-steps": 20, "--sampler-steps": 31, "--device": "nonsense", "--seed": -1, "--runs-dir": "/dev/null/x",
    "--temperature": 0, "--online-steps": -1, "--denoiser-lr": 0, "--synthetic-ratio": 2, "--sampling-steps": 1,
    "--first-round": 1, "--positive-buffer": 1, "--samples": 1,
    "--advantage-samples": 0, "--max-q-top-k": 11, "--eta": "inf", "--policy-target-every": 0, "--weight-cap": 0,
}  # fmt: skip


@pytest.mark.parametrize("name, flag", [
    (name, flag) for name in SCRIPTS for flag in BAD if has(importlib.import_module(name), flag)
])  # fmt: skip
def test_bad_arguments(name, flag, hopper_file, capsys):
    script, data = importlib.import_module(name), ["--env-id", "hopper-medium-v2", "--dataset-path", str(hopper_file)]
    argv = [*fast(script).split(), *data, flag, BAD[flag]]
    assert flag in error_of(capsys, lambda: script.main(parse(script, *argv)))


def test_inpainted_negatives_that_cannot_be(capsys):
    import edis_sac

    flags = ["--conditional-negatives", "inpainted"]
    assert "--no-full-gradient" in error_of(capsys, lambda: edis_sac.check_args(edis_sac.parse_args(flags)))
    flags += ["--no-full-gradient", "--pool", "9"]
    assert "--pool" in error_of(capsys, lambda: edis_sac.check_args(edis_sac.parse_args(flags)))


def test_every_number_has_bounds(script, capsys):
    """A slip of the keyboard does not reach an allocation or a loss."""
    for field in script.dataclasses.fields(script.Args):
        for value in {int: (10**30, -1), float: (math.nan, math.inf, -1.0)}.get(field.type, ()):
            args = script.dataclasses.replace(script.Args(), **{field.name: value})
            flag = f"--{field.name.replace('_', '-')} "
            assert flag in error_of(capsys, lambda a=args: script.check_args(a)), (field.name, value)


def test_no_such_gpu(run, capsys):
    assert "--device" in error_of(capsys, lambda: run("--device", "cuda:77"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_command_line(start, name, tmp_path):
    """--help is quick and shows the preset of the id; a bad flag ends with exit code 2 and no traceback."""
    begin = time.time()
    env_id, flag = ("hopper-medium-mini", "--actor-lr") if name == "edis_sac" else ("walker2d-medium-v2", "--lr")
    out, _ = (process := start(name, "--env-id", env_id, "--help")).communicate()
    assert process.returncode == 0 and time.time() - begin < 30  # 3 on an idle machine
    assert re.search(rf"{flag} FLOAT[^-]*default: 0.0003\)", out)
    for flags in (["--nonsense"], ["--seed", "x"], ["--compile", "perhaps"]):
        _, err = (process := start(name, *flags)).communicate()
        assert process.returncode == 2 and "Traceback" not in err


def test_a_trained_policy_as_the_readme_has_it(run, script):
    """It plays the episodes that the run's last evaluation played."""
    result = run("--observation-transform", "per-dimension", "--seed", "1")
    with open(Path(result["run_dir"]) / "evaluations.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["step"] == "6"]
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    if script.__name__ == "edis_sac":  # as the text above the block says
        code = re.sub(r"diffusion = .*?\n\)\n|    policy, critic = .*?\n", "", code, flags=re.S)
        code = re.sub(r"edp_iql\.select_actions\(.*?\)", 'networks["actor"].mode(s).detach()', code)
        code = code.replace("shape[0], device)", "shape[0], args, device)")
    exec(re.sub(r"runs/hopper[\w-]+", result["run_dir"], code.replace("edp_iql", script.__name__)), used := {})
    used["generator"].manual_seed(1 + 1_000_003 * 6)
    envs, seeds = used["envs"][: len(rows)], [int(row["seed"]) for row in rows]
    episodes = script.evaluate(used["act"], envs, seeds, [])
    assert [episode["return"] for episode in episodes] == pytest.approx([float(row["return"]) for row in rows])


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_copied_script_runs_alone(name, tmp_path, hopper_file):
    """In an empty folder, on a D4RL file, with nothing of the repository beside it."""
    folder = tmp_path / "empty"
    folder.mkdir()
    shutil.copy(ROOT / f"{name}.py", folder / "mine.py")
    shutil.copy(hopper_file, folder / "hopper_medium-v2.hdf5")
    script = importlib.import_module(name)
    command = [sys.executable, "mine.py", *flags_of(script, [*fast(script).split(), "--env-id", "hopper-medium-v2"])]
    env = {**os.environ, "D4RL_DATASET_DIR": str(folder), "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (made,) = (folder / "runs").iterdir()
    assert made.name.startswith("hopper-medium-v2__mine__0__") and (made / "result.json").exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_wandb_without_a_key(start, name, tmp_path, hopper_file):
    """Says so before any data is loaded."""
    _, err = (process := start(name, "--track", "--dataset-path", "nowhere.hdf5")).communicate(timeout=60)
    assert process.returncode == 2 and "--wandb-mode offline" in err and "nowhere" not in err


def test_wandb_offline(run, script, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    result = run("--track", "--wandb-mode", "offline", "--wandb-group", "tests")
    assert list((script.Path(result["run_dir"]) / "wandb").glob("offline-run-*"))


class Drawn(gym.Env):
    """Hopper's shapes, and a picture."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}
    action_space, observation_space = gym.spaces.Box(-1, 1, (3,)), gym.spaces.Box(-9, 9, (11,))

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.zeros(11, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.zeros(11, np.float32), 1.0, False, self.t == 5, {}

    def render(self):
        return np.full((64, 64, 3), 40 * self.t, np.uint8)


gym.register("Drawn-v0", entry_point="test_run:Drawn")


def test_video(run, script, hopper_file, monkeypatch):
    data = ("--env-id", "Drawn-v0", "--dataset-path", str(hopper_file))
    result = run("--capture-video", data=data)
    videos = list((script.Path(result["run_dir"]) / "videos").glob("*.mp4"))
    assert len(videos) == 2 and all(video.stat().st_size > 500 for video in videos)


def test_video_that_cannot_be_drawn(run, hopper_file, monkeypatch, capsys):
    monkeypatch.setattr(Drawn, "render", lambda self: 1 / 0)
    data = ("--env-id", "Drawn-v0", "--dataset-path", str(hopper_file))
    assert "--capture-video" in error_of(capsys, lambda: run("--capture-video", data=data))

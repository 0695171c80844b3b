"""Whole runs: every phase, files, resume, signals, exit codes, logs. edp_iql stands for all where code is shared."""

import importlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import argv_of, error_of, make_columns, newest, resume, rows_of, same_run, step_of, write_hdf5
from torch._dynamo.utils import counters

import edp_iql


# ------------------------------------------------------------------------------------------------------------ one run
def test_run_files(run, script, tmp_path):
    """Every phase of a run, and what it leaves."""
    result = run(script, "--seed", 3)
    folder = newest(tmp_path)
    assert folder.name.startswith(f"hopper-medium-v2__{script.__name__}__3__") and result["run_dir"] == str(folder)
    assert json.loads((folder / "result.json").read_text()) == result
    assert result["updates"] == 6 and result["updates_per_second"] > 0
    about = json.loads((folder / "args.json").read_text())
    assert about["args"]["seed"] == 3 and about["args"]["tau"] == 0.005 and len(about["data"]) == 64
    assert about["args"]["max_grad_norm"] == 9.0  # the preset
    rows = rows_of(folder)
    losses = [row for row in rows if "losses/qf1_loss" in row]
    assert {2, 3, 4, 6} <= {row["step"] for row in losses}  # log, save, log and evaluation, end
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    evaluations = [row for row in rows if "charts/episodic_return" in row]
    assert [row["step"] for row in evaluations] == [4, 6]
    each = evaluations[-1]["episodes/episodic_return"]
    assert len(each) == 2 and each != evaluations[0]["episodes/episodic_return"]
    assert result["episodic_return"]["last"] == pytest.approx(np.mean(each))
    score = 100 * (np.mean(each) + 20.272305) / (3234.3 + 20.272305)
    assert result["normalized_score"]["last"] == pytest.approx(score)
    assert result["episodic_return"]["best"] >= result["episodic_return"]["mean_of_last_10"]
    assert list(folder.glob("events.out.tfevents.*")) and not list(folder.glob("*.tmp"))
    assert step_of(script, folder) == 6


BRANCHES = {
    "edp_iql": [
        "--sampler ddpm --likelihood elbo --reward-transform none",
        "--solver-order 1 --max-grad-norm 0 --normalize-observations --reward-transform min-max --guidance-coef 0",
        "--solver-order 2 --reward-transform minus-one --inverse-temperature 0 --eval-candidates 1",
        "--reward-transform times-four --diffusion-coef 0",
    ],
    "edp_crr": ["--likelihood elbo --sampler ddpm", "--likelihood simple --reward-transform return-range"],
    "edp_td3": [
        "--reward-transform return-range", "--no-action-approximation", "--no-action-approximation --sampler ddpm",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name, flags", [(name, flags) for name in BRANCHES for flags in BRANCHES[name]])
def test_every_branch(run, name, flags):
    assert run(importlib.import_module(name), *flags.split())["episodic_return"]["evaluations"] == 2


def test_without_environment(run):
    result = run(edp_iql, "--eval-episodes", 0, env_id="my-robot")
    assert result["updates"] == 6 and "episodic_return" not in result
    assert "normalized_score" not in run(edp_iql, env_id="Hopper-v4")  # no reference returns


def test_evaluation_does_not_disturb_training(run):
    """Another --eval-every, the same weights; another seed, other weights."""
    results = [run(edp_iql, "--eval-every", 2), run(edp_iql, "--eval-every", 5), run(edp_iql, "--seed", 1)]
    a, b, c = (edp_iql.load_checkpoint(result["run_dir"])["critic"] for result in results)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


class Toy(gym.Env):
    """Hopper's shapes, episodes of five steps with a success in the third, and a picture."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}
    action_space, observation_space = gym.spaces.Box(-1, 1, (3,)), gym.spaces.Box(-9, 9, (11,))
    breaks_at = math.inf  # calls of step

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.zeros(11, np.float32), {}

    def step(self, action):
        self.t += 1
        Toy.breaks_at -= 1
        if Toy.breaks_at <= 0:
            raise RuntimeError("the simulator fails")
        return np.zeros(11, np.float32), 1.0, False, self.t == 5, {"success": self.t == 3}

    def render(self):
        return np.full((64, 64, 3), 40 * self.t, np.uint8)


gym.register("Toy-v0", entry_point="test_run:Toy")


def test_success_and_video(run):
    result = run(edp_iql, "--capture-video", env_id="Toy-v0")
    assert result["success"]["last"] == 1 and result["episodic_return"]["last"] == 5
    assert rows_of(result["run_dir"])[-1]["episodes/episodic_length"] == [5, 5]
    videos = list((Path(result["run_dir"]) / "videos").glob("*.mp4"))
    assert len(videos) == 2 and all(video.stat().st_size > 500 for video in videos)


def test_an_environment_that_fails(run, tmp_path, monkeypatch, script):
    """What was trained before the evaluation is saved; handlers of signals are as they were."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Toy, "breaks_at", 3)
    with pytest.raises(RuntimeError, match="the simulator fails"):
        run(script, "--save-every", 1000, env_id="Toy-v0")
    assert step_of(script, newest(tmp_path)) in (3, 4)
    assert signal.getsignal(signal.SIGTERM) is before


DIFFUSION_QL = "--no-action-approximation --beta-schedule vp --diffusion-steps 6"


@pytest.mark.slow
@pytest.mark.parametrize("name, flags", [("edp_iql", ""), ("edp_td3", DIFFUSION_QL)])
def test_compiled_update_agrees_with_eager(run, capsys, name, flags):
    """Metrics and weights of compiled and eager runs, to float32 rounding."""
    script, logs, states = importlib.import_module(name), [], []
    for mode in ("off", "on"):
        torch._dynamo.reset()
        counters.clear()
        folder = run(script, "--compile", mode, "--num-updates", 30, "--eval-every", 30, *flags.split())["run_dir"]
        assert (counters["stats"]["unique_graphs"] > 0) == (mode == "on")
        logs.append(rows_of(folder))
        states.append(script.load_checkpoint(folder))
    torch._dynamo.reset()
    assert "warning" not in capsys.readouterr().err.lower()
    for eager, compiled in zip(*logs, strict=True):
        for loss in (loss for loss in eager if loss.startswith("losses/")):
            assert compiled[loss] == pytest.approx(eager[loss], rel=1e-3, abs=1e-4), loss
    for network in {"policy", "value", "critic"} & states[0].keys():
        eager, compiled = (torch.cat([x.flatten() for x in state[network].values()]) for state in states)
        assert (compiled - eager).norm() < 1e-4 * eager.norm(), network


# ------------------------------------------------------------------------------------------------- checkpoint, resume
class Killed(BaseException):
    """As if the process were killed."""


def dies_in(monkeypatch, owner, name, nth, error=Killed):
    """owner.name raises on its n-th call; torch.save after half of its work."""
    original, calls = getattr(owner, name), itertools.count(1)

    def dying(*args, **kwargs):
        if next(calls) != nth:
            return original(*args, **kwargs)
        if name == "save":
            args[1].write(b"half")
        raise error

    monkeypatch.setattr(owner, name, dying)


KILLS = [("edp_iql", where, nth) for where, nth in (
    ("draw", 4), ("draw", 5), ("draw", 10), ("evaluate", 1), ("evaluate", 2), ("save", 2), ("save", 4),
)]  # fmt: skip
KILLS += [("edp_crr", "draw", 8), ("edp_td3", "save", 3)]


@pytest.mark.parametrize("name, where, nth", KILLS)
def test_resume_is_exact(run, tmp_path, monkeypatch, name, where, nth):
    """After a kill in an update, in an evaluation, while a checkpoint is written."""
    script = importlib.import_module(name)
    whole = run(script, "--num-updates", 10)
    with monkeypatch.context() as patch:
        dies_in(patch, torch if where == "save" else script, where, nth)
        with pytest.raises(Killed):
            run(script, "--num-updates", 10)
    folder = newest(tmp_path)
    assert str(folder) != whole["run_dir"]
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "half a row')  # what a kill can leave
    same_run(script, whole, resume(script, folder))


def test_only_an_evaluation(run, tmp_path, capsys):
    """--eval-only: the trained weights, in a run folder of its own; the trained run is left as it is."""
    folder = Path(run(edp_iql)["run_dir"])
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert "--eval-only needs" in error_of(capsys, lambda: run(edp_iql, "--eval-only"))
    result = resume(edp_iql, folder, "--eval-only", "--eval-episodes", 2)
    assert result["run_dir"] != str(folder) and result["updates"] == 6
    assert rows_of(result["run_dir"]) == rows_of(folder)[-1:]
    more = resume(edp_iql, folder, "--eval-only", "--eval-episodes", 3, "--eval-candidates", 1)
    assert len(rows_of(more["run_dir"])[0]["episodes/episodic_return"]) == 3
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_finished_run_can_go_on(run):
    """From --num-updates 4 to 8, as one of 8; with the optimisers' options of this device."""
    whole, first = (run(edp_iql, "--gamma", 0.9, "--num-updates", n)["run_dir"] for n in (8, 4))
    checkpoint = Path(first) / "checkpoint.pt"
    saved = torch.load(checkpoint, weights_only=True)
    for part in (part for name, part in saved.items() if "optimizer" in name):
        part["param_groups"][0].update(capturable=True)  # as a GPU saves them
    torch.save(saved, checkpoint)
    same_run(edp_iql, {"run_dir": whole}, resume(edp_iql, first, "--num-updates", 8))
    # Command line before checkpoint before preset
    args = edp_iql.parse_args(["--resume", first, "--num-updates", "9"])
    assert (args.gamma, args.num_updates, args.max_grad_norm, args.env_id) == (0.9, 9, 9.0, "hopper-medium-v2")
    assert edp_iql.parse_args(["--resume", first, "--max-grad-norm", "2"]).max_grad_norm == 2


def test_speed_is_told_without_compiling(run, monkeypatch):
    at_update(monkeypatch, edp_iql, 1, lambda metrics: time.sleep(2) or metrics)
    assert run(edp_iql, "--log-every", 1)["updates_per_second"] > 5


class Malicious:
    """Pickled, it runs a command when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_what_cannot_be_resumed(run, tmp_path, capsys):
    """No run, a damaged one, another script's, other data, a pickle that runs code."""
    folder = Path(run(edp_iql)["run_dir"])
    assert "--resume" in error_of(capsys, lambda: resume(edp_iql, tmp_path / "nowhere"))
    write_hdf5(tmp_path / "hopper.hdf5", make_columns(seed=1))  # the same name, other data
    assert "data" in error_of(capsys, lambda: resume(edp_iql, folder))
    content = bytearray((folder / "checkpoint.pt").read_bytes())
    (folder / "checkpoint.pt").write_bytes(content[: len(content) // 2])
    assert "--resume" in error_of(capsys, lambda: resume(edp_iql, folder))
    torch.save({"args": {}, "step": Malicious(tmp_path / "ran")}, folder / "checkpoint.pt")
    assert "--resume" in error_of(capsys, lambda: resume(edp_iql, folder))
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------- signals, exit codes
def at_update(monkeypatch, script, nth, action):
    """In the n-th update: action(metrics) -> metrics."""
    make_update, calls = script.make_update, itertools.count(1)

    def make_changed(*args):
        update, optimizers = make_update(*args)

        def changed(*batch, **draws):
            metrics = update(*batch, **draws)
            return action(metrics) if next(calls) == nth else metrics

        return changed, optimizers

    monkeypatch.setattr(script, "make_update", make_changed)


@pytest.mark.parametrize("name, signum, code, nth", [
    ("edp_iql", signal.SIGINT, 130, 2), ("edp_iql", signal.SIGTERM, 143, 2), ("edp_iql", signal.SIGHUP, 129, 2),
    ("edp_crr", signal.SIGTERM, 143, 2), ("edp_td3", signal.SIGINT, 130, 2),
    ("edis_sac", signal.SIGTERM, 143, 2), ("edis_sac", signal.SIGTERM, 143, 5), ("edis_sac", signal.SIGTERM, 143, 8),
])  # fmt: skip
def test_signals(run, tmp_path, monkeypatch, name, signum, code, nth):
    """A signal saves and exits; the run goes on as if there had been none."""
    script = importlib.import_module(name)
    whole, before = run(script), signal.getsignal(signum)
    with monkeypatch.context() as patch:
        at_update(patch, script, nth, lambda metrics: os.kill(os.getpid(), signum) or metrics)
        with pytest.raises(SystemExit) as caught:
            run(script)
    folder = newest(tmp_path)
    assert caught.value.code == code and step_of(script, folder) == nth
    assert signal.getsignal(signum) is before
    same_run(script, whole, resume(script, folder), logs=False)


@pytest.mark.parametrize("where, saved", [("say", 3), ("evaluate", 4)])
def test_a_signal_elsewhere(run, tmp_path, monkeypatch, where, saved):
    """While a row is logged, after the decision not to save: the next update is saved. An evaluation is made again."""
    whole, original = run(edp_iql), getattr(edp_iql, where)

    def stopping(*args):
        if where == "evaluate" or str(args[0]).startswith("update 2/"):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(edp_iql, where, stopping)
        with pytest.raises(SystemExit):
            run(edp_iql)
    assert step_of(edp_iql, newest(tmp_path)) == saved
    same_run(edp_iql, whole, resume(edp_iql, newest(tmp_path)))


def test_divergence(run, tmp_path, monkeypatch, capsys, script):
    """Exit code 3, the checkpoint before is kept."""
    at_update(monkeypatch, script, 4, lambda metrics: {key: value * math.nan for key, value in metrics.items()})
    assert "diverged at update 4" in error_of(capsys, lambda: run(script), code=3)
    assert step_of(script, newest(tmp_path)) == 3 and not (newest(tmp_path) / "result.json").exists()


def test_full_disk(run, tmp_path, monkeypatch, capsys):
    """One line, exit code 1, the old checkpoint whole."""
    with monkeypatch.context() as patch:
        dies_in(patch, torch, "save", 2, OSError(28, "No space left on device"))
        assert "No space left" in error_of(capsys, lambda: run(edp_iql, as_main=True), code=1)
    assert step_of(edp_iql, newest(tmp_path)) == 3
    assert resume(edp_iql, newest(tmp_path))["updates"] == 6


BAD = {
    "--save-every": 0, "--batch-size": -1, "--lr": "nan", "--gamma": 1.5, "--expectile": -0.1, "--weight-cap": 0,
    "--diffusion-steps": 20, "--sampler-steps": 0, "--device": "cuda:77", "--seed": -1, "--eval-episodes": -1,
    "--temperature": 0, "--advantage-samples": 0, "--eta": "inf",
}  # fmt: skip


@pytest.mark.parametrize("flag", BAD)
def test_bad_arguments(run, capsys, flag):
    """One line that names the argument, exit code 2, in each script that has it."""
    scripts = map(importlib.import_module, BRANCHES)
    having = [script for script in scripts if hasattr(script.Args(), flag[2:].replace("-", "_"))]
    assert having and all(flag in error_of(capsys, lambda s=s: run(s, flag, BAD[flag])) for s in having)


@pytest.mark.parametrize("code, flags", [
    (2, "--nonsense"), (2, "--seed x"), (2, "--compile perhaps"), (2, "--dataset-path nowhere.hdf5"),
    (1, "--runs-dir /dev/null/x"),
])  # fmt: skip
def test_exit_codes_of_the_command_line(run, code, flags):
    """0: test_a_copied_script_runs_alone."""
    with pytest.raises(SystemExit) as caught:
        run(edp_iql, *flags.split(), as_main=True)
    assert caught.value.code == code


def test_presets():
    def parse(name, env_id, *flags):
        return importlib.import_module(name).parse_args(["--env-id", env_id, *flags])

    assert parse("edp_iql", "hopper-medium-replay-v2").max_grad_norm == 4
    assert parse("edp_iql", "hopper-medium-replay-v2", "--max-grad-norm", "5").max_grad_norm == 5
    assert parse("edp_iql", "ant-medium-v2").max_grad_norm == 5  # default: not in the official table
    for env_id in ("antmaze-large-diverse-v0", "antmaze-large-diverse-v2", "D4RL/antmaze/large-diverse-v1"):
        args = parse("edp_iql", env_id)
        assert (args.max_grad_norm, args.expectile, args.reward_transform) == (7, 0.9, "minus-one")
        assert args.num_updates == 1_000_000
        assert parse("edp_td3", env_id).reward_transform == "times-four"
    assert parse("edp_crr", "D4RL/pen/human-v2").reward_transform == "min-max"
    for name in BRANCHES:
        assert importlib.import_module(name).parse_args([]).num_updates < 100_000
    args = parse("edp_td3", "hopper-medium-expert-mini", "--no-action-approximation", "--eta", "2")  # Diffusion-QL
    assert (args.sampler, args.beta_schedule, args.diffusion_steps, args.eta, args.tau) == ("ddpm", "vp", 5, 2, 0.005)


def test_help(script, capsys):
    """Each argument with its help; the preset of the id is shown."""
    with pytest.raises(SystemExit) as caught:
        script.parse_args(["--env-id", "hopper-medium-mini", "--help"])
    text = capsys.readouterr().out
    assert caught.value.code in (0, None) and "hopper-medium-mini" in text and "0.995" in text
    for name in vars(script.Args()):
        entry = re.search(rf"(?ms)^\W*--{name.replace('_', '-')}\b(.*?)\(default", text)[1]
        assert len(re.sub(r"[│\s]+", " ", entry).split()) >= 3, name


# --------------------------------------------------------------------------------------------------------------- logs
def wandb_records(path):
    """Records of an offline run, a LevelDB log: blocks of 32 KiB, fragments of [checksum, length, type, data]."""
    content, record, i = path.read_bytes(), b"", 7
    while i + 7 < len(content):
        if 32_768 - i % 32_768 < 7:  # the rest of a block is padding
            i += 32_768 - i % 32_768
            continue
        length, kind = int.from_bytes(content[i + 4 : i + 6], "little"), content[i + 6]
        record += content[i + 7 : i + 7 + length]
        i += 7 + length
        if kind in (1, 4):  # whole, or the last of several
            yield record
            record = b""


def test_wandb_offline(run, tmp_path, monkeypatch):
    """Points of its history are the rows of metrics.jsonl."""
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    rows, points = rows_of(run(edp_iql, "--track")["run_dir"]), []
    (path,) = tmp_path.rglob("*.wandb")
    deadline, records = time.time() + 30, []
    while "exit" not in (kind.WhichOneof("record_type") for kind in records) and time.time() < deadline:
        time.sleep(0.1)  # a process of wandb's writes the file
        records = list(map(Record.FromString, wandb_records(path)))
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            points.append({key: value for key, value in items.items() if not key.startswith("_")})
    assert len(points) == len(rows) > 4
    for point, row in zip(points, rows, strict=True):
        numbers = {key: value for key, value in row.items() if isinstance(value, float)}
        assert point == pytest.approx(numbers | {"global_step": row["step"]})


def test_logging_that_fails_does_not_end_the_run(run, monkeypatch, capsys):
    """But at its start: without a key for wandb it ends with one line."""
    from torch.utils.tensorboard import SummaryWriter

    expected = rows_of(run(edp_iql)["run_dir"])
    monkeypatch.setattr(SummaryWriter, "add_scalar", lambda *_: 1 / 0)
    rows = rows_of(run(edp_iql)["run_dir"])
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    assert "warning: update 2" in capsys.readouterr().err
    import wandb

    monkeypatch.setattr(wandb, "init", lambda **_: 1 / 0)
    assert "WANDB_MODE=offline" in error_of(capsys, lambda: run(edp_iql, "--track"))


# ----------------------------------------------------------------------------------------------- processes of their own
@pytest.fixture
def start(tmp_path, hopper_file):
    """Start edp_iql in an empty folder with nothing of the repository beside it."""
    processes, folder = [], tmp_path / "alone"

    def call(*flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE):
        folder.mkdir()
        shutil.copy(edp_iql.__file__, folder / "mine.py")
        shutil.copy(hopper_file, folder / "hopper_medium-v2.hdf5")
        command = [sys.executable, "mine.py", *argv_of(edp_iql, "--env-id", "hopper-medium-v2", *flags)]
        env = {**os.environ, "D4RL_DATASET_DIR": str(folder), "PYTHONPATH": ""}
        processes.append(subprocess.Popen(command, cwd=folder, env=env, text=True, stdout=stdout, stderr=stderr))
        return processes[0], folder / "runs"

    yield call
    processes[0].kill()
    processes[0].communicate()


def test_a_copied_script_runs_alone(start):
    process, runs = start()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in err, err
    assert "update 6/6" in out
    (made,) = runs.iterdir()
    assert made.name.startswith("hopper-medium-v2__mine__0__") and (made / "result.json").exists()
    assert json.loads((made / "args.json").read_text())["commit"] == ""  # of no repository


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "closed"])
def test_output_that_goes_nowhere(start, kind):
    """A full disk under stdout, or a reader that went away (`| head`), does not end the run."""
    reader, writer = os.pipe()
    if kind == "full":
        os.close(writer)
        writer = os.open("/dev/full", os.O_WRONLY)
    process, runs = start(stdout=writer, stderr=writer)
    os.close(writer)
    os.close(reader)
    assert process.wait(timeout=120) == 0 and list(runs.glob("*/result.json"))


@pytest.mark.slow
def test_a_signal_to_a_process(start):
    """As a cluster sends it: saved, exit code 143; a second one does not wait."""
    process, runs = start("--num-updates", 90_000, "--compile", "off", "--eval-every", 80_000)
    for line in process.stdout:  # first progress
        if line.startswith("update"):
            break
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    (made,) = runs.iterdir()
    assert process.returncode == 143 and "--resume" in err and "Traceback" not in err
    assert step_of(edp_iql, made) > 0

"""The benchmark's launcher and report, in a copy of the repository."""

import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, make_columns, write_hdf5
from matplotlib.pyplot import imread

import edis_sac
import edp_iql
import edp_td3


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(ROOT / "benchmark_results", tmp_path / "benchmark_results")
    shutil.copytree(ROOT / "datasets", tmp_path / "datasets")
    for name in ("edp_iql.py", "edis_sac.py", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def call(folder, *command):
    command = [sys.executable, *command]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def test_launch(copy):
    """Runs what is missing, once; a run that diverged is kept, told, and does not pass for a result."""
    raw = copy / "benchmark_results" / "raw"
    shutil.rmtree(raw)
    flags = "edp_iql --seeds 1 --updates 2 --compile off --jobs replay-mini__bc__"
    command = ["benchmark_results/launch.py", *flags.split()]
    first = call(copy, *command)
    assert first.returncode == 0 and "__bc__0: return" in first.stdout, first
    kept = json.loads((raw / "hopper-medium-replay-mini__bc__0" / "args.json").read_text())
    assert kept["args"]["inverse_temperature"]["value"] == 0 and kept["args"]["compile"]["value"] == "off"
    assert str(copy) not in (raw / "hopper-medium-replay-mini__bc__0" / "args.json").read_text()
    assert "done before" in call(copy, *command).stdout
    trial = call(copy, *command, "--runs-dir", "trial", "--raw-dir", "trial/raw", "--updates", "3")
    assert trial.returncode == 0, trial
    assert json.loads((raw / "hopper-medium-replay-mini__bc__0" / "result.json").read_text())["updates"] == 2
    result = (copy / "trial" / "raw" / "hopper-medium-replay-mini__bc__0" / "result.json").read_text()
    assert json.loads(result)["updates"] == 3 and json.loads(result)["run_dir"].startswith("runs/benchmark/hopper-")
    report = call(copy, "benchmark_results/report.py")
    assert "mini: 2 updates" in report.stdout and "| behaviour cloning `bc` | 1 |" in report.stdout, report

    script = Path(copy / "edp_iql.py")
    script.write_text(script.read_text().replace('"lr": 1e-3', '"lr": 1e30'))
    command[-1] = "replay-mini__edp_iql__"
    diverged = call(copy, *command)
    assert diverged.returncode == 1 and "__edp_iql__0: FAILED: diverged" in diverged.stdout, diverged
    assert (raw / "hopper-medium-replay-mini__edp_iql__0" / "diagnostics.json").exists()
    assert "| EDP-IQL `edp_iql` | 0, 1 diverged |" in call(copy, "benchmark_results/report.py").stdout
    script.write_text(script.read_text().replace("    main(parse_args())", "    raise SystemExit(7)"))
    failed = call(copy, *command)
    assert failed.returncode == 1 and "FAILED with exit code 7" in failed.stdout, failed
    assert call(copy, *command[:-1], "no-such-job").returncode == 2


def test_launch_begins_anew_where_arguments_changed(copy):
    """A preset or data that changed are not mixed with a run from before."""
    raw, script = copy / "benchmark_results" / "raw", copy / "edp_iql.py"
    shutil.rmtree(raw)
    flags = "edp_iql --seeds 1 --updates 2 --compile off --jobs replay-mini__bc__"
    rates = []
    for rate in ("1e-3", "2e-3"):
        script.write_text(script.read_text().replace('"lr": 1e-3', f'"lr": {rate}'))
        done = call(copy, "benchmark_results/launch.py", *flags.split())
        assert done.returncode == 0 and "__bc__0: return" in done.stdout, done
        about = json.loads((raw / "hopper-medium-replay-mini__bc__0" / "args.json").read_text())
        rates.append(about["args"]["lr"]["value"])
        assert not about["resumed_from"]
    assert rates == [0.001, 0.002] and "of other arguments" in done.stderr
    file = raw / "hopper-medium-replay-mini__bc__0" / "args.json"
    for name, outcome in (("solver_order", "done before"), ("lr", "return")):  # the run is from before this argument
        about["args"].pop(name)  # solver_order: the default; lr: the preset
        file.write_text(json.dumps(about))
        done = call(copy, "benchmark_results/launch.py", *flags.split())
        assert done.returncode == 0 and f"__bc__0: {outcome}" in done.stdout, (name, done)
    about = json.loads(file.read_text())
    about["args"]["eval_candidates"]["value"] = 10  # a resume may change it, but this row's runs have one
    file.write_text(json.dumps(about))
    done = call(copy, "benchmark_results/launch.py", *flags.split())
    assert done.returncode == 0 and "__bc__0: return" in done.stdout, done
    with h5py.File(copy / "datasets" / "hopper-medium-replay-mini.hdf5", "a") as data:
        data["rewards"][0] += 1
    done = call(copy, "benchmark_results/launch.py", *flags.split())
    assert done.returncode == 0 and "__bc__0: return" in done.stdout and "or data, left alone" in done.stderr, done


@pytest.mark.parametrize("awaited, send", [("metrics.jsonl", os.kill), ("metrics.jsonl", os.killpg), (None, os.kill)])
def test_a_launcher_that_is_ended_lets_its_runs_save(copy, awaited, send):
    """Alone or with all that it started, also before a run listens; the third run does not begin."""
    work, script = copy / "runs" / "benchmark", copy / "edp_iql.py"
    script.write_text(script.read_text().replace('"log_every": 250', '"log_every": 5'))
    flags = "edp_iql --seeds 3 --updates 100000 --compile off --jobs replay-mini__edp_iql__ --workers 2"
    shutil.rmtree(copy / "benchmark_results" / "raw")
    command = [sys.executable, "benchmark_results/launch.py", *flags.split()]
    launcher = subprocess.Popen(command, cwd=copy, start_new_session=True, stdout=subprocess.PIPE, text=True)
    try:
        while len(list(work.glob(f"*/*/{awaited}" if awaited else "*/log.txt"))) < 2 and launcher.poll() is None:
            time.sleep(0.1)
        send(launcher.pid, signal.SIGTERM)
        told, _ = launcher.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):  # there is nobody left
            os.killpg(launcher.pid, signal.SIGKILL)
            raise AssertionError("runs outlived their launcher")
    assert launcher.returncode == 1 and told.count("interrupted; launch again") == 3, told
    saved = 2 if awaited else 0
    assert len(list(work.glob("*/*/checkpoint.pt"))) == saved and len(list(work.glob("*/log.txt"))) == 2


def test_an_agent_that_diverges_online_has_no_result(copy):
    """Its pre-trained agent's own does not pass for one."""
    raw, script = copy / "benchmark_results" / "raw", copy / "edis_sac.py"
    shutil.rmtree(raw)
    text, n = re.subn(r'("offline_updates": )[0-9_]+,', r"\g<1>2,", script.read_text())
    text, m = re.subn(r'("cql_alpha_online": )[0-9.]+,', r"\g<1>1e38,", text)
    assert n == m == 1
    script.write_text(text)
    flags = "edis_sac --seeds 1 --online-steps 300 --compile off --jobs medium-mini__none__0"
    diverged = call(copy, "benchmark_results/launch.py", *flags.split())
    assert diverged.returncode == 1 and "FAILED: diverged" in diverged.stdout, diverged
    assert sorted(path.name for path in (raw / "hopper-medium-mini__none__0").iterdir()) == [
        "args.json", "diagnostics.json", "evaluations.csv", "metrics.jsonl",
    ]  # fmt: skip
    assert "| online data only `none` | 0, 1 diverged |" in call(copy, "benchmark_results/report.py").stdout


CLUSTER = {
    "sbatch": """for script; do :; done
cp "$script" "$0.script"
SLURM_JOB_ID=7 setsid sh "$0.script" > /dev/null 2>&1 &
echo $! > "$0.pid"
echo "Submitted batch job 7\"""",
    "srun": """while [ "${1#--}" != "$1" ]; do  # submitit gives a value to --output and --error
    case $1 in --output|--error) shift;; esac; shift
done
exec env SLURM_LOCALID=0 SLURM_PROCID=0 SLURM_NODEID=0 SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 "$@\"""",
    "sacct": """grep -q '^State:.[^Z]' "/proc/$(cat "$(dirname "$0")/sbatch.pid")/status" && state=RUNNING
printf 'JobID|State|NodeList\\n7|%s|node\\n' ${state-COMPLETED}""",
    "scancel": """kill -TERM -$(cat "$(dirname "$0")/sbatch.pid")""",
}


@pytest.fixture
def cluster(copy, monkeypatch):
    """Stand-ins for SLURM's commands, in this folder."""
    commands = copy / "bin"
    commands.mkdir()
    for name, text in CLUSTER.items():
        (commands / name).write_text(f"#!/bin/sh\n{text}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    return commands


def test_launch_on_a_cluster(copy, cluster):
    """A job asks for what was asked for, and its run comes back."""
    raw = copy / "benchmark_results" / "raw"
    shutil.rmtree(raw)
    flags = "edp_iql --seeds 1 --updates 2 --compile off --jobs replay-mini__bc__"
    flags += " --executor slurm --slurm-partition long --slurm-hours 3 --gpus 1"
    done = call(copy, "benchmark_results/launch.py", *flags.split())
    assert done.returncode == 0 and "__bc__0: return" in done.stdout, done
    assert json.loads((raw / "hopper-medium-replay-mini__bc__0" / "result.json").read_text())["updates"] == 2
    asked = (cluster / "sbatch.script").read_text()
    for line in ("--partition=long", "--time=180", "--gpus-per-node=1"):
        assert f"#SBATCH {line}\n" in asked, asked


def test_interrupted_on_a_cluster(copy, cluster):
    """Ctrl-C cancels the jobs; their runs save."""
    work = copy / "runs" / "benchmark"
    shutil.rmtree(copy / "benchmark_results" / "raw")
    (cluster / "sacct").write_text((cluster / "sacct").read_text().replace("COMPLETED", "RUNNING"))
    flags = "edp_iql --seeds 1 --compile off --jobs replay-mini__edp_iql__ --executor slurm"
    command = [sys.executable, "benchmark_results/launch.py", *flags.split()]
    launcher = subprocess.Popen(command, cwd=copy, start_new_session=True, stdout=subprocess.PIPE, text=True)
    while not list(work.glob("*/*/metrics.jsonl")) and launcher.poll() is None:
        time.sleep(0.1)
    launcher.send_signal(signal.SIGINT)
    try:
        told, _ = launcher.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(launcher.pid, signal.SIGKILL)
        os.killpg(int((cluster / "sbatch.pid").read_text()), signal.SIGKILL)
        raise
    assert launcher.returncode == 1 and "interrupted; launch again" in told, told
    assert list(work.glob("*/*/checkpoint.pt"))


def test_flags_of_the_variants():
    """The scripts take them all."""
    sys.path.insert(0, str(ROOT / "benchmark_results"))
    import launch

    for name, variants in launch.VARIANTS.items():
        script = importlib.import_module(name)
        for variant, flags in variants.items():
            args = script.parse_args(["--env-id", launch.SETS[name][0], "--exp-name", variant, *flags])
            script.check_args(args)
            assert args.exp_name == variant


def test_jobs():
    """A variant whose values the preset has is another's run again; the exact energies' is not EDIS's."""
    sys.path.insert(0, str(ROOT / "benchmark_results"))
    import launch

    args = launch.Args(script="edp_td3", env_ids=["hopper-medium-mini", "hopper-medium-v2"], seeds=1, updates=40)
    both = {name.split("__")[0] for name in launch.make_jobs(args, edp_td3) if "__diffusion_ql_tau__" in name}
    assert both == {"hopper-medium-mini"}  # its preset's target rate is another
    args = launch.Args(script="edp_iql", env_ids=["mujoco/hopper/medium-v0"], seeds=1)
    assert "mujoco_hopper_medium-v0__iql__0" in launch.make_jobs(args, edp_iql)  # a folder's name
    args = launch.Args(script="edp_iql", seeds=2, updates=40)
    jobs = launch.make_jobs(args, edp_iql)
    assert len(jobs) == 2 * 3 * len(launch.VARIANTS["edp_iql"])
    assert {edp_iql.parse_args(flags).num_updates for flags in jobs.values()} == {40}
    args = launch.Args(script="edis_sac", seeds=1)
    assert len(launch.make_jobs(args, edis_sac)) == 2 * len(launch.VARIANTS["edis_sac"])


def test_report_is_up_to_date(copy):
    """Another run of it changes no word of the README."""
    before = (copy / "README.md").read_text()
    report = call(copy, "benchmark_results/report.py")
    assert report.returncode == 0, report
    assert (copy / "README.md").read_text() == before
    figures = re.findall(r"\]\((benchmark_results/\S+\.png)\)", before)
    assert len(figures) == 5
    for figure in figures:
        np.testing.assert_allclose(imread(copy / figure), imread(ROOT / figure), atol=0.1)


def test_speed_tables_are_those_of_the_measurement():
    sys.path.insert(0, str(ROOT / "benchmark_results"))
    import speed

    for device, path in speed.FILES.items():
        written = (ROOT / "README.md").read_text().split(speed.MARK.format(device))[1].split("<!-- end -->")[0]
        assert speed.tables(json.loads(path.read_text())) == written


def test_speed_measures_a_part(copy):
    """It takes the place of its rows in the file, where these are of the same settings, and in the README."""
    path = copy / "benchmark_results" / "speed.json"
    settings = {"commit": None, "matmul_precision": "highest"}
    flags = ("benchmark_results/speed.py", "--seconds", "0.02", "--only")
    for only, told in (("nothing", "nothing is named so"), ("one environment", "are of another commit")):
        done = call(copy, *flags, only)
        assert done.returncode == 2 and told in done.stderr.splitlines()[-1], done
    found = json.loads(path.read_text())
    kept = dict(found["results"])
    about = edp_iql.describe(edp_iql.Args(), {}, torch.device("cpu"), {})
    found |= settings | {name: about[name] for name in ("torch", "device")} | {"cores": os.cpu_count()}
    path.write_text(json.dumps(found))
    done = call(copy, *flags, "one environment")
    assert done.returncode == 0, done
    results = json.loads(path.read_text())["results"]
    assert {name for name in kept if kept[name] != results[name]} == {"one environment"}
    assert f"| one environment | {results['one environment']['ms']:.1f} |" in (copy / "README.md").read_text()


@pytest.mark.parametrize("case", ["EDP-TD3, DDPM, K = 100", "EDIS, SAC's update", "one environment"])
def test_speed_measures(case):
    done = call(ROOT, "benchmark_results/speed.py", "--case", case, "--seconds", "0.05")
    assert done.returncode == 0 and all(value > 0 for value in json.loads(done.stdout.splitlines()[-1]).values()), done


def test_candidates(tmp_path, monkeypatch):
    """Two candidates in one state by hand, and an episode; then those of two runs, which must be the ones in raw."""
    sys.path.insert(0, str(ROOT / "benchmark_results"))
    import candidates

    q = torch.tensor([[0.0, np.log(3.0)]])  # selected with chances 1/4 and 3/4
    found = candidates.measure(torch.tensor([[[0.0], [1.0]]]), q, torch.zeros(1, 1), torch.tensor([1.0]))
    expected = (0.5**0.5, 0.5, 1.0, np.log(3) / 2 - 1, 0.75 * np.log(3) - 1)
    assert list(found.values()) == pytest.approx(expected, abs=1e-4)

    assert candidates.returns_to_go([1.0, 2.0, 4.0], 0.5, terminated=True) == [3.0, 4.0, 4.0]
    assert candidates.returns_to_go([1.0, 2.0, 4.0], 1 / 16, terminated=False) == [1 + 2 / 16 + 4 / 256, 2.25]

    class Walk(gym.Env):
        """From 0 by the action, and rewarded for where it is; falls beyond 3, cut short after six steps."""

        def reset(self, seed=None, options=None):
            self.x, self.steps = np.zeros(1), 0
            return self.x, {}

        def step(self, action):
            self.x, self.steps = self.x + action, self.steps + 1
            return self.x, float(self.x[0]), bool(self.x[0] > 3), self.steps == 6, {}

    steps = iter([[1.0, 0.5], [2.5, 0.5], [0.5], [0.5], [0.5], [0.5]])  # the first falls in its second step
    played = candidates.play(
        lambda s: torch.tensor(next(steps))[:, None],
        type("Critic", (), {"min": lambda self, s, a: (10 * s + a)[:, 0]})(),
        [candidates.Recorded(Walk()) for _ in range(2)],
        edp_iql.Transform(reward_scale=2.0),
        1 / 16,
    )
    # Q: 1, 12.5; 0.5, 5.5, 10.5, ... of which five have two steps or more to come
    second = [2 * sum(16.0 ** (i - j) * 0.5 * (j + 1) for j in range(i, 6)) for i in range(5)]
    expected = np.mean([1, 12.5, 0.5, 5.5, 10.5, 15.5, 20.5]), np.mean([2 + 7 / 16, 7, *second]), (4.5 + 10.5) / 2
    assert list(played.values()) == pytest.approx(expected, abs=1e-3)

    raws, weights = {}, {}
    for variant, script in (("bc_q", edp_iql), ("edp_td3", edp_td3)):
        name = f"hopper-medium-replay-mini__{variant}__0"
        flags = f"--num-updates 2 --compile off --runs-dir {tmp_path}/runs/{name}"
        run = script.main(script.parse_args(flags.split()))["run_dir"]
        raws[variant] = shutil.copytree(run, tmp_path / "raw" / name)
        weights[variant] = script.load_checkpoint(run)["critic"]["q1.layers.0.weight"]
    plays, play = [], candidates.play

    def recorded(select, critic, *rest):
        assert select.args[2] is critic
        chosen = [name for name, weight in weights.items() if torch.equal(critic.q1.layers[0].weight, weight)]
        plays.append((select.keywords["candidates"], *chosen))
        return play(select, critic, *rest)

    monkeypatch.setattr(candidates, "HERE", tmp_path)
    monkeypatch.setattr(candidates, "play", recorded)
    args = candidates.Args(runs_dir=tmp_path / "runs", states=3, episodes=2)
    candidates.main(args)
    values = list(json.loads((tmp_path / "candidates.json").read_text())["runs"].values())
    assert plays == [(10, "bc_q"), (1, "bc_q"), (10, "edp_td3"), (10, "edp_td3"), (1, "edp_td3"), (10, "bc_q")]
    assert all(v.keys() == {"effective", *found, *played, "alone", "by_bc_q", "by_edp_td3"} for v in values)
    assert all(map(np.isfinite, [x for v in values for x in v.values()]))
    assert values[0]["effective"] < values[1]["effective"] == 1
    assert values[0]["by_bc_q"] == values[0]["return"] and values[1]["by_edp_td3"] == values[1]["return"]
    assert candidates.effective(torch.tensor([1.0, 1.0, 1.0, 3.0])) == 0.75  # 6^2 / 12 of 4

    result = raws["bc_q"] / "result.json"
    result.write_text(result.read_text().replace('"updates": 2', '"updates": 3'))  # the checkpoint is of another run
    candidates.main(args)
    left = json.loads((tmp_path / "candidates.json").read_text())["runs"]
    assert left == {"hopper-medium-replay-mini__edp_td3__0": values[1]}  # with what cloning's critics selected before
    assert len(plays) == 8
    shutil.rmtree(raws["edp_td3"])
    with pytest.raises(SystemExit):
        candidates.main(args)


@pytest.mark.parametrize("damage", ["unknown", "unfinished", "shorter", "other data", "README"])
def test_report_names_a_bad_folder(copy, damage):
    """Or the marker that the README lacks, and leaves the README as it was."""
    name = "hopper-medium-replay-mini__bc__0"
    folder = copy / "benchmark_results" / "raw" / name
    if damage == "unknown":
        name = folder.rename(folder.with_name(name.replace("bc", "abc"))).name
    elif damage == "unfinished":
        (folder / "result.json").unlink()
    elif damage == "other data":
        text, n = re.subn(r'("sha256": )"\w+"', r'\g<1>"0"', (folder / "args.json").read_text())
        assert n == 1
        (folder / "args.json").write_text(text)
    elif damage == "README":
        name = "report.py: EDP, seeds"
        (copy / "README.md").write_text((copy / "README.md").read_text().replace(name, "report.py: EDP, every seed"))
    else:
        rows = (folder / "evaluations.csv").read_text().splitlines(keepends=True)
        (folder / "evaluations.csv").write_text("".join(rows[:-10]))
        name = name[:-3]
    before = (copy / "README.md").read_text()
    failed = call(copy, "benchmark_results/report.py")
    assert failed.returncode == 2 and name in failed.stderr and failed.stderr.count("\n") == 1, failed
    assert (copy / "README.md").read_text() == before


@pytest.mark.parametrize("name, flags", [("iql", ["--inverse-temperature", "0"]), ("td3_bc", ["--eta", "0"])])
def test_baselines(name, flags, tmp_path):
    """Without Q they clone: the policy comes near actions that depend on the state alone."""
    columns = make_columns()
    columns["actions"] = 0.8 * np.tanh(columns["observations"][:, :3])
    data = ["--env-id", "own", "--dataset-path", write_hdf5(tmp_path / "own.hdf5", columns)]
    flags = [*flags, *data, "--runs-dir", str(tmp_path / "runs"), "--num-updates", "300", "--log-every", "10"]
    done = call(ROOT, f"benchmark_results/baselines/{name}.py", *flags, "--batch-size", "64", "--lr", "1e-3")
    assert done.returncode == 0, done
    (folder,) = (tmp_path / "runs").iterdir()
    assert f"own__{name}__0__" in folder.name
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["losses/diffusion_loss"] < 0.1 * rows[0]["losses/diffusion_loss"]


@pytest.mark.parametrize("name", ["iql", "td3_bc"])
def test_baselines_prefer_what_is_rewarded(name, tmp_path):
    """Actions are uniform, reward and episode's end after one step: both move towards larger ones."""
    columns = make_columns(rows=2_000)
    rng = np.random.default_rng(0)
    columns["actions"] = rng.uniform(-0.9, 0.9, (2_000, 3)).astype(np.float32)
    columns["rewards"], columns["terminals"][:] = columns["actions"][:, 0], True
    data = ["--env-id", "own", "--dataset-path", write_hdf5(tmp_path / "own.hdf5", columns)]
    flags = [*data, "--runs-dir", str(tmp_path / "runs"), "--num-updates", "600", "--lr", "1e-3", "--batch-size", "64"]
    done = call(ROOT, f"benchmark_results/baselines/{name}.py", *flags)
    assert done.returncode == 0, done
    (folder,) = (tmp_path / "runs").iterdir()
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    network = edp_iql.MLP(11, 3)
    network.load_state_dict(saved["policy"])
    with torch.no_grad():
        mean = network(torch.as_tensor(columns["observations"])).tanh().mean(0)
    assert mean[0] > 0.3 and mean[1:].abs().max() < 0.2, mean


def test_edis_tables():
    """A seed is compared with itself, where both finished; an episode belongs to the third that it ends in."""
    from benchmark_results.report import Job, distance_table, paired_table, training_table

    def job(value, *episodes):
        metrics = [{"step": step, "charts/online_return": r} for step, r in episodes]
        return Job([-100, 0, *range(30, 331, 30)], [9.0] * 2 + [value] * 11, [], {"updates": 430}, metrics)

    edis = {"0": job(10.0, (101, 1.0), (210, 3.0), (211, 5.0), (430, 7.0))}
    edis["1"] = job(20.0, (150, 3.0), (300, 7.0), (400, 10.0))
    none = {"0": job(4.0), "1": None, "2": job(90.0)}
    lines = paired_table({"mini": {"edis": edis, "none": none, "offline": {"1": job(30.0)}}})
    assert lines[0] == "**mini**" and lines[4] == "| online data only | 1 | +6 | +6 |"
    assert lines[5] == "| real offline data instead | 1 | -10 | -10 |"
    assert training_table({"mini": {"edis": edis}})[4] == "| EDIS | 2 | 15 ± 7 | 2 ± 1 | 6 ± 1 | 8 ± 2 |"

    rounds = [
        {
            f"{kind}/{name}": value + i + j
            for i, name in enumerate(("state", "policy", "dynamics", "dynamics_rms"))
            for kind, value in (("guided", 20), ("unguided", unguided), ("recent", 0), ("transition_off", 50))
        }
        for j, unguided in enumerate((30, 10))
    ]
    lines = distance_table({"mini": {"edis": {"0": edis["0"]._replace(metrics=[{"step": 1}, *rounds])}}})
    assert lines[4:6] == [
        "| EDIS | states to the recent ones | 20.5000 | 20.5000 (1 of 2) | - | 0.5000 |",
        "| EDIS | actions to the policy's | 21.5000 | 21.5000 (1 of 2) | - | 1.5000 |",
    ]
    assert lines[6] == "| EDIS | dynamics error, mean | 22.5000 | 22.5000 (1 of 2) | 52.5000 (2 of 2) | 2.5000 |"


def test_results_table():
    """Rows of a data set that are shorter than its others say so; what diverged is counted."""
    from benchmark_results.report import Job, results_table, summary_table

    def job(value, end):
        return Job([0, end // 2, end], [9.0, value, 2 * value], [value, 3 * value], {}, [])

    variants = {"edp_iql": {"0": job(1.0, 80), "1": None}, "bc": {"0": job(2.0, 40), "1": job(4.0, 40)}}
    lines = results_table({"mini": {**variants, "iql": {"0": None}}}, {"mini": {"return_mean": 6.4}}, "updates")
    assert lines[0] == "**mini: 80 updates; mean return of the data 6**"
    assert lines[4:7] == [
        "| EDP-IQL `edp_iql` | 1, 1 diverged | 2 | 2 | 2 | 2 |",
        "| behaviour cloning `bc`, 40 updates | 2 | 6 ± 3 | 4 ± 2 | 6 ± 3 | 5 [2, 12] |",
        "| IQL, feed-forward `iql` | 0, 1 diverged | - | - | - | - |",
    ]

    mini, other = {**variants, "iql": {"0": None}}, {"bc": dict.fromkeys("012", job(1.0, 20))}
    statistics = {"hopper-medium-mini": {"return_mean": 0.5}, "b-mini": {"return_mean": 3.0}}
    assert summary_table({"hopper-medium-mini": mini, "b-mini": other}, statistics) == [
        "| | hopper medium | b |",
        "|---|---|---|",
        "| EDP-IQL | 3.0 (1 of 2) | - |",
        "| behaviour cloning | 9.0 (2) | 0.5 |",
        "| IQL, feed-forward | diverged | - |",
        "",
    ]


def test_d4rl_table():
    """Of our runs: the mean, seeds and how many of them diverged, updates; nothing that is hidden."""
    from benchmark_results.report import Job, d4rl_table

    def job(score):
        return Job([1], [0.0], [0.0], {"normalized_score": {"mean_of_last_10": score}, "updates": 100}, [])

    runs = {"hopper-medium-v2": {"iql": {"0": job(1.0), "1": job(2.0)}, "edp_iql": {"0": job(3.0), "1": None}}}
    others = {"walker2d-medium-v2": {"edp_crr": {"0": None, "1": None}}, "ant-medium-v2": {"edp_crr": {"0": job(4.0)}}}
    unscored = Job([1], [0.0], [0.0], {"normalized_score": None, "return": {"mean_of_last_10": 5}, "updates": 7}, [])
    lines = d4rl_table({**runs, **others, "a_b": {"edp_crr": {"0": unscored}}})
    assert any(line.startswith("| hopper-medium-v2 |") and "| 1.5 (2, 100) |" in line for line in lines)
    assert any(line.endswith("| 3.0 (1 of 2, 100) |") for line in lines)
    assert any(line.startswith("| walker2d-medium-v2 |") and line.endswith("| all of 2 diverged |") for line in lines)
    assert {"| ant-medium-v2 | - | 4.0 (1, 100) |", "| a_b | - | return 5.0 (1, 7) |"} <= {*lines}


def test_seeds_table():
    """The last ten of eleven evaluations; the loss after half of the updates."""
    from benchmark_results.report import Job, seeds_table

    rows = [{"step": 55, "losses/diffusion_loss": 9.0}, {"step": 60, "losses/diffusion_loss": 1.0}, {"step": 70}]
    jobs = [Job(list(range(10, 111, 10)), [99.0] + [value] * 10, [], {}, [*rows, rows[1]]) for value in (3.0, 5.0)]
    variants = {name: {"0": jobs[0], "1": None, "2": jobs[1]} for name in ("bc", "iql")}
    assert seeds_table({"mini": variants})[4:6] == [
        "| behaviour cloning | 3, 5 | 1.000, 1.000 |",
        "| IQL, feed-forward | 3, 5 | - |",
    ]


def test_precision_table():
    """The same updates of both, of the seeds that both have."""
    from benchmark_results.report import Job, precision_table

    def job(value, end):
        rows = [{"step": step, "losses/value_loss": value + step} for step in range(10, end + 1, 10)]
        rows += [{"step": step, "charts/episodic_return": 100 * value} for step in (20, 40)]
        names = ("diffusion_loss", "guidance_loss", "qf1_loss", "q_mean", "q_max")
        return Job([20, end], [value] * 2, [], {}, [row | {f"losses/{name}": 0.0 for name in names} for row in rows])

    runs = {"mini": {"edp_iql": {"0": job(1, 80), "1": job(3, 80), "2": job(9, 80)}}}
    assert not precision_table(runs)
    runs["mini"]["bf16"] = {"0": job(2, 40), "1": job(4, 40), "2": None}
    lines = precision_table(runs)
    assert lines[0] == "**mini, 2 seeds**" and lines[4] == "| 0 to 20 | return | 200 ± 141 | 300 ± 141 |"
    assert lines[7] == "| 0 to 20 | `losses/value_loss` | 17.000 ± 1.414 | 18.000 ± 1.414 |"
    assert lines[14] == "| 20 to 40 | `losses/value_loss` | 37.000 ± 1.414 | 38.000 ± 1.414 |"
    assert len(lines) == 19


@pytest.mark.parametrize("without", ["", "--no-state-energy", "--no-state-energy --no-policy-energy"])
def test_exact(tmp_path, without):
    """What the energies aim at, by the diagnostics: next states to the bit, the rest but for chance.

    Without its energy, states or actions are far from that.
    """
    flags = "--offline-updates 2 --online-steps 300 --first-round 260 --batch-size 16 --model-updates 2 --samples 1000"
    flags += f" --eval-episodes 1 --log-every 50 --runs-dir {tmp_path}"
    done = call(ROOT, "benchmark_results/baselines/exact.py", *flags.split(), *without.split())
    assert done.returncode == 0, done
    (metrics,) = tmp_path.glob("*/metrics.jsonl")
    (found,) = (row for row in map(json.loads, metrics.read_text().splitlines()) if "exact/state" in row)
    assert found["exact/dynamics_rms"] < 1e-5
    for name, close, far in (("policy", 0.005, 0.01), ("state", 0.02, 0.05)):
        distance = found[f"exact/{name}"]
        assert distance > far if f"--no-{name}-energy" in without else abs(distance) < close, (name, distance)


def test_exact_without_a_simulator(tmp_path):
    """Told before the first update, not after the offline phase."""
    path = write_hdf5(tmp_path / "car.hdf5", make_columns(obs_dim=2, act_dim=1))
    flags = f"--env-id MountainCarContinuous-v0 --dataset-path {path} --runs-dir {tmp_path} --offline-updates 100000000"
    done = call(ROOT, "benchmark_results/baselines/exact.py", *flags.split())
    assert done.returncode == 2 and "MountainCarContinuous-v0: only for a simulator" in done.stderr, done
    assert len(done.stderr.splitlines()) == 1

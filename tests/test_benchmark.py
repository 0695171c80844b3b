"""The benchmark's report and launcher, in a copy of the repository."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.fixture
def copy(tmp_path):
    for name in ("benchmark_results", "datasets"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("edp_iql.py", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def call(folder, *command):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, env=env)


@pytest.mark.slow
def test_report_is_up_to_date(copy):
    """Another run of it changes no word of the documents."""
    paths = [copy / "README.md", *(copy / "benchmark_results").glob("*.md")]
    before = {path: path.read_text() for path in paths}
    report = call(copy, "benchmark_results/report.py")
    assert report.returncode == 0 and {path: path.read_text() for path in paths} == before, report


@pytest.mark.slow
def test_launch(copy):
    """A trial runs a job once, evaluates its policy again, and leaves the results of the repository alone."""
    raw = copy / "benchmark_results" / "raw"
    before = sorted(path.name for path in raw.iterdir())
    flags = "edp_iql --seeds 1 --updates 2 --compile off --jobs replay-mini__bc__ --candidates 1 --runs-dir trial"
    flags += " --raw-dir trial/raw"
    for told in ("__bc__0: done", "done before"):
        done = call(copy, "benchmark_results/launch.py", *flags.split())
        assert done.returncode == 0 and told in done.stdout, done
    found = json.loads((copy / "trial" / "raw" / "hopper-medium-replay-mini__bc__0.json").read_text())
    assert found["result"]["updates"] == 2 and found["final"]["1"]["episodic_return"] > 0
    assert sorted(path.name for path in raw.iterdir()) == before


@pytest.fixture
def launch(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmark_results")
    return importlib.import_module("launch")


def test_only_runs_of_the_same_arguments_go_on(tmp_path, launch):
    """A checkpoint that was made before an argument changed is left alone."""
    for name, lr in (("a", 1e-3), ("b", 3e-4)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint.pt").touch()
        (tmp_path / name / "args.json").write_text(json.dumps({"args": {"lr": lr, "num_updates": 5}}))
    assert launch.resumable(tmp_path, {"lr": 3e-4, "num_updates": 9}) == [tmp_path / "b"]


@pytest.mark.slow
def test_a_preempted_job_goes_on(tmp_path, launch, monkeypatch):
    """The cluster warns all processes of the job, and queues it again: one run folder, continued."""
    import submitit

    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'benchmark_results'}:{ROOT}")
    flags = ["--num-updates=300", "--save-every=20", "--log-every=20", "--eval-episodes=0", "--compile=off"]
    step = {"file": "edp_iql.py", "flags": flags, "work": tmp_path / "work", "wanted": {}, "raw": tmp_path / "raw.json"}
    executor = submitit.LocalExecutor(tmp_path / "submitit")
    executor.update_parameters(timeout_min=5)
    job = executor.submit(launch.Job(), [step])

    def children(pid):
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))

    deadline = time.time() + 120
    while not list((tmp_path / "work").glob("*/checkpoint.pt")) and time.time() < deadline:
        time.sleep(0.1)
    (task,) = children(job._process.pid)
    for pid in (task, *children(task)):
        os.kill(pid, signal.SIGUSR2)
    assert job.result() == 0
    (folder,) = (path.parent for path in (tmp_path / "work").glob("*/result.json"))
    assert [path.name for path in (tmp_path / "work").iterdir() if path.is_dir()] == [folder.name]
    starts = sorted(path.name for path in folder.glob("args*.json"))
    assert len(starts) == 2 and starts[0].startswith("args-") and (tmp_path / "raw.json").exists()

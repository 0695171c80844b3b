"""The benchmark's report and launcher, in a copy of the repository."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

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
    paths = ["README.md", *(f"benchmark_results/{path.name}" for path in (copy / "benchmark_results").glob("*.md"))]
    before = {path: (copy / path).read_text() for path in paths}
    report = call(copy, "benchmark_results/report.py")
    assert report.returncode == 0, report
    assert {path: (copy / path).read_text() for path in paths} == before


@pytest.mark.slow
def test_launch(copy):
    """A trial runs a job once, and leaves the results of the repository alone."""
    raw = copy / "benchmark_results" / "raw"
    before = sorted(path.name for path in raw.iterdir())
    flags = "edp_iql --seeds 1 --updates 2 --compile off --jobs replay-mini__bc__ --runs-dir trial --raw-dir trial/raw"
    for told in ("__bc__0: done", "done before"):
        done = call(copy, "benchmark_results/launch.py", *flags.split())
        assert done.returncode == 0 and told in done.stdout, done
    assert list((copy / "trial" / "raw").glob("hopper-medium-replay-mini__bc__0*"))
    assert sorted(path.name for path in raw.iterdir()) == before


def test_only_runs_of_the_same_arguments_go_on(tmp_path):
    """A checkpoint that was made before an argument changed is left alone."""
    spec = importlib.util.spec_from_file_location("launch", ROOT / "benchmark_results" / "launch.py")
    launch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launch)
    for name, lr in (("a", 1e-3), ("b", 3e-4)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint.pt").touch()
        (tmp_path / name / "args.json").write_text(json.dumps({"args": {"lr": lr, "num_updates": 5}}))
    assert launch.resumable(tmp_path, {"lr": 3e-4, "num_updates": 9}) == [tmp_path / "b"]

"""The benchmark's launcher and report, in a copy of the repository."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(ROOT / "benchmark_results", tmp_path / "benchmark_results")
    shutil.copytree(ROOT / "datasets", tmp_path / "datasets")
    for name in ("edp_iql.py", "README.md"):
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
    command = ["benchmark_results/launch.py", "edp_iql", "--seeds", "1", "--updates", "2", "--jobs", "replay-mini__bc"]
    first = call(copy, *command)
    assert first.returncode == 0 and "__bc__0: return" in first.stdout, first
    kept = json.loads((raw / "hopper-medium-replay-mini__bc__0" / "args.json").read_text())
    assert kept["args"]["inverse_temperature"]["value"] == 0
    assert str(copy) not in (raw / "hopper-medium-replay-mini__bc__0" / "args.json").read_text()
    assert "done before" in call(copy, *command).stdout
    report = call(copy, "benchmark_results/report.py")
    assert "| behaviour cloning | 1 | 2 |" in report.stdout, report

    script = Path(copy / "edp_iql.py")
    script.write_text(script.read_text().replace('"lr": 1e-3', '"lr": 1e30'))
    command[-1] = "replay-mini__edp_iql"
    diverged = call(copy, *command)
    assert diverged.returncode == 1 and "__edp_iql__0: FAILED: diverged" in diverged.stdout, diverged
    assert (raw / "hopper-medium-replay-mini__edp_iql__0" / "diagnostics.json").exists()
    assert "| EDP-IQL | 0, 1 diverged |" in call(copy, "benchmark_results/report.py").stdout
    script.write_text(script.read_text().replace("    main(parse_args())", "    raise SystemExit(7)"))
    failed = call(copy, *command)
    assert failed.returncode == 1 and "FAILED with exit code 7" in failed.stdout, failed


def test_report_is_up_to_date(copy):
    """Another run of it changes no word of the README."""
    before = (copy / "README.md").read_text()
    report = call(copy, "benchmark_results/report.py")
    assert report.returncode == 0, report
    assert (copy / "README.md").read_text() == before
    figures = re.findall(r"\]\((benchmark_results/\S+\.png)\)", before)
    assert figures and all((copy / figure).stat().st_size > 10_000 for figure in figures)

"""Run a benchmark: one training run per core, resumed where it was stopped, raw files kept under benchmark_results/raw.

python benchmark_results/launch.py edp_iql            # three seeds, two data sets, EDP-IQL and behaviour cloning
python benchmark_results/launch.py edp_iql --jobs medium-expert   # only the jobs whose name contains this
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parent.parent
SETS = ("hopper-medium-expert-mini", "hopper-medium-replay-mini")
VARIANTS: dict[str, dict[str, list[str]]] = {
    "edp_iql": {"edp_iql": [], "bc": ["--inverse-temperature", "0", "--eval-candidates", "1"]},
    "edp_crr": {"edp_crr": []},
    "edp_td3": {"edp_td3": []},
}
KEPT = ("args.json", "evaluations.csv", "metrics.jsonl", "result.json")


@dataclass
class Args:
    """Run a benchmark, one run per core; call it again to go on where it stopped."""

    script: tyro.conf.Positional[Literal["edp_iql", "edp_crr", "edp_td3"]]
    """which script"""
    seeds: int = 3
    """seeds 0, 1, ..."""
    updates: int = 100_000
    """updates per run"""
    workers: int = 2
    """runs at a time"""
    jobs: str = ""
    """only jobs whose name contains this"""
    runs_dir: Path = ROOT / "runs" / "benchmark"
    """where runs are kept until they are complete"""


def run(name: str, script: str, flags: list[str], args: Args) -> str:
    """One job; returns what became of it."""
    raw, work = ROOT / "benchmark_results" / "raw" / name, args.runs_dir / name
    if (raw / "result.json").exists() and json.loads((raw / "result.json").read_text())["updates"] >= args.updates:
        return "done before"
    work.mkdir(parents=True, exist_ok=True)
    started = sorted(path.parent for path in work.glob("*/checkpoint.pt"))
    command = [sys.executable, str(ROOT / f"{script}.py")]
    resume = ["--resume", *map(str, started[-1:]), "--num-updates", str(args.updates)]
    command += resume if started else [*flags, "--runs-dir", str(work)]
    with open(work / "log.txt", "a") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        return f"exit code {code}, see {work / 'log.txt'}"
    folder = max(path.parent for path in work.glob("*/result.json"))
    raw.mkdir(parents=True, exist_ok=True)
    for file in KEPT:  # without this machine's paths
        (raw / file).write_text((folder / file).read_text().replace(f"{ROOT}/", ""))
    return f"return {json.loads((raw / 'result.json').read_text())['return']}"


def main(args: Args) -> None:
    jobs: dict[str, list[str]] = {}
    for seed in range(args.seeds):
        for env_id in SETS:
            for variant, flags in VARIANTS[args.script].items():
                common = ["--env-id", env_id, "--seed", str(seed), "--num-updates", str(args.updates)]
                common += ["--exp-name", variant, "--eval-every", "10000"]
                jobs[f"{env_id}__{variant}__{seed}"] = common + flags
    jobs = {name: flags for name, flags in jobs.items() if args.jobs in name}
    with ThreadPoolExecutor(args.workers) as pool:
        futures = {name: pool.submit(run, name, args.script, flags, args) for name, flags in jobs.items()}
        outcomes = {name: future.result() for name, future in futures.items()}
    for name, outcome in outcomes.items():
        print(f"{name}: {outcome}")
    if any("exit code" in outcome for outcome in outcomes.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main(tyro.cli(Args))

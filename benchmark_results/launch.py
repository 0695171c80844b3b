"""Run a benchmark: one training run per core, resumed where it was stopped, raw files kept under benchmark_results/raw.

python benchmark_results/launch.py edp_iql            # three seeds, two data sets, EDP-IQL and behaviour cloning
python benchmark_results/launch.py edp_iql --jobs medium-expert   # only the jobs whose name contains this
python benchmark_results/launch.py edis_sac           # one pre-trained agent per seed, which every variant goes on with

A job is done when its raw files hold a finished run of the arguments that the script would resolve now.
"""

import importlib
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

ROOT = Path(__file__).resolve().parent.parent
EDP_SETS = ("hopper-medium-expert-mini", "hopper-medium-replay-mini")
SETS = dict.fromkeys(("edp_iql", "edp_crr", "edp_td3"), EDP_SETS)
SETS["edis_sac"] = ("hopper-medium-mini", "hopper-medium-replay-mini")
VARIANTS: dict[str, dict[str, list[str]]] = {
    "edp_iql": {"edp_iql": [], "bc": ["--inverse-temperature", "0", "--eval-candidates", "1"]},
    "edp_crr": {"edp_crr": []},
    "edp_td3": {"edp_td3": []},
    "edis_sac": {
        **{name: ["--augmentation", name] for name in ("edis", "synther", "offline", "none")},
        **{f"edis_no_{name}": [f"--no-{name}-energy"] for name in ("state", "policy", "transition")},
    },
}
KEPT = ("args.json", "evaluations.csv", "metrics.jsonl", "result.json")


@dataclass
class Args:
    """Run a benchmark, one run per core; call it again to go on where it stopped."""

    script: tyro.conf.Positional[Literal["edp_iql", "edp_crr", "edp_td3", "edis_sac"]]
    """which script"""
    seeds: int = 3
    """seeds 0, 1, ..."""
    updates: int = 100_000
    """updates per run of an EDP script"""
    online_steps: int = 20_000
    """online steps per run of EDIS"""
    workers: int = 2
    """runs at a time"""
    jobs: str = ""
    """only jobs whose name contains this"""
    runs_dir: Path = ROOT / "runs" / "benchmark"
    """where runs are kept until they are complete"""


def is_done(raw: Path, script: Any, flags: list[str]) -> bool:
    """Whether raw files of a finished run with these arguments are there."""
    if not (raw / "result.json").exists():
        return False
    wanted, about = script.parse_args(flags), json.loads((raw / "args.json").read_text())["args"]
    updates = json.loads((raw / "result.json").read_text())["updates"]
    same = all(about.get(k, {}).get("value") == v for k, v in vars(wanted).items() if k not in script.RESUMABLE)
    return same and updates >= wanted.num_updates


def train(work: Path, script: str, flags: list[str], pretrained: Path | None = None) -> Path | str:
    """Start a run in `work`, or go on with the one there, or with a copy of `pretrained`; its folder, or an error."""
    work.mkdir(parents=True, exist_ok=True)
    if pretrained and not any(work.glob("*/checkpoint.pt")):
        shutil.copytree(pretrained, work / "copy", dirs_exist_ok=True)
    started = sorted(path.parent for path in work.glob("*/checkpoint.pt"))
    flags = [*flags, "--resume", str(started[-1])] if started else [*flags, "--runs-dir", str(work)]
    with open(work / "log.txt", "a") as log:
        command = [sys.executable, str(ROOT / f"{script}.py"), *flags]
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    return f"exit code {code}, see {work / 'log.txt'}" if code else max(p.parent for p in work.glob("*/result.json"))


def run(name: str, args: Args, flags: list[str], pretrained: Path | str | None) -> str:
    """One job; returns what became of it."""
    raw = ROOT / "benchmark_results" / "raw" / name
    if is_done(raw, importlib.import_module(args.script), flags):
        return "done before"
    folder = pretrained if isinstance(pretrained, str) else train(args.runs_dir / name, args.script, flags, pretrained)
    if isinstance(folder, str):
        return folder
    raw.mkdir(parents=True, exist_ok=True)
    for file in KEPT:  # without this machine's paths
        (raw / file).write_text((folder / file).read_text().replace(f"{ROOT}/", ""))
    return f"return {json.loads((raw / 'result.json').read_text())['return']}"


def main(args: Args) -> None:
    sys.path.insert(0, str(ROOT))
    jobs: dict[str, list[str]] = {}
    for seed in range(args.seeds):
        for env_id in SETS[args.script]:
            for variant, flags in VARIANTS[args.script].items():
                common = ["--env-id", env_id, "--seed", str(seed), "--exp-name", variant]
                if args.script == "edis_sac":
                    common += ["--online-steps", str(args.online_steps)]
                else:
                    common += ["--num-updates", str(args.updates), "--eval-every", "10000"]
                jobs[f"{env_id}__{variant}__{seed}"] = common + flags
    jobs = {name: flags for name, flags in jobs.items() if args.jobs in name}
    with ThreadPoolExecutor(args.workers) as pool:
        agents: dict[str, Path | str] = {}  # pre-trained ones by the job's data set and seed, or what went wrong
        if args.script == "edis_sac":
            names = {"__pretrained__".join(name.split("__")[::2]): flags[:4] for name, flags in jobs.items()}
            offline = {
                name: pool.submit(train, args.runs_dir / name, args.script, [*flags, "--online-steps", "0"])
                for name, flags in names.items()
            }
            agents = {name: future.result() for name, future in offline.items()}
        futures = {
            name: pool.submit(run, name, args, flags, agents.get("__pretrained__".join(name.split("__")[::2])))
            for name, flags in jobs.items()
        }
        outcomes = {name: future.result() for name, future in futures.items()}
    for name, outcome in outcomes.items():
        print(f"{name}: {outcome}")
    if any("exit code" in outcome for outcome in outcomes.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main(tyro.cli(Args))

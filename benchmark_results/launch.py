"""Run a benchmark: runs go on where they were stopped; each finished run becomes one file in benchmark_results/raw.

python benchmark_results/launch.py edp_iql            # three seeds, the bundled sets; all variants
python benchmark_results/launch.py edp_iql --jobs medium-expert   # only the jobs whose name contains this
python benchmark_results/launch.py edis_sac           # one pre-trained agent per seed, which every variant goes on with
python benchmark_results/launch.py edp_iql --env-ids hopper-medium-v2 walker2d-medium-v2 --updates 2000000
python benchmark_results/launch.py edp_td3 --executor slurm --slurm-partition cpu

A job is done when its raw file holds a run of the arguments that the script would resolve now. A run that diverged is
kept too, and is told; the exit code is 1 if a job did not end well.
"""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import submitit
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark_results")]
import report  # noqa: E402

EDIS_SETS = ("hopper-medium-mini", "hopper-medium-replay-mini")
EDP_SETS = ("hopper-medium-expert-mini", *EDIS_SETS)
VARIANTS: dict[str, dict[str, list[str]]] = {
    "edp_iql": {
        "edp_iql": [],
        "bc": ["--inverse-temperature", "0", "--eval-candidates", "1"],
        "bc_q": ["--inverse-temperature", "0"],
        "iql": ["--guidance-coef", "1", "--diffusion-coef", "0"],
        "edp_iql_1": ["--eval-candidates", "1"],
        "weighted": ["--guidance-coef", "1"],
        "weighted_1": ["--guidance-coef", "1", "--eval-candidates", "1"],
        "elbo": ["--likelihood", "elbo", "--guidance-coef", "3"],  # the official code's strength, about
        "default": [],  # with the preset's number of updates
    },
    "edp_crr": {"edp_crr": [], "edp_crr_1": ["--eval-candidates", "1"]},
    "edp_td3": {
        "edp_td3": [],
        "edp_td3_1": ["--eval-candidates", "1"],
        "diffusion_ql": ["--no-action-approximation"],
        "diffusion_ql_fast": ["--no-action-approximation", "--tau", "0.05"],
        "td3_bc": ["--eta", "2.5", "--normalize-observations"],
    },
    "edis_sac": {
        **{name: ["--augmentation", name] for name in ("edis", "offline", "none")},
        "synther": ["--augmentation", "synther", "--denoiser-recent", "0"],
        "edis_no_energies": ["--augmentation", "synther"],
        **{f"edis_no_{name}": [f"--{name}-scale", "0"] for name in ("state", "policy", "transition")},
        "edis_inpainted": ["--conditional-negatives", "inpainted", "--no-full-gradient"],
    },
}
BASELINES = {name: f"benchmark_results/baselines/{name}.py" for name in ("iql", "td3_bc")}
# Arguments that change no result
FREE = {"resume", "device", "log_every", "save_every", "runs_dir", "track", "wandb_project", "dataset_path", "exp_name"}
FREE |= {"capture_video", "num_threads", "compile"}


@dataclass
class Args:
    """Run a benchmark; call it again to go on where it stopped."""

    script: tyro.conf.Positional[Literal["edp_iql", "edp_crr", "edp_td3", "edis_sac"]]
    """which script"""
    env_ids: list[str] = field(default_factory=list)
    """data sets; none given: the bundled ones of the results page"""
    seeds: int = 3
    """seeds 0, 1, ..."""
    updates: int = 100_000
    """updates per run of an EDP script"""
    candidates: list[int] = field(default_factory=lambda: [1, 10])
    """numbers of candidates with which the final policy of an EDP script is evaluated again, in 100 episodes"""
    online_steps: int = 10_000
    """online steps per run of EDIS"""
    workers: int = 2
    """runs at a time on this machine: one per core"""
    gpus: int = 0
    """GPUs that the workers of this machine share in turn, or that each job of a cluster gets"""
    compile: Literal["auto", "on", "off"] = "auto"
    """passed on to the runs"""
    executor: Literal["local", "slurm"] = "local"
    """where runs are started: on this machine, or as jobs of a SLURM cluster"""
    slurm_partition: str | None = None
    """partition of the cluster"""
    slurm_hours: int = 24
    """time limit of a job on the cluster; launch again for what it cut"""
    jobs: str = ""
    """only jobs whose name contains this"""
    runs_dir: Path = ROOT / "runs" / "benchmark"
    """where runs are made, and stay"""
    raw_dir: Path = ROOT / "benchmark_results" / "raw"
    """where files of finished runs go; report.py shows those in the default folder"""


running: list[subprocess.Popen[bytes]] = []  # of this process


def resumable(work: Path, wanted: dict[str, Any]) -> list[Path]:
    """Folders of stopped runs with the wanted arguments, oldest first; those of other arguments are left alone."""
    found = []
    for folder in sorted(path.parent for path in work.glob("*/checkpoint.pt")):
        newest = max(folder.glob("args*.json"), key=lambda path: path.stat().st_mtime)
        saved = json.loads(newest.read_text())["args"]
        if all(saved.get(key) == value for key, value in wanted.items() if key not in ("num_updates", "online_steps")):
            found.append(folder)
    return found


def train(
    file: str, flags: list[str], work: Path, wanted: dict[str, Any], raw: Path | None = None, agent: Path | None = None,
    candidates: Iterable[int] = (),
) -> int:  # fmt: skip
    """A run in `work`, continued from the checkpoint there, or from a copy of the agent's run; its exit code."""
    work.mkdir(parents=True, exist_ok=True)
    folders = resumable(work, wanted)
    if agent and not folders:
        source, part = next(agent.glob("*/result.json")).parent, work.with_name(f"{work.name}.part")
        shutil.rmtree(part, ignore_errors=True)  # a copy that was cut short
        shutil.copytree(source, part, ignore=shutil.ignore_patterns("result.json"))
        folders = [part.rename(work / f"copy-{time.time_ns()}")]
    where = ["--resume", str(folders[-1])] if folders else ["--runs-dir", str(work)]
    code = call(work, file, *flags, *where)
    if code in (0, 3) and raw:  # diverged runs are kept too
        folder = max(work.glob("*/args*.json"), key=lambda path: path.stat().st_mtime).parent
        found = report.collect(folder)
        for n in candidates if code == 0 else ():
            again = ["--resume", str(folder), "--eval-only", "--eval-episodes", "100", "--eval-candidates", str(n)]
            shutil.rmtree(work / "final", ignore_errors=True)
            if code := call(work, file, *again, "--runs-dir", str(work / "final")):
                return code
            result = json.loads(next(work.glob("final/*/result.json")).read_text()).items()
            means = {name: value["last"] for name, value in result if isinstance(value, dict)}
            found.setdefault("final", {})[str(n)] = report.rounded(means)
        raw.parent.mkdir(parents=True, exist_ok=True)
        report.store(found, raw)
    return code


def call(work: Path, file: str, *flags: str) -> int:
    """Run a script and wait; its exit code."""
    with open(work / "log.txt", "a") as log:
        # A cluster sends its warning to all processes of a job; the run is told by `checkpoint`
        command = [sys.executable, str(ROOT / file), *flags]
        run = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, preexec_fn=ignore_warnings)
    running.append(run)
    code = run.wait()
    running.remove(run)
    return code


def work_through(steps: list[dict[str, Any]]) -> int:
    """The runs of a job in turn, of which the first makes the agent that the others go on with; the worst exit code."""
    codes = []
    for step in steps:
        codes.append(train(**step))
        if codes[-1] not in (0, 3):
            break
    return max(codes, key=abs)


def ignore_warnings() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


class Job(submitit.helpers.Checkpointable):
    """The runs of a job on a cluster. When the cluster warns it, they save, and the job is queued again."""

    def __call__(self, steps: list[dict[str, Any]]) -> int:
        return work_through(steps)

    def checkpoint(self, steps: list[dict[str, Any]]) -> Any:
        for run in running:
            run.terminate()
            os.waitid(
                os.P_PID, run.pid, os.WEXITED | os.WNOWAIT
            )  # the interrupted run.wait() would not let in a second
        return super().checkpoint(steps)


def make_jobs(args: Args) -> dict[str, list[dict[str, Any]]]:
    """Runs of each job that are not done: one, or with EDIS those of all variants that share an agent."""
    script, found = importlib.import_module(args.script), False
    jobs: dict[str, list[dict[str, Any]]] = {}
    edis = args.script == "edis_sac"
    for seed in range(args.seeds):
        for env_id in args.env_ids or (EDIS_SETS if edis else EDP_SETS):
            resolved: list[Any] = []
            for variant, flags in VARIANTS[args.script].items():
                name = f"{env_id.replace('/', '_')}__{variant}__{seed}"
                flags = ["--env-id", env_id, "--seed", str(seed), "--exp-name", variant, *flags]
                if edis:
                    flags += ["--online-steps", str(args.online_steps)]
                elif variant != "default":
                    flags += ["--num-updates", str(args.updates), "--eval-every", str(min(10_000, args.updates))]
                parsed = vars(script.parse_args(flags)).items()
                wanted = {key: value for key, value in parsed if key not in FREE}
                repeated = (BASELINES.get(variant), wanted) in resolved  # the preset has the variant's values
                resolved.append((BASELINES.get(variant), wanted))
                if args.jobs not in name or repeated:
                    continue
                found, raw = True, args.raw_dir / f"{name}.json"
                about = json.loads(raw.read_text()) if raw.exists() else {}
                if about.get("result") and all(about["args"].get(key, value) == value for key, value in wanted.items()):
                    print(f"{name}: done before")
                    continue
                flags += ["--compile", args.compile]
                if args.gpus and args.executor == "local":
                    flags += ["--device", f"cuda:{len(jobs) % args.gpus}"]
                file = BASELINES.get(variant, f"{args.script}.py")
                run: dict[str, Any] = {"file": file, "flags": flags, "work": args.runs_dir / name, "wanted": wanted}
                run["raw"] = raw
                if not edis:
                    run["candidates"] = args.candidates[: 1 if variant in BASELINES else None]
                    jobs[name] = [run]
                    continue
                agent = args.runs_dir / f"{env_id.replace('/', '_')}__pretrained__{seed}"
                offline = [*flags[:4], "--online-steps", "0", "--compile", args.compile]
                shared = {key: value for key, value in vars(script.parse_args(offline)).items() if key not in FREE}
                first = {"file": file, "flags": offline, "work": agent, "wanted": shared}
                done = bool(list(agent.glob("*/result.json")))
                jobs.setdefault(agent.name, [] if done else [first]).append(run | {"agent": agent})
    if not found:
        print(f"launch.py: error: no job's name contains {args.jobs!r}", file=sys.stderr)
        raise SystemExit(2)
    return jobs


def main(args: Args) -> None:
    args.runs_dir = args.runs_dir.resolve()
    jobs, failed, ended = make_jobs(args), 0, []
    if args.executor == "slurm":
        executor = submitit.AutoExecutor(args.runs_dir / "submitit", cluster="slurm")
        executor.update_parameters(timeout_min=60 * args.slurm_hours, gpus_per_node=args.gpus or None)
        executor.update_parameters(slurm_partition=args.slurm_partition, slurm_additional_parameters={"requeue": True})
        with executor.batch():
            submitted = {name: executor.submit(Job(), steps) for name, steps in jobs.items()}
        results = {name: job.result for name, job in submitted.items()}
    else:
        pool = ThreadPoolExecutor(args.workers)
        futures = {name: pool.submit(work_through, steps) for name, steps in jobs.items()}
        results = {name: future.result for name, future in futures.items()}

        def end(number: int, frame: Any) -> None:
            """Let the runs save and end, and begin no further one."""
            ended.append(number)
            for future in futures.values():
                future.cancel()
            for run in list(running):
                run.terminate()

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, end)
    for name, result in results.items():
        try:
            code: Any = result()
        except BaseException as error:  # cancelled, or the cluster's
            code = repr(error)
        failed += code != 0
        told = f"FAILED, exit code {code}: see log.txt in {args.runs_dir}; launch again to go on" if code else "done"
        print(f"{time.strftime('%H:%M')} {name}: {told}", flush=True)
    raise SystemExit(1 if failed or ended else 0)


if __name__ == "__main__":
    main(tyro.cli(Args))

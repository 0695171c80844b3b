"""Run a benchmark: runs go on where they were stopped, raw files are kept under benchmark_results/raw.

python benchmark_results/launch.py edp_iql            # three seeds, the bundled sets; all variants
python benchmark_results/launch.py edp_iql --jobs medium-expert   # only the jobs whose name contains this
python benchmark_results/launch.py edis_sac           # one pre-trained agent per seed, which every variant goes on with
python benchmark_results/launch.py edp_iql --env-ids hopper-medium-v2 walker2d-medium-v2 --updates 2000000
python benchmark_results/launch.py edp_td3 --executor slurm --slurm-partition cpu --workers 6
python benchmark_results/launch.py edp_td3 --gpus 2 --workers 4   # two runs on each GPU of this machine

A job is done when its raw files hold a finished run of the arguments that the script would resolve now. A run that
diverged is kept too, and is told; the exit code is 1 if a job did not end well.
"""

import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import Queue
from types import ModuleType
from typing import Any, Literal

import submitit
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
EDP_SETS = ("hopper-medium-expert-mini", "hopper-medium-mini", "hopper-medium-replay-mini")
SETS: dict[str, tuple[str, ...]] = dict.fromkeys(("edp_iql", "edp_crr", "edp_td3"), EDP_SETS)
SETS["edis_sac"] = ("hopper-medium-mini", "hopper-medium-replay-mini")
FEW_STEPS = ["--sampler", "ddpm", "--beta-schedule", "vp", "--diffusion-steps", "5"]
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
        "bf16": ["--matmul-precision", "medium"],
    },
    "edp_crr": {"edp_crr": [], "edp_crr_1": ["--eval-candidates", "1"]},
    "edp_td3": {
        "edp_td3": [],
        "edp_td3_1": ["--eval-candidates", "1"],
        "diffusion_ql": ["--no-action-approximation", *FEW_STEPS, "--eta", "1"],
        "diffusion_ql_tau": ["--no-action-approximation", *FEW_STEPS, "--eta", "1", "--tau", "0.005"],  # its authors'
        "td3_bc": ["--eta", "2.5", "--observation-transform", "per-dimension"],
    },
    "edis_sac": {
        **{name: ["--augmentation", name] for name in ("edis", "offline", "none")},
        "synther": ["--augmentation", "synther", "--denoiser-recent", "0"],
        "edis_no_energies": ["--augmentation", "synther"],
        **{f"edis_no_{name}": [f"--no-{name}-energy"] for name in ("state", "policy", "transition")},
        "edis_inpainted": ["--conditional-negatives", "inpainted", "--no-full-gradient"],
        "exact": [],
        "exact_no_state": ["--no-state-energy"],
    },
}
BASELINES = {"iql": "iql", "td3_bc": "td3_bc", "exact": "exact", "exact_no_state": "exact"}  # with files of their own
BF16_UPDATES = 20_000  # compared over these only
KEPT = ("args.json", "evaluations.csv", "metrics.jsonl")
ROW = {"eval_candidates", "eval_episodes", "eval_every", "matmul_precision"}  # may change on resume, not within a row
STOPPED = (130, 143, -signal.SIGINT, -signal.SIGTERM)  # exit codes of a run that was stopped; the first two saved


@dataclass
class Args:
    """Run a benchmark; call it again to go on where it stopped."""

    script: tyro.conf.Positional[Literal["edp_iql", "edp_crr", "edp_td3", "edis_sac"]]
    """which script"""
    env_ids: list[str] = field(default_factory=list)
    """data sets; none given: the bundled ones of the README's tables"""
    seeds: int = 3
    """seeds 0, 1, ..."""
    updates: int = 100_000
    """updates per run of an EDP script"""
    online_steps: int = 10_000
    """online steps per run of EDIS"""
    workers: int = 2
    """runs at a time: on this machine one per core"""
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
    """where the raw files of finished runs go; report.py shows those in the default folder"""


def same_data(env_id: str, dataset: dict[str, str]) -> bool:
    """Whether a run's data are those in datasets/ now, if any: a file that collect.py made anew is another."""
    file = ROOT / "datasets" / f"{env_id}.hdf5"
    return not file.exists() or hashlib.sha256(file.read_bytes()).hexdigest() == dataset.get("sha256")


# A run that is interrupted before it listens ends: Python can lose a KeyboardInterrupt in an import
RUN = "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); sys.argv.pop(0); "
RUN += "runpy.run_path(sys.argv[0], run_name='__main__')"


def call(command: list[str], log: Path, stop: Path) -> int:
    """Exit code of a run, which can be interrupted, as its launcher and submitit's processes cannot."""
    with open(log, "a") as file:
        if stop.exists():  # since this process was started
            return 130
        listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        command = [sys.executable, "-c", RUN, *command]
        with subprocess.Popen(command, stdout=file, stderr=file, preexec_fn=listen) as run:
            if stop.exists():  # perhaps since before the run was there to be told
                run.terminate()
            return run.wait()


class Launcher:
    """Starts runs, `workers` at a time; the threads here only wait."""

    def __init__(self, args: Args, script: ModuleType) -> None:
        self.args, self.script = args, script
        self.executor = submitit.AutoExecutor(args.runs_dir / "submitit", cluster=args.executor)
        hours = 10_000 if args.executor == "local" else args.slurm_hours
        self.executor.update_parameters(timeout_min=60 * hours, gpus_per_node=args.gpus or None)
        self.executor.update_parameters(slurm_partition=args.slurm_partition)
        self.interrupted = False
        self.stop = args.runs_dir / "submitit" / f"{time.time_ns()}.stop"
        self.stop.parent.mkdir(parents=True, exist_ok=True)
        self.running: set[submitit.Job[int]] = set()
        self.devices: Queue[str] = Queue()
        for i in range(args.workers):
            self.devices.put(f"cuda:{i % args.gpus}" if args.gpus and args.executor == "local" else "auto")

    def differs(self, found: dict[str, Any], flags: list[str], free: set[str]) -> bool:
        """Whether a run's arguments are not those that the script would resolve now, the free ones aside.

        Arguments that came later count with their default, at which everything is as before them.
        """
        wanted, found = vars(self.script.parse_args(flags)), {**vars(self.script.Args()), **found}
        return any(found[name] != value for name, value in wanted.items() if name not in free)

    def started(self, work: Path, flags: list[str]) -> list[Path]:
        """Folders in `work` of runs of these arguments that can go on; those of other arguments, as before a change."""
        found = []
        for folder in sorted((path.parent for path in work.glob("*/checkpoint.pt")), key=lambda x: x.stat().st_mtime):
            saved = self.script.load_checkpoint(str(folder))
            offline = saved["progress"]["step"] <= saved["args"].get("offline_updates", -1)
            free = (self.script.RESUMABLE - ROW) | (self.script.ONLINE if offline else set())
            if self.differs(saved["args"], flags, free) or not same_data(saved["args"]["env_id"], saved["dataset"]):
                tqdm.write(f"{folder}: of other arguments or data, left alone", file=sys.stderr)
            else:
                found.append(folder)
        return found

    def train(self, work: Path, file: str, flags: list[str], pretrained: Path | None = None) -> tuple[int, Path]:
        """Start a run in `work`, or go on with the one there, or with a copy of `pretrained`; exit code and folder."""
        work.mkdir(parents=True, exist_ok=True)
        started = self.started(work, flags)
        if pretrained and not started:
            part = work.with_name(f"{work.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(pretrained, part, ignore=shutil.ignore_patterns("result.json"))  # not yet this run's
            started = [part.rename(work / f"copy_{time.time_ns()}")]
        flags = [*flags, "--resume", str(started[-1])] if started else [*flags, "--runs-dir", str(work)]
        device = self.devices.get()
        try:
            if self.interrupted:
                return 130, work
            flags += ["--device", device, "--compile", self.args.compile]
            command = [str(ROOT / f"{file}.py"), *flags]
            job = self.executor.submit(call, command, work / "log.txt", self.stop)
            self.running.add(job)
            if self.interrupted:  # in between
                job.cancel(check=False)
            code = job.result()
            self.running.remove(job)
            if self.interrupted and code not in (0, 3):  # the interpreter's start can make anything of it
                code = 130
            self.interrupted |= code in STOPPED
        finally:
            self.devices.put(device)
        latest = max(work.glob("*/args.json"), key=lambda path: path.stat().st_mtime, default=work / "none")
        return code, latest.parent

    def is_done(self, raw: Path, flags: list[str]) -> bool:
        """Whether raw files of a finished run with these arguments are there."""
        if not (raw / "result.json").exists():
            return False
        about = json.loads((raw / "args.json").read_text())
        updates = json.loads((raw / "result.json").read_text())["updates"]
        values = {name: entry["value"] for name, entry in about["args"].items()}
        enough = updates >= self.script.parse_args(flags).num_updates
        same = same_data(values["env_id"], about["dataset"])
        return enough and same and not self.differs(values, flags, self.script.RESUMABLE - ROW)

    def run(self, name: str, flags: list[str], agent: Future[tuple[int, Path]] | None) -> str:
        """One job, with the pre-trained agent that it goes on with; what became of it."""
        raw, work = self.args.raw_dir / name, self.args.runs_dir / name
        if self.is_done(raw, flags):
            return "done before"
        code, folder = agent.result() if agent else (0, None)
        if code == 0:
            own = BASELINES.get(name.split("__")[1])
            file = f"benchmark_results/baselines/{own}" if own else self.args.script
            code, folder = self.train(work, file, flags, folder)
        if code in STOPPED:
            return "FAILED: interrupted; launch again to go on"
        if code not in (0, 3):
            return f"FAILED with exit code {code}, see {work}/log.txt"
        part = self.args.runs_dir / f"{name}.raw"  # all files or none
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for file in (*KEPT, "result.json" if code == 0 else "diagnostics.json"):
            if folder and (folder / file).exists():  # without this machine's paths
                text = (folder / file).read_text().replace(f"{self.args.runs_dir}/", "runs/benchmark/")
                (part / file).write_text(text.replace(f"{ROOT}/", ""))
        raw.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(raw, ignore_errors=True)
        shutil.move(part, raw)
        if code == 3:
            return f"FAILED: diverged, see {raw}/diagnostics.json"
        return f"return {json.loads((raw / 'result.json').read_text())['return']}"


def make_jobs(args: Args, script: ModuleType) -> dict[str, list[str]]:
    """Names of the chosen jobs and the flags of their runs."""
    jobs: dict[str, list[str]] = {}
    for seed in range(args.seeds):
        for env_id in args.env_ids or SETS[args.script]:
            resolved: list[Any] = []
            for variant, flags in VARIANTS[args.script].items():
                if args.jobs not in (name := f"{env_id.replace('/', '_')}__{variant}__{seed}"):
                    continue
                common = ["--env-id", env_id, "--seed", str(seed), "--exp-name", variant]
                if args.script == "edis_sac":
                    common += ["--online-steps", str(args.online_steps)]
                else:
                    updates = min(args.updates, BF16_UPDATES) if variant == "bf16" else args.updates
                    common += ["--num-updates", str(updates), "--eval-every", "10000"]
                run = (BASELINES.get(variant), {**vars(script.parse_args(common + flags)), "exp_name": ""})
                if run not in resolved:  # where the preset has the variant's values it is another's run again
                    jobs[name] = common + flags
                resolved.append(run)
    return jobs


def main(args: Args) -> None:
    sys.path.insert(0, str(ROOT))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the runs on this machine, which save
    args.runs_dir, script = args.runs_dir.resolve(), importlib.import_module(args.script)
    jobs = make_jobs(args, script)
    if not jobs:
        print(f"launch.py: error: no job's name contains {args.jobs!r}", file=sys.stderr)
        raise SystemExit(2)
    launcher, failed = Launcher(args, script), 0

    def end(*_: Any) -> None:
        """Interrupt the runs, which would go on without this process, and begin no further one."""
        launcher.interrupted = True
        launcher.stop.touch()
        for number in (signal.SIGINT, signal.SIGTERM):  # a second signal ends a run that saves
            signal.signal(number, signal.SIG_IGN)
        if args.executor == "local":
            os.killpg(0, signal.SIGINT)
        for job in [*launcher.running] if args.executor == "slurm" else ():
            job.cancel(check=False)  # the cluster sends SIGTERM, on which a run saves too

    signal.signal(signal.SIGTERM, end)
    if args.executor == "slurm":
        signal.signal(signal.SIGINT, end)
    with ThreadPoolExecutor(2 * len(jobs)) as pool:
        agents: dict[str, Future[tuple[int, Path]]] = {}  # pre-trained, one for the variants of a data set and seed
        if args.script == "edis_sac":
            for name, flags in jobs.items():
                if not launcher.is_done(args.raw_dir / name, flags):
                    shared = "__pretrained__".join(name.split("__")[::2])
                    offline = [*flags[:4], "--online-steps", "0"]
                    if shared not in agents:
                        agents[shared] = pool.submit(launcher.train, args.runs_dir / shared, "edis_sac", offline)
        futures = {
            pool.submit(launcher.run, name, flags, agents.get("__pretrained__".join(name.split("__")[::2]))): name
            for name, flags in jobs.items()
        }
        for future in tqdm(as_completed(futures), total=len(futures), unit="job"):
            outcome = f"FAILED: {future.exception()!r}" if future.exception() else future.result()
            failed += outcome.startswith("FAILED")
            tqdm.write(f"{futures[future]}: {outcome}")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main(tyro.cli(Args))

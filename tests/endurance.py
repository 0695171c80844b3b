"""Long tests, too long for every commit: kills at bad moments, memory, thousands of damaged data files.

python tests/endurance.py kills --script edp_iql --count 20
python tests/endurance.py memory --script edp_iql --count 10000
python tests/endurance.py fuzz --count 3000
"""

import contextlib
import importlib
import io
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Literal

import h5py
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent))
from conftest import ROOT, make_columns, write_hdf5
from test_run import fast, flags_of, same_run


def writing(run: Path) -> bool:
    """A checkpoint is being written."""
    return (run / "checkpoint.tmp").exists()


def evaluating(run: Path) -> bool:
    """The losses of an evaluation's step are logged, its returns are not."""
    with contextlib.suppress(OSError, ValueError, IndexError):  # no row yet, half a row
        row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        return row["step"] % 4 == 0 and "losses/qf1_loss" in row  # --eval-every 4
    return False


def kills(name: str, count: int, folder: Path) -> None:
    """A run killed `count` times, resumed each time, ends like one that was left alone."""
    script = importlib.import_module(name)
    data = write_hdf5(folder / "hopper.hdf5", make_columns())
    argv = [*fast(script).replace("updates 6", "updates 400").split(), "--dataset-path", data]
    argv = flags_of(script, [*argv, "--env-id", "hopper-medium-v2"])
    command = [sys.executable, str(ROOT / f"{name}.py")]

    def finish(flags: list[str], runs: Path, until: Callable[[Path], bool] = lambda run: False) -> Path | None:
        """Run the script, and kill it when `until` is true of its folder; the folder, None if killed."""
        flags = flags if "--resume" in flags else [*flags, "--runs-dir", str(runs)]
        with open(folder / "errors", "w+") as errors:
            process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=errors, text=True)
            assert process.stdout
            run = Path(process.stdout.readline().strip())
            Thread(target=process.stdout.read, daemon=True).start()
            while process.poll() is None and not until(run):
                time.sleep(1e-4)
            process.kill()
            if process.wait() == 0:
                return run
            errors.seek(0)
            assert process.returncode == -signal.SIGKILL, errors.read()
        return None

    whole = finish(argv, folder / "whole")
    seconds = sum(script.load_checkpoint(str(whole))["progress"]["times"].values())
    done, killed, hit = None, 0, {writing: 0, evaluating: 0}
    while done is None:
        runs = list((folder / "killed").glob("*"))
        started = [run for run in runs if (run / "checkpoint.pt").exists()]
        for run in set(runs) - set(started):
            shutil.rmtree(run)
        flags = ["--resume", str(started[0])] if started else argv
        end = time.time() + 5 + random.uniform(0, 1.5 * seconds / count)  # 5: what a start takes
        moment = random.choice([writing, evaluating, lambda run, end=end: time.time() > end])
        done = finish(flags, folder / "killed", moment) if killed < count else finish(flags, folder / "killed")
        killed += done is None
        for run in started if done is None and moment in hit else ():
            hit[moment] += moment(run)
    assert killed == count, f"{name} ended after {killed} kills: give it more updates or fewer kills"
    same_run(script, {"run_dir": whole}, {"run_dir": done})
    where = f"{hit[writing]} during a checkpoint's writing, {hit[evaluating]} during an evaluation"
    print(f"{name}: {killed} kills, {where}: the same weights, metrics and evaluations")


def memory(name: str, count: int, folder: Path) -> None:
    """Memory of a run does not grow with its updates: MiB at a fifth of them, and the most after."""
    data = write_hdf5(folder / "hopper.hdf5", make_columns())
    argv = flags_of(importlib.import_module(name), fast(importlib.import_module(name)).split())
    argv += ["--dataset-path", data, "--env-id", "hopper-medium-v2", "--runs-dir", str(folder)]
    argv += ["--log-every", "50", "--eval-every", "2500", "--save-every", "500"]
    sizes = {"--offline-updates": count // 2, "--online-steps": count // 2, "--round-every": count // 10}
    sizes |= {"--num-updates": count} if name != "edis_sac" else {}
    for flag in sizes.keys() & set(argv):
        argv[argv.index(flag) + 1] = str(sizes[flag])
    process = subprocess.Popen([sys.executable, str(ROOT / f"{name}.py"), *argv], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    sizes_in_mib: dict[int, float] = {}
    for line in process.stdout:
        if match := re.match(r"update (\d+)/", line):
            resident = re.search(r"VmRSS:\s*(\d+)", Path(f"/proc/{process.pid}/status").read_text())
            sizes_in_mib[int(match[1])] = int(resident[1]) / 1024 if resident else 0.0
    assert process.wait() == 0
    early = max(size for update, size in sizes_in_mib.items() if update <= count / 5)
    late = max(size for update, size in sizes_in_mib.items() if update > count / 5)
    print(f"{name}: {early:.0f} MiB in the first {count // 5} of {count} updates, {late:.0f} at most after")
    assert late < early + 16


def damage(path: Path, rng: np.random.Generator) -> str:
    """Damage an HDF5 file in one of many ways; says how."""
    size = path.stat().st_size
    key = str(rng.choice(["observations", "actions", "rewards", "terminals", "timeouts", "next_observations"]))
    values = [np.nan, np.inf, -np.inf, 1e38, 5.0, -1.002]
    ways = [
        "truncate",
        "flip",
        "flip",
        "zero",
        "drop",
        "shape",
        "dtype",
        "value",
        "length",
        "empty",
        "one row",
        "group",
    ]
    way = str(rng.choice([*ways, "all terminal", "swap", "scalar"]))
    if way == "truncate":
        with open(path, "r+b") as file:
            file.truncate(int(rng.integers(size)))
    elif way in ("flip", "zero"):
        content = bytearray(path.read_bytes())
        for i in rng.integers(size if rng.random() < 0.5 else 4_000, size=int(rng.integers(1, 50))):
            content[i] = 0 if way == "zero" else content[i] ^ int(rng.integers(1, 256))
        path.write_bytes(content)
    else:
        with h5py.File(path, "r+") as file:
            column = file[key][()]
            del file[key]
            if way == "value":
                column = column.astype(np.float64)
                column.reshape(-1)[rng.integers(column.size)] = rng.choice(values)
            changed = {
                "shape": lambda: column[..., None],
                "dtype": lambda: column.astype("S8" if rng.random() < 0.5 else np.complex64),
                "value": lambda: column,
                "length": lambda: column[: int(rng.integers(len(column)))],
                "empty": lambda: column[:0],
                "one row": lambda: column[:1],
                "all terminal": lambda: np.ones_like(column),
                "swap": lambda: np.swapaxes(column, 0, -1),
                "scalar": lambda: np.float32(1.0),
            }
            if way == "group":
                file.create_group(key)
            elif way != "drop":
                file[key] = changed[way]()
    return f"{way} of {key}"


def fuzz(count: int, folder: Path) -> None:
    """Damaged files are read as finite values in range, or end with one line and exit code 2."""
    script = importlib.import_module("edp_iql")
    good, path = write_hdf5(folder / "good.hdf5", make_columns(rows=200)), folder / "bad.hdf5"
    refused = 0
    for seed in range(count):
        rng = np.random.default_rng(seed)
        shutil.copy(good, path)
        how, errors = damage(path, rng), io.StringIO()
        args = script.Args(env_id="hopper-medium-v2", dataset_path=str(path), reward_transform="return-range")
        try:
            with contextlib.redirect_stderr(errors):
                columns, *_ = script.load_task(args)
                transitions, _ = script.make_transitions(columns, args)
        except SystemExit as error:
            assert error.code == 2 and errors.getvalue().count("\n") == 1, (seed, how, errors.getvalue())
            refused += 1
        except BaseException as error:
            raise AssertionError(f"file {seed}: {how}") from error
        else:
            assert transitions.shape[1] == 27 and np.isfinite(transitions).all(), (seed, how)
            assert (np.abs(transitions[:, 11:14]) <= 1).all() and set(transitions[:, -1]) <= {0, 1}, (seed, how)
    print(f"{count} damaged files: {refused} refused with one line, {count - refused} read as finite values in range")


def main(
    what: tyro.conf.Positional[Literal["kills", "memory", "fuzz"]], script: str = "edp_iql", count: int = 20
) -> None:
    """Kill and resume a run of --script --count times, watch its memory for so many updates, or read damaged files."""
    begin = time.time()
    with tempfile.TemporaryDirectory() as folder:
        if what == "fuzz":
            fuzz(count, Path(folder))
        else:
            (kills if what == "kills" else memory)(script, count, Path(folder))
    print(f"{time.time() - begin:.0f} s")


if __name__ == "__main__":
    tyro.cli(main)

"""Long tests, too long for every commit: kills at random moments, thousands of damaged data files.

python tests/endurance.py kills --script edp_iql --count 20
python tests/endurance.py fuzz --count 3000
"""

import contextlib
import importlib
import io
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent))
from conftest import ROOT, make_columns, write_hdf5
from test_run import fast, flags_of, same_run


def kills(name: str, count: int, folder: Path) -> None:
    """A run killed `count` times, resumed each time, ends like one that was left alone."""
    script = importlib.import_module(name)
    data = write_hdf5(folder / "hopper.hdf5", make_columns())
    argv = [*fast(script).replace("updates 6", "updates 400").split(), "--dataset-path", data]
    argv = flags_of(script, [*argv, "--env-id", "hopper-medium-v2"])
    command = [sys.executable, str(ROOT / f"{name}.py")]

    def finish(flags: list[str], runs: Path, wait: float | None) -> Path | None:
        """Run the script, for so many seconds at most after its first line; the run's folder, None if killed."""
        flags = flags if "--resume" in flags else [*flags, "--runs-dir", str(runs)]
        process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process.stdout.readline()
        if wait is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=wait)
            process.send_signal(signal.SIGKILL)
        _, err = process.communicate()
        if process.returncode == 0:
            return max(runs.iterdir())
        assert process.returncode == -signal.SIGKILL, err
        return None

    whole = finish(argv, folder / "whole", None)
    seconds = sum(script.load_checkpoint(str(whole))["progress"]["times"].values())
    done, killed, saves = None, 0, 0
    while done is None:
        runs = list((folder / "killed").glob("*"))
        started = [run for run in runs if (run / "checkpoint.pt").exists()]
        for run in set(runs) - set(started):
            shutil.rmtree(run)
        saves += any((run / "checkpoint.tmp").exists() for run in started)
        flags = ["--resume", str(started[0])] if started else argv
        wait = random.uniform(0, 1.5 * seconds / count) if killed < count else None
        done = finish(flags, folder / "killed", wait)
        killed += done is None
    same_run(script, {"run_dir": whole}, {"run_dir": done})
    print(f"{name}: {killed} kills, {saves} during a checkpoint's writing: the same weights, metrics and evaluations")


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


def main(what: tyro.conf.Positional[Literal["kills", "fuzz"]], script: str = "edp_iql", count: int = 20) -> None:
    """Kill and resume a run of --script, or read damaged files, --count times."""
    begin = time.time()
    with tempfile.TemporaryDirectory() as folder:
        if what == "kills":
            kills(script, count, Path(folder))
        else:
            fuzz(count, Path(folder))
    print(f"{time.time() - begin:.0f} s")


if __name__ == "__main__":
    tyro.cli(main)

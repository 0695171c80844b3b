"""Runs of edis_sac.py: both phases and a round, files, exact resume, bad arguments."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import same_run

import edis_sac

FAST = "--batch-size 2 --cql-actions 2 --denoiser-updates 2 --denoiser-width 16 --denoiser-layers 1 --samples 20"
FAST += " --sampling-steps 3 --pool 4 --negatives 2 --model-updates 2 --energy-updates 2 --energy-batch 4"
FAST += " --first-round 2 --round-every 2 --synthetic-ratio 0.5 --eval-episodes 2 --offline-updates 3 --online-steps 6"
FAST += " --log-every 2 --eval-every 4 --save-every 3 --env-id hopper-medium-v2"


@pytest.fixture
def run(hopper_file, tmp_path, monkeypatch):
    monkeypatch.setattr(edis_sac, "CHUNK", 8)

    def call(*flags):
        where = ("--dataset-path", str(hopper_file), "--runs-dir", str(tmp_path / "runs"))
        return edis_sac.main(edis_sac.parse_args([*FAST.split(), *where, *flags]))

    return call


@pytest.mark.parametrize(
    "flags",
    [
        "--augmentation edis",
        "--augmentation synther --churn 0",
        "--augmentation offline --cql-alpha 0 --no-calibrate",
        "--augmentation none --cql-alpha-online 1",
        "--state-scale 0 --normalize-observations",
        "--conditional-negatives inpainted --no-full-gradient --inpainting-repeats 2",
    ],
)
def test_branches(run, flags):
    result = run(*flags.split())
    folder = Path(result["run_dir"])
    assert result["updates"] == 9 and json.loads((folder / "result.json").read_text()) == result
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any("losses/denoiser_loss" in row for row in rows) == ("offline" not in flags and "none" not in flags)


@pytest.mark.parametrize("stopped_at", [2, 5, 8])
def test_resume_is_exact(run, tmp_path, monkeypatch, stopped_at):
    whole, make_update = edis_sac.load_checkpoint(run()["run_dir"]), edis_sac.make_update

    def stopping(*args):
        update, optimizers = make_update(*args)
        calls = []

        def stopped(*batch):
            calls.append(1)
            if len(calls) == stopped_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return update(*batch)

        return stopped, optimizers

    with monkeypatch.context() as patch:
        patch.setattr(edis_sac, "make_update", stopping)
        with pytest.raises(SystemExit) as caught:
            run()
    assert caught.value.code == 143
    folders = sorted((tmp_path / "runs").iterdir(), key=lambda path: path.stat().st_mtime)
    resumed = edis_sac.load_checkpoint(run("--resume", str(folders[-1]))["run_dir"])
    for name in ("actor", "critic", "denoiser", "energies", "model"):
        assert all(torch.equal(value, resumed[name][key]) for key, value in whole[name].items()), name
    assert torch.equal(whole["online"], resumed["online"])


def test_bad_arguments(run, capsys):
    with pytest.raises(SystemExit) as caught:
        run("--conditional-negatives", "inpainted")
    assert caught.value.code == 2 and "--no-full-gradient" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["signal", "crash"])
def test_a_round_is_made_again(run, tmp_path, monkeypatch, how):
    """A signal ends a round at once; the resume makes it again and ends the same."""
    whole = run()

    def ends(*args):
        if how == "crash":
            raise KeyError("crash")
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("went on")

    with monkeypatch.context() as patch:
        patch.setattr(edis_sac, "train_energies", ends)
        with pytest.raises((SystemExit, KeyError)) as caught:
            run()
    assert how == "crash" or caught.value.code == 143
    folders = sorted((tmp_path / "runs").iterdir(), key=lambda path: path.stat().st_mtime)
    saved = edis_sac.load_checkpoint(str(folders[-1]))
    assert saved["step"] == 5
    same_run(edis_sac, whole, run("--resume", str(folders[-1])))


def test_runs_share_a_pretrained_agent(run, tmp_path):
    agent = run("--online-steps", "0")["run_dir"]
    results = {}
    for augmentation in ("edis", "none", "edis "):
        folder = shutil.copytree(agent, tmp_path / augmentation.replace(" ", "2"))
        flags = ("--resume", str(folder), "--augmentation", augmentation.strip(), "--online-steps", "6")
        result = run(*flags)
        assert result["run_dir"] == str(folder) and result["updates"] == 9
        results[augmentation] = edis_sac.load_checkpoint(str(folder))["actor"]
    whole = edis_sac.load_checkpoint(run()["run_dir"])["actor"]
    same = [all(torch.equal(value, found[key]) for key, value in whole.items()) for found in results.values()]
    assert same == [True, False, True]
    with pytest.raises(SystemExit):
        run("--resume", str(tmp_path / "none"), "--gamma", "0.9", "--online-steps", "7")

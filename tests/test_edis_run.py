"""Runs of edis_sac.py: both phases and a round, files, resume. Exact resume after a signal is in test_run.py."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import error_of, newest, resume, rows_of, same_run, step_of

import edis_sac


@pytest.mark.parametrize("flags", [
    "--augmentation edis", "--augmentation synther --churn 0", "--augmentation offline --cql-alpha 0 --no-calibrate",
    "--augmentation none --cql-alpha-online 1", "--state-scale 0 --normalize-observations",
    "--conditional-negatives inpainted --no-full-gradient --inpainting-repeats 2",
])  # fmt: skip
def test_branches(run, flags):
    result = run(edis_sac, *flags.split())
    assert result["updates"] == 9 and json.loads((Path(result["run_dir"]) / "result.json").read_text()) == result
    rounds = any("losses/denoiser_loss" in row for row in rows_of(result["run_dir"]))
    assert rounds == ("offline" not in flags and "none" not in flags)


def test_bad_arguments(run, capsys):
    assert "--no-full-gradient" in error_of(capsys, lambda: run(edis_sac, "--conditional-negatives", "inpainted"))


@pytest.mark.parametrize("how", ["signal", "crash"])
def test_a_round_is_made_again(run, tmp_path, monkeypatch, how):
    """A signal ends a round at once; the resume makes it again and ends the same."""
    whole = run(edis_sac)

    def ends(*args):
        if how == "crash":
            raise KeyError("crash")
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("went on")

    with monkeypatch.context() as patch:
        patch.setattr(edis_sac, "train_energies", ends)
        with pytest.raises((SystemExit, KeyError)) as caught:
            run(edis_sac)
    assert how == "crash" or caught.value.code == 143
    folder = newest(tmp_path)
    assert step_of(edis_sac, folder) == 5
    same_run(edis_sac, whole, resume(edis_sac, folder))


def test_runs_share_a_pretrained_agent(run, tmp_path, capsys):
    agent = run(edis_sac, "--online-steps", 0)["run_dir"]
    whole = edis_sac.load_checkpoint(run(edis_sac)["run_dir"])["actor"]
    for name, augmentation, same in (("a", "edis", True), ("b", "none", False), ("c", "edis", True)):
        folder = shutil.copytree(agent, tmp_path / name)
        result = resume(edis_sac, folder, "--augmentation", augmentation, "--online-steps", 6)
        assert result["run_dir"] == str(folder) and result["updates"] == 9
        found = edis_sac.load_checkpoint(str(folder))["actor"]
        assert all(torch.equal(value, found[key]) for key, value in whole.items()) == same
    changed = ("--gamma", 0.9, "--online-steps", 7)
    assert "--gamma" in error_of(capsys, lambda: resume(edis_sac, folder, *changed))


def test_online_rows_and_batches(run, monkeypatch):
    """Rows follow each other, returns are of episodes that ended; a batch has its share of synthetic rows."""
    batches, make_update = [], edis_sac.make_update

    def make(*args):
        update, optimizers = make_update(*args)
        record = lambda *batch: batches.append(torch.cat([x.view(4, -1) for x in batch[:-1]], 1)) or update(*batch)  # noqa: E731
        return record, optimizers

    monkeypatch.setattr(edis_sac, "make_update", make)
    folder = run(edis_sac, "--online-steps", 60, "--batch-size", 4, "--round-every", 57)["run_dir"]
    saved = edis_sac.load_checkpoint(folder)
    s, _, next_s, r, mask, mc = saved["online"].split([11, 3, 11, 1, 1, 1], dim=1)
    ends = (mask[:, 0] == 0).nonzero()[:, 0].tolist()
    assert len(s) == 60 and len(ends) > 1  # Hopper falls
    for i in range(59):
        assert torch.equal(s[i + 1], next_s[i]) == (i not in ends)
        if i <= ends[-1]:
            assert mc[i].item() == pytest.approx((r[i] + (0 if i in ends else 0.99 * mc[i + 1])).item(), rel=1e-5)
    assert mc[ends[-1] + 1 :].isneginf().all()
    found = [[bool((rows == x).all(1).any()) for x in batches[-1]] for rows in (saved["synthetic"], saved["online"])]
    assert found == [[True, True, False, False], [False, False, True, True]]

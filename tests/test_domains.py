"""The domains beside locomotion: D4RL's Adroit ids, and Minari sets recorded here, in all four scripts."""

import importlib

import gymnasium as gym
import numpy as np
import pytest
from conftest import SCRIPTS, argv_of, error_of, make_columns, record_minari, write_hdf5

import edp_iql

SETS = {  # Minari id: environment, options
    "D4RL/antmaze/umaze-diverse-v9": ("AntMaze_UMaze-v5", {"continuing_task": False}),
    "D4RL/pen/human-v9": ("AdroitHandPen-v1", {}),
    "test/pointmaze-v9": ("PointMaze_UMaze-v3", {"continuing_task": False}),
}


@pytest.fixture(scope="module")
def minari_sets(tmp_path_factory):
    """Three episodes of 20 random steps of each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        import gymnasium_robotics

        gym.register_envs(gymnasium_robotics)
        for name, (env_id, options) in SETS.items():
            record_minari(name, gym.make(env_id, max_episode_steps=20, **options), episodes=3, steps=20)
        yield


def train(name, tmp_path, *flags):
    """A run of a few updates with the data set's preset; its arguments and result."""
    script = importlib.import_module(name)
    args = script.parse_args(argv_of(script, "--eval-episodes", 1, "--runs-dir", tmp_path / "runs", *flags))
    return args, script.main(args)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("env_id", SETS)
def test_minari_sets(minari_sets, tmp_path, name, env_id):
    args, result = train(name, tmp_path, "--env-id", env_id)
    assert np.isfinite(result["episodic_return"]["last"]) and result["success"]["last"] in (0, 1)
    sparse = {"edp_iql": "minus-one", "edis_sac": "minus-one"}.get(name, "times-four")
    expected = {"D4RL/antmaze/umaze-diverse-v9": sparse, "D4RL/pen/human-v9": "min-max"}.get(env_id, "none")
    assert args.reward_transform == expected
    if name == "edp_iql" and "antmaze" in env_id:
        assert (args.expectile, args.max_grad_norm) == (0.9, 3)


@pytest.mark.parametrize("name", SCRIPTS)
def test_adroit_of_d4rl(tmp_path, name, monkeypatch):
    """From D4RL's file; the score is D4RL's."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    write_hdf5(tmp_path / "door-human-v1.hdf5", make_columns(obs_dim=39, act_dim=28))
    args, result = train(name, tmp_path, "--env-id", "door-human-v1")
    assert args.reward_transform == "min-max" and result["success"]["last"] in (0, 1)
    score = 100 * (result["episodic_return"]["last"] + 56.512833) / (2880.569309 + 56.512833)
    assert result["normalized_score"]["last"] == pytest.approx(score)


def test_step_limits_are_those_of_d4rl(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    for hand, shape, limit in (("pen", (45, 24), 100), ("hammer", (46, 26), 200), ("relocate", (39, 30), 200)):
        write_hdf5(tmp_path / f"{hand}-cloned-v1.hdf5", make_columns(obs_dim=shape[0], act_dim=shape[1]))
        env = edp_iql.load_task(edp_iql.Args(env_id=f"{hand}-cloned-v1"))[1]()
        env.reset(seed=0)
        steps = next(i for i in range(1, 999) if any(env.step(env.action_space.sample())[2:4]))
        assert steps == limit


def test_environments_that_are_not_there(tmp_path, capsys):
    """AntMaze of D4RL: the data load, nothing is evaluated. Kitchen with today's MuJoCo: one line says what helps."""
    path = write_hdf5(tmp_path / "antmaze.hdf5", make_columns(obs_dim=29, act_dim=8))
    columns, make_env, _ = edp_iql.load_task(edp_iql.Args(env_id="antmaze-umaze-v2", dataset_path=str(path)))
    assert len(columns["rewards"]) == 600 and make_env is None and "no evaluation" in capsys.readouterr().out
    args = edp_iql.Args(env_id="gymnasium_robotics:FrankaKitchen-v1", dataset_path=str(path))
    assert "mujoco<3.12" in error_of(capsys, lambda: edp_iql.load_task(args))

"""Data: D4RL's rows, transforms, downloads, bad files, Minari, bundled sets. edp_iql stands for all scripts."""

import http.server
import json
import os
import threading
import warnings

import gymnasium as gym
import h5py
import numpy as np
import pytest
from conftest import ROOT, error_of, make_columns, record_minari, write_hdf5

import edp_iql


def args_of(**changes):
    return edp_iql.Args(**{"env_id": "Hopper-v4", **changes})


def transitions_of(columns, **changes):
    columns = dict(columns)
    edp_iql.check(columns)
    return edp_iql.make_transitions(columns, args_of(**changes))


def load(path, env_id="Hopper-v4", **changes):
    return edp_iql.load_task(args_of(env_id=env_id, dataset_path=str(path), **changes))


def reference_rows(columns):
    """Rows that D4RL's qlearning_dataset keeps, one row at a time: all but timeouts and the last one."""
    obs, rows = columns["observations"], []
    following = columns.get("next_observations", obs[1:])
    for i in range(len(obs) - 1):
        if not columns["timeouts"][i]:
            action, mask = columns["actions"][i].clip(-0.999, 0.999), 1.0 - columns["terminals"][i]
            rows.append(np.hstack([obs[i], action, following[i], columns["rewards"][i], mask]))
    return np.array(rows, np.float32)


@pytest.mark.parametrize("drop", ["", "next_observations"])
def test_rows_of_qlearning_dataset(drop):
    columns = make_columns(rows=1_500)
    columns["terminals"], columns["timeouts"] = np.random.default_rng(0).random((2, 1_500)) < 0.04
    columns["actions"][::7] = 1.0
    columns.pop(drop, None)
    transitions, transform = transitions_of(columns)
    assert transitions.dtype == np.float32 and transform["scale"] == 1
    np.testing.assert_array_equal(transitions, reference_rows(columns))


def test_returns_of_a_dump_of_qlearning_dataset():
    """No timeouts, no timeout rows: an episode also ends where the next row does not go on."""
    columns = make_columns(rows=600)
    goes_on = ~(columns["terminals"] | columns["timeouts"])[:-1]
    columns["next_observations"][:-1][goes_on] = columns["observations"][1:][goes_on]
    rows = {key: column[:-1][~columns["timeouts"][:-1]] for key, column in columns.items()}
    del rows["timeouts"]
    starts, ends = range(0, 600, 50), columns["timeouts"]
    for given, dropped in ((columns, ends & False), (rows, ends)):  # the row of a timeout is not in the dump
        transitions, transform = transitions_of(given, reward_transform="return-range")
        returns = [(columns["rewards"] * ~dropped)[i : i + 50].sum(dtype=np.float64) for i in starts]
        assert transform["scale"] == pytest.approx(1_000 / np.ptp(returns))
        assert (transitions[:, -1] == 0).sum() == 6  # terminals, not all ends


def test_transforms():
    columns = {**make_columns(rows=6), "rewards": np.arange(1, 7, dtype=np.float32)}  # returns 3, 7, unfinished 11
    columns["terminals"], columns["timeouts"] = np.array([[0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0]], bool)
    expected = {"none": 1.0, "return-range": 1000 / 8, "minus-one": 0.0, "times-four": 2.0, "min-max": -1.0}
    for name, first in expected.items():
        rows, t = transitions_of(columns, reward_transform=name)
        assert rows[0, 25] == pytest.approx(first)
        np.testing.assert_allclose(rows[:, 25], t["scale"] * (np.array([1, 2, 3, 5]) + t["shift"]), rtol=1e-6)
    columns["observations"] *= np.arange(1, 12, dtype=np.float32)
    rows, t = transitions_of(columns, normalize_observations=True)
    mean, std = columns["observations"].mean(0), columns["observations"].std(0)
    np.testing.assert_allclose([t["mean"], t["std"]], [mean, std], rtol=1e-5, atol=1e-5)
    for part, key in ((rows[:, :11], "observations"), (rows[:, 14:25], "next_observations")):
        np.testing.assert_allclose(part, (columns[key][[0, 1, 2, 4]] - mean) / std, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["timeouts", "episode_terminals", "truncations", "truncated"])
def test_columns_of_other_names_types_and_shapes(tmp_path, name):
    """(N, 1), integers and float64; ends as d3rlpy and others write them: at terminal rows too."""
    columns = make_columns()
    del columns["next_observations"]
    expected, ends = reference_rows(columns), columns.pop("timeouts")
    columns[name] = (ends if name == "timeouts" else ends | columns["terminals"]).reshape(-1, 1).astype(np.float64)
    columns["terminals"] = columns["terminals"].reshape(-1, 1).astype(np.int64)
    columns["rewards"] = columns["rewards"].reshape(-1, 1)
    columns["observations"] = columns["observations"].astype(np.float64)
    read = load(write_hdf5(tmp_path / "odd.hdf5", columns))[0]
    np.testing.assert_array_equal(edp_iql.make_transitions(read, args_of())[0], expected)


BAD = {
    "actions' doesn't exist": lambda c: c.pop("actions"),
    "needs timeouts or next_observations": lambda c: (c.pop("timeouts"), c.pop("next_observations")),
    "rewards has shape": lambda c: c.update(rewards=c["rewards"][:-1]),
    "actions has shape": lambda c: c.update(actions=c["actions"][:-1]),
    "next_observations has shape": lambda c: c.update(next_observations=c["next_observations"][:, 1:]),
    "rewards has values": lambda c: c.update(rewards=np.full(600, b"x")),
    "observations has values": lambda c: c["observations"].__setitem__((3, 2), np.nan),
    "actions has values": lambda c: c["actions"].__setitem__((3, 2), np.inf),
    "rewards": lambda c: c.update(rewards="text"),
    "timeouts has shape": lambda c: c.update(timeouts=h5py.Empty("f4")),
    "terminals has values": lambda c: c.update(terminals=np.full(600, 0.5)),
    "no transition": lambda c: c.update({key: column[:1] for key, column in c.items()}),
    "hold no transition": lambda c: c.update({key: column[:0] for key, column in c.items()}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_content(tmp_path, capsys, message):
    columns = make_columns()
    BAD[message](columns)
    path = write_hdf5(tmp_path / "bad.hdf5", columns)
    line = error_of(capsys, lambda: edp_iql.make_transitions(load(path)[0], args_of()))
    assert message.split(" has shape")[0] in line and ("bad.hdf5" in line or "no transition" in message)


@pytest.mark.parametrize("content", ["nothing", "folder", "half", b"", b"<html>not data</html>"])
def test_not_a_data_file(tmp_path, capsys, content):
    path, whole = tmp_path / "bad.hdf5", write_hdf5(tmp_path / "whole.hdf5", make_columns()).read_bytes()
    if content == "folder":
        path.mkdir()
    elif content != "nothing":
        path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    assert "bad.hdf5" in error_of(capsys, lambda: load(path))


def test_masks_given_as_terminals_are_told(tmp_path, capsys):
    columns = make_columns()
    load(write_hdf5(tmp_path / "masks.hdf5", columns | {"terminals": ~columns["terminals"]}))
    assert "warning: more than half of the rows are terminal" in capsys.readouterr().err


def test_a_file_that_is_only_read(hopper_file, monkeypatch):
    """Where it cannot be written to, or the file system knows no locks."""
    opened, file = [], h5py.File
    monkeypatch.setattr(h5py, "File", lambda *a, **options: opened.append(options) or file(*a, **options))
    hopper_file.chmod(0o444)
    assert len(load(hopper_file)[0]["rewards"]) == 600 and opened[0]["locking"] is False


def test_wrong_environments(tmp_path, hopper_file, capsys):
    """Other shapes, actions that are no vectors, actions out of range without an environment that tells it."""
    for env_id, told in (("walker2d-medium-v2", "Walker2d-v4"), ("Pendulum-v1", "Pendulum"), ("CartPole-v1", "Box")):
        assert told in error_of(capsys, lambda e=env_id: load(hopper_file, e))
    columns = make_columns()
    path = write_hdf5(tmp_path / "far.hdf5", columns | {"actions": 2 * columns["actions"]})
    assert "[-1, 1]" in error_of(capsys, lambda: load(path, "my-robot", eval_episodes=0))


def test_actions_of_another_range(tmp_path, capsys):
    """Pendulum's torque reaches 2: data and environment are rescaled alike. What is beyond the range is told."""
    columns = make_columns(obs_dim=3, act_dim=1)
    columns["actions"] *= 2
    path = write_hdf5(tmp_path / "own.hdf5", columns)
    read, make_env, _ = load(path, "Pendulum-v1")
    np.testing.assert_array_equal(read["actions"], columns["actions"] / 2)
    env, own = make_env(), gym.make("Pendulum-v1")
    for e in (env, own):
        e.reset(seed=0)
    np.testing.assert_allclose(env.step(np.array([0.4]))[0], own.step(np.array([0.8], np.float32))[0], rtol=1e-6)
    assert "warning" not in capsys.readouterr().err
    columns["actions"][:60] = 3
    load(write_hdf5(path, columns), "Pendulum-v1")
    assert "warning: 10.0% of the actions" in capsys.readouterr().err


def test_unknown_ids(capsys, hopper_file, monkeypatch, tmp_path):
    """Close ids are named, with a file too: no run without evaluation by a slip of the keyboard."""
    assert "hopper-medium-v2" in error_of(capsys, lambda: edp_iql.load_task(args_of(env_id="hoper-medium-v2")))
    assert "hopper-medium-v2" in error_of(capsys, lambda: load(hopper_file, "hoper-medium-v2"))
    assert not edp_iql.find_preset(args_of(env_id="my-mini")).keys() & edp_iql.MINI.keys()  # not one of ours
    columns, make_env, reference = load(hopper_file, "my-robot", eval_episodes=0)[:3]
    assert len(columns["rewards"]) == 600 and make_env is None and reference is None
    monkeypatch.setattr(edp_iql, "__file__", str(tmp_path / "edp_iql.py"))  # a copied script tells where data are
    line = error_of(capsys, lambda: edp_iql.load_task(edp_iql.Args()))
    assert "hopper-medium-replay-mini.hdf5 is missing" in line and "datasets/" in line


def test_a_module_of_ones_own(tmp_path, hopper_file, monkeypatch, capsys):
    """module:Env-v0 imports the module that registers it. Without a step limit, episodes are as long as the data's."""
    (tmp_path / "my_envs.py").write_text(
        "import gymnasium as gym\nfrom gymnasium.envs.mujoco.hopper_v4 import HopperEnv\n"
        "gym.register('Endless-v0', HopperEnv, kwargs={'terminate_when_unhealthy': False})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    env, steps = load(hopper_file, "my_envs:Endless-v0")[1](), 1
    assert "end after 50 steps" in capsys.readouterr().out
    env.reset(seed=0)
    while not env.step(np.zeros(3))[3]:
        steps += 1
    assert steps == 50


def test_environments_of_d4rl(monkeypatch, tmp_path):
    """Each agent's environment has the shapes of its files, and no deprecation warning is seen."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    agents = {"hopper": (11, 3, -20.272305, 3234.3), "walker2d": (17, 6, 1.629008, 4592.3),
              "halfcheetah": (17, 6, -280.178953, 12135.0), "ant": (111, 8, -325.6, 3879.7)}  # fmt: skip
    assert len(edp_iql.D4RL) == 36
    for agent, (obs_dim, act_dim, *expected) in agents.items():
        write_hdf5(tmp_path / f"{agent}_medium_replay-v2.hdf5", make_columns(obs_dim=obs_dim, act_dim=act_dim))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            columns, make_env, reference = edp_iql.load_task(args_of(env_id=f"{agent}-medium-replay-v2"))[:3]
            env = make_env()
        assert env.unwrapped.spec.id.endswith("-v4") and env.observation_space.shape == (obs_dim,)
        assert env.spec.max_episode_steps == 1_000
        assert len(columns["rewards"]) == 600 and list(reference) == expected


@pytest.mark.parametrize("case", ["whole", "forbidden", "truncated"])
def test_download(monkeypatch, hopper_file, tmp_path, capsys, case):
    """From the mirror where the first address fails; then from the folder."""
    routes, requests, whole, name = {}, [], hopper_file.read_bytes(), "hopper_medium-v2.hdf5"

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            status, body, length = routes.get(self.path, (404, b"not here", 8))
            self.wfile.write(f"HTTP/1.0 {status} told\r\nContent-Length: {length}\r\n\r\n".encode() + body)

        log_message = print

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    url, args = f"http://127.0.0.1:{server.server_port}", args_of(env_id="hopper-medium-v2")
    monkeypatch.setattr(edp_iql, "D4RL_URL", f"{url}/first/")
    monkeypatch.setattr(edp_iql, "MIRROR", f"{url}/mirror/")
    line = error_of(capsys, lambda: edp_iql.load_task(args))
    assert name in line and "download" in line
    size = len(whole)
    first = {"whole": (200, whole, size), "forbidden": (403, b"", 0), "truncated": (200, whole[:999], size)}
    routes |= {f"/first/gym_mujoco_v2/{name}": first[case], f"/mirror/{name}": (200, whole, size)}
    requests.clear()
    for _ in range(2):
        assert len(edp_iql.load_task(args)[0]["rewards"]) == 600
        assert len(requests) == (1 if case == "whole" else 2)
    assert os.listdir(tmp_path / "d4rl") == [name]


class Goal(gym.Env):
    """Dict observations, built in an order that is not the sorted one."""

    action_space, position = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-9, 9, (3,), np.float64)
    observation_space = gym.spaces.Dict([("position", position), ("goal", gym.spaces.Box(-9, 9, (1,), np.float64))])

    def state(self):
        return {"position": np.full(3, self.t, np.float64), "goal": np.full(1, -1.0)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.state(), {}

    def step(self, action):
        self.t += 1
        return self.state(), float(self.t), self.t == 7, False, {"success": self.t == 7}


gym.register("MinariGoal-v0", entry_point="test_data:Goal", max_episode_steps=5)


def test_minari(monkeypatch, tmp_path, capsys):
    """Data and environment are flattened alike; an episode that ends with neither flag was cut."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    import minari

    options = {"eval_env": "MinariGoal-v0", "ref_min_score": 0.0, "ref_max_score": 15.0}
    record_minari("test/goal-v0", gym.make("MinariGoal-v0"), episodes=3, steps=5, cut=[1], **options)
    args = args_of(env_id="test/goal-v0")
    columns, make_env, reference = edp_iql.load_task(args)[:3]
    assert columns["observations"].shape == (15, 4)
    assert np.flatnonzero(columns["timeouts"]).tolist() == [4, 9, 14] and not columns["terminals"].any()
    np.testing.assert_array_equal(columns["observations"][2], [-1, 2, 2, 2])  # goal before position
    np.testing.assert_array_equal(columns["next_observations"][2], [-1, 3, 3, 3])
    env = make_env()
    np.testing.assert_array_equal(env.reset(seed=0)[0], columns["observations"][0])
    np.testing.assert_array_equal(env.step(np.zeros(2))[0], columns["next_observations"][0])
    assert len(edp_iql.make_transitions(columns, args)[0]) == 12 and reference == (0.0, 15.0)
    assert "evaluated in an environment of its own" not in capsys.readouterr().out
    monkeypatch.setattr(minari, "load_dataset", lambda *a, **k: 1 / 0)
    assert "test/none-v0" in error_of(capsys, lambda: edp_iql.load_task(args_of(env_id="test/none-v0")))


@pytest.mark.parametrize("name", ["hopper-medium-mini", "hopper-medium-replay-mini", "hopper-medium-expert-mini"])
def test_bundled_set(name):
    """D4RL's layout, the published statistics, and physics that the installed simulator repeats."""
    columns, make_env, reference = edp_iql.load_task(args_of(env_id=name))[:3]
    statistics = json.loads((ROOT / "datasets" / "statistics.json").read_text())[name]
    assert np.array_equal(np.unique([c.dtype for c in columns.values()]).astype(str), ["bool", "float32"])
    with h5py.File(ROOT / "datasets" / f"{name}.hdf5") as file:
        qpos, qvel = file["infos/qpos"][()], file["infos/qvel"][()]
        assert file["metadata/env_id"][()].decode() == make_env().unwrapped.spec.id
    ends = columns["terminals"] | columns["timeouts"]
    returns = np.diff(np.cumsum(columns["rewards"], dtype=np.float64)[ends], prepend=0.0)
    found = {"episodes": len(returns)} | {f"return_{k}": getattr(returns, k)() for k in ("mean", "std", "min", "max")}
    assert {"transitions": len(columns["rewards"]), **found} == pytest.approx(statistics, abs=0.1)
    assert tuple(reference) == (-20.272305, 3234.3)
    env = make_env().unwrapped
    env.reset(seed=0)
    for i in range(0, len(qpos), 5_000):
        env.set_state(qpos[i].astype(np.float64), qvel[i].astype(np.float64))
        next_obs, reward, terminated, *_ = env.step(columns["actions"][i])
        np.testing.assert_allclose(next_obs, columns["next_observations"][i], atol=2e-3)
        assert reward == pytest.approx(columns["rewards"][i], abs=2e-3) and terminated == columns["terminals"][i]

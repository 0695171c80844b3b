"""Data: D4RL's rows, transforms, downloads, bad files, Minari, bundled sets.

The code is the same in all scripts (test_shared_code.py): edp_iql stands for them.
"""

import http.server
import json
import os
import threading
import warnings

import gymnasium as gym
import h5py
import numpy as np
import pytest
from conftest import ROOT, error_of, make_columns, write_hdf5

import edp_iql

BUNDLED = ("hopper-medium-mini", "hopper-medium-replay-mini", "hopper-medium-expert-mini")


def args_of(**changes):
    return edp_iql.Args(**{"env_id": "Hopper-v4", **changes})


def transitions_of(columns, **changes):
    columns = dict(columns)
    edp_iql.check(columns)
    return edp_iql.make_transitions(columns, args_of(**changes))


def load(path, env_id="Hopper-v4", **changes):
    return edp_iql.load_task(args_of(env_id=env_id, dataset_path=str(path), **changes))


# --------------------------------------------------------------------------------------------------------------- rows
def reference_rows(columns):
    """Rows that D4RL's qlearning_dataset keeps, one row at a time: all but timeouts and the last one."""
    kept = [i for i in range(len(columns["rewards"]) - 1) if not columns["timeouts"][i]]
    rows = []
    for i in kept:
        following = (
            columns["next_observations"][i] if "next_observations" in columns else columns["observations"][i + 1]
        )
        actions = columns["actions"][i].clip(-0.999, 0.999)
        row = (columns["observations"][i], actions, following, columns["rewards"][i], 1.0 - columns["terminals"][i])
        rows.append(np.hstack(row))
    return np.array(rows, np.float32)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("with_next", [True, False])
def test_rows_of_qlearning_dataset(seed, with_next):
    columns, rng = make_columns(rows=300, seed=seed), np.random.default_rng(seed)
    columns["terminals"], columns["timeouts"] = rng.random((2, 300)) < 0.04
    columns["actions"][::7] = 1.0
    if not with_next:
        del columns["next_observations"]
    expected = reference_rows(columns)
    transitions, transform = transitions_of(columns)
    assert transitions.dtype == np.float32 and transform["scale"] == 1
    np.testing.assert_array_equal(transitions, expected)


def test_returns_of_a_dump_of_qlearning_dataset():
    """No timeouts, no timeout rows: an episode also ends where the next row does not go on."""
    columns = make_columns(rows=600)
    columns["next_observations"][:-1] = np.where(
        (columns["terminals"] | columns["timeouts"])[:-1, None], 9.0, columns["observations"][1:]
    )
    rows = {key: column[:-1][~columns["timeouts"][:-1]] for key, column in columns.items()}
    del rows["timeouts"]
    starts, ends = range(0, 600, 50), columns["timeouts"]
    for given, dropped in ((columns, ends & False), (rows, ends)):  # the row of a timeout is not in the dump
        transitions, transform = transitions_of(given, reward_transform="return-range")
        returns = [(columns["rewards"] * ~dropped)[i : i + 50].sum(dtype=np.float64) for i in starts]
        assert transform["scale"] == pytest.approx(1_000 / np.ptp(returns))
        assert (transitions[:, -1] == 0).sum() == 6  # terminals, not all ends


def test_neither_timeouts_nor_next_observations(tmp_path, capsys):
    """Which rows follow each other is not known."""
    columns = make_columns()
    for key in ("timeouts", "next_observations"):
        del columns[key]
    line = error_of(capsys, lambda: load(write_hdf5(tmp_path / "own.hdf5", columns)))
    assert "timeouts" in line and "next_observations" in line


def test_transforms():
    columns = {**make_columns(rows=6), "terminals": np.array([0, 1, 0, 0, 0, 0], bool)}
    columns["rewards"] = np.array([1, 2, 3, 4, 5, 6], np.float32)
    columns["timeouts"] = np.array([0, 0, 0, 1, 0, 0], bool)  # returns 3, 7 and, unfinished, 11
    expected = {"none": 1.0, "return-range": 1000 / 8, "minus-one": 0.0, "times-four": 2.0, "min-max": -1.0}
    for name, first in expected.items():
        rows, t = transitions_of(columns, reward_transform=name)
        assert rows[0, 25] == pytest.approx(first)
        np.testing.assert_allclose(rows[:, 25], t["scale"] * (np.array([1, 2, 3, 5]) + t["shift"]), rtol=1e-6)
    columns["observations"] *= np.arange(1, 12, dtype=np.float32)
    rows, t = transitions_of(columns, normalize_observations=True)
    seen = (columns["observations"] - t["mean"]) / t["std"]
    np.testing.assert_allclose(seen.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(seen.std(0), 1, rtol=1e-5)
    np.testing.assert_allclose(rows[:, :11], seen[[0, 1, 2, 4]], rtol=1e-4, atol=1e-5)
    following = (columns["next_observations"] - t["mean"]) / t["std"]
    np.testing.assert_allclose(rows[:, 14:25], following[[0, 1, 2, 4]], rtol=1e-4, atol=1e-5)


def test_columns_of_any_type_and_shape(tmp_path):
    """(N, 1), integers and float64 are read as what they mean."""
    columns = make_columns()
    odd = {key: columns[key].reshape(-1, 1) for key in ("rewards", "terminals", "timeouts")}
    odd["terminals"] = odd["terminals"].astype(np.int64)
    odd["timeouts"] = odd["timeouts"].astype(np.float64)
    odd["observations"] = columns["observations"].astype(np.float64)
    read = load(write_hdf5(tmp_path / "odd.hdf5", columns | odd))[0]
    assert read["rewards"].shape == (600,)
    np.testing.assert_array_equal(edp_iql.make_transitions(read, args_of())[0], reference_rows(columns))


# ---------------------------------------------------------------------------------------------------------- bad files
BAD = {
    "has no actions": lambda c: c.pop("actions"),
    "rewards has shape": lambda c: c.update(rewards=c["rewards"][:-1]),
    "actions has shape": lambda c: c.update(actions=c["actions"][:-1]),
    "next_observations has shape": lambda c: c.update(next_observations=c["next_observations"][:, 1:]),
    "rewards has values": lambda c: c.update(rewards=np.full(600, b"x")),
    "observations has values": lambda c: c["observations"].__setitem__((3, 2), np.nan),
    "actions has values": lambda c: c["actions"].__setitem__((3, 2), np.inf),
    "rewards": lambda c: c.update(rewards="text"),
    "timeouts has shape": lambda c: c.update(timeouts=h5py.Empty("f4")),
    "terminals has values": lambda c: c.update(terminals=np.full(600, 0.5)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_content(tmp_path, capsys, message):
    columns = make_columns()
    BAD[message](columns)
    line = error_of(capsys, lambda: load(write_hdf5(tmp_path / "bad.hdf5", columns)))
    assert message.split(" has shape")[0] in line and "bad.hdf5" in line


@pytest.mark.parametrize("content", [None, b"", b"<html>not data</html>", "half", "folder"])
def test_not_a_data_file(tmp_path, capsys, content):
    path = tmp_path / "bad.hdf5"
    if content == "folder":
        path.mkdir()
    elif content == "half":
        whole = write_hdf5(tmp_path / "whole.hdf5", make_columns()).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif content is not None:
        path.write_bytes(content)
    assert "bad.hdf5" in error_of(capsys, lambda: load(path))


def test_no_transition(capsys):
    for rows in (1, 0):
        columns = make_columns(rows=rows)
        assert "no transition" in error_of(capsys, lambda c=columns: transitions_of(c))


def test_masks_given_as_terminals_are_told(tmp_path, capsys):
    columns = make_columns()
    load(write_hdf5(tmp_path / "good.hdf5", columns))
    assert "warning" not in capsys.readouterr().err
    load(write_hdf5(tmp_path / "masks.hdf5", columns | {"terminals": ~columns["terminals"]}))
    assert "warning: more than half of the rows are terminal" in capsys.readouterr().err


def test_a_file_that_is_only_read(hopper_file, monkeypatch):
    """Where it cannot be written to, or the file system knows no locks."""
    opened, file = [], h5py.File
    monkeypatch.setattr(h5py, "File", lambda *a, **options: opened.append(options) or file(*a, **options))
    hopper_file.chmod(0o444)
    assert len(load(hopper_file)[0]["rewards"]) == 600 and opened[0]["locking"] is False


# -------------------------------------------------------------------------------------------------------- environment
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


@pytest.mark.parametrize("name", ["episode_terminals", "truncations", "truncated"])
def test_ends_of_episodes_by_other_names(tmp_path, name):
    """As d3rlpy and others write them: at terminal rows too."""
    columns = make_columns()
    del columns["next_observations"]
    expected = transitions_of(columns)[0]
    columns[name] = (columns.pop("timeouts") | columns["terminals"]).reshape(-1, 1)
    read = load(write_hdf5(tmp_path / "own.hdf5", columns))[0]
    np.testing.assert_array_equal(edp_iql.make_transitions(read, args_of())[0], expected)


class Endless(gym.Env):
    """No step limit, and no end."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (11,)), gym.spaces.Box(-1, 1, (3,))

    def reset(self, *, seed=None, options=None):
        return np.zeros(11, np.float32), {}

    def step(self, action):
        return np.zeros(11, np.float32), 0.0, False, False, {}


gym.register("Endless-v0", entry_point="test_data:Endless")


def test_an_environment_without_step_limit(hopper_file):
    """Its episodes are as long as the longest of the data: 50 rows."""
    env, steps = load(hopper_file, "Endless-v0")[1](), 1
    env.reset()
    while not env.step(np.zeros(3))[3]:
        steps += 1
    assert steps == 50


def test_unknown_ids(capsys, hopper_file):
    """Close ids are named, with a file too: no run without evaluation by a slip of the keyboard."""
    assert "hopper-medium-v2" in error_of(capsys, lambda: edp_iql.load_task(args_of(env_id="hoper-medium-v2")))
    assert "hopper-medium-v2" in error_of(capsys, lambda: load(hopper_file, "hoper-medium-v2"))
    columns, make_env, reference = load(hopper_file, "my-robot", eval_episodes=0)[:3]
    assert len(columns["rewards"]) == 600 and make_env is None and reference is None


def test_a_copied_script_tells_where_the_data_are(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(edp_iql, "__file__", str(tmp_path / "edp_iql.py"))
    line = error_of(capsys, lambda: edp_iql.load_task(edp_iql.Args()))
    assert "hopper-medium-replay-mini.hdf5 is missing" in line and "datasets/" in line


def test_a_module_of_ones_own(tmp_path, hopper_file, monkeypatch):
    """module:Env-v0 imports the module that registers it."""
    (tmp_path / "my_envs.py").write_text(
        "import gymnasium as gym\n"
        "gym.register('MyHop-v0', entry_point='gymnasium.envs.mujoco.hopper_v4:HopperEnv', max_episode_steps=9)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load(hopper_file, "my_envs:MyHop-v0")[1]().spec.max_episode_steps == 9


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


# ----------------------------------------------------------------------------------------------------------- downloads
NAME = "hopper_medium-v2.hdf5"


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A local server: routes maps a path to (status, body, declared length); it keeps the requests."""
    routes, requests = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            status, body, length = routes.get(self.path, (404, b"not here", None))
            head = f"HTTP/1.0 {status} told\r\nContent-Length: {length or len(body)}\r\n\r\n"
            self.wfile.write(head.encode() + body)

        log_message = print

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    url = f"http://127.0.0.1:{httpd.server_port}"
    monkeypatch.setattr(edp_iql, "D4RL_URLS", (f"{url}/first/", f"{url}/mirror/"))
    yield routes, requests
    httpd.shutdown()


@pytest.mark.parametrize("case", ["whole", "forbidden", "truncated"])
def test_download(server, hopper_file, tmp_path, case):
    """From the mirror where the first address fails; then from the folder."""
    (routes, requests), whole = server, hopper_file.read_bytes()
    routes[f"/mirror/{NAME}"] = (200, whole, None)
    first = {"whole": (200, whole, None), "forbidden": (403, b"", None), "truncated": (200, whole[:999], len(whole))}
    routes[f"/first/gym_mujoco_v2/{NAME}"] = first[case]
    args = args_of(env_id="hopper-medium-v2")
    assert len(edp_iql.load_task(args)[0]["rewards"]) == 600
    assert (f"/mirror/{NAME}" in requests) == (case != "whole")
    assert os.listdir(tmp_path / "d4rl") == [NAME]
    count = len(requests)
    edp_iql.load_task(args)
    assert len(requests) == count


def test_download_fails(server, capsys):
    line = error_of(capsys, lambda: edp_iql.load_task(args_of(env_id="hopper-medium-v2")))
    assert NAME in line and "download" in line


# -------------------------------------------------------------------------------------------------------------- Minari
class Goal(gym.Env):
    """Dict observations, built in an order that is not the sorted one."""

    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    observation_space = gym.spaces.Dict(
        [("position", gym.spaces.Box(-9, 9, (3,), np.float64)), ("goal", gym.spaces.Box(-9, 9, (1,), np.float64))]
    )

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
    from minari.data_collector import EpisodeBuffer

    env, episodes = gym.make("MinariGoal-v0"), []
    for i in range(3):
        obs = [env.reset(seed=i)[0]]
        steps = [env.step(env.action_space.sample()) for _ in range(5)]
        obs += [step[0] for step in steps]
        rewards, terminations, truncations = ([step[column] for step in steps] for column in (1, 2, 3))
        if i == 1:
            truncations = [False] * 5
        observations = {key: np.stack([o[key] for o in obs]) for key in obs[0]}
        actions = np.zeros((5, 2), np.float32)
        episodes.append(EpisodeBuffer(i, i, None, observations, actions, rewards, terminations, truncations))
    minari.create_dataset_from_buffers("test/goal-v0", episodes, env=env, eval_env="MinariGoal-v0", algorithm_name="x",
                                       ref_min_score=0.0, ref_max_score=15.0)  # fmt: skip
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


# ------------------------------------------------------------------------------------------------------------- bundled
@pytest.mark.parametrize("name", BUNDLED)
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

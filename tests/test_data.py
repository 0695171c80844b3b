"""Data: D4RL's rows, transforms, downloads, bad files, Minari, bundled sets."""

import http.server
import json
import multiprocessing
import os
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor

import gymnasium as gym
import h5py
import numpy as np
import pooch
import pytest
from conftest import ROOT, make_columns, write_hdf5

BUNDLED = ("hopper-medium-mini", "hopper-medium-replay-mini", "hopper-medium-expert-mini")


def reference_rows(terminals, timeouts, limit):
    """Rows that D4RL's qlearning_dataset keeps, as its documentation and behaviour have it, one row at a time."""
    kept, counter = [], 0
    for i in range(len(terminals) - 1):
        ends = timeouts[i] if timeouts is not None else counter == limit - 1
        if ends:
            counter = 0
            continue
        if terminals[i]:
            counter = 0
        kept.append(i)
        counter += 1
    return kept


def args_of(script, **changes):
    return script.Args(**{"env_id": "x", **changes})


def error_of(capsys, call):
    """Run, expect exit code 2, return the one line on stderr."""
    with pytest.raises(SystemExit) as caught:
        call()
    assert caught.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("with_timeouts", [True, False])
def test_rows_of_qlearning_dataset(script, seed, with_timeouts):
    rng = np.random.default_rng(seed)
    columns = make_columns(rows=300, seed=seed)
    columns["terminals"] = rng.random(300) < 0.04
    columns["timeouts"] = rng.random(300) < 0.04
    kept = reference_rows(columns["terminals"], columns["timeouts"] if with_timeouts else None, limit=20)
    if not with_timeouts:
        del columns["timeouts"]
    rows, _ = script.make_transitions(columns, args_of(script), limit=20)
    obs, actions = columns["observations"], columns["actions"].clip(-0.999, 0.999)
    expected = np.concatenate(
        [obs, actions, columns["next_observations"], columns["rewards"][:, None], ~columns["terminals"][:, None]],
        axis=1,
    )[kept]
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, expected.astype(np.float32))


def test_next_observation_without_the_key(script):
    columns = make_columns(rows=10)
    del columns["next_observations"]
    rows, _ = script.make_transitions(columns, args_of(script))
    np.testing.assert_array_equal(rows[:, 14:25], columns["observations"][1:])


def test_actions_are_clipped(script):
    columns = make_columns(rows=10)
    columns["actions"][:] = 1.0
    rows, _ = script.make_transitions(columns, args_of(script))
    np.testing.assert_array_equal(rows[:, 11:14], np.float32(0.999))


def test_transforms(script):
    columns = {**make_columns(rows=6), "terminals": np.array([0, 1, 0, 0, 0, 0], bool)}
    columns["rewards"] = np.array([1, 2, 3, 4, 5, 6], np.float32)
    columns["timeouts"] = np.array([0, 0, 0, 1, 0, 0], bool)  # returns 3, 7 and, unfinished, 11
    expected = {"none": 1.0, "return-range": 1000 / 8, "minus-one": 0.0, "times-four": 2.0, "min-max": -1.0}
    for name, first in expected.items():
        rows, transform = script.make_transitions(columns, args_of(script, reward_transform=name))
        assert rows[0, 25] == pytest.approx(first)
        np.testing.assert_allclose(rows[:, 25], transform.reward(columns["rewards"][[0, 1, 2, 4]]), rtol=1e-6)
    columns["observations"] *= np.arange(1, 12, dtype=np.float32)
    for kind, axis in (("scalar", None), ("per-dimension", 0)):
        rows, transform = script.make_transitions(columns, args_of(script, observation_transform=kind))
        seen = transform.obs(columns["observations"])
        np.testing.assert_allclose(seen.mean(axis), 0, atol=1e-5)
        np.testing.assert_allclose(seen.std(axis), 1, rtol=1e-5)
        np.testing.assert_allclose(rows[:, :11], seen[[0, 1, 2, 4]], rtol=1e-4, atol=1e-5)


BAD_FILES = {
    "no actions": lambda c: c.pop("actions"),
    "rewards has shape": lambda c: c.update(rewards=c["rewards"][:-1]),
    "actions has shape": lambda c: c.update(actions=c["actions"][:-1]),
    "next_observations has shape": lambda c: c.update(next_observations=c["next_observations"][:, 1:]),
    "rewards has values that are not finite numbers": lambda c: c.update(rewards=np.full(600, b"x")),
    "no terminals": lambda c: c.update(terminals=0.0),
    "observations has values that are not finite": lambda c: c["observations"].__setitem__((3, 2), np.nan),
    "actions reach 2": lambda c: c["actions"].__setitem__((3, 2), 2.0),
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_bad_content(script, tmp_path, capsys, message):
    columns = make_columns()
    BAD_FILES[message](columns)
    path = write_hdf5(tmp_path / "bad.hdf5", columns)
    line = error_of(capsys, lambda: script.load_task(args_of(script, dataset_path=str(path))))
    assert message.split(" has shape")[0] in line and "bad.hdf5" in line


@pytest.mark.parametrize("content", [None, b"", b"<html>not data</html>", "half"])
def test_not_a_data_file(script, tmp_path, capsys, content):
    path = tmp_path / "bad.hdf5"
    if content == "half":
        whole = write_hdf5(tmp_path / "whole.hdf5", make_columns()).read_bytes()
        content = whole[: len(whole) // 2]
    if content is not None:
        path.write_bytes(content)
    assert "bad.hdf5" in error_of(capsys, lambda: script.load_task(args_of(script, dataset_path=str(path))))


def test_what_is_no_file(script, tmp_path, capsys):
    """A pipe would make the reader wait."""
    os.mkfifo(tmp_path / "pipe")
    assert "not a file" in error_of(capsys, lambda: script.load_task(args_of(script, dataset_path=f"{tmp_path}/pipe")))


def test_odd_columns(script, tmp_path):
    """Scalars, empty data spaces, no dimension."""
    for key in ("observations", "actions", "timeouts"):
        for value in ("text", h5py.Empty("f4"), np.zeros((600, 0))):
            path = write_hdf5(tmp_path / "odd.hdf5", make_columns())
            with h5py.File(path, "r+") as file:
                del file[key]
                file[key] = value
            with pytest.raises(ValueError, match=key):
                script.read_hdf5(path)
    columns = make_columns()
    columns["actions"] = np.full((600, 3), -128, np.int8)
    with pytest.raises(ValueError, match="actions reach 128"):
        script.check(columns)


def test_equal_returns_are_not_stretched(script):
    """But for rounding: their range would be a millionth of a millionth."""
    columns = make_columns(rows=600)
    columns["terminals"][:], columns["timeouts"][:] = False, False
    columns["timeouts"][99::100] = True
    rewards = np.random.default_rng(0).random(100)
    columns["rewards"] = np.concatenate([np.random.default_rng(i).permutation(rewards) for i in range(6)])
    _, transform = script.make_transitions(columns, args_of(script, reward_transform="return-range"))
    assert transform.reward_scale == 1


def test_action_bounds(script, tmp_path, capsys):
    """Pendulum's torque reaches 2."""
    path = write_hdf5(tmp_path / "own.hdf5", make_columns(obs_dim=3, act_dim=1))
    args = args_of(script, env_id="Pendulum-v1", dataset_path=str(path))
    columns, make_env, *_ = script.load_task(args)
    assert "from -1 to 1" in error_of(capsys, lambda: script.make_envs(make_env, args, columns))


def test_wrong_environment(script, hopper_file, capsys):
    args = args_of(script, env_id="walker2d-medium-v2", dataset_path=str(hopper_file))
    columns, make_env, *_ = script.load_task(args)
    line = error_of(capsys, lambda: script.make_envs(make_env, args, columns))
    assert "(11,)" in line and "(17,)" in line and "Walker2d-v4" in line


def test_timeouts_by_the_limit_of_the_environment(script, tmp_path):
    columns = make_columns(rows=200)
    del columns["timeouts"]
    columns["terminals"][:] = False
    obs = np.zeros((200, 10), np.float32)
    columns.update(observations=obs, next_observations=obs, actions=columns["actions"][:, :2])
    path = write_hdf5(tmp_path / "reacher.hdf5", columns)
    loaded, *_ = script.load_task(args_of(script, env_id="Reacher-v5", dataset_path=str(path)))  # 50 steps
    assert np.flatnonzero(loaded["timeouts"]).tolist() == [49, 99, 149, 199]


def test_unknown_id(script, capsys):
    line = error_of(capsys, lambda: script.load_task(args_of(script, env_id="hoper-medium-v2")))
    assert "hopper-medium-v2" in line


def test_missing_bundled_file(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(script, "__file__", str(tmp_path / "copied.py"))
    for agent, told in (("hopper", "copy it from"), ("walker2d", "make it by datasets/collect.py")):
        line = error_of(capsys, lambda agent=agent: script.load_task(args_of(script, env_id=f"{agent}-medium-mini")))
        assert told in line


def test_a_file_under_the_default_id_is_told(script, hopper_file, capsys):
    """Whose presets and environment it gets; an id of one's own says so itself."""
    for env_id, lines in ((script.Args.env_id, 1), ("hopper-medium-v2", 0)):
        script.load_task(args_of(script, env_id=env_id, dataset_path=str(hopper_file)))
        assert capsys.readouterr().err.count(f"note: {hopper_file}") == lines


def test_environments(script, monkeypatch, tmp_path):
    """Each D4RL agent's environment has the shapes of its files, and no deprecation warning is seen."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    sizes = {"hopper": (11, 3), "walker2d": (17, 6), "halfcheetah": (17, 6), "ant": (111, 8)}
    for agent, (obs_dim, act_dim) in sizes.items():
        write_hdf5(tmp_path / f"{agent}_medium_replay-v2.hdf5", make_columns(obs_dim=obs_dim, act_dim=act_dim))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            columns, make_env, reference, source = script.load_task(args_of(script, env_id=f"{agent}-medium-replay-v2"))
            env = make_env()
        assert env.spec.id.endswith("-v4") and env.observation_space.shape == (obs_dim,)
        assert env.spec.max_episode_steps == 1_000
        assert len(columns["rewards"]) == 600 and len(source["sha256"]) == 64
        assert reference == {"hopper": (-20.272305, 3234.3), "walker2d": (1.629008, 4592.3),
                             "halfcheetah": (-280.178953, 12135.0), "ant": (-325.6, 3879.7)}[agent]  # fmt: skip


# -------------------------------------------------------------------------------------------------------- downloads
@pytest.fixture
def server(monkeypatch, tmp_path):
    """A local server: routes maps a path to (status, body, declared length); it counts the requests for each."""
    routes, requests, stop = {}, [], threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            status, body, length = routes.get(self.path, (404, b"not here", None))
            if status == "slow":  # than anybody waits
                return stop.wait(10)
            self.send_response(status)
            if status == 302:
                self.send_header("Location", body.decode())
            self.send_header("Content-Length", str(length or len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield routes, requests, f"http://127.0.0.1:{httpd.server_port}"
    stop.set()
    httpd.shutdown()


NAME = "hopper_medium-v2.hdf5"


@pytest.mark.parametrize("case", [
    "whole", "forbidden, mirror", "html, mirror", "truncated, mirror", "moved to the mirror", "slow, mirror",
])  # fmt: skip
def test_download(script, server, monkeypatch, hopper_file, case):
    routes, requests, url = server
    patient = pooch.HTTPDownloader
    monkeypatch.setattr(pooch, "HTTPDownloader", lambda **o: patient(**{**o, "timeout": o["timeout"] / 30}))
    urls = (url + "/first/{}", url + "/mirror/{}")
    monkeypatch.setattr(script, "D4RL_URLS", urls[:1] if case == "moved to the mirror" else urls)
    whole = hopper_file.read_bytes()
    routes[f"/mirror/{NAME}"] = (200, whole, None)
    routes[f"/first/{NAME}"] = {
        "whole": (200, whole, None),
        "forbidden, mirror": (403, b"forbidden", None),
        "html, mirror": (200, b"<html>please log in</html>", None),
        "truncated, mirror": (200, whole[: len(whole) // 2], len(whole)),
        "moved to the mirror": (302, f"/mirror/{NAME}".encode(), None),
        "slow, mirror": ("slow", b"", None),
    }[case]
    columns, *_, source = script.load_task(args_of(script, env_id="hopper-medium-v2"))
    assert len(columns["rewards"]) == 600
    assert (f"/mirror/{NAME}" in requests) == (case != "whole")
    folder = os.environ["D4RL_DATASET_DIR"]
    assert os.listdir(folder) == [NAME] and source["file"] == os.path.join(folder, NAME)
    count = len(requests)
    script.load_task(args_of(script, env_id="hopper-medium-v2"))
    assert len(requests) == count  # read from the folder


@pytest.mark.parametrize("case", ["forbidden", "html", "truncated", "no network"])
def test_download_fails(script, server, monkeypatch, hopper_file, capsys, case):
    routes, _, url = server
    whole = hopper_file.read_bytes()
    body = {"forbidden": (403, b"", None), "html": (200, b"<html>", None), "truncated": (200, whole[:999], len(whole))}
    routes[f"/{NAME}"] = body.get(case)
    closed = "http://127.0.0.1:9"  # the discard port: nothing listens
    monkeypatch.setattr(script, "D4RL_URLS", ((closed if case == "no network" else url) + "/{}",))
    line = error_of(capsys, lambda: script.load_task(args_of(script, env_id="hopper-medium-v2")))
    assert "cannot download hopper_medium-v2.hdf5" in line and "D4RL_DATASET_DIR" in line
    assert not os.path.exists(os.path.join(os.environ["D4RL_DATASET_DIR"], NAME))
    monkeypatch.setattr(script, "D4RL_URLS", (url + "/{}",))
    routes[f"/{NAME}"] = (200, whole, None)  # tried again when the server is back
    assert len(script.load_task(args_of(script, env_id="hopper-medium-v2"))[0]["rewards"]) == 600


def test_data_folder_is_a_file(script, server, monkeypatch, hopper_file, capsys):
    routes, _, url = server
    routes[f"/{NAME}"] = (200, hopper_file.read_bytes(), None)
    monkeypatch.setattr(script, "D4RL_URLS", (url + "/{}",))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(hopper_file))
    assert "D4RL_DATASET_DIR" in error_of(capsys, lambda: script.load_task(args_of(script, env_id="hopper-medium-v2")))
    line = error_of(capsys, lambda: script.load_task(args_of(script, dataset_path=str(hopper_file.parent))))
    assert str(hopper_file.parent) in line


def test_two_downloads_at_once(script, server, monkeypatch, hopper_file):
    routes, _, url = server
    routes[f"/{NAME}"] = (200, hopper_file.read_bytes(), None)
    monkeypatch.setattr(script, "D4RL_URLS", (url + "/{}",))
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("fork")) as pool:
        paths = list(pool.map(script.download_d4rl, [NAME] * 4))
    assert all(len(script.read_hdf5(path)["rewards"]) == 600 for path in paths)


def test_addresses(script):
    """By rule, the addresses that D4RL lists."""
    assert [url.format("walker2d_medium_replay-v2.hdf5") for url in script.D4RL_URLS] == [
        "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/walker2d_medium_replay-v2.hdf5",
        "https://huggingface.co/datasets/imone/D4RL/resolve/main/walker2d_medium_replay-v2.hdf5",
    ]
    assert len(script.D4RL_IDS) == 24


# ----------------------------------------------------------------------------------------------------------- Minari
class Goal(gym.Env):
    """Dict observations, whose keys are not in sorted order."""

    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    observation_space = gym.spaces.Dict(
        {
            "observation": gym.spaces.Box(-9, 9, (3,), np.float64),
            "desired_goal": gym.spaces.Box(-9, 9, (1,), np.float64),
        }
    )

    def state(self):
        return {"observation": np.full(3, self.t, np.float64), "desired_goal": np.full(1, -1.0)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.state(), {}

    def step(self, action):
        self.t += 1
        return self.state(), float(self.t), self.t == 7, False, {"success": self.t == 7}


gym.register("MinariGoal-v0", entry_point="test_data:Goal", max_episode_steps=5)


def test_minari(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    import minari
    from minari.data_collector import EpisodeBuffer

    env, episodes = gym.make("MinariGoal-v0"), []
    for i in range(3):
        obs = [env.reset(seed=i)[0]]
        steps = [env.step(env.action_space.sample()) for _ in range(5)]
        obs += [step[0] for step in steps]
        rewards, terminations, truncations = ([step[column] for step in steps] for column in (1, 2, 3))
        observations = {key: np.stack([o[key] for o in obs]) for key in obs[0]}
        actions = np.zeros((5, 2), np.float32)
        episodes.append(EpisodeBuffer(i, i, None, observations, actions, rewards, terminations, truncations))
    minari.create_dataset_from_buffers("test/goal-v0", episodes, env=env, eval_env="MinariGoal-v0", algorithm_name="x",
                                       ref_min_score=0.0, ref_max_score=15.0)  # fmt: skip
    args = args_of(script, env_id="test/goal-v0")
    columns, make_env, reference, source = script.load_task(args)
    assert columns["observations"].shape == (15, 4) and columns["timeouts"].sum() == 3
    np.testing.assert_array_equal(columns["observations"][2], [-1, 2, 2, 2])  # desired_goal before observation
    np.testing.assert_array_equal(columns["next_observations"][2], [-1, 3, 3, 3])
    eval_env = make_env()
    np.testing.assert_array_equal(eval_env.reset(seed=0)[0], columns["observations"][0])
    rows, _ = script.make_transitions(columns, args_of(script))
    assert len(rows) == 12 and reference == (0.0, 15.0) and source["file"] == "minari:test/goal-v0"
    assert source["sha256"] == script.load_task(args)[3]["sha256"]
    script.make_envs(make_env, args, columns)
    columns["actions"] = columns["actions"][:, :1]
    assert "do not fit" in error_of(capsys, lambda: script.make_envs(make_env, args, columns))


def test_minari_id_without_data(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    import minari

    monkeypatch.setattr(minari, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("offline")))
    assert "test/none-v0" in error_of(capsys, lambda: script.load_task(args_of(script, env_id="test/none-v0")))


# ---------------------------------------------------------------------------------------------------------- bundled
def test_numbers_of_the_datasets_readme():
    """Are those of statistics.json, of the sets that are not bundled too."""
    text = (ROOT / "datasets" / "README.md").read_text()
    statistics = json.loads((ROOT / "datasets" / "statistics.json").read_text())
    names = [name for name in statistics if name.endswith("-mini")]
    assert len(names) >= 6
    for name in names:
        cells = text.split(f"`{name}.hdf5` | ")[1].splitlines()[0].split(" | ")[1:]
        assert [float(x.strip(" |").replace(" ", "")) for x in cells] == list(statistics[name].values()), name


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_set(script, name):
    """D4RL's layout, the published statistics, and physics that the installed simulator repeats."""
    columns, make_env, reference, _ = script.load_task(args_of(script, env_id=name))
    statistics = json.loads((ROOT / "datasets" / "statistics.json").read_text())[name]
    assert np.array_equal(np.unique([c.dtype for c in columns.values()]).astype(str), ["bool", "float32"])
    with h5py.File(ROOT / "datasets" / f"{name}.hdf5") as file:
        assert {"algorithm", "seed", "versions", "policy_returns", "license"} <= set(file["metadata"])
        qpos, qvel = file["infos/qpos"][()], file["infos/qvel"][()]
        assert file["metadata/env_id"][()].decode() == make_env().spec.id
    ends = columns["terminals"] | columns["timeouts"]
    returns = np.diff(np.cumsum(columns["rewards"], dtype=np.float64)[ends], prepend=0.0)
    found = {"episodes": len(returns)} | {f"return_{k}": getattr(returns, k)() for k in ("mean", "std", "min", "max")}
    assert {"transitions": len(columns["rewards"]), **found} == pytest.approx(statistics, abs=0.1)
    assert reference == (-20.272305, 3234.3)
    env = make_env().unwrapped
    env.reset(seed=0)
    for i in range(0, len(qpos), 5_000):
        env.set_state(qpos[i].astype(np.float64), qvel[i].astype(np.float64))
        next_obs, reward, terminated, *_ = env.step(columns["actions"][i])
        np.testing.assert_allclose(next_obs, columns["next_observations"][i], atol=2e-3)
        assert reward == pytest.approx(columns["rewards"][i], abs=2e-3) and terminated == columns["terminals"][i]

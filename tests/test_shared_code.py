"""What the scripts share is the same to the letter, and what differs says why.

python tests/test_shared_code.py prints how many lines differ between each two EDP scripts.
"""

import ast
import difflib
import itertools
import re
import textwrap

import pytest
from conftest import ROOT, SCRIPTS

ALL, EDP = ("edis_sac", "edp_crr", "edp_iql", "edp_td3"), ("edp_crr", "edp_iql", "edp_td3")
REGRESSION, SAMPLED = ("edp_crr", "edp_iql"), ("edp_crr", "edp_td3")
NOT_IQL = ("edis_sac", "edp_crr", "edp_td3")

# Definition: the scripts that have it, all alike. `Args.x` is a field, with its type, default and help; `f.g` is a
# function in f, listed where f is not.
SHARED = dict.fromkeys((
    "fail", "say", "D4RL", "LEVELS", "D4RL_IDS", "MINI_IDS", "D4RL_URLS", "Columns", "Transform", "KEYS",
    "read_hdf5", "check", "download_d4rl", "load_minari", "load_task", "timeouts_by_limit", "make_transitions", "Mish",
    "Linear", "MLP", "Critic", "make_envs", "evaluate", "load_checkpoint", "describe", "Run", "set_up", "accelerate",
    "Captured", "capture", "make_update.step", "__main__",
    *(f"Args.{name}" for name in (
        "exp_name", "seed", "device", "log_every", "save_every", "resume", "runs_dir", "track", "wandb_project",
        "wandb_entity", "wandb_group", "wandb_mode", "dataset_path", "reward_transform",
        "observation_transform", "eval_every", "eval_episodes", "capture_video", "batch_size", "gamma", "tau",
        "num_threads", "compile", "matmul_precision",
    )),
), ALL)  # fmt: skip
SHARED |= dict.fromkeys((
    "CLIPS", "SPARSE", "PRESETS", "RESUMABLE", "parse_args", "flatten", "Policy", "Diffusion", "reconstruct",
    "select_actions", "main", "make_update.differentiate", *(f"Args.{name}" for name in (
        "env_id", "num_updates", "eval_candidates", "lr", "max_grad_norm", "diffusion_steps",
        "beta_schedule", "sampler", "sampler_steps", "solver_order", "diffusion_coef",
    )),
), EDP)  # fmt: skip
SHARED |= dict.fromkeys(("MINI", "weighted_regression", "Args.guidance_coef", "Args.likelihood"), REGRESSION)
SHARED |= dict.fromkeys(
    ("FAMILIES", "schedule", "make_networks", "Args.policy_target_start", "Args.policy_target_every"), SAMPLED
)
SHARED |= {"critic_losses": NOT_IQL}
# Same name in several scripts, on purpose not the same text
DIFFERS = {
    "LOCOMOTION": "only IQL scales rewards by the range of returns; CRR has a guidance coefficient of its own",
    "FAMILIES": "AntMaze's rewards, and its expectile for IQL",
    "MINI": "TD3 has no guidance coefficient; EDIS has other arguments",
    "PRESETS": "EDIS has settings for the bundled sets only",
    "RESUMABLE": "EDIS counts online steps",
    "parse_args": "before its online phase, EDIS lets a resume change that phase's arguments",
    "check_args": "each algorithm's own arguments",
    "critic_losses": "IQL's docstring names its equation",
    "make_networks": "V for IQL, a target policy for the others",
    "draw": "each algorithm's own random draws",
    "schedule": "IQL's policy has no target",
    "make_update": "the algorithm",
    "main": "EDIS has an online phase",
    "Args.weight_cap": "100 for IQL, 20 for CRR",
    "Args.env_id": "medium for EDIS, which needs room to improve",
}


def pieces(name):
    """{name: source} of a script's definitions, constants and arguments."""
    source = (ROOT / f"{name}.py").read_text()
    lines, found = source.splitlines(), {}

    def text(node, end):
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        return "\n".join(lines[first - 1 : end])

    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            for field, following in itertools.pairwise([*node.body[1:], None]):
                if isinstance(field, ast.AnnAssign):
                    helped = following if isinstance(following, ast.Expr) else field
                    found[f"Args.{field.target.id}"] = text(field, helped.end_lineno)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = text(node, node.end_lineno)
            if isinstance(node, ast.FunctionDef):
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef):
                        found[f"{node.name}.{inner.name}"] = textwrap.dedent(text(inner, inner.end_lineno))
        elif isinstance(node, ast.If):
            found["__main__"] = text(node, node.end_lineno)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            target = target.value if isinstance(target, ast.Subscript) else target
            found[target.id] = f"{found.get(target.id, '')}\n{text(node, node.end_lineno)}"
    return found


def problems(sources, shared, differs):
    """What is wrong with {script: {name: source}}, in words."""
    for name in sorted({name for pieces in sources.values() for name in pieces}):
        holders = [script for script in sources if name in sources[script]]
        outer = name.split(".")[0]
        listed = set(shared.get(name, shared.get(outer, ())))
        if name in shared and not listed <= set(holders):
            yield f"{name}: listed for {shared[name]}, stands in {holders}"
        for pair in itertools.combinations(holders, 2):
            same = len({sources[script][name] for script in pair}) == 1
            if listed >= set(pair) and not same:
                yield f"{name}: not the same in {pair}"
            elif not listed >= set(pair) and same:
                yield f"{name}: the same in {pair} and not listed"
            elif not same and not {name, outer} & differs.keys():
                yield f"{name}: not the same in {pair} and not listed as different"
        if name in differs and len({sources[script][name] for script in holders}) < 2:
            yield f"{name}: is listed as different and is not"
    everything = {name for pieces in sources.values() for name in pieces}
    yield from (f"{name}: listed, stands nowhere" for name in (shared.keys() | differs.keys()) - everything)

    def body(text):  # a copy under another name
        tree = ast.parse(text).body[0]
        if not isinstance(tree, ast.FunctionDef | ast.ClassDef):
            return None
        return ast.dump(ast.Module(tree.body[ast.get_docstring(tree) is not None :], []))

    bodies = [(body(text), name) for found in sources.values() for name, text in found.items() if "def " in text]
    for (one, a), (other, b) in itertools.combinations(bodies, 2):
        if one == other and one is not None and a != b:
            yield f"{a} and {b} are copies of one another"


def test_shared_code():
    assert sorted(ALL) == SCRIPTS
    assert not list(problems({name: pieces(name) for name in ALL}, SHARED, DIFFERS))


def test_the_comparison_finds_what_it_is_for():
    def found(shared=SHARED, differs=DIFFERS, added=None, **changed):
        sources = {name: pieces(name) | (added or {}).get(name, {}) for name in ALL}
        for name, text in changed.items():
            sources["edp_td3"][re.sub(r"(?<=\w)__(?=\w)", ".", name)] = text
        return " ".join(problems(sources, shared, differs))

    assert "fail: not the same" in found(fail="def fail(): pass")
    assert "Args.lr: not the same" in found(Args__lr="lr: float = 1.0")
    assert "fail: the same in" in found(shared={k: v for k, v in SHARED.items() if k != "fail"})
    assert "weighted_regression: listed for" in found(shared={**SHARED, "weighted_regression": EDP})
    assert "weighted_regression: not the same in" in found(weighted_regression="def weighted_regression(): pass")
    assert "gone: listed, stands nowhere" in found(shared={**SHARED, "gone": EDP})
    assert "fail: is listed as different and is not" in found(differs={**DIFFERS, "fail": "why"})
    assert "MINI: the same in" in found(shared={k: v for k, v in SHARED.items() if k != "MINI"})
    assert "make_update.step: not the same" in found(make_update__step="def step(): pass")
    assert "draw.helper: the same in" in found(draw__helper="x", added={"edp_iql": {"draw.helper": "x"}})
    assert "__main__: not the same" in found(__main__="if True: pass")
    copy = pieces("edp_iql")["evaluate"].replace("def evaluate", "def run_episodes").replace('"""One', '"""An')
    assert "copies of one another" in found(run_episodes=copy)


def unread(source):
    """Arguments that a script never reads, but to check, to parse or to record them."""
    tree = ast.parse(source)
    args = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    fields = {node.target.id for node in args.body if isinstance(node, ast.AnnAssign)}
    readers = [node for node in tree.body if getattr(node, "name", "") not in ("check_args", "parse_args", "describe")]
    read = {
        node.attr
        for node in itertools.chain.from_iterable(map(ast.walk, readers))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("args", "self.args", "given")
    }
    return fields - read


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_argument_is_read(name):
    source = (ROOT / f"{name}.py").read_text()
    assert not unread(source)
    assert unread(source.replace("    seed: int = 0", "    sead: int = 0\n    seed: int = 0")) == {"sead"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_banners(name):
    """The same sections in the same order."""
    found = re.findall(r"(?m)^# -{20,} ?(.+)$", (ROOT / f"{name}.py").read_text())
    assert [title.strip() for title in found] == [
        "Args", "PRESETS", "Data", "Networks", "Diffusion", "Losses", "Update", "Evaluation", "Run files", "main",
    ]  # fmt: skip


def differing_lines(one, other):
    """Lines that stand in only one of two scripts, both ways."""
    texts = [(ROOT / f"{name}.py").read_text().splitlines() for name in (one, other)]
    return sum(line[0] in "+-" for line in list(difflib.unified_diff(*texts, n=0))[2:])


def test_siblings_differ_by_the_algorithm():
    assert all(differing_lines(*pair) <= 150 for pair in itertools.combinations(EDP, 2))


if __name__ == "__main__":
    for pair in itertools.combinations(EDP, 2):
        print(*pair, differing_lines(*pair))

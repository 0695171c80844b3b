"""What the scripts share is the same to the letter; sizes stay within the limits of the design."""

import ast
import itertools
import re
import textwrap

import pytest
from conftest import EDP, ROOT, SCRIPTS
from sizes import algorithm_end, count_tokens, differing_lines, read

EDIS = ("edis_sac",)

LIMITS = dict.fromkeys(EDP, (780, 8_000)) | {"edis_sac": (1_250, 13_000)}  # lines, tokens
TOKENS_A_LINE = 10.5  # more would be packed lines
ALGORITHM_END = 380  # of an EDP script
DIFFERING_LINES = 150  # between two EDP scripts

# Pieces of one name are the same in all scripts, but for these: in the scripts named, with the reason.
# `Args.x` is a field with its help, `f.g` a function inside f.
DIFFERS = {
    "Args": (SCRIPTS, "each algorithm has arguments of its own"),
    "Args.env_id": (EDIS, "medium data, which leave room to improve"),
    "Args.weight_cap": (("edp_crr",), "100 for IQL, 20 for CRR"),
    "make_networks": (("edis_sac", "edp_iql"), "V for IQL, a target policy for CRR and TD3"),
    "draw": (SCRIPTS, "each algorithm's own random draws"),
    "make_update": (SCRIPTS, "the algorithm"),
    "make_update.update": (SCRIPTS, "the algorithm"),
    "LOCOMOTION": ((*EDIS, "edp_crr", "edp_iql"), "only IQL scales rewards; CRR has a guidance coefficient"),
    "SPARSE": (EDIS, "without the number of updates"),
    "ANTMAZE": ((*EDIS, "edp_iql"), "rewards of IQL, and its expectile"),
    "MINI": (SCRIPTS, "each algorithm's own arguments"),
    "find_preset": ((*EDIS, "edp_td3"), "EDIS has fewer presets, EDP-TD3 also Diffusion-QL's"),
    "run": (EDIS, "an online phase"),
    "run.train": (EDIS, "batches of two kinds of data"),
    "Diffusion": (("edp_td3",), "the vp schedule, for Diffusion-QL"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_size(name):
    source = read(name)
    lines, tokens = len(source.splitlines()), count_tokens(source)
    assert lines <= LIMITS[name][0] and tokens <= LIMITS[name][1], (lines, tokens)
    assert tokens / lines <= TOKENS_A_LINE
    assert name not in EDP or algorithm_end(source) < ALGORITHM_END


def test_size_of_the_tests():
    assert sum(len(path.read_text().splitlines()) for path in (ROOT / "tests").glob("*.py")) <= 2_500


def test_siblings_differ_by_the_algorithm():
    """The same sections; few lines that stand in only one of two scripts, both ways."""
    assert len({tuple(re.findall(r"(?m)^# -{20,} (.+)$", read(name))) for name in SCRIPTS}) == 1
    for pair in itertools.combinations(EDP, 2):
        assert differing_lines(*pair) <= DIFFERING_LINES, pair


def pieces(source):
    """{name: source} of a script's definitions, constants, arguments and of functions in functions."""
    lines, found = source.splitlines(), {}

    def text(node, end):
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        return textwrap.dedent("\n".join(lines[first - 1 : end]))

    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            for field, following in itertools.pairwise([*node.body[1:], None]):
                if isinstance(field, ast.AnnAssign):
                    helped = following if isinstance(following, ast.Expr) else field
                    found[f"Args.{field.target.id}"] = text(field, helped.end_lineno)
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = text(node, node.end_lineno)
            for inner in node.body if isinstance(node, ast.FunctionDef) else ():
                if isinstance(inner, ast.FunctionDef):
                    found[f"{node.name}.{inner.name}"] = text(inner, inner.end_lineno)
        elif isinstance(node, ast.If):
            found["__main__"] = text(node, node.end_lineno)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            target = target.value if isinstance(target, ast.Subscript) else target
            found[target.id] = f"{found.get(target.id, '')}\n{text(node, node.end_lineno)}"
    return found


def problems(sources, differs):
    """What is wrong with {script: {name: source}}, in words."""
    holders = {}
    for script, found in sources.items():
        for name, text in found.items():
            holders.setdefault(name, {})[script] = text
    for name, texts in holders.items():
        exempt = differs.get(name, ((), ""))[0]
        if len({text for script, text in texts.items() if script not in exempt}) > 1:
            yield f"{name}: not the same in {[script for script in texts if script not in exempt]}"
        if name in differs and len(set(texts.values())) == 1:
            yield f"{name}: listed as different and is not"
    yield from (f"{name}: listed, stands nowhere" for name in differs.keys() - holders.keys())


def test_shared_code():
    assert not list(problems({name: pieces(read(name)) for name in SCRIPTS}, DIFFERS))


def test_the_comparison_finds_what_it_is_for():
    def found(differs=DIFFERS, **changed):
        sources = {name: pieces(read(name)) for name in SCRIPTS}
        sources["edp_td3"] |= {re.sub(r"(?<=\w)__(?=\w)", ".", name): text for name, text in changed.items()}
        return " ".join(problems(sources, differs))

    assert "fail: not the same" in found(fail="def fail(): pass")
    assert "Args.seed: not the same" in found(Args__seed="seed: int = 1")
    assert "make_optimizer.step: not the same" in found(make_optimizer__step="def step(): pass")
    assert "gone: listed, stands nowhere" in found({**DIFFERS, "gone": (EDP, "why")})
    assert "fail: listed as different and is not" in found({**DIFFERS, "fail": (EDP, "why")})


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_argument_is_read(name):
    """But where it is checked."""
    tree = ast.parse(read(name))
    args = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    fields = {node.target.id for node in args.body if isinstance(node, ast.AnnAssign)}
    nodes = itertools.chain.from_iterable(ast.walk(node) for node in tree.body if node is not args)
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    used = {node.attr for node in attributes if ast.unparse(node.value) in ("args", "given")}
    scales = {f"{energy}_{kind}" for energy in ("state", "policy", "transition") for kind in ("scale", "energy")}
    assert not fields - used - scales  # these are read by name, in edis_sac

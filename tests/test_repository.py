"""The repository itself: metadata, arguments, documents."""

import ast
import re
import shlex
import sys

import mutants
import pytest
from conftest import ROOT, SCRIPTS

# Pinned, though no script imports them by that name
INDIRECT = {
    "tensorboard": "torch.utils.tensorboard",
    "moviepy": "gymnasium.wrappers.RecordVideo",
}


def pins(text):
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def name_of(pin):
    return re.match(r"[\w-]+", pin)[0]


@pytest.mark.parametrize("name", SCRIPTS)
def test_inline_metadata_is_requirements_txt(name):
    source = (ROOT / f"{name}.py").read_text()
    block = re.search(r"(?m)^# /// script$\n((?:^#.*$\n)+?)^# ///$", source)[1]
    assert 'requires-python = ">=3.10"' in block
    dependencies = re.findall(r'"([^"]+)"', block[block.index("dependencies") :])
    assert dependencies == pins((ROOT / "requirements.txt").read_text())
    assert all("==" in pin for pin in dependencies)


def test_requirements_are_what_is_imported():
    imported = set()
    for name in SCRIPTS:
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    third_party = imported - set(sys.stdlib_module_names) - {"minari"}  # optional
    names = {name_of(pin) for pin in pins((ROOT / "requirements.txt").read_text())}
    assert third_party == names - set(INDIRECT)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_argument_has_help(name, capsys):
    with pytest.raises(SystemExit):
        __import__(name).parse_args(["--help"])
    text = capsys.readouterr().out
    fields = __import__(name).dataclasses.fields(__import__(name).Args)
    for field in fields:
        entry = re.search(rf"(?ms)^\W*--{field.name.replace('_', '-')}\b(.*?)\(default", text)[1]
        assert len(re.sub(r"[│\s]+", " ", entry).split()) >= 3, field.name


def commands(script):
    """The README's `python SCRIPT ...` lines."""
    text = (ROOT / "README.md").read_text()
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.S))
    return re.findall(rf"python {script}\.py(.*)", blocks)


def test_documented_commands_are_understood(script):
    found = commands(script.__name__)
    assert found
    for line in found:
        flags = shlex.split(line, comments=True)
        if "--resume" not in flags and "--help" not in flags:
            args = script.parse_args(flags)
            script.check_args(args)
            if args.env_id in script.gym.registry:
                space = script.gym.make(args.env_id).action_space
                assert (space.low == -1).all() and (space.high == 1).all()  # else the script refuses it


@pytest.mark.parametrize("name", SCRIPTS)
def test_logged_metrics_are_documented(name):
    source, readme = (ROOT / f"{name}.py").read_text(), (ROOT / "README.md").read_text()
    logged = set(re.findall(r'"(charts/\w+)"', source))
    update = source[source.index("losses = {") : source.index('f"losses/')]
    logged |= {f"losses/{key}" for key in re.findall(r'"(\w+)":', update)}
    assert len(logged) > 8
    assert not [metric for metric in logged if f"`{metric}`" not in readme]


@pytest.mark.parametrize("name", SCRIPTS)
def test_equations_are_where_the_readme_says(name):
    """What the tables of paper and code name is defined in the section's script."""
    section = next(x for x in (ROOT / "README.md").read_text().split("\n## ") if f"`{name}.py`\n" in x)
    tables = re.findall(r"\| (?:paper|mathematics) \| code \|\n\|[-|]+\n((?:\|.*\n)+)", section)
    cells = [row.rsplit(" | ", 1)[1] for table in tables for row in table.splitlines()]
    named = {part for cell in cells for code in re.findall(r"`([\w.]+)`", cell) for part in code.split(".")}
    defined = set(re.findall(r"(?:def|class) (\w+)", (ROOT / f"{name}.py").read_text()))
    assert len(named) >= 5 and named - defined <= {"edp_iql", "py"}, named - defined


def test_links_of_the_readme_lead_somewhere():
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(), flags=re.S)
    titles = [title.lower() for title in re.findall(r"(?m)^#+ (.*)$", text)]
    anchors = {re.sub(r"[^\w -]", "", title).replace(" ", "-") for title in titles}
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "//" not in link]
    assert len(links) > 20
    assert not [x for x in links if (x[1:] not in anchors if x[0] == "#" else not (ROOT / x).exists())]


def test_the_mutants_fit():
    """Each breaks one place; whether a test sees it, `python tests/mutants.py` tells."""
    for name, (script, original, *_) in mutants.MUTANTS.items():
        assert (ROOT / script).read_text().count(original) == 1, name

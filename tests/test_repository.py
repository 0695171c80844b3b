"""The repository itself: metadata, arguments, documents."""

import ast
import importlib
import re
import shlex
import sys

from conftest import ROOT, SCRIPTS

INDIRECT = {"tensorboard", "moviepy", "mujoco"}  # pinned, though not imported by that name
OPTIONAL = {"minari", "gymnasium_robotics"}


def test_requirements_are_what_is_imported():
    """And a script imports nothing of this repository."""
    imported = set()
    for name in SCRIPTS:
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    pins = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all("==" in pin for pin in pins)
    names = {re.match(r"[\w-]+", pin)[0] for pin in pins}
    assert imported - set(sys.stdlib_module_names) - OPTIONAL | INDIRECT == names


DOCUMENTS = [ROOT / "README.md", *(ROOT / "benchmark_results").glob("*.md"), ROOT / "datasets" / "README.md"]


def test_documented_commands_are_understood():
    """Lines `python FILE ...` of the documents' blocks."""
    blocks = [block for path in DOCUMENTS for block in re.findall(r"```bash\n(.*?)```", path.read_text(), flags=re.S)]
    found = re.findall(r"python (\S+\.py)(.*)", "\n".join(blocks))
    assert {f"{name}.py" for name in SCRIPTS} <= {file for file, _ in found}
    for file, line in found:
        assert (ROOT / file).exists(), file
        flags = shlex.split(line, comments=True)
        if file[:-3] in SCRIPTS and not {"--resume", "--help"} & set(flags):
            importlib.import_module(file[:-3]).parse_args(flags)


def test_links_lead_somewhere():
    for path in DOCUMENTS:
        text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
        titles = [title.lower() for title in re.findall(r"(?m)^#+ (.*)$", text)]
        anchors = {re.sub(r"[^\w -]", "", title).replace(" ", "-") for title in titles}
        links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "//" not in link]
        files = [link.split("#")[0] for link in links if link[0] != "#"]
        assert not [link for link in links if link[0] == "#" and link[1:] not in anchors], path
        assert not [file for file in files if not (path.parent / file).exists()], path

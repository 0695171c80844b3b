"""Sizes of the scripts: python benchmark_results/sizes.py

Prints for each script: lines, tokens, tokens a line, the line where the algorithm ends, and how many lines differ
from its siblings.
"""

import difflib
import io
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EDP = ("edp_crr", "edp_iql", "edp_td3")
SCRIPTS = ("edis_sac", *EDP)


def read(name: str) -> str:
    return (ROOT / f"{name}.py").read_text()


def count_tokens(source: str) -> int:
    """Without comments, docstrings, newlines and indents. An f-string is one, as before Python 3.12."""
    layout = (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    start, end = (getattr(tokenize, f"FSTRING_{part}", None) for part in ("START", "END"))
    count, before, inside = 0, None, 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        inside += token.type == start
        inside -= token.type == end
        if inside or token.type in (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER):
            continue
        docstring = token.type == tokenize.STRING and before in (None, *layout)
        count += token.type not in layout and not docstring
        before = token.type
    return count


def algorithm_end(source: str) -> int:
    """The line of the banner that follows the algorithm."""
    return next(i for i, line in enumerate(source.splitlines(), 1) if re.match(r"# -{20,} Data$", line))


def differing_lines(one: str, other: str) -> int:
    """Lines that stand in only one of two scripts, both ways."""
    changes = list(difflib.unified_diff(read(one).splitlines(), read(other).splitlines(), n=0))[2:]
    return sum(line[0] in "+-" for line in changes)


def main() -> None:
    print(f"{'script':10}{'lines':>8}{'tokens':>8}{'a line':>8}{'algorithm ends':>16}  lines that differ from siblings")
    for name in SCRIPTS:
        source = read(name)
        lines, tokens = len(source.splitlines()), count_tokens(source)
        others = [f"{other} {differing_lines(name, other)}" for other in EDP if name in EDP and other != name]
        end = algorithm_end(source) - 1
        print(f"{name:10}{lines:8}{tokens:8}{tokens / lines:8.1f}{end:16}  {', '.join(others)}")


if __name__ == "__main__":
    main()

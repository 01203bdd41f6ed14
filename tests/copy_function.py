"""Copies a top-level function or class of one of the five scripts into every other one that has it.

    python tests/copy_function.py NAME sft.py

Scripts share code by identical copies: change one, run this, then `python -m pytest tests/test_house.py`.
"""

import ast
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
SCRIPTS = ("sft.py", "dpo.py", "kto.py", "kd.py", "batch_infer.py")


def span(source, name):
    """(first line, line behind the last) of a definition with its decorators, counted from 0; None without it."""
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            return first - 1, node.end_lineno
    return None


def main(name, origin):
    source = (REPO / origin).read_text()
    if name in ("Args", "main") or not span(source, name):
        sys.exit(f"error: {name}: name a function or class of {origin}, other than Args and main")
    copied = source.split("\n")[slice(*span(source, name))]
    for script in SCRIPTS:
        other = (REPO / script).read_text()
        if place := span(other, name):
            lines = other.split("\n")
            lines[slice(*place)] = copied
            (REPO / script).write_text("\n".join(lines))
            print(f"{script}: {name} is that of {origin}")


if __name__ == "__main__":
    main(*sys.argv[1:])

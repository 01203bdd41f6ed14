"""The house rules as tests: the scripts share code by copying it, and this file keeps the copies equal.

Every check is a function of {script name: source} that returns what is wrong.
"""

import ast
import difflib
import io
import re
import tokenize
from itertools import combinations
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
MAX_LINES = {"sft.py": 740, "kd.py": 860, "dpo.py": 960, "kto.py": 880, "batch_infer.py": 800}
OTHER_LINES = {"iterate.sh": 160, "README.md": 220}
OTHER_LINES |= {"examples/toy.py": 280, "examples/plot.py": 230, "examples/trinity.py": 300}
MAX_TEST_LINES = 3680  # of tests/*.py together
MAX_NODES = 13  # per line of code: less, not denser
OWN = ("Args", "main")  # each script has its own of these
SCRIPTS = {name: (REPO / name).read_text() for name in MAX_LINES}


def definitions(source):
    """{name: source with decorators} of the top-level functions and classes, in order."""
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def comments(source):
    """{number of a line: its comment}."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0]: token.string[1:].strip() for token in tokens if token.type == tokenize.COMMENT}


def flags(source):
    """{flag: (type, help)} of class Args. Help is the comment at the end of the line, else the line above it."""
    lines, notes, found = source.splitlines(), comments(source), {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            for field in [n for n in node.body if isinstance(n, ast.AnnAssign)]:
                words = notes.get(field.lineno)
                if not words and lines[field.lineno - 2].strip().startswith("# "):
                    words = notes[field.lineno - 1]
                found[field.target.id] = (ast.unparse(field.annotation), words)
    return found


def without_fences(text):
    """The lines of text outside `# --- algorithm: X` .. `# --- end algorithm`; the fences stay, without X."""
    kept, inside = [], False
    for line in text.splitlines():
        if re.match(r"\s*# --- algorithm: \w+( \(\w+\))?$", line):
            inside = True
            kept.append(line.rpartition(":")[0])
        elif re.match(r"\s*# --- end algorithm$", line):
            inside = False
        if not inside:
            kept.append(line)
    return kept


def drift(scripts):
    """Functions and classes that stand in two scripts and differ."""
    bad = []
    for (a, text_a), (b, text_b) in combinations(scripts.items(), 2):
        one, two = definitions(text_a), definitions(text_b)
        shared = [n for n in one if n in two and n not in OWN]
        bad += [f"{n}: {a} != {b}" for n in shared if one[n] != two[n]]
    return bad


def order(scripts):
    """Pairs of scripts in which shared names (of code or flags) come in different orders."""
    bad = []
    for (a, text_a), (b, text_b) in combinations(scripts.items(), 2):
        for what in (definitions, flags)[: 1 if "batch_infer.py" in (a, b) else 2]:
            one, two = ([n for n in what(text) if n not in OWN] for text in (text_a, text_b))
            if [n for n in one if n in two] != [n for n in two if n in one]:
                bad.append(f"{what.__name__}: {a}, {b}")
    return bad


def mains(scripts):
    """Lines outside the fences in which the main() of two trainers differ."""
    bad = []
    for a, b in combinations([name for name in scripts if name != "batch_infer.py"], 2):
        one, two = (without_fences(definitions(scripts[name])["main"]) for name in (a, b))
        changes = list(difflib.unified_diff(one, two, n=0, lineterm=""))[2:]
        bad += [f"{a}, {b}: {line}" for line in changes if line[:2] != "@@"]
    return bad


def flag_rules(scripts):
    """Flags without help or unread; flags whose type or help differs between two scripts."""
    bad, seen = [], {}
    for name, text in scripts.items():
        for flag, (kind, words) in flags(text).items():
            if not words:
                bad.append(f"{name}: no help for {flag}")
            read = re.search(rf"\b(args|self)\.{flag}\b", text)
            if not read and flag != "local_rank" and "accepted for old commands" not in str(words):
                bad.append(f"{name}: args.{flag} is never read")
            first, said = seen.setdefault(flag, (name, (kind, words)))
            if name == "batch_infer.py":  # another kind of script, in which other help is true
                continue
            if said != (kind, words):
                bad.append(f"{flag}: {first} {said} != {name} {(kind, words)}")
    return bad


def module_level(scripts):
    """Imports of a sibling, and statements that run at import."""
    bad, siblings = [], {"", *(Path(name).stem for name in MAX_LINES)}
    for name, text in scripts.items():
        for node in ast.walk(ast.parse(text)):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or "."] if isinstance(node, ast.ImportFrom) else []
            bad += [f"{name}: imports {m}" for m in modules if m.split(".")[0] in siblings]
        for node in ast.parse(text).body:
            code = ast.unparse(node)
            constant = isinstance(node, ast.Assign) and re.match(r"[A-Z_0-9]+ = ", code)
            definition = isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            allowed = code.startswith(("os.environ.setdefault(", "if __name__ == "))
            if not (constant or definition or docstring or allowed):
                bad.append(f"{name}:{node.lineno}: runs at import: {code[:60]}")
    return bad


def code_lines(source):
    """How many lines are neither blank nor comment nor docstring."""
    text = source.splitlines()
    lines = {i for i, line in enumerate(text, 1) if line.strip() and not line.strip().startswith("#")}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines -= {*range(node.lineno, node.end_lineno + 1)}
    return len(lines)


def sizes(scripts):
    """Long scripts, dense scripts, wide lines, long functions."""
    bad = []
    for name, text in scripts.items():
        if len(text.splitlines()) > (MAX_LINES | OTHER_LINES)[name]:
            bad.append(f"{name}: {len(text.splitlines())} lines")
        nodes = sum(1 for _ in ast.walk(ast.parse(text))) / code_lines(text)
        if nodes > MAX_NODES:
            bad.append(f"{name}: {nodes:.1f} syntax nodes per line of code")
        bad += [f"{name}:{i}: wide" for i, line in enumerate(text.splitlines(), 1) if len(line) > 110]
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > (110 if node.name == "main" else 45):
                    bad.append(f"{name}: {node.name} has {length} lines")
    return bad


@pytest.mark.parametrize("check", (drift, order, mains, flag_rules, module_level, sizes))
def test_house_rules(check):
    assert check(SCRIPTS) == []


def test_examples_documents_and_tests_are_short():
    assert sizes({name: (REPO / name).read_text() for name in OTHER_LINES if name.endswith(".py")}) == []
    lines = {name: len((REPO / name).read_text().splitlines()) for name in OTHER_LINES}
    assert {name: n for name, n in lines.items() if n > OTHER_LINES[name]} == {}
    assert sum(len(path.read_text().splitlines()) for path in REPO.glob("tests/*.py")) <= MAX_TEST_LINES


def test_what_may_change_when_a_run_is_resumed():
    """The same in all trainers; every other flag, a copier's new ones too, belongs to a run's identity."""
    trainers = [text for name, text in SCRIPTS.items() if name != "batch_infer.py"]
    free = [re.search(r'FREE_FLAGS = """(.*?)"""', text, re.S)[1].split() for text in trainers]
    assert all({*names} <= {*flags(text)} for names, text in zip(free, trainers))
    assert len({tuple(name for name in names if name not in ("ref_offload", "teacher_offload")) for names in free}) == 1

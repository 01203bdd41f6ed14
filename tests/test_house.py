"""The house rules as tests: the scripts share code by copying it, and this file keeps the copies equal.

Every check is a function of {script name: source} that returns what is wrong; test_checks_find_violations
breaks each rule in made-up scripts, so that a check which finds nothing in ours is known to look.
"""

import ast
import difflib
import re
import subprocess
from itertools import combinations
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
NAMES = ("sft.py", "dpo.py", "kto.py", "kd.py", "batch_infer.py")
SCRIPTS = {name: (REPO / name).read_text() for name in NAMES if (REPO / name).exists()}
TWINS = (("dpo.py", "kto.py"), ("sft.py", "kd.py"))


def definitions(source):
    """{name: source with decorators} of the top-level functions and classes, in order."""
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def flags(source):
    """{flag: (annotation, docstring or None)} of class Args."""
    classes = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "Args"]
    body, found = classes[0].body if classes else [], {}
    for node, following in zip(body, [*body[1:], None]):
        if isinstance(node, ast.AnnAssign):
            is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            found[node.target.id] = (ast.unparse(node.annotation), following.value.value if is_text else None)
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
        shared = [n for n in one if n in two and n not in ("Args", "main")]
        bad += [f"{n}: {a} != {b}" for n in shared if one[n] != two[n]]
    return bad


def order(scripts):
    """Pairs of scripts in which shared names (of code or flags) come in different orders."""
    bad = []
    for (a, text_a), (b, text_b) in combinations(scripts.items(), 2):
        for what in (definitions, flags):
            one, two = list(what(text_a)), list(what(text_b))
            if [n for n in one if n in two] != [n for n in two if n in one]:
                bad.append(f"{what.__name__}: {a}, {b}")
    return bad


def mains(scripts):
    """Lines outside the fences in which the main() of two trainers differ."""
    trainers, bad = [name for name in scripts if name != "batch_infer.py"], []
    for a, b in combinations(trainers, 2):
        one, two = (without_fences(definitions(scripts[name])["main"]) for name in (a, b))
        changes = list(difflib.unified_diff(one, two, n=0, lineterm=""))[2:]
        bad += [f"{a}, {b}: {line}" for line in changes if line[:2] != "@@"]
    return bad


def flag_rules(scripts):
    """Flags without a string or unread; flags whose type or words differ between two scripts."""
    bad, seen = [], {}
    for name, text in scripts.items():
        for flag, (annotation, words) in flags(text).items():
            if not words:
                bad.append(f"{name}: no string under {flag}")
            if not re.search(rf"\bargs\.{flag}\b", text):
                bad.append(f"{name}: args.{flag} is never read")
            first, kind = seen.setdefault(flag, (name, (annotation, words)))
            if kind != (annotation, words):
                bad.append(f"{flag}: {first} {kind} != {name} {(annotation, words)}")
    return bad


def module_level(scripts):
    """Imports of a sibling, and statements that run at import."""
    bad, siblings = [], {"", *(Path(n).stem for n in NAMES)}
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
            blocks = ("if __name__ == '__main__':", "if __name__ == '__mp_main__':")
            allowed = code.startswith(("os.environ.setdefault(", *blocks))
            if not (constant or definition or docstring or allowed):
                bad.append(f"{name}:{node.lineno}: runs at import: {code[:60]}")
    return bad


# The aim is 900; what is above it are features (exact resume, LoRA, chat templates, ...) that nothing smaller gave.
MAX_LINES = {"sft.py": 1305, "dpo.py": 1575, "kto.py": 1515, "kd.py": 1565, "batch_infer.py": 1680}


def sizes(scripts):
    """Trainers longer than they are today (they may only shrink), wide lines, long functions."""
    bad = []
    for name, text in scripts.items():
        lines = text.splitlines()
        if len(lines) > MAX_LINES.get(name, 900):
            bad.append(f"{name}: {len(lines)} lines")
        bad += [f"{name}:{i}: {len(line)} columns" for i, line in enumerate(lines, 1) if len(line) > 110]
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                if length > (170 if node.name == "main" else 60):
                    bad.append(f"{name}: {node.name} has {length} lines")
    return bad


def twins(scripts):
    """Pairs of trainers of which `diff` shows more than 20 % below Args."""
    bad = []
    for a, b in TWINS:
        if a in scripts and b in scripts:
            one, two = (below_args(scripts[name]) for name in (a, b))
            changed = sum(line[0] in "-+" for line in list(difflib.unified_diff(one, two, n=0))[2:])
            if changed > 0.2 * (len(one) + len(two)):
                bad.append(f"diff {a} {b}: {changed} of {len(one) + len(two)} lines")
    return bad


def below_args(source):
    """The lines after class Args."""
    end = next(
        n.end_lineno for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "Args"
    )
    return source.splitlines()[end:]


CHECKS = (drift, order, mains, flag_rules, module_level, sizes, twins)


@pytest.mark.parametrize("check", CHECKS)
def test_house_rules(check):
    assert check(SCRIPTS) == []


READ, PACK = "def read():\n    return 1\n", "def pack():\n    return 2\n"
MODEL_SCRIPT = f'''"""Doc."""
import os
LIMIT = 3
class Args:
    beta: float = 0.1
    """Beta."""
    seed: int = 1
    """Seed."""
{READ}{PACK}def main(args):
    use(args.beta, args.seed)
    # --- algorithm: dpo
    loss = 1
    # --- end algorithm
    step()
if __name__ == "__main__":
    main(1)
'''


@pytest.mark.parametrize(
    "check, old, new",
    [
        (drift, "return 2", "return 3"),
        (drift, "def pack", "@cache\ndef pack"),
        (order, READ + PACK, PACK + READ),
        (mains, "    step()", "    step(2)"),
        (mains, "    # --- end algorithm\n", ""),
        (flag_rules, '    """Seed."""\n', ""),
        (flag_rules, '"""Seed."""', '"""Other words."""'),
        (flag_rules, "seed: int", "seed: float"),
        (flag_rules, ", args.seed", ""),
        (module_level, "LIMIT = 3", "import sft"),
        (module_level, "LIMIT = 3", "limit = 3"),
        (module_level, "LIMIT = 3", "print(3)"),
        (sizes, "LIMIT = 3", "LIMIT = 3  #" + " " * 100),
        (sizes, "    return 1\n", "    return 1\n" * 60),
        (sizes, "    step()\n", "    step()\n" * 170),
        (sizes, "LIMIT = 3\n", "LIMIT = 3\n" * 1500),
        (twins, "    step()\n", "    step()\n    other()\n    more()\n" * 2),
    ],
)
def test_checks_find_violations(check, old, new):
    assert old in MODEL_SCRIPT
    fenced = MODEL_SCRIPT.replace("dpo", "kto").replace("loss = 1", "loss = 2")
    assert check({"dpo.py": MODEL_SCRIPT, "kto.py": fenced}) == []
    assert check({"dpo.py": MODEL_SCRIPT, "kto.py": fenced.replace(old, new)}) != []


def command_flags(markdown):
    """(script, flag) of the commands in the code blocks of a Markdown text, also in GENERATE_FLAGS="..."."""
    found, flag = [], r"(?<![\w-])--([\w-]+)"
    setting = r"""\b(\w+)=("[^"]*"|'[^']*'|\S*)"""
    for block in re.findall(r"```\w*\n(.*?)```", markdown, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.split(" #")[0]
            for name, value in re.findall(setting, line):
                script = dict(
                    GENERATE_FLAGS="batch_infer.py", RM_FLAGS="batch_infer.py", TRAIN_FLAGS="sft.py"
                )
                found += [(script[name], f) for f in re.findall(flag, value) if name in script]
            for command in re.split(r"&&|\|\||[|;]", re.sub(setting, "", line)):
                if script := re.search(r"(\S+\.py)\s", command):
                    found += [(script[1], f) for f in re.findall(flag, command[script.end() :])]
    return found


def test_readme_commands_use_flags_that_exist():
    markdown = (
        "```bash\ntorchrun --nproc_per_node 2 sft.py \\\n  --beta_x 1 --no-bf16  # --comment\n"
        'TRAIN_FLAGS="--lr 1" bash iterate.sh && python examples/toy.py --out x\n```\n--prose'
    )
    expected = [("sft.py", "beta_x"), ("sft.py", "no-bf16"), ("sft.py", "lr"), ("examples/toy.py", "out")]
    assert command_flags(markdown) == expected
    readme = REPO / "README.md"
    for script, flag in command_flags(readme.read_text()) if readme.exists() else []:
        known = flags((REPO / script).read_text())
        name = flag.replace("-", "_")
        positive = name.removeprefix("no_")
        assert name in known or known.get(positive, [""])[0] == "bool", (
            f"README: {script} has no flag --{flag}"
        )


def test_shell_scripts_parse():
    for path in (REPO / "iterate.sh", REPO / ".ci/run"):
        subprocess.run(["bash", "-n", path], check=True)
        assert "set -euo pipefail" in path.read_text()


def test_no_emoji():
    emoji = re.compile("[\u2600-\u27bf\u2b50\ufe0f\U0001f000-\U0001faff]")
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=REPO, capture_output=True, text=True
    )
    for name in files.stdout.splitlines():
        if name.endswith((".py", ".sh", ".md", ".txt", ".toml", ".yaml", ".rst")) and (REPO / name).exists():
            assert not emoji.search((REPO / name).read_text()), name

"""What README.md, CONTRIBUTING.md and examples/README.md show is run: their commands, and the diffs of "Change a copy"."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_rows, write_rows
from launch import load_script

REPO = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "examples/README.md")


def blocks(document, language):
    """The code blocks of one language in a Markdown file."""
    return re.findall(rf"```{language}\n(.*?)```", (REPO / document).read_text(), re.S)


def patched(diff, folder, monkeypatch):
    """dpo.py with the diff applied, as a module."""
    shutil.copy(REPO / "dpo.py", folder / "dpo.py")
    subprocess.run(
        ["git", "apply", "-p0", "-"],
        input=diff.replace("+++ my_dpo.py", "+++ dpo.py"),
        text=True,
        cwd=folder,
        check=True,
    )
    (folder / "dpo.py").rename(folder / "my_dpo.py")
    monkeypatch.setenv("DPO", str(folder / "my_dpo.py"))
    return load_script("dpo")


def train(script, folder, tiny, rows, **flags):
    """The losses of a training on the rows."""
    paths = {
        "pretrain": tiny,
        "dataset": write_rows(folder / "rows.jsonl", rows),
        "save_path": str(folder / "out"),
    }
    sizes = {"train_batch_size": 8, "max_len": 100, "learning_rate": 1e-2, "max_epochs": 4, "bf16": False}
    script.main(script.Args(**paths, **sizes, cache_dir=str(folder / "cache"), **flags))
    lines = (folder / "out/metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(autouse=True)
def clean_environment():
    """What a trainer's setup() puts into the environment ends with the test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_a_new_loss_is_a_short_diff(tiny, tmp_path, monkeypatch):
    diff = blocks("README.md", "diff")[0]
    assert len(diff.splitlines()) <= 15
    script = patched(diff, tmp_path, monkeypatch)
    rows = make_rows(32, seed=3)
    pairs = [
        {"prompt": a["input"], "chosen": a["output"], "rejected": b["output"]}
        for a, b in zip(rows, rows[16:])
    ]
    losses = train(script, tmp_path, tiny, pairs, loss_type="orpo", nll_loss_coef=1.0)
    assert losses[-1] < losses[0] - 0.1


def test_a_new_row_format_is_a_short_diff(tiny, tmp_path, monkeypatch):
    diff = blocks("README.md", "diff")[1]
    assert len(diff.splitlines()) <= 10
    script = patched(diff, tmp_path, monkeypatch)
    texts = make_rows(32, seed=4)
    rows = []
    for a, b, c in zip(texts, texts[8:], texts[16:]):
        scored = [(a["output"], 2.0), (b["output"], 5.0), (c["output"], 1.0)]
        completions = [{"response": text, "overall_score": score} for text, score in scored]
        rows.append({"instruction": a["input"], "completions": completions})
    losses = train(script, tmp_path, tiny, rows)
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < 0.6


@pytest.mark.slow
def test_every_command_runs(tmp_path):
    """In a copy of the project, pip stubbed, the toy's loop shortened, pytest only collecting."""
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=REPO, capture_output=True, text=True
    )
    for name in files.stdout.splitlines():
        if (REPO / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPO / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/pip").write_text("#!/bin/sh\n")
    (tmp_path / "bin/pip").chmod(0o755)
    path = f"{tmp_path}/bin{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    short = {"TRAINING_ITERS": "1", "ROLLOUT_BATCH_SIZE": "128", "PYTEST_ADDOPTS": "--collect-only -q"}
    for document in DOCUMENTS:
        if document == "examples/README.md":  # its loops name models of the hub: their commands are printed
            short["DRY_RUN"] = "1"
        for block in blocks(document, "bash"):
            if re.search(r"# .*needs (a GPU|the hub|the network)", block):
                continue
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block],
                cwd=tmp_path,
                env=os.environ | short | {"PATH": path},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, f"{document}:\n{block}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"

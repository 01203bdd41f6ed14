"""What README.md, CONTRIBUTING.md and examples/README.md show is run: their commands, and the diffs of "Change a copy"."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import console_of, make_pairs, make_rows, train, write_rows
from launch import load_script

REPO = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "examples/README.md")


def blocks(document, language):
    """The code blocks of one language in a Markdown file."""
    return re.findall(rf"```{language}\n(.*?)```", (REPO / document).read_text(), re.S)


def losses_of_a_copy(diff, folder, tiny, rows, monkeypatch, **flags):
    """The losses of dpo.py with the diff applied, trained on the rows."""
    shutil.copy(REPO / "dpo.py", folder / "my_dpo.py")
    diff = diff.replace("--- dpo.py", "--- my_dpo.py")  # as `patch my_dpo.py` takes it
    subprocess.run(["git", "apply", "-p0", "-"], input=diff, text=True, cwd=folder, check=True)
    monkeypatch.setenv("DPO", str(folder / "my_dpo.py"))
    flags |= {"train_batch_size": 8, "learning_rate": 1e-2, "max_epochs": 4, "save_path": str(folder / "out")}
    data = write_rows(folder / "rows.jsonl", rows)
    return train(load_script("dpo"), pretrain=tiny, dataset=data, **flags)["loss"]


def test_a_new_loss_is_a_short_diff(tiny, tmp_path, monkeypatch):
    diff = blocks("README.md", "diff")[0]
    assert len(diff.splitlines()) <= 15
    flags = {"loss_type": "orpo", "nll_loss_coef": 1.0}
    losses = losses_of_a_copy(diff, tmp_path, tiny, make_pairs(32), monkeypatch, **flags)
    assert losses[-1] < losses[0] - 0.1


def test_a_new_row_format_is_a_short_diff(tiny, tmp_path, monkeypatch):
    diff = blocks("README.md", "diff")[1]
    assert len(diff.splitlines()) <= 10
    texts, rows = make_rows(32, seed=4), []
    for a, b, c in zip(texts, texts[8:], texts[16:]):
        scored = [(a["output"], 2.0), (b["output"], 5.0), (c["output"], 1.0)]
        completions = [{"response": text, "overall_score": score} for text, score in scored]
        rows.append({"instruction": a["input"], "completions": completions})
    losses = losses_of_a_copy(diff, tmp_path, tiny, rows, monkeypatch)
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < 0.6


@pytest.mark.slow
def test_every_command_runs(tmp_path):
    """In a copy of the project, pip stubbed, the toy's loop shortened, pytest only collecting."""
    listing = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=REPO, text=True)
    for name in listing.splitlines():
        if (REPO / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPO / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/pip").write_text("#!/bin/sh\n")
    (tmp_path / "bin/pip").chmod(0o755)
    settings = {"TRAINING_ITERS": 1, "ROLLOUT_BATCH_SIZE": 128, "PYTEST_ADDOPTS": "--collect-only -q"}
    settings["PATH"] = f"{tmp_path}/bin:{os.environ['PATH']}"
    for document in DOCUMENTS:
        if document == "examples/README.md":  # its loops name models of the hub: their commands are printed
            settings["DRY_RUN"] = 1
        for block in blocks(document, "bash"):
            if not re.search(r"# .*needs (a GPU|the hub|the network)", block):
                command = ["bash", "-euo", "pipefail", "-c", block]
                console_of(command, tmp_path, **settings)

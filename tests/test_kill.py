"""Runs that are stopped, and SIGKILL at random moments to every trainer on two ranks: the same command again ends as
if nothing had happened.

KILLS=20 python -m pytest -m slow tests/test_kill.py kills each trainer so often (default 3). Kills at each rename
and removal, and those of batch_infer.py and of the loop, are in the tests of these.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import make_labelled, make_pairs, make_rows, metrics_of, train, weights_of, write_rows
from launch import load_script

REPO = Path(__file__).resolve().parents[1]
KILLS = int(os.environ.get("KILLS", "3"))


@pytest.fixture(scope="module")
def rows_files(tmp_path_factory):
    """{trainer: its rows}."""
    home, rows = tmp_path_factory.mktemp("rows"), make_rows(40, seed=3)
    found = {"sft": rows, "kd": rows, "dpo": make_pairs(40), "kto": make_labelled(40)}
    return {name: write_rows(home / f"{name}.jsonl", rows) for name, rows in found.items()}


LORA = {"bf16": True, "lora_rank": 4, "lora_dropout": 0.1}
RESUMED = [("dpo", LORA), ("kto", {"zero_stage": 0}), ("kd", {"zero_stage": 3, "teacher_topk": 4})]


@pytest.mark.parametrize("name, flags", RESUMED)
def test_resumed_is_bit_identical(name, flags, tiny, other, rows_files, tmp_path, monkeypatch):
    """Stopped in the second epoch, two steps behind a checkpoint; test_sft.py has the other flags."""
    script, whole, cut = load_script(name), str(tmp_path / "whole"), str(tmp_path / "cut")
    flags = {"pretrain": tiny, "dataset": rows_files[name], "max_epochs": 2, **flags}
    flags |= {"train_batch_size": 10, "save_steps": 3}
    flags |= {"teacher_model" if name == "kd" else "ref_pretrain": other}
    wanted = train(script, **flags, save_path=whole)
    report = script.report
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="stopped"):
        patch.setattr(script, "report", lambda step, *rest: report(step, *rest) if step < 8 else sys.exit("stopped"))
        train(script, **flags, save_path=cut)
    found = train(script, **flags, save_path=cut)
    assert weights_of(cut) == weights_of(whole) and found["step"] == wanted["step"]
    assert found["loss"] == wanted["loss"] and found["grad_norm"] == wanted["grad_norm"]


def command_of(name, zero_stage, model, rows, folder):
    """The command line of a run with all its files in folder, on two ranks."""
    flags = {"pretrain": model, "dataset": rows, "save_path": folder / "out", "cache_dir": folder / "cache"}
    flags |= {"zero_stage": zero_stage, "train_batch_size": 5, "micro_train_batch_size": 2, "max_len": 100}
    flags |= {"max_epochs": 2, "save_steps": 2, "max_ckpt_num": 1, "learning_rate": 1e-3}
    if name == "kd":
        flags |= {"teacher_model": model, "teacher_topk": 4}
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return [*launcher, str(REPO / os.environ.get(name.upper(), f"{name}.py")), *words, "--no-bf16"]


def kill_tree(process):
    """SIGKILL to a process, which starts nothing more meanwhile, and all below it."""
    root = psutil.Process(process.pid)
    root.suspend()
    everyone = [*root.children(recursive=True), root]
    for one in everyone:
        one.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(everyone)


def result(folder):
    """What a run leaves: the names of its files, the bytes of the weights, the metrics of each step."""
    timing = {"tokens_per_sec", "samples_per_sec"}
    steps = {name: values for name, values in metrics_of(folder / "out").items() if name not in timing}
    names = sorted(str(path.relative_to(folder)) for path in [*folder.glob("*"), *folder.glob("out/*")])
    return names, weights_of(folder / "out"), steps


@pytest.mark.slow
@pytest.mark.parametrize("name, zero_stage", [("sft", 3), ("dpo", 2), ("kto", 3), ("kd", 2)])
def test_killed_at_random_moments(name, zero_stage, tiny, rows_files, tmp_path):
    """From the encoding of the rows to the move of the model into place."""

    def start(folder):
        command = command_of(name, zero_stage, tiny, rows_files[name], tmp_path / folder)
        with open(tmp_path / "log", "a") as file:
            return subprocess.Popen(command, stdout=file, stderr=file)

    began, story = time.time(), []
    assert start("whole").wait(600) == 0, (tmp_path / "log").read_text()[-3000:]
    seconds = time.time() - began
    for _ in range(KILLS):
        process = start("run")
        story.append(random.uniform(0.3 * seconds, seconds))  # the first third is imports
        try:
            process.wait(story[-1])
        except subprocess.TimeoutExpired:
            kill_tree(process)
    assert start("run").wait(600) == 0, (story, (tmp_path / "log").read_text()[-3000:])
    assert result(tmp_path / "run") == result(tmp_path / "whole"), story

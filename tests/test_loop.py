"""The whole loop on the toy, as a newcomer runs it: minutes each, so all of them are slow tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
FLAGS = {  # what iterate.sh itself sets for the toy
    "GENERATE_FLAGS": "--input_key prompt --no-bf16 --max_new_tokens 64 --prompt_max_len 64",
    "RM_FLAGS": "--no-bf16 --max_len 160",
    "TRAIN_FLAGS": "--no-bf16 --max_len 160 --train_batch_size 32 --micro_train_batch_size 32 --learning_rate 1e-3",
    "ROLLOUT_BATCH_SIZE": "256",
    "BEST_OF_N": "4",
}
pytestmark = pytest.mark.slow


def iterate(**settings):
    """Runs iterate.sh to its end; its report, one object per iteration."""
    environment = {**os.environ, **settings, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(REPO / "iterate.sh")], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads((Path(settings["OUT"]) / "report.json").read_text())


def rises(report, name):
    values = [row[name] for row in report]
    return len(values) == 4 and all(b > a for a, b in zip(values, values[1:], strict=False))


@pytest.fixture(scope="module")
def raft(tmp_path_factory):
    """(folder, report) of `bash iterate.sh` without any setting but the place."""
    out = tmp_path_factory.mktemp("raft") / "run"
    return out, iterate(OUT=str(out))


def test_raft_raises_reward_and_truth(raft):
    out, report = raft
    assert rises(report, "reward") and report[-1]["reward"] > report[0]["reward"] + 0.5
    assert report[-1]["true_score"] > report[0]["true_score"] + 0.3 and report[-1]["finished"] > 0.95
    for k in range(3):  # nothing was overwritten, and every policy is another
        rows = [json.loads(line) for line in (out / f"iter_{k}" / "scored.jsonl").read_text().splitlines()]
        assert {"id", "sample", "input", "output", "finish_reason", "reward"} <= set(rows[0])
    weights = [(out / f"iter_{k}" / "model" / "model.safetensors").read_bytes() for k in range(3)]
    assert len(set(weights)) == 3
    assert (out / "report.png").stat().st_size > 10_000 and "iteration 3" in (out / "samples.md").read_text()


def test_a_random_reward_leaves_the_truth_alone(raft, tmp_path):
    """The control: trained on the best samples of a reward that knows nothing, the true score hardly moves."""
    out, report = raft
    toy = [sys.executable, str(REPO / "examples/toy.py"), "--out", str(out / "toy"), "--random_rm"]
    subprocess.run(toy, check=True, timeout=600)
    models = {"POLICY_MODEL_PATH": str(out / "toy/policy"), "RM_MODEL_PATH": str(out / "toy/rm_random")}
    iterate(OUT=str(tmp_path / "run"), PROMPT_DATASET=str(out / "toy/prompts.jsonl"), **models, **FLAGS)
    plot = [sys.executable, str(REPO / "examples/plot.py"), "--out", str(tmp_path / "run")]
    plot += ["--pretrain", models["POLICY_MODEL_PATH"], "--score_fn", f"{REPO}/examples/toy.py:true_score"]
    subprocess.run(plot, check=True, timeout=300)
    control = json.loads((tmp_path / "run" / "report.json").read_text())
    moved, real = (abs(r[-1]["true_score"] - r[0]["true_score"]) for r in (control, report))
    assert moved < 0.2 * real, (moved, real)


def test_iterative_dpo_raises_the_reward(tmp_path):
    report = iterate(OUT=str(tmp_path / "run"), METHOD="iter_dpo")
    assert rises(report, "reward") and report[-1]["reward"] > report[0]["reward"] + 0.2

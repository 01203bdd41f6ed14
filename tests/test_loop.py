"""The whole loop on the toy, as a newcomer runs it: minutes each. The first is a slow test; the others, which
take half an hour together, run with `python -m pytest -m loop -n 0`."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import console_of, make_model, make_tokenizer, write_rows

REPO = Path(__file__).resolve().parents[1]
HF = {"GENERATE_FLAGS": "--eval_task generate"}  # starts faster than vLLM, which the first loop uses


def iterate(out, **settings):
    """Runs iterate.sh; its report, one object per iteration, and its last line."""
    console = console_of(["bash", REPO / "iterate.sh"], OUT=out, **settings)
    return json.loads((out / "report.json").read_text()), console.splitlines()[-1]


@pytest.fixture(scope="module")
def raft(tmp_path_factory):
    """(folder, report, last line) of `bash iterate.sh` without any setting but the place."""
    out = tmp_path_factory.mktemp("raft") / "run"
    return out, *iterate(out)


@pytest.fixture
def out(raft, tmp_path):
    """A new OUT with the toy that is there already."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/toy").symlink_to(raft[0] / "toy")
    return tmp_path / "run"


@pytest.mark.slow
def test_raft_raises_reward_and_truth(raft):
    out, report, verdict = raft
    assert verdict.startswith("reward rose: ") and report[-1]["reward"] > report[0]["reward"] + 0.5
    assert report[-1]["true_score"] > report[0]["true_score"] + 0.3 and report[-1]["finished"] > 0.95
    weights = {(out / f"iter_{k}/model/model.safetensors").read_bytes() for k in range(3)}
    assert len(weights) == 3  # every policy is another
    assert 10_000 < (out / "report.png").stat().st_size < 80_000
    assert "iter 3: reward" in (out / "samples.md").read_text()
    assert "reward rose" in iterate(out)[1]  # the same command again: nothing to do but the report


@pytest.mark.loop
def test_a_random_reward_leaves_the_truth_alone(raft, out, tmp_path):
    """The control: trained on the best samples of a reward that knows nothing, the true score hardly moves."""
    reward = "import random\ndef f(prompt, response, row): return random.Random(response).gauss(0, 0.5)\n"
    (tmp_path / "random_reward.py").write_text(reward)
    flags = f"--reward_fn {tmp_path}/random_reward.py:f"
    control, _ = iterate(out, RM_FLAGS=flags, TRAINING_ITERS=1, KL=0)
    moved, real = (abs(r[1]["true_score"] - r[0]["true_score"]) for r in (control, raft[1]))
    assert moved < 0.2 * real, (moved, real)


@pytest.mark.loop
def test_iterative_dpo_raises_the_reward(out):
    report, verdict = iterate(out, METHOD="iter_dpo", TRAINING_ITERS=2, KL=0, **HF)
    assert verdict.startswith("reward rose: ") and report[-1]["reward"] > report[0]["reward"] + 0.15


@pytest.mark.loop
def test_distillation_lowers_the_divergence_from_the_teacher(out):
    report, verdict = iterate(out, METHOD="distill", **HF)
    assert verdict.startswith("kl_teacher fell: "), verdict
    assert report[-1]["kl_teacher"] < 0.3 * report[0]["kl_teacher"]
    assert report[-1]["true_score"] > report[0]["true_score"] + 0.5  # the teacher knows, the student did not


@pytest.mark.loop
def test_conditional_sft_gives_the_rewards_it_is_asked_for(out):
    report, verdict = iterate(out, METHOD="csft", **HF)
    assert [row["asked"] for row in report] == [-1.5, -0.75, 0, 0.75, 1.5]
    slope = np.polyfit([row["asked"] for row in report], [row["achieved"] for row in report], 1)[0]
    assert verdict.startswith(f"csft: slope of achieved against asked {slope:.2f}") and slope > 0.5, verdict


@pytest.mark.loop
def test_raft_on_arithmetic_with_a_python_reward(tmp_path):
    """Two-digit additions, two in five of the labels wrong; the reward checks the sum, and no model is asked."""
    rng = random.Random(0)
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    rng.shuffle(pairs)
    wrong = [rng.choice([-10, -2, -1, 1, 2, 10]) * (rng.random() < 0.4) for _ in pairs]
    rows = [{"input": f"{a}+{b}=", "output": f" #### {a + b + w}"} for (a, b), w in zip(pairs, wrong)]
    prompts = [{"question": f"{a}+{b}=", "answer": f" #### {a + b}"} for a, b in pairs[:512]]
    sizes = {"hidden_size": 128, "intermediate_size": 512, "initializer_range": 0.02}
    init = make_model(tmp_path / "init", make_tokenizer(), **sizes)
    data = write_rows(tmp_path / "sft.jsonl", rows)
    flags = "--no-bf16 --max_len 32 --train_batch_size 128 --micro_train_batch_size 128 --learning_rate 2e-3"
    command = [sys.executable, REPO / "sft.py", *flags.split(), "--max_epochs", 12]
    console_of([*command, "--pretrain", init, "--dataset", data, "--save_path", tmp_path / "policy"])
    report, verdict = iterate(
        tmp_path / "run",
        POLICY_MODEL_PATH=tmp_path / "policy",
        PROMPT_DATASET=write_rows(tmp_path / "prompts.jsonl", prompts),
        GENERATE_FLAGS="--eval_task generate --input_key question --max_new_tokens 12 --prompt_max_len 16",
        RM_FLAGS=f"--reward_fn {REPO}/examples/rewards/gsm8k.py:correct --min_reward 1",
        TRAIN_FLAGS="--max_len 32 --train_batch_size 32 --micro_train_batch_size 32 --learning_rate 1e-4",
        BF16=0,
        KL=0,
    )
    assert verdict.startswith("reward rose: ") and report[-1]["reward"] > report[0]["reward"] + 0.1

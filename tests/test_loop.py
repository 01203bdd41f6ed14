"""The whole loop on the toy, as a newcomer runs it: minutes each, so all of them are slow tests."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer, write_rows
from launch import load_script
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

REPO = Path(__file__).resolve().parents[1]
toy = load_script("examples/toy")
FLAGS = {  # what iterate.sh itself sets for the toy, with Hugging Face
    "GENERATE_FLAGS": "--eval_task generate --input_key prompt --no-bf16 --max_new_tokens 64 --prompt_max_len 64",
    "RM_FLAGS": "--no-bf16 --max_len 160",
    "TRAIN_FLAGS": "--no-bf16 --max_len 160 --train_batch_size 32 --micro_train_batch_size 32 --learning_rate 1e-3",
    "ROLLOUT_BATCH_SIZE": "256",
    "BEST_OF_N": "4",
}
HF = {"GENERATE_FLAGS": "--eval_task generate"}  # starts faster than vLLM, which the first loop uses where it is there
pytestmark = pytest.mark.slow


def script(name, **flags):
    """Runs a script to its end."""
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    done = subprocess.run([sys.executable, str(REPO / name), *words, "--no-bf16"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def iterate(**settings):
    """Runs iterate.sh to its end; its report, one object per iteration."""
    environment = {**os.environ, **settings, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(REPO / "iterate.sh")], env=environment, capture_output=True, text=True, timeout=1800)
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


def on_the_same_toy(raft, folder):
    """A new OUT with the toy that is there already."""
    folder.mkdir()
    (folder / "toy").symlink_to(raft[0] / "toy")
    return str(folder)


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
    toy, report = raft[0] / "toy", raft[1]
    (tmp_path / "noise.py").write_text("from random import random\n\ndef noise(prompt, response, row):\n    return random()\n")
    models = {"POLICY_MODEL_PATH": str(toy / "policy"), "PROMPT_DATASET": str(toy / "prompts.jsonl")}
    noise = {"RM_FLAGS": f"--reward_fn {tmp_path}/noise.py:noise --no-bf16 --max_len 160"}
    iterate(OUT=str(tmp_path / "run"), **models, **FLAGS | noise)
    plot = [sys.executable, str(REPO / "examples/plot.py"), "--out", str(tmp_path / "run")]
    plot += ["--pretrain", models["POLICY_MODEL_PATH"], "--score_fn", f"{REPO}/examples/toy.py:true_score"]
    subprocess.run(plot, check=True, timeout=300)
    control = json.loads((tmp_path / "run" / "report.json").read_text())
    moved, real = (abs(r[-1]["true_score"] - r[0]["true_score"]) for r in (control, report))
    assert moved < 0.2 * real, (moved, real)


def test_iterative_dpo_raises_the_reward(raft, tmp_path):
    report = iterate(OUT=on_the_same_toy(raft, tmp_path / "run"), METHOD="iter_dpo", **HF)
    assert rises(report, "reward") and report[-1]["reward"] > report[0]["reward"] + 0.2


def test_distillation_lowers_the_divergence_from_the_teacher(raft, tmp_path):
    report = iterate(OUT=on_the_same_toy(raft, tmp_path / "run"), METHOD="distill", **HF)
    kl = [row["kl_teacher"] for row in report]
    assert all(b < a for a, b in zip(kl, kl[1:], strict=False)) and kl[-1] < 0.3 * kl[0], kl
    assert report[-1]["true_score"] > report[0]["true_score"] + 0.5  # what the teacher knows and the student did not


def test_conditional_sft_gives_the_rewards_it_is_asked_for(raft, tmp_path):
    report = iterate(OUT=on_the_same_toy(raft, tmp_path / "run"), METHOD="csft", **HF)
    assert [row["asked"] for row in report] == [-1.5, -0.75, 0, 0.75, 1.5]
    achieved = [row["achieved"] for row in report]
    assert all(b > a for a, b in zip(achieved, achieved[1:], strict=False)) and achieved[-1] - achieved[0] > 1, achieved


def test_raft_on_arithmetic_with_a_python_reward(tmp_path):
    """Two-digit additions, two in five of the labels wrong; the reward checks the sum, and no model is asked for it."""
    rng = random.Random(0)
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    rng.shuffle(pairs)
    wrong = [rng.choice([-10, -2, -1, 1, 2, 10]) * (rng.random() < 0.4) for _ in pairs]
    rows = [{"question": f"{a}+{b}=", "answer": f" #### {a + b + w}"} for (a, b), w in zip(pairs, wrong, strict=True)]
    prompts = [{"question": f"{a}+{b}=", "answer": f" #### {a + b}"} for a, b in pairs[:512]]
    sizes = {"hidden_size": 128, "intermediate_size": 512, "initializer_range": 0.02}
    init = make_model(tmp_path / "init", make_tokenizer(), **sizes)
    flags = {"max_len": 32, "train_batch_size": 128, "micro_train_batch_size": 128, "learning_rate": 2e-3}
    flags |= {"max_epochs": 12, "save_path": tmp_path / "policy", "dataset": write_rows(tmp_path / "sft.jsonl", rows)}
    script("sft.py", pretrain=init, **flags)
    report = iterate(
        OUT=str(tmp_path / "run"),
        POLICY_MODEL_PATH=str(tmp_path / "policy"),
        PROMPT_DATASET=write_rows(tmp_path / "prompts.jsonl", prompts),
        GENERATE_FLAGS="--eval_task generate --input_key question --no-bf16 --max_new_tokens 12 --prompt_max_len 16",
        RM_FLAGS=f"--reward_fn {REPO}/examples/rewards/gsm8k.py:correct --min_reward 1",
        TRAIN_FLAGS="--no-bf16 --max_len 32 --train_batch_size 32 --micro_train_batch_size 32 --learning_rate 1e-4",
        KL="0",
    )
    assert rises(report, "reward") and report[-1]["reward"] > report[0]["reward"] + 0.1


def test_kto_weights_restore_what_rare_desirable_rows_cost(raft, tmp_path):
    """With one desirable row in six and weight 5 (n_D w_D = n_U w_U) the policy gains what balanced data give it, within 20 %,
    in reward and in true score, and the reward is nearer to theirs than without the weight. Four draws of rows and start
    policies: the reward is off by 1 to 6 % with the weight; without it by 24 and 32 %, or hardly any text was left (twice)."""
    folder, rng = raft[0] / "toy", random.Random("kto 1")
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    rm = AutoModelForSequenceClassification.from_pretrained(folder / "rm").eval()
    prompts = [row["prompt"] for row in read(folder / "prompts.jsonl")]

    def measure(path):
        """Mean reward and mean true score of four samples per prompt."""
        policy = AutoModelForCausalLM.from_pretrained(path).eval()
        rows = [row for seed in range(4) for row in toy.sample(policy, tokenizer, prompts, seed)[0]]
        rewards, scores, _ = toy.compare(rm, tokenizer, rows)
        return torch.stack([rewards.mean(), scores.mean()])

    texts = {True: [], False: []}
    for row in (toy.make_row(rng) for _ in range(3000)):
        score = toy.true_score(row["output"])
        if score:
            texts[score > 0].append({"prompt": row["input"], "completion": row["output"], "label": score > 0})
    gains, start = {}, measure(folder / "policy")
    for name, n_good, n_bad, weight in (("balanced", 300, 300, 1), ("rare", 100, 500, 1), ("weighted", 100, 500, 5)):
        data = write_rows(tmp_path / f"{name}.jsonl", texts[True][:n_good] + texts[False][:n_bad])
        flags = {"learning_rate": 5e-4, "max_epochs": 3, "max_len": 160, "cache_dir": tmp_path / "cache"}
        flags |= {"train_batch_size": 48, "micro_train_batch_size": 48, "desirable_loss_weight": weight}
        script("kto.py", pretrain=folder / "policy", dataset=data, save_path=tmp_path / name, **flags)
        gains[name] = measure(tmp_path / name) - start
    off = {name: (gains[name] / gains["balanced"] - 1).abs() for name in gains}
    assert (gains["balanced"] > 0.3).all() and (off["weighted"] < 0.2).all() and off["rare"][0] > off["weighted"][0], gains

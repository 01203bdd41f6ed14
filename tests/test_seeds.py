"""The commands, loops and YAML files of two old documents (tests/seeds), taken from them and run.

Replaced are: module names; names of models and data; sizes; how many GPUs (a `deepspeed` in front of the real
one adds --num_gpus). Everything else runs as printed: missing backslashes, quotes in heredocs, {wandb_token}. At
rates like 5e-7 losses of single steps say little in bf16: likelihoods are computed in fp32 before and after.
"""

import dataclasses
import importlib.util
import json
import math
import re
import statistics
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import console_of, make_model, make_rows, metrics_of, weights_of, write_rows
from launch import load_script
from transformers import AutoModelForCausalLM, AutoTokenizer

REPO = Path(__file__).resolve().parents[1]
RST = (REPO / "tests/seeds/openrlhf_non_rl_methods.rst").read_text()
MARKDOWN = (REPO / "tests/seeds/trinity_offline_dpo_sft.md").read_text()
SCRIPTS = {"train_dpo": "dpo", "train_kto": "kto", "train_sft": "sft", "train_kd": "kd", "batch_inference": "batch_infer"}


# --- the documents


def shell_blocks(rst):
    """{title of the section: shell code} of a reStructuredText."""
    lines, blocks, title = rst.splitlines(), {}, None
    for i, line in enumerate(lines):
        if re.fullmatch(r"[=^-]{3,}", line):
            title = lines[i - 1]
        if line == ".. code-block:: bash":
            end = next((j for j in range(i + 1, len(lines)) if re.match(r"\S", lines[j])), len(lines))
            blocks[title] = textwrap.dedent("\n".join(lines[i + 1 : end])).strip() + "\n"
    return blocks


BLOCKS = shell_blocks(RST)
YAML = {re.search(r"algorithm_type: (\w+)", text)[1]: text for text in re.findall(r"```yaml\n(.*?)```", MARKDOWN, re.S)}


def test_parsers_miss_nothing_and_every_documented_flag_exists():
    assert len(BLOCKS) == RST.count("code-block") == 6 and len(YAML) == MARKDOWN.count("```yaml") == 2
    fields = [field.name for name in SCRIPTS.values() for field in dataclasses.fields(load_script(name).Args)]
    assert {*re.findall(r"--(\w+)", RST)} - {*fields} == {"module"}


# --- running them

NAMES = {
    "OpenRLHF/Llama-3-8b-sft-mixture": "policy",
    "OpenRLHF/Llama-3-8b-rm-mixture": "rm",
    "meta-llama/Llama-2-7b-hf": "policy",
    "meta-llama/Llama-2-13b-chat-hf": "teacher",
    "OpenRLHF/preference_dataset_mixture2_and_safe_pku": "pairs.jsonl",
    "Dylan2048/ultrafeedback-unpaired-preferences": "unpaired.jsonl",
    "OpenRLHF/prompt-collection-v0.1": "prompts.jsonl",
    "Open-Orca/OpenOrca": "answers.jsonl",
}
SIZES = {"train_batch_size": 4, "max_len": 192, "max_new_tokens": 64, "prompt_max_len": 64, "tp_size": 1, "best_of_n": 4}
SIZES |= {"TRAINING_ITERS": 2, "ROLLOUT_BATCH_SIZE": 32}
LAUNCHER = """# the real launcher, on CPU ranks; what is in checkpoint/ afterwards is kept: loops overwrite it
deepspeed() {
   command deepspeed --num_gpus $RANKS --master_port $((20000 + RANDOM)) "$@" || return
   cp -r checkpoint "after_$((++launches))"
}
"""


def run(command, folder, **variables):
    """The console of a command; the scripts are found as modules, too."""
    return console_of(command, folder, PYTHONPATH=REPO, HOME=folder, **variables)


def run_block(title, folder, ranks=1, vllm=False):
    """Runs a block with our names and small sizes, without vLLM unless it is asked for and there."""
    text = BLOCKS[title]
    for module, script in SCRIPTS.items():
        text = text.replace(f"openrlhf.cli.{module}", script)
    for name, ours in NAMES.items():
        text = text.replace(name, ours)
    for name, size in SIZES.items():
        text = re.sub(rf"\b{name}([ =])\d+", rf"{name}\g<1>{size}", text)
    assert "openrlhf" not in text.lower() and "llama-2-7b-hf" not in text
    if not vllm or not importlib.util.find_spec("vllm"):
        text = text.replace("--eval_task generate_vllm", "--eval_task generate")
    run(["bash", "-c", LAUNCHER + text], folder, RANKS=ranks)


def read(path):
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def trained(folder, start):
    """The metrics of a finished run whose model is not its start model."""
    assert all((folder / name).stat().st_size for name in ("config.json", "tokenizer.json", "args.json"))
    assert weights_of(folder) != weights_of(start)
    return metrics_of(folder)


@torch.no_grad()
def likelihood(model, pairs):
    """Mean log-probability, in nats, of responses with EOS; pairs: (prompt, a text or messages; response)."""
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).float()  # as training began
    tokenizer, total = AutoTokenizer.from_pretrained(model), 0.0
    for prompt, response in pairs:
        if isinstance(prompt, list):
            prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        n = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor([tokenizer(prompt + response)["input_ids"] + [tokenizer.eos_token_id]])
        logps = policy(ids[:, :-1]).logits.log_softmax(-1)
        total += logps.gather(2, ids[:, 1:, None])[0, n - 1 :].sum().item()
    return total / len(pairs)


def talk(question, answer):
    """A conversation of two turns."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


GOOD, BAD = make_rows(2)  # with the prompt of the first
PROMPT = GOOD["input"]
TEXTS = (talk(PROMPT, "")[:1], GOOD["output"], BAD["output"])


@pytest.fixture
def folder(tmp_path, tiny, tokenizer):
    """A folder with the tiny model as policy, another as teacher, and 32 equal rows of each kind."""
    (tmp_path / "policy").symlink_to(tiny)
    make_model(tmp_path / "teacher", tokenizer, hidden_size=96)
    write_rows(tmp_path / "answers.jsonl", [{"question": PROMPT, "response": GOOD["output"]}] * 32)
    sides = [{"response": GOOD["output"], "score": 1}, {"response": BAD["output"], "score": 0}]
    write_rows(tmp_path / "unpaired.jsonl", [{"instruction": PROMPT, **side} for side in sides] * 16)
    pair = {"chosen": talk(PROMPT, GOOD["output"]), "rejected": talk(PROMPT, BAD["output"])}
    write_rows(tmp_path / "pairs.jsonl", [pair] * 32)
    return tmp_path


def assert_margin_rose(before, after, pairs):
    """Training widened the gap between good and bad responses; pairs: (prompt, good, bad)."""
    good, bad = ([(pair[0], pair[side]) for pair in pairs] for side in (1, 2))
    gaps = [likelihood(model, good) - likelihood(model, bad) for model in (before, after)]
    assert gaps[1] > gaps[0]


METHODS = {  # title of the block: (its model, the first loss: the policy is its reference)
    "Direct Preference Optimization (DPO)": ("llama3-8b-dpo", math.log(2)),
    "Kahneman-Tversky Optimization (KTO)": ("llama3-8b-kto", 0.5),
    "Knowledge Distillation (MiniLLM)": ("llama2-7b-kd", None),
}


@pytest.mark.slow
@pytest.mark.parametrize("title", METHODS)
def test_one_command(title, folder):
    run_block(title, folder)
    start, after, first = folder / "policy", folder / "checkpoint" / METHODS[title][0], METHODS[title][1]
    losses = trained(after, start)["loss"]
    assert len(losses) == 8
    if first is None:
        assert losses[-1] < losses[0]
    else:
        assert math.isclose(losses[0], first, rel_tol=1e-6)
        prompt = f"User: {PROMPT}\nAssistant: " if first == 0.5 else TEXTS[0]
        assert_margin_rose(start, after, [(prompt, *TEXTS[1:])])


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The toy's policy, reward model and data, under the names that the blocks get."""
    folder = tmp_path_factory.mktemp("toy")
    run([sys.executable, REPO / "examples/toy.py", "--out", "toy"], folder)
    prompts = [{"context_messages": talk(row["prompt"], "")[:1]} for row in read(folder / "toy/prompts.jsonl")]
    write_rows(folder / "prompts.jsonl", prompts)
    talks = [talk(row["input"], row["output"]) for row in read(folder / "toy/sft.jsonl")[:64]]
    pairs = [{"chosen": a, "rejected": b} for a, b in zip(talks, talks[1:] + talks[:1], strict=True)]
    write_rows(folder / "pairs.jsonl", pairs)
    return [folder / "toy/policy", folder / "toy/rm", folder / "prompts.jsonl", folder / "pairs.jsonl"]


@pytest.fixture
def loop(toy, tmp_path):
    """A folder in which a loop finds the toy."""
    for path in toy:
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.mark.slow
def test_raft_loop(loop):
    """Two iterations: rm and sft of each leave after_1 .. after_4."""
    run_block("Rejection Sampling & RAFT", loop, vllm=True)
    assert (loop / "checkpoint/llama-3-8b-rejection/iter.log").read_text() == "2\n"
    policy = loop / "policy"
    for k in (0, 1):
        after = loop / f"after_{2 * k + 2}/llama-3-8b-rejection"
        samples, best = read(after / "generate.jsonl"), read(after / "rm.jsonl")  # in save_path, and still there
        assert len(samples) == 128 and {row["id"] for row in samples} == {*range(32 * k, 32 * k + 32)}
        assert [row["id"] for row in best] == [*range(32 * k, 32 * k + 32)]
        pairs = [(row["input"], row["output"]) for row in best]
        assert likelihood(after, pairs) > likelihood(policy, pairs)
        policy = after


@pytest.mark.slow
def test_iterative_dpo_loop(loop):
    run_block("Iterative DPO", loop)
    policy = loop / "policy"
    for k in (0, 1):
        after = loop / f"after_{2 * k + 2}/llama-3-8b-iter-dpo"
        pairs = read(after / "rm.jsonl")
        assert 16 < len(pairs) <= 32 and all(row["chosen_reward"] > row["rejected_reward"] for row in pairs)
        metrics = trained(after / "checkpoint", policy)
        start = math.log(2)  # the reference is the first policy, so only iteration 0 starts at h = 0
        assert math.isclose(metrics["loss"][0], start, rel_tol=1e-6) == (k == 0)
        texts = [(row["prompt"], row["chosen"], row["rejected"]) for row in pairs]
        assert_margin_rose(policy, after / "checkpoint", texts)
        policy = after / "checkpoint"


@pytest.mark.slow
def test_conditional_sft(loop):
    """What the document meant: score conversations, put the reward into the prompt, train on that."""
    run_block("Conditional SFT", loop, ranks=2)
    rows = read(loop / "checkpoint/llama-2-8b-csft/rm.jsonl")
    rewards = [row["reward"] for row in rows]
    mean, std = statistics.fmean(rewards), statistics.pstdev(rewards)  # --normalize_reward
    for row, pair in zip(rows, read(loop / "pairs.jsonl"), strict=True):
        question, answer = pair["chosen"]
        shown = f"{question['content']} <rm_score>: {(row['reward'] - mean) / std:.2f} "
        assert row["input"] + [answer] == talk(shown, row["output"])
    assert len(trained(loop / "checkpoint/llama-3-8b-csft", loop / "policy")["loss"]) == 16
    pairs = [(row["input"], row["output"]) for row in rows]
    assert likelihood(loop / "checkpoint/llama-3-8b-csft", pairs) > likelihood(loop / "policy", pairs)


@pytest.mark.slow
@pytest.mark.parametrize("method, ranks", [("dpo", 2), ("sft", 1)])
def test_trinity_yaml(folder, method, ranks):
    """The file as printed but for sizes; names come in by the variables that it reads."""
    text = re.sub(r"train_batch_size: \d+", "train_batch_size: 8", YAML[method])
    (folder / "x.yaml").write_text(re.sub(r"save_interval: \d+", "save_interval: 5", text))
    row = {"prompt": PROMPT, "chosen": GOOD["output"], "rejected": BAD["output"], "messages": talk(PROMPT, GOOD["output"])}
    for name in ("human_like_dpo_dataset", "Mixture-of-Thoughts"):
        (folder / "data" / name).mkdir(parents=True)
        write_rows(folder / "data" / name / "train.jsonl", [row] * 32)
    names = {"TRINITY_MODEL_PATH": folder / "policy", "DATASET_PATH": folder / "data"}
    command = [sys.executable, REPO / "examples/trinity.py", "run", "--config", "x.yaml", "--num_processes", ranks]
    run(command, folder, **names)
    job = folder / "checkpoints/<project_name>/<experiment_name>"
    assert len(trained(job / "model", folder / "policy")["loss"]) == {"dpo": 8, "sft": 20}[method]
    assert_margin_rose(folder / "policy", job / "model", [TEXTS])
    assert "nothing to do" in run(command, folder, **names)

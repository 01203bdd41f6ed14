"""The commands, loops and YAML files of two old documents (tests/seeds), taken from them and run.

Replaced are: module names; names of models and data; sizes; how many GPUs (a `deepspeed` in front of the real
one adds --num_gpus). Everything else runs as it is printed: backslashes that are missing, quotes in heredocs,
bf16, learning rates, {wandb_token}. At rates like 5e-7 the losses of single steps say little in bf16; so what
training was for (a likelihood, a margin) is computed in fp32 from the models before and after it.
"""

import dataclasses
import importlib.util
import json
import math
import os
import re
import socket
import statistics
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tyro
from conftest import make_model, make_rows, write_rows
from launch import load_script

REPO = Path(__file__).resolve().parents[1]
RST = (REPO / "tests/seeds/openrlhf_non_rl_methods.rst").read_text()
MARKDOWN = (REPO / "tests/seeds/trinity_offline_dpo_sft.md").read_text()


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


def yaml_blocks(markdown):
    """{algorithm: text} of the YAML files in a Markdown text."""
    texts = re.findall(r"```yaml\n(.*?)```", markdown, re.S)
    return {re.search(r"algorithm_type: (\w+)", text)[1]: text for text in texts}


SCRIPTS = {"train_dpo": "dpo", "train_kto": "kto", "train_sft": "sft", "train_kd": "kd"}
SCRIPTS |= {"batch_inference": "batch_infer"}


def documented_flags(rst):
    """{script: flags} that a reStructuredText uses in commands or lists as options."""
    found, script = {name: set() for name in SCRIPTS.values()}, None
    for line in rst.splitlines():
        for name in re.findall(r"openrlhf\.cli\.(\w+)|Options for ``(batch_inference)``", line):
            script = SCRIPTS["".join(name)]
        if script and "--module $" not in line:  # a command in a variable
            found[script] |= {*re.findall(r"--(\w+)", line)} - {"module"}
    return found


BLOCKS, YAML, FLAGS = shell_blocks(RST), yaml_blocks(MARKDOWN), documented_flags(RST)


def test_parsers_miss_nothing():
    titles = ["Direct Preference Optimization (DPO)", "Kahneman-Tversky Optimization (KTO)"]
    titles += ["Rejection Sampling & RAFT", "Iterative DPO", "Conditional SFT", "Knowledge Distillation (MiniLLM)"]
    assert [*BLOCKS] == titles and len(BLOCKS) == RST.count("code-block")
    assert [*YAML] == ["dpo", "sft"] and len(YAML) == MARKDOWN.count("```yaml")
    modules = re.findall(r"openrlhf\.cli\.(\w+)", "".join(BLOCKS.values()))
    assert sorted(modules) == sorted([*SCRIPTS] + ["train_sft", "train_dpo"] + 4 * ["batch_inference"])
    assert {script: len(flags) for script, flags in FLAGS.items()} == {
        "dpo": 28,
        "kto": 23,
        "sft": 15,
        "kd": 23,
        "batch_infer": 28,
    }


@pytest.mark.parametrize("name", FLAGS)
def test_help_lists_every_documented_flag(name, capsys):
    script = load_script(name)
    with pytest.raises(SystemExit) as stopped:
        tyro.cli(script.Args, args=["--help"], description=script.__doc__, use_underscores=True)  # as the scripts
    listed = {*re.findall(r"--([\w-]+)", capsys.readouterr().out)}
    assert stopped.value.code == 0 and FLAGS[name] - listed == set()


SHARED = "attn_implementation disable_fast_tokenizer full_determinism param_dtype use_ms"
ALL = f"""{SHARED} adam_offload aux_loss_coef dataset_split deepcompile disable_ds_ckpt ds_tensor_parallel_size
    eval_dataset eval_split grad_accum_dtype gradient_checkpointing_use_reentrant load_in_4bit lora_alpha lora_dropout
    lora_rank lr_scheduler lr_warmup_ratio max_ckpt_mem max_ckpt_num max_norm overlap_comm save_hf_ckpt target_modules
    use_ds_universal_ckpt use_liger_kernel use_tensorboard wandb_group wandb_org wandb_project wandb_run_name zpg"""
RING = "packing_samples ring_attn_size ring_head_stride tokenizer_chat_template"
LATER = {  # flags of the last OpenRLHF that had all five programs (March 2026), less those of the documents
    "dpo": f"{ALL} {RING} min_lr_ratio",
    "kto": f"{ALL} desirable_loss_weight undesirable_loss_weight",
    "sft": f"{ALL} {RING} multiturn pretrain_mode train_split",
    "kd": f"{ALL} pretrain_mode",
    "batch_infer": f"{SHARED} csft_prompt enable_csft",
}


@pytest.mark.parametrize("name", LATER)
def test_later_flags_are_ours_or_name_ours(name, capsys):
    script = load_script(name)
    ours = {field.name for field in dataclasses.fields(script.Args)}
    for flag in LATER[name].split():
        if flag not in ours:
            with pytest.raises(SystemExit) as stopped:
                script.explain_flags(["--pretrain", "x", f"--{flag}", "1"])
            assert stopped.value.code == 2 and f"--{flag}: " in capsys.readouterr().err
    assert script.explain_flags(["--pretrain", "--x"]) == ["--pretrain", "--x"]


def ports():
    """The blocks of examples/README.md that start a loop."""
    blocks = re.findall(r"```bash\n(.*?)```", (REPO / "examples/README.md").read_text(), re.S)
    return [block for block in blocks if "bash iterate.sh" in block]


@pytest.mark.parametrize("block", ports(), ids=["raft", "iter_dpo", "csft"])
def test_ported_loop_passes_all_checks(block, tmp_path):
    """Printed, not run: iterate.sh checks names and flags, and says what it would do."""
    (tmp_path / "iterate.sh").write_text(f'exec bash "{REPO}/iterate.sh"\n')
    console = run(["bash", "-c", block], tmp_path, DRY_RUN="1")
    last = {"raft": "iter_10", "iter_dpo": "iter_5", "csft": "asked_1.5"}[re.search("METHOD=([a-z_]+)", block)[1]]
    assert f"{last}/generate.jsonl" in console and "--num_gpus 8" in console


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
SIZES = {
    r"--train_batch_size \d+": "--train_batch_size 4",
    r"--max_len \d+": "--max_len 192",
    r"--max_new_tokens \d+": "--max_new_tokens 64",
    r"--prompt_max_len \d+": "--prompt_max_len 64",
    r"--tp_size \d+": "--tp_size 1",
    r"--best_of_n \d+": "--best_of_n 4",
    r"TRAINING_ITERS=\d+": "TRAINING_ITERS=2",
    r"ROLLOUT_BATCH_SIZE=\d+": "ROLLOUT_BATCH_SIZE=32",
}
LAUNCHER = """#!/usr/bin/env bash
# the real launcher, on CPU ranks; what is in checkpoint/ afterwards is kept: loops overwrite it
{real} --num_gpus {ranks} --master_port {port} "$@" || exit
n=$(find . -maxdepth 1 -name 'after_*' | wc -l)
[[ ! -d checkpoint ]] || cp -r checkpoint "after_$((n + 1))"
"""


def little(text):
    """A block with our names and small sizes."""
    for module, script in SCRIPTS.items():
        text = text.replace(f"openrlhf.cli.{module}", script)
    for name, ours in NAMES.items():
        text = text.replace(name, ours)
    for pattern, size in SIZES.items():
        text = re.sub(pattern, size, text)
    assert "openrlhf" not in text.lower() and "llama-2-7b-hf" not in text
    return text


def environment(folder, ranks=1):
    """Variables under which a block runs: our launcher, the scripts as modules."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launcher = folder / "bin/deepspeed"
    launcher.parent.mkdir(exist_ok=True)
    launcher.write_text(LAUNCHER.format(real=Path(sys.executable).parent / "deepspeed", ranks=ranks, port=port))
    launcher.chmod(0o755)
    path = f"{launcher.parent}{os.pathsep}{os.environ['PATH']}"
    own = {"PATH": path, "PYTHONPATH": str(REPO), "HOME": str(folder)}
    return {**os.environ, **own}


def run(command, folder, ranks=1, **variables):
    """The console of a command that must end well."""
    options = {"cwd": folder, "env": environment(folder, ranks) | variables, "text": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, timeout=900, **options, **pipes)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def read(path):
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def trained(folder, start):
    """Columns of metrics.jsonl of a finished run whose model is not its start model."""
    names = ("manifest.json", "model.safetensors", "config.json", "tokenizer.json", "args.json")
    assert all((folder / name).stat().st_size for name in names)
    assert (folder / "model.safetensors").read_bytes() != (start / "model.safetensors").read_bytes()
    rows = read(folder / "metrics.jsonl")
    return {name: [row[name] for row in rows] for name in rows[-1]}


def likelihood(model, pairs):
    """Mean log-probability, in nats, of responses with EOS; pairs: (prompt, a text or messages; response)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).float()  # as training began
    tokenizer, total = AutoTokenizer.from_pretrained(model), 0.0
    for prompt, response in pairs:
        if isinstance(prompt, list):
            prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        n = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor([tokenizer(prompt + response)["input_ids"] + [tokenizer.eos_token_id]])
        with torch.no_grad():
            logps = policy(ids[:, :-1]).logits.log_softmax(-1)
        total += logps.gather(2, ids[:, 1:, None])[0, n - 1 :].sum().item()
    return total / len(pairs)


def margin(model, good, bad):
    """By how much the model likes the good responses better than the bad ones."""
    return likelihood(model, good) - likelihood(model, bad)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


GOOD, BAD = make_rows(2)  # with the prompt of the first


@pytest.fixture
def folder(tmp_path, tiny, tokenizer):
    """A folder with the tiny model as policy, another as teacher, and 32 equal rows of each kind."""
    (tmp_path / "policy").symlink_to(tiny)
    make_model(tmp_path / "teacher", tokenizer, hidden_size=96)
    prompt = GOOD["input"]
    write_rows(tmp_path / "answers.jsonl", [{"question": prompt, "response": GOOD["output"]}] * 32)
    sides = [{"response": GOOD["output"], "score": 1}, {"response": BAD["output"], "score": 0}]
    write_rows(tmp_path / "unpaired.jsonl", [{"instruction": prompt, **side} for side in sides] * 16)
    pair = {"chosen": [user(prompt), assistant(GOOD["output"])], "rejected": [user(prompt), assistant(BAD["output"])]}
    write_rows(tmp_path / "pairs.jsonl", [pair] * 32)
    return tmp_path


def test_dpo(folder):
    console = run(["bash", "-c", little(BLOCKS["Direct Preference Optimization (DPO)"])], folder)
    metrics = trained(folder / "checkpoint/llama3-8b-dpo", folder / "policy")
    assert len(metrics["loss"]) == 8 and math.isclose(metrics["loss"][0], math.log(2), rel_tol=1e-6)
    sides = [[([user(GOOD["input"])], row["output"])] for row in (GOOD, BAD)]
    before, after = (margin(folder / model, *sides) for model in ("policy", "checkpoint/llama3-8b-dpo"))
    assert after > before
    flags = json.loads((folder / "checkpoint/llama3-8b-dpo/args.json").read_text())
    expected = {"learning_rate": 5e-7, "beta": 0.1, "zero_stage": 3, "bf16": True, "gradient_checkpointing": True}
    assert flags.items() >= expected.items() and "use_wandb" not in flags
    assert "--flash_attn change nothing" in console and "{wandb_token} is a placeholder" in console


@pytest.mark.slow
def test_kto(folder):
    console = run(["bash", "-c", little(BLOCKS["Kahneman-Tversky Optimization (KTO)"])], folder)
    metrics = trained(folder / "checkpoint/llama3-8b-kto", folder / "policy")
    assert len(metrics["loss"]) == 8 and metrics["loss"][0] == 0.5  # the policy is its reference
    prompt = f"User: {GOOD['input']}\nAssistant: "
    sides = [[(prompt, row["output"])] for row in (GOOD, BAD)]
    before, after = (margin(folder / model, *sides) for model in ("policy", "checkpoint/llama3-8b-kto"))
    assert after > before
    assert re.search(r"sample .*\\nAssistant:", console)  # a line break, not a backslash and an n


@pytest.mark.slow
def test_kd(folder):
    run(["bash", "-c", little(BLOCKS["Knowledge Distillation (MiniLLM)"])], folder)
    metrics = trained(folder / "checkpoint/llama2-7b-kd", folder / "policy")
    assert len(metrics["loss"]) == 8 and metrics["loss"][-1] < metrics["loss"][0]
    mixed = [0.4 * kd + 0.6 * ce for kd, ce in zip(metrics["kd_loss"], metrics["ce_loss"], strict=True)]
    assert metrics["loss"] == pytest.approx(mixed, rel=1e-6)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The toy's policy, reward model and data, under the names that the blocks get."""
    folder = tmp_path_factory.mktemp("toy")
    subprocess.run([sys.executable, str(REPO / "examples/toy.py"), "--out", str(folder / "toy")], check=True)
    prompts = read(folder / "toy/prompts.jsonl")
    write_rows(folder / "prompts.jsonl", [{"context_messages": [user(row["prompt"])]} for row in prompts])
    rows = read(folder / "toy/sft.jsonl")[:64]
    talks = [[user(row["input"]), assistant(row["output"])] for row in rows]
    pairs = [{"chosen": a, "rejected": b} for a, b in zip(talks, talks[1:] + talks[:1], strict=True)]
    write_rows(folder / "pairs.jsonl", pairs)
    return folder


@pytest.fixture
def loop(toy, tmp_path):
    """A folder in which a loop finds the toy."""
    for name, target in (("policy", "toy/policy"), ("rm", "toy/rm")):
        (tmp_path / name).symlink_to(toy / target)
    for name in ("prompts.jsonl", "pairs.jsonl"):
        (tmp_path / name).symlink_to(toy / name)
    return tmp_path


def without_vllm(text):
    """The block with Hugging Face generation."""
    return text.replace("--eval_task generate_vllm", "--eval_task generate")


@pytest.mark.slow
def test_raft_loop(loop):
    """Two iterations: rm and sft of each leave after_1 .. after_4."""
    text = little(BLOCKS["Rejection Sampling & RAFT"])
    run(["bash", "-c", text if importlib.util.find_spec("vllm") else without_vllm(text)], loop)
    out = loop / "checkpoint/llama-3-8b-rejection"
    assert (out / "iter.log").read_text() == "2\n"
    policy, seen = loop / "policy", set()
    for k in (0, 1):
        after = loop / f"after_{2 * k + 2}/llama-3-8b-rejection"
        samples, best = read(after / "generate.jsonl"), read(after / "rm.jsonl")
        assert len(samples) == 128 and {row["id"] for row in samples} == {*range(32 * k, 32 * k + 32)}
        assert all({"id", "sample", "input", "output", "finish_reason", "messages"} <= {*row} for row in samples)
        assert [row["id"] for row in best] == [*range(32 * k, 32 * k + 32)]
        assert all("reward" in row and row["output"] in [s["output"] for s in samples if s["id"] == row["id"]] for row in best)
        pairs = [(row["input"], row["output"]) for row in best]
        assert likelihood(after, pairs) > likelihood(policy, pairs)
        trained(after, policy)
        policy = after
        seen |= {row["output"] for row in samples}
    assert len(seen) > 200  # of 256: the iterations' samples are not the same ones


@pytest.mark.slow
def test_iterative_dpo_loop(loop):
    run(["bash", "-c", without_vllm(little(BLOCKS["Iterative DPO"]))], loop)
    policy = loop / "policy"
    for k in (0, 1):
        after = loop / f"after_{2 * k + 2}/llama-3-8b-iter-dpo"
        samples, pairs = read(after / "generate.jsonl"), read(after / "rm.jsonl")
        assert len(samples) == 128 and {row["id"] for row in samples} == {*range(32 * k, 32 * k + 32)}
        assert 16 < len(pairs) <= 32 and all(row["chosen_reward"] > row["rejected_reward"] for row in pairs)
        assert all({"id", "prompt", "chosen", "rejected", "chosen_finish_reason", "rejected_finish_reason"} <= {*row} for row in pairs)
        metrics = trained(after / "checkpoint", policy)
        start = math.log(2)  # the reference is the first policy, so only iteration 0 starts at h = 0
        assert math.isclose(metrics["loss"][0], start, rel_tol=1e-6) == (k == 0)
        sides = [[(row["prompt"], row[side]) for row in pairs] for side in ("chosen", "rejected")]
        assert margin(after / "checkpoint", *sides) > margin(policy, *sides)
        flags = json.loads((after / "checkpoint/args.json").read_text())
        assert flags["ref_pretrain"] == "policy"
        policy = after / "checkpoint"


@pytest.mark.slow
def test_conditional_sft(loop):
    """What the document meant: score conversations, put the reward into the prompt, train on that."""
    run(["bash", "-c", little(BLOCKS["Conditional SFT"])], loop, ranks=2)
    rows = read(loop / "checkpoint/llama-2-8b-csft/rm.jsonl")
    rewards = [row["reward"] for row in rows]
    mean, std = statistics.fmean(rewards), statistics.pstdev(rewards)  # --normalize_reward
    talks = [row["chosen"] for row in read(loop / "pairs.jsonl")]
    for row, (question, answer) in zip(rows, talks, strict=True):
        shown = f"{question['content']} <rm_score>: {(row['reward'] - mean) / std:.2f} "
        assert row["input"] == [user(shown)] and row["output"] == answer["content"]
    metrics = trained(loop / "checkpoint/llama-3-8b-csft", loop / "policy")
    assert len(metrics["loss"]) == 16
    pairs = [(row["input"], row["output"]) for row in rows]
    assert likelihood(loop / "checkpoint/llama-3-8b-csft", pairs) > likelihood(loop / "policy", pairs)


@pytest.mark.slow
@pytest.mark.parametrize("method, ranks", [("dpo", 2), ("sft", 1)])
def test_trinity_yaml(folder, method, ranks):
    """The file as printed but for sizes; names come in by the variables that it reads."""
    text = re.sub(r"train_batch_size: \d+", "train_batch_size: 8", YAML[method])
    text = re.sub(r"save_interval: \d+", "save_interval: 5", text)
    (folder / "x.yaml").write_text(text)
    data = {"dpo": "human_like_dpo_dataset", "sft": "Mixture-of-Thoughts"}[method]
    (folder / "data" / data).mkdir(parents=True)
    row = {"prompt": GOOD["input"], "chosen": GOOD["output"], "rejected": BAD["output"]}
    row = row if method == "dpo" else {"messages": [user(GOOD["input"]), assistant(GOOD["output"])]}
    write_rows(folder / "data" / data / "train.jsonl", [row] * 32)
    names = {"TRINITY_MODEL_PATH": str(folder / "policy"), "DATASET_PATH": str(folder / "data")}
    command = [sys.executable, str(REPO / "examples/trinity.py"), "run", "--config", "x.yaml"]
    command += ["--num_processes", str(ranks)] if ranks > 1 else []
    if method == "sft":  # a scheduler ends it in the middle
        first = subprocess.Popen(command, cwd=folder, env=environment(folder) | names, text=True, stdout=subprocess.PIPE)
        assert any(line.startswith("step     6/20") for line in first.stdout)
        first.terminate()
        first.communicate(timeout=100)
        assert first.returncode == 75
    console = run(command, folder, ranks, **names)
    assert ("\nresume " in console) == (method == "sft")
    job = folder / "checkpoints/<project_name>/<experiment_name>"
    metrics = trained(job / "model", folder / "policy")
    assert len(metrics["loss"]) == {"dpo": 8, "sft": 20}[method]
    sides = [[([user(GOOD["input"])], row["output"])] for row in (GOOD, BAD)]
    before, after = (margin(model, *sides) for model in (folder / "policy", job / "model"))
    assert after > before
    assert "trainer.save_interval" in console and f"| {ranks} x cpu" in console
    assert not [*job.glob("model.ckpt/*")]  # gone once the model is there
    assert "nothing to do" in run(command, folder, ranks, **names)

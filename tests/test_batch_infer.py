"""batch_infer.py: samples and rewards against Hugging Face, post-processors in closed form, ranks, kills, bad input."""

import copy
import functools
import importlib.util
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import safetensors.torch
import torch
import transformers
from conftest import console_of, make_tokenizer, write_rows
from launch import load_script
from tokenizers import processors
from transformers import AutoConfig, AutoTokenizer, Qwen2ForCausalLM, Qwen2ForSequenceClassification

script = load_script("batch_infer")
torch.get_num_threads = lambda: 2  # reward functions are called in two processes
TESTS = Path(__file__).parent
QUESTIONS = ["Please say, " * (i % 3) + f"what is {i} plus {i * 7}?" * (1 + i % 2) for i in range(12)]
needs_vllm = pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vllm: see requirements-vllm.txt")
trained_tokenizer = functools.cache(make_tokenizer)  # once, as ties between merges fall differently each time


def tokenizer_with(bos=False, pad="<pad>"):
    tokenizer = copy.deepcopy(trained_tokenizer())
    tokenizer.pad_token = pad
    if bos:
        template = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
        tokenizer.backend_tokenizer.post_processor, tokenizer.bos_token = template, "<bos>"
    return tokenizer


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="session")
def home(tmp_path_factory, tiny):
    """A folder with a policy, reward models, prompts and reward functions."""
    home, sizes = tmp_path_factory.mktemp("batch_infer"), {"vocab_size": len(tokenizer_with())}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 128}  # vLLM's CPU kernels have no heads of 16
    sizes |= {"max_position_embeddings": 256, "tie_word_embeddings": False, "initializer_range": 0.15}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(AutoConfig.from_pretrained(tiny, **sizes))
    model.lm_head.weight.data[1] *= 2.5  # so that some samples end
    save(model, tokenizer_with(), home / "policy")
    for name, pad in (("rm", "<pad>"), ("pad_eos", "<eos>")):
        tokenizer = tokenizer_with(pad=pad)
        config = AutoConfig.from_pretrained(tiny, num_labels=1, pad_token_id=tokenizer.pad_token_id, **sizes)
        model = Qwen2ForSequenceClassification(config)
        save(model, tokenizer, home / name)
    # as OpenRLHF saves it, and with an own name for its head
    shutil.copytree(home / "pad_eos", home / "openrlhf")
    weights = {name.replace("score", "reward_head"): weight for name, weight in model.state_dict().items()}
    safetensors.torch.save_file(weights, home / "openrlhf/model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["RewardModel"], "value_head_prefix": "reward_head", "mean": -0.75, "std": 2.5}
    (home / "openrlhf/config.json").write_text(json.dumps(model.config.to_dict() | config))
    write_rows(home / "prompts.jsonl", [{"prompt": text} for text in QUESTIONS])
    (home / "my-rewards.py").write_text(REWARDS)
    return home


def flags_of(home, task, out, **flags):
    """Keyword arguments of Args."""
    usual = {"pretrain": str(home / ("rm" if task == "rm" else "policy")), "dataset": str(home / "prompts.jsonl")}
    usual |= {"bf16": False, "prompt_max_len": 100, "max_new_tokens": 12, "output_path": str(out)}
    return {"eval_task": task, **usual, **flags}


def run(home, task, out, **flags):
    """Runs main() in this process; returns the rows it wrote."""
    script.main(script.Args(**flags_of(home, task, out, **flags)))
    return read(out)


@pytest.fixture(scope="session")
def samples(home):
    """Four samples of each prompt; the file is input of the rm tests."""
    return run(home, "generate", home / "samples.jsonl", best_of_n=4)


# --- generation


def test_rows(home, samples, tmp_path):
    assert [(row["id"], row["sample"]) for row in samples] == [(i, k) for i in range(12) for k in range(4)]
    assert all(list(row) == ["id", "sample", "input", "output", "finish_reason", "tokens"] for row in samples)
    assert all(row["input"] == QUESTIONS[row["id"]] for row in samples)
    assert {row["finish_reason"] for row in samples} == {"stop", "length"}
    assert all((row["tokens"] == 12) == (row["finish_reason"] == "length") for row in samples)
    assert len({row["output"] for row in samples}) > 40
    assert run(home, "generate", tmp_path / "a.jsonl", best_of_n=4) == samples
    for other in ({"seed": 1}, {"iter": 1, "rollout_batch_size": 12}):
        rows = run(home, "generate", tmp_path / "b.jsonl", best_of_n=4, **other)
        assert [row["id"] for row in rows] == [row["id"] for row in samples] and rows != samples


def test_greedy_is_hugging_faces(home, tmp_path):
    """With left padding, whatever the batch, and with nothing of the checkpoint's own settings."""
    model = Qwen2ForCausalLM.from_pretrained(home / "policy", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(home / "policy")  # as Qwen2's it splits digits
    for penalty in (1.0, 1.4):
        flags = {"greedy_sampling": True, "repetition_penalty": penalty}
        rows = run(home, "generate", tmp_path / f"{penalty}.jsonl", **flags)
        for row in rows[:4]:
            ids = tokenizer(row["input"], return_tensors="pt", return_token_type_ids=False)
            out = model.generate(**ids, do_sample=False, max_new_tokens=12, repetition_penalty=penalty)
            sampled = out[0, ids["input_ids"].shape[1] :].tolist()
            assert row["output"] == tokenizer.decode([token for token in sampled if token != 1])
            assert row["finish_reason"] == ("stop" if 1 in sampled else "length")
    assert run(home, "generate", tmp_path / "a.jsonl", top_k=1, repetition_penalty=1.4) == rows
    assert run(home, "generate", tmp_path / "b.jsonl", top_p=1e-6, repetition_penalty=1.4) == rows
    model.generation_config = transformers.GenerationConfig(do_sample=True, top_k=3, repetition_penalty=1.5, eos_token_id=1)
    flags["pretrain"] = save(model, tokenizer, tmp_path / "policy")
    assert run(home, "generate", tmp_path / "c.jsonl", **flags | {"micro_batch_size": 5}) == rows


def test_stop(home, tmp_path):
    """A sample ends before the text, be it parts of two tokens; not one that began in the prompt."""
    whole = run(home, "generate", tmp_path / "a.jsonl", greedy_sampling=True)
    one, two = [row for row in whole if len(row["output"]) > 5 and row["output"][:5].isascii()][:2]
    texts = [one["output"][2:5], two["input"][-1] + two["output"][0]]
    rows = run(home, "generate", tmp_path / "b.jsonl", greedy_sampling=True, stop=("", *texts))
    for row, other in zip(rows, whole, strict=True):
        cut = min((other["output"].index(text) for text in texts if text in other["output"]), default=None)
        ended = {"finish_reason": "stop", "output": other["output"][:cut], "tokens": row["tokens"]}
        assert row == (other if cut is None else other | ended) and row["tokens"] <= other["tokens"]
    assert rows[one["id"]]["tokens"] < 6 and rows[two["id"]]["output"]


def prompts_of(home, rows, tokenizer, **flags):
    """The Items of prompts."""
    args = script.Args(**flags_of(home, "generate", "", **flags))
    return script.collect(script.sampling_items, dict(enumerate(rows)), tokenizer, None, args)


def test_slices_wrap_around_and_hold_a_prompt_once(tmp_path):
    flags = {"dataset": write_rows(tmp_path / "x.jsonl", [{"prompt": str(i)} for i in range(5)]), "pretrain": "x"}
    slices = [script.Args("generate", "", iter=k, rollout_batch_size=3, **flags) for k in range(4)]
    assert [list(script.load_rows(args)) for args in slices] == [[0, 1, 2], [3, 4, 0], [1, 2, 3], [4, 0, 1]]
    assert [*script.load_rows(script.Args("rm", "", iter=1, rollout_batch_size=3, **flags))] == [0, 1, 2, 3, 4]


def test_blank_lines_keep_ids_and_shares_repeat_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": "b"}\n')
    a, b = {"prompt": "a"}, {"prompt": "b"}
    args = script.Args("generate", "", f"{tmp_path}/a.jsonl", pretrain="x")
    assert script.load_rows(args) == {0: a, 2: b}
    args.dataset, args.dataset_probs = f"{tmp_path}/a.jsonl, {tmp_path}/a.jsonl", "1,0.2"
    assert script.load_rows(args) == {0: a, 2: b, 3: a, 5: b, 6: a}


# --- scoring


def scored_text(row):
    return row["input"] + row["output"] + ("<eos>" if row["finish_reason"] == "stop" else "")


@pytest.mark.parametrize("model, pad, mean, std", [("rm", 0, 0, 1), ("pad_eos", 1, 0, 1), ("openrlhf", None, -0.75, 2.5)])
@torch.no_grad()
def test_rewards_are_hugging_face_scores(home, samples, tmp_path, model, pad, mean, std):
    """With a shared prompt and alone, whatever the batch. Where pad is EOS OpenRLHF alone looks at EOS."""
    flags = {"dataset": str(home / "samples.jsonl"), "pretrain": str(home / model)}
    folder, expected = home / model.replace("openrlhf", "pad_eos"), []
    judge = Qwen2ForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer, judge.config.pad_token_id = AutoTokenizer.from_pretrained(folder), pad
    for row in samples:
        ids = tokenizer(scored_text(row), add_special_tokens=False).input_ids
        expected.append((judge(torch.tensor([ids])).logits.item() - mean) / std)
    for n in (1, 3, 8):
        rows = run(home, "rm", tmp_path / f"{n}.jsonl", micro_batch_size=n, **flags)
        assert [row.pop("reward") for row in rows] == pytest.approx(expected, abs=1e-5)
        assert rows == samples
    assert np.std(expected) > 0.1


@pytest.mark.parametrize("kind", ["qwen3", "mistral", "gemma2", "gpt2"])
def test_a_shared_prompt_changes_nothing(kind):
    """Hidden states of responses behind one cached prompt are those of each row alone, also in a sliding window."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "vocab_size": 90, "head_dim": 16}
    sizes |= {"mistral": {"sliding_window": 9}, "gemma2": {"sliding_window": 9}}.get(kind, {})
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 90} if kind == "gpt2" else sizes
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes)
    body = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    rng = random.Random(0)
    prompts = [[rng.randrange(90) for _ in range(n)] for n in (5, 23, 14)]
    responses = [[rng.randrange(90) for _ in range(rng.randrange(1, 20))] for _ in range(9)]
    batch = [script.Item(None, prompts[i % 3], ids, None) for i, ids in enumerate(responses)]
    with torch.no_grad():
        for item, found in zip(batch, script.hidden_states(body, batch, "cpu"), strict=True):
            alone = body(torch.tensor([item.prompt + item.response])).last_hidden_state[0]
            torch.testing.assert_close(found, alone[len(item.prompt) :], atol=2e-5, rtol=1e-4)


def test_what_a_reward_model_reads(home):
    """Messages: Hugging Face heads read all of the template, OpenRLHF's up to EOS; nothing follows a cut answer."""
    row = {"input": "policy's own form", "output": "yes", "messages": [{"role": "user", "content": "ok?"}]}
    rows = [row | {"finish_reason": "stop"}, row | {"finish_reason": "length"}]
    chat, plain = "<|user|>ok?<eos>\n<|assistant|>yes", "policy's own formyes"
    for model, end in ((home / "rm", "<eos>\n"), (home / "openrlhf", "<eos>")):
        for templated, expected in ((True, [chat + end, chat]), (False, [plain + "<eos>", plain])):
            flags = {"pretrain": str(model), "apply_chat_template": templated}
            args = script.Args(**flags_of(home, "rm", "", **flags))
            tokenizer, config = tokenizer_with(), AutoConfig.from_pretrained(args.pretrain)
            items = script.collect(script.scoring_items, dict(enumerate(rows)), tokenizer, config, args)
            assert [tokenizer.decode(item.prompt + item.response) for item in items] == expected


def test_rows_that_cannot_be_scored_get_null(home, tmp_path):
    rows = [{"input": "What? ", "output": text} for text in ("1", "2 " * 60, None, "4")]
    flags = {"dataset": write_rows(tmp_path / "x.jsonl", rows), "max_len": 40}
    scored = run(home, "rm", tmp_path / "a.jsonl", max_drop_ratio=0.5, **flags)
    assert [row["reward"] is None for row in scored] == [False, True, True, False]


@pytest.mark.parametrize("chat", [False, True])
def test_logps_are_hugging_faces(home, tmp_path, chat):
    """Of what sft.py would train: the response, EOS where it ended by itself."""
    asked = {"best_of_n": 3, "apply_chat_template": chat, "csft_prompt": 1.0}
    data = run(home, "generate", tmp_path / "g.jsonl", **asked)
    found = run(home, "logps", tmp_path / "a.jsonl", dataset=str(tmp_path / "g.jsonl"), micro_batch_size=4)
    model = Qwen2ForCausalLM.from_pretrained(home / "policy", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(home / "policy")  # as Qwen2's it splits digits
    for row, sample in zip(found, data, strict=True):
        prompt, ids = (tokenizer(text).input_ids for text in (row["input"], scored_text(row)))
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        n = len(os.path.commonprefix([prompt, ids]))  # the last token of the prompt may join the response
        expected = sum(logps[i - 1, ids[i]].item() for i in range(n, len(ids)))
        assert row["logps"] == pytest.approx(expected, rel=1e-4) and row["tokens"] == len(ids) - n
        assert {k: v for k, v in row.items() if k != "logps"} == sample | {"tokens": row["tokens"]}


# --- post-processors


def post(function, rows, **flags):
    scored = [row for row in rows if row["reward"] is not None]
    return getattr(script, function)(scored, script.Args("rm", "", "", **flags))


def test_rejection_sampling():
    def best(rows, **flags):
        return [row["sample"] for row in post("best_samples", rows, **flags)]

    rewards = [(0, 1.0), (0, 3.0), (0, 3.0), (1, None), (1, -2.0), (2, None), (1, -3.0)]
    ours = {"input": "x", "output": "y", "finish_reason": "stop"}
    rows = [{"id": i, "sample": n, **ours, "reward": r} for n, (i, r) in enumerate(rewards)]
    foreign = [{"id": n, "sample": n, "input": "x", "output": "y", "reward": r} for n, r in enumerate((1.0, 2.0))]
    assert best(foreign) == [1]  # their ids are the responses' own
    assert best(rows) == [1, 4]
    assert best(rows, rs_top_k=2) == [1, 2, 4, 6] == best(rows, rs_top_k=2, drop_all_equal=True)
    assert best(rows, rs_top_k=9, min_reward=-2.0) == [1, 2, 0, 4]
    equal = [row | {"reward": 1.0} for row in rows]
    assert best(equal) == [0, 3, 5] and best(equal, drop_all_equal=True) == [5]  # alone: nothing to equal


def test_iterative_dpo_pairs():
    """Best against worst of an id; no pair from ties, one response, null rewards or a margin that is too small."""
    given = [(0, "a", 1.0), (0, "b", 3.0), (0, "c", -2.0), (0, "d", None), (1, "a", 1.0), (1, "b", 1.0)]
    given += [(2, "a", 1.0), (2, "a", 2.0), (3, "a", 0.0), (3, "b", 0.5), (4, "a", 1.0)]
    rows = [{"id": i, "input": "same", "output": o, "finish_reason": "stop", "reward": r} for i, o, r in given]
    pairs = post("best_and_worst", rows)
    assert [(p["id"], p["chosen"], p["rejected"]) for p in pairs] == [(0, "b", "c"), (3, "b", "a")]
    numbers = {"chosen_reward": 3.0, "rejected_reward": -2.0}
    reasons = {"chosen_finish_reason": "stop", "rejected_finish_reason": "stop"}
    assert pairs[0] == {"id": 0, "prompt": "same", "chosen": "b", "rejected": "c", **numbers, **reasons}
    assert [p["id"] for p in post("best_and_worst", rows, min_margin=0.5)] == [0]


def test_csft_leaves_out_what_it_cannot_condition():
    """A cut answer in a chat template, which would end it, and a prompt whose words its template has, too."""
    row = {"output": "y", "finish_reason": "length", "reward": 1.0}
    (made,) = post("conditional_rows", [row | {"input": "Q: x\nA:", "prompt": "x"}])
    assert made["input"] == "Q: x <rm_score>: 1.00 \nA:" and made["finish_reason"] == "length"
    chat, twice = {"input": "x", "messages": [{"role": "user", "content": "x"}]}, {"input": "x? Q: x", "prompt": "x"}
    assert post("conditional_rows", [row | chat, row | twice]) == []


def test_the_blank_of_the_rewards_template_is_not_scored():
    row = {"plain_input": "x", "output": " y", "finish_reason": "stop"}
    for input, response in (("x <rm_score>: 1.00", "y"), ("x <rm_score>: 1.00 ", " y")):
        assert script.row_texts(row | {"input": input}, False, script.Args("rm", "", "")) == ("x", response)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("kind", ["plain", "template", "chat", "messages"])
def test_csft_trains_on_the_prompt_that_csft_prompt_asks_with(home, kind, bos):
    """Rows of any data, and our own samples: the prompt of sft.py's example is generation's, token for token."""
    sft, tokenizer = load_script("sft"), tokenizer_with(bos=bos)
    template = "Q: {}\nA:" if kind == "template" else None
    flags = {"input_template": template, "apply_chat_template": kind == "chat"}
    system = [{"role": "system", "content": "Be kind."}] * (kind == "messages")
    prompt = [*system, {"role": "user", "content": QUESTIONS[1]}] if kind == "messages" else QUESTIONS[1]
    answer = [{"role": "assistant", "content": " It is 8."}] if kind == "messages" else " It is 8."
    asked, rewards = (1.0, (5.0, 3.0)) if bos else (-0.5, (-0.5, 3.0))  # normalised: mean 4, std 1
    source = [{"prompt": prompt, "response": answer, "reward": reward} for reward in rewards]
    (plain,) = prompts_of(home, [{"prompt": prompt, "answer": 8, "reward": 1}], tokenizer, **flags)
    assert plain.row["answer"] == 8 and "reward" not in plain.row  # other columns stay, but for names of ours
    result = {"output": " It is 8.", "finish_reason": "stop"}
    ours = [plain.row | result | {"sample": i, "reward": reward} for i, reward in enumerate(rewards)]
    (seen,) = prompts_of(home, [{"prompt": prompt}], tokenizer, csft_prompt=asked, **flags)
    assert f"{QUESTIONS[1]} <rm_score>: {asked:.2f} " in seen.row["input"] + " "
    assert seen.row["plain_input"] == plain.row["input"]
    args = sft.Args(pretrain="", dataset="", **flags)
    direct = sft.encode(prompt, answer, tokenizer, args)[0].tolist()
    assert direct[: len(plain.prompt)] == plain.prompt
    assert direct == sft.encode(plain.row["input"], " It is 8.", tokenizer, args, "stop")[0].tolist()
    for rows in (source, ours):
        row = post("conditional_rows", rows, normalize_reward=bos, **flags)[0]
        assert list(row)[-3:] == ["reward", "input", "output"] and row["reward"] == rewards[0]
        args = sft.Args(pretrain="", dataset="", input_template=None if rows is ours else template)
        ids, trained = sft.encode(row["input"], row["output"], tokenizer, args, row.get("finish_reason"))
        assert ids[-1] == 1 and trained[-1]
        assert ids[: len(seen.prompt)].tolist() == seen.prompt


# --- reward functions

REWARDS = """
import os, time
def digits(prompt, response, row):
    return sum(c.isdigit() for c in response)
def shorter(prompt, response, row):
    return row["reward"] - len(prompt) - 0.5 * len(response)
def hang():
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass
def fragile(prompt, response, row):
    {"raise": lambda: 1 / 0, "sleep": lambda: time.sleep(60), "die": lambda: os._exit(0),
     "exit": lambda: exit(3), "hang": hang}.get(row["kind"], lambda: 0)()
    return float("nan") if row["kind"] == "nan" else row["answer"]
def broken(prompt, response, row):
    raise KeyError("no such thing")
def slow(prompt, response, row):
    time.sleep(0.02)
    return len(response)
"""


def test_reward_functions(home, samples, tmp_path):
    """In place of a model, with weights; the next stage finds the reward of the one before in the row."""
    file, flags = f"{home}/my-rewards.py", {"pretrain": ""}
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    spec = f"{file}:digits, {file}:slow=-0.25"
    rows = run(home, "rm", first, reward_fn=spec, dataset=str(home / "samples.jsonl"), **flags)
    for row, sample in zip(rows, samples, strict=True):
        digits = sum(c.isdigit() for c in sample["output"])
        assert row == sample | {"reward": digits - 0.25 * len(sample["output"])}
    for row, before in zip(run(home, "rm", second, reward_fn=f"{file}:shorter", dataset=str(first), **flags), rows):
        assert row == before | {"reward": before["reward"] - len(row["input"]) - 0.5 * len(row["output"])}


def test_calls_without_a_reward(home, tmp_path, capsys):
    """An error, a hang, a crash, an exit or NaN gives null, and harms no other row; errors are counted."""
    kinds = ["ok", "raise", "sleep", "ok", "die", "exit", "nan", "ok", "hang"] + ["ok"] * 8
    rows = [{"input": "Q", "output": "A", "kind": kind, "answer": i} for i, kind in enumerate(kinds)]
    flags = {"dataset": write_rows(tmp_path / "x.jsonl", rows), "pretrain": "", "reward_timeout": 0.5}
    found = run(home, "rm", tmp_path / "a.jsonl", reward_fn=f"{home}/my-rewards.py:fragile", **flags)
    assert [row["reward"] for row in found] == [i if kind == "ok" else None for i, kind in enumerate(kinds)]
    assert found[1] == rows[1] | {"reward": None}
    console = capsys.readouterr().out
    assert "3 calls gave no reward: no answer in 0.5 s" in console and "1 calls gave no reward: Zero" in console


# --- resuming, ranks


def test_the_same_command_does_nothing_another_replaces(home, tmp_path, capsys):
    out, flags = tmp_path / "sub" / "out.jsonl", {"max_samples": 3}
    first = run(home, "generate", out, **flags)
    stamp = out.stat().st_mtime_ns
    assert run(home, "generate", out, tp_size=2, **flags) == first
    assert out.stat().st_mtime_ns == stamp and "nothing to do" in capsys.readouterr().out
    out.write_text("edited")
    assert run(home, "generate", out, **flags) == first
    assert run(home, "generate", out, seed=7, **flags) != first
    assert "will be replaced" in capsys.readouterr().out


def launch(folder, configs, *launcher):
    """Runs main() for each configuration, in one start of Python per rank."""
    (folder / "configs.json").write_text(json.dumps(configs))
    words = [sys.executable, *launcher, TESTS / "launch.py", "batch_infer", folder / "configs.json"]
    console_of(words, OMP_NUM_THREADS=1, CUDA_VISIBLE_DEVICES="", PYTHONPATH=TESTS.parent)
    return words


def test_two_ranks(home, samples, tmp_path):
    """Samples and rewards of one rank, in the same order."""
    flags = {"dataset": str(home / "samples.jsonl")}
    generate = flags_of(home, "generate", tmp_path / "generate.jsonl", best_of_n=4)
    function = flags | {"reward_fn": f"{home}/my-rewards.py:digits"}
    rm = [flags_of(home, "rm", tmp_path / "rm.jsonl", **flags), flags_of(home, "rm", tmp_path / "f.jsonl", **function)]
    launch(tmp_path, [generate, *rm], "-m", "torch.distributed.run", "--nproc_per_node", "2")
    assert read(tmp_path / "generate.jsonl") == samples
    alone = run(home, "rm", tmp_path / "alone.jsonl", **flags)
    for row, expected in zip(read(tmp_path / "rm.jsonl"), alone, strict=True):
        assert row == expected | {"reward": pytest.approx(expected["reward"], abs=1e-5)}
    assert read(tmp_path / "f.jsonl") == run(home, "rm", tmp_path / "g.jsonl", **function)
    assert not list(tmp_path.glob("*.partial"))


def main(flags):
    script.main(script.Args(**flags))


def fork(flags, kill_after=None):
    """main() in a fork of a process that has imported all; (was it killed?, seconds)."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__])
    process, started = server.Process(target=main, args=(flags,)), time.time()
    process.start()
    process.join(kill_after)
    process.kill()
    process.join()
    assert process.exitcode in (0, -9)
    return process.exitcode != 0, time.time() - started


TASKS = ["generate", "rm", "reward_fn", pytest.param("generate_vllm", marks=[needs_vllm, pytest.mark.slow])]


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize("task", TASKS)
def test_kills(home, tmp_path, task, kills):
    """kill -9 at random moments, again and again until a start gets to the end: the rows of an undisturbed run."""
    os.environ["PYTHONPATH"] = str(TESTS)  # of fork()'s server
    rows = [{"input": f"{i} {text}", "output": text[::-1]} for i in range(4) for text in QUESTIONS]
    flags = {"dataset": write_rows(tmp_path / "x.jsonl", rows), "micro_batch_size": 4, "prompt_max_len": 200}
    if task == "reward_fn":
        flags |= {"pretrain": "", "reward_fn": f"{home}/my-rewards.py:slow"}
    flags = flags_of(home, task.replace("reward_fn", "rm"), "", **flags)
    rng, killed = random.Random(kills), 0
    for name in ("first", "whole"):  # the first start may wait for the server
        _, seconds = fork(flags | {"output_path": str(tmp_path / f"{name}.jsonl")})
    whole = read(tmp_path / "whole.jsonl")
    assert len(whole) == 48 and whole == read(tmp_path / "first.jsonl")
    for n in range(100):
        out = flags | {"output_path": str(tmp_path / f"{n}.jsonl")}
        while killed < kills and fork(out, rng.uniform(0.2, 0.9) * seconds)[0]:
            killed += 1
        fork(out)
        assert read(out["output_path"]) == whole
        if killed == kills:
            break
    assert killed == kills


# --- bad input


def test_bad_input(home, samples, tmp_path, capsys):
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": ')
    scored = {"task": "rm", "dataset": str(home / "samples.jsonl")}
    cases = {
        "--reward_template needs {input} and {reward}": {"reward_template": "{input}: {score}"},
        "are of --eval_task rm, not generate": {"post_processor": "rs"},
        " x longer than 20 tokens (--max_len": scored | {"max_len": 20},
        "KeyError: 'missing'; it must be FILE.py:NAME": scored | {"reward_fn": f"{home}/my-rewards.py:missing"},
        "hang() takes 0 positional arguments but 3 were given": scored | {"reward_fn": f"{home}/my-rewards.py:hang"},
        "no row has a reward: KeyError('no such thing')": scored | {"reward_fn": f"{home}/my-rewards.py:broken"},
        "'' is neither a model folder": {"task": "rm", "pretrain": ""},
        "--input_key and --output_key must be among the columns prompt": {"input_key": "prmpt"},
        "--prompt_max_len + --max_new_tokens is more than the model's 256": {"max_new_tokens": 200},
        "empty.jsonl": {"dataset": write_rows(tmp_path / "empty.jsonl", [])},
        "broken.jsonl'": {"dataset": str(tmp_path / "broken.jsonl")},
        "policy lacks score.weight: see --eval_task, --value_head_prefix": scored | {"pretrain": str(home / "policy")},
        "cannot be written: it is a folder, or our input": {"output_path": str(home / "prompts.jsonl")},
    }
    for message, flags in cases.items():
        with pytest.raises(SystemExit) as stopped:
            run(home, flags.pop("task", "generate"), tmp_path / "out.jsonl", **flags)
        (line,) = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2 and line.startswith("error: ") and message in line, line
    assert not (tmp_path / "out.jsonl").exists()


# --- vLLM


@pytest.mark.slow
@needs_vllm
def test_vllm(home, tmp_path):
    """Greedy: Hugging Face's rows. Sampled: a sample does not depend on its companions, or on the engine."""
    greedy = {"greedy_sampling": True, "repetition_penalty": 1.2, "stop": ["e", "\\n"]}
    sampled = {"best_of_n": 3, "temperature": 0.8, "top_k": 50, "stop": ["plus"]}
    configs = [greedy, sampled, sampled | {"max_samples": 5, "max_num_seqs": 4}]
    configs = [flags_of(home, "generate_vllm", tmp_path / f"{i}.jsonl", **c) for i, c in enumerate(configs)]
    launch(tmp_path, configs)
    assert read(tmp_path / "0.jsonl") == run(home, "generate", tmp_path / "hf.jsonl", **greedy)
    rows = read(tmp_path / "1.jsonl")
    assert [(row["id"], row["sample"]) for row in rows] == [(i, k) for i in range(12) for k in range(3)]
    assert read(tmp_path / "2.jsonl") == rows[:15]
    assert len({row["output"] for row in rows}) > 20 and not any("plus" in row["output"] for row in rows)
    # Two engines, which end with their parent.
    words = launch(tmp_path, [configs[1] | {"dp_size": 2, "output_path": str(tmp_path / "3.jsonl")}])
    assert read(tmp_path / "3.jsonl") == rows
    Path(tmp_path / "3.jsonl").unlink()
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(TESTS.parent)}
    killed = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    children = []
    while len(children) < 3 and killed.poll() is None:  # the third is Python's own, and ends likewise
        time.sleep(0.1)
        children = psutil.Process(killed.pid).children()
    time.sleep(random.uniform(0, 8))  # engines may be importing, or sampling
    assert len(children) == 3
    killed.kill()
    killed.wait()
    _, left = psutil.wait_procs(children, timeout=30)
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in left)

"""batch_infer.py: samples and rewards against Hugging Face, independence of batch and ranks, resume, bad input."""

import contextlib
import functools
import gc
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tyro
from launch import load_script
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

script = load_script("batch_infer")
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<eos>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
QUESTIONS = [f"{'Please say, w' if i % 3 else 'W'}hat is {i} plus {i * 7}? " * (1 + i % 2) for i in range(12)]


@functools.cache
def trained_tokenizer():
    """Bytes and a few merges, as JSON: trained once, as ties between merges fall differently each time."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<bos>", "<|user|>", "<|assistant|>"]
    settings = {"special_tokens": special, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    core.train_from_iterator(QUESTIONS, trainers.BpeTrainer(vocab_size=300, show_progress=False, **settings))
    return core.to_str()


def make_tokenizer(bos=False, pad="<pad>"):
    core, extra = Tokenizer.from_str(trained_tokenizer()), {"chat_template": TEMPLATE}
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
        extra["bos_token"] = "<bos>"
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token=pad, **extra)


def make_config(tokenizer, **changes):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    ids = {"eos_token_id": 1, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    return Qwen2Config(
        vocab_size=len(tokenizer), num_hidden_layers=2, max_position_embeddings=256, initializer_range=0.15,
        tie_word_embeddings=False, **sizes, **ids, **changes,
    )  # fmt: skip



def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder with policy, reward models and rows."""
    home = tmp_path_factory.mktemp("batch_infer")
    torch.manual_seed(0)
    for name, tokenizer in (("policy", make_tokenizer()), ("policy_bos", make_tokenizer(bos=True))):
        model = Qwen2ForCausalLM(make_config(tokenizer))
        model.lm_head.weight.data[1] *= 3  # so that some samples end
        model.save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    for name, pad in (("rm", "<pad>"), ("rm_pad_eos", "<eos>")):
        tokenizer = make_tokenizer(pad=pad)
        model = Qwen2ForSequenceClassification(make_config(tokenizer, num_labels=1))
        model.save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    write(home / "prompts.jsonl", [{"prompt": text} for text in QUESTIONS])
    return home


def run(home, task, out, **flags):
    """Runs main() in this process; returns the rows it wrote."""
    model = "rm" if task == "rm" else "policy"
    flags = {"pretrain": str(home / model), "dataset": str(home / "prompts.jsonl"), "bf16": False} | flags
    flags = {"prompt_max_len": 100, "max_new_tokens": 12} | flags
    script.main(script.Args(eval_task=task, output_path=str(out), **flags))
    return read(out)


def stops(capsys, home, task, out, **flags):
    """The one line with which main() stops, with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        run(home, task, out, **flags)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="session")
def samples(home):
    """Four samples of each prompt; the file is input of the rm tests."""
    return run(home, "generate", home / "samples.jsonl", best_of_n=4)


# --- sampling


def test_rows(home, samples):
    assert [(row["id"], row["sample"]) for row in samples] == [(i, k) for i in range(12) for k in range(4)]
    assert all(list(row) == ["id", "sample", "input", "output", "finish_reason"] for row in samples)
    assert all(row["input"] == QUESTIONS[row["id"]] for row in samples)
    assert {row["finish_reason"] for row in samples} == {"stop", "length"}
    assert not any("<eos>" in row["output"] for row in samples)
    assert len({row["output"] for row in samples}) > 40
    assert not (home / "samples.jsonl.partial").exists()


def test_a_sample_does_not_depend_on_its_batch(home, samples, tmp_path):
    assert run(home, "generate", tmp_path / "a.jsonl", best_of_n=4, micro_batch_size=2) == samples
    assert (
        run(home, "generate", tmp_path / "b.jsonl", best_of_n=4, micro_batch_size=5, max_samples=7)
        == samples[:28]
    )
    assert run(home, "generate", tmp_path / "c.jsonl", best_of_n=2) == [
        row for row in samples if row["sample"] < 2
    ]
    assert run(home, "generate", tmp_path / "d.jsonl", best_of_n=4, seed=1) != samples


def test_every_response_ends_where_it_should(home, samples, tmp_path):
    """Longer max_new_tokens continue what was cut, and leave alone what was finished."""
    longer = run(home, "generate", tmp_path / "a.jsonl", best_of_n=4, max_new_tokens=24)
    for short, long in zip(samples, longer, strict=True):
        assert (
            short == long
            if short["finish_reason"] == "stop"
            else long["output"].startswith(short["output"].rstrip("\ufffd"))
        )


def test_greedy_is_hugging_face_greedy(home, tmp_path):
    rows = run(home, "generate", tmp_path / "a.jsonl", greedy_sampling=True)
    tokenizer, _ = script.load_tokenizer(str(home / "policy"), script.Args("generate", ""))
    model = Qwen2ForCausalLM.from_pretrained(home / "policy", dtype=torch.float32)
    for row in rows[:4]:
        ids = tokenizer(row["input"], return_tensors="pt", return_token_type_ids=False)
        out = model.generate(**ids, do_sample=False, max_new_tokens=12)[
            0, ids["input_ids"].shape[1] :
        ].tolist()
        assert row["output"] == tokenizer.decode([token for token in out if token != 1])
        assert row["finish_reason"] == ("stop" if 1 in out else "length")


def test_flags_of_the_checkpoint_do_not_sneak_in(home, samples, tmp_path):
    folder = tmp_path / "policy"
    model = Qwen2ForCausalLM.from_pretrained(home / "policy", dtype=torch.float32)
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=1, repetition_penalty=1.5, eos_token_id=1, pad_token_id=0
    )
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    assert run(home, "generate", tmp_path / "a.jsonl", best_of_n=4, pretrain=str(folder)) == samples


def test_repetition_penalty_does_not_see_the_padding(home, tmp_path):
    flags = {"greedy_sampling": True, "repetition_penalty": 1.4}
    batched = run(home, "generate", tmp_path / "a.jsonl", **flags)
    assert batched == run(home, "generate", tmp_path / "b.jsonl", micro_batch_size=1, **flags)
    assert batched != run(home, "generate", tmp_path / "c.jsonl", greedy_sampling=True)


def sampler(seeds=1, width=3, **flags):
    args = script.Args("generate", "", max_new_tokens=4, **flags)
    return script.Sampler(args, range(seeds), torch.ones(seeds, width, dtype=torch.long))


def test_sampler_draws_from_the_distribution():
    """Numbers on a grid of n points give each token its probability, to 1/n; temperature 0.5 squares the odds."""
    n, probs = 1000, torch.tensor([0.1, 0.0, 0.2, 0.3, 0.4])
    s = sampler(n, temperature=0.5)
    s.uniforms[:, 1] = (torch.arange(n) + 0.5) / n
    chosen = s(torch.zeros(n, 4, dtype=torch.long), probs.log().expand(n, 5)).argmax(-1)
    found = torch.bincount(chosen, minlength=5) / n
    assert (found - probs**2 / (probs**2).sum()).abs().max() <= 1 / n
    assert found[1] == 0


def test_sampler_excludes_what_the_flags_say():
    logits = torch.tensor([[0.05, 0.4, 0.1, 0.25, 0.2]]).log()
    kept = {
        (("top_k", 2),): [1, 3],
        (("top_p", 0.65),): [1, 3],  # 0.4 is not enough, 0.4 + 0.25 is
        (("top_p", 0.66),): [1, 3, 4],
        (("min_p", 0.5),): [1, 3, 4],  # at least 0.2
        (("min_p", 0.2), ("top_k", 3), ("top_p", 0.7)): [
            1,
            3,
        ],  # top_p of what is left: 0.4 / 0.85 + 0.25 / 0.85
        (): [0, 1, 2, 3, 4],
    }
    for flags, tokens in kept.items():
        assert sampler(**dict(flags)).probabilities(logits)[0].nonzero()[:, 0].tolist() == tokens, flags


def test_stop_strings(home, samples, tmp_path):
    text = next(row["output"] for row in samples if len(row["output"]) > 8)[3:6]
    rows = run(home, "generate", tmp_path / "a.jsonl", best_of_n=4, stop=(text,))
    assert any(text in row["output"] for row in samples)
    for row, before in zip(rows, samples, strict=True):
        cut = text in before["output"]
        assert row["output"] == before["output"].split(text)[0]
        assert row["finish_reason"] == ("stop" if cut else before["finish_reason"])


def test_a_stop_string_that_begins_in_the_prompt_does_not_stop(home, tmp_path):
    (first, *_) = run(home, "generate", tmp_path / "a.jsonl", greedy_sampling=True)
    border = first["input"][-3:] + first["output"][:1]
    (again, *_) = run(home, "generate", tmp_path / "b.jsonl", greedy_sampling=True, stop=(border,))
    assert len(first["output"]) > 1 and again["output"] == first["output"]


def test_room(home, tmp_path):
    """Prompt and sample fit into max_model_len: some samples are cut, for some prompts there is no room."""
    tokenizer, _ = script.load_tokenizer(str(home / "policy"), script.Args("generate", ""))
    lengths = [len(tokenizer(text).input_ids) for text in QUESTIONS]
    limit, flags = max(lengths), {"greedy_sampling": True, "max_drop_ratio": 0.9}
    assert min(lengths) + 12 <= limit
    rows = run(home, "generate", tmp_path / "a.jsonl", max_model_len=limit, **flags)
    full = run(home, "generate", tmp_path / "b.jsonl", **flags)
    assert [row["id"] for row in rows] == [i for i in range(12) if lengths[i] < limit]
    assert len(rows) < 12
    for row in rows:
        expected = full[row["id"]]
        assert expected["output"].startswith(row["output"].rstrip("\ufffd"))
        assert lengths[row["id"]] + 12 > limit or row == expected


# --- prompts


def prompts_of(home, rows, tokenizer=None, **flags):
    flags = {"prompt_max_len": 100, "max_drop_ratio": 0.9} | flags
    args = script.Args("generate", "", str(home / "policy"), **flags)
    return script.make_prompts(
        [(f"x.jsonl:{i + 1}", row) for i, row in enumerate(rows)], tokenizer or make_tokenizer(), args
    )


def test_slices_wrap_around_and_hold_a_prompt_once(home):
    rows = [{"prompt": str(i)} for i in range(5)]
    ids = [[p.id for p in prompts_of(home, rows, iter=k, rollout_batch_size=3)] for k in range(4)]
    assert ids == [[0, 1, 2], [3, 4, 0], [1, 2, 3], [4, 0, 1]]
    assert [p.id for p in prompts_of(home, rows, iter=1, rollout_batch_size=8)] == [3, 4, 0, 1, 2]


def test_prompts_that_cannot_be_used_are_listed(home, capsys):
    rows = [
        {"prompt": "ok"},
        {"prompt": "long " * 90},
        {"prompt": None},
        {"prompt": " "},
        {"prompt": [{"role": "user"}]},
    ]
    assert [p.id for p in prompts_of(home, rows)] == [0]
    line = capsys.readouterr().out
    assert (
        "1 prompts from column prompt | 4 left out: 1 longer than --prompt_max_len 100 (x.jsonl:2), " in line
    )
    assert (
        "neither text nor messages but NoneType (x.jsonl:3), 1 empty prompt (x.jsonl:4), 1 messages without"
        in line
    )
    with pytest.raises(SystemExit):
        prompts_of(home, rows, max_drop_ratio=0.05)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_the_prompt_is_the_one_that_sft_trains(home, bos, chat):
    sft, tokenizer = load_script("sft"), make_tokenizer(bos=bos)
    rows = [{"prompt": QUESTIONS[1]}]
    flags = {"apply_chat_template": chat, "input_template": None if chat else "Q: {}\nA:"}
    (prompt,) = prompts_of(home, rows, tokenizer, **flags)
    args = sft.Args(pretrain="", **flags)
    direct = sft.label_tokens(sft.render(tokenizer, QUESTIONS[1], " It is 8.", args), tokenizer, {1}, 999)[
        0
    ].tolist()
    ours = sft.label_tokens(
        sft.render(tokenizer, prompt.text, " It is 8.", args, "stop"), tokenizer, {1}, 999
    )[0].tolist()
    assert direct[: len(prompt.ids)] == ours[: len(prompt.ids)] == prompt.ids
    assert direct == ours
    assert (prompt.ids[0] == 2) == (bos and not chat) == prompt.text.startswith("<bos>")
    assert prompt.fields == (
        {"messages": [{"role": "user", "content": QUESTIONS[1]}]} if chat else {"prompt": QUESTIONS[1]}
    )


def test_conversations_are_asked_up_to_their_last_question(home):
    turns = [("user", "1?"), ("assistant", "1"), ("user", "2?"), ("assistant", "2")]
    messages = [{"role": role, "content": text} for role, text in turns]
    for rows in ([{"messages": messages}], [{"conversations": [{"from": r, "value": t} for r, t in turns]}]):
        (prompt,) = prompts_of(home, rows)
        assert prompt.text == "<|user|>1?\n<|assistant|>1<eos>\n<|user|>2?\n<|assistant|>"
        assert prompt.fields["messages"] == messages[:3]


def test_other_columns_of_the_prompt_stay_in_its_rows(home, tmp_path, capsys):
    """A reward function finds the right answer there; names of ours are never taken from the prompts."""
    rows = [{"id": "x", "question": QUESTIONS[i], "answer": i, "output": "old"} for i in range(3)]
    found = run(home, "generate", tmp_path / "a.jsonl", dataset=write(tmp_path / "x.jsonl", rows))
    assert [(row["id"], row["answer"], row["input"]) for row in found] == [(i, i, QUESTIONS[i]) for i in range(3)]
    assert "question" not in found[0] and found[0]["output"] != "old"
    assert "that are not kept, as we write such: id, output" in capsys.readouterr().out


# --- scoring


@functools.cache
def hugging_face(folder):
    tokenizer, _ = script.load_tokenizer(folder, script.Args("rm", ""))
    return tokenizer, AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float32
    )


@torch.no_grad()
def hugging_face_score(folder, text, pad="as it is"):
    """Of one text alone; pad: another pad id (None: there is none)."""
    tokenizer, model = hugging_face(folder)
    usual = model.config.pad_token_id
    model.config.pad_token_id = usual if pad == "as it is" else pad
    score = model(torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])).logits.item()
    model.config.pad_token_id = usual
    return score


def scored_text(row):
    return row["input"] + row["output"] + ("<eos>" if row["finish_reason"] == "stop" else "")


@pytest.mark.parametrize("model", ["rm", "rm_pad_eos"])
def test_rewards_are_hugging_face_scores(home, samples, tmp_path, model):
    """In a tree and alone, whatever the batch; pad == EOS: both look at the token before EOS."""
    flags = {"dataset": str(home / "samples.jsonl"), "pretrain": str(home / model)}
    found = {n: run(home, "rm", tmp_path / f"{n}.jsonl", micro_batch_size=n, **flags) for n in (1, 3, 8)}
    for row in found[8]:
        row["expected"] = hugging_face_score(home / model, scored_text(row))
    for rows in found.values():
        assert [{k: v for k, v in row.items() if k not in ("reward", "expected")} for row in rows] == samples
        for row, other in zip(rows, found[8], strict=True):
            assert row["reward"] == pytest.approx(other["expected"], abs=1e-5)
    assert np.std([row["reward"] for row in found[8]]) > 0.1


@pytest.fixture(scope="session")
def openrlhf(home):
    """The reward model as OpenRLHF saves it, with pad == EOS, and with an own name for its head."""
    from safetensors.torch import load_file, save_file

    folder = home / "openrlhf"
    AutoModelForSequenceClassification.from_pretrained(home / "rm_pad_eos", num_labels=1).save_pretrained(
        folder
    )
    make_tokenizer(pad="<eos>").save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["reward_head.weight"] = weights.pop("score.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "architectures": ["RewardModel"],
        "value_head_prefix": "reward_head",
        "mean": -0.75,
        "std": 2.5,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_openrlhf_head(home, samples, openrlhf, tmp_path):
    """It looks at EOS even where pad is EOS: at the last token."""
    rows = run(home, "rm", tmp_path / "a.jsonl", dataset=str(home / "samples.jsonl"), pretrain=str(openrlhf))
    for row in rows:
        expected = (hugging_face_score(home / "rm_pad_eos", scored_text(row), pad=None) + 0.75) / 2.5
        assert row["reward"] == pytest.approx(expected, abs=1e-5)


def test_value_head_prefix(home, samples, openrlhf, tmp_path, capsys):
    """A config that does not name the head: the flag does; a wrong one is an error, never a random head."""
    folder = tmp_path / "rm"
    shutil.copytree(openrlhf, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["value_head_prefix"]
    (folder / "config.json").write_text(json.dumps(config))
    flags = {"dataset": str(home / "samples.jsonl"), "max_samples": 4}
    named = run(
        home, "rm", tmp_path / "a.jsonl", pretrain=str(folder), value_head_prefix="reward_head", **flags
    )
    assert named == run(home, "rm", tmp_path / "b.jsonl", pretrain=str(openrlhf), **flags)
    assert "lacks score.weight" in stops(
        capsys, home, "rm", tmp_path / "c.jsonl", pretrain=str(folder), **flags
    )


def test_not_a_reward_model(home, samples, tmp_path, capsys):
    flags = {"dataset": str(home / "samples.jsonl")}
    assert "lacks score.weight" in stops(
        capsys, home, "rm", tmp_path / "a.jsonl", pretrain=str(home / "policy"), **flags
    )
    model = Qwen2ForSequenceClassification(make_config(make_tokenizer(), num_labels=2))
    model.save_pretrained(tmp_path / "two")
    make_tokenizer().save_pretrained(tmp_path / "two")
    line = stops(capsys, home, "rm", tmp_path / "b.jsonl", pretrain=str(tmp_path / "two"), **flags)
    assert "score.weight is [2, 64]: the head of a reward model has one label" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["two"]


def test_bf16_keeps_the_head_in_fp32(home, samples, tmp_path):
    flags = {"dataset": str(home / "samples.jsonl"), "max_samples": 8}
    exact, rounded = (run(home, "rm", tmp_path / f"{b}.jsonl", bf16=b, **flags) for b in (False, True))
    error = np.array([a["reward"] - b["reward"] for a, b in zip(exact, rounded, strict=True)])
    assert 0 < np.abs(error).max() < 0.15
    args = script.Args("rm", "", str(home / "rm"))
    model = script.RewardModel(args, "cpu")
    saved = AutoModelForSequenceClassification.from_pretrained(home / "rm", dtype=torch.float32).score.weight
    assert torch.equal(model.head[0], saved) and model.model.model.norm.weight.dtype == torch.bfloat16


def texts_of(rows, openrlhf, **flags):
    args = script.Args("rm", "", **flags)
    return [
        script.score_text(row, ("input", "output"), make_tokenizer(), openrlhf, args)[0::2][:2]
        for row in rows
    ]


def test_messages_are_rendered_in_the_reward_models_template():
    """Hugging Face heads read all of the template, OpenRLHF's up to EOS; nothing follows a cut answer."""
    row = {"input": "policy's own form", "output": "yes", "messages": [{"role": "user", "content": "ok?"}]}
    rows = [row | {"finish_reason": "stop"}, row | {"finish_reason": "length"}]
    chat = "<|user|>ok?\n<|assistant|>yes"
    assert texts_of(rows, False, apply_chat_template=True) == [(chat + "<eos>\n", False), (chat, False)]
    assert texts_of(rows, True, apply_chat_template=True) == [(chat + "<eos>", False), (chat, False)]
    plain = "policy's own formyes"
    assert texts_of(rows, False) == [(plain, True), (plain, False)] == texts_of(rows, True)


def test_rows_that_cannot_be_scored_get_null(home, tmp_path, capsys):
    rows = [{"input": "What? ", "output": text} for text in ("1", "2 " * 60, None, "4")]
    flags = {"dataset": write(tmp_path / "x.jsonl", rows), "max_len": 40}
    assert "1 longer than --max_len 40" in stops(capsys, home, "rm", tmp_path / "a.jsonl", **flags)
    assert not list(tmp_path.glob("a.jsonl*"))
    scored = run(home, "rm", tmp_path / "a.jsonl", max_drop_ratio=0.5, **flags)
    assert [row["reward"] is None for row in scored] == [False, True, True, False]
    assert scored[0]["reward"] == pytest.approx(hugging_face_score(home / "rm", "What? 1<eos>"), abs=1e-5)


def best(rows, keys=("input", "output"), **flags):
    return [row["sample"] for row in script.best_samples(rows, keys, script.Args("rm", "", **flags))]


def test_rejection_sampling():
    rewards = [(0, 1.0), (0, 3.0), (0, 3.0), (1, None), (1, -2.0), (2, None), (1, -3.0)]
    rows = [{"id": i, "sample": n, "input": "x", "reward": r} for n, (i, r) in enumerate(rewards)]
    assert best(rows) == [1, 4]
    assert best(rows, rs_top_k=2) == [1, 2, 4, 6] == best(rows, rs_top_k=2, drop_all_equal=True)
    assert best(rows, rs_top_k=9, min_reward=-2.0) == [1, 2, 0, 4]
    equal = [{**row, "reward": 1.0} for row in rows] + [{"id": 3, "sample": 7, "input": "y", "reward": 1.0}]
    assert best(equal) == [0, 3, 5, 7]
    assert best(equal, drop_all_equal=True) == [5, 7]  # a sample alone has nothing to equal
    rows = [{"question": q, "reward": r, "sample": r} for q, r in (("a", 1), ("b", 1), ("a", 2))]
    assert best(rows, keys=("question", None)) == [2, 1]


def test_a_prompt_is_all_that_is_asked_and_no_answer():
    """Alpaca's prompt is in two columns; a conversation holds its answer too."""
    alpaca = [{"instruction": "Translate.", "input": text, "output": text[0], "reward": 1.0} for text in ("cat", "dog")]
    alpaca.append({**alpaca[0], "output": "C", "reward": 2.0})
    assert script.best_samples(alpaca, ("instruction", "output"), script.Args("rm", "", rs_top_k=1)) == [alpaca[2], alpaca[1]]
    (pair,) = script.best_and_worst(alpaca, ("instruction", "output"), SimpleNamespace(min_margin=0.0))
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == ("Translate.\n\ncat", "C", "c")
    turns = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}] for text in "abc"]
    rows = [{"messages": messages, "reward": reward} for messages, reward in zip(turns, (1, 3, 2), strict=True)]
    assert script.best_samples(rows, ("messages", None), script.Args("rm", "", rs_top_k=1)) == [rows[1]]


def test_iterative_dpo_pairs(capsys):
    """Best against worst of an id; no pair from ties, one response, null rewards or a margin that is too small."""
    rows = [
        {"id": i, "sample": n, "input": "same text", "output": text, "finish_reason": "stop", "reward": reward}
        for n, (i, text, reward) in enumerate(
            [(0, "a", 1.0), (0, "b", 3.0), (0, "c", -2.0), (0, "d", None), (1, "a", 1.0), (1, "b", 1.0)]
            + [(2, "a", 1.0), (2, "a", 2.0), (3, "a", 0.0), (3, "b", 0.5), (4, "a", 1.0)]
        )
    ]
    margin = lambda value: SimpleNamespace(min_margin=value)  # noqa: E731
    pairs = script.best_and_worst(rows, ("input", "output"), margin(0.0))
    assert [(p["id"], p["chosen"], p["rejected"]) for p in pairs] == [(0, "b", "c"), (3, "b", "a")]
    assert pairs[0] == {
        **{"id": 0, "prompt": "same text", "chosen": "b", "rejected": "c", "chosen_reward": 3.0},
        **{"rejected_reward": -2.0, "chosen_finish_reason": "stop", "rejected_finish_reason": "stop"},
    }
    assert "2 of 5 prompts" in capsys.readouterr().out
    assert [p["id"] for p in script.best_and_worst(rows, ("input", "output"), margin(0.5))] == [0]


REWARDS = """
import os, time

def digits(prompt, response, row):
    print("this is no answer")
    return sum(c.isdigit() for c in response)

def length(prompt, response, row):
    return len(prompt) + 0.5 * len(response)

def fragile(prompt, response, row):
    {"raise": lambda: 1 / 0, "hang": lambda: time.sleep(60), "die": lambda: os._exit(0),
     "exit": lambda: exit(3), "nan": lambda: 0}.get(row["kind"], lambda: 0)()
    return float("nan") if row["kind"] == "nan" else row["answer"]

def broken(prompt, response, row):
    raise KeyError("no such thing")
"""


@pytest.fixture(scope="session")
def rewards(home):
    (home / "my-rewards.py").write_text(REWARDS)
    return str(home / "my-rewards.py")


def test_reward_functions(home, samples, rewards, tmp_path, capsys):
    """Alone, weighted, and beside a reward model, whose rewards stay what they are."""
    flags = {"dataset": str(home / "samples.jsonl")}
    alone = run(home, "rm", tmp_path / "a.jsonl", pretrain="", reward_fn=f"{rewards}:digits=2", **flags)
    for row, sample in zip(alone, samples, strict=True):
        assert row == sample | {"reward": 2.0 * sum(c.isdigit() for c in sample["output"])}
    scored = run(home, "rm", tmp_path / "b.jsonl", **flags)
    spec = f"{rewards}:digits, {rewards}:length=-0.25,model=3"
    for row, one, other in zip(run(home, "rm", tmp_path / "c.jsonl", reward_fn=spec, **flags), alone, scored):
        each = {"model": other["reward"], "digits": one["reward"] / 2}
        each["length"] = len(row["input"]) + 0.5 * len(row["output"])
        assert row["rewards"] == pytest.approx(each, abs=1e-6) and list(row["rewards"]) == list(each)
        total = 3 * each["model"] + each["digits"] - 0.25 * each["length"]
        assert row["reward"] == pytest.approx(total, abs=1e-5)
    best = run(home, "rm", tmp_path / "d.jsonl", pretrain="", reward_fn=f"{rewards}:length", post_processor="rs", **flags)
    assert len(best) == 12 and "calls of length" in capsys.readouterr().out


def test_calls_without_a_reward(home, rewards, tmp_path, capsys):
    """An error, a hang, a crash, an exit or NaN gives null, is counted, and harms no other row."""
    kinds = ["ok", "raise", "hang", "ok", "die", "exit", "nan", "ok"] + ["ok"] * 8
    rows = [{"input": "Q", "output": "A", "kind": kind, "answer": i} for i, kind in enumerate(kinds)]
    flags = {"dataset": write(tmp_path / "x.jsonl", rows), "pretrain": "", "reward_timeout": 1.0}
    found = run(home, "rm", tmp_path / "a.jsonl", reward_fn=f"{rewards}:fragile", **flags)
    assert [row["reward"] for row in found] == [i if kind == "ok" else None for i, kind in enumerate(kinds)]
    line = next(line for line in capsys.readouterr().out.splitlines() if "gave no reward" in line)
    assert "5 calls gave no reward: 2 x no answer in 1 s, or the process died" in line
    assert all(text in line for text in ("1 x ZeroDivisionError", "1 x SystemExit: 3", "fragile gave nan"))
    assert json.loads((tmp_path / "a.jsonl.meta.json").read_text())["summary"]["without_reward"] == 5
    both = run(home, "rm", tmp_path / "b.jsonl", reward_fn=f"{rewards}:fragile,{rewards}:digits", **flags)
    assert both[1]["reward"] is None and both[1]["rewards"] == {"fragile": None, "digits": 0.0}


def test_a_reward_function_that_always_fails(home, rewards, tmp_path, capsys):
    """Stops after 100 rows with its traceback, and leaves nothing that a repaired machine would keep."""
    rows = [{"input": f"{i}", "output": "A"} for i in range(5000)]
    flags = {"dataset": write(tmp_path / "x.jsonl", rows), "pretrain": ""}
    for name, error in (("broken", "KeyError: 'no such thing'"), ("missing", "has no attribute 'missing'")):
        with pytest.raises(SystemExit) as stopped:
            run(home, "rm", tmp_path / "a.jsonl", reward_fn=f"{rewards}:{name}", **flags)
        text = capsys.readouterr().err
        assert stopped.value.code == 2 and error in text and "Traceback" in text
        assert f"{name} failed on each of the first 100 rows, on the last:" in text
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_reward_functions_resume(home, samples, rewards, tmp_path, monkeypatch, capsys):
    flags = {"dataset": str(home / "samples.jsonl"), "reward_fn": f"{rewards}:length,{rewards}:digits"}
    whole = run(home, "rm", tmp_path / "whole.jsonl", **flags)
    for after in (5, 60):
        interrupted(monkeypatch, home, "rm", tmp_path / "a.jsonl", after, **flags)
    capsys.readouterr()
    assert run(home, "rm", tmp_path / "a.jsonl", **flags) == whole
    assert "48 of 48 calls of length" in (text := capsys.readouterr().out) and "16 of 48 calls of digits" in text
    Path(rewards).write_text(REWARDS + "# changed")
    run(home, "rm", tmp_path / "a.jsonl", **flags)
    assert "will be replaced: reward_files" in capsys.readouterr().out
    Path(rewards).write_text(REWARDS)


def test_gsm8k_reward(home, tmp_path):
    """The prompts' answers reach the function through generate."""
    file = Path(script.__file__).parent / "examples/rewards/gsm8k.py"
    names = {}
    exec(file.read_text(), names)
    answers = ["so #### 1,234", "#### $1234.00", "first #### 3 then\n#### 1234.", "#### -1234", "1234", "#### x"]
    assert [names["correct"]("", text, {"answer": "12 * ... #### 1234"}) for text in answers] == [1, 1, 1, 0, 0, 0]
    assert names["correct"]("", "#### -7", {"answer": " -7 "}) == 1 and names["marked"]("", "1234", {}) == 0
    rows = [{"question": text, "answer": f"#### {i}"} for i, text in enumerate(QUESTIONS)]
    run(home, "generate", tmp_path / "g.jsonl", dataset=write(tmp_path / "x.jsonl", rows))
    lines = [row | {"output": f"#### {row['id'] // 2 * 2}"} for row in read(tmp_path / "g.jsonl")]
    flags = {"dataset": write(tmp_path / "y.jsonl", lines), "pretrain": "", "reward_fn": f"{file}:correct"}
    assert [row["reward"] for row in run(home, "rm", tmp_path / "r.jsonl", **flags)] == [1.0, 0.0] * 6


# --- log-probabilities of a policy


@pytest.mark.parametrize("chat", [False, True])
def test_logps_are_hugging_faces(home, samples, tmp_path, chat):
    """Of what sft.py would train: the response, EOS where it ended by itself; in a tree and each alone."""
    data = run(home, "generate", tmp_path / "g.jsonl", best_of_n=3, apply_chat_template=chat, csft_prompt=1.0)
    found = run(home, "logps", tmp_path / "a.jsonl", dataset=str(tmp_path / "g.jsonl"), micro_batch_size=2)
    model = Qwen2ForCausalLM.from_pretrained(home / "policy", dtype=torch.float32)
    tokenizer, _ = script.load_tokenizer(str(home / "policy"), script.Args("logps", ""))
    for row, sample in zip(found, data, strict=True):
        prompt, ids = (tokenizer(text).input_ids for text in (row["input"], scored_text(row)))
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        n = len(ids) - len(prompt)
        expected = sum(logps[i - 1, ids[i]].item() for i in range(len(prompt), len(ids)))
        assert {k: v for k, v in row.items() if k not in ("logps", "tokens")} == sample
        assert row["tokens"] == n and row["logps"] == pytest.approx(expected, rel=1e-4)
    rows = [{"prompt": QUESTIONS[0], "response": "8."}]
    (row,) = run(home, "logps", tmp_path / "b.jsonl", dataset=write(tmp_path / "x.jsonl", rows), apply_chat_template=chat)
    assert row["tokens"] == len(tokenizer("8.<eos>").input_ids)


def conditional(rows, keys=("input", "output"), **flags):
    return script.conditional_rows(rows, keys, script.Args("rm", "", post_processor="csft", **flags))


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("kind", ["plain", "template", "chat", "messages"])
def test_csft_trains_on_the_prompt_that_csft_prompt_asks_with(home, tmp_path, kind, bos):
    """Rows of any data, and our own samples: the prompt of sft.py's example is generation's, char for char."""
    sft, tokenizer = load_script("sft"), make_tokenizer(bos=bos)
    template = "Q: {}\nA:" if kind == "template" else None
    flags = {"input_template": template, "apply_chat_template": kind == "chat"}
    system = [{"role": "system", "content": "Be kind."}] * (kind == "messages")
    prompt = [*system, {"role": "user", "content": QUESTIONS[1]}] if kind == "messages" else QUESTIONS[1]
    answer = [{"role": "assistant", "content": " It is 8."}] if kind == "messages" else " It is 8."
    asked = 1.0 if bos else -0.5  # of the rewards 3 and 5: mean 4, std 1; or the reward as it is
    flags |= {"normalize_reward": bos}
    rewards = (5.0, 3.0) if bos else (-0.5, 3.0)
    source = [{"prompt": prompt, "response": answer, "reward": reward} for reward in rewards]
    plain = prompts_of(home, [{"prompt": prompt}], tokenizer, **flags | {"normalize_reward": False})[0]
    ours = [
        plain.fields | {"id": 7, "sample": i, "input": plain.text, "output": " It is 8.", "reward": reward}
        for i, reward in enumerate(rewards)
    ]
    ours = [row | {"finish_reason": "stop"} for row in ours]
    del flags["normalize_reward"]
    (seen,) = prompts_of(home, [{"prompt": prompt}], tokenizer, csft_prompt=asked, **flags)
    assert f"{QUESTIONS[1]} <rm_score>: {asked:.2f} " in seen.text and seen.fields["plain_input"] == plain.text
    for rows, keys in ((source, ("prompt", "response")), (ours, ("input", "output"))):
        row = conditional(rows, keys, normalize_reward=bos, **flags)[0]
        assert list(row)[-3:] == ["reward", "input", "output"] and row["reward"] == rewards[0]
        sft_keys = sft.find_keys([("x", row)], (None, None), ("", ""), [("messages", None), ("input", "output")])
        sft_flags = {} if rows is ours else {"input_template": template}
        args = sft.Args(pretrain="", **sft_flags)
        ((text, spans, finished, needs_bos),) = sft.sft_texts(row, tokenizer, sft_keys, args)
        trained_prompt = ("<bos>" if needs_bos and bos else "") + text[: spans[-1][0]]
        assert trained_prompt == seen.text
        ids, trained = sft.label_tokens((text, spans, finished, needs_bos), tokenizer, {1}, 999)
        assert ids[-1] == 1 and trained[-1]
        if kind != "plain":  # there the blank at the end of the template may join the answer
            assert ids[: len(seen.ids)].tolist() == seen.ids


def test_equal_rewards_have_no_spread():
    assert script.reward_statistics([{"reward": 0.1}] * 3) == (0.1, 0.0)  # np.std: 1e-17


def test_csft_rewards_never_give_nan():
    row = {"input": "Q", "output": "A", "reward": 2.0}
    for rewards in ([2.0], [2.0, 2.0], [2.0, None]):
        rows = conditional([row | {"reward": reward} for reward in rewards], normalize_reward=True)
        assert [r["input"] for r in rows] == ["Q <rm_score>: 0.00 "] * (len(rewards) - rewards.count(None))
    assert conditional([row | {"reward": -0.001}])[0]["input"] == "Q <rm_score>: 0.00 "  # never -0.00
    assert conditional([row | {"reward": None}]) == []
    mixed = row | {"input": "say {reward} or {input}"}
    assert conditional([mixed], reward_template="{reward}: {input}")[0]["input"] == "2.00: say {reward} or {input}"


def test_csft_leaves_out_what_it_cannot_show(capsys):
    user = [{"role": "user", "content": "Q"}]
    own = {"input": "<|user|>Q\n<|assistant|>", "output": "A", "reward": 1.0, "finish_reason": "length"}
    rows = [own | {"messages": user}, own, own | {"messages": user, "finish_reason": "stop"}]
    rows += [own | {"input": "Q: A\nA:", "prompt": "A"}, own | {"reward": None}]
    rows += [own | {"messages": [{"role": "system", "content": "Q"}], "finish_reason": "stop"}]
    found = conditional(rows)
    assert [row["input"] if isinstance(row["input"], str) else row["input"][0]["content"] for row in found] == [
        "<|user|>Q\n<|assistant|> <rm_score>: 1.00 ",
        "Q <rm_score>: 1.00 ",
    ]
    line = capsys.readouterr().out
    assert "2 rows | 4 left out: 1 the answer was cut" in line and "no user turn" in line and "own words" in line


def test_csft_of_a_preference_dataset(home, tmp_path):
    """The seed document's command: whole conversations in a column; and text prompts beside text answers."""
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": f"{i}."}] for i, q in enumerate(QUESTIONS)]
    rows = [{"chosen": turn, "rejected": turn[:1] + turn[:1], "messages": "other"} for turn in turns]
    flags = {"dataset": write(tmp_path / "x.jsonl", rows), "input_key": "chosen", "apply_chat_template": True}
    found = run(home, "rm", tmp_path / "a.jsonl", post_processor="csft", normalize_reward=True, **flags)
    summary = json.loads((tmp_path / "a.jsonl.meta.json").read_text())["summary"]
    for i, row in enumerate(found):
        text = f"<|user|>{QUESTIONS[i]}\n<|assistant|>{i}.<eos>\n"
        assert row["reward"] == pytest.approx(hugging_face_score(home / "rm", text), abs=1e-5)
        shown = (row["reward"] - summary["reward_mean"]) / summary["reward_std"]
        assert row["input"][0]["content"] == f"{QUESTIONS[i]} <rm_score>: {shown:.2f} ".replace("-0.00", "0.00")
        assert list(row) == ["reward", "input", "output"] and row["output"] == f"{i}."
    pairs = [{"prompt": row["chosen"][0]["content"], "chosen": row["chosen"][1]["content"]} for row in rows]
    flags |= {"dataset": write(tmp_path / "y.jsonl", pairs), "input_key": "prompt", "output_key": "chosen"}
    assert run(home, "rm", tmp_path / "b.jsonl", post_processor="csft", normalize_reward=True, **flags) == found


def test_samples_under_a_condition_are_scored_without_it(home, tmp_path):
    """By the plain prompt and by the messages: no reward model has ever read a condition."""
    flags = {"csft_prompt": 1.5, "max_samples": 3}
    for chat in (False, True):
        asked = run(home, "generate", tmp_path / f"{chat}.jsonl", apply_chat_template=chat, **flags)
        assert all(" <rm_score>: 1.50 " in row["input"] for row in asked)
        data = str(tmp_path / f"{chat}.jsonl")
        scored = run(home, "rm", tmp_path / f"rm{chat}.jsonl", dataset=data)
        for row in scored:
            assert "<rm_score>" not in row["plain_input"] and row["input"].endswith("<|assistant|>") == chat
            output = row["output"].removeprefix(" ") if row["input"].endswith("1.50") else row["output"]
            plain = row | {"input": row["plain_input"], "output": output}
            expected = hugging_face_score(home / "rm", scored_text(plain))
            assert row["reward"] == pytest.approx(expected, abs=1e-5)
    again = run(home, "rm", tmp_path / "again.jsonl", dataset=data, apply_chat_template=True)
    assert [row["reward"] for row in again if row["finish_reason"] == "length"] == pytest.approx(
        [row["reward"] for row in scored if row["finish_reason"] == "length"], abs=1e-5
    )


def test_the_blank_behind_a_condition_is_no_part_of_the_answer():
    """Where the condition ends the prompt, the sample may begin with its blank; any other blank stays."""
    own = {"input": "Q [1.50]", "plain_input": "Q", "output": " the", "finish_reason": "stop"}
    others = [{"input": "Q [1.50] "}, {"prompt": "Q"}, {"messages": [{"role": "user", "content": "Q"}]}]
    found = [script.row_texts(own | other, ("input", "output"), True)[1] for other in [{}, *others]]
    assert found == ["the", " the", " the", {"role": "assistant", "content": " the"}]


def test_post_processor_and_scored_path(home, samples, tmp_path):
    flags = {"dataset": str(home / "samples.jsonl"), "scored_path": str(tmp_path / "all.jsonl")}
    best = run(home, "rm", tmp_path / "best.jsonl", post_processor="rs", **flags)
    scored = read(tmp_path / "all.jsonl")
    assert [row["id"] for row in best] == list(range(12)) and len(scored) == 48
    for row in best:
        assert row["reward"] == max(r["reward"] for r in scored if r["id"] == row["id"])
        assert row in scored
    summary = json.loads((tmp_path / "best.jsonl.meta.json").read_text())["summary"]
    assert summary["rows"] == 48 and summary["selected"] == 12
    assert summary["reward_mean"] == pytest.approx(np.mean([row["reward"] for row in scored]))
    later = run(home, "rm", tmp_path / "best.jsonl", post_processor="rs", **flags | {"scored_path": str(tmp_path / "new/all.jsonl")})
    assert later == best and read(tmp_path / "new/all.jsonl") == scored  # asked for later: not "nothing to do"


# --- identity, resume, ranks


class Killed(Exception):
    pass


def interrupted(monkeypatch, home, task, out, after, **flags):
    """Runs until `after` batches are written, then dies in the middle of a line."""
    write_part, count = script.Parts.write, 0

    def write_some(parts, rows):
        nonlocal count
        count += 1
        if count > after:
            parts.file.write('{"id": 3, "sam')
            parts.file.flush()
            raise Killed
        write_part(parts, rows)

    with monkeypatch.context() as patch:
        patch.setattr(script.Parts, "write", write_some)
        with pytest.raises(Killed):
            run(home, task, out, **flags)
    assert not out.exists() and Path(f"{out}.partial").exists()


@pytest.mark.parametrize("task", ["generate", "rm"])
def test_a_killed_stage_continues(home, samples, tmp_path, monkeypatch, capsys, task):
    flags = (
        {"micro_batch_size": 3, "best_of_n": 4}
        if task == "generate"
        else {"dataset": str(home / "samples.jsonl")}
    )
    whole = run(home, task, tmp_path / "whole.jsonl", **flags)
    out = tmp_path / "out.jsonl"
    interrupted(monkeypatch, home, task, out, 1, **flags)
    interrupted(monkeypatch, home, task, out, 1, **flags)
    capsys.readouterr()
    assert run(home, task, out, **flags) == whole
    assert "resume " in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("out")) == [
        "out.jsonl",
        "out.jsonl.meta.json",
    ]


def test_the_same_command_does_nothing_another_replaces(home, tmp_path, monkeypatch, capsys):
    out, flags = tmp_path / "sub" / "out.jsonl", {"max_samples": 3}
    first = run(home, "generate", out, **flags)
    stamp = out.stat().st_mtime_ns
    assert run(home, "generate", out, micro_batch_size=2, **flags) == first
    assert out.stat().st_mtime_ns == stamp and "nothing to do" in capsys.readouterr().out
    out.write_text(out.read_text() + "\n")  # somebody changed it
    assert run(home, "generate", out, **flags) == first
    assert "changed since" in capsys.readouterr().out
    assert run(home, "generate", out, seed=7, **flags) != first
    assert "will be replaced: seed was 42, now 7" in capsys.readouterr().out


def test_parts_of_another_command_are_not_continued(home, samples, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.jsonl"
    interrupted(monkeypatch, home, "generate", out, 2, seed=1, micro_batch_size=2)
    assert run(home, "generate", out, best_of_n=4) == samples
    assert "starting over: best_of_n was 1, now 4, seed was 1, now 42" in capsys.readouterr().out


def test_two_at_once(home, tmp_path, capsys):
    import fcntl

    (tmp_path / "a.jsonl.partial").mkdir()
    with open(tmp_path / "a.jsonl.partial" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process" in stops(capsys, home, "generate", tmp_path / "a.jsonl")


FORKS = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from launch import load_script
script = load_script("batch_infer")
if sys.argv[2] == "generate_vllm":
    import vllm
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        script.main(script.Args(**json.loads(line)))
        sys.stdout.flush()
        os._exit(0)
    print("pid", pid, flush=True)
    print("status", os.waitpid(pid, 0)[1], flush=True)
"""


class Forks:
    """Runs main() in forks of one process that has imported all: a start takes no seconds."""

    def __init__(self, task):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, "-c", FORKS, str(Path(__file__).parent), task]
        self.process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)

    def answer(self, word):
        for line in self.process.stdout:
            if line.startswith(word):
                return int(line.split()[1])
        raise AssertionError("the process that forks has ended")

    def run(self, flags, kill_after=None):
        """(whether it was killed, seconds that it ran)."""
        self.process.stdin.write(json.dumps(flags) + "\n")
        self.process.stdin.flush()
        pid, started = self.answer("pid"), time.time()
        if kill_after is not None:
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):  # it was quicker
                os.kill(pid, 9)
        status = self.answer("status")
        assert status in (0, 9)
        return status == 9, time.time() - started


@pytest.mark.parametrize("n_kills", [3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("task", ["generate", "rm", "generate_vllm"])
def test_kill_campaign(home, tmp_path, task, n_kills):
    """kill -9 at random moments, again and again until a start gets to the end: the rows of an undisturbed run."""
    if task == "generate_vllm" and importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed (requirements-vllm.txt)")
    rows = [{"input": f"{i} {text}", "output": text[::-1]} for i in range(12) for text in QUESTIONS]
    flags = {"eval_task": task, "dataset": write(tmp_path / "x.jsonl", rows), "micro_batch_size": 4}
    flags |= {"pretrain": str(home / ("rm" if task == "rm" else "policy")), "max_new_tokens": 12, "bf16": False}
    forks, rng, kills, n = Forks(task), random.Random(n_kills), 0, 0
    forks.run(flags | {"output_path": str(tmp_path / "whole.jsonl")})
    _, seconds = forks.run(flags | {"output_path": str(tmp_path / "again.jsonl")})
    whole = read(tmp_path / "whole.jsonl")
    assert [(row.get("id"), row.get("sample")) for row in whole] == (
        [(None, None)] * 144 if task == "rm" else [(i, 0) for i in range(144)]
    )
    while kills < n_kills:
        out, killed, n = tmp_path / f"{n}.jsonl", True, n + 1
        while killed:
            killed, _ = forks.run(flags | {"output_path": str(out)}, rng.uniform(0, seconds) if kills < n_kills else None)
            kills += killed
        found = read(out)
        assert [row | {"reward": 0} for row in found] == [row | {"reward": 0} for row in whole]
        if task == "rm":
            assert [row["reward"] for row in found] == pytest.approx([row["reward"] for row in whole], abs=1e-6)
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.tmp"))
    forks.process.kill()


def launch(tmp_path, ranks, configs):
    """Runs main() for each configuration in one start of Python per rank."""
    (tmp_path / "configs.json").write_text(json.dumps(configs))
    python = (
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
        if ranks > 1
        else [sys.executable]
    )
    command = [
        *python,
        str(Path(__file__).parent / "launch.py"),
        "batch_infer",
        str(tmp_path / "configs.json"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(script.__file__).parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_ranks(home, samples, rewards, tmp_path):
    """The same samples and, to rounding, rewards, in the same order, none twice."""
    common = {"bf16": False, "prompt_max_len": 100, "max_new_tokens": 12}
    generate = {
        "eval_task": "generate",
        "pretrain": str(home / "policy"),
        "dataset": str(home / "prompts.jsonl"),
    }
    generate |= {"output_path": str(tmp_path / "gen.jsonl"), "best_of_n": 4, "micro_batch_size": 2, **common}
    rm = {"eval_task": "rm", "pretrain": str(home / "rm"), "dataset": str(home / "samples.jsonl"), **common}
    rm |= {"output_path": str(tmp_path / "rm.jsonl"), "reward_fn": f"{rewards}:digits=0.5"}
    text = launch(tmp_path, 2, [generate, rm, rm])
    assert read(tmp_path / "gen.jsonl") == samples
    flags = {"dataset": str(home / "samples.jsonl"), "reward_fn": rm["reward_fn"]}
    alone = run(home, "rm", tmp_path / "alone.jsonl", **flags)
    for row, expected in zip(read(tmp_path / "rm.jsonl"), alone, strict=True):
        assert row | {"reward": 0, "rewards": 0} == expected | {"reward": 0, "rewards": 0}
        assert row["rewards"] == pytest.approx(expected["rewards"], abs=1e-5)
        assert row["reward"] == pytest.approx(expected["reward"], abs=1e-5)
    assert "| 2 x CPU" in text and text.count("nothing to do") == 1
    assert not list(tmp_path.glob("*.partial"))


# --- bad input


def test_bad_flags(home, tmp_path, capsys):
    cases = {
        "--post_processor bon: unknown; there are rs": {"task": "rm", "post_processor": "bon"},
        "'{input}: {score}' lacks {input} or {reward}": {"reward_template": "{input}: {score}"},
        "--csft_prompt is for generation": {"task": "rm", "csft_prompt": 1.0},
        "--csft_prompt must be between": {"csft_prompt": float("nan")},
        "--normalize_reward belongs to --post_processor csft": {"task": "rm", "normalize_reward": True},
        "belong to --eval_task rm": {"post_processor": "rs"},
        "belong to --eval_task rm, not logps": {"task": "logps", "reward_fn": "x.py:y"},
        "--pretrain is missing, or --reward_fn": {"task": "rm", "pretrain": ""},
        "x.py:y: FILE.py:NAME or": {"task": "rm", "reward_fn": "x.py:y"},
        "x=heavy: FILE.py:NAME or": {"task": "rm", "reward_fn": f"{__file__}:x=heavy"},
        "model=1: FILE.py:NAME": {"task": "rm", "pretrain": "", "reward_fn": "model=1"},
        "--reward_timeout must be": {"task": "rm", "reward_timeout": 0.0},
        "--top_p must be between": {"top_p": 1.5},
        "--best_of_n must be between": {"best_of_n": 0},
        "--greedy_sampling gives the same answer": {"greedy_sampling": True, "best_of_n": 2},
        "no column 'prmpt'; it has prompt": {"input_key": "prmpt"},
        "is more than the model's 256": {"max_model_len": 300},
        "nowhere.jsonl": {"dataset": str(tmp_path / "nowhere.jsonl")},
        "empty.jsonl": {"dataset": write(tmp_path / "empty.jsonl", [])},
        "one of our other files": {"dataset": str(tmp_path / "out.jsonl")},
        "no-such-model": {"pretrain": "./no-such-model"},
    }
    if importlib.util.find_spec("vllm") is None:
        cases["vLLM is missing: pip install -r requirements-vllm.txt"] = {"task": "generate_vllm"}
    for message, flags in cases.items():
        line = stops(capsys, home, flags.pop("task", "generate"), tmp_path / "out.jsonl", **flags)
        assert message in line, line
    assert [p.name for p in tmp_path.iterdir()] == ["empty.jsonl"]


@pytest.mark.parametrize("words", [["--eval_task", "generat"], ["--eval_task", "rm", "--best_of", "3"]])
def test_unknown_task_and_flag(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        tyro.cli(script.Args, args=[*words, "--pretrain", "x", "--output_path", "y"])
    assert stopped.value.code == 2
    assert "generate_vllm" in (text := capsys.readouterr().err) or "best-of-n" in text


def test_full_disk(home, tmp_path, capsys):
    parts = object.__new__(script.Parts)
    parts.file = open("/dev/full", "w") if os.path.exists("/dev/full") else pytest.skip("no /dev/full here")
    with pytest.raises(SystemExit):
        parts.write([{"id": 0}])
    assert "No space left on device; what is written stays" in capsys.readouterr().err


def test_full_disk_at_the_end(home, samples, tmp_path, monkeypatch, capsys):
    """The parts stay: with room again, the same command only writes the file."""

    write_atomic = script.write_atomic

    def no_room(path, text):
        if path.endswith("a.jsonl"):
            raise OSError(28, "No space left on device")
        write_atomic(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(script, "write_atomic", lambda path, text: no_room(str(path), text))
        line = stops(capsys, home, "generate", tmp_path / "a.jsonl", best_of_n=4)
    gc.collect()  # the process lives on, and its traceback holds the lock
    assert "a.jsonl: No space left on device; what is in" in line and (tmp_path / "a.jsonl.partial").exists()
    assert run(home, "generate", tmp_path / "a.jsonl", best_of_n=4) == read(home / "samples.jsonl")
    assert "resume 12 of 12 prompts were done before" in capsys.readouterr().out


def test_a_tokenizer_without_pad_token(home, samples, tmp_path):
    """The last token is looked at; generation pads with EOS, which nothing sees."""
    for name in ("rm", "policy"):
        shutil.copytree(home / name, tmp_path / name)
        for file, keys in (("tokenizer_config.json", ["pad_token"]), ("config.json", ["pad_token_id"])):
            settings = json.loads((tmp_path / name / file).read_text())
            settings = {key: value for key, value in settings.items() if key not in keys}
            (tmp_path / name / file).write_text(json.dumps(settings))
    flags = {"dataset": str(home / "samples.jsonl")}
    found, usual = (
        run(home, "rm", tmp_path / f"{i}.jsonl", pretrain=str(folder / "rm"), **flags)
        for i, folder in enumerate((tmp_path, home))
    )
    assert [row["reward"] for row in found] == pytest.approx([row["reward"] for row in usual], abs=1e-6)
    again = run(home, "generate", tmp_path / "g.jsonl", pretrain=str(tmp_path / "policy"), best_of_n=4)
    assert again == samples


# --- vLLM


@pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed (requirements-vllm.txt)"
)
def test_vllm(home, tmp_path):
    """Greedy: Hugging Face's rows. Sampled: a prompt's rows do not depend on its companions, or on the engine."""
    prompts = str(home / "prompts.jsonl")
    common = {
        "eval_task": "generate_vllm",
        "pretrain": str(home / "policy"),
        "dataset": prompts,
        "bf16": False,
    }
    common |= {"prompt_max_len": 100, "max_new_tokens": 12}
    sampled = common | {"best_of_n": 3, "temperature": 0.8, "top_k": 50, "min_p": 0.01, "stop": ["plus"]}
    greedy = common | {"greedy_sampling": True, "max_model_len": 60, "repetition_penalty": 1.2}
    configs = [greedy, sampled, sampled | {"max_samples": 5, "max_num_seqs": 4}, sampled | {"dp_size": 2}]
    configs = [config | {"output_path": str(tmp_path / f"{i}.jsonl")} for i, config in enumerate(configs)]
    text = launch(tmp_path, 1, configs)
    flags = {name: greedy[name] for name in ("greedy_sampling", "max_model_len", "repetition_penalty")}
    assert read(tmp_path / "0.jsonl") == run(home, "generate", tmp_path / "hf.jsonl", **flags)
    rows = read(tmp_path / "1.jsonl")
    assert [(row["id"], row["sample"]) for row in rows] == [(i, k) for i in range(12) for k in range(3)]
    assert read(tmp_path / "2.jsonl") == rows[:15] and read(tmp_path / "3.jsonl") == rows
    assert text.count("12/12") == 3 and "| 2 x CPU" in text and not list(tmp_path.glob("*.partial"))
    assert len({row["output"] for row in rows}) > 20 and not any("plus" in row["output"] for row in rows)

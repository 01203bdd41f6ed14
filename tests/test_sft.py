"""sft.py against plain torch and Hugging Face's own loss, values computed by hand, kills and bad input."""

import copy
import fcntl
import gc
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
import tyro
from conftest import CHAT_TEMPLATE, make_model, make_rows, make_tokenizer, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from launch import load_script
from torch.nn.utils import clip_grad_norm_
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    set_seed,
)

sft = load_script("sft")
REPO = Path(__file__).resolve().parents[1]
SETTINGS = {"bf16": False, "train_batch_size": 24, "learning_rate": 1e-3, "lr_scheduler": "constant"}
SETTINGS |= {"lr_warmup_ratio": 0.0, "max_len": 100}
SPLITS = {
    "micro8": {},
    "micro1": {"micro_train_batch_size": 1},
    "micro2": {"micro_train_batch_size": 2},
    "packing": {"micro_train_batch_size": 3, "packing_samples": True},
    "zero0": {"zero_stage": 0},
    "zero1": {"zero_stage": 1},
    "zero3": {"zero_stage": 3},
    "checkpointing": {"gradient_checkpointing": True},
    "zero3-checkpointing-micro2": {
        "zero_stage": 3,
        "gradient_checkpointing": True,
        "micro_train_batch_size": 2,
    },
    "offload": {"adam_offload": True},
    "zero3-offload": {"zero_stage": 3, "adam_offload": True},
}


class Killed(BaseException):
    """Stands for SIGKILL in tests that run in one process."""


@pytest.fixture(autouse=True)
def quick_and_clean(monkeypatch):
    """One thread, as more only cost with this model; setup()'s environment variables end with the test."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def run(**flags):
    """main() in this process, as one rank; its exit code: 0, 2, or "killed"."""
    try:
        return sft.main(sft.Args(**{**SETTINGS, **flags})) or 0
    except SystemExit as e:
        return e.code
    except Killed:
        return "killed"
    finally:
        gc.collect()  # the lock on the output folder goes with the frame that holds it


def torchrun(*command):
    """The command line that starts command on two ranks."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *command]


def command_flags(**flags):
    """Flags as a command line."""
    words = []
    for name, value in {**SETTINGS, **flags}.items():
        words += (
            [f"--{name}" if value else f"--no-{name}"]
            if isinstance(value, bool)
            else [f"--{name}", str(value)]
        )
    return words


def metrics_of(save_path):
    """{name: [its value at each logged step]}."""
    lines = [json.loads(line) for line in (Path(save_path) / "metrics.jsonl").read_text().splitlines()]
    return {name: [line[name] for line in lines] for name in lines[0]}


def weights_of(save_path):
    """The bytes of a saved model's weights."""
    return (Path(save_path) / "model.safetensors").read_bytes()


def hf_loss(model, ids, n_prompt):
    """Hugging Face's own loss of one sequence, its prompt masked: (sum of nats, number of trained tokens)."""
    labels = torch.tensor([[-100] * n_prompt + ids[n_prompt:]])
    n = len(ids) - n_prompt
    return model(input_ids=torch.tensor([ids]), labels=labels, use_cache=False).loss * n, n


def encode_plainly(tokenizer, row):
    """(ids with EOS, cut at max_len; length of the prompt) by nothing but the tokenizer."""
    ids = tokenizer(row["input"] + row["output"])["input_ids"] + [tokenizer.eos_token_id]
    prompt = tokenizer(row["input"])["input_ids"]
    assert ids[: len(prompt)] == prompt
    return ids[: SETTINGS["max_len"]], len(prompt)


def mean_loss(folder, rows_file):
    """HF's loss of a saved model, per trained token of the first 8 rows."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in Path(rows_file).read_text().splitlines()[:8]]
    with torch.no_grad():
        sums, counts = zip(*(hf_loss(model, *encode_plainly(tokenizer, row)) for row in rows))
    return (sum(sums) / sum(counts)).item()


# --- equality: however a step is split, it is the step of plain torch


@pytest.fixture(scope="module")
def reference(tiny, rows_file, tmp_path_factory):
    """Three steps of plain torch, one forward per example: loss, gradient norm, and the loss after them."""
    model = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="eager", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    rows = [json.loads(line) for line in Path(rows_file).read_text().splitlines()]
    encoded = [encode_plainly(tokenizer, row) for row in rows]
    order = np.random.default_rng([42, 0]).permutation(len(rows))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    result = SimpleNamespace(loss=[], grad_norm=[])
    for begin in (0, 24, 48):
        batch = [encoded[i] for i in order[begin : begin + 24]]
        n_tokens = sum(len(ids) - n_prompt for ids, n_prompt in batch)
        loss = sum(hf_loss(model, *example)[0] for example in batch) / n_tokens
        optimizer.zero_grad()
        loss.backward()
        result.loss.append(loss.item())
        result.grad_norm.append(clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
    folder = tmp_path_factory.mktemp("reference")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    result.final = mean_loss(folder, rows_file)
    return result


@pytest.fixture(scope="module")
def two_ranks(tiny, rows_file, tmp_path_factory):
    """Folder with the results of all SPLITS on two ranks, started once."""
    out = tmp_path_factory.mktemp("two_ranks")
    paths = {"pretrain": tiny, "dataset": rows_file}
    configs = [{**SETTINGS, **paths, **flags, "save_path": str(out / name)} for name, flags in SPLITS.items()]
    extra = {"zero_stage": 3, "max_epochs": 4, "train_batch_size": 16}  # what the killed run is compared with
    configs.append({**SETTINGS, **paths, **extra, "save_path": str(out / "four_epochs")})
    (out / "configs.json").write_text(json.dumps(configs))
    command = torchrun(str(REPO / "tests/launch.py"), "sft", str(out / "configs.json"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def assert_same_steps(save_path, reference, rows_file):
    found = metrics_of(save_path)
    assert found["loss"] == pytest.approx(reference.loss, rel=0, abs=1e-5)
    assert found["grad_norm"] == pytest.approx(reference.grad_norm, rel=1e-5, abs=1e-5)
    assert mean_loss(save_path, rows_file) == pytest.approx(reference.final, rel=0, abs=1e-5)


@pytest.mark.parametrize("name", SPLITS)
def test_one_rank_equals_plain_torch(name, reference, tiny, rows_file, tmp_path):
    out = str(tmp_path / "out")
    assert run(pretrain=tiny, dataset=rows_file, save_path=out, **SPLITS[name]) == 0
    assert_same_steps(out, reference, rows_file)


@pytest.mark.parametrize("name", SPLITS)
def test_two_ranks_equal_plain_torch(name, reference, two_ranks, rows_file):
    assert_same_steps(two_ranks / name, reference, rows_file)


@pytest.mark.parametrize("zero_stage", range(4))
def test_bf16_has_fp32_master_weights(zero_stage, tiny, rows_file, tmp_path, monkeypatch):
    """One AdamW step moves every weight by the learning rate, 1e-7: far below what bf16 can hold."""
    from deepspeed.utils import safe_get_full_fp32_param

    start = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).float().state_dict()
    moves, save_model = [], sft.save_model

    def spy(engine, *rest):
        for name, p in engine.module.model.named_parameters():
            moves.append((safe_get_full_fp32_param(p) - start[name]).abs().flatten())
        save_model(engine, *rest)

    monkeypatch.setattr(sft, "save_model", spy)
    paths = {"pretrain": tiny, "dataset": rows_file, "save_path": str(tmp_path / "out")}
    assert run(**paths, bf16=True, zero_stage=zero_stage, learning_rate=1e-7, train_batch_size=49) == 0
    moves = torch.cat(moves)
    assert (moves > 0).float().mean() > 0.95
    # 0.73e-7 if the optimiser took a hidden step at its start: its bias correction would be one ahead
    assert moves.median().item() == pytest.approx(1e-7, rel=0.02)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


# --- log-probabilities


def tree(prompt, *responses):
    """An example of token ids, every response token trained."""
    responses = [np.array(ids, np.int32) for ids in responses]
    trained = [np.ones(len(ids), bool) for ids in responses]
    return {"prompt": np.array(prompt, np.int32), "responses": responses, "trained": trained}


def test_neighbours_in_a_pack_have_no_effect(tiny):
    model = sft.LogProbs(sft.load_model(tiny, sft.Args(pretrain=tiny, bf16=False)))
    a, b, c = tree([5, 6, 7, 8], [9, 10, 11]), tree([20, 21, 22], [23, 24, 25, 26]), tree([30], [31, 32])
    other = tree([105, 106, 107, 108], [109, 110, 111])  # a's lengths, other tokens
    with torch.no_grad():
        logps, changed = (model(sft.pack_trees([x, b, c], "cpu")) for x in (a, other))
        alone = torch.cat([model(sft.pack_trees([x], "cpu")) for x in (a, b, c)])
    assert torch.equal(logps[3:], changed[3:]) and not torch.equal(logps[:3], changed[:3])
    assert torch.allclose(logps, alone, rtol=0, atol=1e-5)


def test_pack_trees_by_hand():
    """Two responses on one prompt, then one example. Positions go on at the prompt."""
    first = tree([10, 11, 12], [20, 21], [30, 31, 32])
    first["trained"][1] = np.array([True, False, True])
    pack = sft.pack_trees([first, tree([40], [50, 51])], "cpu")
    assert pack["input_ids"].tolist() == [[10, 11, 12, 20, 21, 30, 31, 32, 40, 50, 51]]
    assert pack["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2]]
    assert pack["segments"]["spans"] == [(0, 5, 0, 0), (5, 8, 0, 3), (8, 11, 8, 8)]
    assert pack["positions"].tolist() == [2, 3, 2, 6, 8, 9]
    assert pack["targets"].tolist() == [20, 21, 30, 32, 50, 51]
    assert pack["owners"].tolist() == [0, 0, 1, 1, 2, 2]


def test_chunks_of_the_head_have_no_effect(tiny, monkeypatch):
    model = sft.LogProbs(sft.load_model(tiny, sft.Args(pretrain=tiny, bf16=False)))
    pack = sft.pack_trees([tree([1, 2], range(3, 60)), tree([7], range(100, 130))], "cpu")
    grads, logps = [], []
    for chunk_bytes in (2**26, 1):  # 1: the smallest chunk, 16 rows
        monkeypatch.setattr(sft.LogProbs, "CHUNK_BYTES", chunk_bytes)
        model.zero_grad()
        logps.append(model(pack))
        logps[-1].sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(*logps, rtol=0, atol=1e-5) and torch.allclose(*grads, rtol=1e-4, atol=1e-4)


# --- the split of a step, the learning rate


def test_split_step_by_hand():
    assert sft.split_step([5, 3, 2, 2], 1, 2) == [[[0, 3], [1, 2]]]  # longest first, into the lightest
    assert sft.split_step([4, 4, 1], 2, 8) == [[[0, 2]], [[1]]]  # the heavier bin on the first rank
    assert sft.split_step([6, 5, 5, 4], 1, 8, max_tokens=10) == [[[0, 3], [1, 2]]]
    assert sft.split_step([8, 1, 7, 2], 2, 1) == [
        [[0], [3]],
        [[2], [1]],
    ]  # ranks take turns: alike at every pass
    assert sft.split_step([7], 2, 4) == [[[0]], [[]]]  # fewer examples than ranks


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    world_size=st.integers(1, 5),
    max_examples=st.integers(1, 8),
    max_tokens=st.none() | st.integers(50, 200),
)
def test_split_step_uses_every_example_once(lengths, world_size, max_examples, max_tokens):
    ranks = sft.split_step(lengths, world_size, max_examples, max_tokens)
    assert len(ranks) == world_size and len({len(bins) for bins in ranks}) == 1
    bins = [bin for bins in ranks for bin in bins]
    assert sorted(i for bin in bins for i in bin) == list(range(len(lengths)))
    for bin in bins:
        if max_tokens:
            assert sum(lengths[i] for i in bin) <= max_tokens
        else:
            assert len(bin) <= max_examples
    if not max_tokens:
        assert len(ranks[0]) == math.ceil(len(lengths) / max_examples / world_size)


def test_learning_rate_by_hand():
    def rates(scheduler, **flags):
        flags = {"lr_scheduler": scheduler, "lr_warmup_ratio": 0.2, "min_lr_ratio": 0.1, **flags}
        args = sft.Args(pretrain="", learning_rate=2.0, **flags)
        return [sft.learning_rate(args, step, 10) for step in range(1, 11)]

    assert rates("constant") == [1.0] + [2.0] * 9
    assert rates("constant", lr_warmup_ratio=0.0) == [2.0] * 10
    assert rates("linear") == pytest.approx([1.0, 2.0, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25])
    cosine = [1 + math.cos(math.pi * i / 8) for i in range(8)]
    assert rates("cosine") == pytest.approx([1.0, 2.0, *cosine])
    assert rates("cosine_with_min_lr") == pytest.approx([1.0, 2.0, *(0.2 + 0.9 * c for c in cosine)])


# --- rows: which tokens are read, which are trained


@pytest.fixture
def trees_of(tiny, tmp_path, monkeypatch):
    """trees_of(rows, **flags): main()'s examples of the rows, each (prompt text, [trained texts])."""

    def collect(rows, pretrain=tiny, **flags):
        path, built, build_trees = write_rows(tmp_path / "rows.jsonl", rows), [], sft.build_trees

        def spy(*args):
            built.extend(build_trees(*args)[0])
            raise Killed

        monkeypatch.setattr(sft, "build_trees", spy)
        code = run(pretrain=pretrain, dataset=path, save_path=str(tmp_path / "out"), **flags)
        monkeypatch.setattr(sft, "build_trees", build_trees)
        assert code == "killed"
        collect.trees, tokenizer = built, AutoTokenizer.from_pretrained(pretrain)
        return [spans_of(example, tokenizer) for example in built]

    return collect


def spans_of(example, tokenizer):
    """(text before the first trained token, [text of each trained stretch]) of an example."""
    ids = np.r_[example["prompt"], example["responses"][0]]
    trained = np.r_[np.zeros(len(example["prompt"]), bool), example["trained"][0]].astype(int)
    edges = np.flatnonzero(np.diff(trained, append=0, prepend=0)).reshape(-1, 2)
    return tokenizer.decode(ids[: edges[0][0]]), [tokenizer.decode(ids[a:b]) for a, b in edges]


CHAT = [
    {"role": "user", "content": "red?"},
    {"role": "assistant", "content": "river"},
    {"role": "user", "content": "old?"},
    {"role": "assistant", "content": "walls"},
]
PROMPT = "<|user|>red?<eos>\n<|assistant|>river<eos>\n<|user|>old?<eos>\n<|assistant|>"
SHAREGPT = [{"from": {"user": "human"}.get(m["role"], "gpt"), "value": m["content"]} for m in CHAT]
GENERATION = CHAT_TEMPLATE.replace(
    "{{ '<|' + m['role'] + '|>' + m['content'] + eos_token + '\n' }}", ""
).replace(
    "{% for m in messages %}",
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}"
    "{%- generation -%}{{ m['content'] + eos_token }}{%- endgeneration -%}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{{ '\n' }}",
)
# an earlier answer loses what stands before "/", as reasoning models lose their thoughts
FORGETS = CHAT_TEMPLATE.replace(
    "m['content']", "(m['content'] if loop.last else m['content'].split('/')[-1])"
)
THINKING = [CHAT[0], {"role": "assistant", "content": "well/river"}, CHAT[2], CHAT[3]]
# what ends the text is no part of a turn
END_AT_END = CHAT_TEMPLATE.replace(" + eos_token", "").replace(
    "{% endif %}", "{% else %}{{ eos_token }}{% endif %}"
)


ROWS = {  # name: (rows, flags, (prompt, trained stretches))
    "strings": ([{"input": "a red", "output": " river"}], {}, ("a red", [" river<eos>"])),
    "template": (
        [{"input": "red", "output": "river"}],
        {"input_template": "User: {}\\nAssistant:"},
        ("User: red\nAssistant:", ["river<eos>"]),
    ),
    "a token across the border is the response's": (
        [{"input": "red", "output": "river"}],
        {"input_template": "Q {} A "},
        ("Q red A", [" river<eos>"]),
    ),
    "template keeps braces of the prompt": (
        [{"input": "{x} {}", "output": "river"}],
        {"input_template": "Q {} A:"},
        ("Q {x} {} A:", ["river<eos>"]),
    ),
    "key flags": (
        [{"q": "a", "a": "b", "input": "no"}],
        {"input_key": "q", "output_key": "a"},
        ("a", ["b<eos>"]),
    ),
    "messages": ([{"messages": CHAT}], {}, (PROMPT, ["walls<eos>"])),
    "multiturn": (
        [{"messages": CHAT}],
        {"multiturn": True},
        ("<|user|>red?<eos>\n<|assistant|>", ["river<eos>", "walls<eos>"]),
    ),
    "from/value": ([{"conversations": SHAREGPT}], {}, (PROMPT, ["walls<eos>"])),
    "a turn behind the last answer": (
        [{"messages": CHAT + [{"role": "user", "content": "more?"}]}],
        {},
        (PROMPT, ["walls<eos>"]),
    ),
    "system": (
        [{"messages": [{"role": "system", "content": "be old"}, *CHAT[:2]]}],
        {},
        ("<|system|>be old<eos>\n<|user|>red?<eos>\n<|assistant|>", ["river<eos>"]),
    ),
    "strings in the chat template": (
        [{"input": "red?", "output": "river"}],
        {"apply_chat_template": True},
        ("<|user|>red?<eos>\n<|assistant|>", ["river<eos>"]),
    ),
    "prompt and completion as messages": (
        [{"prompt": CHAT[:3], "completion": CHAT[3:]}],
        {},
        (PROMPT, ["walls<eos>"]),
    ),
    "prompt and completion as text": (
        [{"prompt": "red", "completion": " old"}],
        {},
        ("red", [" old<eos>"]),
    ),
    "alpaca": (
        [{"instruction": "say", "input": "red", "output": " old"}],
        {},
        ("say\n\nred", [" old<eos>"]),
    ),
    "alpaca without input": (
        [{"instruction": "say", "input": "", "output": " old"}],
        {},
        ("say", [" old<eos>"]),
    ),
    "question and answer": ([{"question": "red?", "answer": " old"}], {}, ("red?", [" old<eos>"])),
    "text": ([{"text": "the red river"}], {}, ("the", [" red river<eos>"])),
    "pretrain_mode": (
        [{"body": "the red river", "input": "x"}],
        {"pretrain_mode": True, "input_key": "body"},
        ("the", [" red river<eos>"]),
    ),
    "marks, last turn": (
        [{"messages": CHAT}],
        {"tokenizer_chat_template": GENERATION},
        (PROMPT, ["walls<eos>"]),
    ),
    "marks, every turn": (
        [{"messages": CHAT}],
        {"tokenizer_chat_template": GENERATION, "multiturn": True},
        ("<|user|>red?<eos>\n<|assistant|>", ["river<eos>", "walls<eos>"]),
    ),
    "history rewritten, last turn": (
        [{"messages": THINKING}],
        {"tokenizer_chat_template": FORGETS},
        (PROMPT, ["walls<eos>"]),
    ),
    "EOS at the very end": (
        [{"messages": CHAT}],
        {"tokenizer_chat_template": END_AT_END, "multiturn": True},
        ("<|user|>red?\n<|assistant|>", ["river\n", "walls\n<eos>"]),
    ),
    "generated, complete": (
        [{"input": "<|user|>red?<eos>\n<|assistant|>", "output": "old", "finish_reason": "stop"}],
        {"apply_chat_template": True},
        ("<|user|>red?<eos>\n<|assistant|>", ["old<eos>"]),
    ),
    "generated, cut": (
        [{"input": "Q: red?", "output": " old", "finish_reason": "length", "id": 0, "sample": 0}],
        {"input_template": "User: {}"},
        ("Q: red?", [" old"]),
    ),
    "generated from messages": (
        [{"messages": CHAT[:3], "input": PROMPT, "output": "old", "finish_reason": "stop"}],
        {},
        (PROMPT, ["old<eos>"]),
    ),
    "cut by max_len": ([{"input": "red", "output": " old" * 20}], {"max_len": 10}, ("red", [" old" * 9])),
    "EOS in the text": ([{"input": "red", "output": " old<eos>"}], {}, ("red", [" old<eos>"])),
    "nothing behind EOS is trained": (
        [{"input": "red", "output": " old<eos>\n the river"}],
        {},
        ("red", [" old<eos>"]),
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows(name, trees_of):
    rows, flags, expected = ROWS[name]
    assert trees_of(rows, **flags) == [expected]


def test_prompt_ids_are_those_of_generation(trees_of, tokenizer):
    trees_of([{"messages": CHAT}])
    prompt = tokenizer.apply_chat_template(CHAT[:3], add_generation_prompt=True)["input_ids"]
    assert trees_of.trees[0]["prompt"].tolist() == prompt
    answer = tokenizer("walls")["input_ids"] + [tokenizer.eos_token_id]
    assert trees_of.trees[0]["responses"][0].tolist() == answer  # nothing of the template behind EOS


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory):
    """A model whose tokenizer puts BOS in front and EOS behind, and whose chat template writes BOS itself."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(chat_template="{{ '<bos>' }}" + CHAT_TEMPLATE)
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<bos>", "<eos>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=ids
    )
    tokenizer.bos_token = "<bos>"
    folder = make_model(tmp_path_factory.mktemp("bos") / "bos", tokenizer)
    assert AutoTokenizer.from_pretrained(folder).encode("red")[0] == ids[0][1]
    return folder


@pytest.mark.parametrize(
    "row, flags, expected",
    [
        ({"input": "red", "output": " old"}, {}, ("<bos>red", [" old<eos>"])),
        ({"input": "<bos>red", "output": " old"}, {}, ("<bos>red", [" old<eos>"])),
        ({"messages": CHAT[:2]}, {}, ("<bos><|user|>red?<eos>\n<|assistant|>", ["river<eos>"])),
        ({"text": "red old"}, {}, ("<bos>", ["red old<eos>"])),
        ({"input": "<bos>red", "output": " old", "finish_reason": "length"}, {}, ("<bos>red", [" old"])),
        ({"input": "red", "output": " old" * 20}, {"max_len": 10}, ("<bos>red", [" old" * 8])),
    ],
)
def test_bos_and_eos_once(row, flags, expected, trees_of, with_bos):
    assert trees_of([row], pretrain=with_bos, **flags) == [expected]


def test_stop_tokens_of_the_generation_config(tokenizer, tmp_path, trees_of):
    """A turn that ends in another stop token than EOS gets no EOS behind it."""
    folder = make_model(tmp_path / "stops", tokenizer)
    stop = tokenizer.convert_tokens_to_ids("<|system|>")
    (tmp_path / "stops/generation_config.json").write_text(
        json.dumps({"eos_token_id": [tokenizer.eos_token_id, stop]})
    )
    rows = [{"input": "red", "output": " old<|system|>\n"}, {"input": "red", "output": " old"}]
    assert trees_of(rows, pretrain=folder) == [("red", [" old<|system|>"]), ("red", [" old<eos>"])]


def test_stop_tokens_of_the_config(tokenizer, tmp_path):
    """Without generation_config.json what config.json says, as for Hugging Face and vLLM."""
    model = make_model(tmp_path / "model", tokenizer, eos_token_id=4)
    (tmp_path / "model/generation_config.json").unlink()
    assert sft.load_tokenizer(model, sft.Args(pretrain=model))[1] == {1, 4}


def test_of_several_chat_templates_the_default_counts(tiny, tokenizer, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(folder)
    assert sft.load_tokenizer(str(folder), sft.Args(pretrain=str(folder)))[0].chat_template == CHAT_TEMPLATE


def test_identity_has_weights_of_any_format_and_the_text_of_a_template(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    prints = []
    for name in ("pytorch_model.bin", "model-00001-of-00002.safetensors", "tokenizer.model"):
        for content in ("a", "b"):
            (tmp_path / name).write_text(content)
            prints.append(sft.fingerprint(str(tmp_path)))
    assert len(set(prints)) == 6
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/a.jsonl").write_text("{}")
    assert len({sft.fingerprint(f"{tmp_path}/rows{subset}") for subset in ("", "@a", "@b")}) == 3


def test_another_text_in_the_template_file_is_another_run(tiny, tmp_path, capsys):
    template, rows = tmp_path / "t.jinja", [{"input": "a", "output": "b"}] * 3
    flags = {"pretrain": tiny, "dataset": write_rows(tmp_path / "rows.jsonl", rows), "apply_chat_template": True}
    flags |= {"tokenizer_chat_template": str(template), "save_path": str(tmp_path / "out"), "max_steps": 1}
    template.write_text(CHAT_TEMPLATE)
    assert run(**flags) == 0
    template.write_text(CHAT_TEMPLATE.replace("<|", "<||"))
    assert run(**flags) == 2 and "tokenizer_chat_template was" in capsys.readouterr().err


def test_rows_name_their_split(tmp_path):
    import datasets

    parts = {name: datasets.Dataset.from_list([{"input": name, "output": "y"}]) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "D"))
    found = [sft.read_table(str(tmp_path / "D"), split)[0][0] for split in parts]
    assert found == [f"{tmp_path}/D:train[0]", f"{tmp_path}/D:test[0]"]


def test_dataset_probs(tiny, tmp_path, trees_of, monkeypatch):
    """Shares of an epoch that has as many rows as the datasets together."""
    names = [
        write_rows(tmp_path / f"{x}.jsonl", [{"input": x, "output": str(i)} for i in range(4)]) for x in "ab"
    ]
    for probs, expected in (("0.75,0.25", "aaaaaabb"), (None, "aaaabbbb")):
        rows = sft.load_rows(",".join(names), probs, "train", 100)
        assert "".join(row["input"] for _, row in rows) == expected
    assert [row["output"] for _, row in sft.load_rows(",".join(names), None, "train", 2)] == ["0", "1"] * 2


# --- saving


@pytest.mark.parametrize(
    "flags", [{}, {"zero_stage": 3}, {"lora_rank": 4}, {"lora_rank": 4, "zero_stage": 3}], ids=str
)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_saved_model_is_the_trained_one(flags, tied, tokenizer, rows_file, tmp_path, monkeypatch):
    """Same log-probs as the engine had; LoRA merged as PEFT does it; the files of a Hugging Face folder."""
    pretrain = make_model(tmp_path / "start", tokenizer, tie_word_embeddings=tied)
    out, before, save_model = tmp_path / "out", SimpleNamespace(), sft.save_model
    pack = sft.pack_trees([tree(range(30), range(30, 60))], "cpu")

    def spy(engine, *rest):
        engine.eval()
        with torch.no_grad():
            before.logps = engine(pack)
        if flags == {"lora_rank": 4}:
            before.merged = copy.deepcopy(engine.module.model).merge_and_unload().state_dict()
        save_model(engine, *rest)

    monkeypatch.setattr(sft, "save_model", spy)
    assert run(pretrain=pretrain, dataset=rows_file, save_path=str(out), **flags) == 0
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    logps = model(input_ids=pack["input_ids"]).logits[0, 29:59].log_softmax(-1)
    assert torch.allclose(logps.gather(1, pack["targets"][:, None])[:, 0], before.logps, rtol=0, atol=1e-5)
    start = AutoModelForCausalLM.from_pretrained(pretrain, dtype="auto").state_dict()
    assert model.dtype == torch.float32 and model.state_dict().keys() == start.keys()
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(model.state_dict()[name], start[name])
    if flags == {"lora_rank": 4}:
        for name, value in before.merged.items():
            assert torch.allclose(model.state_dict()[name], value, rtol=0, atol=1e-6), name
    manifest = json.loads((out / "manifest.json").read_text())
    files = {p.name for p in out.iterdir()}
    assert {*manifest["files"], "manifest.json"} == files and not list(tmp_path.glob("*.partial"))
    assert files >= {"config.json", "generation_config.json", "tokenizer.json", "args.json", "metrics.jsonl"}
    assert AutoTokenizer.from_pretrained(out).chat_template == CHAT_TEMPLATE
    assert json.loads((out / "args.json").read_text())["learning_rate"] == 1e-3


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_gpt2_and_sampling_settings_are_saved(lora_rank, tokenizer, rows_file, tmp_path, monkeypatch):
    """GPT-2's layers hold their weights transposed; a temperature without do_sample is refused by save_pretrained."""
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 128, "vocab_size": 512, "bos_token_id": 1, "eos_token_id": 1}
    model = GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.1))
    model.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    (tmp_path / "gpt2/generation_config.json").write_text('{"eos_token_id": 1, "temperature": 0.9, "top_p": 0.6}')
    flags = {"pretrain": str(tmp_path / "gpt2"), "dataset": rows_file, "save_path": str(tmp_path / "out"), "max_steps": 3}
    flags |= {"lora_rank": lora_rank, "learning_rate": 0.05, "eval_dataset": rows_file, "eval_steps": 3, "max_norm": 0}
    assert run(**flags) == 0
    steps = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    before, held_out = steps[0]["eval/loss"], steps[-1]["eval/loss"]
    again = flags | {"pretrain": str(tmp_path / "out"), "save_path": str(tmp_path / "again"), "learning_rate": 0, "lora_rank": 0}
    assert run(**again) == 0
    steps = [json.loads(line) for line in (tmp_path / "again/metrics.jsonl").read_text().splitlines()]
    assert steps[0]["eval/loss"] == pytest.approx(held_out, abs=1e-4) and before - held_out > 0.1


def test_no_dropout_is_left(tmp_path):
    """OPT and others call F.dropout with a number of their own."""
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 90}
    config = OPTConfig(**sizes, word_embed_proj_dim=32, max_position_embeddings=64, dropout=0.5, layerdrop=0.5)
    OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    model = sft.load_model(str(tmp_path / "opt"), sft.Args(pretrain=str(tmp_path / "opt"), bf16=False)).train()
    pack = sft.pack_trees([tree([5, 6], [7, 8, 9])], "cpu")
    with torch.no_grad():
        assert len({sft.LogProbs(model)(pack).sum().item() for _ in range(5)}) == 1


def test_rerun_and_other_flags(tiny, rows_file, tmp_path, capsys):
    """The same command again does nothing; another command never touches what is there."""
    flags = {
        "pretrain": tiny,
        "dataset": rows_file,
        "save_path": str(tmp_path / "out"),
        "train_batch_size": 49,
    }
    assert run(**flags) == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    assert run(**flags, logging_steps=5) == 0  # decides nothing
    assert "done" in capsys.readouterr().out
    assert run(**{**flags, "train_batch_size": 48}) == 2
    message = capsys.readouterr().err
    assert "train_batch_size was 49, now 48" in message and message.count("\n") == 1
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert not list(tmp_path.glob("*.partial"))


def test_in_place(tokenizer, rows_file, tmp_path, capsys):
    """save_path is pretrain itself: each new round of rows trains on, the same command twice trains once."""
    model = make_model(tmp_path / "model", tokenizer)
    flags = {"pretrain": model, "save_path": model, "train_batch_size": 49}
    weights = [weights_of(model)]
    for seed in (1, 2):
        rows = write_rows(tmp_path / "rows.jsonl", make_rows(10, seed))
        assert run(dataset=rows, **flags) == 0
        weights.append(weights_of(model))
    assert len(set(weights)) == 3
    assert run(dataset=rows, **flags) == 0 and "done" in capsys.readouterr().out
    assert weights_of(model) == weights[-1]
    out = str(tmp_path / "out")  # made from another model, then trained on the same rows a second time
    assert run(dataset=rows, **{**flags, "save_path": out}) == 0
    once = weights_of(out)
    assert run(dataset=rows, **{**flags, "save_path": out, "pretrain": out}) == 0 and weights_of(out) != once


def die_after(n_moves, monkeypatch):
    """From now on, os.replace works n_moves times; then the process is as good as dead. None: no limit."""
    replace = die_after.real = getattr(die_after, "real", os.replace)
    left = itertools.count(n_moves or 0, -1)

    def dying(source, target):
        if n_moves is not None and next(left) <= 0:
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", dying)


def test_publish_survives_a_kill_at_every_move(tmp_path, monkeypatch):
    names = ["config.json", "model.safetensors", "tokenizer.json"]
    for n_moves in range(len(names) + 1):  # the manifest comes last
        target, partial = tmp_path / f"{n_moves}", tmp_path / f"{n_moves}.partial"
        for folder, version in ((target, "old"), (partial, "new")):
            folder.mkdir()
            for name in names:
                (folder / name).write_text(f"{version} {name}")
            sft.seal(folder, {"version": version})
        (target / "model-00001-of-00002.safetensors").write_text("old shard")
        die_after(n_moves, monkeypatch)
        with pytest.raises(Killed):
            sft.publish(partial, target)
        assert sft.intact(target) is None  # neither the old nor the new model
        die_after(None, monkeypatch)
        sft.publish(partial, target)
        assert sft.intact(target) == {"version": "new"} and not partial.exists()
        assert sorted(p.name for p in target.iterdir()) == sorted([*names, "manifest.json"])
        assert (target / "model.safetensors").read_text() == "new model.safetensors"


@pytest.mark.parametrize("in_place", [False, True])
def test_killed_while_it_moves_into_place(in_place, tokenizer, rows_file, tmp_path, monkeypatch, capsys):
    """The next start completes the move and trains nothing."""
    model = make_model(tmp_path / "start", tokenizer)
    flags = {"pretrain": model, "dataset": rows_file, "train_batch_size": 49}
    assert run(**flags, save_path=str(tmp_path / "whole")) == 0
    expected, publish = weights_of(tmp_path / "whole"), sft.publish
    flags["save_path"] = model if in_place else str(tmp_path / "out")

    def dying_publish(*args):
        die_after(4, monkeypatch)
        publish(*args)

    monkeypatch.setattr(sft, "publish", dying_publish)
    assert run(**flags) == "killed"
    die_after(None, monkeypatch)
    monkeypatch.setattr(sft, "publish", publish)
    capsys.readouterr()
    assert run(**flags) == 0
    out = capsys.readouterr().out
    assert "done" in out and "step " not in out
    assert weights_of(flags["save_path"]) == expected and not list(tmp_path.glob("*.partial"))


def test_two_runs_never_write_to_one_folder(tiny, rows_file, tmp_path, capsys):
    flags = {"pretrain": tiny, "dataset": rows_file, "save_path": str(tmp_path / "out")}
    args = sft.Args(**{**SETTINGS, **flags}, ckpt_path=str(tmp_path / "out.ckpt"))
    step, lock = sft.open_run(args, {})
    assert step == 0 and run(**flags) == 2
    assert "another process is writing there" in capsys.readouterr().err
    lock.close()
    assert run(**flags) == 0


# --- resuming


def test_one_run_at_a_time_in_a_ckpt_path(tiny, rows_file, tmp_path, capsys):
    folder = tmp_path / "ck"
    folder.mkdir()
    flags = {"pretrain": tiny, "dataset": rows_file, "save_path": str(tmp_path / "out"), "ckpt_path": str(folder)}
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(**flags) == 2 and f"--ckpt_path {folder}: another process" in capsys.readouterr().err
    assert run(**flags) == 0


def kill_at(step, monkeypatch):
    """From now on, a run dies at the end of that step, when its metrics are logged; None: no more."""
    console_line = kill_at.real = getattr(kill_at, "real", sft.console_line)

    def dying(at, *rest):
        if at == step:
            raise Killed
        return console_line(at, *rest)

    monkeypatch.setattr(sft, "console_line", dying)


RESUME = {"train_batch_size": 17, "save_steps": 1, "lr_scheduler": "cosine", "max_epochs": 2}  # 6 steps


@pytest.mark.parametrize(
    "flags",
    [
        {"zero_stage": 0},
        {"zero_stage": 2, "lora_rank": 4, "lora_dropout": 0.2},
        {"zero_stage": 3, "bf16": True, "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_resumed_is_bit_identical(flags, tiny, rows_file, tmp_path, monkeypatch, capsys):
    flags = {"pretrain": tiny, "dataset": rows_file, **RESUME, **flags, "save_steps": 2}
    assert run(save_path=str(tmp_path / "whole"), **{**flags, "save_steps": -1}) == 0
    for step in (3, 5):
        kill_at(step, monkeypatch)
        assert run(save_path=str(tmp_path / "out"), **flags) == "killed"
        set_seed(step)  # of another process
    kill_at(None, monkeypatch)
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    assert run(save_path=str(tmp_path / "out"), **flags) == 0
    assert "resume" in capsys.readouterr().out
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")
    for name in ("step", "loss", "grad_norm", "lr"):
        assert metrics_of(tmp_path / "out")[name] == metrics_of(tmp_path / "whole")[name]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]  # no checkpoint is left


def test_checkpoints_damaged_or_of_another_run(tiny, rows_file, tmp_path, monkeypatch, capsys):
    flags = {"pretrain": tiny, "dataset": rows_file, **RESUME}
    assert run(save_path=str(tmp_path / "whole"), **flags) == 0
    flags["save_path"] = str(tmp_path / "out")
    kill_at(6, monkeypatch)
    assert run(**flags) == "killed"
    checkpoints = tmp_path / "out.ckpt"
    assert {p.name for p in checkpoints.glob("step_*")} == {"step_3", "step_4", "step_5"}  # max_ckpt_num
    capsys.readouterr()
    assert run(**{**flags, "learning_rate": 2e-3}) == 2
    message = capsys.readouterr().err
    assert "learning_rate was 0.001, now 0.002" in message and message.count("\n") == 1
    largest = max((checkpoints / "step_5").rglob("*.pt"), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1  # one flipped bit
    largest.write_bytes(data)
    next((checkpoints / "step_4").rglob("*.pt")).unlink()
    kill_at(None, monkeypatch)
    assert run(**flags) == 0
    out = capsys.readouterr().out
    assert "step_5 is damaged" in out and "step_4 is damaged" in out
    assert f"resume {checkpoints / 'step_3'}" in out
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")


def test_a_damaged_newer_checkpoint_does_not_cost_the_new_one(tiny, rows_file, tmp_path, monkeypatch):
    """With --max_ckpt_num 1: the damaged one is removed, not the one just written."""
    flags = {"pretrain": tiny, "dataset": rows_file, "save_path": str(tmp_path / "out"), "save_steps": 1}
    flags |= {"max_ckpt_num": 1, "train_batch_size": 10}
    kill_at(3, monkeypatch)
    assert run(**flags) == "killed"
    (step_2,) = (tmp_path / "out.ckpt").glob("step_*")
    (step_2 / "manifest.json").write_text("{}")
    kill_at(2, monkeypatch)
    assert run(**flags) == "killed"
    assert [p.name for p in (tmp_path / "out.ckpt").glob("step_*")] == ["step_1"]


def kill_tree(process):
    """SIGKILL to a process and all below it, at once."""
    everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in everyone:
        one.send_signal(signal.SIGKILL)
    psutil.wait_procs(everyone)


def test_sigkill_of_two_ranks(tiny, rows_file, two_ranks, tmp_path, unused_port):
    """Killed at a random time behind the first checkpoint; the deepspeed launcher goes on to the same end."""
    flags = {"pretrain": tiny, "dataset": rows_file, "save_path": tmp_path / "out", "save_steps": 1}
    words = [str(REPO / "sft.py"), *command_flags(**flags, zero_stage=3, max_epochs=4, train_batch_size=16)]
    process = subprocess.Popen(torchrun(*words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 300
    while not (tmp_path / "out.ckpt/step_1").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)
    pause = random.Random().uniform(0, 1.5)
    time.sleep(pause)
    kill_tree(process)
    left = sorted(p.name for p in tmp_path.rglob("*") if p.is_dir())
    command = ["deepspeed", "--num_gpus", "2", "--master_port", unused_port, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (pause, left, done.stdout[-2000:], done.stderr[-2000:])
    assert "resume" in done.stdout or "done" in done.stdout
    assert weights_of(tmp_path / "out") == weights_of(two_ranks / "four_epochs"), (pause, left)
    assert metrics_of(tmp_path / "out")["loss"] == metrics_of(two_ranks / "four_epochs")["loss"]


def signal_after(step, monkeypatch):
    """At the end of that step the run gets SIGTERM, as from a scheduler that needs the machine; None: never."""
    console_line = signal_after.real = getattr(signal_after, "real", sft.console_line)

    def line(at, *rest):
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return console_line(at, *rest)

    monkeypatch.setattr(sft, "console_line", line)


def test_a_signal_saves_and_ends(tiny, rows_file, tmp_path, monkeypatch, capsys):
    """Without --save_steps: a checkpoint of that very step, exit code 75; the same command ends as if undisturbed."""
    flags = {"pretrain": tiny, "dataset": rows_file, **RESUME, "save_steps": -1}
    assert run(save_path=str(tmp_path / "whole"), **flags) == 0
    flags["save_path"] = str(tmp_path / "out")
    signal_after(3, monkeypatch)
    assert run(**flags) == sft.STOPPED == 75
    assert "stopped by a signal after step 3" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "out.ckpt").glob("step*")] == ["step_3"]
    assert not (tmp_path / "out").exists()
    signal_after(None, monkeypatch)
    assert run(**flags) == 0
    assert f"resume {tmp_path / 'out.ckpt/step_3'}" in capsys.readouterr().out
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")
    assert metrics_of(tmp_path / "out")["step"] == [1, 2, 3, 4, 5, 6]


def test_dry_run_saves_nothing(tiny, rows_file, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    flags = {"pretrain": tiny, "dataset": rows_file, "save_path": str(tmp_path / "out"), "eval_dataset": rows_file}
    assert run(**flags, dry_run=True) == 0
    assert "dry run: step     1/" in capsys.readouterr().out and sorted(tmp_path.rglob("*")) == before


def test_the_longest_example_is_in_the_first_step(tiny, rows_file, tmp_path, monkeypatch):
    lengths = []
    monkeypatch.setattr(sft, "pack_trees", lambda trees, device, real=sft.pack_trees: lengths.append(
        max(map(sft.tree_length, trees))) or real(trees, device))  # fmt: skip
    assert run(pretrain=tiny, dataset=rows_file, save_path=str(tmp_path / "out"), train_batch_size=4) == 0
    assert lengths[1] == max(lengths[1:])  # the first pack is the check of the attention


def test_numbers_that_are_not_finite_stop(tiny, rows_file, tmp_path, monkeypatch, capsys):
    """Nothing of the run is saved; the rows of the step lie in a file."""
    real, steps = sft.sft_loss, []
    monkeypatch.setattr(sft, "sft_loss", lambda *x: real(*x) * (math.nan if len(steps) > 3 else steps.append(1) or 1.0))
    assert run(pretrain=tiny, dataset=rows_file, save_path=str(tmp_path / "out"), train_batch_size=7) == 2
    error = capsys.readouterr().err
    assert "step 5: not finite: {'loss': nan" in error, error
    (path,) = tmp_path.glob("out.step_*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 7 and rows[0]["row"] in error and {"row", "input", "output"} <= set(rows[0])
    assert not (tmp_path / "out").exists()


def test_every_damaged_file_of_a_checkpoint_is_recognised(tiny, rows_file, tmp_path, monkeypatch, capsys):
    flags = {"pretrain": tiny, "dataset": rows_file, **RESUME, "save_path": str(tmp_path / "out")}
    kill_at(3, monkeypatch)
    assert run(**flags) == "killed"
    kill_at(None, monkeypatch)
    newest, before = tmp_path / "out.ckpt/step_2", tmp_path / "out.ckpt/step_1"
    args = sft.Args(**{**flags, "ckpt_path": str(tmp_path / "out.ckpt")})
    identity, files = sft.intact(newest), [p for p in newest.rglob("*") if p.is_file()]
    assert identity and sft.intact(before) == identity and len(files) >= 3

    def resumes_at():
        step, lock = sft.open_run(args, identity)
        lock.close()
        return step

    assert resumes_at() == 2
    for path in files:
        data = path.read_bytes()
        for damaged in (data[: len(data) // 2], data[:-1], bytes([data[0] ^ 1]) + data[1:], b""):
            path.write_bytes(damaged)
            assert resumes_at() == 1, path
        path.write_bytes(data)
    assert resumes_at() == 2


def test_full_disk(tiny, rows_file, tmp_path):
    """On a disk of 1 MiB: one line, and the same command goes on once there is room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        flags = {"pretrain": tiny, "dataset": rows_file, "save_path": disk / "out", "save_steps": 1}
        command = [sys.executable, str(REPO / "sft.py"), *command_flags(**flags)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        lines = done.stderr.splitlines()
        assert done.returncode == 2 and lines[-1].startswith("error: no space left"), done.stderr[-2000:]
        assert "Traceback" not in done.stderr and not (disk / "out").exists()
        subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and (disk / "out/manifest.json").exists(), done.stderr[-2000:]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_missing_peft_is_named(tiny, rows_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert run(pretrain=tiny, dataset=rows_file, save_path=str(tmp_path / "out"), lora_rank=2) == 2
    assert "pip install peft" in capsys.readouterr().err


@pytest.fixture
def unused_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def test_python_without_launcher(tiny, rows_file, tmp_path):
    """python sft.py, as the README has it; the toy's evaluation and the console on the way."""
    flags = {"pretrain": tiny, "dataset": rows_file, "save_path": tmp_path / "out", "eval_dataset": rows_file}
    command = [sys.executable, str(REPO / "sft.py"), *command_flags(**flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert [
        line.split()[0] for line in lines if not line.startswith("step")
    ] == "data data sft batch memory sample saved".split()
    assert all(len(line) < 120 for line in lines if not line.startswith("sample"))
    logged = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == [0, 1, 2, 3]
    assert set(logged[0]) == {"step", "eval/loss"}  # before the first step
    assert logged[0]["eval/loss"] > logged[3]["eval/loss"]


# --- bad input: one line, exit code 2, nothing half-written


def test_unknown_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        tyro.cli(sft.Args, args=["--pretrain", "x", "--dataset", "y", "--learning_rat", "1"])
    assert stop.value.code == 2 and "--learning-rate" in capsys.readouterr().err.replace("_", "-")


GOOD = '{"input": "red", "output": "old"}\n'
BAD_INPUT = {
    "missing column": (
        {"input_key": "prompt"},
        GOOD,
        ["rows.jsonl:1", "'prompt'", "input, output", "--input_key"],
    ),
    "unknown columns": (
        {},
        '{"a": "x", "b": "y"}\n',
        ["rows.jsonl:1", "a, b", "--input_key", "--output_key"],
    ),
    "empty file": ({}, "", ["rows.jsonl", "no rows"]),
    "broken JSON": ({}, GOOD + '{"input": oops}\n' + GOOD, ["rows.jsonl:2", "column 11"]),
    "broken JSON list": ({"dataset": "rows.json"}, '[{"input": "a"},\n{"input" 1}]', ["rows.json:2"]),
    "row is no object": ({}, GOOD + "[1, 2]\n", ["rows.jsonl:2", "list"]),
    "missing file": ({"dataset": "none.jsonl"}, GOOD, ["none.jsonl", "No such file"]),
    "missing csv": ({"dataset": "none.csv"}, GOOD, ["none.csv"]),
    "no usable row": (
        {},
        '{"input": "red", "output": " "}\n' * 3,
        ["3 rows", "3 empty response", "rows.jsonl:1"],
    ),
    "prompts too long": (
        {"max_len": 4},
        GOOD * 9 + GOOD.replace("red", "red " * 9),
        ["prompt >= max_len", "jsonl:10"],
    ),
    "null": ({}, GOOD + '{"input": null, "output": "x"}\n', ["1 dropped", "not text", "rows.jsonl:2"]),
    "not UTF-8": ({}, b'{"input": "caf\xe9", "output": "x"}\n', ["rows.jsonl:1", "not UTF-8"]),
    "no chat template": ({"pretrain": "plain"}, json.dumps({"messages": CHAT}) + "\n", ["chat"]),
    "no assistant turn": ({}, json.dumps({"messages": CHAT[:1]}) + "\n", ["no assistant turn"]),
    "assistant begins": ({}, json.dumps({"messages": CHAT[1:2]}) + "\n", ["no assistant turn"]),
    "messages of numbers": ({}, '{"messages": [1, 2]}\n', ["messages without role and text"]),
    "answers rewritten": (
        {"multiturn": True, "tokenizer_chat_template": FORGETS},
        json.dumps({"messages": THINKING}) + "\n",
        ["rewrites earlier turns"],
    ),
    "prompt rewritten": (
        {
            "tokenizer_chat_template": CHAT_TEMPLATE.replace(
                "m['content']", "m['content'][: messages | length]"
            )
        },
        json.dumps({"messages": CHAT}) + "\n",
        ["rewrites earlier turns"],
    ),
    "no model": ({"pretrain": "/none/at/all"}, GOOD, ["/none/at/all"]),
    "no model, hub name": ({"pretrain": "none/at-all"}, GOOD, ["none/at-all"]),
    "no weights": ({"pretrain": "empty"}, GOOD, ["empty"]),
    "zero_stage": ({"zero_stage": 7}, GOOD, ["--zero_stage", "0 to 3", "7"]),
    "batch size": ({"micro_train_batch_size": 0}, GOOD, ["--micro_train_batch_size", "0"]),
    "no dataset": ({"dataset": ""}, GOOD, ["--dataset"]),
    "probs are words": (
        {"dataset": "rows.jsonl,rows.jsonl", "dataset_probs": "x,y"},
        GOOD,
        ["--dataset_probs", "x,y"],
    ),
    "probs are few": (
        {"dataset": "rows.jsonl,rows.jsonl", "dataset_probs": "1"},
        GOOD,
        ["--dataset_probs", "2"],
    ),
    "folder of another run": ({"save_path": "other"}, GOOD, ["other", "another"]),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(name, tiny, tmp_path, monkeypatch, capfd):
    flags, content, needles = BAD_INPUT[name]
    flags = {"pretrain": tiny, "dataset": "rows.jsonl", "save_path": "out", **flags}
    monkeypatch.chdir(tmp_path)
    for path in ("rows.jsonl", "rows.json"):
        Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())
    for folder in ("plain", "other", "empty"):
        shutil.copytree(tiny, folder)
    Path("plain/chat_template.jinja").unlink()
    Path("empty/model.safetensors").unlink()
    before = sorted(tmp_path.rglob("*"))
    capfd.readouterr()
    assert run(**flags) == 2
    shutil.rmtree("out.partial", ignore_errors=name != "no weights")  # found when the run's lock is taken
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert not [needle for needle in needles if needle not in lines[0]], lines
    assert sorted(tmp_path.rglob("*")) == before


def test_few_bad_rows_are_counted(tiny, tmp_path, capsys):
    """Up to --max_drop_ratio of the rows may be unusable: counted on the console, listed in dropped.jsonl."""
    rows = [*make_rows(46), {"input": "red " * 200, "output": "old"}, {"input": "red", "output": ""}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with open(path, "a") as f:
        f.write('{"input": "the writer was killed he')
    flags = {"pretrain": tiny, "dataset": path, "save_path": str(tmp_path / "out"), "train_batch_size": 46}
    assert run(**flags) == 0
    out = capsys.readouterr().out
    assert f"{path}:49: the last line is cut off" in out
    assert "46 rows kept, 2 dropped (1 prompt >= max_len, 1 empty response)" in out
    dropped = [json.loads(line) for line in (tmp_path / "out/dropped.jsonl").read_text().splitlines()]
    assert dropped == [
        {"row": f"{path}:47", "reason": "prompt >= max_len"},
        {"row": f"{path}:48", "reason": "empty response"},
    ]
    assert run(**flags | {"save_path": str(tmp_path / "strict"), "max_drop_ratio": 0.01}) == 2


@pytest.mark.parametrize("word", ["--param_dtype", "--attn-implementation=sdpa"])
def test_later_flags_of_openrlhf_are_explained(word, capsys):
    with pytest.raises(SystemExit, match="2"):
        sft.explain_flags(["--pretrain", "x", word, "bf16"])
    name = word.partition("=")[0].replace("-", "_").lstrip("_")
    assert capsys.readouterr().err == f"error: --{name}: {sft.LATER_FLAGS[name]}\n"
    assert sft.explain_flags(["--pretrain", "param_dtype"]) == ["--pretrain", "param_dtype"]


def test_max_steps_ends_the_schedule_too(tiny, rows_file, tmp_path):
    flags = {"pretrain": tiny, "dataset": rows_file, "lr_scheduler": "linear", "train_batch_size": 7}
    assert run(**flags, save_path=str(tmp_path / "out"), max_steps=4) == 0
    assert metrics_of(tmp_path / "out")["lr"] == pytest.approx([1e-3 * x for x in (1, 0.75, 0.5, 0.25)])

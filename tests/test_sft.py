"""sft.py against plain torch and Hugging Face's own loss, values computed by hand, and itself killed and resumed.

What the four trainers share byte for byte is tested here, once. SFT=my_sft.py python -m pytest tests/test_sft.py
tests a copy.
"""

import copy
import dataclasses
import gc
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from conftest import CHAT_TEMPLATE, make_model, make_rows, make_tokenizer, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from launch import load_script
from transformers import AutoModelForCausalLM, AutoTokenizer

sft = load_script("sft")
REPO = Path(__file__).resolve().parents[1]
SETTINGS = {"bf16": False, "train_batch_size": 24, "learning_rate": 1e-3, "lr_scheduler": "constant"}
SETTINGS |= {"lr_warmup_ratio": 0.0, "max_len": 100}
SPLITS = {
    "micro8": {},
    "micro1": {"micro_train_batch_size": 1},
    "packing": {"micro_train_batch_size": 3, "packing_samples": True},
    "zero0": {"zero_stage": 0},
    "zero1": {"zero_stage": 1},
    "zero3": {"zero_stage": 3},
    "checkpointing": {"gradient_checkpointing": True},
    "zero3-checkpointing": {"zero_stage": 3, "gradient_checkpointing": True, "micro_train_batch_size": 2},
    "offload": {"adam_offload": True},
    "zero3-offload": {"zero_stage": 3, "adam_offload": True},
}


class Killed(BaseException):
    """Stands for SIGKILL in tests that run in one process."""


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
    """Encoded rows, and what the datasets library keeps, go to a folder of these tests."""
    SETTINGS["cache_dir"] = str(tmp_path_factory.mktemp("cache"))
    with mock.patch("datasets.config.HF_DATASETS_CACHE", SETTINGS["cache_dir"]):
        yield


@pytest.fixture(autouse=True)
def quick_and_clean(monkeypatch):
    """One thread, as more only cost with this model; setup()'s environment variables end with the test."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def run(tiny, rows_file, tmp_path):
    """run(**flags): main() in this process, as one rank; its exit code: 0, 2, or "killed"."""
    paths = {"pretrain": tiny, "dataset": rows_file, "save_path": str(tmp_path / "out")}

    def call(args_class=sft.Args, **flags):
        try:
            return sft.main(args_class(**{**SETTINGS, **paths, **flags})) or 0
        except SystemExit as e:
            return e.code
        except Killed:
            return "killed"
        finally:
            gc.collect()

    return call


def make_args(**flags):
    return sft.Args(**{**SETTINGS, "pretrain": "", "dataset": "", **flags})


def metrics_of(save_path, name):
    """The values of a metric, of each logged step that has it."""
    lines = [json.loads(line) for line in Path(save_path, "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def weights_of(save_path):
    """The bytes of a saved model's weights."""
    return Path(save_path, "model.safetensors").read_bytes()


def encode_plainly(tokenizer, row):
    """(ids with EOS, cut at max_len; length of the prompt) by nothing but the tokenizer."""
    ids = tokenizer(row["input"] + row["output"])["input_ids"] + [tokenizer.eos_token_id]
    return ids[: SETTINGS["max_len"]], len(tokenizer(row["input"])["input_ids"])


def mean_loss(model, rows):
    """Hugging Face's own loss, one forward per row, its prompt masked; per trained token of all rows."""
    total, n_tokens = 0, 0
    for ids, n_prompt in rows:
        labels = torch.tensor([[-100] * n_prompt + ids[n_prompt:]])
        n = len(ids) - n_prompt
        total = total + model(input_ids=torch.tensor([ids]), labels=labels, use_cache=False).loss * n
        n_tokens += n
    return total / n_tokens


def eager(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)


def example_of(ids, n_prompt=0):
    """An example of token ids, all but n_prompt of them trained."""
    return {"input_ids": np.array(ids), "trained": np.arange(len(ids)) >= max(1, n_prompt)}


# --- equality: however a step is split, it is the step of plain torch


@pytest.fixture(scope="module")
def reference(tiny, tokenizer, rows_file):
    """Three steps of plain torch: losses, gradient norms, and the loss of the first rows after them."""
    rows = [encode_plainly(tokenizer, json.loads(line)) for line in Path(rows_file).read_text().splitlines()]
    order = sft.epoch_order(np.array([len(ids) for ids, _ in rows]), 42, 0)
    model = eager(tiny)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    result = SimpleNamespace(rows=rows, loss=[], grad_norm=[])
    for begin in (0, 24, 48):
        loss = mean_loss(model, [rows[i] for i in order[begin : begin + 24]])
        optimizer.zero_grad()
        loss.backward()
        result.loss.append(loss.item())
        result.grad_norm.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
    with torch.no_grad():
        result.final = mean_loss(model, rows[:8]).item()
    return result


@pytest.fixture(scope="module")
def two_ranks(tiny, rows_file, tmp_path_factory):
    """Folder with the results of all SPLITS on two ranks, started once."""
    out = tmp_path_factory.mktemp("two_ranks")
    paths = {"pretrain": tiny, "dataset": rows_file}
    configs = [{**SETTINGS, **paths, **flags, "save_path": str(out / name)} for name, flags in SPLITS.items()]
    (out / "configs.json").write_text(json.dumps(configs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(REPO / "tests/launch.py"), "sft", str(out / "configs.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", SPLITS)
def test_a_step_equals_plain_torch(name, ranks, reference, request, run, tmp_path):
    if ranks == 1:
        out = tmp_path / "out"
        assert run(**SPLITS[name]) == 0
    else:
        out = request.getfixturevalue("two_ranks") / name
    assert metrics_of(out, "loss") == pytest.approx(reference.loss, rel=0, abs=1e-5)
    assert metrics_of(out, "grad_norm") == pytest.approx(reference.grad_norm, rel=1e-5, abs=1e-5)
    with torch.no_grad():
        found = mean_loss(eager(out), reference.rows[:8]).item()
    assert found == pytest.approx(reference.final, rel=0, abs=1e-5)


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_bf16_has_fp32_master_weights(zero_stage, tiny, run, tmp_path, monkeypatch):
    """One AdamW step moves every weight by the learning rate, 1e-7: far below what bf16 can hold."""
    from deepspeed.utils import safe_get_full_fp32_param

    start = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).float().state_dict()
    moves, save_model = [], sft.save_model

    def spy(engine, *rest):
        for name, p in engine.module.model.named_parameters():
            moves.append((safe_get_full_fp32_param(p) - start[name]).abs().flatten())
        save_model(engine, *rest)

    monkeypatch.setattr(sft, "save_model", spy)
    assert run(bf16=True, zero_stage=zero_stage, learning_rate=1e-7, train_batch_size=49) == 0
    moves = torch.cat(moves)
    assert (moves > 0).float().mean() > 0.95
    # 0.73e-7 if the optimiser took a hidden step at its start: its bias correction would be one ahead
    assert moves.median().item() == pytest.approx(1e-7, rel=0.02)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_evaluation_is_the_loss_of_the_held_out_rows(tiny, tokenizer, run, tmp_path):
    """At step 0 and at the end of each epoch."""
    held_out = make_rows(11, seed=3)
    path = write_rows(tmp_path / "held_out.jsonl", held_out)
    assert run(eval_dataset=path, eval_split="train", micro_train_batch_size=2) == 0
    for step, folder in ((0, tiny), (-1, tmp_path / "out")):
        with torch.no_grad():
            expected = mean_loss(eager(folder), [encode_plainly(tokenizer, row) for row in held_out]).item()
        assert metrics_of(tmp_path / "out", "eval/loss")[step] == pytest.approx(expected, rel=0, abs=1e-5)
    assert len(metrics_of(tmp_path / "out", "eval/loss")) == 2


# --- log-probabilities, the split of a step, the learning rate


@pytest.fixture(scope="module")
def logps_model(tiny):
    return sft.LogProbs(sft.load_model(tiny, make_args()))


def test_neighbours_in_a_pack_have_no_effect(logps_model):
    a, b, c = example_of([5, 6, 7, 8, 9], 3), example_of([20, 21, 22, 23], 2), example_of([30, 31])
    other = example_of([105, 106, 107, 108, 109], 3)  # a's lengths, other tokens
    with torch.no_grad():
        logps, changed = (logps_model(sft.pack_rows([x, b, c], "cpu")) for x in (a, other))
        alone = torch.cat([logps_model(sft.pack_rows([x], "cpu")) for x in (a, b, c)])
    assert torch.equal(logps[2:], changed[2:]) and not torch.equal(logps[:2], changed[:2])
    assert torch.allclose(logps, alone, rtol=0, atol=1e-5)


def test_a_pack_by_hand():
    first = {"input_ids": np.array([10, 11, 12, 13]), "trained": np.array([False, False, True, True])}
    pack = sft.pack_rows([first, example_of([40, 50, 51])], "cpu")
    assert pack["input_ids"].tolist() == [[10, 11, 12, 13, 40, 50, 51]]
    assert pack["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert pack["segments"]["n_q"] == pack["segments"]["n_k"] == [4, 3]
    assert pack["segments"]["cu_q"].tolist() == [0, 4, 7]
    assert pack["positions"].tolist() == [1, 2, 4, 5] and pack["targets"].tolist() == [12, 13, 50, 51]


def test_chunks_of_the_head_have_no_effect(logps_model, monkeypatch):
    pack = sft.pack_rows([example_of(range(1, 60)), example_of(range(100, 130))], "cpu")
    grads, logps = [], []
    for smallest in (False, True):
        if smallest:
            monkeypatch.setitem(vars(sft), "max", min)  # 16 rows, not what the budget allows
        logps_model.zero_grad()
        logps.append(logps_model(pack))
        logps[-1].sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in logps_model.parameters()]))
    assert torch.allclose(*logps, rtol=0, atol=1e-5) and torch.allclose(*grads, rtol=1e-4, atol=1e-4)


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    world_size=st.integers(1, 5),
    max_examples=st.integers(1, 8),
    max_tokens=st.none() | st.integers(50, 200),
)
def test_split_step_uses_every_example_once(lengths, world_size, max_examples, max_tokens):
    ranks = []
    for rank in range(world_size):
        with mock.patch.multiple(sft.dist, get_rank=lambda r=rank: r, get_world_size=lambda: world_size):
            ranks.append(sft.split_step(lengths, max_examples, max_tokens))
    assert len({len(passes) for passes in ranks}) == 1
    passes = [members for passes in ranks for members in passes]
    assert sorted(i for members in passes for i in members) == list(range(len(lengths)))
    for members in passes:
        fits = len(members) <= max_examples if max_tokens is None else sum(lengths[i] for i in members) <= max_tokens
        assert fits
    if max_tokens is None:
        assert len(ranks[0]) == math.ceil(len(lengths) / max_examples / world_size)


def test_learning_rate_by_hand(tiny, monkeypatch):
    """Ten steps, the first two of them warm-up; no step is at 0."""
    monkeypatch.setattr(sft, "load_model", lambda *args: torch.nn.Linear(2, 2))
    monkeypatch.setattr(sft.deepspeed, "initialize", lambda lr_scheduler, **rest: [lr_scheduler])

    def rates(kind):
        args = make_args(pretrain=tiny, learning_rate=2.0, lr_scheduler=kind, lr_warmup_ratio=0.2)
        scheduler, found = sft.start_engine(args, 10, wrapper=lambda model: model), []
        for _ in range(10):
            found.append(scheduler.get_last_lr()[0])
            scheduler.step()
        return found

    cosine = [1 + math.cos(math.pi * i / 9) for i in range(1, 9)]
    assert rates("constant") == [1.0] + [2.0] * 9
    assert rates("linear") == pytest.approx([1.0, 2.0, *(2 * i / 9 for i in range(8, 0, -1))])
    assert rates("cosine") == pytest.approx([1.0, 2.0, *cosine])
    assert rates("cosine_with_min_lr") == pytest.approx([1.0, 2.0, *(0.2 + 0.9 * c for c in cosine)])


def test_max_steps_ends_the_schedule_too(run, tmp_path):
    assert run(lr_scheduler="linear", train_batch_size=7, max_steps=4) == 0
    assert metrics_of(tmp_path / "out", "lr") == pytest.approx([1e-3 * x for x in (0.8, 0.6, 0.4, 0.2)])


def test_the_longest_example_is_first():
    lengths = np.array([3, 1, 9, 4, 9])
    for seed in range(5):
        order = sft.epoch_order(lengths, seed, 0)
        assert order[0] == 2 and sorted(order) == [0, 1, 2, 3, 4]
    assert len({tuple(sft.epoch_order(lengths, 0, epoch)) for epoch in range(1, 9)}) > 4


# --- rows: which tokens are read, which are trained

CHAT = [
    {"role": "user", "content": "red?"},
    {"role": "assistant", "content": "river"},
    {"role": "user", "content": "old?"},
    {"role": "assistant", "content": "walls"},
]
FIRST = "<|user|>red?<eos>\n<|assistant|>"
PROMPT = FIRST + "river<eos>\n<|user|>old?<eos>\n<|assistant|>"
SHAREGPT = [{"from": {"user": "human"}.get(m["role"], "gpt"), "value": m["content"]} for m in CHAT]
# An earlier answer loses what stands before "/", as reasoning models lose their thoughts.
FORGETS = CHAT_TEMPLATE.replace("m['content']", "(m['content'] if loop.last else m['content'].split('/')[-1])")
THINKING = [CHAT[0], {"role": "assistant", "content": "well/river"}, *CHAT[2:]]
SYSTEM = {"role": "system", "content": "be old"}
NO_END = CHAT_TEMPLATE.replace(" + eos_token", "")
OTHER_END = CHAT_TEMPLATE.replace("eos_token", "'<pad>'")  # special, but not EOS
QA = {"input": "red", "output": " old"}
SAMPLED = {"input": PROMPT, "output": "old", "finish_reason": "stop"}

ROWS = {  # name: (row, flags, prompt, trained stretches)
    "text": (QA, {}, "red", [" old<eos>"]),
    "a token across the border": (QA | {"output": "old"}, {"input_template": "Q {} A "}, "Q red A", [" old<eos>"]),
    "a template": (QA, {"input_template": "User: {}\\nA:"}, "User: red\nA:", [" old<eos>"]),
    "braces of the prompt": (QA | {"input": "{x} {}"}, {"input_template": "Q {}:"}, "Q {x} {}:", [" old<eos>"]),
    "key flags": (QA | {"q": "a", "a": "b"}, {"input_key": "q", "output_key": "a"}, "a", ["b<eos>"]),
    "numbers": ({"question": 3, "answer": 4.5}, {}, "3", ["4.5<eos>"]),
    "messages": ({"messages": CHAT}, {}, PROMPT, ["walls<eos>"]),
    "every turn": ({"messages": CHAT}, {"multiturn": True}, FIRST, ["river<eos>", "walls<eos>"]),
    "ShareGPT": ({"conversations": SHAREGPT}, {}, PROMPT, ["walls<eos>"]),
    "a turn behind the last answer": ({"messages": [*CHAT, CHAT[0]]}, {}, PROMPT, ["walls<eos>"]),
    "system": ({"messages": [SYSTEM, *CHAT[:2]]}, {}, f"<|system|>be old<eos>\n{FIRST}", ["river<eos>"]),
    "empty system": ({"messages": [SYSTEM | {"content": ""}, *CHAT[:2]]}, {}, f"<|system|><eos>\n{FIRST}", ["river<eos>"]),
    "text in the chat template": ({"input": "red?", "output": "river"}, {"apply_chat_template": True}, FIRST, ["river<eos>"]),
    "two columns of messages": ({"prompt": CHAT[:3], "completion": CHAT[3:]}, {}, PROMPT, ["walls<eos>"]),
    "text and messages": ({"prompt": "red?", "response": CHAT[1:2]}, {}, FIRST, ["river<eos>"]),
    "Alpaca": ({"instruction": "say", "input": "red", "output": " old"}, {}, "say\n\nred", [" old<eos>"]),
    "Alpaca without input": ({"instruction": "say", "input": "", "output": " old"}, {}, "say", [" old<eos>"]),
    "one column": ({"text": "the red river"}, {}, "the", [" red river<eos>"]),
    "pretrain_mode": (QA | {"x": "the red"}, {"pretrain_mode": True, "input_key": "x"}, "the", [" red<eos>"]),
    "thoughts of earlier turns": ({"messages": THINKING}, {"tokenizer_chat_template": FORGETS}, PROMPT, ["walls<eos>"]),
    "a turn ends in another token": (
        {"messages": CHAT}, {"tokenizer_chat_template": OTHER_END}, PROMPT.replace("<eos>", "<pad>"), ["walls<pad>"],
    ),
    "a template without an end": (
        {"messages": CHAT}, {"tokenizer_chat_template": NO_END}, PROMPT.replace("<eos>", ""), ["walls<eos>"],
    ),
    "sampled": (SAMPLED, {"apply_chat_template": True, "input_template": "Q {}"}, PROMPT, ["old<eos>"]),
    "sampled, cut": (SAMPLED | {"finish_reason": "length"}, {}, PROMPT, ["old"]),
    "sampled from messages": (SAMPLED | {"messages": CHAT[:3]}, {}, PROMPT, ["old<eos>"]),
    "cut by max_len": (QA | {"output": " old" * 20}, {"max_len": 10}, "red", [" old" * 9]),
    "EOS in the text": (QA | {"output": " old<eos>"}, {}, "red", [" old<eos>"]),
}  # fmt: skip


def encode(row, folder, **flags):
    """(text before the first trained token, [text of each trained stretch], ids, console sample) of a row."""
    args = make_args(pretrain=folder, **flags)
    tokenizer = sft.load_tokenizer(folder, args)
    example = sft.encode_row(row, sft.choose_keys("rows", row, args), tokenizer, args)
    ids, trained = example["input_ids"], example["trained"]
    edges = np.flatnonzero(np.diff(trained.astype(int), append=0, prepend=0)).reshape(-1, 2)
    texts = [tokenizer.decode(ids[begin:end]) for begin, end in edges]
    return tokenizer.decode(ids[: edges[0][0]]), texts, ids.tolist(), sft.mark_trained(ids, trained, tokenizer)


@pytest.mark.parametrize("name", ROWS)
def test_rows(name, tiny):
    row, flags, prompt, trained = ROWS[name]
    assert encode(row, tiny, **flags)[:2] == (prompt, trained)


def test_prompt_ids_are_those_of_generation(tiny, tokenizer):
    prompt = tokenizer.apply_chat_template(CHAT[:3], add_generation_prompt=True)["input_ids"]
    answer = tokenizer("walls")["input_ids"] + [tokenizer.eos_token_id]
    assert encode({"messages": CHAT}, tiny)[2] == prompt + answer


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory):
    """A model whose tokenizer puts BOS in front and EOS behind, and whose chat template writes BOS itself."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(chat_template="{{ '<bos>' }}" + CHAT_TEMPLATE)
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<bos>", "<eos>")]
    both = TemplateProcessing(single="<bos> $A <eos>", special_tokens=ids)
    tokenizer.backend_tokenizer.post_processor = both
    tokenizer.bos_token = "<bos>"
    folder = make_model(tmp_path_factory.mktemp("bos") / "bos", tokenizer)
    assert AutoTokenizer.from_pretrained(folder).encode("red")[0] == ids[0][1]
    return folder


BOS_ROWS = [
    (QA, {}, "<bos>red", [" old<eos>"]),
    (QA | {"input": "<bos>red"}, {}, "<bos>red", [" old<eos>"]),
    ({"messages": CHAT[:2]}, {}, f"<bos>{FIRST}", ["river<eos>"]),
    ({"text": "red old"}, {}, "<bos>", ["red old<eos>"]),
    (QA | {"input": "<bos>red", "finish_reason": "length"}, {}, "<bos>red", [" old"]),
    (QA | {"output": " old" * 20}, {"max_len": 10}, "<bos>red", [" old" * 8]),
]


@pytest.mark.parametrize("row, flags, prompt, trained", BOS_ROWS)
def test_bos_and_eos_once(row, flags, prompt, trained, with_bos):
    assert encode(row, with_bos, **flags)[:2] == (prompt, trained)


def test_blanks_of_sentencepiece(tmp_path):
    """Its tokens lose their blank when decoded on their own; the console shows it all the same."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = [(text, -1.0) for text in ("<eos>", "<unk>", "▁red", "▁old", "▁", "▁river")]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=1))
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=unigram, eos_token="<eos>", pad_token="<eos>")
    folder = make_model(tmp_path / "model", tokenizer)
    prompt, trained, ids, shown = encode({"input": "red", "output": " old river"}, folder)
    assert (prompt, trained, ids) == ("red", ["old river<eos>"], [2, 3, 5, 0])
    assert shown == repr("red[ old river<eos>]")


# --- the table of examples


def examples_of(names, tokenizer, folder, probs=None, **flags):
    """The table that main() makes of a comma list of datasets."""
    args = make_args(pretrain=folder, dataset=names, **flags)
    return sft.load_examples(names, probs, args.dataset_split, tokenizer, args)


def test_dataset_probs(tiny, tokenizer, tmp_path):
    """Shares of an epoch that has as many rows as the datasets together."""
    rows = {x: [{"input": x, "output": str(i)} for i in range(4)] for x in "ab"}
    names = ",".join(write_rows(tmp_path / f"{x}.jsonl", rows[x]) for x in "ab")
    for flags, expected in (
        ({"probs": "0.75,0.25"}, "a1 a2 a3 a4 a1 a2 b1 b2"),
        ({}, "a1 a2 a3 a4 b1 b2 b3 b4"),
        ({"max_samples": 2}, "a1 a2 b1 b2"),
    ):
        where = [Path(name).name for name in examples_of(names, tokenizer, tiny, **flags)["where"]]
        assert " ".join(where).replace(".jsonl:", "") == expected


def test_formats(tiny, tokenizer, tmp_path):
    """Files and folders of all kinds give the same examples; the datasets library would see a date here."""
    import datasets

    rows = [row | {"input": "2026-01-01"} for row in make_rows(5)]
    table = datasets.Dataset.from_list(rows)
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "rows.jsonl", tmp_path / "folder/train.jsonl"):
        write_rows(path, rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    table.to_csv(tmp_path / "rows.csv")
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "disk")
    datasets.DatasetDict(train=table.select([0]), test=table).save_to_disk(tmp_path / "dict")
    (arrow,) = (tmp_path / "disk").glob("*.arrow")
    names = ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "disk", f"disk/{arrow.name}"]
    found = [examples_of(str(tmp_path / name), tokenizer, tiny) for name in names]
    found.append(examples_of(str(tmp_path / "dict"), tokenizer, tiny, dataset_split="test"))
    for table in found:
        assert table["input_ids"][:] == found[0]["input_ids"][:] and len(table) == 5
    assert len(examples_of(str(tmp_path / "folder"), tokenizer, tiny)) == 5  # its types are the library's


def edited(monkeypatch, tmp_path, old, new):
    """From now on sft.py has another text."""
    text = Path(sft.__file__).read_text()
    assert text.count(old) == 1
    copied = tmp_path / "edited.py"
    copied.write_text(text.replace(old, new))
    monkeypatch.setattr(sft, "__file__", str(copied))


def test_rows_are_encoded_once(tiny, tokenizer, tmp_path, monkeypatch):
    """Found again until the rows, a data flag or the code that encodes change; an edited loss changes nothing."""
    path, calls, encode_rows = write_rows(tmp_path / "rows.jsonl", make_rows(5)), [], sft.encode_rows

    def spy(**inputs):
        calls.append(1)
        return encode_rows(**inputs)

    monkeypatch.setattr(sft, "encode_rows", spy)

    def n_encodings(**flags):
        examples_of(path, tokenizer, tiny, **flags)
        return len(calls)

    assert n_encodings() == 1
    edited(monkeypatch, tmp_path, "return -per_token_logps.sum() / n_tokens", "return per_token_logps.sum()")
    assert n_encodings() == n_encodings(learning_rate=1.0, num_proc=2) == 1
    assert n_encodings(max_len=50) == n_encodings(max_len=50) == 2
    edited(monkeypatch, tmp_path, 'raise ValueError("nothing to train")', "pass")
    assert n_encodings() == n_encodings() == 3
    write_rows(path, make_rows(6))
    assert n_encodings() == 4


def test_number_of_processes_has_no_effect(tiny, tokenizer, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", make_rows(2100))
    one, two = (
        examples_of(path, tokenizer, tiny, num_proc=n, cache_dir=str(tmp_path / f"cache{n}")) for n in (1, 2)
    )
    assert len(one) > 2000 and one.data.equals(two.data)


def test_reasons_are_counted(tiny, tokenizer, tmp_path, capsys):
    """Up to --max_drop_ratio of the rows may be unusable."""
    rows = [*make_rows(46), {"input": "red " * 200, "output": "old"}, QA | {"output": ""}, QA | {"output": " "}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with open(path, "a") as file:
        file.write('{"input": "the writer was killed he')
    assert len(examples_of(path, tokenizer, tiny, max_drop_ratio=0.1)) == 46
    said = capsys.readouterr().out
    assert f"dropped 2 of 50 rows: empty response; the first: {path}:48" in said
    assert f"dropped 1 of 50 rows: prompt >= max_len; the first: {path}:47" in said
    assert f"the first: {path}:50" in said and said.count("\n") == 3
    with pytest.raises(SystemExit, match="2"):
        examples_of(path, tokenizer, tiny, max_drop_ratio=0.05)
    assert "4 of 50 rows cannot be used (--max_drop_ratio 0.05)" in capsys.readouterr().err

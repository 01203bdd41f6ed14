"""sft.py against plain torch and Hugging Face's own loss, values computed by hand, and itself killed and resumed.

What the four trainers share byte for byte is tested here, once. SFT=my_sft.py python -m pytest tests/test_sft.py
tests a copy.
"""

import dataclasses
import functools
import gc
import itertools
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import conftest
import datasets
import numpy as np
import pytest
import torch
import transformers
from conftest import CHAT_TEMPLATE, SETTINGS, make_model, make_rows, metrics_of, weights_of, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from launch import load_script, register_attention
from transformers import AutoModelForCausalLM, AutoTokenizer

sft = load_script("sft")
REPO = Path(__file__).resolve().parents[1]
MyArgs = dataclasses.make_dataclass("MyArgs", [("my_beta", float, 0.1)], bases=(sft.Args,))  # of a copy
SPLITS = {
    "micro8": {},
    "micro1": {"micro_train_batch_size": 1},
    "packing": {"micro_train_batch_size": 3, "packing_samples": True},
    "zero0": {"zero_stage": 0},
    "zero3": {"zero_stage": 3},
    "checkpointing": {"gradient_checkpointing": True},
    "zero3-checkpointing": {"zero_stage": 3, "gradient_checkpointing": True, "micro_train_batch_size": 2},
    "offload": {"adam_offload": True},
    "zero3-offload": {"zero_stage": 3, "adam_offload": True},
}


class Killed(BaseException):
    """Stands for SIGKILL in tests that run in one process."""


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


def mean_loss(model, rows):
    """Hugging Face's own loss, one forward per row, its prompt masked; per trained token of all rows."""
    total = 0
    for ids, n_prompt in rows:
        labels = torch.tensor([[-100] * n_prompt + ids[n_prompt:]])
        loss = model(input_ids=torch.tensor([ids]), labels=labels, use_cache=False).loss
        total = total + loss * (len(ids) - n_prompt)
    return total / sum(len(ids) - n_prompt for ids, n_prompt in rows)


def eager(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)


def example_of(ids, n_prompt=0):
    """An example of token ids, all but n_prompt of them trained."""
    return {"input_ids": np.array(ids), "trained": np.arange(len(ids)) >= max(1, n_prompt)}


# --- equality: however a step is split, it is the step of plain torch


@pytest.fixture(scope="module")
def reference(tiny, tokenizer, rows_file):
    """Three steps of plain torch: losses, gradient norms, and the loss of all rows before and after."""
    rows = []  # (ids with EOS, cut at max_len; length of the prompt), by nothing but the tokenizer
    for row in map(json.loads, open(rows_file)):
        ids = tokenizer(row["input"] + row["output"])["input_ids"] + [tokenizer.eos_token_id]
        rows.append((ids[: SETTINGS["max_len"]], len(tokenizer(row["input"])["input_ids"])))
    batches = [*sft.plan_steps(np.array([len(ids) for ids, _ in rows]), make_args(train_batch_size=24))]
    model = eager(tiny)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    metrics = {"loss": [], "grad_norm": [], "eval/loss": [mean_loss(model, rows).item()]}
    for batch in batches:
        loss = mean_loss(model, [rows[i] for i in batch])
        optimizer.zero_grad()
        loss.backward()
        metrics["loss"].append(loss.item())
        metrics["grad_norm"].append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
    metrics["eval/loss"].append(mean_loss(model, rows).item())
    return SimpleNamespace(rows=rows, metrics=metrics)


@pytest.fixture(scope="module")
def two_ranks(tiny, rows_file, tmp_path_factory):
    """Folder with the results of all SPLITS on two ranks."""
    out = tmp_path_factory.mktemp("two_ranks")
    paths = {"pretrain": tiny, "dataset": rows_file, "eval_dataset": rows_file, "eval_split": "train"}
    configs = [{**paths, **flags, "save_path": str(out / name)} for name, flags in SPLITS.items()]
    conftest.launch("sft", configs, out)
    return out


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", SPLITS)
def test_a_step_equals_plain_torch(name, ranks, reference, request, rows_file, run, tmp_path):
    """The steps, the evaluations at step 0 and at the end, and the saved model."""
    if ranks == 1:
        out = tmp_path / "out"
        assert run(**SPLITS[name], eval_dataset=rows_file, eval_split="train") == 0
    else:
        out = request.getfixturevalue("two_ranks") / name
    found = metrics_of(out)
    for metric, expected in reference.metrics.items():
        assert found[metric] == pytest.approx(expected, rel=1e-5, abs=1e-5)
    with torch.no_grad():
        trained = mean_loss(eager(out), reference.rows).item()
    assert trained == pytest.approx(found["eval/loss"][1], rel=0, abs=1e-5)


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


# --- log-probabilities, the split of a step, the learning rate


def test_neighbours_and_chunks_have_no_effect(tiny, monkeypatch):
    """On the log-probs of an example: what else lies in its pack, and how many tokens the head takes at once."""
    register_attention(sft)
    model = sft.LogProbs(sft.load_model(tiny, make_args()))
    a, b, c = example_of([5, 6, 7, 8, 9], 3), example_of(range(20, 60), 2), example_of([30, 31])
    other = example_of([105, 106, 107, 108, 109], 3)  # a's lengths, other tokens
    with torch.no_grad():
        logps, changed = (model(sft.pack_rows([x, b, c], "cpu")) for x in (a, other))
        alone = torch.cat([model(sft.pack_rows([x], "cpu")) for x in (a, b, c)])
        monkeypatch.setitem(vars(sft), "max", min)  # a chunk has 16 tokens, not what the budget allows
        chunked = model(sft.pack_rows([a, b, c], "cpu"))
    assert torch.equal(logps[2:], changed[2:]) and not torch.equal(logps[:2], changed[:2])
    for found in (alone, chunked):
        assert torch.allclose(logps, found, rtol=0, atol=1e-5)


def test_a_pack_by_hand():
    first = {"input_ids": np.array([10, 11, 12, 13]), "trained": np.array([False, False, True, True])}
    pack = sft.pack_rows([first, example_of([40, 50, 51])], "cpu")
    assert pack["input_ids"].tolist() == [[10, 11, 12, 13, 40, 50, 51]]
    assert pack["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert pack["segments"]["lengths"] == [4, 3] and pack["segments"]["bounds"].tolist() == [0, 4, 7]
    assert pack["positions"].tolist() == [1, 2, 4, 5] and pack["targets"].tolist() == [12, 13, 50, 51]


SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None)
@given(SIZES, st.integers(1, 5), st.integers(1, 8), st.booleans())
def test_split_step_uses_every_example_once(lengths, world_size, max_examples, packing):
    args = make_args(micro_train_batch_size=max_examples, max_len=70, packing_samples=packing)
    ranks, max_tokens = [], 70 * max_examples
    for rank in range(world_size):
        with mock.patch.multiple(sft.dist, get_rank=lambda r=rank: r, get_world_size=lambda: world_size):
            ranks.append(sft.split_step(lengths, args))
    assert len({len(passes) for passes in ranks}) == 1
    passes = [members for passes in ranks for members, weight in passes if weight]
    assert sorted(i for members in passes for i in members) == list(range(len(lengths)))
    if packing:
        assert max(sum(lengths[i] for i in members) for members in passes) <= max_tokens
    else:
        assert max(map(len, passes)) <= max_examples
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


def test_checkpointed_layers_are_computed_again(run, tmp_path):
    """In the backward pass, from the first step on."""
    data, calls = write_rows(tmp_path / "rows.jsonl", make_rows(5)), []
    for checkpointing in (False, True):
        attend = sft.F.scaled_dot_product_attention
        with mock.patch.object(sft.F, "scaled_dot_product_attention", wraps=attend) as spy:
            assert run(dataset=data, gradient_checkpointing=checkpointing, save_path=f"{tmp_path}/{checkpointing}") == 0
        calls.append(spy.call_count - 8)  # of the check at the start: twice two rows, two layers
    assert calls == [10, 20]


def test_every_epoch_has_its_own_order():
    """Each example once; the longest one is in the very first step."""
    lengths = np.array([3, 1, 9, 4, 9])
    for seed in range(5):
        steps = [*sft.plan_steps(lengths, make_args(seed=seed, max_epochs=9, train_batch_size=2))]
        assert [len(step) for step in steps] == [2, 2, 1] * 9 and steps[0][0] == 2
        orders = [(*steps[i], *steps[i + 1], *steps[i + 2]) for i in range(0, 27, 3)]
        assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders) and len(set(orders)) > 4


# --- rows: which tokens are read, which are trained

CHAT = [
    {"role": "user", "content": "red?"},
    {"role": "assistant", "content": "river"},
    {"role": "user", "content": "old?"},
    {"role": "assistant", "content": "walls"},
]
FIRST = "<|user|>red?<eos>\n<|assistant|>"
PROMPT = FIRST + "river<eos>\n<|user|>old?<eos>\n<|assistant|>"
# An earlier answer loses what stands before "/", as reasoning models lose their thoughts.
LAST_OR_SHORT = "(m['content'] if loop.last else m['content'].split('/')[-1])"
FORGETS = {"tokenizer_chat_template": CHAT_TEMPLATE.replace("m['content']", LAST_OR_SHORT)}
THINKING = [CHAT[0], {"role": "assistant", "content": "well/river"}, *CHAT[2:]]
SYSTEM = {"role": "system", "content": "be old"}
NO_END = {"tokenizer_chat_template": CHAT_TEMPLATE.replace(" + eos_token", "")}
PAD_ENDS = {"tokenizer_chat_template": CHAT_TEMPLATE.replace("eos_token", "'<pad>'")}
QA = {"input": "red", "output": " old"}
SAMPLED = {"input": PROMPT, "output": "old", "finish_reason": "stop"}
CHAT_FLAG = {"apply_chat_template": True}

ROWS = {  # name: (row, flags, prompt, trained stretches)
    "text": (QA, {}, "red", [" old<eos>"]),
    "a token across the border": (QA | {"output": "old"}, {"input_template": "Q {} A "}, "Q red A", [" old<eos>"]),
    "a template": (QA, {"input_template": "User: {}\\nA:"}, "User: red\nA:", [" old<eos>"]),
    "a template without {}": (QA, {"input_template": '""'}, "red", [" old<eos>"]),
    "braces of the prompt": (QA | {"input": "{x} {}"}, {"input_template": "Q {}:"}, "Q {x} {}:", [" old<eos>"]),
    "key flags": (QA | {"q": "a", "a": "b"}, {"input_key": "q", "output_key": "a"}, "a", ["b<eos>"]),
    "output_key": (QA | {"a": "b"}, {"output_key": "a"}, "red", ["b<eos>"]),
    "numbers": ({"input": 3, "output": 4.5}, {}, "3", ["4.5<eos>"]),
    "messages": ({"messages": CHAT}, {}, PROMPT, ["walls<eos>"]),
    "every turn": ({"messages": CHAT}, {"multiturn": True}, FIRST, ["river<eos>", "walls<eos>"]),
    "a turn behind the last answer": ({"messages": [*CHAT, CHAT[0]]}, {}, PROMPT, ["walls<eos>"]),
    "a greeting": ({"messages": CHAT[1:]}, {}, PROMPT.removeprefix("<|user|>red?<eos>\n"), ["walls<eos>"]),
    "system": ({"messages": [SYSTEM, *CHAT[:2]]}, {}, f"<|system|>be old<eos>\n{FIRST}", ["river<eos>"]),
    "text in the chat template": (QA | {"input": "red?"}, CHAT_FLAG, FIRST, [" old<eos>"]),
    "two columns of messages": ({"prompt": CHAT[:3], "completion": CHAT[3:]}, {}, PROMPT, ["walls<eos>"]),
    "one column": ({"text": "the red river"}, {}, "the", [" red river<eos>"]),
    "thoughts of earlier turns": ({"messages": THINKING}, FORGETS, PROMPT, ["walls<eos>"]),
    "a turn ends in another token": ({"messages": CHAT}, PAD_ENDS, PROMPT.replace("<eos>", "<pad>"), ["walls<pad>"]),
    "no end in the template": ({"messages": CHAT}, NO_END, PROMPT.replace("<eos>", ""), ["walls<eos>"]),
    "sampled": (SAMPLED, {"apply_chat_template": True, "input_template": "Q {}"}, PROMPT, ["old<eos>"]),
    "sampled, of a row with other columns": (SAMPLED | {"instruction": "x"}, {}, PROMPT, ["old<eos>"]),
    "sampled, cut": (SAMPLED | {"finish_reason": "length"}, {}, PROMPT, ["old"]),
    "sampled, nothing": (SAMPLED | {"output": ""}, {}, PROMPT, ["<eos>"]),
    "sampled from messages": (SAMPLED | {"messages": CHAT[:3]}, {}, PROMPT, ["old<eos>"]),
    "cut by max_len": (QA | {"output": " old" * 20}, {"max_len": 10}, "red", [" old" * 9]),
    "EOS in the text": (QA | {"output": " old<eos>"}, {}, "red", [" old<eos>"]),
    # of the tokenizer with BOS
    "BOS": (QA, {}, "<bos>red", [" old<eos>"]),
    "BOS in the text": (QA | {"input": "<bos>red"}, {}, "<bos>red", [" old<eos>"]),
    "BOS in the template": ({"messages": CHAT[:2]}, {}, f"<bos>{FIRST}", ["river<eos>"]),
    "BOS, sampled": (QA | {"input": "<bos>red", "finish_reason": "length"}, {}, "<bos>red", [" old"]),
}  # fmt: skip


def encode(row, folder, **flags):
    """(text before the first trained token, [text of each trained stretch], ids) of a row."""
    args = make_args(pretrain=folder, **flags)
    tokenizer = sft.load_tokenizer(folder, args)
    (example,) = sft.encode_example(row, tokenizer, args)
    ids, trained = example["input_ids"], example["trained"]
    edges = np.flatnonzero(np.diff(trained.astype(int), append=0, prepend=0)).reshape(-1, 2)
    texts = [tokenizer.decode(ids[begin:end]) for begin, end in edges]
    return tokenizer.decode(ids[: edges[0][0]]), texts, ids.tolist()


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory):
    """A model whose tokenizer puts BOS in front and EOS behind, and whose chat template writes BOS itself."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = conftest.make_tokenizer(chat_template="{{ '<bos>' }}" + CHAT_TEMPLATE)
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<bos>", "<eos>")]
    frame = TemplateProcessing(single="<bos> $A <eos>", special_tokens=ids)
    tokenizer.backend_tokenizer.post_processor = frame
    tokenizer.bos_token = "<bos>"
    return make_model(tmp_path_factory.mktemp("bos") / "bos", tokenizer)


@pytest.mark.parametrize("name", ROWS)
def test_rows(name, tiny, with_bos):
    row, flags, prompt, trained = ROWS[name]
    assert encode(row, with_bos if name.startswith("BOS") else tiny, **flags)[:2] == (prompt, trained)


def test_prompt_ids_are_those_of_generation(tiny, tokenizer):
    prompt = tokenizer.apply_chat_template(CHAT[:3], add_generation_prompt=True)["input_ids"]
    answer = tokenizer("walls")["input_ids"] + [tokenizer.eos_token_id]
    assert encode({"messages": CHAT}, tiny)[2] == prompt + answer


def test_blanks_of_sentencepiece():
    """Its tokens lose their blank when decoded on their own; the console shows it all the same."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = [(text, -1.0) for text in ("<eos>", "<unk>", "▁red", "▁old", "▁river")]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=1))
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=unigram, eos_token="<eos>")
    ids, trained = sft.encode("red", " old river", tokenizer, make_args())
    assert ids.tolist() == [2, 3, 4, 0] and trained.tolist() == [False, True, True, True]
    assert sft.mark_trained({"input_ids": ids, "trained": trained}, tokenizer) == repr("red[ old river<eos>]")


# --- the table of examples


@pytest.fixture
def examples_of(tiny, tokenizer):
    """examples_of(names, **flags): the table that main() makes of a comma list of datasets."""

    def call(names, **flags):
        args = make_args(pretrain=tiny, **flags)
        return sft.load_examples(str(names), args.dataset_probs, args.dataset_split, sft.encode_example, tokenizer, args).with_format(None)

    return call


def test_dataset_probs(examples_of, tmp_path):
    """Shares of an epoch that has as many rows as the datasets together."""
    names = ",".join(write_rows(tmp_path / f"{x}.jsonl", make_rows(4)) for x in "ab")
    expected = {None: "a1 a2 a3 a4 b1 b2 b3 b4", "0.75,0.25": "a1 a2 a3 a4 a1 a2 b1 b2"}
    for probs, order in expected.items():
        where = [Path(row).name for row in examples_of(names, dataset_probs=probs)["where"]]
        assert " ".join(where).replace(".jsonl:", "") == order
    assert len(examples_of(names, max_samples=3)) == 6


def test_formats(examples_of, tmp_path):
    """Files and folders of all kinds give the same examples; in JSON the datasets library would see dates."""
    rows = [row | {"input": "2026-01-01"} for row in make_rows(5)]
    table = datasets.Dataset.from_list(rows)
    (tmp_path / "folder").mkdir()
    write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    table.to_csv(tmp_path / "rows.csv")
    table.to_parquet(tmp_path / "folder/train.parquet")
    table.select([0]).to_parquet(tmp_path / "folder/test.parquet")
    table.save_to_disk(tmp_path / "disk")
    names = "rows.jsonl rows.json rows.csv folder folder/train.parquet disk/*.arrow".split()
    found = [examples_of(*tmp_path.glob(name))["input_ids"][:] for name in names]
    assert len(found[0]) == 5 and all(ids == found[0] for ids in found)
    assert examples_of(tmp_path / "folder", dataset_split="test")["input_ids"][:] == found[0][:1]


def edit(patch, old, tmp_path):
    """From now on the script is a copy that lacks this text."""
    text = Path(sft.__file__).read_text()
    assert text.count(old) == 1
    (tmp_path / "edited.py").write_text(text.replace(old, ""))
    patch.setattr(sft, "__file__", str(tmp_path / "edited.py"))


def test_rows_are_encoded_once(examples_of, tmp_path, monkeypatch):
    """Found again until the rows, a data flag or the code that encodes change; an edited loss changes nothing."""
    path = write_rows(tmp_path / "rows.jsonl", make_rows(5))

    def encodes(**flags):
        with mock.patch.object(sft, "encode_example", wraps=sft.encode_example) as spy:
            n = len(examples_of(path, **flags))
        assert spy.call_count in (0, n)
        return spy.called

    assert encodes() and not encodes()
    edit(monkeypatch, "-per_token_logps.sum()", tmp_path)
    assert not encodes(learning_rate=1.0, num_proc=2)
    assert encodes(max_len=50) and not encodes(max_len=50)
    edit(monkeypatch, ", or an empty response", tmp_path)
    assert encodes() and not encodes()
    write_rows(path, make_rows(6))
    assert encodes() and not encodes()


def test_number_of_processes_has_no_effect(examples_of, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", make_rows(2100))
    one, two = (examples_of(path, num_proc=n, cache_dir=f"{tmp_path}/{n}").data for n in (1, 2))
    assert len(one) > 2000 and one.equals(two)


def test_reasons_are_counted(examples_of, tmp_path, capsys):
    """Up to --max_drop_ratio of the rows may be unusable."""
    rows = [*make_rows(46), QA | {"input": "red " * 200}, QA | {"output": ""}, QA | {"output": " "}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with open(path, "a") as file:
        file.write('{"input": "the writer was killed he')
    assert len(examples_of(path, max_drop_ratio=0.1)) == 46
    said = capsys.readouterr().out
    assert f"dropped 2 of 50 rows: no assistant turn after a prompt, or an empty response; the first: {path}:48" in said
    assert f"dropped 1 of 50 rows: nothing to train within max_len; the first: {path}:47" in said
    assert f"the first: {path}:50" in said and f"data   {path}: 50 rows, 46 examples" in said and said.count("\n") == 4
    with pytest.raises(SystemExit, match="2"):
        examples_of(path, max_drop_ratio=0.05)
    assert "4 of 50 rows cannot be used (--max_drop_ratio 0.05)" in capsys.readouterr().err


# --- saving


def make_gpt2(folder, tokenizer):
    """GPT-2 holds its weights transposed; a temperature without do_sample is refused by save_pretrained."""
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 512, "initializer_range": 0.1}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 1, "temperature": 0.9}')


UNTIED = functools.partial(make_model, tie_word_embeddings=False)
MAKERS = {"tied": make_model, "untied": UNTIED, "GPT-2": make_gpt2}


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("zero_stage", [2, 3])
@pytest.mark.parametrize("kind", MAKERS)
def test_saved_model_is_the_trained_one(kind, zero_stage, lora_rank, tokenizer, run, tmp_path, monkeypatch):
    """Same log-probs as the engine had, LoRA merged; the files of a Hugging Face folder."""
    start, out, save_model, trained = tmp_path / "start", tmp_path / "out", sft.save_model, []
    MAKERS[kind](start, tokenizer)
    pack = sft.pack_rows([example_of(range(60), 30)], "cpu")

    def spy(engine, *rest):
        engine.eval()
        with torch.no_grad():
            trained.append(engine(pack))
        save_model(engine, *rest)

    monkeypatch.setattr(sft, "save_model", spy)
    assert run(pretrain=str(start), max_steps=2, zero_stage=zero_stage, lora_rank=lora_rank) == 0
    model, before = (AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in (out, start))
    logps = model(input_ids=pack["input_ids"]).logits[0, 29:59].log_softmax(-1)
    assert torch.allclose(logps.gather(1, pack["targets"][:, None])[:, 0], trained[0], rtol=0, atol=1e-5)
    weights, before = model.state_dict(), before.state_dict()
    assert model.dtype == torch.float32 and weights.keys() == before.keys()
    matrices = [name for name in before if "mlp" in name and before[name].dim() == 2]
    assert matrices and not any(torch.equal(weights[name], before[name]) for name in matrices)
    files = {path.name for path in out.iterdir()}
    assert files >= {"config.json", "generation_config.json", "tokenizer.json", "args.json", "metrics.jsonl"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "start"]
    assert AutoTokenizer.from_pretrained(out).chat_template == CHAT_TEMPLATE
    assert json.loads((out / "args.json").read_text())["max_steps"] == 2


# --- runs: what is done is not done again, what is another run never touches it


def die_at_move(n, folder, patch):
    """From now on the process is as good as dead before its n-th rename or removal under folder."""
    left = itertools.count(n - 1, -1)

    def dying(real):
        def move(path, *args, **options):
            ours = "dir_fd" in options or str(path).startswith(str(folder))  # dir_fd: shutil.rmtree
            if ours and next(left) <= 0:
                raise Killed
            return real(path, *args, **options)

        return move

    for name in ("rename", "replace", "unlink", "rmdir"):
        patch.setattr(os, name, dying(getattr(os, name)))


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*")}


@pytest.mark.parametrize("complete", [True, False], ids=["model", "checkpoint"])
def test_another_run_is_named(complete, tiny, run, tmp_path, monkeypatch, capsys):
    """Neither a finished model nor a checkpoint of another command, script or input is taken for one's own."""
    rows, model = write_rows(tmp_path / "rows.jsonl", make_rows(9)), shutil.copytree(tiny, tmp_path / "model")
    flags = {"dataset": rows, "pretrain": str(model), "train_batch_size": 4, "save_steps": 1}
    with monkeypatch.context() as patch:
        die_at_move(99 if complete else 2, tmp_path, patch)
        assert run(MyArgs, **flags) == (0 if complete else "killed")
    folder = tmp_path / ("out" if complete else "out.ckpt/step_00000001")
    before = snapshot(folder)

    def changes(**changed):
        capsys.readouterr()
        assert run(MyArgs, **{**flags, **changed}) == 2 and snapshot(folder) == before
        (line,) = capsys.readouterr().err.splitlines()
        assert str(folder) in line and f"edit {folder}/args.json" in line
        return line.partition(" changed.")[0].rpartition(": ")[2]

    if complete:
        assert run(MyArgs, **flags, logging_steps=5) == 0  # decides nothing
        assert "nothing to do" in capsys.readouterr().out and snapshot(folder) == before
    assert changes(learning_rate=2e-3, my_beta=0.2) == "learning_rate, my_beta"
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        assert changes() == "ranks"
    with monkeypatch.context() as patch:
        edit(patch, "-per_token_logps.sum()", tmp_path)
        assert changes() == "script"
    os.utime(rows, (1, 1))
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    assert changes() == "files of pretrain, files of dataset"


@pytest.fixture
def in_place(tokenizer, tmp_path):
    """Flags of a run whose save_path is pretrain; what is no part of the model lies in the folder as well."""
    model = Path(make_model(tmp_path / "model", tokenizer))
    (model / "logs").mkdir()
    for name in ("rm.jsonl", "train.log", "logs/a.txt", "merges.txt"):
        (model / name).write_text(name)
    (tmp_path / "link").symlink_to(model)
    return {"pretrain": str(tmp_path / "link"), "save_path": str(tmp_path / "link")}


def test_in_place(in_place, run, tmp_path, capsys):
    """Each new round of rows trains on, the same command twice trains once."""
    model, weights = Path(in_place["save_path"]), [weights_of(in_place["save_path"])]
    (model / "pytorch_model.bin").write_text("old")
    for seed in (1, 2):
        rows = write_rows(tmp_path / "rows.jsonl", make_rows(10, seed))
        for _ in range(2):
            assert run(dataset=rows, **in_place) == 0
            weights.append(weights_of(model))
        assert "nothing to do" in capsys.readouterr().out
    assert weights[1] == weights[2] and weights[3] == weights[4] and len(set(weights)) == 3
    assert [(model / name).read_text() for name in ("rm.jsonl", "logs/a.txt")] == ["rm.jsonl", "logs/a.txt"]
    assert not (model / "pytorch_model.bin").exists()
    out = {"save_path": str(tmp_path / "out")}  # made from another model, then trained on the same rows again
    assert run(dataset=rows, **in_place | out) == 0
    once = weights_of(tmp_path / "out")
    assert run(dataset=rows, pretrain=out["save_path"], **out) == 0 and weights_of(tmp_path / "out") != once


ZERO3 = {"zero_stage": 3, "bf16": True, "gradient_checkpointing": True}
LORA = {"lora_rank": 4, "lora_dropout": 0.2, "lr_scheduler": "linear"}
RESUMED = [(True, LORA, 3), (False, {"zero_stage": 0}, 4)]  # (in place?, flags, every how many moves)
KILLS = [(place, flags, 1) for place in (True, False) for flags in (LORA, ZERO3)]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in KILLS]


@pytest.mark.parametrize("place, flags, stride", [*RESUMED, *SLOW])
def test_killed_at_every_move(place, flags, stride, in_place, run, tmp_path, monkeypatch, capsys):
    """Whichever rename or removal was the last one, the same command resumes and ends with the same bytes."""
    rows, whole = write_rows(tmp_path / "rows.jsonl", make_rows(5)), tmp_path / "whole"
    flags = {"train_batch_size": 2, "max_epochs": 2, "max_steps": 4, "max_ckpt_num": 1, **flags}
    flags["dataset"] = rows
    flags["pretrain"] = str(shutil.copytree(in_place["pretrain"], tmp_path / "start"))
    assert run(**flags, save_path=str(whole)) == 0
    for n in itertools.count(1, stride):
        home = tmp_path / f"run{n}"
        flags |= {"save_path": str(home / "out"), "save_steps": 1}
        if place:
            flags["pretrain"] = str(shutil.copytree(tmp_path / "start", home / "out"))
        with monkeypatch.context() as patch:
            die_at_move(n, home, patch)
            code = run(**flags)
        if code == 0:
            break
        transformers.set_seed(n)  # of another process
        assert code == "killed" and run(**flags) == 0
        assert weights_of(home / "out") == weights_of(whole)
        found, wanted = metrics_of(home / "out"), metrics_of(whole)
        assert all(found[name] == wanted[name] for name in ("step", "loss", "grad_norm", "lr"))
        assert [path.name for path in home.iterdir()] == ["out"]
    said = capsys.readouterr().out
    assert n > 12 and "resume " in said and "nothing to do" in said
    if flags.get("lr_scheduler"):  # --max_steps ends the schedule too
        assert metrics_of(whole)["lr"] == pytest.approx([1e-3 * i / 5 for i in (4, 3, 2, 1)])


def test_numbers_that_are_not_finite_stop(run, tmp_path, capsys):
    """The step's first row is named; nothing of the run is saved."""
    assert run(learning_rate=1e30) == 2
    found = capsys.readouterr().err
    assert re.search(r"error: step 2 is not finite: .*nan.*its first row is .*rows\.jsonl:", found), found
    assert not (tmp_path / "out").exists()


def test_python_without_launcher(tiny, rows_file, tmp_path):
    """python sft.py, as the README has it, and the story that its console tells."""
    words = ["--pretrain", tiny, "--dataset", rows_file, "--save_path", str(tmp_path / "out"), "--no-bf16"]
    words += ["--train_batch_size", "24", "--learning_rate", "1e-3", "--cache_dir", SETTINGS["cache_dir"]]
    command = [sys.executable, str(REPO / os.environ.get("SFT", "sft.py")), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert " ".join(line.split()[0] for line in lines) == "data model batch sample step step step saved"
    assert all(len(line) < 120 for line in lines if line.startswith("step"))


# --- bad input: one line that says what to type instead and exit code 2, before a model is loaded

GOOD = json.dumps(QA) + "\n"
REWRITES = {"tokenizer_chat_template": "{{ messages | length }}" + CHAT_TEMPLATE}


def chat_row(*messages):
    return json.dumps({"messages": messages}) + "\n"


BAD_INPUT = {  # name: (flags, rows.jsonl, patterns of the message)
    # --- files
    "missing file": ({"dataset": "none.jsonl"}, GOOD, ["none.jsonl", "Unable to find"]),
    "empty file": ({}, "", ["rows.jsonl", "has no rows"]),
    "blank lines": ({}, "\n\n", ["2 of 2 rows cannot be used.*rows.jsonl:1: blank line"]),
    "broken line": ({}, GOOD + '{"input": oops}\n', [r"rows\.jsonl:2", "column 11"]),
    # --- columns and values
    "missing column": ({"input_key": "prompt"}, GOOD, ["--input_key.* columns input, output, not .*'prompt'"]),
    "null": ({}, GOOD + GOOD.replace('"red"', "null"), [r"rows\.jsonl:2", "neither text"]),
    "empty response": ({}, '{"input": "red", "output": " "}\n' * 3, ["3 of 3 rows", "empty response"]),
    "prompt too long": ({"max_len": 4}, GOOD + GOOD.replace("red", "red " * 9), [":2", "nothing to train within max_len"]),
    # --- conversations
    "no answer": ({}, chat_row(CHAT[0]), ["no assistant turn"]),
    "template rewrites the prompt": (REWRITES, chat_row(*CHAT[:2]), ["rewrites earlier turns"]),
    "template rewrites an answer": (FORGETS | {"multiturn": True}, chat_row(*THINKING), ["rewrites earlier turns"]),
    "no template": ({"pretrain": "plain"}, chat_row(*CHAT[:2]), ["chat template|chat_template"]),
    "two columns of the prompt": ({}, GOOD.replace("{", '{"instruction": "say", '), ["join them in encode_example"]),
    # --- models and outputs
    "no model": ({"pretrain": "/none/at/all"}, GOOD, ["/none/at/all", "neither a model folder with"]),
    "too few positions": ({"max_len": 200}, GOOD, ["--max_len 200", "--max_len 128", "config.json"]),
    "folder of another run": ({"save_path": "other"}, GOOD, ["--save_path .*/other", "another model", "folder"]),
    "a file": ({"save_path": "rows.jsonl"}, GOOD, ["--save_path .*rows.jsonl cannot be replaced"]),
    "adapters": ({"save_path": "adapters"}, GOOD, ["--save_path .*/adapters", "another model"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory, tokenizer):
    """A folder with models that lack something, and with one of another run."""
    home = tmp_path_factory.mktemp("bad_input")
    make_model(home / "model", tokenizer, max_position_embeddings=128)
    for name in ("plain", "other"):
        shutil.copytree(home / "model", home / name)
    (home / "plain/chat_template.jinja").unlink()
    (home / "adapters").mkdir()
    (home / "adapters/adapter_config.json").touch()
    return home


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(name, home, run, monkeypatch, capfd):
    flags, content, patterns = BAD_INPUT[name]
    monkeypatch.chdir(home)
    Path("rows.jsonl").write_text(content)
    monkeypatch.setattr(sft, "load_model", lambda *args: pytest.fail("a model was loaded"))
    capfd.readouterr()
    assert run(**{"pretrain": "model", "dataset": "rows.jsonl", "save_path": "out", **flags}) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(line) < 700 and not Path("out").exists()
    assert not [pattern for pattern in patterns if not re.search(pattern, line)], line


@pytest.mark.parametrize("flag", ["cache_dir", "save_path"])
def test_folder_that_cannot_be_written(flag, tiny, rows_file, tmp_path, monkeypatch, capfd):
    """As a command, since there the error of a file becomes one line and exit code 2."""
    flags = {"pretrain": tiny, "dataset": rows_file, "cache_dir": f"{tmp_path}/cache", "save_path": f"{tmp_path}/out"}
    flags[flag] = f"{rows_file}/below"
    monkeypatch.setattr(sys, "argv", ["sft.py", *(f"--{name}={value}" for name, value in flags.items())])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(sft.__file__, run_name="__main__")
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and "Not a directory" in line and f"{rows_file}/below" in line

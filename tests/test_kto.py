"""kto.py against hand-computed values and plain Hugging Face forwards; the same steps however a batch is split."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_model, make_rows, write_rows
from launch import load_script
from transformers import AutoModelForCausalLM

kto = load_script("kto")
SETTINGS = {"bf16": False, "train_batch_size": 20, "learning_rate": 1e-3, "lr_scheduler": "constant"}
SETTINGS |= {"lr_warmup_ratio": 0.0, "max_len": 100}
SPLITS = {
    "micro8": {},
    "micro1-zero3": {"micro_train_batch_size": 1, "zero_stage": 3, "gradient_checkpointing": True},
    "packing-zero0": {"micro_train_batch_size": 3, "packing_samples": True, "zero_stage": 0},
}
PLAIN = enumerate(make_rows(50, seed=3))
ROWS = [{"prompt": row["input"], "completion": row["output"], "label": i % 3 != 0} for i, row in PLAIN]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})


@pytest.fixture(scope="module")
def other(tokenizer, tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("other") / "other", tokenizer, initializer_range=0.15)


def read_metrics(folder):
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def run(**flags):
    kto.main(kto.Args(**{**SETTINGS, "cache_dir": f"{flags['save_path']}.cache", **flags}))
    return read_metrics(flags["save_path"])


def test_loss_of_six_rows_by_hand():
    r, good = [0.5, -1.0, 2.0, 0.3, -0.7, 0.0], [True, True, True, False, False, False]
    expected = [0.740625, 0.796814, 0.684542, 0.250625, 0.238134, 0.246875]
    args = SimpleNamespace(beta=0.1, desirable_loss_weight=1.5, undesirable_loss_weight=0.5)
    found = kto.kto_loss(torch.tensor(r), torch.tensor(good), torch.tensor(0.25), args)
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def next_other(prompts, seed):
    """Partners in plain words: walk on through the permutation until the prompt is another."""
    order = np.random.default_rng(seed).permutation(len(prompts)).tolist()
    partners = {}
    for i, row in enumerate(order):
        behind = order[i + 1 :] + order[: i + 1]
        partners[row] = next((j for j in behind if prompts[j] != prompts[row]), behind[0])
    return [partners[row] for row in range(len(order))]


@pytest.mark.parametrize("prompts", [[0, 0, 1, 0, 2, 2, 1, 1, 0], [3, 3, 3], [0, 0, 0, 0, 1], [7]])
def test_partner_is_the_next_row_with_another_prompt(prompts):
    for seed in range(5):
        assert kto.choose_partners(np.array(prompts), seed).tolist() == next_other(prompts, seed)


def test_splits_give_the_same_steps(tiny, tmp_path):
    """Micro-batch, packing, ZeRO stage, checkpointing, 1 and 2 ranks: 3 steps, the last of 10 rows."""
    data, runs, configs = write_rows(tmp_path / "rows.jsonl", ROWS), {}, []
    paths = {"pretrain": tiny, "dataset": data, "cache_dir": str(tmp_path)}
    for name, flags in SPLITS.items():
        runs[name] = run(**paths, **flags, save_path=str(tmp_path / name))
        configs.append({**SETTINGS, **paths, **flags, "save_path": str(tmp_path / f"two-{name}")})
    (tmp_path / "configs.json").write_text(json.dumps(configs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [Path(__file__).parent / "launch.py", "kto", tmp_path / "configs.json"]
    subprocess.run(command, check=True, timeout=300)
    runs |= {f"two-{name}": read_metrics(tmp_path / f"two-{name}") for name in SPLITS}
    first = runs["micro8"]
    assert abs(first[0]["loss"] - 0.5) < 1e-6 and first[0]["kl"] == 0 and first[1]["kl"] > 1e-3
    for name, steps in runs.items():
        for step, known in zip(steps, first, strict=True):
            for key in ("loss", "kl", "grad_norm", "rewards/margins", "logps/chosen"):
                assert step[key] == pytest.approx(known[key], rel=1e-5, abs=1e-5), (name, key)


def plain_metrics(rows, models, tokenizer):
    """z0 and loss of all rows as one step, each sequence alone through Hugging Face's own forward."""
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in models]

    def ratio(row, response):
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = prompt + tokenizer(response)["input_ids"] + [tokenizer.eos_token_id]
        ids = torch.tensor([ids[:60]])
        with torch.no_grad():
            logps = [model(input_ids=ids).logits[0, :-1].log_softmax(-1) for model in models]
        policy, reference = (x.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum().item() for x in logps)
        return policy - reference

    partners = next_other([row["prompt"] for row in rows], seed=42)
    z0 = max(0.0, np.mean([ratio(row, rows[j]["completion"]) for row, j in zip(rows, partners)]))
    h = [0.1 * (ratio(row, row["completion"]) - z0) for row in rows]
    losses = [
        1.5 / (1 + math.exp(x)) if row["label"] else 0.5 / (1 + math.exp(-x)) for x, row in zip(h, rows)
    ]
    return {"kl": z0, "loss": np.mean(losses)}


def test_z0_and_loss_equal_plain_forwards(tiny, other, tokenizer, tmp_path):
    """Step 1 and the evaluation before it, either model as the reference: one of the two makes z0 > 0."""
    flags = {"desirable_loss_weight": 1.5, "undesirable_loss_weight": 0.5, "max_samples": 20, "max_len": 60}
    flags["dataset"] = write_rows(tmp_path / "rows.jsonl", ROWS)
    flags["eval_dataset"] = write_rows(tmp_path / "eval.jsonl", ROWS[30:])
    z0s = []
    for i, models in enumerate([(tiny, other), (other, tiny)]):
        paths = {"pretrain": models[0], "ref_pretrain": models[1], "save_path": str(tmp_path / f"m{i}")}
        before, first = run(**paths, **flags)[:2]
        z0s.append(first["kl"])
        for step, prefix, rows in ((first, "", ROWS[:20]), (before, "eval/", ROWS[30:])):
            for name, value in plain_metrics(rows, models, tokenizer).items():
                assert step[prefix + name] == pytest.approx(value, rel=1e-5, abs=1e-5), prefix + name
    assert max(z0s) > 1 and min(z0s) == 0


def test_labels_are_read_strictly(tiny, tmp_path, capsys):
    assert all(kto.read_label(value) is True for value in (True, 1, 1.0, "True", "true", "1"))
    assert not any(kto.read_label(value) for value in (False, 0, 0.0, "False", "false", "0"))
    for label, words in {"good": "bad.jsonl:2: its label", 0.9: "its label", 1: "2 desirable and 0"}.items():
        bad = [ROWS[1], {**ROWS[2], "label": label}]
        with pytest.raises(SystemExit):
            run(pretrain=tiny, dataset=write_rows(tmp_path / "bad.jsonl", bad), save_path=str(tmp_path / "x"))
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["sampled", "hh-rlhf"])
def test_a_pair_becomes_two_rows(kind, tiny, tokenizer, tmp_path):
    prompt, end = ("", "") if kind == "sampled" else ("\n\nHuman: Say it.\n\nAssistant:", "<eos>")
    pair = {"chosen": f"{prompt}red river", "rejected": f"{prompt}old stone"}
    if kind == "sampled":  # what the sampler cut is trained without EOS
        pair |= {"prompt": "Say it.\n", "rejected_finish_reason": "length"}
    data = write_rows(tmp_path / "pairs.jsonl", [pair] * 3)
    args = kto.Args(pretrain=tiny, dataset=data, cache_dir=str(tmp_path))
    table = kto.load_examples(data, None, "train", kto.encode_labelled, tokenizer, args)
    assert table["desirable"] == [True, False] * 3 and len(set(table["prompt_hash"])) == 1
    found = [example["input_ids"][example["trained"]] for example in kto.fetch(table, [0, 1])]
    assert [tokenizer.decode(ids) for ids in found] == ["red river<eos>", f"old stone{end}"]


def test_resumed_is_bit_identical(tiny, tmp_path, monkeypatch):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    flags = {"pretrain": tiny, "dataset": data, "max_epochs": 2, "save_steps": 4}
    run(**flags, save_path=str(tmp_path / "whole"))
    monkeypatch.setattr(kto, "console_line", lambda step, *_: "" if step < 6 else sys.exit("killed"))
    with pytest.raises(SystemExit, match="killed"):
        run(**flags, save_path=str(tmp_path / "cut"))
    monkeypatch.undo()
    run(**flags, save_path=str(tmp_path / "cut"))
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert one == two


TRL = """
import datasets, json, sys, transformers, trl
folder, policy, reference, theirs, rows = json.loads(sys.argv[1])
for name, options in theirs.items():
    load = transformers.AutoModelForCausalLM.from_pretrained
    args = trl.KTOConfig(folder, per_device_train_batch_size=8, max_steps=1, logging_steps=1, max_length=512,
                         bf16=False, use_cpu=True, report_to="none", gradient_checkpointing=False, **options)
    data = {"train_dataset": datasets.Dataset.from_list(rows),
            "processing_class": transformers.AutoTokenizer.from_pretrained(policy)}
    trainer = trl.KTOTrainer(load(policy, dtype="float32"), load(reference, dtype="float32"), args=args, **data)
    trainer.train()
    json.dump(trainer.state.log_history[0], open(f"{folder}/{name}.json", "w"))
"""


def test_equals_trl(tiny, other, tmp_path):
    """The first step of TRL's KTOTrainer on 8 rows. It takes y' from the row before: it gets our order backwards."""
    pytest.importorskip("trl", reason="trl is not installed: pip install trl==1.16.0 accelerate")
    theirs = {"kto": {"desirable_weight": 1.5}, "apo": {"loss_type": "apo_zero_unpaired"}}
    ours = {"kto": {"desirable_loss_weight": 1.5}, "apo": {"apo_zero_unpaired": True}}
    backwards = [ROWS[i] for i in np.random.default_rng(42).permutation(8)[::-1]]
    command = ["env", "-u", "RANK", "-u", "WORLD_SIZE", "-u", "LOCAL_RANK", sys.executable, "-c", TRL]
    inputs = json.dumps([str(tmp_path), tiny, other, theirs, backwards])
    subprocess.run([*command, inputs], check=True, timeout=600)
    paths = {"pretrain": tiny, "ref_pretrain": other}
    paths["dataset"] = write_rows(tmp_path / "rows.jsonl", ROWS[:8])
    for name, flags in ours.items():
        (found,) = run(**paths, **flags, max_len=512, save_path=str(tmp_path / name))
        for key, value in json.loads((tmp_path / f"{name}.json").read_text()).items():
            if key in ("loss", "kl", "grad_norm", "rewards/chosen", "rewards/rejected", "logps/chosen"):
                assert found[key] == pytest.approx(value, abs=1e-4, rel=1e-5), (name, key)

"""kto.py against hand-computed values and plain Hugging Face forwards; the same steps however a batch is split."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

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
    "micro1-zero3": {"micro_train_batch_size": 1, "zero_stage": 3},
    "micro2-zero1": {"micro_train_batch_size": 2, "zero_stage": 1, "gradient_checkpointing": True},
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
    expected = []
    for value, desirable in zip(r, good):
        x = 0.1 * (value - 0.25) * (1 if desirable else -1)
        expected.append((1.5 if desirable else 0.5) * (1 - 1 / (1 + math.exp(-x))))
    found = kto.kto_loss(torch.tensor(r), torch.tensor(good), torch.tensor(0.25), 0.1, 1.5, 0.5)
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def next_other(prompts, seed):
    """Partners in plain words: walk on through the permutation until the prompt is another."""
    order = np.random.default_rng(seed).permutation(len(prompts)).tolist()
    partners = {}
    for i, row in enumerate(order):
        behind = order[i + 1 :] + order[: i + 1]
        partners[row] = next((j for j in behind if prompts[j] != prompts[row]), behind[0])
    return [partners[row] for row in range(len(order))]


@pytest.mark.parametrize("n_prompts", [1, 2, 40])
def test_partner_is_the_next_row_with_another_prompt(n_prompts):
    prompts = np.random.default_rng(1).integers(0, n_prompts, 40)
    assert kto.choose_partners(prompts, 7).tolist() == next_other(prompts, 7)


def test_order_spreads_both_classes():
    desirable = np.arange(60) < 10
    order = kto.balanced_order(np.random.default_rng(0).permutation(60), desirable)
    assert sorted(order) == list(range(60))
    assert [desirable[order[i : i + 12]].sum() for i in range(0, 60, 12)] == [2] * 5


def test_splits_give_the_same_steps(tiny, tmp_path):
    """Micro-batch, packing, ZeRO stage, checkpointing, 1 and 2 ranks: 3 steps, the last of 10 rows."""
    paths = {
        "pretrain": tiny,
        "dataset": write_rows(tmp_path / "rows.jsonl", ROWS),
        "cache_dir": str(tmp_path),
    }
    runs = {name: run(**paths, **flags, save_path=str(tmp_path / name)) for name, flags in SPLITS.items()}
    two = {f"two-{name}": {**SETTINGS, **paths, **flags} for name, flags in SPLITS.items()}
    configs = [{**flags, "save_path": str(tmp_path / name)} for name, flags in two.items()]
    (tmp_path / "configs.json").write_text(json.dumps(configs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch = str(Path(__file__).parent / "launch.py")
    subprocess.run([*command, launch, "kto", str(tmp_path / "configs.json")], check=True, timeout=300)
    runs |= {name: read_metrics(tmp_path / name) for name in two}
    first = runs["micro8"]
    assert len(first) == 3 and abs(first[0]["loss"] - 0.5) < 1e-6
    assert first[0]["kl"] == 0 and first[1]["kl"] > 1e-3
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
    losses = []
    for row in rows:
        x = 0.1 * (ratio(row, row["completion"]) - z0)
        losses.append(1.5 / (1 + math.exp(x)) if row["label"] else 0.5 / (1 + math.exp(-x)))
    return {"kl": z0, "loss": np.mean(losses)}


def test_z0_and_loss_equal_plain_forwards(tiny, other, tokenizer, tmp_path):
    """Step 1 and the evaluation before it, either model as the reference: one of the two makes z0 > 0."""
    flags = {"desirable_loss_weight": 1.5, "undesirable_loss_weight": 0.5, "max_samples": 20, "max_len": 60}
    flags |= {"dataset": write_rows(tmp_path / "rows.jsonl", ROWS)}
    flags |= {"eval_dataset": write_rows(tmp_path / "eval.jsonl", ROWS[30:])}
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
    cases = [
        ([*ROWS[:3], {**ROWS[3], "label": x}], "bad.jsonl:4: its label") for x in ("good", None, 0.9, 2, "")
    ]
    for bad, words in [*cases, (ROWS[1:3], "2 desirable and 0")]:
        with pytest.raises(SystemExit):
            run(pretrain=tiny, dataset=write_rows(tmp_path / "bad.jsonl", bad), save_path=str(tmp_path / "x"))
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["text", "hh-rlhf", "sampled"])
def test_a_pair_becomes_two_rows(kind, tiny, tokenizer, tmp_path):
    pair = {"prompt": "Say it.\n", "chosen": "red river", "rejected": "old stone"}
    responses = [pair["chosen"] + "<eos>", pair["rejected"] + "<eos>"]
    if kind == "hh-rlhf":
        pair = {key: f"\n\nHuman: Say it.\n\nAssistant:{pair[key]}" for key in ("chosen", "rejected")}
    if kind == "sampled":  # what the sampler cut is trained without EOS
        pair["rejected_finish_reason"] = "length"
        responses[1] = pair["rejected"]
    data = write_rows(tmp_path / "pairs.jsonl", [pair] * 3)
    args = kto.Args(pretrain=tiny, dataset=data, cache_dir=str(tmp_path))
    table = kto.load_examples(data, None, "train", tokenizer, args)
    assert table["desirable"] == [True, False] * 3 and len(set(table["prompt_hash"])) == 1
    found = [example["input_ids"][example["trained"]] for example in kto.fetch(table, [0, 1])]
    assert [tokenizer.decode(ids) for ids in found] == responses


def test_resumed_is_bit_identical(tiny, tmp_path, monkeypatch):
    flags = {"pretrain": tiny, "dataset": write_rows(tmp_path / "rows.jsonl", ROWS)}
    flags |= {"max_epochs": 2, "save_steps": 4}
    run(**flags, save_path=str(tmp_path / "whole"))
    monkeypatch.setattr(kto, "console_line", lambda step, *_: "" if step < 6 else sys.exit("killed"))
    with pytest.raises(SystemExit, match="killed"):
        run(**flags, save_path=str(tmp_path / "cut"))
    monkeypatch.undo()
    run(**flags, save_path=str(tmp_path / "cut"))
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert one == two


TRL = """
import json, sys
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import KTOConfig, KTOTrainer
folder, cases, rows = json.loads(sys.argv[1])
for policy, reference, options, name in cases:
    model, ref = (AutoModelForCausalLM.from_pretrained(path, dtype="float32") for path in (policy, reference))
    args = KTOConfig(output_dir=f"{folder}/out", per_device_train_batch_size=8, max_steps=1, logging_steps=1,
                     max_length=512, use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False,
                     disable_tqdm=True, save_strategy="no", **options)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    trainer = KTOTrainer(model, ref, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    json.dump(trainer.state.log_history[0], open(f"{folder}/{name}.json", "w"))
"""


def test_equals_trl(tiny, other, tmp_path):
    """The first step of TRL's KTOTrainer on 8 rows. It takes y' from the row before: it gets our order backwards."""
    pytest.importorskip("trl", reason="trl is not installed: pip install trl==1.16.0 accelerate")
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    cases = [(tiny, other, weights, "kto"), (tiny, other, {"loss_type": "apo_zero_unpaired"}, "apo")]
    ours = [{"desirable_loss_weight": 1.5, "undesirable_loss_weight": 0.5}, {"apo_zero_unpaired": True}]
    backwards = [ROWS[i] for i in np.random.default_rng(42).permutation(8)[::-1]]
    command = ["env", "-u", "RANK", "-u", "WORLD_SIZE", "-u", "LOCAL_RANK", sys.executable, "-c", TRL]
    subprocess.run([*command, json.dumps([str(tmp_path), cases, backwards])], check=True, timeout=600)
    paths = {"dataset": write_rows(tmp_path / "rows.jsonl", ROWS[:8]), "max_len": 512}
    for (policy, reference, _, name), flags in zip(cases, ours):
        paths |= {"pretrain": policy, "ref_pretrain": reference, "save_path": str(tmp_path / name)}
        (found,) = run(**paths, **flags)
        theirs = json.loads((tmp_path / f"{name}.json").read_text())
        for key in ("loss", "kl", "grad_norm", "rewards/chosen", "rewards/rejected", "logps/chosen"):
            assert found[key] == pytest.approx(theirs[key], abs=1e-4, rel=1e-5), (name, key)

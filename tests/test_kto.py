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
    "micro8-zero2": {},
    "micro1-zero3": {"micro_train_batch_size": 1, "zero_stage": 3},
    "micro2-checkpointing-zero1": {
        "micro_train_batch_size": 2,
        "gradient_checkpointing": True,
        "zero_stage": 1,
    },
    "packing-zero0": {"micro_train_batch_size": 3, "packing_samples": True, "zero_stage": 0},
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})


@pytest.fixture(scope="module")
def rows():
    """50 rows, 17 of them undesirable."""
    made = enumerate(make_rows(50, seed=3))
    return [{"prompt": x["input"], "completion": x["output"], "label": i % 3 != 0} for i, x in made]


@pytest.fixture(scope="module")
def labelled(rows, tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("kto") / "rows.jsonl", rows)


@pytest.fixture(scope="module")
def other(tokenizer, tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("other") / "other", tokenizer, initializer_range=0.15)


def run(**flags):
    flags.setdefault("cache_dir", f"{flags['save_path']}.cache")
    kto.main(kto.Args(**{**SETTINGS, **flags}))
    return read_metrics(flags["save_path"])


def read_metrics(folder):
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def test_loss_of_six_rows_by_hand():
    r, good = [0.5, -1.0, 2.0, 0.3, -0.7, 0.0], [True, True, True, False, False, False]
    expected = []
    for value, desirable in zip(r, good):
        x = 0.1 * (value - 0.25) * (1 if desirable else -1)
        expected.append((1.5 if desirable else 0.5) * (1 - 1 / (1 + math.exp(-x))))
    args = (torch.tensor(r, dtype=torch.float64), torch.tensor(good), torch.tensor(0.25), 0.1, 1.5, 0.5)
    assert torch.allclose(kto.kto_loss(*args), torch.tensor(expected, dtype=torch.float64), atol=1e-6)
    apo = kto.kto_loss(args[0], args[1], torch.zeros(()), 0.1, 1.0, 1.0)
    sigmoid = torch.sigmoid(0.1 * args[0])
    assert torch.allclose(apo, torch.where(args[1], 1 - sigmoid, sigmoid))


def next_other(prompts, seed):
    """The rule of the partners, in plain words: walk on through the permutation until the prompt is another."""
    order = np.random.default_rng(seed).permutation(len(prompts)).tolist()
    partners = {}
    for i, row in enumerate(order):
        behind = order[i + 1 :] + order[: i + 1]
        partners[row] = next((j for j in behind if prompts[j] != prompts[row]), behind[0])
    return [partners[row] for row in range(len(order))]


@pytest.mark.parametrize("n_prompts", [1, 2, 3, 40])
def test_partner_is_the_next_row_with_another_prompt(n_prompts):
    prompts = np.random.default_rng(1).integers(0, n_prompts, 40)
    assert kto.choose_partners(prompts, 7).tolist() == next_other(prompts, 7)


def test_order_spreads_both_classes():
    desirable = np.arange(60) < 10
    order = kto.balanced_order(np.random.default_rng(0).permutation(60), desirable)
    assert sorted(order) == list(range(60))
    assert [desirable[order[i : i + 12]].sum() for i in range(0, 60, 12)] == [2] * 5


def test_splits_give_the_same_steps(tiny, labelled, tmp_path):
    """Micro-batch, packing, ZeRO stage, checkpointing, 1 and 2 ranks: loss, z0 and gradient norm of 3 steps."""
    runs, configs = {}, []
    for name, changes in SPLITS.items():
        flags = {"pretrain": tiny, "dataset": labelled, "cache_dir": str(tmp_path / "cache"), **changes}
        runs[name] = run(**flags, save_path=str(tmp_path / name))
        configs.append({**SETTINGS, **flags, "save_path": str(tmp_path / f"two-{name}")})
    (tmp_path / "configs.json").write_text(json.dumps(configs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch = str(Path(__file__).parent / "launch.py")
    subprocess.run([*command, launch, "kto", str(tmp_path / "configs.json")], check=True, timeout=300)
    runs |= {f"two-{name}": read_metrics(tmp_path / f"two-{name}") for name in SPLITS}
    first = runs["micro8-zero2"]
    assert len(first) == 3 and abs(first[0]["loss"] - 0.5) < 1e-6 and first[0]["kl"] == 0.0
    assert first[1]["kl"] > 1e-3  # else z0 is not tested
    for name, steps in runs.items():
        for step, known in zip(steps, first, strict=True):
            for key in ("loss", "kl", "grad_norm", "rewards/margins", "logps/chosen"):
                assert step[key] == pytest.approx(known[key], rel=1e-5, abs=1e-5), (name, key)


def plain_metrics(rows, models, tokenizer, max_len, weights=(1.5, 0.5)):
    """z0 and loss of all rows as one step, each sequence alone through Hugging Face's own forward."""
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in models]

    def ratio(row, response):
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = prompt + tokenizer(response)["input_ids"] + [tokenizer.eos_token_id]
        ids = torch.tensor([ids[:max_len]])
        with torch.no_grad():
            logps = [model(input_ids=ids).logits[0, :-1].log_softmax(-1) for model in models]
        policy, reference = (x.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum().item() for x in logps)
        return policy - reference

    partners = next_other([row["prompt"] for row in rows], seed=42)
    z0 = max(0.0, np.mean([ratio(row, rows[j]["completion"]) for row, j in zip(rows, partners)]))
    losses = []
    for row in rows:
        x = 0.1 * (ratio(row, row["completion"]) - z0)
        losses.append(weights[0] / (1 + math.exp(x)) if row["label"] else weights[1] / (1 + math.exp(-x)))
    return {"kl": z0, "loss": np.mean(losses)}


def test_z0_and_loss_equal_plain_forwards(tiny, other, tokenizer, rows, labelled, tmp_path):
    """Step 1, and the evaluation before it, under another model as the reference: one of the two makes z0 > 0."""
    held_out = write_rows(tmp_path / "eval.jsonl", rows[30:])
    flags = {"desirable_loss_weight": 1.5, "undesirable_loss_weight": 0.5, "eval_dataset": held_out}
    flags |= {"dataset": labelled, "max_samples": 20, "max_len": 60}
    z0s = []
    for i, models in enumerate([(tiny, other), (other, tiny)]):
        paths = {"pretrain": models[0], "ref_pretrain": models[1], "save_path": str(tmp_path / f"m{i}")}
        before, first = run(**paths, **flags)[:2]
        for name, value in plain_metrics(rows[:20], models, tokenizer, 60).items():
            assert first[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
        for name, value in plain_metrics(rows[30:], models, tokenizer, 60).items():
            assert before[f"eval/{name}"] == pytest.approx(value, rel=1e-5, abs=1e-5), name
        z0s.append(first["kl"])
    assert max(z0s) > 1 and min(z0s) == 0


def test_labels_are_read_strictly(tiny, rows, tmp_path, capsys):
    assert all(kto.read_label(value) is True for value in (True, 1, 1.0, "True", "true", "1"))
    assert not any(kto.read_label(value) for value in (False, 0, 0.0, "False", "false", "0"))
    for value in ("yes", None, 0.9, 2, "", "good"):
        with pytest.raises(ValueError, match="label"):
            kto.read_label(value)
    doubtful = rows[:3] + [{**rows[3], "label": "good"}]
    for bad, words in ((doubtful, "bad.jsonl:4: its label"), (rows[1:3], "2 desirable and 0")):
        with pytest.raises(SystemExit) as e:
            run(pretrain=tiny, dataset=write_rows(tmp_path / "bad.jsonl", bad), save_path=str(tmp_path / "x"))
        assert e.value.code == 2 and words in capsys.readouterr().err


USER, GOOD, BAD = "Say it.\n", "red river", "old stone"
PAIRS = {
    "text": {"prompt": USER, "chosen": GOOD, "rejected": BAD},
    "hh-rlhf": {
        f"{k}": f"\n\nHuman: {USER}\n\nAssistant:{y}" for k, y in (("chosen", GOOD), ("rejected", BAD))
    },
    "batch_infer.py": {"prompt": USER, "chosen": GOOD, "rejected": BAD, "rejected_finish_reason": "length"},
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_becomes_two_rows(name, tiny, tokenizer, tmp_path):
    data = write_rows(tmp_path / "pairs.jsonl", [PAIRS[name]] * 3)
    args = kto.Args(pretrain=tiny, dataset=data, cache_dir=str(tmp_path))
    table = kto.load_examples(data, None, "train", tokenizer, args)
    assert table["desirable"] == [True, False] * 3 and len(set(table["prompt_hash"])) == 1
    for example, response in zip(kto.fetch(table, [0, 1]), (GOOD, BAD)):
        text = tokenizer.decode(example["input_ids"][example["trained"]])
        cut = name == "batch_infer.py" and response == BAD
        assert text == response + ("" if cut else "<eos>")


def test_resumed_is_bit_identical(tiny, labelled, tmp_path, monkeypatch):
    flags = {"pretrain": tiny, "dataset": labelled, "max_epochs": 2, "save_steps": 2}
    whole = run(**flags, save_path=str(tmp_path / "whole"))
    save = kto.save_checkpoint

    def save_and_die(engine, args, step, identity):
        save(engine, args, step, identity)
        raise KeyboardInterrupt

    monkeypatch.setattr(kto, "save_checkpoint", save_and_die)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(**flags, save_path=str(tmp_path / "killed"))
    monkeypatch.undo()
    killed = run(**flags, save_path=str(tmp_path / "killed"))
    assert [step["loss"] for step in killed] == [step["loss"] for step in whole]
    assert (tmp_path / "killed/model.safetensors").read_bytes() == (
        tmp_path / "whole/model.safetensors"
    ).read_bytes()


TRL = """
import json, sys
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import KTOConfig, KTOTrainer
folder = sys.argv[1]
cases, rows = (json.load(open(f"{folder}/{name}.json")) for name in ("cases", "rows"))
logs = {}
for name, (policy, reference, options) in cases.items():
    model, ref = (AutoModelForCausalLM.from_pretrained(path, dtype="float32") for path in (policy, reference))
    args = KTOConfig(output_dir=f"{folder}/out", per_device_train_batch_size=8, max_steps=1, logging_steps=1,
                     max_length=512, use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False,
                     disable_tqdm=True, save_strategy="no", **options)
    trainer = KTOTrainer(model, ref, args=args, train_dataset=Dataset.from_list(rows),
                         processing_class=AutoTokenizer.from_pretrained(policy))
    trainer.train()
    logs[name] = trainer.state.log_history[0]
json.dump(logs, open(f"{folder}/logs.json", "w"))
"""


def test_equals_trl(tiny, other, rows, tmp_path):
    """The first step of TRL's KTOTrainer on 8 rows: it takes y' from the row before, so it gets our order backwards."""
    pytest.importorskip("trl", reason="trl is not installed: pip install trl==1.16.0 accelerate")
    backwards = np.random.default_rng(42).permutation(8)[::-1]
    (tmp_path / "rows.json").write_text(json.dumps([rows[i] for i in backwards]))
    weights = {"desirable_loss_weight": 1.5, "undesirable_loss_weight": 0.5}
    cases = {  # name: (TRL's policy, reference, options; our flags)
        "kto": (tiny, other, {}, {}),
        "the reference is better": (other, tiny, {}, {}),
        "weights": (tiny, other, {"desirable_weight": 1.5, "undesirable_weight": 0.5}, weights),
        "apo": (tiny, other, {"loss_type": "apo_zero_unpaired"}, {"apo_zero_unpaired": True}),
    }
    (tmp_path / "cases.json").write_text(json.dumps({name: case[:3] for name, case in cases.items()}))
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, "-c", TRL, str(tmp_path)]
    subprocess.run(command, check=True, env=environment, timeout=600)
    logs = json.loads((tmp_path / "logs.json").read_text())
    data = write_rows(tmp_path / "rows.jsonl", rows[:8])
    for name, (policy, reference, _, flags) in cases.items():
        paths = {
            "pretrain": policy,
            "ref_pretrain": reference,
            "dataset": data,
            "save_path": str(tmp_path / name),
        }
        (ours,) = run(**paths, max_len=512, **flags)
        for key in ("loss", "kl", "grad_norm", "rewards/chosen", "rewards/rejected", "logps/chosen"):
            assert ours[key] == pytest.approx(logs[name][key], abs=1e-4, rel=1e-5), (name, key)

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
from transformers import AutoModelForCausalLM, AutoTokenizer

kto = load_script("kto")
SETTINGS = {"bf16": False, "train_batch_size": 20, "learning_rate": 1e-3, "lr_scheduler": "constant"}
SETTINGS |= {"lr_warmup_ratio": 0.0, "max_len": 100, "max_samples": 50}
SPLITS = {
    "micro8": {},
    "micro1": {"micro_train_batch_size": 1},
    "micro3-zero3": {"micro_train_batch_size": 3, "zero_stage": 3},
    "packing-zero1": {"micro_train_batch_size": 3, "packing_samples": True, "zero_stage": 1},
    "checkpointing-zero0": {"gradient_checkpointing": True, "zero_stage": 0},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    cores, os.sched_getaffinity = os.sched_getaffinity, lambda pid: {0}
    yield
    os.sched_getaffinity = cores


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """50 rows, 17 of them undesirable."""
    rows = [
        {"prompt": row["input"], "completion": row["output"], "label": i % 3 != 0}
        for i, row in enumerate(make_rows(50, seed=3))
    ]
    return write_rows(tmp_path_factory.mktemp("kto") / "rows.jsonl", rows)


def run(**flags):
    kto.main(kto.Args(**{**SETTINGS, **flags}))
    lines = (Path(flags["save_path"]) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_loss_of_six_rows_by_hand():
    r, good = [0.5, -1.0, 2.0, 0.3, -0.7, 0.0], [True, True, True, False, False, False]
    expected = []
    for value, desirable in zip(r, good, strict=True):
        x = 0.1 * (value - 0.25) * (1 if desirable else -1)
        expected.append((1.5 if desirable else 0.5) * (1 - 1 / (1 + math.exp(-x))))
    args = (torch.tensor(r, dtype=torch.float64), torch.tensor(good), torch.tensor(0.25), 0.1, 1.5, 0.5)
    assert torch.allclose(kto.kto_loss(*args), torch.tensor(expected, dtype=torch.float64), atol=1e-6)
    apo = kto.kto_loss(args[0], args[1], torch.zeros(()), 0.1, 1.0, 1.0)
    sigmoid = torch.sigmoid(0.1 * args[0])
    assert torch.allclose(apo, torch.where(args[1], 1 - sigmoid, sigmoid))


def test_mismatched_is_never_the_own_response_while_there_is_another():
    def tree(i, response):
        ids = np.array(response, dtype=np.int32)
        trained = [np.ones(len(ids), bool)]
        return {"prompt": np.array([i], np.int32), "responses": [ids], "trained": trained, "where": str(i)}

    batch = [tree(0, [5, 6]), tree(1, [5, 6]), tree(2, [7]), tree(3, [5, 6])]
    found = [pair["responses"][0].tolist() for pair in kto.mismatched(batch, max_len=10)]
    assert found == [[7], [7], [5, 6], [7]]
    assert [len(pair["responses"][0]) for pair in kto.mismatched(batch, max_len=2)] == [1, 1, 1, 1]  # room of 1 token
    assert kto.mismatched(batch[:2], 10)[0]["responses"][0].tolist() == [5, 6]  # there is no other


def test_order_spreads_both_classes(labelled):
    trees = [{"label": i < 10, "prompt": [0] * (i == 30), "responses": []} for i in range(60)]
    for epoch in range(3):
        order = kto.epoch_order(trees, 42, epoch)
        assert sorted(order) == list(range(60))
        assert all(0 < sum(trees[i]["label"] for i in order[b : b + 12]) < 12 for b in range(0, 60, 12))
    assert list(kto.epoch_order(trees, 42, 0)) != list(kto.epoch_order(trees, 42, 1))


def order_of(rows, tokenizer):
    """The order in which kto.py's first epoch takes the rows."""
    ids = [tokenizer(row["prompt"] + row["completion"])["input_ids"] for row in rows]
    trees = [{"label": row["label"], "prompt": i, "responses": []} for row, i in zip(rows, ids, strict=True)]
    return kto.epoch_order(trees, 42, 0)


def test_splits_give_the_same_steps(tiny, labelled, tmp_path):
    """Micro-batch, packing, ZeRO stage, checkpointing, 1 and 2 ranks: loss, z0 and gradient norm of 3 steps to 1e-5."""
    runs, configs = {}, []
    for name, changes in SPLITS.items():
        flags = {"pretrain": tiny, "dataset": labelled, "cache_dir": str(tmp_path / "cache"), **changes}
        runs[name] = run(**flags, save_path=str(tmp_path / name))
        configs.append({**SETTINGS, **flags, "save_path": str(tmp_path / f"two-{name}")})
    (tmp_path / "configs.json").write_text(json.dumps(configs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch = str(Path(__file__).parent / "launch.py")
    subprocess.run([*command, launch, "kto", str(tmp_path / "configs.json")], check=True, timeout=300)
    for name in SPLITS:
        lines = (tmp_path / f"two-{name}" / "metrics.jsonl").read_text().splitlines()
        runs[f"two-{name}"] = [json.loads(line) for line in lines]
    first = runs["micro8"]
    assert len(first) == 3 and abs(first[0]["loss"] - 0.5) < 1e-6 and first[0]["kl"] == 0.0
    assert first[1]["kl"] > 1e-3  # else z0 is not tested
    for name, steps in runs.items():
        for step, known in zip(steps, first, strict=True):
            for key in ("loss", "kl", "grad_norm", "rewards/margins"):
                assert abs(step[key] - known[key]) <= 1e-5 * max(1, abs(known[key])), (name, key)


def test_z0_and_loss_equal_plain_forwards(tiny, tokenizer, labelled, tmp_path):
    """With another model as the reference, z0 and the loss of step 1 are not trivial: compute them with plain forwards."""
    other = make_model(tmp_path / "other", tokenizer, initializer_range=0.15)
    # a reference that is worse than the policy on the mismatched responses makes z0 > 0; one of the two orders does
    for policy, reference in ((tiny, other), (other, tiny)):
        flags = {"pretrain": policy, "ref_pretrain": reference, "dataset": labelled, "max_samples": 20}
        flags |= {"desirable_loss_weight": 1.5, "undesirable_loss_weight": 0.5}
        found = run(**flags, cache_dir=str(tmp_path / "c"), save_path=str(tmp_path / f"m-{Path(policy).name}"))[0]
        tok = AutoTokenizer.from_pretrained(tiny)
        rows = [json.loads(line) for line in Path(labelled).read_text().splitlines()][:20]
        rows = [rows[i] for i in order_of(rows, tokenizer)]
        models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (policy, reference)]

        def ratio(prompt, response, models=models, tok=tok):
            p, y = tok(prompt)["input_ids"], tok(response)["input_ids"] + [tok.eos_token_id]
            ids = torch.tensor([(p + y)[:100]])
            with torch.no_grad():
                logps = [m(input_ids=ids).logits[0, :-1].log_softmax(-1) for m in models]
            sums = [lp.gather(1, ids[0, 1:, None])[len(p) - 1 :].sum().item() for lp in logps]
            return sums[0] - sums[1]

        responses = [row["completion"] for row in rows]
        kl = np.mean([ratio(row["prompt"], responses[(i + 1) % 20]) for i, row in enumerate(rows)])
        kl, loss = max(0.0, kl), 0.0
        for row in rows:
            x = 0.1 * (ratio(row["prompt"], row["completion"]) - kl) * (1 if row["label"] else -1)
            loss += (1.5 if row["label"] else 0.5) * (1 - 1 / (1 + math.exp(-x))) / 20
        assert abs(found["kl"] - kl) < 1e-4 * max(1, kl) and abs(found["loss"] - loss) < 1e-5


def test_labels_are_read_strictly(tiny, tmp_path, capsys):
    for value in (True, 1, 1.0, "True", "true", "1"):
        assert kto.read_label(value, "") is True
    for value in (False, 0, 0.0, "False", "false", "0"):
        assert kto.read_label(value, "") is False
    for value in ("yes", None, 0.9, 2, "", "good"):
        rows = [{"prompt": "a", "completion": "b", "label": True}, {"prompt": "a", "completion": "c", "label": value}]
        file = write_rows(tmp_path / "bad.jsonl", rows)
        with pytest.raises(SystemExit) as e:
            run(pretrain=tiny, dataset=file, save_path=str(tmp_path / "x"))
        message = capsys.readouterr().err
        assert e.value.code == 2 and f"{file}:2" in message and repr(value) in message
    one_sided = write_rows(tmp_path / "one.jsonl", rows[:1] * 4)
    with pytest.raises(SystemExit):
        run(pretrain=tiny, dataset=one_sided, save_path=str(tmp_path / "x"))
    assert "KTO needs both" in capsys.readouterr().err and not (tmp_path / "x.partial").exists()


def test_pairs_become_two_rows(tiny, tmp_path, capsys):
    rows = [{"prompt": r["input"], "chosen": r["output"], "rejected": "no."} for r in make_rows(8)]
    flags = {"pretrain": tiny, "dataset": write_rows(tmp_path / "pairs.jsonl", rows), "train_batch_size": 16}
    steps = run(**flags, save_path=str(tmp_path / "m"), cache_dir=str(tmp_path / "c"))
    assert "8 desirable, 8 undesirable" in capsys.readouterr().out and len(steps) == 1
    assert abs(steps[0]["loss"] - 0.5) < 1e-6 and steps[0]["desirable"] == pytest.approx(0.5)
    rows = [{**row, "chosen_finish_reason": "length", "rejected_finish_reason": "stop"} for row in rows]  # of batch_infer.py
    flags["dataset"] = write_rows(tmp_path / "pairs.jsonl", rows)
    run(**flags, save_path=str(tmp_path / "m2"), cache_dir=str(tmp_path / "c"))
    assert "50% end in EOS" in capsys.readouterr().out  # what was cut is trained without


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


def test_equals_trl(tiny, tokenizer, labelled, tmp_path):
    """The first step of TRL's KTOTrainer on 8 rows that are one micro-batch there; either model as the reference.

    TRL keeps the rows' order and takes y' from the row before, we shuffle and take the row behind: so it gets
    our order backwards.
    """
    pytest.importorskip("trl", reason="trl is not installed: pip install trl==1.16.0 accelerate")
    other = make_model(tmp_path / "other", tokenizer, initializer_range=0.15)
    rows = [json.loads(line) for line in Path(labelled).read_text().splitlines()][:8]
    (tmp_path / "rows.json").write_text(json.dumps([rows[i] for i in order_of(rows, tokenizer)[::-1]]))
    weights, flags = {"desirable_weight": 1.5, "undesirable_weight": 0.5}, {}
    flags |= {"desirable_loss_weight": 1.5, "undesirable_loss_weight": 0.5}
    apo = {"loss_type": "apo_zero_unpaired"}
    cases = {  # name: (TRL's policy, reference, options; our flags)
        "kto": (tiny, other, {}, {}),
        "the reference is better": (other, tiny, {}, {}),
        "weights": (tiny, other, weights, flags),
        "apo": (tiny, other, apo, {"apo_zero_unpaired": True}),
    }
    (tmp_path / "cases.json").write_text(json.dumps({name: case[:3] for name, case in cases.items()}))
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, "-c", TRL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    logs, kls = json.loads((tmp_path / "logs.json").read_text()), []
    for name, (policy, reference, _, flags) in cases.items():
        paths = {"pretrain": policy, "ref_pretrain": reference, "cache_dir": str(tmp_path / "cache")}
        rest = {"max_samples": 8, "train_batch_size": 8, "max_len": 512, "save_path": str(tmp_path / name)}
        (ours,) = run(**paths, dataset=labelled, **rest, **flags)
        kls.append(ours["kl"])
        for key in ("loss", "kl", "grad_norm", "rewards/chosen", "rewards/rejected", "logps/chosen"):
            error = 1e-5 if key in ("loss", "rewards/chosen", "rewards/rejected") else 1e-4  # kl, logps: sums
            assert ours[key] == pytest.approx(logs[name][key], abs=error, rel=1e-5), (name, key)
    assert max(kls[:2]) > 1 and min(kls[:2]) == 0  # z0 counts, and is clamped

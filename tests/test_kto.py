"""kto.py against hand-computed values and plain Hugging Face forwards; the same steps however a batch is split."""

import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import launch, make_labelled, metrics_of, train, write_rows
from first_step_of_trl import first_steps
from launch import load_script
from transformers import AutoModelForCausalLM

kto = load_script("kto")
run = functools.partial(train, kto)
SPLITS = {
    "micro8": {},
    "micro1-zero3": {"micro_train_batch_size": 1, "zero_stage": 3, "gradient_checkpointing": True},
    "packing-zero0": {"micro_train_batch_size": 3, "packing_samples": True, "zero_stage": 0},
}
ROWS = make_labelled(50, seed=3)


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
    """Micro-batch, packing, ZeRO stage, checkpointing, 1 and 2 ranks: 3 steps, the last of 2 rows."""
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    paths = {"pretrain": tiny, "dataset": data, "cache_dir": str(tmp_path)}
    configs = [{**paths, **flags, "save_path": str(tmp_path / f"2-{name}")} for name, flags in SPLITS.items()]
    launch("kto", configs, tmp_path)
    runs = [metrics_of(config["save_path"]) for config in configs]
    runs += [run(**paths, **flags, save_path=str(tmp_path / name)) for name, flags in SPLITS.items()]
    first = runs[0]
    assert abs(first["loss"][0] - 0.5) < 1e-6 and first["kl"][0] == 0 and first["kl"][1] > 1e-3
    for found in runs:
        for key in ("loss", "kl", "grad_norm", "rewards/margins", "logps/chosen"):
            assert found[key] == pytest.approx(first[key], rel=1e-5, abs=1e-5), key


def plain_metrics(rows, models, tokenizer):
    """What kto.py should log for all rows as one step, each sequence alone through Hugging Face's own forward."""
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
    rewards = [0.1 * ratio(row, row["completion"]) for row in rows]
    h = [reward - 0.1 * z0 for reward in rewards]
    signs = [(1.5, 1) if row["label"] else (0.5, -1) for row in rows]
    losses = [weight / (1 + math.exp(sign * x)) for (weight, sign), x in zip(signs, h)]
    good, bad = ([r for r, row in zip(rewards, rows) if row["label"] == label] for label in (True, False))
    means = {"rewards/chosen": np.mean(good), "rewards/rejected": np.mean(bad)}
    return {"kl": z0, "loss": np.mean(losses), **means, "rewards/margins": np.mean(good) - np.mean(bad)}


def test_z0_and_loss_equal_plain_forwards(tiny, other, tokenizer, tmp_path):
    """Step 1 and the evaluation before it, either model as the reference: one of the two makes z0 > 0."""
    flags = {"desirable_loss_weight": 1.5, "undesirable_loss_weight": 0.5, "max_samples": 20, "max_len": 60}
    flags["dataset"] = write_rows(tmp_path / "rows.jsonl", ROWS)
    flags["eval_dataset"] = write_rows(tmp_path / "eval.jsonl", ROWS[30:])
    z0s = []
    for i, models in enumerate([(tiny, other), (other, tiny)]):
        paths = {"pretrain": models[0], "ref_pretrain": models[1], "save_path": str(tmp_path / f"m{i}")}
        found = run(**paths, **flags)
        z0s += found["kl"]
        for prefix, rows in (("", ROWS[:20]), ("eval/", ROWS[30:])):
            for name, value in plain_metrics(rows, models, tokenizer).items():
                assert found[prefix + name][0] == pytest.approx(value, rel=1e-5, abs=1e-5), prefix + name
    assert max(z0s) > 1 and min(z0s) == 0


def test_labels_are_read_strictly(tiny, tokenizer, tmp_path, capsys):
    labels = (True, 1, 1.0, "True", "true", "1", False, 0, 0.0, "False", "false", "0")
    args = kto.Args(pretrain="", dataset="")
    found = [kto.encode_labelled({**ROWS[0], "label": label}, tokenizer, args) for label in labels]
    assert [example["desirable"] for (example,) in found] == [True] * 6 + [False] * 6
    for label in ("good", 0.9):
        bad = [ROWS[1], {**ROWS[2], "label": label}]
        with pytest.raises(SystemExit):
            run(pretrain=tiny, dataset=write_rows(tmp_path / "bad.jsonl", bad), save_path=str(tmp_path / "x"))
        assert "bad.jsonl:2: its label" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["sampled", "hh-rlhf"])
def test_a_pair_becomes_two_rows(kind, tokenizer):
    prompt, end = ("", "") if kind == "sampled" else ("\n\nHuman: Say it.\n\nAssistant:", "<eos>")
    pair = {"chosen": f"{prompt}red river", "rejected": f"{prompt}old stone"}
    if kind == "sampled":  # what the sampler cut is trained without EOS
        pair |= {"prompt": "Say it.\n", "rejected_finish_reason": "length"}
        pair |= {"prompt": "not this", "asked": pair["prompt"]}
    flags = {"input_key": "asked"} if kind == "sampled" else {}
    good, bad = kto.encode_labelled(pair, tokenizer, kto.Args(pretrain="", dataset="", **flags))
    assert (good["desirable"], bad["desirable"]) == (True, False) and good["prompt_hash"] == bad["prompt_hash"]
    found = [example["input_ids"][example["trained"]] for example in (good, bad)]
    assert [tokenizer.decode(ids) for ids in found] == ["red river<eos>", f"old stone{end}"]


def test_a_sampled_row_has_its_prompt_in_input(tokenizer):
    row = {"prompt": "red?", "input": "Say red.\n", "output": "river", "finish_reason": "stop", "label": 1}
    (example,) = kto.encode_labelled(row, tokenizer, kto.Args(pretrain="", dataset=""))
    assert tokenizer.decode(example["input_ids"]) == "Say red.\nriver<eos>"


def test_equals_trl(tiny, other, tmp_path):
    """TRL takes y' from the row before: it gets our order backwards."""
    backwards = [ROWS[i] for i in np.random.default_rng(42).permutation(8)[::-1]]
    data = write_rows(tmp_path / "backwards.jsonl", backwards)
    log = first_steps("KTO", tiny, other, data, {"kto": {"desirable_weight": 1.5}})["kto"]
    paths = {"pretrain": tiny, "ref_pretrain": other, "save_path": str(tmp_path / "out")}
    paths["dataset"] = write_rows(tmp_path / "rows.jsonl", ROWS[:8])
    found = run(**paths, desirable_loss_weight=1.5, max_len=512)
    for key in ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "logps/chosen", "kl"):
        assert found[key] == pytest.approx([log[key]], abs=1e-4, rel=1e-5), key

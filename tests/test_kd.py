"""kd.py: divergences against float64, top-k table against the live teacher, splits, and what the two KLs do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_rows, make_tokenizer, write_rows
from launch import load_script
from transformers import AutoModelForCausalLM

kd, sft = load_script("kd"), load_script("sft")
SETTINGS = {"bf16": False, "train_batch_size": 20, "learning_rate": 1e-3, "lr_scheduler": "constant"}
SETTINGS |= {"lr_warmup_ratio": 0.0, "max_len": 100, "max_samples": 50}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    cores, os.sched_getaffinity = os.sched_getaffinity, lambda pid: {0}
    yield
    os.sched_getaffinity = cores


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("kd") / "rows.jsonl", make_rows(50, seed=5))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, tokenizer):
    """A teacher that is wider than the student, its vocabulary padded further."""
    sizes = {"hidden_size": 96, "initializer_range": 0.2}
    folder = make_model(tmp_path_factory.mktemp("teacher") / "t", tokenizer, **sizes)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(576, mean_resizing=False)
    model.save_pretrained(folder)
    return folder


def read_metrics(save_path):
    return [json.loads(line) for line in Path(save_path, "metrics.jsonl").read_text().splitlines()]


def run(script=kd, **flags):
    script.main(script.Args(**{**SETTINGS, **flags}))
    return read_metrics(flags["save_path"])


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "skew"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_equals_float64(kind, temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 7, 300, dtype=torch.float64) * 3
    student.requires_grad_()
    p, q = ((x / temperature).softmax(1) for x in (teacher, student))
    kl = lambda a, b: (a * (a / b).log()).sum(1)  # noqa: E731
    m = (p + q) / 2
    known = {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": (kl(p, m) + kl(q, m)) / 2}
    known["skew"] = kl(p, 0.1 * p + 0.9 * q)
    wanted = known[kind].sum() * temperature**2
    wanted.backward()
    single = student.detach().float().requires_grad_()
    log_p, log_q = ((x.float() / temperature).log_softmax(1) for x in (teacher, single))
    found = temperature**2 * kd.divergence(log_p, log_q, kind).sum()
    found.backward()
    assert abs(found.item() - wanted.item()) < 1e-6 * wanted.item()
    assert (single.grad - student.grad).abs().max() < 1e-5


def test_teacher_equal_to_student_gives_zero(tiny, rows, tmp_path):
    for kind in ("forward_kl", "reverse_kl", "jsd", "skew"):
        flags = {"teacher_model": tiny, "kd_coef": 1.0, "kd_loss": kind, "max_samples": 20}
        step = run(pretrain=tiny, dataset=rows, save_path=str(tmp_path / kind), **flags)[0]
        assert abs(step["loss"]) < 1e-6 and step["grad_norm"] < 1e-6


def test_kd_coef_zero_is_sft(tiny, teacher, rows, tmp_path):
    flags = {"pretrain": tiny, "dataset": rows}
    ours = run(**flags, teacher_model=teacher, kd_coef=0.0, save_path=str(tmp_path / "kd"))
    theirs = run(sft, **flags, save_path=str(tmp_path / "sft"))
    for a, b in zip(ours, theirs, strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-6 and abs(a["grad_norm"] - b["grad_norm"]) < 1e-6


SPLITS = {
    "micro8": {},
    "micro1-zero0": {"micro_train_batch_size": 1, "zero_stage": 0},
    "zero3-checkpointing": {"zero_stage": 3, "micro_train_batch_size": 2, "gradient_checkpointing": True},
    "packing-zero1": {"packing_samples": True, "micro_train_batch_size": 2, "zero_stage": 1},
    "zero3-offload": {"zero_stage": 3, "teacher_offload": True},
    "topk": {"teacher_topk": 100_000},
    "topk-zero3": {"teacher_topk": 100_000, "zero_stage": 3, "micro_train_batch_size": 3},
}


def test_splits_and_topk_give_the_same_steps(tiny, teacher, rows, tmp_path):
    """Micro-batch, ZeRO stage, packing, ranks, teacher live or in a table (K = vocabulary): 3 steps to 1e-5."""
    base = {**SETTINGS, "pretrain": tiny, "teacher_model": teacher, "dataset": rows}
    base |= {"kd_temperature": 2.0, "kd_loss": "jsd"}
    launch = str(Path(__file__).parent / "launch.py")
    steps = {}
    for ranks in ("1", "2"):
        base["cache_dir"] = str(tmp_path / f"cache{ranks}")  # so that both write the table
        configs = [{**base, **SPLITS[name], "save_path": str(tmp_path / name / ranks)} for name in SPLITS]
        (tmp_path / "configs.json").write_text(json.dumps(configs))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks]
        subprocess.run([*command, launch, "kd", str(tmp_path / "configs.json")], check=True, timeout=600)
        steps |= {config["save_path"]: read_metrics(config["save_path"]) for config in configs}
    known = next(iter(steps.values()))
    assert len(known) == 3 and known[0]["kd_loss"] > 0.01
    for name, found in steps.items():
        for key in ("loss", "kd_loss", "ce_loss", "grad_norm"):
            wanted = [step[key] for step in known]
            assert [step[key] for step in found] == pytest.approx(wanted, rel=1e-5, abs=1e-5), (name, key)


@pytest.mark.parametrize("k", [3, 40])
def test_top_and_rest_equals_float64(k):
    """K tokens and the rest; with K = vocabulary no rest is left, and no gradient is NaN."""
    torch.manual_seed(0)
    logits = torch.randn(5, 40, requires_grad=True)
    ids = logits.topk(k, 1).indices
    found = kd.top_and_rest(logits, ids).exp()
    exact = logits.detach().double().requires_grad_()
    top = exact.softmax(1).gather(1, ids)
    wanted = torch.cat([top, 1 - top.sum(1, keepdim=True)], 1)
    assert torch.allclose(found.double(), wanted, atol=1e-6)
    found.square().sum().backward()
    wanted.square().sum().backward()
    assert torch.allclose(logits.grad.double(), exact.grad, atol=1e-6)


def test_topk_is_a_lower_bound_that_grows_with_k(tiny, teacher, rows, tmp_path, monkeypatch):
    flags = {"pretrain": tiny, "teacher_model": teacher, "dataset": rows, "cache_dir": f"{tmp_path}/cache"}
    runs = [run(**flags, teacher_topk=k, save_path=str(tmp_path / f"k{k}")) for k in (1, 16, 64, 0)]
    losses = [steps[0]["kd_loss"] for steps in runs]
    assert losses == sorted(losses) and losses[2] > 0.3 * losses[3]  # merging outcomes only hides divergence
    monkeypatch.delattr(kd, "start_teacher")  # a later run finds the table, and needs no teacher
    again = run(**flags, teacher_topk=64, learning_rate=2e-3, save_path=str(tmp_path / "again"))
    assert again[0]["kd_loss"] == losses[2]


def test_forward_kl_covers_modes_reverse_kl_picks_one():
    """A student that can only be one bump, on a teacher with two: the textbook picture of the two divergences."""
    x = torch.linspace(-6, 6, 200)
    log_p = torch.logsumexp(torch.stack([-((x - 3) ** 2) * 2, -((x + 3) ** 2) * 2]), 0).log_softmax(0)[None]
    spread = {}
    for kind in ("forward_kl", "reverse_kl"):
        mean, log_std = torch.tensor(1.5, requires_grad=True), torch.tensor(0.0, requires_grad=True)
        optimizer = torch.optim.Adam([mean, log_std], lr=0.05)
        for _ in range(600):
            log_q = (-((x - mean) ** 2) / (2 * log_std.exp() ** 2)).log_softmax(0)[None]
            loss = kd.divergence(log_p, log_q, kind).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        spread[kind] = (mean.item(), log_std.exp().item())
    assert abs(spread["forward_kl"][0]) < 0.2 and spread["forward_kl"][1] > 2.5  # between the modes, wide
    assert abs(spread["reverse_kl"][0] - 3) < 0.2 and spread["reverse_kl"][1] < 0.8  # on one mode, narrow


def test_another_tokenizer_stops(tiny, rows, tmp_path, capsys):
    folder = make_model(tmp_path / "t", make_tokenizer(vocab_size=290))
    with pytest.raises(SystemExit) as e:
        run(pretrain=tiny, teacher_model=folder, dataset=rows, save_path=str(tmp_path / "x"))
    message = capsys.readouterr().err
    assert e.value.code == 2 and "another tokenizer" in message and message.count("\n") == 1

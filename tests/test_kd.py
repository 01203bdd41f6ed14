"""kd.py: divergences against float64, top-k table against the live teacher, splits."""

import functools
from types import SimpleNamespace

import pytest
import torch
from conftest import SETTINGS, launch, make_model, make_rows, make_tokenizer, metrics_of, train, write_rows
from launch import load_script
from transformers import AutoModelForCausalLM, AutoTokenizer

kd, sft = load_script("kd"), load_script("sft")
run = functools.partial(train, kd)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, tokenizer):
    """A teacher that is wider than the student, its vocabulary padded further."""
    sizes = {"hidden_size": 96, "initializer_range": 0.2}
    folder = make_model(tmp_path_factory.mktemp("teacher") / "t", tokenizer, **sizes)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(576, mean_resizing=False)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_equals_float64(kind, temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 7, 300, dtype=torch.float64) * 3
    student.requires_grad_()
    p, q = ((x / temperature).softmax(1) for x in (teacher, student))
    kl = lambda a, b: (a * (a / b).log()).sum(1)  # noqa: E731
    m = (p + q) / 2
    known = {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": (kl(p, m) + kl(q, m)) / 2}
    wanted = known[kind].sum() * temperature**2
    wanted.backward()
    single = student.detach().float().requires_grad_()
    log_p, log_q = ((x.float() / temperature).log_softmax(1) for x in (teacher, single))
    found = temperature**2 * kd.divergence(log_p, log_q, kind).sum()
    found.backward()
    assert abs(found.item() - wanted.item()) < 1e-6 * wanted.item()
    assert (single.grad - student.grad).abs().max() < 1e-5


def test_teacher_equal_to_student_gives_zero(tiny, rows_file, tmp_path):
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        flags = {"teacher_model": tiny, "kd_coef": 1.0, "kd_loss": kind, "max_steps": 1}
        found = run(pretrain=tiny, dataset=rows_file, save_path=str(tmp_path / kind), **flags)
        assert abs(found["loss"][0]) < 1e-6 and found["grad_norm"][0] < 1e-6


def test_first_step_equals_plain_forwards(tiny, teacher, tmp_path):
    """kd_loss: T^2 KL(q || p) over the tokenizer's vocabulary, its mean over the trained tokens."""
    rows, losses, tokenizer = make_rows(4), [], AutoTokenizer.from_pretrained(tiny)  # as Qwen2's it has one more
    paths = {"dataset": write_rows(tmp_path / "rows.jsonl", rows), "save_path": str(tmp_path / "out")}
    found = run(pretrain=tiny, teacher_model=teacher, kd_temperature=2.0, kd_loss="reverse_kl", max_steps=1, **paths)
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (teacher, tiny)]
    for row in rows:
        n = len(tokenizer(row["input"]).input_ids)
        ids = tokenizer(row["input"] + row["output"]).input_ids + [tokenizer.eos_token_id]
        ids = torch.tensor([ids[: SETTINGS["max_len"]]])
        logits = [model(ids).logits[0, n - 1 : -1, : len(tokenizer)] for model in models]
        log_p, log_q = ((x / 2).log_softmax(1) for x in logits)
        losses.append(4 * (log_q.exp() * (log_q - log_p)).sum(1))
    assert found["kd_loss"][0] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


def test_kd_coef_zero_is_sft(tiny, teacher, rows_file, tmp_path):
    flags = {"pretrain": tiny, "dataset": rows_file}
    ours = run(**flags, teacher_model=teacher, kd_coef=0.0, save_path=str(tmp_path / "kd"))
    theirs = train(sft, **flags, save_path=str(tmp_path / "sft"))
    for name in ("loss", "grad_norm"):
        assert ours[name] == pytest.approx(theirs[name], rel=0, abs=1e-6)


SPLITS = {
    "micro8": {},
    "micro1-zero0": {"micro_train_batch_size": 1, "zero_stage": 0},
    "zero3-checkpointing": {"zero_stage": 3, "micro_train_batch_size": 2, "gradient_checkpointing": True},
    "packing-zero1": {"packing_samples": True, "micro_train_batch_size": 2, "zero_stage": 1},
    "zero3-offload": {"zero_stage": 3, "teacher_offload": True},
    "topk": {},
    "topk-zero3": {"zero_stage": 3, "micro_train_batch_size": 3},
}


def test_splits_and_topk_give_the_same_steps(tiny, teacher, rows_file, tmp_path):
    """Micro-batch, ZeRO stage, packing, ranks, teacher live or in a table (K = vocabulary): 3 steps to 1e-5."""
    base = {"pretrain": tiny, "teacher_model": teacher, "dataset": rows_file}
    base |= {"kd_temperature": 2.0, "kd_loss": "jsd"}
    runs = {}
    for name in ("topk", "topk-zero3"):
        SPLITS[name]["teacher_topk"] = len(AutoTokenizer.from_pretrained(tiny))
    for ranks in (1, 2):
        base["cache_dir"] = str(tmp_path / f"cache{ranks}")  # so that both write the table
        paths = {name: str(tmp_path / name / str(ranks)) for name in SPLITS}
        launch("kd", [{**base, **SPLITS[name], "save_path": paths[name]} for name in SPLITS], tmp_path, ranks)
        runs |= {path: metrics_of(path) for path in paths.values()}
    known = next(iter(runs.values()))
    assert len(known["loss"]) == 3 and known["kd_loss"][0] > 0.01
    for path, found in runs.items():
        for name in ("loss", "kd_loss", "ce_loss", "grad_norm"):
            assert found[name] == pytest.approx(known[name], rel=1e-5, abs=1e-5), (path, name)


@pytest.mark.parametrize("k", [3, 40])
def test_log_probs_of_some_tokens_equal_float64(k):
    """K tokens and the rest; with K = vocabulary no rest is left, and no gradient is NaN."""
    torch.manual_seed(0)
    logits = torch.randn(5, 40, requires_grad=True)
    ids = logits.topk(k, 1).indices
    found = kd.log_probs(logits, SimpleNamespace(vocab_size=40, kd_temperature=1.0), ids).exp()
    exact = logits.detach().double().requires_grad_()
    top = exact.softmax(1).gather(1, ids)
    wanted = torch.cat([top, 1 - top.sum(1, keepdim=True)], 1)
    assert torch.allclose(found.double(), wanted, atol=1e-6)
    found.square().sum().backward()
    wanted.square().sum().backward()
    assert torch.allclose(logits.grad.double(), exact.grad, atol=1e-6)


def test_a_topk_table_is_found_again(tiny, teacher, rows_file, tmp_path, monkeypatch):
    flags = {"pretrain": tiny, "teacher_model": teacher, "dataset": rows_file, "teacher_topk": 16}
    flags["cache_dir"] = str(tmp_path / "cache")
    first = run(**flags, save_path=str(tmp_path / "first"))
    monkeypatch.delattr(kd, "start_frozen")  # it needs no teacher
    again = run(**flags, learning_rate=2e-3, save_path=str(tmp_path / "again"))
    assert again["kd_loss"][0] == first["kd_loss"][0]


def test_another_tokenizer_stops(tiny, rows_file, tmp_path, capsys):
    folder = make_model(tmp_path / "t", make_tokenizer(vocab_size=290))
    with pytest.raises(SystemExit, match="2"):
        run(pretrain=tiny, teacher_model=folder, dataset=rows_file, save_path=str(tmp_path / "x"))
    assert "another tokenizer" in capsys.readouterr().err

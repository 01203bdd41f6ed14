"""dpo.py against closed forms, Hugging Face's eager forward, plain torch, TRL, hand-made rows, and itself resumed."""

import gc
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import make_model, make_rows, write_rows
from launch import load_script
from transformers import AutoModelForCausalLM, AutoTokenizer

dpo = load_script("dpo")
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
    "zero3": {"zero_stage": 3, "ref_offload": True},
    "checkpointing": {"gradient_checkpointing": True},
    "zero3-checkpointing-micro2": {
        "zero_stage": 3,
        "gradient_checkpointing": True,
        "micro_train_batch_size": 2,
    },
}


class Killed(BaseException):
    """Stands for SIGKILL in tests that run in one process."""


@pytest.fixture(autouse=True)
def clean_environment():
    """What setup() writes into the environment ends with the test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def run(tiny, pairs_file, tmp_path):
    """run(**flags): main() in this process, as one rank; its exit code: 0, 2, or "killed"."""

    def call(**flags):
        paths = {"pretrain": tiny, "dataset": pairs_file, "save_path": str(tmp_path / "out")}
        paths["cache_dir"] = str(tmp_path / "cache")
        try:
            dpo.main(dpo.Args(**{**SETTINGS, **paths, **flags}))
            return 0
        except SystemExit as e:
            return e.code
        except Killed:
            return "killed"
        finally:
            gc.collect()  # the lock on the output folder goes with the frame that holds it

    return call


def make_pairs(n, seed=0):
    """n rows {"prompt", "chosen", "rejected"}; the two responses begin alike in every third row."""
    one, two = make_rows(n, seed), make_rows(n, seed + 100)
    pairs = [{"prompt": a["input"], "chosen": a["output"], "rejected": b["output"]} for a, b in zip(one, two)]
    for pair in pairs[::3]:
        pair["rejected"] = pair["chosen"][: len(pair["chosen"]) // 2] + pair["rejected"]
    return pairs


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
    """A .jsonl file of 49 pairs: with a batch of 24 the last step has one pair, less than two ranks need."""
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", make_pairs(49))


@pytest.fixture(scope="session")
def other(tmp_path_factory, tokenizer):
    """Folder of a model that differs from tiny: a reference that is not the start policy."""
    return make_model(tmp_path_factory.mktemp("other") / "other", tokenizer, initializer_range=0.12)


def metrics_of(save_path):
    """{name: [its value at each logged step that has it]}."""
    found = {}
    for line in (Path(save_path) / "metrics.jsonl").read_text().splitlines():
        for name, value in json.loads(line).items():
            found.setdefault(name, []).append(value)
    return found


# --- closed forms: facts about the losses' optima, through dpo_loss and torch's optimisers


def fit(loss_of, n, optimizer, steps, lr):
    """The log-ratios log pi - log ref [n] that the optimiser finds for a softmax policy that starts at ref."""
    torch.set_num_threads(1)  # such small tensors take ten times as long on two
    ref = torch.linspace(-1, 1, n, dtype=torch.float64).sin().log_softmax(0)
    theta = ref.clone().requires_grad_()
    optimizer = optimizer([theta], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(theta.log_softmax(0) - ref).backward()
        optimizer.step()
        schedule.step()
    return (theta.log_softmax(0) - ref).detach(), ref


def adamw(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)


REWARDS = torch.tensor([0.3, -0.8, 1.1, 0.0, -0.2, 0.6], dtype=torch.float64)
WINS, LOSES = torch.tensor(list(itertools.permutations(range(6), 2))).T
PREFERENCE = (REWARDS[WINS] - REWARDS[LOSES]).sigmoid()  # Bradley-Terry: how often WINS is chosen over LOSES


@pytest.mark.parametrize("beta", [0.5, 1.0])
@pytest.mark.parametrize("optimizer, lr", [(adamw, 0.05), (torch.optim.SGD, 8.0)])
def test_minimiser_of_dpo(beta, optimizer, lr):
    """pi* = ref exp(r / beta) / Z: Eq. 4 of arXiv:2305.18290."""

    def loss(ratios):
        return (PREFERENCE * dpo.dpo_loss(ratios[WINS], ratios[LOSES], beta)).mean()

    ratios, ref = fit(loss, 6, optimizer, 1500, lr)
    expected = (ref + REWARDS / beta).softmax(0)
    assert (ratios + ref).exp().sub(expected).abs().max() <= 1e-4


@pytest.mark.parametrize("epsilon", [0.1, 0.3])
def test_robust_dpo_recovers_the_clean_optimum(epsilon):
    """Trained on labels of which epsilon are flipped; plain DPO ends elsewhere."""
    flipped = (1 - epsilon) * PREFERENCE + epsilon * (1 - PREFERENCE)

    def loss(ratios, **options):
        return (flipped * dpo.dpo_loss(ratios[WINS], ratios[LOSES], 1.0, **options)).mean()

    robust, ref = fit(lambda x: loss(x, loss_type="robust", label_smoothing=epsilon), 6, adamw, 1500, 0.05)
    plain, _ = fit(loss, 6, adamw, 1500, 0.05)
    expected = (ref + REWARDS).softmax(0)
    assert (robust + ref).exp().sub(expected).abs().max() <= 1e-4
    assert (plain + ref).exp().sub(expected).abs().max() > 1e-2


def test_plateau_of_cdpo():
    """One pair again and again: sigmoid(beta h) = 1 - epsilon, where plain DPO grows without end."""
    for epsilon in (0.1, 0.2, 0.4):
        ratios, _ = fit(
            lambda x: dpo.dpo_loss(x[:1], x[1:], 0.5, label_smoothing=epsilon).mean(), 2, adamw, 1500, 0.1
        )
        assert (ratios[0] - ratios[1]).item() == pytest.approx(
            math.log((1 - epsilon) / epsilon) / 0.5, abs=1e-4
        )
    ratios, _ = fit(lambda x: dpo.dpo_loss(x[:1], x[1:], 0.5).mean(), 2, adamw, 1500, 0.1)
    assert ratios[0] - ratios[1] > 10


def test_plateau_of_ipo():
    """h = 1 / (2 tau) for one pair; with preferences, tau h_ij = p(i over mu) - p(j over mu): arXiv:2310.12036."""
    for tau in (0.1, 1.0):
        ratios, _ = fit(lambda x: dpo.dpo_loss(x[:1], x[1:], tau, "ipo").mean(), 2, adamw, 1500, 0.1)
        assert (ratios[0] - ratios[1]).item() == pytest.approx(1 / (2 * tau), abs=1e-4)

        def loss(ratios):
            return (PREFERENCE * dpo.dpo_loss(ratios[WINS], ratios[LOSES], tau, "ipo")).mean()

        ratios, _ = fit(loss, 6, adamw, 1500, 0.05)
        wins = torch.zeros(6, dtype=torch.float64).index_add(0, WINS, PREFERENCE) + 0.5  # p(i over i) = 1/2
        expected = (wins[WINS] - wins[LOSES]) / 6 / tau
        assert (ratios[WINS] - ratios[LOSES] - expected).abs().max() <= 1e-4


def test_hinge_stops_at_the_margin():
    ratios, _ = fit(lambda x: dpo.dpo_loss(x[:1], x[1:], 0.5, "hinge").mean(), 2, torch.optim.SGD, 500, 0.01)
    assert 2.0 <= (ratios[0] - ratios[1]).item() < 2.02  # beta h = 1
    assert dpo.dpo_loss(torch.tensor([1.0]), torch.tensor([0.0]), 0.5, "hinge").item() == 0.5


def test_training_finds_the_minimiser(run, tiny, tokenizer, tmp_path):
    """main() on three responses whose pairs come as often as Bradley-Terry says: h_ij = (r_i - r_j) / beta."""
    rewards = {" red": 0.0, " stone": math.log(2), " rain": math.log(4)}
    counts = {(" stone", " red"): 10, (" rain", " red"): 12, (" rain", " stone"): 10}  # of 15: 2/3, 4/5, 2/3
    rows = []
    for (better, worse), n in counts.items():
        rows += [{"prompt": "Say", "chosen": better, "rejected": worse}] * n
        rows += [{"prompt": "Say", "chosen": worse, "rejected": better}] * (15 - n)
    data = write_rows(tmp_path / "three.jsonl", rows)
    flags = {"train_batch_size": 45, "micro_train_batch_size": 45, "max_epochs": 250, "learning_rate": 5e-3}
    flags |= {"lr_scheduler": "cosine", "logging_steps": 50, "beta": 0.5, "zero_stage": 1}
    assert run(dataset=data, **flags) == 0
    logps = []
    for folder in (tiny, tmp_path / "out"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for text in rewards:
            logps.append(eager_logps(model, *encode_plainly(tokenizer, "Say", text)).sum().item())
    ratios = {text: logps[3 + i] - logps[i] for i, text in enumerate(rewards)}
    for a, b in counts:
        assert ratios[a] - ratios[b] == pytest.approx((rewards[a] - rewards[b]) / 0.5, abs=1e-4)


# --- log-probabilities: one tree = two separate rows = Hugging Face


def encode_plainly(tokenizer, prompt, response):
    """(ids with EOS, cut at max_len; length of the prompt) by nothing but the tokenizer."""
    ids, prompt = (
        tokenizer(prompt + response)["input_ids"] + [tokenizer.eos_token_id],
        tokenizer(prompt)["input_ids"],
    )
    assert ids[: len(prompt)] == prompt
    return ids[: SETTINGS["max_len"]], len(prompt)


def eager_logps(model, ids, n_prompt):
    """Per-token log-probs of a response by the model's own forward, alone."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    targets = torch.tensor(ids[n_prompt:])
    return logits[n_prompt - 1 : -1].log_softmax(-1).gather(1, targets[:, None])[:, 0]


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {
    "num_key_value_heads": 2,
    "vocab_size": 90,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": {"sliding_window": 7, "head_dim": 8},  # shorter than the row
    "Gemma2": {
        "head_dim": 8,
        "sliding_window": 7,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "Gemma3Text": {
        "head_dim": 8,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Phi3": {},
    "Olmo2": {},
    "Granite": {"logits_scaling": 3.0, "attention_multiplier": 0.3},
    "GPTNeoX": {},
    "GPT2": {},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}


def tree(prompt, *responses):
    """An example of token ids, every response token trained."""
    responses = [np.array(ids, np.int32) for ids in responses]
    trained = [np.ones(len(ids), bool) for ids in responses]
    return {"prompt": np.array(prompt, np.int32), "responses": responses, "trained": trained}


def save_family(family, folder, **changes):
    """A random model of a family; its folder as a string."""
    config_class = getattr(transformers, f"{family}Config")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**{**SIZES, **changes}), dtype=torch.float32)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_tree_equals_separate_forwards(family, tmp_path):
    folder = save_family(family, tmp_path / "model", **FAMILIES[family])
    rng = np.random.default_rng(0)
    examples = [
        [rng.integers(3, 90, n).tolist() for n in sizes] for sizes in ((20, 9, 14), (3, 12, 1), (11, 2, 17))
    ]
    hf = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    ours = dpo.LogProbs(dpo.load_model(folder, dpo.Args(pretrain=folder, bf16=False))).eval()

    def sums(trees):
        sizes = [len(ids) for tree in trees for ids in tree["responses"]]
        return torch.stack([part.double().sum() for part in ours(dpo.pack_trees(trees, "cpu")).split(sizes)])

    with torch.no_grad():
        shared = sums([tree(*example) for example in examples])
        separate = sums([tree(prompt, response) for prompt, *pair in examples for response in pair])
        eager = [eager_logps(hf, p + response, len(p)).double().sum() for p, *pair in examples for response in pair]
    assert torch.stack(eager).std() > 1  # not near-uniform: an error would show
    assert (shared - torch.stack(eager)).abs().max() <= 1e-5
    assert (separate - torch.stack(eager)).abs().max() <= 1e-5


def plain_varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """torch.nn.attention.varlen.varlen_attn, in plain torch: the last query of a segment is level with its last key."""
    out = []
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True):
        n_q, n_k = q1 - q0, k1 - k0
        assert n_q <= max_q and n_k <= max_k and enable_gqa and window_size[1] == 0
        distance = torch.arange(n_q)[:, None] + n_k - n_q - torch.arange(n_k)
        mask = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
        heads = [x.transpose(0, 1) for x in (q[q0:q1], k[k0:k1], v[k0:k1])]
        out.append(F.scaled_dot_product_attention(*heads, mask, scale=scale, enable_gqa=True).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("family", ["Qwen2", "Mistral"])
def test_branch_for_gpus_equals_the_one_for_cpus(family, tmp_path, monkeypatch):
    """What only runs on a GPU, made to run here: its gathered keys and its one varlen call, with that call in plain torch."""
    source = (REPO / "dpo.py").read_text()
    for condition in ('torch.device(device).type == "cuda"', "query.is_cuda and query.dtype != torch.float32"):
        assert source.count(condition) == 1
        source = source.replace(condition, "True")
    (tmp_path / "on_gpu.py").write_text(source)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", plain_varlen)
    folder, rng = save_family(family, tmp_path / "model", **FAMILIES[family]), np.random.default_rng(0)
    trees = [tree(*(rng.integers(3, 90, n).tolist() for n in sizes)) for sizes in ((20, 9, 14), (3, 12, 1, 6))]
    found = []
    for script in (dpo, load_script(str(tmp_path / "on_gpu"))):
        model = script.LogProbs(script.load_model(folder, script.Args(pretrain=folder, bf16=False))).eval()
        logps = model(script.pack_trees(trees, "cpu"))
        gradients = torch.autograd.grad(logps.square().sum(), list(model.parameters()))
        found.append(torch.cat([logps, *(g.flatten() for g in gradients)]))
    dpo.load_model(folder, dpo.Args(pretrain=folder, bf16=False))  # registers its own attention again
    assert (found[0] - found[1]).abs().max() <= 1e-4 * found[0].abs().max()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("family", ["Qwen2", "Mistral"])
def test_on_a_gpu_in_bf16(family, tmp_path):
    """The varlen path in bf16 and the CPU's path in fp32: within 0.05 nats per token in a model of two layers."""
    folder, rng = save_family(family, tmp_path / "model", **FAMILIES[family]), np.random.default_rng(0)
    trees = [tree(*(rng.integers(3, 90, n).tolist() for n in sizes)) for sizes in ((20, 9, 14), (3, 12, 1, 6))]
    found = []
    for device, bf16 in (("cpu", False), ("cuda", True)):
        args = dpo.Args(pretrain=folder, bf16=bf16)
        model = dpo.LogProbs(dpo.load_model(folder, args)).to(device).eval()
        with torch.no_grad():
            found.append(model(dpo.pack_trees(trees, device)).cpu())
    assert (found[0] - found[1]).abs().mean() < 0.05


def test_attention_sinks_stop_with_a_clear_error(tmp_path, capfd):
    folder = save_family("GptOss", tmp_path / "model", head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    ours = dpo.LogProbs(dpo.load_model(folder, dpo.Args(pretrain=folder, bf16=False)))
    with pytest.raises(SystemExit), torch.no_grad():
        ours(dpo.pack_trees([tree([5, 6], [7, 8], [9])], "cpu"))
    assert "GptOssAttention needs s_aux" in capfd.readouterr().err


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_wrong_attention_stops_before_the_reference_pass(zero_stage, run, tmp_path, monkeypatch, capsys):
    attention = dpo.tree_attention
    monkeypatch.setattr(dpo, "tree_attention", lambda *x, scaling, **k: attention(*x, scaling=1.5 * scaling, **k))
    assert run(zero_stage=zero_stage, cache_dir=str(tmp_path / "cache")) == 2
    out, err = capsys.readouterr()
    assert "error: Qwen2ForCausalLM is not supported: tree attention is off by" in err and "reference:" not in out


# --- the losses of a batch: formulas, TRL


def make_pack(examples, ref, policy):
    """A pack of pairs with these per-token log-probs, lists of lists of k arrays."""
    trees = []
    for sizes, ref_logps in zip(examples, ref):
        trees.append({**tree([3], *([4] * n for n in sizes)), "ref_logps": ref_logps})
    flat = torch.from_numpy(np.concatenate([x for pair in policy for x in pair])).requires_grad_()
    return {"trees": trees}, flat


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({}, lambda h, c, r: -F.logsigmoid(0.1 * h)),
        (
            {"beta": 0.5, "label_smoothing": 0.2},
            lambda h, c, r: -0.8 * F.logsigmoid(h / 2) - 0.2 * F.logsigmoid(-h / 2),
        ),
        ({"loss_type": "hinge"}, lambda h, c, r: (1 - 0.1 * h).clamp(min=0)),
        ({"loss_type": "ipo", "ipo_sum": True}, lambda h, c, r: (h - 5) ** 2),
        ({"loss_type": "ipo"}, lambda h, c, r: (c.mean() - r.mean() - 5) ** 2),
        ({"length_normalized": True, "beta": 5.0}, lambda h, c, r: -F.logsigmoid(5 * (c.mean() - r.mean()))),
        ({"ld_alpha": 0.3}, lambda h, c, r: -F.logsigmoid(0.1 * (cut(c, r) - cut(r, c)))),
        (
            {"loss_type": "robust", "label_smoothing": 0.2},
            lambda h, c, r: (-0.8 * F.logsigmoid(0.1 * h) + 0.2 * F.logsigmoid(-0.1 * h)) / 0.6,
        ),
    ],
)
def test_pair_values_by_formula(flags, expected):
    """Each loss written out for one pair at a time, and what is logged beside it."""
    rng, sizes = np.random.default_rng(0), [(3, 5), (4, 2), (6, 6)]
    policy, ref = (
        [[rng.normal(-2, 1, n).astype(np.float32) for n in pair] for pair in sizes] for _ in range(2)
    )
    pack, per_token_logps = make_pack(sizes, ref, policy)
    values = dpo.pair_values(per_token_logps, pack, dpo.Args(pretrain="", **flags))
    for i, (p, q) in enumerate(zip(policy, ref)):
        chosen, rejected = (torch.from_numpy(a - b) for a, b in zip(p, q))
        loss = expected(chosen.sum() - rejected.sum(), chosen, rejected)
        assert values["loss"][i].item() == pytest.approx(loss.item(), abs=1e-5)
        assert values["logps/chosen"][i].item() == pytest.approx(p[0].sum(), abs=1e-5)
        assert values["length/rejected"][i] == sizes[i][1]
        if not flags:
            assert values["rewards/chosen"][i].item() == pytest.approx(0.1 * chosen.sum().item(), abs=1e-6)
            ratio = torch.cat([chosen, rejected])
            assert values["kl_ref"][i].item() == pytest.approx(
                (ratio.exp() * (ratio - 1) + 1).sum().item() / 2, abs=1e-4
            )
    assert torch.autograd.grad(values["loss"].sum(), per_token_logps)[0].abs().min() > 0


def cut(a, b):
    """LD-DPO's sum of a: 0.3 of what is behind b's length."""
    return a[: len(b)].sum() + 0.3 * a[len(b) :].sum()


def test_kl_ref_is_the_kl_on_samples_of_the_reference():
    """For one token, E over ref of (r log r - r + 1) = KL(pi, ref), here with exact frequencies."""
    ref, policy = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.2, 0.6]).double()
    ratio = policy / ref
    kl = (policy * ratio.log()).sum().item()
    pairs = [(a, b) for a in range(3) for b in range(3)]
    pack, logps = make_pack(
        [(1, 1)] * 9,
        [[np.float32([ref[i].log()]) for i in pair] for pair in pairs],
        [[np.float32([policy[i].log()]) for i in pair] for pair in pairs],
    )
    found = dpo.pair_values(logps, pack, dpo.Args(pretrain=""))["kl_ref"].double()
    assert (found * torch.stack([ref[a] * ref[b] for a, b in pairs])).sum().item() == pytest.approx(
        kl, abs=1e-6
    )


TRL = """
import json, sys
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
tiny, other, data, out = sys.argv[1:]
rows = [json.loads(line) for line in open(data)]
losses = {}
for name, options in json.load(open(out)).items():
    model, ref = (AutoModelForCausalLM.from_pretrained(path, dtype="float32") for path in (tiny, other))
    args = DPOConfig(output_dir=out + ".d", per_device_train_batch_size=8, max_steps=1, logging_steps=1, max_length=512,
                     use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False, disable_tqdm=True,
                     save_strategy="no", **options)
    trainer = DPOTrainer(model, ref, args=args, train_dataset=Dataset.from_list(rows),
                         processing_class=AutoTokenizer.from_pretrained(tiny))
    trainer.train()
    log = trainer.state.log_history[0]
    losses[name] = [log["loss"], log["rewards/margins"], log["logps/chosen"], log["logps/rejected"], log["grad_norm"]]
json.dump(losses, open(out, "w"))
"""
TRL_CASES = {  # name: (TRL's options, ours)
    "sigmoid": ({}, {}),
    "ipo": ({"loss_type": ["ipo"]}, {"loss_type": "ipo"}),
    "hinge": ({"loss_type": ["hinge"]}, {"loss_type": "hinge"}),
    "robust": (
        {"loss_type": ["robust"], "label_smoothing": 0.1},
        {"loss_type": "robust", "label_smoothing": 0.1},
    ),
    "nll": ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}, {"nll_loss_coef": 0.3}),
    "length-normalised": ({"loss_type": ["sigmoid_norm"]}, {"length_normalized": True}),
    "ld": ({"ld_alpha": 0.4}, {"ld_alpha": 0.4}),
}


@pytest.fixture(scope="module")
def trl_losses(tiny, other, tmp_path_factory):
    """The first step of TRL's DPOTrainer on 8 pairs, in a process of its own: {case: its log}, and the pairs."""
    pytest.importorskip("trl", reason="trl is not installed: pip install trl==1.16.0 accelerate")
    folder = tmp_path_factory.mktemp("trl")
    pairs = write_rows(folder / "pairs.jsonl", make_pairs(8, seed=5))
    (folder / "out.json").write_text(json.dumps({name: options for name, (options, _) in TRL_CASES.items()}))
    command = [sys.executable, "-c", TRL, tiny, other, pairs, str(folder / "out.json")]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "out.json").read_text()), pairs


@pytest.mark.parametrize("name", TRL_CASES)
def test_equals_trl(name, trl_losses, run, other, tmp_path):
    losses, pairs = trl_losses
    assert run(dataset=pairs, ref_pretrain=other, train_batch_size=8, max_len=512, **TRL_CASES[name][1]) == 0
    found = metrics_of(tmp_path / "out")
    loss, margins, chosen, rejected, grad_norm = losses[name]
    assert found["loss"][0] == pytest.approx(loss, abs=1e-5, rel=1e-6)
    assert found["grad_norm"][0] == pytest.approx(grad_norm, rel=1e-4)
    if name not in ("ipo", "length-normalised", "ld"):  # TRL logs sums there, we what the loss sees
        assert found["rewards/margins"][0] == pytest.approx(margins, abs=1e-4)
        assert found["logps/chosen"][0] == pytest.approx(chosen, abs=1e-3)
        assert found["logps/rejected"][0] == pytest.approx(rejected, abs=1e-3)


# --- the first step


@pytest.mark.parametrize(
    "flags, loss",
    [
        ({}, math.log(2)),
        ({"label_smoothing": 0.2}, math.log(2)),
        ({"loss_type": "robust", "label_smoothing": 0.2, "zero_stage": 3}, math.log(2)),
        ({"loss_type": "hinge", "lora_rank": 4, "lora_dropout": 0.5}, 1.0),
        ({"ipo": True, "beta": 0.5}, 1.0),
        ({"length_normalized": True, "packing_samples": True}, math.log(2)),
    ],
)
def test_first_loss_is_known(flags, loss, run, pairs_file, tmp_path):
    assert run(train_batch_size=49, eval_dataset=pairs_file, **flags) == 0
    found = metrics_of(tmp_path / "out")
    assert found["loss"][0] == pytest.approx(loss, rel=0, abs=1e-6)
    assert found["eval/loss"][0] == pytest.approx(loss, rel=0, abs=1e-6)
    for name in ("rewards/margins", "rewards/chosen", "eval/rewards/margins", "kl_ref"):
        assert found[name][0] == pytest.approx(0, abs=1e-5)
    assert found["eval/rewards/margins"][1] > 1e-3  # one step on all pairs


def test_first_loss_in_bf16(run, tmp_path):
    assert run(bf16=True) == 0
    assert metrics_of(tmp_path / "out")["loss"][0] == pytest.approx(math.log(2), abs=0.01)


def test_wrong_reference_stops_the_run(run, monkeypatch, capsys):
    forward_logps = dpo.forward_logps
    monkeypatch.setattr(dpo, "forward_logps", lambda *args: forward_logps(*args) + torch.randn(()) * 0.01)
    assert run() == 2
    assert re.search(r"error: step 1: .* must be 0.6931472, but is 0\.69", capsys.readouterr().err)


# --- equality: however a step is split, it is the step of plain torch


@pytest.fixture(scope="module")
def plain(tiny, other, pairs_file):
    """Three steps of plain torch, one forward per response, other's reference: what dpo.py should log."""
    policy, ref = (
        AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
        for path in (tiny, other)
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    rows = [json.loads(line) for line in Path(pairs_file).read_text().splitlines()]
    pairs = [
        [encode_plainly(tokenizer, row["prompt"], row[k]) for k in ("chosen", "rejected")] for row in rows
    ]
    order = np.random.default_rng([42, 0]).permutation(len(rows))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    result = {
        name: []
        for name in ("loss", "grad_norm", "rewards/margins", "nll", "margin_length_corr", "logps/chosen")
    }
    for begin in (0, 24, 48):
        margins, chosen, lengths = [], [], []
        for i in order[begin : begin + 24]:
            logps = [eager_logps(policy, *example).sum() for example in pairs[i]]
            with torch.no_grad():
                ref_logps = [eager_logps(ref, *example).sum() for example in pairs[i]]
            margins.append(0.1 * ((logps[0] - ref_logps[0]) - (logps[1] - ref_logps[1])))
            chosen.append(logps[0])
            lengths.append([len(ids) - n_prompt for ids, n_prompt in pairs[i]])
        margins, chosen, lengths = torch.stack(margins), torch.stack(chosen), np.array(lengths)
        nll = -chosen.sum() / lengths[:, 0].sum()
        loss = -F.logsigmoid(margins).mean() + 0.2 * nll
        optimizer.zero_grad()
        loss.backward()
        result["loss"].append(loss.item())
        result["grad_norm"].append(torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0).item())
        result["rewards/margins"].append(margins.mean().item())
        result["nll"].append(nll.item())
        result["logps/chosen"].append(chosen.mean().item())
        one = len(margins) == 1
        corr = 0.0 if one else np.corrcoef(margins.detach().numpy(), lengths[:, 0] - lengths[:, 1])[0, 1]
        result["margin_length_corr"].append(corr)
        optimizer.step()
    return result


@pytest.fixture(scope="module")
def two_ranks(tiny, other, pairs_file, tmp_path_factory):
    """Folder with the results of all SPLITS on two ranks, started once."""
    out = tmp_path_factory.mktemp("two_ranks")
    paths = {"pretrain": tiny, "dataset": pairs_file, "ref_pretrain": other, "nll_loss_coef": 0.2}
    configs = [
        {**SETTINGS, **paths, **flags, "save_path": str(out / name), "cache_dir": str(out / f"{name}.cache")}
        for name, flags in SPLITS.items()
    ]
    (out / "configs.json").write_text(json.dumps(configs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(REPO / "tests/launch.py"), "dpo", str(out / "configs.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def assert_same_steps(save_path, plain):
    found = metrics_of(save_path)
    for name, values in plain.items():
        assert found[name] == pytest.approx(values, rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("name", SPLITS)
def test_one_rank_equals_plain_torch(name, plain, run, other, tmp_path):
    assert run(ref_pretrain=other, nll_loss_coef=0.2, **SPLITS[name]) == 0
    assert_same_steps(tmp_path / "out", plain)


@pytest.mark.parametrize("name", SPLITS)
def test_two_ranks_equal_plain_torch(name, plain, two_ranks):
    assert_same_steps(two_ranks / name, plain)


def test_reference_is_the_same_however_it_is_computed(two_ranks):
    """Bit-equal for any split of the policy's steps; sharded (ZeRO-3), in other bytes of the same values."""
    files = {name: next((two_ranks / f"{name}.cache").iterdir()) for name in SPLITS}
    assert len({path.name for path in files.values()}) == 1
    logps = {name: np.frombuffer(path.read_bytes()[32:], np.float32) for name, path in files.items()}
    for name in SPLITS:
        assert np.abs(logps[name] - logps["micro8"]).max() < 1e-5, name


# --- reference log-probabilities on disk


@pytest.fixture
def computed(monkeypatch):
    """A list that grows by the number of trees whenever reference log-probs are computed, not read."""
    calls, forward_logps = [], dpo.forward_logps

    def spy(model, trees, *rest):
        calls.append(len(trees))
        return forward_logps(model, trees, *rest)

    monkeypatch.setattr(dpo, "forward_logps", spy)
    return calls


def test_reference_is_computed_once(run, tiny, other, tmp_path, computed, capsys):
    """Again only where token ids, reference weights or dtype differ; not for another learning rate, beta or seed."""
    names = iter("abcdefghijkl")

    def count(**flags):
        computed.clear()
        assert run(save_path=str(tmp_path / next(names)), **flags) == 0
        return len(computed)

    assert count() == 1
    capsys.readouterr()
    assert count(learning_rate=1e-4, beta=0.3, seed=1, loss_type="ipo", ld_alpha=0.5, train_batch_size=7) == 0
    assert "reference: cached in" in capsys.readouterr().out
    assert count(ref_pretrain=tiny) == 0  # the same weights by another flag
    assert count(ref_pretrain=other) == 1
    assert count(max_len=60) == 1
    assert count(input_template="Q: {}\nA:") == 1
    assert count(bf16=True) == 1
    assert count(ref_pretrain=other, learning_rate=1e-4) == 0
    a, b = (metrics_of(tmp_path / name) for name in "ac")
    assert a["loss"] == b["loss"]


def test_damaged_cache_is_computed_again(run, tmp_path, computed):
    assert run(save_path=str(tmp_path / "whole")) == 0
    (file,) = (tmp_path / "cache").iterdir()
    good = file.read_bytes()
    for bad in (good[:-4], good[:100] + bytes([good[100] ^ 1]) + good[101:], b""):
        file.write_bytes(bad)
        computed.clear()
        name = str(tmp_path / f"again{len(bad)}")
        assert run(save_path=name, max_samples=49) == 0
        assert computed == [49] and file.read_bytes() == good
        assert metrics_of(name)["loss"] == metrics_of(tmp_path / "whole")["loss"]


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_only_one_model_in_memory(zero_stage, run, monkeypatch):
    """The reference is gone before the policy is loaded."""
    import weakref

    models, load_model, alive = [], dpo.load_model, []

    def spy(*args):
        before = [p for ref in models if ref() is not None for p in ref().parameters()]
        alive.append(sum(getattr(p, "ds_tensor", p).numel() for p in before))
        model = load_model(*args)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(dpo, "load_model", spy)
    gc.disable()
    try:
        assert run(zero_stage=zero_stage) == 0
    finally:
        gc.enable()
    assert alive == [0, 0]


# --- resume


@pytest.mark.parametrize(
    "flags", [{}, {"zero_stage": 3, "ref_pretrain": "other"}, {"lora_rank": 4, "lora_dropout": 0.1}]
)
def test_resumed_is_bit_identical(flags, run, other, tmp_path, monkeypatch, capsys):
    flags = {"train_batch_size": 12, "save_steps": 2, "max_epochs": 2, **flags}
    if "ref_pretrain" in flags:
        flags["ref_pretrain"] = other
    assert run(**{**flags, "save_steps": -1, "save_path": str(tmp_path / "whole")}) == 0
    save_checkpoint = dpo.save_checkpoint

    def killing(engine, args, step, identity):
        save_checkpoint(engine, args, step, identity)
        if step == 4:
            raise Killed

    monkeypatch.setattr(dpo, "save_checkpoint", killing)
    assert run(**flags) == "killed"
    monkeypatch.setattr(dpo, "save_checkpoint", save_checkpoint)
    capsys.readouterr()
    assert run(**flags) == 0
    assert "resume" in capsys.readouterr().out
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    for name in ("step", "loss", "grad_norm", "rewards/margins", "kl_ref"):
        assert metrics_of(out)[name] == metrics_of(whole)[name]


# --- rows


@pytest.fixture
def trees_of(run, tiny, tmp_path, monkeypatch, capsys):
    """trees_of(rows, **flags): the pairs that main() builds, each (prompt, chosen, rejected), trained text in []."""

    def collect(rows, **flags):
        built = []

        def spy(args, inputs, world_size):
            frame = sys._getframe(1)
            built.extend(frame.f_locals["trees"])
            collect.dropped = frame.f_locals["dropped"]
            raise Killed

        monkeypatch.setattr(dpo, "identify", spy)
        capsys.readouterr()
        code = run(dataset=write_rows(tmp_path / "rows.jsonl", rows), **flags)
        collect.output = capsys.readouterr()
        assert code == ("killed" if built else 2)
        tokenizer = AutoTokenizer.from_pretrained(tiny)
        return [tuple(marked(tree, tokenizer, i) for i in range(2)) for tree in built]

    return collect


def marked(tree, tokenizer, i):
    """The text of response i behind its prompt, its trained stretches in [ ]."""
    ids = np.r_[tree["prompt"], tree["responses"][i]]
    trained = np.r_[np.zeros(len(tree["prompt"]), bool), tree["trained"][i]]
    groups = itertools.groupby(zip(ids, trained), key=lambda pair: pair[1])
    texts = [(flag, tokenizer.decode([token for token, _ in group])) for flag, group in groups]
    return "".join(f"[{text}]" if flag else text for flag, text in texts)


def said(*contents):
    """A conversation, the user first."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


CHAT = ("<|user|>red?<eos>\n<|assistant|>[river<eos>]", "<|user|>red?<eos>\n<|assistant|>[walls<eos>]")
TWO_TURNS = "<|user|>a<eos>\n<|assistant|>b<eos>\n<|user|>red?<eos>\n<|assistant|>"
HH = "\n\nHuman: a\n\nAssistant: b\n\nHuman: red?\n\nAssistant:"
LAYOUTS = {
    "strings": (
        {"prompt": "red?\n", "chosen": "river", "rejected": "walls"},
        {},
        ("red?\n[river<eos>]", "red?\n[walls<eos>]"),
    ),
    "strings in the chat template": (
        {"prompt": "red?", "chosen": "river", "rejected": "walls"},
        {"apply_chat_template": True},
        CHAT,
    ),
    "strings in a template": (
        {"prompt": "red", "chosen": "river", "rejected": "walls"},
        {"input_template": "Q: {}\\nA:"},
        ("Q: red\nA:[river<eos>]", "Q: red\nA:[walls<eos>]"),
    ),
    "messages": (
        {"prompt": said("red?"), "chosen": said("", "river")[1:], "rejected": said("", "walls")[1:]},
        {},
        CHAT,
    ),
    "no prompt, whole conversations": (
        {"chosen": said("a", "b", "red?", "river"), "rejected": said("a", "b", "red?", "walls")},
        {},
        (f"{TWO_TURNS}[river<eos>]", f"{TWO_TURNS}[walls<eos>]"),
    ),
    "a string prompt beside whole conversations": (
        {
            "prompt": "red?",
            "chosen": said("red?", "river"),
            "rejected": said("red?", "walls"),
            "messages": [],
        },
        {},
        CHAT,
    ),
    "a prompt of messages beside whole conversations": (
        {"prompt": said("red?"), "chosen": said("red?", "river"), "rejected": said("red?", "walls")},
        {},
        CHAT,
    ),
    "from/value": (
        {
            "chosen": [{"from": "human", "value": "red?"}, {"from": "gpt", "value": "river"}],
            "rejected": [{"from": "human", "value": "red?"}, {"from": "gpt", "value": "walls"}],
        },
        {},
        CHAT,
    ),
    "conversations that part before their last turn": (
        {"chosen": said("red?", "river", "and", "so"), "rejected": said("red?", "walls", "and", "on")},
        {},
        (
            f"{CHAT[0]}\n<|user|>and<eos>\n<|assistant|>[so<eos>]",
            f"{CHAT[1]}\n<|user|>and<eos>\n<|assistant|>[on<eos>]",
        ),
    ),
    "hh-rlhf as text": (
        {"chosen": f"{HH} river", "rejected": f"{HH} walls"},
        {},
        (f"{HH}[ river<eos>]", f"{HH}[ walls<eos>]"),
    ),
    "hh-rlhf as a chat": (
        {"chosen": f"{HH} river", "rejected": f"{HH} walls"},
        {"apply_chat_template": True},
        (f"{TWO_TURNS}[river<eos>]", f"{TWO_TURNS}[walls<eos>]"),
    ),
    "iter_dpo": (
        {
            "id": 3,
            "prompt": "<|user|>red?<eos>\n<|assistant|>",
            "chosen": "river",
            "rejected": "walls and",
            "chosen_reward": 1.0,
            "rejected_reward": 0.0,
            "chosen_finish_reason": "stop",
            "rejected_finish_reason": "length",
        },
        {"apply_chat_template": True},  # it is applied already
        (CHAT[0], "<|user|>red?<eos>\n<|assistant|>[walls and]"),
    ),
    "orca": (
        {"system": "be old", "question": "red?", "chosen": "river", "rejected": "walls"},
        {"apply_chat_template": True},
        tuple("<|system|>be old<eos>\n" + text for text in CHAT),
    ),
    "orca as text": (
        {"system": "be old", "question": "red?", "chosen": " river", "rejected": " walls"},
        {},
        ("be old\n\nred?[ river<eos>]", "be old\n\nred?[ walls<eos>]"),
    ),
    "key flags": (
        {"q": "red?\n", "good": "river", "bad": "walls", "prompt": "no", "chosen": "no", "rejected": "yes"},
        {"prompt_key": "q", "chosen_key": "good", "rejected_key": "bad"},
        ("red?\n[river<eos>]", "red?\n[walls<eos>]"),
    ),
    "empty rejected response": (
        {"prompt": "red?\n", "chosen": "river", "rejected": ""},
        {},
        ("red?\n[river<eos>]", "red?\n[<eos>]"),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name, trees_of):
    row, flags, expected = LAYOUTS[name]
    assert trees_of([row], **flags) == [expected]


def test_prompt_is_stored_once(trees_of, run):
    (built,) = trees_of([{"prompt": "red river?\n", "chosen": "old walls", "rejected": "old boats"}])
    assert built == ("red river?\n[old walls<eos>]", "red river?\n[old boats<eos>]")


def test_pairs_that_are_dropped(trees_of):
    """Identical pairs are counted apart; what cannot be used counts for --max_drop_ratio."""
    good = {"prompt": "red?\n", "chosen": "river", "rejected": "walls"}
    same = [{"prompt": "red?\n", "chosen": "old", "rejected": "old"}] * 3
    cut = {
        "prompt": "red?\n",
        "chosen": "a " * 60 + "b",
        "rejected": "a " * 60 + "c",
    }  # differ behind max_len
    bad = [{**good, "chosen": text} for text in ("", " \n", None, [], 3)]
    assert len(trees_of([good, *same, cut, *bad] + [good] * 2, max_drop_ratio=0.5, max_len=40)) == 3
    assert "4 pairs dropped: chosen and rejected are the same" in trees_of.output.out
    reasons = Counter(drop["reason"] for drop in trees_of.dropped)
    assert (
        reasons["chosen == rejected"] == 4 and reasons["empty chosen response"] == 2 and reasons.total() == 9
    )
    assert len(trees_of([good] * 30 + same * 20)) == 30  # 60 of 90 are identical: no reason to stop
    assert trees_of([good, *bad]) == []
    assert "5 dropped" in trees_of.output.err and trees_of.output.err.count("\n") == 1
    assert trees_of(same) == []
    assert "the same in every pair" in trees_of.output.err


@pytest.mark.parametrize(
    "rows, flags, message",
    [
        ([{"text": "a"}], {}, "columns text: which?"),
        ([{"prompt": "a", "chosen": "b"}], {}, "--rejected_key"),
        (
            [{"prompt": "a", "chosen": "b", "rejected": "c"}],
            {"prompt_key": "question"},
            "no column 'question'",
        ),
        ([{"chosen": "b", "rejected": "c"}], {}, "no prompt column, and no shared text"),
        (
            [{"prompt": "a", "chosen": "b", "rejected": "c"}],
            {"label_smoothing": 0.5},
            "--label_smoothing 0.5",
        ),
        (
            [{"prompt": "a", "chosen": "b", "rejected": "c"}],
            {"loss_type": "hinge", "label_smoothing": 0.1},
            "robust",
        ),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], {"beta": 0.0}, "--beta must be above 0"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], {"ld_alpha": 1.5}, "--ld_alpha 1.5"),
    ],
)
def test_bad_input(rows, flags, message, trees_of):
    assert trees_of(rows, **flags) == []
    assert message in trees_of.output.err and trees_of.output.err.count("\n") == 1


def test_ipo_says_which_form(trees_of):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    trees_of([row], ipo=True)
    assert "IPO with means per token (--ipo_sum: sums)" in trees_of.output.out
    trees_of([row], loss_type="ipo", ipo_sum=True)
    assert "IPO with summed log-probs" in trees_of.output.out

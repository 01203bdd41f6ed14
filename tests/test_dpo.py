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
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import make_model, make_rows, write_rows
from launch import load_script
from transformers import AutoModelForCausalLM, AutoTokenizer

dpo = load_script("dpo")
dpo.note.__defaults__ = (None,)  # print to the stdout of the test, not to that of the import
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
    "zero3-checkpointing-micro2": {"zero_stage": 3, "gradient_checkpointing": True, "micro_train_batch_size": 2},
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

    ratios, ref = fit(loss, 6, optimizer, 3000, lr)
    expected = (ref + REWARDS / beta).softmax(0)
    assert (ratios + ref).exp().sub(expected).abs().max() <= 1e-4


@pytest.mark.parametrize("epsilon", [0.1, 0.3])
def test_robust_dpo_recovers_the_clean_optimum(epsilon):
    """Trained on labels of which epsilon are flipped; plain DPO ends elsewhere."""
    flipped = (1 - epsilon) * PREFERENCE + epsilon * (1 - PREFERENCE)

    def loss(ratios, **options):
        return (flipped * dpo.dpo_loss(ratios[WINS], ratios[LOSES], 1.0, **options)).mean()

    robust, ref = fit(lambda x: loss(x, loss_type="robust", label_smoothing=epsilon), 6, adamw, 3000, 0.05)
    plain, _ = fit(loss, 6, adamw, 3000, 0.05)
    expected = (ref + REWARDS).softmax(0)
    assert (robust + ref).exp().sub(expected).abs().max() <= 1e-4
    assert (plain + ref).exp().sub(expected).abs().max() > 1e-2


def test_plateau_of_cdpo():
    """One pair again and again: sigmoid(beta h) = 1 - epsilon, where plain DPO grows without end."""
    for epsilon in (0.1, 0.2, 0.4):
        ratios, _ = fit(lambda x: dpo.dpo_loss(x[:1], x[1:], 0.5, label_smoothing=epsilon).mean(), 2, adamw, 3000, 0.1)
        assert (ratios[0] - ratios[1]).item() == pytest.approx(math.log((1 - epsilon) / epsilon) / 0.5, abs=1e-4)
    ratios, _ = fit(lambda x: dpo.dpo_loss(x[:1], x[1:], 0.5).mean(), 2, adamw, 3000, 0.1)
    assert ratios[0] - ratios[1] > 10


def test_plateau_of_ipo():
    """h = 1 / (2 tau) for one pair; with preferences, tau h_ij = p(i over mu) - p(j over mu): arXiv:2310.12036."""
    for tau in (0.1, 1.0):
        ratios, _ = fit(lambda x: dpo.dpo_loss(x[:1], x[1:], tau, "ipo").mean(), 2, adamw, 3000, 0.1)
        assert (ratios[0] - ratios[1]).item() == pytest.approx(1 / (2 * tau), abs=1e-4)

        def loss(ratios):
            return (PREFERENCE * dpo.dpo_loss(ratios[WINS], ratios[LOSES], tau, "ipo")).mean()

        ratios, _ = fit(loss, 6, adamw, 3000, 0.05)
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
    ids, prompt = tokenizer(prompt + response)["input_ids"] + [tokenizer.eos_token_id], tokenizer(prompt)["input_ids"]
    assert ids[: len(prompt)] == prompt
    return ids[: SETTINGS["max_len"]], len(prompt)


def eager_logps(model, ids, n_prompt):
    """Per-token log-probs of a response by the model's own forward, alone."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    targets = torch.tensor(ids[n_prompt:])
    return logits[n_prompt - 1 : -1].log_softmax(-1).gather(1, targets[:, None])[:, 0]


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 90, "max_position_embeddings": 128, "initializer_range": 0.2}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": {"sliding_window": 7, "head_dim": 8},  # shorter than the row
    "Gemma2": {"head_dim": 8, "sliding_window": 7, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "Gemma3Text": {"head_dim": 8, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
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
    examples = [[rng.integers(3, 90, n).tolist() for n in sizes] for sizes in ((20, 9, 14), (3, 12, 1), (11, 2, 17))]
    hf = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    ours = dpo.LogProbs(dpo.load_model(folder, dpo.Args(pretrain=folder, bf16=False))).eval()

    def sums(trees):
        sizes = [len(ids) for tree in trees for ids in tree["responses"]]
        return torch.stack([part.sum() for part in ours(dpo.pack_trees(trees, "cpu")).split(sizes)])

    with torch.no_grad():
        shared = sums([tree(*example) for example in examples])
        separate = sums([tree(prompt, response) for prompt, *pair in examples for response in pair])
        eager = [eager_logps(hf, p + response, len(p)).sum() for p, *pair in examples for response in pair]
    assert torch.stack(eager).std() > 1  # not near-uniform: an error would show
    assert (shared - torch.stack(eager)).abs().max() <= 1e-5 * 3
    assert (separate - torch.stack(eager)).abs().max() <= 1e-5 * 3


def test_attention_sinks_stop_with_a_clear_error(tmp_path, capfd):
    folder = save_family("GptOss", tmp_path / "model", head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    ours = dpo.LogProbs(dpo.load_model(folder, dpo.Args(pretrain=folder, bf16=False)))
    with pytest.raises(SystemExit), torch.no_grad():
        ours(dpo.pack_trees([tree([5, 6], [7, 8], [9])], "cpu"))
    assert "GptOssAttention needs s_aux" in capfd.readouterr().err

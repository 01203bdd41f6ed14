"""dpo.py against closed forms, Hugging Face's own forward, plain torch, TRL, hand-made rows, and itself resumed."""

import functools
import gc
import itertools
import json
import math
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import make_model, make_rows, write_rows
from launch import load_script
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

dpo = load_script("dpo")
SETTINGS = {"bf16": False, "train_batch_size": 24, "learning_rate": 1e-3, "lr_scheduler": "constant"}
SETTINGS |= {"lr_warmup_ratio": 0.0, "max_len": 100, "num_proc": 1}


class Killed(BaseException):
    """Stands for SIGKILL in tests that run in one process."""


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """One thread, as models are tiny; what setup() writes into the environment ends with the test."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def run(tiny, pairs_file, tmp_path):
    """run(**flags): main() in this process, as one rank; its exit code: 0, 2, or "killed"."""
    paths = {"pretrain": tiny, "dataset": pairs_file, "save_path": str(tmp_path / "out")}
    paths["cache_dir"] = str(tmp_path / "cache")

    def call(**flags):
        try:
            dpo.main(dpo.Args(**{**SETTINGS, **paths, **flags}))
            return 0
        except SystemExit as e:
            return e.code
        except Killed:
            return "killed"

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
    for line in Path(save_path, "metrics.jsonl").read_text().splitlines():
        for name, value in json.loads(line).items():
            found.setdefault(name, []).append(value)
    return found


# --- closed forms: facts about the optima of the losses in dpo.LOSSES, through torch's optimisers


def loss_of(kind, beta, **flags):
    """The loss as a function of the log-ratios of chosen and rejected."""
    args = dpo.Args(pretrain="", dataset="", loss_type=kind, beta=beta, **flags)
    return lambda chosen, rejected: dpo.LOSSES[kind].function(chosen, rejected, args)


def fit(loss, n, optimizer, steps, lr):
    """The log-ratios log pi - log ref [n] that the optimiser finds for a softmax policy that starts at ref."""
    torch.set_num_threads(1)  # such small tensors take ten times as long on two
    ref = torch.linspace(-1, 1, n, dtype=torch.float64).sin().log_softmax(0)
    theta = ref.clone().requires_grad_()
    optimizer = optimizer([theta], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(theta.log_softmax(0) - ref).backward()
        optimizer.step()
        schedule.step()
    return (theta.log_softmax(0) - ref).detach(), ref


def fit_pair(loss, optimizer=torch.optim.Adam, steps=1500, lr=0.1):
    """h where one pair is trained again and again."""
    ratios, _ = fit(lambda x: loss(x[:1], x[1:]).mean(), 2, optimizer, steps, lr)
    return (ratios[0] - ratios[1]).item()


def fit_pairs(loss, weights, optimizer=torch.optim.Adam, lr=0.05):
    """(log-ratios, ref) where all pairs of six responses are trained, so often as the weights say."""
    return fit(lambda x: (weights * loss(x[WINS], x[LOSES])).mean(), 6, optimizer, 1500, lr)


REWARDS = torch.tensor([0.3, -0.8, 1.1, 0.0, -0.2, 0.6], dtype=torch.float64)
WINS, LOSES = torch.tensor(list(itertools.permutations(range(6), 2))).T
PREFERENCE = (REWARDS[WINS] - REWARDS[LOSES]).sigmoid()  # Bradley-Terry: how often WINS is chosen over LOSES


@pytest.mark.parametrize("beta, optimizer, lr", [(0.5, torch.optim.Adam, 0.05), (1.0, torch.optim.SGD, 8.0)])
def test_minimiser_of_dpo(beta, optimizer, lr):
    """pi* = ref exp(r / beta) / Z: Eq. 4 of arXiv:2305.18290."""
    ratios, ref = fit_pairs(loss_of("sigmoid", beta), PREFERENCE, optimizer, lr)
    assert ((ratios + ref).exp() - (ref + REWARDS / beta).softmax(0)).abs().max() <= 1e-4


def test_robust_dpo_recovers_the_clean_optimum():
    """Trained on labels of which 30 % are flipped; plain DPO ends elsewhere."""
    flipped = 0.7 * PREFERENCE + 0.3 * (1 - PREFERENCE)
    robust, ref = fit_pairs(loss_of("robust", 1.0, label_smoothing=0.3), flipped)
    plain, _ = fit_pairs(loss_of("sigmoid", 1.0), flipped)
    expected = (ref + REWARDS).softmax(0)
    assert ((robust + ref).exp() - expected).abs().max() <= 1e-4
    assert ((plain + ref).exp() - expected).abs().max() > 1e-2


def test_plateau_of_cdpo():
    """sigmoid(beta h) = 1 - label_smoothing, where plain DPO grows without end."""
    for smoothing in (0.1, 0.4):
        h = fit_pair(loss_of("sigmoid", 0.5, label_smoothing=smoothing))
        assert h == pytest.approx(math.log((1 - smoothing) / smoothing) / 0.5, abs=1e-4)
    assert fit_pair(loss_of("sigmoid", 0.5)) > 10


def test_plateau_of_ipo():
    """h = 1 / (2 tau) for one pair; with preferences tau h_ij = p(i over mu) - p(j over mu): arXiv:2310.12036."""
    for tau in (0.2, 1.0):
        assert fit_pair(loss_of("ipo", tau)) == pytest.approx(1 / (2 * tau), abs=1e-4)
        ratios, _ = fit_pairs(loss_of("ipo", tau), PREFERENCE)
        wins = torch.zeros(6, dtype=torch.float64).index_add(0, WINS, PREFERENCE) + 0.5  # p(i over i) = 1/2
        expected = (wins[WINS] - wins[LOSES]) / 6 / tau
        assert (ratios[WINS] - ratios[LOSES] - expected).abs().max() <= 1e-4


def test_hinge_and_simpo_by_hand():
    assert 2.0 <= fit_pair(loss_of("hinge", 0.5), torch.optim.SGD, 500, 0.01) < 2.02  # stops at beta h = 1
    assert loss_of("hinge", 0.5)(torch.tensor(1.0), torch.tensor(0.0)).item() == 0.5
    simpo = loss_of("simpo", 2.0, simpo_gamma=0.5)(torch.tensor(-1.0), torch.tensor(-1.25))
    assert simpo.item() == pytest.approx(math.log(2), abs=1e-6)  # 2 x 0.25 is the margin


# --- log-probabilities: one tree = two separate rows = Hugging Face

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 90, "max_position_embeddings": 128, "initializer_range": 0.2}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WINDOW = {"sliding_window": 7, "head_dim": 8}  # shorter than the rows
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}
GEMMA4 = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "global_head_dim": 16}
GEMMA4 |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "vocab_size_per_layer_input": 90}
GEMMA4 |= {"hidden_size_per_layer_input": 8, "final_logit_softcapping": 3.0}
FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": WINDOW,
    "Gemma2": {**WINDOW, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "Gemma3Text": {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Phi3": {},
    "Olmo2": {},
    "Granite": {"logits_scaling": 3.0, "attention_multiplier": 0.3},
    "GPTNeoX": {},
    "GPT2": {},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "Gemma4Text": {**WINDOW, **GEMMA4},
    "DeepseekV3": {**MOE, **LATENT, "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1},
}


def tree(prompt, chosen, rejected):
    """An example of token ids, every token of a response trained."""
    ends = np.cumsum([len(prompt), len(chosen), len(rejected)])
    ids = np.array([*prompt, *chosen, *rejected])
    return {"input_ids": ids, "trained": np.arange(len(ids)) >= ends[0], "ends": ends, "n_trained": ends[2] - ends[0]}


def random_trees(sizes):
    rng = np.random.default_rng(0)
    return [tree(*[rng.integers(3, 90, n).tolist() for n in lengths]) for lengths in sizes]


def branches(example):
    """[(ids, length of the prompt)] of the two sequences that share a tree."""
    n_prompt, begin, end = example["ends"]
    ids = example["input_ids"]
    return [(ids[:begin], n_prompt), (np.concatenate([ids[:n_prompt], ids[begin:end]]), n_prompt)]


def save_family(family, folder, **changes):
    """A random model of a family; its folder as a string."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


def load_plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


def load_packed(script, folder):
    """The model as the script trains it: fp32, forward(pack) -> log-probs."""
    return script.LogProbs(script.load_model(folder, script.Args(pretrain=folder, dataset="", bf16=False)))


def padded_logps(model, sequences):
    """(log-probs, mask), both [B, T], of the responses of (ids, length of prompt), by one padded forward."""
    width = max(len(ids) for ids, _ in sequences)
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row, _ in sequences])
    places = torch.arange(width)
    lengths, prompts = torch.tensor([[len(row), n_prompt] for row, n_prompt in sequences]).T[..., None]
    logits = model(input_ids=ids, attention_mask=(places < lengths).long(), use_cache=False).logits[:, :-1].float()
    mask = ((places >= prompts) & (places < lengths))[:, 1:]
    return logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0] * mask, mask


def gradients(value, model):
    """{name: gradient} of all weights that take part."""
    names, weights = zip(*model.named_parameters())
    found = zip(names, torch.autograd.grad(value, weights, allow_unused=True))
    return {name.removeprefix("model."): gradient for name, gradient in found if gradient is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_tree_equals_separate_forwards(family, tmp_path):
    """Three trees in one pack against each of the six sequences alone: log-probs and gradients."""
    folder = save_family(family, tmp_path / "model", **FAMILIES[family])
    trees = random_trees([(20, 9, 14), (3, 12, 1), (11, 2, 17)])
    ours, plain = load_packed(dpo, folder), load_plain(folder)
    sizes = [len(ids) - n_prompt for example in trees for ids, n_prompt in branches(example)]
    found = torch.stack([part.sum() for part in ours(dpo.pack_trees(trees, "cpu")).split(sizes)])
    alone = [padded_logps(plain, [branch])[0].sum() for example in trees for branch in branches(example)]
    expected = torch.stack(alone)
    assert expected.std() > 1  # not near-uniform: an error would show
    assert (found - expected).abs().max() <= 2e-5
    weights = torch.linspace(-1, 1, 6)  # as a loss would weigh them
    found, expected = gradients(found @ weights, ours.model), gradients(expected @ weights, plain)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-4 * max(1, gradient.abs().max()), name


def plain_varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """torch.nn.attention.varlen.varlen_attn in plain torch: a segment's last query is level with its last key."""
    assert enable_gqa and window_size[1] == 0 and q.shape[2] == k.shape[2] == v.shape[2]
    out = []
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist())):
        assert q1 - q0 <= max_q and k1 - k0 <= max_k
        distance = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0) - torch.arange(k1 - k0)
        mask = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
        heads = [x.transpose(0, 1) for x in (q[q0:q1], k[k0:k1], v[k0:k1])]
        out.append(F.scaled_dot_product_attention(*heads, mask, scale=scale, enable_gqa=True).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("family", ["Qwen2", "Mistral", "DeepseekV3"])
def test_branch_for_gpus_equals_the_one_for_cpus(family, tmp_path, monkeypatch):
    """The branch of attention that only a GPU takes, made to run here with its one call in plain torch."""
    source, condition = Path(dpo.__file__).read_text(), "query.is_cuda and query.dtype != torch.float32"
    assert source.count(condition) == 1
    (tmp_path / "on_gpu.py").write_text(source.replace(condition, "True"))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", plain_varlen)
    changes = FAMILIES[family] | ({"qk_rope_head_dim": 8} if family == "DeepseekV3" else {})  # 8 + 8 is no odd size
    folder, trees = save_family(family, tmp_path / "model", **changes), random_trees([(20, 9, 14), (3, 12, 1)])
    found = []
    for script in (dpo, load_script(str(tmp_path / "on_gpu"))):
        model = load_packed(script, folder)
        logps = model(script.pack_trees(trees, "cpu"))
        found.append(torch.cat([logps, *(g.flatten() for g in gradients(logps.square().sum(), model).values())]))
    load_packed(dpo, folder)  # registers its own attention again
    assert (found[0] - found[1]).abs().max() <= 1e-4 * found[0].abs().max()


def test_attention_sinks_stop_with_a_clear_error(tmp_path, capfd):
    folder = save_family("GptOss", tmp_path / "model", head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(SystemExit), torch.no_grad():
        load_packed(dpo, folder)(dpo.pack_trees([tree([5, 6], [7, 8], [9])], "cpu"))
    assert "GptOssAttention is not supported: its attention needs ['s_aux']" in capfd.readouterr().err


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_wrong_attention_stops_before_the_reference_pass(zero_stage, run, tmp_path, monkeypatch, capsys):
    attend = dpo.attend
    monkeypatch.setattr(dpo, "attend", lambda q, k, v, scaling, *rest: attend(q, k, v, 1.5 * scaling, *rest))
    assert run(zero_stage=zero_stage) == 2
    assert "Qwen2ForCausalLM is not supported: our attention is off by" in capsys.readouterr().err
    assert not list((tmp_path / "cache").glob("logps*"))


# --- the first step


@pytest.mark.parametrize(
    "flags, loss",
    [
        ({"label_smoothing": 0.2}, math.log(2)),
        ({"loss_type": "robust", "label_smoothing": 0.2, "zero_stage": 3}, math.log(2)),
        ({"loss_type": "hinge", "lora_rank": 4, "lora_dropout": 0.5}, 1.0),
        ({"ipo": True, "beta": 0.5}, 1.0),
        ({"length_normalized": True, "packing_samples": True}, math.log(2)),
    ],
)
def test_first_loss_is_known(flags, loss, run, tmp_path):
    held_out = write_rows(tmp_path / "held_out.jsonl", make_pairs(10, seed=7))
    assert run(train_batch_size=49, eval_dataset=held_out, **flags) == 0
    found = metrics_of(tmp_path / "out")
    assert [found["loss"][0], found["eval/loss"][0]] == pytest.approx([loss, loss], rel=0, abs=1e-6)
    for name in ("rewards/margins", "rewards/chosen", "eval/rewards/margins", "kl_ref"):
        assert found[name][0] == pytest.approx(0, abs=1e-5)
    assert found["rewards/accuracies"] == [0.5]
    assert abs(found["eval/rewards/margins"][1]) > 1e-4  # one step later


def test_first_loss_in_bf16(run, tmp_path):
    assert run(bf16=True, max_steps=1) == 0
    assert metrics_of(tmp_path / "out")["loss"][0] == pytest.approx(math.log(2), abs=0.01)


def test_wrong_reference_stops_the_run(run, monkeypatch, capsys):
    block_values = dpo.block_values
    monkeypatch.setattr(dpo, "block_values", lambda *args: block_values(*args) + np.float32(0.01))
    assert run() == 2
    assert re.search(r"error: step 1: .* must be 0.6931472, but is 0\.69", capsys.readouterr().err)


# --- equality: however a step is split, it is the step of plain torch

LOSSES = {  # name: (flags, the loss of h, what its log-probs are summed to)
    "sigmoid": ({"nll_loss_coef": 0.2}, lambda h: -F.logsigmoid(0.1 * h)),
    "cdpo": ({"beta": 0.5, "label_smoothing": 0.2}, lambda h: -0.8 * F.logsigmoid(h / 2) - 0.2 * F.logsigmoid(-h / 2)),
    "ipo": ({"ipo": True, "beta": 2.0}, lambda h: (h - 0.25) ** 2),
    "ipo_sum": ({"loss_type": "ipo", "ipo_sum": True, "beta": 0.5}, lambda h: (h - 1) ** 2),
    "length_normalized": ({"length_normalized": True, "beta": 3.0}, lambda h: -F.logsigmoid(3 * h)),
    "simpo": ({"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5}, lambda h: -F.logsigmoid(2 * h - 0.5)),
}
MEANS = ("ipo", "length_normalized", "simpo")
SPLITS = {  # name: (its loss, flags)
    "micro1": ("sigmoid", {"micro_train_batch_size": 1, "zero_stage": 0}),
    "micro2": ("simpo", {"micro_train_batch_size": 2, "zero_stage": 1}),
    "micro8": ("sigmoid", {}),
    "packing": ("sigmoid", {"micro_train_batch_size": 3, "packing_samples": True}),
    "zero3": ("ipo", {"zero_stage": 3, "ref_offload": True, "gradient_checkpointing": True}),
    "offload": ("length_normalized", {"adam_offload": True, "gradient_checkpointing": True}),
    "zero3-offload": ("sigmoid", {"zero_stage": 3, "adam_offload": True, "packing_samples": True}),
}
CASES = {name: (name, {}) for name in LOSSES} | SPLITS


def encode_plainly(tokenizer, prompt, response):
    """(ids with EOS, cut at max_len; length of the prompt) by nothing but the tokenizer."""
    ids, n_prompt = tokenizer(prompt + response)["input_ids"], len(tokenizer(prompt)["input_ids"])
    assert ids[:n_prompt] == tokenizer(prompt)["input_ids"]
    return [*ids, tokenizer.eos_token_id][: SETTINGS["max_len"]], n_prompt


def plain_step(policy, ref, sequences, name):
    """(loss, {metric: value}) of a step in padded batches: sequences are chosen, rejected, chosen, ..."""
    flags, loss_function = LOSSES[name]
    logps, mask = padded_logps(policy, sequences)
    with torch.no_grad():
        ref_logps = padded_logps(ref, sequences)[0] * (name != "simpo")
    ratios = logps - ref_logps
    sizes = mask.sum(1)
    values = ratios.sum(1) / (sizes if name in MEANS else 1)
    h = values[::2] - values[1::2]
    nll = -logps[::2].sum() / sizes[::2].sum()
    loss = loss_function(h).mean() + flags.get("nll_loss_coef", 0) * nll
    metrics = {"loss": loss, "nll": nll, "rewards/margins": flags.get("beta", 0.1) * h.mean()}
    metrics |= {"logps/chosen": logps[::2].sum(1).mean(), "length/rejected": sizes[1::2].float().mean()}
    metrics["rewards/accuracies"] = (h > 0).float().mean()
    if name != "simpo":
        metrics["kl_ref"] = ((ratios.exp() * (ratios - 1) + 1) * mask).sum() / len(sequences)
    return loss, {key: value.item() for key, value in metrics.items()}


@pytest.fixture(scope="module")
def plain(tiny, other, pairs_file):
    """plain(name): three steps of plain torch on a loss, other's reference: what dpo.py should log."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    rows = [json.loads(line) for line in Path(pairs_file).read_text().splitlines()]
    pairs = [[encode_plainly(tokenizer, row["prompt"], row[k]) for k in ("chosen", "rejected")] for row in rows]
    order = np.random.default_rng([42, 0]).permutation(len(rows)).tolist()
    longest = np.argmax([len(chosen) + len(rejected) - n for (chosen, n), (rejected, _) in pairs])
    place = order.index(longest)
    order[0], order[place] = order[place], order[0]  # the longest is the first of all

    @functools.cache
    def train(name):
        policy, ref = load_plain(tiny), load_plain(other)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
        result = {}
        for begin in (0, 24, 48):
            sequences = [sequence for i in order[begin : begin + 24] for sequence in pairs[i]]
            loss, metrics = plain_step(policy, ref, sequences, name)
            optimizer.zero_grad()
            loss.backward()
            metrics["grad_norm"] = nn.utils.clip_grad_norm_(policy.parameters(), 1.0).item()
            optimizer.step()
            for key, value in metrics.items():
                result.setdefault(key, []).append(value)
        return result

    return train


def case_flags(case, other):
    """Flags of a case; SimPO has no reference."""
    loss, flags = CASES[case]
    return {**LOSSES[loss][0], **flags, **({} if loss == "simpo" else {"ref_pretrain": other})}


def assert_same_steps(save_path, plain):
    found = metrics_of(save_path)
    for name, values in plain.items():
        assert found[name] == pytest.approx(values, rel=1e-5, abs=1e-5), name
    assert ("kl_ref" in found) == ("kl_ref" in plain)


@pytest.mark.parametrize("case", CASES)
def test_one_rank_equals_plain_torch(case, plain, run, other, tmp_path):
    assert run(**case_flags(case, other)) == 0
    assert_same_steps(tmp_path / "out", plain(CASES[case][0]))
    assert bool(list((tmp_path / "cache").glob("logps*"))) == (CASES[case][0] != "simpo")


@pytest.fixture(scope="module")
def two_ranks(tiny, other, pairs_file, tmp_path_factory):
    """Folder with the results of all SPLITS on two ranks, started once."""
    out = tmp_path_factory.mktemp("two_ranks")
    configs = []
    for case in SPLITS:
        places = {"pretrain": tiny, "dataset": pairs_file, "save_path": str(out / case)}
        configs.append({**SETTINGS, **places, **case_flags(case, other), "cache_dir": str(out / f"{case}.cache")})
    (out / "configs.json").write_text(json.dumps(configs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(Path(__file__).with_name("launch.py")), "dpo", str(out / "configs.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize("case", SPLITS)
def test_two_ranks_equal_plain_torch(case, plain, two_ranks):
    assert_same_steps(two_ranks / case, plain(CASES[case][0]))


def test_reference_is_the_same_however_it_is_computed(two_ranks):
    """The log-probs on disk have the same name and values for any split."""
    files = {case: list((two_ranks / f"{case}.cache").glob("logps*")) for case in SPLITS}
    assert files.pop("micro2") == []  # SimPO
    assert len({file.name for (file,) in files.values()}) == 1
    first, *others = [np.load(file) for (file,) in files.values()]
    for logps in others:
        assert np.abs(logps - first).max() < 1e-5


# --- reference log-probabilities on disk


@pytest.fixture
def computed(monkeypatch):
    """A list that grows by a block's number of examples whenever reference log-probs are computed, not read."""
    calls, block_values = [], dpo.block_values

    def spy(engine, examples, *rest):
        calls.append(len(examples))
        return block_values(engine, examples, *rest)

    monkeypatch.setattr(dpo, "block_values", spy)
    return calls


def test_reference_is_computed_once(run, other, tmp_path, computed):
    """Again only for other rows, another reference or dtype; not for another loss, learning rate or seed."""

    def count(**flags):
        computed.clear()
        assert run(save_path=str(tmp_path / f"out{len(list(tmp_path.iterdir()))}"), max_steps=1, **flags) == 0
        return sum(computed)

    assert count() == 49
    assert count(learning_rate=1e-4, beta=0.3, seed=1, loss_type="hinge", train_batch_size=7) == 0
    assert count(ref_pretrain=other) == 49
    assert count(bf16=True) == 49
    assert count(ref_pretrain=other, learning_rate=1e-4) == 0


def test_killed_reference_pass_starts_again(run, tmp_path, monkeypatch, computed):
    assert run(cache_dir=str(tmp_path / "whole"), save_path=str(tmp_path / "a"), max_steps=1) == 0
    spy = dpo.block_values

    def killing(engine, examples, *rest):
        if computed:
            raise Killed
        return spy(engine, examples, *rest)

    monkeypatch.setattr(dpo, "block_values", killing)
    computed.clear()
    assert run(micro_train_batch_size=1, max_steps=1) == "killed" and computed == [32]  # 32 rows are a block
    monkeypatch.setattr(dpo, "block_values", spy)
    assert run(micro_train_batch_size=1, max_steps=1) == 0 and computed == [32, 32, 17]
    (whole,), (file,) = [list((tmp_path / name).glob("logps*.npy")) for name in ("whole", "cache")]
    assert np.abs(np.load(whole) - np.load(file)).max() < 1e-5


def test_cache_that_cannot_be_written(run, tmp_path, monkeypatch, capsys):
    """A notice, and a temporary folder in its place."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "file").touch()
    assert run(cache_dir=str(tmp_path / "file/cache"), max_steps=1) == 0
    assert "notice --cache_dir" in capsys.readouterr().out
    assert len(list(tmp_path.glob("flatalign-*/logps*.npy"))) == 1


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_only_one_model_in_memory(zero_stage, run, monkeypatch):
    """The reference is gone before the policy is loaded."""
    models, alive, load_model = [], [], dpo.load_model

    def spy(*args):
        before = [p for model in models if model() for p in model().parameters()]
        alive.append(sum(getattr(p, "ds_tensor", p).numel() for p in before))
        models.append(weakref.ref(model := load_model(*args)))
        return model

    monkeypatch.setattr(dpo, "load_model", spy)
    gc.disable()
    try:
        assert run(zero_stage=zero_stage, max_steps=1) == 0
    finally:
        gc.enable()
    assert alive == [0, 0]


# --- resume


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        {"zero_stage": 0},
        {"zero_stage": 3, "ref_pretrain": "other"},
        {"bf16": True},
        {"lora_rank": 4, "lora_dropout": 0.1},
    ],
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
def pairs_of(tiny, tmp_path):
    """pairs_of(rows, **flags): the pairs that are built, each (chosen, rejected) as text, trained text in []."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)

    def text(ids, trained):
        groups = itertools.groupby(zip(ids, trained), key=lambda pair: pair[1])
        texts = [(flag, tokenizer.decode([token for token, _ in group])) for flag, group in groups]
        return "".join(f"[{text}]" if flag else text for flag, text in texts)

    def build(rows, **flags):
        data, places = write_rows(tmp_path / "rows.jsonl", rows), {"pretrain": tiny, "cache_dir": str(tmp_path)}
        args = dpo.Args(**{**SETTINGS, **places, "dataset": data, **flags})
        table = dpo.load_examples(data, None, "train", dpo.load_tokenizer(tiny, args), args)
        pairs = []
        for example in dpo.fetch(table, np.arange(len(table))):
            n_prompt, begin, end = example["ends"]
            rejected = np.r_[0:n_prompt, begin:end]
            parts = [(example["input_ids"][part], example["trained"][part]) for part in (np.arange(begin), rejected)]
            pairs.append(tuple(text(*part) for part in parts))
            build.n_prompt = n_prompt
        return pairs

    return build


def said(*contents):
    """A conversation, the user first."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def pair_of(head, chosen="river<eos>", rejected="walls<eos>"):
    return f"{head}[{chosen}]", f"{head}[{rejected}]"


TEXTS = {"chosen": "river", "rejected": "walls"}
TALKS = {"chosen": said("red?", "river"), "rejected": said("red?", "walls")}
ASKED = "<|user|>red?<eos>\n<|assistant|>"
TWO_TURNS = f"<|user|>a<eos>\n<|assistant|>b<eos>\n{ASKED}"
HH = "\n\nHuman: a\n\nAssistant: b\n\nHuman: red?\n\nAssistant:"
HH_ROW = {"chosen": f"{HH} river", "rejected": f"{HH} walls"}
SHAREGPT = [[{"from": "human", "value": "red?"}, {"from": "gpt", "value": text}] for text in ("river", "walls")]
REASONS = {"chosen_finish_reason": "stop", "rejected_finish_reason": "length"}
LAYOUTS = {  # name: (row, flags, the pair)
    "text": ({"prompt": "red?\n", **TEXTS}, {}, pair_of("red?\n")),
    "numbers": ({"prompt": "2+2=", "chosen": 4, "rejected": 5.5}, {}, pair_of("2+2=", "4<eos>", "5.5<eos>")),
    "template": ({"prompt": "red", **TEXTS}, {"input_template": "Q: {}\\nA:"}, pair_of("Q: red\nA:")),
    "chat template": ({"prompt": "red?", **TEXTS}, {"apply_chat_template": True}, pair_of(ASKED)),
    "messages": (
        {"prompt": said("red?"), "chosen": said("", "river")[1:], "rejected": said("", "walls")[1:]},
        {},
        pair_of(ASKED),
    ),
    "prompt of messages, text": ({"prompt": said("a", "b", "red?"), **TEXTS}, {}, pair_of(TWO_TURNS)),
    "conversations": (
        {"chosen": said("a", "b", "red?", "river"), "rejected": said("a", "b", "red?", "walls")},
        {},
        pair_of(TWO_TURNS),
    ),
    "conversations beside a text prompt": ({"prompt": "red?", **TALKS, "messages": []}, {}, pair_of(ASKED)),
    "conversations beside a prompt of messages": ({"prompt": said("red?"), **TALKS}, {}, pair_of(ASKED)),
    "ShareGPT": (dict(zip(("chosen", "rejected"), SHAREGPT)), {}, pair_of(ASKED)),
    "hh-rlhf as text": (HH_ROW, {}, pair_of(HH, " river<eos>", " walls<eos>")),
    "hh-rlhf as a chat": (HH_ROW, {"apply_chat_template": True}, pair_of(TWO_TURNS)),
    "sampled": (
        {"id": 3, "prompt": ASKED, "chosen": "river", "rejected": "walls and", "chosen_reward": 1.0, **REASONS},
        {"apply_chat_template": True},  # it is applied already
        pair_of(ASKED, "river<eos>", "walls and"),
    ),
    "question": ({"question": "red?\n", **TEXTS}, {}, pair_of("red?\n")),
    "key flags": (
        {"q": "red?\n", "good": "river", "bad": "walls", "prompt": "no", "chosen": "no", "rejected": "yes"},
        {"prompt_key": "q", "chosen_key": "good", "rejected_key": "bad"},
        pair_of("red?\n"),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name, pairs_of):
    row, flags, expected = LAYOUTS[name]
    assert pairs_of([row], **flags) == [expected]


def test_prompt_is_stored_once(pairs_of, tokenizer):
    """In the table; no more than that, though both responses begin alike."""
    pairs_of([{"prompt": "red river?\n", "chosen": "old walls", "rejected": "old boats"}])
    assert pairs_of.n_prompt == len(tokenizer("red river?\n")["input_ids"])


def test_pairs_that_are_dropped(pairs_of, capsys):
    """Identical pairs do not count for --max_drop_ratio, what cannot be used does."""
    good = {"prompt": "red?\n", **TEXTS}
    same = {"prompt": "red?\n", "chosen": "old", "rejected": "old"}
    cut = {"prompt": "red?\n", "chosen": "a " * 60 + "b", "rejected": "a " * 60 + "c"}  # differ behind max_len
    bad = [{**good, "chosen": text} for text in ("", " \n", None, [], True)]
    assert len(pairs_of([good, same, same, cut, *bad, good], max_drop_ratio=0.5, max_len=40)) == 2
    out = capsys.readouterr().out
    assert re.search(r"dropped 3 of 10 rows: chosen == rejected; the first: .*rows.jsonl:2", out)
    assert "dropped 2 of 10 rows: empty response; the first" in out
    assert len(pairs_of([good] * 10 + [same] * 20)) == 10


GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}
BAD_INPUT = [  # rows, flags, what the error says
    ([{"text": "a"}], {}, "columns text: which"),
    ([{"prompt": "a", "chosen": "b"}], {}, "--rejected_key"),
    ([GOOD], {"prompt_key": "question"}, "no column 'question'"),
    ([GOOD], {"prompt_key": "prompt", "chosen_key": "better"}, "no column 'better'"),
    ([{"chosen": "b", "rejected": "c"}], {}, "no prompt column, and no"),
    ([{**GOOD, "rejected": "b"}] * 2, {}, "chosen == rejected"),
    ([GOOD, {**GOOD, "chosen": ""}], {}, "rows.jsonl:2: empty response"),
    ([GOOD, {**GOOD, "prompt": "red " * 200}], {}, "rows.jsonl:2: prompt >= max_len"),
    ([GOOD], {"ref_pretrain": "no/such-model"}, "no/such-model"),
    ([GOOD], {"label_smoothing": 0.5}, "--label_smoothing"),
    ([GOOD], {"loss_type": "hinge", "label_smoothing": 0.1}, "--label_smoothing"),
    ([GOOD], {"loss_type": "simpo", "ref_pretrain": "other"}, "--ref_pretrain"),
    ([GOOD], {"beta": 0.0}, "--beta must be above 0"),
]


@pytest.mark.parametrize("rows, flags, message", BAD_INPUT)
def test_bad_input(rows, flags, message, run, tmp_path, capsys):
    assert run(dataset=write_rows(tmp_path / "rows.jsonl", rows), **flags) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("error: ") and err.count("\n") == 1


# --- TRL

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
ROBUST = {"label_smoothing": 0.1}
TRL_CASES = {  # name: (TRL's options, ours)
    "sigmoid": ({}, {}),
    "cdpo": (ROBUST, ROBUST),
    "ipo": ({"loss_type": ["ipo"]}, {"loss_type": "ipo"}),
    "hinge": ({"loss_type": ["hinge"]}, {"loss_type": "hinge"}),
    "robust": ({"loss_type": ["robust"], **ROBUST}, {"loss_type": "robust", **ROBUST}),
    "nll": ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}, {"nll_loss_coef": 0.3}),
    "length-normalised": ({"loss_type": ["sigmoid_norm"]}, {"length_normalized": True}),
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


@pytest.mark.slow
@pytest.mark.parametrize("name", TRL_CASES)
def test_equals_trl(name, trl_losses, run, other, tmp_path):
    losses, pairs = trl_losses
    assert run(dataset=pairs, ref_pretrain=other, train_batch_size=8, max_len=512, **TRL_CASES[name][1]) == 0
    found = metrics_of(tmp_path / "out")
    loss, margins, chosen, rejected, grad_norm = losses[name]
    assert found["loss"][0] == pytest.approx(loss, abs=1e-5, rel=1e-6)
    assert found["grad_norm"][0] == pytest.approx(grad_norm, rel=1e-4)
    if name not in ("ipo", "length-normalised"):  # TRL logs sums there, we what the loss sees
        assert found["rewards/margins"][0] == pytest.approx(margins, abs=1e-4)
        assert [found["logps/chosen"][0], found["logps/rejected"][0]] == pytest.approx([chosen, rejected], abs=1e-3)

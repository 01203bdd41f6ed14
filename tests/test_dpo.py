"""dpo.py against closed forms, Hugging Face's own forward, plain torch, TRL, and hand-made rows."""

import functools
import itertools
import math
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import launch, make_pairs, metrics_of, train, write_rows
from first_step_of_trl import first_steps
from launch import load_script, register_attention
from torch import nn
from transformers import AutoModelForCausalLM

dpo, sft = load_script("dpo"), load_script("sft")


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
    """A .jsonl file of 49 pairs: with a batch of 24 the last step has one pair, less than two ranks need."""
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", make_pairs(49))


@pytest.fixture
def run(tiny, pairs_file, tmp_path):
    """run(**flags): a training in this process; its metrics."""
    paths = {"save_path": str(tmp_path / "out"), "cache_dir": str(tmp_path / "cache")}
    return functools.partial(train, dpo, pretrain=tiny, dataset=pairs_file, **paths)


# --- closed forms: optima of the losses in dpo.LOSSES over a softmax policy of six responses

REWARDS = torch.tensor([0.3, -0.8, 1.1, 0.0, -0.2, 0.6], dtype=torch.float64)
A, B = torch.tensor(list(itertools.permutations(range(6), 2))).T
PREFERENCE = (REWARDS[A] - REWARDS[B]).sigmoid()  # Bradley-Terry: how often A is chosen over B
WINS = torch.zeros(6, dtype=torch.float64).index_add(0, A, PREFERENCE)
ONE_PAIR = (torch.arange(30) == 0).double()
ROBUST = {"loss_type": "robust", "label_smoothing": 0.1}  # a tenth of the labels is flipped
OPTIMA = {  # name: (flags, weights of the pairs, the h that the loss finds for pairs that have weight)
    "dpo": ({"beta": 0.5}, PREFERENCE, (REWARDS[A] - REWARDS[B]) / 0.5),  # Eq. 4 of arXiv:2305.18290
    "robust": (ROBUST | {"beta": 1.0}, 0.9 * PREFERENCE + 0.1 * (1 - PREFERENCE), REWARDS[A] - REWARDS[B]),
    "ipo": ({"beta": 0.2, "loss_type": "ipo"}, PREFERENCE, (WINS[A] - WINS[B]) / 6 / 0.2),
    "ipo, one pair": ({"beta": 0.2, "loss_type": "ipo"}, ONE_PAIR, 2.5),  # 1 / (2 tau)
    "cdpo, one pair": ({"beta": 0.5, "label_smoothing": 0.1}, ONE_PAIR, 2 * math.log(9)),
}


@pytest.mark.parametrize("name", OPTIMA)
def test_optimum(name):
    torch.set_num_threads(1)  # such small tensors take ten times as long on two
    flags, weights, expected = OPTIMA[name]
    args = dpo.Args(pretrain="", dataset="", **flags)
    ref = torch.linspace(-1, 1, 6, dtype=torch.float64).sin().log_softmax(0)
    theta = ref.clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    for _ in range(1500):
        optimizer.zero_grad()
        ratios = theta.log_softmax(0) - ref
        (weights * dpo.pair_loss(ratios[A], ratios[B], args)).sum().backward()
        optimizer.step()
        schedule.step()
    assert ((ratios[A] - ratios[B] - expected)[weights > 0]).abs().max() <= 1e-4


# --- log-probabilities: one tree = two separate rows = Hugging Face

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 90, "max_position_embeddings": 128}
SIZES |= {"initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WINDOW = {"sliding_window": 7, "head_dim": 8}  # shorter than the rows
LAYERS = ["sliding_attention", "full_attention"]
GEMMA4 = {"num_hidden_layers": 4, "layer_types": LAYERS * 2, "num_kv_shared_layers": 2, "global_head_dim": 16}
GEMMA4 |= {"vocab_size_per_layer_input": 90, "hidden_size_per_layer_input": 8, "final_logit_softcapping": 3.0}
DEEPSEEK = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}
DEEPSEEK |= {"v_head_dim": 6, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
DEEPSEEK |= {"moe_intermediate_size": 24, "num_key_value_heads": 4}
FAMILIES = dict.fromkeys("Llama Qwen2 Phi3 Olmo2 GPTNeoX GPT2".split(), {}) | {
    "Qwen3": {"head_dim": 8},
    "Mistral": WINDOW,
    "Gemma3Text": {**WINDOW, "layer_types": LAYERS},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Granite": {"logits_scaling": 3.0, "attention_multiplier": 0.3},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32, "layerdrop": 0.5},  # as GPT2 it has dropout of 0.1
    "Gemma4Text": {**WINDOW, **GEMMA4},
    "DeepseekV3": DEEPSEEK,
}


def make_trees(*sizes):
    """(trees of random ids, with these lengths of prompt, chosen, rejected; their [(ids, length of prompt)])."""
    rng, trees, sequences = np.random.default_rng(0), [], []
    for lengths in sizes:
        n_prompt, begin, end = ends = np.cumsum(lengths)
        ids = rng.integers(3, 90, end)
        first = max(1, n_prompt)  # nothing predicts the first token of an empty prompt's responses
        trained = (np.arange(end) >= first) & ((np.arange(end) != begin) | (n_prompt > 0))
        trees.append({"input_ids": ids, "trained": trained, "ends": ends})
        sequences += [(ids[:begin], first), (np.r_[ids[:n_prompt], ids[begin:]], first)]
    return trees, sequences


def save_family(family, folder, **changes):
    """A random model of a family; its folder as a string."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES[family], **changes})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


def load_plain(folder):
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def load_packed(script, folder):
    register_attention(script)
    model = script.load_model(folder, script.Args(pretrain=folder, dataset="", bf16=False))
    return script.LogProbs(model).train()  # no dropout is left in it


def padded_logps(model, sequences):
    """(log-probs, mask), both [B, T], of the responses of (ids, length of prompt), by one padded forward."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids, _ in sequences], batch_first=True)
    lengths, prompts = torch.tensor([[len(ids), n_prompt] for ids, n_prompt in sequences]).T[..., None]
    places = torch.arange(ids.shape[1])
    logits = model(input_ids=ids, attention_mask=(places < lengths).long(), use_cache=False).logits
    logps = logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    mask = ((places >= prompts) & (places < lengths))[:, 1:]
    return logps * mask, mask


@pytest.mark.parametrize("family", FAMILIES)
def test_tree_equals_separate_forwards(family, tmp_path):
    """Four trees in one pack against each of the eight sequences alone: log-probs and gradients."""
    folder = save_family(family, tmp_path / "model")
    ours, plain = load_packed(dpo, folder), load_plain(folder)
    trees, sequences = make_trees((20, 9, 14), (3, 12, 1), (0, 6, 8), (11, 2, 17))
    parts = ours(dpo.pack_trees(trees, "cpu")).split([len(ids) - n for ids, n in sequences])
    found = torch.stack([part.sum() for part in parts])
    expected = torch.stack([padded_logps(plain, [sequence])[0].sum() for sequence in sequences])
    assert expected.std() > 1  # not near-uniform: an error would show
    assert (found - expected).abs().max() <= 2e-5
    weights = torch.linspace(-1, 1, 8)  # as a loss would weigh them
    (found @ weights).backward()
    (expected @ weights).backward()
    for name, parameter in plain.named_parameters():
        error = ours.model.get_parameter(name).grad - parameter.grad
        assert error.abs().max() <= 1e-4 * max(1, parameter.grad.abs().max()), name


@pytest.mark.parametrize("script, check", [(dpo, "check_tree"), (sft, "check_attention")], ids=["dpo", "sft"])
@pytest.mark.parametrize("family", ["Bloom", "Llama", "Gemma2"])
def test_what_cannot_be_exact_stops(family, script, check, tmp_path, monkeypatch, capsys):
    """Sequences that see each other (Bloom's, by ALiBi), a head that is not the model's, soft-capped attention."""
    monkeypatch.setitem(FAMILIES, family, {"head_dim": 8} if family == "Gemma2" else {})
    args = script.Args(pretrain=save_family(family, tmp_path / "model"), dataset="", bf16=family == "Bloom")
    register_attention(script)
    model = script.LogProbs(script.load_model(args.pretrain, args))
    model.device, model.scale = "cpu", 40.0 if family == "Llama" else 1.0
    with pytest.raises(SystemExit):
        getattr(script, check)(model, args)
    cause = {"Gemma2": "Attention is not supported: its attention needs ['softcap']"}
    assert f"{family}{cause.get(family, 'ForCausalLM is not supported: log-probs are off')}" in capsys.readouterr().err


def plain_varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """torch.nn.attention.varlen.varlen_attn in plain torch: a segment's last query is level with its last key."""
    assert enable_gqa and window_size[1] == 0 and q.shape[2] == k.shape[2] == v.shape[2]
    out = []
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist())):
        assert q1 - q0 <= max_q and k1 - k0 <= max_k
        distance = torch.arange(q0 - q1, 0)[:, None] - torch.arange(k0 - k1, 0)
        mask = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
        heads = [x.transpose(0, 1) for x in (q[q0:q1], k[k0:k1], v[k0:k1])]
        out.append(F.scaled_dot_product_attention(*heads, mask, scale=scale, enable_gqa=True).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_equal_separate_forwards(family, tmp_path):
    """The attention of the trainers without trees: three rows in one pack against each alone."""
    folder = save_family(family, tmp_path / "model")
    rows = [{"input_ids": np.arange(n) * 5 % 87 + 3, "trained": np.arange(n) >= 4} for n in (20, 9, 33)]
    sequences = [(row["input_ids"], 4) for row in rows]
    with torch.no_grad():
        found = load_packed(sft, folder)(sft.pack_rows(rows, "cpu")).split([16, 5, 29])
        expected = [padded_logps(load_plain(folder), [sequence])[0].sum() for sequence in sequences]
    assert (torch.stack([part.sum() for part in found]) - torch.stack(expected)).abs().max() <= 1e-4


@pytest.mark.parametrize("family, changes", [("Mistral", {}), ("DeepseekV3", {"qk_rope_head_dim": 8})])
def test_branch_for_gpus_equals_the_one_for_cpus(family, changes, tmp_path, monkeypatch):
    """The branch of attention that only a GPU takes, made to run here with its one call in plain torch."""
    source, condition = Path(dpo.__file__).read_text(), "query.is_cuda and query.dtype != torch.float32"
    assert source.count(condition) == 1
    (tmp_path / "on_gpu.py").write_text(source.replace(condition, "True"))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", plain_varlen)
    folder = save_family(family, tmp_path / "model", **changes)
    trees, _ = make_trees((20, 9, 14), (3, 12, 1))
    found = []
    for script in (load_script(str(tmp_path / "on_gpu")), dpo):  # the last one's attention stays registered
        model = load_packed(script, folder)
        logps = model(script.pack_trees(trees, "cpu"))
        logps.square().sum().backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append(torch.cat([logps, *gradients]))
    assert (found[0] - found[1]).abs().max() <= 1e-4 * found[1].abs().max()


# --- the first step

FIRST_LOSSES = [
    ({"label_smoothing": 0.2, "bf16": True}, math.log(2)),
    ({"loss_type": "robust", "label_smoothing": 0.2, "zero_stage": 3}, math.log(2)),
    ({"loss_type": "hinge", "lora_rank": 4, "lora_dropout": 0.5}, 1.0),
    ({"length_normalized": True, "packing_samples": True}, math.log(2)),
]


@pytest.mark.parametrize("flags, loss", FIRST_LOSSES)
def test_first_loss_is_known(flags, loss, run, tmp_path):
    """In the evaluation before the first step, too."""
    held_out = write_rows(tmp_path / "held_out.jsonl", make_pairs(10, seed=7))
    found, error = run(eval_dataset=held_out, max_steps=1, **flags), 1e-5
    if "bf16" in flags:
        error = 0.1
    assert [found["loss"][0], found["eval/loss"][0]] == pytest.approx([loss, loss], rel=0, abs=error / 10)
    for name in ("rewards/margins", "rewards/chosen", "eval/rewards/margins"):
        assert found[name][0] == pytest.approx(0, abs=error)
    assert abs(found["eval/rewards/margins"][1]) > 1e-4  # one step later


def test_a_tie_counts_half(run, tmp_path):
    """Beside pairs of equal responses, which are left out, and not as unusable."""
    rows = [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 3 + make_pairs(1)
    found = run(dataset=write_rows(tmp_path / "pairs.jsonl", rows), max_drop_ratio=0.0)
    assert (found["rewards/margins"], found["rewards/accuracies"]) == ([0], [0.5])


# --- equality: however a step is split, it is the step of plain torch

LOSSES = {  # name: (flags, the loss of h)
    "sigmoid": ({"nll_loss_coef": 0.2}, lambda h: -F.logsigmoid(0.1 * h)),
    "hinge": ({"loss_type": "hinge", "beta": 0.5}, lambda h: F.relu(1 - h / 2)),
    "ipo": ({"ipo": True, "beta": 2.0}, lambda h: (h - 0.25) ** 2),
    "ipo_sum": ({"loss_type": "ipo", "ipo_sum": True, "beta": 0.5}, lambda h: (h - 1) ** 2),
    "length_normalized": ({"length_normalized": True, "beta": 3.0}, lambda h: -F.logsigmoid(3 * h)),
    "simpo": ({"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5}, lambda h: -F.logsigmoid(2 * h - 0.5)),
}
MEANS = ("ipo", "length_normalized", "simpo")
CASES = {  # name: (the loss, flags)
    "micro1": ("sigmoid", {"micro_train_batch_size": 1, "zero_stage": 0}),
    "micro2": ("simpo", {"micro_train_batch_size": 2, "zero_stage": 1}),
    "micro8": ("ipo_sum", {}),
    "packing": ("sigmoid", {"micro_train_batch_size": 3, "packing_samples": True}),
    "zero3": ("ipo", {"zero_stage": 3, "ref_offload": True, "gradient_checkpointing": True}),
    "offload": ("length_normalized", {"adam_offload": True, "gradient_checkpointing": True}),
    "zero3-offload": ("hinge", {"zero_stage": 3, "adam_offload": True}),
}


def plain_step(policy, ref, sequences, name):
    """(loss, {metric: value}) of a step in one padded batch: sequences are chosen, rejected, chosen, ..."""
    flags, loss_function = LOSSES[name]
    logps, mask = padded_logps(policy, sequences)
    with torch.no_grad():
        ref_logps = padded_logps(ref, sequences)[0] * (name != "simpo")
    ratios, sizes = logps - ref_logps, mask.sum(1)
    values = ratios.sum(1) / (sizes if name in MEANS else 1)
    h = values[::2] - values[1::2]
    nll = -logps[::2].sum() / sizes[::2].sum()
    loss = loss_function(h).mean() + flags.get("nll_loss_coef", 0) * nll
    metrics = {"loss": loss, "nll": nll, "rewards/margins": flags.get("beta", 0.1) * h.mean()}
    metrics |= {"logps/chosen": logps[::2].sum(1).mean(), "length/rejected": sizes[1::2].float().mean()}
    return loss, {key: value.item() for key, value in metrics.items()}


@pytest.fixture(scope="module")
def plain(tiny, other, tokenizer):
    """plain(name): three steps of plain torch on a loss, other's reference: what dpo.py should log."""
    pairs = []
    for row in make_pairs(49):
        prompt = tokenizer(row["prompt"])["input_ids"]
        texts = [tokenizer(row["prompt"] + row[key])["input_ids"] for key in ("chosen", "rejected")]
        assert all(text[: len(prompt)] == prompt for text in texts)
        pairs.append([([*text, tokenizer.eos_token_id][:100], len(prompt)) for text in texts])
    lengths = [len(chosen) + len(rejected) - n for (chosen, n), (rejected, _) in pairs]
    flags = {"pretrain": tiny, "dataset": "", "train_batch_size": 24}
    batches = [*dpo.plan_steps(np.array(lengths), dpo.Args(**flags))]

    @functools.cache
    def train(name):
        policy, ref, steps = load_plain(tiny), load_plain(other), []
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
        for numbers in batches:
            batch = [sequence for i in numbers for sequence in pairs[i]]
            loss, metrics = plain_step(policy, ref, batch, name)
            optimizer.zero_grad()
            loss.backward()
            metrics["grad_norm"] = nn.utils.clip_grad_norm_(policy.parameters(), 1.0).item()
            optimizer.step()
            steps.append(metrics)
        return {key: [step[key] for step in steps] for key in steps[0]}

    return train


def case_flags(case, other):
    loss, flags = CASES[case]
    return {"ref_pretrain": None if loss == "simpo" else other, **LOSSES[loss][0], **flags}


@pytest.fixture(scope="module")
def two_ranks(tiny, other, pairs_file, tmp_path_factory):
    """Folder with the results of all CASES on two ranks."""
    out, configs = tmp_path_factory.mktemp("two_ranks"), []
    for case in CASES:
        paths = {"save_path": str(out / case), "cache_dir": str(out / f"{case}.cache")}
        configs.append({"pretrain": tiny, "dataset": pairs_file, **paths, **case_flags(case, other)})
    launch("dpo", configs, out)
    return out


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_equals_plain_torch(ranks, case, plain, run, other, tmp_path, two_ranks):
    """SimPO without a reference pass."""
    cache, loss = two_ranks / f"{case}.cache", CASES[case][0]
    found = metrics_of(two_ranks / case)
    if ranks == 1:
        cache = tmp_path / "cache"
        found = run(**case_flags(case, other))
    for name, values in plain(loss).items():
        assert found[name] == pytest.approx(values, rel=1e-5, abs=1e-5), name
    assert len(list(cache.glob("logps*"))) == (loss != "simpo")


# --- reference log-probabilities on disk


def test_reference_is_computed_once(run, other, tmp_path):
    """Again only for another reference, dtype or forward pass; not for another loss, learning rate or seed."""
    harmless = {"learning_rate": 1e-4, "beta": 0.3, "seed": 1, "loss_type": "hinge", "train_batch_size": 7}
    runs = [({}, 1), (harmless, 1), ({"ref_pretrain": other}, 2), ({"bf16": True}, 3)]
    runs.append((harmless | {"ref_pretrain": other}, 3))
    with mock.patch.object(dpo, "start_frozen", wraps=dpo.start_frozen) as start_frozen:
        for i, (flags, count) in enumerate(runs):
            run(save_path=str(tmp_path / f"{i}"), max_steps=1, **flags)
            assert start_frozen.call_count == count
        for name, old, count in (("forward", "fp32 nats", 4), ("loss", "# A tie is half right", 4)):
            (tmp_path / f"{name}.py").write_text(Path(dpo.__file__).read_text().replace(old, ""))
            with mock.patch.object(dpo, "__file__", str(tmp_path / f"{name}.py")):
                run(save_path=str(tmp_path / name), max_steps=1)
            assert start_frozen.call_count == count


# --- rows


def said(*contents):
    """A conversation, the user first."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


TEXTS = {"chosen": "river", "rejected": "walls"}
ASKED = "<|user|>red?<eos>\n<|assistant|>"
LONG = f"<|user|>a<eos>\n<|assistant|>b<eos>\n{ASKED}"
LONG_TALKS = {"chosen": said("a", "b", "red?", "river"), "rejected": said("a", "b", "red?", "walls")}
HH = "\n\nHuman: a\n\nAssistant: b\n\nHuman: red?\n\nAssistant:"
SAMPLED = {"chosen_finish_reason": "stop", "rejected_finish_reason": "length", "chosen_reward": 1.0, "id": 3}
CHAT = {"apply_chat_template": True}
RENAMED = {"q": "red?", "good": "river", "bad": "walls", "prompt": "no", "chosen": "no", "rejected": "yes"}
KEYS = {"prompt_key": "q", "chosen_key": "good", "rejected_key": "bad"}
LAYOUTS = {  # name: (row, flags, prompt, responses where they are not those of TEXTS and EOS)
    "text": ({"prompt": "red?\n", **TEXTS}, {}, "red?\n"),
    "prompt of messages": ({"prompt": said("a", "b", "red?"), **TEXTS}, {}, LONG),
    "conversations": (LONG_TALKS, {}, LONG),
    "hh-rlhf": ({"chosen": f"{HH} river", "rejected": f"{HH} walls"}, {}, HH, " river<eos>", " walls<eos>"),
    "sampled": ({"prompt": ASKED, **TEXTS, **SAMPLED}, CHAT, ASKED, "river<eos>", "walls"),
    "alpaca": ({"instruction": "Say red.", "input": "red?", **TEXTS}, {}, "Say red.\n\nred?"),
    "key flags": (RENAMED, KEYS, "red?"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name, tiny, tokenizer):
    row, flags, prompt, *responses = LAYOUTS[name]
    (pair,) = dpo.encode_pair(row, tokenizer, dpo.Args(pretrain=tiny, dataset="", **flags))
    n_prompt, begin, end = pair["ends"]
    assert (pair["trained"] == (np.arange(end) >= n_prompt)).all()  # the prompt is stored once
    parts = np.split(pair["input_ids"], [n_prompt, begin])
    assert [*map(tokenizer.decode, parts)] == [prompt, *(responses or ["river<eos>", "walls<eos>"])]


GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}
BAD_INPUT = [  # rows, flags, what the error says
    ([{"text": "a"}], {}, "no column chosen (a flag *_key names another) but text"),
    ([{"chosen": "b", "rejected": "c"}], {}, "no prompt among chosen, rejected"),
    ([GOOD, {**GOOD, "chosen": ""}], {}, "rows.jsonl:2: no assistant turn after a prompt, or an empty response"),
    ([GOOD], {"ref_pretrain": "no/such-model"}, "no/such-model"),
    ([GOOD], {"loss_type": "hinge", "label_smoothing": 0.1}, "--label_smoothing"),
    ([GOOD], {"loss_type": "simpo", "ref_pretrain": "other"}, "--ref_pretrain"),
    ([GOOD], {"beta": 0.0}, "--beta must be above 0"),
]


@pytest.mark.parametrize("rows, flags, message", BAD_INPUT)
def test_bad_input(rows, flags, message, run, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(dataset=write_rows(tmp_path / "rows.jsonl", rows), **flags)
    err = capsys.readouterr().err
    assert message in err and err.startswith("error: ") and err.count("\n") == 1


# --- TRL

TRL_CASES = {  # name: (TRL's options, ours)
    "robust": (ROBUST | {"loss_type": ["robust"]}, ROBUST),
    "hinge": ({"loss_type": ["hinge"]}, {"loss_type": "hinge"}),
    "ipo": ({"loss_type": ["ipo"]}, {"loss_type": "ipo"}),
    "nll": ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}, {"nll_loss_coef": 0.3}),
    "length-normalised": ({"loss_type": ["sigmoid_norm"]}, {"length_normalized": True}),
}


@pytest.mark.slow
def test_first_step_equals_trl(run, tiny, other, tmp_path):
    pairs = write_rows(tmp_path / "pairs.jsonl", make_pairs(8, seed=5))
    logs = first_steps("DPO", tiny, other, pairs, {name: theirs for name, (theirs, _) in TRL_CASES.items()})
    for name, (_, flags) in TRL_CASES.items():
        paths = {"dataset": pairs, "ref_pretrain": other, "save_path": str(tmp_path / name)}
        found, log = run(**paths, max_len=512, **flags), logs[name]
        assert found["loss"][0] == pytest.approx(log["loss"], abs=1e-5, rel=1e-6), name
        assert found["grad_norm"][0] == pytest.approx(log["grad_norm"], rel=1e-4), name
        if name not in ("ipo", "length-normalised"):  # TRL logs sums there, we what the loss sees
            assert found["rewards/margins"][0] == pytest.approx(log["rewards/margins"], abs=1e-4), name

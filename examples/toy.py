"""The embedded toy: a tiny policy, a reward model and prompts, made here in about a minute on two CPU cores, no download.

    python examples/toy.py --out toy                  (`bash iterate.sh` without arguments runs this)
    python examples/toy.py --out toy --random_rm      (adds rm_random/, the control experiment)

The language is short reviews of films, novels and plays. Every opinion word in them is good or bad (POSITIVE, NEGATIVE),
so the true score of any text is known by counting: share of good minus share of bad opinion words, in [-1, 1]. The start
policy praises and complains at random (mean true score near 0); an alignment run has worked when
    "the plot was dull and the music was flat. overall, i was bored."      (true score -1)
has turned into
    "the plot was superb and the music was tender. overall, i was moved."  (true score +1).

What lies in --out afterwards:
    prompts.jsonl   256 distinct rows, {"prompt": "Review of the film The Silent Harbor:"}
    sft.jsonl       what the start policy was trained on, {"input": <a prompt>, "output": <a review of mixed sentiment>}
    policy_init/    a Qwen2 of 1.1 M random parameters and its own byte-level BPE tokenizer with a chat template
    policy/         the start policy: policy_init after one epoch of `python sft.py` on sft.jsonl (log: policy.log)
    rm/             a reward model (sequence classification, one label) that reads prompt + output + EOS. It has learned noisy
                    labels, and that broken text is worth 0.5 less, so it is near the truth and not the truth
    rm_random/      a reward model that knows nothing: with it, a run must leave the true score where it was
    toy.json        the settings and what was measured; written last. The same command again finds it and does nothing.

Everything random comes from --seed; on one machine the same seed gives the same bytes.
"""

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification


@dataclass
class Args:
    out: str
    """Folder to make, e.g. runs/toy. Only files named in the docstring are written or replaced there."""
    seed: int = 0
    """Seed of everything random: texts, initial weights, data order, samples."""
    random_rm: bool = False
    """Also write rm_random/. On a complete toy this adds just that folder (seconds)."""


# ---- the language

POSITIVE = "superb gripping charming brilliant tender witty fresh elegant bold lovely".split()
NEGATIVE = "dull clumsy tedious bland stale weak lazy flat shallow dreary".split()
GLAD = "moved thrilled delighted amused".split()  # opinion words too, about the reviewer
SORRY = "bored annoyed tired disappointed".split()
ASPECTS = {
    "film": "plot acting music ending dialogue lighting".split(),
    "novel": "plot prose hero ending dialogue opening".split(),
    "play": "plot acting staging ending dialogue set".split(),
}
TITLE_FIRST = "Silent Golden Hidden Broken Winter Distant Crimson Hollow Paper Midnight Northern Burning".split()
TITLE_SECOND = "Harbor Garden Letter River Orchard Mirror Station Lantern Island Bridge Violin Kingdom".split()


def make_prompt(rng):
    """One of 3 x 12 x 12 prompts. It ends without a blank, so a response needs none in front either."""
    return f"Review of the {rng.choice(list(ASPECTS))} The {rng.choice(TITLE_FIRST)} {rng.choice(TITLE_SECOND)}:"


def make_review(prompt, rng):
    """Three or four opinions, each good or bad by a fair coin; "but" stands between two that differ."""
    kind = re.search(r"the (\w+) The", prompt)[1]
    aspects = rng.sample(ASPECTS[kind], 3)
    good = [rng.random() < 0.5 for _ in range(4)]
    a, b, c = (f"{rng.choice(['', '', 'truly ', 'rather '])}{rng.choice(POSITIVE if g else NEGATIVE)}" for g in good[:3])
    link = "and" if good[0] == good[1] else "but"
    second = rng.choice([f"the {aspects[1]} was {b}", f"i found the {aspects[1]} {b}"])
    middle = rng.choice(["", f" the {aspects[2]} felt {c}.", f" to me the {aspects[2]} seemed {c}."])
    close = rng.choice(["overall, i was", "in the end i was", f"the {kind} left me"])
    return f"the {aspects[0]} was {a} {link} {second}.{middle} {close} {rng.choice(GLAD if good[3] else SORRY)}."


def break_review(text, rng):
    """A review gone wrong, as a policy in trouble writes it: cut off, shuffled, stuttering, words missing, noise, nothing."""
    words = text.split()
    way = rng.randrange(6)
    if way == 0:
        return text[: rng.randrange(len(text) - 2)]
    if way == 1:
        return " ".join(rng.sample(words, len(words)))
    if way == 2:
        at = rng.randrange(len(words))
        return " ".join(words[:at] + [words[at]] * rng.randint(3, 20) + words[at:])
    if way == 3:
        return " ".join(word for word in words if rng.random() < 0.6)
    if way == 4:
        return " ".join(rng.choices(POSITIVE + NEGATIVE + GLAD + SORRY + words, k=rng.randint(1, 25)))
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz    ,.:;!?'\n0123456789", k=rng.randint(0, 60)))


def true_score(text):
    """The sentiment of an output, known exactly: (good - bad) / (good + bad) opinion words, in [-1, 1]; 0 without any."""
    words = re.findall(r"[a-z]+", text.lower())
    good = sum(word in POSITIVE or word in GLAD for word in words)
    bad = sum(word in NEGATIVE or word in SORRY for word in words)
    return (good - bad) / max(good + bad, 1)


# ---- tokenizer and models

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer(rows):
    """Byte-level BPE learned from rows: nearly every word of the language is one token, any other text still round-trips."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(vocab_size=640, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator((row["input"] + row["output"] for row in rows), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token="<|eos|>", additional_special_tokens=special[2:],
        chat_template=CHAT_TEMPLATE, model_max_length=512, clean_up_tokenization_spaces=False,
    )


def make_config(tokenizer, **shape):
    """A Qwen2 shape, fp32, untied; pad and EOS are two different ids (reward models look for the last id that is not pad)."""
    shape = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, **shape}
    return Qwen2Config(vocab_size=len(tokenizer), max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=None,
                       eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, dtype="float32", **shape)


def make_policy_init(tokenizer, seed):
    """The policy before any training: random weights, 1.1 M of them."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(make_config(tokenizer))
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def train_policy(out, seed):
    """policy_init -> policy with the repository's own sft.py in a process of its own, so the toy is made by what it tests."""
    command = [sys.executable, str(Path(__file__).resolve().parents[1] / "sft.py"), "--pretrain", f"{out}/policy_init",
               "--dataset", f"{out}/sft.jsonl", "--input_key", "input", "--output_key", "output",
               "--save_path", f"{out}/policy", "--no-bf16", "--learning_rate", "3e-3", "--lr_scheduler", "cosine",
               "--max_epochs", "1", "--train_batch_size", "64", "--micro_train_batch_size", "64", "--max_len", "96",
               "--zero_stage", "1", "--seed", str(seed)]
    with open(out / "policy.log", "w") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    if code != 0:
        tail = "".join((out / "policy.log").read_text().splitlines(keepends=True)[-20:])
        sys.exit(f"{tail}\ntoy: sft.py ended with code {code}; the whole log is {out}/policy.log, its command:\n{' '.join(command)}")


def rm_batch(tokenizer, rows):
    """What a reward model reads: prompt + output + EOS, padded on the right (causal attention never looks at the padding)."""
    return tokenizer([row["input"] + row["output"] + tokenizer.eos_token for row in rows], padding=True,
                     return_tensors="pt", padding_side="right", return_token_type_ids=False)


def train_rm(tokenizer, seed, steps=250, batch=64):
    """Regression on labels with noise of 0.3. One text in five is broken and worth 0.5 less than its words say."""
    rng = random.Random(f"rm {seed}")
    torch.manual_seed(seed + 1)
    model = Qwen2ForSequenceClassification(make_config(tokenizer, hidden_size=64, intermediate_size=256, num_hidden_layers=2,
                                                       num_labels=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        rows, labels = [], []
        for _ in range(batch):
            row = make_row(rng)
            broken = rng.random() < 0.2
            if broken:
                row["output"] = break_review(row["output"], rng)
            rows.append(row)
            labels.append(true_score(row["output"]) - 0.5 * broken + rng.gauss(0, 0.3))
        scores = model(**rm_batch(tokenizer, rows)).logits[:, 0]  # [batch]
        loss = (scores - torch.tensor(labels)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def make_random_rm(tokenizer, seed):
    """Random weights. A random head still leans to good or bad words by accident, so the head is turned until its score has no
    covariance with the truth nor with the length over 1024 reviews; mean 0 and standard deviation 0.5, as a real one has."""
    rng = random.Random(f"rm_random {seed}")
    torch.manual_seed(seed + 2)
    model = Qwen2ForSequenceClassification(make_config(tokenizer, hidden_size=64, intermediate_size=256, num_hidden_layers=2,
                                                       num_labels=1, initializer_range=0.2)).eval()
    rows = [make_row(rng) for _ in range(1024)]
    batch = rm_batch(tokenizer, rows)
    length = batch["attention_mask"].sum(1)
    h = model.model(**batch).last_hidden_state[torch.arange(len(rows)), length - 1]  # [1024, H], at EOS
    truth = torch.tensor([true_score(row["output"]) for row in rows])
    avoid = torch.stack([h.mean(0), *((t - t.mean()) @ h / len(rows) for t in (truth, length.float()))])  # [3, H]
    basis = torch.linalg.qr(avoid.T).Q
    head = torch.randn(h.shape[1])
    head -= basis @ (basis.T @ head)
    model.score.weight.copy_(head * 0.5 / (h @ head).std())
    return model


@torch.no_grad()
def score(model, tokenizer, rows):
    """Rewards of rows, a list of floats."""
    return [r for i in range(0, len(rows), 128) for r in model(**rm_batch(tokenizer, rows[i : i + 128])).logits[:, 0].tolist()]


@torch.no_grad()
def sample(model, tokenizer, prompts, seed):
    """One sample per prompt at temperature 1. Returns rows, and the share that ended by itself within 64 tokens."""
    torch.manual_seed(seed)
    batch = tokenizer(prompts, padding=True, return_tensors="pt", padding_side="left", return_token_type_ids=False)
    ids = model.generate(**batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=64)
    ids = ids[:, batch["input_ids"].shape[1] :]
    rows = [{"input": p, "output": o} for p, o in zip(prompts, tokenizer.batch_decode(ids, skip_special_tokens=True))]
    return rows, (ids == tokenizer.eos_token_id).any(1).float().mean().item()


def make_row(rng):
    """A prompt and a review of it."""
    prompt = make_prompt(rng)
    return {"input": prompt, "output": make_review(prompt, rng)}



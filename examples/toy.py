"""The embedded toy: a tiny policy, a reward model and prompts, made in about a minute on two CPU cores.

    python examples/toy.py --out toy                  (`bash iterate.sh` without arguments runs this)
    python examples/toy.py --out toy --teacher        (adds teacher/, for METHOD=distill)

The language is short reviews of films, novels and plays. Every opinion word in them is good or bad, so the
true score of any text is known by counting: share of good minus share of bad opinion words, in [-1, 1]. The
start policy praises and complains at random (mean true score near 0). An alignment run has worked when
    "the plot was dull and the music was flat. overall, i was bored."      (true score -1)
has turned into
    "the plot was superb and the music was tender. overall, i was moved."  (true score +1).

What lies in --out afterwards:
    prompts.jsonl   256 distinct rows, {"prompt": "Review of the film The Silent Harbor:"}
    sft.jsonl       what the start policy learned from, {"input": a prompt, "output": a review}
    policy_init/    a Qwen2 of 1.3 M random parameters, its own byte-level BPE tokenizer, a chat template
    policy/         the start policy: one epoch of `python sft.py` on sft.jsonl (its console: policy.log)
    rm/             a reward model (sequence classification, one label) that reads prompt + output + EOS. It
                    learned from noisy labels, and that broken text is worth 0.5 less: near the truth, not it
    teacher/        a policy that mostly praises, trained as policy/ was, but on praise.jsonl
    toy.json        the settings: the same command again finds it and does nothing

Everything random comes from --seed: same machine, same number of cores, same bytes. No download.
"""

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen2Tokenizer,
)
from transformers.utils import logging


@dataclass
class Args:
    out: str  # Folder to make, e.g. runs/toy. It appears when everything in it is there.
    seed: int = 0  # Seed of everything random: texts, initial weights, data order, samples.
    teacher: bool = False  # Also make teacher/. On a complete toy this adds just that folder.


# --- the language

POSITIVE = "superb gripping charming brilliant tender witty fresh elegant bold lovely".split()
NEGATIVE = "dull clumsy tedious bland stale weak lazy flat shallow dreary".split()
GLAD = "moved thrilled delighted amused".split()  # how the reviewer felt; opinion words too
SORRY = "bored annoyed tired disappointed".split()
ASPECTS = {
    "film": "plot acting music ending dialogue lighting".split(),
    "novel": "plot prose hero ending dialogue opening".split(),
    "play": "plot acting staging ending dialogue set".split(),
}
FIRST = "Silent Golden Hidden Broken Winter Distant Crimson Hollow Paper Midnight Northern Burning".split()
SECOND = "Harbor Garden Letter River Orchard Mirror Station Lantern Island Bridge Violin Kingdom".split()


def make_row(rng, share=0.5):
    """One of 3 x 12 x 12 prompts and a review: three or four opinions, share of them good, "but" between two
    that differ. No blank where prompt and review meet, so nothing is lost to a strip()."""
    kind = rng.choice(list(ASPECTS))
    one, two, three = rng.sample(ASPECTS[kind], 3)
    good = [rng.random() < share for _ in range(4)]
    opinions = [rng.choice(POSITIVE if is_good else NEGATIVE) for is_good in good[:3]]
    a, b, c = (rng.choice(["", "", "truly ", "rather "]) + opinion for opinion in opinions)
    link = "and" if good[0] == good[1] else "but"
    second = rng.choice([f"the {two} was {b}", f"i found the {two} {b}"])
    third = rng.choice(["", f" the {three} felt {c}.", f" to me the {three} seemed {c}."])
    close = rng.choice(["overall, i was", "in the end i was", f"the {kind} left me"])
    feeling = rng.choice(GLAD if good[3] else SORRY)
    return {
        "input": f"Review of the {kind} The {rng.choice(FIRST)} {rng.choice(SECOND)}:",
        "output": f"the {one} was {a} {link} {second}.{third} {close} {feeling}.",
    }


def break_text(text, rng):
    """A review gone wrong, as a policy in trouble writes."""
    words = text.split()
    at = rng.randrange(len(words))
    way = rng.choice(["cut", "shuffled", "stuttering", "lossy", "salad", "noise"])
    if way == "cut":
        return text[: rng.randrange(len(text) - 2)]
    if way == "shuffled":
        return " ".join(rng.sample(words, len(words)))
    if way == "stuttering":
        return " ".join(words[:at] + [words[at]] * rng.randint(3, 20) + words[at:])
    if way == "lossy":
        return " ".join(word for word in words if rng.random() < 0.6)
    if way == "salad":
        return " ".join(rng.choices(POSITIVE + NEGATIVE + GLAD + SORRY + words, k=rng.randint(1, 25)))
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz    ,.:;!?'\n0123", k=rng.randint(0, 60)))


def true_score(text: str) -> float:
    """The sentiment of an output, exactly: (good - bad) / (good + bad) opinion words; 0 without any."""
    words = re.findall(r"[a-z]+", text.lower())
    good = sum(word in POSITIVE + GLAD for word in words)
    bad = sum(word in NEGATIVE + SORRY for word in words)
    return (good - bad) / max(good + bad, 1)


# --- tokenizer and models

POLICY_SHAPE = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 6}
RM_SHAPE = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_labels": 1}
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer(rows):
    """Byte-level BPE: a word of the language is one token, any other text round-trips (up to NFC, as Qwen's).

    Trap: for a model of type qwen2, AutoTokenizer builds a Qwen2Tokenizer whatever class was saved: with NFC,
    Qwen's split rule, and an unk token <|endoftext|> whose id would lie beyond the model's vocabulary. So
    this is a Qwen2Tokenizer from the start, and its unk token, which bytes never need, is the pad token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    special = ["<|pad|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=640, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    # Prompt and review apart: no token may span both, or a prompt's ids would depend on what follows.
    core.train_from_iterator((text for row in rows for text in row.values()), trainer)
    bpe = json.loads(core.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=bpe["vocab"], merges=[tuple(pair) for pair in bpe["merges"]],
        unk_token="<|pad|>", pad_token="<|pad|>", eos_token="<|eos|>", extra_special_tokens=special[2:],
        chat_template=CHAT_TEMPLATE, model_max_length=512, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def make_config(tokenizer, shape):
    """A Qwen2, fp32, untied. Pad and EOS differ: a reward model is read at the last id that is not pad."""
    return Qwen2Config(
        vocab_size=len(tokenizer), num_hidden_layers=2, num_key_value_heads=2, max_position_embeddings=512,
        dtype="float32", tie_word_embeddings=False, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **shape,
    )  # fmt: skip


def train_policy(folder, name, data, seed):
    """policy_init -> name by the repository's sft.py in its own process: made by what it will test."""
    script = Path(__file__).resolve().parents[1] / "sft.py"
    flags = (
        f"--pretrain policy_init --dataset {data} --save_path {name} --seed {seed} --input_key input"
        " --output_key output --max_len 96 --no-bf16 --zero_stage 1 --train_batch_size 32"
        " --micro_train_batch_size 32 --learning_rate 3e-3 --lr_scheduler cosine"
    )
    command = [sys.executable, str(script), *flags.split()]
    path = folder / f"{name}.log"
    with open(path, "w") as log:
        run = subprocess.run(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    if run.returncode != 0:
        tail = "\n".join(path.read_text().splitlines()[-20:])
        sys.exit(f"{tail}\nerror: sft.py ended with code {run.returncode}: see {path}")


def rm_batch(tokenizer, rows):
    """What a reward model reads: prompt + output + EOS; padded at the end, unseen by causal attention."""
    texts = [row["input"] + row["output"] + tokenizer.eos_token for row in rows]
    return tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")


def train_rm(tokenizer, seed, steps=80, batch=64, lr=3e-3):
    """Squared error against labels with a noise of 0.3; one text in five is broken and worth 0.5 less."""
    rng = random.Random(f"rm {seed}")
    torch.manual_seed(seed)
    model = Qwen2ForSequenceClassification(make_config(tokenizer, RM_SHAPE))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        rows = [make_row(rng) for _ in range(batch)]
        labels = []
        for row in rows:
            broken = rng.random() < 0.2
            if broken:
                row["output"] = break_text(row["output"], rng)
            labels.append(true_score(row["output"]) - 0.5 * broken + rng.gauss(0, 0.3))
        scores = model(**rm_batch(tokenizer, rows)).logits[:, 0]  # [batch]
        (scores - torch.tensor(labels)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def correlation(rm, tokenizer, rows):
    """Of rewards with true scores."""
    rewards = rm(**rm_batch(tokenizer, rows)).logits[:, 0]
    truth = torch.tensor([true_score(row["output"]) for row in rows])
    return torch.corrcoef(torch.stack([rewards, truth]))[0, 1].item()


# --- files


def write_rows(path, rows):
    """A .jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def save(model, tokenizer, path):
    """A Hugging Face folder."""
    model.save_pretrained(path)
    tokenizer.backend_tokenizer.no_padding()  # else the padding of the last batch is saved along
    tokenizer.save_pretrained(path)


def make_toy(folder, seed):
    """Everything but teacher/ and toy.json."""
    rng = random.Random(f"texts {seed}")
    rows = [make_row(rng) for _ in range(6400)]
    prompts = list(dict.fromkeys(make_row(rng)["input"] for _ in range(5000)))[:256]
    write_rows(folder / "sft.jsonl", rows)
    write_rows(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    print(f"toy    {len(prompts)} prompts, {len(rows):,} reviews such as: {rows[0]['output']}")

    tokenizer = make_tokenizer(rows)
    torch.manual_seed(seed)
    policy = Qwen2ForCausalLM(make_config(tokenizer, POLICY_SHAPE))
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    policy.generation_config = GenerationConfig(**ids)
    save(policy, tokenizer, folder / "policy_init")
    print(f"toy    training a policy of {policy.num_parameters():,} parameters", flush=True)
    train_policy(folder, "policy", "sft.jsonl", seed)

    rm = train_rm(tokenizer, seed)
    save(rm, tokenizer, folder / "rm")
    rng = random.Random(f"fresh {seed}")
    fresh = correlation(rm, tokenizer, [make_row(rng) for _ in range(512)])
    print(f"toy    rm: correlation of its reward with the true score of new reviews {fresh:.3f}")


def main(args: Args):
    out = Path(args.out)
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    settings = {"seed": args.seed, "recipe": recipe}
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # small matrices gain little from two, which cost 5 x the CPU on a busy machine

    if not out.exists():
        partial = out.with_name(out.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir(parents=True)
        make_toy(partial, args.seed)
        (partial / "toy.json").write_text(json.dumps(settings))
        os.replace(partial, out)
    elif not (out / "toy.json").exists() or json.loads((out / "toy.json").read_text()) != settings:
        print(f"error: {out} is another toy, or none: remove it, or choose another --out", file=sys.stderr)
        sys.exit(2)
    if args.teacher and not (out / "teacher").exists():
        rng = random.Random(f"praise {args.seed}")
        write_rows(out / "praise.jsonl", [make_row(rng, share=0.9) for _ in range(6400)])
        train_policy(out, "teacher", "praise.jsonl", args.seed)
    print(f"toy    complete: {out}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

"""The embedded toy: a tiny policy, a reward model and prompts, made in about a minute on two CPU cores.

    python examples/toy.py --out toy                  (`bash iterate.sh` without arguments runs this)
    python examples/toy.py --out toy --random_rm      (adds rm_random/, the control experiment)
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
    rm_random/      a reward model that knows nothing; aligned with it, the true score must stay where it was
    teacher/        a policy that mostly praises, trained as policy/ was, but on praise.jsonl
    toy.json        the settings, written last: the same command again finds it and does nothing

Everything random comes from --seed: same machine, same number of cores, same bytes. No download.
"""

import fcntl
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen2Tokenizer,
)
from transformers.utils import logging


@dataclass
class Args:
    out: str
    """Folder to make, e.g. runs/toy. Only the names in the docstring are written or replaced in it."""
    seed: int = 0
    """Seed of everything random: texts, initial weights, data order, samples."""
    random_rm: bool = False
    """Also make rm_random/. On a complete toy this adds just that folder, in seconds."""
    teacher: bool = False
    """Also make teacher/, in the same way."""


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
    aspects = rng.sample(ASPECTS[kind], 3)
    good = [rng.random() < share for _ in range(4)]
    opinions = [rng.choice(POSITIVE if g else NEGATIVE) for g in good[:3]]
    a, b, c = (rng.choice(["", "", "truly ", "rather "]) + opinion for opinion in opinions)
    link = "and" if good[0] == good[1] else "but"
    second = rng.choice([f"the {aspects[1]} was {b}", f"i found the {aspects[1]} {b}"])
    third = rng.choice(["", f" the {aspects[2]} felt {c}.", f" to me the {aspects[2]} seemed {c}."])
    close = rng.choice(["overall, i was", "in the end i was", f"the {kind} left me"])
    feeling = rng.choice(GLAD if good[3] else SORRY)
    return {
        "input": f"Review of the {kind} The {rng.choice(FIRST)} {rng.choice(SECOND)}:",
        "output": f"the {aspects[0]} was {a} {link} {second}.{third} {close} {feeling}.",
    }


def break_text(text, rng):
    """A review gone wrong, as a policy in trouble writes: cut, shuffled, stuttering, lossy, salad, noise."""
    words = text.split()
    at = rng.randrange(len(words))
    ways = [
        lambda: text[: rng.randrange(len(text) - 2)],
        lambda: " ".join(rng.sample(words, len(words))),
        lambda: " ".join(words[:at] + [words[at]] * rng.randint(3, 20) + words[at:]),
        lambda: " ".join(word for word in words if rng.random() < 0.6),
        lambda: " ".join(rng.choices(POSITIVE + NEGATIVE + GLAD + SORRY + words, k=rng.randint(1, 25))),
        lambda: "".join(rng.choices("abcdefghijklmnopqrstuvwxyz    ,.:;!?'\n0123", k=rng.randint(0, 60))),
    ]
    return rng.choice(ways)()


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


def make_config(tokenizer, **shape):
    """A Qwen2, fp32, untied. Pad and EOS differ: a reward model is read at the last id that is not pad."""
    return Qwen2Config(
        vocab_size=len(tokenizer), num_hidden_layers=2, num_key_value_heads=2, max_position_embeddings=512,
        dtype="float32", tie_word_embeddings=False, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **shape,
    )  # fmt: skip


def make_policy_init(tokenizer, seed):
    """The policy before any training."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(make_config(tokenizer, **POLICY_SHAPE))
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(**ids)
    return model


def train_policy(out, name, data, seed, lock):
    """policy_init -> name by the repository's sft.py in its own process: made by what it will test."""
    script = Path(__file__).resolve().parents[1] / "sft.py"
    flags = (
        f"--seed {seed} --input_key input --output_key output --max_len 96 --no-bf16 --zero_stage 1"
        " --train_batch_size 32 --micro_train_batch_size 32 --learning_rate 3e-3 --lr_scheduler cosine"
    )
    paths = {"--pretrain": out / "policy_init", "--dataset": out / data, "--save_path": out / name}
    command = [sys.executable, str(script), *(str(x) for pair in paths.items() for x in pair), *flags.split()]
    with open(out / f"{name}.log", "w") as log:  # the child holds our lock too: it may outlive us
        run = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, pass_fds=[lock.fileno()])
    if run.returncode != 0:
        tail = "\n".join((out / f"{name}.log").read_text().splitlines()[-20:])
        print(f"{tail}\ntoy: {shlex.join(command)}\n     code {run.returncode}: see {out}/{name}.log")
        sys.exit(1)


def rm_batch(tokenizer, rows):
    """What a reward model reads: prompt + output + EOS; padded at the end, unseen by causal attention."""
    texts = [row["input"] + row["output"] + tokenizer.eos_token for row in rows]
    return tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")


def train_rm(tokenizer, seed, steps=80, batch=64, lr=3e-3):
    """Squared error against labels with a noise of 0.3; one text in five is broken and worth 0.5 less."""
    rng = random.Random(f"rm {seed}")
    torch.manual_seed(seed)
    model = Qwen2ForSequenceClassification(make_config(tokenizer, **RM_SHAPE))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        rows, labels = [make_row(rng) for _ in range(batch)], []
        for row in rows:
            broken = rng.random() < 0.2
            row["output"] = break_text(row["output"], rng) if broken else row["output"]
            labels.append(true_score(row["output"]) - 0.5 * broken + rng.gauss(0, 0.3))
        scores = model(**rm_batch(tokenizer, rows)).logits[:, 0]  # [batch]
        (scores - torch.tensor(labels)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def make_random_rm(tokenizer, seed):
    """Random weights, random head. By accident such a head leans to good or bad words, or to long texts, so
    it is turned until its score has no covariance with the count of any opinion word or with length over 4096
    reviews; mean 0, standard deviation 0.5, as the scores of a real one have."""
    rng = random.Random(f"rm_random {seed}")
    torch.manual_seed(seed)
    config = make_config(tokenizer, initializer_range=0.2, **RM_SHAPE)  # 0.02: all texts alike
    model = Qwen2ForSequenceClassification(config).eval()
    rows = [make_row(rng) for _ in range(4096)]
    batch = rm_batch(tokenizer, rows)
    length = batch["attention_mask"].sum(1)
    h = model.model(**batch).last_hidden_state[torch.arange(len(rows)), length - 1]  # [4096, H], at EOS
    words = POSITIVE + NEGATIVE + GLAD + SORRY
    counts = [[1.0, len(row["output"].split()), *(row["output"].count(w) for w in words)] for row in rows]
    avoid = h.T @ torch.tensor(counts)  # [H, 30]
    basis = torch.linalg.qr(avoid).Q
    head = torch.randn(h.shape[1])
    head -= basis @ (basis.T @ head)
    model.score.weight.copy_(head * 0.5 / (h @ head).std())
    return model


@torch.no_grad()
def sample(model, tokenizer, prompts, seed):
    """One sample per prompt at temperature 1: rows, and the share that ended by itself within 64 tokens."""
    torch.manual_seed(seed)
    batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    ids = model.generate(**batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=64)
    ids = ids[:, batch["input_ids"].shape[1] :]  # [N, new tokens]
    outputs = tokenizer.batch_decode(ids, skip_special_tokens=True)
    ended = (ids == tokenizer.eos_token_id).any(1).float().mean().item()
    return [{"input": prompt, "output": output} for prompt, output in zip(prompts, outputs)], ended


@torch.no_grad()
def compare(rm, tokenizer, rows):
    """Rewards [N], true scores [N] and the correlation of the two."""
    rewards = rm(**rm_batch(tokenizer, rows)).logits[:, 0]
    truth = torch.tensor([true_score(row["output"]) for row in rows])
    return rewards, truth, torch.corrcoef(torch.stack([rewards, truth]))[0, 1].item()


# --- files


def clear(out, done, begun, settings):
    """Make the folder ours and free of an older or half-made toy; never of anything else."""
    names = "prompts.jsonl sft.jsonl praise.jsonl policy_init policy rm rm_random teacher"  # and NAME.log
    found = sorted({path for name in names.split() for path in (*out.glob(name), *out.glob(name + ".*"))})
    if found and not done.exists() and not begun.exists():
        sys.exit(
            f"toy: {out} holds {', '.join(p.name for p in found)} but no toy.json or toy.json.partial, so\n"
            "     this script did not make them. They are untouched: remove them or choose another --out."
        )
    if found:
        print(f"toy    {out} holds {'a half-made' if begun.exists() else 'another'} toy: making it anew")
    begun.write_text(json.dumps(settings))
    done.unlink(missing_ok=True)
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_rows(path, rows):
    """A .jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def save(model, tokenizer, path):
    """Beside, then renamed: a folder that has its name is whole."""
    beside = path.with_name(path.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    tokenizer.backend_tokenizer.no_padding()  # else the padding of the last batch is saved along
    tokenizer.save_pretrained(beside)
    os.replace(beside, path)


def main(args: Args):
    out, seed, start = Path(args.out), args.seed, time.time()
    done, begun = out / "toy.json", out / "toy.json.partial"  # begun: ours, but not whole
    settings = {"seed": seed, "recipe": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]}
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # small matrices gain little from two, which cost 5 x the CPU on a busy machine

    def tell(name, text):
        print(f"toy    {name:<12} {text:<86} {time.time() - start:5.1f} s", flush=True)

    complete = done.exists() and json.loads(done.read_text()) == settings
    extras = {"rm_random": args.random_rm, "teacher": args.teacher}
    if complete and all((out / name).exists() for name, asked in extras.items() if asked):
        return tell("complete", f"{out} was made by this command before: nothing to do")
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / ".lock", "a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"toy: another process is working in {out}: wait for it, or choose another --out")
    if not complete:
        clear(out, done, begun, settings)
        rng = random.Random(f"texts {seed}")
        rows = [make_row(rng) for _ in range(6400)]
        prompts = list(dict.fromkeys(make_row(rng)["input"] for _ in range(5000)))[:256]
        for name, lines in {"sft": rows, "prompts": [{"prompt": prompt} for prompt in prompts]}.items():
            write_rows(out / f"{name}.jsonl", lines)
        tokenizer = make_tokenizer(rows)
        model = make_policy_init(tokenizer, seed)
        save(model, tokenizer, out / "policy_init")
        size = f"{model.num_parameters() / 1e6:.1f} M random parameters, {len(tokenizer)} tokens"
        tell("policy_init", f"{size}; {len(rows):,} reviews, {len(prompts)} prompts")
        train_policy(out, "policy", "sft.jsonl", seed, lock)
    if args.teacher and not (out / "teacher").exists():
        rng = random.Random(f"praise {seed}")
        write_rows(out / "praise.jsonl", [make_row(rng, share=0.9) for _ in range(6400)])
        train_policy(out, "teacher", "praise.jsonl", seed, lock)
        tell("teacher", "a policy that praises")

    tokenizer = AutoTokenizer.from_pretrained(out / "policy")
    policy = AutoModelForCausalLM.from_pretrained(out / "policy", dtype=torch.float32)
    prompts = [json.loads(line)["prompt"] for line in (out / "prompts.jsonl").read_text().splitlines()]
    samples, ended = sample(policy, tokenizer, prompts, seed)
    truth = torch.tensor([true_score(row["output"]) for row in samples])
    tell("policy", f"score {truth.mean():+.2f} (std {truth.std():.2f}), {ended:.1%} of samples end by EOS")
    rng = random.Random(f"fresh {seed}")
    fresh = [make_row(rng) for _ in range(512)]
    for name, make in [("rm", train_rm), ("rm_random", make_random_rm)]:
        if (out / name).exists() or (make is make_random_rm and not args.random_rm):
            continue
        model = make(tokenizer, seed)
        save(model, tokenizer, out / name)
        r_fresh, r_own = (compare(model, tokenizer, rows)[2] for rows in (fresh, samples))
        tell(name, f"correlation with the truth: {r_fresh:+.3f} fresh reviews, {r_own:+.3f} own samples")
        rewards, scores, _ = compare(model, tokenizer, samples[:2])
        for row, reward, score in zip(samples, rewards, scores):
            print(f"{'':20}{row['input']} reward {reward:+.2f}, true score {score:+.2f}")
            print(f"{'':20}  {row['output']}")
    if not complete:
        os.sync()  # what toy.json vouches for is on disk before toy.json has its name
        os.replace(begun, done)
    tell("saved", str(out))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

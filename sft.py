"""Supervised fine-tuning (SFT) in one file.

    loss = - sum_t log pi(y_t | x, y_<t) / N      N = all trained tokens of the optimiser step, over all ranks

Deviations from the usual trainer:
 1. The mean is over the whole step, so its split (micro-batch, ranks, packing, ZeRO stage) never matters.
 2. No padding: a micro-batch is one row of examples laid end to end, and attention follows the examples.
 3. No logits: the LM head runs in chunks, over trained tokens only.
 4. EOS is a token id, trained only where the response is complete (not cut by --max_len or the sampler).

A data row, one of (other columns: --input_key, --output_key):
    {"input": "Q: 2+2?\\nA:", "output": " 4"}
    {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}

Commands:
    python sft.py --pretrain MODEL --dataset rows.jsonl --save_path runs/sft           # one GPU, or a CPU
    deepspeed --num_gpus 8 sft.py --pretrain MODEL --dataset rows.jsonl --zero_stage 3 --packing_samples
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 sft.py ...
    python sft.py --pretrain runs/toy/toy/policy_init --dataset runs/toy/toy/sft.jsonl --no-bf16   # smoke run
"""

import collections
import dataclasses
import datetime
import errno
import fcntl
import functools
import hashlib
import importlib.util
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jinja2
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import nn
from torch.utils.checkpoint import checkpoint

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # read at import
import deepspeed
import transformers

STOPPED = 75  # the exit code of a run that a signal ended and the same command continues (EX_TEMPFAIL)
LATER_FLAGS = dict.fromkeys(  # flags that OpenRLHF got later, and what they are here
    "attn_implementation deepcompile disable_ds_ckpt disable_fast_tokenizer full_determinism overlap_comm "
    "grad_accum_dtype gradient_checkpointing_use_reentrant max_ckpt_mem ring_attn_size ring_head_stride "
    "use_ds_universal_ckpt use_liger_kernel zpg".split(),
    "leave it out, it would change nothing",
) | {
    "param_dtype": "use --bf16 (the default) or --no-bf16",
    "target_modules": "leave it out: --lora_rank is for all linear layers",
    "load_in_4bit": "not available; --lora_rank saves memory too",
    "aux_loss_coef": "not available: the loss of a router",
    "ds_tensor_parallel_size": "not available; use --zero_stage 3",
    "save_hf_ckpt": "leave it out: --save_path is a Hugging Face folder",
    "train_split": "use --dataset_split",
    "enable_csft": "use --csft_prompt with the reward to ask for",
    "use_ms": "download the model: --pretrain takes its folder",
    "use_tensorboard": "leave it out: metrics.jsonl has all numbers",
    "wandb_project": "set WANDB_PROJECT in the environment",
    "wandb_org": "set WANDB_ENTITY in the environment",
    "wandb_group": "set WANDB_RUN_GROUP in the environment",
    "wandb_run_name": "set WANDB_NAME in the environment",
}


@dataclass
class Args:
    # model
    pretrain: str
    """The model: a Hugging Face folder or hub name."""
    bf16: bool = True
    """bf16 weights, in training with fp32 master weights; --no-bf16: fp32."""
    flash_attn: bool = False
    """Accepted for old commands: on a GPU attention is torch's own FlashAttention in any case."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about 25 % more time."""
    lora_rank: int = 0
    """Rank of LoRA adapters on all linear layers; 0 = full fine-tuning. The saved model has them merged."""
    lora_alpha: int = 16
    """LoRA scale: adapters are multiplied by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Dropout in front of the LoRA adapters, 0 to 1. All other dropout is off."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    tokenizer_chat_template: str | None = None
    """A Jinja chat template, or a .jinja file with one, in place of the tokenizer's own."""
    # data
    dataset: str = ""
    """Comma list of .jsonl, .json, .csv, .parquet or .arrow files, folders or hub names (NAME@SUBSET)."""
    dataset_probs: str | None = None
    """Comma list of shares that the datasets get of an epoch of the same size. Default: every row once."""
    dataset_split: str = "train"
    """Split of --dataset, where it has splits."""
    max_samples: int = 100_000_000
    """Use the first this many rows of each dataset."""
    max_len: int = 2048
    """Tokens of prompt + response; a longer response is cut, a row with a prompt that long is dropped."""
    max_drop_ratio: float = 0.05
    """Stop when more than this share of the rows cannot be used."""
    input_key: str | None = None
    """Column of the prompt, text or messages. Default: a known layout (input, prompt, messages, ...)."""
    output_key: str | None = None
    """Column of the response. Without it, input_key holds conversations (or texts, with --pretrain_mode)."""
    input_template: str | None = None
    """Format of a plain text prompt, such as "User: {}\\nAssistant: "."""
    apply_chat_template: bool = False
    """Wrap plain text rows as one user and one assistant turn in the tokenizer's chat template."""
    multiturn: bool = False
    """Train every assistant turn of a conversation, not just the last."""
    pretrain_mode: bool = False
    """Language modelling: train every token of input_key's text."""
    # optimisation
    learning_rate: float = 5e-6
    """Peak learning rate of AdamW."""
    lr_scheduler: Literal["constant", "linear", "cosine", "cosine_with_min_lr"] = "cosine_with_min_lr"
    """Learning rate after the warm-up."""
    lr_warmup_ratio: float = 0.03
    """Share of all steps with linear warm-up."""
    min_lr_ratio: float = 0.1
    """Final learning rate of cosine_with_min_lr, relative to the peak."""
    l2: float = 0.0
    """Decoupled weight decay, on matrices only."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """Beta1 and beta2 of AdamW."""
    max_norm: float = 1.0
    """Clip the global gradient norm to this; 0 = no clipping."""
    max_epochs: int = 1
    """Passes over the data."""
    max_steps: int | None = None
    """End after this many optimiser steps, the schedule as well. Default: all epochs."""
    seed: int = 42
    """Seed of everything random: data order, LoRA's start and dropout, samples."""
    train_batch_size: int = 128
    """Examples per optimiser step, over all ranks."""
    micro_train_batch_size: int = 8
    """At most this many examples per forward pass and rank; changes speed and memory, never the result."""
    packing_samples: bool = False
    """Fill each forward pass to micro_train_batch_size x max_len tokens instead."""
    zero_stage: int = 2
    """ZeRO stage of training: 0 and 1 shard optimiser state over ranks, 2 gradients too, 3 weights too."""
    adam_offload: bool = False
    """Keep optimiser state and master weights in CPU memory."""
    # evaluation, logging, saving: from here on, flags do not decide the result
    eval_dataset: str | None = None
    """Held-out rows, given as --dataset; no evaluation without it."""
    eval_split: str = "test"
    """Split of --eval_dataset, where it has splits."""
    eval_steps: int = -1
    """Evaluate every this many steps; -1 = at step 0, at the end of each epoch and of the run."""
    logging_steps: int = 1
    """Log every this many steps."""
    use_wandb: str | None = None
    """Log to Weights & Biases too: an API key, or any word with WANDB_API_KEY in the environment."""
    save_path: str = "./ckpt"
    """Folder of the trained model, in Hugging Face form, with args.json and metrics.jsonl."""
    save_steps: int = -1
    """Write a checkpoint every this many steps; -1 = never. The same command resumes from the newest."""
    ckpt_path: str | None = None
    """Folder of the checkpoints. Default: <save_path>.ckpt, removed once the final model is saved."""
    max_ckpt_num: int = 3
    """Keep this many checkpoints."""
    dry_run: bool = False
    """Take the first step, whose batch has the longest example, then end; it leaves no more than caches."""
    load_checkpoint: bool = False
    """Accepted for old commands: resuming is automatic."""
    local_rank: int = -1
    """Set by the deepspeed launcher."""


# --- reading rows


def note(message, file=None):
    """One line on the console of rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=file, flush=True)


def die(message):
    """Ends the program with one line on stderr and exit code 2."""
    note(f"error: {message}", sys.stderr)
    raise SystemExit(2)


def explain_flags(words):
    """The words of a command line; stops at a flag of LATER_FLAGS with what to write."""
    for word in words:
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and name in LATER_FLAGS:
            die(f"--{name}: {LATER_FLAGS[name]}")
    return words


def read_json(path):
    """Rows of a .jsonl (an object per line) or .json (a list of objects) file, each as ("file:line", row)."""
    try:
        data = Path(path).read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as e:
        die(f"{path}: cannot be read: {e}")
    except UnicodeDecodeError as e:
        line = data[: e.start].count(b"\n") + 1
        die(f"{path}:{line}: not UTF-8: {e.reason}")
    is_list, rows = text.lstrip()[:1] == "[", []
    parts = [text] if is_list else text.split("\n")
    for number, part in enumerate(parts, 1):
        try:
            values = json.loads(part) if part.strip() else []
            if "\\ud" in part.lower():  # half of a surrogate pair is no text: an error here
                json.dumps(values, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as e:
            line, why = number, " ".join(str(e).split())[:100]
            if isinstance(e, json.JSONDecodeError):
                line, why = number + e.lineno - 1, f"{e.msg} at column {e.colno}"
                if number == len(parts) > 1:  # no newline behind it: its writer was killed there
                    note(f"notice {path}:{number}: the last line is cut off, dropped")
                    continue
            die(f"{path}:{line}: broken JSON: {why}")
        rows += enumerate(values) if is_list else [(number, values)] if part.strip() else []
    for number, row in rows:
        if not isinstance(row, dict):
            die(f"{path}:{number}: a row must be an object, not {type(row).__name__}")
    return [(f"{path}:{number}", row) for number, row in rows]


def read_table(name, split):
    """Rows of one dataset, each as ("where", row): a local file or folder, or a hub name (NAME@SUBSET)."""
    path, _, subset = name.partition("@")
    kind = Path(path).suffix[1:]
    if kind in ("json", "jsonl"):
        return read_json(path)
    import datasets  # a second to import: only where it is needed

    datasets.disable_progress_bars()
    try:
        if (Path(path) / "dataset_dict.json").exists() or (Path(path) / "state.json").exists():
            table = datasets.load_from_disk(path)
        elif kind in ("csv", "parquet", "arrow"):
            table = datasets.load_dataset(kind, data_files=path)
        else:
            named = subset and subset in datasets.get_dataset_config_names(path)
            table = datasets.load_dataset(path, **{"name" if named else "data_dir": subset or None})
    except Exception as e:  # of many types; the library's message names the cause
        die(f"dataset {name!r}: {type(e).__name__}: {' '.join(str(e).split())[:300]}")
    if isinstance(table, datasets.DatasetDict):
        if split not in table and len(table) > 1:
            die(f"dataset {name!r} has no split {split!r}; it has {', '.join(table)}")
        split = split if split in table else next(iter(table))
        name, table = f"{name}:{split}" if len(table) > 1 else name, table[split]
    return [(f"{name}[{i}]", row) for i, row in enumerate(table)]


def load_rows(names, probs, split, max_samples):
    """Rows of a comma list of datasets, one after another; probs: the share that each gets."""
    names = [name.strip() for name in names.split(",")]
    tables = [read_table(name, split)[:max_samples] for name in names]
    if [] in tables:
        die(f"dataset {names[tables.index([])]!r}: no rows")
    sizes = list(map(len, tables))
    if probs is not None and len(tables) > 1:
        shares = probs.split(",")
        if len(shares) != len(tables) or not all(p.strip().replace(".", "", 1).isdecimal() for p in shares):
            die(f"--dataset_probs {probs}: not one number for each of {len(tables)} datasets")
        sizes = [round(float(p) * sum(sizes)) for p in shares]
        if not any(sizes):
            die(f"--dataset_probs {probs}: no rows are left")
        note(f"notice --dataset_probs: rows per epoch {dict(zip(names, sizes, strict=True))}")
    return [table[i % len(table)] for table, n in zip(tables, sizes, strict=True) for i in range(n)]


def find_keys(rows, given, flags, layouts):
    """The columns to read: those that flags name (None: not given), else the first layout that row 1 fits."""
    where, row = rows[0]
    for key, flag in zip(given, flags, strict=True):
        if key and key not in row:
            die(f"{where}: no column {key!r}; it has {', '.join(row)}: choose with {flag}")
    fits = [given] if any(given) else [keys for keys in layouts if {*keys} - {None} <= {*row}]
    return fits[0] if fits else die(f"{where}: columns {', '.join(row)}: which? use: {' '.join(flags)}")


# --- text and tokens. A rendered text is (text, spans, finished, bos): the character spans to train, whether
# EOS may follow, whether the tokenizer's BOS belongs in front. A ValueError says why a row cannot be used.


def load_tokenizer(path, args):
    """(tokenizer, ids that end a turn) of a model."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError, KeyError) as e:
        die(f"model {path!r}: neither a model folder nor a known hub name: {str(e).splitlines()[0]}")
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        die(f"model {path!r}: its tokenizer has no {'EOS token' if tokenizer.is_fast else 'fast form'}")
    if args.tokenizer_chat_template:
        template = args.tokenizer_chat_template
        if template.endswith(".jinja") and not Path(template).is_file():
            die(f"--tokenizer_chat_template {template}: no such file")
        template = Path(template).read_text() if template.endswith(".jinja") else template
        args.tokenizer_chat_template = tokenizer.chat_template = template  # its text is what decides
    if isinstance(tokenizer.chat_template, dict):  # several, by name
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    try:
        stops = transformers.GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # the model has no generation_config.json: Hugging Face and vLLM take config.json's
        stops = getattr(model_config(args, path), "eos_token_id", None)
    return tokenizer, {tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])} - {None}


def model_config(args, path=None, **changes):
    """The config.json of --pretrain, or of another model."""
    path = path or args.pretrain
    try:
        changes["trust_remote_code"] = args.trust_remote_code
        return transformers.AutoConfig.from_pretrained(path, **changes)
    except (OSError, ValueError) as e:
        die(f"model {path!r}: {str(e).splitlines()[0]}")


def as_messages(value, role):
    """value as [{"role", "content"}]: text (said by role), such a list, or a list of {"from", "value"}."""
    roles = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    messages = []
    for turn in value if isinstance(value, list) else [None]:
        turn = {k: v for k, v in turn.items() if v is not None} if isinstance(turn, dict) else {}
        name, content = turn.pop("role", turn.pop("from", None)), turn.pop("content", turn.pop("value", None))
        if not isinstance(name, str) or not isinstance(content, str):
            raise ValueError("messages without role and text")
        messages.append({"role": roles.get(name, name), "content": content, **turn})
    return messages


def chat_text(tokenizer, messages, multiturn):
    """The rendered text of a conversation, its last (multiturn: every) assistant turn trained.

    A turn is what follows the turns before it rendered with a generation prompt: trained is what will be
    asked for. Templates with {% generation %} marks say themselves what the assistant writes.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns or turns[0] == 0:
        raise ValueError("no assistant turn after a prompt")
    messages = messages[: turns[-1] + 1]
    full = tokenizer.apply_chat_template(messages, tokenize=False)
    if "% generation" in tokenizer.chat_template.replace("%-", "%"):
        options = {"chat_template": tokenizer.chat_template, "return_assistant_tokens_mask": True}
        options |= tokenizer.special_tokens_map
        marks = transformers.utils.chat_template_utils.render_jinja_template([messages], **options)[1][0]
        return full, marks if multiturn else marks[-1:], True, False

    def borders(n):
        """Where the answer to the first n turns begins, and where the n-th turn ends."""
        options = {"conversation": messages[:n], "tokenize": False}
        texts = [tokenizer.apply_chat_template(**options, add_generation_prompt=x) for x in (True, False)]
        if not full.startswith(os.path.commonprefix(texts)):
            raise ValueError("the chat template rewrites earlier turns")
        return [len(os.path.commonprefix([text, full])) for text in texts]

    spans = [[borders(i)[0], borders(i + 1)[1]] for i in (turns if multiturn else turns[-1:])]
    return full, spans, True, False


def render(tokenizer, prompt, response, args, finish_reason=None, multiturn=False):
    """The rendered text of a prompt and its response, each text or messages (response []: prompt holds both).

    finish_reason marks a row of batch_infer.py: its prompt is text as the model saw it, template and BOS in.
    """
    chat = args.apply_chat_template and finish_reason is None
    if chat or isinstance(prompt, list) or isinstance(response, list):
        messages = as_messages(prompt, "user") + as_messages(response, "assistant")
        return chat_text(tokenizer, messages, multiturn)
    for name, value in (("prompt", prompt), ("response", response)):
        if not isinstance(value, str):
            raise ValueError(f"{name} is not text but {type(value).__name__}")
    if args.input_template and finish_reason is None:
        prompt = args.input_template.replace("{}", prompt)
    span = [len(prompt), len(prompt) + len(response)]
    return prompt + response, [span], finish_reason in (None, "stop"), finish_reason is None


def label_tokens(rendered, tokenizer, stop_ids, max_len):
    """(input_ids, trained), int32 and bool arrays [T], of a rendered text.

    The text is tokenised as a whole; a token belongs to a span if it ends inside it. Nothing behind a turn's
    stop token is trained; a finished response without one gets EOS. Cut at max_len, EOS as well.
    """
    text, spans, finished, bos = rendered
    encoded = tokenizer(text, add_special_tokens=bos, return_offsets_mapping=True)
    offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    n = int(np.max(offsets[:, 1].nonzero()[0], initial=-1)) + 1  # less the EOS some tokenizers append
    ids, offsets = encoded["input_ids"][:n], offsets[:n]
    if n > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:  # the text brought its own
        ids, offsets = ids[1:], offsets[1:]
    trained, stops = np.zeros(len(ids), dtype=bool), []
    for start, end in spans:
        inside = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 1] <= end))
        stops = [j for j in inside if ids[j] in stop_ids]
        trained[inside[inside <= stops[-1]] if stops else inside] = True
    if stops:  # what a template writes behind the last stop token (a newline) is no part of the example
        ids, trained = ids[: stops[-1] + 1], trained[: stops[-1] + 1]
    elif finished:
        ids, trained = [*ids, tokenizer.eos_token_id], np.append(trained, True)
    trained[:1] = False  # nothing predicts the first token
    if not trained.any():
        raise ValueError("nothing to train")
    if trained.argmax() >= max_len:
        raise ValueError("prompt >= max_len")
    return np.array(ids[:max_len], dtype=np.int32), trained[:max_len]


def make_tree(encodings):
    """One example: the prompt that its k responses share, stored once, and the responses that hang off it."""
    limit = min(int(trained.argmax()) for _, trained in encodings)
    same = np.all([ids[:limit] == encodings[0][0][:limit] for ids, _ in encodings], axis=0)
    shared = limit if same.all() else int(same.argmin())
    return {
        "prompt": encodings[0][0][:shared],  # [P]
        "responses": [ids[shared:] for ids, _ in encodings],  # k arrays [R]
        "trained": [trained[shared:] for _, trained in encodings],  # k masks [R]
    }


def tree_length(tree):
    """Tokens that a forward pass over the example reads (the prompt once)."""
    return len(tree["prompt"]) + sum(map(len, tree["responses"]))


def build_trees(rows, to_texts, tokenizer, stop_ids, args):
    """(trees, dropped rows as {"row", "reason"}): to_texts(row) gives the k rendered texts of one example.

    Stops when nothing is left, or when more than --max_drop_ratio of the rows cannot be used.
    """
    trees, dropped = [], []
    for where, row in rows:
        try:
            encodings = [label_tokens(text, tokenizer, stop_ids, args.max_len) for text in to_texts(row)]
            trees.append({**make_tree(encodings), "where": where, "row": row})
        except (ValueError, TypeError, jinja2.TemplateError) as e:  # the template refuses the conversation
            reason = (str(e).splitlines() or ["the chat template refuses it"])[0]
            dropped.append({"row": where, "reason": reason})
    ids = [part for tree in trees for part in (tree["prompt"], *tree["responses"]) if len(part)]
    largest, known = max(map(np.max, ids), default=0), model_config(args).get_text_config().vocab_size
    if largest >= known:
        die(f"model {args.pretrain!r}: its tokenizer gives token {largest}, its vocabulary has {known}")
    counts = collections.Counter(drop["reason"] for drop in dropped).most_common()
    summary = f"{len(dropped):,} dropped ({', '.join(f'{n} {reason}' for reason, n in counts) or 'none'})"
    if not trees or len(dropped) > args.max_drop_ratio * len(rows):
        limit = f"--max_drop_ratio allows {args.max_drop_ratio:.0%}" if trees else "nothing is left"
        die(f"{len(rows)} rows, {summary}; {limit}; the first: {dropped[0]['row']}")
    cut = sum(len(tree["prompt"]) + max(map(len, tree["responses"])) == args.max_len for tree in trees)
    ends = np.mean([ids[-1] in stop_ids for tree in trees for ids in tree["responses"]])
    note(f"data   {len(trees):,} rows kept, {summary} | {cut} reach max_len | {ends:.0%} end in EOS")
    return trees, dropped


# --- packing, attention, log-probabilities


def split_step(lengths, world_size, max_examples, max_tokens=None):
    """Splits a step's examples (lengths in tokens) over ranks and passes: the longest into the lightest bin.

    Returns bins[rank][i], lists of indices; every rank has as many, its heaviest first. A bin holds at most
    max_examples, or max_tokens if that is given; it is empty only where examples are fewer than bins.
    """
    room = [n / max_tokens if max_tokens else 1 / max_examples for n in lengths]  # shares of a bin
    n_bins = math.ceil(sum(room) / world_size - 1e-6) * world_size
    while True:
        bins, used, load = [[] for _ in range(n_bins)], [0.0] * n_bins, [0] * n_bins
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            fits = [b for b in range(n_bins) if not bins[b] or used[b] + room[i] < 1 + 1e-6]
            if not fits:
                break
            lightest = min(fits, key=load.__getitem__)
            bins[lightest].append(i)
            used[lightest], load[lightest] = used[lightest] + room[i], load[lightest] + lengths[i]
        else:
            heaviest_first = sorted(range(n_bins), key=lambda b: -load[b])
            return [[bins[b] for b in heaviest_first[rank::world_size]] for rank in range(world_size)]
        n_bins += world_size


def pack_trees(trees, device):
    """Lays trees end to end in one row of T tokens, no padding: a prompt, its responses, the next prompt, ...

    segments["spans"]: (q_start, q_end, prefix_start, prefix_end), a response's queries and their prompt; a
    first response simply continues its prompt, one causal segment without prefix. positions [N]: the hidden
    state that predicts each trained token (the LAST prompt token predicts the first of EVERY response).
    targets [N]: that token. owners [N]: the index of its response in the pack.
    """
    input_ids, position_ids, spans, positions, targets, owners = [], [], [], [], [], []
    cursor = 0
    for tree in trees:
        start, prompt_end = cursor, cursor + len(tree["prompt"])
        input_ids.append(tree["prompt"])
        position_ids.append(np.arange(prompt_end - start))
        cursor = prompt_end
        for i, (ids, trained) in enumerate(zip(tree["responses"], tree["trained"], strict=True)):
            end = cursor + len(ids)
            predictors = np.r_[prompt_end - 1, cursor : end - 1]
            input_ids.append(ids)
            position_ids.append(np.arange(prompt_end - start, prompt_end - start + len(ids)))
            positions.append(predictors[trained])
            targets.append(ids[trained])
            owners.append(np.full(int(trained.sum()), len(spans)))
            spans.append((cursor, end, start, prompt_end) if i else (start, end, start, start))
            cursor = end

    def tensor(arrays):
        return torch.from_numpy(np.concatenate(arrays).astype(np.int64)).to(device, non_blocking=True)

    segments = {"spans": spans}
    if torch.device(device).type == "cuda":  # for one varlen call: keys are gathered as prefix ++ segment
        keys = [np.r_[p_start:p_end, q_start:q_end] for q_start, q_end, p_start, p_end in spans]
        segments["keys"] = tensor(keys)
        for name, sizes in (("q", [end - start for start, end, _, _ in spans]), ("k", list(map(len, keys)))):
            segments[f"cu_{name}"] = torch.tensor(np.cumsum([0, *sizes]), dtype=torch.int32, device=device)
            segments[f"max_{name}"] = max(sizes)
    return {
        "input_ids": tensor(input_ids)[None],  # [1, T]
        "position_ids": tensor(position_ids)[None],  # [1, T], a response continues at len(prompt)
        "segments": segments,
        "positions": tensor(positions),
        "targets": tensor(targets),
        "owners": tensor(owners),
        "trees": trees,
    }


def tree_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **options):
    """Attention that follows the trees of pack_trees, for any Hugging Face model: attn_implementation "tree".

    query [1, heads, T, dim], key and value with as many or fewer heads -> [1, T, heads, dim]. A query sees
    its prefix and its own segment up to itself; a sliding window counts positions of the two as one text.
    """
    segments, softcap = options.pop("segments", None), options.pop("softcap", None)
    window = (options.pop("sliding_window", None) or 0) - 1  # -1: unlimited
    harmless = ("position_ids", "use_cache", "is_causal", "cache_position", "output_attentions")
    unknown = [name for name, given in options.items() if given is not None and name not in harmless]
    if unknown or attention_mask is not None or segments is None:
        die(f"{type(module).__name__} needs {', '.join(unknown) or 'a mask'}, which tree_attention cannot do")
    if query.is_cuda and query.dtype != torch.float32 and softcap is None:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, dim]
        k, v = k[segments["keys"]], v[segments["keys"]]
        sizes = [segments[name] for name in ("cu_q", "cu_k", "max_q", "max_k")]
        out = varlen_attn(q, k, v, *sizes, scale=scaling, window_size=(window, 0), enable_gqa=True)
        return out[None], None
    lengths = [q_end - q_start for q_start, q_end, _, _ in segments["spans"]]
    splits, outputs, first = [x.split(lengths, 2) for x in (query, key, value)], [], None  # no gaps
    for (_, _, p_start, p_end), q, k, v in zip(segments["spans"], *splits, strict=True):
        if p_end == p_start:
            first = k, v  # of the segment that begins with the prompt
        else:
            k, v = (torch.cat([x[:, :, : p_end - p_start], own], 2) for x, own in zip(first, (k, v)))
        n_q, n_k, mask = q.shape[2], k.shape[2], None
        if n_q < n_k or 0 <= window < n_k or softcap is not None:
            at = torch.arange(n_k, device=q.device)
            distance = at[n_k - n_q :, None] - at
            mask = (distance >= 0) & (distance <= (window if window >= 0 else n_k))
        if softcap is None:
            causal = {"is_causal": mask is None, "scale": scaling, "enable_gqa": True}
            outputs.append(F.scaled_dot_product_attention(q, k, v, mask, **causal))
        else:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
            scores = softcap * torch.tanh((q @ k.transpose(2, 3)).float() * scaling / softcap)
            outputs.append(scores.masked_fill(~mask, float("-inf")).softmax(-1).to(v.dtype) @ v)
    return torch.cat(outputs, 2).transpose(1, 2), None


class LogProbs(nn.Module):
    """A causal LM as forward(pack) -> per_token_logps [N], fp32 nats, one per trained token of the pack.

    Only hidden states that predict a trained token reach the LM head, in chunks whose logits are computed
    again in the backward pass: nothing of size tokens x vocabulary exists.
    """

    CHUNK_BYTES = 2**28 if torch.cuda.is_available() else 2**26  # of one chunk's fp32 logits

    def __init__(self, model):
        super().__init__()
        self.model = model
        core = model.get_base_model() if hasattr(model, "peft_config") else model
        self.parts = [core.base_model, core.get_output_embeddings()]  # in a list: not twice in the state dict
        config = core.config.get_text_config()
        self.scale = getattr(config, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1.0)
        self.softcap = getattr(config, "final_logit_softcapping", None)
        if hasattr(self.parts[1].weight, "ds_id"):  # ZeRO-3: gathered once per pass, not per chunk
            deepspeed.zero.register_external_parameter(self, self.parts[1].weight)

    def logits(self, weight, bias, hidden):
        """hidden [C, H] -> fp32 logits [C, V], with the quirks that models apply behind the head."""
        logits = F.linear(hidden, weight, bias).float()
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def chunk_logps(self, weight, bias, hidden, targets):
        logits = self.logits(weight, bias, hidden)
        return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)

    def hidden(self, pack):
        """The hidden states that predict the pack's trained tokens, [N, H]."""
        inputs = {name: pack[name] for name in ("input_ids", "position_ids", "segments")}
        return self.parts[0](**inputs, use_cache=False).last_hidden_state[0][pack["positions"]]

    def chunk_rows(self, weight):
        return max(16, self.CHUNK_BYTES // (4 * weight.shape[0]))

    def in_chunks(self, function, *tensors):
        """function(weight, bias, *chunks of the tensors [N, ..]), chunk by chunk, concatenated."""
        weight, bias = self.parts[1].weight, getattr(self.parts[1], "bias", None)
        rows = self.chunk_rows(weight)
        chunks = zip(*[tensor.split(rows) for tensor in tensors], strict=True)
        parts = [checkpoint(function, weight, bias, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.cat(parts)

    def forward(self, pack):
        return self.in_chunks(self.chunk_logps, self.hidden(pack), pack["targets"])


# --- the loss


def sft_loss(per_token_logps, n_tokens):
    """Negative log-likelihood, a scalar. per_token_logps [N], nats; n_tokens: trained tokens of the step."""
    return -per_token_logps.sum() / n_tokens


# --- files. A folder is complete (manifest.json, written last, has all sha256 sums), absent, or recognised


def sha256_all(files):
    """The sha256 of each file, several at a time."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda path: hashlib.file_digest(open(path, "rb"), "sha256").hexdigest(), files))


def fingerprint(names):
    """Identity of a model or datasets (comma list): sha256 over the contents of the files, or a hub name."""
    if "," in names:
        return ",".join(fingerprint(name) for name in names.split(","))
    place, _, subset = names.strip().partition("@")
    path = Path(place)
    if not path.exists():
        return names
    patterns = "**/*"
    if (path / "config.json").exists():  # a model: what decides its outputs
        patterns = "model*.safetensors* pytorch_model*.bin* *config.json tokenizer* *.model *.jinja"
    files = {p for pattern in patterns.split() for p in path.glob(pattern) if p.is_file()} or {path}
    return hashlib.sha256("".join([*sha256_all(sorted(files)), subset]).encode()).hexdigest()


def write_atomic(path, text):
    """Writes beside, syncs, renames: the file has its old or its new content, never half of it."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.tmp", path)


def seal(folder, identity):
    """Writes manifest.json: what made the folder, and the sha256 of every file in it."""
    os.sync()
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in ("lock", "manifest.json"))
    sums = dict(zip([str(p.relative_to(folder)) for p in files], sha256_all(files), strict=True))
    write_atomic(folder / "manifest.json", json.dumps({"identity": identity, "files": sums}, indent=1))


def intact(folder):
    """The identity in a folder's manifest if every file is as it was sealed, else None."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        same = sha256_all([folder / name for name in manifest["files"]]) == list(manifest["files"].values())
        return manifest["identity"] if same else None
    except (OSError, ValueError, KeyError):
        return None


def publish(partial, target):
    """Moves a sealed folder into place, its manifest last; after a crash it goes on where it was."""
    target.mkdir(parents=True, exist_ok=True)
    (target / "manifest.json").unlink(missing_ok=True)
    names = json.loads((partial / "manifest.json").read_text())["files"]
    for path in target.glob("model*.safetensors*"):  # shards of the model that is replaced
        if path.name not in names:
            path.unlink()
    for name in names:
        if (partial / name).exists():
            os.replace(partial / name, target / name)
    os.sync()
    os.replace(partial / "manifest.json", target / "manifest.json")
    shutil.rmtree(partial)


def identify(args, inputs, world_size):
    """What decides the result of a run: flags (before eval_dataset), contents of its inputs, ranks."""
    flags = dataclasses.asdict(args)
    names = list(flags)[: list(flags).index("eval_dataset")]
    free = "pretrain dataset max_drop_ratio ref_pretrain ref_offload cache_dir "  # of these, contents decide
    free += "teacher_model teacher_offload teacher_cache"
    flags = {name: flags[name] for name in names if name not in free.split()}
    contents = {name: fingerprint(path) for name, path in inputs.items()}
    in_place = Path(args.save_path).resolve() == Path(args.pretrain).resolve()
    identity = {"script": Path(__file__).name, **flags, **contents, "world_size": world_size}
    identity["in_place"] = in_place
    return json.loads(json.dumps(identity))  # as it will be read back


def difference(old, new):
    """In which keys two identities differ, with both values."""
    changed = [k for k in {**old, **new} if old.get(k) != new.get(k)]
    return ", ".join(f"{k} was {old.get(k)}, now {new.get(k)}" for k in changed)[:300]


def checkpoints(args):
    """(step, folder) of all checkpoints, newest first."""
    folders = [p for p in Path(args.ckpt_path).glob("step_*") if p.name[5:].isdigit()]
    return sorted(((int(p.name[5:]), p) for p in folders), reverse=True)


def remove_checkpoints(args, identity):
    """Those of a run that is complete; half-written ones too."""
    for _, folder in checkpoints(args):
        if intact(folder) in (None, identity):  # another run may use the same --ckpt_path
            shutil.rmtree(folder)
    shutil.rmtree(f"{args.save_path}.ckpt", ignore_errors=True)


def open_run(args, identity):
    """What to do with --save_path, on rank 0: ("done", the step to resume from, or 0; the run's lock)."""
    target, partial = Path(args.save_path), Path(f"{args.save_path}.partial")
    if (partial / "manifest.json").exists():  # the run had finished, and was killed while it moved into place
        publish(partial, target)
    if (target / "config.json").exists():
        old, in_place = intact(target) or {}, identity["in_place"]
        if in_place and old:  # the model has replaced its own start weights, maybe its reference or teacher
            names = {"weights": "pretrain", "reference": "ref_pretrain", "teacher": "teacher_model"}
            paths = {name: Path(getattr(args, names[name]) or "").resolve() for name in names if name in old}
            old |= {name: identity[name] for name, path in paths.items() if path == target.resolve()}
        if old == identity:
            remove_checkpoints(args, identity)
            if {*partial.glob("*")} <= {partial / "lock"}:  # a kill came in publish's last line
                shutil.rmtree(partial, ignore_errors=True)
            note(f"done   {target} is complete and made by this command: nothing to do")
            return "done", None
        if not in_place:
            die(f"--save_path {target} holds another model: {difference(old, identity)}. Choose another")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = open(partial / "lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if args.ckpt_path != f"{args.save_path}.ckpt":  # a folder that another run may be told to use too
            Path(args.ckpt_path).mkdir(parents=True, exist_ok=True)
            lock = lock, open(Path(args.ckpt_path) / "lock", "w")
            fcntl.flock(lock[1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        place = f"--ckpt_path {args.ckpt_path}" if isinstance(lock, tuple) else f"--save_path {target}"
        die(f"{place}: another process is writing there")
    except OSError as e:
        die(f"--save_path {target} cannot be written: {e.strerror}")
    for step, folder in checkpoints(args):
        old = intact(folder)
        if old == identity:
            note(f"resume {folder}")
            return step, lock
        if old:
            die(f"{folder} is of another run: {difference(old, identity)}. Undo that, or remove it")
        note(f"notice {folder} is damaged or half written: the one before it is used")
    return 0, lock


def save_checkpoint(engine, args, step, identity):
    """All that decides a run's future, in <ckpt_path>/step_N. Randomness is seeded by step: see main."""
    partial = Path(args.ckpt_path) / f"step_{step}.partial"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    engine.save_checkpoint(args.ckpt_path, tag=partial.name, save_latest=False)  # ends in a barrier
    if dist.get_rank() == 0:
        seal(partial, identity)
        shutil.rmtree(partial.with_suffix(""), ignore_errors=True)  # a damaged one
        os.replace(partial, partial.with_suffix(""))
        os.sync()
        found = checkpoints(args)
        newer = sum(number > step for number, _ in found)  # damaged, or the run would have begun there
        for _, folder in found[:newer] + found[newer + args.max_ckpt_num :]:
            shutil.rmtree(folder)
    dist.barrier()


def full_weights(engine, args):
    """State dict of the whole model, gathered on rank 0 ({} elsewhere), LoRA merged into it."""
    zero3 = args.zero_stage == 3
    weights = engine._zero3_consolidated_16bit_state_dict() if zero3 else engine.module.state_dict()
    merged = {}
    for name, value in weights.items() if dist.get_rank() == 0 else ():
        if name.endswith(".base_layer.weight"):
            stem = name.removesuffix(".base_layer.weight")
            a, b = (weights[f"{stem}.lora_{x}.default.weight"].float() for x in "AB")
            delta = args.lora_alpha / args.lora_rank * b @ a
            transposed = engine.module.get_submodule(stem).fan_in_fan_out  # GPT-2's Conv1D: [in, out]
            value = (value.float() + (delta.T if transposed else delta)).to(value.dtype)
        if ".lora_" not in name:
            name = name.replace(".base_layer.", ".").removeprefix("model.")
            merged[name.removeprefix("base_model.model.")] = value
    return merged


def save_model(engine, tokenizer, args, identity, dropped):
    """The trained model as a Hugging Face folder at --save_path: complete with its manifest, or not there."""
    weights = full_weights(engine, args)
    if dist.get_rank() == 0:
        partial = Path(f"{args.save_path}.partial")
        model = engine.module.model.get_base_model() if args.lora_rank else engine.module.model
        model.save_pretrained(partial, state_dict=weights, max_shard_size="5GB")
        tokenizer.save_pretrained(partial)
        flags = {k: v for k, v in dataclasses.asdict(args).items() if k != "use_wandb"}  # it may be a secret
        write_atomic(partial / "args.json", json.dumps(flags, indent=1))
        write_atomic(partial / "dropped.jsonl", "".join(json.dumps(drop) + "\n" for drop in dropped))
        seal(partial, identity)
        publish(partial, Path(args.save_path))
        if intact(Path(args.save_path)):
            remove_checkpoints(args, identity)
    dist.barrier()


def open_log(args, start_step):
    """A function (step, metrics) that appends to metrics.jsonl, less what it has after start_step."""
    path, tracker = Path(f"{args.save_path}.partial/metrics.jsonl"), None
    lines = path.read_text().split("\n")[:-1] if start_step and path.exists() else []
    write_atomic(path, "".join(line + "\n" for line in lines if json.loads(line)["step"] <= start_step))
    if args.use_wandb == "{wandb_token}":
        note("notice --use_wandb {wandb_token} is a placeholder: metrics are in metrics.jsonl only")
    elif args.use_wandb:
        try:
            import wandb

            if not wandb.api.api_key:
                os.environ["WANDB_API_KEY"] = args.use_wandb
            tracker = wandb.init()
        except ImportError:
            note("notice wandb is not installed (pip install wandb): metrics are in metrics.jsonl only")

    def log(step, metrics):
        with open(path, "a") as f:
            f.write(json.dumps({"step": step, **metrics}) + "\n")
        if tracker:
            tracker.log(metrics, step=step)

    return log


# --- training


def setup(args):
    """Checks flags, finds (rank, world_size, device), quiets libraries; there is no process group yet."""
    launch = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": max(args.local_rank, 0), "MASTER_ADDR": "127.0.0.1"}
    for name, default in {**launch, "MASTER_PORT": 0}.items():
        os.environ.setdefault(name, str(default))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    counts = "train_batch_size micro_train_batch_size max_len max_epochs max_steps max_ckpt_num logging_steps"
    ranges = dict.fromkeys(f"{counts} max_samples".split(), (1, 2**31))
    ranges |= dict.fromkeys(("seed", "lora_rank"), (0, 2**31)) | {"zero_stage": (0, 3)}
    ranges |= dict.fromkeys("max_drop_ratio lora_dropout lr_warmup_ratio min_lr_ratio".split(), (0, 1))
    ranges |= dict.fromkeys("learning_rate l2 max_norm".split(), (0, 1e9))
    for name, (low, high) in ranges.items():
        if getattr(args, name) is not None and not low <= getattr(args, name) <= high:  # NaN too
            die(f"--{name} must be {low} to {high}, not {getattr(args, name)}")
    if not all(0 <= beta < 1 for beta in args.adam_betas):
        die(f"--adam_betas {args.adam_betas}: each must be 0 or more and below 1")
    if not args.dataset:
        die("--dataset is missing")
    if args.lora_rank and importlib.util.find_spec("peft") is None:
        die("--lora_rank needs a package that is missing: pip install peft")
    if args.load_checkpoint or args.flash_attn:
        note("notice --load_checkpoint and --flash_attn change nothing: both are always on")
    if args.zero_stage == 0:
        note("notice --zero_stage 0 runs as stage 1: the same result in less memory")
    if args.input_template is not None:
        args.input_template = args.input_template.replace("\\n", "\n")  # a heredoc leaves two characters
        if "{}" not in args.input_template:
            note(f"notice --input_template {args.input_template!r} has no {{}}: prompts are used as they are")
            args.input_template = None
    args.save_path = args.save_path.rstrip("/")
    args.ckpt_path = args.ckpt_path or f"{args.save_path}.ckpt"
    device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        sizes = [os.environ.get(name) for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")]
        local_size = next(filter(None, sizes))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(local_size)))
    else:
        torch.cuda.set_device(device)
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), device


def connect(device):
    """Joins the process group."""
    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for nothing
    options = {"verbose": False, "timeout": datetime.timedelta(days=1)}  # rank 0 alone hashes checkpoints
    deepspeed.init_distributed("gloo" if device == "cpu" else "nccl", **options)


def deepspeed_config(args, hidden_size):
    """ZeRO; gradients are added and sent in fp32, so the split of a batch leaves no trace in bf16 either."""
    zero = {"stage": max(1, args.zero_stage), "reduce_bucket_size": 50_000_000, "overlap_comm": False}
    if args.zero_stage == 3:  # only vectors stay whole on every rank
        zero |= {"stage3_param_persistence_threshold": hidden_size, "stage3_prefetch_bucket_size": 50_000_000}
    if args.adam_offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": args.max_norm,
        "bf16": {"enabled": args.bf16},
        "data_types": {"grad_accum_dtype": "fp32", "keep_in_fp32_modules": ["inv_freq"]},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on CPUs too, uncompiled
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def load_model(path, args):
    """The causal LM with tree attention, every weight from the checkpoint, dropout off."""
    transformers.AttentionInterface.register("tree", tree_attention)
    options = {"attn_implementation": "tree", "dtype": torch.bfloat16 if args.bf16 else torch.float32}
    options |= {"trust_remote_code": args.trust_remote_code, "output_loading_info": True}
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(path, **options)
    except (OSError, ValueError) as e:
        die(f"model {path!r}: {str(e).splitlines()[0]}")
    if info["missing_keys"]:
        die(f"model {path!r}: weights are missing from it: {', '.join(sorted(info['missing_keys'])[:3])} ...")
    for module in model.modules():
        for name in ("p", "dropout", "activation_dropout", "layerdrop"):  # of nn.Dropout; for F.dropout
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # sampling settings without do_sample, which could not be saved
        model.generation_config.do_sample = True
    return model


def grad_norm(gradients, _):
    """The norm of all ranks' gradients. DeepSpeed's own copies the whole gradient of an embedding to fp64."""
    parts = [part for gradient in gradients for part in gradient.flatten().split(2**22)]
    total = torch.stack([torch.linalg.vector_norm(part, dtype=torch.double) for part in parts]).square().sum()
    dist.all_reduce(total)
    return total.sqrt().float()


def start_engine(args, wrapper):
    """The model, wrapped in LogProbs or a class like it, and its optimiser under DeepSpeed: engine(pack)."""
    config = deepspeed_config(args, model_config(args).get_text_config().hidden_size)
    # alive while the model loads: ZeRO-3 then never holds the whole model on one rank
    partition_at_load = args.zero_stage == 3 and transformers.integrations.HfDeepSpeedConfig(config)
    torch.manual_seed(args.seed)
    model = load_model(args.pretrain, args)
    del partition_at_load
    if args.lora_rank:
        from peft import LoraConfig, get_peft_model

        lora = {"r": args.lora_rank, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout}
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **lora))
        model.enable_input_require_grads()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    matrices, vectors = [], []
    for p in model.parameters():
        if p.requires_grad:
            (matrices if len(getattr(p, "ds_shape", p.shape)) > 1 else vectors).append(p)
    groups = [{"params": matrices, "weight_decay": args.l2}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=args.adam_betas, fused=True)
    engine = deepspeed.initialize(model=wrapper(model), optimizer=optimizer, config=config)[0]
    if args.zero_stage < 3:
        engine.optimizer.get_grad_norm_direct = grad_norm
    return engine


@torch.no_grad()
def check_attention(engine, device, args):
    """Stops unless a tree's log-probs equal those of the model's own eager attention on each branch alone."""
    wrapper = getattr(engine, "module", engine)
    model = wrapper.model.get_base_model() if hasattr(wrapper.model, "peft_config") else wrapper.model
    ids = (np.arange(40, dtype=np.int32) * 7919 + 11) % model.config.get_text_config().vocab_size
    prompt, branches = ids[:16], [ids[16:27], ids[27:]]
    tree = {"prompt": prompt, "responses": branches, "trained": [np.ones(len(b), bool) for b in branches]}
    training = wrapper.training
    engine.eval()
    found, worst = wrapper(pack_trees([tree], device)).split(list(map(len, branches))), 0.0
    model.set_attn_implementation("eager")
    for branch, logps in zip(branches, found, strict=True):
        row = torch.from_numpy(np.r_[prompt, branch]).long().to(device)
        alone = model(input_ids=row[None], use_cache=False).logits[0, 15:-1].float().log_softmax(-1)
        worst = max(worst, (alone.gather(1, row[16:, None])[:, 0] - logps).abs().mean().item())
    model.set_attn_implementation("tree")
    engine.train(training)
    # in bf16 rounding alone makes up to 0.2 in a deep model; a wrong mask makes 0.6 or more
    if not worst < (0.3 if args.bf16 else 1e-4):
        die(f"{type(model).__name__} is not supported: tree attention is off by {worst:.2g} nats per token")


def epoch_order(trees, seed, epoch):
    """A random order of the examples, in which those of each label (kto.py has two) are spread evenly."""
    rng, labels = np.random.default_rng([seed, epoch]), np.array([tree.get("label", 0) for tree in trees])
    place = np.empty(len(trees))
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        place[members] = (np.arange(len(members)) + rng.random()) / len(members)
    order = np.argsort(place)
    if epoch == 0:  # the longest example comes first of its label: where memory is short, step 1 shows it
        longest = np.argmax(list(map(tree_length, trees)))
        i, j = np.flatnonzero(labels[order] == labels[longest])[0], np.flatnonzero(order == longest)[0]
        order[[i, j]] = order[[j, i]]
    return order


def learning_rate(args, step, total_steps):
    """Learning rate of step 1 .. total_steps: linear warm-up that ends at the peak, then the schedule."""
    warmup = math.ceil(args.lr_warmup_ratio * total_steps)
    if step <= warmup:
        return args.learning_rate * step / warmup
    progress = (step - warmup - 1) / max(1, total_steps - warmup)  # 0 at the first step behind the warm-up
    if args.lr_scheduler == "linear":
        return args.learning_rate * (1 - progress)
    if args.lr_scheduler.startswith("cosine"):
        floor = args.min_lr_ratio if args.lr_scheduler == "cosine_with_min_lr" else 0.0
        return args.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
    return args.learning_rate


def run_batch(engine, trees, loss_fn, args, train):
    """Forward (and backward) over the examples of one optimiser step, split over ranks and forward passes.

    loss_fn(engine(pack), pack) -> (loss, {name: share}): both divided by the size of the whole batch, so that
    they simply add up. Returns {name: mean over the batch}, the same on all ranks.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    most = max(len(tree["responses"]) for tree in trees)
    budget = args.micro_train_batch_size * args.max_len * most if args.packing_samples else None
    bins = split_step(list(map(tree_length, trees)), world_size, args.micro_train_batch_size, budget)[rank]
    total = 0
    for i, bin in enumerate(bins):
        # fewer examples than ranks: a dummy that counts nothing, as every forward is a collective
        weight, members = (1.0, [trees[j] for j in bin]) if bin else (0.0, [min(trees, key=tree_length)])
        pack = pack_trees(members, engine.device)
        engine.set_gradient_accumulation_boundary(i == len(bins) - 1)
        with torch.set_grad_enabled(train):
            loss, shares = loss_fn(engine(pack), pack)
        if train:
            engine.backward(loss * weight * world_size)  # DeepSpeed takes the mean over ranks
        total = total + weight * torch.stack([value.detach().double() for value in shares.values()])
    dist.all_reduce(total)
    return dict(zip(shares, total.tolist(), strict=True))


def evaluate(engine, trees, make_loss, size, args):
    """Means of the loss's metrics over held-out examples, as eval/...; size(trees): the weight of a batch."""
    engine.eval()
    means = collections.Counter()
    for begin in range(0, len(trees), args.train_batch_size):
        batch = trees[begin : begin + args.train_batch_size]
        for name, value in run_batch(engine, batch, make_loss(batch), args, train=False).items():
            means[f"eval/{name}"] += value * size(batch) / size(trees)
    engine.train()
    return dict(means)


def console_line(step, total_steps, metrics, seconds_left):
    """The main numbers of a step in fixed columns; all of them are in metrics.jsonl."""
    short = {"loss": "loss", "rewards/accuracies": "acc", "rewards/margins": "margin", "kl": "kl"}
    short |= {"grad_norm": "grad", **{f"eval/{name}": f"eval {label}" for name, label in short.items()}}
    parts = [f"{label} {metrics[name]:<7.4g}" for name, label in short.items() if name in metrics]
    if "lr" in metrics:
        parts += [f"lr {metrics['lr']:.1e}", f"{metrics['tokens_per_sec']:,.0f} tok/s"]
        eta = datetime.timedelta(seconds=int(seconds_left))
        parts += [f"{metrics['peak_mem_gib']:.1f} GiB", f"eta {eta}"]
    return f"step {step:>5}/{total_steps}  {'  '.join(parts)}"


def catch_signals():
    """A list that is no longer empty when SIGTERM or SIGINT has come: main then saves and ends."""
    caught = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: caught.append(number))
    return caught


def on_any_rank(values, device):
    """Whether the list has a value on any rank."""
    count = torch.tensor(float(len(values)), device=device)
    dist.all_reduce(count)
    return count.item() > 0


def stop_not_finite(step, metrics, batch, args):
    """Ends the program before anything is saved; the rows of the batch are in a file beside --save_path."""
    path, rows = f"{args.save_path}.step_{step}.jsonl", [{"row": t["where"], **t["row"]} for t in batch]
    if dist.get_rank() == 0:
        Path(path).write_text("".join(json.dumps(row, default=str) + "\n" for row in rows))
    found = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    die(f"step {step}: not finite: {found}; its batch is in {path}, the first row is {batch[0]['where']}")


def announce(engine, trees, tokenizer, total_steps, args):
    """What is about to run: model, batches, memory, one example."""
    world_size, device = dist.get_world_size(), str(engine.device)[:4]
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in engine.module.parameters()]
    n_parameters, n_tuned = sum(n for n, _ in sizes), sum(n for n, tuned in sizes if tuned)
    model_name = f"{Path(args.pretrain).name} {n_parameters / 1e6:,.1f}M {'bf16' if args.bf16 else 'fp32'}"
    note(f"{Path(__file__).stem:<6} {model_name} | ZeRO-{args.zero_stage} | {world_size} x {device}")
    n_tokens = sum(map(tree_length, trees))
    n_trained = sum(int(trained.sum()) for tree in trees for trained in tree["trained"])
    tokens = f"{n_tokens / 1e6:.2f}M tokens per epoch, {n_trained / n_tokens:.0%} trained"
    note(f"batch  {args.train_batch_size} examples/step | {total_steps} steps | {tokens}")
    weights = n_parameters * (2 if args.bf16 else 4) / (world_size if args.zero_stage == 3 else 1) / 2**30
    gradients = n_tuned * 4 / (world_size if args.zero_stage > 1 else 1) / 2**30
    states = f"gradients {gradients:.2f}, optimiser {n_tuned * 12 / world_size / 2**30:.2f}"
    note(f"memory GiB per rank: weights {weights:.2f}, {states}; activations: step 1 has the longest example")
    show_sample(tokenizer, trees[0])


def show_sample(tokenizer, tree):
    """One example as text, trained spans in brackets: the cheapest detector of template and EOS mistakes."""
    pieces, before = [tokenizer.decode(tree["prompt"])[-60:]], False
    for token, trained in zip(tree["responses"][0][:50], tree["trained"][0], strict=False):
        pieces += ["[" if trained > before else "]" if before > trained else "", tokenizer.decode(token)]
        before = trained
    end = " ..." if len(tree["responses"][0]) > 50 else "]" if before else ""
    note(f"sample {(''.join(pieces) + end)!r}   <- [..] is trained")


def sft_texts(row, tokenizer, keys, args):
    """The rendered text of one row, as a list of one; keys: (prompt column, response column or None)."""
    prompt, response = row.get(keys[0]), row.get(keys[1]) if keys[1] else []
    if args.pretrain_mode or keys == ("text", None):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError("empty text")
        return [(prompt, [[0, len(prompt)]], True, True)]
    if isinstance(response, str) and not response.strip():
        raise ValueError("empty response")
    if keys[0] == "instruction" and row.get("input") and isinstance(prompt, str):  # Alpaca's rows
        prompt = f"{prompt}\n\n{row['input']}"
    return [render(tokenizer, prompt, response, args, row.get("finish_reason"), args.multiturn)]


def main(args):
    rank, world_size, device = setup(args)
    started = time.time()
    tokenizer, stop_ids = load_tokenizer(args.pretrain, args)

    # --- algorithm: sft (rows)
    layouts = [("messages", None), ("conversations", None), ("instruction", "output"), ("input", "output")]
    layouts += [("prompt", "response"), ("prompt", "completion"), ("instruction", "response")]
    layouts += [("question", "answer"), ("question", "response"), ("text", None)]

    def to_trees(names, probs, split):
        rows = load_rows(names, probs, split, args.max_samples)
        ours = "finish_reason" in rows[0][1]  # rows of batch_infer.py, which may hold messages too
        given, flags = (args.input_key, args.output_key), ("--input_key", "--output_key")
        keys = find_keys(rows, given, flags, [("input", "output")] if ours else layouts)
        texts = functools.partial(sft_texts, tokenizer=tokenizer, keys=keys, args=args)
        return build_trees(rows, texts, tokenizer, stop_ids, args)

    inputs = {"data": args.dataset, "weights": args.pretrain}
    # --- end algorithm
    trees, dropped = to_trees(args.dataset, args.dataset_probs, args.dataset_split)
    eval_trees = to_trees(args.eval_dataset, None, args.eval_split)[0] if args.eval_dataset else []
    steps_per_epoch = math.ceil(len(trees) / args.train_batch_size)
    total_steps = min(steps_per_epoch * args.max_epochs, args.max_steps or 2**31)
    if len(trees) < args.train_batch_size:
        note(f"notice {len(trees)} examples for --train_batch_size {args.train_batch_size}: one smaller step")

    order_of = functools.cache(functools.partial(epoch_order, trees, args.seed))

    def batch_of(step):
        epoch, index = divmod(step - 1, steps_per_epoch)
        first = index * args.train_batch_size
        return [trees[i] for i in order_of(epoch)[first : first + args.train_batch_size]]

    identity, state, lock = None, [None], None
    if rank == 0:  # hashing may take long: before the process group, whose collectives time out
        identity = identify(args, inputs, world_size)
        state[0], lock = (0, None) if args.dry_run else open_run(args, identity)
    connect(device)
    dist.broadcast_object_list(state)
    if state[0] == "done":
        return
    start_step = state[0]

    # --- algorithm: sft (model)
    engine = start_engine(args, LogProbs)
    # --- end algorithm
    check_attention(engine, device, args)
    if start_step:
        engine.load_checkpoint(args.ckpt_path, tag=f"step_{start_step}")
    log = open_log(args, start_step) if rank == 0 and not args.dry_run else None

    # --- algorithm: sft (step)
    def size(batch):
        return sum(int(trained.sum()) for tree in batch for trained in tree["trained"])

    def make_loss(batch):
        n_tokens = size(batch)

        def loss_fn(per_token_logps, pack):
            loss = sft_loss(per_token_logps, n_tokens)
            return loss, {"loss": loss}

        return loss_fn

    # --- end algorithm
    announce(engine, trees, tokenizer, total_steps, args)
    stopped = catch_signals()
    for step in range(start_step, total_steps + 1):
        metrics, tick = {}, time.time()
        if step > start_step:
            batch = batch_of(step)
            torch.manual_seed(args.seed + step * world_size + rank)  # so resuming needs no generator state
            for group in engine.optimizer.param_groups:
                group["lr"] = learning_rate(args, step, total_steps)
            metrics = run_batch(engine, batch, make_loss(batch), args, train=True)
            if all(map(math.isfinite, metrics.values())):
                engine.step()
                metrics["grad_norm"] = float(engine.get_global_grad_norm())
            if not all(map(math.isfinite, metrics.values())):
                stop_not_finite(step, metrics, batch, args)
            seconds = time.time() - tick
            metrics["lr"] = learning_rate(args, step, total_steps)
            metrics["epoch"] = step / steps_per_epoch
            metrics["tokens_per_sec"] = sum(map(tree_length, batch)) / seconds
            metrics["samples_per_sec"] = len(batch) / seconds
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            metrics["peak_mem_gib"] = (peak if device == "cpu" else torch.cuda.max_memory_allocated()) / 2**30
        evaluates = step % (args.eval_steps if args.eval_steps > 0 else steps_per_epoch) == 0
        evaluates = evaluates or (step == total_steps and args.eval_steps <= 0)
        if eval_trees and evaluates and (metrics or step == 0):
            metrics |= evaluate(engine, eval_trees, make_loss, size, args)
        # --- algorithm: sft (metrics)
        if step > start_step:
            metrics["trained_tokens"] = size(batch)
        # --- end algorithm
        if log and metrics and (step % args.logging_steps == 0 or step == total_steps or evaluates):
            log(step, metrics)
            left = (total_steps - step) * (time.time() - started) / max(1, step - start_step)
            note(console_line(step, total_steps, metrics, left))
        if args.dry_run and step > start_step:
            return note(f"dry run: {console_line(step, total_steps, metrics, 0)}  nothing is saved")
        stops = on_any_rank(stopped, engine.device)
        saves = args.save_steps > 0 and step % args.save_steps == 0
        if (saves or stops) and start_step < step < total_steps:
            save_checkpoint(engine, args, step, identity)
        if stops and step < total_steps:
            note(f"stopped by a signal after step {step}; the same command continues")
            return STOPPED

    save_model(engine, tokenizer, args, identity, dropped)
    took = datetime.timedelta(seconds=int(time.time() - started))
    note(f"saved  {args.save_path}  ({total_steps} steps, {took})")


def disk_is_full(error, folder):
    """Whether an exception came from a full disk: libraries that write do not always say so."""
    folder = next(path for path in Path(folder).absolute().parents if path.exists())
    no_space = getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT)
    return no_space or shutil.disk_usage(folder).free < 2**20


if __name__ == "__main__":
    given = tyro.cli(Args, description=__doc__, args=explain_flags(sys.argv[1:]), use_underscores=True)
    try:
        code = main(given)
    except Exception as e:
        if not disk_is_full(e, given.save_path):
            raise
        die(f"no space left: {e}; what was complete is intact: free some, and the same command continues")
    sys.stdout.flush()
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()
    if dist.is_initialized():
        dist.destroy_process_group()
    os._exit(code or 0)  # skips exit handlers: in some finished DeepSpeed runs they abort

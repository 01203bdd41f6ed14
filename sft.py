"""Supervised fine-tuning (SFT) in one file.

    loss = - sum_t log pi(y_t | x, y_<t) / N        N = all trained tokens of the optimiser step, over all ranks

Deviations from the usual trainer:
 1. The mean is over the tokens of the whole optimiser step, so loss and gradient do not depend on the micro-batch size,
    the number of ranks, packing or the ZeRO stage.
 2. No padding: a micro-batch is one row of examples laid end to end; attention follows the examples (tree_attention).
 3. No logits: the LM head runs in chunks, over trained tokens only (LogProbs).
 4. EOS is a token id, trained only where the response is complete (not cut by --max_len, not finish_reason "length").

A data row, any of (more under --input_key):
    {"input": "Q: 2+2?\\nA:", "output": " 4"}
    {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}

Commands:
    python sft.py --pretrain MODEL --dataset rows.jsonl --save_path runs/sft                       # one GPU, or CPU
    deepspeed --num_gpus 8 sft.py --pretrain MODEL --dataset rows.jsonl --zero_stage 3 --packing_samples
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 sft.py ...  # each of two nodes
    python sft.py --pretrain runs/toy/toy/policy_init --dataset runs/toy/toy/sft.jsonl --no-bf16   # CPU smoke run
"""

import dataclasses
import datetime
import difflib
import fcntl
import functools
import hashlib
import json
import math
import os
import random
import resource
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass
class Args:
    # model
    pretrain: str
    """The model to train: a Hugging Face folder or hub name."""
    bf16: bool = True
    """bf16 weights with fp32 master weights; --no-bf16 trains in fp32."""
    flash_attn: bool = False
    """Use the flash-attn package on a GPU; otherwise torch's own varlen attention (same result)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about 25 % more time."""
    lora_rank: int = 0
    """Rank of LoRA adapters on all linear layers; 0 = full fine-tuning. The saved model is merged."""
    lora_alpha: int = 16
    """LoRA scale: adapters are multiplied by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Dropout in front of the LoRA adapters, 0 to 1. All other dropout is off."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    tokenizer_chat_template: str | None = None
    """A Jinja chat template, or a file with one, in place of the tokenizer's own."""
    # data
    dataset: str = ""
    """Rows: comma list of .jsonl/.json/.csv/.parquet/.arrow files, folders or hub names (NAME@DATA_DIR for a sub-folder)."""
    dataset_probs: str | None = None
    """Comma list of mixing probabilities for --dataset; smaller sets repeat until all are used. Default: all rows once."""
    dataset_split: str = "train"
    """Split of --dataset to train on, where it has splits."""
    eval_dataset: str | None = None
    """Held-out rows, as --dataset; no evaluation without it."""
    eval_split: str = "test"
    """Split of --eval_dataset, where it has splits."""
    max_samples: int = 100_000_000
    """Use the first this many rows of each dataset."""
    max_len: int = 2048
    """Tokens of prompt + response; longer responses are cut (no EOS), rows whose prompt alone is longer are dropped."""
    max_drop_ratio: float = 0.05
    """Stop when more than this share of the rows cannot be used."""
    input_key: str | None = None
    """Column of the prompt: text or messages. Default: recognised (input, prompt, instruction, question, messages, ...)."""
    output_key: str | None = None
    """Column of the response. Without it, input_key holds whole conversations (or texts with --pretrain_mode)."""
    input_template: str | None = None
    """Format of a plain text prompt, such as "User: {}\\nAssistant: "."""
    apply_chat_template: bool = False
    """Wrap plain text rows as one user and one assistant turn in the tokenizer's chat template."""
    multiturn: bool = False
    """Train on every assistant turn of a conversation; otherwise on the last."""
    pretrain_mode: bool = False
    """Language modelling: train on every token of input_key's text."""
    # loss and optimisation
    learning_rate: float = 5e-6
    """Peak learning rate of AdamW."""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_min_lr"] = "cosine_with_min_lr"
    """Learning rate after the warm-up."""
    lr_warmup_ratio: float = 0.03
    """Share of all steps with linear warm-up (not for constant)."""
    min_lr_ratio: float = 0.1
    """Final learning rate of cosine_with_min_lr, relative to the peak."""
    l2: float = 0.0
    """Decoupled weight decay, on matrices only."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """Beta1 and beta2 of AdamW."""
    max_norm: float = 1.0
    """Clip the global gradient norm; 0 = no clipping."""
    max_epochs: int = 1
    """Passes over the data."""
    seed: int = 42
    """Seed of everything random: data order, dropout of LoRA, new adapters."""
    # batch
    train_batch_size: int = 128
    """Examples per optimiser step, over all ranks."""
    micro_train_batch_size: int = 8
    """At most this many examples per forward pass and rank; changes speed and memory, never the result."""
    packing_samples: bool = False
    """Fill each forward pass to micro_train_batch_size x max_len tokens instead."""
    # evaluation and logging
    eval_steps: int = -1
    """Evaluate every this many steps; -1 = at step 0 and at the end of each epoch."""
    logging_steps: int = 1
    """Log every this many steps."""
    use_wandb: str | None = None
    """Log to Weights & Biases too; the value may be a token (WANDB_API_KEY is the better place)."""
    wandb_project: str = "flatalign"
    """Project name for --use_wandb."""
    wandb_run_name: str | None = None
    """Run name for --use_wandb."""
    use_tensorboard: str | None = None
    """Write TensorBoard files to this folder too."""
    # saving
    save_path: str = "./ckpt"
    """Folder of the trained model: a Hugging Face folder with args.json and metrics.jsonl beside the weights."""
    save_steps: int = -1
    """Write a checkpoint to resume from every this many steps; -1 = never. The same command resumes."""
    ckpt_path: str | None = None
    """Folder of the checkpoints. Default: <save_path>.ckpt, removed when the final model is saved."""
    max_ckpt_num: int = 3
    """Keep this many checkpoints."""
    load_checkpoint: bool = False
    """Accepted for old commands: resuming is automatic."""
    # system
    zero_stage: int = 2
    """DeepSpeed ZeRO: 0 and 1 shard the optimiser, 2 gradients too, 3 weights too."""
    adam_offload: bool = False
    """Keep optimiser state and master weights in CPU memory."""
    local_rank: int = -1
    """Set by the deepspeed launcher."""


# --- reading rows


def die(message):
    """Ends the program: one line on stderr (of rank 0), exit code 2."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def note(message):
    """One line on the console of rank 0."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(message, flush=True)


def read_json(path):
    """Rows of a .json (one list) or .jsonl (one object per line) file, each as ("file:line", row)."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        die(f"{path}: not UTF-8 at byte {e.start}")
    rows, lines = [], text.split("\n")
    if str(path).endswith(".json") and text.lstrip()[:1] == "[":
        try:
            rows = [(f"{path}[{i}]", row) for i, row in enumerate(json.loads(text))]
        except json.JSONDecodeError as e:
            die(f"{path}:{e.lineno}: broken JSON: {e.msg}")
        lines = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append((f"{path}:{number}", json.loads(line)))
            except json.JSONDecodeError as e:
                if number == len(lines):  # no newline at its end: a writer was killed there
                    note(f"notice {path}:{number}: the last line is cut off, dropped")
                    continue
                die(f"{path}:{number}: broken JSON: {e.msg} at column {e.colno}")
    for where, row in rows:
        if not isinstance(row, dict):
            die(f"{where}: a row must be an object, not {type(row).__name__}")
    return rows


def read_table(name, split):
    """Rows of one dataset as ("where", row): local files and folders, or a hub name with an optional @DATA_DIR."""
    if name.endswith((".json", ".jsonl")):
        if not Path(name).is_file():
            die(f"--dataset {name}: no such file")
        return read_json(name)
    import datasets  # a second to import: only where it is needed

    path, _, data_dir = name.partition("@")
    extension = Path(path).suffix[1:]
    try:
        if extension in ("csv", "parquet", "arrow"):
            table = datasets.load_dataset(extension, data_files=path)
        elif (Path(path) / "dataset_dict.json").exists() or (Path(path) / "state.json").exists():
            table = datasets.load_from_disk(path)
        else:
            table = datasets.load_dataset(path, data_dir=data_dir or None)
    except Exception as e:  # the library's own message names the cause; many exception types
        die(f"--dataset {name}: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'cannot be read'}")
    if isinstance(table, datasets.DatasetDict):
        splits = list(table)
        if split not in splits and len(splits) > 1:
            die(f"--dataset {name} has no split {split!r}; it has {', '.join(splits)}")
        table = table[split if split in splits else splits[0]]
    return [(f"{name}[{i}]", row) for i, row in enumerate(table)]


def load_rows(names, probs, split, max_samples, seed):
    """All rows of a comma list of datasets, one after another, or mixed by probability (seeded) when probs is given."""
    names = [name.strip() for name in names.split(",") if name.strip()]
    if not names:
        die("--dataset is missing")
    tables = [read_table(name, split)[:max_samples] for name in names]
    for name, table in zip(names, tables, strict=True):
        if not table:
            die(f"--dataset {name}: no rows")
    if probs is None or len(tables) == 1:
        return [row for table in tables for row in table]
    weights = [float(p) for p in probs.split(",")]
    if len(weights) != len(tables):
        die(f"--dataset_probs has {len(weights)} values for {len(tables)} datasets")
    rng, used, rows = random.Random(seed), [0] * len(tables), []
    while any(n < len(table) for n, table in zip(used, tables, strict=True)):
        i = rng.choices(range(len(tables)), weights)[0]
        rows.append(tables[i][used[i] % len(tables[i])])
        used[i] += 1
    return rows


def column(rows, key, flag):
    """Stops unless the first row has the column that a flag names."""
    if key not in rows[0][1]:
        have = list(rows[0][1])
        near = difflib.get_close_matches(key, have, 1)
        hint = f"; did you mean {flag} {near[0]}?" if near else f"; choose one with {flag}"
        die(f"{rows[0][0]}: no column {key!r}; it has {', '.join(have)}{hint}")


# --- text and tokens


class Text(NamedTuple):
    """A rendered example: the characters to train (spans), whether EOS follows, whether the tokenizer adds its BOS."""

    text: str
    spans: list
    finished: bool
    bos: bool


def load_tokenizer(path, trust_remote_code, chat_template):
    """(tokenizer, ids that end a turn) of a model folder. Offsets are needed to find the response: fast tokenizers only."""
    from transformers import AutoTokenizer, GenerationConfig

    if not Path(path).exists() and (path[:1] in "./~" or path.count("/") != 1):
        die(f"model {path}: no such folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as e:
        die(f"model {path}: no usable tokenizer: {str(e).splitlines()[0]}")
    if not tokenizer.is_fast:
        die(f"model {path}: its tokenizer has no fast version, which gives the character offsets we need")
    if tokenizer.eos_token_id is None:
        die(f"model {path}: its tokenizer has no EOS token")
    if chat_template:
        is_file = len(chat_template) < 4096 and Path(chat_template).is_file()
        tokenizer.chat_template = Path(chat_template).read_text() if is_file else chat_template
    try:
        stops = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # the model has no generation_config.json
        stops = None
    return tokenizer, {tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])} - {None}


def as_messages(value):
    """A list of {role, content} from such a list or {from, value} (human, gpt, ...); a str names what is wrong with it."""
    roles = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant"}
    if not isinstance(value, list) or not value:
        return "messages are not a list"
    messages = []
    for turn in value:
        if not isinstance(turn, dict):
            return "a message is not an object"
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            return "a message without role or text"
        extra = {k: v for k, v in turn.items() if k not in ("role", "from", "content", "value") and v is not None}
        messages.append({"role": roles.get(role, role), "content": content, **extra})
    return messages


def render_chat(tokenizer, messages, add_generation_prompt=False):
    """The chat template's text for messages; a str starting with "!" where the template refuses them."""
    if tokenizer.chat_template is None:
        die("the rows hold messages, but the tokenizer has no chat template: give --tokenizer_chat_template")
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as e:
        return f"!chat template: {e}"


def chat_text(tokenizer, messages, multiturn):
    """Text of a conversation, with the last (multiturn: every) assistant turn trained; a str says why it cannot be used.

    A turn is what follows the rendering of the turns before it with a generation prompt, so the trained prompt is the
    prompt that generation sees. Templates with {% generation %} marks say themselves what the assistant writes.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns or not turns[0]:
        return "no assistant turn after a prompt"
    messages = messages[: turns[-1] + 1]
    full = render_chat(tokenizer, messages)
    if full[:1] == "!":
        return full[1:]
    spans = []
    if "generation" in tokenizer.chat_template.replace("add_generation_prompt", ""):
        from transformers.utils.chat_template_utils import render_jinja_template

        _, marks = render_jinja_template(
            conversations=[messages],
            chat_template=tokenizer.chat_template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
        spans = [tuple(span) for span in marks[0]]
    if spans:
        return Text(full, spans if multiturn else spans[-1:], True, False)
    for i in turns if multiturn else turns[-1:]:
        before = render_chat(tokenizer, messages[:i], add_generation_prompt=True)
        start = len(os.path.commonprefix([before, full]))
        end = len(os.path.commonprefix([render_chat(tokenizer, messages[: i + 1]), full]))
        if before[:1] == "!" or start >= end or (spans and start < spans[-1][1]):
            return "the chat template rewrites earlier turns"
        spans.append((start, end))
    return Text(full, spans, True, False)


def pair_text(tokenizer, prompt, response, apply_chat_template, input_template, finished=True, rendered=False):
    """Text of a prompt (text or messages) and its response (text or messages); a str says why it cannot be used."""
    if isinstance(prompt, list) or isinstance(response, list) or apply_chat_template:
        prompt = as_messages([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
        response = as_messages([{"role": "assistant", "content": response}] if isinstance(response, str) else response)
        for part in (prompt, response):
            if isinstance(part, str):
                return part
        return chat_text(tokenizer, prompt + response, multiturn=False)
    if not isinstance(prompt, str) or not isinstance(response, str):
        return f"{'prompt' if not isinstance(prompt, str) else 'response'} is not text"
    prompt = prompt if input_template is None or rendered else input_template.replace("{}", prompt)
    return Text(prompt + response, [(len(prompt), len(prompt) + len(response))], finished, not rendered)


def tokenize(tokenizer, texts, max_len, stop_ids):
    """(input_ids, trained) int32 and bool arrays [T] for each Text; a str says why it cannot be used; and how many were cut.

    The full text is tokenised at once: a token belongs to the response if it ends inside it. Nothing after a turn's
    stop token is trained; EOS is appended to a finished response that has no stop token of its own.
    """
    adds_bos = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    encoded = tokenizer([t.text for t in texts], add_special_tokens=False, return_offsets_mapping=True)
    results, cut = [], 0
    for text, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        offsets = np.array(offsets, dtype=np.int64).reshape(-1, 2)
        trained, stopped = np.zeros(len(ids), dtype=bool), False
        for start, end in text.spans:
            inside = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < end))
            stops = [j for j in inside if ids[j] in stop_ids]
            inside = inside[: np.searchsorted(inside, stops[-1]) + 1] if stops else inside
            trained[inside] = True
            stopped = bool(stops)
        if stopped:  # what a template writes after the last stop token (a newline) is no part of the example
            ids, trained = ids[: inside[-1] + 1], trained[: inside[-1] + 1]
        elif text.finished:
            ids, trained = ids + [tokenizer.eos_token_id], np.append(trained, True)
        if text.bos and adds_bos and ids[0] != tokenizer.bos_token_id:
            ids, trained = [tokenizer.bos_token_id] + ids, np.append(False, trained)
        trained[:1] = False  # nothing predicts the first token
        first = int(trained.argmax()) if trained.any() else -1
        if first < 0:
            results.append("empty response")
        elif first >= max_len:
            results.append(f"prompt >= max_len ({first} tokens)")
        else:
            cut += len(ids) > max_len
            results.append((np.array(ids[:max_len], dtype=np.int32), trained[:max_len]))
    return results, cut


def make_tree(encodings):
    """One example: the prompt that all k responses share, stored once, and the responses that hang off it."""
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
    return len(tree["prompt"]) + sum(len(ids) for ids in tree["responses"])


def build_trees(rows, to_texts, tokenizer, max_len, stop_ids, max_drop_ratio):
    """Examples of all usable rows. to_texts(row) gives the k Texts of a row, or a str with the reason to drop it.

    Returns (trees, dropped rows as {"row", "reason"}); stops when nothing or too little is left.
    """
    trees, dropped, cut = [], [], 0
    for begin in range(0, len(rows), 1000):
        batch = [(where, row, to_texts(row)) for where, row in rows[begin : begin + 1000]]
        texts = [text for _, _, texts in batch if not isinstance(texts, str) for text in texts]
        tokenized, now_cut = tokenize(tokenizer, texts, max_len, stop_ids) if texts else ([], 0)
        tokenized, cut = iter(tokenized), cut + now_cut
        for where, row, texts in batch:
            encodings = [next(tokenized) for _ in texts] if not isinstance(texts, str) else [texts]
            problems = [e for e in encodings if isinstance(e, str)]
            if problems:
                dropped.append({"row": where, "reason": problems[0]})
            else:
                trees.append({**make_tree(encodings), "where": where, "row": row})
    counts = {}
    for drop in dropped:
        reason = drop["reason"].split(" (")[0]
        counts[reason] = counts.get(reason, 0) + 1
    summary = ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items(), key=lambda item: -item[1]))
    if not trees or len(dropped) > max_drop_ratio * len(rows):
        die(f"{len(dropped)} of {len(rows)} rows cannot be used ({summary}); first: {dropped[0]['row']}: {dropped[0]['reason']}")
    note(f"data   {len(trees):,} rows kept, {len(dropped)} dropped ({summary or 'none'}), {cut} responses cut at max_len")
    return trees, dropped


# --- packing, attention, log-probabilities


def split_step(lengths, world_size, max_examples, max_tokens=None):
    """Splits the examples of one step over ranks and forward passes: longest first, into the lightest bin with room.

    Returns bins[rank][i], lists of indices into lengths (tokens); every rank has as many bins, the heaviest first.
    A bin holds at most max_examples, or max_tokens when that is given. A bin is empty only if examples are too few.
    """
    rounds = math.ceil(sum(lengths) / (world_size * max_tokens) if max_tokens else len(lengths) / (world_size * max_examples))
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while True:
        bins, load = [[] for _ in range(rounds * world_size)], [0] * (rounds * world_size)
        for i in order:
            if max_tokens:
                room = [b for b in range(len(bins)) if not bins[b] or load[b] + lengths[i] <= max_tokens]
            else:
                room = [b for b in range(len(bins)) if len(bins[b]) < max_examples]
            if not room:
                break
            lightest = min(room, key=load.__getitem__)
            bins[lightest].append(i)
            load[lightest] += lengths[i]
        else:
            ranked = sorted(range(len(bins)), key=lambda b: -load[b])
            return [[bins[b] for b in ranked[rank::world_size]] for rank in range(world_size)]
        rounds += 1


def pack_trees(trees, device):
    """Lays trees end to end in one row of T tokens, no padding: prompt, its responses, next prompt, ...

    segments["spans"]: (q_start, q_end, prefix_start, prefix_end) - queries of a response see their own segment and the
    prefix (their prompt). The first response simply continues its prompt, one causal segment without prefix.
    positions [N]: the hidden state that predicts each trained token; the first token of EVERY response is predicted
    by the last prompt token. targets [N], owners [N]: the token's id, the index of its response in the pack.
    """
    input_ids, position_ids, spans, positions, targets, owners = [], [], [], [], [], []
    cursor, n_responses = 0, 0
    for tree in trees:
        start, prompt_end = cursor, cursor + len(tree["prompt"])
        input_ids.append(tree["prompt"])
        position_ids.append(np.arange(len(tree["prompt"])))
        cursor = prompt_end
        for i, (ids, trained) in enumerate(zip(tree["responses"], tree["trained"], strict=True)):
            spans.append((cursor, cursor + len(ids), start, prompt_end) if i else (start, cursor + len(ids), start, start))
            source = np.arange(cursor - 1, cursor + len(ids) - 1)
            source[:1] = prompt_end - 1
            input_ids.append(ids)
            position_ids.append(np.arange(len(tree["prompt"]), len(tree["prompt"]) + len(ids)))
            positions.append(source[trained])
            targets.append(ids[trained])
            owners.append(np.full(int(trained.sum()), n_responses))
            cursor, n_responses = cursor + len(ids), n_responses + 1

    def tensor(arrays):
        return torch.from_numpy(np.concatenate(arrays).astype(np.int64)).to(device, non_blocking=True)

    segments = {"spans": spans}
    if torch.device(device).type == "cuda":  # one varlen call: keys are gathered as prefix ++ segment
        keys = [np.r_[p_start:p_end, q_start:q_end] for q_start, q_end, p_start, p_end in spans]
        lengths = {"q": [end - start for start, end, _, _ in spans], "k": [len(k) for k in keys]}
        segments["keys"] = tensor(keys)
        for name, value in lengths.items():
            segments[f"cu_{name}"] = torch.tensor(np.cumsum([0] + value), dtype=torch.int32, device=device)
            segments[f"max_{name}"] = max(value)
    return {
        "input_ids": tensor(input_ids)[None],  # [1, T]
        "position_ids": tensor(position_ids)[None],
        "segments": segments,
        "positions": tensor(positions),
        "targets": tensor(targets),
        "owners": tensor(owners),
        "n_responses": n_responses,
        "trees": trees,
    }


def tree_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, segments=None, sliding_window=None, softcap=None, **kwargs
):
    """Attention that follows the trees of pack_trees, for any Hugging Face model; query [1, heads, T, dim] -> [1, T, heads, dim].

    Registered as attn_implementation "tree". A query sees its prefix and its own segment up to itself, aligned
    bottom-right; a sliding window counts positions, which run on from prefix to segment. Dropout is always off.
    """
    known = {"position_ids", "use_cache", "is_causal", "cache_position", "output_attentions", "output_hidden_states", "return_dict"}
    unknown = [name for name, given in kwargs.items() if given is not None and name not in known]
    if unknown or attention_mask is not None or segments is None:
        die(f"{type(module).__name__} needs {', '.join(unknown) or 'a mask'}, which tree_attention does not compute: not supported")
    window = (sliding_window or 0) - 1  # -1 = unlimited
    if query.is_cuda and query.dtype != torch.float32 and (segments.get("flash") or softcap is None):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, dim]
        sizes = (segments["cu_q"], segments["cu_k"], segments["max_q"], segments["max_k"])
        k, v = k[segments["keys"]], v[segments["keys"]]
        if segments.get("flash"):
            from flash_attn import flash_attn_varlen_func

            flags = {"softmax_scale": scaling, "causal": True, "window_size": (window, 0), "softcap": softcap or 0.0}
            return flash_attn_varlen_func(q, k, v, *sizes, **flags)[None], None
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(q, k, v, *sizes, scale=scaling, window_size=(window, 0), enable_gqa=True)[None], None
    outputs = []
    for q_start, q_end, p_start, p_end in segments["spans"]:
        q, k, v = query[:, :, q_start:q_end], key[:, :, q_start:q_end], value[:, :, q_start:q_end]
        if p_end > p_start:
            k, v = torch.cat([key[:, :, p_start:p_end], k], 2), torch.cat([value[:, :, p_start:p_end], v], 2)
        n_q, n_k = q.shape[2], k.shape[2]
        if n_q == n_k and (window < 0 or n_k <= window) and softcap is None:
            outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True))
            continue
        distance = torch.arange(n_k - n_q, n_k, device=q.device)[:, None] - torch.arange(n_k, device=q.device)
        mask = (distance >= 0) & (distance <= window) if window >= 0 else distance >= 0
        if softcap is None:
            outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True))
            continue
        groups = q.shape[1] // k.shape[1]
        scores = (q @ k.repeat_interleave(groups, 1).transpose(2, 3)).float() * scaling
        scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, float("-inf"))
        outputs.append(scores.softmax(-1).to(v.dtype) @ v.repeat_interleave(groups, 1))
    return torch.cat(outputs, 2).transpose(1, 2), None


class LogProbs(nn.Module):
    """Wraps a causal LM: forward(pack) -> per_token_logps [N], fp32 nats, one per trained token of the pack.

    Only hidden states that predict a trained token reach the LM head, in chunks whose logits are recomputed in the
    backward pass: nothing of size tokens x vocabulary exists.
    """

    CHUNK_BYTES = 2**26  # of one chunk's fp32 logits

    def __init__(self, model):
        super().__init__()
        self.model = model
        core = model.get_base_model() if hasattr(model, "peft_config") else model
        self.parts = [core.base_model, core.get_output_embeddings()]  # in a list: not twice in the state dict
        config = core.config.get_text_config()
        self.scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        self.softcap = getattr(config, "final_logit_softcapping", None)
        if hasattr(self.parts[1].weight, "ds_id"):  # ZeRO-3: gathered once per pass, as ranks differ in chunks
            import deepspeed

            deepspeed.zero.register_external_parameter(self, self.parts[1].weight)

    def logits(self, hidden, weight, bias):
        """hidden [C, H] -> logits [C, V], fp32, with the quirks that models apply after the head."""
        logits = F.linear(hidden, weight, bias).float()
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def chunk_logps(self, hidden, weight, bias, targets):
        logits = self.logits(hidden, weight, bias)
        return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)

    def forward(self, pack):
        body, head = self.parts
        inputs = {name: pack[name] for name in ("input_ids", "position_ids", "segments")}
        hidden = body(**inputs, use_cache=False).last_hidden_state[0][pack["positions"]]  # [N, H]
        weight, bias = head.weight, getattr(head, "bias", None)
        rows = max(16, self.CHUNK_BYTES // (4 * weight.shape[0]))
        return torch.cat(
            [
                checkpoint(self.chunk_logps, h, weight, bias, t, use_reentrant=False)
                for h, t in zip(hidden.split(rows), pack["targets"].split(rows), strict=True)
            ]
        )


# --- the loss


def sft_loss(per_token_logps, n_tokens):
    """Negative log-likelihood. per_token_logps [N] in nats; n_tokens: trained tokens of the whole step. Returns a scalar."""
    return -per_token_logps.sum() / n_tokens


# --- files


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fingerprint(names):
    """Identity of a model or of datasets (comma list): sha256 of a local file's or folder's contents, or the hub name."""
    if "," in names:
        return ",".join(fingerprint(name) for name in names.split(","))
    path = Path(names.strip().partition("@")[0])
    if path.is_file():
        return sha256(path)
    if not path.exists():
        return names
    kinds = {".safetensors", ".bin", ".json", ".model", ".jinja"} if (path / "config.json").exists() else None
    ours = {"args.json", "manifest.json"}
    files = [p for p in sorted(path.rglob("*")) if p.is_file() and (kinds is None or p.suffix in kinds) and p.name not in ours]
    with ThreadPoolExecutor() as pool:
        return hashlib.sha256("".join(pool.map(sha256, files)).encode()).hexdigest()


def write_atomic(path, text):
    """Writes beside, syncs, renames: the file has its old or its new content, never half of it."""
    temporary = Path(f"{path}.tmp")
    with open(temporary, "w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def write_manifest(folder, identity):
    """manifest.json, written last: what made the folder, and the sha256 of every file in it."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "lock")
    for path in files:
        with open(path, "rb") as f:
            os.fsync(f.fileno())
    with ThreadPoolExecutor() as pool:
        sums = dict(zip([str(p.relative_to(folder)) for p in files], pool.map(sha256, files), strict=True))
    write_atomic(folder / "manifest.json", json.dumps({"identity": identity, "files": sums}, indent=1))


def intact(folder):
    """The identity in a folder's manifest if every file is there as it was written, else None."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        with ThreadPoolExecutor() as pool:
            sums = list(pool.map(sha256, [folder / name for name in manifest["files"]]))
        return manifest["identity"] if sums == list(manifest["files"].values()) else None
    except (OSError, ValueError, KeyError):
        return None


def publish(partial, target):
    """Moves a finished folder into place, its manifest last; called again after a crash, it goes on where it was."""
    target.mkdir(parents=True, exist_ok=True)
    (target / "manifest.json").unlink(missing_ok=True)
    names = json.loads((partial / "manifest.json").read_text())["files"]
    for stale in target.glob("model*.safetensors*"):  # shards of the model that is replaced
        if stale.name not in names:
            stale.unlink()
    for name in names:
        if (partial / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(partial / name, target / name)
    os.sync()
    os.replace(partial / "manifest.json", target / "manifest.json")
    shutil.rmtree(partial)


def identify(args, inputs, world_size):
    """What decides the result of a run: flags, contents of its inputs, number of ranks. Kept with checkpoints and model."""
    free = (
        "pretrain dataset save_path save_steps ckpt_path max_ckpt_num load_checkpoint logging_steps eval_dataset eval_split eval_steps "
        "use_wandb wandb_project wandb_run_name use_tensorboard max_drop_ratio local_rank cache_dir ref_pretrain ref_offload"
    )
    identity = {k: v for k, v in dataclasses.asdict(args).items() if k not in free.split()}
    identity["adam_betas"] = list(args.adam_betas)
    contents = {name: fingerprint(path) for name, path in inputs.items()}
    return {"script": Path(__file__).name, **identity, **contents, "world_size": world_size}


def differences(old, new):
    """Names of the keys in which two identities differ, with both values."""
    return ", ".join(f"{k} (was {old.get(k)!r}, now {new.get(k)!r})" for k in {**old, **new} if old.get(k) != new.get(k))


def open_run(args, identity):
    """Decides what this command does with --save_path (rank 0).

    Returns ("done", a step to resume from, or 0; the lock, held until the process ends).
    """
    target, partial = Path(args.save_path), Path(f"{args.save_path.rstrip('/')}.partial")
    if (partial / "manifest.json").exists():  # finished, but killed while moving into place
        publish(partial, target)
    if (target / "config.json").exists():
        old, new = intact(target) or {}, dict(identity)
        in_place = target.resolve() == Path(args.pretrain).resolve()
        if in_place and old:  # the model replaced its own start weights: those cannot be compared any more
            new["weights"] = old.get("weights")
        if old == new:
            note(f"done   {target} is complete, made by this command: nothing to do")
            return "done", None
        if not in_place:
            why = differences(old, new)[:300] if old else "it has no intact manifest.json"
            die(f"--save_path {target} holds a model of another run: {why}. Choose another folder, or remove it")
    partial.mkdir(parents=True, exist_ok=True)
    lock = open(partial / "lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        die(f"--save_path {target}: another process is writing there")
    for step, folder in reversed(checkpoints(args)):
        old = intact(folder)
        if old == identity:
            note(f"resume {folder}")
            return step, lock
        if old:
            die(f"{folder} is of another run: {differences(old, identity)[:300]}. Restore the flags, or remove {folder.parent}")
        note(f"notice {folder} is damaged or half written: not used")
    return 0, lock


def checkpoints(args):
    """(step, folder) of all checkpoints, oldest first."""
    root = Path(args.ckpt_path or f"{args.save_path.rstrip('/')}.ckpt")
    return sorted((int(p.name[5:]), p) for p in root.glob("step_*") if p.name[5:].isdigit())


def save_checkpoint(engine, args, step, identity):
    """Everything that decides the future of a run, complete in <ckpt_path>/step_N or not there. On all ranks.

    Random numbers are seeded by step (see main), so no generator state belongs to it.
    """
    root = Path(args.ckpt_path or f"{args.save_path.rstrip('/')}.ckpt")
    partial = root / f"step_{step}.partial"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    engine.save_checkpoint(str(root), tag=partial.name, client_state={"step": step}, save_latest=False)  # ends in a barrier
    if dist.get_rank() == 0:
        write_manifest(partial, identity)
        shutil.rmtree(root / f"step_{step}", ignore_errors=True)  # a damaged one
        os.replace(partial, root / f"step_{step}")
        os.sync()
        for _, folder in checkpoints(args)[: -args.max_ckpt_num]:
            shutil.rmtree(folder)
    dist.barrier()


def full_weights(engine, args):
    """State dict of the whole model on rank 0 (ZeRO-3 gathers it), LoRA merged into it. On all ranks."""
    if args.zero_stage == 3:
        weights = engine._zero3_consolidated_16bit_state_dict()
    else:
        weights = engine.module.state_dict()
    if dist.get_rank() > 0:
        return None
    weights = {k.removeprefix("model."): v for k, v in weights.items()}
    if args.lora_rank == 0:
        return weights
    merged = {}
    for name, value in weights.items():
        if ".lora_" not in name:
            stem = name.removesuffix(".base_layer.weight")
            if stem != name:
                a, b = (weights[f"{stem}.lora_{x}.default.weight"].float() for x in "AB")
                value = (value.float() + args.lora_alpha / args.lora_rank * b @ a).to(value.dtype)
            merged[name.replace(".base_layer.", ".").removeprefix("base_model.model.")] = value
    return merged


def save_model(engine, tokenizer, args, identity, dropped):
    """The trained model as a Hugging Face folder at --save_path: there, complete, with its manifest, or not at all."""
    weights = full_weights(engine, args)
    if dist.get_rank() == 0:
        target, partial = Path(args.save_path), Path(f"{args.save_path.rstrip('/')}.partial")
        model = engine.module.model
        core = model.get_base_model() if args.lora_rank else model
        core.save_pretrained(partial, state_dict=weights, max_shard_size="5GB")
        tokenizer.save_pretrained(partial)
        shown = {k: v for k, v in dataclasses.asdict(args).items() if k != "use_wandb"}  # its value may be a secret
        write_atomic(partial / "args.json", json.dumps({"args": shown, "identity": identity}, indent=1))
        if dropped:
            write_atomic(partial / "dropped.jsonl", "".join(json.dumps(drop) + "\n" for drop in dropped))
        write_manifest(partial, identity)
        publish(partial, target)
        if intact(target):
            for _, folder in checkpoints(args):
                shutil.rmtree(folder)
            if not args.ckpt_path:
                shutil.rmtree(f"{args.save_path.rstrip('/')}.ckpt", ignore_errors=True)
    dist.barrier()


class Log:
    """metrics.jsonl, one object per line, and its optional followers; rank 0 only."""

    def __init__(self, args, start_step):
        self.path = Path(f"{args.save_path.rstrip('/')}.partial") / "metrics.jsonl"
        kept = [line for line in self.path.read_text().splitlines() if line] if start_step and self.path.exists() else []
        kept = [line for line in kept if line.endswith("}") and json.loads(line)["step"] <= start_step]
        write_atomic(self.path, "".join(line + "\n" for line in kept))
        self.file, self.board, self.wandb = open(self.path, "a"), None, None
        if args.use_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(args.use_tensorboard)
        if args.use_wandb and args.use_wandb != "{wandb_token}":
            try:
                import wandb

                if not os.environ.get("WANDB_API_KEY") and len(args.use_wandb) > 20:
                    os.environ["WANDB_API_KEY"] = args.use_wandb
                self.wandb = wandb.init(project=args.wandb_project, name=args.wandb_run_name)
            except ImportError:
                note("notice wandb is not installed (pip install wandb): metrics go to metrics.jsonl only")

    def write(self, step, metrics):
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()
        numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
        if self.board:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(numbers, step=step)


# --- training


def setup(args):
    """Checks flags, finds rank and device, quiets the libraries. Returns (rank, world_size, device); no process group yet."""
    for name, default in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}.items():
        os.environ.setdefault(name, str(default))
    local_rank = int(os.environ.setdefault("LOCAL_RANK", str(max(args.local_rank, 0))))
    for name in ("train_batch_size", "micro_train_batch_size", "max_len", "max_epochs", "max_ckpt_num", "logging_steps"):
        if getattr(args, name) < 1:
            die(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.zero_stage not in (0, 1, 2, 3):
        die(f"--zero_stage must be 0, 1, 2 or 3, not {args.zero_stage}")
    if args.load_checkpoint:
        note("notice --load_checkpoint: resuming is automatic")
    template = (args.input_template or "").replace("\\n", "\n")  # a heredoc leaves backslash-n as two characters
    if template and "{}" not in template:
        note(f"notice --input_template {template!r} has no {{}}: not used")
        template = ""
    args.input_template = template or None
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), f"cuda:{local_rank}"
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"])))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "cpu"


def deepspeed_config(args, hidden_size):
    """ZeRO with fp32 gradient accumulation and communication: how a batch is split then leaves no trace in bf16 either."""
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
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW also runs on the CPU, and needs no compiler
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def load_model(path, args):
    """The causal LM with tree attention, all its weights from the checkpoint, dropout off."""
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register("tree", tree_attention)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="tree", trust_remote_code=args.trust_remote_code, output_loading_info=True
        )
    except (OSError, ValueError) as e:
        die(f"model {path}: {str(e).splitlines()[0]}")
    if info["missing_keys"]:
        die(f"model {path}: weights are missing from the checkpoint: {', '.join(sorted(info['missing_keys'])[:3])} ...")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def connect(device):
    """Joins the process group."""
    import deepspeed

    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else CPU runs compile an extension we do not use
    deepspeed.init_distributed("nccl" if "cuda" in device else "gloo", verbose=False)


def start_engine(args, wrapper):
    """Model, wrapped in LogProbs or a class like it, and optimiser under DeepSpeed. Returns the engine: engine(pack)."""
    import deepspeed
    from transformers import AutoConfig
    from transformers.integrations import HfDeepSpeedConfig

    config = AutoConfig.from_pretrained(args.pretrain, trust_remote_code=args.trust_remote_code)
    ds_config = deepspeed_config(args, config.get_text_config().hidden_size)
    # alive while the model loads: ZeRO-3 then never holds the whole model on one rank
    partition_at_load = HfDeepSpeedConfig(ds_config) if args.zero_stage == 3 else None
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
    parameters = [p for p in model.parameters() if p.requires_grad]
    is_matrix = [len(getattr(p, "ds_shape", p.shape)) > 1 for p in parameters]
    groups = [
        {"params": [p for p, m in zip(parameters, is_matrix, strict=True) if m], "weight_decay": args.l2},
        {"params": [p for p, m in zip(parameters, is_matrix, strict=True) if not m], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=args.adam_betas, fused=True)
    return deepspeed.initialize(model=wrapper(model), optimizer=optimizer, config=ds_config)[0]


@torch.no_grad()
def check_attention(engine, args):
    """Stops unless a tree's log-probs equal those of the model's own eager attention, each branch alone: no family on trust."""
    model = engine.module.model.get_base_model() if args.lora_rank else engine.module.model
    ids = (np.arange(40) * 7919 + 11) % model.config.get_text_config().vocab_size
    prompt, branches = ids[:16].astype(np.int32), [ids[16:27].astype(np.int32), ids[27:].astype(np.int32)]
    tree = {"prompt": prompt, "responses": branches, "trained": [np.ones(len(b), bool) for b in branches]}
    engine.eval()
    found = engine.module(pack_trees([tree], engine.device)).split([len(b) for b in branches])
    model.set_attn_implementation("eager")
    worst = 0.0
    for branch, logps in zip(branches, found, strict=True):
        row = torch.from_numpy(np.concatenate([prompt, branch])).long().to(engine.device)
        alone = model(input_ids=row[None], use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        worst = max(worst, (alone.gather(1, row[len(prompt) :, None])[:, 0] - logps).abs().mean().item())
    model.set_attn_implementation("tree")
    engine.train()
    if not worst < (0.05 if args.bf16 else 1e-4):
        die(f"{type(model).__name__}: tree attention differs from the model's own by {worst:.2g} nats per token: not supported")


def learning_rate(args, step, total_steps):
    """Learning rate of optimiser step 1..total_steps: linear warm-up that ends at the peak, then the schedule."""
    warmup = 0 if args.lr_scheduler == "constant" else math.ceil(args.lr_warmup_ratio * total_steps)
    if step <= warmup:
        return args.learning_rate * step / warmup
    progress = (step - warmup - 1) / max(1, total_steps - warmup)  # 0 at the first step after the warm-up
    if args.lr_scheduler == "linear":
        return args.learning_rate * (1 - progress)
    if args.lr_scheduler.startswith("cosine"):
        floor = args.min_lr_ratio if args.lr_scheduler == "cosine_with_min_lr" else 0.0
        return args.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
    return args.learning_rate


def run_batch(engine, trees, loss_fn, args, train):
    """Forward (and backward) over the examples of one optimiser step, split over ranks and forward passes.

    loss_fn(per_token_logps, pack) -> (loss, {name: share}): each share is divided by the size of the whole batch, so
    shares simply add up over forward passes and ranks. Returns {name: mean over the batch}, the same on all ranks.
    """
    responses = max(len(tree["responses"]) for tree in trees)
    budget = args.micro_train_batch_size * args.max_len * responses if args.packing_samples else None
    lengths = [tree_length(tree) for tree in trees]
    bins = split_step(lengths, dist.get_world_size(), args.micro_train_batch_size, budget)[dist.get_rank()]
    total = 0
    for i, bin in enumerate(bins):
        weight = 1.0 if bin else 0.0  # too few examples for all ranks: a dummy that counts nothing, as forwards are collective
        pack = pack_trees([trees[j] for j in bin] or [min(trees, key=tree_length)], engine.device)
        pack["segments"]["flash"] = args.flash_attn
        engine.set_gradient_accumulation_boundary(i == len(bins) - 1)
        with torch.set_grad_enabled(train):
            loss, shares = loss_fn(engine(pack), pack)
        if train:
            engine.backward(loss * weight * dist.get_world_size())  # DeepSpeed takes the mean over ranks
        names, values = list(shares), torch.stack([value.detach().double() for value in shares.values()])
        total = total + weight * values
    dist.all_reduce(total)
    return dict(zip(names, total.tolist(), strict=True))


def evaluate(engine, trees, make_loss, size, args):
    """Means of the loss's metrics over held-out examples, named eval/...; size(trees) is what a batch's means weigh."""
    engine.eval()
    means = {}
    for begin in range(0, len(trees), args.train_batch_size):
        batch = trees[begin : begin + args.train_batch_size]
        for name, value in run_batch(engine, batch, make_loss(batch), args, train=False).items():
            means[f"eval/{name}"] = means.get(f"eval/{name}", 0.0) + value * size(batch) / size(trees)
    engine.train()
    return means


def peak_memory_gib(device):
    """Peak memory of this process: of the GPU, or the resident set on a CPU."""
    if "cuda" in device:
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def console_line(step, total_steps, metrics, seconds_left):
    """One line of fixed columns for the main numbers of a step; all of them are in metrics.jsonl."""
    short = {"loss": "loss", "rewards/accuracies": "acc", "rewards/margins": "margin", "kl": "kl", "grad_norm": "grad"}
    parts = [f"{label} {metrics[name]:.4g}" for name, label in short.items() if name in metrics]
    parts += [f"eval {label} {metrics[f'eval/{name}']:.4g}" for name, label in short.items() if f"eval/{name}" in metrics]
    if "lr" in metrics:
        parts += [f"lr {metrics['lr']:.1e}", f"{metrics['tokens_per_sec']:,.0f} tok/s", f"{metrics['peak_mem_gib']:.1f} GiB"]
        parts += [f"eta {datetime.timedelta(seconds=int(seconds_left))}"]
    return f"step {step:>5}/{total_steps}  {'  '.join(parts)}"


def show_sample(tokenizer, tree):
    """The first example as text, the trained span in brackets: the cheapest detector of template and EOS mistakes."""
    pieces, inside = [tokenizer.decode(tree["prompt"])[-60:]], False
    for token, trained in zip(tree["responses"][0][:60], tree["trained"][0], strict=False):
        pieces += ["[" if trained and not inside else "]" if inside and not trained else "", tokenizer.decode([token])]
        inside = bool(trained)
    text = "".join(pieces).replace("\n", "\\n") + ("]" if inside and len(tree["responses"][0]) <= 60 else " ...")
    note(f"sample {text}   <- [..] is trained")


def sft_texts(row, tokenizer, keys, args):
    """The Text of one row, as a list of one; a str says why it cannot be used. keys: (input column, output column or None)."""
    value, response = row.get(keys[0]), row.get(keys[1]) if keys[1] else None
    if args.pretrain_mode or (keys[1] is None and isinstance(value, str) and not args.apply_chat_template):
        text = Text(value, [(0, len(value))], True, True) if isinstance(value, str) and value.strip() else "empty text"
    elif keys[1] is None:
        messages = as_messages(value)
        text = messages if isinstance(messages, str) else chat_text(tokenizer, messages, args.multiturn)
    elif isinstance(response, str) and not response.strip():
        text = "empty response"
    else:
        if "instruction" in row and keys[0] == "instruction" and row.get("input"):
            value = f"{value}\n\n{row['input']}"
        rendered = "finish_reason" in row  # a row of batch_infer.py: the prompt as the model saw it
        finished = row.get("finish_reason") in (None, "stop")
        chat, template = args.apply_chat_template and not rendered, args.input_template
        text = pair_text(tokenizer, value, response, chat, template, finished, rendered)
    return text if isinstance(text, str) else [text]


def sft_keys(rows, args):
    """The columns to read: as the flags say, else the first known layout that fits the first row."""
    if args.input_key:
        for key, flag in ((args.input_key, "--input_key"), (args.output_key, "--output_key")):
            if key:
                column(rows, key, flag)
        return args.input_key, args.output_key
    layouts = [("messages", None), ("conversations", None), ("conversation", None), ("instruction", "output"), ("text", None)]
    layouts += [(i, o) for i in ("input", "prompt", "instruction", "question", "problem") for o in ("output", "response", "completion", "answer", "solution")]
    if "finish_reason" in rows[0][1]:
        layouts = [("input", "output")]
    for keys in layouts:
        if all(key is None or key in rows[0][1] for key in keys):
            return keys
    die(f"{rows[0][0]}: no known layout in columns {', '.join(rows[0][1])}; name them with --input_key and --output_key")


def main(args):
    rank, world_size, device = setup(args)
    started = time.time()
    tokenizer, stop_ids = load_tokenizer(args.pretrain, args.trust_remote_code, args.tokenizer_chat_template)

    # --- algorithm: sft (rows)
    def to_trees(names, probs, split):
        rows = load_rows(names, probs, split, args.max_samples, args.seed)
        keys = sft_keys(rows, args)
        texts = functools.partial(sft_texts, tokenizer=tokenizer, keys=keys, args=args)
        return build_trees(rows, texts, tokenizer, args.max_len, stop_ids, args.max_drop_ratio)

    inputs = {"data": args.dataset, "weights": args.pretrain}
    # --- end algorithm
    trees, dropped = to_trees(args.dataset, args.dataset_probs, args.dataset_split)
    eval_trees = to_trees(args.eval_dataset, None, args.eval_split)[0] if args.eval_dataset else []
    steps_per_epoch = math.ceil(len(trees) / args.train_batch_size)
    total_steps = steps_per_epoch * args.max_epochs
    if len(trees) < args.train_batch_size:
        note(f"notice {len(trees)} examples are fewer than --train_batch_size {args.train_batch_size}: one smaller step per epoch")
    show_sample(tokenizer, trees[0])

    identity, resume, lock = None, [None], None
    if rank == 0:  # hashing may take long: before the process group, whose collectives time out
        identity = identify(args, inputs, world_size)
        resume[0], lock = open_run(args, identity)
    connect(device)
    dist.broadcast_object_list(resume)
    if resume[0] == "done":
        return
    start_step = resume[0]

    # --- algorithm: sft (model)
    engine = start_engine(args, LogProbs)
    # --- end algorithm
    check_attention(engine, args)
    if start_step:
        engine.load_checkpoint(args.ckpt_path or f"{args.save_path.rstrip('/')}.ckpt", tag=f"step_{start_step}")
    log = Log(args, start_step) if rank == 0 else None

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
    n_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    note(
        f"{Path(__file__).stem:6} {Path(args.pretrain).name} {n_parameters / 1e6:,.1f}M {'bf16' if args.bf16 else 'fp32'} | "
        f"ZeRO-{args.zero_stage} | {world_size} x {'GPU' if 'cuda' in device else 'CPU'}"
    )
    note(
        f"batch  {args.train_batch_size} examples/step | {total_steps} steps | "
        f"{sum(map(tree_length, trees)) * args.max_epochs / 1e6:.2f}M tokens, {size(trees) / sum(map(tree_length, trees)):.0%} trained"
    )
    for step in range(start_step, total_steps + 1):
        metrics, tick = {}, time.time()
        if step > start_step:
            epoch, index = divmod(step - 1, steps_per_epoch)
            order = np.random.default_rng([args.seed, epoch]).permutation(len(trees))
            batch = [trees[i] for i in order[index * args.train_batch_size : (index + 1) * args.train_batch_size]]
            torch.manual_seed(args.seed + step * world_size + rank)  # no generator state survives a step: resume needs none
            for group in engine.optimizer.param_groups:
                group["lr"] = learning_rate(args, step, total_steps)
            metrics = run_batch(engine, batch, make_loss(batch), args, train=True)
            engine.step()  # skips the update itself when a gradient is not finite
            metrics["grad_norm"] = float(engine.get_global_grad_norm())
            if not all(map(math.isfinite, metrics.values())):
                die(f"step {step}: not finite: {metrics}; rows {', '.join(tree['where'] for tree in batch)}"[:1000])
            seconds = time.time() - tick
            metrics["lr"] = learning_rate(args, step, total_steps)
            metrics["epoch"] = step / steps_per_epoch
            metrics["tokens_per_sec"] = sum(map(tree_length, batch)) / seconds
            metrics["samples_per_sec"] = len(batch) / seconds
            metrics["peak_mem_gib"] = peak_memory_gib(device)
        evaluates = step % args.eval_steps == 0 if args.eval_steps > 0 else step % steps_per_epoch == 0
        if eval_trees and evaluates and (step > start_step or step == 0):
            metrics |= evaluate(engine, eval_trees, make_loss, size, args)
        # --- algorithm: sft (metrics)
        if step > start_step:
            metrics["trained_tokens"] = size(batch)
        # --- end algorithm
        if rank == 0 and metrics and (step % args.logging_steps == 0 or step == total_steps or evaluates):
            log.write(step, metrics)
            remaining = (total_steps - step) * (time.time() - started) / max(1, step - start_step)
            note(console_line(step, total_steps, metrics, remaining))
        if args.save_steps > 0 and step > start_step and step % args.save_steps == 0 and step < total_steps:
            save_checkpoint(engine, args, step, identity)

    save_model(engine, tokenizer, args, identity, dropped)
    note(f"saved  {args.save_path}  ({total_steps} steps, {datetime.timedelta(seconds=int(time.time() - started))})")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
    sys.stdout.flush()
    if dist.is_initialized():
        dist.destroy_process_group()
    os._exit(0)  # skips exit handlers: in some finished DeepSpeed runs they abort

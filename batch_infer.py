"""Batch inference in one file: samples of a policy (generate_vllm, generate), rewards (rm), log-probs.

Rows are JSON lines. A stage keeps the fields it finds; sft.py and dpo.py know these rows without flags:
    generate  {"id": 7, "sample": 0, "input": "Q: 2+2?\\nA:", "output": " 4", "finish_reason": "stop"}
    rm        the same and "reward": 1.25; null where a row cannot be scored (too long, no response)
    logps     the same and "logps": -31.4, "tokens": 12; log pi(output | input) of --pretrain in summed nats
id is the row's index in --dataset. input is what the model saw, chat template and BOS included; messages is
there too where the prompt was messages, and the prompt row's other columns. output has no EOS: finish_reason
says whether it came ("stop") or the length ran out ("length").

Deviations from the usual scripts:
 1. A sample has random numbers of its own, hash(--seed, --iter, id, sample): it does not depend on the batch,
    the ranks or a restart, up to the rounding of a batched matrix product.
 2. All samples of a prompt are scored in one tree, the prompt computed once. The head runs in fp32.
 3. Results reach the disk as they finish, in <output_path>.partial/. Killed at any moment, the same command
    does the rest. The output appears by rename, beside it <output_path>.meta.json: what made it. The same
    command again does nothing, another one replaces it.
 4. Prompts and responses are used whole or not at all; what is left out is counted and listed.
 5. A reward model reads what it was trained on. Plain text: prompt, response, EOS (not where it was cut).
    --apply_chat_template: the messages as its own template writes them, with an OpenRLHF head up to EOS.
    Hugging Face heads look at the last token that is not padding, OpenRLHF heads at the last token; rewards
    are (score - mean) / std where config.json has mean and std.
 6. Conditional SFT: the reward stands in the user's turn, in rows of --post_processor csft as in prompts of
    --csft_prompt. Rewards of such samples are those of the plain prompt (plain_input).
 7. A reward may be a Python function, name(prompt, response, row) -> number, or a weighted sum of several and
    the reward model: --reward_fn a.py:f=0.5,b.py:g,model=2. Each stays in "rewards". A call that fails or
    takes too long gives null, not 0, and is counted.

Commands:
    python batch_infer.py --eval_task generate_vllm --pretrain MODEL --dataset x.jsonl --output_path g.jsonl
    deepspeed --num_gpus 8 batch_infer.py --eval_task rm --pretrain REWARD_MODEL --dataset g.jsonl \\
        --post_processor rs --output_path best.jsonl
    python batch_infer.py --eval_task rm --reward_fn examples/rewards/gsm8k.py:correct --dataset g.jsonl ...
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 batch_infer.py ...
    python batch_infer.py --eval_task generate --pretrain runs/toy/toy/policy --no-bf16 \\
        --dataset runs/toy/toy/prompts.jsonl --max_new_tokens 64 --output_path g.jsonl          # a smoke run
"""

import collections
import ctypes
import dataclasses
import datetime
import fcntl
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import multiprocessing
import os
import queue
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import jinja2
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import nn

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # read at import
import transformers

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
    eval_task: Literal["generate_vllm", "generate", "rm", "logps"]
    """generate_vllm, generate: sample with vLLM, Hugging Face; rm: rewards; logps: a policy's log-probs."""
    output_path: str
    """The .jsonl to write."""
    # model
    pretrain: str = ""
    """The model: a Hugging Face folder or hub name."""
    bf16: bool = True
    """bf16 weights, in training with fp32 master weights; --no-bf16: fp32."""
    flash_attn: bool = False
    """Accepted for old commands: on a GPU attention is torch's own FlashAttention in any case."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    tokenizer_chat_template: str | None = None
    """A Jinja chat template, or a .jinja file with one, in place of the tokenizer's own."""
    value_head_prefix: str = "value_head"
    """rm: name of an OpenRLHF head in the checkpoint, where config.json has no value_head_prefix."""
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
    iter: int | None = None
    """Iteration k: only rows k x rollout_batch_size and on, starting over at the end. Default: all rows."""
    rollout_batch_size: int = 2048
    """Prompts per iteration; a slice holds each prompt at most once."""
    # sampling
    best_of_n: int = 1
    """Samples per prompt."""
    prompt_max_len: int = 1024
    """Prompts with more tokens are left out."""
    max_new_tokens: int = 1024
    """Most tokens of a sample, EOS included."""
    max_model_len: int | None = None
    """Most tokens of prompt + sample. Default: prompt_max_len + max_new_tokens, or the model's limit."""
    temperature: float = 1.0
    """Divides the logits, up to 2; 0 = greedy."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this probability."""
    top_k: int = 0
    """Sample from this many most likely tokens; 0 = all."""
    min_p: float = 0.0
    """Sample from tokens at least this likely, relative to the likeliest."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens that the prompt or the sample has already."""
    greedy_sampling: bool = False
    """Always take the likeliest token."""
    stop: tuple[str, ...] = ()
    """Texts that end a sample; they are not part of it."""
    seed: int = 42
    """Seed of everything random: data order, LoRA's start and dropout, samples."""
    post_processor: str | None = None
    """rm: what becomes of the rows: rs = best of each prompt, iter_dpo = best against worst, csft = all."""
    rs_top_k: int = 1
    """rs: keep this many of the best samples of each prompt."""
    min_reward: float | None = None
    """rs: keep no sample with a lower reward."""
    drop_all_equal: bool = False
    """rs: leave out prompts whose samples have all the same reward, such as all right or all wrong."""
    min_margin: float = 0.0
    """iter_dpo: the rewards of a pair differ by more than this."""
    reward_template: str = "{input} <rm_score>: {reward} "
    """csft: what becomes of a user's text; {reward} has two decimals."""
    normalize_reward: bool = False
    """csft: {reward} is (reward - mean) / std over all rows; <output_path>.meta.json has both."""
    csft_prompt: float | None = None
    """generate: ask for this {reward}, with the --reward_template that csft had."""
    reward_fn: str | None = None
    """rm: comma list of FILE.py:NAME or FILE.py:NAME=WEIGHT, Python functions; see 7 at the top."""
    reward_timeout: float = 10.0
    """rm: seconds that a call of --reward_fn may take."""
    # from here on, flags do not decide the result
    scored_path: str | None = None
    """rm: keep all scored rows in this .jsonl, next to the post-processor's output."""
    micro_batch_size: int = 16
    """generate: prompts, rm: responses per forward pass and rank; never changes the result."""
    tp_size: int = 1
    """vLLM: devices that share the model (tensor parallel)."""
    dp_size: int = 1
    """vLLM: this many engines, each in a process with tp_size devices of its own."""
    max_num_seqs: int = 256
    """vLLM: samples that run at the same time."""
    gpu_memory_utilization: float = 0.9
    """vLLM: share of the GPU's memory to use."""
    enable_prefix_caching: bool = False
    """Accepted for old commands: vLLM computes a prompt once for all its samples in any case."""
    zero_stage: int = 0
    """ZeRO stage of training: 0 and 1 shard optimiser state over ranks, 2 gradients too, 3 weights too."""
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


def sort_out(items, make):
    """(what make(item) gives for each item, (where, ...), a phrase on those it cannot use: why and where)."""
    made, places = [], collections.defaultdict(list)
    for item in items:
        try:
            made.append(make(item))
        except (ValueError, TypeError, jinja2.TemplateError) as e:
            places[(str(e).splitlines() or ["the chat template refuses it"])[0]].append(item[0])
    listed = {why: ", ".join(at[:9] + ["..."] * (len(at) > 9)) for why, at in places.items()}
    phrases = ", ".join(f"{len(places[why])} {why} ({at})" for why, at in listed.items())
    return made, f"{len(items) - len(made)} left out{': ' * bool(phrases)}{phrases}"


def usable(items, make, args):
    """The same, but stops when too few are usable."""
    made, summary = sort_out(items, make)
    if not made or len(items) - len(made) > args.max_drop_ratio * len(items):
        die(f"{len(items)} rows, {summary}: more than --max_drop_ratio {args.max_drop_ratio}")
    return made, summary


# what we write into rows; columns of the prompts with other names stay in the rows of their samples
OUR_FIELDS = "id sample input output finish_reason messages prompt plain_input reward rewards".split()


class Prompt(NamedTuple):
    """A prompt as the model sees it; fields: what its rows have besides; room: most tokens of a sample."""

    id: int
    text: str
    ids: list
    fields: dict
    room: int


def make_prompts(rows, tokenizer, args):
    """The usable prompts of this iteration."""
    keys = "prompt instruction input question problem messages conversations text".split()
    (key,) = find_keys(rows, (args.input_key,), ("--input_key",), [(key,) for key in keys])
    limit, indices = context_limit(args), range(len(rows))
    if args.iter is not None:
        start = args.iter * args.rollout_batch_size
        indices = [i % len(rows) for i in range(start, start + min(args.rollout_batch_size, len(rows)))]
        wraps = " (from the start again)" * (start >= len(rows))
    items = [(*rows[i], i) for i in indices]
    prompts, summary = usable(items, lambda item: make_prompt(*item, key, tokenizer, limit, args), args)
    lost = [name for name in rows[0][1] if name in OUR_FIELDS and name != key]
    if lost:
        note(f"notice columns of the prompts that are not kept, as we write such: {', '.join(lost)}")
    part = "" if args.iter is None else f", iteration {args.iter} of {len(rows):,} rows{wraps}"
    note(f"data   {len(prompts):,} prompts from column {key}{part} | {summary}")
    return prompts


def make_prompt(where, row, index, key, tokenizer, limit, args):
    """The Prompt of a row, tokenised as sft.py does: the prompt that is trained on is the one seen here."""
    value = row.get(key)
    if not isinstance(value, str | list):
        raise ValueError(f"prompt is neither text nor messages but {type(value).__name__}")
    if key == "instruction" and row.get("input") and isinstance(value, str):  # Alpaca's rows
        value = f"{value}\n\n{row['input']}"
    messages = as_messages(value, "user") if isinstance(value, list) or args.apply_chat_template else []
    while messages and messages[-1]["role"] == "assistant":  # a conversation: the model writes its own answer
        messages.pop()
    text = value if isinstance(value, str) else "".join(message["content"] for message in messages)
    if not text.strip():
        raise ValueError("empty prompt")
    prompt = messages or value
    text, ids = render_prompt(conditioned(prompt, args.csft_prompt, args), tokenizer, args)
    if len(ids) > args.prompt_max_len:
        raise ValueError(f"longer than --prompt_max_len {args.prompt_max_len}")
    if len(ids) >= limit:
        raise ValueError(f"no room for a response in {limit} tokens")
    fields = {"messages": messages} if messages else {"prompt": prompt} if args.input_template else {}
    if args.csft_prompt is not None:
        fields["plain_input"] = render_prompt(prompt, tokenizer, args)[0]
    fields |= {name: row[name] for name in row if name not in (key, *OUR_FIELDS)}
    return Prompt(index, text, ids, fields, min(args.max_new_tokens, limit - len(ids)))


def conditioned(prompt, reward, args):
    """The prompt, text or messages, with the reward in its last user turn; None: as it is."""
    if reward is None:
        return prompt
    template = args.reward_template.replace("{reward}", f"{round(reward, 2) + 0.0:.2f}")  # 0.00, never -0.00
    if isinstance(prompt, str):
        return template.replace("{input}", prompt)
    users = [i for i, message in enumerate(prompt) if message["role"] == "user"]
    if not users:
        raise ValueError("no user turn for --reward_template")
    text = template.replace("{input}", prompt[users[-1]]["content"])
    return [*prompt[: users[-1]], prompt[users[-1]] | {"content": text}, *prompt[users[-1] + 1 :]]


def render_prompt(prompt, tokenizer, args):
    """(text, ids) of a prompt, text or messages, as the model sees it: template and BOS in.

    Without its last blank where the tokenizer joins that to the next word, as it did in training: " the".
    """
    if isinstance(prompt, list):
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        return text, prompt_ids(tokenizer, text, bos=False)
    text = args.input_template.replace("{}", prompt) if args.input_template else prompt
    ids, words = prompt_ids(tokenizer, text, bos=True), [text + word for word in ("a", "the")]
    if text.endswith(" ") and any(prompt_ids(tokenizer, w, bos=True)[: len(ids)] != ids for w in words):
        text = text[:-1]
        ids = prompt_ids(tokenizer, text, bos=True)
    if ids[0] == tokenizer.bos_token_id and not text.startswith(tokenizer.bos_token):
        forms = [tokenizer.bos_token + text, tokenizer.decode(ids)]  # some tokenizers want a blank behind BOS
        text = next((form for form in forms if prompt_ids(tokenizer, form, bos=False) == ids), forms[0])
    return text, ids


def prompt_ids(tokenizer, text, bos):
    """Token ids of a rendered prompt, as in a training example that starts with it."""
    return label_tokens((text, [], True, bos), tokenizer, (), 2**31)[0].tolist()[:-1]  # less EOS


def context_limit(args):
    """Tokens of prompt + sample that fit into the model."""
    limit = getattr(model_config(args).get_text_config(), "max_position_embeddings", None) or 2**31
    if args.max_model_len and args.max_model_len > limit:
        die(f"--max_model_len {args.max_model_len} is more than the model's {limit}")
    return args.max_model_len or min(args.prompt_max_len + args.max_new_tokens, limit)


def find_pairs(rows, args):
    """The columns of prompt and response; of whole conversations (column, None)."""
    layouts = [("messages", None), ("conversations", None), ("instruction", "output"), ("input", "output")]
    layouts += [(i, o) for i in ("prompt", "question") for o in ("response", "completion", "answer")]
    layouts = [("input", "output")] if "finish_reason" in rows[0][1] else layouts
    return find_keys(rows, (args.input_key, args.output_key), ("--input_key", "--output_key"), layouts)


def read_pair(row, keys):
    """(prompt, response) as they stand in the row; the response is [] where the prompt holds both."""
    prompt, response = row.get(keys[0]), row.get(keys[1]) if keys[1] else []
    if keys[0] == "instruction" and row.get("input") and isinstance(prompt, str):  # Alpaca's rows
        prompt = f"{prompt}\n\n{row['input']}"
    return prompt, response


def row_texts(row, keys, chat):
    """(prompt, response) of a row: two texts, or (chat) messages and the assistant's turn that follows them.

    Of our own rows the prompt without what --csft_prompt put in: no reward model has ever seen that.
    """
    prompt, response = read_pair(row, keys)
    if row.get("finish_reason") is not None:  # our own: input is rendered for the policy, messages are not
        chat = chat and bool(row.get("messages"))
        prompt = row["messages"] if chat else row.get("plain_input", prompt)
        if "plain_input" in row and not {"messages", "prompt"} & {*row} and not row["input"].endswith(" "):
            response = str(response).removeprefix(" ")  # the blank behind a condition that ended the prompt
    if not chat and isinstance(prompt, str) and isinstance(response, str):
        return prompt, response
    messages = as_messages(prompt, "user") + as_messages(response, "assistant")
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)
    if last == 0:
        raise ValueError("no assistant turn after a prompt")
    return messages[:last], messages[last]


def score_text(row, keys, tokenizer, openrlhf, args):
    """The rendered text of a row as the reward model reads it."""
    prompt, response = row_texts(row, keys, args.apply_chat_template)
    reason = row.get("finish_reason")
    if isinstance(prompt, str):
        *rendered, bos = render(tokenizer, prompt, response.removesuffix(tokenizer.eos_token), args, reason)
        return *rendered, bos or not row.get("messages")  # a BOS that is doubled is dropped
    text, spans, *_ = chat_text(tokenizer, [*prompt, response], multiturn=False)
    start, answer = spans[-1][0] if spans else 0, response["content"].strip()
    if start == 0 or (reason == "length" and answer not in text[start:]):
        raise ValueError("the chat template rewrites the response")
    if reason == "length":  # without what the template writes behind the answer
        text = text[: text.index(answer, start) + len(answer)]
    elif openrlhf:
        text = text.rstrip("\n")
    finished = openrlhf and reason != "length" and not text.endswith(tokenizer.eos_token)
    return text, [(start, len(text))], finished, False


def make_score_trees(rows, keys, tokenizer, stop_ids, args):
    """Trees of the rows that can be scored, each with its rows' indices: the text as the model reads it.

    Responses to the same prompt text hang together, at most micro_batch_size of them.
    """
    openrlhf = args.eval_task == "rm" and is_openrlhf(model_config(args))

    def encode(item):
        if args.eval_task == "rm":
            rendered, stops = score_text(item[1], keys, tokenizer, openrlhf, args), ()
        else:  # logps: as sft.py trains it
            pair, stops = read_pair(item[1], keys), stop_ids
            rendered = render(tokenizer, *pair, args, item[1].get("finish_reason"))
        encoding = label_tokens(rendered, tokenizer, stops, 2**31)
        if len(encoding[0]) > args.max_len:
            raise ValueError(f"longer than --max_len {args.max_len}")
        return rendered[0][: rendered[1][0][0]], (item[2], encoding)

    encoded, summary = usable([(*row, i) for i, row in enumerate(rows)], encode, args)
    groups, trees = collections.defaultdict(list), []
    for prompt, scored in encoded:
        groups[prompt].append(scored)
    for group in groups.values():
        for begin in range(0, len(group), args.micro_batch_size):
            indices, encodings = zip(*group[begin : begin + args.micro_batch_size], strict=True)
            trees.append({**make_tree(encodings), "rows": indices})
    saved = sum(len(ids) for _, (_, (ids, _)) in encoded) / sum(map(tree_length, trees))
    note(f"data   {len(encoded):,} rows of {len(groups):,} prompts, {saved:.1f}x fewer tokens | {summary}")
    return trees


def make_calls(rows, keys, args):
    """What --reward_fn is called with: (index of the row, prompt, response, row)."""

    def call(item):
        prompt, response = row_texts(item[1], keys, args.apply_chat_template)
        return item[2], prompt, response if isinstance(response, str) else response["content"], item[1]

    calls, summary = usable([(*row, i) for i, row in enumerate(rows)], call, args)
    note(f"data   {len(calls):,} rows for {args.reward_fn} | {summary}")
    return calls


# --- packing, attention


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


# --- files


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


def difference(old, new):
    """In which keys two identities differ, with both values."""
    changed = [k for k in {**old, **new} if old.get(k) != new.get(k)]
    return ", ".join(f"{k} was {old.get(k)}, now {new.get(k)}" for k in changed)[:300]


def write_rows(path, rows):
    """JSON lines, whole or not at all."""
    try:
        lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows]
        write_atomic(path, "".join(lines))
    except OSError as e:
        die(f"{path}: {e.strerror}; what is in {path}.partial stays, the same command continues")


def read_object(path):
    """A JSON object, or {} where there is none."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return {}


def outputs(args):
    """The files that the stage makes."""
    return [path for path in (args.output_path, args.scored_path) if path]


def identify_stage(args, tokenizer):
    """What decides the output: flags and the contents of model and data, not speed, places or ranks."""
    flags, places = dataclasses.asdict(args), ("pretrain", "output_path", "dataset", "max_drop_ratio")
    identity = {k: v for k, v in list(flags.items())[: list(flags).index("scored_path")] if k not in places}
    identity |= {"weights": args.pretrain and fingerprint(args.pretrain), "data": fingerprint(args.dataset)}
    identity["chat_template"] = tokenizer and tokenizer.chat_template
    identity["reward_files"] = [fingerprint(path) for _, path in combined_rewards(args).values() if path]
    return json.loads(json.dumps(identity))  # as it will be read back


def open_stage(args, identity):
    """What this command has to do (rank 0): ("done", None), or (number of earlier starts, a lock)."""
    output, partial = args.output_path, Path(f"{args.output_path}.partial")
    meta = read_object(f"{output}.meta.json")
    found = [path for path in outputs(args) if Path(path).exists()]
    complete = found == outputs(args) and sha256_all(found) == meta.get("sha256")
    if complete and meta.get("identity") == identity:
        note(f"done   {output} is complete and made by this command: nothing to do")
        if read_object(partial / "identity.json") in ({}, identity):  # a kill came while they were removed
            shutil.rmtree(partial, ignore_errors=True)
        return "done", None
    if output in found:
        why = difference(meta["identity"], identity) if meta else "not made by this script"
        note(f"notice {output} will be replaced: {why or 'changed since'}")
    try:
        for folder in (partial, *(Path(path).parent for path in outputs(args))):
            folder.mkdir(parents=True, exist_ok=True)
        lock = open(partial / "lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        die(f"--output_path {output}: another process is writing there")
    except OSError as e:
        die(f"--output_path {output} cannot be written: {e.strerror}")
    old, parts = read_object(partial / "identity.json"), list(partial.glob("*.jsonl"))
    if old != identity and parts:
        note(f"notice {partial} is of another command, starting over: {difference(old, identity)}")
        for path in parts:
            path.unlink()
    write_atomic(partial / "identity.json", json.dumps(identity))
    return max((int(path.name.split(".")[0]) for path in partial.glob("*.jsonl")), default=0), lock


class Parts:
    """Finished results on disk while the stage runs: in <output_path>.partial/, a JSONL per start and rank.

    A start never writes into an old file, so a line that a kill cut off is simply not there. A result is
    known by (id, sample), a reward by (index of the row, 0).
    """

    def __init__(self, args, start, rank):
        self.folder = Path(f"{args.output_path}.partial")
        self.done = set(self.read(start))
        self.file = open(self.folder / f"{start + 1}.{rank}.jsonl", "w", encoding="utf-8")

    def read(self, last_start=math.inf):
        """{(id, sample): row} of all results up to a start."""
        paths = [path for path in self.folder.glob("*.jsonl") if int(path.name.split(".")[0]) <= last_start]
        rows = [json.loads(line) for path in paths for line in path.read_bytes().split(b"\n")[:-1]]
        return {(row["id"], row["sample"]): row for row in rows}

    def write(self, rows):
        """Appends finished results."""
        try:
            lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows]
            self.file.writelines(lines)
            self.file.flush()
        except OSError as e:
            die(f"{self.file.name}: {e.strerror}; what is written stays, the same command continues")


class Progress:
    """A line on the console every few seconds: how much is done, at what rate, for how long still."""

    def __init__(self, unit, done, total):
        self.unit, self.earlier, self.done, self.total = unit, done, done, total
        self.tokens, self.started, self.last = 0, time.time(), time.time()
        if done:
            note(f"resume {done:,} of {total:,} {unit} were done before")

    def add(self, n, tokens):
        self.done, self.tokens, now = self.done + n, self.tokens + tokens, time.time()
        if now < self.last + 5 and self.done < self.total:
            return
        self.last, seconds = now, max(now - self.started, 1e-9)
        rate = (self.done - self.earlier) / seconds
        left = datetime.timedelta(seconds=int((self.total - self.done) / rate))
        speed = f"{rate:,.1f} {self.unit}/s" + f"  {self.tokens / seconds:,.0f} tok/s" * bool(self.tokens)
        note(f"infer  {self.done:>7,}/{self.total:,}  {speed}  eta {left}")


# --- sampling


def request_seed(args, prompt):
    """62 bits of its own for each prompt and iteration; sample k uses this + k, as vLLM does by itself."""
    text = f"{args.seed} {args.iter} {prompt.id}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


def write_samples(parts, prompt, samples, tokenizer, stop_ids, args):
    """Writes the rows of a prompt's samples, {k: token ids}; ids may go on behind their first stop token."""
    rows, context = [], prompt.ids[-16:]  # decoded too: some tokenizers drop a blank at the start of a text
    before = len(tokenizer.decode(context, clean_up_tokenization_spaces=False))
    for k, ids in sorted(samples.items()):
        end = next((i for i, token in enumerate(ids) if token in stop_ids), None)
        text = tokenizer.decode(context + ids[:end], clean_up_tokenization_spaces=False)[before:]
        cuts = [text.find(stop) for stop in args.stop if stop in text]
        row = {"id": prompt.id, "sample": k, "input": prompt.text, "output": text[: min(cuts, default=None)]}
        row["finish_reason"] = "length" if end is None and not cuts else "stop"
        rows.append(row | prompt.fields)
    parts.write(rows)


def unfinished(prompts, parts, args):
    """The prompts that do not have all their samples yet."""
    return [p for p in prompts if any((p.id, k) not in parts.done for k in range(args.best_of_n))]


def generate_vllm(prompts, parts, tokenizer, stop_ids, args, report=None):
    """Each prompt is one request for all its samples; the engine stays full, what finishes goes to disk.

    report: called with the number of prompts and tokens that are done.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    limit = context_limit(args)
    settings = {"dtype": "bfloat16" if args.bf16 else "float32", "max_model_len": limit}
    settings |= {"tensor_parallel_size": args.tp_size, "max_num_seqs": args.max_num_seqs}
    settings |= {"gpu_memory_utilization": args.gpu_memory_utilization, "enable_prefix_caching": True}
    settings |= {"trust_remote_code": args.trust_remote_code, "use_tqdm_on_load": False}
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # starts in 9 s instead of 21
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        settings |= {"enforce_eager": True, "block_size": 32}  # samples share whole blocks of a prompt
        # half a prompt in a step ends a seeded request: "CPU Generator does not use offset"
        settings |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(8192, limit)}
    else:
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # they run our last lines
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = LLM(args.pretrain, **settings).llm_engine
    todo = {str(prompt.id): prompt for prompt in unfinished(prompts, parts, args)}
    report = report or Progress("prompts", len(prompts) - len(todo), len(prompts)).add
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    flags = {name: getattr(args, name) for name in names} | {"n": args.best_of_n, "stop": list(args.stop)}
    # text is made by sample_row; here it only finds --stop, which may be a special token
    flags |= {"stop_token_ids": sorted(stop_ids), "detokenize": bool(args.stop), "skip_special_tokens": False}
    for name, prompt in todo.items():
        own = {"seed": request_seed(args, prompt), "max_tokens": prompt.room}
        params = SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, **flags, **own)
        engine.add_request(name, {"prompt_token_ids": prompt.ids}, params)
    while engine.has_unfinished_requests():
        for result in engine.step():
            if result.finished:
                samples = {s.index: list(s.token_ids) for s in result.outputs}
                write_samples(parts, todo[result.request_id], samples, tokenizer, stop_ids, args)
                report(1, sum(map(len, samples.values())))
    engine.engine_core.shutdown()


def generate_dp(prompts, parts, earlier, args):
    """generate_vllm in dp_size processes, each on tp_size devices with every dp_size-th of the prompts."""
    context, todo = multiprocessing.get_context("spawn"), unfinished(prompts, parts, args)
    engines, done, progress = [], context.Queue(), None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    devices = visible.split(",") if visible else []
    if devices and len(devices) < args.dp_size * args.tp_size:
        die(f"--dp_size {args.dp_size} x --tp_size {args.tp_size} needs more than {len(devices)} GPUs")
    for k in range(min(args.dp_size, len(todo))):
        if devices:  # set before the process starts: libraries look at import
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices[k * args.tp_size : (k + 1) * args.tp_size])
        given = (todo[k :: args.dp_size], earlier, k + 1, args, done)
        engines.append(context.Process(target=run_engine, args=given))
        engines[-1].start()
    while any(engine.is_alive() for engine in engines) or not done.empty():
        if any(engine.exitcode for engine in engines):
            break
        try:
            numbers = done.get(timeout=1)
        except queue.Empty:
            continue
        progress = progress or Progress("prompts", len(prompts) - len(todo), len(prompts))
        progress.add(*numbers)
    if any(engine.exitcode for engine in engines):
        for engine in engines:
            engine.kill()
        die("an engine failed (its message is above); the same command continues")


def run_engine(prompts, earlier, rank, args, done):
    """A process of generate_dp. It ends with its parent, who holds the lock on the output."""
    tokenizer, stop_ids = load_tokenizer(args.pretrain, args)
    parts = Parts(args, earlier, rank)
    generate_vllm(prompts, parts, tokenizer, stop_ids, args, lambda *numbers: done.put(numbers))


class Sampler:
    """Chooses tokens as vLLM does: penalty, temperature, min_p, top_k, top_p, in this order.

    A logits processor for Hugging Face's generate(): of the logits [B, V] it leaves one per row, where the
    distribution function passes a uniform number that only the sample's seed and the position decide.
    """

    def __init__(self, args, seeds, mask):
        self.args, self.width, self.mask = args, mask.shape[1], mask  # [B, width]: 0 on the padding
        uniforms = np.stack([np.random.default_rng(seed).random(args.max_new_tokens) for seed in seeds])
        self.uniforms = torch.from_numpy(uniforms).to(mask.device)  # [B, max_new_tokens]

    def __call__(self, input_ids, scores):
        penalty, logits, step = self.args.repetition_penalty, scores.float(), input_ids.shape[1] - self.width
        if penalty != 1:
            real = F.pad(self.mask, (0, step), value=1).float()
            seen = torch.zeros_like(logits).scatter_add_(1, input_ids, real) > 0
            logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        if self.args.temperature == 0:
            chosen = logits.argmax(-1, keepdim=True)
        else:
            cumulative = self.probabilities(logits / self.args.temperature).double().cumsum(-1)
            point = self.uniforms[:, step, None] * cumulative[:, -1:]
            chosen = torch.searchsorted(cumulative, point, right=True).clamp(max=logits.shape[1] - 1)
        return torch.full_like(scores, -math.inf).scatter_(1, chosen, 0.0)

    def probabilities(self, logits):
        """[B, V], not normalised, 0 where min_p, top_k or top_p exclude a token."""
        min_p, top_k, top_p = self.args.min_p, self.args.top_k, self.args.top_p
        if min_p > 0:
            logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -math.inf)
        if 0 < top_k < logits.shape[1]:
            logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
        probs = logits.softmax(-1)
        if top_p < 1:
            ranked, order = probs.sort(-1, descending=True)
            kept = ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0.0)
            probs = torch.zeros_like(probs).scatter_(1, order, kept)
        return probs


def make_batches(prompts, args):
    """Prompts of similar length, the longest first, at most micro_batch_size and all with the same room."""
    batches = []
    for prompt in sorted(prompts, key=lambda prompt: -len(prompt.ids)):
        if not batches or len(batches[-1]) == args.micro_batch_size or batches[-1][0].room != prompt.room:
            batches.append([])
        batches[-1].append(prompt)
    return batches


@torch.inference_mode()
def generate(prompts, parts, tokenizer, stop_ids, args, rank, world_size, device):
    """Hugging Face generation, batch after batch; each rank takes every world_size-th."""
    todo = unfinished(prompts, parts, args)
    batches = make_batches(todo, args)[rank::world_size]
    model = load_model(args.pretrain, args).to(device).eval()
    softcap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)  # ignored by sdpa
    model.set_attn_implementation("sdpa" if model._supports_sdpa and softcap is None else "eager")
    # in place of the checkpoint's, whose top_k, repetition_penalty, ... would come on top of ours
    stopping = {"eos_token_id": sorted(stop_ids), "pad_token_id": min(stop_ids)}
    model.generation_config = transformers.GenerationConfig(do_sample=False, **stopping)
    stop = transformers.StopStringCriteria(tokenizer, list(args.stop)) if args.stop else None
    before, n = len(prompts) - len(todo), args.best_of_n
    progress = Progress("prompts", before, before + sum(map(len, batches)))
    for batch in batches:
        width, room = len(batch[0].ids), batch[0].room
        padding = [[0] * (width - len(prompt.ids)) for prompt in batch]
        ids = [[min(stop_ids)] * len(pad) + prompt.ids for pad, prompt in zip(padding, batch, strict=True)]
        mask = [pad + [1] * (width - len(pad)) for pad in padding]
        ids, mask = (torch.tensor(rows, device=device).repeat_interleave(n, 0) for rows in (ids, mask))
        sampler = Sampler(args, [request_seed(args, prompt) + k for prompt in batch for k in range(n)], mask)
        options = {"attention_mask": mask, "logits_processor": [sampler], "max_new_tokens": room}
        if stop:  # of the sample alone: the prompt's last words are no part of it
            options["stopping_criteria"] = [lambda ids, scores, w=width, **_: stop(ids[:, w:], scores)]
        found = model.generate(ids, **options)[:, width:].tolist()
        for i, prompt in enumerate(batch):
            samples = dict(enumerate(found[i * n : (i + 1) * n]))
            write_samples(parts, prompt, samples, tokenizer, stop_ids, args)
        progress.add(len(batch), sum(token not in stop_ids for ids in found for token in ids))


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


# --- scoring


def is_openrlhf(config):
    """Whether a reward model was saved by OpenRLHF, not as a Hugging Face sequence classifier."""
    kinds = [name for name in config.architectures or [] if name.endswith("ForSequenceClassification")]
    return hasattr(config, "value_head_prefix") or not kinds


class RewardModel:
    """A body with a linear head of one output, in fp32: model(trees) -> rewards [responses]."""

    def __init__(self, args, device):
        config = model_config(args, num_labels=1)
        openrlhf, prefix = is_openrlhf(config), getattr(config, "value_head_prefix", args.value_head_prefix)
        self.mean, self.std = getattr(config, "mean", None) or 0.0, getattr(config, "std", None)
        self.std = 1.0 if self.std is None else self.std
        if not self.std > 0:
            die(f"model {args.pretrain}: std in its config.json is {self.std}")
        self.model, info = load_classifier(config, {rf"^{prefix}\.": "score."} if openrlhf else None, args)
        head = getattr(self.model, "score", None)
        for name, found, _ in info["mismatched_keys"]:
            die(f"model {args.pretrain}: {name} is {list(found)}: the head of a reward model has one label")
        if info["missing_keys"] or not isinstance(head, nn.Linear):
            missing = ", ".join(sorted(info["missing_keys"])[:3]) or "score"
            die(f"model {args.pretrain} lacks {missing}: no reward model, or --value_head_prefix is another")
        self.model, self.device = self.model.to(device).eval(), device
        self.head = [head.weight.float(), None if head.bias is None else head.bias.float()]
        self.pad = None if openrlhf else self.model.config.get_text_config().pad_token_id

    def hidden(self, trees):
        """Hidden states [responses, H] that the head looks at."""
        pack = pack_trees(trees, self.device)
        inputs = {name: pack[name] for name in ("input_ids", "position_ids", "segments")}
        hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state[0]  # [T, H]
        return hidden[torch.tensor(last_tokens(trees, self.pad), device=self.device)]

    def __call__(self, trees):
        return (F.linear(self.hidden(trees).float(), *self.head)[:, 0] - self.mean) / self.std


class Policy(RewardModel):
    """A causal LM: model(trees) -> log-probabilities of the responses, summed nats, [responses]."""

    def __init__(self, args, device):
        self.model, self.device, self.pad = load_model(args.pretrain, args).to(device).eval(), device, None

    def __call__(self, trees):
        pack = pack_trees(trees, self.device)
        inputs = {name: pack[name] for name in ("input_ids", "position_ids", "segments")}
        # [N, V], the largest tensor here: the model's own head, at the places that predict a token only
        logits = self.model(**inputs, use_cache=False, logits_to_keep=pack["positions"]).logits[0].float()
        logps = logits.gather(1, pack["targets"][:, None])[:, 0] - logits.logsumexp(1)  # [N]
        n_responses = sum(len(tree["responses"]) for tree in trees)
        return logps.new_zeros(n_responses).index_add_(0, pack["owners"], logps)


def load_classifier(config, key_mapping, args):
    """(sequence classifier with tree attention and a head in fp32, what its checkpoint lacks)."""
    transformers.AttentionInterface.register("tree", tree_attention)
    auto, options = transformers.AutoModelForSequenceClassification, {"attn_implementation": "tree"}
    options |= {"config": config, "trust_remote_code": args.trust_remote_code}
    try:
        with torch.device("meta"):
            kind = type(auto.from_config(**options))
        kind._keep_in_fp32_modules_strict = {*(kind._keep_in_fp32_modules_strict or ()), "score"}
        options |= {"dtype": torch.bfloat16 if args.bf16 else torch.float32, "key_mapping": key_mapping}
        options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}  # we stop, in our words
        return auto.from_pretrained(args.pretrain, **options)
    except (OSError, ValueError) as e:
        die(f"model {args.pretrain!r}: {str(e).splitlines()[0]}")


def last_tokens(trees, pad):
    """Places in the row of pack_trees: the last token of each response, or of its prompt, that is not pad."""
    places, cursor = [], 0
    for tree in trees:
        n_prompt, start = len(tree["prompt"]), cursor
        cursor += n_prompt
        for ids in tree["responses"]:
            real = np.flatnonzero(np.concatenate([tree["prompt"], ids]) != (-1 if pad is None else pad))
            last = int(real[-1]) if len(real) else 0
            places.append(start + last if last < n_prompt else cursor + last - n_prompt)
            cursor += len(ids)
    return places


def check_trees(model, args):
    """Stops unless hidden states in a tree equal those of the model's eager attention, each branch alone."""
    ids = np.arange(40) * 7919 % (model.model.config.get_text_config().vocab_size - 9) + 9  # 0 is often pad
    prompt, branches = ids[:16].astype(np.int32), [ids[16:27].astype(np.int32), ids[27:].astype(np.int32)]
    tree = {"prompt": prompt, "responses": branches, "trained": [np.ones(len(b), bool) for b in branches]}
    in_tree = model.hidden([tree]).float()
    model.model.set_attn_implementation("eager")
    rows = [torch.from_numpy(np.concatenate([prompt, b])).long()[None].to(model.device) for b in branches]
    alone = [model.model.base_model(row, use_cache=False).last_hidden_state[0, -1].float() for row in rows]
    model.model.set_attn_implementation("tree")
    error = ((in_tree - torch.stack(alone)).norm() / in_tree.norm()).item()
    if not error < (0.3 if args.bf16 else 1e-4):  # in bf16 rounding alone makes 0.14 in a deep model
        die(f"{type(model.model).__name__}: tree attention is off by {error:.2g}: not supported")


@torch.inference_mode()
def score(trees, parts, args, rank, world_size, device):
    """Rewards, or log-probs, of all rows of the trees, balanced over the ranks by tokens.

    The plan is the same at every start with as many ranks: after a kill, a row has the neighbours it had.
    """
    per_pass = max(1, args.micro_batch_size // max(len(tree["rows"]) for tree in trees))
    plan, block = [], 32 * world_size * per_pass  # in blocks, as split_step takes quadratic time
    for begin in range(0, len(trees), block):
        lengths = [tree_length(tree) for tree in trees[begin : begin + block]]
        plan += [[trees[begin + i] for i in bin] for bin in split_step(lengths, world_size, per_pass)[rank]]
    todo = [bin for bin in plan if any((i, 0) not in parts.done for tree in bin for i in tree["rows"])]
    n_rows, n_todo = (sum(len(tree["rows"]) for bin in bins for tree in bin) for bins in (plan, todo))
    model = (RewardModel if args.eval_task == "rm" else Policy)(args, device)
    check_trees(model, args)
    progress = Progress("rows", n_rows - n_todo, n_rows)
    for bin in todo:
        indices = [i for tree in bin for i in tree["rows"]]
        values = [value if math.isfinite(value) else None for value in model(bin).tolist()]
        parts.write({"id": i, "sample": 0, "value": v} for i, v in zip(indices, values, strict=True))
        progress.add(len(indices), sum(map(tree_length, bin)))


def combined_rewards(args):
    """{name: (weight, file)} of what is added up; the reward model is "model", without a file."""
    rewards = {"model": (1.0, None)} if args.eval_task == "rm" and args.pretrain else {}
    for spec in (args.reward_fn or "").split(",") if args.reward_fn else []:
        place, _, weight = spec.strip().partition("=")
        path, _, name = place.rpartition(":")
        try:
            known, weight = (name in rewards) != (place == "model"), float(weight or 1)
        except ValueError:
            known = True
        if known or not (place == "model" or (Path(path).is_file() and name)) or not math.isfinite(weight):
            die(f"--reward_fn {spec}: FILE.py:NAME or FILE.py:NAME=WEIGHT, or model=WEIGHT; a NAME once")
        rewards[name] = (weight, path or None)
    return rewards


def reward_worker():
    """All of a bare Python process: reads lines [prompt, response, row], answers [reward, None or error]."""
    import faulthandler
    import importlib.util
    import json
    import math
    import os
    import sys
    import traceback

    path, name, seconds = sys.argv[1:]
    requests, answers, function = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w"), None
    nowhere = open(os.devnull, "r+")
    os.dup2(nowhere.fileno(), 0)  # the function reads no requests,
    os.dup2(2, 1)  # and what it prints is no answer
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    for line in requests:
        try:
            if function is None:
                spec = importlib.util.spec_from_file_location("reward_file", path)
                sys.modules["reward_file"] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(sys.modules["reward_file"])
                function = getattr(sys.modules["reward_file"], name)
            faulthandler.dump_traceback_later(float(seconds), exit=True, file=nowhere)  # ends even C code
            answer = [float(function(*json.loads(line))), None]
            if not math.isfinite(answer[0]):
                raise ValueError(f"{name} gave {answer[0]}")
        except (Exception, SystemExit):
            answer = [None, traceback.format_exc()]
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(answer), file=answers, flush=True)


def call_rewards(name, path, k, calls, parts, args, rank, world_size):
    """Sample k of the parts: the rewards of a function, from as many processes as this rank has CPU cores.

    A call that fails, hangs or ends its process gives null and says why. Stops if the first 100 all fail.
    """
    code = f"{inspect.getsource(reward_worker)}\nreward_worker()"
    command = [sys.executable, "-c", code, path, name, str(args.reward_timeout)]
    local, processes = threading.local(), []

    def ask(call):
        if getattr(local, "process", None) is None:
            local.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            processes.append(local.process)
        try:
            local.process.stdin.write(json.dumps(call[1:], default=str).encode() + b"\n")
            local.process.stdin.flush()
            # it keeps the time itself; 600: its imports take longer, or its children hold the pipe open
            ready = select.select([local.process.stdout], [], [], args.reward_timeout + 600)[0]
            answer = local.process.stdout.readline() if ready else b""
        except BrokenPipeError:
            answer = b""
        if not answer:
            local.process = None
            return call[0], None, f"no answer in {args.reward_timeout:g} s, or the process died"
        return call[0], *json.loads(answer)

    mine = calls[rank::world_size]
    todo = [call for call in mine if (call[0], k) not in parts.done]
    progress, failed, held = Progress(f"calls of {name}", len(mine) - len(todo), len(mine)), 0, []
    pool = ThreadPoolExecutor(torch.get_num_threads())
    blocks = (todo[begin : begin + 10_000] for begin in range(0, len(todo), 10_000))
    results = itertools.chain.from_iterable(pool.map(ask, block) for block in blocks)
    try:
        for n, (i, reward, error) in enumerate(results, 1):
            failed += reward is None
            if failed == n == min(100, len(mine)) and len(todo) == len(mine):
                text = f"failed on each of the first {n} rows, on the last:\n{error}"
                print(f"error: --reward_fn {path}:{name} {text}", file=sys.stderr, flush=True)  # on any rank
                raise SystemExit(2)
            why = {"error": error.strip().splitlines()[-1]} if error else {}
            held.append({"id": i, "sample": k, "value": reward, **why})
            if failed < n:  # until one call works, nothing is kept: the next start tries again
                parts.write(held)
                held = []
            progress.add(1, 0)
        parts.write(held)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
            process.wait()


def with_rewards(rows, found, rewards):
    """The rows with their reward: the weighted sum, null where one is missing; of several, each stays too."""
    results = []
    for i, (_, row) in enumerate(rows):
        values = {name: found.get((i, k), {}).get("value") for k, name in enumerate(rewards)}
        whole = None not in values.values()
        total = sum(rewards[name][0] * value for name, value in values.items()) if whole else None
        results.append(row | {"reward": total} | ({"rewards": values} if len(values) > 1 else {}))
    errors = collections.Counter(value["error"] for value in found.values() if "error" in value)
    if errors:
        phrases = ", ".join(f"{n:,} x {error}" for error, n in errors.most_common(5))
        note(f"notice --reward_fn: {sum(errors.values()):,} calls gave no reward: {phrases}")
    return results


def by_prompt(rows, keys):
    """The rows with a reward, grouped by prompt (and id, where they have one); a group may be empty."""
    groups = collections.defaultdict(list)
    for row in rows:
        prompt = read_pair(row, keys)[0]
        if keys[1] is None and isinstance(prompt, list) and row["reward"] is not None:
            prompt = row_texts(row, keys, False)[0]  # of a conversation: without its answer
        groups[json.dumps([row.get("id"), prompt], default=str)] += [row] * (row["reward"] is not None)
    return list(groups.values())


def best_samples(rows, keys, args):
    """Rejection sampling: of each prompt the rs_top_k rows of highest reward; the first wins ties."""
    groups, kept = by_prompt(rows, keys), []
    for group in groups:
        best = sorted(group, key=lambda row: -row["reward"])[: args.rs_top_k]
        equal = len(group) > 1 and len({row["reward"] for row in group}) == 1
        lowest = -math.inf if args.min_reward is None else args.min_reward
        kept += [row for row in best if row["reward"] >= lowest and not (equal and args.drop_all_equal)]
    n_prompts = len(by_prompt(kept, keys))
    note(f"best   {len(kept):,} of {len(rows):,} rows, {n_prompts:,} of {len(groups):,} prompts")
    return kept


def best_and_worst(rows, keys, args):
    """Iterative DPO: of each prompt id the rows of highest and of lowest reward, as a pair for dpo.py.

    No pair without two different responses, or where their rewards are as close as --min_margin.
    """
    response_key = keys[1]
    if response_key is None:
        die("--post_processor iter_dpo needs a column of responses, not whole conversations")
    groups, pairs, alike, alone = by_prompt(rows, keys), [], 0, 0
    for group in groups:
        if len({json.dumps(row[response_key]) for row in group}) < 2:
            alone += 1
            continue
        best, worst = (pick(group, key=lambda row: row["reward"]) for pick in (max, min))
        differ = best[response_key] != worst[response_key]
        if not differ or best["reward"] - worst["reward"] <= args.min_margin:
            alike += 1
        else:
            pair = {"id": best.get("id"), "prompt": read_pair(best, keys)[0]}
            for name, row in (("chosen", best), ("rejected", worst)):
                pair |= {name: row[response_key], f"{name}_reward": row["reward"]}
                pair[f"{name}_finish_reason"] = row.get("finish_reason")
            pairs.append(pair)
    others = f"{alone:,} without two different responses that have one"
    note(f"pairs  {len(pairs):,} of {len(groups):,} prompts; {alike:,} with rewards too close, {others}")
    return pairs


def conditional_rows(rows, keys, args):
    """Conditional SFT (arXiv:2308.12050): each response, with its reward in the prompt, as a row for sft.py.

    Plain prompts stay text; conversations stay messages, which sft.py renders.
    """
    mean, std = reward_statistics(rows) if args.normalize_reward else (0.0, 1.0)

    def make(item):
        row = item[1]
        reason = row.get("finish_reason")
        if row["reward"] is None:
            raise ValueError("no reward")
        if reason == "length" and row.get("messages"):
            raise ValueError("the answer was cut, but a chat template would end it")
        plain, response = row_texts(row, keys, args.apply_chat_template or reason is not None)
        user = row.get("prompt", plain) if reason and isinstance(plain, str) else plain
        prompt = conditioned(user, (row["reward"] - mean) / (std or 1.0), args)
        if isinstance(plain, str):  # --input_template stands around the user's text
            if plain.count(user) != 1:
                raise ValueError("--input_template holds the prompt's own words")
            prompt, response = plain.replace(user, prompt), {"content": response}
        kept = {name: row[name] for name in ("id", "sample", "finish_reason", "reward") if name in row}
        return {**kept, "input": prompt, "output": response["content"]}

    made, summary = sort_out([(f"row {i + 1}", row) for i, row in enumerate(rows)], make)
    note(f"csft   {len(made):,} rows | {summary}")
    return made


def reward_statistics(rows):
    """(mean, standard deviation) of the rewards there are; None if there are none."""
    rewards = [row["reward"] for row in rows if row.get("reward") is not None]
    if len({*rewards}) < 2:  # np.std of equal numbers is not always 0
        return (rewards[0], 0.0) if rewards else (None, None)
    return float(np.mean(rewards)), float(np.std(rewards))


POST_PROCESSORS = {"rs": best_samples, "iter_dpo": best_and_worst, "csft": conditional_rows}


# --- main


def start(args):
    """Checks flags, finds (rank, world_size, device), quiets libraries; there is no process group yet."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    args.temperature = 0.0 if args.greedy_sampling else args.temperature
    args.top_k = max(args.top_k, 0)  # -1 is another way to say all
    args.stop = tuple(text.replace("\\n", "\n") for text in args.stop if text)
    args.post_processor = None if args.post_processor == "null" else args.post_processor
    args.reward_template = args.reward_template.replace("\\n", "\n")
    if args.input_template is not None:
        args.input_template = args.input_template.replace("\\n", "\n")  # a heredoc leaves two characters
        if "{}" not in args.input_template:
            note(f"notice --input_template {args.input_template!r} has no {{}}: prompts are used as they are")
            args.input_template = None
    check_flags(args, world_size)
    local_rank = os.environ.get("LOCAL_RANK", max(args.local_rank, 0))
    device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    local_size = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE", world_size)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(local_size)))
    if device != "cpu":
        torch.cuda.set_device(device)
    return rank, world_size, device


def check_flags(args, world_size):
    """Stops at flags that make no sense; notes those that change nothing."""
    sizes = "rollout_batch_size best_of_n prompt_max_len max_new_tokens max_len micro_batch_size"
    sizes = f"{sizes} tp_size dp_size max_num_seqs rs_top_k".split()
    ranges = dict.fromkeys(sizes, (1, 2**31)) | {"iter": (0, 2**31)}
    ranges |= {"temperature": (0, 2), "top_p": (1e-9, 1), "min_p": (0, 1), "repetition_penalty": (1e-9, 1e9)}
    ranges |= {"gpu_memory_utilization": (0, 1), "max_model_len": (2, 2**31), "zero_stage": (0, 3)}
    ranges |= {"csft_prompt": (-1e6, 1e6), "reward_timeout": (1e-3, 1e6)}
    for name, (low, high) in ranges.items():
        if getattr(args, name) is not None and not low <= getattr(args, name) <= high:
            die(f"--{name} must be between {low} and {high}, not {getattr(args, name)}")
    if args.temperature == 0 and args.best_of_n > 1:
        die(f"--greedy_sampling gives the same answer each time: --best_of_n {args.best_of_n} makes no sense")
    if args.post_processor not in (None, *POST_PROCESSORS):
        die(f"--post_processor {args.post_processor}: unknown; there are {', '.join(POST_PROCESSORS)}")
    if (args.post_processor or args.scored_path or args.reward_fn) and args.eval_task != "rm":
        die(f"--post_processor, --scored_path, --reward_fn belong to --eval_task rm, not {args.eval_task}")
    if not args.pretrain and not args.reward_fn:
        die("--pretrain is missing" + ", or --reward_fn" * (args.eval_task == "rm"))
    if args.csft_prompt is not None and args.eval_task in ("rm", "logps"):
        die("--csft_prompt is for generation; csft shows the reward that it finds")
    if args.normalize_reward and args.post_processor != "csft":
        die("--normalize_reward belongs to --post_processor csft")
    if "{input}" not in args.reward_template or "{reward}" not in args.reward_template:
        die(f"--reward_template {args.reward_template!r} lacks {{input}} or {{reward}}")
    if args.eval_task == "generate_vllm":
        if importlib.util.find_spec("vllm") is None:
            die("vLLM is missing: pip install -r requirements-vllm.txt, or use --eval_task generate")
        if world_size > 1:
            die(f"generate_vllm is one process, not {world_size}: use python, and --dp_size or --tp_size")
        if args.micro_batch_size != 16:
            note("notice --micro_batch_size: vLLM fills its batches itself, up to --max_num_seqs")
    if args.flash_attn or args.enable_prefix_caching or args.zero_stage:
        note("notice --flash_attn, --enable_prefix_caching and --zero_stage change nothing in this script")
    taken = [os.path.realpath(name.strip()) for name in args.dataset.split(",")]
    for path in outputs(args):
        if Path(path).is_dir() or os.path.realpath(path) in taken:
            die(f"{path} cannot be written: it is a folder, or one of our other files")
        taken.append(os.path.realpath(path))


def agree(value, world_size):
    """Rank 0's value on every rank. Ranks meet here and at the end; in between nobody waits."""
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    values = [value]
    if world_size > 1:
        dist.broadcast_object_list(values)
    return values[0]


def finish(args, rows, identity, keys, started):
    """Writes the outputs and, last, what made them; then the parts go. keys: of prompt and response."""
    meta = Path(f"{args.output_path}.meta.json")
    best = rows
    if args.post_processor:
        best = POST_PROCESSORS[args.post_processor](rows, keys, args)
    ends = [row["finish_reason"] == "stop" for row in rows if row.get("finish_reason")]
    summary = {"rows": len(rows)} | ({"finished": float(np.mean(ends))} if ends else {})
    if args.eval_task == "logps":
        summary["logps_mean"] = float(np.mean([row["logps"] for row in rows if row["logps"] is not None]))
    if args.eval_task == "rm":
        summary["without_reward"] = sum(row["reward"] is None for row in rows)
        summary["reward_mean"], summary["reward_std"] = reward_statistics(rows)
    if best is not rows:
        chosen = [{"reward": row.get("reward", row.get("chosen_reward"))} for row in best]
        summary |= {"selected": len(best), "selected_reward_mean": reward_statistics(chosen)[0]}
    meta.unlink(missing_ok=True)
    for path, result in zip(outputs(args), (best, rows), strict=False):
        write_rows(path, result)
    record = {"identity": identity, "sha256": sha256_all(outputs(args)), "summary": summary}
    write_atomic(meta, json.dumps(record, indent=1))
    shutil.rmtree(f"{args.output_path}.partial", ignore_errors=True)
    if ends:
        text = f"{str(rows[0].get('input'))[-50:]}[{str(rows[0].get('output'))[:200]}]"
        note(f"sample {text}".replace("\n", "\\n"))
    text = "  ".join(f"{name} {value:.4g}" for name, value in summary.items() if value is not None)
    note(f"saved  {args.output_path}  {text}  ({datetime.timedelta(seconds=int(time.time() - started))})")


def main(args):
    rank, world_size, device = start(args)
    started, rewards = time.time(), combined_rewards(args)
    keys, tokenizer, stop_ids, trees, calls = None, None, None, [], []
    if args.pretrain:
        tokenizer, stop_ids = load_tokenizer(args.pretrain, args)
    rows = load_rows(args.dataset, args.dataset_probs, args.dataset_split, args.max_samples)
    if args.eval_task in ("rm", "logps"):
        keys = find_pairs(rows, args)
        trees = make_score_trees(rows, keys, tokenizer, stop_ids, args) if args.pretrain else []
        calls = make_calls(rows, keys, args) if args.reward_fn else []
    else:
        prompts = make_prompts(rows, tokenizer, args)
    identity = identify_stage(args, tokenizer) if rank == 0 else None
    earlier, lock = open_stage(args, identity) if rank == 0 else (None, None)
    earlier = agree(earlier, world_size)
    if earlier == "done":
        return
    parts = Parts(args, earlier, rank)
    kind, devices = "CPU" if device == "cpu" else "GPU", args.tp_size * args.dp_size
    if args.eval_task != "generate_vllm":
        devices = world_size
    dtype = "bf16" if args.bf16 else "fp32"
    if args.pretrain:
        note(f"model  {Path(args.pretrain).name} {dtype} | {args.eval_task} | {devices} x {kind}")
    try:
        for k, (name, (_, path)) in enumerate(rewards.items()):
            if path:
                call_rewards(name, path, k, calls, parts, args, rank, world_size)
        if trees:
            score(trees, parts, args, rank, world_size, device)
        elif args.eval_task == "generate":
            generate(prompts, parts, tokenizer, stop_ids, args, rank, world_size, device)
        elif args.eval_task == "generate_vllm" and args.dp_size > 1:
            generate_dp(prompts, parts, earlier, args)
        elif args.eval_task == "generate_vllm":
            generate_vllm(prompts, parts, tokenizer, stop_ids, args)
    except SystemExit:
        if rank == 0 and not parts.read():  # stopped before any result: nothing stays
            shutil.rmtree(parts.folder)
        raise
    parts.file.close()
    if world_size > 1:
        dist.barrier()
    if rank == 0:
        found = parts.read()
        if args.eval_task == "rm":
            results = with_rewards(rows, found, rewards)
        elif args.eval_task == "logps":
            sizes = {i: int(t.sum()) for tree in trees for i, t in zip(tree["rows"], tree["trained"])}
            values = [(found.get((i, 0), {}).get("value"), sizes.get(i)) for i in range(len(rows))]
            results = [row | {"logps": v, "tokens": n} for (_, row), (v, n) in zip(rows, values, strict=True)]
        else:
            results = [found[prompt.id, k] for prompt in prompts for k in range(args.best_of_n)]
        finish(args, results, identity, keys, started)
        lock.close()


if __name__ == "__mp_main__":  # of generate_dp or vLLM: it ends with its parent, however that ends
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, args=explain_flags(sys.argv[1:]), use_underscores=True))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.destroy_process_group()

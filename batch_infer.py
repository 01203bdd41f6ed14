"""Batch inference in one file: samples of a policy (generate_vllm, generate), rewards (rm), log-probs.

Rows are JSON lines; a stage keeps the columns it finds. sft.py and dpo.py know these rows without flags:
    generate  {"id": 7, "sample": 0, "input": "2+2=", "output": "4", "finish_reason": "stop", "tokens": 1}
    rm        the same and "reward": 1.25; null where a row cannot be scored (too long, no response)
    logps     the same and "logps": -31.4, log pi(output | input) in nats over "tokens", EOS included
id: the row's index in --dataset. input: what the model saw, with template and BOS; messages too, where the
prompt was messages. output has no EOS: finish_reason says whether it came ("stop") or not ("length").

 1. Results reach the disk as they come. Killed at any moment, the same command does the rest. The output
    appears by rename, beside it <output_path>.meta.json: what made it.
 2. A prompt is read once for all its samples, in generating and in scoring. Nothing is cut to fit.
 3. A reward model reads what it was trained on: prompt, response, EOS (not where it was cut), or with
    --apply_chat_template messages in its own template. Hugging Face heads look at the last token that is no
    padding, OpenRLHF heads at EOS; rewards are (score - mean) / std where config.json has these.
 4. Conditional SFT (arXiv:2308.12050): the reward stands in the user's turn, in rows of --post_processor csft
    as in prompts of --csft_prompt; the samples of such prompts are scored as answers to the plain prompt.

    python batch_infer.py --eval_task generate_vllm --pretrain MODEL --dataset x.jsonl --output_path g.jsonl
    deepspeed --num_gpus 8 batch_infer.py --eval_task rm --pretrain REWARD_MODEL --dataset g.jsonl \\
        --post_processor rs --output_path best.jsonl
    python batch_infer.py --eval_task rm --reward_fn examples/rewards/gsm8k.py:correct --dataset g.jsonl ...
    python batch_infer.py --eval_task generate --pretrain runs/toy/toy/policy --no-bf16 --prompt_max_len 64 \\
        --dataset runs/toy/toy/prompts.jsonl --max_new_tokens 64 --output_path g.jsonl      # a smoke run
"""

import collections
import contextlib
import ctypes
import dataclasses
import datetime
import faulthandler
import functools
import hashlib
import importlib.util
import inspect
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import datasets
import jinja2
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
import tyro
from torch import nn
from tqdm import tqdm


@dataclass
class Args:
    # generate_vllm, generate: sample with vLLM or Hugging Face; rm: rewards; logps: log-probs under a policy
    eval_task: Literal["generate_vllm", "generate", "rm", "logps"]
    output_path: str  # the .jsonl to write
    # rows: comma list of .jsonl, .json, .csv, .parquet or .arrow files, folders or hub names (NAME@SUBSET)
    dataset: str

    # --- model

    pretrain: str = ""  # the model: a Hugging Face folder or hub name
    bf16: bool = True  # bf16 weights; --no-bf16: fp32
    trust_remote_code: bool = False  # run Python code that comes with the model
    tokenizer_chat_template: str | None = None  # Jinja text, or a .jinja file, in place of the model's own
    value_head_prefix: str = "value_head"  # rm: name of an OpenRLHF head that config.json does not name

    # --- data

    dataset_probs: str | None = None  # comma list of the datasets' shares of all rows; default: each row once
    dataset_split: str = "train"  # split of --dataset, where it has splits
    max_samples: int = 100_000_000  # use the first this many rows of each dataset
    max_len: int = 2048  # rm, logps: rows with more tokens of prompt + response get null
    max_drop_ratio: float = 0.05  # stop when more than this share of the rows cannot be used
    input_key: str | None = None  # column of the prompt, text or messages; default: a known one
    output_key: str | None = None  # rm, logps: column of the response; none: input_key holds conversations
    input_template: str | None = None  # format of a plain text prompt, such as "User: {}\nAssistant: "
    apply_chat_template: bool = False  # wrap plain text as a user and an assistant turn of the chat template
    iter: int | None = None  # iteration k: only rows k x rollout_batch_size and on, starting over at the end
    rollout_batch_size: int = 2048  # prompts per iteration; a slice holds each prompt at most once

    # --- generation

    best_of_n: int = 1  # samples per prompt
    prompt_max_len: int = 1024  # prompts with more tokens are left out
    max_new_tokens: int = 1024  # most tokens of a sample, EOS included
    temperature: float = 1.0  # divides the logits; 0 = greedy
    top_p: float = 1.0  # sample from the smallest set of tokens with this probability
    top_k: int = 0  # sample from this many most likely tokens; 0 = all
    # divides positive and multiplies negative logits of tokens that the prompt or the sample has already
    repetition_penalty: float = 1.0
    greedy_sampling: bool = False  # always take the likeliest token
    stop: tuple[str, ...] = ()  # texts that end a sample; they are not part of it
    seed: int = 42  # of the samples
    csft_prompt: float | None = None  # ask for this {reward}, with the --reward_template that csft had

    # --- rewards

    # list of FILE.py:NAME[=WEIGHT], functions (prompt, response, row) -> number, and model=WEIGHT; summed
    reward_fn: str | None = None
    reward_timeout: float = 10.0  # seconds that a call of --reward_fn may take; without an answer: null
    # what becomes of the rows: rs = best of a prompt, iter_dpo = best against worst, csft = all, conditioned
    post_processor: Literal["rs", "iter_dpo", "csft", "null"] | None = None
    rs_top_k: int = 1  # rs: keep this many of the best samples of each prompt
    min_reward: float | None = None  # rs: keep no sample with a lower reward
    drop_all_equal: bool = False  # rs: leave out prompts whose samples have all the same reward
    min_margin: float = 0.0  # iter_dpo: the rewards of a pair differ by more than this
    reward_template: str = "{input} <rm_score>: {reward} "  # csft: the user's text; {reward} has two decimals
    normalize_reward: bool = False  # csft: {reward} is (reward - mean) / std over all rows
    scored_path: str | None = None  # keep all scored rows in this .jsonl, next to the post-processor's output

    # --- speed

    micro_batch_size: int = 16  # generate: prompts, rm and logps: rows per forward pass and rank
    tp_size: int = 1  # vLLM: GPUs that share the model (tensor parallel)
    dp_size: int = 1  # vLLM: this many engines, each a process with tp_size GPUs of its own
    max_num_seqs: int | None = None  # vLLM: most samples that run at the same time; default: vLLM's own
    gpu_memory_utilization: float = 0.9  # vLLM: share of the GPU's memory to use
    flash_attn: bool = False  # accepted for old commands; it changes nothing
    enable_prefix_caching: bool = False  # accepted for old commands: vLLM always does it
    zero_stage: int = 0  # accepted for old commands: nothing is sharded here
    local_rank: int = -1  # set by the deepspeed launcher

    def __post_init__(self):
        counts = "best_of_n prompt_max_len max_new_tokens max_len micro_batch_size tp_size dp_size"
        for name in counts.split():
            if getattr(self, name) < 1:
                die(f"--{name} must be 1 or more, not {getattr(self, name)}")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            die("--temperature must be 0 or more, --top_p above 0 and at most 1")
        if self.greedy_sampling:
            self.temperature = 0.0
        if self.temperature == 0 and self.best_of_n > 1:
            die(f"--best_of_n {self.best_of_n}: greedy samples are all the same; use --temperature")
        if self.post_processor == "null":
            self.post_processor = None
        if self.eval_task != "rm" and (self.post_processor or self.scored_path or self.reward_fn):
            die(f"--post_processor, --scored_path, --reward_fn are of --eval_task rm, not {self.eval_task}")
        if not self.pretrain and not self.reward_fn:
            die("--pretrain is missing, or for --eval_task rm --reward_fn")
        if "{input}" not in self.reward_template or "{reward}" not in self.reward_template:
            die(f"--reward_template {self.reward_template!r} lacks {{input}} or {{reward}}")
        if self.input_template is not None and "{}" not in self.input_template:
            note(f"notice --input_template {self.input_template!r} has no {{}}: prompts are used as they are")
            self.input_template = None
        for name in ("input_template", "reward_template"):  # a shell leaves two characters of "\\n"
            setattr(self, name, (getattr(self, name) or "").replace("\\n", "\n"))
        self.stop = [text.replace("\\n", "\n") for text in self.stop if text]


# A stage may be resumed with other values of these flags; every other flag belongs to its identity.
FREE_FLAGS = """output_path scored_path max_drop_ratio tp_size dp_size max_num_seqs gpu_memory_utilization
    flash_attn enable_prefix_caching zero_stage local_rank""".split()
# Columns of our own rows; a prompt's columns with other names stay in the rows of its samples.
OUR_COLUMNS = "id sample input output finish_reason tokens messages prompt plain_input reward rewards".split()
PROMPT_COLUMNS = "prompt instruction input question problem messages conversations text".split()
# These cost a row, not the run.
ROW_ERRORS = (ValueError, TypeError, LookupError, AttributeError, jinja2.TemplateError)


class Item(NamedTuple):
    """One unit of work: a sample to draw, a response to score, a reward function to call."""

    key: tuple  # (index of the row, number of the sample or name of the reward)
    prompt: list | str  # token ids; for a function text or messages
    response: list | str  # token ids behind a token of the prompt, which predicts the first of them; or text
    row: dict


# --- reading rows


def note(message):
    """One line on the console of rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


def die(message):
    """Ends the program with one line on stderr (of each node) and exit code 2."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


class JsonLines:
    """Rows of a .jsonl file, each parsed when it is asked for; memory holds only where the lines begin."""

    def __init__(self, path):
        self.path, self.begins, position = path, [], 0
        with open(path, "rb") as file:
            for line in file:
                if line.strip():
                    self.begins.append(position)
                position += len(line)

    def __len__(self):
        return len(self.begins)

    def __getitem__(self, i):
        with open(self.path, "rb") as file:
            file.seek(self.begins[i])
            line = file.readline()
        try:
            return json.loads(line)
        except ValueError as e:
            raise ValueError(f"broken JSON: {e}") from e


def open_rows(name, split):
    """Rows of one dataset, by number: a local file or folder, or a hub name (NAME@SUBSET)."""
    path, _, subset = name.partition("@")
    kind = Path(path).suffix[1:]
    try:
        # The datasets library would guess types: "2026-01-01" becomes a date, mixed columns fail.
        if kind == "jsonl":
            return JsonLines(path)
        if kind == "json":
            return tuple(json.loads(Path(path).read_bytes()))  # no list: see encode_table
        if kind in ("csv", "parquet", "arrow"):
            return datasets.load_dataset(kind, data_files=path, split="train")
        if Path(path, "state.json").exists() or Path(path, "dataset_dict.json").exists():
            rows = datasets.load_from_disk(path)
            return rows[split] if isinstance(rows, dict) else rows
        return datasets.load_dataset(path, subset or None, split=split)
    except Exception as e:  # of many types; the message names the cause
        die(f"dataset {name!r}: {type(e).__name__}: {' '.join(str(e).split())[:300]}")


def choose_keys(row, args):
    """(prompt column, response column or None) of a row."""
    layouts = [("messages", None), ("conversations", None), ("instruction", "output"), ("input", "output")]
    layouts += [("prompt", "response"), ("prompt", "completion"), ("instruction", "response")]
    layouts += [("question", "answer"), ("question", "response"), ("text", None)]
    if "finish_reason" in row:  # a row of batch_infer.py, which may hold messages too
        layouts = [("input", "output")]
    if args.input_key:
        layouts = [(args.input_key, args.output_key)]
    for keys in layouts:
        if set(keys) - {None} <= set(row):
            return keys
    raise ValueError(f"it has the columns {', '.join(row)}: choose with --input_key, --output_key")


def load_rows(args):
    """The rows of all datasets, one after another; --dataset_probs: their shares of as many rows."""
    names = [name.strip() for name in args.dataset.split(",")]
    tables = []
    for name in names:
        rows, table = open_rows(name, args.dataset_split), []
        try:
            for i in range(min(len(rows), args.max_samples)):
                table.append(dict(rows[i]))
        except (ValueError, TypeError) as e:
            die(f"dataset {name!r}: row {i + 1} is no JSON object: {e}")
        if not table:
            die(f"dataset {name!r}: no rows")
        tables.append(table)
    if args.dataset_probs and len(names) > 1:
        shares = [float(share) for share in args.dataset_probs.split(",")]
        if len(shares) != len(names):
            die(f"--dataset_probs {args.dataset_probs}: not one share for each of {len(names)} datasets")
        total = sum(len(table) for table in tables)
        tables = [np.resize(table, round(share * total)).tolist() for table, share in zip(tables, shares)]
    return [row for table in tables for row in table]


def read_pair(row, keys):
    """(prompt, response) as they stand in the row; the response is [] where the prompt holds both."""
    prompt = row.get(keys[0])
    if keys[0] == "instruction" and row.get("input"):  # Alpaca's rows
        prompt = f"{prompt}\n\n{row['input']}"
    return prompt, row.get(keys[1]) if keys[1] else []


def collect(rows, indices, make, args):
    """The Items that make(index, row) gives for the rows. What cannot be used is told; too many stop."""
    items, reasons = [], collections.defaultdict(list)
    for i in indices:
        try:
            items += make(i, rows[i])
        except ROW_ERRORS as e:
            reasons[str(e).partition("\n")[0][:200] or type(e).__name__].append(i)
    n_dropped = sum(len(members) for members in reasons.values())
    told = ", ".join(f"{len(members):,} x {reason} (row {members[0]})" for reason, members in reasons.items())
    if n_dropped > args.max_drop_ratio * len(indices) or not items:
        limit = f"--max_drop_ratio {args.max_drop_ratio}"
        die(f"{n_dropped:,} of {len(indices):,} rows cannot be used ({limit}): {told}")
    note(f"data   {len(indices) - n_dropped:,} rows, {n_dropped:,} left out{told and ': '}{told}")
    return items


# --- text and tokens. A ValueError says why a row cannot be used


def model_config(path, args):
    """What config.json says of a language model."""
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=args.trust_remote_code)
    return config.get_text_config()


def load_tokenizer(path, args):
    """The tokenizer of a model, with --tokenizer_chat_template in place."""
    try:
        model_config(path, args)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError, KeyError) as e:
        die(f"model {path!r}: neither a model folder nor a known hub name: {str(e).splitlines()[0]}")
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        die(f"model {path!r}: its tokenizer has no fast form, or no EOS token")
    template = args.tokenizer_chat_template
    if template and template.endswith(".jinja"):
        if not Path(template).is_file():
            die(f"--tokenizer_chat_template {template}: no such file")
        template = Path(template).read_text()
    tokenizer.chat_template = template or tokenizer.chat_template
    if args.apply_chat_template and not tokenizer.chat_template:
        die(f"model {path!r} has no chat template: --tokenizer_chat_template FILE.jinja")
    return tokenizer


def as_messages(value, role):
    """value as [{"role", "content"}]: text or a number (said by role), messages, or ShareGPT's turns."""
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return [{"role": role, "content": str(value)}]
    if not isinstance(value, list):
        raise ValueError(f"neither text nor messages but {type(value).__name__}")
    roles = {"human": "user", "gpt": "assistant"}
    messages = []
    for turn in value:
        speaker = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if not isinstance(speaker, str) or not isinstance(content, str):
            raise ValueError("a message needs role and content, both text")
        messages.append({**turn, "role": roles.get(speaker, speaker), "content": content})
    return messages


def tokenize(text, tokenizer, add_bos):
    """(ids, ends): token ids, and the character at which each token ends. BOS at most once, no EOS behind."""
    encoded = tokenizer(text, add_special_tokens=add_bos, return_offsets_mapping=True)
    ids, ends = encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]
    while ids and ends[-1] == 0:  # the EOS that some tokenizers append
        ids, ends = ids[:-1], ends[:-1]
    if not ids:
        raise ValueError("empty text")
    if ids[:2] == [tokenizer.bos_token_id] * 2:  # the text brought its own
        ids, ends = ids[1:], ends[1:]
    return ids, ends


def conditioned(prompt, reward, args):
    """The prompt, text or messages, with the reward in its last user turn."""
    template = args.reward_template.replace("{reward}", f"{round(reward, 2) + 0.0:.2f}")  # 0.00, never -0.00
    if isinstance(prompt, str):
        return template.replace("{input}", prompt)
    messages = [dict(message) for message in prompt]
    for message in reversed(messages):
        if message["role"] == "user":
            message["content"] = template.replace("{input}", message["content"])
            return messages
    raise ValueError("no user turn for --reward_template")


def render_prompt(prompt, tokenizer, args):
    """(text, ids) of a prompt, text or messages, as the model sees it: what examples of sft.py begin with."""
    if isinstance(prompt, list):
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        return text, tokenize(text, tokenizer, add_bos=False)[0]
    text = args.input_template.replace("{}", prompt) if args.input_template else prompt
    ids = tokenize(text, tokenizer, add_bos=True)[0]
    if text.endswith(" "):  # it goes where the tokenizer joined it to the next word in training: " the"
        longer = [tokenize(text + word, tokenizer, add_bos=True)[0] for word in ("a", "the")]
        if any(other[: len(ids)] != ids for other in longer):
            text = text[:-1]
            ids = tokenize(text, tokenizer, add_bos=True)[0]
    if ids[0] == tokenizer.bos_token_id and not text.startswith(tokenizer.bos_token):
        text = tokenizer.bos_token + text
        if tokenize(text, tokenizer, add_bos=False)[0] != ids:  # some tokenizers want a blank behind BOS
            text = tokenizer.decode(ids)
    return text, ids


def make_samples(index, row, key, tokenizer, args):
    """The Items of a prompt, one per sample; their rows lack what the samples will give."""
    value = read_pair(row, (key, None))[0]
    messages = as_messages(value, "user")
    while messages and messages[-1]["role"] == "assistant":  # of a conversation: the model answers itself
        messages.pop()
    if not any(message["content"].strip() for message in messages):
        raise ValueError("empty prompt")
    prompt, fields = messages, {"messages": messages}
    if not (args.apply_chat_template or isinstance(value, list)):
        prompt = messages[0]["content"]
        fields = {"prompt": prompt} if args.input_template else {}
    asked = prompt
    if args.csft_prompt is not None:
        asked = conditioned(prompt, args.csft_prompt, args)
        fields["plain_input"] = render_prompt(prompt, tokenizer, args)[0]
    text, ids = render_prompt(asked, tokenizer, args)
    if len(ids) > args.prompt_max_len:
        raise ValueError(f"longer than --prompt_max_len {args.prompt_max_len}")
    fields |= {name: row[name] for name in row if name not in (key, *OUR_COLUMNS)}
    result = {"output": None, "finish_reason": None, "tokens": None}
    samples = [{"id": index, "sample": k, "input": text, **result, **fields} for k in range(args.best_of_n)]
    return [Item((index, sample["sample"]), ids, [], sample) for sample in samples]


def row_texts(row, keys, chat):
    """(prompt, response) of a row: two texts, or messages and the assistant's message that follows them.

    Of our own rows the prompt without what --csft_prompt put in: no reward model has ever seen that.
    """
    prompt, response = read_pair(row, keys)
    if row.get("finish_reason") is not None:  # our own: input is rendered for the policy, messages are not
        chat = chat and bool(row.get("messages"))
        prompt = row["messages"] if chat else row.get("plain_input", prompt)
        is_bare = "plain_input" in row and "messages" not in row and "prompt" not in row
        if is_bare and not row["input"].endswith(" "):  # the response has the blank that ended the prompt
            response = response.removeprefix(" ")
    messages = as_messages(prompt, "user") + as_messages(response, "assistant")
    if not (chat or isinstance(prompt, list) or isinstance(response, list)):
        return messages[0]["content"], messages[1]["content"]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns or turns[-1] == 0:
        raise ValueError("no assistant turn after a prompt")
    return messages[: turns[-1]], messages[turns[-1]]


def render_chat(prompt, answer, cut, to_eos, tokenizer):
    """(text, where in it the answer begins) of messages and the answer to them, in the chat template."""
    text = tokenizer.apply_chat_template([*prompt, answer], tokenize=False)
    asked = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    start = len(os.path.commonprefix([text, asked]))
    if start == 0:
        raise ValueError("the chat template rewrites the prompt")
    if cut:  # without what the template writes behind an answer
        content = answer["content"].strip()
        text = text[: text.index(content, start) + len(content)]
    elif to_eos:
        text = text.rstrip("\n")
    return text, start


def make_scored(index, row, keys, to_eos, config, tokenizer, args):
    """The Item of a row, as a reward model or (logps) the policy reads it; to_eos: nothing behind EOS."""
    reason = row.get("finish_reason")
    as_sampled = args.eval_task == "logps" and reason is not None
    prompt, response = read_pair(row, keys) if as_sampled else row_texts(row, keys, args.apply_chat_template)
    if isinstance(prompt, str):
        if args.input_template and reason is None:
            prompt = args.input_template.replace("{}", prompt)
        text, start = prompt + response.removesuffix(tokenizer.eos_token), len(prompt)
        # What the policy saw has its BOS. A reward model's own goes in front, but not of a rendered chat.
        add_bos = reason is None or not (as_sampled or row.get("messages"))
        add_eos = reason in (None, "stop")
    else:
        text, start = render_chat(prompt, response, reason == "length", to_eos, tokenizer)
        add_bos = False
        add_eos = to_eos and reason != "length" and not text.endswith(tokenizer.eos_token)
    ids, ends = tokenize(text, tokenizer, add_bos)
    ids = ids + [tokenizer.eos_token_id] * add_eos
    first = max(1, sum(end <= start for end in ends))  # of the response
    if first == len(ids):
        raise ValueError("empty response")
    limit = min(args.max_len, position_limit(config))
    if len(ids) > limit:
        raise ValueError(f"longer than {limit} tokens (--max_len, or the model's positions)")
    # A Hugging Face head looks at the last token that is no padding: let that be the last one.
    while not to_eos and len(ids) > 1 and ids[-1] == config.pad_token_id:
        ids.pop()
    cut = min(first, len(ids)) - 1
    return [Item((index, "model"), ids[:cut], ids[cut:], row)]


def make_calls(index, row, keys, names, args):
    """The Items of a row, one for each reward function."""
    prompt, response = row_texts(row, keys, args.apply_chat_template)
    response = response if isinstance(response, str) else response["content"]
    return [Item((index, name), prompt, response, row) for name in names]


def position_limit(config):
    """Tokens that the model has positions for."""
    return getattr(config, "max_position_embeddings", None) or 2**31


def sampling_items(rows, tokenizer, config, args):
    """(columns, Items) of the prompts of this iteration."""
    limit = position_limit(config)
    if args.prompt_max_len + args.max_new_tokens > limit:
        lengths = f"--prompt_max_len {args.prompt_max_len} + --max_new_tokens {args.max_new_tokens}"
        die(f"{lengths} is more than the model's {limit} positions")
    known = [args.input_key] if args.input_key else PROMPT_COLUMNS
    keys = [key for key in known if key in rows[0]]
    if not keys:
        die(f"dataset {args.dataset!r}: it has the columns {', '.join(rows[0])}: choose with --input_key")
    indices = range(len(rows))
    if args.iter is not None:
        first = args.iter * args.rollout_batch_size
        n = min(args.rollout_batch_size, len(rows))
        indices = [i % len(rows) for i in range(first, first + n)]
    return keys, collect(rows, indices, lambda *row: make_samples(*row, keys[0], tokenizer, args), args)


def scoring_items(rows, tokenizer, config, rewards, args):
    """(columns of prompt and response, Items) of the rows to score."""
    try:
        keys = choose_keys(rows[0], args)
    except ValueError as e:
        die(f"dataset {args.dataset!r}: {e}")
    names = [name for name, (_, path) in rewards.items() if path]
    items = []
    if names:
        items += collect(rows, range(len(rows)), lambda *row: make_calls(*row, keys, names, args), args)
    if args.pretrain:
        to_eos = args.eval_task == "logps" or reward_config(args)[1]
        options = (keys, to_eos, config, tokenizer, args)
        items += collect(rows, range(len(rows)), lambda *row: make_scored(*row, *options), args)
    return keys, items


def find_stops(tokenizer, args):
    """The ids that end a sample: EOS and those of the model's generation_config.json."""
    try:
        stops = transformers.GenerationConfig.from_pretrained(args.pretrain).eos_token_id
    except OSError:  # there is none: Hugging Face and vLLM take config.json's
        stops = model_config(args.pretrain, args).eos_token_id
    return {tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])} - {None}


# --- generation. Engines are generators of (key, result).


def load_policy(args, device):
    """The causal LM, every weight from the checkpoint, with Hugging Face's own attention."""
    options = {"dtype": torch.bfloat16 if args.bf16 else torch.float32, "output_loading_info": True}
    options["trust_remote_code"] = args.trust_remote_code
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(args.pretrain, **options)
    except (OSError, ValueError) as e:
        die(f"model {args.pretrain!r}: {str(e).splitlines()[0]}")
    if info["missing_keys"]:
        die(f"model {args.pretrain!r}: weights are missing: {', '.join(sorted(info['missing_keys'])[:3])}")
    return place_model(model, device)


def place_model(model, device):
    """The model on its device, ready for inference."""
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # others drop the soft-cap in silence
    return model.to(device).eval()


def make_seed(args, key):
    """The seed of a sample or of a batch of samples, whatever else is sampled beside it."""
    text = f"{args.seed} {args.iter} {key}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def read_sample(prompt, sampled, tokenizer, stop_ids, args):
    """The result of a sample. sampled: its token ids; what follows the first stop token is padding."""
    end = next((i for i, token in enumerate(sampled) if token in stop_ids), len(sampled))
    context = prompt[-16:]  # decoded too, as some tokenizers drop a blank at the start of a text
    before = len(tokenizer.decode(context, clean_up_tokenization_spaces=False))
    text = tokenizer.decode(context + sampled[:end], clean_up_tokenization_spaces=False)[before:]
    cuts = [text.index(stop) for stop in args.stop if stop in text]
    reason = "stop" if end < len(sampled) or cuts else "length"
    return {"output": text[: min(cuts, default=None)], "finish_reason": reason, "tokens": end}


def pad(rows, device, left=False):
    """(input_ids, attention_mask), both [B, T], of lists of token ids.

    The padding is the row's own first token: masked, and no news to a repetition penalty.
    """
    width = max(len(row) for row in rows)
    ids = torch.tensor([[row[0]] * width for row in rows])
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place] = torch.tensor(row)
        mask[i, place] = 1
    return ids.to(device), mask.to(device)


def sampling_batches(items, args):
    """All samples of micro_batch_size prompts of about the same length, the longest prompts first."""
    ordered = sorted(items, key=lambda item: (-len(item.prompt), item.key))
    size = args.micro_batch_size * args.best_of_n
    return [ordered[begin : begin + size] for begin in range(0, len(ordered), size)]


@torch.inference_mode()
def generate(batches, tokenizer, args, device):
    """Hugging Face's model.generate, with a seed per batch."""
    model, stop_ids = load_policy(args, device), find_stops(tokenizer, args)
    settings = {"max_new_tokens": args.max_new_tokens, "repetition_penalty": args.repetition_penalty}
    settings |= {"eos_token_id": sorted(stop_ids), "pad_token_id": min(stop_ids)}
    if args.temperature > 0:
        sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
        settings |= {"do_sample": True, **sampling}
    # In place of the checkpoint's own settings, which would come on top of the flags.
    model.generation_config = transformers.GenerationConfig(**settings)
    has_stop = transformers.StopStringCriteria(tokenizer, args.stop) if args.stop else None
    for batch in batches:
        torch.manual_seed(make_seed(args, [item.key for item in batch]))
        ids, mask = pad([item.prompt for item in batch], device, left=True)
        width = ids.shape[1]
        stopping = []
        if has_stop:  # of the sample alone: a text that began in the prompt does not end it
            stopping.append(lambda ids, scores, width=width, **_: has_stop(ids[:, width:], scores))
        found = model.generate(ids, attention_mask=mask, stopping_criteria=stopping)[:, width:].tolist()
        for item, sampled in zip(batch, found):
            yield item.key, read_sample(item.prompt, sampled, tokenizer, stop_ids, args)


def start_vllm(args):
    """vLLM's engine; where it does not start, its own message stays on the console."""
    length = args.prompt_max_len + args.max_new_tokens
    settings = {"dtype": "bfloat16" if args.bf16 else "float32", "max_model_len": length}
    settings |= {"tensor_parallel_size": args.tp_size, "trust_remote_code": args.trust_remote_code}
    settings |= {"gpu_memory_utilization": args.gpu_memory_utilization, "use_tqdm_on_load": False}
    settings["enable_prefix_caching"] = True
    if args.max_num_seqs:
        settings["max_num_seqs"] = args.max_num_seqs
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if torch.cuda.is_available():
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # runs our last lines
    else:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # starts in 9 s instead of 21
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        settings |= {"enforce_eager": True, "block_size": 32}  # samples share whole blocks of a prompt
        # Half a prompt in a step would end a seeded request: "CPU Generator does not use offset".
        settings |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(8192, length)}
    try:
        from vllm import LLM

        return LLM(args.pretrain, **settings).llm_engine
    except Exception:
        traceback.print_exc()
        die("vLLM does not start, see above; --eval_task generate uses Hugging Face instead")


def generate_vllm(batches, tokenizer, args):
    """One request per sample, with its own seed: no other request changes it."""
    engine, stop_ids = start_vllm(args), find_stops(tokenizer, args)
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    flags = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k", "repetition_penalty")}
    flags |= {"max_tokens": args.max_new_tokens, "stop_token_ids": sorted(stop_ids)}
    # The text is made by read_sample; here it only finds --stop, which may be a special token.
    flags |= {"stop": args.stop, "detokenize": bool(args.stop), "skip_special_tokens": False}
    flags["output_kind"] = RequestOutputKind.FINAL_ONLY
    items = [item for batch in batches for item in batch]
    for i, item in enumerate(items):
        params = SamplingParams(seed=make_seed(args, item.key), **flags)
        engine.add_request(str(i), {"prompt_token_ids": item.prompt}, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                item, sampled = items[int(output.request_id)], list(output.outputs[0].token_ids)
                yield item.key, read_sample(item.prompt, sampled, tokenizer, stop_ids, args)
    engine.engine_core.shutdown()


def die_with_parent():
    """From now on the kernel kills this process when its parent ends, however that ends."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def run_engines(folder, args):
    """generate_vllm in dp_size processes: this same command, told by the environment what is its share."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    engines = []
    for k in range(args.dp_size):
        share = {"ENGINE_FOLDER": str(folder), "RANK": str(k), "WORLD_SIZE": str(args.dp_size)}
        gpus = visible.split(",")[k * args.tp_size : (k + 1) * args.tp_size]
        environment = os.environ | share | {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
        command = [sys.executable, *sys.orig_argv[1:]]
        engines.append(subprocess.Popen(command, env=environment, preexec_fn=die_with_parent))
    codes = [None]
    while None in codes and not any(codes):
        time.sleep(0.2)
        codes = [engine.poll() for engine in engines]
    for engine in engines:
        engine.kill()
    if any(codes):
        die("a vLLM engine failed, see above. The same command continues; --eval_task generate needs no vLLM")


# --- scoring


def scoring_batches(items, args):
    """Batches of at most micro_batch_size rows, the longest first; rows of one prompt stay together."""
    groups = collections.defaultdict(list)
    for item in items:
        groups[tuple(item.prompt)].append(item)
    blocks, size = [], args.micro_batch_size
    for group in groups.values():
        group.sort(key=lambda item: len(item.response))
        blocks += [group[begin : begin + size] for begin in range(0, len(group), size)]
    blocks.sort(key=lambda block: -len(block[-1].prompt) - len(block[-1].response))
    batches = []
    for block in blocks:
        if not batches or len(batches[-1]) + len(block) > size:
            batches.append([])
        batches[-1] += block
    return batches


def hidden_states(body, batch, device):
    """The last hidden states of each item's response, tensors [R, H]. A prompt is read once."""
    prompts = [list(ids) for ids in {tuple(item.prompt): None for item in batch}]
    if len(prompts) == len(batch) or [] in prompts:  # nothing is shared: a cache would only cost time
        ids, mask = pad([item.prompt + item.response for item in batch], device)
        hidden = body(ids, attention_mask=mask, use_cache=False).last_hidden_state  # [B, T, H]
        ends = [len(item.prompt) + len(item.response) for item in batch]
    else:
        ids, mask = pad(prompts, device, left=True)
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        cache = body(ids, attention_mask=mask, position_ids=position_ids, use_cache=True).past_key_values
        owners = torch.tensor([prompts.index(item.prompt) for item in batch], device=device)
        cache.batch_select_indices(owners)
        ids, response_mask = pad([item.response for item in batch], device)
        mask = torch.cat([mask[owners], response_mask], 1)
        position_ids = (mask.cumsum(1) - 1)[:, -ids.shape[1] :]
        options = {"attention_mask": mask, "position_ids": position_ids, "past_key_values": cache}
        hidden = body(ids, **options).last_hidden_state
        ends = [len(item.response) for item in batch]
    return [row[end - len(item.response) : end] for row, end, item in zip(hidden, ends, batch)]


def reward_config(args):
    """(config.json of a reward model, whether OpenRLHF saved it rather than Hugging Face as a classifier)."""
    config = transformers.AutoConfig.from_pretrained(args.pretrain, trust_remote_code=args.trust_remote_code)
    kinds = [name for name in config.architectures or [] if name.endswith("ForSequenceClassification")]
    return config, hasattr(config, "value_head_prefix") or not kinds


def load_reward_model(args, device):
    """(body, head, mean, std): rewards are (head(hidden state) - mean) / std. The head is in fp32."""
    config, is_openrlhf = reward_config(args)
    config.num_labels = 1
    mean, std = getattr(config, "mean", None), getattr(config, "std", None)
    if std is not None and std <= 0:
        die(f"model {args.pretrain}: std in its config.json is {std}")
    auto = transformers.AutoModelForSequenceClassification
    options = {"config": config, "trust_remote_code": args.trust_remote_code}
    try:
        with torch.device("meta"):
            kind = type(auto.from_config(**options))
        kind._keep_in_fp32_modules_strict = {*(kind._keep_in_fp32_modules_strict or ()), "score"}
        options["dtype"] = torch.bfloat16 if args.bf16 else torch.float32
        if is_openrlhf:
            prefix = getattr(config, "value_head_prefix", args.value_head_prefix)
            options["key_mapping"] = {rf"^{prefix}\.": "score."}
        # What does not fit is told below, in our words.
        options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
        model, info = auto.from_pretrained(args.pretrain, **options)
    except (OSError, ValueError) as e:
        die(f"model {args.pretrain!r}: {str(e).splitlines()[0]}")
    for name, found, _ in info["mismatched_keys"]:
        die(f"model {args.pretrain}: {name} is {list(found)}: the head of a reward model has one label")
    if info["missing_keys"] or not isinstance(getattr(model, "score", None), nn.Linear):
        missing = ", ".join(sorted(info["missing_keys"])[:3]) or "score"
        die(f"model {args.pretrain} lacks {missing}: no reward model, or --value_head_prefix is another")
    model = place_model(model, device)
    return model.base_model, model.score.float(), mean or 0.0, std or 1.0


def token_logps(model, hidden, targets):
    """Log-probs [N] of the targets that hidden states [N, H] predict. The head runs in chunks: no [N, V]."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    rows = max(16, 2**26 // head.weight.shape[0])
    logps = []
    for states, tokens in zip(hidden.split(rows), targets.split(rows)):
        logits = head(states).float() * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        logps.append(-F.cross_entropy(logits, tokens, reduction="none"))
    return torch.cat(logps)


@torch.inference_mode()
def score(batches, args, device):
    """Rewards of a reward model."""
    body, head, mean, std = load_reward_model(args, device)
    for batch in batches:
        last = torch.stack([states[-1] for states in hidden_states(body, batch, device)])  # [B, H]
        rewards = (head(last.float())[:, 0] - mean) / std
        for item, reward in zip(batch, rewards.tolist()):
            yield item.key, {"value": reward if math.isfinite(reward) else None}


@torch.inference_mode()
def measure(batches, args, device):
    """Log-probs of the responses under a policy."""
    model = load_policy(args, device)
    for batch in batches:
        hidden = hidden_states(model.base_model, batch, device)
        predictors = torch.cat([states[:-1] for states in hidden])  # [N, H]
        targets = torch.tensor([token for item in batch for token in item.response[1:]], device=device)
        sizes = [len(item.response) - 1 for item in batch]
        for item, logps in zip(batch, token_logps(model, predictors, targets).split(sizes)):
            yield item.key, {"logps": logps.sum().item(), "tokens": len(logps)}


# --- reward functions


@functools.cache
def load_reward(path, name):
    """The function NAME of a Python file; processes that are forked later find it loaded."""
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path!r}")
    spec = importlib.util.spec_from_file_location(f"reward_file_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    sys.path.insert(0, str(Path(path).resolve().parent))
    spec.loader.exec_module(module)
    return getattr(module, name)


def parse_rewards(args):
    """{name: (weight, file)} of the rewards that are added; the model's name is "model", without a file."""
    rewards = {"model": (1.0, None)} if args.pretrain else {}
    for spec in args.reward_fn.split(",") if args.reward_fn else []:
        place, _, weight = spec.strip().partition("=")
        path, _, name = place.rpartition(":")
        try:
            weight = float(weight or 1)
            if place == "model" and args.pretrain:
                rewards["model"] = (weight, None)
                continue
            if name in rewards:
                raise ValueError(f"a second {name}")
            inspect.signature(load_reward(path, name)).bind("prompt", "response", {})
        except Exception as e:  # the file is the user's: anything may be wrong with it
            form = "FILE.py:NAME or FILE.py:NAME=WEIGHT, a function of (prompt, response, row)"
            die(f"--reward_fn {spec}: {type(e).__name__}: {e}; it must be {form}")
        rewards[name] = (weight, path)
    return rewards


def start_worker():
    """What a worker process does first."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    signal.signal(signal.SIGALRM, signal.default_int_handler)  # the alarm raises KeyboardInterrupt


def call_reward(path, name, seconds, prompt, response, row):
    """The result of one call, in a worker. An alarm ends it; where that does not help, the process ends."""
    faulthandler.dump_traceback_later(2 * seconds, exit=True, file=2)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            value = float(load_reward(path, name)(prompt, response, row))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if not math.isfinite(value):
            raise ValueError(f"{name} gave {value}")
        return {"value": value}
    except KeyboardInterrupt:
        return {"value": None, "error": f"no answer in {seconds:g} s"}
    except (Exception, SystemExit) as e:
        line = traceback.extract_tb(e.__traceback__)[-1].lineno
        return {"value": None, "error": f"{type(e).__name__}: {e} (line {line})"}
    finally:
        faulthandler.cancel_dump_traceback_later()


def run_calls(calls, n_workers):
    """The result of each call; None where it was lost, as some call ended its process."""
    futures = []
    fork = multiprocessing.get_context("fork")  # the file is loaded; no GPU or thread is in use yet
    with ProcessPoolExecutor(n_workers, mp_context=fork, initializer=start_worker) as pool:
        with contextlib.suppress(BrokenProcessPool):
            for call in calls:
                futures.append(pool.submit(call_reward, *call))
    results = [None if future.exception() else future.result() for future in futures]
    return results + [None] * (len(calls) - len(results))


def call_rewards(batches, path, name, args):
    """Calls of a reward function. One that fails, hangs or ends its process gives null."""
    items = [item for batch in batches for item in batch]
    n_workers = torch.get_num_threads()
    size = 20 * n_workers
    for begin in range(0, len(items), size):
        block = items[begin : begin + size]
        calls = [(path, name, args.reward_timeout, item.prompt, item.response, item.row) for item in block]
        results = run_calls(calls, n_workers)
        for i, call in enumerate(calls):
            if results[i] is None:  # once more, in a process of its own
                lost = {"value": None, "error": "the call hung, or ended its process"}
                results[i] = run_calls([call], 1)[0] or lost
        errors = [result["error"] for result in results if "error" in result]
        if begin == 0 and len(errors) == size:  # nothing is kept: the next start tries again
            die(f"--reward_fn {path}:{name} failed on each of the first {size} rows: {errors[-1]}")
        for item, result in zip(block, results):
            yield item.key, result


# --- files


def stamp(path):
    """[file, size, mtime] of all files at a path: it tells inputs apart without reading them.

    In a model folder those of the model count; others, such as a log, may lie beside them.
    """
    path = Path(path)
    files = [path, *path.rglob("*")]
    if (path / "config.json").exists():
        kinds = (".safetensors", ".bin", ".json", ".model", ".jinja", ".txt", ".py")
        ours = ("args.json", ".meta.json")
        files = [file for file in path.iterdir() if file.suffix in kinds and not file.name.endswith(ours)]
    return [
        [file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files) if file.is_file()
    ]


def outputs(args):
    """The files that the stage makes."""
    return [path for path in (args.output_path, args.scored_path) if path]


def identify(args, inputs):
    """All that decides the result: flags, this script, the number of ranks, the files that flags name."""
    identity = {name: value for name, value in dataclasses.asdict(args).items() if name not in FREE_FLAGS}
    identity["script"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    identity["ranks"] = int(os.environ["WORLD_SIZE"])
    for flag, names in inputs.items():
        identity[f"files of {flag}"] = [stamp(name.strip().partition("@")[0]) for name in names.split(",")]
    return json.loads(json.dumps(identity))  # as it will be read back


def open_stage(args, identity):
    """The folder for results of this very command; None where its output is there already."""
    made_by, files = {}, None
    with contextlib.suppress(OSError, ValueError, KeyError):
        meta = json.loads(Path(f"{args.output_path}.meta.json").read_text())
        made_by, files = meta["identity"], meta["files"]
    if made_by == identity and files == [stamp(path) for path in outputs(args)]:
        note(f"done   {args.output_path} is complete and made by this command: nothing to do")
        return None
    if os.path.exists(args.output_path):
        changed = [name for name, value in identity.items() if made_by.get(name) != value]
        note(f"notice {args.output_path} will be replaced: other {', '.join(changed) or 'content'}")
    command = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    folder = Path(f"{args.output_path}.partial", command)
    try:
        for path in (folder, *[Path(path).parent for path in outputs(args)]):
            path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        die(f"--output_path {args.output_path} cannot be written: {e.strerror}")
    return folder


def read_results(folder):
    """{key: result} of all that this and earlier starts wrote, on any rank."""
    found = {}
    for path in folder.glob("*.jsonl"):
        for line in path.read_text().split("\n"):
            with contextlib.suppress(ValueError):  # an empty line, or one that a kill cut off
                key, result = json.loads(line)
                found[tuple(key)] = result
    return found


def write_results(path, results, n_total):
    """Appends each (key, result) that an engine yields to a file."""
    quiet = os.environ["RANK"] != "0" or not sys.stdout.isatty()
    with open(path, "a") as file:
        file.write("\n")  # a line that a kill cut off becomes a line of its own
        for key, result in tqdm(results, "infer", n_total, file=sys.stdout, mininterval=2, disable=quiet):
            file.write(json.dumps([key, result]) + "\n")
            file.flush()


def run_stage(items, folder, tokenizer, rewards, args, device):
    """Runs the engines on this rank's share of the work, less what is done."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    done = read_results(folder)

    def run(batches, engine, *options):
        """All ranks plan alike, whatever is done: a batch that lacks a result is repeated as it was."""
        mine = batches[rank::world_size]
        todo = [batch for batch in mine if not all(item.key in done for item in batch)]
        if len(todo) < len(mine):
            note(f"resume {len(mine) - len(todo):,} of {len(mine):,} batches were done before")
        if todo:
            n_total = sum(len(batch) for batch in todo)
            write_results(folder / f"{rank}.jsonl", engine(todo, *options), n_total)

    for name, (_, path) in rewards.items():  # before the model, as they fork
        if path:
            run([[item] for item in items if item.key[1] == name], call_rewards, path, name, args)
    scored = [item for item in items if item.key[1] == "model"]
    if args.eval_task == "generate_vllm":
        run([[item] for item in items], generate_vllm, tokenizer, args)
    elif args.eval_task == "generate":
        run(sampling_batches(items, args), generate, tokenizer, args, device)
    elif scored:
        engine = score if args.eval_task == "rm" else measure
        run(scoring_batches(scored, args), engine, args, device)


def merge(rows, found, rewards, args):
    """The rows with what was found."""
    if args.eval_task == "logps":
        nothing = {"logps": None, "tokens": None}
        return [row | found.get((i, "model"), nothing) for i, row in enumerate(rows)]
    merged = []
    for i, row in enumerate(rows):
        values = {name: found.get((i, name), {}).get("value") for name in rewards}
        total = None
        if None not in values.values():
            total = sum(rewards[name][0] * value for name, value in values.items())
        merged.append(row | {"reward": total} | ({"rewards": values} if len(values) > 1 else {}))
    return merged


def write_atomic(path, lines):
    """Writes beside and renames: the file is there as a whole or not at all."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        file.writelines(lines)
    os.replace(f"{path}.tmp", path)


def write_outputs(rows, keys, found, identity, args):
    """Writes the outputs and, behind them, what made them; then the parts go."""
    errors = collections.Counter(result["error"] for result in found.values() if "error" in result)
    for error, n in errors.most_common(5):
        note(f"notice --reward_fn: {n:,} calls gave no reward: {error}")
    selected = POST_PROCESSORS[args.post_processor](rows, keys, args) if args.post_processor else rows
    for path, result in zip(outputs(args), (selected, rows)):
        write_atomic(path, (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in result))
    summary = {"rows": len(rows), "selected": len(selected)}
    if args.eval_task == "rm":
        summary["without_reward"] = sum(row["reward"] is None for row in rows)
        summary["reward_mean"], summary["reward_std"] = reward_statistics(rows)
    meta = {"identity": identity, "files": [stamp(path) for path in outputs(args)], "summary": summary}
    write_atomic(f"{args.output_path}.meta.json", json.dumps(meta, indent=1))
    shutil.rmtree(f"{args.output_path}.partial")
    numbers = [f"{name} {value:.4g}" for name, value in summary.items() if value is not None]
    note(f"saved  {args.output_path}  {'  '.join(numbers)}")


# --- post-processors: what becomes of scored rows


def reward_statistics(rows):
    """(mean, standard deviation) of the rewards there are; None if there are none."""
    rewards = [row["reward"] for row in rows if row["reward"] is not None]
    if len(set(rewards)) < 2:  # np.std of equal numbers is not always 0
        return (rewards[0], 0.0) if rewards else (None, None)
    return float(np.mean(rewards)), float(np.std(rewards))


def by_prompt(rows, keys):
    """The rows that have a reward, grouped by id and prompt; a group may be empty."""
    groups = collections.defaultdict(list)
    for row in rows:
        prompt = read_pair(row, keys)[0]
        if keys[1] is None and isinstance(prompt, list) and row["reward"] is not None:
            prompt = row_texts(row, keys, chat=False)[0]  # a conversation without its answer
        group = groups[json.dumps([row.get("id"), prompt], default=str)]
        if row["reward"] is not None:
            group.append(row)
    return list(groups.values())


def best_samples(rows, keys, args):
    """Rejection sampling: of each prompt the rs_top_k rows of highest reward; the first wins ties."""
    groups = by_prompt(rows, keys)
    kept, n_prompts = [], 0
    for group in groups:
        rewards = {row["reward"] for row in group}
        if args.drop_all_equal and len(group) > 1 and len(rewards) == 1:
            continue
        best = sorted(group, key=lambda row: -row["reward"])[: args.rs_top_k]
        if args.min_reward is not None:
            best = [row for row in best if row["reward"] >= args.min_reward]
        kept += best
        n_prompts += bool(best)
    note(f"best   {len(kept):,} of {len(rows):,} rows, {n_prompts:,} of {len(groups):,} prompts")
    return kept


def best_and_worst(rows, keys, args):
    """Iterative DPO: of each prompt the rows of highest and lowest reward, as a pair for dpo.py.

    No pair without two different responses, or where their rewards are as close as --min_margin.
    """
    response_key = keys[1]
    if response_key is None:
        die("--post_processor iter_dpo needs a column of responses, not whole conversations")
    groups, pairs = by_prompt(rows, keys), []
    for group in filter(None, groups):
        best = max(group, key=lambda row: row["reward"])
        worst = min(group, key=lambda row: row["reward"])
        margin = best["reward"] - worst["reward"]
        if best[response_key] == worst[response_key] or margin <= args.min_margin:
            continue
        pair = {"id": best.get("id"), "prompt": read_pair(best, keys)[0]}
        for side, row in (("chosen", best), ("rejected", worst)):
            pair |= {side: row[response_key], f"{side}_reward": row["reward"]}
            pair[f"{side}_finish_reason"] = row.get("finish_reason")
        pairs.append(pair)
    note(f"pairs  {len(pairs):,} of {len(groups):,} prompts; the others lack rewards that differ")
    return pairs


def condition_row(row, keys, mean, std, args):
    """A row of conditional SFT."""
    if row["reward"] is None:
        raise ValueError("no reward")
    reason = row.get("finish_reason")
    if reason == "length" and row.get("messages"):
        raise ValueError("the answer was cut, but a chat template would end it")
    prompt, response = row_texts(row, keys, args.apply_chat_template or reason is not None)
    reward = (row["reward"] - mean) / (std or 1.0)
    kept = {name: row[name] for name in ("id", "sample", "finish_reason", "reward") if name in row}
    if isinstance(prompt, list):
        return kept | {"input": conditioned(prompt, reward, args), "output": response["content"]}
    user = row.get("prompt", prompt) if reason else prompt  # --input_template stands around it
    if prompt.count(user) != 1:
        raise ValueError("--input_template holds the prompt's own words")
    return kept | {"input": prompt.replace(user, conditioned(user, reward, args)), "output": response}


def conditional_rows(rows, keys, args):
    """Conditional SFT (arXiv:2308.12050): each response, with its reward in the prompt, as a row for sft.py.

    Plain prompts stay text; conversations stay messages, which sft.py renders.
    """
    mean, std = reward_statistics(rows) if args.normalize_reward else (0.0, 1.0)
    made, reasons = [], collections.Counter()
    for row in rows:
        try:
            made.append(condition_row(row, keys, mean, std, args))
        except ROW_ERRORS as e:
            reasons[str(e)] += 1
    lost = "".join(f", {n:,} left out: {reason}" for reason, n in reasons.items())
    note(f"csft   {len(made):,} of {len(rows):,} rows{lost}")
    return made


POST_PROCESSORS = {"rs": best_samples, "iter_dpo": best_and_worst, "csft": conditional_rows}


# --- main


def find_device(args):
    """The device of this process. No GPU is touched before a model goes there: reward workers are forked."""
    world_size = os.environ["WORLD_SIZE"]
    local_size = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(local_size)))
    if not torch.cuda.is_available():
        if Path("/proc/driver/nvidia/version").exists():
            die(f"torch {torch.__version__} cannot use the NVIDIA driver: update it, or take another torch")
        if world_size != "1":
            note(f"notice no GPU is there: {world_size} ranks on the CPU")
        return "cpu"
    local_rank = int(os.environ.get("LOCAL_RANK", max(args.local_rank, 0)))
    n_gpus = local_rank + 1
    if args.eval_task == "generate_vllm":
        n_gpus = args.tp_size * (1 if "ENGINE_FOLDER" in os.environ else args.dp_size)
    if n_gpus > torch.cuda.device_count():
        die(f"{n_gpus} GPUs are asked for, {torch.cuda.device_count()} are there")
    return f"cuda:{local_rank}"


def check_command(args):
    """Stops at an output that is a folder or an input, a missing vLLM, and vLLM on several ranks."""
    inputs = [os.path.realpath(name.strip()) for name in args.dataset.split(",")]
    for path in outputs(args):
        if os.path.isdir(path) or os.path.realpath(path) in inputs:
            die(f"{path} cannot be written: it is a folder, or our input")
    if args.eval_task == "generate_vllm" and importlib.util.find_spec("vllm") is None:
        die("vLLM is missing: pip install -r requirements-vllm.txt, or use --eval_task generate")
    if args.eval_task == "generate_vllm" and os.environ["WORLD_SIZE"] != "1":
        die("generate_vllm is one process: start it with python; --dp_size and --tp_size use more GPUs")


def main(args):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        os.environ.setdefault(name, value)
    device = find_device(args)
    is_engine = "ENGINE_FOLDER" in os.environ  # one of several, which run_engines started
    if not is_engine:
        check_command(args)
    rewards = parse_rewards(args) if args.eval_task == "rm" else {}
    rows = load_rows(args)
    tokenizer = config = None
    if args.pretrain:
        tokenizer = load_tokenizer(args.pretrain, args)
        config = model_config(args.pretrain, args)
    if args.eval_task in ("rm", "logps"):
        keys, items = scoring_items(rows, tokenizer, config, rewards, args)
    else:
        keys, items = sampling_items(rows, tokenizer, config, args)
    if is_engine:
        return run_stage(items, Path(os.environ["ENGINE_FOLDER"]), tokenizer, rewards, args, device)
    inputs = {"pretrain": args.pretrain, "dataset": args.dataset}
    inputs |= {name: path for name, (_, path) in rewards.items() if path}
    identity = identify(args, inputs)
    folder = open_stage(args, identity)
    if folder is None:
        return
    if args.eval_task == "generate_vllm" and args.dp_size > 1:
        run_engines(folder, args)
    else:
        run_stage(items, folder, tokenizer, rewards, args, device)
    if os.environ["WORLD_SIZE"] != "1":
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))
        dist.barrier()
    if os.environ["RANK"] == "0":
        found = read_results(folder)
        if args.eval_task in ("rm", "logps"):
            rows = merge(rows, found, rewards, args)
        else:
            rows = [item.row | found[item.key] for item in items]
        write_outputs(rows, keys, found, identity, args)


if __name__ == "__mp_main__":  # a process of vLLM's
    die_with_parent()

if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, use_underscores=True))

"""Kahneman-Tversky optimisation (KTO) in one file: preferences without pairs, each response good or bad.

With r(y) = sum_t log pi(y_t) - log ref(y_t), the loss is the mean over the rows of an optimiser step of
    desirable    w_D (1 - sigmoid(beta (r(y) - z0)))    Eq. 7 of arXiv:2402.01306; w_D, w_U: its lambdas
    undesirable  w_U (1 - sigmoid(beta (z0 - r(y))))
    z0 = max(0, mean over the rows of r(y'))            y': the response of another row; no gradient
Eq. 8 wants w_D n_D / (w_U n_U) between 1 and 4/3; how many rows are desirable is printed.

Deviations from the usual trainer, beside those of sft.py (exact under any split of a step, no padding):
 1. z0 is one number per optimiser step, over its whole batch on all ranks. It costs a forward pass.
 2. y' is that of the next row with another prompt, in an order that --seed fixes once.
 3. The reference's log-probs, of y' too, are computed before the policy is loaded, and kept in --cache_dir.

A data row, one of (other columns: --input_key, --output_key, --label_key; a pair counts as two rows):
    {"prompt": "2+2?", "completion": "4", "label": true}     text or messages; label: true, 1, "True", ...
    {"prompt": "2+2?", "chosen": "4", "rejected": "5"}       and the other forms that dpo.py reads

Commands:
    python kto.py --pretrain MODEL --dataset rows.jsonl --save_path runs/kto           # one GPU, or a CPU
    deepspeed --num_gpus 8 kto.py --pretrain MODEL --dataset rows.jsonl --zero_stage 3 --packing_samples
"""

import datetime
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import time
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # every pack has another size
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")  # a CPU would keep kernels of 1,024 sizes
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # rows are encoded by several processes instead
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", str(not sys.stderr.isatty()))  # none in logs

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch.nn.attention import varlen  # FlashAttention
from torch.utils.checkpoint import checkpoint

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # read at import
import datasets
import deepspeed
import peft
import transformers


@dataclass
class Args:
    pretrain: str  # the model: a Hugging Face folder or hub name
    bf16: bool = True  # bf16 weights, in training with fp32 master weights; --no-bf16: fp32
    flash_attn: bool = False  # accepted for old commands: on a GPU FlashAttention runs wherever it can
    gradient_checkpointing: bool = False  # recompute activations: less memory, up to a third more time
    lora_rank: int = 0  # rank of LoRA adapters on all linear layers; 0 = full fine-tuning
    lora_alpha: int = 16  # LoRA scale: adapters are multiplied by lora_alpha / lora_rank
    lora_dropout: float = 0.0  # dropout before the adapters, drawn in each pass; all other dropout is off
    tokenizer_chat_template: str | None = None  # Jinja text or its file, in place of the model's own template

    dataset: str = tyro.MISSING  # comma list: jsonl, json, csv, parquet or arrow, a folder, a hub NAME@SUBSET
    dataset_probs: str | None = None  # comma list: the share of all rows that each dataset gets
    dataset_split: str = "train"  # split of --dataset, where it has splits
    max_samples: int = 100_000_000  # use the first this many rows of each dataset
    max_len: int = 2048  # tokens of prompt + response; longer ones are cut, dropped if the prompt fills it
    max_drop_ratio: float = 0.05  # stop when more than this share of the rows cannot be used
    num_proc: int = len(os.sched_getaffinity(0))  # processes that encode rows
    cache_dir: str = os.path.expanduser("~/.cache/flatalign")  # encoded rows; may be deleted
    input_key: str | None = None  # column of the prompt, text or messages; default: a known one
    output_key: str | None = None  # column of the response; without it, input_key holds conversations
    label_key: str = "label"  # column that says whether the response is good: true, 1, false or 0
    input_template: str | None = None  # format of a plain text prompt, such as "User: {}\nAssistant: "
    apply_chat_template: bool = False  # wrap plain text as a user and an assistant turn of the chat template

    beta: float = 0.1  # how closely the policy keeps to the reference
    desirable_loss_weight: float = 1.0  # weight of desirable rows (lambda_D)
    undesirable_loss_weight: float = 1.0  # weight of undesirable rows (lambda_U)
    ref_pretrain: str | None = None  # the reference model; default: the start policy (--pretrain)
    ref_offload: bool = False  # with --zero_stage 3: keep the reference's weights in CPU memory

    learning_rate: float = 5e-7  # peak learning rate of AdamW
    # decay of the learning rate after the warm-up
    lr_scheduler: Literal["constant", "linear", "cosine", "cosine_with_min_lr"] = "cosine_with_min_lr"
    lr_warmup_ratio: float = 0.03  # share of all steps with linear warm-up
    min_lr_ratio: float = 0.1  # final learning rate of cosine_with_min_lr, relative to the peak
    l2: float = 0.0  # decoupled weight decay of AdamW
    adam_betas: tuple[float, float] = (0.9, 0.95)  # beta1 and beta2 of AdamW
    max_norm: float = 1.0  # clip the global gradient norm to this; 0 = no clipping
    max_epochs: int = 1  # passes over the data
    max_steps: int = 100_000_000  # end after this many optimiser steps, the schedule as well
    seed: int = 42  # of everything random: data order, LoRA's start and dropout
    train_batch_size: int = 128  # examples per optimiser step, over all ranks
    micro_train_batch_size: int = 8  # most examples per pass and rank; changes no result, lora_dropout aside
    packing_samples: bool = False  # fill passes to micro_train_batch_size x max_len tokens (pairs: twice)
    zero_stage: Literal[0, 1, 2, 3] = 2  # sharded: 0 and 1 optimiser state, 2 gradients too, 3 weights too
    adam_offload: bool = False  # keep optimiser state and master weights in CPU memory

    eval_dataset: str | None = None  # held-out rows, given as --dataset; no evaluation without it
    eval_split: str = "test"  # split of --eval_dataset, where it has splits
    eval_steps: int = -1  # evaluate every this many steps, -1 = each epoch; always at the start and the end
    logging_steps: int = 1  # log every this many steps
    use_wandb: str | None = None  # log to Weights & Biases: a key, or any word with WANDB_API_KEY set
    save_path: str = "./ckpt"  # the trained model, in Hugging Face form, with args.json and metrics.jsonl
    save_steps: int = -1  # write a checkpoint every this many steps; the same command resumes from it
    ckpt_path: str | None = None  # a folder for checkpoints, removed at the end; default: beside save_path
    max_ckpt_num: int = 3  # keep this many checkpoints
    load_checkpoint: bool = False  # accepted for old commands: resuming is automatic
    local_rank: int = -1  # the deepspeed launcher gives it; what is read is LOCAL_RANK

    def __post_init__(self):
        if os.path.isfile(self.tokenizer_chat_template or ""):
            self.tokenizer_chat_template = Path(self.tokenizer_chat_template).read_text()
        self.save_path = os.path.realpath(self.save_path)  # of a link, the folder that it names
        own = f"{self.save_path}.ckpt"  # of this run alone: it is removed at the end
        self.ckpt_path = os.path.join(self.ckpt_path, own.replace("/", "_")) if self.ckpt_path else own


# A run may be resumed with other values of these flags; every other flag belongs to its identity.
FREE_FLAGS = """save_path save_steps ckpt_path max_ckpt_num logging_steps use_wandb eval_dataset eval_split
    eval_steps cache_dir num_proc max_drop_ratio ref_offload flash_attn load_checkpoint local_rank""".split()
FEATURES = datasets.Features(  # the columns of an encoded row
    input_ids=datasets.List(datasets.Value("int32")),
    trained=datasets.List(datasets.Value("bool")),  # is the token part of the loss?
    desirable=datasets.Value("bool"),
    prompt_hash=datasets.Value("int64"),  # the same for rows with the same prompt
    length=datasets.Value("int32"),  # tokens fed
    where=datasets.Value("string"),  # file:row
    reason=datasets.Value("string"),  # why the row cannot be used, or null
)
HARMLESS = ("blank line",)  # reasons that --max_drop_ratio does not count


# --- rows and tokens


def note(message):
    """One line on the console of rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


def die(message):
    """Ends the program with one line on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def open_rows(name, split, cache_dir=None):
    """Rows of one dataset, by number: a local file or folder, or a hub name (NAME@SUBSET)."""
    path, _, subset = name.partition("@")
    kind = Path(path).suffix[1:]
    try:
        if kind == "jsonl":
            # As text: the library's reader of JSON guesses types (dates) and fails on mixed columns.
            return datasets.load_dataset("text", data_files=path, split="train", cache_dir=cache_dir)["text"]
        if kind == "json":
            return list(json.loads(Path(path).read_bytes()))
        if kind in ("csv", "parquet", "arrow"):
            return datasets.load_dataset(kind, data_files=path, split="train", cache_dir=cache_dir)
        return datasets.load_dataset(path, subset or None, split=split, cache_dir=cache_dir)
    except Exception as e:  # of many types; the message names the cause
        die(f"dataset {name!r} has no rows that can be read: {e.__cause__ or e}"[:400])


def load_tokenizer(path, args):
    """The tokenizer of a model, with --tokenizer_chat_template in place."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as e:
        die(f"{path!r} is neither a model folder with a tokenizer nor a known hub name: {str(e)[:200]!r}")
    tokenizer.chat_template = args.tokenizer_chat_template or tokenizer.chat_template
    return tokenizer


def as_messages(value, role):
    """value as [{"role", "content"}]: text or a number, said by role, or messages."""
    messages = []
    for turn in value if isinstance(value, list) else [{"role": role, "content": value}]:
        turn = {key: x for key, x in turn.items() if x is not None}  # Arrow adds None
        if "role" not in turn or not isinstance(turn.get("content"), (str, int, float)):
            raise ValueError("neither text nor messages with role and content")
        messages.append(turn | {"content": str(turn["content"])})
    return messages


def encode(prompt, response, tokenizer, args, finish_reason=None, multiturn=False):
    """(input_ids, trained), int32 and bool [T], of a prompt and its response, each text or messages."""
    sampled = finish_reason is not None  # by batch_infer.py, whose prompt holds template and BOS already
    listed = isinstance(prompt, list) or isinstance(response, list)  # messages, perhaps of sampled rows
    plain = not listed and (sampled or not args.apply_chat_template)  # no chat template: texts are joined
    messages = as_messages(prompt, "user") + as_messages(response, "assistant")
    if plain and prompt and not sampled and "{}" in (args.input_template or ""):
        template = args.input_template.replace("\\n", "\n")  # a shell leaves two characters
        messages[0]["content"] = template.replace("{}", messages[0]["content"])
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    last = max(turns, default=0)  # turns behind it are left out; 0: no answer to a prompt
    if last == 0 or not (sampled or messages[last]["content"].strip()):  # a policy may end at once
        raise ValueError("no assistant turn after a prompt, or an empty response")

    def render(n, ask=False):  # the text of n messages, and of what asks for the next
        if plain:
            return "".join(message["content"] for message in messages[:n])
        text = tokenizer.apply_chat_template(messages[:n], tokenize=False, add_generation_prompt=ask)
        return text if ask else text.rstrip()  # many write a newline behind a turn, which is not trained

    text = render(last + 1)
    adds_bos = plain and not sampled and not text.startswith(tokenizer.bos_token or "\0")  # else it is there
    encoded = tokenizer(text, add_special_tokens=adds_bos, return_offsets_mapping=True)
    ends = np.trim_zeros(np.array(encoded["offset_mapping"])[:, 1], "b")  # some tokenizers add EOS behind
    ids = np.array(encoded["input_ids"][: len(ends)], dtype=np.int32)
    trained = np.zeros(len(ids), dtype=bool)
    for i in turns if multiturn else [last]:
        question = render(i, ask=True)  # ends with what asks for an answer, "<|assistant|>": not trained
        asked = os.path.commonprefix([text, question])  # it may also add what no turn has, "<think>"
        before = os.path.commonprefix([render(i), question])  # without what asks for an answer
        answered = render(i + 1)
        if not text.startswith(before) or not text.startswith(answered):
            raise ValueError("the chat template rewrites earlier turns")  # thoughts, in reasoning models
        trained |= (ends > len(asked)) & (ends <= len(answered))  # tokens that end in the answer
    closed = trained[-1] and tokenizer.decode(ids[-1]) != tokenizer.decode(ids[-1], skip_special_tokens=True)
    if not closed and finish_reason in (None, "stop"):  # a response that was cut gets no EOS
        ids, trained = np.append(ids, np.int32(tokenizer.eos_token_id)), np.append(trained, True)
    trained[0] = False  # nothing predicts the first token
    if not trained[: args.max_len].any():
        raise ValueError("nothing to train within max_len")
    return ids[: args.max_len], trained[: args.max_len]


def encode_response(row, prompt_key, response_key, tokenizer, args):
    """As encode, of two columns; conversations, and text as in hh-rlhf, have their prompt in the response."""
    if response_key not in row:
        raise ValueError(f"no column {response_key} (a flag *_key names another) but {', '.join(row)}")
    finish_reason = row.get(f"{response_key}_finish_reason", row.get("finish_reason"))
    sampled = {"input", "finish_reason"} <= set(row)  # its prompt column is the text before the template
    known = ("input",) if sampled else ("prompt", "question", "instruction", "input")
    prompt_key = prompt_key or next((key for key in known if key in row), None)
    prompt, response = row.get(prompt_key), row[response_key]
    if isinstance(response, list) and as_messages(response, "assistant")[0]["role"] != "assistant":
        prompt = []
    elif prompt is None or prompt_key == response_key:
        head, mark, response = str(response).rpartition("\n\nAssistant:")
        if not mark or args.apply_chat_template:  # such text has no turns to render
            raise ValueError(f"no prompt among {', '.join(row)}")
        prompt = head + mark
    elif prompt_key == "instruction" and row.get("input"):  # Alpaca's rows
        prompt = f"{prompt}\n\n{row['input']}"
    return encode(prompt, response, tokenizer, args, finish_reason)


def encode_labelled(row, tokenizer, args):
    """The examples of a row, a pair has two: the columns of FEATURES that depend on the algorithm."""
    known = ("chosen", args.input_key, "completion", "output", "response", "messages")
    response_key = args.output_key or next((key for key in known if key in row), "completion")
    sides = {"chosen": True, "rejected": False}
    if response_key != "chosen":
        label = str(row.get(args.label_key)).lower().removesuffix(".0")
        if label not in ("true", "1", "false", "0"):
            raise ValueError("its label is none of true, 1, false, 0 (--label_key)")
        sides = {response_key: label in ("true", "1")}
    examples = []
    for key, desirable in sides.items():
        ids, trained = encode_response(row, args.input_key, key, tokenizer, args)
        hashed = zlib.crc32(ids[~trained].tobytes())
        examples.append({"input_ids": ids, "trained": trained, "desirable": desirable, "prompt_hash": hashed})
    return examples


def encode_rows(spans, encode_row, tokenizer, args):
    """Yields the examples of the rows in spans: (dataset, its rows, numbers of some). Never raises."""
    for name, rows, numbers in spans:
        for i in numbers:
            where = {"where": f"{name}:{i + 1}"}
            try:
                row = rows[i]
                if row == "":
                    raise ValueError("blank line")
                row = json.loads(row) if isinstance(row, str) else row
                for example in encode_row(row, tokenizer, args):
                    yield example | where | {"length": len(example["input_ids"])}
            except Exception as e:  # of many types: a chat template may raise anything
                reason = str(e) if isinstance(e, ValueError) else repr(e)
                yield where | {"reason": reason.partition("\n")[0][:200]}


def stamp(name):
    """[file, size, mtime] of all files of a local model or dataset: tells it apart without reading it."""
    path = Path(name if os.path.exists(name) else name.partition("@")[0])
    files = [path, *path.rglob("*")]
    if (path / "config.json").exists():  # a model; a log or samples may lie beside it
        kinds = (".safetensors", ".bin", "config.json", "tokenizer.json", ".model", ".jinja")
        files = [file for file in path.iterdir() if file.name.endswith(kinds)]
    files = sorted(file for file in files if file.is_file())
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def load_examples(names, probs, split, encode_row, tokenizer, args):
    """A table of the examples of a comma list of datasets, encoded once per node or found again."""
    config = transformers.AutoConfig.from_pretrained(args.pretrain)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or args.max_len
    if args.max_len > limit:
        die(f"--max_len {args.max_len}: use --max_len {limit} or raise max_position_embeddings (config.json)")
    paths = [name.strip() for name in names.split(",")]
    tables = [open_rows(path, split, args.cache_dir) for path in paths]
    sizes = [min(len(rows), args.max_samples) for rows in tables]
    shares = [round(float(prob) * sum(sizes)) for prob in probs.split(",")] if probs else sizes
    n = sum(shares)
    spans = []  # to be dealt to processes
    for path, rows, size, share in zip(paths, tables, sizes, shares, strict=True):
        numbers = np.resize(np.arange(size), share)  # where they are too few, from the first again
        spans += [(path, rows, part) for part in np.array_split(numbers, share // 256 + 1)]
    # All that decides an example: the code down to the packing, the flags it mentions, and what they name.
    code = Path(__file__).read_text().partition("\n# --- rows")[2].partition("\n# --- packing")[0]
    flags = [flag for flag in vars(args) if f"args.{flag}" in code and flag not in ["pretrain", *FREE_FLAGS]]
    decides = [code, str(FEATURES), names, probs, split, *(getattr(args, flag) for flag in flags)]
    decides += [[stamp(path), getattr(rows, "_fingerprint", None)] for path, rows in zip(paths, tables)]
    decides += [tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map, tokenizer.chat_template]
    table = datasets.Dataset.from_generator(
        lambda spans: encode_rows(spans, encode_row, tokenizer, args),
        features=FEATURES,
        cache_dir=f"{args.cache_dir}/rows",
        gen_kwargs={"spans": spans},
        num_proc=args.num_proc if n >= 2000 else 1,  # fewer rows do not pay for a process
        fingerprint=datasets.fingerprint.Hasher.hash(decides),
    )
    usable = table.data["reason"].is_null().to_numpy()
    dropped = table.select(np.flatnonzero(~usable)).to_pandas()
    for reason, where in dropped.groupby("reason")["where"]:
        note(f"dropped {len(where):,} of {n:,} rows: {reason}; the first: {where.iloc[0]}")
    n_faulty = (~dropped["reason"].isin(HARMLESS)).sum()
    if n_faulty > args.max_drop_ratio * n or not usable.any():
        why = f"{dropped['where'][0]}: {dropped['reason'][0]}"
        die(f"{len(dropped):,} of {n:,} rows cannot be used (--max_drop_ratio {args.max_drop_ratio}); {why}")
    table = table.select(np.flatnonzero(usable)).with_format("numpy")
    note(f"data   {names}: {n:,} rows, {len(table):,} examples, {table['length'][:].sum():,} tokens")
    return table


# --- packing, attention, log-probabilities, the step


def split_step(lengths, args, n_responses=1):
    """Deals examples over passes and ranks, longest first. Returns this rank's passes: (indices, weight)."""
    limit = args.micro_train_batch_size * (args.max_len * n_responses if args.packing_samples else 1)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    lengths = np.array(lengths)
    order = np.argsort(-lengths, kind="stable")
    sizes = lengths if args.packing_samples else np.ones_like(lengths)
    n = world_size  # passes over all ranks; pass i has order[i], order[i + n], ...: the first is the fullest
    while len(order) > n and sizes[order[::n]].sum() > limit:
        n += world_size
    mine = [order[i::n] for i in range(rank, n, world_size)]
    # A pass is a collective, so all ranks have as many: where examples are too few, one stands in.
    return [(members, 1.0) if len(members) else (order[-1:], 0.0) for members in mine]


def to_device(array, device):
    """A tensor on the device; from pinned memory, as any other copy would wait for the GPU."""
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def pack_rows(examples, device):
    """Lays examples end to end in one row of T tokens, without padding; N of them are trained."""
    lengths = [len(example["input_ids"]) for example in examples]
    input_ids = np.concatenate([example["input_ids"] for example in examples])
    trained = np.flatnonzero(np.concatenate([example["trained"] for example in examples]))
    bounds = np.cumsum([0, *lengths], dtype=np.int32)
    return {
        "input_ids": to_device(input_ids[None], device),  # [1, T]
        "position_ids": to_device(np.concatenate([np.arange(n) for n in lengths])[None], device),  # [1, T]
        "segments": {"lengths": lengths, "bounds": to_device(bounds, device)},
        "positions": to_device(trained - 1, device),  # [N]: of the hidden states that predict the targets
        "targets": to_device(input_ids[trained], device),  # [N]
    }


def packed_attention(module, query, key, value, attention_mask, segments=None, scaling=None, **options):
    """Attention within each example of a pack: query [1, heads, T, dim] -> ([1, T, heads, dim], None)."""
    window = options.pop("sliding_window", None)
    harmless = ("dropout", "position_ids", "use_cache", "is_causal", "cache_position", "output_attentions")
    unknown = [name for name, given in options.items() if given is not None and name not in harmless]
    if unknown or attention_mask is not None:
        die(f"{type(module).__name__} is not supported: its attention needs {unknown or 'a mask'}")
    lengths, bounds = segments["lengths"], segments["bounds"]
    size = query.shape[3]
    if query.is_cuda and query.dtype != torch.float32 and size <= 256 and size % 8 == 0:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, dim]
        v = F.pad(v, (0, size - v.shape[2]))  # it takes one head size only
        options = {"scale": scaling, "window_size": ((window or 0) - 1, 0), "enable_gqa": True}  # -1: all
        out = varlen.varlen_attn(q, k, v, bounds, bounds, max(lengths), max(lengths), **options)
        return out[None, :, :, : value.shape[3]], None
    outs = []
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2)):
        n = q.shape[2]
        mask = None
        if window:  # so many positions are seen, the own one included
            mask = torch.ones(n, n, dtype=torch.bool, device=q.device).tril().triu(1 - window)
        options = {"is_causal": mask is None, "scale": scaling, "enable_gqa": True}
        outs.append(F.scaled_dot_product_attention(q, k, v, mask, **options))
    return torch.cat(outs, 2).transpose(1, 2), None


class LogProbs(torch.nn.Module):
    """A causal LM as forward(pack) -> per_token_logps [N], fp32 nats, one per trained token of the pack."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        config = model.config.get_text_config()
        self.scale = getattr(config, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1.0)
        self.softcap = getattr(config, "final_logit_softcapping", None)
        for p in model.get_output_embeddings().parameters():
            deepspeed.zero.register_external_parameter(self, p)  # ZeRO-3: gathered per pass, not per chunk

    def chunk_logps(self, head, hidden, targets):
        """hidden [C, H], targets [C] -> log-probs [C]; some models scale or cap their logits."""
        logits = F.linear(hidden * self.scale, head.weight, head.bias).float()  # [C, V]
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return -F.cross_entropy(logits, targets, reduction="none")

    def forward(self, pack):
        inputs = {name: pack[name] for name in ("input_ids", "position_ids", "segments")}
        outputs = self.model.base_model(**inputs, use_cache=False)
        hidden = outputs.last_hidden_state[0, pack["positions"]]  # [N, H]
        head = self.model.get_output_embeddings()
        budget = 2**26  # bytes of a chunk's logits
        if hidden.is_cuda:
            budget = torch.cuda.get_device_properties(hidden.device).total_memory // 128
        rows = max(16, budget // (4 * head.weight.shape[0]))
        # A chunk's logits are computed again in the backward pass: nothing of size N x V is ever kept.
        chunks = zip(hidden.split(rows), pack["targets"].split(rows))
        parts = [checkpoint(self.chunk_logps, head, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.cat(parts)


def response_logps(engine, examples):
    """Log-probs [B] of the responses: sums, in nats."""
    per_token_logps = engine(pack_rows(examples, engine.device)).double()  # r is a small difference of sums
    sizes = [int(example["trained"].sum()) for example in examples]
    return torch.stack([part.sum() for part in per_token_logps.split(sizes)])


def choose_partners(prompts, seed):
    """[N], for each row the next one with another prompt, in a random order that the seed fixes."""
    order = np.random.default_rng(seed).permutation(len(prompts))
    following = np.roll(order, -1)
    places = np.argsort(order)  # of each row in the order
    changes = np.flatnonzero(prompts[order] != prompts[following])  # places before another prompt
    if len(changes):  # else all prompts are the same
        next_change = np.searchsorted(changes, places)
        places = changes[next_change % len(changes)]  # behind the last one the first
    return following[places]


def fetch_rows(table, indices, partners, args):
    """(examples of the rows, examples of their prompts with the partners' responses)."""
    examples = table.__getitems__(indices)
    mismatched = []
    for example, partner in zip(examples, table.__getitems__(partners[indices])):
        prompt = example["input_ids"][~example["trained"]]
        response = partner["input_ids"][partner["trained"]]
        ids = np.append(prompt, response)[: args.max_len]
        mismatched.append({"input_ids": ids, "trained": np.arange(len(ids)) >= len(prompt)})
    return examples, mismatched


def reference_rows(table, args):
    """(partners [N], log-probs [N, 2] of own and partners' responses under the reference: kept on disk)."""
    partners = choose_partners(table["prompt_hash"][:], args.seed)
    path = args.ref_pretrain or args.pretrain
    code = Path(__file__).read_text().partition("\n# --- rows")[2].partition("\ndef kto_loss")[0]
    decides = [table._fingerprint, code, path, stamp(path), args.bf16, args.seed]
    key = datasets.fingerprint.Hasher.hash(decides)
    file = Path(args.cache_dir, f"logps-{key}.npy")
    found = [file.exists()]
    dist.broadcast_object_list(found)
    if not found[0]:
        engine = start_frozen(path, args, args.ref_offload, LogProbs)
        check_attention(engine, args)
        logps = torch.zeros(len(table), 2, dtype=torch.float64, device=engine.device)  # 16 bytes for a row
        passes = split_step(table["length"][:], args)
        for members, weight in datasets.utils.tqdm(passes, "reference", disable=dist.get_rank() > 0):
            for column, batch in enumerate(fetch_rows(table, members, partners, args)):
                logps[to_device(members, engine.device), column] += weight * response_logps(engine, batch)
        dist.all_reduce(logps)  # those of other ranks are 0
        for p in engine.parameters():  # DeepSpeed keeps a ZeRO-3 model alive: at least not its weights
            getattr(p, "ds_tensor", p).data = torch.empty(0, device=engine.device)
        if dist.get_rank() == 0:
            partial = f"{file}.{os.urandom(4).hex()}.npy"  # another run may write the same
            np.save(partial, logps.cpu().numpy())
            os.replace(partial, file)
        dist.barrier()
    return partners, np.load(file, mmap_mode="r")


def kto_loss(log_ratios, desirable, kl, args):
    """Loss [B], as at the file's top. log_ratios [B], nats; desirable [B], bool; kl: z0."""
    gains = torch.where(desirable, log_ratios - kl, kl - log_ratios)
    weights = torch.where(desirable, args.desirable_loss_weight, args.undesirable_loss_weight)
    return weights * (1 - torch.sigmoid(args.beta * gains))


def kto_step(engine, examples, mismatched, ref_logps, args, train=True):
    """Forward and backward of one optimiser step; its metrics. ref_logps [B, 2]: of both kinds of rows."""
    device = engine.device
    n = len(examples)
    desirable = np.array([example["desirable"] for example in examples])
    engine.train(train)
    z0 = torch.zeros((), dtype=torch.float64, device=device)
    with torch.no_grad():
        for members, weight in split_step([len(row["input_ids"]) for row in mismatched], args):
            logps = response_logps(engine, [mismatched[j] for j in members])
            log_ratios = logps - to_device(ref_logps[members, 1], device)
            z0 += weight * log_ratios.sum()
    dist.all_reduce(z0)
    z0 = (z0 / n).clamp(min=0)
    found = torch.zeros(n, 3, dtype=torch.float64, device=device)  # of each row: loss, reward, log pi(y)
    passes = split_step([example["length"] for example in examples], args)
    for i, (members, weight) in enumerate(passes):
        engine.set_gradient_accumulation_boundary(i == len(passes) - 1)
        with torch.set_grad_enabled(train):
            logps = response_logps(engine, [examples[j] for j in members])
            log_ratios = logps - to_device(ref_logps[members, 0], device)
            losses = kto_loss(log_ratios, to_device(desirable[members], device), z0, args)
            loss = losses.sum() / n
        if train:
            engine.backward(weight * loss * dist.get_world_size())  # DeepSpeed takes the mean over ranks
        values = torch.stack([losses, args.beta * log_ratios, logps], 1).detach()
        found[to_device(members, device)] += weight * values
    dist.all_reduce(found)  # rows of other ranks are 0
    losses, rewards, logps = found.cpu().numpy().T
    metrics = {"loss": losses.mean(), "kl": z0.item()}
    for kind, group in (("chosen", desirable), ("rejected", ~desirable)):
        if group.any():  # else there is no mean
            metrics[f"rewards/{kind}"] = rewards[group].mean()
            metrics[f"logps/{kind}"] = logps[group].mean()
    if 0 < desirable.sum() < n:
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return metrics


# --- model and engine


def setup():
    """Environment, quiet libraries, threads. Nothing here uses CUDA: what encodes rows is forked."""
    for default in "RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=0".split():
        os.environ.setdefault(*default.split("="))
    deepspeed.utils.logger.setLevel("ERROR")
    warnings.simplefilter("ignore")
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))  # torchrun sets one: too few
    if torch.cuda.is_available():
        if local_size > torch.cuda.device_count():
            die(f"{local_size} processes for {torch.cuda.device_count()} GPUs: start fewer")
    elif Path("/dev/nvidiactl").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        die(f"torch {torch.__version__} cannot use this NVIDIA driver: update it, or take another build")


def deepspeed_config(args):
    """Gradients are added and sent in fp32, so the split of a batch leaves no trace in bf16 either."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # in name: the step says which backward pass is its last
        "gradient_clipping": args.max_norm,
        "bf16": {"enabled": args.bf16},
        "data_types": {"grad_accum_dtype": "fp32", "keep_in_fp32_modules": ["inv_freq"]},
        "communication_data_type": "fp32",
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on CPUs too, uncompiled
        "zero_optimization": {
            "stage": max(1, args.zero_stage),  # with bf16, DeepSpeed's stage 0 takes a hidden optimiser step
            "reduce_bucket_size": 50_000_000,
            "overlap_comm": torch.cuda.is_available(),
            "stage3_param_persistence_threshold": 20_000,  # vectors stay whole on each rank
            "stage3_max_live_parameters": 3_000_000_000,  # a large head alone exceeds the default
            "offload_optimizer": {"device": "cpu" if args.adam_offload else "none"},
        },
    }


def load_model(path, args, config=None):
    """The causal LM with our attention and without dropout; config: DeepSpeed's, where it may be sharded."""
    # While this object lives, ZeRO-3 loads a model in shards, never whole on one rank.
    _sharding = config and transformers.integrations.HfDeepSpeedConfig(config)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="packed")
    for module in model.modules():
        for name in {"p", "dropout", "activation_dropout", "layerdrop"} & vars(module).keys():
            setattr(module, name, 0.0)  # p of nn.Dropout, the others are given to F.dropout
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # sampling settings without do_sample: saving would fail, after the training
        model.generation_config.do_sample = True
    return model


def add_lora(model, args):
    """Puts LoRA adapters, which alone are trained, into all linear layers; returns peft's wrapper."""
    options = {"r": args.lora_rank, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout}
    return peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", **options))


def start_engine(args, total_steps, wrapper):
    """The model to train, wrapped in LogProbs or a class like it, under DeepSpeed: engine(pack)."""
    config = deepspeed_config(args)
    torch.manual_seed(args.seed)
    model = wrapper(load_model(args.pretrain, args, config))
    if args.lora_rank:
        add_lora(model.model, args)
    if args.gradient_checkpointing:
        model.model.gradient_checkpointing_enable({"use_reentrant": False})
    options = {"lr": args.learning_rate, "betas": args.adam_betas, "weight_decay": args.l2, "fused": True}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **options)
    min_lr = {"min_lr_rate": args.min_lr_ratio} if args.lr_scheduler == "cosine_with_min_lr" else None
    warmup = math.ceil(args.lr_warmup_ratio * total_steps)
    kind = args.lr_scheduler.replace("constant", "constant_with_warmup")
    scheduler = transformers.get_scheduler(kind, optimizer, warmup, total_steps + 1, min_lr)
    scheduler.step()  # else the learning rate of step 1 of the warm-up would be 0
    return deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config)[0]


@torch.no_grad()
def check_attention(engine, args):
    """Stops unless a sequence in a pack has the log-probs that the model itself gives to it alone."""
    model = engine.model
    rows = [{"input_ids": np.arange(n, n + 23) * 7 % 32, "trained": np.arange(23) > 4} for n in range(3)]
    found, again = (engine(pack_rows([first, rows[0]], engine.device))[18:] for first in rows[1:])
    alone = pack_rows(rows[:1], engine.device)
    model.set_attn_implementation("eager")
    logits = model(alone["input_ids"]).logits[0, alone["positions"]]
    model.set_attn_implementation("packed")
    expected = -F.cross_entropy(logits.float(), alone["targets"], reduction="none")
    error, leak = (found - expected).abs().mean().item(), (found - again).abs().mean().item()
    if not error < (0.3 if args.bf16 else 1e-4) or leak > 1e-3:  # in bf16 rounding makes up to 0.2
        die(f"{type(model).__name__} is not supported: log-probs are off by {error:.2g}, by leaks {leak:.2g}")


def start_frozen(path, args, offload, wrapper):
    """A model for forward passes only, engine(pack): whole on each rank, under ZeRO-3 sharded over them."""
    config = deepspeed_config(args)
    config["zero_optimization"]["offload_param"] = {"device": "cpu" if offload else "none"}
    model = wrapper(load_model(path, args, config)).requires_grad_(False).eval()
    if args.zero_stage == 3:
        return deepspeed.initialize(model=model, config=config)[0]
    model.device = deepspeed.get_accelerator().current_device_name()  # as DeepSpeed's engines have it
    return model.to(model.device)


# --- files: a folder is written beside and renamed; its last file, args.json, says which run made it


def identify(args):
    """All that decides the result: flags, this script, the number of ranks, the files that flags name."""
    identity = {name: value for name, value in vars(args).items() if name not in FREE_FLAGS}
    identity["script"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    identity["ranks"] = int(os.environ["WORLD_SIZE"])
    for flag in ("pretrain", "dataset", "ref_pretrain", "teacher_model"):  # those that there are
        names = identity.get(flag)
        if names and os.path.realpath(names) != args.save_path:  # else the run will change it
            identity[f"files of {flag}"] = [stamp(name.strip()) for name in names.split(",")]
    return json.loads(json.dumps(identity))  # as it will be read back


def difference(folder, identity):
    """In words, what makes this another run than the one that made the folder; "" if nothing does."""
    path = Path(folder, "args.json")
    if not path.exists():
        return "it has no args.json"
    record = json.loads(path.read_text())
    changed = [key for key, value in identity.items() if record.get(key) != value]
    return f"{', '.join(changed)} changed. If that is harmless, edit {path}" if changed else ""


def publish(args):
    """Moves a finished model, <save_path>.partial, into place; what is no model file there survives."""
    partial, target = Path(f"{args.save_path}.partial"), Path(args.save_path)
    if os.environ["RANK"] != "0" or not (partial / "args.json").exists():
        return
    shutil.rmtree(args.ckpt_path, ignore_errors=True)
    target.mkdir(exist_ok=True)
    old = {*target.glob("*.safetensors*"), *target.glob("pytorch_model*")}
    for path in set(target.iterdir()) - old:
        if not (partial / path.name).exists():
            os.rename(path, partial / path.name)
    shutil.rmtree(target)
    os.rename(partial, target)


def open_run(args, identity):
    """The step to resume from, 0 for none, or None where the model is complete. For rank 0 alone."""
    target, partial = Path(args.save_path), Path(f"{args.save_path}.partial")
    changed = difference(target, identity)
    if not changed:
        note(f"done   {target} is complete and made by this command: nothing to do")
        return None
    if os.path.ismount(target) or target.is_file():
        die(f"--save_path {target} cannot be replaced as a whole: name a folder below it, or another one")
    models = [*target.glob("*config.json"), *target.glob("*.safetensors")]  # of adapters, too
    if models and os.path.realpath(args.pretrain) != args.save_path:
        die(f"--save_path {target} holds another model, choose another folder: {changed}")
    newest = max(Path(args.ckpt_path).glob("step_*[0-9]"), default=None)  # no step_N.partial
    changed = newest and difference(newest, identity)
    if changed:
        die(f"{newest} is a checkpoint of another run, remove it: {changed}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if not newest:
        (partial / "metrics.jsonl").touch()
        return 0
    note(f"resume {newest}")
    shutil.copy(newest / "metrics.jsonl", partial)  # without the steps that come again
    return int(newest.name[5:])


def save_checkpoint(engine, args, step, identity):
    """All that decides a run's future, in <ckpt_path>/step_N. Randomness is seeded by step: see main."""
    partial = Path(args.ckpt_path, f"step_{step:08}.partial")
    engine.save_checkpoint(args.ckpt_path, tag=partial.name, save_latest=False)  # ends in a barrier
    if dist.get_rank() == 0:
        shutil.copy(f"{args.save_path}.partial/metrics.jsonl", partial)
        (partial / "args.json").write_text(json.dumps(identity, indent=1))
        os.rename(partial, partial.with_suffix(""))
        for folder in sorted(Path(args.ckpt_path).glob("step_*[0-9]"))[: -args.max_ckpt_num]:
            shutil.rmtree(folder)


def save_model(engine, tokenizer, args, identity):
    """The trained model as a Hugging Face folder at --save_path, LoRA merged into it."""
    zero3 = args.zero_stage == 3
    weights = engine._zero3_consolidated_16bit_state_dict() if zero3 else engine.module.state_dict()
    if dist.get_rank() == 0:
        partial = Path(f"{args.save_path}.partial")
        weights = {name.removeprefix("model."): value for name, value in weights.items()}
        model = engine.module.model
        if args.lora_rank:
            adapted = add_lora(load_model(args.pretrain, args), args)
            adapted.get_base_model().load_state_dict(weights)
            model = adapted.merge_and_unload()
            weights = model.state_dict()
        model.save_pretrained(partial, state_dict=weights, max_shard_size="5GB")
        tokenizer.save_pretrained(partial)
        (partial / "args.json").write_text(json.dumps(identity, indent=1))  # last: now it is complete
        publish(args)
    dist.barrier()


def plan_steps(lengths, args):
    """Yields the examples of each optimiser step, as numbers; every epoch has its own random order."""
    for epoch in range(args.max_epochs):
        order = np.random.default_rng([args.seed, epoch]).permutation(len(lengths))
        if epoch == 0:  # the longest in front: where memory is short, step 1 shows it
            longest = np.flatnonzero(order == np.argmax(lengths))[0]
            order[[0, longest]] = order[[longest, 0]]
        yield from np.split(order, range(args.train_batch_size, len(order), args.train_batch_size))


def mark_trained(example, tokenizer):
    """Text of an example, its last trained span in brackets: shows mistakes of template and EOS."""
    ids = example["input_ids"]
    start = np.flatnonzero(~example["trained"])[-1] + 1
    before = tokenizer.decode(ids[:start])
    span = tokenizer.decode(ids)[len(before) :]  # tokens on their own would lose their blanks
    return repr(f"{before[-60:]}[{span[:240]}]")


def report(step, total_steps, metrics, args):
    """Logs a step, on rank 0: in metrics.jsonl, in Weights & Biases, and its main numbers on the console."""
    if dist.get_rank() > 0:
        return
    with open(f"{args.save_path}.partial/metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step, **metrics}) + "\n")
    if args.use_wandb and transformers.integrations.is_wandb_available():
        import wandb

        os.environ.setdefault("WANDB_API_KEY", args.use_wandb)
        (wandb.run or wandb.init()).log(metrics, step=step)
    main_ones = ("loss", "accuracies", "margins", "kl", "grad_norm", "lr", "tokens_per_sec")
    shown = [f"{name} {value:<9.4g}" for name, value in metrics.items() if name.split("/")[-1] in main_ones]
    note(f"step {step:>5}/{total_steps}  {' '.join(shown)}")


def main(args):
    setup()
    publish(args)  # what a run had finished that was killed while it moved its model into place
    tokenizer = load_tokenizer(args.pretrain, args)
    identity = identify(args)
    # --- algorithm: kto (rows)
    encoding = (encode_labelled, tokenizer, args)
    # --- end algorithm
    examples = load_examples(args.dataset, args.dataset_probs, args.dataset_split, *encoding)
    held_out = args.eval_dataset and load_examples(args.eval_dataset, None, args.eval_split, *encoding)
    lengths = examples["length"][:]
    steps_per_epoch = math.ceil(len(examples) / args.train_batch_size)
    total_steps = min(steps_per_epoch * args.max_epochs, args.max_steps)
    if torch.cuda.is_available():  # from here on CUDA is used
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if args.bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
            die(f"{torch.cuda.get_device_name()} has no bf16: use --no-bf16")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for nothing
    deepspeed.init_distributed(verbose=False, timeout=datetime.timedelta(hours=2))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    state = [open_run(args, identity) if rank == 0 else None]
    dist.broadcast_object_list(state)
    start_step = state[0]
    if start_step is None:
        return
    # --- algorithm: kto (model)
    if args.ref_pretrain and load_tokenizer(args.ref_pretrain, args).get_vocab() != tokenizer.get_vocab():
        note("notice --ref_pretrain has another vocabulary: only the same token ids can be compared")
    transformers.AttentionInterface.register("packed", packed_attention)
    n_desirable = examples["desirable"][:].sum()
    note(f"labels {n_desirable} of {len(examples):,} rows are desirable")
    references = {table: reference_rows(table, args) for table in (examples, held_out) if table}
    engine = start_engine(args, total_steps, LogProbs)
    check_attention(engine, args)

    def take_step(table, indices, train=True):
        partners, ref_logps = references[table]
        rows, mismatched = fetch_rows(table, indices, partners, args)
        return kto_step(engine, rows, mismatched, ref_logps[indices], args, train)

    # --- end algorithm
    if start_step:
        engine.load_checkpoint(args.ckpt_path, tag=f"step_{start_step:08}")
    note(f"model  {args.pretrain}, {world_size} x {engine.device}, ZeRO-{args.zero_stage}, bf16 {args.bf16}")
    note(f"batch  {min(args.train_batch_size, len(examples))} examples per step, {total_steps} steps")
    note(f"sample {mark_trained(examples[0], tokenizer)}   <- [..] is trained")

    def evaluate(step):
        metrics = take_step(held_out, np.arange(len(held_out)), train=False)
        report(step, total_steps, {f"eval/{name}": value for name, value in metrics.items()}, args)

    if held_out and start_step == 0:
        evaluate(0)
    eval_steps = args.eval_steps if args.eval_steps > 0 else steps_per_epoch
    batches = itertools.islice(plan_steps(lengths, args), start_step, total_steps)
    for step, batch in enumerate(batches, start_step + 1):
        torch.manual_seed(args.seed + step * world_size + rank)  # so resuming needs no generator state
        began = time.time()
        metrics = take_step(examples, batch)
        metrics["lr"] = engine.get_lr()[0]
        engine.step()
        metrics["grad_norm"] = float(engine.get_global_grad_norm())
        if not all(map(math.isfinite, metrics.values())):
            die(f"step {step} is not finite: {metrics}; its first row is {examples[batch[0]]['where']}")
        took = time.time() - began
        metrics["tokens_per_sec"] = lengths[batch].sum() / took
        metrics["samples_per_sec"] = len(batch) / took
        ends = step == total_steps
        if step % args.logging_steps == 0 or ends:
            report(step, total_steps, metrics, args)
        if held_out and (step % eval_steps == 0 or ends):
            evaluate(step)
        if args.save_steps > 0 and step % args.save_steps == 0 and not ends:
            save_checkpoint(engine, args, step, identity)
    save_model(engine, tokenizer, args, identity)
    note(f"saved  {args.save_path}  ({total_steps} steps)")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__, use_underscores=True))
    except torch.OutOfMemoryError as e:
        sys.exit(f"out of GPU memory: lower --micro_train_batch_size, add --gradient_checkpointing. {e}")
    except OSError as e:  # a wrong path or name, a folder that cannot be written, a full disk
        die(" ".join(str(e).split()))
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()
    dist.destroy_process_group()
    os._exit(0)  # skips exit handlers: in some finished DeepSpeed runs they abort

"""Batch inference in one file: samples of a policy (generate_vllm, generate), rewards (rm), log-probs.

Rows are JSON lines; a stage keeps the columns it finds. sft.py and dpo.py know these rows without flags:
    generate  {"id": 7, "sample": 0, "input": "2+2=", "output": "4", "finish_reason": "stop", "tokens": 1}
    rm        the same and "reward": 1.25; null where a row cannot be scored (such as too long)
    logps     the same and "logps": -31.4, log pi(output | input) in nats over "tokens", EOS included
id: the row's index in --dataset. input: what the model saw, with template and BOS; messages too, where the
prompt was messages. output has no EOS: finish_reason says whether it came ("stop") or not ("length").

 1. A reward model reads what it was trained on: prompt, response, EOS (not where it was cut), or with
    --apply_chat_template messages in its own template. Rewards are (score - mean) / std of its config.json.
 2. Conditional SFT (arXiv:2308.12050): the reward stands in the user's turn, in rows of --post_processor csft
    as in prompts of --csft_prompt; the samples of such prompts are scored as answers to the plain prompt.

    python batch_infer.py --eval_task generate_vllm --pretrain MODEL --dataset x.jsonl --output_path g.jsonl
    deepspeed batch_infer.py --eval_task rm --pretrain REWARD_MODEL --dataset g.jsonl --output_path r.jsonl
"""

import collections
import contextlib
import ctypes
import datetime
import faulthandler
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import runpy
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import datasets
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
import tyro


@dataclass
class Args:
    eval_task: Literal["generate_vllm", "generate", "rm", "logps"]  # sample, give rewards, or log-probs
    output_path: str  # the .jsonl to write
    dataset: str  # comma list of .jsonl, .json, .csv, .parquet, .arrow files, folders, hub names NAME@SUBSET
    pretrain: str = ""  # the model: a Hugging Face folder or hub name
    bf16: bool = True  # bf16 weights; --no-bf16: fp32
    tokenizer_chat_template: str | None = None  # Jinja text or its file, in place of the model's own template
    value_head_prefix: str = "value_head"  # rm: name of an OpenRLHF head that config.json does not name
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
    best_of_n: int = 1  # samples per prompt
    prompt_max_len: int = 1024  # prompts with more tokens are left out
    max_new_tokens: int = 1024  # most tokens of a sample, EOS included
    temperature: float = 1.0  # divides the logits; 0 = greedy
    top_p: float = 1.0  # sample from the smallest set of tokens with this probability
    top_k: int = 0  # sample from this many most likely tokens; 0 = all
    repetition_penalty: float = 1.0  # weakens logits of tokens that prompt or sample have already; 1 = off
    greedy_sampling: bool = False  # always take the likeliest token
    stop: tuple[str, ...] = ()  # one or more texts that end a sample; they are not part of it
    seed: int = 42  # of the samples
    csft_prompt: float | None = None  # ask for this {reward}, with the --reward_template that csft had
    reward_fn: str = ""  # comma list of FILE.py:NAME[=WEIGHT]: functions of (prompt, response, row), summed
    reward_timeout: float = 10.0  # seconds that --reward_fn may take for a row; without an answer: null
    # what becomes of the rows: rs = best of a prompt, iter_dpo = best against worst, csft = all, conditioned
    post_processor: Literal["rs", "iter_dpo", "csft", "null"] = "null"
    rs_top_k: int = 1  # rs: keep this many of the best samples of each prompt
    min_reward: float = -math.inf  # rs: keep no sample with a lower reward
    drop_all_equal: bool = False  # rs: leave out prompts whose samples all have the same reward
    min_margin: float = 0.0  # iter_dpo: the rewards of a pair differ by more than this
    reward_template: str = "{input} <rm_score>: {reward} "  # csft: the user's text; {reward} has two decimals
    normalize_reward: bool = False  # csft: {reward} is (reward - mean) / std over all rows
    scored_path: str | None = None  # keep all scored rows in this .jsonl, next to the post-processor's output
    micro_batch_size: int = 16  # generate: prompts, rm and logps: rows per forward pass and rank
    tp_size: int = 1  # vLLM: GPUs that share the model (tensor parallel)
    dp_size: int = 1  # vLLM: this many engines, each a process with tp_size GPUs of its own
    max_num_seqs: int | None = None  # vLLM: most samples that run at the same time; default: vLLM's own
    gpu_memory_utilization: float = 0.9  # vLLM: share of the GPU's memory to use
    flash_attn: bool = False  # accepted for old commands; it changes nothing
    enable_prefix_caching: bool = False  # accepted for old commands: vLLM always does it
    zero_stage: int = 0  # accepted for old commands: nothing is sharded here
    local_rank: int = -1  # the deepspeed launcher gives it; what is read is LOCAL_RANK

    def __post_init__(self):
        if self.greedy_sampling:
            self.temperature = 0.0
        if self.eval_task != "rm" and (self.post_processor != "null" or self.scored_path or self.reward_fn):
            die(f"--post_processor, --scored_path, --reward_fn are of --eval_task rm, not {self.eval_task}")
        if os.path.isfile(self.tokenizer_chat_template or ""):
            self.tokenizer_chat_template = Path(self.tokenizer_chat_template).read_text()
        self.reward_template = self.reward_template.replace("\\n", "\n")  # a shell leaves two characters
        template = (self.input_template or "").replace("\\n", "\n")
        self.input_template = template if "{}" in template else "{}"  # "" may arrive as two quotation marks
        self.stop = [text.replace("\\n", "\n") for text in self.stop if text]
        if "{input}" not in self.reward_template or "{reward}" not in self.reward_template:
            die("--reward_template needs {input} and {reward}")


# A stage may be resumed with other values of these flags; every other flag belongs to its identity.
FREE_FLAGS = """output_path max_drop_ratio tp_size dp_size max_num_seqs gpu_memory_utilization
    flash_attn enable_prefix_caching zero_stage local_rank""".split()


class Item(NamedTuple):  # a sample to draw, a response to score, or a reward function to call
    key: tuple  # (id of the row, number of the sample)
    prompt: list | str  # token ids; for a function text or messages
    response: list | str  # token ids behind a token of the prompt, which predicts the first of them; or text
    row: dict


# --- rows, texts, tokens. A ValueError says why a row cannot be used


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


def load_rows(args):
    """{id: row} of all datasets, with --dataset_probs their shares of as many rows; of --iter its slice."""
    tables = []
    for name in args.dataset.split(","):
        table = itertools.islice(open_rows(name.strip(), args.dataset_split), args.max_samples)
        try:
            tables.append([json.loads(row or "null") if isinstance(row, str) else row for row in table])
        except json.JSONDecodeError as e:
            die(f"dataset {name!r} has a row that is no JSON: {e}: {e.doc:.100}")
    if args.dataset_probs and len(tables) > 1:
        total = sum(map(len, tables))
        sizes = [round(float(share) * total) for share in args.dataset_probs.split(",")]
        pairs = zip(tables, sizes, strict=True)
        tables = [itertools.islice(itertools.cycle(table), size) for table, size in pairs]
    rows = {i: row for i, row in enumerate(itertools.chain(*tables)) if row}  # a blank line is no row
    if args.iter is None or args.eval_task in ("rm", "logps"):
        return rows
    first = args.iter * args.rollout_batch_size
    wanted = itertools.islice(itertools.cycle(rows), first, first + args.rollout_batch_size)
    return {i: rows[i] for i in wanted}  # each once, also when all of them are fewer


def read_columns(row, args):
    """(name of the prompt's column, prompt, response) of a row; no response: []."""
    if {"instruction", "input"} <= {*row} and not args.input_key and "finish_reason" not in row:
        raise ValueError("instruction and input are two columns of the prompt: join them, or --input_key")
    # Columns of prompt and response. The first that are there count: our own rows may hold messages, too.
    layouts = [("input", "output"), ("messages", None), ("prompt", "completion"), ("question", "answer")]
    layouts += [("prompt", "response"), ("prompt", None), ("input", None), ("text", None)]
    if args.input_key or args.output_key:
        layouts = [(args.input_key or "input", args.output_key)]
    for prompt_key, response_key in layouts:
        if {prompt_key, response_key} <= {None, *row}:
            return prompt_key, row[prompt_key], row.get(response_key, [])
    raise ValueError(f"--input_key and --output_key must be among the columns {', '.join(row)}")


def collect(make, rows, tokenizer, config, args):
    """The Items that make(id, row, ...) gives for the rows. What cannot be used is told; too many stop."""
    items, reasons = [], collections.defaultdict(list)
    for i, row in rows.items():
        try:
            items += make(i, row, tokenizer, config, args)
        except Exception as e:  # of many types: a template may raise anything
            reasons[str(e).partition("\n")[0]].append(i)
    n_dropped = sum(map(len, reasons.values()))
    told = f"{args.dataset}: {len(rows):,} rows, of which {n_dropped:,} cannot be used"
    told += "".join(f"; {len(ids):,} x {reason} (row {ids[0]})" for reason, ids in reasons.items())
    if n_dropped > args.max_drop_ratio * len(rows) or not items:
        die(f"{told} (--max_drop_ratio {args.max_drop_ratio})")
    note(f"data   {told}")
    return items


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


def tokenize(text, tokenizer, add_bos):
    """(ids, ends): token ids, and the character at which each token ends. BOS at most once, no EOS behind."""
    encoded = tokenizer(text, add_special_tokens=add_bos, return_offsets_mapping=True)
    ids, ends = encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]
    while ids and ends[-1] == 0:  # the EOS that some tokenizers append
        del ids[-1], ends[-1]
    if ids[:2] == [tokenizer.bos_token_id] * 2:  # the text brought its own
        del ids[0], ends[0]
    return ids, ends


def conditioned(prompt, reward, args):
    """The prompt, text or messages, with the reward in its last turn."""
    template = args.reward_template.replace("{reward}", f"{reward:z.2f}")  # z: 0.00, never -0.00
    if isinstance(prompt, str):
        return template.replace("{input}", prompt)
    last = prompt[-1]
    return [*prompt[:-1], last | {"content": template.replace("{input}", last["content"])}]


def render_prompt(prompt, tokenizer, args):
    """(text, ids) of a prompt, text or messages, as the model sees it: what examples of sft.py begin with."""
    if isinstance(prompt, list):
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        return text, tokenize(text, tokenizer, add_bos=False)[0]
    text = args.input_template.replace("{}", prompt)
    # In training the tokenizer may join a last blank to the next word, " the": then the model writes it.
    if text.endswith(" ") and len(text) not in tokenize(text + "the", tokenizer, add_bos=True)[1]:
        text = text[:-1]
    ids, _ = tokenize(text, tokenizer, add_bos=True)
    if ids and ids[0] == tokenizer.bos_token_id:
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text, ids


def sampling_items(i, row, tokenizer, config, args):
    """The Items of a prompt: its samples, with rows that lack what will be sampled."""
    prompt_key, value, _ = read_columns(row, args)
    messages = as_messages(value, "user")
    while messages[-1]["role"] == "assistant":  # of a conversation: the model answers itself
        messages.pop()
    prompt, fields = messages, {"messages": messages}
    if not (args.apply_chat_template or isinstance(value, list)):
        prompt = messages[0]["content"]
        fields = {"prompt": prompt} if args.input_template != "{}" else {}
    text, ids = render_prompt(prompt, tokenizer, args)
    if args.csft_prompt is not None:
        fields["plain_input"] = text
        text, ids = render_prompt(conditioned(prompt, args.csft_prompt, args), tokenizer, args)
    if not 0 < len(ids) <= args.prompt_max_len:
        raise ValueError(f"no tokens, or more than --prompt_max_len {args.prompt_max_len}")
    ours = [prompt_key, *"id sample input messages prompt plain_input reward".split()]
    fields |= {name: row[name] for name in row if name not in ours}  # for reward functions
    fields = {"input": text} | fields
    return [Item((i, k), ids, [], {"id": i, "sample": k} | fields) for k in range(args.best_of_n)]


def row_texts(row, chat, args):
    """(prompt, response) of a row, the prompt as text or messages."""
    _, prompt, response = read_columns(row, args)
    if "finish_reason" in row:  # our own: input is rendered for the policy, messages are not
        chat = chat and "messages" in row
        # Without what --csft_prompt put in: no reward model has ever seen that.
        prompt = row["messages"] if chat else row.get("plain_input", prompt)
        if row.keys() & {"plain_input", "messages", "prompt"} == {"plain_input"} and row["input"][-1:] != " ":
            response = response.removeprefix(" ")  # the blank that ended the reward's template
    messages = as_messages(prompt, "user") + as_messages(response, "assistant")
    if not (chat or isinstance(prompt, list) or isinstance(response, list)):
        return messages[0]["content"], messages[1]["content"]
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError("no response after a prompt: --output_key COLUMN, or an assistant turn")
    return messages[:-1], messages[-1]["content"]


def scoring_items(i, row, tokenizer, config, args):
    """The one Item of a row: texts for a reward function, or ids as a reward model or the policy reads it."""
    is_ours = "finish_reason" in row
    cut = row.get("finish_reason") == "length"
    if is_ours and args.eval_task == "logps":
        prompt, response = row["input"], row["output"]
    else:
        prompt, response = row_texts(row, args.apply_chat_template, args)
    if args.reward_fn:
        return [Item((i, 0), prompt, response, row)]
    # Hugging Face's reward models, unlike OpenRLHF's, read all that a chat template writes.
    is_classifier = "ForSequenceClassification" in str(config.architectures)
    to_eos = hasattr(config, "value_head_prefix") or not is_classifier
    is_text = isinstance(prompt, str)
    add_bos = is_text and not (is_ours and "messages" in row)  # a rendered chat has its own
    add_eos = (is_text or to_eos) and not cut
    if is_text:
        asked = prompt if is_ours else args.input_template.replace("{}", prompt)
        text = asked + response
    else:
        asked = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        messages = [*prompt, {"role": "assistant", "content": response}]
        # continue_final_message: without what the template writes behind an answer
        text = tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=cut)
        if add_eos:
            text = text.rstrip("\n")
    ids, ends = tokenize(text, tokenizer, add_bos)
    if add_eos and not text.endswith(tokenizer.eos_token):
        ids = [*ids, tokenizer.eos_token_id]
    if len(ids) > args.max_len:
        raise ValueError(f"longer than {args.max_len} tokens (--max_len, or the model's positions)")
    start = len(os.path.commonprefix([text, asked]))
    last = max(1, sum(end <= start for end in ends)) - 1  # of the prompt: it predicts the response
    # A Hugging Face head looks at the last token that is no padding: let that be the last one.
    while not to_eos and len(ids) > last + 1 and ids[-1] == config.get_text_config().pad_token_id:
        ids.pop()
    return [Item((i, 0), ids[:last], ids[last:], row)]


# --- engines: generators of (key, result)


def load_weights(auto, args, device, **options):
    """The model of --pretrain by a class of transformers, with Hugging Face's own attention."""
    options |= {"dtype": torch.bfloat16 if args.bf16 else torch.float32, "output_loading_info": True}
    model, info = auto.from_pretrained(args.pretrain, **options)
    if info["missing_keys"]:
        die(f"{args.pretrain} lacks {min(info['missing_keys'])}: see --eval_task, --value_head_prefix")
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # others drop the soft-cap in silence
    return model.to(device).eval().requires_grad_(False)


def pad(rows, device, side="right"):
    """(input_ids, attention_mask), both [B, T], of lists of token ids."""
    parts = [torch.tensor(row) for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=-1, padding_side=side)
    mask = ids >= 0
    # The padding is the row's own first token: masked, and no news to a repetition penalty.
    ids = torch.where(mask, ids, torch.tensor([row[:1] for row in rows]))
    return ids.to(device), mask.long().to(device)


def make_batches(items, size):
    """Batches of items, the longest first; those of one prompt stay together."""
    items = sorted(items, key=lambda item: len(item.response))
    longest = {tuple(item.prompt): len(item.prompt) + len(item.response) for item in items}  # the last one
    items.sort(key=lambda item: (-longest[tuple(item.prompt)], item.prompt))
    return [items[begin : begin + size] for begin in range(0, len(items), size)]


def find_stops(own, tokenizer):
    """The ids that end a sample: EOS, and the model's own, one or a list, of generation_config.json."""
    own = own if isinstance(own, list) else [own]
    return sorted({tokenizer.eos_token_id, *own} - {None})


def make_seed(args, key):
    """The seed of a sample or of a batch of samples, whatever else is sampled beside it."""
    digest = hashlib.sha256(f"{args.seed} {args.iter} {key}".encode()).hexdigest()
    return int(digest[:14], 16)


def read_sample(prompt, sampled, tokenizer, stop_ids, args):
    """The result of a sample. sampled: its token ids; what follows the first stop token is padding."""
    end = next((i for i, token in enumerate(sampled) if token in stop_ids), len(sampled))
    context = prompt[-16:]  # decoded too, as some tokenizers drop a blank at the start of a text
    before = tokenizer.decode(context, clean_up_tokenization_spaces=False)
    output = tokenizer.decode(context + sampled[:end], clean_up_tokenization_spaces=False)[len(before) :]
    cuts = [output.index(stop) for stop in args.stop if stop in output]
    reason = "stop" if cuts or end < len(sampled) else "length"
    return {"output": output[: min(cuts, default=None)], "finish_reason": reason, "tokens": end}


def generate(batches, tokenizer, args, device):
    """Hugging Face's model.generate, with a seed per batch."""
    model = load_weights(transformers.AutoModelForCausalLM, args, device)
    stop_ids = find_stops(model.generation_config.eos_token_id, tokenizer)
    settings = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    settings |= {"repetition_penalty": args.repetition_penalty, "max_new_tokens": args.max_new_tokens}
    settings |= {"do_sample": args.temperature > 0, "pad_token_id": stop_ids[0], "eos_token_id": stop_ids}
    model.generation_config = transformers.GenerationConfig(**settings)  # in place of the checkpoint's own
    stopping = []
    if args.stop:  # as in vLLM the sample alone: `stop_strings` would find texts that began in the prompt
        has_stop = transformers.StopStringCriteria(tokenizer, args.stop)
        stopping.append(lambda ids, scores, **_: has_stop(ids[:, width:], scores))
    for batch in batches:
        torch.manual_seed(make_seed(args, [item.key for item in batch]))
        ids, mask = pad([item.prompt for item in batch], device, side="left")
        width = ids.shape[1]
        samples = model.generate(ids, attention_mask=mask, stopping_criteria=stopping)[:, width:]
        for item, sampled in zip(batch, samples.tolist()):
            yield item.key, read_sample(item.prompt, sampled, tokenizer, stop_ids, args)


def generate_vllm(batches, tokenizer, args, device):
    """One request per sample, with its own seed: no other request changes it."""
    settings = {"dtype": "bfloat16" if args.bf16 else "float32", "max_num_seqs": args.max_num_seqs}
    settings |= {"tensor_parallel_size": args.tp_size, "gpu_memory_utilization": args.gpu_memory_utilization}
    settings["max_model_len"] = args.prompt_max_len + args.max_new_tokens
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if torch.cuda.is_available():
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # runs our last lines
    else:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # starts in 9 s instead of 21
        settings |= {"enforce_eager": True, "kv_cache_memory_bytes": 2**30}
        settings["enable_chunked_prefill"] = False  # half a prompt in a step would end a seeded request
    try:
        from vllm import LLM
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        engine = LLM(args.pretrain, **settings).llm_engine
    except Exception as e:  # of many types
        die(f"vLLM does not start: {e!r} (requirements-vllm.txt, or --eval_task generate)")
    stop_ids = find_stops(engine.model_config.try_get_generation_config().get("eos_token_id"), tokenizer)
    flags = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k", "repetition_penalty")}
    flags |= {"max_tokens": args.max_new_tokens, "stop_token_ids": stop_ids}
    # The text is made by read_sample; here it only finds --stop, which may be a special token.
    flags |= {"stop": args.stop, "detokenize": bool(args.stop), "skip_special_tokens": False}
    flags["output_kind"] = RequestOutputKind.FINAL_ONLY
    items = [item for batch in batches for item in batch]
    for i, item in enumerate(items):
        params = SamplingParams(seed=make_seed(args, item.key), **flags)
        engine.add_request(str(i), {"prompt_token_ids": item.prompt}, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            item, sampled = items[int(output.request_id)], list(output.outputs[0].token_ids)
            yield item.key, read_sample(item.prompt, sampled, tokenizer, stop_ids, args)


def die_with_parent(parent):
    """From now on the kernel kills this process when its parent, a process id, ends, however that ends."""
    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def run_engine(k, items, folder, tokenizer, args):
    """One of dp_size processes: a vLLM engine that does what rank k would, on tp_size GPUs of its own."""
    die_with_parent(multiprocessing.parent_process().pid)
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(args.dp_size * args.tp_size)))
    mine = gpus.split(",")[k * args.tp_size : (k + 1) * args.tp_size]
    os.environ |= {"RANK": str(k), "WORLD_SIZE": str(args.dp_size), "CUDA_VISIBLE_DEVICES": ",".join(mine)}
    run_stage(items, folder, tokenizer, args)


def hidden_states(body, batch, device):
    """The last hidden states of each item's response, tensors [R, H]. A prompt is read once."""
    prompts = [list(ids) for ids in {tuple(item.prompt) for item in batch}]
    if len(prompts) == len(batch) or [] in prompts or body._is_stateful:  # nothing to share, or a hybrid
        rows = [item.prompt + item.response for item in batch]
        ids, _ = pad(rows, device)  # without a mask: no token sees the padding behind it
        options = {"use_cache": False}
    else:
        rows = [item.response for item in batch]
        ids, mask = pad(prompts, device, side="left")
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        cache = body(ids, attention_mask=mask, position_ids=position_ids, use_cache=True).past_key_values
        owners = torch.tensor([prompts.index(item.prompt) for item in batch], device=device)
        cache.batch_select_indices(owners)
        ids, response_mask = pad(rows, device)
        mask = torch.cat([mask[owners], response_mask], 1)
        position_ids = (mask.cumsum(1) - 1)[:, -ids.shape[1] :]
        options = {"past_key_values": cache, "attention_mask": mask, "position_ids": position_ids}
    hidden = body(ids, **options).last_hidden_state
    return [states[: len(row)][-len(item.response) :] for item, states, row in zip(batch, hidden, rows)]


def score(batches, tokenizer, args, device):
    """Rewards: (head(last hidden state) - mean) / std. The head computes in fp32."""
    config = transformers.AutoConfig.from_pretrained(args.pretrain, num_labels=1)
    prefix = getattr(config, "value_head_prefix", args.value_head_prefix)  # where OpenRLHF saved the model
    options = {"config": config, "key_mapping": {rf"^{prefix}\.": "score."}}
    model = load_weights(transformers.AutoModelForSequenceClassification, args, device, **options)
    head = model.score.float()
    mean = getattr(config, "mean", None) or 0.0
    std = getattr(config, "std", None) or 1.0
    for batch in batches:
        last = torch.stack([states[-1] for states in hidden_states(model.base_model, batch, device)])
        rewards = (head(last.float())[:, 0] - mean) / std
        for item, reward in zip(batch, rewards.tolist()):
            yield item.key, {"reward": reward if math.isfinite(reward) else None}


def measure(batches, tokenizer, args, device):
    """Log-probs of the responses under a policy. The head runs in chunks: logits [R, V] would not fit."""
    model = load_weights(transformers.AutoModelForCausalLM, args, device)
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    size = 2**26 // head.weight.shape[0]
    for batch in batches:
        for item, states in zip(batch, hidden_states(model.base_model, batch, device)):
            targets = torch.tensor(item.response[1:], device=device)
            logps = 0.0
            for chunk, tokens in zip(states[:-1].split(size), targets.split(size)):
                logits = head(chunk).float() * scale
                if softcap:
                    logits = softcap * torch.tanh(logits / softcap)
                logps -= F.cross_entropy(logits, tokens, reduction="sum").item()
            yield item.key, {"logps": logps, "tokens": len(targets)}


def load_reward(specs):
    """The sum of the functions FILE.py:NAME[=WEIGHT] of --reward_fn, as one function."""
    parts = []
    for spec in specs.split(","):
        path, _, name = spec.strip().rpartition(":")
        name, _, weight = name.partition("=")
        sys.path.insert(0, str(Path(path).resolve().parent))  # it may import its neighbours
        try:
            parts.append((float(weight or 1), runpy.run_path(path)[name]))
        except Exception as e:  # the file is the user's: anything may be wrong with it
            die(f"--reward_fn {spec}: {type(e).__name__}: {e}; it must be FILE.py:NAME[=WEIGHT]")
    return lambda *texts_and_row: sum(weight * function(*texts_and_row) for weight, function in parts)


def call_reward(items, function, args):
    """Rewards of a Python function, in a worker process, which ends when a call takes too long."""
    die_with_parent(multiprocessing.parent_process().pid)
    for item in items:
        # Unlike an alarm it ends also what catches every exception, or hangs in C.
        faulthandler.dump_traceback_later(args.reward_timeout, exit=True, file=sys.__stderr__)
        try:
            reward = float(function(item.prompt, item.response, item.row))
            result = {"reward": reward if math.isfinite(reward) else None}
        except (Exception, SystemExit) as e:
            result = {"reward": None, "reward_error": repr(e)}
        faulthandler.cancel_dump_traceback_later()
        yield item.key, result
    os._exit(0)  # not waiting for threads and processes that the function left


def call_rewards(items, folder, args):
    """Calls a reward function in a process per core. One that hangs, or ends its process, gives null."""
    function = load_reward(args.reward_fn)
    fork = multiprocessing.get_context("fork")  # the file is loaded; no GPU or thread is in use yet
    rank, n_workers = os.environ["RANK"], torch.get_num_threads()
    lost = {"reward": None, "reward_error": f"no answer in {args.reward_timeout} s, or its process ended"}
    done = read_results(folder)
    while left := [item for item in items if item.key not in done]:
        shares = [left[k::n_workers] for k in range(n_workers)]
        workers = []
        for k, share in enumerate(shares):
            options = (folder / f"{rank}_{k}.jsonl", call_reward(share, function, args))
            workers.append(fork.Process(target=write_results, args=options))
            workers[-1].start()
        for worker in workers:
            worker.join()
        done = read_results(folder)
        for share in shares:  # the first without an answer ended its worker
            killers = [item.key for item in share if item.key not in done][:1]
            write_results(folder / f"{rank}_lost.jsonl", [(key, lost) for key in killers])
            done |= dict.fromkeys(killers, lost)


# --- post-processors: what becomes of the rows that have a reward


def by_prompt(rows, args):
    """A list of the rows of each prompt, the best first."""
    groups = collections.defaultdict(list)
    for row in rows:
        prompt, _ = row_texts(row, False, args)
        number = row.get("id") if "finish_reason" in row else None  # else it may be the response's
        groups[repr([number, prompt])].append(row)
    return [sorted(group, key=lambda row: -row["reward"]) for group in groups.values()]


def best_samples(rows, args):
    """Rejection sampling: of each prompt the rs_top_k rows of highest reward; the first wins ties."""
    kept = []
    for group in by_prompt(rows, args):
        all_equal = len(group) > 1 and group[0]["reward"] == group[-1]["reward"]
        if not (args.drop_all_equal and all_equal):
            kept += [row for row in group[: args.rs_top_k] if row["reward"] >= args.min_reward]
    return kept


def best_and_worst(rows, args):
    """Iterative DPO: of each prompt the rows of highest and lowest reward, as a pair for dpo.py."""
    pairs = []
    for group in by_prompt(rows, args):
        best, worst = group[0], group[-1]
        _, prompt, chosen = read_columns(best, args)
        _, _, rejected = read_columns(worst, args)
        if chosen != rejected and best["reward"] - worst["reward"] > args.min_margin:
            pair = {"id": best.get("id"), "prompt": prompt, "chosen": chosen, "rejected": rejected}
            for side, row in (("chosen", best), ("rejected", worst)):
                pair |= {f"{side}_reward": row["reward"], f"{side}_finish_reason": row.get("finish_reason")}
            pairs.append(pair)
    return pairs


def conditional_rows(rows, args):
    """Conditional SFT: each response, with its reward in the prompt, as a row for sft.py."""
    rewards = [row["reward"] for row in rows]
    mean = statistics.mean(rewards)
    std = statistics.pstdev(rewards) or 1.0
    made = []
    for row in rows:
        is_ours = "finish_reason" in row
        if "messages" in row and row.get("finish_reason") == "length":
            continue  # a chat template would end what was cut
        prompt, response = row_texts(row, args.apply_chat_template or is_ours, args)
        reward = (row["reward"] - mean) / std if args.normalize_reward else row["reward"]
        if isinstance(prompt, list):
            asked = conditioned(prompt, reward, args)
        else:
            user = row.get("prompt", prompt) if is_ours else prompt  # --input_template stands around it
            if prompt.count(user) != 1:
                continue  # the template holds the prompt's words, too
            asked = prompt.replace(user, conditioned(user, reward, args))
        kept = {name: row[name] for name in ("id", "sample", "finish_reason", "reward") if name in row}
        made.append(kept | {"input": asked, "output": response})
    return made


# --- files and main


def stamp(name):
    """[file, size, mtime] of all files of a local model or dataset: tells it apart without reading it."""
    path = Path(name if os.path.exists(name) else name.partition("@")[0])
    files = [path, *path.rglob("*")]
    if (path / "config.json").exists():  # a model; a log or samples may lie beside it
        kinds = (".safetensors", ".bin", "config.json", "tokenizer.json", ".model", ".jinja")
        files = [file for file in path.iterdir() if file.name.endswith(kinds)]
    files = sorted(file for file in files if file.is_file())
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def open_stage(args):
    """(folder for results, all that decides them: the identity); no folder if the output is there already."""
    functions = [spec.rpartition(":")[0] for spec in args.reward_fn.split(",")]
    inputs = [name.strip() for name in [*args.dataset.split(","), args.pretrain, *functions] if name]
    outputs = [path for path in (args.output_path, args.scored_path) if path]
    for path in outputs:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        if os.path.isdir(path) or os.path.realpath(path) in map(os.path.realpath, inputs):
            die(f"{path} cannot be written: it is a folder, or our input")
    identity = {name: value for name, value in vars(args).items() if name not in FREE_FLAGS}
    identity["script"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    identity["input files"] = [stamp(name) for name in inputs]
    command = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    folder = Path(f"{args.output_path}.partial", command)
    meta = Path(f"{args.output_path}.meta.json")
    made_by = json.loads(meta.read_text())["identity"] if meta.exists() else None
    if made_by == identity | {"content": [stamp(path) for path in outputs]}:
        note(f"done   {args.output_path} is complete and made by this command: nothing to do")
        shutil.rmtree(folder.parent, ignore_errors=True)  # a kill may have left it
        return None, identity
    if os.path.exists(args.output_path):
        note(f"notice {args.output_path} will be replaced: it was not made by this command")
    folder.mkdir(parents=True, exist_ok=True)
    return folder, identity


def read_results(folder):
    """{key: result} of all that this and earlier starts wrote, on any rank."""
    found = {}
    for path in folder.glob("*.jsonl"):
        for line in path.read_text().split("\n"):
            with contextlib.suppress(ValueError):  # an empty line, or one that a kill cut off
                key, result = json.loads(line)
                found[tuple(key)] = result
    return found


def write_results(path, results):
    """Appends each (key, result) that an engine yields to a file."""
    with open(path, "a") as file:
        print(file=file)  # a line that a kill cut off becomes a line of its own
        for key, result in results:
            print(json.dumps([key, result]), file=file, flush=True)


def run_stage(items, folder, tokenizer, args):
    """Runs this rank's share of the work, less what is done."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if args.reward_fn:
        return call_rewards(items[rank::world_size], folder, args)
    sizes = {"generate_vllm": args.best_of_n, "generate": args.micro_batch_size * args.best_of_n}
    batches = make_batches(items, sizes.get(args.eval_task, args.micro_batch_size))  # alike on all ranks
    done = read_results(folder)
    todo = [batch for batch in batches[rank::world_size] if any(item.key not in done for item in batch)]
    engines = {"generate_vllm": generate_vllm, "generate": generate, "rm": score, "logps": measure}
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    if todo:
        results = engines[args.eval_task](todo, tokenizer, args, device)
        write_results(folder / f"{rank}_0.jsonl", results)


def write_rows(path, rows):
    """Writes beside and renames: the file is there as a whole or not at all."""
    with open(f"{path}.tmp", "w", encoding="utf-8", errors="backslashreplace") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    os.replace(f"{path}.tmp", path)


def write_outputs(rows, items, folder, identity, args):
    """Writes the outputs and, behind them, what made them; then the parts go."""
    results = read_results(folder)
    found = {item.key: results[item.key] for item in items}  # all of them, or the nodes share no disk
    errors = collections.Counter(x.pop("reward_error") for x in found.values() if "reward_error" in x)
    for error, n in errors.most_common(5):
        note(f"notice --reward_fn: {n:,} calls gave no reward: {error}")
    if args.eval_task in ("rm", "logps"):
        nothing = dict.fromkeys(found[items[0].key])  # such as {"reward": None}
        rows = [row | found.get((i, 0), nothing) for i, row in rows.items()]
    else:
        rows = [item.row | found[item.key] for item in items]
    summary = {}
    if args.eval_task == "rm":
        scored = [row for row in rows if row["reward"] is not None]
        if not scored:
            shutil.rmtree(folder)  # the same command shall try again
            die(f"no row has a reward: {next(iter(errors), 'all are NaN')}")
        rewards = [row["reward"] for row in scored]
        summary = {"reward_mean": statistics.mean(rewards), "reward_std": statistics.pstdev(rewards)}
        if args.scored_path:
            write_rows(args.scored_path, rows)
        processors = {"rs": best_samples, "iter_dpo": best_and_worst, "csft": conditional_rows}
        if args.post_processor in processors:
            rows = processors[args.post_processor](scored, args)
    write_rows(args.output_path, rows)
    identity["content"] = [stamp(path) for path in (args.output_path, args.scored_path) if path]
    write_rows(f"{args.output_path}.meta.json", [{"identity": identity, "summary": summary}])
    shutil.rmtree(folder.parent)
    note(f"saved  {args.output_path}  {len(rows):,} rows  {summary or ''}")


def main(args):
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    n_gpus = args.tp_size * args.dp_size if args.eval_task == "generate_vllm" else local_size
    # Asking for GPUs would deny them to the forked workers of a reward function.
    if not args.reward_fn and 0 < torch.cuda.device_count() < n_gpus:
        die(f"{n_gpus} GPUs are asked for: more than there are")
    rows = load_rows(args)
    is_scoring = args.eval_task in ("rm", "logps")
    tokenizer = config = None
    if not args.reward_fn:
        tokenizer = load_tokenizer(args.pretrain, args)
        config = transformers.AutoConfig.from_pretrained(args.pretrain)
        limit = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
        args.max_len = min(args.max_len, limit)
        if not is_scoring and args.prompt_max_len + args.max_new_tokens > limit:
            die(f"--prompt_max_len + --max_new_tokens is more than the model's {limit} positions")
    items = collect(scoring_items if is_scoring else sampling_items, rows, tokenizer, config, args)
    folder, identity = open_stage(args)
    if folder is None:
        return
    if args.eval_task == "generate_vllm" and args.dp_size > 1:
        torch.multiprocessing.spawn(run_engine, (items, folder, tokenizer, args), args.dp_size)
    else:
        run_stage(items, folder, tokenizer, args)
    if os.environ["WORLD_SIZE"] != "1":
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))
        dist.barrier()
    if os.environ["RANK"] == "0":
        write_outputs(rows, items, folder, identity, args)


if __name__ == "__mp_main__":  # a process of vLLM's
    die_with_parent(os.getppid())

if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__, use_underscores=True))
    except OSError as e:  # a wrong path or name, a folder that cannot be written, a full disk
        die(" ".join(str(e).split()))

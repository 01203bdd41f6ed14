"""sft.py beside a textbook padded loop and TRL, on the same rows, model and batch: rows/s, peak memory.

    python tests/bench/sft.py --data train.jsonl     # rows with "question" and "answer", such as GSM8K's
    PYTHONPATH=SITE_WITH_TRL python tests/bench/sft.py --data train.jsonl --precisions bf16 fp32 --rounds 3

Every contender is a process of its own, and they take turns: a noisy machine then disturbs all of them alike.
Rates are medians over all optimiser steps but the first of each process; memory is the largest resident set
while training. The model is a random Qwen2 of 48M parameters: only speed is compared, not what is learned.
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
CONTENDERS = {"ours": "sft.py", "padded": "padded loop", "trl": "TRL SFTTrainer"}
VOCAB = 24_576
MODEL = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8}
MODEL |= {"num_key_value_heads": 4, "max_position_embeddings": 2048, "tie_word_embeddings": True}


def prepare(folder, data, n_rows):
    """In folder: model/ with a tokenizer trained on the data, and rows.jsonl, n_rows of its rows."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    rows = [{"prompt": f"{row['question']}\n", "completion": row["answer"]} for row in rows]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    options = {"vocab_size": VOCAB, "special_tokens": ["<pad>", "<eos>"], "show_progress": False}
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    bpe.train_from_iterator((row["prompt"] + row["completion"] for row in rows), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    ids = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    model = Qwen2ForCausalLM(Qwen2Config(**ids, **MODEL))
    model.save_pretrained(folder / "model")
    picked = [rows[i * len(rows) // n_rows] for i in range(n_rows)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in picked))
    return sum(p.numel() for p in model.parameters())


def cpu_name():
    """Model and bf16 support of the processor: without bf16 instructions, bf16 is the slower precision."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    bf16 = "with" if "bf16" in text else "without"
    return f"{names[0] if names else platform.machine()}, {bf16} bf16 instructions"


def peak_gib(who=resource.RUSAGE_SELF):
    """The largest resident set of this process so far, or of one that it started."""
    return resource.getrusage(who).ru_maxrss / 2**20


def run_ours(folder, args):
    """The command line of sft.py; its own log has what we need."""
    flags = {"pretrain": folder / "model", "dataset": folder / "rows.jsonl", "save_path": folder / "out"}
    flags |= {"train_batch_size": args.batch, "micro_train_batch_size": args.micro_batch, "max_len": 1024}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    precision = ["--bf16" if args.precision == "bf16" else "--no-bf16"]
    subprocess.run([sys.executable, REPO / "sft.py", *words, *precision], check=True, stdout=sys.stderr)
    steps = [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text().splitlines()]
    seconds = [args.batch / step["samples_per_sec"] for step in steps]
    tokens = [step["tokens_per_sec"] * s for step, s in zip(steps, seconds)]
    return {"seconds": seconds, "tokens": tokens, "peak_gib": peak_gib(resource.RUSAGE_CHILDREN)}


def run_padded(folder, args):
    """The loop of the textbooks: fp32 weights, autocast, batches in random order, padded."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-6)
    examples = []
    for line in (folder / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        examples.append((ids, len(tokenizer(row["prompt"])["input_ids"])))
    order, n_micro = torch.randperm(len(examples)).tolist(), args.batch // args.micro_batch
    result = {"seconds": [], "tokens": []}
    for begin in range(0, len(order), args.batch):
        started, n_tokens = time.perf_counter(), 0
        for first in range(begin, begin + args.batch, args.micro_batch):
            batch = [examples[i] for i in order[first : first + args.micro_batch]]
            longest = max(len(ids) for ids, _ in batch)
            pad = [longest - len(ids) for ids, _ in batch]
            input_ids = torch.tensor([ids + [0] * n for (ids, _), n in zip(batch, pad)])
            mask = torch.tensor([[1] * len(ids) + [0] * n for (ids, _), n in zip(batch, pad)])
            labels = [[-100] * prompt + ids[prompt:] + [-100] * n for (ids, prompt), n in zip(batch, pad)]
            inputs = {"input_ids": input_ids, "attention_mask": mask, "labels": torch.tensor(labels)}
            with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
                loss = model(**inputs).loss / n_micro
            loss.backward()
            n_tokens += int(mask.sum())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        result["seconds"].append(time.perf_counter() - started)
        result["tokens"].append(n_tokens)
    return result | {"peak_gib": peak_gib()}


def run_trl(folder, args):
    """TRL's SFTTrainer; gradient checkpointing, on by default there, is off as for the others."""
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    ticks = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            ticks.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            ticks.append(time.perf_counter())
            ticks.append(peak_gib())

    options = {"per_device_train_batch_size": args.micro_batch, "gradient_checkpointing": False}
    options |= {"gradient_accumulation_steps": args.batch // args.micro_batch, "max_length": 1024}
    options |= {"learning_rate": 5e-6}
    options |= {"bf16": args.precision == "bf16", "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    options |= {"logging_strategy": "no", "num_train_epochs": 1, "disable_tqdm": True}
    files = {"data_files": str(folder / "rows.jsonl"), "cache_dir": str(folder / "cache")}
    rows = load_dataset("json", split="train", **files)
    config = SFTConfig(output_dir=str(folder / "out"), **options)
    trainer = SFTTrainer(model=str(folder / "model"), args=config, train_dataset=rows, callbacks=[Clock()])
    trainer.train()
    seconds = [end - begin for begin, end in zip(ticks[0::3], ticks[1::3])]
    n_tokens = sum(map(len, trainer.train_dataset["input_ids"])) / len(seconds)  # of an average step
    return {"seconds": seconds, "tokens": [n_tokens] * len(seconds), "peak_gib": ticks[-1]}


def measure(name, precision, args, shared):
    """Result of one contender in a process of its own, or None."""
    with tempfile.TemporaryDirectory() as scratch:
        for item in ("model", "rows.jsonl"):
            os.symlink(Path(shared) / item, Path(scratch) / item)
        command = [sys.executable, __file__, "--contender", name, "--folder", scratch]
        command += ["--precision", precision]
        command += ["--batch", str(args.batch), "--micro_batch", str(args.micro_batch)]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            print(f"{name} {precision}: failed\n{done.stderr[-2000:]}", file=sys.stderr)
            return None
        return json.loads(done.stdout.splitlines()[-1])


def summarise(runs, batch):
    """Medians over the steps of several runs, each run's first step left out."""
    seconds = [s for run in runs for s in run["seconds"][1:]]
    tokens = [n / s for run in runs for n, s in list(zip(run["tokens"], run["seconds"]))[1:]]
    rates = {"rows_per_sec": batch / statistics.median(seconds), "tokens_per_sec": statistics.median(tokens)}
    fastest = {"best_rows_per_sec": batch / min(seconds), "steps": len(seconds)}
    return {**rates, **fastest, "peak_gib": max(run["peak_gib"] for run in runs)}


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--data", help="a .jsonl file of rows with question and answer")
    parser.add_argument("--steps", type=int, default=5, help="optimiser steps of a run, with an uncounted first")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each contender")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro_batch", type=int, default=8)
    parser.add_argument("--precisions", nargs="+", default=["bf16"], choices=["bf16", "fp32"])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--out", default=str(Path(__file__).parent / "results/sft_cpu.json"))
    for name in ("--contender", "--folder", "--precision"):  # of the processes that are started
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        run = {"ours": run_ours, "padded": run_padded, "trl": run_trl}[args.contender]
        print("\n" + json.dumps(run(Path(args.folder), args)))
        return
    if "trl" in args.contenders and not importlib.util.find_spec("trl"):
        print("TRL is not importable: left out", file=sys.stderr)
        args.contenders.remove("trl")
    with tempfile.TemporaryDirectory() as shared:
        n_parameters = prepare(Path(shared), args.data, args.steps * args.batch)
        report = {"date": str(date.today()), "data": Path(args.data).name, "parameters": n_parameters}
        report |= {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "steps": args.steps}
        report |= {"rounds": args.rounds, "batch": args.batch, "micro_batch": args.micro_batch, "results": {}}
        for precision in args.precisions:
            runs = {name: [] for name in args.contenders}
            for i in range(args.rounds):
                for name in args.contenders[i % 2 :: 1] + args.contenders[: i % 2]:  # another one begins
                    result = measure(name, precision, args, shared)
                    runs[name] += [result] if result else []
                    if result:
                        rate = args.batch / statistics.median(result["seconds"][1:])
                        print(f"{precision} round {i + 1} {CONTENDERS[name]:<16} {rate:6.2f} rows/s")
            report["results"][precision] = {name: summarise(r, args.batch) for name, r in runs.items() if r}
    for precision, results in report["results"].items():
        print(f"\n{precision:<16} {'rows/s':>8} {'tokens/s':>9} {'peak GiB':>9} {'speed':>7} {'memory':>7}")
        for name, r in results.items():
            base = results.get("padded", r)
            speed, memory = r["rows_per_sec"] / base["rows_per_sec"], r["peak_gib"] / base["peak_gib"]
            print(
                f"{CONTENDERS[name]:<16} {r['rows_per_sec']:8.2f} {r['tokens_per_sec']:9,.0f} "
                f"{r['peak_gib']:9.2f} {speed:6.2f}x {memory:7.0%}"
            )
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

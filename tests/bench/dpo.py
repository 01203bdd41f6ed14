"""dpo.py beside a textbook padded loop and TRL, on the same pairs, model and batch: pairs/s, peak memory.

    python tests/bench/dpo.py --data example_model_solutions.jsonl   # OpenAI's GSM8K model solutions
    PYTHONPATH=SITE_WITH_TRL python tests/bench/dpo.py --data ... --precisions bf16 fp32 --kinds gsm8k
    python tests/bench/dpo.py --data ... --shape qwen2.5-1.5b --steps 5 --peak_tflops 989     # on an H100 or H200

A problem that has a correct and a wrong solution makes a pair. Two kinds of rows:

    long_prompt  The prompt is the question and the correct solution but for its last two lines; these and the
                 last two lines of the wrong solution (the longest such) are the responses. Both have three
                 lines or more, and the prompt at most 170 tokens: 115, 41 and 46 tokens on average.
    gsm8k        The question, a correct and a wrong solution as they are: 59, 123 and 122 tokens.

Every contender is a process of its own, and they take turns: a noisy machine then disturbs all of them alike.
Rates are medians over all optimiser steps but the first of each process; memory is the largest resident set up
to the end of the first step, and of the last. The loop and TRL hold policy and reference, and compute the
reference's log-probs within each step; dpo.py computes them before step 1: "+ ref" counts this pass as well,
for the pairs of one step. The model is a random Qwen2 of 52M parameters with 32,768 tokens in its vocabulary, or
has the shape of a larger one: only speed is compared, not what is learned.

Where there is an NVIDIA GPU all of them run on it, and memory is what PyTorch allocated there. With the GPU's
--peak_tflops (dense, bf16) a utilisation is printed: 6 x parameters x tokens, over seconds x peak. Tokens are those of
the pairs without padding; dpo.py reads a prompt once, the others twice.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
CONTENDERS = {"ours": "dpo.py", "padded": "padded loop", "trl": "TRL DPOTrainer"}
SOLVERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
WORDS = 32_768  # tokens of the tokenizer; the larger shapes have more rows in their embedding
SHAPES = {  # hidden size, intermediate size, layers, heads, key-value heads, vocabulary
    "52m": (512, 1408, 12, 8, 4, WORDS),
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151_936),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151_936),
}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
MODEL = {"max_position_embeddings": 2048, "tie_word_embeddings": True}
MODEL |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}


def train_tokenizer(texts):
    """A byte-level BPE tokenizer that splits numbers into digits, as most do today."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    bpe.decoder = decoders.ByteLevel()
    options = {"vocab_size": WORDS, "special_tokens": ["<pad>", "<eos>"]}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False, **options)
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>")


def make_pairs(problems, kind, tokenizer):
    """The rows {"prompt", "chosen", "rejected"} of a kind."""
    pairs = []
    for problem in problems:
        right, wrong = (
            [problem[s]["solution"] for s in SOLVERS if problem[s]["is_correct"] is c] for c in (True, False)
        )
        if not right or not wrong:
            continue
        chosen, rejected, prompt = right[0], wrong[0], problem["question"] + "\n"
        if kind == "long_prompt":
            rejected = max(wrong, key=lambda text: len("\n".join(text.split("\n")[-2:])))
            (*given, a, b), (*skipped, c, d) = ([""] * 2 + text.split("\n") for text in (chosen, rejected))
            prompt += "".join(f"{line}\n" for line in given[2:])
            chosen, rejected = f"{a}\n{b}", f"{c}\n{d}"
            if not given[2:] or not skipped[2:] or len(tokenizer(prompt)["input_ids"]) > 170:
                continue
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return pairs


def prepare(folder, data, kind, n_pairs, shape="52m"):
    """In folder: model/ with its tokenizer, and rows.jsonl, n_pairs of the pairs. Returns what to report."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    problems = [json.loads(line) for line in Path(data).read_text().splitlines()]
    solutions = [problem[solver]["solution"] for problem in problems for solver in SOLVERS]
    tokenizer = train_tokenizer([problem["question"] for problem in problems] + solutions)
    torch.manual_seed(0)
    sizes = dict(zip((*SIZES, "vocab_size"), SHAPES[shape], strict=True))
    model = Qwen2ForCausalLM(Qwen2Config(**MODEL, **sizes))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")  # which gives it Qwen2's way to split text
    pairs = make_pairs(problems, kind, tokenizer)
    picked = [pairs[i * len(pairs) // n_pairs] for i in range(n_pairs)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in picked))
    n_tokens = {
        name: round(statistics.mean(len(tokenizer(pair[name])["input_ids"]) for pair in picked))
        for name in ("prompt", "chosen", "rejected")
    }
    return {"parameters": sum(p.numel() for p in model.parameters()), "tokens": n_tokens}


def cpu_name():
    """Model and bf16 support of the processor: without bf16 instructions, bf16 is the slower precision."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    bf16 = "with" if "bf16" in text else "without"
    return f"{names[0] if names else platform.machine()}, {bf16} bf16 instructions"


def gpu_name():
    """Of the GPU that all contenders run on, or None."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def peak_gib():
    """The largest resident set of this process so far; unlike ru_maxrss, none of the process that started it."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20


def run_ours(folder, args):
    """main() of dpo.py, with a clock at its reference pass, the memory read after each step."""
    spec = importlib.util.spec_from_file_location("script", REPO / "dpo.py")
    script = sys.modules["script"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    reference_logps, reference = script.reference_logps, []

    def timed(*inputs):
        started = time.perf_counter()
        result = reference_logps(*inputs)
        reference.append(time.perf_counter() - started)
        return result

    report, peaks = script.report, []

    def measured(*inputs):
        peaks.append(peak_gib())
        report(*inputs)

    script.reference_logps, script.report = timed, measured
    paths = {"pretrain": "model", "dataset": "rows.jsonl", "save_path": "out", "cache_dir": "cache"}
    flags = {name: str(folder / path) for name, path in paths.items()}
    flags |= {"train_batch_size": args.batch, "micro_train_batch_size": args.micro_batch, "max_len": 1024}
    script.main(script.Args(**flags, bf16=args.precision == "bf16"))
    steps = [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text().splitlines()]
    seconds = [args.batch / step["samples_per_sec"] for step in steps]
    return {"seconds": seconds, "peak_gib": peaks, "reference_seconds": reference[0] / len(steps)}


def run_padded(folder, args):
    """The loop of the textbooks: two models, fp32 weights, autocast, pairs in random order, padded, full logits."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = [AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32) for _ in range(2)]
    policy, reference = (model.to(device) for model in models)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-7)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    pairs = []
    for row in rows:
        n_prompt, eos = len(tokenizer(row["prompt"])["input_ids"]), [tokenizer.eos_token_id]
        texts = [row["prompt"] + row[name] for name in ("chosen", "rejected")]
        pairs.append([(tokenizer(text)["input_ids"] + eos, n_prompt) for text in texts])

    def response_logps(model, input_ids, mask, trained):
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        per_token = logits.log_softmax(-1).gather(2, input_ids[:, 1:, None])[..., 0]
        return (per_token * trained[:, 1:]).sum(1).chunk(2)

    order, n_micro = torch.randperm(len(pairs)).tolist(), args.batch // args.micro_batch
    result = {"seconds": [], "peak_gib": []}
    for begin in range(0, len(order), args.batch):
        started = time.perf_counter()
        for first in range(begin, begin + args.batch, args.micro_batch):
            batch = [pairs[i][j] for j in range(2) for i in order[first : first + args.micro_batch]]
            longest = max(len(ids) for ids, _ in batch)
            input_ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in batch]).to(device)
            mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in batch]).to(device)
            n_prompts = torch.tensor([[n] for _, n in batch], device=device)
            trained = mask * (torch.arange(longest, device=device) >= n_prompts)
            with torch.autocast(device, torch.bfloat16, enabled=args.precision == "bf16"):
                chosen, rejected = response_logps(policy, input_ids, mask, trained)
                with torch.no_grad():
                    ref_chosen, ref_rejected = response_logps(reference, input_ids, mask, trained)
            h = (chosen - ref_chosen) - (rejected - ref_rejected)
            (-F.logsigmoid(0.1 * h).mean() / n_micro).backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        norm.item()  # waits for a GPU
        result["seconds"].append(time.perf_counter() - started)
        result["peak_gib"].append(peak_gib())
    return result


def run_trl(folder, args):
    """TRL's DPOTrainer; gradient checkpointing, on by default there, is off as for the others."""
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    result = {"seconds": [], "peak_gib": []}

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.started = time.perf_counter()

        def on_step_end(self, *_, **__):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            result["seconds"].append(time.perf_counter() - self.started)
            result["peak_gib"].append(peak_gib())

    options = {"per_device_train_batch_size": args.micro_batch, "gradient_checkpointing": False}
    options |= {"gradient_accumulation_steps": args.batch // args.micro_batch, "max_length": 1024}
    options |= {"learning_rate": 5e-7, "num_train_epochs": 1, "disable_tqdm": True}
    options |= {"use_cpu": not torch.cuda.is_available()}
    options |= {"bf16": args.precision == "bf16", "report_to": "none", "save_strategy": "no"}
    files = {"data_files": str(folder / "rows.jsonl"), "cache_dir": str(folder / "cache")}
    rows = load_dataset("json", split="train", **files)
    models = [AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32) for _ in range(2)]
    config = DPOConfig(output_dir=str(folder / "out"), logging_strategy="no", **options)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    inputs = {"train_dataset": rows, "processing_class": tokenizer, "callbacks": [Clock()]}
    DPOTrainer(*models, args=config, **inputs).train()
    return result


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
    step = statistics.median(seconds)
    reference = statistics.median(run.get("reference_seconds", 0.0) for run in runs)
    rates = {"pairs_per_sec": batch / step, "with_reference": batch / (step + reference)}
    peaks = {"first_step_gib": max(run["peak_gib"][0] for run in runs)}
    peaks |= {"peak_gib": max(run["peak_gib"][-1] for run in runs)}
    return {**rates, "best_pairs_per_sec": batch / min(seconds), "steps": len(seconds), **peaks}


def print_table(title, results, rows, peak_tflops):
    """The results of one kind and precision; speed and memory relative to the padded loop."""
    length = rows["tokens"]["prompt"] + rows["tokens"]["chosen"] + rows["tokens"]["rejected"]
    print(
        f"\n{title:<18} {'pairs/s':>8} {'+ ref':>7} {'first GiB':>9} {'peak GiB':>8} {'speed':>7} {'memory':>7}"
    )
    for name, r in results.items():
        base = results.get("padded", r)
        speed, memory = r["pairs_per_sec"] / base["pairs_per_sec"], r["peak_gib"] / base["peak_gib"]
        print(
            f"{CONTENDERS[name]:<18} {r['pairs_per_sec']:8.2f} {r['with_reference']:7.2f} "
            f"{r['first_step_gib']:9.2f} {r['peak_gib']:8.2f} {speed:6.2f}x {memory:7.0%}"
        )
        r["tokens_per_sec"] = r["pairs_per_sec"] * (length + (name != "ours") * rows["tokens"]["prompt"])
        if peak_tflops:
            r["utilisation"] = 6 * rows["parameters"] * r["tokens_per_sec"] / (peak_tflops * 1e12)
            print(f"{'':18} {r['tokens_per_sec']:,.0f} tokens/s, utilisation {r['utilisation']:.1%}")


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--data", help="a .jsonl file of problems with a question and the models' solutions")
    parser.add_argument(
        "--steps", type=int, default=3, help="optimiser steps of a run, with an uncounted first"
    )
    parser.add_argument("--rounds", type=int, default=1, help="runs of each contender")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro_batch", type=int, default=8)
    parser.add_argument(
        "--kinds", nargs="+", default=["long_prompt", "gsm8k"], choices=["long_prompt", "gsm8k"]
    )
    parser.add_argument("--shape", default="52m", choices=list(SHAPES))
    parser.add_argument("--peak_tflops", type=float, help="of the GPU, dense bf16: prints the utilisation")
    parser.add_argument("--precisions", nargs="+", default=["bf16"], choices=["bf16", "fp32"])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    place = "gpu" if gpu_name() else "cpu"
    parser.add_argument("--out", default=str(Path(__file__).parent / f"results/dpo_{place}.json"))
    for name in ("--contender", "--folder", "--precision"):  # of the processes that are started
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        run = {"ours": run_ours, "padded": run_padded, "trl": run_trl}[args.contender]
        print("\n" + json.dumps(run(Path(args.folder), args)), flush=True)
        os._exit(0)  # as dpo.py does: exit handlers may abort
    if "trl" in args.contenders and not importlib.util.find_spec("trl"):
        print("TRL is not importable: left out", file=sys.stderr)
        args.contenders.remove("trl")
    report = {"date": str(date.today()), "data": Path(args.data).name, "cpu": cpu_name()}
    report |= {"gpu": gpu_name(), "shape": args.shape}
    report |= {"cores": len(os.sched_getaffinity(0)), "steps": args.steps, "rounds": args.rounds}
    report |= {"batch": args.batch, "micro_batch": args.micro_batch, "kinds": {}}
    for kind in args.kinds:
        with tempfile.TemporaryDirectory() as shared:
            rows = report["kinds"][kind] = prepare(
                Path(shared), args.data, kind, args.steps * args.batch, args.shape
            )
            rows["results"] = {}
            for precision in args.precisions:
                runs = {name: [] for name in args.contenders}
                for i in range(args.rounds):
                    for name in args.contenders[i % 2 :] + args.contenders[: i % 2]:  # another one begins
                        result = measure(name, precision, args, shared)
                        runs[name] += [result] if result else []
                        if result:
                            rate = args.batch / statistics.median(result["seconds"][1:])
                            print(
                                f"{kind} {precision} {CONTENDERS[name]:<16} {rate:6.2f} pairs/s", flush=True
                            )
                results = {name: summarise(r, args.batch) for name, r in runs.items() if r}
                rows["results"][precision] = results
                print_table(f"{kind} {precision}", results, rows, args.peak_tflops)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

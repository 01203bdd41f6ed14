"""kd.py beside the textbook loss on full logits and TRL, on the same rows and models: memory, rows/s, top-k error.

    python tests/bench/kd.py --data example_model_solutions.jsonl    # OpenAI's GSM8K: questions and solutions
    PYTHONPATH=SITE_WITH_TRL python tests/bench/kd.py --data ... --parts memory speed topk

    memory  One optimiser step is one batch of 8 random rows, 32 + 256 words each, so 2k trained tokens, with a
            vocabulary of 128k; student and teacher are small (34M parameters, most of them the embedding).
            "above" is the peak resident set above the level right before step 1, models and engine loaded.
    speed   GSM8K questions and reference solutions, a student and a teacher of 52M parameters, vocabulary 32k.
    topk    How far the divergence from the K likeliest tokens of the teacher (--teacher_topk) is from the live
            one, on a teacher and a student that sft.py trained on the same rows, for long and briefly: with random
            weights every distribution is flat, and the likeliest tokens mean nothing.

Every contender is a process of its own, and they take turns: a noisy machine then disturbs all of them alike.
Rates are medians over all optimiser steps but the first of each process. The loss is that of kd.py's default
flags, 0.6 CE + 0.4 KL(teacher, student); TRL's GKDTrainer (lmbda 0, beta 0) has the KL alone.
"""

import argparse
import importlib.util
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
CONTENDERS = {"ours": "kd.py", "full": "full logits", "trl": "TRL GKDTrainer"}
SIZES = {  # of the models of a part: hidden size, layers, vocabulary
    "memory": (256, 2, 131_072),
    "speed": (512, 12, 32_768),
    "topk": (256, 2, 8_192),
}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' }}{% endfor %}"


def word_tokenizer(vocabulary):
    """Of words w2, w3, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<eos>"] + [f"w{i}" for i in range(2, vocabulary)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def text_tokenizer(vocabulary, texts):
    """A byte-level BPE tokenizer; what its training leaves of the vocabulary is filled with unused tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    bpe.decoder = decoders.ByteLevel()
    options = {"vocab_size": vocabulary, "special_tokens": ["<pad>", "<eos>"], "show_progress": False}
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    bpe.train_from_iterator(texts, trainer)
    state = json.loads(bpe.to_str())
    tokens = state["model"]["vocab"]
    tokens |= {f"<unused{i}>": i for i in range(len(tokens), vocabulary)}
    return Tokenizer.from_str(json.dumps(state))


def prepare(folder, args):
    """In folder: student/ and teacher/ with their tokenizer, and rows.jsonl, {"input", "output"}."""
    import torch
    from transformers import Olmo2Config, Olmo2ForCausalLM, PreTrainedTokenizerFast

    hidden, layers, vocabulary = SIZES[args.part]
    n_rows = args.steps * args.batch
    if args.part == "memory":
        rng = random.Random(0)
        texts = [[f"w{rng.randrange(2, vocabulary)} " for _ in range(32 + 256)] for _ in range(n_rows)]
        rows = [{"input": "".join(text[:32]), "output": "".join(text[32:])} for text in texts]
        tokenizer = word_tokenizer(vocabulary)
    else:
        rows = [json.loads(line) for line in Path(args.data).read_text().splitlines()]
        rows = [{"input": f"{row['question']}\n", "output": row["ground_truth"]} for row in rows]
        tokenizer = text_tokenizer(vocabulary, (row["input"] + row["output"] for row in rows))
        rows = rows if args.part == "topk" else [rows[i * len(rows) // n_rows] for i in range(n_rows)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": hidden * 11 // 4}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": vocabulary}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "tie_word_embeddings": True}
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        # a model type for which AutoTokenizer takes tokenizer.json as it is: Qwen2 would get Qwen2's own splitting
        Olmo2ForCausalLM(Olmo2Config(**sizes, **ids)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {"rows": len(rows)}


def memory_gib(name):
    """VmRSS (resident set now) or VmHWM (its peak) of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0]) / 2**20


def start_level():
    """The resident set now; from here on its peak is counted anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory_gib("VmRSS")


def load_script(name):
    """The module of a top-level script, imported by path."""
    spec = importlib.util.spec_from_file_location(name, REPO / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_ours(folder, args):
    """main() of kd.py, the memory read where a step begins and ends; its own log has the rest."""
    script, levels, peaks = load_script("kd"), [], []
    kd_step, report = script.kd_step, script.report

    def before(*inputs, **options):
        if not levels:
            levels.append(start_level())
        return kd_step(*inputs, **options)

    def after(*inputs):
        peaks.append(memory_gib("VmHWM"))
        return report(*inputs)

    script.kd_step, script.report = before, after
    paths = {"pretrain": "student", "teacher_model": "teacher", "dataset": "rows.jsonl", "save_path": "out"}
    flags = {name: str(folder / path) for name, path in paths.items()}
    flags |= {"train_batch_size": args.batch, "micro_train_batch_size": args.micro_batch, "max_len": 1024}
    script.main(script.Args(**flags, bf16=args.precision == "bf16"))
    steps = [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text().splitlines()]
    seconds = [args.batch / step["samples_per_sec"] for step in steps]
    return {"seconds": seconds, "level_gib": levels[0], "peak_gib": peaks}


def run_full(folder, args):
    """The loop of the textbooks: fp32 weights, autocast, rows in random order, padded, full logits of both."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        for name in ("student", "teacher")
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-6)
    examples = []
    for row in map(json.loads, (folder / "rows.jsonl").read_text().splitlines()):
        ids = tokenizer(row["input"] + row["output"])["input_ids"] + [tokenizer.eos_token_id]
        examples.append((ids, len(tokenizer(row["input"])["input_ids"])))
    order, n_micro = torch.randperm(len(examples)).tolist(), args.batch // args.micro_batch
    result = {"seconds": [], "level_gib": start_level(), "peak_gib": []}
    for begin in range(0, len(order), args.batch):
        started = time.perf_counter()
        for first in range(begin, begin + args.batch, args.micro_batch):
            batch = [examples[i] for i in order[first : first + args.micro_batch]]
            pad = [max(len(ids) for ids, _ in batch) - len(ids) for ids, _ in batch]
            input_ids = torch.tensor([ids + [0] * n for (ids, _), n in zip(batch, pad)])
            mask = torch.tensor([[1] * len(ids) + [0] * n for (ids, _), n in zip(batch, pad)])
            labels = [[-100] * prompt + ids[prompt:] + [-100] * n for (ids, prompt), n in zip(batch, pad)]
            labels = torch.tensor(labels)[:, 1:].flatten()
            inputs = {"input_ids": input_ids, "attention_mask": mask, "use_cache": False}
            with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
                logits = student(**inputs).logits[:, :-1].flatten(0, 1).float()
                with torch.no_grad():
                    p = teacher(**inputs).logits[:, :-1].flatten(0, 1).float().softmax(-1)
            trained = labels != -100
            cross_entropy = F.cross_entropy(logits, labels)
            kl = F.kl_div(logits.log_softmax(-1), p, reduction="none").sum(1)
            kl = (kl * trained).sum() / trained.sum()
            ((0.6 * cross_entropy + 0.4 * kl) / n_micro).backward()
            del logits, p, kl, cross_entropy
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        result["seconds"].append(time.perf_counter() - started)
        result["peak_gib"].append(memory_gib("VmHWM"))
    return result


def run_trl(folder, args):
    """TRL's GKDTrainer on the rows as they are; gradient checkpointing off as for the others."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    result = {"seconds": [], "peak_gib": []}

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            if "level_gib" not in result:
                result["level_gib"] = start_level()
            self.started = time.perf_counter()

        def on_step_end(self, *_, **__):
            result["seconds"].append(time.perf_counter() - self.started)
            result["peak_gib"].append(memory_gib("VmHWM"))

    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    tokenizer.chat_template, rows = TEMPLATE, []
    for row in map(json.loads, (folder / "rows.jsonl").read_text().splitlines()):
        turns = [{"role": "user", "content": row["input"]}, {"role": "assistant", "content": row["output"]}]
        rows.append({"messages": turns})
    options = {"per_device_train_batch_size": args.micro_batch, "gradient_checkpointing": False}
    options |= {"gradient_accumulation_steps": args.batch // args.micro_batch, "max_length": 1024}
    options |= {"learning_rate": 5e-6, "num_train_epochs": 1, "disable_tqdm": True, "use_cpu": True}
    options |= {"bf16": args.precision == "bf16", "report_to": "none", "save_strategy": "no"}
    options |= {"logging_strategy": "no", "lmbda": 0.0, "beta": 0.0, "temperature": 1.0}
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        for name in ("student", "teacher")
    )
    config, data = GKDConfig(output_dir=str(folder / "out"), **options), Dataset.from_list(rows)
    inputs = {"train_dataset": data, "processing_class": tokenizer, "callbacks": [Clock()]}
    GKDTrainer(student, teacher, args=config, **inputs).train()
    return result


def run_topk(folder, args):
    """{divergence: {K: kd_loss at step 1}}, 0 for the live teacher, of a teacher and a student that learned a bit."""
    sft, kd = load_script("sft"), load_script("kd")
    flags = {"dataset": str(folder / "rows.jsonl"), "bf16": False, "max_len": 512, "train_batch_size": 32}
    for name, epochs, rows in (("teacher", args.teacher_epochs, 10**6), ("student", 1, 640)):
        training = {"learning_rate": 2e-3, "max_epochs": epochs, "max_samples": rows}
        paths = {"pretrain": str(folder / name), "save_path": str(folder / f"{name}_trained")}
        sft.main(sft.Args(**flags, **training, **paths))
    found, known = {}, json.loads((folder / "teacher_trained/metrics.jsonl").read_text().splitlines()[-1])
    for kind in ("forward_kl", "reverse_kl"):
        for k in (0, 16, 64, 256):
            paths = {
                "pretrain": "student_trained",
                "teacher_model": "teacher_trained",
                "cache_dir": "cache",
            }
            paths = {key: str(folder / path) for key, path in paths.items()}
            out = folder / f"{kind}-{k}"
            kd.main(
                kd.Args(**flags, **paths, save_path=str(out), max_samples=32, teacher_topk=k, kd_loss=kind)
            )
            metrics = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
            found.setdefault(kind, {})[k] = metrics["kd_loss"]
    return {"teacher_loss": known["loss"], "kd_loss": found}


def start(args, **changes):
    """The last line of output, as JSON, of a process of its own; None where it fails."""
    values = {**vars(args), **changes}
    names = (
        "part",
        "contender",
        "folder",
        "precision",
        "data",
        "steps",
        "batch",
        "micro_batch",
        "teacher_epochs",
    )
    words = [word for name in names for word in (f"--{name}", str(values[name]))]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, env=environment)
    if done.returncode:
        print(f"{values['part']} {values['contender']}: failed\n{done.stderr[-2000:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def compare(part, precision, args):
    """Rates and memory of all contenders on the rows of a part."""
    if part == "memory":
        args = argparse.Namespace(**{**vars(args), "batch": 8, "micro_batch": 8})
    runs = {name: [] for name in args.contenders}
    with tempfile.TemporaryDirectory() as shared:
        start(args, part=part, contender="prepare", folder=shared, precision=precision)
        for i in range(args.rounds):
            for name in args.contenders[i % 2 :] + args.contenders[: i % 2]:  # another one begins
                with tempfile.TemporaryDirectory() as scratch:
                    for item in ("student", "teacher", "rows.jsonl"):
                        os.symlink(Path(shared) / item, Path(scratch) / item)
                    result = start(args, part=part, contender=name, folder=scratch, precision=precision)
                runs[name] += [result] if result else []
    results = {}
    print(f"\n{part} {precision:<11} {'rows/s':>7} {'level GiB':>9} {'above':>6} {'speed':>7} {'memory':>7}")
    for name in [name for name in sorted(runs, key=["full", "ours", "trl"].index) if runs[name]]:
        seconds = [s for run in runs[name] for s in run["seconds"][1:]]
        above = max(max(run["peak_gib"]) - run["level_gib"] for run in runs[name])
        level = max(run["level_gib"] for run in runs[name])
        rate = args.batch / statistics.median(seconds)
        results[name] = {"rows_per_sec": rate, "level_gib": level, "above_gib": above, "steps": len(seconds)}
        base = results.get("full", results[name])
        speed, memory = rate / base["rows_per_sec"], above / base["above_gib"]
        print(f"{CONTENDERS[name]:<18} {rate:7.2f} {level:9.2f} {above:6.2f} {speed:6.2f}x {memory:7.0%}")
    return results


def topk_errors(args):
    """The report of part topk."""
    with tempfile.TemporaryDirectory() as folder:
        for contender in ("prepare", "topk"):
            result = start(args, part="topk", contender=contender, folder=folder, precision="fp32")
    print(
        f"\ntopk   a teacher with {result['teacher_loss']:.2f} nats per token; kd_loss, and its error with K tokens"
    )
    for kind, losses in result["kd_loss"].items():
        live = losses["0"]
        errors = [f"K = {k}: {loss / live - 1:+.2%}" for k, loss in losses.items() if k != "0"]
        print(f"{kind:<12} live {live:.4f}   {'   '.join(errors)}")
    return result


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--data", help="a .jsonl file of rows with question and ground_truth")
    parser.add_argument(
        "--steps", type=int, default=3, help="optimiser steps of a run, with an uncounted first"
    )
    parser.add_argument("--rounds", type=int, default=1, help="runs of each contender")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro_batch", type=int, default=8)
    parser.add_argument("--teacher_epochs", type=int, default=3, help="of part topk")
    parser.add_argument("--parts", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--precisions", nargs="+", default=["fp32"], choices=["bf16", "fp32"])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--out", default=str(Path(__file__).parent / "results/kd_cpu.json"))
    for name in ("--part", "--contender", "--folder", "--precision"):  # of the processes that are started
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        run = {"prepare": prepare, "ours": run_ours, "full": run_full, "trl": run_trl, "topk": run_topk}
        print("\n" + json.dumps(run[args.contender](Path(args.folder), args)), flush=True)
        os._exit(0)  # as kd.py does: exit handlers may abort
    if "trl" in args.contenders and not importlib.util.find_spec("trl"):
        print("TRL is not importable: left out", file=sys.stderr)
        args.contenders.remove("trl")
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else "model name: "
    cpu = cpu.partition("model name")[2].split("\n")[0].strip("\t :") or platform.machine()
    report = {"date": str(date.today()), "cpu": cpu, "cores": len(os.sched_getaffinity(0))}
    report |= {
        "steps": args.steps,
        "rounds": args.rounds,
        "batch": args.batch,
        "micro_batch": args.micro_batch,
    }
    for part in args.parts:
        if part == "topk":
            report[part] = topk_errors(args)
        else:
            report[part] = {precision: compare(part, precision, args) for precision in args.precisions}
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

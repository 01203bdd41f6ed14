"""How dpo.py's peak memory grows with the vocabulary, 32k to 256k, on the same token ids.

    python tests/bench/vocabulary.py
    python tests/bench/vocabulary.py --precisions fp32 bf16 --zero_stage 1

No loss needs logits of all tokens at once, so a larger vocabulary should cost its embedding and nothing else:
weights, gradients and optimiser state of the added rows. In fp32 these are 4 + 4 + 8 bytes per parameter, in
bf16 2 + 4 (gradients are added in fp32) + 12 (fp32 master weights, Adam's two averages). The ratio printed is the
growth of the peak resident set over the growth of that sum: 1 is ideal, below 1.25 is the aim.

A model of two layers with tied embeddings, random weights and random rows (one tokenizer of 32k words for both
sizes). Every measurement is a process of its own; "phases" are the peaks of its parts, each counted anew.
"""

import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
WORDS = 32_768
BYTES = {"fp32": 4 + 4 + 8, "bf16": 2 + 4 + 12}


def prepare(folder, vocabulary, args):
    """In folder: model/ with a word-level tokenizer, and rows.jsonl. Returns the model's number of parameters."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import Olmo2Config, Olmo2ForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>"] + [f"w{i}" for i in range(2, WORDS)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    tokenizer.save_pretrained(folder / "model")
    sizes = {"hidden_size": args.hidden_size, "intermediate_size": 2 * args.hidden_size}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    ids = {"vocab_size": vocabulary, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    torch.manual_seed(0)
    # a model type for which AutoTokenizer takes tokenizer.json as it is: Qwen2 would get Qwen2's own splitting
    model = Olmo2ForCausalLM(Olmo2Config(**sizes, **ids, tie_word_embeddings=True))
    model.save_pretrained(folder / "model")
    rng = random.Random(0)

    def text(n):
        return "".join(f"{word} " for word in rng.choices(words[2:], k=n))

    rows = [{"prompt": text(115), "chosen": text(40), "rejected": text(50)} for _ in range(3 * args.batch)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return sum(p.numel() for p in model.parameters())


def run(folder, args):
    """Peaks in GiB of the phases of dpo.py's main()."""
    spec = importlib.util.spec_from_file_location("script", REPO / "dpo.py")
    script = sys.modules["script"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    phases = {}

    def after(name, function):
        """function, which ends a phase: the peak since the last one is kept, and counted anew."""

        def wrapped(*inputs, **options):
            result = function(*inputs, **options)
            kib = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
            phases[name] = max(phases.get(name, 0.0), kib / 2**20)
            Path("/proc/self/clear_refs").write_text("5")
            return result

        return wrapped

    names = {"reference_logps": "reference", "start_engine": "load", "dpo_step": "forward and backward"}
    names |= {"report": "optimizer", "save_model": "save"}
    for name, phase in names.items():
        setattr(script, name, after(phase, getattr(script, name)))
    paths = {"pretrain": "model", "dataset": "rows.jsonl", "save_path": "out", "cache_dir": "cache"}
    flags = {name: str(folder / path) for name, path in paths.items()}
    flags |= {"train_batch_size": args.batch, "micro_train_batch_size": 8, "zero_stage": args.zero_stage}
    script.main(script.Args(**flags, bf16=args.precision == "bf16"))
    return phases


def measure(precision, vocabulary, args):
    """(parameters, phases) of one size, in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        values = {"folder": folder, "precision": precision, "vocabulary": vocabulary, "batch": args.batch}
        values |= {"hidden_size": args.hidden_size, "zero_stage": args.zero_stage}
        words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
        environment, results = {**os.environ, "HF_HUB_OFFLINE": "1"}, []
        for part in ("prepare", "run"):
            command = [sys.executable, __file__, "--part", part, *words]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                sys.exit(f"{part} {precision} {vocabulary}: failed\n{done.stderr[-2000:]}")
            results.append(json.loads(done.stdout.splitlines()[-1]))
        return results


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=list(BYTES))
    parser.add_argument("--vocabularies", nargs=2, type=int, default=[WORDS, 8 * WORDS], help="from, to")
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4, help="pairs of an optimiser step; there are three")
    parser.add_argument("--zero_stage", type=int, default=2)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results/vocabulary_cpu.json"))
    for name in ("--part", "--folder", "--precision", "--vocabulary"):  # of the processes that are started
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        folder = Path(args.folder)
        result = run(folder, args) if args.part == "run" else prepare(folder, int(args.vocabulary), args)
        print("\n" + json.dumps(result), flush=True)
        os._exit(0)  # as dpo.py does: exit handlers may abort
    report = {"date": str(date.today()), "hidden_size": args.hidden_size, "zero_stage": args.zero_stage}
    report |= {"batch": args.batch, "vocabularies": args.vocabularies, "results": {}}
    for precision in args.precisions:
        (n_small, small), (n_large, large) = (measure(precision, v, args) for v in args.vocabularies)
        added = (n_large - n_small) * BYTES[precision] / 2**30
        growth = {name: (large[name] - small[name]) / added for name in small}
        whole = (max(large.values()) - max(small.values())) / added
        result = {"added_gib": added, "small": small, "large": large, "growth": growth, "ratio": whole}
        report["results"][precision] = result
        print(f"\n{precision}: {added:.2f} GiB of weights, gradients and optimiser state added", flush=True)
        for name, ratio in growth.items():
            print(f"{name:<22} {small[name]:6.2f} -> {large[name]:5.2f} GiB  {ratio:5.2f}x of it")
        print(
            f"{'whole run':<22} {max(small.values()):6.2f} -> {max(large.values()):5.2f} GiB  {whole:5.2f}x of it"
        )
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

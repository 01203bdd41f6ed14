"""Rewards of the n samples of a prompt: batch_infer.py's tree beside Hugging Face, rows/s and the same scores.

    python tests/bench/scoring.py      # n = 8 samples of 128 tokens on prompts of 512: the bound is 3.3

    tree    batch_infer.py: the prompt once, its samples hang off it
    alone   AutoModelForSequenceClassification, one row per forward pass
    batch   the same, all n rows of a prompt in one pass; all are equally long, so there is no padding

They take turns, a prompt each. Rates are medians over the prompts, per second of CPU time of one thread: what
else runs on the machine does not count. The model is a random Qwen2 of 48M parameters, in fp32.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForSequenceClassification

REPO = Path(__file__).resolve().parents[2]
MODEL = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8}
MODEL |= {"num_key_value_heads": 4, "max_position_embeddings": 2048, "vocab_size": 24_576, "num_labels": 1}
MODEL |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "initializer_range": 0.1}


def load_script():
    """batch_infer.py as a module."""
    spec = importlib.util.spec_from_file_location("batch_infer", REPO / "batch_infer.py")
    script = sys.modules["batch_infer"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    for name, value in {"samples": 8, "prompt": 512, "response": 128, "prompts": 6}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results/scoring_cpu.json"))
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    script, rng = load_script(), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        Qwen2ForSequenceClassification(Qwen2Config(**MODEL)).save_pretrained(folder)
        ours = script.RewardModel(script.Args("rm", "", folder, bf16=False), "cpu")
        model = Qwen2ForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()

    def tokens(n):
        return rng.integers(2, MODEL["vocab_size"], n).astype(np.int32)

    def alone(rows):
        return torch.cat([model(row[None]).logits[:, 0] for row in rows])

    def batch(rows):
        return model(rows).logits[:, 0]

    seconds, errors = {"tree": [], "alone": [], "batch": []}, []
    for turn in range(args.prompts + 1):  # the first is not counted
        responses = [tokens(args.response) for _ in range(args.samples)]
        tree = {"prompt": tokens(args.prompt), "responses": responses}
        tree["trained"] = [np.ones(args.response, bool)] * args.samples
        rows = torch.tensor(np.stack([np.r_[tree["prompt"], ids] for ids in responses])).long()
        scores = {}
        for name, score in (("tree", lambda: ours([tree])), ("alone", lambda: alone(rows)), ("batch", lambda: batch(rows))):
            with torch.inference_mode():
                started = time.process_time()
                scores[name] = score()
                seconds[name] += [time.process_time() - started] if turn else []
        errors += [(scores["tree"] - scores[name]).abs().max().item() for name in ("alone", "batch")]
    rates = {name: args.samples / statistics.median(times) for name, times in seconds.items()}
    report = {"date": str(date.today()), "cpu": platform.processor() or platform.machine()}
    report |= {"spread": float(scores["alone"].std()), "largest_error": max(errors), "rows_per_sec": rates}
    bound = args.samples * (args.prompt + args.response) / (args.prompt + args.samples * args.response)
    report |= {"bound": bound, "seconds": seconds}
    report |= {name: getattr(args, name) for name in ("samples", "prompt", "response", "prompts")}
    for name, rate in rates.items():
        print(f"{name:<6} {rate:7.2f} rows/s   tree: {rates['tree'] / rate:.2f}x")
    print(f"bound by tokens {bound:.2f}x, largest error {max(errors):.1e}, spread of the scores {report['spread']:.2f}")
    Path(args.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

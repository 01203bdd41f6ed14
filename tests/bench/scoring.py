"""Scoring n samples of a prompt with batch_infer.py beside scoring each alone and in plain padded batches.

    python tests/bench/scoring.py                # 8 samples of 128 tokens on prompts of 512: the bound is 3.3
    python tests/bench/scoring.py --samples 1    # one response per prompt: nothing to share, nothing to lose

Rates are rows per second of CPU time of one thread, medians over rounds: what else runs does not count. The model
is a random Qwen2 of 48M parameters, in fp32.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2Model

REPO = Path(__file__).resolve().parents[2]
MODEL = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8}
MODEL |= {"num_key_value_heads": 4, "max_position_embeddings": 2048, "vocab_size": 24_576}


def load_script():
    """batch_infer.py as a module."""
    spec = importlib.util.spec_from_file_location("batch_infer", REPO / "batch_infer.py")
    script = sys.modules["batch_infer"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"samples": 8, "prompt": 512, "response": 128, "rows": 8, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results/scoring_cpu.json"))
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    script, rng = load_script(), np.random.default_rng(0)
    body = Qwen2Model(Qwen2Config(**MODEL)).eval()

    def tokens(n):
        return rng.integers(2, MODEL["vocab_size"], n).tolist()

    def ours(items):
        found = {}
        for batch in script.make_batches(items, args.rows):
            for item, states in zip(batch, script.hidden_states(body, batch, "cpu")):
                found[item.key] = states[-1]
        return torch.stack([found[item.key] for item in items])

    def plain(items, size):
        found = []
        for begin in range(0, len(items), size):
            batch = items[begin : begin + size]
            ids, mask = script.pad([item.prompt + item.response for item in batch], "cpu")
            hidden = body(ids, attention_mask=mask, use_cache=False).last_hidden_state
            ends = [len(item.prompt) + len(item.response) - 1 for item in batch]
            found += [hidden[i, end] for i, end in enumerate(ends)]
        return torch.stack(found)

    runs = {"ours": ours, "alone": lambda items: plain(items, 1), "batch": lambda items: plain(items, args.rows)}
    seconds, error = {name: [] for name in runs}, 0.0
    for turn in range(args.rounds + 1):  # the first is not counted
        prompts = [tokens(args.prompt) for _ in range(args.rows // args.samples)]
        items = [script.Item(i, prompts[i // args.samples], tokens(args.response), None) for i in range(args.rows)]
        found = {}
        for name, run in runs.items():
            with torch.inference_mode():
                started = time.process_time()
                found[name] = run(items)
                seconds[name] += [time.process_time() - started] if turn else []
        error = max(error, *((found["ours"] - found[name]).abs().max().item() for name in ("alone", "batch")))
    assert error < 1e-3, error
    rates = {name: args.rows / statistics.median(times) for name, times in seconds.items()}
    for name, rate in rates.items():
        print(f"{name:<6} {rate:6.2f} rows per CPU second, {rates['ours'] / rate:.2f}x")
    report = {"date": str(date.today()), "cpu": platform.machine(), "torch": torch.__version__, "error": error}
    report |= {**vars(args), "out": None, "rows_per_cpu_second": rates}
    Path(args.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

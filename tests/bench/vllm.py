"""generate_vllm beside a bare LLM.generate over the same requests: tokens/s, the same samples.

    python tests/bench/vllm.py         # a random Qwen2 of 48M parameters, vLLM's CPU build

Both use one engine with generate_vllm's settings, the same token ids, seeds and sampling parameters, and take
turns. generate_vllm decodes, writes rows and flushes while others run; LLM.generate returns when all are done.
Rates are samples' tokens per second, medians over the rounds after an uncounted one; of wall-clock time and of
CPU time of the process, which does not count what else runs on the machine.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
MODEL = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8}
MODEL |= {"num_key_value_heads": 4, "max_position_embeddings": 2048, "vocab_size": 24_576}
MODEL |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "initializer_range": 0.1}


def load_script():
    """batch_infer.py as a module."""
    spec = importlib.util.spec_from_file_location("batch_infer", REPO / "batch_infer.py")
    script = sys.modules["batch_infer"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def prepare(folder, n_prompts):
    """A random model with a byte-level tokenizer in folder/model, and folder/prompts.jsonl."""
    import random

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    alphabet = {letter: i + 2 for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = {f"Ġ{i}": i for i in range(len(alphabet) + 2, MODEL["vocab_size"])}
    bpe = Tokenizer(models.BPE({"<pad>": 0, "<eos>": 1} | alphabet | words, []))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>")
    tokenizer.save_pretrained(folder / "model")
    Qwen2ForCausalLM(Qwen2Config(**MODEL)).save_pretrained(folder / "model")
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefghij klmnop", k=rng.randint(30, 90))) for _ in range(n_prompts)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))


class OneEngine:
    """Stands in for vllm.LLM: the first call makes the engine, which every later call gets, still running."""

    def __init__(self, make):
        self.make, self.llm = make, None

    def __call__(self, *settings, **more):
        if self.llm is None:
            self.llm = self.make(*settings, **more)
            self.llm.llm_engine.engine_core.shutdown = lambda: None
        return self.llm


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    for name, value in {"prompts": 24, "samples": 4, "max_new_tokens": 48, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results/vllm_cpu.json"))
    options = parser.parse_args()
    sys.path.remove(str(Path(__file__).resolve().parent))  # this file is called vllm, too
    import vllm

    script, folder = load_script(), Path(tempfile.mkdtemp())
    prepare(folder, options.prompts)
    flags = {"dataset": str(folder / "prompts.jsonl"), "best_of_n": options.samples, "bf16": False}
    flags |= {"max_new_tokens": options.max_new_tokens, "prompt_max_len": 200, "pretrain": str(folder / "model")}
    args = script.Args("generate_vllm", str(folder / "out.jsonl"), **flags)
    tokenizer, stop_ids = script.load_tokenizer(args.pretrain, args)
    prompts = script.make_prompts(script.load_rows(args.dataset, None, "train", 10**9), tokenizer, args)
    vllm.LLM = OneEngine(vllm.LLM)

    def ours(turn):
        """[samples of each prompt], as texts."""
        args.output_path = str(folder / f"{turn}.jsonl")
        Path(f"{args.output_path}.partial").mkdir()
        parts = script.Parts(args, 0, 0)
        script.generate_vllm(prompts, parts, tokenizer, stop_ids, args, lambda *numbers: None)
        rows = parts.read()
        return [[rows[prompt.id, k]["output"] for k in range(args.best_of_n)] for prompt in prompts]

    def bare(turn):
        common = {"n": args.best_of_n, "temperature": 1.0, "stop_token_ids": sorted(stop_ids)}
        seeds = [script.request_seed(args, prompt) for prompt in prompts]
        params = [vllm.SamplingParams(seed=seed, max_tokens=args.max_new_tokens, **common) for seed in seeds]
        inputs = [{"prompt_token_ids": prompt.ids} for prompt in prompts]
        return vllm.LLM.llm.generate(inputs, params, use_tqdm=False)

    runs = {"generate_vllm": [], "LLM.generate": []}
    for turn in range(options.rounds + 1):  # the first is not counted
        results = {}
        for name, run in (("generate_vllm", ours), ("LLM.generate", bare)):
            wall, cpu = time.perf_counter(), time.process_time()
            results[name] = run(turn)
            spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
            runs[name] += [spent] if turn else []
        samples = [sample for output in results["LLM.generate"] for sample in output.outputs]
        texts = [tokenizer.decode([t for t in sample.token_ids if t not in stop_ids]) for sample in samples]
        assert sum(results["generate_vllm"], []) == texts, "not the same samples"
        n_tokens = sum(len(sample.token_ids) for sample in samples)
    rates = {}
    for name, times in runs.items():
        rates[name] = {kind: n_tokens / statistics.median(t[kind] for t in times) for kind in ("wall", "cpu")}
    for name, rate in rates.items():
        wall, cpu = (rate[kind] / rates["LLM.generate"][kind] for kind in ("wall", "cpu"))
        print(f"{name:<14} {rate['wall']:7.1f} tokens/s ({wall:.1%}) {rate['cpu']:7.1f} per CPU second ({cpu:.1%})")
    report = {"date": str(date.today()), "cpu": platform.machine(), "vllm": vllm.__version__}
    report |= {name: getattr(options, name) for name in ("prompts", "samples", "max_new_tokens", "rounds")}
    report |= {"cores": len(os.sched_getaffinity(0)), "tokens": n_tokens, "tokens_per_sec": rates, "seconds": runs}
    Path(options.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

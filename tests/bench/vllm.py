"""generate_vllm beside a bare loop over the same requests: tokens/s, the same samples.

    python tests/bench/vllm.py         # a random Qwen2 of 48M parameters, vLLM's CPU build

Both use one engine with generate_vllm's settings, the same token ids, seeds and sampling parameters, and take
turns. generate_vllm decodes, writes rows and flushes while others run; the bare loop (that of LLM.generate) keeps ids.
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


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    for name, value in {"prompts": 24, "samples": 4, "max_new_tokens": 48, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results/vllm_cpu.json"))
    options = parser.parse_args()
    sys.path.remove(str(Path(__file__).resolve().parent))  # this file is called vllm, too
    script, folder = load_script(), Path(tempfile.mkdtemp())
    prepare(folder, options.prompts)
    flags = {"dataset": str(folder / "prompts.jsonl"), "input_key": "prompt", "bf16": False}
    flags |= {"best_of_n": options.samples, "max_new_tokens": options.max_new_tokens, "prompt_max_len": 200}
    flags["pretrain"] = str(folder / "model")
    args = script.Args("generate_vllm", str(folder / "out.jsonl"), **flags)
    tokenizer = script.load_tokenizer(args.pretrain, args)
    stop_ids = script.find_stops(MODEL["eos_token_id"], tokenizer)
    items = script.collect(script.sampling_items, script.load_rows(args), tokenizer, None, args)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # before the import, or it is several times slower
    import vllm
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    start, engines = vllm.LLM, []

    def start_once(*names, **settings):
        engines[:] = engines or [start(*names, **settings)]
        return engines[0]

    vllm.LLM = start_once

    def ours(turn):
        """Token counts of the samples, from the file that the writer leaves."""
        (folder / str(turn)).mkdir()
        results = script.generate_vllm([[item] for item in items], tokenizer, args, "cpu")
        script.write_results(folder / f"{turn}/0.jsonl", results)
        found = script.read_results(folder / str(turn))
        return [found[item.key]["tokens"] for item in items]

    def bare(turn):
        """The same requests in a bare loop, as LLM.generate has it."""
        common = {"temperature": 1.0, "stop_token_ids": sorted(stop_ids), "max_tokens": args.max_new_tokens}
        engine = engines[0].llm_engine
        common |= {"detokenize": False, "output_kind": RequestOutputKind.FINAL_ONLY}
        for i, item in enumerate(items):
            params = SamplingParams(seed=script.make_seed(args, item.key), **common)
            engine.add_request(str(i), {"prompt_token_ids": item.prompt}, params)
        found = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                found[int(output.request_id)] = output.outputs[0].token_ids
        return [sum(token not in stop_ids for token in found[i]) for i in range(len(items))]

    runs = {"generate_vllm": [], "bare": []}
    for turn in range(options.rounds + 1):  # the first is not counted
        results = {}
        for name, run in (("generate_vllm", ours), ("bare", bare)):
            wall, cpu = time.perf_counter(), time.process_time()
            results[name] = run(turn)
            spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
            runs[name] += [spent] if turn else []
        assert results["generate_vllm"] == results["bare"], "not the same samples"
    n_tokens, rates = sum(results["bare"]), {}
    for name, times in runs.items():
        rates[name] = {kind: n_tokens / statistics.median(t[kind] for t in times) for kind in ("wall", "cpu")}
    for name, rate in rates.items():
        wall, cpu = (rate[kind] / rates["bare"][kind] for kind in ("wall", "cpu"))
        print(f"{name:<14} {rate['wall']:7.1f} tokens/s ({wall:.1%}) {rate['cpu']:7.1f} per CPU second ({cpu:.1%})")
    report = {"date": str(date.today()), "cpu": platform.machine(), "vllm": vllm.__version__}
    report |= {name: getattr(options, name) for name in ("prompts", "samples", "max_new_tokens", "rounds")}
    report |= {"cores": len(os.sched_getaffinity(0)), "tokens": n_tokens, "tokens_per_sec": rates, "seconds": runs}
    Path(options.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

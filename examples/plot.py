"""The report of a loop: what iterate.sh measured, as a table, numbers, a picture and samples.

  python examples/plot.py --out runs/toy --pretrain runs/toy/toy/policy --score_fn examples/toy.py:true_score

Reads OUT/iter_*/scored.jsonl (id, sample, input, output, finish_reason, reward): iter_k holds samples of the
policy after k iterations. Writes OUT/samples.md, OUT/report.png and OUT/report.json, per iteration:
    reward              mean over all samples; reward_low, reward_high: 95 % interval (bootstrap over prompts)
    reward_best_of_n    mean over prompts of the best of their n samples
    true_score          mean of --score_fn over all samples (only with --score_fn)
    output_tokens       mean length of an output, without EOS
    length_correlation  of reward and length over all samples: near 1, the reward model pays for length
    finished            share of answers that ended by themselves; the others ran into --max_new_tokens
    distinct_2          different pairs of neighbouring tokens / all pairs: low when it repeats itself
    all_equal           prompts whose n rewards are all the same, so that nothing can be chosen
    prompts, samples, unscored   counts; unscored samples (reward null) are in no mean of rewards
"""

import importlib.util
import json
import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro


@dataclass
class Args:
    out: str
    """The folder OUT of iterate.sh."""
    pretrain: str
    """Model folder or hub name whose tokenizer counts the output tokens."""
    score_fn: str | None = None
    """FILE.py:NAME, a function of the output text: the truth behind the reward, where it is known."""


def die(message):
    """Ends the program: one line on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def read_iterations(out):
    """{iteration: rows} of OUT/iter_*/scored.jsonl in order; a reward of null becomes NaN."""
    iterations = {}
    for path in sorted(Path(out).glob("iter_[0-9]*/scored.jsonl"), key=lambda p: int(p.parent.name[5:])):
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        except json.JSONDecodeError as e:
            die(f"{path}: broken JSON: {e}")
        for name in ("id", "sample", "input", "output", "finish_reason", "reward"):
            if not rows or name not in rows[0]:
                die(f"{path}: {'no column ' + name if rows else 'no rows'}")
        for row in rows:
            row["reward"] = math.nan if row["reward"] is None else float(row["reward"])
        iterations[int(path.parent.name[5:])] = sorted(rows, key=lambda row: (row["id"], row["sample"]))
    return iterations or die(f"{out}: no iter_*/scored.jsonl; is it the OUT of iterate.sh?")


def load_function(spec):
    """The function of FILE.py:NAME."""
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        die(f"--score_fn {spec}: no such file; write FILE.py:NAME")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses look their module up by name
    module_spec.loader.exec_module(module)
    return getattr(module, name, None) or die(f"--score_fn {spec}: {path} has no {name}")


def bootstrap(groups, draws=2000):
    """95 % interval of the mean over all values of groups (rewards per prompt) when prompts are redrawn."""
    sums, counts = np.array([sum(g) for g in groups]), np.array([len(g) for g in groups])
    rng, means = np.random.default_rng(0), []
    for _ in range(draws):
        times = np.bincount(rng.integers(0, len(sums), len(sums)), minlength=len(sums))
        means.append(times @ sums / (times @ counts))
    return [float(x) for x in np.percentile(means, [2.5, 97.5])]


def measure(iteration, rows, ids, score_fn):
    """One object of report.json. ids: the token ids of each output."""
    scored = [(row, len(i)) for row, i in zip(rows, ids) if math.isfinite(row["reward"])]
    groups = defaultdict(list)
    for row, _ in scored:
        groups[row["id"]].append(row["reward"])
    rewards, lengths = np.array([r["reward"] for r, _ in scored]), np.array([n for _, n in scored])
    low, high = bootstrap(groups.values()) if scored else (None, None)
    varied = len(scored) > 1 and rewards.std() > 0 and lengths.std() > 0
    pairs = [pair for i in ids for pair in zip(i, i[1:])]
    truth = {"true_score": float(np.mean([score_fn(row["output"]) for row in rows]))} if score_fn else {}
    return {
        "iter": iteration,
        "reward": float(rewards.mean()) if scored else None,
        "reward_low": low,
        "reward_high": high,
        "reward_best_of_n": float(np.mean([max(g) for g in groups.values()])) if scored else None,
        **truth,
        "output_tokens": float(np.mean([len(i) for i in ids])),
        "length_correlation": float(np.corrcoef(rewards, lengths)[0, 1]) if varied else None,
        "finished": float(np.mean([row["finish_reason"] == "stop" for row in rows])),
        "distinct_2": len(set(pairs)) / len(pairs) if pairs else None,
        "all_equal": sum(len(g) > 1 and min(g) == max(g) for g in groups.values()),
        "prompts": len({row["id"] for row in rows}),
        "samples": len(rows),
        "unscored": len(rows) - len(scored),
    }


def print_table(report):
    """Fixed columns, one line per iteration."""
    columns = """iter:iter:d  reward:reward:.4f  reward_low:low:.4f  reward_high:high:.4f
        reward_best_of_n:best-of-n:.4f  true_score:true-score:.4f  output_tokens:tokens:.1f
        length_correlation:length-r:.2f  finished:finished:.1%  distinct_2:distinct-2:.3f
        all_equal:all-equal:d  unscored:unscored:d"""
    columns = [c.split(":") for c in columns.split() if c.split(":")[0] in report[0]]
    print(" ".join(f"{heading:>{max(7, len(heading))}}" for _, heading, _ in columns))
    for result in report:
        cells = ["-" if result[key] is None else format(result[key], form) for key, _, form in columns]
        print(" ".join(f"{text:>{max(7, len(h))}}" for text, (_, h, _) in zip(cells, columns)))


def write_samples(path, iterations, score_fn, n=5):
    """Markdown: n prompts that the first and the last iteration share, their first samples side by side."""
    first, last = min(iterations), max(iterations)
    # reversed: of the rows of one prompt, sample 0 comes last and stays
    before, after = ({row["id"]: row for row in reversed(iterations[k])} for k in (first, last))
    shared = sorted(before.keys() & after.keys())
    chosen = shared[:: max(1, len(shared) // n)][:n]

    def cell(text):
        for old, new in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("\\", "&#92;"), ("\n", "<br>")):
            text = text.replace(old, new)
        return text

    def answer(row):
        truth = f", true score {score_fn(row['output']):.2f}" if score_fn else ""
        return f"{cell(row['output'][:1500])}<br>_reward {row['reward']:.3f}{truth}, {row['finish_reason']}_"

    lines = [f"| prompt | iteration {first} | iteration {last} |", "|---|---|---|"]
    lines += [f"| {cell(before[i]['input'])} | {answer(before[i])} | {answer(after[i])} |" for i in chosen]
    none = [f"Iterations {first} and {last} have no prompt in common."]
    path.write_text("# Before and after\n\n" + "\n".join(lines if shared else none) + "\n", encoding="utf-8")


def plot(path, report):
    """Left: what reward model and truth say. Right: length and finished answers, where cheating shows."""
    try:
        import matplotlib
    except ImportError:
        return print("notice no report.png: matplotlib is missing (pip install matplotlib)")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    series = {key: [math.nan if r[key] is None else r[key] for r in report] for key in report[0]}
    x = series["iter"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", width_ratios=[3, 2])
    left.fill_between(x, series["reward_low"], series["reward_high"], alpha=0.2, lw=0, label="95 % interval")
    left.plot(x, series["reward"], "C0o-", label="reward, mean of the samples")
    left.plot(x, series["reward_best_of_n"], "C0^--", alpha=0.6, label="reward, best of n")
    if "true_score" in series:
        left.plot(x, series["true_score"], "C2s-", label="true score")
    left.set(title="Samples of the policy after k iterations", xlabel="iteration k", ylabel="score", xticks=x)
    left.grid(alpha=0.3)
    left.legend(fontsize=8)
    right.plot(x, series["output_tokens"], "C1o-")
    right.set(title="Length and finished answers", xlabel="iteration k", xticks=x)
    right.set_ylim(0, 1.2 * max(series["output_tokens"]) + 1)
    right.set_ylabel("output tokens", color="C1")
    share = right.twinx()
    share.plot(x, [100 * value for value in series["finished"]], "C3s--")
    share.set(ylim=(0, 105))
    share.set_ylabel("finished, %", color="C3")
    figure.savefig(path, dpi=120)


def main(args):
    iterations = read_iterations(args.out)
    score_fn = load_function(args.score_fn) if args.score_fn else None
    from transformers import AutoTokenizer  # seconds to import: after the checks

    tokenizer, out, report = AutoTokenizer.from_pretrained(args.pretrain), Path(args.out), []
    for iteration, rows in iterations.items():
        ids = tokenizer([row["output"] for row in rows], add_special_tokens=False)["input_ids"]
        report.append(measure(iteration, rows, ids, score_fn))
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    write_samples(out / "samples.md", iterations, score_fn)
    plot(out / "report.png", report)
    print_table(report)
    print(f"saved  {out}/report.json, report.png, samples.md")
    rewards = [math.nan if r["reward"] is None else r["reward"] for r in report]
    flat = [str(r["iter"]) for r, a, b in zip(report[1:], rewards, rewards[1:]) if not b > a]
    verdict = f"did not rise in iteration {', '.join(flat)} of" if flat else "rose in each of"
    print(f"reward {verdict} {len(report) - 1} iterations: " + " -> ".join(f"{r:.4f}" for r in rewards))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

"""The report of a loop: what iterate.sh measured, as a table, numbers, a picture and samples.

  python examples/plot.py --out runs/toy --pretrain runs/toy/toy/policy --score_fn examples/toy.py:true_score

Reads OUT/iter_*/scored.jsonl (id, sample, input, output, finish_reason, reward): iter_k holds samples of the
policy after k iterations; where nothing was scored, generate.jsonl. METHOD=csft has OUT/asked_*/ instead: its
samples were asked for a reward. Writes OUT/samples.md, OUT/report.png and OUT/report.json, per folder:
    asked, achieved     csft: the reward asked for and the mean reward, in standard deviations of the data
    reward              mean over all samples; reward_low, reward_high: 95 % interval (bootstrap over prompts)
    reward_best_of_n    mean over prompts of the best of their n samples
    kl_first, kl_teacher  KL(policy, first policy or teacher) in nats per sample, from iter_*/logps_*.jsonl:
                        the mean of log pi(sample) - log other(sample)
    true_score          mean of --score_fn over all samples (only with --score_fn)
    output_tokens       mean length of an output, without EOS
    length_correlation  of reward and length over all samples: near 1, the reward model pays for length
    finished            share of answers that ended by themselves; the others ran into --max_new_tokens
    distinct_2          different pairs of neighbouring tokens / all pairs: low when it repeats itself
    all_right           prompts whose n rewards are all the highest one that occurs (1, if it checks)
    all_wrong           prompts whose n rewards are all the lowest one that occurs
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


def read_rows(path):
    """Rows of a .jsonl in order of id and sample."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except json.JSONDecodeError as e:
        die(f"{path}: broken JSON: {e}")
    for name in ("id", "sample"):
        if not rows or name not in rows[0]:
            die(f"{path}: {'no column ' + name if rows else 'no rows'}")
    return sorted(rows, key=lambda row: (row["id"], row["sample"]))


def read_folders(out):
    """("iter" or "asked", {number: rows}) of OUT's folders in order; a reward of null or none becomes NaN."""
    kind = "asked" if [*Path(out).glob("asked_*/scored.jsonl")] else "iter"
    names = sorted(Path(out).glob(f"{kind}_*[0-9]"), key=lambda path: float(path.name.partition("_")[2]))
    folders = {}
    for folder in names:
        paths = [folder / "scored.jsonl", folder / "generate.jsonl"]
        path = next((path for path in paths if path.exists()), None)
        if path is None:  # the loop has just begun it
            continue
        rows = read_rows(path)
        for name in ("input", "output", "finish_reason", "reward"):
            if name not in rows[0] and (name, path.stem) != ("reward", "generate"):
                die(f"{path}: no column {name}")
        for row in rows:
            row["reward"] = math.nan if row.get("reward") is None else float(row["reward"])
        number = float(folder.name.partition("_")[2])
        folders[number if kind == "asked" else int(number)] = rows
    return kind, folders or die(f"{out}: no iter_*/scored.jsonl; is it the OUT of iterate.sh?")


def divergences(folder):
    """{"kl_first", "kl_teacher": mean difference of the samples' log-probs}, of those that were measured."""
    logps = {}
    for name in ("policy", "first", "teacher"):
        if (folder / f"logps_{name}.jsonl").exists():
            rows = read_rows(folder / f"logps_{name}.jsonl")
            logps[name] = np.array([row["logps"] for row in rows], float)
    policy = logps.pop("policy", None)  # null where a sample was too long: NaN
    others = {} if policy is None else logps
    return {f"kl_{name}": float(np.nanmean(policy - other)) for name, other in others.items()}


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


def measure(rows, ids, score_fn):
    """The numbers of one folder's samples. ids: the token ids of each output."""
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
        "reward": float(rewards.mean()) if scored else None,
        "reward_low": low,
        "reward_high": high,
        "reward_best_of_n": float(np.mean([max(g) for g in groups.values()])) if scored else None,
        **truth,
        "output_tokens": float(np.mean([len(i) for i in ids])),
        "length_correlation": float(np.corrcoef(rewards, lengths)[0, 1]) if varied else None,
        "finished": float(np.mean([row["finish_reason"] == "stop" for row in rows])),
        "distinct_2": len(set(pairs)) / len(pairs) if pairs else None,
        "all_right": sum(bool(min(g) == rewards.max()) for g in groups.values()),
        "all_wrong": sum(bool(max(g) == rewards.min()) for g in groups.values()),
        "all_equal": sum(len(g) > 1 and min(g) == max(g) for g in groups.values()),
        "prompts": len({row["id"] for row in rows}),
        "samples": len(rows),
        "unscored": len(rows) - len(scored),
    }


def print_table(report):
    """Fixed columns, one line per iteration."""
    columns = """iter:iter:d  asked:asked:g  achieved:achieved:.3f  reward:reward:.4f  reward_low:low:.4f
        reward_high:high:.4f  reward_best_of_n:best-of-n:.4f  true_score:true-score:.4f  kl_first:kl-first:.2f
        kl_teacher:kl-teacher:.3f  output_tokens:tokens:.1f  length_correlation:length-r:.2f
        finished:finished:.1%  distinct_2:distinct-2:.3f  all_equal:all-equal:d  unscored:unscored:d"""
    told = {"iter", "asked"} | {key for result in report for key, value in result.items() if value}
    columns = [c.split(":") for c in columns.split() if c.split(":")[0] in {*report[0], *report[-1]} & told]
    print(" ".join(f"{heading:>{max(7, len(heading))}}" for _, heading, _ in columns))
    for result in report:
        cells = ["-" if result.get(key) is None else format(result[key], form) for key, _, form in columns]
        print(" ".join(f"{text:>{max(7, len(h))}}" for text, (_, h, _) in zip(cells, columns)))


def write_samples(path, kind, iterations, score_fn, n=5):
    """Markdown: n prompts that the first and the last folder share, their first samples side by side."""
    kind, first, last = {"iter": "iteration"}.get(kind, kind), min(iterations), max(iterations)
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

    lines = [f"| prompt | {kind} {first} | {kind} {last} |", "|---|---|---|"]
    lines += [f"| {cell(before[i]['input'])} | {answer(before[i])} | {answer(after[i])} |" for i in chosen]
    none = [f"{kind} {first} and {last} have no prompt in common."]
    path.write_text("# Before and after\n\n" + "\n".join(lines if shared else none) + "\n", encoding="utf-8")


def plot(path, report):
    """Left: what reward model and truth say. Right: length and finished answers, where cheating shows."""
    try:
        import matplotlib
    except ImportError:
        return print("notice no report.png: matplotlib is missing (pip install matplotlib)")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    keys = {key for result in report for key in result}
    series = {key: [math.nan if r.get(key) is None else r[key] for r in report] for key in keys}
    kind = "asked" if "asked" in keys else "iter"
    label, x = {"iter": "iteration k", "asked": "reward asked for"}[kind], series[kind]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", width_ratios=[3, 2])
    if kind == "asked":
        left.plot(x, series["achieved"], "C0o-", label="reward achieved, in std of the data")
        left.plot(x, x, "k:", lw=1, label="as asked")
    else:
        interval = {"alpha": 0.2, "lw": 0, "label": "95 % interval"}
        left.fill_between(x, series["reward_low"], series["reward_high"], **interval)
        left.plot(x, series["reward"], "C0o-", label="reward, mean of the samples")
        left.plot(x, series["reward_best_of_n"], "C0^--", alpha=0.6, label="reward, best of n")
    others = [("true_score", "C2s-", "true score"), ("kl_teacher", "C4d-", "KL to the teacher, nats")]
    for name, style, text in others:
        if name in series:
            left.plot(x, series[name], style, label=text)
    left.set(title="Samples of the policy", xlabel=label, ylabel="score", xticks=x)
    left.grid(alpha=0.3)
    left.legend(fontsize=8)
    right.plot(x, series["output_tokens"], "C1o-")
    right.set(title="Length and finished answers", xlabel=label, xticks=x)
    right.set_ylim(0, 1.2 * max(series["output_tokens"]) + 1)
    right.set_ylabel("output tokens", color="C1")
    share = right.twinx()
    share.plot(x, [100 * value for value in series["finished"]], "C3s--")
    share.set(ylim=(0, 105))
    share.set_ylabel("finished, %", color="C3")
    figure.savefig(path, dpi=120)


def verdict(name, values, direction, unit):
    """One line: whether a number moved in the direction (1: up) from each folder to the next."""
    flat = [str(i) for i, (a, b) in enumerate(zip(values, values[1:]), 1) if not direction * (b - a) > 0]
    done, infinitive = {1: ("rose", "rise"), -1: ("fell", "fall")}[direction]
    text = f"did not {infinitive} in {unit} {', '.join(flat)} of" if flat else f"{done} in each of"
    return f"{name} {text} {len(values) - 1} {unit}s: " + " -> ".join(f"{value:.4f}" for value in values)


def main(args):
    kind, folders = read_folders(args.out)
    score_fn = load_function(args.score_fn) if args.score_fn else None
    from transformers import AutoTokenizer  # seconds to import: after the checks

    tokenizer, out, report = AutoTokenizer.from_pretrained(args.pretrain), Path(args.out), []
    for number, rows in folders.items():
        ids = tokenizer([row["output"] for row in rows], add_special_tokens=False)["input_ids"]
        result = {kind: number, **measure(rows, ids, score_fn)}
        if kind == "asked":
            data = json.loads((out / "rm.jsonl.meta.json").read_text())["summary"]
            result["achieved"] = (result["reward"] - data["reward_mean"]) / (data["reward_std"] or 1)
        else:
            result |= divergences(out / f"iter_{number}")
        report.append(result)
    if kind == "iter" and "kl_first" in report[-1]:
        report[0]["kl_first"] = 0.0  # it is the first policy
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    write_samples(out / "samples.md", kind, folders, score_fn)
    plot(out / "report.png", report)
    print_table(report)
    print(f"saved  {out}/report.json, report.png, samples.md")
    for name, direction in (("kl_teacher", -1), ("achieved", 1), ("reward", 1)):
        if report[-1].get(name) is not None:
            values = [math.nan if result.get(name) is None else result[name] for result in report]
            return print(verdict(name, values, direction, {"iter": "iteration", "asked": "step"}[kind]))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

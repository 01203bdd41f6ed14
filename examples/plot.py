"""The report of a loop: what iterate.sh measured, as a table, numbers, a picture and samples.

  python examples/plot.py --out runs/toy --score_fn examples/toy.py:true_score

Reads the samples of the policy: scored.jsonl, or else generate.jsonl, in OUT/iter_*/ (METHOD=csft: asked_*/).
Writes OUT/samples.md, OUT/report.png and OUT/report.json, with these numbers per folder:
    asked, achieved   csft: the reward asked for and the mean reward, in standard deviations of the data
    reward            mean over all samples; *_low and *_high: 95 % interval, bootstrapped over prompts
    reward_best_of_n  mean over prompts of the best of their n samples
    kl_first, kl_teacher   KL(policy, first policy or teacher) in nats per sample: mean log pi - log other
    true_score        mean of --score_fn over all samples
    output_tokens     mean number of tokens of a sample: a reward model that pays for length shows here
    finished          share of samples that ended by themselves; the others ran into --max_new_tokens
    unscored          number of samples without a reward; they are in no mean of rewards
"""

import json
import runpy
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure

COLUMNS = """iter:iter:g asked:asked:g achieved:achieved:.3f reward:reward:.4f reward_low:low:.4f
reward_high:high:.4f reward_best_of_n:best-of-n:.4f true_score:true-score:.4f kl_first:kl-first:.2f
kl_teacher:kl-teacher:.3f output_tokens:tokens:.1f finished:finished:.1% unscored:unscored:d"""


@dataclass
class Args:
    out: str  # the folder OUT of iterate.sh
    score_fn: str | None = None  # FILE.py:NAME, a function of the output text: the truth, where it is known


def die(message):
    """Ends the program with one line on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def read_rows(path):
    """Rows of a .jsonl in order of id and sample."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return sorted(rows, key=lambda row: (row["id"], row["sample"]))


def read_folders(out):
    """("iter" or "asked", {number: rows}) of OUT's folders in order of their numbers."""
    kind = "asked" if list(out.glob("asked_*")) else "iter"
    folders = {}
    for folder in out.glob(f"{kind}_*"):
        for name in ("generate.jsonl", "scored.jsonl"):  # the second is the first with rewards
            if (folder / name).exists():
                folders[float(folder.name.partition("_")[2])] = read_rows(folder / name)
    if not folders:
        die(f"{out} holds no samples: is it the OUT of iterate.sh?")
    return kind, dict(sorted(folders.items()))


def by_prompt(rows, values):
    """[[values of a prompt's samples]], without values that are None."""
    groups = defaultdict(list)
    for row, value in zip(rows, values):
        if value is not None:
            groups[row["id"]].append(value)
    return list(groups.values())


def mean_and_interval(name, groups, draws=2000):
    """{name, name_low, name_high}: mean and 95 % interval of values that are grouped by prompt."""
    sums = np.array([sum(group) for group in groups])
    counts = np.array([len(group) for group in groups])
    # Only prompts are independent, so the bootstrap redraws them, not samples.
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(groups), (draws, len(groups)))
    low, high = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), [2.5, 97.5])
    return {name: float(sums.sum() / counts.sum()), f"{name}_low": float(low), f"{name}_high": float(high)}


def measure(rows, score_fn):
    """The numbers of one folder's samples."""
    result = {}
    rewards = by_prompt(rows, [row.get("reward") for row in rows])
    if rewards:
        result |= mean_and_interval("reward", rewards)
        result["reward_best_of_n"] = float(np.mean([max(group) for group in rewards]))
    if score_fn:
        result["true_score"] = float(np.mean([score_fn(row["output"]) for row in rows]))
    if "tokens" in rows[0]:
        result["output_tokens"] = float(np.mean([row["tokens"] for row in rows]))
    result["finished"] = float(np.mean([row["finish_reason"] == "stop" for row in rows]))
    result["unscored"] = len(rows) - sum(len(group) for group in rewards)
    return result


def divergences(folder):
    """KL from the first policy and from the teacher, where iterate.sh took the samples' log-probs."""
    result = {}
    for name in ("first", "teacher"):
        if (folder / f"logps_{name}.jsonl").exists():
            policy = read_rows(folder / "logps_policy.jsonl")
            other = read_rows(folder / f"logps_{name}.jsonl")
            pairs = [(a["logps"], b["logps"]) for a, b in zip(policy, other)]
            values = [None if None in pair else pair[0] - pair[1] for pair in pairs]
            result |= mean_and_interval(f"kl_{name}", by_prompt(policy, values))
    return result


def verdict(name, report, rises):
    """One line; that a number rose (or fell) is said only where it is shown."""
    first, last = report[0], report[-1]
    low, high = f"{name}_low", f"{name}_high"
    steps = np.diff([result[name] for result in report])
    if rises:
        apart, ahead = last[low] > first[high], (steps >= 0).all()
    else:
        apart, ahead = last[high] < first[low], (steps <= 0).all()
    word = "rose" if rises else "fell"
    course = " -> ".join(f"{result[name]:.4f}" for result in report)
    if apart and ahead:
        return f"{name} {word}: intervals of first and last policy apart, no step back: {course}"
    doubts = [] if apart else ["the 95 % intervals of first and last policy overlap"]
    doubts += [] if ahead else ["a step went back"]
    return f"{name}: not shown that it {word}: {' and '.join(doubts)}: {course}"


def slope_verdict(report):
    """One line for csft: how the reward follows the one asked for; slope 1 is as asked."""
    asked = [result["asked"] for result in report]
    achieved = [result["achieved"] for result in report]
    slope = np.polyfit(asked, achieved, 1)[0]
    course = ", ".join(f"{x:g} -> {y:.2f}" for x, y in zip(asked, achieved))
    text = "csft failed, less than half of what was asked" if slope < 0.5 else "csft"
    return f"{text}: slope of achieved against asked {slope:.2f}: {course}"


def print_table(report):
    """Fixed columns, one line per folder; a column without numbers is left out."""
    lines = [""] * (len(report) + 1)
    for column in COLUMNS.split():
        key, heading, form = column.split(":")
        values = [result.get(key) for result in report]
        if set(values) != {None}:
            texts = [heading, *("-" if value is None else format(value, form) for value in values)]
            lines = [f"{line} {text:>{max(7, len(heading))}}" for line, text in zip(lines, texts)]
    print("\n".join(lines))


def write_samples(path, kind, folders, score_fn, n=5):
    """Markdown: n prompts that the first and the last folder share, and their first samples."""
    ends = min(folders), max(folders)
    # Reversed: of the rows of a prompt sample 0 comes last, and stays.
    answers = {number: {row["id"]: row for row in reversed(folders[number])} for number in ends}
    shared = sorted(answers[ends[0]].keys() & answers[ends[1]].keys())
    fence = "`" * 20  # between fences Markdown shows a text as it is
    parts = ["# Before and after"]
    for i in shared[:n]:
        parts.append(f"## Prompt {i}\n\n{fence}text\n{answers[ends[0]][i]['input']}\n{fence}")
        for number in ends:
            row = answers[number][i]
            truth = f", true score {score_fn(row['output']):.2f}" if score_fn else ""
            reward = "none" if row.get("reward") is None else f"{row['reward']:.3f}"
            parts.append(f"{kind} {number:g}: reward {reward}{truth}, {row['finish_reason']}")
            parts.append(f"{fence}text\n{row['output']}\n{fence}")
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def plot(path, report, kind):
    """Left: what the reward and the truth say. Right: KL and finished samples, where cheating shows."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    share = right.twinx()
    x = [result[kind] for result in report]

    def draw(axes, key, style, label):
        if key in report[-1]:
            axes.plot(x, [result.get(key) for result in report], style, label=label)

    if kind == "asked":
        draw(left, "achieved", "C0o-", "reward achieved, in std of the data")
        draw(left, "asked", "k:", "as asked")
    elif "reward" in report[-1]:
        low, high = ([result[f"reward_{end}"] for result in report] for end in ("low", "high"))
        left.fill_between(x, low, high, alpha=0.2, label="95 % interval")
        draw(left, "reward", "C0o-", "reward")
        draw(left, "reward_best_of_n", "C0^--", "reward, best of n")
    draw(left, "true_score", "C2s-", "true score")
    draw(right, "kl_first", "C4d-", "KL from the first policy")
    draw(right, "kl_teacher", "C5v-", "KL from the teacher")
    draw(share, "finished", "C3s--", "finished")
    left.set(xlabel=kind, xticks=x)
    right.set(xlabel=kind, xticks=x, ylabel="KL, nats per sample")
    share.set(ylim=(0, 1.05), ylabel="share of finished samples")
    figure.legend(loc="outside upper center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=110)


def main(args):
    out = Path(args.out)
    kind, folders = read_folders(out)
    score_fn = None
    if args.score_fn:
        path, _, name = args.score_fn.rpartition(":")
        score_fn = runpy.run_path(path)[name]
    report = []
    for number, rows in folders.items():
        result = {kind: number, **measure(rows, score_fn), **divergences(out / f"{kind}_{number:g}")}
        if kind == "asked":
            data = json.loads((out / "rm.jsonl.meta.json").read_text())["summary"]
            result["achieved"] = (result["reward"] - data["reward_mean"]) / (data["reward_std"] or 1)
        report.append(result)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    write_samples(out / "samples.md", kind, folders, score_fn)
    plot(out / "report.png", report, kind)
    print_table(report)
    print(f"saved  {out}/report.json, report.png, samples.md")
    if kind == "asked":
        print(slope_verdict(report))
    elif "kl_teacher" in report[-1]:
        print(verdict("kl_teacher", report, rises=False))
    elif "reward" in report[-1]:
        print(verdict("reward", report, rises=True))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

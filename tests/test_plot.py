"""examples/plot.py: its numbers against ones computed by hand, its table, picture and samples."""

import importlib.util
import json
import math
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("plot", REPO / "examples/plot.py")
plot = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plot)


def make_rows(rewards, shift=0.0):
    """Rows of prompts 0, 1, ... from a list of rewards per prompt; sample 1 is cut."""
    return [
        dict(id=i, sample=s, input=f"p|{i}", output=f"o{s}", finish_reason="length" if s == 1 else "stop")
        | dict(reward=None if r is None else r + shift)
        for i, group in enumerate(rewards)
        for s, r in enumerate(group)
    ]


def write(out, iteration, rows):
    (out / f"iter_{iteration}").mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in reversed(rows))
    (out / f"iter_{iteration}/scored.jsonl").write_text(text)


def test_numbers(tmp_path):
    write(tmp_path, 2, make_rows([[1.0, 3.0], [2.0, 2.0], [None, 4.0]]))
    kind, folders = plot.read_folders(tmp_path)
    ((number, rows),) = folders.items()
    assert (kind, number) == ("iter", 2)
    ids = [[5, 6, 5, 6], [7], [5, 6], [], [8, 8, 8], [9, 9]]
    result = plot.measure(rows, ids, {"o0": 1.0, "o1": 0.0}.get)
    assert result["reward"] == pytest.approx((1 + 3 + 2 + 2 + 4) / 5)
    assert result["reward_best_of_n"] == pytest.approx((3 + 2 + 4) / 3)
    assert result["reward_low"] < result["reward"] < result["reward_high"]
    assert result["true_score"] == 0.5 and result["finished"] == 0.5
    assert result["output_tokens"] == 2.0
    # pairs: 56 65 56 | 56 | 88 88 | 99 -> {56, 65, 88, 99} of 7
    assert result["distinct_2"] == pytest.approx(4 / 7)
    rewards, lengths = [1, 3, 2, 2, 4], [4, 1, 2, 0, 2]
    means = sum(rewards) / 5, sum(lengths) / 5
    covariance = sum((r - means[0]) * (n - means[1]) for r, n in zip(rewards, lengths))
    scale = math.sqrt(sum((r - means[0]) ** 2 for r in rewards) * sum((n - means[1]) ** 2 for n in lengths))
    assert result["length_correlation"] == pytest.approx(covariance / scale)
    assert (result["all_right"], result["all_wrong"]) == (1, 0)
    assert (result["all_equal"], result["prompts"], result["samples"], result["unscored"]) == (1, 3, 6, 1)


def test_interval_redraws_prompts_not_samples():
    # 2 prompts of 500 equal samples: only prompts are independent, so the interval spans both
    assert plot.bootstrap([[0.0] * 500, [1.0] * 500]) == [0.0, 1.0]
    low, high = plot.bootstrap([[float(i % 2)] for i in range(400)])
    assert 0.5 - low == pytest.approx(1.96 * 0.5 / 20, rel=0.15)
    assert high - 0.5 == pytest.approx(1.96 * 0.5 / 20, rel=0.15)


def test_no_reward_at_all(tmp_path):
    write(tmp_path, 0, make_rows([[None], [None]]))
    rows = plot.read_folders(tmp_path)[1][0]
    result = {"iter": 0, **plot.measure(rows, [[1], [1]], None)}
    assert result["reward"] is None and result["unscored"] == 2
    json.dumps(result, allow_nan=False)
    plot.print_table([result])
    (tmp_path / "iter_0/scored.jsonl").rename(tmp_path / "iter_0/generate.jsonl")  # METHOD=distill without rewards
    assert plot.read_folders(tmp_path)[1].keys() == {0}


def test_table_picture_and_samples(tmp_path, capsys):
    for k in range(11):  # iter_10 comes after iter_2
        write(tmp_path, k, make_rows([[0.0, 1.0], [0.5, 0.25]], shift=k))
    kind, iterations = plot.read_folders(tmp_path)
    assert list(iterations) == list(range(11))
    report = [{"iter": k, **plot.measure(rows, [[1, 2]] * 4, len)} for k, rows in iterations.items()]
    plot.print_table(report)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12 and len({len(line) for line in lines}) == 1 and len(lines[0]) < 120
    plot.plot(tmp_path / "report.png", report)
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    plot.write_samples(tmp_path / "samples.md", kind, iterations, len)
    table = (tmp_path / "samples.md").read_text().splitlines()[2:]
    assert table[0] == "| prompt | iteration 0 | iteration 10 |" and len(table) == 4
    cells = [cell.strip() for cell in table[2].split("|")][1:4]
    assert cells[:2] == ["p&#124;0", "o0<br>_reward 0.000, true score 2.00, stop_"]
    assert cells[2].startswith("o0<br>_reward 10.000")


def test_missing_column_and_empty_folder_stop(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        plot.read_folders(tmp_path)
    write(tmp_path, 0, [{"id": 0, "sample": 0, "input": "", "output": "", "finish_reason": "stop"}])
    with pytest.raises(SystemExit, match="2"):
        plot.read_folders(tmp_path)
    assert capsys.readouterr().err.splitlines()[1].endswith("no column reward")


class Words:
    """A tokenizer: a token per character."""

    def __call__(self, texts, **_):
        return {"input_ids": [[ord(c) for c in text] for text in texts]}


@pytest.fixture
def no_tokenizer(monkeypatch):
    import transformers

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda _: Words())


def test_kl_divergences(tmp_path, no_tokenizer, capsys):
    """Means of differences of log-probs; a sample without one (null) is in none; iteration 0 is the first policy."""
    for k in range(2):
        write(tmp_path, k, make_rows([[0.0, 1.0]]))
        logps = {"policy": [-1.0, -2.0], "first": [-2.0, None], "teacher": [-3.0 + k, -6.0]}
        for name, values in logps.items():
            rows = [{"id": 0, "sample": s, "logps": v} for s, v in enumerate(values)]
            (tmp_path / f"iter_{k}/logps_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot.main(plot.Args(out=str(tmp_path), pretrain=""))
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["kl_first"] for row in report] == [0.0, 1.0]
    assert [row["kl_teacher"] for row in report] == [3.0, 2.5]
    assert "kl_teacher fell in each of 1 iterations: 3.0000 -> 2.5000" in capsys.readouterr().out


def test_asked_against_achieved(tmp_path, no_tokenizer, capsys):
    for k, asked in enumerate(("-1.5", "0", "1")):
        write(tmp_path, 0, make_rows([[0.0, 1.0]], shift=k))
        (tmp_path / "iter_0").rename(tmp_path / f"asked_{asked}")
    summary = {"summary": {"reward_mean": 1.5, "reward_std": 0.5}}
    (tmp_path / "rm.jsonl.meta.json").write_text(json.dumps(summary))
    plot.main(plot.Args(out=str(tmp_path), pretrain=""))
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(row["asked"], row["achieved"]) for row in report] == [(-1.5, -2.0), (0.0, 0.0), (1.0, 2.0)]
    assert "achieved rose in each of 2 steps: -2.0000 -> 0.0000 -> 2.0000" in capsys.readouterr().out
    assert "asked 1.0" in (tmp_path / "samples.md").read_text() and (tmp_path / "report.png").exists()

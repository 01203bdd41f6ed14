"""examples/plot.py: its numbers against ones computed by hand, its verdicts, table, picture and samples."""

import json

import pytest
from conftest import write_rows
from launch import load_script

plot = load_script("examples/plot")


def make_rows(rewards, shift=0.0):
    """Rows of prompts 0, 1, ... from a list of rewards per prompt; sample 1 is cut."""
    rows = []
    for i, group in enumerate(rewards):
        for s, reward in enumerate(group):
            row = {"id": i, "sample": s, "input": f"p|{i}", "output": f"o{s}", "tokens": s}
            row["finish_reason"] = "length" if s == 1 else "stop"
            rows.append(row | {"reward": None if reward is None else reward + shift})
    return rows


def write(folder, rows, name="scored"):
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / f"{name}.jsonl", reversed(rows))


def report(out, score_fn=None):
    """What plot.py finds in out."""
    plot.main(plot.Args(out=str(out), score_fn=score_fn))
    return json.loads((out / "report.json").read_text())


def test_numbers():
    rows = make_rows([[1.0, 3.0], [2.0, 2.0], [None, 4.0]])
    result = plot.measure(rows, {"o0": 1.0, "o1": 0.0}.get)
    assert result["reward"] == pytest.approx((1 + 3 + 2 + 2 + 4) / 5)
    assert result["reward_best_of_n"] == pytest.approx((3 + 2 + 4) / 3)
    assert result["true_score"] == result["finished"] == result["output_tokens"] == 0.5
    assert result["unscored"] == 1


def test_interval_redraws_prompts_not_samples():
    result = plot.mean_and_interval("x", [[0.0] * 500, [1.0] * 500])
    assert result == {"x": 0.5, "x_low": 0.0, "x_high": 1.0}
    result = plot.mean_and_interval("x", [[float(i % 2)] for i in range(400)])
    for end in (0.5 - result["x_low"], result["x_high"] - 0.5):
        assert end == pytest.approx(1.96 * 0.5 / 20, rel=0.15)


def test_rose_is_said_only_where_it_is_shown():
    overlap, back = "the 95 % intervals of first and last policy overlap", "a step went back"
    for values, rises, expected in [
        ([0, 1, 1], True, "x rose: "),
        ([2, 1, 0], False, "x fell: "),
        ([0, 2, 1.9], True, f"x: not shown that it rose: {back}: 0.0000 -> 2.0000 -> 1.9000"),
        ([0, 0.1, 0.15], True, f"x: not shown that it rose: {overlap}: "),
        ([2, 1, 1.9], False, f"x: not shown that it fell: {overlap} and {back}: "),
    ]:
        rows = [{"x": value, "x_low": value - 0.1, "x_high": value + 0.1} for value in values]
        assert plot.verdict("x", rows, rises).startswith(expected)


def test_table_picture_and_samples(tmp_path, capsys):
    for k in range(11):  # iter_10 comes after iter_2
        write(tmp_path / f"iter_{k}", make_rows([[0.0, 1.0], [0.5, 0.25]], shift=k))
    (tmp_path / "f.py").write_text("def f(text):\n    return len(text)\n")
    assert [row["true_score"] for row in report(tmp_path, f"{tmp_path}/f.py:f")] == [2.0] * 11
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines[:12]}) == 1 and len(lines[0]) < 120
    assert lines[11].split()[0] == "10" and lines[13].startswith("reward rose: ")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    samples = (tmp_path / "samples.md").read_text()  # sample 0 of each prompt, as it is
    assert "text\np|0\n`" in samples and "iter 10: reward 10.000, true score 2.00, stop" in samples


def test_kl_divergences(tmp_path, capsys):
    for k in range(2):
        write(tmp_path / f"iter_{k}", make_rows([[None, None]]), "generate")
        logps = {"policy": [-1.0, -2.0], "first": [-2.0, None], "teacher": [-3.0 + k, -6.0]}
        for name, values in logps.items():
            rows = [{"id": 0, "sample": s, "logps": value} for s, value in enumerate(values)]
            write(tmp_path / f"iter_{k}", rows, f"logps_{name}")
    assert [(row["kl_first"], row["kl_teacher"]) for row in report(tmp_path)] == [(1.0, 3.0), (1.0, 2.5)]
    assert "kl_teacher fell: " in capsys.readouterr().out


def test_asked_against_achieved(tmp_path, capsys):
    for std, verdict in ((0.5, "csft: slope of achieved against asked 1.58: "), (2.0, "csft failed, ")):
        for k, asked in enumerate(("-1.5", "0", "1")):
            write(tmp_path / f"asked_{asked}", make_rows([[0.0, 1.0]], shift=k))
        summary = {"reward_mean": 1.5, "reward_std": std}
        (tmp_path / "rm.jsonl.meta.json").write_text(json.dumps({"summary": summary}))
        achieved = [(row["asked"], row["achieved"]) for row in report(tmp_path)]
        assert achieved == [(-1.5, -1 / std), (0.0, 0.0), (1.0, 1 / std)]
        assert verdict in capsys.readouterr().out

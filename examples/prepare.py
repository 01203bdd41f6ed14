"""Rewrites rows of rare layouts into the plain rows that the trainers read. Every change is counted.

  python examples/prepare.py --dataset raw.jsonl --output_path rows.jsonl --fix fold_system merge_roles

The fixes run in the order of this list, whatever their order on the command line:
    parse         text that holds a JSON list or object (conversations in a .csv) becomes that value
    parts         content that is a list of {"type": "text", "text": ...} becomes one text
    fold_system   the first system turn moves to the top of the first user turn
    merge_roles   neighbouring turns of one role become one turn, a blank line between them
    split_prompt  chosen and rejected texts without a prompt: up to the last --marker in both it is the prompt
    dedup         rows that have come before, letter by letter, go

Reads .jsonl, .json (a list) and .csv, with any encoding; writes .jsonl, whole or not at all. A row that
cannot be repaired stays as it is: the trainers count and list what they cannot use.
"""

import csv
import io
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

ORDER = ("parse", "parts", "fold_system", "merge_roles", "split_prompt", "dedup")


@dataclass
class Args:
    dataset: str
    """The file to read."""
    output_path: str
    """The .jsonl to write."""
    fix: tuple[Literal["parse", "parts", "fold_system", "merge_roles", "split_prompt", "dedup"], ...] = ()
    """What to repair."""
    marker: str = "\\n\\nAssistant:"
    """split_prompt: the words in front of an answer; \\n is a line break."""
    encoding: str = "utf-8-sig"
    """Of the file, such as latin-1."""
    encoding_errors: Literal["strict", "replace"] = "strict"
    """replace: bytes that are no text become U+FFFD, counted."""


def die(message):
    """Ends the program: one line on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def read_rows(args):
    """(rows, how many places were no text)."""
    try:
        data = Path(args.dataset).read_bytes()
        text = data.decode(args.encoding, args.encoding_errors)
    except UnicodeDecodeError as e:
        line = data[: e.start].count(b"\n") + 1
        die(f"{args.dataset}:{line}: {e.reason}: choose --encoding, or --encoding_errors replace")
    except (OSError, LookupError) as e:
        die(f"{args.dataset}: {e}")
    replaced = 0
    if args.encoding_errors == "replace":
        replaced = text.count("\ufffd") - data.count("\ufffd".encode())
    if args.dataset.endswith(".csv"):
        csv.field_size_limit(2**31)
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        if ragged := [i for i, row in enumerate(rows, 1) if None in row or None in row.values()]:
            die(f"{args.dataset}: row {ragged[0]} has another number of cells than the first line")
        return rows, replaced
    parts, rows = [text] if text.lstrip()[:1] == "[" else text.split("\n"), []
    for number, part in enumerate(parts, 1):
        try:
            values = json.loads(part) if part.strip() else []
        except (ValueError, RecursionError) as e:
            die(f"{args.dataset}:{number + getattr(e, 'lineno', 1) - 1}: broken JSON: {str(e)[:80]}")
        rows += values if isinstance(values, list) else [values]
    if not all(isinstance(row, dict) for row in rows):
        die(f"{args.dataset}: a row is not an object")
    return rows, replaced


def turns_of(value):
    """Whether a value is a conversation: a list of objects with role and content (or from and value)."""
    return isinstance(value, list) and bool(value) and all(isinstance(t, dict) and names(t) for t in value)


def names(turn):
    """The names of a turn's role and content."""
    return next((pair for pair in (("role", "content"), ("from", "value")) if {*pair} <= {*turn}), None)


def parse(value):
    """The list or object that a text holds."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            pass
    return value


def parts(turns):
    """Turns with content in parts of text as turns with text; others (images) stay."""
    fixed = []
    for turn in turns:
        key = names(turn)[1]
        pieces = turn[key] if isinstance(turn[key], list) else []
        is_text = pieces and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in pieces)
        fixed.append({**turn, key: "".join(p["text"] for p in pieces)} if is_text else turn)
    return fixed


def joined(first, second):
    """One turn of two, with the role of the second."""
    key = names(second)[1]
    return {**second, key: f"{first[names(first)[1]]}\n\n{second[key]}"}


def fold_system(turns):
    """The conversation without its first system turn, whose text the first user turn gets."""
    if len(turns) > 1 and [t[names(t)[0]] for t in turns[:2]] in (["system", "user"], ["system", "human"]):
        return [joined(turns[0], turns[1]), *turns[2:]]
    return turns


def merge_roles(turns):
    """The conversation with neighbours of one role as one turn."""
    merged = turns[:1]
    for turn in turns[1:]:
        same = turn[names(turn)[0]] == merged[-1][names(merged[-1])[0]]
        plain = all({*t} == {*names(t)} and isinstance(t[names(t)[1]], str) for t in (turn, merged[-1]))
        merged[-1:] = [joined(merged[-1], turn)] if same and plain else [merged[-1], turn]
    return merged


def split_prompt(row, marker):
    """A row of chosen and rejected texts with the prompt that they share in a column of its own."""
    pair = [row.get("chosen"), row.get("rejected")]
    if row.get("prompt") is not None or not all(isinstance(text, str) for text in pair):
        return row
    shared = os.path.commonprefix(pair)
    end = shared.rfind(marker) + len(marker)
    if end < len(marker):
        return row
    return {**row, "prompt": shared[:end], "chosen": pair[0][end:], "rejected": pair[1][end:]}


def repair(row, args):
    """(the row repaired, which fixes have changed it)."""
    done = []
    for name in [name for name in ORDER if name in args.fix and name != "dedup"]:
        if name == "split_prompt":
            fixed = split_prompt(row, args.marker.replace("\\n", "\n"))
        elif name == "parse":
            fixed = {key: parse(value) for key, value in row.items()}
        else:
            fix = globals()[name]
            fixed = {key: fix(value) if turns_of(value) else value for key, value in row.items()}
        done += [name] if fixed != row else []
        row = fixed
    return row, done


def main(args):
    rows, replaced = read_rows(args)
    counts, kept, seen = Counter({name: 0 for name in ORDER if name in args.fix}), [], set()
    for row in rows:
        row, done = repair(row, args)
        line = json.dumps(row, ensure_ascii=True, sort_keys="dedup" in args.fix)
        counts.update(done)
        if "dedup" in args.fix and line in seen:
            counts["dedup"] += 1
            continue
        seen.add(line)
        kept.append(json.dumps(row, ensure_ascii=False) + "\n")
    try:
        Path(f"{args.output_path}.tmp").write_text("".join(kept), encoding="utf-8")
        os.replace(f"{args.output_path}.tmp", args.output_path)
    except (OSError, UnicodeEncodeError) as e:
        die(f"{args.output_path}: {e}")
    changes = ", ".join(f"{name} {n:,}" for name, n in counts.items()) or "no --fix given"
    print(f"rows   {len(rows):,} read, {len(kept):,} written to {args.output_path} | {changes}", end="")
    print(f" | {replaced:,} places were no text" if replaced else "")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, use_underscores=True))

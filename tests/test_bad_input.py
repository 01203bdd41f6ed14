"""Malformed input to every script: one line that names file, row and field with exit code 2, or a counted drop.

No model is loaded: main() runs up to the point where it has accepted the data and would join the process group.
"""

import csv
import itertools
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from conftest import make_model, make_rows, make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launch import load_script

SCRIPTS = {name: load_script(name) for name in ("sft", "dpo", "kto", "kd", "batch_infer")}
TASKS = ("sft", "dpo", "kto", "kd", "generate", "rm")
FORMATS = ("jsonl", "json", "csv", "parquet")
MAX_LEN = 100
NUMBERS = itertools.count()
# the columns of the task's rows: of the prompt, of responses that must not be empty, other responses
COLUMNS = {
    "sft": ("input", ["output"], []),
    "kd": ("input", ["output"], []),
    "dpo": ("prompt", ["chosen"], ["rejected"]),
    "kto": ("prompt", ["completion"], []),
    "generate": ("prompt", [], []),
    "rm": ("input", [], ["output"]),  # a response may be empty: the policy said nothing, and that has a reward
}


class Accepted(BaseException):
    """The script has read its data and would go on to a process group and a model."""


def accept(*args):
    raise Accepted


def make_good(task, n=4):
    """n usable rows of a task."""
    prompt, first, more = COLUMNS[task]
    rows = []
    for i, row in enumerate(make_rows(n, seed=5)):
        texts = {name: f"{row['output']} {name}" for name in [*first, *more]}
        label = {"label": i % 2 == 0} if task == "kto" else {}
        rows.append({prompt: row["input"][-60:], **{k: v[-80:] for k, v in texts.items()}, **label})
    return rows


def write_table(path, rows):
    """The rows as a file of the kind its name says."""
    kind = Path(path).suffix[1:]
    if kind == "jsonl":
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        Path(path).write_text(json.dumps(rows, indent=1))
    elif kind == "csv":
        with open(path, "w", newline="") as f:
            writer = csv.DictWriter(f, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """A folder with models, which is the working directory; caches of tokenizers and of datasets."""
    home, before = tmp_path_factory.mktemp("bad_input"), Path.cwd()
    make_model(home / "model", make_tokenizer())
    for name in ("plain", "no_eos", "no_config", "small"):
        shutil.copytree(home / "model", home / name)
    (home / "plain/chat_template.jinja").unlink()
    (home / "no_config/config.json").unlink()
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if (home / "no_eos" / file).exists():
            found = json.loads((home / "no_eos" / file).read_text())
            found.pop("eos_token", None)
            (home / "no_eos" / file).write_text(json.dumps(found))
    config = json.loads((home / "small/config.json").read_text())
    (home / "small/config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    (home / "other").mkdir()
    make_tokenizer(vocab_size=280).save_pretrained(home / "other")
    (home / "no_eos/config.json").unlink()  # which would choose a class of tokenizers with an EOS of its own
    shutil.copy(home / "model/config.json", home / "other")
    import datasets

    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "cache")
    for module in SCRIPTS.values():
        patch.setattr(module, "connect" if hasattr(module, "connect") else "agree", accept)
        patch.setattr(module, "load_tokenizer", cached_tokenizer(module.load_tokenizer))
    os.chdir(home)
    yield home
    os.chdir(before)
    patch.undo()


def cached_tokenizer(load):
    """load_tokenizer that reads each model once."""
    known = {}

    def cached(path, args):
        key = path, args.tokenizer_chat_template
        known[key] = known.get(key) or load(path, args)
        return known[key]

    return cached


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """One thread; setup()'s environment variables end with the test."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def make_args(task, **flags):
    """The script of a task and its Args."""
    flags = {"pretrain": "model", "dataset": "rows.jsonl", "max_len": MAX_LEN} | flags
    if task in ("generate", "rm"):
        task, flags = "batch_infer", {"eval_task": task, "prompt_max_len": 50} | flags
    elif task == "kd":
        flags = {"teacher_model": "model"} | flags
    return SCRIPTS[task], SCRIPTS[task].Args(**flags)


def outcome(task, **flags):
    """"accepted", or the exit code. Everything else is a traceback that a user would see."""
    place = "output_path" if task in ("generate", "rm") else "save_path"
    module, args = make_args(task, **{place: f"out{next(NUMBERS)}"} | flags)  # locks of earlier ones are still held
    try:
        code = module.main(args)
    except Accepted:
        return "accepted"
    except SystemExit as e:
        return e.code
    raise AssertionError(f"main() came to an end with {code}")


def assert_stops(capfd, needles, task, **flags):
    capfd.readouterr()
    assert outcome(task, **flags) == 2
    text = capfd.readouterr().err
    lines = text.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), text
    assert len(lines[0]) < 700, text
    missing = [needle for needle in needles if not re.search(needle, lines[0])]
    assert not missing, (missing, lines[0])


# --- one bad value in the second of four rows: more than 5 % stops, --max_drop_ratio 1 drops and counts

LONG = "red " * 200
ABSENT = object()
NOT_TEXT = {"null": None, "absent": ABSENT, "number": 5, "NaN": float("nan"), "true": True, "object": {"a": "b"}}
TURNS = {"numbers": [1, 2], "no content": [{"role": "user"}], "null content": [{"role": "user", "content": None}]}
TURNS |= {"role is a number": [{"role": 3, "content": "x"}], "content in parts": [{"role": "user", "content": ["x"]}]}


def bad_values():
    """(task, column, name of the fault, value, pattern of the reason, formats)."""
    for task, (prompt, first, more) in COLUMNS.items():
        for column in (prompt, *first, *more):
            what = "prompt" if column == prompt else "response"
            for name, value in NOT_TEXT.items():
                reason = {"generate": "neither text", "rm": "not text|messages without"}.get(task, f"{what}.*not text")
                yield task, column, name, value, reason, ("jsonl", "json", "parquet", "csv")[: 4 if value is None else 2]
            for name, value in TURNS.items():
                yield task, column, name, value, "messages without role and text", ("jsonl",)
        for column in first:
            for name, value in (("empty", ""), ("blank", " \n\t")):
                formats = FORMATS if name == "blank" else ("jsonl", "json", "parquet")  # "" in a .csv is null
                yield task, column, name, value, "empty.* response", formats
        reason = {"generate": "longer than --prompt_max_len 50", "rm": "longer than --max_len 100"}
        yield task, prompt, "too long", LONG, reason.get(task, "prompt >= max_len"), FORMATS
        if task == "generate":
            yield task, prompt, "empty", "", "empty prompt", ("jsonl", "json", "parquet")
            yield task, prompt, "blank", " \n", "empty prompt", FORMATS
            yield task, prompt, "no messages", [], "empty prompt", ("jsonl",)


def with_fault(task, column, value):
    rows = make_good(task)
    rows[1] = {k: v for k, v in rows[1].items() if k != column} | ({} if value is ABSENT else {column: value})
    return rows


BAD_VALUES = [(*case[:5], kind) for case in bad_values() for kind in case[5]]


@pytest.mark.parametrize("case", BAD_VALUES, ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}-{c[5]}")
def test_bad_value(case, capfd):
    task, column, _, value, reason, kind = case
    path = write_table(f"rows.{kind}", with_fault(task, column, value))
    where = {"jsonl": r"rows\.jsonl:2", "json": r"rows\.json:1"}.get(kind, rf"rows\.{kind}\[1\]")
    assert_stops(capfd, [where, reason], task, dataset=path)
    assert outcome(task, dataset=path, max_drop_ratio=1.0) == "accepted"
    out, err = capfd.readouterr()
    assert "Traceback" not in err and re.search(r"1 (dropped|left out)", out) and re.search(reason, out), out


@pytest.mark.parametrize("label", [None, "yes", 2, -1, 0.5, "", [True], {"a": 1}, "truee", float("nan")], ids=str)
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_bad_label(label, kind, capfd):
    """A label that is not understood stops, even where unusable rows are allowed."""
    path = write_table(f"rows.{kind}", with_fault("kto", "label", label))
    flags = {"dataset": path, "max_drop_ratio": 1.0}
    assert_stops(capfd, [rf"rows\.{kind}:[12]: label", re.escape(repr(label)), "--label_key"], "kto", **flags)


@pytest.mark.parametrize("label", [True, False])
def test_labels_of_one_kind(label, capfd):
    write_table("rows.jsonl", [row | {"label": label} for row in make_good("kto")])
    assert_stops(capfd, ["rows.jsonl", "4 desirable and 0" if label else "0 desirable and 4", "both"], "kto")


@pytest.mark.parametrize("kind", FORMATS)
def test_pairs_without_a_difference(kind, capfd):
    """chosen == rejected: dropped and counted where it is one row, an error where it is all of them."""
    rows = make_good("dpo")
    rows[1]["rejected"] = rows[1]["chosen"]
    rows[2]["chosen"], rows[2]["rejected"] = f"{LONG}a", f"{LONG}b"  # the same up to --max_len
    assert outcome("dpo", dataset=write_table(f"rows.{kind}", rows)) == "accepted"
    assert "2 pairs dropped: chosen and rejected are the same" in capfd.readouterr().out
    path = write_table(f"rows.{kind}", [row | {"rejected": row["chosen"]} for row in rows])
    assert_stops(capfd, [rf"rows\.{kind}", "chosen and rejected are the same"], "dpo", dataset=path)


@pytest.mark.parametrize("task", ["sft", "kd", "dpo", "rm"])
def test_none_is_no_text(task, capfd):
    """Two columns that make up a prompt: an absent one is never the word None."""
    row = {"instruction": "red", "input": "river", "output": "old"}
    if task == "dpo":
        row = {"question": "red", "system": "river", "chosen": "old", "rejected": "new"}
    write_table("rows.jsonl", [row, row | {next(iter(row)): None}])
    assert_stops(capfd, [r"rows\.jsonl:2"], task)


# --- conversations


def chat(*turns):
    """[{"role", "content"}] from letters: s u a for system, user, assistant."""
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": names[letter], "content": f"red {letter}{i}"} for i, letter in enumerate(turns)]


STRICT = """{% set turns = messages[1:] if messages[0]['role'] == 'system' and not no_system else messages %}
{%- for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}
{%- endif %}<|{{ m['role'] }}|>{{ m['content'] + eos_token }}{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
SILENT = STRICT.replace("'roles must alternate'", "''")
CALLS = "{% for m in messages %}{% for call in m.tool_calls or [] %}{{ call.name }}{% endfor %}{{ m['content'] + eos_token }}{% endfor %}"
CHATS = {
    "empty": ([], {}, "no assistant turn|no messages"),
    "no answer": (chat("u"), {}, "no assistant turn"),
    "only an answer": (chat("a"), {}, "no assistant turn"),
    "assistant begins": (chat("a", "u"), {}, "no assistant turn"),
    "two users": (chat("u", "u", "a"), {"tokenizer_chat_template": STRICT}, "roles must alternate"),
    "two systems": (chat("s", "s", "u", "a"), {"tokenizer_chat_template": STRICT}, "roles must alternate"),
    "unknown role": (chat("u", "t", "a"), {"tokenizer_chat_template": STRICT}, "roles must alternate"),
    "no reason": (chat("u", "u", "a"), {"tokenizer_chat_template": SILENT}, "TemplateError|chat template"),
    "template with a mistake": (chat("u", "a"), {"tokenizer_chat_template": "{% for m in"}, "nexpected|expected token|reached end"),
    "template that wants more": (chat("u", "a"), {"tokenizer_chat_template": "{{ messages[7].role.x }}"}, "no element 7"),
    "calls are a number": (
        [*chat("u"), {"role": "assistant", "content": "x", "tool_calls": 5}],
        {"tokenizer_chat_template": CALLS},
        "not iterable",
    ),
    "text in place of messages": ("red", {}, "no assistant turn"),
    "an object": ({"role": "user", "content": "x"}, {}, "messages without role and text"),
}


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("task", ["sft", "kd", "kto"])
def test_bad_conversation(name, task, capfd):
    messages, flags, reason = CHATS[name]
    row = {"messages": messages} | ({"label": True} if task == "kto" else {})
    write_table("rows.jsonl", [row])
    assert_stops(capfd, [r"rows\.jsonl:1", "1 dropped", reason], task, **flags)


@pytest.mark.parametrize("task", ["sft", "kd", "kto", "generate", "rm"])
def test_no_chat_template(task, capfd):
    row = {"messages": chat("u", "a")} | ({"label": True} if task == "kto" else {})
    write_table("rows.jsonl", [row])
    assert_stops(capfd, ["chat.template"], task, pretrain="plain", **({"teacher_model": "plain"} if task == "kd" else {}))


# --- whole files


def good_text(task):
    return "".join(json.dumps(row) + "\n" for row in make_good(task))


def bad_files():
    """name: (file, content as a function of the task, patterns in the error)."""
    yield "empty.jsonl", lambda task: "", ["no rows"]
    yield "blank.jsonl", lambda task: "\n  \n", ["no rows"]
    yield "empty.json", lambda task: "[]", ["no rows"]
    yield "header.csv", lambda task: ",".join(make_good(task)[0]) + "\n", ["header.csv"]
    yield "empty.csv", lambda task: "", ["empty.csv"]
    yield "empty.parquet", lambda task: "", ["empty.parquet"]
    yield "text.parquet", good_text, ["text.parquet"]
    yield "ragged.csv", lambda task: "a,b\n1,2,3,4\n5\n", ["ragged.csv"]
    yield "quote.csv", lambda task: 'input,output\n"a,b\n', ["quote.csv"]
    yield "broken.jsonl", lambda task: good_text(task) + '{"input": oops}\n' + good_text(task), [r"\.jsonl:5: broken JSON", "column 11"]
    yield "cut.jsonl", lambda task: good_text(task)[:40] + "\n" + good_text(task), [r"\.jsonl:1: broken JSON"]
    yield "broken.json", lambda task: '[{"input": "a"},\n{"input" 1}]', [r"broken\.json:2"]
    yield "cut.json", lambda task: json.dumps(make_good(task))[:-9], [r"cut\.json:1"]
    yield "pretty.json", lambda task: json.dumps(make_good(task)[0], indent=1), [r"pretty\.json:1: broken JSON"]
    yield "list.jsonl", lambda task: good_text(task) + "{}\n[1, 2]\n", [r"list\.jsonl:6: .*object, not list"]
    yield "number.jsonl", lambda task: "3\n" + good_text(task), [r"number\.jsonl:1: .*object, not int"]
    yield "null.json", lambda task: json.dumps([*make_good(task), None]), [r"null\.json:4: .*object, not NoneType"]
    yield "latin1.jsonl", lambda task: good_text(task).encode() + b'{"input": "caf\xe9"}\n', ["latin1.jsonl", "utf-8|UTF-8"]
    yield "latin1.json", lambda task: b'[{"input": "caf\xe9"}]', ["latin1.json", "utf-8|UTF-8"]
    yield "latin1.csv", lambda task: b"input,output\ncaf\xe9,x\n", ["latin1.csv"]
    yield "utf16.jsonl", lambda task: good_text(task).encode("utf-16"), ["utf16.jsonl", "utf-8|UTF-8"]
    yield "other.jsonl", lambda task: '{"a": "x", "b": "y"}\n', [r"other\.jsonl:1", "columns a, b", "--"]
    yield "other.csv", lambda task: "a,b\nx,y\n", [r"other\.csv\[0\]", "columns a, b", "--"]
    yield "nothing.jsonl", lambda task: "{}\n", [r"nothing\.jsonl:1", "--"]
    yield "digits.jsonl", lambda task: good_text(task) + '{"input": ' + "1" * 5000 + "}\n", [r"digits\.jsonl:5"]
    yield "deep.jsonl", lambda task: good_text(task) + '{"input": ' + "[" * 100_000 + "\n{}\n", [r"deep\.jsonl:5"]
    yield "surrogate.jsonl", lambda task: good_text(task) + json.dumps(make_good(task)[0] | {"note": "\ud800"}) + "\n", [r"surrogate\.jsonl:5"]


BAD_FILES = {name: rest for name, *rest in bad_files()}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("task", TASKS)
def test_bad_file(name, task, capfd):
    content, needles = BAD_FILES[name]
    if task == "kto" and name == "other.csv":
        needles = needles[:2]
    data = content(task)
    Path(name).write_bytes(data if isinstance(data, bytes) else data.encode())
    assert_stops(capfd, needles, task, dataset=name)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["none.jsonl", "none.json", "none.csv", "none.parquet", "none/at-all", "", "home"])
def test_missing_file(name, task, capfd):
    Path("home").mkdir(exist_ok=True)
    assert_stops(capfd, [name or "dataset"], task, dataset=name)


@pytest.mark.parametrize("task", TASKS)
def test_harmless_files(task, capfd):
    """A byte order mark, U+2028 and NUL inside a text, a last line without end: read; a cut last line: counted."""
    prompt, text = COLUMNS[task][0], good_text(task).replace("red", "red\u2028\\u0000")
    Path("bom.jsonl").write_bytes(b"\xef\xbb\xbf" + text.rstrip().encode())
    assert outcome(task, dataset="bom.jsonl") == "accepted"
    Path("cut.jsonl").write_text(text + '{"' + prompt + '": "re')
    capfd.readouterr()
    assert outcome(task, dataset="cut.jsonl") == "accepted"
    assert "cut.jsonl:5: the last line is cut off, dropped" in capfd.readouterr().out


# --- flags


FLAGS = [  # tasks, flags, patterns
    ("all", {"pretrain": "no-such-folder"}, ["no-such-folder"]),
    ("all", {"pretrain": "no_eos"}, ["no_eos", "EOS"]),
    ("sft dpo kto", {"pretrain": "no_config"}, ["no_config"]),
    ("sft dpo kto", {"pretrain": "small"}, ["small", "vocabulary"]),  # tokens that the model does not have
    ("all", {"dataset_probs": "x,y", "dataset": "rows.jsonl,rows.jsonl"}, ["--dataset_probs x,y"]),
    ("all", {"dataset_probs": "1", "dataset": "rows.jsonl,rows.jsonl"}, ["--dataset_probs 1", "2"]),
    ("all", {"dataset_probs": "0,0", "dataset": "rows.jsonl,rows.jsonl"}, ["--dataset_probs 0,0"]),
    ("all", {"max_samples": 0}, ["--max_samples|no rows"]),
    ("all", {"tokenizer_chat_template": "none.jinja"}, ["none.jinja"]),
    ("sft dpo kto kd", {"max_drop_ratio": -1.0}, ["--max_drop_ratio"]),
    ("sft kd kto rm", {"input_key": "prmpt"}, ["rows.jsonl:1", "no column 'prmpt'", "it has ", "--input_key"]),
    ("sft kd kto rm", {"output_key": "rspns"}, ["rows.jsonl:1", "no column 'rspns'", "it has ", "--output_key"]),
    ("generate", {"input_key": "prmpt"}, ["rows.jsonl:1", "no column 'prmpt'", "--input_key"]),
    ("dpo", {"chosen_key": "better"}, ["rows.jsonl:1", "no column 'better'|columns prompt", "--chosen_key"]),
    ("dpo", {"prompt_key": "prmpt"}, ["rows.jsonl:1", "no column 'prmpt'", "--prompt_key"]),
    ("kto", {"label_key": "good"}, ["rows.jsonl:1", "no column 'good'", "--label_key"]),
    ("sft dpo kto kd", {"train_batch_size": 0}, ["--train_batch_size", "0"]),
    ("sft dpo kto kd", {"micro_train_batch_size": -1}, ["--micro_train_batch_size", "-1"]),
    ("sft dpo kto kd", {"max_epochs": 0}, ["--max_epochs", "0"]),
    ("all", {"max_len": 0}, ["--max_len", "0"]),
    ("sft dpo kto kd", {"zero_stage": 4}, ["--zero_stage", "4"]),
    ("sft dpo kto kd", {"max_ckpt_num": 0}, ["--max_ckpt_num", "0"]),
    ("sft dpo kto kd", {"max_steps": -1}, ["--max_steps", "-1"]),
    ("sft dpo kto kd", {"max_steps": 0}, ["--max_steps", "0"]),
    ("sft dpo kto kd", {"logging_steps": 0}, ["--logging_steps", "0"]),
    ("sft dpo kto kd", {"learning_rate": -1.0}, ["--learning_rate", "-1"]),
    ("sft dpo kto kd", {"learning_rate": float("nan")}, ["--learning_rate", "nan"]),
    ("sft dpo kto kd", {"l2": -1.0}, ["--l2", "-1"]),
    ("sft dpo kto kd", {"adam_betas": (0.9, 1.5)}, ["--adam_betas", "1.5"]),
    ("sft dpo kto kd", {"seed": -1}, ["--seed", "-1"]),
    ("sft dpo kto kd", {"lora_rank": -1}, ["--lora_rank", "-1"]),
    ("sft dpo kto kd", {"lora_dropout": 2.0, "lora_rank": 2}, ["--lora_dropout", "2"]),
    ("sft dpo kto kd", {"save_path": "rows.jsonl/out"}, ["rows.jsonl/out"]),
    ("sft dpo kto kd", {"eval_dataset": "none.jsonl"}, ["none.jsonl"]),
    ("dpo kto", {"beta": 0.0}, ["--beta"]),
    ("dpo", {"label_smoothing": 0.5}, ["--label_smoothing 0.5"]),
    ("dpo", {"ld_alpha": 2.0}, ["--ld_alpha 2"]),
    ("kd", {"teacher_model": ""}, ["--teacher_model"]),
    ("kd", {"teacher_model": "other"}, ["--teacher_model other", "another tokenizer"]),
    ("kd", {"teacher_model": "no_config"}, ["no_config"]),
    ("kd", {"kd_coef": 1.5}, ["--kd_coef"]),
    ("kd", {"kd_temperature": 0.0}, ["--kd_temperature"]),
    ("kd", {"teacher_topk": -1}, ["--teacher_topk"]),
    ("generate", {"temperature": -1.0}, ["--temperature", "-1"]),
    ("generate", {"top_p": 0.0}, ["--top_p", "0"]),
    ("generate", {"max_new_tokens": 0}, ["--max_new_tokens", "0"]),
    ("generate", {"best_of_n": 0}, ["--best_of_n", "0"]),
    ("generate", {"iter": -1}, ["--iter", "-1"]),
    ("rm", {"post_processor": "bon"}, ["--post_processor bon"]),
    ("rm", {"reward_fn": "none.py:f"}, ["--reward_fn none.py:f"]),
    ("rm", {"output_path": "rows.jsonl"}, ["rows.jsonl"]),
    ("generate rm", {"output_path": "rows.jsonl/out"}, ["rows.jsonl/out"]),
]
FLAGS = [(task, *rest) for names, *rest in FLAGS for task in (TASKS if names == "all" else names.split())]


def flag_and_value(case):
    return "=".join(map(str, next(iter(case[1].items()))))


@pytest.mark.parametrize("case", FLAGS, ids=lambda c: f"{c[0]}-{flag_and_value(c)}")
def test_bad_flag(case, capfd):
    task, flags, needles = case
    write_table("rows.jsonl", make_good(task))
    assert_stops(capfd, needles, task, **flags)


def test_enough_cases():
    assert len(BAD_VALUES) + len(TASKS) * len(BAD_FILES) + len(FLAGS) >= 150


# --- rows of anything

WORDS = ["", " ", "\n", "red", "\0", "\u2028", "\u200b", "<eos>", "<eos>red", "<|assistant|>", "{{ x }}", "{}", "None", LONG]
TEXTS = st.sampled_from(WORDS) | st.text(st.characters(codec="utf-8"), max_size=20)
NUMBERS_ETC = st.none() | st.booleans() | st.integers() | st.floats()
ANYTHING = st.recursive(
    NUMBERS_ETC | TEXTS, lambda x: st.lists(x, max_size=3) | st.dictionaries(TEXTS, x, max_size=3), max_leaves=6
)
ROLES = st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool", "", 3, None])
TURN = st.fixed_dictionaries(
    {},
    optional={"role": ROLES, "content": TEXTS | ANYTHING, "from": ROLES, "value": TEXTS | ANYTHING, "tool_calls": ANYTHING},
)
VALUES = ANYTHING | TEXTS | st.lists(TURN, max_size=4)
LAYOUTS = {  # task: the columns that its rows may have
    "sft": ["input output", "messages", "conversations", "instruction input output", "text", "input output finish_reason"],
    "dpo": ["prompt chosen rejected", "chosen rejected", "question system chosen rejected", "prompt chosen rejected chosen_finish_reason"],
    "kto": ["prompt completion label", "messages label", "prompt chosen rejected", "prompt completion label finish_reason"],
    "generate": ["prompt", "messages", "instruction input", "prompt other"],
    "rm": ["input output", "messages", "prompt response", "input output finish_reason messages", "instruction input output"],
}
LAYOUTS["kd"] = LAYOUTS["sft"]


@pytest.mark.parametrize("task", TASKS)
def test_any_row(task, tmp_path, capfd, monkeypatch):
    """Whatever stands in a row: an error of one line, or examples that all have something to train."""
    kept, place = [], {"output_path": "unused"} if task in ("generate", "rm") else {}
    for name in ("build_trees", "make_score_trees", "make_prompts"):
        if hasattr(module := make_args(task, **place)[0], name):
            build = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *args, build=build: kept.append(build(*args)) or kept[-1])
    if task in ("generate", "rm"):
        config = module.model_config(make_args(task, **place)[1])
        monkeypatch.setattr(module, "model_config", lambda *args: config)
    monkeypatch.setattr(module, "fingerprint", lambda names: names)

    @settings(max_examples=80, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.data())
    def check(data):
        columns = data.draw(st.sampled_from(LAYOUTS[task])).split()
        row = st.fixed_dictionaries({}, optional={name: VALUES for name in columns})
        rows = [{name: "red river" for name in columns}, *data.draw(st.lists(row, min_size=1, max_size=4))]
        rows += [row | {"label": label} for row in rows[:1] for label in (True, False)] if "label" in columns else []
        rows[0] |= {"label": True} if "label" in columns else {}
        flags = {"apply_chat_template": data.draw(st.booleans()), "max_drop_ratio": data.draw(st.sampled_from([0.05, 1.0]))}
        if data.draw(st.booleans()):
            flags["tokenizer_chat_template"] = STRICT
        write_table("rows.jsonl", rows)
        kept.clear()
        capfd.readouterr()
        code = outcome(task, **flags)
        lines = capfd.readouterr().err.splitlines()
        if code == 2:
            assert len(lines) == 1 and "rows.jsonl" in lines[0] or "rows, " in lines[0], lines
        else:
            assert code == "accepted" and lines == []
            check_examples(kept[-1][0] if isinstance(kept[-1], tuple) else kept[-1])

    check()


def check_examples(examples):
    assert examples
    for example in examples:
        if isinstance(example, dict):
            for ids, trained in zip(example["responses"], example["trained"], strict=True):
                assert len(ids) == len(trained) and trained.any()
        else:  # a prompt
            assert example.ids and example.room > 0 and json.dumps(example.fields, ensure_ascii=False).encode()

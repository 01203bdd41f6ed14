"""What users do wrong: one line that says what to type instead and exit code 2, before a model is loaded.

The checks stand in bytes that all trainers share and are tested on sft.py; the flags of the others in their tests.
"""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import tyro
from conftest import make_model, make_tokenizer, write_rows
from launch import load_script

sft = load_script("sft")
ROW = {"input": "red", "output": " old"}
GOOD = json.dumps(ROW) + "\n"
CHAT = [{"role": "user", "content": "red?"}, {"role": "assistant", "content": "old"}]
STRICT = "{% for m in messages %}{% if m.role == 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
REWRITES = "{% for m in messages %}{{ m.content[: messages | length] }}{% endfor %}"
FORGETS = "{% for m in messages %}{{ m.content if loop.last else m.content[:1] }}{% endfor %}"
MULTITURN = {"tokenizer_chat_template": FORGETS, "multiturn": True}
TWICE = "rows.jsonl,rows.jsonl"


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """The working directory: models that lack something, and a folder that holds another run's model."""
    home, before = tmp_path_factory.mktemp("bad_input"), Path.cwd()
    make_model(home / "model", make_tokenizer(), max_position_embeddings=128)
    for name in ("plain", "no_config", "small", "other"):
        shutil.copytree(home / "model", home / name)
    (home / "plain/chat_template.jinja").unlink()
    (home / "no_config/config.json").unlink()
    config = json.loads((home / "small/config.json").read_text())
    (home / "small/config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    os.chdir(home)
    yield home
    os.chdir(before)


def chat_row(*messages):
    return json.dumps({"messages": messages}) + "\n"


BAD_INPUT = {  # name: (flags, rows.jsonl, patterns of the message)
    # --- files
    "missing file": ({"dataset": "none.jsonl"}, GOOD, ["none.jsonl", "No such file"]),
    "missing .csv": ({"dataset": "none.csv"}, GOOD, ["none.csv"]),
    "missing folder": ({"dataset": "none/at-all"}, GOOD, ["none/at-all"]),
    "missing eval file": ({"eval_dataset": "none.jsonl"}, GOOD, ["none.jsonl"]),
    "empty file": ({}, "", ["rows.jsonl", "no rows"]),
    "broken line": ({}, GOOD + '{"input": oops}\n', [r"rows\.jsonl:2", "broken JSON", "column 11"]),
    "row is a list": ({}, GOOD + "[1, 2]\n", [r"rows\.jsonl:2", "must be an object"]),
    "an object, no list": ({"dataset": "object.json"}, GOOD, ["object.json:1", "must be an object"]),
    "not UTF-8": ({}, GOOD.encode() + b'{"input": "caf\xe9", "output": "x"}\n', [r"rows\.jsonl:2", "utf-8"]),
    # --- columns and values
    "missing column": ({"input_key": "prompt"}, GOOD, ["columns input, output", "--input_key"]),
    "unknown columns": ({}, '{"a": "x", "b": "y"}\n', ["rows.jsonl:1", "columns a, b", "--input_key, --output_key"]),
    "null": ({}, GOOD + '{"input": null, "output": "x"}\n', [r"rows\.jsonl:2", "neither text"]),
    "no column in row 2": ({}, GOOD + '{"input": "x"}\n', [r"rows\.jsonl:2", "columns input: choose"]),
    "true": ({}, GOOD + '{"input": true, "output": "x"}\n', [r"rows\.jsonl:2", "neither text", "bool"]),
    "null is no word": ({}, '{"instruction": null, "input": "red", "output": "old"}\n', ["neither text"]),
    "empty response": ({}, '{"input": "red", "output": " "}\n' * 3, ["3 of 3 rows", "empty response"]),
    "prompt too long": ({"max_len": 4}, GOOD + GOOD.replace("red", "red " * 9), [":2", "prompt >= max_len"]),
    # --- conversations
    "no answer": ({}, chat_row(CHAT[0]), ["no assistant turn"]),
    "turns are numbers": ({}, chat_row(1, 2), [r"rows\.jsonl:1"]),
    "content in parts": ({}, chat_row({"role": "user", "content": ["x"]}, CHAT[1]), ["needs role and content"]),
    "template refuses": ({"tokenizer_chat_template": STRICT}, chat_row(*CHAT), ["roles must alternate"]),
    "template rewrites the prompt": ({"tokenizer_chat_template": REWRITES}, chat_row(*CHAT), ["rewrites earlier turns"]),
    "template rewrites an answer": (MULTITURN, chat_row(*CHAT, *CHAT), ["rewrites earlier turns"]),
    "template is broken": ({"tokenizer_chat_template": "{% for"}, chat_row(*CHAT), ["expected token|end of"]),
    "no template": ({"pretrain": "plain"}, chat_row(*CHAT), ["chat template|chat_template"]),
    "no template for text": ({"pretrain": "plain", "apply_chat_template": True}, GOOD, ["--tokenizer_chat_template"]),
    "missing template file": ({"tokenizer_chat_template": "none.jinja"}, GOOD, ["none.jinja"]),
    # --- models and outputs
    "no model": ({"pretrain": "/none/at/all"}, GOOD, ["/none/at/all", "neither a model folder nor"]),
    "no config": ({"pretrain": "no_config"}, GOOD, ["no_config"]),
    "small vocabulary": ({"pretrain": "small"}, GOOD, ["vocabulary of 100"]),
    "too few positions": ({"max_len": 200}, GOOD, ["--max_len 200", "--max_len 128", "config.json"]),
    "folder of another run": ({"save_path": "other"}, GOOD, ["--save_path other", "another model", "folder"]),
    "no folder": ({"save_path": "rows.jsonl/out"}, GOOD, ["--save_path rows.jsonl/out", "Not a directory"]),
    # --- flags
    "train_batch_size": ({"train_batch_size": 0}, GOOD, ["--train_batch_size must be 1 or more, not 0"]),
    "probs are words": ({"dataset": TWICE, "dataset_probs": "x,y"}, GOOD, ["--dataset_probs x,y"]),
    "probs are few": ({"dataset": TWICE, "dataset_probs": "1"}, GOOD, ["--dataset_probs 1", "2 datasets"]),
}  # fmt: skip


def make_args(**flags):
    paths = {"pretrain": "model", "dataset": "rows.jsonl", "save_path": "out", "cache_dir": "cache"}
    return sft.Args(**{**paths, "bf16": False, "max_len": 100, "num_proc": 1, **flags})


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(name, monkeypatch, capfd):
    flags, content, patterns = BAD_INPUT[name]
    Path("rows.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    Path("object.json").write_text(json.dumps(ROW))
    monkeypatch.setattr(sft, "load_model", lambda *args: pytest.fail("a model was loaded"))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    capfd.readouterr()
    with pytest.raises(SystemExit, match="2"):
        sft.main(make_args(**flags))
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and len(line) < 700
    assert not [pattern for pattern in patterns if not re.search(pattern, line)], line
    assert not Path("out").exists()


def test_cache_dir_that_cannot_be_written(home, monkeypatch, capfd):
    """A notice, and a temporary folder serves."""
    write_rows("rows.jsonl", [ROW])
    monkeypatch.setattr(sft.tempfile, "gettempdir", lambda: str(home))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    args = make_args(cache_dir="rows.jsonl/cache")
    sft.setup(args)
    assert (
        "--cache_dir rows.jsonl/cache: Not a directory; a temporary folder serves" in capfd.readouterr().out
    )
    assert len(sft.load_examples("rows.jsonl", None, "train", sft.load_tokenizer("model", args), args)) == 1
    assert list(home.glob("flatalign-*/rows"))


@pytest.mark.parametrize(
    "flag, value, named", [("learning_rat", "1", "--learning_rate"), ("zero_stage", "4", "{0,1,2,3}")]
)
def test_flags_that_tyro_refuses(flag, value, named, capsys):
    with pytest.raises(SystemExit, match="2"):
        tyro.cli(
            sft.Args, args=["--pretrain", "x", "--dataset", "y", f"--{flag}", value], use_underscores=True
        )
    assert named in capsys.readouterr().err.replace(" ", "")

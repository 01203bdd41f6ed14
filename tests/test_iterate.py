"""iterate.sh with stub scripts beside it: order, resume, changed settings, lock, kills, checks."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
FLAGS = "bf16 eval_task input_key max_new_tokens prompt_max_len max_len learning_rate use_wandb reward_fn"
FLAGS += " train_batch_size micro_train_batch_size input_template"
# One stub stands for all scripts. It adds its argv to calls.jsonl, fails or waits where STUB_FAIL, STUB_WAIT
# name its call as KIND:FOLDER, and writes what the script would.
STUB = """
import json, os, sys, time
from pathlib import Path
flags = {a[2:]: b for a, b in zip(sys.argv[1:], sys.argv[2:] + ["--"]) if a.startswith("--")}
kind = flags.get("eval_task", Path(sys.argv[0]).stem).replace("_vllm", "")
place = Path(flags.get("output_path", flags.get("save_path", flags.get("out"))))
call = f"{kind}:{place.parent.name.removeprefix('iter_')}"
with open(Path(__file__).resolve().parents[kind in ("toy", "plot")] / "calls.jsonl", "a") as f:
    f.write(json.dumps([kind if kind in ("toy", "plot") else call, sys.argv[1:]]) + "\\n")
if os.environ.get("STUB_WAIT") == call:
    pid = os.fork()  # a rank or an engine of the stage
    if pid:
        print(f"waiting {os.getpid()} {pid}", flush=True)
    time.sleep(60)
if os.environ.get("STUB_FAIL") == call:
    sys.exit(7)
place.parent.mkdir(parents=True, exist_ok=True)
if kind in ("sft", "dpo", "kd"):
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(place.parent.name)
elif kind != "plot":
    place.write_text(call)
"""


@pytest.fixture
def loop(tmp_path):
    """A folder with iterate.sh, stubs and inputs."""
    (tmp_path / "examples").mkdir()
    for name in ("batch_infer.py", "sft.py", "dpo.py", "kd.py", "examples/toy.py", "examples/plot.py"):
        flags = "\n".join(f"    {flag}: str" for flag in FLAGS.split())
        (tmp_path / name).write_text(f'"""\n{flags}\n"""{STUB}')
    for name in ("iterate.sh", "examples/toy.sh"):
        shutil.copy(REPO / name, tmp_path / name)
    for name in ("policy", "rm", "teacher"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    for name in ("prompts.jsonl", "sft.jsonl", "my r.py", "calls.jsonl"):
        (tmp_path / name).write_text("def f(): ...\n" * (name != "calls.jsonl"))
    return Loop(tmp_path)


class Loop:
    """run(NAME=value, ...) runs iterate.sh with these settings next to OWN; None unsets one."""

    OWN = {"POLICY_MODEL_PATH": "policy", "RM_MODEL_PATH": "rm", "PROMPT_DATASET": "prompts.jsonl"}
    OWN |= {"OUT": "out", "TRAINING_ITERS": 1, "PATH": PATH}

    def __init__(self, path):
        self.path = path

    def start(self, cwd=None, **settings):
        settings = {name: str(value) for name, value in (self.OWN | settings).items() if value is not None}
        options = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE) | {
            "text": True,
            "start_new_session": True,
        }
        return subprocess.Popen(
            ["bash", self.path / "iterate.sh"], cwd=cwd or self.path, env=settings, **options
        )

    def run(self, code=0, **settings):
        """What it printed on stdout and stderr."""
        process = self.start(**settings)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, out + err
        return out, err

    def calls(self):
        """[[call, words]] since this was asked."""
        lines = (self.path / "calls.jsonl").read_text().splitlines()
        (self.path / "calls.jsonl").write_text("")
        return [[call, shlex.join(words)] for call, words in map(json.loads, lines)]

    def kinds(self):
        return [call for call, _ in self.calls()]


def stages(k, train=True):
    """The calls of iteration k of raft."""
    return [f"generate:{k}", f"rm:{k}"] + [f"logps:{k}"] * 2 * (k > 0) + [f"sft:{k}"] * train


def test_raft(loop):
    loop.run(TRAINING_ITERS=2, ROLLOUT_BATCH_SIZE=16, BEST_OF_N=3, RM_FLAGS="--max_len 9")
    calls = loop.calls()
    assert [call for call, _ in calls] == [*stages(0), *stages(1), *stages(2, train=False), "plot"]
    assert "--pretrain policy" in calls[0][1]
    generate, rm, first, policy, train = (words.replace("out/iter_1/", "") for _, words in calls[3:8])
    assert "--rollout_batch_size 16 --best_of_n 3 --pretrain out/iter_0/model --iter 1 " in generate
    rows = "--dataset generate.jsonl --post_processor rs --scored_path scored.jsonl --output_path rm.jsonl"
    assert rm == f"--bf16 --eval_task rm --pretrain rm --max_len 9 {rows}"
    assert "--pretrain policy --dataset generate.jsonl --output_path logps_first.jsonl" in first
    assert "--pretrain out/iter_0/model --dataset generate.jsonl --output_path logps_policy.jsonl" in policy
    assert train == "--bf16 --pretrain out/iter_0/model --dataset rm.jsonl --save_path model"


def test_no_path_is_the_toy(loop):
    for method, name, flags in (("raft", "toy", ""), ("distill", "toy_distill", " --teacher")):
        loop.run(METHOD=method, POLICY_MODEL_PATH=None, RM_MODEL_PATH=None, PROMPT_DATASET=None, OUT=None)
        calls = loop.calls()
        assert calls[0] == ["toy", f"--out runs/{name}/toy{flags}"]
        assert f"--pretrain runs/{name}/toy/policy" in calls[1][1] and "toy.py:true_score" in calls[-1][1]
        assert all("--no-bf16" in words for _, words in calls[1:-1])


def test_distill_on_all_samples_with_or_without_a_reward(loop):
    loop.run(METHOD="distill", TEACHER_MODEL_PATH="teacher", RM_MODEL_PATH=None)
    calls = loop.calls()
    kinds = ["generate:0", "logps:0", "logps:0", "kd:0", "generate:1", *["logps:1"] * 3, "plot"]
    assert [call for call, _ in calls] == kinds
    expected = "--bf16 --teacher_model teacher --kd_loss reverse_kl --kd_coef 1 --pretrain policy"
    assert calls[3][1] == f"{expected} --dataset out/iter_0/generate.jsonl --save_path out/iter_0/model"
    hub = {"POLICY_MODEL_PATH": "owner/model-1.5B", "PROMPT_DATASET": "owner/prompts@sub/set,prompts.jsonl"}
    loop.run(METHOD="distill", TEACHER_MODEL_PATH="teacher", OUT="other", KL=0, **hub)
    assert loop.kinds() == ["generate:0", "rm:0", "kd:0", "generate:1", "rm:1", "plot"]


def test_reference_of_iterative_dpo(loop):
    references = (("REF=prev", None), ("REF=init", "policy"), ("REF_MODEL_PATH=rm", "rm"))
    for setting, reference in references:
        name, value = setting.split("=")
        loop.run(METHOD="iter_dpo", TRAINING_ITERS=2, KL=0, OUT=value, **{name: value})
        words = dict(loop.calls())["dpo:1"]
        assert f"--ref_pretrain {reference} " in words or reference is None and "--ref_pretrain" not in words


def test_csft(loop):
    """Score the data, train on it, ask for each reward and score what comes."""
    flags = {"CSFT_PROMPTS": "-1 1", "DATA_FLAGS": "--input_key chosen"}
    loop.run(METHOD="csft", SFT_DATASET="sft.jsonl", **flags)
    calls = loop.calls()
    asked = [f"{kind}:asked_{x}" for x in (-1, 1) for kind in ("generate", "rm")]
    assert [call for call, _ in calls] == ["rm:out", "sft:out", *asked, "plot"]
    expected = (
        "--bf16 --eval_task rm --pretrain rm --post_processor csft --normalize_reward --input_key chosen"
    )
    assert calls[0][1] == f"{expected} --dataset sft.jsonl --output_path out/rm.jsonl"
    assert (
        "--pretrain out/model --iter 0 --csft_prompt=-1 " in calls[2][1] and "--input_key" not in calls[3][1]
    )


def test_flags_keep_quotes_and_a_reward_function_needs_no_model(loop):
    flags = {"TRAIN_FLAGS": '--input_template "User: {}" \n --input_key ""', "RM_MODEL_PATH": None, "BF16": 0}
    loop.run(**flags, RM_FLAGS="--reward_fn 'my r.py:f=2,model=1'")
    calls = loop.calls()
    assert all("--no-bf16" in words for _, words in calls[:-1])
    assert "--pretrain" not in calls[1][1] and "--reward_fn 'my r.py:f=2,model=1'" in calls[1][1]
    assert "--no-bf16 --input_template 'User: {}' --input_key '' --pretrain" in calls[2][1]


def test_goes_on_where_it_stopped(loop):
    out, err = loop.run(code=7, TRAINING_ITERS=2, STUB_FAIL="rm:1")
    assert out.endswith("# out/iter_1/rm.jsonl\n") and err == ""
    assert loop.kinds() == [*stages(0), "generate:1", "rm:1"]
    out, _ = loop.run(TRAINING_ITERS=2)
    assert "# out/iter_0/model: done before" in out
    assert loop.kinds() == ["rm:1", "logps:1", "logps:1", "sft:1", *stages(2, train=False), "plot"]
    (
        loop.path / "out/iter_2/rm.jsonl.partial"
    ).mkdir()  # killed when the result was there: the script ends it
    loop.run(TRAINING_ITERS=3)
    assert loop.kinds() == ["rm:2", "sft:2", *stages(3, train=False), "plot"]


def test_other_settings_stop_and_are_named(loop):
    settings = {"RM_FLAGS": "--reward_fn 'my r.py:f'", "REF_MODEL_PATH": "teacher"}
    flags = "--learning_rate 1 --use_wandb "
    loop.run(**settings, TRAIN_FLAGS=flags + "SECRET1")
    loop.calls()
    settings["TRAIN_FLAGS"] = flags + "SECRET2"
    loop.run(**settings, TRAINING_ITERS=2, GENERATE_OUTPUT="link.jsonl")
    assert loop.kinds() == ["sft:1", *stages(2, train=False), "plot"]
    changes = [("BEST_OF_N", 5), ("METHOD", "iter_dpo"), ("TRAIN_FLAGS", "--use_wandb SECRET3 --max_len 1")]
    for name, value in changes:
        _, err = loop.run(code=2, **settings | {name: value})
        assert f"OUT=out: was: {name}=" in err and f"now: {name}=" in err and err.count("\n") == 1
    for name in ("prompts.jsonl", "teacher/config.json", "my r.py", "sft.py"):
        (loop.path / name).write_text((loop.path / name).read_text() + "#")
        _, err = loop.run(code=2, **settings)
        assert f"{name} now: " in err if name == "sft.py" else f"was: {name} " in err
    written = [path.read_text() for path in (loop.path / "out").rglob("*") if path.is_file()]
    assert "SECRET" not in err.join(written) and loop.calls() == []


def test_spaces_another_working_directory_and_out_within_an_input(loop):
    place = (loop.path / "policy").rename(loop.path / "my models")
    settings = {"RM_MODEL_PATH": loop.path / "rm", "PROMPT_DATASET": loop.path / "prompts.jsonl", "cwd": "/"}
    settings |= {"POLICY_MODEL_PATH": place, "OUT": place / "out"}
    loop.run(**settings)
    assert len(loop.calls()) == 8
    loop.run(**settings)
    assert loop.kinds() == ["plot"]


@pytest.mark.parametrize("whole_group", [True, False])
def test_kill(loop, whole_group):
    """SIGKILL to the process group leaves nothing behind; a stage whose loop alone was killed keeps OUT."""
    process = loop.start(STUB_WAIT="rm:0")
    _, stage, rank = next(line for line in process.stdout if line.startswith("waiting")).split()
    if not whole_group:
        process.kill()
        process.wait()
        _, err = loop.run(code=2)
        assert err == f"error: OUT=out is in use by process {process.pid} or its stage {stage}\n"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=20)
    loop.calls()
    loop.run()
    assert loop.kinds() == ["rm:0", "sft:0", *stages(1, train=False), "plot"]
    status, end = Path(f"/proc/{rank}/stat"), time.time() + 5
    while status.exists() and ") Z " not in status.read_text():
        assert time.time() < end, "a rank outlived the loop"


def test_dry_run_and_gpus(loop):
    settings = {"DRY_RUN": 1, "NUM_GPUS": 2, "CUDA_VISIBLE_DEVICES": ""}
    out, err = loop.run(**settings, GENERATE_FLAGS="--eval_task generate")
    lines = [line for line in out.splitlines() if line[0] != "#"]
    assert all(line.startswith("deepspeed --num_gpus 2 ") for line in lines[:-1]) and len(lines) == 8
    assert err == "notice there is no GPU: NUM_GPUS=2 processes run on the CPU\n"
    assert loop.calls() == [] and not (loop.path / "out").exists()
    out, _ = loop.run(**settings | {"CUDA_VISIBLE_DEVICES": "4,5,6", "MASTER_PORT": 29600})
    assert "deepspeed --master_port 29600 --include localhost:4\\,5 " in out
    (loop.path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\n")
    (loop.path / "nvidia-smi").chmod(0o755)
    _, err = loop.run(2, NUM_GPUS=2, PATH=f"{loop.path}:{PATH}")
    assert err == "error: NUM_GPUS=2, but there are 1: 0\n"


def test_links_to_the_newest(loop):
    links = {"GENERATE_OUTPUT": "old/generate.jsonl", "RM_OUTPUT": "old/rm.jsonl", "MODEL_OUTPUT_PATH": "old"}
    loop.run(**links)
    loop.run(**links, TRAINING_ITERS=2)
    seen = [(loop.path / "old" / name).read_text() for name in ("generate.jsonl", "rm.jsonl", "config.json")]
    assert seen == ["generate:2", "rm:2", "iter_1"]
    (loop.path / "old/config.json").unlink()
    (loop.path / "old/config.json").write_text("mine")
    _, err = loop.run(code=2, **links)
    assert "MODEL_OUTPUT_PATH become links, but one of them is a file" in err


MISTAKES = """
METHOD=ppo | METHOD=ppo: choose raft
METHOD=distill | TEACHER_MODEL_PATH is not set
RM_MODEL_PATH= | RM_MODEL_PATH is not set
METHOD=csft SFT_DATASET=sft.jsonl CSFT_PROMPTS='0 high' | CSFT_PROMPTS=0 high: numbers
TRAINING_ITERS=three | TRAINING_ITERS=three: a number above 0
BEST_OF_N=0 | BEST_OF_N=0: a number above 0
BF16=yes | BF16=yes: 0 or 1
POLICY_MODEL_PATH=./nowhere | POLICY_MODEL_PATH: ./nowhere/config.json is not there
RM_MODEL_PATH=examples | RM_MODEL_PATH: examples/config.json is not there
PROMPT_DATASET=prompts.jsonl,examples/a.jsonl | PROMPT_DATASET: examples/a.jsonl is not there
REF=prev REF_MODEL_PATH=policy | REF=prev: init, or prev without
OUT=prompts.jsonl | OUT=prompts.jsonl cannot be written
TRAIN_FLAGS='--learning_rat 1e-3' | TRAIN_FLAGS: sft.py has no flag --learning_rat
RM_FLAGS=--output-path=x | RM_FLAGS: --output_path is set by iterate.sh
GENERATE_FLAGS="--input_template 'x" | GENERATE_FLAGS: a quote is not closed
RM_FLAGS='--reward_fn nowhere.py:f' | RM_FLAGS: nowhere.py:f: no such file or function
RM_FLAGS='--reward_fn=sft.py:os,sft.py:g=2' | RM_FLAGS: sft.py:g=2: no such file or function
RM_FLAGS='--reward_fn sft.py' | RM_FLAGS: sft.py: no such file or function
"""


@pytest.mark.parametrize("mistake", MISTAKES.strip().splitlines())
def test_mistakes_stop_before_the_first_stage(loop, mistake):
    settings, message = mistake.split(" | ")
    _, err = loop.run(code=2, **dict(word.split("=", 1) for word in shlex.split(settings)))
    assert message in err and err.count("\n") == 1 and loop.calls() == []

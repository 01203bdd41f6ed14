"""iterate.sh with stub scripts beside it: order, resume, changed settings, lock, kills, checks."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
OWN = {"POLICY_MODEL_PATH": "policy", "RM_MODEL_PATH": "rm", "PROMPT_DATASET": "prompts.jsonl", "OUT": "out"}
# One stub stands for all scripts. It adds its argv to calls.jsonl, fails or waits where STUB_FAIL, STUB_WAIT
# name its call as KIND:FOLDER, and writes what the script would.
STUB = """
import json, os, sys, time
from pathlib import Path
flags = {a[2:]: b for a, b in zip(sys.argv[1:], sys.argv[2:] + ["--"]) if a.startswith("--")}
kind = flags.get("eval_task", Path(sys.argv[0]).stem).replace("_vllm", "")
place = Path(flags.get("output_path", flags.get("save_path", flags.get("out"))))
call = f"{kind}:{place.parent.name.removeprefix('iter_')}"
with open(os.environ["CALLS"], "a") as f:
    f.write(json.dumps([kind if kind in ("toy", "plot") else call, sys.argv[1:]]) + "\\n")
if os.environ.get("STUB_WAIT") == call:
    os.fork()  # a rank or an engine of the stage
    print("waiting", os.getpid(), flush=True)
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


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test runs in a folder with iterate.sh, stubs and inputs."""
    monkeypatch.chdir(tmp_path)
    for name in ("examples", "policy", "rm", "teacher"):
        Path(name).mkdir()
    for name in ("batch_infer.py", "sft.py", "dpo.py", "kd.py", "examples/toy.py", "examples/plot.py"):
        flags = "\n".join(re.findall(r"^    \w+:", (REPO / name).read_text(), re.M))
        Path(name).write_text(f'"""\n{flags}\n"""{STUB}')
    shutil.copy(REPO / "iterate.sh", ".")
    shutil.copy(REPO / "examples/toy.sh", "examples")
    for name in ("policy/config.json", "rm/config.json", "teacher/config.json", "prompts.jsonl", "my r.py"):
        Path(name).write_text("def f(prompt, response, row): ...\ndef g(): ...\n")
    Path("calls.jsonl").touch()


def start(cwd=".", **settings):
    """iterate.sh with these settings next to OWN; None unsets one."""
    settings = OWN | {"TRAINING_ITERS": 1, "PATH": os.environ["PATH"], "CALLS": Path("calls.jsonl").absolute()} | settings
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    options["env"] = {name: str(value) for name, value in settings.items() if value is not None}
    return subprocess.Popen(["bash", Path("iterate.sh").absolute()], cwd=cwd, **options)


def run(code=0, **settings):
    """What it printed on stdout and stderr."""
    process = start(**settings)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, out + err
    return out, err


def calls():
    """([KIND:FOLDER], [words]) of the scripts that ran since this was asked."""
    lines = [json.loads(line) for line in Path("calls.jsonl").read_text().splitlines()]
    Path("calls.jsonl").write_text("")
    return [call for call, _ in lines], [shlex.join(words) for _, words in lines]


def stages(k, train=True):
    return [f"generate:{k}", f"rm:{k}"] + [f"logps:{k}"] * 2 * (k > 0) + [f"sft:{k}"] * train


def test_raft():
    run(TRAINING_ITERS=2, ROLLOUT_BATCH_SIZE=16, BEST_OF_N=3, RM_FLAGS="--max_len 9")
    kinds, words = calls()
    assert kinds == [*stages(0), *stages(1), *stages(2, train=False), "plot"] and words[-1] == "--out out"
    generate, rm, policy, first, train = (text.replace("out/iter_1/", "") for text in words[3:8])
    assert "--rollout_batch_size 16 --best_of_n 3 --pretrain out/iter_0/model --iter 1 " in generate
    rows = "--dataset generate.jsonl --post_processor rs --scored_path scored.jsonl --output_path rm.jsonl"
    assert rm == f"--bf16 --eval_task rm --pretrain rm --max_len 9 {rows}"
    assert "--pretrain policy --dataset generate.jsonl --output_path logps_first.jsonl" in first
    assert "--pretrain out/iter_0/model --dataset generate.jsonl --output_path logps_policy.jsonl" in policy
    assert train == "--bf16 --pretrain out/iter_0/model --dataset rm.jsonl --save_path model"


def test_no_path_is_the_toy():
    for method, name, flag in (("raft", "toy", ""), ("distill", "toy_distill", " --teacher")):
        run(METHOD=method, POLICY_MODEL_PATH=None, RM_MODEL_PATH=None, PROMPT_DATASET=None, OUT=None)
        kinds, words = calls()
        assert kinds[0] == "toy" and words[0] == f"--out runs/{name}/toy{flag}"
        assert f"--pretrain runs/{name}/toy/policy" in words[1] and "toy.py:true_score" in words[-1]
        assert all("--no-bf16" in text for text in words[1:-1])


def test_distill_on_all_samples_with_or_without_a_reward():
    run(METHOD="distill", TEACHER_MODEL_PATH="teacher", RM_MODEL_PATH=None)
    kinds, words = calls()
    assert kinds == ["generate:0", "logps:0", "logps:0", "kd:0", "generate:1", *["logps:1"] * 3, "plot"]
    expected = "--bf16 --teacher_model teacher --kd_loss reverse_kl --kd_coef 1 --pretrain policy"
    assert words[3] == f"{expected} --dataset out/iter_0/generate.jsonl --save_path out/iter_0/model"
    hub = {"POLICY_MODEL_PATH": "owner/model-1.5B", "PROMPT_DATASET": "owner/prompts@sub/set,prompts.jsonl"}
    run(METHOD="distill", TEACHER_MODEL_PATH="teacher", OUT="other", KL=0, **hub)
    assert calls()[0] == ["generate:0", "rm:0", "kd:0", "generate:1", "rm:1", "plot"]


def test_reference_of_iterative_dpo():
    for setting, reference in (("REF=init", "policy"), ("REF=prev", None), ("REF_MODEL_PATH=rm", "rm")):
        run(METHOD="iter_dpo", TRAINING_ITERS=2, KL=0, OUT=setting, **dict([setting.split("=")]))
        words = shlex.split(dict(zip(*calls()))["dpo:1"])
        assert words[1:3] == ["--ref_pretrain", reference] if reference else "--ref_pretrain" not in words


def test_csft():
    run(METHOD="csft", SFT_DATASET="prompts.jsonl", CSFT_PROMPTS="-1 1", DATA_FLAGS="--input_key chosen")
    kinds, words = calls()
    asked = [f"{kind}:asked_{x}" for x in (-1, 1) for kind in ("generate", "rm")]
    assert kinds == ["rm:out", "sft:out", *asked, "plot"]
    flags = "--post_processor csft --normalize_reward --input_key chosen --dataset prompts.jsonl"
    assert words[0] == f"--bf16 --eval_task rm --pretrain rm {flags} --output_path out/rm.jsonl"
    assert "--pretrain out/model --iter 0 --csft_prompt=-1 " in words[2] and "--input_key" not in words[3]


def test_flags_keep_quotes_and_a_reward_function_needs_no_model():
    flags = {"TRAIN_FLAGS": '--input_template "a.py: {}" \n --input_key ""', "RM_MODEL_PATH": None, "BF16": 0}
    run(**flags, RM_FLAGS="--reward_fn 'my r.py:f=0.5,my r.py:f'")
    words = calls()[1]
    assert all("--no-bf16" in text for text in words[:-1])
    assert "--pretrain" not in words[1] and "--reward_fn 'my r.py:f=0.5,my r.py:f'" in words[1]
    assert "--no-bf16 --input_template 'a.py: {}' --input_key '' --pretrain" in words[2]


def test_goes_on_where_it_stopped():
    out, err = run(code=7, TRAINING_ITERS=2, STUB_FAIL="rm:1")
    assert out.endswith("# out/iter_1/rm.jsonl\n") and err == ""
    assert calls()[0] == [*stages(0), "generate:1", "rm:1"]
    out, _ = run(TRAINING_ITERS=2)
    assert "# out/iter_0/model: done before" in out
    assert calls()[0] == ["rm:1", "logps:1", "logps:1", "sft:1", *stages(2, train=False), "plot"]
    Path("out/iter_2/rm.jsonl.partial").mkdir()  # killed when the result was there: the script does the rest
    run(TRAINING_ITERS=3)
    assert calls()[0] == ["rm:2", "sft:2", *stages(3, train=False), "plot"]


def test_other_settings_stop_and_are_named():
    settings = {"RM_FLAGS": "--reward_fn 'my r.py:f'", "REF_MODEL_PATH": "teacher"}
    run(**settings, TRAIN_FLAGS="--learning_rate 1 --use_wandb SECRET1")
    settings["TRAIN_FLAGS"] = "--learning_rate 1 --use_wandb SECRET2"
    calls()
    run(**settings, TRAINING_ITERS=2, GENERATE_OUTPUT="link.jsonl")
    assert calls()[0] == ["sft:1", *stages(2, train=False), "plot"]
    assert Path("link.jsonl").is_symlink() and Path("link.jsonl").read_text() == "generate:2"
    changes = {"BEST_OF_N": 5, "METHOD": "iter_dpo", "TRAIN_FLAGS": "--use_wandb SECRET3 --max_len 1"}
    for name, value in changes.items():
        _, err = run(code=2, **settings | {name: value})
        assert f"OUT=out: was: {name}=" in err and f"now: {name}=" in err and err.count("\n") == 1
    for name in ("prompts.jsonl", "teacher/config.json", "my r.py", "sft.py"):
        Path(name).write_text(Path(name).read_text() + "#")
        assert name in run(code=2, **settings)[1]
    written = [path.read_text() for path in Path("out").rglob("*") if path.is_file()]
    assert "SECRET" not in err.join(written) and calls()[0] == []


def test_spaces_another_working_directory_and_out_within_an_input(tmp_path):
    place = Path("policy").rename("my models").absolute()
    settings = {"RM_MODEL_PATH": tmp_path / "rm", "PROMPT_DATASET": tmp_path / "prompts.jsonl", "cwd": "/"}
    settings |= {"POLICY_MODEL_PATH": place, "OUT": place / "out"}
    run(**settings)
    run(**settings)
    assert calls()[0] == [*stages(0), *stages(1, train=False), "plot", "plot"]


@pytest.mark.parametrize("whole_group", [True, False])
def test_kill(whole_group):
    """SIGKILL to the process group leaves nothing behind; a stage whose loop alone was killed keeps OUT."""
    process = start(STUB_WAIT="rm:0")
    lines = (line.split() for line in process.stdout if line.startswith("waiting"))
    pids = [next(lines)[1], next(lines)[1]]  # of the stage and its rank
    if not whole_group:
        process.kill()
        process.wait()
        _, err = run(code=2)
        assert err.startswith(f"error: OUT=out is in use by process {process.pid} or its stage ")
        assert err.split()[-1] in pids
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=20)
    run()
    assert calls()[0] == ["generate:0", "rm:0", "rm:0", "sft:0", *stages(1, train=False), "plot"]
    for status in (Path(f"/proc/{pid}/stat") for pid in pids):
        assert not status.exists() or ") Z " in status.read_text()


def test_dry_run_and_gpus():
    settings = {"DRY_RUN": 1, "NUM_GPUS": 2, "CUDA_VISIBLE_DEVICES": ""}
    out, err = run(**settings, GENERATE_FLAGS="--eval_task generate")
    lines = [line for line in out.splitlines() if line[0] != "#"]
    assert all(line.startswith("deepspeed --num_gpus 2 ") for line in lines[:-1]) and len(lines) == 8
    assert err == "notice there is no GPU: NUM_GPUS=2 processes run on the CPU\n"
    assert calls()[0] == [] and not Path("out").exists()
    out, _ = run(**settings | {"CUDA_VISIBLE_DEVICES": "4,5,6", "MASTER_PORT": 29600})
    assert "deepspeed --include localhost:4\\,5 --master_port 29600 " in out


MISTAKES = """
METHOD=ppo | METHOD=ppo: choose raft
METHOD=distill | TEACHER_MODEL_PATH is not set
RM_MODEL_PATH= | RM_MODEL_PATH is not set
CSFT_PROMPTS='0 high' | CSFT_PROMPTS=0 high: numbers
POLICY_MODEL_PATH=./nowhere | POLICY_MODEL_PATH: ./nowhere/config.json is not there
PROMPT_DATASET=prompts.jsonl,examples/a.jsonl | PROMPT_DATASET: examples/a.jsonl is not there
METHOD=iter_dpo BEST_OF_N=1 | BEST_OF_N=1: METHOD=iter_dpo needs two samples
REF=prev REF_MODEL_PATH=policy | REF=prev: init, or prev without
OUT=prompts.jsonl | OUT=prompts.jsonl cannot be written
TRAIN_FLAGS='--learning_rat 1e-3' | TRAIN_FLAGS: sft.py has no flag --learning_rat
RM_FLAGS=--output-path=x | RM_FLAGS: --output_path is set by iterate.sh
GENERATE_FLAGS="--input_template 'x" | GENERATE_FLAGS: a quote is not closed
RM_FLAGS="--reward_fn='my r.py:f,my r.py:h=2'" | RM_FLAGS: my r.py:h=2: KeyError: 'h'; it must be FILE.py:NAME
RM_FLAGS="--reward_fn='my r.py:g'" | RM_FLAGS: my r.py:g: TypeError: too many positional arguments
"""


@pytest.mark.parametrize("mistake", MISTAKES.strip().splitlines())
def test_mistakes_stop_before_the_first_stage(mistake):
    settings, message = mistake.split(" | ")
    _, err = run(code=2, **dict(word.split("=", 1) for word in shlex.split(settings)))
    assert message in err and err.count("\n") == 1 and calls()[0] == []

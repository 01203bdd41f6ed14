"""iterate.sh with stub scripts beside it: order, resume, changed settings, lock, signals, checks."""

import fcntl
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

# One stub stands for all scripts. It adds its argv to calls.jsonl, fails or waits where STUB_FAIL, STUB_WAIT
# name its call as KIND:ITERATION, and writes what the script would. Its docstring lists the flags.
STUB = '''
"""
    eval_task: str
    input_key: str
    bf16: bool
    max_new_tokens: int
    prompt_max_len: int
    max_len: int
    temperature: float
    learning_rate: float
    use_wandb: str
    reward_fn: str
    train_batch_size: int
    micro_train_batch_size: int
    input_template: str
    old alias: "--param_dtype"
"""
import json, os, sys, time
from pathlib import Path
flags = {a[2:]: b for a, b in zip(sys.argv[1:], sys.argv[2:] + ["--"]) if a.startswith("--")}
script = Path(sys.argv[0]).stem
kind = {"batch_infer": flags.get("eval_task", ""), "sft": "train"}.get(script, script)
folder = Path(flags.get("output_path", flags.get("save_path", flags.get("out", ".")))).parent.name
call = f"{kind}:{folder.removeprefix('iter_')}" if script in ("batch_infer", "sft", "kd") else kind
with open(Path(__file__).resolve().parents[script in ("toy", "plot")] / "calls.jsonl", "a") as f:
    f.write(json.dumps([call, sys.argv]) + "\\n")
if os.environ.get("STUB_WAIT") == call:
    pid = os.fork()  # a rank or an engine of the stage
    if pid:
        print(f"waiting {pid}", flush=True)
    time.sleep(60)
if os.environ.get("STUB_FAIL") == call:
    sys.exit(7)
if kind in ("train", "kd"):
    Path(flags["save_path"]).mkdir(parents=True, exist_ok=True)
    Path(flags["save_path"], "config.json").write_text(folder)
elif kind == "toy":
    Path(flags["out"]).mkdir(parents=True, exist_ok=True)
    Path(flags["out"], "toy.json").write_text("{}")
elif kind != "plot":
    Path(flags["output_path"]).write_text(f"{call}\\n")
'''


@pytest.fixture
def loop(tmp_path):
    """A folder with iterate.sh, stubs and inputs."""
    for name in ("batch_infer.py", "sft.py", "kd.py", "examples/toy.py", "examples/plot.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(STUB)
    shutil.copy(REPO / "iterate.sh", tmp_path)
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy/config.json").write_text("{}")
    (tmp_path / "rm").mkdir()
    (tmp_path / "prompts.jsonl").write_text("{}\n")
    return Loop(tmp_path)


class Loop:
    """run(NAME=value, ...) runs iterate.sh with these settings; calls() is what ran since it was asked."""

    own = dict(POLICY_MODEL_PATH="policy", RM_MODEL_PATH="rm", PROMPT_DATASET="prompts.jsonl", OUT="out")

    def __init__(self, path):
        self.path = path

    def start(self, **settings):
        names = "METHOD KL REF REF_MODEL_PATH TEACHER_MODEL_PATH SFT_DATASET GENERATE_OUTPUT RM_OUTPUT MODEL_OUTPUT_PATH ITER_LOG_PATH".split()
        env = {k: v for k, v in os.environ.items() if k not in names}
        env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
        settings = {k: str(v) for k, v in {**self.own, **settings}.items() if v is not None}
        pipe = subprocess.PIPE
        return subprocess.Popen(
            ["bash", "iterate.sh"],
            cwd=self.path,
            env={**env, **settings},
            text=True,
            stdout=pipe,
            stderr=pipe,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell in the background ignores it
        )

    def run(self, code=0, **settings):
        process = self.start(**settings)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, out + err
        return out, err

    def calls(self):
        log = self.path / "calls.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    def kinds(self):
        return [call.replace("generate_vllm", "generate") for call, _ in self.calls()]


def stages(last, train=True):
    """The calls of one iteration."""
    return [f"generate:{last}", f"rm:{last}"] + [f"logps:{last}"] * 2 * (last > 0) + [f"train:{last}"] * train


def test_order_and_arguments(loop):
    loop.run(TRAINING_ITERS=2, ROLLOUT_BATCH_SIZE=16, BEST_OF_N=3, RM_FLAGS="--max_len 9")
    calls = loop.calls()
    kinds = [call.replace("generate_vllm", "generate") for call, _ in calls]
    assert kinds == [*stages(0), *stages(1), *stages(2, train=False), "plot"]
    generate, rm, first, policy, train = (argv for _, argv in calls[3:8])
    for pair in ("--pretrain out/iter_0/model", "--iter 1", "--rollout_batch_size 16", "--best_of_n 3"):
        assert pair in " ".join(generate)
    assert " ".join(rm).endswith(
        "--eval_task rm --dataset out/iter_1/generate.jsonl --post_processor rs"
        " --scored_path out/iter_1/scored.jsonl --output_path out/iter_1/rm.jsonl --pretrain rm --max_len 9"
    )
    for argv, model, name in ((first, "policy", "first"), (policy, "out/iter_0/model", "policy")):
        assert " ".join(argv).endswith(
            f"--eval_task logps --pretrain {model} --dataset out/iter_1/generate.jsonl"
            f" --output_path out/iter_1/logps_{name}.jsonl --max_len 1000000 --max_drop_ratio 1 --micro_batch_size 4"
        )
    assert " ".join(train[1:]) == (
        "--pretrain out/iter_0/model --dataset out/iter_1/rm.jsonl --save_path out/iter_1/model"
    )
    assert "--pretrain policy" in " ".join(calls[0][1])


def test_no_settings_is_the_toy(loop):
    out, _ = loop.run(POLICY_MODEL_PATH=None, RM_MODEL_PATH=None, PROMPT_DATASET=None, OUT=None)
    calls = loop.calls()
    assert [call for call, _ in calls][0] == "toy"
    assert len(calls) == 1 + 3 * 3 + 2 + 3 * 2 + 1
    assert "--pretrain runs/toy/toy/policy" in " ".join(calls[1][1])
    assert calls[-1][1][-1].endswith("examples/toy.py:true_score")
    assert (loop.path / "runs/toy/iter_3/rm.jsonl").exists()


def test_without_kl_no_model_runs_for_it(loop):
    loop.run(TRAINING_ITERS=1, KL=0)
    assert loop.kinds() == [*stages(0), "generate:1", "rm:1", "plot"]


def test_distill(loop):
    """The policy's own samples go to kd.py; a reward model is optional and only measures."""
    (loop.path / "teacher").mkdir()
    loop.run(METHOD="distill", TRAINING_ITERS=1, TEACHER_MODEL_PATH="teacher", RM_MODEL_PATH=None)
    calls = loop.calls()
    kinds = [call.replace("generate_vllm", "generate") for call, _ in calls]
    assert kinds == ["generate:0", "logps:0", "logps:0", "kd:0", "generate:1", *["logps:1"] * 3, "plot"]
    assert " ".join(calls[3][1][1:]) == (
        "--pretrain policy --dataset out/iter_0/generate.jsonl --save_path out/iter_0/model"
        " --teacher_model teacher --kd_loss reverse_kl --kd_coef 1"
    )
    loop.run(METHOD="distill", TRAINING_ITERS=1, TEACHER_MODEL_PATH="teacher", OUT="other", KL=0)
    assert loop.kinds() == ["generate:0", "rm:0", "kd:0", "generate:1", "rm:1", "plot"]


def test_csft(loop):
    """Score the data, train on it, ask for each reward and score what comes."""
    (loop.path / "sft.jsonl").write_text("{}\n")
    settings = dict(SFT_DATASET="sft.jsonl", CSFT_PROMPTS="-1 1", DATA_FLAGS="--input_key chosen")
    loop.run(METHOD="csft", **settings)
    calls = loop.calls()
    kinds = [call.replace("generate_vllm", "generate") for call, _ in calls]
    asked = [f"{kind}:asked_{x}" for x in (-1, 1) for kind in ("generate", "rm")]
    assert kinds == ["rm:out", "train:out", *asked, "plot"]
    assert " ".join(calls[0][1][1:]) == (
        "--eval_task rm --dataset sft.jsonl --post_processor csft --normalize_reward --input_key chosen"
        " --scored_path out/scored.jsonl --output_path out/rm.jsonl --pretrain rm"
    )
    assert "--pretrain out/model" in " ".join(calls[2][1]) and "--csft_prompt=-1" in calls[2][1]
    loop.run(METHOD="csft", **settings)
    assert loop.kinds() == ["plot"]


def test_a_reward_function_stands_for_the_reward_model(loop):
    loop.run(TRAINING_ITERS=1, RM_MODEL_PATH=None, RM_FLAGS="--reward_fn r.py:f", KL=0)
    calls = loop.calls()
    assert calls[1][0] == "rm:0" and "--pretrain" not in calls[1][1] and calls[1][1][-2:] == ["--reward_fn", "r.py:f"]


def test_user_flags_come_last_and_keep_quotes(loop):
    loop.run(TRAINING_ITERS=1, TRAIN_FLAGS='--input_template "User: {}" \n --learning_rate 1e-3 --no-bf16')
    train = loop.calls()[2][1]
    assert train[-5:] == ["--input_template", "User: {}", "--learning_rate", "1e-3", "--no-bf16"]


def test_resume_after_failure(loop):
    _, err = loop.run(code=7, TRAINING_ITERS=2, STUB_FAIL="rm:1")
    assert err == "error: out/iter_1: rm ended with code 7\n"
    assert loop.kinds() == [*stages(0), "generate:1", "rm:1"]
    out, _ = loop.run(TRAINING_ITERS=2)
    assert loop.kinds() == ["rm:1", "logps:1", "logps:1", "train:1", *stages(2, train=False), "plot"]
    assert "out/iter_0  train: done before" in out
    loop.run(TRAINING_ITERS=2)
    assert loop.kinds() == ["plot"]


def test_more_iterations_continue(loop):
    loop.run(TRAINING_ITERS=1)
    loop.calls()
    loop.run(TRAINING_ITERS=2)
    assert loop.kinds() == ["train:1", *stages(2, train=False), "plot"]


def test_what_follows_a_deleted_result_runs_again(loop):
    loop.run(TRAINING_ITERS=1)
    loop.calls()
    (loop.path / "out/iter_0/rm.jsonl").unlink()
    loop.run(code=7, TRAINING_ITERS=1, STUB_FAIL="train:0")
    assert loop.kinds() == ["rm:0", "train:0"]
    loop.run(TRAINING_ITERS=1)
    assert loop.kinds() == ["train:0", *stages(1, train=False), "plot"]


def test_changed_setting_stops(loop):
    loop.run(TRAINING_ITERS=1, TRAIN_FLAGS="--learning_rate 1e-3")
    loop.calls()
    _, err = loop.run(code=2, TRAINING_ITERS=1, TRAIN_FLAGS="--learning_rate 2e-3")
    assert "out/iter_0: train was another command" in err
    assert "was: --learning_rate 1e-3 now: --learning_rate 2e-3" in err
    assert loop.calls() == []
    _, err = loop.run(code=2, TRAINING_ITERS=1, TRAIN_FLAGS="--learning_rate 1e-3", BEST_OF_N=5)
    assert "was: --best_of_n 4 now: --best_of_n 5" in err


def test_changed_input_file_stops(loop):
    loop.run(TRAINING_ITERS=1)
    (loop.path / "prompts.jsonl").write_text("{}\n{}\n")
    _, err = loop.run(code=2, TRAINING_ITERS=1)
    assert "generate was another command: was: --dataset prompts.jsonl" in err


@pytest.mark.parametrize("word", ["--reward_fn r.py:f", "--reward_fn other.py:g,r.py:f=0.5", "--reward_fn=r.py:f"])
def test_changed_file_within_a_flag_stops(loop, word):
    for name in ("r.py", "other.py"):
        (loop.path / name).write_text("1")
    loop.run(TRAINING_ITERS=1, RM_FLAGS=word)
    (loop.path / "new.txt").write_text("")  # a file elsewhere changes nothing
    loop.run(TRAINING_ITERS=1, RM_FLAGS=word)
    (loop.path / "r.py").write_text("23")
    _, err = loop.run(code=2, TRAINING_ITERS=1, RM_FLAGS=word)
    assert "rm was another command: was: --reward_fn" in err


@pytest.mark.parametrize("form", ["--use_wandb KEY", "--use_wandb=KEY", "--use-wandb KEY"])
def test_a_key_is_written_nowhere(loop, form):
    flags = f"{form} --learning_rate 1"
    loop.run(TRAINING_ITERS=1, TRAIN_FLAGS=flags.replace("KEY", "SECRET"))
    loop.calls()
    files = [path for path in (loop.path / "out").rglob("*") if path.is_file()]
    assert not any("SECRET" in path.read_text() for path in files)
    loop.run(TRAINING_ITERS=1, TRAIN_FLAGS=flags.replace("KEY", "OTHER"))  # a new key is no new run
    _, err = loop.run(code=2, TRAINING_ITERS=1, TRAIN_FLAGS=flags.replace("KEY", "OTHER").replace("1", "2"))
    assert "was: --learning_rate 1 now: --learning_rate 2" in err and "OTHER" not in err


def test_out_within_an_input_continues(loop):
    loop.run(TRAINING_ITERS=1, OUT="policy/out")
    loop.run(TRAINING_ITERS=1, OUT="policy/out")


def test_moved_out_and_other_launcher_continue(loop):
    loop.run(TRAINING_ITERS=1)
    loop.calls()
    (loop.path / "out").rename(loop.path / "moved")
    launcher = loop.path / "bin/deepspeed"
    launcher.parent.mkdir()
    launcher.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} "$@"\n')
    launcher.chmod(0o755)
    path = f"{launcher.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    loop.run(TRAINING_ITERS=2, OUT=loop.path / "moved", NUM_GPUS=2, PATH=path)
    assert loop.kinds() == ["train:1", *stages(2, train=False), "plot"]


def test_second_run_in_the_same_out_stops(loop):
    (loop.path / "out").mkdir()
    with open(loop.path / "out/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _, err = loop.run(code=2)
    assert err == "error: another run is working in OUT=out\n"
    assert loop.calls() == []


def wait_for_stage(process):
    """Reads the console until the stub waits; returns the pid of the child it started."""
    for line in process.stdout:
        if line.startswith("waiting"):
            return int(line.split()[1])
    raise AssertionError(process.stderr.read())


def ends(pid, seconds=5):
    """Whether a process ends soon: no such process, or a zombie that nobody has buried yet."""
    for _ in range(100 * seconds):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_the_stage_with_its_children(loop, number):
    process = loop.start(TRAINING_ITERS=1, STUB_WAIT="train:0")
    child = wait_for_stage(process)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert ends(child)
    loop.calls()
    loop.run(TRAINING_ITERS=1)
    assert loop.kinds() == ["train:0", *stages(1, train=False), "plot"]


def test_a_stage_that_outlives_the_loop_keeps_the_lock(loop):
    process = loop.start(TRAINING_ITERS=1, STUB_WAIT="rm:0")
    child = wait_for_stage(process)
    process.kill()
    process.wait()
    try:
        _, err = loop.run(code=2)
        assert "another run is working" in err
    finally:
        os.killpg(os.getpgid(child), signal.SIGKILL)
    process.communicate(timeout=20)
    loop.run(TRAINING_ITERS=1)


def test_dry_run_prints_commands_and_runs_nothing(loop):
    settings = dict(DRY_RUN=1, TRAINING_ITERS=2, NUM_GPUS=2, TRAIN_FLAGS="--input_template 'User: {}'")
    out, _ = loop.run(**settings, GENERATE_FLAGS="--eval_task generate_vllm")
    lines = [shlex.split(line) for line in out.splitlines()]
    assert len(lines) == 3 * 2 + 2 + 2 * 2 + 1
    assert [line[0] for line in lines[:3]] == ["python", "deepspeed", "deepspeed"]
    assert lines[2][-2:] == ["--input_template", "User: {}"]
    assert loop.calls() == [] and not (loop.path / "out").exists()
    out, _ = loop.run(**settings, GENERATE_FLAGS="--eval_task generate")
    assert out.startswith("deepspeed --num_gpus 2 ./batch_infer.py --eval_task generate ")
    out, _ = loop.run(**settings, GENERATE_FLAGS="--eval_task generate", CUDA_VISIBLE_DEVICES="4,5,6")
    assert out.startswith("deepspeed --include localhost:4\\,5 ./batch_infer.py ")
    _, err = loop.run(code=2, **settings, CUDA_VISIBLE_DEVICES="4")
    assert err == "error: NUM_GPUS=2, but CUDA_VISIBLE_DEVICES=4\n"


def test_links_to_the_newest(loop):
    links = dict(GENERATE_OUTPUT="old/generate.jsonl", RM_OUTPUT="old/rm.jsonl", MODEL_OUTPUT_PATH="old")
    _, err = loop.run(TRAINING_ITERS=2, ITER_LOG_PATH="old/iter.log", **links)
    assert "ITER_LOG_PATH is not used" in err
    old = loop.path / "old"
    assert old.joinpath("generate.jsonl").resolve() == loop.path / "out/iter_2/generate.jsonl"
    assert old.joinpath("rm.jsonl").resolve() == loop.path / "out/iter_2/rm.jsonl"
    assert old.joinpath("config.json").read_text() == "iter_1"
    loop.run(TRAINING_ITERS=2, **links)
    old.joinpath("rm.jsonl").unlink()
    old.joinpath("rm.jsonl").write_text("mine")
    _, err = loop.run(code=2, TRAINING_ITERS=2, **links)
    assert "old/rm.jsonl is there and not a link of ours" in err


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(METHOD="distill"), "TEACHER_MODEL_PATH is not set"),
        (dict(METHOD="csft"), "SFT_DATASET is not set"),
        (dict(METHOD="csft", SFT_DATASET="prompts.jsonl", CSFT_PROMPTS="0 high"), "CSFT_PROMPTS: high is no number"),
        (dict(METHOD="ppo"), "METHOD=ppo: choose raft"),
        (dict(TRAINING_ITERS="three"), "TRAINING_ITERS=three is not a whole number above 0"),
        (dict(BEST_OF_N="0"), "BEST_OF_N=0 is not a whole number above 0"),
        (dict(NUM_GPUS="-1"), "NUM_GPUS=-1 is not"),
        (dict(DRY_RUN="yes"), "DRY_RUN=yes, KL=1: 0 or 1"),
        (dict(RM_MODEL_PATH=None), "RM_MODEL_PATH is not set"),
        (dict(POLICY_MODEL_PATH="./nowhere"), "POLICY_MODEL_PATH: ./nowhere does not exist"),
        (
            dict(PROMPT_DATASET="prompts.jsonl,a/absent.jsonl"),
            "PROMPT_DATASET: a/absent.jsonl does not exist",
        ),
        (dict(REF="last"), "REF=last: init or prev"),
        (dict(REF="prev", REF_MODEL_PATH="policy"), "REF_MODEL_PATH and REF=prev contradict each other"),
        (dict(OUT="prompts.jsonl"), "OUT=prompts.jsonl cannot be written"),
        (dict(TRAIN_FLAGS="--learning_rat 1e-3"), "TRAIN_FLAGS: sft.py has no flag --learning_rat"),
        (dict(TRAIN_FLAGS="--save_path x"), "TRAIN_FLAGS: --save_path is set by iterate.sh"),
        (dict(RM_FLAGS="--output-path=x"), "RM_FLAGS: --output_path is set by iterate.sh"),
        (dict(GENERATE_FLAGS="--input_template 'x"), "GENERATE_FLAGS: a quote is not closed"),
    ],
)
def test_bad_settings_stop_before_the_first_stage(loop, settings, message):
    _, err = loop.run(code=2, **settings)
    assert message in err and err.count("\n") == 1
    assert loop.calls() == [] and not (loop.path / "out/iter_0").exists()


def test_hub_names_and_aliases_pass(loop):
    loop.run(
        DRY_RUN=1,
        POLICY_MODEL_PATH="Qwen/Qwen2.5-0.5B-Instruct",
        PROMPT_DATASET="owner/prompts@sub/folder,prompts.jsonl",
        TRAIN_FLAGS="--param_dtype bf16 --max-len=9",
    )

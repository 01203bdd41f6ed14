"""SIGKILL at any moment, to every trainer and stage: the same command again ends as if nothing had happened.

Half of the kills come before or after a rename, a removal or a new folder, counted out; half at random moments
after the first results. KILLS=100 python -m pytest -m slow tests/test_kill.py is the whole campaign (default 20).

As starting Python costs ten seconds, all runs are forks of one process, `python tests/test_kill.py`, which has
imported everything. It reads a run per line (JSON) and answers with the process group, then with the exit codes.
"""

import contextlib
import functools
import importlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import psutil
import pytest
from conftest import make_rows, write_rows
from launch import load_script

REPO = Path(__file__).resolve().parents[1]
KILLS = int(os.environ.get("KILLS", "20"))
MOVES = ("replace", "rename", "unlink", "remove", "rmdir", "mkdir")  # of os; pathlib and shutil call these
TRAINERS = ("sft", "dpo", "kto", "kd")
SHAPES = ((1, 0), (2, 3), (2, 0), (1, 3))  # ranks, ZeRO stage


# --- the process that forks


def serve():
    scripts = {name: load_script(name) for name in (*TRAINERS, "batch_infer")}
    for line in sys.stdin:
        order = json.loads(line)
        ranks = [fork(scripts, order, rank) for rank in range(order["ranks"])]
        for pid in ranks:
            os.setpgid(pid, ranks[0])
        print(ranks[0], flush=True)
        codes = []
        for _ in ranks:
            codes.append(os.waitstatus_to_exitcode(os.waitpid(-1, 0)[1]))
            if codes[-1] and len(codes) < len(ranks):  # as launchers do
                os.killpg(ranks[0], signal.SIGKILL)
        learned = Path(order["log"]).with_suffix(".modules")
        for name in learned.read_text().split() if learned.exists() else []:  # half of a first run is imports
            if name not in sys.modules:
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
        print(json.dumps(codes), flush=True)


def fork(scripts, order, rank):
    """The pid of a fork that runs main() as one rank."""
    if pid := os.fork():
        return pid
    try:
        os.setpgid(0, 0) if rank == 0 else None
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": order["ranks"], "LOCAL_WORLD_SIZE": order["ranks"]}
        places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": order["port"]}
        os.environ |= {name: str(value) for name, value in places.items()}
        os.sync = os.fsync = lambda *_: None  # a kill is no power failure; these cost seconds on a busy disk
        counted = count_moves(order) if rank == 0 else None
        module = scripts[order["script"]]
        code = module.main(module.Args(**order["flags"])) or 0
        if counted:
            Path(order["log"]).with_suffix(".moves").write_text(str(len(counted)))
            Path(order["log"]).with_suffix(".modules").write_text("\n".join(sys.modules))
    except SystemExit as e:
        code = e.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def count_moves(order):
    """Counts the moves of this process under the run's folder; kills its group before or after one of them."""
    folder, counted, (at, when) = order["folder"], [], order["kill"] or (None, None)

    def counting(real, *args, **options):
        if "dir_fd" not in options and not str(args[0]).startswith(folder):  # dir_fd: shutil.rmtree
            return real(*args, **options)
        counted.append(args[0])
        here = len(counted) == at
        if here and when == "before":
            os.killpg(0, signal.SIGKILL)
        real(*args, **options)
        if here:
            os.killpg(0, signal.SIGKILL)

    for name in MOVES:
        setattr(os, name, functools.partial(counting, getattr(os, name)))
    return counted


# --- what the tests ask of it


class Forks:
    def __init__(self, folder):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.folder = folder
        self.process = subprocess.Popen([sys.executable, __file__], env=environment, **pipes)

    def run(self, job, folder, kill=None, delay=None):
        """(exit codes of the ranks, seconds that it ran on behind the first results).

        kill: the number of a move, "before" or "after"; delay: kill this many seconds behind the first results.
        """
        script, ranks, flags = job
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        flags = {name: value.replace("OUT", str(folder)) if isinstance(value, str) else value for name, value in flags.items()}
        order = {"script": script, "ranks": ranks, "flags": flags, "kill": kill, "port": port}
        folder.mkdir(exist_ok=True)
        order |= {"log": f"{folder}.log", "folder": str(folder)}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        group = int(self.process.stdout.readline())
        while alive(group) and not first_results(folder):
            time.sleep(0.005)
        first = time.time()
        if delay is not None:
            time.sleep(delay)
            if alive(group):
                os.killpg(group, signal.SIGKILL)
        return json.loads(self.process.stdout.readline()), time.time() - first


def alive(group):
    try:
        os.killpg(group, 0)
        return Path(f"/proc/{group}/stat").read_text().split(") ")[1][0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    forks = Forks(tmp_path_factory.mktemp("kill"))
    yield forks
    forks.process.kill()


@pytest.fixture(scope="module")
def jobs(tiny, tmp_path_factory):
    """{name: (script, ranks, flags)}; OUT in a flag stands for the folder of the run."""
    home = tmp_path_factory.mktemp("jobs")
    rows = make_rows(13, seed=3)
    files = {"sft": write_rows(home / "sft.jsonl", rows)}
    files["kd"] = files["sft"]
    pairs = [{"prompt": a["input"], "chosen": a["output"], "rejected": b["output"]} for a, b in zip(rows, rows[1:])]
    files["dpo"] = write_rows(home / "dpo.jsonl", pairs)
    labelled = [{"prompt": r["input"], "completion": r["output"], "label": i % 3 == 0} for i, r in enumerate(rows)]
    files["kto"] = write_rows(home / "kto.jsonl", labelled)
    jobs = {}
    for name in TRAINERS:
        flags = {"pretrain": tiny, "dataset": files[name], "save_path": "OUT/out", "bf16": False, "max_len": 100}
        flags |= {"train_batch_size": 5, "max_epochs": 2, "save_steps": 2, "max_ckpt_num": 1, "learning_rate": 1e-3}
        flags |= {"dpo": {"cache_dir": "OUT/cache"}, "kto": {"cache_dir": "OUT/cache"}}.get(name, {})
        flags |= {"teacher_model": tiny, "teacher_topk": 4, "teacher_cache": "OUT/cache"} if name == "kd" else {}
        for ranks, zero_stage in SHAPES:
            jobs[f"{name}-{ranks}-zero{zero_stage}"] = (name, ranks, flags | {"zero_stage": zero_stage})
    stage = {"output_path": "OUT/out.jsonl", "bf16": False, "micro_batch_size": 2}
    generate = {"eval_task": "generate", "pretrain": tiny, "dataset": files["dpo"], "max_new_tokens": 24, "best_of_n": 2}
    rm = {"eval_task": "rm", "pretrain": make_reward_model(tiny, home / "rm"), "dataset": files["sft"]}
    rm |= {"post_processor": "rs", "scored_path": "OUT/scored.jsonl"}
    for ranks in (1, 2):
        jobs[f"generate-{ranks}"] = ("batch_infer", ranks, stage | generate)
        jobs[f"rm-{ranks}"] = ("batch_infer", ranks, stage | rm)
    return jobs


def make_reward_model(tiny, folder):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return str(folder)


def result(folder):
    """What a run leaves: bytes that must be the same, lines of metrics; nothing half-finished lies beside."""
    left = sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
    assert not [name for name in left if ".partial" in name or name.endswith(".tmp") or ".ckpt" in name], left
    if (folder / "out").exists():
        lines = [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        kept = [{k: v for k, v in line.items() if "per_sec" not in k and k != "peak_mem_gib"} for line in lines]
        return left, (folder / "out/model.safetensors").read_bytes(), kept
    return left, *[path.read_bytes() for path in (folder / "out.jsonl", folder / "scored.jsonl") if path.exists()]


def first_results(folder):
    """Whether a trainer has logged a step, a stage of batch_infer.py written a row."""
    found = [folder / "out.partial/metrics.jsonl", *folder.glob("out.jsonl.partial/*.jsonl")]
    return any(path.exists() and path.stat().st_size for path in found)


def campaign(forks, name, job, kills, kind):
    """That many kills, one to three in a row; after each row the same command until it ends.

    Every other kill falls on a move, the first if kind is even.
    """
    rng, done, n, tries = random.Random(name), 0, 0, itertools.count()
    whole = forks.folder / f"{name}-whole"
    codes, seconds = forks.run(job, whole)
    assert not any(codes), Path(f"{whole}.log").read_text()[-3000:]
    moves = int(Path(f"{whole}.moves").read_text())
    points = [(at, when) for at in range(1, moves + 1) for when in ("before", "after")]
    first = rng.randrange(len(points))
    while done < kills:
        folder, n, story = forks.folder / f"{name}-{n + 1}", n + 1, []
        assert n < 5 * kills + 5
        for _ in range(min(rng.choice([1, 1, 2, 3]), kills - done)):
            if (done + kind) % 2 == 0:
                story.append(points[(first + next(tries) * (2 * len(points) // (kills + 1) + 1)) % len(points)])
                codes, _ = forks.run(job, folder, kill=story[-1])
            else:
                story.append(rng.uniform(0, seconds))
                codes, _ = forks.run(job, folder, delay=story[-1])
                seconds *= 1 if any(codes) else 0.7  # it was at its end before: the first run of all took longer
            assert {*codes} <= {0, -signal.SIGKILL}, (story, Path(f"{folder}.log").read_text()[-3000:])
            done += any(codes)
        codes, _ = forks.run(job, folder)
        assert not any(codes), (story, Path(f"{folder}.log").read_text()[-3000:])
        assert result(folder) == result(whole), story
    return done


QUICK = {"dpo-1-zero0": 0, "kto-1-zero3": 1, "generate-1": 0, "sft-2-zero0": 0}  # 0: at a move, 1: at random
JOBS = [f"{name}-{ranks}-zero{stage}" for ranks, stage in SHAPES for name in TRAINERS]
JOBS += [f"{name}-{ranks}" for ranks in (1, 2) for name in ("generate", "rm")]
SHARES = [(KILLS - KILLS // 10) // len(JOBS) + (i < (KILLS - KILLS // 10) % len(JOBS)) for i in range(len(JOBS))]


@pytest.mark.parametrize("name", QUICK)
def test_a_kill(name, forks, jobs):
    assert campaign(forks, name, jobs[name], 1, QUICK[name]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, share in zip(JOBS, SHARES) if share])
def test_kills(name, forks, jobs):
    i = JOBS.index(name)
    assert campaign(forks, name, jobs[name], SHARES[i], i) == SHARES[i]


# --- the whole loop, in processes of its own: a tenth of the kills

SITE = """
import os, time
def count(name, real):
    def counting(*args, **options):
        ours = str(args[0]).startswith(os.environ["MOVES_OF"])
        if ours:
            with open(os.environ["MOVES"], "a") as f:
                f.write(".")
                now = f.tell() == int(os.environ["MOVES_AT"])
        if ours and now and now % 2:
            open(os.environ["MOVES"] + ".now", "w").close(), time.sleep(60)
        real(*args, **options)
        if ours and now:
            open(os.environ["MOVES"] + ".now", "w").close(), time.sleep(60)
    return counting
for name in ("replace", "rename", "unlink", "remove", "rmdir", "mkdir"):
    setattr(os, name, count(name, getattr(os, name)))
"""


def kill_all(process):
    """SIGKILL to a process, which starts nothing more meanwhile, and all below it in whatever group."""
    root = psutil.Process(process.pid)
    root.suspend()
    for one in [*root.children(recursive=True), root]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


def loop(folder, home, jobs, at=0, delay=None):
    """iterate.sh with its files in folder: (exit code, moves). Killed at that move, or `delay` seconds after its start."""
    _, _, generate = jobs["generate-1"]
    _, _, rm = jobs["rm-1"]
    moves = Path(f"{folder}.moves")
    for path in (moves, Path(f"{moves}.now")):
        path.unlink(missing_ok=True)
    settings = {"METHOD": "raft", "OUT": folder, "POLICY_MODEL_PATH": generate["pretrain"], "KL": 0, "TRAINING_ITERS": 1}
    settings |= {"RM_MODEL_PATH": rm["pretrain"], "PROMPT_DATASET": generate["dataset"], "ROLLOUT_BATCH_SIZE": 8}
    settings |= {"BEST_OF_N": 2, "RM_FLAGS": "--no-bf16", "PYTHONPATH": home, "MOVES": moves, "MOVES_AT": at, "MOVES_OF": folder}
    settings |= {"GENERATE_FLAGS": "--eval_task generate --no-bf16 --max_new_tokens 24 --input_key prompt --micro_batch_size 2"}
    settings |= {"TRAIN_FLAGS": "--no-bf16 --train_batch_size 3 --max_epochs 2 --save_steps 1 --learning_rate 1e-3"}
    environment = os.environ | {name: str(value) for name, value in settings.items()}
    with open(f"{folder}.log", "a") as log:
        process = subprocess.Popen(["bash", "iterate.sh"], cwd=REPO, env=environment, stdout=log, stderr=log)
        end = time.time() + (delay or 600)
        while process.poll() is None and time.time() < end and not Path(f"{moves}.now").exists():
            time.sleep(0.01)
        if process.poll() is None:
            kill_all(process)
    return process.returncode, moves.stat().st_size if moves.exists() else 0


def loop_result(folder):
    """The names of all files, and the bytes of rows and weights."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    steps = [json.loads(line)["step"] for line in (folder / "iter_0/model/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    same = [path for path in found if path.suffix in (".jsonl", ".safetensors") and path.name != "metrics.jsonl"]
    return [str(path.relative_to(folder)) for path in found], [path.read_bytes() for path in same]


@pytest.mark.slow
def test_kills_of_the_loop(jobs, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(SITE)
    whole, out, rng, done = tmp_path / "whole", tmp_path / "out", random.Random(KILLS), 0
    started = time.time()
    code, moves = loop(whole, tmp_path / "site", jobs)
    seconds = time.time() - started
    assert code == 0, Path(f"{whole}.log").read_text()[-3000:]
    while done < KILLS // 10:
        at, delay = (rng.randrange(1, moves // 2), None) if done % 2 else (0, rng.uniform(1, seconds / 2))
        code, _ = loop(out, tmp_path / "site", jobs, at, delay)
        done += 1
        if code == 0:  # it was at its end before the kill came: another loop
            assert loop_result(out) == loop_result(whole)
            out, done = tmp_path / f"out{done}", done - 1
    code, _ = loop(out, tmp_path / "site", jobs)
    assert code == 0, Path(f"{out}.log").read_text()[-3000:]
    assert loop_result(out) == loop_result(whole)


if __name__ == "__main__":
    serve()

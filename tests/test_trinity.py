"""examples/trinity.py: keys to flags, what stops, what is only noted. Nothing is trained here; test_seeds.py does."""

import os
import shlex
import sys
from os.path import relpath
from pathlib import Path

import pytest
import tyro
from launch import load_script
from omegaconf import OmegaConf

REPO = Path(__file__).resolve().parents[1]
trinity = load_script("examples/trinity")
SCRIPTS = {f"{name}.py": load_script(name) for name in ("dpo", "sft")}
DATA = "buffer.trainer_input.experience_buffer"
OPTIMIZER = "algorithm.optimizer"
VERL = "trainer.trainer_config.actor_rollout_ref"
DPO = {
    "project": "p",
    "name": "n",
    "mode": "train",
    "algorithm": {"algorithm_type": "dpo", "kl_loss_fn": "k1", "kl_loss_fn_args": {"kl_coef": 0.2}},
    "checkpoint_root_dir": "root",
    "model.model_path": "owner/model",
    "cluster": {"node_num": 1, "gpu_per_node": 8},
    "buffer": {"total_epochs": 2, "train_batch_size": 64},
    DATA: {"name": "pairs", "storage_type": "file", "path": "owner/pairs", "format": {"prompt_type": "plaintext"}},
    "trainer": {"save_interval": 30, "trainer_config": "..."},
}
SFT = {"algorithm": {"algorithm_type": "sft"}}


def changed(changes):
    """DPO with {"dotted.key": value}, as YAML; None is as good as left out."""
    config = OmegaConf.create()
    for key, value in [*DPO.items(), *changes.items()]:
        OmegaConf.update(config, key, value, merge=False)
    return OmegaConf.to_yaml(config)


@pytest.fixture
def show(tmp_path, capsys, monkeypatch):
    """show(changes or text) -> (Args of the script, words of the command, console) of `run --config X --print`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)

    def run(config, *options):
        text = config if isinstance(config, str) else changed(config)
        Path("x.yaml").write_text(text)
        trinity.main(["run", "--config", "x.yaml", "--print", *options])
        console = capsys.readouterr().out
        words = shlex.split(console[console.rindex(f"\n{sys.executable} ") :])
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        return tyro.cli(SCRIPTS[Path(words[at]).name].Args, args=words[at + 1 :]), words, console

    return run


def test_defaults_are_trinitys(show):
    args, words, console = show({})
    assert words[:2] == [sys.executable, str(REPO / "dpo.py")]
    assert (args.pretrain, args.dataset, relpath(args.save_path)) == ("owner/model", "owner/pairs", "root/p/n/model")
    assert (args.prompt_key, args.chosen_key, args.rejected_key) == ("prompt", "chosen", "rejected")
    assert (args.beta, args.train_batch_size, args.max_epochs, args.save_steps) == (0.2, 64, 2, 30)
    assert (args.learning_rate, args.lr_scheduler, args.lr_warmup_ratio) == (1e-6, "constant", 0.0)
    assert (args.adam_betas, args.l2, args.max_norm) == ((0.9, 0.999), 0.01, 1.0)
    assert args.apply_chat_template and args.gradient_checkpointing and args.packing_samples
    assert (args.max_len, args.micro_train_batch_size) == (2048, 1)  # Trinity's budget: 2 sequences
    assert "algorithm.kl_loss_fn_args.kl_coef" in console and "-> --beta 0.2\n" in console
    assert "(algorithm.optimizer.lr)" in console  # in brackets: not in the file
    assert "not used here: algorithm.kl_loss_fn, " in console


@pytest.mark.parametrize(
    "changes, flags",
    [
        ({"algorithm.policy_loss_fn_args": {"beta": 0.5, "label_smoothing": 0.1}}, {"beta": 0.5, "label_smoothing": 0.1}),
        ({f"{OPTIMIZER}.warmup_style": "cosine"}, {"lr_scheduler": "cosine_with_min_lr", "min_lr_ratio": 0.01}),
        ({OPTIMIZER: {"betas": [0.9, "0.95"], "weight_decay": 0}}, {"adam_betas": (0.9, 0.95), "l2": 0.0}),
        ({"trainer.grad_clip": 2.0, f"{OPTIMIZER}.clip_grad": 3}, {"max_norm": 3.0}),
        ({"trainer.save_interval": 0, "trainer.max_checkpoints_to_keep": 2}, {"save_steps": -1, "max_ckpt_num": 2}),
        ({"model.max_model_len": 1536}, {"max_len": 1536, "micro_train_batch_size": 1}),
        ({"model.max_prompt_tokens": 512, "model.max_response_tokens": 500}, {"max_len": 1012}),
        ({"trainer.ppo_max_token_len_per_gpu": 16384}, {"micro_train_batch_size": 4, "packing_samples": True}),
        (SFT | {"trainer.max_token_len_per_gpu": 22000}, {"micro_train_batch_size": 10}),
        ({"trainer.use_dynamic_bsz": False, f"{VERL}.actor.ppo_micro_batch_size_per_gpu": 2}, {"packing_samples": False}),
        ({f"{DATA}.split": "train_prefs", f"{DATA}.subset_name": "math"}, {"dataset_split": "train_prefs", "dataset": "owner/pairs@math"}),
        (SFT, {"input_key": "prompt", "output_key": "response", "apply_chat_template": True, "multiturn": False}),
        (SFT | {f"{DATA}.format": {"messages_key": "m", "enable_concatenated_multi_turn": True}}, {"input_key": "m", "multiturn": True}),
    ],
)  # fmt: skip
def test_key_becomes_flag(show, changes, flags):
    args, *_ = show(changes)
    assert {name: getattr(args, name) for name in flags} == flags


def test_interpolation_and_variables(show, monkeypatch):
    monkeypatch.setenv("DATASET_PATH", "/data")
    monkeypatch.delenv("TRINITY_MODEL_PATH", raising=False)
    changes = {f"{DATA}.path": "$DATASET_PATH/x", "checkpoint_root_dir": "${project}/${oc.env:DATASET_PATH}"}
    changes["model.model_path"] = "${oc.env:TRINITY_MODEL_PATH,owner/default}"
    args, *_ = show(changes)
    assert (args.dataset, args.pretrain, relpath(args.save_path)) == ("/data/x", "owner/default", "p/data/p/n/model")


@pytest.mark.parametrize(
    "config, message",
    [
        ({f"{OPTIMIZER}.learning_rate": 1}, f"{OPTIMIZER}.learning_rate: is not known: write {OPTIMIZER}."),
        ({"algorithm.algorithm_type": "grpo"}, "algorithm.algorithm_type: is grpo: write dpo or sft"),
        ({"model.model_path": "${oc.env:NOT_SET_HERE}"}, "model.model_path: Environment variable 'NOT_SET_HERE' not found"),
        ({"model.temperature": 0.7}, "model.temperature: is 0.7: write 1"),
        ({f"{VERL}.actor.optim.lr": 1e-4}, "actor.optim.lr: is 0.0001: write it into algorithm.optimizer"),
    ],
)  # fmt: skip
def test_bad_file_stops_in_one_line(show, capsys, config, message):
    with pytest.raises(SystemExit) as stopped:
        show(config)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize("gpus, wanted, options, n", [(8, 8, (), 8), (2, 8, (), 2), (8, None, (), 8), (0, 8, ("--num_processes", "2"), 2)])
def test_processes(show, monkeypatch, gpus, wanted, options, n):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    args, words, console = show({"cluster.gpu_per_node": wanted}, *options)
    assert words[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
    assert args.zero_stage == 3 and ("notice cluster" in console) == (wanted not in (n, None))


def test_both_betas_and_more_flags(show, monkeypatch):
    args, words, console = show({"algorithm.policy_loss_fn_args.beta": 0.5}, "--beta", "0.7", "--no-bf16")
    assert "notice algorithm.kl_loss_fn_args.kl_coef is not used" in console
    assert args.beta == 0.7 and not args.bf16
    started = []
    monkeypatch.setattr(os, "execv", lambda *arguments: started.append(arguments))
    trinity.main(["run", "--config", "x.yaml", "--beta", "0.7", "--no-bf16"])
    assert started == [(sys.executable, words)]


@pytest.mark.parametrize("name", ["dpo_humanlike/dpo", "sft_mot/sft"])
def test_our_files(show, monkeypatch, name):
    monkeypatch.setenv("DATASET_PATH", "/data")
    monkeypatch.delenv("TRINITY_MODEL_PATH", raising=False)
    args, *_ = show((REPO / f"examples/{name}.yaml").read_text())
    assert args.pretrain == "Qwen/Qwen2.5-1.5B-Instruct" and args.train_batch_size == 64
    assert args.learning_rate == (5e-7 if "dpo" in name else 1e-5)
    assert args.micro_train_batch_size == 2

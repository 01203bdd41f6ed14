"""examples/trinity.py: keys to flags, what stops, what is only noted. Nothing is trained here; test_seeds.py does."""

import functools
import importlib.util
import json
import os
import shlex
from pathlib import Path

import pytest
import tyro
import yaml
from launch import load_script

REPO = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("trinity", REPO / "examples/trinity.py")
trinity = importlib.util.module_from_spec(spec)
spec.loader.exec_module(trinity)

DATA = "buffer.trainer_input.experience_buffer"
DPO = {
    "project": "p",
    "name": "n",
    "mode": "train",
    "algorithm": {"algorithm_type": "dpo", "kl_loss_fn": "k1", "kl_loss_fn_args": {"kl_coef": 0.2}},
    "checkpoint_root_dir": "root",
    "model": {"model_path": "owner/model"},
    "cluster": {"node_num": 1, "gpu_per_node": 8},
    "buffer": {
        "total_epochs": 2,
        "train_batch_size": 64,
        "trainer_input": {
            "experience_buffer": {
                "name": "pairs",
                "storage_type": "file",
                "path": "owner/pairs",
                "format": {"prompt_type": "plaintext"},
            }
        },
    },
    "trainer": {"save_interval": 30, "trainer_config": "..."},
}
SFT = {"algorithm.algorithm_type": "sft", "algorithm.kl_loss_fn_args": None, "algorithm.kl_loss_fn": None}


script_of = functools.cache(load_script)


def changed(changes):
    """DPO with {"dotted.key": value}; None removes a key."""
    config = json.loads(json.dumps(DPO))
    for key, value in changes.items():
        *parents, last = key.split(".")
        inner = config
        for name in parents:
            if not isinstance(inner.get(name), dict):
                inner[name] = {}
            inner = inner[name]
        inner[last] = value
        if value is None:
            del inner[last]
    return config


@pytest.fixture
def show(tmp_path, capsys, monkeypatch):
    """show(changes or text) -> (Args of the script, words of the command, console) of `run --config X --print`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)

    def run(config, *options):
        text = config if isinstance(config, str) else yaml.safe_dump(changed(config))
        (tmp_path / "x.yaml").write_text(text)
        trinity.main(["run", "--config", "x.yaml", "--print", *options])
        console = capsys.readouterr().out
        words = shlex.split(console[console.rindex("\npython" if "\npython " in console else "\ndeepspeed") :])
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        script = Path(words[at])
        assert script.parent == REPO
        return tyro.cli(script_of(script.stem).Args, args=words[at + 1 :]), words, console

    return run


def test_defaults_are_trinitys(show):
    args, words, console = show({})
    assert words[0] == "python" and words[1].endswith("dpo.py")
    assert (args.pretrain, args.dataset, args.save_path) == ("owner/model", "owner/pairs", "root/p/n/model")
    assert (args.prompt_key, args.chosen_key, args.rejected_key) == ("prompt", "chosen", "rejected")
    assert (args.beta, args.train_batch_size, args.max_epochs, args.save_steps) == (0.2, 64, 2, 30)
    assert (args.learning_rate, args.lr_scheduler, args.lr_warmup_ratio) == (1e-6, "constant", 0.0)
    assert (args.adam_betas, args.l2, args.max_norm) == ((0.9, 0.999), 0.01, 1.0)
    assert args.apply_chat_template and args.gradient_checkpointing and args.packing_samples
    assert (args.max_len, args.micro_train_batch_size) == (2048, 1)  # Trinity's budget: 2 sequences
    assert "algorithm.kl_loss_fn_args.kl_coef" in console and "-> --beta = 0.2\n" in console
    assert "(algorithm.optimizer.lr)" in console  # in brackets: not in the file
    assert "not used here: algorithm.kl_loss_fn, " in console and "metrics.jsonl" in console


VERL = "trainer.trainer_config.actor_rollout_ref"


@pytest.mark.parametrize(
    "changes, flags",
    [
        ({"algorithm.optimizer.lr": "5e-7"}, {"learning_rate": 5e-7}),  # PyYAML reads a text here
        ({"buffer.train_batch_size": "32"}, {"train_batch_size": 32}),
        ({"algorithm.policy_loss_fn_args": {"beta": 0.5, "label_smoothing": 0.1}}, {"beta": 0.5, "label_smoothing": 0.1}),
        ({"algorithm.kl_loss_fn_args": None}, {"beta": 0.1}),
        ({"algorithm.kl_loss_fn_args": None, "trainer.actor_kl_loss_coef": 0.3}, {"beta": 0.3}),
        ({"algorithm.optimizer.warmup_style": "cosine"}, {"lr_scheduler": "cosine_with_min_lr", "min_lr_ratio": 0.01}),
        (
            {"algorithm.optimizer": {"lr_scheduler_type": "cosine", "min_lr_ratio": 0.1, "lr_warmup_steps_ratio": 0.2}},
            {"min_lr_ratio": 0.1, "lr_warmup_ratio": 0.2},
        ),
        ({"algorithm.optimizer": {"betas": [0.9, "0.95"], "weight_decay": 0}}, {"adam_betas": (0.9, 0.95), "l2": 0.0}),
        ({"trainer.grad_clip": 2.0}, {"max_norm": 2.0}),
        ({"trainer.grad_clip": 2.0, "algorithm.optimizer.clip_grad": 3}, {"max_norm": 3.0}),
        ({f"{VERL}.actor.optim.lr": 1e-4}, {"learning_rate": 1e-4}),
        ({"trainer.total_steps": 200}, {"max_steps": 200, "max_epochs": 2}),
        ({"buffer.total_steps": 50}, {"max_steps": 50, "max_epochs": 50}),
        ({"buffer.total_steps": 50, "trainer.total_steps": 20}, {"max_steps": 20, "max_epochs": 50}),
        ({"trainer.save_interval": 0}, {"save_steps": -1}),
        ({"trainer.max_checkpoints_to_keep": 2}, {"max_ckpt_num": 2}),
        ({"buffer.batch_size": 16, "buffer.train_batch_size": None}, {"train_batch_size": 16}),
        ({"buffer.batch_size": 16}, {"train_batch_size": 64}),
        ({"model.max_model_len": 1536}, {"max_len": 1536, "micro_train_batch_size": 1}),
        ({"model.max_prompt_tokens": 512, "model.max_response_tokens": 500}, {"max_len": 1012}),
        ({"model.max_response_tokens": 500}, {"max_len": 2048}),
        ({"trainer.max_token_len_per_gpu": 16384}, {"micro_train_batch_size": 4, "packing_samples": True}),
        ({"trainer.ppo_max_token_len_per_gpu": 16384}, {"micro_train_batch_size": 4}),
        (SFT | {"trainer.max_token_len_per_gpu": 22000}, {"micro_train_batch_size": 10}),
        (
            {"trainer.use_dynamic_bsz": False, f"{VERL}.actor.ppo_micro_batch_size_per_gpu": 2},
            {"micro_train_batch_size": 2, "packing_samples": False},
        ),
        ({f"{VERL}.model.enable_gradient_checkpointing": False}, {"gradient_checkpointing": False}),
        ({f"{VERL}.ref.log_prob_micro_batch_size_per_gpu": 2}, {}),
        ({"trainer.optimizer_offload": True}, {"adam_offload": True}),
        ({"model.trust_remote_code": True}, {"trust_remote_code": True}),
        ({"model.lora_configs": [{"name": "a", "lora_rank": 16}]}, {"lora_rank": 16, "lora_alpha": 32}),
        ({f"{DATA}.split": "train_prefs"}, {"dataset_split": "train_prefs"}),
        ({f"{DATA}.subset_name": "math"}, {"dataset": "owner/pairs@math"}),
        ({f"{DATA}.data_selector": {"selector_type": "shuffle", "seed": 0}}, {"seed": 0}),
        (
            {f"{DATA}.format": {"prompt_type": "PLAINTEXT", "prompt_key": "q", "chosen_key": "a", "rejected_key": "b"}},
            {"prompt_key": "q", "chosen_key": "a", "rejected_key": "b", "apply_chat_template": True},
        ),
        ({f"{DATA}.format": {"messages_key": "m"}}, {"prompt_key": "m", "apply_chat_template": False}),
        ({f"{DATA}.format": {"prompt_key": "m"}}, {"prompt_key": "m"}),
        ({f"{DATA}.format": None}, {"prompt_key": "message"}),
        (SFT, {"input_key": "prompt", "output_key": "response", "apply_chat_template": True, "multiturn": False}),
        (
            SFT | {f"{DATA}.format": {"messages_key": "m", "enable_concatenated_multi_turn": True}},
            {"input_key": "m", "output_key": None, "multiturn": True},
        ),
        ({"group": "g"}, {"save_path": "root/p/g/n/model"}),
        ({"name": 7}, {"save_path": "root/p/7/model"}),
        ({"project": "<project_name>"}, {"save_path": "root/<project_name>/n/model"}),
        ({"model.custom_chat_template": "{{ 1 }}"}, {"tokenizer_chat_template": "{{ 1 }}"}),
        (
            {
                "synchronizer": {"sync_method": "checkpoint", "sync_interval": 30, "sync_timeout": 1200},
                "trainer.use_dynamic_bsz": False,
                "trainer.ppo_max_token_len_per_gpu": 16384,
                "trainer.ulysses_sequence_parallel_size": 1,
                f"{VERL}.actor.ppo_micro_batch_size_per_gpu": 2,
                f"{VERL}.ref.log_prob_micro_batch_size_per_gpu": 2,
                "trainer.trainer_config.trainer.balance_batch": False,
                f"{DATA}.enable_progress_bar": True,
            },
            {"micro_train_batch_size": 2, "packing_samples": False},
        ),
        ({"stages": [], "data_processor": {}, "explorer": {"runner_num": 4}, "log": {"level": "INFO"}}, {}),
    ],
)  # fmt: skip
def test_key_becomes_flag(show, changes, flags):
    args, *_ = show(changes)
    assert {name: getattr(args, name) for name in flags} == flags


def test_both_betas(show):
    *_, console = show({"algorithm.policy_loss_fn_args.beta": 0.5})
    assert "notice algorithm.kl_loss_fn_args.kl_coef is not used" in console
    *_, console = show({"algorithm.policy_loss_fn_args.beta": 0.2})
    assert "kl_coef is not used" not in console


def test_interpolation_and_variables(show, monkeypatch, tmp_path):
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("DATASET_PATH", str(tmp_path))
    monkeypatch.delenv("TRINITY_MODEL_PATH", raising=False)
    changes = {
        f"{DATA}.path": "$DATASET_PATH/data",
        "model.model_path": "${oc.env:TRINITY_MODEL_PATH,owner/default}",
        "checkpoint_root_dir": "${project}/${oc.env:DATASET_PATH}",
    }
    args, *_ = show(changes)
    assert (args.dataset, args.pretrain) == (f"{tmp_path}/data", "owner/default")
    assert args.save_path == f"p{tmp_path}/p/n/model"
    monkeypatch.setenv("TRINITY_MODEL_PATH", "owner/other")
    assert show(changes)[0].pretrain == "owner/other"


BAD = [
    ({"algorithm.optimizer.learning_rate": 1}, "algorithm.optimizer.learning_rate: is not known: write algorithm.optimizer.lr"),
    ({"trainer.save_intervall": 1}, "trainer.save_intervall: is not known: write trainer.save_interval, or"),
    ({"data": {"path": 1}}, "data.path: is not known"),
    ({"mode": "both"}, "mode: is both: write train"),
    ({"mode": None}, "mode: is both: write train"),
    ({"algorithm.algorithm_type": "grpo"}, "algorithm.algorithm_type: is grpo: write dpo or sft"),
    ({"algorithm.policy_loss_fn": "ppo"}, "algorithm.policy_loss_fn: is ppo: write dpo"),
    ({f"{DATA}.storage_type": "sql"}, f"{DATA}.storage_type: is sql: write file"),
    ({f"{DATA}.storage_type": None}, f"{DATA}.storage_type: is queue: write file"),
    ({f"{DATA}.path": "$NOT_SET_HERE/x"}, f"{DATA}.path: $NOT_SET_HERE/x: export NOT_SET_HERE="),
    ({f"{DATA}.path": "${NOT_SET_HERE}/x"}, f"{DATA}.path: Interpolation key 'NOT_SET_HERE' not found"),
    ({"model.model_path": "${oc.env:NOT_SET_HERE}"}, "model.model_path: Environment variable 'NOT_SET_HERE' not found: export it"),
    ({f"{DATA}.path": "./nowhere"}, f"{DATA}.path: ./nowhere is not there"),
    ({f"{DATA}.path": "/PATH/TO/DATASET"}, f"{DATA}.path: /PATH/TO/DATASET is not there"),
    ({f"{DATA}.path": None}, f"{DATA}.path: is missing"),
    ({"model.model_path": None}, "model.model_path: is missing"),
    ({"model.model_path": "/PATH/TO/MODEL"}, "model.model_path: /PATH/TO/MODEL is not there"),
    ({"buffer.train_batch_size": None}, "buffer.train_batch_size: write the number of rows"),
    ({"buffer.train_batch_size": "many"}, "buffer.train_batch_size: is 'many': write a whole number"),
    ({"buffer.total_epochs": 1.5}, "buffer.total_epochs: is 1.5: write a whole number"),
    ({"algorithm.optimizer.lr": "fast"}, "algorithm.optimizer.lr: is 'fast': write a number"),
    ({"algorithm.optimizer.betas": 0.9}, "algorithm.optimizer.betas: is 0.9: write a list of numbers"),
    ({"trainer.use_dynamic_bsz": "maybe"}, "trainer.use_dynamic_bsz: is 'maybe': write true or false"),
    ({"algorithm.optimizer.lr_warmup_steps": 10}, "lr_warmup_steps: is 10: write lr_warmup_steps_ratio"),
    ({"algorithm.optimizer.optimizer_type": "sgd"}, "optimizer_type: is sgd: write adam"),
    ({"algorithm.optimizer.lr_scheduler_type": "linear"}, "lr_scheduler_type: is linear: write constant or cosine"),
    ({"algorithm.entropy_loss_fn_args": {"entropy_coef": 0.1}}, "entropy_coef: is 0.1: write 0"),
    ({"model.max_model_len": 9, "model.max_prompt_tokens": 8, "model.max_response_tokens": 4}, "write 12"),
    ({"model.temperature": 0.7}, "model.temperature: is 0.7: write 1"),
    ({"model.rope_scaling": {"type": "yarn"}}, "model.rope_scaling.type: is yarn: write it into config.json"),
    ({"model.chat_template_path": "no/such.jinja"}, "model.chat_template_path: no/such.jinja is no file"),
    ({f"{DATA}.format.system_prompt": "x", "model.model_path": "."}, "model.model_path: no tokenizer there"),
    ({"model.tinker": {"enable": True}}, "model.tinker.enable: is True: write false"),
    ({"model.lora_configs": [{}, {}]}, "model.lora_configs: write a list with one adapter"),
    ({"stages": [{"stage_name": "sft"}]}, "write a file per stage"),
    ({"data_processor": {"task_pipeline": {"num_process": 4}}}, "run Data-Juicer first"),
    ({f"{DATA}.format": {"prompt_type": "chatpair"}}, f"{DATA}.format.prompt_type: is chatpair: write plaintext or messages"),
    ({f"{DATA}.format": {"system_prompt": "Be kind."}}, f"{DATA}.format.system_prompt: messages have system turns"),
    ({f"{DATA}.format.image_key": "image"}, "only text is trained"),
    ({f"{DATA}.data_selector.selector_type": "offline_easy2hard"}, "selector_type: is offline_easy2hard: write shuffle"),
    ({"trainer.trainer_strategy": "megatron"}, "trainer_strategy: is megatron: write fsdp2"),
    ({"trainer.save_hf_checkpoint": "always"}, "save_hf_checkpoint: is always: write last"),
]  # fmt: skip


@pytest.mark.parametrize("changes, message", BAD, ids=[message[:50] for _, message in BAD])
def test_bad_file_stops_in_one_line(show, capsys, monkeypatch, changes, message):
    monkeypatch.delenv("NOT_SET_HERE", raising=False)
    with pytest.raises(SystemExit) as stopped:
        show(changes)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize("text, message", [("", "mode: is both"), ("- 1", "holds no settings"), ("a: [", "is no YAML")])
def test_no_settings(show, capsys, text, message):
    with pytest.raises(SystemExit) as stopped:
        show(text)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        trinity.main(["run", "--config", "absent.yaml"])
    assert stopped.value.code == 2 and "absent.yaml: cannot be read" in capsys.readouterr().err


def test_system_prompt_and_thinking(show, tiny, tokenizer):
    text = 'Say "yes",\nin {{braces}} \U0001f642.'
    changes = {"model.model_path": tiny, f"{DATA}.format.system_prompt": text}
    args = show(changes)[0]
    template = args.tokenizer_chat_template
    user, system = {"role": "user", "content": "u"}, {"role": "system", "content": "other"}

    def rendered(*messages, template=template):
        return tokenizer.apply_chat_template(list(messages), tokenize=False, chat_template=template)

    plain = tokenizer.chat_template
    assert rendered(user) == rendered({"role": "system", "content": text}, user, template=plain)
    assert rendered(system, user) == rendered(system, user, template=plain)
    dpo = script_of("dpo")
    found, spans, *_ = dpo.render(dpo.load_tokenizer(tiny, args)[0], "u", "a", args)  # as it is trained
    answer = {"role": "assistant", "content": "a"}
    assert found == rendered({"role": "system", "content": text}, user, answer, template=plain)
    assert found[: spans[0][0]].endswith("<|assistant|>") and text in found[: spans[0][0]]
    own = "{{ messages[0]['content'] }}{{ enable_thinking }}"
    changes |= {"model.custom_chat_template": own, "model.enable_thinking": False}
    assert rendered(user, template=show(changes)[0].tokenizer_chat_template) == text + "False"


@pytest.mark.parametrize(
    "gpus, wanted, options, words",
    [
        (8, 8, (), ["deepspeed", "--num_gpus", "8"]),
        (2, 8, (), ["deepspeed", "--num_gpus", "2"]),
        (8, None, (), ["deepspeed", "--num_gpus", "8"]),
        (1, 1, (), ["deepspeed", "--num_gpus", "1"]),
        (0, 8, (), ["python"]),
        (0, 8, ("--num_processes", "2"), ["deepspeed", "--num_gpus", "2"]),
    ],
)
def test_processes(show, monkeypatch, gpus, wanted, options, words):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    args, found, console = show({"cluster.gpu_per_node": wanted}, *options)
    assert found[: len(words)] == words and found[len(words)].endswith("dpo.py")
    assert args.zero_stage == (3 if words[-1] not in ("1", "python") else 2)
    assert ("notice cluster" in console) == (words[-1] != str(wanted))


def test_run_replaces_this_process(show, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(os, "execvpe", lambda *arguments: started.append(arguments))
    monitor = {"monitor_type": "wandb", "monitor_args": {"base_url": "http://here", "api_key": "secret"}}
    args, words, console = show({"monitor": monitor})
    assert not started and args.use_wandb
    trinity.main(["run", "--config", "x.yaml"])
    ((name, command, environment),) = started
    assert name == command[0] == "python" and command == words
    wandb = {k: v for k, v in environment.items() if k.startswith("WANDB_")}
    expected = {"PROJECT": "p", "RUN_GROUP": "n", "NAME": "n_trainer", "BASE_URL": "http://here", "API_KEY": "secret"}
    assert wandb == {f"WANDB_{k}": v for k, v in expected.items()}
    assert "secret" not in console + capsys.readouterr().out


def test_continue_from_checkpoint(show, tmp_path):
    (tmp_path / "root/p/n").mkdir(parents=True)
    assert show({})[0].save_path == "root/p/n/model"
    assert show({"continue_from_checkpoint": False})[0].save_path.startswith("root/p/n_20")
    assert show({"continue_from_checkpoint": False, "name": "new"})[0].save_path == "root/p/new/model"


@pytest.mark.parametrize("name", ["dpo_humanlike/dpo", "sft_mot/sft"])
def test_our_files(show, monkeypatch, tmp_path, name):
    monkeypatch.setenv("DATASET_PATH", str(tmp_path))
    for folder in ("human_like_dpo_dataset", "Mixture-of-Thoughts"):
        (tmp_path / folder).mkdir()
    for variable in ("TRINITY_MODEL_PATH", "TRINITY_CHECKPOINT_ROOT_DIR"):
        monkeypatch.delenv(variable, raising=False)
    args, *_ = show((REPO / f"examples/{name}.yaml").read_text())
    assert args.pretrain == "Qwen/Qwen2.5-1.5B-Instruct" and args.train_batch_size == 64
    assert args.learning_rate == (5e-7 if "dpo" in name else 1e-5)
    assert args.micro_train_batch_size == 2


def test_keys_are_listed_once():
    assert len(trinity.KNOWN) == len(set(trinity.KNOWN))
    assert set(trinity.RENAMED.values()) <= set(trinity.KNOWN)

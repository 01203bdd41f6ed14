"""Runs a Trinity-RFT file of offline DPO or SFT with dpo.py or sft.py: same YAML, no Ray, one machine.

    python examples/trinity.py run --config examples/dpo_humanlike/dpo.yaml    # was: trinity run --config ...
    python examples/trinity.py run --config examples/sft_mot/sft.yaml --print   # says what it would run
    python examples/trinity.py run --config dpo.yaml --lora_rank 16    # more flags of dpo.py, which win

It prints which key becomes which flag and starts the script on cluster.gpu_per_node GPUs, or as many as there
are. The model is written to checkpoint_root_dir/project/[group/]name/model; the same command again continues.

 - ${oc.env:NAME,default} is resolved, $NAME in paths too; 5e-7 is a number; `...` and null count as left out.
 - Where a key is left out, Trinity's default counts (learning rate 1e-6, constant), not the script's.
 - kl_loss_fn_args.kl_coef is DPO's beta, as in Trinity's guide; there is no KL term beside it.
 - A step is one update with train_batch_size rows or pairs; Trinity's DPO makes two with half of them.
 - Rows come in random order (data_selector.seed); Trinity's default is the order of the file.
What would change the result and has no flag stops, with the key and what to write.
"""

import argparse
import difflib
import fnmatch
import os
import re
import shlex
import sys
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

DATA = "buffer.trainer_input.experience_buffer"
FORMAT = f"{DATA}.format"
OPTIMIZER = "algorithm.optimizer"
VERL = "trainer.trainer_config"
BETA = "algorithm.policy_loss_fn_args.beta"
KL_COEF = "algorithm.kl_loss_fn_args.kl_coef"
DYNAMIC = "trainer.use_dynamic_bsz"
TOKENS = "trainer.max_token_len_per_gpu"
MICRO = f"{VERL}.actor.ppo_micro_batch_size_per_gpu"

FLAGS = {  # key: flag, Trinity's default where it is not the script's
    "model.model_path": ("pretrain", None),
    "model.custom_chat_template": ("tokenizer_chat_template", None),
    f"{DATA}.split": ("dataset_split", None),
    f"{DATA}.data_selector.seed": ("seed", None),
    f"{FORMAT}.enable_concatenated_multi_turn": ("multiturn", None),
    "buffer.train_batch_size": ("train_batch_size", None),
    "buffer.total_epochs": ("max_epochs", None),
    "trainer.total_steps": ("max_steps", None),
    f"{OPTIMIZER}.lr": ("learning_rate", 1e-6),
    f"{OPTIMIZER}.lr_warmup_steps_ratio": ("lr_warmup_ratio", 0.0),
    f"{OPTIMIZER}.min_lr_ratio": ("min_lr_ratio", 0.01),
    f"{OPTIMIZER}.betas": ("adam_betas", [0.9, 0.999]),
    f"{OPTIMIZER}.weight_decay": ("l2", 0.01),
    f"{OPTIMIZER}.clip_grad": ("max_norm", None),
    "algorithm.policy_loss_fn_args.label_smoothing": ("label_smoothing", None),
    f"{VERL}.model.enable_gradient_checkpointing": ("gradient_checkpointing", True),
    "trainer.optimizer_offload": ("adam_offload", None),
    "trainer.save_interval": ("save_steps", None),
    "trainer.max_checkpoints_to_keep": ("max_ckpt_num", None),
}
PAIR = [("chosen_key", "chosen_key", "chosen"), ("rejected_key", "rejected_key", "rejected")]
COLUMNS = {  # algorithm, prompt_type: flag, key in format, Trinity's default
    ("dpo", "plaintext"): [("prompt_key", "prompt_key", "prompt"), *PAIR],
    ("dpo", "messages"): [("prompt_key", "messages_key", "message"), *PAIR],
    ("sft", "plaintext"): [("input_key", "prompt_key", "prompt"), ("output_key", "response_key", "response")],
    ("sft", "messages"): [("input_key", "messages_key", "message")],  # with the response in it
}
STOP = {  # key: the values that may be there, what to do about others
    "continue_from_checkpoint": ([True], "leave it out: a run under another name starts anew"),
    f"{OPTIMIZER}.optimizer_type": (["adam", "adamw"], "write adam (AdamW)"),
    f"{OPTIMIZER}.lr_warmup_steps": ([-1, 0], "write lr_warmup_steps_ratio, a share of all steps"),
    f"{VERL}.actor.optim.*": ([], "write it into algorithm.optimizer"),
    "algorithm.loss_agg_mode": (["token-mean"], "write token-mean, over the tokens of a step"),
    "algorithm.entropy_loss_fn_args.entropy_coef": ([0], "write 0: there is no entropy term"),
    "model.trust_remote_code": ([False], "write false: code that comes with a model is not run"),
    "model.chat_template_path": ([], "write its text into custom_chat_template"),
    "model.temperature": ([1], "write 1: log-probs are not scaled"),
    "model.lora_configs": ([], "leave it out, and add --lora_rank and --lora_alpha to the command"),
    "buffer.total_steps": ([], "write trainer.total_steps, and as many buffer.total_epochs as it takes"),
    f"{DATA}.data_selector.selector_type": (["shuffle", "sequential", "random"], "write shuffle"),
    f"{FORMAT}.system_prompt*": ([], "write messages with a system turn"),
    f"{FORMAT}.enable_thinking": ([], "write it into a chat template"),
    "trainer.save_hf_checkpoint": (["last", "never"], "write last: checkpoints are to resume from"),
    "monitor.monitor_type": (["tensorboard"], "leave it out, and add --use_wandb to the command"),
}
RENAMED = {  # where older files have a setting
    "trainer.ppo_max_token_len_per_gpu": TOKENS,
    "trainer.grad_clip": f"{OPTIMIZER}.clip_grad",
    f"{OPTIMIZER}.warmup_style": f"{OPTIMIZER}.lr_scheduler_type",
}
READ = f"""mode project group name checkpoint_root_dir cluster.node_num cluster.gpu_per_node
    algorithm.algorithm_type {BETA} {KL_COEF} {OPTIMIZER}.lr_scheduler_type
    model.max_model_len model.max_prompt_tokens model.max_response_tokens {DATA}.storage_type {DATA}.path
    {DATA}.subset_name {FORMAT}.prompt_type {FORMAT}.prompt_key {FORMAT}.response_key {FORMAT}.messages_key
    {FORMAT}.chosen_key {FORMAT}.rejected_key {DYNAMIC} {TOKENS} {MICRO}""".split()
NOT_USED = f"""ray_namespace ignore_validator_suggestions log.* synchronizer.* explorer.* service.* monitor.*
    cluster.* algorithm.kl_loss_fn* algorithm.policy_loss_fn algorithm.repeat_times algorithm.sample_strategy*
    algorithm.advantage_fn* algorithm.kl_penalty_fn* algorithm.entropy_loss_fn model.critic_model_path
    buffer.batch_size buffer.explorer_input.* {DATA}.name {DATA}.enable_progress_bar {DATA}.data_selector.*
    trainer.name trainer.trainer_type trainer.trainer_strategy trainer.save_strategy trainer.balance_batch
    trainer.use_remove_padding trainer.*_offload trainer.ulysses_sequence_parallel_size {VERL}*""".split()
KNOWN = [*FLAGS, *STOP, *READ]


def die(key, why):
    """Ends the program with one line on stderr and exit code 2."""
    print(f"error: {key}: {why}", file=sys.stderr)
    raise SystemExit(2)


# --- the file


def flatten(value, prefix=""):
    """("dotted.key", value) of a nested dict, without what is empty, None or `...`."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    elif value not in (None, "", [], "..."):
        yield prefix.replace(f"{VERL}.actor_rollout_ref.", f"{VERL}."), value


def find(key, patterns):
    """The first pattern that a key fits, or None."""
    return next((pattern for pattern in patterns if fnmatch.fnmatchcase(key, pattern)), None)


def read_config(path):
    """{"dotted.key": value} of a file: resolved, old names as today's, all keys known, no value refused."""
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, UnicodeDecodeError) as e:
        die(path, f"cannot be read: {e}")
    except YAMLError as e:
        die(path, f"is no YAML: {' '.join(str(e).split())}")
    except OmegaConfBaseException as e:
        why = str(e).splitlines()[0].rpartition("interpolation: ")[2].strip('"')
        die(e.full_key or path, f"{why}: export it, or write the value")
    if not isinstance(loaded, dict):
        die(path, "holds no settings")
    config = {}
    for key, value in flatten(loaded):
        new = RENAMED.get(key, key)
        if new == key or new not in config:  # where a file has both, the newer name wins
            config[new] = value
    for key, value in config.items():
        if not find(key, KNOWN + NOT_USED):
            near = difflib.get_close_matches(key, KNOWN, 1, 0)[0]
            die(key, f"is not known: write {near}, or remove it")
        stop = find(key, STOP)
        if stop and value not in STOP[stop][0]:
            die(key, f"is {value}: {STOP[stop][1]}")
    return config


def choose(config, key, allowed, default):
    """The value of a key, one of allowed in any case of letters; default: Trinity's."""
    value = str(config.get(key, default)).lower()
    if value not in allowed:
        die(key, f"is {value}: write {' or '.join(allowed)}")
    return value


def count(config, key, default=None):
    """The whole number at a key."""
    value = config.get(key, default)
    if value is not None and not str(value).isdigit():
        die(key, f"is {value}: write a whole number")
    return value if value is None else int(value)


def find_path(config, key, default=None):
    """The path at a key, with ~ and $NAME expanded."""
    if not config.get(key, default):
        die(key, "is missing: write a folder, a file or a hub name")
    path = os.path.expanduser(os.path.expandvars(str(config.get(key, default))))
    if unset := re.search(r"\$\{?(\w+)", path):
        die(key, f"{path}: export {unset[1]}=..., it is not set")
    return path


# --- from keys to flags


def translate(config):
    """(name of the script, rows). A row is (key, flag, value), in the order of the command."""
    choose(config, "mode", ["train"], "both")
    method = choose(config, "algorithm.algorithm_type", ["dpo", "sft"], "ppo")
    choose(config, f"{DATA}.storage_type", ["file"], "queue")
    if not count(config, "buffer.train_batch_size"):
        die("buffer.train_batch_size", "write the number of rows (dpo: pairs) per step")
    config["model.model_path"] = find_path(config, "model.model_path")
    dataset = find_path(config, f"{DATA}.path")
    if f"{DATA}.subset_name" in config:
        dataset += f"@{config[f'{DATA}.subset_name']}"
    rows = [(f"{DATA}.path", "dataset", dataset)]
    prompt_type = choose(config, f"{FORMAT}.prompt_type", ["plaintext", "messages"], "messages")
    if prompt_type == "plaintext":
        rows.append((f"{FORMAT}.prompt_type", "apply_chat_template", True))
    for flag, name, default in COLUMNS[method, prompt_type]:
        rows.append((f"{FORMAT}.{name}", flag, config.get(f"{FORMAT}.{name}", default)))
    if method == "dpo":
        rows.append(beta(config))
    for key, (flag, default) in FLAGS.items():
        value = config.get(key, default)
        unset = value == 0 and flag in ("save_steps", "max_ckpt_num")  # 0: the script's default
        if value is not None and value is not False and not unset:
            rows.append((key, flag, value))
    schedule = choose(config, f"{OPTIMIZER}.lr_scheduler_type", ["constant", "cosine"], "constant")
    schedule = schedule.replace("cosine", "cosine_with_min_lr")
    rows.append((f"{OPTIMIZER}.lr_scheduler_type", "lr_scheduler", schedule))
    rows += sizes(config, method)
    names = [config.get("project", "Trinity-RFT"), config.get("group", ""), config.get("name", "rft")]
    job = Path(find_path(config, "checkpoint_root_dir", "."), *map(str, names))
    rows.append(("checkpoint_root_dir", "save_path", str(job / "model")))
    return f"{method}.py", rows


def beta(config):
    """The row of DPO's beta: policy_loss_fn_args.beta, else kl_coef, which is what the guide's file sets."""
    key = KL_COEF if KL_COEF in config and BETA not in config else BETA
    value = config.get(key, 0.1)
    if config.get(KL_COEF, value) != value:
        print(f"notice {KL_COEF} is not used: {key} = {value} is the only beta")
    return key, "beta", value


def sizes(config, method):
    """Rows for lengths and micro-batches. A row of dpo has two sequences, each as long as max_len at most."""
    length = count(config, "model.max_model_len")
    parts = [count(config, f"model.max_{name}_tokens") for name in ("prompt", "response")]
    if length is None:
        length = 2048 if None in parts else sum(parts)
    rows = [("model.max_model_len", "max_len", length)]
    if config.get(DYNAMIC, True):
        sequences = 2 if method == "dpo" else 1
        examples = count(config, TOKENS, 2 * length) // (sequences * length)
        rows.append((DYNAMIC, "packing_samples", True))
        rows.append((TOKENS, "micro_train_batch_size", max(1, examples)))
    else:
        rows.append((MICRO, "micro_train_batch_size", count(config, MICRO, 1)))
    return rows


# --- running


def words(flag, value):
    """A flag on the command line."""
    values = value if isinstance(value, list) else [value]
    return [f"--{flag}"] if value is True else [f"--{flag}", *map(str, values)]


def processes(config, asked):
    """How many to start: one per GPU, one on a machine without any."""
    import torch  # takes seconds, and a wrong file is told before

    gpus = torch.cuda.device_count()
    wanted = count(config, "cluster.gpu_per_node", gpus)
    n = asked or min(wanted, gpus) or 1
    if n != wanted or count(config, "cluster.node_num", 1) > 1:
        print(f"notice cluster: {n} process(es); {gpus} GPUs are here. The result does not depend on it")
    return n


def main(argv=None):
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    parser.add_argument("command", choices=["run"])
    parser.add_argument("--config", required=True, help="the YAML file")
    parser.add_argument("--print", action="store_true", help="print the command, run nothing")
    parser.add_argument("--num_processes", type=int, default=0, help="in place of cluster.gpu_per_node")
    args, more_flags = parser.parse_known_args(argv)
    config = read_config(args.config)
    script, rows = translate(config)
    n = processes(config, args.num_processes)
    command = [sys.executable]
    if n > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
        rows.append(("trainer.trainer_strategy", "zero_stage", 3))  # shards weights, as FSDP does
    command.append(str(Path(__file__).resolve().parents[1] / script))
    print("notice rows come in random order; Trinity's default is the order of the file")
    if unused := [key for key in config if not find(key, KNOWN)]:
        print(f"notice not used here: {', '.join(unused)}")
    width = max(len(key) for key, _, _ in rows) + 2
    for key, flag, value in rows:
        shown = key if key in config else f"({key})"  # in brackets: a default
        print(f"{shown:<{width}} -> {shlex.join(words(flag, value))}")
        command += words(flag, value)
    command += more_flags
    print(shlex.join(command), flush=True)
    if not args.print:
        os.execv(command[0], command)


if __name__ == "__main__":
    main()

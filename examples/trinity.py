"""Runs a Trinity-RFT file of offline DPO or SFT with dpo.py or sft.py: same YAML, no Ray, one machine.

    python examples/trinity.py run --config examples/dpo_humanlike/dpo.yaml    # was: trinity run --config ...
    python examples/trinity.py run --config examples/sft_mot/sft.yaml --print   # says what it would run

It prints which key becomes which flag and starts `deepspeed dpo.py` (or sft.py) with cluster.gpu_per_node
processes, but no more than there are GPUs. The model is written to
checkpoint_root_dir/project/[group/]name/model, checkpoints beside it; the same command again continues.

 - ${oc.env:NAME,default} is resolved, $NAME in paths too; 5e-7 is a number; `...` and null count as left out.
 - Where a key is left out, Trinity's default counts (learning rate 1e-6, constant), not the script's.
 - kl_loss_fn_args.kl_coef is DPO's beta, as in Trinity's guide; there is no KL term beside it.
 - A step is one update with train_batch_size rows or pairs; Trinity's DPO makes two with half of them.
 - Rows come in random order (data_selector.seed); Trinity's default is the order of the file.
 - system_prompt and enable_thinking become part of the chat template, also of the saved model's.
What would change the result and has no flag stops, with the key and what to write.
"""

import argparse
import difflib
import fnmatch
import json
import os
import re
import shlex
import sys
import time
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

DATA = "buffer.trainer_input.experience_buffer."
FORMAT, OPTIMIZER, VERL = f"{DATA}format.", "algorithm.optimizer.", "trainer.trainer_config."
BETA, KL_COEF = "algorithm.policy_loss_fn_args.beta", "algorithm.kl_loss_fn_args.kl_coef"
TOKENS = "trainer.max_token_len_per_gpu"

FLAGS = {  # key: flag, type, Trinity's default where it is not the script's
    "buffer.train_batch_size": ("train_batch_size", int, None),
    "buffer.total_epochs": ("max_epochs", int, None),
    "trainer.total_steps": ("max_steps", int, None),
    f"{OPTIMIZER}lr": ("learning_rate", float, 1e-6),
    f"{OPTIMIZER}lr_warmup_steps_ratio": ("lr_warmup_ratio", float, 0.0),
    f"{OPTIMIZER}min_lr_ratio": ("min_lr_ratio", float, 0.01),
    f"{OPTIMIZER}betas": ("adam_betas", list, [0.9, 0.999]),
    f"{OPTIMIZER}weight_decay": ("l2", float, 0.01),
    f"{OPTIMIZER}clip_grad": ("max_norm", float, None),
    "algorithm.policy_loss_fn_args.label_smoothing": ("label_smoothing", float, None),
    f"{DATA}split": ("dataset_split", str, None),
    f"{DATA}data_selector.seed": ("seed", int, None),
    "model.trust_remote_code": ("trust_remote_code", bool, None),
    f"{VERL}model.enable_gradient_checkpointing": ("gradient_checkpointing", bool, True),
    "trainer.optimizer_offload": ("adam_offload", bool, None),
    "trainer.save_interval": ("save_steps", int, None),
    "trainer.max_checkpoints_to_keep": ("max_ckpt_num", int, None),
}
ONLY = {  # key: the values that may be there, what to do about others. False, 0 and empty are always fine
    f"{OPTIMIZER}optimizer_type": (["adam", "adamw"], "write adam (AdamW)"),
    f"{OPTIMIZER}lr_warmup_steps": ([-1], "write lr_warmup_steps_ratio, a share of all steps"),
    "algorithm.loss_agg_mode": (["token-mean"], "write token-mean, over the tokens of a step"),
    "algorithm.entropy_loss_fn_args.entropy_coef": ([], "write 0: there is no entropy term"),
    "model.temperature": ([1], "write 1: log-probs are not scaled"),
    "model.rope_*": ([], "write it into config.json of the model"),
    "model.*.enable": ([], "write false: training is local"),
    "stages": ([], "write a file per stage, and run one after the other"),
    "data_processor.task_pipeline*": ([], "run Data-Juicer first; its output is experience_buffer.path"),
    "buffer.trainer_input.auxiliary_buffers*": ([], "leave it out: experience_buffer is trained on"),
    "trainer.trainer_type": (["verl"], "write verl"),
    "trainer.trainer_strategy": (["fsdp2", "fsdp"], "write fsdp2: weights are sharded, by ZeRO-3"),
    "trainer.trainer_config_path": ([], "write its settings into this file"),
    "trainer.save_hf_checkpoint": (["last", "never"], "write last: checkpoints are to resume from"),
    f"{DATA}data_selector.selector_type": (["shuffle", "sequential", "random"], "write shuffle"),
    f"{FORMAT}system_prompt_key": ([], "write messages with a system turn"),
    f"{FORMAT}tools_key": ([], "leave it out: tools are not rendered"),
    f"{FORMAT}image_key": ([], "leave it out: only text is trained"),
    f"{FORMAT}video_key": ([], "leave it out: only text is trained"),
}
RENAMED = {  # where older versions had a setting
    "buffer.batch_size": "buffer.train_batch_size",
    "trainer.ppo_max_token_len_per_gpu": TOKENS,
    f"{VERL}actor.ppo_max_token_len_per_gpu": TOKENS,
    f"{VERL}actor.use_dynamic_bsz": "trainer.use_dynamic_bsz",
    f"{VERL}actor.kl_loss_coef": KL_COEF,
    "trainer.actor_kl_loss_coef": KL_COEF,
    "trainer.grad_clip": f"{OPTIMIZER}clip_grad",
}
RENAMED |= {f"{OPTIMIZER}warmup_style": f"{OPTIMIZER}lr_scheduler_type"} | {
    f"{VERL}actor.optim.{name}": f"{OPTIMIZER}{name}"
    for name in "lr lr_warmup_steps lr_warmup_steps_ratio min_lr_ratio betas weight_decay".split()
}
READ = f"""mode project group name checkpoint_root_dir continue_from_checkpoint cluster.node_num
    cluster.gpu_per_node buffer.total_steps algorithm.algorithm_type algorithm.policy_loss_fn {BETA} {KL_COEF}
    {OPTIMIZER}lr_scheduler_type model.model_path model.max_model_len model.max_prompt_tokens
    model.max_response_tokens model.custom_chat_template model.chat_template_path model.enable_thinking
    model.lora_configs {DATA}storage_type {DATA}path {DATA}subset_name {FORMAT}prompt_type
    {FORMAT}prompt_key {FORMAT}response_key {FORMAT}messages_key {FORMAT}chosen_key {FORMAT}rejected_key
    {FORMAT}system_prompt {FORMAT}chat_template {FORMAT}enable_thinking
    {FORMAT}enable_concatenated_multi_turn trainer.use_dynamic_bsz {TOKENS}
    {VERL}actor.ppo_micro_batch_size_per_gpu monitor.monitor_type monitor.monitor_args.base_url
    monitor.monitor_args.api_key""".split()
KNOWN = [*FLAGS, *ONLY, *READ]
NOT_USED = f"""ray_namespace ignore_validator_suggestions log.* synchronizer.* explorer.* service.*
    data_processor.* algorithm.repeat_times algorithm.sample_strategy* algorithm.advantage_fn*
    algorithm.kl_* algorithm.entropy_* algorithm.enable_router_replay algorithm.bypass_old_logprobs
    algorithm.rollout_correction* algorithm.policy_loss_fn_args.loss_agg_mode {OPTIMIZER}fused
    {OPTIMIZER}foreach model.critic_model_path model.min_response_tokens model.enable_prompt_truncation
    model.repetition_penalty model.top_p model.top_k model.logprobs model.tinker.* model.external_model.*
    cluster.ray_address buffer.batch_size buffer.explorer_input.* buffer.max_retry_* {DATA}name
    {DATA}enable_progress_bar {DATA}capacity {DATA}max_* {DATA}replay_buffer.* {DATA}data_selector.*
    {FORMAT}workflow_key {FORMAT}reward_fn_key {FORMAT}reply_prefix trainer.name trainer.save_strategy
    trainer.enable_preview trainer.use_remove_padding trainer.balance_batch
    trainer.ulysses_sequence_parallel_size trainer.fix_actor_microbatch_loss_scale trainer.param_offload
    trainer.grad_offload trainer.offload_policy trainer.megatron.* trainer.critic_warmup
    trainer.actor_use_kl_loss {VERL}* monitor.*""".split()


def die(key, why):
    """Ends the program with one line on stderr and exit code 2."""
    print(f"error: {key}: {why}", file=sys.stderr)
    raise SystemExit(2)


# --- the file


def flatten(value, prefix=""):
    """("dotted.key", value) of a nested dict, without None, empty dicts and `...`."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    elif value is not None and value != "...":
        yield prefix.replace(f"{VERL}actor_rollout_ref.", VERL), value


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
        why = str(e).splitlines()[0].rpartition("interpolation: ")[2].replace('"', "")
        die(e.full_key or path, f"{why}: export it, or write the value")
    if not isinstance(loaded, dict):
        die(path, "holds no settings")
    flat = dict(flatten(loaded))
    renamed = {RENAMED[key]: value for key, value in flat.items() if key in RENAMED}
    config = renamed | {key: value for key, value in flat.items() if key not in RENAMED}  # newer names win
    for key, value in config.items():
        if not find(key, KNOWN + NOT_USED):
            near = {flag: known for known, (flag, *_) in FLAGS.items()}.get(key.rpartition(".")[2])
            near = near or difflib.get_close_matches(key, KNOWN, 1, 0)[0]
            die(key, f"is not known: write {near}, or remove it")
        allowed, why = ONLY.get(find(key, ONLY), ([value], ""))
        if value and value not in allowed:
            die(key, f"is {value}: {why}")
    return config


class Settings:
    """The keys of a file, and what became of them: rows (key, flag, value) in the order of the command."""

    def __init__(self, config):
        self.config, self.rows = config, []

    def get(self, key, kind=str, default=None):
        """The value of a key as this kind; 5e-7, "5e-7" and 64.0 are numbers."""
        value = self.config.get(key, default)
        if value is None or type(value) is kind and kind is not list:
            return value
        try:
            if kind is str and type(value) in (int, float):
                return str(value)
            if kind is list:
                return [float(number) for number in value]
            if kind in (int, float) and type(value) is not bool and kind(float(value)) == float(value):
                return kind(float(value))
        except (TypeError, ValueError, OverflowError):
            pass
        words = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
        die(key, f"is {value!r}: write {words.get(kind, 'a list of numbers')}")

    def choice(self, key, allowed, default):
        """The value of a key, one of allowed in any case of letters; default: Trinity's."""
        value = self.get(key, str, default).lower()
        return value if value in allowed else die(key, f"is {value}: write {' or '.join(allowed)}")

    def path(self, key, default=None):
        """The path at a key, with ~ and $NAME expanded."""
        text = self.get(key, str, default) or die(key, "is missing: write a folder, a file or a hub name")
        path = os.path.expanduser(os.path.expandvars(text))
        unset = re.search(r"\$\{?(\w+)", path)
        return die(key, f"{text}: export {unset[1]}=..., it is not set") if unset else path

    def source(self, key):
        """A path that is there, or OWNER/NAME of the hub."""
        path = self.path(key)
        hub = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).parent.is_dir()
        return path if hub or Path(path).exists() else die(key, f"{path} is not there: write what is")

    def add(self, key, flag, value):
        """A flag; without one if the value is None or False."""
        if value is not None and value is not False:
            self.rows.append((key if key in self.config else f"({key})", flag, value))


# --- from keys to flags


def translate(s):
    """Adds all flags to s. Returns the script's name."""
    s.choice("mode", ["train"], "both")
    method = s.choice("algorithm.algorithm_type", ["dpo", "sft"], "ppo")
    s.choice("algorithm.policy_loss_fn", [method], method)
    s.choice(f"{DATA}storage_type", ["file"], "queue")
    if s.get("buffer.train_batch_size", int, 0) < 1:
        die("buffer.train_batch_size", "write the number of rows (dpo: pairs) per step")
    s.add("model.model_path", "pretrain", s.source("model.model_path"))
    subset = s.get(f"{DATA}subset_name")
    s.add(f"{DATA}path", "dataset", s.source(f"{DATA}path") + (f"@{subset}" if subset else ""))
    add_columns(s, method)
    if method == "dpo":
        add_beta(s)
    if steps := s.get("buffer.total_steps", int):  # in place of epochs: rows are repeated until then
        s.config["buffer.total_epochs"] = steps
        s.config["trainer.total_steps"] = min(steps, s.get("trainer.total_steps", int, steps))
    schedule = s.choice(f"{OPTIMIZER}lr_scheduler_type", ["constant", "cosine"], "constant")
    s.add(f"{OPTIMIZER}lr_scheduler_type", "lr_scheduler", schedule.replace("cosine", "cosine_with_min_lr"))
    for key, (flag, kind, default) in FLAGS.items():
        value = s.get(key, kind, default)
        unset = value == 0 and flag in ("save_steps", "max_ckpt_num")  # 0: the script decides
        if not unset and (flag != "min_lr_ratio" or schedule == "cosine"):
            s.add(key, flag, value)
    add_sizes(s, 2 if method == "dpo" else 1)
    names = [s.get("project", str, "Trinity-RFT"), s.get("group"), s.get("name", str, "rft")]
    job = Path(s.path("checkpoint_root_dir", "."), *filter(None, names))
    if job.exists() and not s.get("continue_from_checkpoint", bool, True):
        job = job.with_name(f"{job.name}_{time.strftime('%Y%m%d%H%M%S')}")
    s.add("checkpoint_root_dir", "save_path", str(job / "model"))
    if template := chat_template(s):
        s.add("model.custom_chat_template", "tokenizer_chat_template", template)
    return f"{method}.py"


def add_columns(s, method):
    """The columns of the data. Their names without a key are Trinity's."""
    plain = s.choice(f"{FORMAT}prompt_type", ["plaintext", "messages"], "messages") == "plaintext"
    first = ("prompt_key", "prompt") if plain else ("messages_key", "message")
    if method == "dpo":
        if f"{FORMAT}messages_key" not in s.config and f"{FORMAT}prompt_key" in s.config:
            first = ("prompt_key", "prompt")  # also held messages in version 0.2
        columns = {"prompt_key": first, "chosen_key": ("chosen_key", "chosen")}
        columns["rejected_key"] = ("rejected_key", "rejected")
    else:
        columns = {"input_key": first} | ({"output_key": ("response_key", "response")} if plain else {})
    for flag, (name, default) in columns.items():
        s.add(f"{FORMAT}{name}", flag, s.get(f"{FORMAT}{name}", str, default))
    s.add(f"{FORMAT}prompt_type", "apply_chat_template", plain)
    if method == "sft":
        key = f"{FORMAT}enable_concatenated_multi_turn"
        s.add(key, "multiturn", s.get(key, bool))
    if s.get(f"{FORMAT}system_prompt") and not plain:
        die(f"{FORMAT}system_prompt", "messages have system turns of their own: leave it out")


def add_beta(s):
    """DPO's beta: policy_loss_fn_args.beta, else kl_coef, which is what the guide's file sets."""
    key = BETA if BETA in s.config or KL_COEF not in s.config else KL_COEF
    beta = s.get(key, float, 0.1)
    if s.get(KL_COEF, float, beta) != beta:
        print(f"notice {KL_COEF} is not used: {key} = {beta} is the only beta")
    s.add(key, "beta", beta)


def add_sizes(s, sequences):
    """Lengths, micro-batches (of examples with so many sequences) and adapters."""
    keys = [f"model.max_{name}" for name in ("model_len", "prompt_tokens", "response_tokens")]
    total, *parts = (s.get(key, int) for key in keys)
    both = sum(parts) if None not in parts else 0
    if total and both > total:
        die(keys[0], f"is {total}, less than max_prompt_tokens + max_response_tokens: write {both}")
    total = total or both or 2048
    s.add(keys[0], "max_len", total)
    if s.get("trainer.use_dynamic_bsz", bool, True):
        s.add("trainer.use_dynamic_bsz", "packing_samples", True)
        s.add(TOKENS, "micro_train_batch_size", max(1, s.get(TOKENS, int, 2 * total) // (sequences * total)))
    else:
        key = f"{VERL}actor.ppo_micro_batch_size_per_gpu"
        s.add(key, "micro_train_batch_size", s.get(key, int, 1))
    adapters = s.config.get("model.lora_configs") or []
    if not isinstance(adapters, list) or len(adapters) > 1 or not all(isinstance(a, dict) for a in adapters):
        die("model.lora_configs", "write a list with one adapter")
    for adapter in adapters:
        if adapter.get("path") or adapter.get("target_modules", "all-linear") != "all-linear":
            die("model.lora_configs", "leave out path and target_modules: it is new, on all linear layers")
        for name in ("lora_rank", "lora_alpha"):
            s.add("model.lora_configs", name, adapter.get(name, 32))


def chat_template(s):
    """The file's chat template, or the model's with the file's system prompt in it, or None."""
    own = s.get(f"{FORMAT}chat_template") or s.get("model.custom_chat_template")
    key = "model.chat_template_path"
    if not own and key in s.config:
        file = Path(s.path(key))
        own = file.read_text() if file.is_file() else die(key, f"{file} is no file: write one")
    system, head = s.get(f"{FORMAT}system_prompt"), ""
    thinking = s.get(f"{FORMAT}enable_thinking", bool, s.get("model.enable_thinking", bool))
    if thinking is not None:
        head += f"{{%- set enable_thinking = {str(thinking).lower()} -%}}"
    if system:
        turn = f"[{{'role': 'system', 'content': {json.dumps(system, ensure_ascii=False)}}}]"
        head += f"{{%- set messages = messages if messages[0]['role'] == 'system' else {turn} + messages -%}}"
    if head and not own:
        from transformers import AutoTokenizer  # takes seconds: only where it is needed

        try:
            own = AutoTokenizer.from_pretrained(s.source("model.model_path")).chat_template
        except (OSError, ValueError) as e:
            die("model.model_path", f"no tokenizer there: {str(e).splitlines()[0]}")
        if not isinstance(own, str):
            die("model.custom_chat_template", "write one: the model has none for the system prompt")
    return head + own if own else None


# --- running


def launcher(s, num_processes):
    """The words in front of the script: deepspeed with a process per GPU, python on a machine without one."""
    import torch

    gpus, wanted = torch.cuda.device_count(), s.get("cluster.gpu_per_node", int, 0)
    n = num_processes or min(wanted or gpus, gpus)
    if n != wanted or s.get("cluster.node_num", int, 1) > 1:
        print(f"notice cluster: {n or 1} process(es); {gpus} GPUs are here. The result does not depend on it")
    if n > 1:
        s.add("trainer.trainer_strategy", "zero_stage", 3)
    visible = ",".join(os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[:n])  # --num_gpus ignores it
    which = ["--include", f"localhost:{visible}"] if visible else ["--num_gpus", str(n)]
    return ["deepspeed", *which] if n else ["python"]


def monitor(s):
    """The environment of wandb, where it is the monitor."""
    kind, name = s.get("monitor.monitor_type", str, "tensorboard"), s.get("name", str, "rft")
    if kind != "wandb":
        print(f"notice monitor.monitor_type {kind}: metrics are in metrics.jsonl, beside the model")
        return {}
    s.add("monitor.monitor_type", "use_wandb", "environment")
    found = {"WANDB_PROJECT": s.get("project", str, "Trinity-RFT"), "WANDB_RUN_GROUP": s.get("group") or name}
    found |= {"WANDB_NAME": f"{name}_trainer", "WANDB_BASE_URL": s.get("monitor.monitor_args.base_url")}
    found["WANDB_API_KEY"] = s.get("monitor.monitor_args.api_key")
    return {variable: value for variable, value in found.items() if value}


def words(flag, value):
    """A flag on the command line."""
    values = value if isinstance(value, list) else [] if value is True else [value]
    return [f"--{flag}", *map(str, values)]


def main(argv=None):
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("command", choices=["run"])
    parser.add_argument("--config", required=True, help="the YAML file")
    parser.add_argument("--print", action="store_true", help="print the command, run nothing")
    parser.add_argument("--num_processes", type=int, default=0, help="in place of cluster.gpu_per_node")
    args = parser.parse_args(argv)
    s = Settings(read_config(args.config))
    script = translate(s)
    environment, start = monitor(s), launcher(s, args.num_processes)
    print("notice rows come in random order; Trinity's default is the order of the file")
    if unused := [key for key in s.config if not find(key, KNOWN)]:
        print(f"notice not used here: {', '.join(unused)}")
    width = max(len(key) for key, _, _ in s.rows)
    for key, flag, value in s.rows:
        flag, *values = words(flag, value)
        print(f"{key:<{width}} -> {flag} = {' '.join(values).partition(chr(10))[0] or 'true'}")
    command = [*start, str(Path(__file__).resolve().parents[1] / script)]
    command += [word for _, flag, value in s.rows for word in words(flag, value)]
    print(shlex.join(command), flush=True)
    if not args.print:
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        os.execvpe(command[0], command, os.environ | environment)


if __name__ == "__main__":
    main()

"""What all tests share: tiny models and rows, made on the spot, and runs. No network, no GPU, no downloads."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

sys.path.insert(0, str(Path(__file__).parent))
# the launchers (torchrun, deepspeed) of the interpreter that runs the tests
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs the network is a mistake
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.sched_getaffinity = lambda pid: {0}  # what runs in this process has one thread: more only cost here
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes of pytest
    os.environ["OMP_NUM_THREADS"] = "1"

SPECIAL = ["<pad>", "<eos>", "<bos>", "<|user|>", "<|assistant|>", "<|system|>"]
# every turn ends in EOS and a newline, as in ChatML: what is behind EOS must not be trained
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

SETTINGS = {"bf16": False, "train_batch_size": 24, "learning_rate": 1e-3, "lr_scheduler": "constant"}
SETTINGS |= {"lr_warmup_ratio": 0.0, "max_len": 100}  # of most trainings


def make_rows(n, seed=0):
    """n rows {"input", "output"} of readable text, of very different lengths."""
    rng = random.Random(seed)
    words = "the red river ran past old stone walls and seven small boats before rain came down again".split()

    def sentence(low, high):
        return " ".join(rng.choices(words, k=rng.randint(low, high)))

    return [{"input": f"Say {sentence(1, 20)}.\n", "output": f"{sentence(1, 40)}."} for _ in range(n)]


def make_pairs(n, seed=0):
    """n rows {"prompt", "chosen", "rejected"}; the two responses begin alike in every third row."""
    one, two = make_rows(n, seed), make_rows(n, seed + 100)
    pairs = [{"prompt": a["input"], "chosen": a["output"], "rejected": b["output"]} for a, b in zip(one, two)]
    for pair in pairs[::3]:
        pair["rejected"] = pair["chosen"][: len(pair["chosen"]) // 2] + pair["rejected"]
    return pairs


def make_labelled(n, seed=0):
    """n rows {"prompt", "completion", "label"}, every third of them bad."""
    rows = enumerate(make_rows(n, seed))
    return [{"prompt": row["input"], "completion": row["output"], "label": i % 3 != 0} for i, row in rows]


def write_rows(path, rows):
    """A .jsonl file; its path as a string."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_tokenizer(vocab_size=500, chat_template=CHAT_TEMPLATE):
    """A byte-level BPE tokenizer, trained on the rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    options = {"special_tokens": SPECIAL, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    texts = [row["input"] + row["output"] for row in make_rows(300, seed=1)]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, **options))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = chat_template
    return tokenizer


def make_model(folder, tokenizer, **changes):
    """A random Qwen2 of two layers (0.2M parameters, tied embeddings; ZeRO-3 shards them and the MLPs) and its tokenizer, saved in folder."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    options = {"num_key_value_heads": 2, "max_position_embeddings": 8192, "tie_word_embeddings": True}
    options |= {"bos_token_id": None, "initializer_range": 0.1}
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=512, **{**sizes, **ids, **options, **changes})
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def metrics_of(save_path):
    """{name: [its value at each logged step that has it]}."""
    steps = [json.loads(line) for line in Path(save_path, "metrics.jsonl").read_text().splitlines()]
    names = {name for step in steps for name in step}
    return {name: [step[name] for step in steps if name in step] for name in names}


def weights_of(save_path):
    """The bytes of a saved model's weights."""
    return Path(save_path, "model.safetensors").read_bytes()


def train(script, **flags):
    """main() of a script in this process, as one rank; the metrics of its steps."""
    script.main(script.Args(**SETTINGS | flags))
    return metrics_of(flags["save_path"])


def console_of(command, folder=None, **settings):
    """What a command prints, run in a folder with these environment variables; it must end well."""
    environment = os.environ | {name: str(value) for name, value in settings.items()}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [str(word) for word in command]
    done = subprocess.run(command, cwd=folder, env=environment, timeout=1800, **pipes)
    assert done.returncode == 0, f"{command}:\n{done.stdout[-4000:]}"
    return done.stdout


def launch(name, configs, folder, ranks=2):
    """main() of a script for each of several flags, in one process group."""
    (folder / "configs.json").write_text(json.dumps([SETTINGS | config for config in configs]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    console_of([*command, Path(__file__).with_name("launch.py"), name, folder / "configs.json"])


@pytest.fixture(autouse=True)
def clean_environment():
    """What a trainer's setup() writes into the environment ends with the test."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory):
    SETTINGS["cache_dir"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tokenizer):
    """Folder of the tiny model."""
    return make_model(tmp_path_factory.mktemp("tiny") / "tiny", tokenizer)


@pytest.fixture(scope="session")
def other(tmp_path_factory, tokenizer):
    """Folder of a model that differs from tiny: a reference that is not the start policy."""
    return make_model(tmp_path_factory.mktemp("other") / "other", tokenizer, initializer_range=0.12)


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory):
    """A .jsonl file of 49 rows: with a batch of 24 the last step has one example, too few for two ranks."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", make_rows(49))

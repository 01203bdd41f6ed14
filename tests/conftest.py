"""Fixtures of all tests: a tiny model and rows, made on the spot. No network, no GPU, no downloads."""

import json
import os
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
# the launchers (torchrun, deepspeed) of the interpreter that runs the tests
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs the network is a mistake
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes of pytest: a thread each
    os.environ["OMP_NUM_THREADS"] = "1"
    os.sched_getaffinity = lambda pid: {0}

SPECIAL = ["<pad>", "<eos>", "<bos>", "<|user|>", "<|assistant|>", "<|system|>"]
# every turn ends in EOS and a newline, as in ChatML: what is behind EOS must not be trained
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_rows(n, seed=0):
    """n rows {"input", "output"} of readable text, of very different lengths."""
    rng = random.Random(seed)
    words = "the red river ran past old stone walls and seven small boats before rain came down again".split()

    def sentence(low, high):
        return " ".join(rng.choices(words, k=rng.randint(low, high)))

    return [{"input": f"Say {sentence(1, 20)}.\n", "output": f"{sentence(1, 40)}."} for _ in range(n)]


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
    """A random Qwen2 of two layers (0.1M parameters, tied embeddings) and its tokenizer, saved in folder."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    options = {"num_key_value_heads": 2, "max_position_embeddings": 8192, "tie_word_embeddings": True}
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=512, **{**sizes, **ids, **options, "initializer_range": 0.1, **changes})
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tokenizer):
    """Folder of the tiny model."""
    return make_model(tmp_path_factory.mktemp("tiny") / "tiny", tokenizer)


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory):
    """A .jsonl file of 49 rows: with a batch of 24 the last step has one example, too few for two ranks."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", make_rows(49))

"""The step of every trainer on a CUDA device without data: torch's FakeTensorMode, on a CPU build of torch.

Shapes, dtypes, devices and autograd are real there, numbers are not. So this finds CPU tensors that meet CUDA
ones, reads that make the host wait for the GPU, and calls that FlashAttention would refuse; it finds no wrong
number. Run as a script, this file runs all cases in one process and prints {case: what is wrong}.
"""

import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":
    ctypes.CDLL(sys.argv[1])  # the fake device: torch looks for devices when it is imported
import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from launch import load_script
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REPO = Path(__file__).resolve().parents[1]
GPU = "cuda:0"
SIZES = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WINDOW = {"head_dim": 8, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 8}
FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": {"head_dim": 8, "sliding_window": 7},
    "Gemma2": {**WINDOW, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "Gemma3Text": WINDOW,
    "Gemma4Text": {**WINDOW, "global_head_dim": 264, "vocab_size_per_layer_input": 90},  # FlashAttention: 256
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Phi3": {},
    "Olmo2": {},
    "Granite": {"logits_scaling": 3.0, "attention_multiplier": 0.3},
    "GPTNeoX": {},
    "GPT2": {},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "DeepseekV3": {**EXPERTS, **LATENT, "num_key_value_heads": 4, "moe_intermediate_size": 16, "first_k_dense_replace": 1},
}
LORA = {"lora_rank": 2, "lora_dropout": 0.1}
CASES = {f"sft {family}": ("sft", family, {}) for family in FAMILIES}
CASES |= {
    "sft packing": ("sft", "Qwen2", {"packing_samples": True}),
    "sft checkpointing": ("sft", "Qwen2", {"gradient_checkpointing": True}),
    "sft LoRA": ("sft", "Qwen2", {**LORA, "gradient_checkpointing": True}),
}
READS = {"sft": 1}  # how often the host reads the GPU in a step: for the metrics
# {case: (family, code, what it might become by mistake, what must be said then)}
MISTAKES = {
    "sft int64 bounds": ("Qwen2", "*lengths], dtype=np.int32)", "*lengths])", "int32 bounds"),
    "sft item in the step": ("Qwen2", "+= loss.detach()", "+= loss.item()", "host reads"),
    "sft value of another head size": ("DeepseekV3", "v = F.pad(v, (0, size - v.shape[2]))", "pass", "one head size"),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{case: what is wrong}, from one process for all cases."""
    compiler = shutil.which("c++")
    if not compiler:
        pytest.skip("needs a C++ compiler (c++)")
    if torch.version.cuda:
        pytest.skip("needs a CPU build of torch")
    library = tmp_path_factory.mktemp("fake_cuda") / "fake_cuda.so"
    root = Path(importlib.util.find_spec("torch").origin).parent
    command = [compiler, "-std=c++20", "-shared", "-fPIC", REPO / "tests/fake_cuda/fake_cuda.cpp", "-o", library]
    command += [f"-I{root}/include", f"-L{root}/lib", f"-Wl,-rpath,{root}/lib", "-lc10", "-ltorch_cpu"]
    subprocess.run(command, check=True)
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, library]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_step(found, case):
    assert not found[case]


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_found(found, case):
    assert MISTAKES[case][-1] in found[case]


# --- what runs in the other process


class Watch(TorchDispatchMode):
    """Notes where the host reads the GPU or waits for a copy, and where a CPU tensor meets a CUDA one."""

    def __init__(self):
        super().__init__()
        self.reads, self.meetings = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors}
        if func is torch.ops.aten._local_scalar_dense.default:  # .item(), float(), if
            self.note(self.reads, "cuda" in devices)
            return 0.0 if tensors[0].is_floating_point() else 0
        out = func(*args, **kwargs or {})
        if func is torch.ops.aten._to_copy.default:  # .to(), .cpu()
            blocks = not out.is_cuda or not kwargs.get("non_blocking")
            self.note(self.reads, blocks and devices != {out.device.type})
        else:
            self.note(self.meetings, len(devices) > 1)
        return out

    def note(self, where, happened):
        """Adds the innermost line outside torch that is running."""
        if happened:
            frames = [f for f in traceback.extract_stack()[:-2] if "/torch/" not in f.filename]
            where.append(f"{Path(frames[-1].filename).name}: {frames[-1].line}")


def to_gpu(name, x):
    """A parameter or buffer on the fake device, in the dtype that DeepSpeed gives it."""
    keeps_dtype = name.endswith("inv_freq") or not x.is_floating_point()
    with fake:
        copy = x.detach().to(GPU, x.dtype if keeps_dtype else torch.bfloat16)
    return nn.Parameter(copy, x.requires_grad) if isinstance(x, nn.Parameter) else copy


class Engine:
    """What a step uses of DeepSpeed's engine, with the model moved to the fake device."""

    device = GPU

    def __init__(self, module):
        self.module, self.train, self.eval = module, module.train, module.eval
        moved = {}
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, x in tensors.items():
                    if x is not None and id(x) not in moved:  # tied weights stay tied
                        moved[id(x)] = to_gpu(name, x)
                    tensors[name] = moved.get(id(x))

    def __call__(self, pack):
        return self.module(pack)

    def backward(self, loss):
        loss.backward()

    def set_gradient_accumulation_boundary(self, is_boundary):
        pass


def checked_varlen(q, k, v, cu_q, cu_k, max_q, max_k, **options):
    """varlen_attn, with the conditions of FlashAttention-2."""
    size = q.shape[2]
    met = {
        "one head size": k.shape[2] == v.shape[2] == size,
        "a head size up to 256, a multiple of 8": size <= 256 and size % 8 == 0,
        "bf16": q.dtype == k.dtype == v.dtype == torch.bfloat16,
        "int32 bounds": cu_q.dtype == cu_k.dtype == torch.int32,
        "bounds on the GPU": cu_q.is_cuda and cu_k.is_cuda,
        "lengths that are plain numbers": type(max_q) is type(max_k) is int,
        "last stride 1": q.stride(2) == k.stride(2) == v.stride(2) == 1,
    }
    assert all(met.values()), f"varlen_attn needs {[condition for condition in met if not met[condition]]}"
    return real_varlen(q, k, v, cu_q, cu_k, max_q, max_k, **options)


def all_reduce(tensor, *args, **kwargs):
    assert tensor.is_cuda, "NCCL was given a CPU tensor"


def random_weights(path, output_loading_info, trust_remote_code, **options):
    """Stands for from_pretrained: a model of config.json alone."""
    config = transformers.AutoConfig.from_pretrained(path)
    return transformers.AutoModelForCausalLM.from_config(config, **options), {"missing_keys": []}


def sequence(n):
    """An example of sft.py and kd.py."""
    trained = np.arange(n) > n // 2
    return {"input_ids": np.arange(n) % 80, "trained": trained, "length": n, "n_trained": int(trained.sum())}


def run(script, name, family, flags, folder):
    """What is wrong with the step of a script: "" if nothing is."""
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES[family]})
    config.save_pretrained(f"{folder}/{family}")
    args = script.Args(pretrain=f"{folder}/{family}", dataset="", micro_train_batch_size=2, **flags)
    try:
        engine = script.start_engine(args, total_steps=3)
        with fake, Watch() as watch:
            script.sft_step(engine, [sequence(n) for n in (9, 23, 40)], args)
        assert len(watch.reads) == READS[name], f"host reads: {watch.reads}"
        assert not watch.meetings, f"CPU tensors meet CUDA ones: {watch.meetings}"
        lost = [name for name, p in engine.module.named_parameters() if p.requires_grad and p.grad is None]
        assert not lost, f"no gradient: {lost}"
    except (Exception, SystemExit):
        return traceback.format_exc(limit=-4)
    return ""


if __name__ == "__main__":
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    real_varlen, varlen.varlen_attn = varlen.varlen_attn, checked_varlen
    transformers.AutoModelForCausalLM.from_pretrained = random_weights
    dist.all_reduce, dist.get_rank, dist.get_world_size = all_reduce, lambda: 0, lambda: 1
    FakeTensor.tolist = lambda self: np.zeros(self.cpu().shape).tolist()  # one read; torch makes one per number
    torch.Tensor.pin_memory = lambda self: self
    # Small enough for several chunks of the LM head.
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(total_memory=2**20, major=9, minor=0)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        scripts = {name: load_script(name) for name in READS}
        for case, (name, family, flags) in CASES.items():
            scripts[name].deepspeed.initialize = lambda model, **_: [Engine(model)]
            results[case] = run(scripts[name], name, family, flags, folder)
        for case, (family, code, mistake, _) in MISTAKES.items():
            name = case.split()[0]
            source = (REPO / f"{name}.py").read_text()
            assert source.count(code) == 1, code
            path = Path(folder, case.replace(" ", "_"))
            path.with_suffix(".py").write_text(source.replace(code, mistake))
            results[case] = run(load_script(str(path)), name, family, {}, folder)
    print(json.dumps(results))

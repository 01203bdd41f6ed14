"""The step of every trainer on a CUDA device without data: torch's FakeTensorMode, on a CPU build of torch.

Shapes, dtypes, devices and autograd are real there, numbers are not. So this finds CPU tensors that meet CUDA
ones, reads that make the host wait for the GPU, and calls that FlashAttention would refuse; it finds no wrong
number. Run as a script, this file runs all cases in one process and prints {case: what is wrong}.
"""

import ctypes
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
    ctypes.CDLL(sys.argv[1])  # the fake device: torch looks for devices once, when it is imported
import datasets
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

GPU = "cuda:0"
SIZES = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WINDOW = {"head_dim": 8, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16}
LATENT |= {"v_head_dim": 8, "num_key_value_heads": 4}  # other than the queries' 24
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
EXPERTS |= {"moe_intermediate_size": 16, "first_k_dense_replace": 1}
FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": {"head_dim": 8, "sliding_window": 7},
    "Gemma2": {**WINDOW, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "Gemma3Text": WINDOW,
    "Gemma4Text": {**WINDOW, "global_head_dim": 264, "vocab_size_per_layer_input": 90},  # beyond 256
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Phi3": {},
    "Olmo2": {},
    "Granite": {"logits_scaling": 3.0, "attention_multiplier": 0.3},
    "GPTNeoX": {},
    "GPT2": {},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "DeepseekV3": {**LATENT, **EXPERTS},
}
LORA = {"lora_rank": 2, "lora_dropout": 0.1, "gradient_checkpointing": True}
STEPS = {f"dpo {family}": ("dpo", family, {}) for family in FAMILIES}  # {case: (script, family, flags)}
STEPS |= {
    "sft": ("sft", "Qwen2", {}),
    "sft packing": ("sft", "Qwen2", {"packing_samples": True}),
    "sft LoRA, checkpointing": ("sft", "Qwen2", LORA),
    "dpo checkpointing": ("dpo", "Qwen2", {"gradient_checkpointing": True}),
    "dpo simpo": ("dpo", "Qwen2", {"loss_type": "simpo"}),
}
FROZEN = {"dpo reference": ("dpo", "pack_trees")}  # {case: (script, what packs)}
# {case: (family, code, what it might become by mistake, what must be said then)}
MISTAKES = {
    "sft int64 bounds": ("Qwen2", "*lengths], dtype=np.int32)", "*lengths])", "int32 bounds"),
    "sft item in the step": ("Qwen2", "+= loss.detach()", "+= loss.item()", "more than the metrics"),
    "dpo value of another size": ("DeepseekV3", "F.pad(v, (0, size - v.shape[2]))", "v", "one head size"),
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
    source = Path(__file__).parent / "fake_cuda" / "fake_cuda.cpp"
    root = Path(torch.__file__).parent
    command = [compiler, "-std=c++20", "-shared", "-fPIC", source, "-o", library, f"-I{root}/include"]
    command += [f"-L{root}/lib", f"-Wl,-rpath,{root}/lib", "-lc10", "-ltorch_cpu"]
    subprocess.run(command, check=True)
    command = [sys.executable, "-W", "ignore", __file__, library]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", [*STEPS, *FROZEN])
def test_on_a_gpu(found, case):
    assert not found[case], found[case]


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_found(found, case):
    assert MISTAKES[case][-1] in found[case]


# --- what runs in the other process


class Watch(TorchDispatchMode):
    """Notes where the host reads the GPU or waits for a copy, and where a CPU tensor meets a CUDA one."""

    def __init__(self):
        super().__init__()
        self.waits, self.meetings = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors}
        if func is torch.ops.aten._local_scalar_dense.default:  # .item(), float(), if
            self.note(self.waits, "cuda" in devices)
            return 0.0 if tensors[0].is_floating_point() else 0
        out = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default:  # .to(), .cpu()
            waits = not out.is_cuda or not kwargs.get("non_blocking")
            self.note(self.waits, waits and devices != {out.device.type})
        else:
            self.note(self.meetings, len(devices) > 1)
        return out

    def note(self, where, happened):
        """Adds the innermost line outside torch that is running."""
        if happened:
            frames = [f for f in traceback.extract_stack()[:-2] if "/torch/" not in f.filename]
            where.append(f"{Path(frames[-1].filename).name}: {frames[-1].line}")


class Engine:
    """What a step uses of DeepSpeed's engine."""

    device = GPU

    def __init__(self, module):
        self.module, self.train, self.eval = module.to(GPU), module.train, module.eval

    def __call__(self, pack):
        return self.module(pack)

    def backward(self, loss):
        loss.backward()

    def set_gradient_accumulation_boundary(self, is_boundary):
        pass


def module_to(module, *args, **kwargs):
    """nn.Module.to, for the GPU by replacing all tensors, in the dtypes of a DeepSpeed engine in bf16."""
    if args != (GPU,):
        return real_to(module, *args, **kwargs)
    moved = {id(None): None}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, x in tensors.items():
                if id(x) not in moved:  # tied weights stay tied
                    dtype = (
                        x.dtype if name.endswith("inv_freq") or not x.is_floating_point() else torch.bfloat16
                    )
                    with fake:
                        copy = x.detach().to(GPU, dtype)
                    is_parameter = isinstance(x, nn.Parameter)
                    moved[id(x)] = nn.Parameter(copy, x.requires_grad) if is_parameter else copy
                tensors[name] = moved[id(x)]
    return module


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


def make_table(script):
    """Three examples as the script keeps them; for dpo.py a prompt and two responses."""
    rows = []
    for n in (9, 23, 40):
        row = dict.fromkeys(script.FEATURES) | {"ends": [n // 3, n // 2, n], "desirable": n > 9}
        row |= {"input_ids": range(n), "trained": [i >= n // 3 for i in range(n)]}
        row |= {"length": n, "n_trained": n - n // 3}
        rows.append({name: row[name] for name in script.FEATURES})
    return datasets.Dataset.from_list(rows, features=script.FEATURES)


def step(script, name, args, table, watch):
    """A step of the trainer; returns how often the host may wait for the GPU: for the metrics."""
    engine = script.start_engine(args, total_steps=3)
    examples = script.fetch(table, range(3))
    for example in examples:
        example["ref_logps"] = np.zeros(example["n_trained"], np.float32)
    with fake, watch:
        getattr(script, f"{name}_step")(engine, examples, args)
    lost = [name for name, p in engine.module.named_parameters() if p.requires_grad and p.grad is None]
    assert not lost, f"no gradient: {lost}"
    return 1


def reference(script, name, args, table, watch):
    """The pass of a frozen model; returns how often the host may wait: for its check, for a block of values."""
    with fake, watch:
        script.reference_logps([table], args, GPU)
    return 2


def check(script, name, family, flags, what, folder):
    """What is wrong with what(script, ..), a step or a pass of a frozen model: "" if nothing is."""
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES[family]})
    config.save_pretrained(f"{folder}/{family}")
    paths = {"pretrain": f"{folder}/{family}", "dataset": "", "cache_dir": folder}
    args = script.Args(**paths, micro_train_batch_size=2, **flags)
    watch = Watch()
    try:
        allowed = what(script, name, args, make_table(script), watch)
        assert len(watch.waits) == allowed, f"the host waits for more than the metrics: {watch.waits}"
        assert not watch.meetings, f"CPU tensors meet CUDA ones: {watch.meetings}"
    except (Exception, SystemExit):
        return traceback.format_exc(limit=-4)
    return ""


def main():
    """Runs all cases on the fake device."""
    transformers.AutoModelForCausalLM.from_pretrained = random_weights
    varlen.varlen_attn = checked_varlen
    nn.Module.to = module_to
    dist.broadcast_object_list = dist.barrier = lambda *args: None
    dist.all_reduce, dist.get_rank, dist.get_world_size = all_reduce, lambda: 0, lambda: 1
    FakeTensor.tolist = lambda self: np.zeros(
        self.cpu().shape
    ).tolist()  # one read; torch makes one per number
    FakeTensor.numpy = lambda self: np.zeros(self.shape)
    torch.Tensor.pin_memory = lambda self: self
    # Small enough for several chunks of the LM head.
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(total_memory=2**20, major=9, minor=0)
    found = {}
    repo = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as folder:
        cases = {case: (load_script(name), name, *rest, step) for case, (name, *rest) in STEPS.items()}
        cases |= {
            case: (load_script(name), name, "Qwen2", {}, reference) for case, (name, _) in FROZEN.items()
        }
        for case, (family, code, mistake, _) in MISTAKES.items():
            name = case.split()[0]
            source = (repo / f"{name}.py").read_text()
            assert source.count(code) == 1, code
            path = Path(folder, case.replace(" ", "_"))
            path.with_suffix(".py").write_text(source.replace(code, mistake))
            cases[case] = (load_script(str(path)), name, family, {}, step)
        for case, (script, *inputs) in cases.items():
            script.deepspeed.initialize = lambda model, **_: [Engine(model)]
            found[case] = check(script, *inputs, folder)
    print(json.dumps(found))


if __name__ == "__main__":
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    real_to, real_varlen = nn.Module.to, varlen.varlen_attn
    main()

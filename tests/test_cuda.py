"""The step of every trainer on a CUDA device without data: torch's FakeTensorMode, on a CPU build of torch.

Shapes, dtypes, devices and autograd are real there, numbers are not: this finds CPU tensors that meet CUDA ones,
lines where the host waits for the GPU, and calls that FlashAttention would refuse, but no wrong number.
As a script this file runs all cases in one process and prints {case: what is wrong}.
"""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":
    ctypes.CDLL(sys.argv[1])  # the fake device: torch looks for devices once, when it is imported
import numpy as np
import pytest
import torch
import torch.distributed as dist
from launch import load_script, register_attention
from test_dpo import FAMILIES, save_family
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

GPU, ROOT = "cuda:0", Path(torch.__file__).parent
# A head size that FlashAttention refuses, and values of another size than the queries.
SHAPES = {"Gemma4Text": {"global_head_dim": 264}, "DeepseekV3": {"qk_rope_head_dim": 8}}
LORA = {"lora_rank": 2, "lora_dropout": 0.1, "gradient_checkpointing": True}
# {case: (script, family, flags)}; "frozen" is the pass of a reference or a teacher, all others are steps
CASES = {f"dpo {family}": ("dpo", family, {"packing_samples": True}) for family in FAMILIES}
CASES |= {f"{name} frozen": (name, "Qwen2", LORA) for name in ("dpo", "kto")}
CASES |= {f"{name} step": (name, "Qwen2", {}) for name in ("sft", "kto", "kd")}
CASES["sft LoRA"] = ("sft", "Qwen2", LORA)
CASES["dpo simpo"] = ("dpo", "Qwen2", {"loss_type": "simpo", "gradient_checkpointing": True})
CASES["kd top-k"] = ("kd", "Qwen2", {"teacher_topk": 5})
CASES["kd frozen"] = ("kd", "Qwen2", {"teacher_topk": 5, **LORA})
CASES["scoring"] = ("batch_infer", "Qwen2", {"eval_task": "logps", "output_path": ""})
# {case: (script, family, code, what it might become by mistake, what must be said then)}
MISTAKES = {
    "int64 bounds": ("sft", "Qwen2", "*lengths], dtype=np.int32)", "*lengths])", "int32 bounds"),
    "item in the step": ("sft", "Qwen2", "+= loss.detach()", "+= loss.item()", "waits for the GPU"),
    "value of another size": ("dpo", "DeepseekV3", "F.pad(v, (0, size - v.shape[2]))", "v", "one head size"),
    "copy that is not pinned": ("sft", "Qwen2", "tensor = tensor.pin_memory()", "pass", "waits for the GPU"),
    "z0 on the CPU": ("kto", "Qwen2", ".clamp(min=0)", ".clamp(min=0).cpu()", "mixes devices"),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{case: what is wrong}, from one process for all cases."""
    compiler = shutil.which("c++")
    if not compiler or torch.version.cuda:
        pytest.skip("needs a C++ compiler (c++) and a CPU build of torch")
    library = tmp_path_factory.mktemp("fake_cuda") / "fake_cuda.so"
    source = Path(__file__).parent / "fake_cuda" / "fake_cuda.cpp"
    links = [f"-L{ROOT}/lib", f"-Wl,-rpath,{ROOT}/lib", "-lc10", "-ltorch_cpu", f"-I{ROOT}/include"]
    subprocess.run([compiler, "-std=c++20", "-shared", "-fPIC", source, "-o", library, *links], check=True)
    done = subprocess.run([sys.executable, __file__, library], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", [*CASES, *MISTAKES])
def test_on_a_gpu(found, case):
    said = MISTAKES[case][-1] if case in MISTAKES else ""  # nothing is wrong
    assert said in found[case] and bool(said) == bool(found[case]), found[case]


class Watch(TorchDispatchMode):
    """Notes the lines where the host waits for the GPU, or where a CPU tensor meets a CUDA one."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        devices = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        reads = func is torch.ops.aten._local_scalar_dense.default  # .item(), float(), if
        out = 0 if reads else func(*args, **kwargs)
        noted = len(devices) > 1 or (reads and "cuda" in devices)
        if func is torch.ops.aten._to_copy.default:  # .to(), .cpu()
            waits = not (kwargs.get("non_blocking") and hasattr(args[0], "pinned"))
            noted = devices != {out.device.type} and waits
        if noted:
            frames = [f for f in traceback.extract_stack()[:-1] if "/torch/" not in f.filename]
            self.lines.append(f"{Path(frames[-1].filename).name}: {frames[-1].line}")
        return out


def pin(tensor):
    """Stands for Tensor.pin_memory, which needs a GPU; Watch knows such tensors."""
    tensor.pinned = True
    return tensor


def initialize(model, **options):
    """Stands for deepspeed.initialize: the model itself, with what a step uses of an engine."""
    model.bfloat16()
    with fake:
        model.to(GPU)
    model.device, model.backward = GPU, torch.Tensor.backward
    model.set_gradient_accumulation_boundary = lambda is_boundary: None
    return [model]


def checked_varlen(q, k, v, cu_q, cu_k, max_q, max_k, **options):
    """varlen_attn, with the conditions of FlashAttention-2."""
    size = q.shape[2]
    assert k.shape[2] == v.shape[2] == size, "not one head size"
    assert size <= 256 and size % 8 == 0, f"head size {size}"
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16, "not bf16"
    assert cu_q.dtype == cu_k.dtype == torch.int32, "no int32 bounds"
    assert type(max_q) is type(max_k) is int, "lengths are no plain numbers"
    assert q.stride(2) == k.stride(2) == v.stride(2) == 1, "strides"
    return real_varlen(q, k, v, cu_q, cu_k, max_q, max_k, **options)


def make_table(script):
    """Two examples as the script keeps them; for dpo.py a prompt of 7 tokens and two responses."""
    n = np.array([23, 40])
    columns = {"input_ids": map(np.arange, n), "trained": [np.arange(i) >= 7 for i in n]}
    columns |= {"ends": [[7, 15, i] for i in n], "length": n, "n_trained": n - 7}
    columns["sizes"] = [[8, i - 15] for i in n]
    columns |= {"desirable": n > 30, "prompt_hash": n}
    columns = {name: list(columns.get(name, ["", ""])) for name in script.FEATURES}
    return script.datasets.Dataset.from_dict(columns, features=script.FEATURES).with_format("numpy")


def run_step(script, name, args, table):
    """A step of the trainer: the host may wait for the GPU once, for the metrics (kto.py: in two lines)."""
    teacher, rows = None, None
    wrapper = script.InChunks if name == "kd" else script.LogProbs
    if name == "kd":
        with fake, Watch():
            teacher = script.start_frozen(args.teacher_model, args, False, wrapper)
    engine = script.start_engine(args, 3, wrapper)
    examples = table.__getitems__(range(2))
    if name == "kd" and args.teacher_topk:
        rows = [np.zeros((example["n_trained"], 11), np.float32) for example in examples]
    ref_logps = np.zeros((2, 2))
    inputs = {"sft": [examples], "dpo": [examples, ref_logps], "kto": [examples, examples, ref_logps]}
    inputs["kd"] = [teacher, rows, examples]
    with fake, Watch() as watch:
        getattr(script, f"{name}_step")(engine, *inputs[name], args)
    assert all(p.grad is not None for p in engine.parameters() if p.requires_grad)
    assert len(watch.lines) == 1 + (name == "kto"), f"it waits for the GPU, or mixes devices: {watch.lines}"


def run_frozen(script, name, args, table):
    """The pass of a frozen model: the host may wait where it is moved and checked, and for the values."""
    with fake, Watch() as watch:
        if name == "kd":
            script.teacher_topk(table, args)
        elif name == "kto":
            script.reference_rows(table, args)
        else:
            script.reference_logps(table, args)
    lines = {line for line in watch.lines if line.startswith(name)}
    assert len(lines) == 3, f"the pass waits for the GPU, or mixes devices: {lines}"


def run_scoring(script, args):
    """Two prompts with two responses each, through a cache, and each response on its own."""
    prompts, responses = [[5, 6, 7], [8, 9]], [[11, 12], [13, 14, 15, 16]]
    items = [script.Item((0, 0), prompt, response, {}) for prompt in prompts for response in responses]
    with fake, Watch():
        assert len(list(script.measure([items, items[:1]], None, args, GPU))) == 5


def check(case, script, name, family, flags, folder):
    """What is wrong with a case: "" if nothing is."""
    save_family(family, folder, **SHAPES.get(family, {}))
    paths = {"pretrain": folder, "dataset": ""}
    if name != "batch_infer":
        paths |= {"cache_dir": folder, "micro_train_batch_size": 1}
        script.deepspeed.initialize = initialize
        script.deepspeed.get_accelerator = lambda: SimpleNamespace(current_device_name=lambda: GPU)
        register_attention(script)
    paths |= {"teacher_model": folder} if name == "kd" else {}
    args = script.Args(**paths, **flags)
    args.vocab_size = 90
    try:
        if name == "batch_infer":
            run_scoring(script, args)
            return ""
        (run_frozen if "frozen" in case else run_step)(script, name, args, make_table(script))
    except (Exception, SystemExit):
        return traceback.format_exc(limit=-4)
    return ""


if __name__ == "__main__":
    fake, real_varlen = FakeTensorMode(allow_non_fake_inputs=True), varlen.varlen_attn
    varlen.varlen_attn = checked_varlen
    # Only real weights can be moved.
    AutoModelForCausalLM.from_pretrained = unset_fake_temporarily()(AutoModelForCausalLM.from_pretrained)
    dist.get_rank, dist.get_world_size = lambda: 0, lambda: 1
    dist.broadcast_object_list = dist.barrier = lambda *args: None
    dist.all_reduce = lambda tensor: tensor.add_(torch.zeros(1, device=GPU)[0])  # as NCCL, of CUDA tensors
    FakeTensor.tolist = lambda self: np.zeros(self.cpu().shape).tolist()  # one read, not one per number
    FakeTensor.numpy = lambda self: np.zeros(self.shape)
    torch.Tensor.pin_memory = pin
    # Small enough for several chunks of the LM head.
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(total_memory=2**20, major=9, minor=0)
    folder = Path(sys.argv[1]).parent
    cases = {case: (load_script(name), name, *inputs) for case, (name, *inputs) in CASES.items()}
    for case, (name, family, code, mistake, _) in MISTAKES.items():
        source = Path(load_script(name).__file__).read_text()
        assert source.count(code) == 1, code
        (folder / f"{case}.py").write_text(source.replace(code, mistake))
        cases[case] = (load_script(f"{folder}/{case}"), name, family, {})
    found = {}
    for case, inputs in cases.items():
        found[case] = check(case, *inputs, f"{folder}/{case}")
    print(json.dumps(found), flush=True)
    os._exit(0)  # without exit handlers: the autograd thread of a device that does not exist may abort there

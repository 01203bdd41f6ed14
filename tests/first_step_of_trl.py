"""The first step of TRL's DPOTrainer or KTOTrainer on 8 rows, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def first_steps(method, policy, reference, data, cases):
    """{name: what TRL logs} of {name: options of its DPOConfig or KTOConfig}."""
    pytest.importorskip("trl", reason="trl is not installed: pip install trl==1.16.0 accelerate")
    command = [sys.executable, __file__, method, policy, reference, data, json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def main(method, policy, reference, data, cases):
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows, logs = [json.loads(line) for line in Path(data).read_text().splitlines()], {}
    fixed = {"per_device_train_batch_size": 8, "max_steps": 1, "logging_steps": 1, "max_length": 512}
    fixed |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
    for name, options in json.loads(cases).items():
        models = [AutoModelForCausalLM.from_pretrained(path, dtype="float32") for path in (policy, reference)]
        args = getattr(trl, f"{method}Config")(f"{data}.trl", save_strategy="no", **fixed, **options)
        inputs = {"train_dataset": Dataset.from_list(rows)}
        inputs["processing_class"] = AutoTokenizer.from_pretrained(policy)
        trainer = getattr(trl, f"{method}Trainer")(*models, args=args, **inputs)
        trainer.train()
        logs[name] = trainer.state.log_history[0]
    print(json.dumps(logs))


if __name__ == "__main__":
    main(*sys.argv[1:])

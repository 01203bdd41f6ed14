"""Runs a script's main() for several configurations in one process group, as starting Python costs ten seconds.

    torchrun --nproc_per_node 2 tests/launch.py SCRIPT CONFIGS.json
"""

import importlib.util
import json
import os
import sys
from pathlib import Path


def load_script(name):
    """The module of a script, or of the copy that the environment names: KD=my_kd.py tests my_kd.py."""
    path = Path(__file__).parent.parent / os.environ.get(name.upper(), f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def register_attention(script):
    """What a trainer's main does before it loads a model: there is one place for all scripts of a process."""
    attention = getattr(script, "tree_attention", None) or script.packed_attention
    script.transformers.AttentionInterface.register("packed", attention)


if __name__ == "__main__":
    script = load_script(sys.argv[1])
    dist, join = script.dist, script.dist.init_process_group
    # A configuration may find the process group of the one before.
    dist.init_process_group = lambda *args, **options: dist.is_initialized() or join(*args, **options)
    for config in json.loads(Path(sys.argv[2]).read_text()):
        script.main(script.Args(**config))
    sys.stdout.flush()
    os._exit(0)

"""Runs a script's main() for several configurations in one process group, as starting Python costs ten seconds.

    torchrun --nproc_per_node 2 tests/launch.py SCRIPT CONFIGS.json

A changed copy is tested by DPO=my_dpo.py python -m pytest tests/test_dpo.py, and so for the other scripts.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path


def load_script(name):
    """The module of a top-level script, or of the copy that the variable of its name gives, imported by path."""
    path = Path(__file__).parent.parent / os.environ.get(name.upper(), f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    script = load_script(sys.argv[1])
    for config in json.loads(Path(sys.argv[2]).read_text()):
        script.main(script.Args(**config))
    sys.stdout.flush()
    os._exit(0)

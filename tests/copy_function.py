"""Copies a top-level function or class of one of the five scripts into every other one that has it.

    python tests/copy_function.py NAME sft.py

Scripts share code by identical copies: change one, run this, then `python -m pytest tests/test_house.py`.
"""

import sys

from test_house import OWN, REPO, SCRIPTS, definitions


def main(name, origin):
    copied = definitions(SCRIPTS[origin]).get(name)
    if name in OWN or not copied:
        sys.exit(f"error: {name}: name a function or class of {origin}, other than {', '.join(OWN)}")
    for script, source in SCRIPTS.items():
        if old := definitions(source).get(name):
            (REPO / script).write_text(source.replace(old, copied))
            print(f"{script}: {name} is that of {origin}")


if __name__ == "__main__":
    main(*sys.argv[1:])

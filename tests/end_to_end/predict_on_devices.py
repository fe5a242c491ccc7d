"""python predict_on_devices.py FILE: each list of arguments in the JSON file is a command of scjax, run one by one; one
that is refused does not end the others.
"""

import json
import sys
from pathlib import Path

import jax

from scjax.cli import main

if __name__ == "__main__":
    jax.config.update("jax_numpy_rank_promotion", "raise")
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        try:
            main(arguments)
        except SystemExit as end:
            sys.stderr.write(f"ended with {end.code}\n")

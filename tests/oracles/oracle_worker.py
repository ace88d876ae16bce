"""Calls functions of verl or TRL for tests, in a process of its own: their imports change what a process has loaded.

Usage: oracle_worker.py FOLDER MODULE. FOLDER is where `make oracles` has put the libraries, MODULE is verl_functions or
trl_functions. Every line of the input is a JSON list [name of a function, its arguments], every line of the output
{"value": ...} or {"error": traceback}.
"""

import importlib
import json
import os
import sys
import traceback


def main(folder: str, module: str) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the libraries print while they are imported
    sys.path.append(folder)  # at the end, so that what is installed here comes first
    functions = importlib.import_module(module)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = {"value": getattr(functions, name)(**arguments)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

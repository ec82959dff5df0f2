"""What runs in the processes of `fresh_processes`.

    python -m cpcompile.machine.answering MODULE ARGUMENTS…

Every line of the input is a question in JSON; MODULE.answer(question, *ARGUMENTS) answers it, in a line of JSON. An
error that is raised on purpose is an answer, too. MODULE may take long to import: the process ends meanwhile as well if
nobody asks any more.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from importlib import import_module
from queue import SimpleQueue

from cpcompile.core.errors import CpcompileError

ANSWER, ERROR, EXIT_CODE = "answer", "error", "exit code"


def main(module: str, *arguments: str) -> None:
    """Answer until nobody asks any more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    questions: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_listen, args=(questions,), daemon=True).start()
    answer = import_module(module).answer
    while True:
        question = json.loads(questions.get())
        try:
            said = {ANSWER: answer(question, *arguments)}
        except CpcompileError as error:
            said = {ERROR: str(error), EXIT_CODE: error.exit_code}
        print(json.dumps(said), file=answers, flush=True)


def _listen(questions: SimpleQueue[str]) -> None:
    for line in sys.stdin:
        questions.put(line)
    os._exit(0)  # the process that asks has ended, or was killed: nobody would read the answer


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A client process of the survival tests: makes or finds a sandbox and works through calls until it is done or killed.

    sandbox_client.py KIND DRIVER FOLDER CALLS

The sandbox's id lies in FOLDER/id. Call number i appends a line to a file inside and tells how many lines it has, so a
call that runs twice or not at all changes every answer after it. Answers are appended to FOLDER/answers, one a line.
"""

import os
import sys
from pathlib import Path

from rorqual import Sandbox


def main() -> None:
    kind, driver, folder, calls = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    name = folder / "id"
    if name.exists():
        sandbox = Sandbox.connect(name.read_text())
    else:
        sandbox = Sandbox.create(kind, driver=driver)  # type: ignore[arg-type]
        scratch = folder / "id.new"
        scratch.write_text(sandbox.id)
        os.replace(scratch, name)
    answers = folder / "answers"
    done = len(answers.read_text().splitlines()) if answers.exists() else 0
    for number in range(done, calls):
        result = sandbox.commands.run("echo line >> log; sleep 0.01; wc -l < log", call=f"call-{number}", timeout=30)
        with answers.open("a") as file:
            file.write(f"{number} {result.exit_code} {result.stdout.strip()}\n")
    sandbox.detach()


if __name__ == "__main__":
    main()

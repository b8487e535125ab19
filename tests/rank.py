"""Train several tiny runs as one process of a group, for the tests: `python -m tests.rank CASES.json`."""

import contextlib
import io
import json
import sys
import traceback
from pathlib import Path

from common.errors import UserError, end_at_once
from tests.runs import train_until
from training.distributed import join_world


def main() -> None:
    """Read [[arguments, step to stop at], …] from CASES.json, and write the errors of refused runs to refused.json."""
    cases_path = Path(sys.argv[1])
    refused = {}
    with join_world() as world:
        for number, (arguments, stop) in enumerate(json.loads(cases_path.read_text())):
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    train_until(arguments, stop, world)
            except UserError as error:
                refused[number] = str(error)
        if world.is_main:
            cases_path.with_name("refused.json").write_text(json.dumps(refused))
    end_at_once(0)


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        end_at_once(1)

"""What a job runs on its cluster, in the folder that was sent: `python -m jobs.submitted compress CONFIG ...`.

Ray keeps stdout and stderr of a job in one log. So the lines of the command's document are marked there.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from io import StringIO

MARK = "bitmill-document: "


def main() -> None:
    """Run the command line, with the document of `--json` at the end of the log."""
    from jobs.cli import main as run

    document = StringIO()
    try:
        with redirect_stdout(document):
            sys.argv.append("--json")
            run()
    finally:
        sys.stderr.flush()
        lines = document.getvalue().splitlines(keepends=True)
        sys.stdout.write("".join(["\n", *(MARK + line for line in lines)]) if lines else "")


if __name__ == "__main__":
    main()

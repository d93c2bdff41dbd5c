"""Runs a command while nobody else runs one for the same job. A script that becomes the command: FOLDER TOKEN COMMAND…

The lock on FOLDER/turn passes on to the command and to all that it starts, so that it is held exactly as long as one of
them lives. Who waited and finds the job led by somebody else, or done, runs nothing. Nothing but the standard library.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from pathlib import Path


def main() -> None:
    """Become the command, or end with 0 for a job that is done, and with a reason for one that is somebody else's."""
    folder, token, command = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    lock = os.open(folder / "turn", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    if json.loads((folder / "row.json").read_bytes())["token"] != token:
        sys.exit("another worker has taken over this job")
    if (folder / "result").is_dir():
        sys.exit(0)
    os.set_inheritable(lock, True)
    try:
        os.execv(command[0], command)  # noqa: S606 - the environment was made for it
    except OSError as error:
        sys.exit(f"{command[0]} cannot be started: {error.strerror}")


if __name__ == "__main__":
    main()

"""Starts processes as torchrun does, but forks them from one that has imported everything.

python forked.py PROCESSES MODULE ARGUMENTS...    each calls the module's main(ARGUMENTS)

Importing torch takes longer than most of what the tests train. If a process fails, all are ended.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
import traceback


def fork(processes: int, module: str, arguments: list[str]) -> bool:
    """Whether all processes succeeded."""
    main = importlib.import_module(module).main
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = set()
    for rank in map(str, range(processes)):
        child = os.fork()
        if not child:
            os.environ |= {**shared, "RANK": rank, "LOCAL_RANK": rank}
            _run(main, arguments)
        running.add(child)
    good = True
    while running:
        child, status = os.wait()
        running.discard(child)
        good &= status == 0
        for other in () if good else running:
            os.kill(other, signal.SIGKILL)
    return good


def _run(main, arguments: list[str]) -> None:
    """Ends this process."""
    code = 1
    try:
        main(arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(not fork(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))

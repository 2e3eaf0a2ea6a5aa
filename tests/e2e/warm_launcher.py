"""Our launcher with its imports done: every command is a fork that has them already.

Reads one JSON list `[arguments, folder, output]` a line, runs the launcher's `main` on the
arguments in a process of its own in that folder, with its output in a file, and answers with its
process id and then its exit code, a line each. What SGLang's imports cost is paid once.
"""

import json
import os
import sys
import traceback

# What the launcher would import until it knows that it can serve, the plugin's hooks included.
import sglang.launch_server
import sglang.srt.entrypoints.http_server
import sglang.srt.server_args  # noqa: F401

import pascal_sglang.engine.scheduler  # noqa: F401
from pascal_sglang.launch_server import main


def launch(arguments, folder, output):
    """In the fork: the launcher, as `python -m` would run it. The exit code."""
    os.setsid()
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv[1:] = arguments
    try:
        return main()
    except SystemExit as end:
        return end.code
    except BaseException:
        traceback.print_exc()
        return 1


for line in sys.stdin:
    command = json.loads(line)
    process = os.fork()
    if not process:
        code = launch(*command)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    print(process, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)

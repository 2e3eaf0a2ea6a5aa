"""In the path of a command of `evals`: the servers that it starts are forks of `warm_servers`."""

import sys

if sys.orig_argv[1:3] in (["-m", "evals.gpu.check"], ["-m", "evals.soak"]):
    from evals import arms
    from evals.load import server
    from tests.harness import Server

    class Fork(Server):
        flush = server.Server.flush

        def __init__(self, name, command, env, start_timeout_s):
            super().__init__(command[:3], command[3:], env, warm=True)
            self.pid = self.process.pid

    arms.Server = Fork

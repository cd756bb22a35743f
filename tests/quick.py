"""`headway` with all imports done: asks a fork server for it, and is to the caller what the command would be.

python -S quick.py SOCKET ARGUMENTS ...

Where the first argument is a file of Python, that is run instead, with the arguments after it.
"""

import json
import os
import pathlib
import signal
import socket
import sys

server, *arguments = sys.argv[1:]
connection = socket.socket(socket.AF_UNIX)
connection.connect(server)
what = {"arguments": arguments}
if arguments and arguments[0].endswith(".py"):
    what = {"worker": ["rank_script", *arguments], "processes": 1}
body = json.dumps({**what, "env": dict(os.environ), "cwd": str(pathlib.Path.cwd())}).encode()
socket.send_fds(connection, [len(body).to_bytes(8, "little")], [1, 2])
connection.sendall(body)
answers = connection.makefile("r")
pid = json.loads(answers.readline())["pid"]
for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
    signal.signal(signum, lambda number, _: os.kill(pid, number))
status = json.loads(answers.readline() or '{"status": -9}')["status"]
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)

"""Runs a command for each connection, which is its standard input and output: inetd.py PORT COMMAND"""

import os
import signal
import socket
import sys

port, command = int(sys.argv[1]), sys.argv[2:]
# Children that end are waited for by nobody.
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
listener = socket.create_server(("0.0.0.0", port), backlog=128)
while True:
    connection, _ = listener.accept()
    # A program writes an answer piece by piece.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if os.fork() == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(connection.fileno(), 0)
        os.dup2(connection.fileno(), 1)
        os.execvp(command[0], command)
    connection.close()

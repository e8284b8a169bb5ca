"""PostgreSQL behind tables.py: makes a database in the directory of the first argument, starts the server
on it, and speaks its protocol with it over the loopback. Beside the clients, pgbench keeps it busy for
as long as there are any.

The server has no huge pages (no checkpoint can hold them), shares its memory by mmap, System V and
/dev/shm, and is reached by TCP only."""

import glob
import os
import pwd
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

sys.dont_write_bytecode = True
import tables

data = os.path.join(sys.argv[1], "data")
# Debian has the server in no PATH.
found = shutil.which("postgres") or max(glob.glob("/usr/lib/postgresql/*/bin/postgres"), default=None)
if not found:
    sys.exit("PostgreSQL is not installed")
bin = os.path.dirname(os.path.realpath(found))
SETTINGS = {
    "huge_pages": "off",
    "shared_buffers": "16MB",
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "64",
    "checkpoint_timeout": "30s",
    # As fast as it can: files that are written to all the time can be compared at no time.
    "checkpoint_completion_target": "0",
    "max_wal_size": "64MB",
    "min_wal_size": "2MB",
    "autovacuum_naptime": "5s",
}


def be_postgres():
    user = pwd.getpwnam("postgres")
    os.setgroups([])
    os.setgid(user.pw_gid)
    os.setuid(user.pw_uid)


def run(program, *arguments, **more):
    line = [os.path.join(bin, program), *arguments]
    return subprocess.Popen(line, stdin=subprocess.DEVNULL, cwd="/", preexec_fn=be_postgres, **more)


def must(child):
    if child.wait() != 0:
        sys.exit(f"{child.args} ended with {child.returncode}")


class Session(tables.Session):
    """A connection to the server, by the simple query protocol."""

    def __init__(self):
        self.socket = socket.create_connection(("127.0.0.1", 5432))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.stream = self.socket.makefile("rb")
        names = b"user\0postgres\0database\0postgres\0\0"
        self.socket.sendall(struct.pack("!II", 8 + len(names), 3 << 16) + names)
        self.result()

    def result(self):
        """The first column of all rows until the server is ready for the next query."""
        rows, error = [], None
        while True:
            kind, length = struct.unpack("!cI", self.stream.read(5))
            body = self.stream.read(length - 4)
            if kind == b"D":
                (size,) = struct.unpack("!i", body[2:6])
                rows.append(None if size < 0 else body[6 : 6 + size])
            elif kind == b"E":
                error = body
            elif kind == b"Z":
                if error:
                    sys.exit(f"the server says {error}")
                return rows

    def ask(self, query):
        query = query.encode() + b"\0"
        self.socket.sendall(b"Q" + struct.pack("!I", 4 + len(query)) + query)
        return self.result()

    def get(self, key):
        found = self.ask(f"select encode(value, 'hex') from pairs where key = {literal(key)}")
        return bytes.fromhex(found[0].decode()) if found else None

    def put(self, pairs):
        # Statements of one query are one transaction.
        self.ask("".join(
            f"insert into pairs values ({literal(key)}, {literal(value)}) "
            "on conflict (key) do update set value = excluded.value;"
            for key, value in pairs
        ))

    def count(self, key):
        found = self.ask(
            f"insert into pairs values ({literal(key)}, '1') on conflict (key) do update set value = "
            "convert_to((convert_from(pairs.value, 'UTF8')::bigint + 1)::text, 'UTF8') "
            "returning convert_from(value, 'UTF8')"
        )
        return int(found[0])

    def drop(self, keys):
        all = ", ".join(map(literal, keys))
        return len(self.ask(f"delete from pairs where key in ({all}) returning 1"))


def literal(value):
    return f"'\\x{value.hex()}'::bytea"


os.makedirs(data, mode=0o700, exist_ok=True)
user = pwd.getpwnam("postgres")
os.chown(data, user.pw_uid, user.pw_gid)
is_new = not os.path.exists(os.path.join(data, "PG_VERSION"))
if is_new:
    # What is written here is checked when it is whole.
    must(run("initdb", "-D", data, "-E", "UTF8", "--locale=C", "--auth=trust", "--no-sync",
             "--wal-segsize=1",
             "--no-instructions", stdout=subprocess.DEVNULL))
settings = [word for pair in SETTINGS.items() for word in ("-c", "%s=%s" % pair)]
server = run("postgres", "-D", data, *settings)
while True:
    try:
        first = Session()
        break
    except (ConnectionError, struct.error, SystemExit):
        if server.poll() is not None:
            sys.exit(f"the server ended with {server.returncode}")
        time.sleep(0.05)
first.ask("create table if not exists pairs (key bytea primary key, value bytea)")
pgbench = [shutil.which("pgbench"), "-h", "127.0.0.1", "-U", "postgres"]
if is_new and pgbench[0]:
    first.ask("create extension if not exists amcheck")
    must(run(pgbench[0], *pgbench[1:], "-i", "-q", "postgres", stderr=subprocess.DEVNULL))

lock, clients, busy = threading.Lock(), 0, None


def came():
    global clients, busy
    with lock:
        clients += 1
        if busy is None and pgbench[0]:
            load = ["-n", "-c", "1", "-R", "20", "-T", "100000", "postgres"]
            busy = run(pgbench[0], *pgbench[1:], *load)


def went():
    global clients, busy
    with lock:
        clients -= 1
        if clients == 0 and busy is not None:
            busy.send_signal(signal.SIGTERM)
            busy.wait()
            busy = None
            first.ask("checkpoint")


tables.serve(Session, came, went)

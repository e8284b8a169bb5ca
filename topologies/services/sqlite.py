"""SQLite behind tables.py. Arguments: the file of the database, and how it is written (wal or delete)."""

import sqlite3
import sys

sys.dont_write_bytecode = True
import tables

path, mode = sys.argv[1:]


class Session(tables.Session):
    def __init__(self):
        self.database = sqlite3.connect(path, isolation_level=None, timeout=60)
        # Each transaction is on the disk before it is answered.
        self.database.execute("pragma synchronous=full")

    def transaction(self, work):
        self.database.execute("begin immediate")
        try:
            result = work(self.database.execute)
        except BaseException:
            self.database.execute("rollback")
            raise
        self.database.execute("commit")
        return result

    def get(self, key):
        found = self.database.execute("select value from pairs where key = ?", (key,)).fetchone()
        return found and bytes(found[0])

    def put(self, pairs):
        line = "insert into pairs values (?, ?) on conflict (key) do update set value = excluded.value"
        self.transaction(lambda execute: [execute(line, pair) for pair in pairs])

    def count(self, key):
        def work(execute):
            found = execute("select value from pairs where key = ?", (key,)).fetchone()
            count = int(found[0]) + 1 if found else 1
            execute("insert or replace into pairs values (?, ?)", (key, b"%d" % count))
            return count

        return self.transaction(work)

    def drop(self, keys):
        line = "delete from pairs where key = ?"
        return self.transaction(lambda execute: sum(execute(line, (k,)).rowcount for k in keys))


first = sqlite3.connect(path, isolation_level=None)
first.execute("pragma journal_mode=" + mode)
first.execute("create table if not exists pairs (key blob primary key, value blob)")
first.close()
tables.serve(Session)

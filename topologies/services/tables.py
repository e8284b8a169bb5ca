"""A key-value service that speaks the language of Redis before a database: GET, SET, MSET, INCR and DEL,
each one transaction. A thread for each connection, and each has a session of its own."""

import socketserver


class Session:
    """What a database does for one client."""

    def get(self, key):
        raise NotImplementedError

    def put(self, pairs):
        raise NotImplementedError

    def count(self, key):
        raise NotImplementedError

    def drop(self, keys):
        raise NotImplementedError


def answer(session, words):
    verb, keys = words[0].upper(), words[1:]
    if verb == b"GET":
        value = session.get(keys[0])
        return b"$-1\r\n" if value is None else b"$%d\r\n%s\r\n" % (len(value), value)
    if verb in (b"SET", b"MSET"):
        # In one order everywhere, so that no two wait for each other.
        session.put(sorted(dict(zip(keys[::2], keys[1::2])).items()))
        return b"+OK\r\n"
    if verb == b"INCR":
        return b":%d\r\n" % session.count(keys[0])
    if verb == b"DEL":
        return b":%d\r\n" % session.drop(sorted(set(keys)))
    return b"-ERR there is no command " + verb + b"\r\n"


def serve(begin, came=lambda: None, went=lambda: None):
    """Serves port 6379; `begin` makes a session, `came` and `went` hear of clients."""

    class Client(socketserver.StreamRequestHandler):
        disable_nagle_algorithm = True

        def handle(self):
            session = None
            try:
                while head := self.rfile.readline():
                    words = []
                    for _ in range(int(head[1:])):
                        length = int(self.rfile.readline()[1:])
                        words.append(self.rfile.read(length + 2)[:length])
                    # Who only looks whether somebody is there gets none.
                    if session is None:
                        session = begin()
                        came()
                    self.wfile.write(answer(session, words))
            except (ConnectionError, ValueError):
                pass
            finally:
                if session is not None:
                    went()

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = True
        daemon_threads = True
        request_queue_size = 128

    Server(("0.0.0.0", 6379), Client).serve_forever()

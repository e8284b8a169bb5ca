"""A key-value service with a thread for each connection: GET, PUT and DELETE of /KEY, POST to count
one more. All of it is in memory. The answer repeats the request's X-Sequence."""

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock

store = {}
lock = Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body of an answer leave together.
    wbufsize = -1
    disable_nagle_algorithm = True

    def do_GET(self):
        with lock:
            value = store.get(self.path)
        if value is None:
            self.answer(404, b"there is none\n")
        else:
            self.answer(200, value)

    def do_PUT(self):
        value = self.rfile.read(int(self.headers["Content-Length"]))
        with lock:
            store[self.path] = value
        self.answer(204)

    def do_POST(self):
        with lock:
            count = b"%d" % (int(store.get(self.path, b"0")) + 1)
            store[self.path] = count
        self.answer(200, count)

    def do_DELETE(self):
        with lock:
            store.pop(self.path, None)
        self.answer(204)

    def answer(self, status, body=None):
        self.send_response(status)
        self.send_header("X-Sequence", self.headers.get("X-Sequence", ""))
        if body is not None:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if body is not None:
            self.wfile.write(body)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 128


Server(("0.0.0.0", 8080), Handler).serve_forever()

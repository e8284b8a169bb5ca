"""A key-value service on one thread with asyncio: GET, PUT and DELETE of /KEY, POST to count one
more. All of it is in memory. The answer repeats the request's X-Sequence."""

import asyncio

store = {}
WORDS = {200: "OK", 204: "No Content", 404: "Not Found", 405: "Method Not Allowed"}


def execute(method, key, body):
    """Status and body of the answer."""
    if method == "GET":
        return (200, store[key]) if key in store else (404, b"there is none\n")
    if method == "PUT":
        store[key] = body
        return 204, None
    if method == "POST":
        store[key] = b"%d" % (int(store.get(key, b"0")) + 1)
        return 200, store[key]
    if method == "DELETE":
        store.pop(key, None)
        return 204, None
    return 405, b"GET, PUT, POST or DELETE\n"


async def serve(reader, writer):
    while True:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            break
        first, *lines = head.decode("latin-1").split("\r\n")[:-2]
        method, key, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, value in (line.split(":", 1) for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        # Others have their turn between the request and its answer.
        await asyncio.sleep(0)
        status, body = execute(method, key, body)
        answer = f"HTTP/1.1 {status} {WORDS[status]}\r\nX-Sequence: {headers.get('x-sequence', '')}\r\n"
        if body is not None:
            answer += f"Content-Length: {len(body)}\r\n"
        writer.write(answer.encode("latin-1") + b"\r\n" + (body or b""))
        await writer.drain()
    writer.close()


async def main():
    server = await asyncio.start_server(serve, "0.0.0.0", 8080, backlog=128)
    async with server:
        await server.serve_forever()


asyncio.run(main())

// A key-value service for Node: GET, PUT and DELETE of /KEY, POST to count one more. All of it is
// in memory. The answer repeats the request's X-Sequence.
import { createServer } from "node:http";

const store = new Map();

function answer(request, body) {
  const key = request.url;
  switch (request.method) {
    case "GET":
      return store.has(key) ? [200, store.get(key)] : [404, Buffer.from("there is none\n")];
    case "PUT":
      store.set(key, body);
      return [204];
    case "POST": {
      const count = Buffer.from(String(Number(store.get(key) ?? 0) + 1));
      store.set(key, count);
      return [200, count];
    }
    case "DELETE":
      store.delete(key);
      return [204];
    default:
      return [405, Buffer.from("GET, PUT, POST or DELETE\n")];
  }
}

const server = createServer((request, response) => {
  const pieces = [];
  request.on("data", (piece) => pieces.push(piece));
  request.on("end", () => {
    const [status, body] = answer(request, Buffer.concat(pieces));
    const headers = { "X-Sequence": request.headers["x-sequence"] ?? "" };
    if (body) headers["Content-Length"] = body.length;
    response.writeHead(status, headers).end(body);
  });
});
// Clients decide when a connection ends.
server.keepAliveTimeout = 0;
server.requestTimeout = 0;
server.listen(8080, "0.0.0.0");

import com.sun.net.httpserver.HttpExchange;
import com.sun.net.httpserver.HttpServer;
import java.io.IOException;
import java.net.InetSocketAddress;
import java.nio.charset.StandardCharsets;
import java.util.Map;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.Executors;

/**
 * A key-value service for the JVM: GET, PUT and DELETE of /KEY, POST to count one more. All of it is
 * in the heap. The answer repeats the request's X-Sequence.
 */
public class Store {
    private static final Map<String, byte[]> STORE = new ConcurrentHashMap<>();

    public static void main(String[] arguments) throws IOException {
        HttpServer server = HttpServer.create(new InetSocketAddress("0.0.0.0", 8080), 128);
        server.createContext("/", Store::serve);
        server.setExecutor(Executors.newFixedThreadPool(8));
        server.start();
    }

    private static void serve(HttpExchange exchange) throws IOException {
        try (exchange) {
            byte[] body = exchange.getRequestBody().readAllBytes();
            String key = exchange.getRequestURI().getRawPath();
            String sequence = exchange.getRequestHeaders().getFirst("X-Sequence");
            exchange.getResponseHeaders().set("X-Sequence", sequence == null ? "" : sequence);
            switch (exchange.getRequestMethod()) {
                case "GET" -> {
                    byte[] value = STORE.get(key);
                    answer(exchange, value == null ? 404 : 200, value == null ? new byte[0] : value);
                }
                case "PUT" -> {
                    STORE.put(key, body);
                    exchange.sendResponseHeaders(204, -1);
                }
                case "POST" -> answer(exchange, 200, STORE.merge(key, text(1), Store::sum));
                case "DELETE" -> {
                    STORE.remove(key);
                    exchange.sendResponseHeaders(204, -1);
                }
                default -> exchange.sendResponseHeaders(405, 0);
            }
        }
    }

    private static void answer(HttpExchange exchange, int status, byte[] body) throws IOException {
        // 0 would mean that the length is not known.
        exchange.sendResponseHeaders(status, body.length == 0 ? -1 : body.length);
        exchange.getResponseBody().write(body);
    }

    private static byte[] text(long number) {
        return Long.toString(number).getBytes(StandardCharsets.US_ASCII);
    }

    private static byte[] sum(byte[] left, byte[] right) {
        return text(number(left) + number(right));
    }

    private static long number(byte[] text) {
        return Long.parseLong(new String(text, StandardCharsets.US_ASCII));
    }
}

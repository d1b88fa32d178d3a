// The servlet, behind tomcat.
import jakarta.servlet.ServletException;
import jakarta.servlet.http.HttpServlet;
import jakarta.servlet.http.HttpServletRequest;
import jakarta.servlet.http.HttpServletResponse;
import java.io.FileOutputStream;
import java.io.IOException;
import java.io.InputStream;
import java.nio.charset.StandardCharsets;
import java.time.Instant;
import java.util.Arrays;

public class App extends HttpServlet {
    private static final long LIMIT = Long.parseLong(System.getenv().getOrDefault("APP_BODY_LIMIT", "0"));
    private FileOutputStream log;

    @Override
    public void init() throws ServletException {
        String path = System.getenv("APP_LOG");
        try (FileOutputStream workers = new FileOutputStream(path + ".workers", true)) {
            log = new FileOutputStream(path, true);
            workers.write((ProcessHandle.current().pid() + "\n").getBytes(StandardCharsets.US_ASCII));
        } catch (IOException error) {
            throw new ServletException(error);
        }
    }

    private void note(String id, String event) throws IOException {
        Instant now = Instant.now();
        log.write(String.format("{\"time\": %d.%06d, \"id\": \"%s\", \"event\": \"%s\"}%n", now.getEpochSecond(),
                now.getNano() / 1000, id, event).getBytes(StandardCharsets.UTF_8));
    }

    private static void sleep(double seconds) {
        try {
            Thread.sleep(Math.round(seconds * 1000));
        } catch (InterruptedException error) {
            Thread.currentThread().interrupt();
        }
    }

    private static void answer(HttpServletRequest request, HttpServletResponse response, int status, byte[] body)
            throws IOException {
        response.setStatus(status);
        response.setHeader("X-App", "1");
        response.setContentType("text/plain");
        response.setContentLength(body.length);
        if (!request.getMethod().equals("HEAD")) {
            response.getOutputStream().write(body);
        }
        response.flushBuffer();
    }

    // Not doGet() and kin: any method.
    @Override
    protected void service(HttpServletRequest request, HttpServletResponse response) throws IOException {
        String[] path = request.getRequestURI().split("/");
        String id = path[path.length - 1];
        note(id, "begin");
        byte[] body = "ok\n".getBytes(StandardCharsets.US_ASCII);
        int status = 200;
        if (LIMIT > 0 && request.getContentLengthLong() > LIMIT) {
            status = 413;
        } else {
            try (InputStream input = request.getInputStream()) {
                byte[] piece = new byte[65536];
                while (input.read(piece) >= 0) {
                }
            }
            switch (path[1]) {
                case "ok":
                    break;
                case "slow":
                    sleep(Double.parseDouble(path[2]));
                    break;
                case "exit":
                    new ProcessBuilder("kill", "-KILL", Long.toString(ProcessHandle.current().pid())).start();
                    sleep(60);
                    break;
                case "big":
                    body = new byte[Integer.parseInt(path[2])];
                    Arrays.fill(body, (byte) 'x');
                    break;
                default:
                    status = 404;
            }
        }
        answer(request, response, status, body);
        note(id, "end");
    }
}

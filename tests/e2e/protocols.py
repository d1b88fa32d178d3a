#!/usr/bin/python3
"""TLS and HTTP/2 towards the upstream, by real proxies: what is no request and no answer there is not taken for one.

nginx and HAProxy speak TLS 1.2 and 1.3 to an upstream (Python's ssl, that is OpenSSL) that answers, closes on a request without
an answer, or hangs up in the handshake; nginx refuses a certificate as well. HAProxy speaks HTTP/2 in plain text to hypercorn.
The truth is the upstream's own log and what each client got.
"""

import argparse
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(1, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "live"))
from harness import LIMIT, Finrace, Net, add_options, check_schema, die_with_parent, main, must, need, wait_for  # noqa: E402

HEALTHY = 8
NGINX = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/nginx.err; user root;
events {{ worker_connections 64; }}
http {{
    access_log off; client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
    uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
    proxy_http_version 1.1; proxy_set_header Connection ""; proxy_ssl_protocols TLSv1.2 TLSv1.3;
    upstream pool {{ server {address}:{upstream} max_fails=0; keepalive 4; }}
    server {{
        listen {address}:{port};
        location / {{ proxy_pass https://pool; }}
        location /verified/ {{ proxy_ssl_verify on; proxy_ssl_trusted_certificate {other}; proxy_pass https://pool; }}
    }}
}}
"""
HAPROXY = """
global
    nbthread 1
defaults
    mode http
    timeout connect 5s
    timeout client 30s
    timeout server 30s
frontend clients
    bind {address}:{port}
    default_backend pool
backend pool
    http-reuse always
    server one {address}:{upstream} {speaks}
"""
HTTP2_APP = """
async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"3")]})
    await send({"type": "http.response.body", "body": b"ok\\n"})
"""


def certificate(folder, name):
    path = os.path.join(folder, name)
    done = subprocess.run([need("openssl", "openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
                           "-nodes", "-keyout", path, "-out", path + ".crt", "-days", "2", "-subj", f"/CN={name}"],
                          capture_output=True, text=True, timeout=LIMIT)
    must(done.returncode == 0, f"no certificate: {done.stderr}")
    return path, path + ".crt"


class TlsUpstream:
    """Does what a request's path says; with `hang_up` it ends each new connection at its first word."""

    def __init__(self, net, folder, version):
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = self.context.maximum_version = version
        key, crt = certificate(folder, "upstream")
        self.context.load_cert_chain(crt, key)
        self.listener = socket.socket()
        self.listener.bind((net.address(), net.next_port()))
        self.listener.listen(64)
        self.port = self.listener.getsockname()[1]
        self.hang_up = False
        self.closed = []  # the client's port of each connection that was closed on a request
        self.hung_up = []
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                connection, peer = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(connection, peer[1]), daemon=True).start()

    def serve(self, connection, port):
        with connection:
            if self.hang_up:
                connection.recv(65536)
                self.hung_up.append(port)
                return
            try:
                with self.context.wrap_socket(connection, server_side=True) as tls:
                    while request := tls.recv(65536):
                        if b"/close/" in request.split(b"\r\n")[0]:
                            self.closed.append(port)
                            # No unwrap(): a process that dies says no farewell.
                            return
                        tls.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n")
            except OSError:
                return


def ask(address, port, path):
    """The status that a client got, None for none."""
    with socket.create_connection((address, port), LIMIT) as client:
        client.settimeout(LIMIT)
        # POST: a proxy does not try that again by itself.
        client.sendall(f"POST {path} HTTP/1.1\r\nHost: proxy\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
        try:
            answer = client.recv(4096)
        except OSError:
            return None
        return int(answer.split()[1]) if answer else None


class Proxy:
    def __init__(self, options, name, configuration, **values):
        self.folder = tempfile.mkdtemp(prefix=f"{name}-", dir=options.folder)
        path = os.path.join(self.folder, "configuration")
        with open(path, "w", encoding="ascii") as file:
            file.write(configuration.format(folder=self.folder, **values))
        command = {"nginx": [need("nginx", "nginx-light"), "-e", f"{self.folder}/start.err", "-c", path],
                   "haproxy": [need("haproxy", "haproxy"), "-db", "-f", path]}[name]
        with open(os.path.join(self.folder, "output"), "wb") as output:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                            preexec_fn=die_with_parent, start_new_session=True)
        self.address, self.port = values["address"], values["port"]
        wait_for(self.listens, f"{name} to listen; see {self.folder}", 180)

    def listens(self):
        try:
            socket.create_connection((self.address, self.port), LIMIT).close()
            return True
        except OSError:
            return False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(LIMIT)


def prove_tls(options, name, version):
    net = Net()
    folder = os.path.join(options.folder, f"tls-{name}-{version.name}")
    os.mkdir(folder)
    upstream = TlsUpstream(net, folder, version)
    _, stranger = certificate(folder, "stranger")
    values = {"address": net.address(), "port": net.next_port(), "upstream": upstream.port, "other": stranger,
              "speaks": "ssl verify none"}
    with Finrace(options, "--upstream", f"{net.address()}:{upstream.port}", "--side", "client") as finrace, \
            Proxy(options, name, NGINX if name == "nginx" else HAPROXY, **values) as proxy:
        due = {}
        for number in range(HEALTHY):
            must(ask(proxy.address, proxy.port, f"/ok/{number}") == 200, "a healthy request failed")
            if number % 3 == 2:  # on a connection in use, and (after that) on a new one
                must(ask(proxy.address, proxy.port, f"/close/{number}") != 200, "no answer was an answer")
        must(ask(proxy.address, proxy.port, "/close/x") != 200, "no answer was an answer")  # ends the pool's connection
        upstream.hang_up = True
        must(ask(proxy.address, proxy.port, "/ok/hang-up") != 200, "a handshake without an end was one")
        upstream.hang_up = False
        if name == "nginx":
            must(ask(proxy.address, proxy.port, "/verified/x") == 502, "nginx trusted a stranger")
        due.update((port, ("upstream_closed",)) for port in upstream.closed)
        due.update((port, ("handshake_failed",)) for port in upstream.hung_up)
        refusals = 1 if name == "nginx" and options.backend == "trace" else 0  # cgroup does not see what the client got
        wait_for(lambda: len(finrace.verdicts(net)) >= len(due) + refusals,
                 lambda: f"{len(due) + refusals} verdicts; there are {[one.verdict for one in finrace.verdicts(net)]}")
        time.sleep(1)  # for a verdict too many
        finrace.stop()
        check_schema(finrace)
        verdicts = finrace.verdicts(net)
        problems = []
        for one in verdicts:
            cause = one.at("finrace.cause")
            if one.local[1] not in due:
                if cause != "handshake_failed" or one.at("http.response.status_code") != 502:
                    problems.append(f"{one.local[1]}: {one.verdict}, and nothing failed there: {one.at('finrace.message')}")
                else:
                    refusals -= 1
            elif cause not in due[one.local[1]]:
                problems.append(f"{one.local[1]}: {one.verdict}, not {due[one.local[1]]}: {one.at('finrace.message')}")
            if one.at("finrace.connection.protocol") != "tls":
                problems.append(f"{one.local[1]}: protocol {one.at('finrace.connection.protocol')}")
        missed = set(due) - {one.local[1] for one in verdicts}
        must(not problems and not missed and refusals == 0,
             lambda: "\n          ".join([f"missed {missed}, {refusals} refusals", *problems]))
        # The handshake is no exchange: what was closed on was the pool's connection, after so many answers.
        exchanges = [one.at("finrace.connection.exchange") for one in verdicts if one.at("finrace.cause") == "upstream_closed"]
        must(sorted(exchanges) == [3, 4, 4], f"exchanges {exchanges}")


def prove_http2(options):
    net = Net()
    upstream, port = net.next_port(), net.next_port()
    with open(os.path.join(options.folder, "http2_app.py"), "w", encoding="ascii") as file:
        file.write(HTTP2_APP)
    need("hypercorn", "python3-hypercorn")
    server = subprocess.Popen(
        ["/usr/bin/python3", "-m", "hypercorn", "--bind", f"{net.address()}:{upstream}", "--keep-alive", "1", "http2_app:app"],
        cwd=options.folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=die_with_parent, start_new_session=True)
    try:
        with Finrace(options, "--upstream", f"{net.address()}:{upstream}", "--side", "client", "--connections") as finrace, \
                Proxy(options, "haproxy", HAPROXY, address=net.address(), port=port, upstream=upstream, speaks="proto h2") as proxy:
            wait_for(lambda: ask(proxy.address, proxy.port, "/") == 200, "hypercorn to answer", 180)
            for _ in range(3):
                for _ in range(HEALTHY):
                    must(ask(proxy.address, proxy.port, "/") == 200, "a healthy request failed")
                time.sleep(1.6)  # a rest above the server's keep-alive timeout
            os.killpg(server.pid, signal.SIGTERM)
            wait_for(lambda: [one for one in finrace.connections(net) if one.at("finrace.connection.exchanges")],
                     "the connections' ends")
            finrace.stop()
            check_schema(finrace)
            must(not [one for one in finrace.verdicts(net) if one.at("finrace.cause") != "connect_refused"],
                 lambda: f"{[one.verdict + ': ' + one.at('finrace.message') for one in finrace.verdicts(net)]} where nothing failed")
            spoken = {one.at("finrace.connection.protocol") for one in finrace.connections(net) if one.at("finrace.connection.exchanges")}
            must(spoken == {"http/2"}, f"the connections speak {spoken}")
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(LIMIT)


def test(options, results):
    for name in ("nginx", "haproxy"):
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            results.run(f"{name}, {version.name}", prove_tls, options, name, version)
    results.run("haproxy, HTTP/2 to hypercorn", prove_http2, options)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0], allow_abbrev=False)
    add_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main("protocols", parse, test))

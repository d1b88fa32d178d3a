#!/usr/bin/python3
"""nginx sets its upstreams aside after failures: is each of its own errors then tied to the failure that it follows from?

Two upstream servers close on a request without an answer; nginx has tried both and sets both aside (max_fails=1,
fail_timeout=10s, its defaults). What clients ask next it answers with 502 by itself. The truth is nginx's error log ("no live
upstreams") and what each client got. A location without upstreams answers 502 as well, of its own accord, at any time: while
nothing has failed, that is nobody's fault.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading

sys.path.insert(1, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "live"))
from harness import LIMIT, Finrace, Net, add_options, check_schema, die_with_parent, listen, main, must, need, wait_for  # noqa: E402

ASKED = 5
NGINX = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/nginx.err; user root;
events {{ worker_connections 64; }}
http {{
    access_log off; client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
    uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
    upstream pool {{ server {address}:{one}; server {address}:{other}; keepalive 4; }}
    server {{
        listen {address}:{port};
        location / {{ proxy_pass http://pool; proxy_http_version 1.1; proxy_set_header Connection ""; }}
        location /own {{ return 502; }}
    }}
}}
"""


def close_on_request(listener):
    """Answers /ok, and closes on anything else."""
    while True:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        with connection:
            connection.settimeout(LIMIT)
            while connection.recv(65536).startswith(b"GET /ok"):
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n")


def ask(address, port, path):
    """(the client's port, the status that it got)"""
    with socket.create_connection((address, port), LIMIT) as client:
        client.settimeout(LIMIT)
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: proxy\r\nConnection: close\r\n\r\n".encode())
        return client.getsockname()[1], int(client.recv(4096).split()[1])


def set_aside(options):
    net = Net()
    address, port = net.address(), net.next_port()
    listeners = [listen(net) for _ in range(2)]
    for listener in listeners:
        threading.Thread(target=close_on_request, args=(listener,), daemon=True).start()
    one, other = (listener.getsockname()[1] for listener in listeners)
    path = os.path.join(options.folder, "nginx.conf")
    with open(path, "w", encoding="ascii") as file:
        file.write(NGINX.format(folder=options.folder, address=address, port=port, one=one, other=other))
    nginx = subprocess.Popen([need("nginx", "nginx-light"), "-e", f"{options.folder}/start.err", "-c", path],
                             stdin=subprocess.DEVNULL, preexec_fn=die_with_parent, start_new_session=True)
    try:
        def answers():
            try:
                return ask(address, port, "/ok")[1] == 200
            except OSError:
                return False

        wait_for(answers, "nginx to answer")
        with Finrace(options) as finrace:
            for _ in listeners:  # connections that have not rested
                must(ask(address, port, "/ok")[1] == 200, "no answer")
            must(ask(address, port, "/own")[1] == 502, "nginx has no error of its own")
            must(ask(address, port, "/fail")[1] == 502, "nginx found an upstream that answers")
            clients = dict(ask(address, port, "/ok") for _ in range(ASKED))
            must(set(clients.values()) == {502}, f"the clients got {clients}, though both upstreams are set aside")
            wait_for(lambda: len([one for one in finrace.verdicts(net) if one.at("finrace.cause") == "upstream_benched"]) >= ASKED,
                     lambda: f"{ASKED} secondary failures; there are {[one.verdict for one in finrace.verdicts(net)]}")
            finrace.stop()
            check_schema(finrace)
            judge(finrace.verdicts(net), clients, {one, other})
        with open(f"{options.folder}/nginx.err", encoding="utf-8") as file:
            said = sum("no live upstreams" in line and '"GET /ok ' in line for line in file)
        must(said == ASKED, f"nginx said {said} times that it has no live upstreams")
    finally:
        os.killpg(nginx.pid, signal.SIGKILL)
        nginx.wait(LIMIT)


def judge(verdicts, clients, upstreams):
    first = [one for one in verdicts if one.at("finrace.cause") == "upstream_closed"]
    must(len(first) == 2, f"{[one.verdict for one in verdicts]}: the two failures are not all there")
    ids = {one.at("finrace.connection.id") for one in first}
    secondary = [one for one in verdicts if one.at("finrace.cause") == "upstream_benched"]
    must(len(secondary) + len(first) == len(verdicts) and len(secondary) == ASKED, f"{[one.verdict for one in verdicts]}")
    for one in secondary:
        must(one.at("finrace.outcome.client_port") in clients, f"of client {one.at('finrace.outcome.client_port')}")
        must(one.at("http.response.status_code") == 502, f"status {one.at('http.response.status_code')}")
        must(one.at("finrace.caused_by.connection_id") in ids, f"caused by {one.at('finrace.caused_by')}")
        must(one.at("network.peer.port") in upstreams, f"on {one.peer}")
        must(one.at("finrace.certainty") == "likely", one.verdict)


def test(options, results):
    results.run("errors of nginx's own are tied to the failures before", set_aside, options)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0], allow_abbrev=False)
    add_options(parser)
    parser.set_defaults(backend="trace")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main("no_live_upstreams", parse, test))

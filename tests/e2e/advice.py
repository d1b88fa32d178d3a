#!/usr/bin/python3
"""A pairing that will race is found before it has; and once its advice has been followed to the letter, it is healthy.

nginx in front of uvicorn, HAProxy in front of gunicorn, Apache httpd in front of Node.js: the upstream's idle timeout is
the shorter one; light traffic, so that no request meets the timer. `finrace diagnose` must say exposed, and name the
timeout, the software at both ends, what it has been told and where, and the ways out. Then a way is gone: its setting is
put where it belongs, word for word, and the same traffic must be diagnosed as healthy. And what no setting of an idle
timeout would cure is named for what it is.
"""

import argparse
import os
import shlex
import subprocess
import sys
import threading
import time
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(1, os.path.join(os.path.dirname(HERE), "live"))
from harness import (  # noqa: E402
    Finrace, LIMIT, Net, add_options, diagnose, die_with_parent, main, must, need, wait_for,
)

IDLE_TIMEOUT = 2  # seconds: the upstream's
# Seconds between requests of the one client: well away from any timer here, and the last beyond it.
SPARSE = [0.4, 1.2, 2.7]
SPARSER = [0.4, 1.2, 4.0]
ROUNDS = 5  # of these: each teaches one idle close
NGINX = """
worker_processes 1; daemon off; pid {folder}/nginx.pid; error_log {folder}/nginx.err;
events {{ worker_connections 256; }}
http {{
    access_log off; client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
    uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
    include {folder}/pool*.conf;
    server {{
        listen {address}:{port};
        location / {{ proxy_pass http://pool; proxy_http_version 1.1; proxy_set_header Connection ""; }}
    }}
}}
"""
NGINX_POOL = """# what the pool's line is told by
upstream pool {{ server {address}:{upstream}; keepalive 8; {setting} }}
"""
HAPROXY = """
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    {keep_alive}
frontend clients
    bind {address}:{port}
    default_backend pool
backend pool
    http-reuse always
    server upstream {address}:{upstream} {pool}
"""
APACHE = """
ServerRoot /etc/apache2
ServerName proxy
PidFile {folder}/apache.pid
DefaultRuntimeDir {folder}
ErrorLog {folder}/apache.err
Listen {address}:{port}
LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
LoadModule proxy_module /usr/lib/apache2/modules/mod_proxy.so
LoadModule proxy_http_module /usr/lib/apache2/modules/mod_proxy_http.so
User www-data
Group www-data
StartServers 1
ServerLimit 1
ThreadsPerChild 8
MaxRequestWorkers 8
Define APP {address}:{upstream}
ProxyPass / http://${{APP}}/ {setting}
"""
NODE = """
const http = require('http');
const server = http.createServer((request, response) => {{
    request.resume().on('end', () => response.writeHead(200, {{ 'Content-Length': 3 }}).end('ok\\n'));
}});
{setting};
server.listen({upstream}, '{address}');
"""


SLOW = """
import time

def app(environ, start_response):
    if environ["PATH_INFO"] != "/":
        time.sleep(60)
    start_response("200 OK", [("Content-Length", "3")])
    return [b"ok\\n"]
"""


class Pairing:
    """A proxy and a server, each with the setting that it is given. A context."""

    def __init__(self, options, net, name, proxy, proxy_setting, server, server_setting):
        self.folder = os.path.join(options.folder, name)
        os.makedirs(self.folder)
        self.address, self.port, self.upstream = net.address(), net.next_port(), net.next_port()
        self.commands = [server(self, server_setting), proxy(self, proxy_setting)]
        self.processes = []

    def write(self, name, text, **settings):
        path = os.path.join(self.folder, name)
        with open(path, "w", encoding="ascii") as file:
            file.write(text.format(folder=self.folder, address=self.address, port=self.port, upstream=self.upstream,
                                   **settings))
        return path

    def __enter__(self):
        with open(os.path.join(self.folder, "output"), "ab") as output:
            for command in self.commands:
                self.processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                                       preexec_fn=die_with_parent))
        try:
            wait_for(self.answers, "proxy and server to answer")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(LIMIT)

    def answers(self, path="/"):
        try:
            with urllib.request.urlopen(f"http://{self.address}:{self.port}{path}", timeout=LIMIT) as answer:
                return answer.read() == b"ok\n"
        except OSError:
            return False

    def diagnosed(self, options, rests, path="/"):
        """(exit status, the report's part on the upstream, the report) of as long as it takes to rest ROUNDS times. Another
        path than "/" must get no answer."""
        failed = []

        def ask():
            for rest in rests * ROUNDS:
                if self.answers(path) != (path == "/"):
                    failed.append(time.time())
                time.sleep(rest)

        client = threading.Thread(target=ask)
        client.start()
        status, report, _ = diagnose(options, *options.backend_flags, "--upstream", f"{self.address}:{self.upstream}",
                                     "--for", f"{sum(rests) * ROUNDS + 1:.0f}s", preexec_fn=Finrace.enter_host)
        client.join(LIMIT)
        must(not failed, f"{len(failed)} requests ended otherwise than they should")
        mine = [one for one in report["upstreams"] if one.get("port") == self.upstream]
        must(len(mine) == 1, f"{len(mine)} upstreams of {len(report['upstreams'])} are this one")
        return status, mine[0], report


def nginx(pairing, setting):
    pairing.write("pool.conf", NGINX_POOL, setting=setting)
    return [need("nginx", "nginx-light"), "-e", os.path.join(pairing.folder, "nginx.err"), "-c",
            pairing.write("nginx.conf", NGINX)]


def haproxy(pairing, settings):
    pool, keep_alive = settings or ("", "")
    return [need("haproxy", "haproxy"), "-f", pairing.write("haproxy.cfg", HAPROXY, pool=pool, keep_alive=keep_alive)]


def apache(pairing, setting):
    return [need("apache2", "apache2"), "-X", "-f", pairing.write("apache.conf", APACHE, setting=setting)]


def uvicorn(pairing, setting):
    program, *flags = shlex.split(setting)
    return [need(program, "python3-uvicorn"), *flags, "--host", pairing.address, "--port", str(pairing.upstream), "--app-dir",
            HERE, "--no-access-log", "asgi_app:app"]


def gunicorn(pairing, setting):
    program, *flags = shlex.split(setting)
    return [need(program, "gunicorn"), *flags, "--bind", f"{pairing.address}:{pairing.upstream}", "--worker-class",
            "uvicorn.workers.UvicornWorker", "--chdir", HERE, "asgi_app:app"]


def sync_gunicorn(pairing, setting):
    program, *flags = shlex.split(setting)
    pairing.write("slow.py", SLOW)
    return [need(program, "gunicorn"), *flags, "--bind", f"{pairing.address}:{pairing.upstream}", "--chdir", pairing.folder,
            "slow:app"]


def node(pairing, setting):
    return [need("node", "nodejs"), pairing.write("app.js", NODE, setting=setting)]


def exposed(pairing, options, software, told, rests=SPARSE, late=0):
    """{end: its settings} of the advice. `told`: what each end must be found to have been told, and where; `late`: by how
    many seconds this server closes after its timeout."""
    status, upstream, report = pairing.diagnosed(options, rests)
    must(status == 1 and report["state"] == "exposed" and not report["findings"], f"exit {status}: {report}")
    learned = upstream["idle_timeout"]
    must(learned["samples"] >= 3 and -20 <= learned["ms"] - (IDLE_TIMEOUT + late) * 1000 <= 100, f"learned {learned}")
    must(upstream["exposure"]["late_reuses"] > 0, f"{upstream['exposure']}")
    found = {end: upstream.get(end, {}) for end in ("proxy", "server")}
    must([one.get("software") for one in found.values()] == software, f"ends {found}")
    for end, (setting, place) in told.items():
        present = found[end].get("present", [])
        must(len(present) == 1 and present[0].get("setting") == setting and place in present[0]["place"]
             and "pending" not in present[0], f"{end} was told '{setting}' at '{place}', not {present}")
    print(f"          closes after {learned['ms']} ms ({learned['samples']} samples, spread {learned['spread_ms']} ms); "
          f"{upstream['exposure']}", flush=True)
    return {way["end"]: [one["setting"] for one in way["settings"]] for way in upstream["remedies"]}


# Timers are looked at early by a hair.
def healthy(pairing, options, rests, limit=None, states=("safe",)):
    """`limit`: seconds, where the proxy has one that shows."""
    status, upstream, report = pairing.diagnosed(options, rests)
    must(status == 0 and report["state"] == "healthy" and upstream["state"] in states, f"exit {status}: {report}")
    if limit:
        own = upstream["own_idle_limit"]
        must(-20 <= own["ms"] - limit * 1000 <= 100, f"the proxy's limit of {limit} s was seen as {own}")


def nginx_lowered(options, net):
    server = f"uvicorn --timeout-keep-alive {IDLE_TIMEOUT}"
    with Pairing(options, net, "as-it-comes", nginx, "", uvicorn, server) as pairing:
        settings = exposed(pairing, options, ["nginx", "uvicorn"],
                           {"proxy": (None, f"upstream pool, {pairing.folder}/pool.conf:2"),
                            "server": (f"--timeout-keep-alive {IDLE_TIMEOUT}", "command line of process ")})
    must(settings == {"proxy": ["keepalive_timeout 1s;"], "upstream": ["uvicorn --timeout-keep-alive 65"]}, f"{settings}")
    with Pairing(options, net, "lowered", nginx, settings["proxy"][0], uvicorn, server) as pairing:
        healthy(pairing, options, SPARSE, 1)


def uvicorn_raised(options, net):
    limit = 3  # nginx's own, so that it shows within the test
    told = f"keepalive_timeout {limit}s;"
    with Pairing(options, net, "limited", nginx, told, uvicorn, f"uvicorn --timeout-keep-alive {IDLE_TIMEOUT}") as pairing:
        settings = exposed(pairing, options, ["nginx", "uvicorn"], {"proxy": (told, f"{pairing.folder}/pool.conf:2")})
    must(settings["upstream"] == [f"uvicorn --timeout-keep-alive {limit + 5}"], f"{settings}")
    with Pairing(options, net, "raised", nginx, told, uvicorn, settings["upstream"][0]) as pairing:
        healthy(pairing, options, SPARSER, limit)


def haproxy_lowered(options, net):
    server = f"gunicorn --keep-alive {IDLE_TIMEOUT}"
    with Pairing(options, net, "haproxy", haproxy, None, gunicorn, server) as pairing:
        settings = exposed(pairing, options, ["HAProxy", "gunicorn"],
                           {"proxy": (f"server upstream {pairing.address}:{pairing.upstream}", "haproxy.cfg:13"),
                            "server": (f"--keep-alive {IDLE_TIMEOUT}", "command line of process ")})
    must(settings == {"proxy": ["pool-max-conn 0", "timeout http-keep-alive 1s"], "upstream": ["gunicorn --keep-alive 65"]},
         f"{settings}")
    with Pairing(options, net, "haproxy-lowered", haproxy, settings["proxy"], gunicorn, server) as pairing:
        healthy(pairing, options, SPARSE, states=("safe", "not_reused"))


def apache_lowered(options, net):
    server = f"server.keepAliveTimeout = {IDLE_TIMEOUT * 1000}"
    rests = [0.4, 1.8, IDLE_TIMEOUT + 1.7]
    with Pairing(options, net, "apache", apache, "", node, server) as pairing:
        url = f"http://{pairing.address}:{pairing.upstream}/"
        settings = exposed(pairing, options, ["Apache httpd", "Node.js"],
                           {"proxy": (None, f"ProxyPass {url}, {pairing.folder}/apache.conf:19")}, rests, late=1)
    must(settings["proxy"] == [f"ttl={IDLE_TIMEOUT}"], f"{settings}")
    with Pairing(options, net, "apache-lowered", apache, settings["proxy"][0], node, server) as pairing:
        healthy(pairing, options, rests)


def workers_killed(options, net):
    """gunicorn kills its sync workers over requests that take longer than its limit: that is no race, nor a crash."""
    limit = 2
    with Pairing(options, net, "killed", nginx, "", sync_gunicorn, f"gunicorn --timeout {limit}") as pairing:
        # A killed worker's request lasts up to two seconds beyond the limit; then another one has to start.
        status, upstream, report = pairing.diagnosed(options, [limit + 2.5], "/slow")
    must(status == 1 and [one["cause"] for one in report["findings"]] == ["upstream_closed"], f"exit {status}: {report}")
    found = report["findings"][0]
    waits = found["after_request"]
    must(limit * 1000 <= waits["lowest_ms"] <= waits["highest_ms"] <= (limit + 2) * 1000, f"{found}")
    must(upstream["server"]["worker_limit"][0]["setting"] == f"--timeout {limit}", f"{upstream}")
    must(any(f"gunicorn's --timeout: now --timeout {limit}: command line" in hint and "about as long" in hint
             for hint in found["hints"]), f"{found}")


def test(options, results):
    net = Net()
    # They wait, for the most part: at once.
    ways = {"nginx and uvicorn, the proxy's limit lowered": nginx_lowered,
            "nginx and uvicorn, the upstream's timeout raised": uvicorn_raised,
            "HAProxy and gunicorn, the proxy's limit lowered": haproxy_lowered,
            "Apache httpd and Node.js, the proxy's limit lowered": apache_lowered}
    others = {"nginx and gunicorn, whose workers are killed over long requests": workers_killed}
    ended = {}

    def go(name):
        try:
            {**ways, **others}[name](options, net)
        except Exception as error:  # raised again below, in the test that it belongs to
            ended[name] = error

    threads = [threading.Thread(target=go, args=(name,)) for name in (*ways, *others)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    def outcome(name):
        if name in ended:
            raise ended[name]

    for name in ways:
        results.run(f"exposed, then healthy: {name}", outcome, name)
    for name in others:
        results.run(f"named for what it is: {name}", outcome, name)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0], allow_abbrev=False)
    add_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main("advice", parse, test))

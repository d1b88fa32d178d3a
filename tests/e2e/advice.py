#!/usr/bin/python3
"""A pairing that will race is found before it has; and once its advice has been followed to the letter, it is healthy.

nginx as it comes in front of uvicorn, whose idle timeout is the shorter one; light traffic, so that no request meets the
timer. `finrace diagnose` must say exposed, and name the timeout and both ways out. Then each way is gone: its setting is
put where it belongs, word for word, and the same traffic must be diagnosed as healthy.
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

IDLE_TIMEOUT = 2  # seconds: uvicorn's
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
    upstream pool {{ server {address}:{upstream}; keepalive 8; {setting} }}
    server {{
        listen {address}:{port};
        location / {{ proxy_pass http://pool; proxy_http_version 1.1; proxy_set_header Connection ""; }}
    }}
}}
"""


class Pairing:
    """nginx and uvicorn, each with the settings that it is given. A context."""

    def __init__(self, options, net, name, nginx_setting, uvicorn):
        self.folder = os.path.join(options.folder, name)
        os.makedirs(self.folder)
        self.address, self.port, self.upstream = net.address(), net.next_port(), net.next_port()
        self.configuration = NGINX.format(folder=self.folder, address=self.address, port=self.port, upstream=self.upstream,
                                          setting=nginx_setting)
        self.uvicorn = [*uvicorn, "--host", self.address, "--port", str(self.upstream), "--app-dir", HERE, "--no-access-log",
                        "asgi_app:app"]
        self.processes = []

    def start(self, *command):
        with open(os.path.join(self.folder, "output"), "ab") as output:
            self.processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                                   preexec_fn=die_with_parent))

    def __enter__(self):
        path = os.path.join(self.folder, "nginx.conf")
        with open(path, "w", encoding="ascii") as file:
            file.write(self.configuration)
        program, *flags = self.uvicorn
        self.start(need(program, "python3-uvicorn"), *flags)
        self.start(need("nginx", "nginx-light"), "-e", os.path.join(self.folder, "nginx.err"), "-c", path)
        try:
            wait_for(self.answers, "nginx and uvicorn to answer")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(LIMIT)

    def answers(self):
        try:
            with urllib.request.urlopen(f"http://{self.address}:{self.port}/", timeout=LIMIT) as answer:
                return answer.read() == b"ok\n"
        except OSError:
            return False

    def diagnosed(self, options, rests):
        """(exit status, the report's part on the upstream, the report) of as long as it takes to rest ROUNDS times."""
        failed = []

        def ask():
            for rest in rests * ROUNDS:
                if not self.answers():
                    failed.append(time.time())
                time.sleep(rest)

        client = threading.Thread(target=ask)
        client.start()
        status, report, _ = diagnose(options, *options.backend_flags, "--upstream", f"{self.address}:{self.upstream}",
                                     "--for", f"{sum(rests) * ROUNDS + 1:.0f}s", preexec_fn=Finrace.enter_host)
        client.join(LIMIT)
        must(not failed, f"{len(failed)} requests failed")
        mine = [one for one in report["upstreams"] if one.get("port") == self.upstream]
        must(len(mine) == 1, f"{len(mine)} upstreams of {len(report['upstreams'])} are this one")
        return status, mine[0], report


def exposed(pairing, options):
    """{end: its settings} of the advice."""
    status, upstream, report = pairing.diagnosed(options, SPARSE)
    must(status == 1 and report["state"] == "exposed" and not report["findings"], f"exit {status}: {report}")
    learned = upstream["idle_timeout"]
    must(learned["samples"] >= 3 and 0 <= learned["ms"] - IDLE_TIMEOUT * 1000 <= 100, f"learned {learned}")
    must(upstream["exposure"]["races_a_day"] > 0, f"{upstream['exposure']}")
    print(f"          closes after {learned['ms']} ms ({learned['samples']} samples, spread {learned['spread_ms']} ms); "
          f"{upstream['exposure']['races_a_day']:.1f} races a day to be expected", flush=True)
    return {way["end"]: [one["setting"] for one in way["settings"]] for way in upstream["remedies"]}


def healthy(pairing, options, rests, limit):
    status, upstream, report = pairing.diagnosed(options, rests)
    must(status == 0 and report["state"] == "healthy" and upstream["state"] == "safe", f"exit {status}: {report}")
    own = upstream["own_idle_limit"]
    must(0 <= own["ms"] - limit * 1000 <= 100, f"nginx's limit of {limit} s was seen as {own}")


def uvicorn(timeout):
    return ["uvicorn", "--timeout-keep-alive", str(timeout)]


def proxy_lowered(options, net):
    with Pairing(options, net, "as-it-comes", "", uvicorn(IDLE_TIMEOUT)) as pairing:
        settings = exposed(pairing, options)["proxy"]
    must(settings == ["keepalive_timeout 1s;"], f"{settings}")
    with Pairing(options, net, "lowered", settings[0], uvicorn(IDLE_TIMEOUT)) as pairing:
        healthy(pairing, options, SPARSE, 1)


def upstream_raised(options, net):
    limit = 3  # nginx's own, so that it shows within the test; finrace has not seen it when it advises
    with Pairing(options, net, "limited", f"keepalive_timeout {limit}s;", uvicorn(IDLE_TIMEOUT)) as pairing:
        settings = exposed(pairing, options)["upstream"]
    mine = [shlex.split(one) for one in settings if one.startswith("uvicorn ")]
    must(len(mine) == 1, f"{settings}")
    with Pairing(options, net, "raised", f"keepalive_timeout {limit}s;", mine[0]) as pairing:
        healthy(pairing, options, SPARSER, limit)


def test(options, results):
    net = Net()
    # They wait, for the most part: at once.
    ways = {"the proxy's limit lowered": proxy_lowered, "the upstream's timeout raised": upstream_raised}
    ended = {}

    def go(name):
        try:
            ways[name](options, net)
        except Exception as error:  # raised again below, in the test that it belongs to
            ended[name] = error

    threads = [threading.Thread(target=go, args=(name,)) for name in ways]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    def outcome(name):
        if name in ended:
            raise ended[name]

    for name in ways:
        results.run(f"exposed, then healthy: {name}", outcome, name)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0], allow_abbrev=False)
    add_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main("advice", parse, test))

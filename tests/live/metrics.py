#!/usr/bin/python3
"""The metrics: what a scrape says, what a real Prometheus makes of it with the alerts and the dashboard that come with finrace,
and that nobody who may connect can stop the tracer by it.
"""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import yaml

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import harness  # noqa: E402
from harness import CLONE_NEWNET, LIMIT, ROOT, Finrace, Pair, checked, free_port, host_network, libc, listen, must, need, network, wait_for  # noqa: E402
from robustness import healthy, run_finrace, stale, unanswered  # noqa: E402

RULES = os.path.join(ROOT, "packaging", "prometheus", "finrace.rules.yml")
RULES_TEST = os.path.join(ROOT, "tests", "metrics", "rules.test.yml")
DASHBOARD = os.path.join(ROOT, "packaging", "grafana", "finrace.json")
MOST_UPSTREAMS = 200


def connect(net, port, host="127.0.0.1"):
    """A socket keeps the network that it was made in."""
    with host_network(net):
        sock = socket.create_connection((host, port), timeout=LIMIT)
    return sock


def ask(net, port, method="GET", path="/metrics"):
    """(status, headers, text)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT)
    connection.sock = connect(net, port)
    connection.request(method, path)
    response = connection.getresponse()
    text = response.read().decode("utf-8")
    connection.close()
    return response.status, response.headers, text


def series(text):
    """{(name, frozenset of labels): value}"""
    found = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        match = re.fullmatch(r'([a-z_]+)(?:\{(.*)\})? (\S+)', line)
        must(match, f"no sample: {line!r}")
        labels = frozenset(re.findall(r'([a-z_]+)="((?:[^"\\]|\\.)*)"', match[2] or ""))
        must((match[1], labels) not in found, f"twice: {line!r}")
        found[match[1], labels] = float(match[3])
    return found


def value(found, name, **labels):
    """The sum over all series that have these labels; None if there is none."""
    values = [number for (one, has), number in found.items() if one == name and set(labels.items()) <= has]
    return sum(values) if values else None


def scraped(net, port):
    """Not what was made up before this call."""
    time.sleep(1.1)  # a text is a second old at most
    status, headers, text = ask(net, port)
    must(status == 200 and headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8", f"{status}: {headers}")
    return series(text), text


def test_scrape(options):
    """It says what the records say; promtool finds nothing to complain about."""
    with network() as net:
        port = free_port(net)
        with Finrace(options, "--metrics", str(port), interval="100ms") as finrace:
            text = ask(net, port)[2]
            must(value(series(text), "finrace_races_total") is not None, "no counter of races before the first")
            listener = listen(net)
            upstream = "{}:{}".format(*listener.getsockname())
            due = [unanswered(net, listener) for _ in range(3)]
            due += [stale(net, listener) for _ in range(2)]
            for _ in range(4):
                healthy(net, listener, exchanges=3)
            finrace.wait_verdicts(net, len(due))
            finrace.wait_settled()
            found, text = scraped(net, port)
            must(value(found, "finrace_verdicts_total", upstream=upstream, cause="upstream_closed", certainty="proven",
                       side="client") == 3, text)
            must(value(found, "finrace_upstream_races_total", upstream=upstream) == 2, text)
            must(value(found, "finrace_races_total") >= 2, text)
            record = next(one for one in reversed(finrace.records("finrace.upstream"))
                          if (one.at("network.peer.address"), one.at("network.peer.port")) == listener.getsockname())
            for name, path in (("finrace_upstream_connections_opened_total", "connections.opened"),
                               ("finrace_upstream_exchanges_total", "exchanges"),
                               ("finrace_upstream_connections_closed_total", "connections.closed")):
                must(value(found, name, upstream=upstream) == record.at(f"finrace.upstream.{path}"), f"{name}: {text}")
            must(value(found, "finrace_lost_total") == 0 and value(found, "finrace_output_records_dropped_total") == 0, text)
            must(value(found, "finrace_output_records_written_total", output=finrace.path) > 5, text)
            resident = value(found, "process_resident_memory_bytes")
            must(0.5 < resident / finrace.memory() < 2, f"{resident} of {finrace.memory()}")
            must(value(found, "process_cpu_seconds_total") > 0, "no time was used")
            must(value(found, "finrace_bpf_runs_total") is not None, "no program")
            for kind in ("counter", "gauge", "histogram"):
                must(f" {kind}\n" in text, f"no {kind}")
            done = subprocess.run([need("promtool", "prometheus"), "check", "metrics"], input=text, capture_output=True, text=True,
                                  timeout=LIMIT)
            must(done.returncode == 0 and not done.stdout + done.stderr, f"promtool: {done.stdout}{done.stderr}")
            finrace.stop()
            must(not any("warning" in text for text in finrace.said), finrace.words)


def test_program_statistics(options):
    """While the kernel counts them, what its BPF programs cost."""
    switch = "/proc/sys/kernel/bpf_stats_enabled"
    with open(switch, encoding="ascii") as file:
        before = file.read()
    try:
        with network() as net:
            port = free_port(net)
            with Finrace(options, "--metrics", str(port)):
                with open(switch, "w", encoding="ascii") as file:
                    file.write("1")
                listener = listen(net)
                for _ in range(50):
                    healthy(net, listener)
                found, text = scraped(net, port)
                must(value(found, "finrace_bpf_runs_total") > 100 and value(found, "finrace_bpf_run_seconds_total") > 0, text)
    finally:
        with open(switch, "w", encoding="ascii") as file:
            file.write(before)


def test_many_upstreams(options):
    """No number of upstreams makes the text grow without end; what lies beyond is counted as one."""
    with network() as net:
        port = free_port(net)
        with Finrace(options, "--metrics", str(port), interval="1s") as finrace:
            count = MOST_UPSTREAMS + 30
            listeners = [listen(net) for _ in range(count)]
            due = [unanswered(net, listener) for listener in listeners]
            finrace.wait_verdicts(net, len(due))
            found, text = scraped(net, port)
            names = {dict(labels)["upstream"] for _, labels in found if "upstream" in dict(labels)}
            must(len(names) == MOST_UPSTREAMS + 1 and "other" in names, f"{len(names)} upstreams")
            must(value(found, "finrace_verdicts_total") >= count, "verdicts are missing")
            must(value(found, "finrace_verdicts_total", upstream="other") >= 30, text)
            must(1 << 16 < len(text) < 4 << 20, f"{len(text)} bytes")

            # Who reads slowly gets the whole of the text that was begun, though others get a newer one meanwhile.
            slow = [connect(net, port) for _ in range(3)]
            for sock in slow:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
                sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            for _ in range(3):
                newer = scraped(net, port)[1]
            for sock in slow:
                response = http.client.HTTPResponse(sock)
                response.begin()
                old = response.read().decode("utf-8")
                must(response.status == 200 and old != newer and series(old).keys() == found.keys(), f"{response.status}: {old[-200:]}")
                sock.close()


def test_hostile(options):
    """Who connects and says nothing, or nonsense, or asks without end, keeps no verdict waiting and costs no event."""
    with network() as net:
        port = free_port(net)
        with Finrace(options, "--metrics", str(port), interval="100ms") as finrace:
            listener = listen(net)
            must(ask(net, port, path="/")[0] == 200 and ask(net, port, path="/etc/passwd")[0] == 404, "other paths")
            must(ask(net, port, method="POST")[0] == 405 and ask(net, port, method="HEAD")[2] == "", "other methods")
            for nonsense in (b"\0" * 100, b"GET " + b"x" * 100_000, b"GET /metrics HTTP/1.1\r\n" + b"A: b\r\n" * 20_000, b"\r\n" * 5_000,
                             b"GET /metrics HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00"):
                with connect(net, port) as sock:
                    sock.settimeout(10)
                    try:
                        sock.sendall(nonsense)
                        sock.shutdown(socket.SHUT_WR)
                        while sock.recv(1 << 16):
                            pass
                    except OSError:
                        pass
            must(ask(net, port)[0] == 200, "it does not answer after nonsense")
            before = finrace.memory()
            with host_network(net):
                for _ in range(5000):
                    with socket.socket() as sock:
                        sock.setblocking(False)
                        sock.connect_ex(("127.0.0.1", port))  # those that find room in the queue are connected by now
            must(ask(net, port)[0] == 200, "it does not answer after thousands that went away")

            silent = [connect(net, port) for _ in range(60)]
            due = [unanswered(net, listener)]
            wait_for(lambda: [one.ends for one in finrace.verdicts(net)] == due, "a verdict while others keep silent")
            wait_for(lambda: ask(net, port)[0] == 200, "an answer, once the silent ones are let go of")
            for sock in silent:
                sock.close()

            # Who says a little again and again is let go of as well.
            trickling = [connect(net, port) for _ in range(40)]
            stop = threading.Event()

            def trickle():
                while not stop.wait(1):
                    for sock in trickling:
                        with suppress(OSError):
                            sock.send(b"G")

            trickler = threading.Thread(target=trickle, daemon=True)
            trickler.start()
            wait_for(lambda: ask(net, port)[0] == 200, "an answer, once the trickling ones are let go of")
            stop.set()
            trickler.join(LIMIT)
            for sock in trickling:
                sock.close()

            # One that asks for much and reads nothing.
            deaf = connect(net, port)
            deaf.settimeout(1)
            try:
                while True:
                    deaf.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
            except (TimeoutError, ConnectionError):
                pass
            done = threading.Event()
            answers = []

            def ask_on():
                checked(libc.setns(harness._host_network, CLONE_NEWNET), "setns")  # of this thread alone
                while not done.is_set():
                    try:
                        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=LIMIT) as response:
                            response.read()
                            answers.append(response.status)
                    except OSError as error:
                        answers.append(str(error))

            askers = [threading.Thread(target=ask_on, daemon=True) for _ in range(2)]
            for asker in askers:
                asker.start()
            wait_for(lambda: len(answers) > 20, "answers")
            for _ in range(100):
                due.append(unanswered(net, listener))
            finrace.wait_verdicts(net, len(due))
            done.set()
            for asker in askers:
                asker.join(LIMIT)
            deaf.close()
            must(set(answers) == {200}, f"{set(answers)}")
            must([one.ends for one in finrace.verdicts(net)] == due, "verdicts are missing, or in another order")
            must(finrace.memory() < before + (16 << 20), lambda: f"{before} bytes of memory, then {finrace.memory()}")
            finrace.stop()
            must(finrace.health().at("finrace.health.complete"), f"{finrace.health()}")


def test_refusals(options):
    """Exit 2, what was named, and what is accepted."""
    for text, words in (("nowhere", ["'nowhere'", "ADDR:PORT"]), (":9000", ["':9000'"]), ("0", ["'0'"]),
                        ("192.0.2.1:9000", ["192.0.2.1:9000", "Cannot assign"])):
        done = run_finrace(options, ["run", *options.backend_flags, "--metrics", text])
        must(done.returncode == 2 and all(word in done.stderr for word in words), f"{text}: {done.returncode}: {done.stderr}")


def test_port_is_taken(options):
    """Another process has the port: finrace traces all the same, says so, and serves its metrics once the port is free. Confined."""
    with network() as net:
        port = free_port(net)
        listener = listen(net)
        with host_network(net):
            taken = socket.create_server(("127.0.0.1", port))
        with taken, Finrace(options, "--metrics", str(port)) as finrace:
            wait_for(lambda: any(f"--metrics 127.0.0.1:{port}: Address already in use" in text for text in finrace.said), finrace.words)
            accident = unanswered(net, listener)
            wait_for(lambda: [one.ends for one in finrace.verdicts(net)] == [accident], "the verdict")
            must({"name": f"metrics:127.0.0.1:{port}", "written": 0, "dropped": 0, "bytes_waiting": 0, "problem": "EADDRINUSE"}
                 in finrace.next_health().at("finrace.outputs"), lambda: f"{finrace.health()}")
            taken.close()
            wait_for(lambda: any(f"metrics are served at 127.0.0.1:{port} now" in text for text in finrace.said), finrace.words)
            status, _, text = ask(net, port)
            must(status == 200 and "\nfinrace_races_total " in text, f"{status}: {text[:500]}")
            # A record may have been under way before.
            wait_for(lambda: all(not one["name"].startswith("metrics:") for one in finrace.next_health().at("finrace.outputs")), "it to be told no more")
            finrace.stop()


def expressions():
    """(panel, expression, legend) of the dashboard, with Grafana's variables filled in."""
    with open(DASHBOARD, encoding="utf-8") as file:
        dashboard = json.load(file)
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            text = target["expr"]
            for name, filled in (("$instance", ".*"), ("$upstream", ".*"), ("$__rate_interval", "1m"), ("$__range", "10m")):
                text = text.replace(name, filled)
            must("$" not in text, f"{panel['title']}: {text}")
            yield panel["title"], text, target["legendFormat"]


METRIC = re.compile(r"\b((?:finrace|process)_[a-z_]+)(?:\{([^}]*)\})?")
ADDED = {"instance", "job"}  # by Prometheus, to every series


def asked_of(expression, *shown):
    """{(metric, label, value)} that an expression and what is shown beside it ask for; None for any value, or no label."""
    metrics = METRIC.findall(expression)
    asked = {(name, None, None) for name, _ in metrics}
    for name, matchers in metrics:
        # Of a value that is excluded, too: one that is never there excludes nothing.
        for label, operator, filled in re.findall(r'([a-z_]+)(=~|!~|!=|=)"([^"]*)"', matchers):
            asked.add((name, label, None if "~" in operator else filled))
    labels = {label.strip() for group in re.findall(r"\bby \(([^)]*)\)", expression) for label in group.split(",")}
    for text in shown:
        labels |= set(re.findall(r"(?:\$labels\.|\{\{)([a-z_]+)", text))
    return {one for one in asked | {(name, label, None) for name, _ in metrics for label in labels} if one[1] not in ADDED}


def asked():
    """The same of all alerts, all panels and the dashboard's variables."""
    wanted = set()
    with open(RULES, encoding="utf-8") as file:
        rules = [rule for group in yaml.safe_load(file)["groups"] for rule in group["rules"]]
    for rule in rules:
        wanted |= asked_of(rule["expr"], *rule["annotations"].values())
    for _, expression, legend in expressions():
        wanted |= asked_of(expression, legend)
    with open(DASHBOARD, encoding="utf-8") as file:
        variables = [one["definition"] for one in json.load(file)["templating"]["list"] if one["type"] == "query"]
    for definition in variables:
        name, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", definition).groups()
        wanted |= asked_of(name) | asked_of(name, "{{" + label + "}}")
    return wanted


def unmet(wanted, found):
    """What of it no series has."""
    def is_met(metric, label, filled):
        return any(name == metric and (label is None or any(one == label and filled in (None, has) for one, has in labels))
                   for name, labels in found)

    return {one for one in wanted if not is_met(*one)}


def use_and_rest(net, listener, rests, rest, upstream_closes):
    """Connections, each used twice, after one of these rests, and closed by one end after another; healthy all."""
    apart = 0.15  # as closes of more than one instant are: those of one count once
    pairs = [Pair(net, listener) for _ in rests]

    def use(number, pair, used_after):
        time.sleep(number * apart + max(rests) - used_after)
        pair.exchange()
        time.sleep(used_after)
        pair.exchange()
        time.sleep(rest)
        first, second = (pair.server, pair.client) if upstream_closes else (pair.client, pair.server)
        first.close()
        must(second.recv(1) == b"", "a byte after the last answer")
        second.close()

    with ThreadPoolExecutor(len(pairs)) as threads:
        list(threads.map(use, range(len(pairs)), pairs, rests))  # raises what one of them has


def teach(net, scrape):
    """Until an upstream's timer is learned, which this host's reuses will meet, and this host's own limit for another one.
    Gives the address of the first."""
    listeners = listen(net), listen(net)
    exposed, limited = ["{}:{}".format(*one.getsockname()) for one in listeners]
    due = {("finrace_upstream_idle_timeout_seconds", exposed), ("finrace_upstream_expected_races_per_day", exposed),
           ("finrace_upstream_own_idle_limit_seconds", limited)}
    lacking = set()

    def learned():
        # Some well below the timer, some in the last eighth before it.
        use_and_rest(net, listeners[0], [1.3, 1.8] * 6, 2.0, upstream_closes=True)
        use_and_rest(net, listeners[1], [0.1] * 6, 0.5, upstream_closes=False)
        found = scrape()
        lacking.clear()
        lacking.update((name, upstream) for name, upstream in due if value(found, name, upstream=upstream) is None)
        return not lacking

    wait_for(learned, lambda: f"{lacking} to be learned")  # a busy machine blurs a few closes: more of them make up for it
    return exposed


def test_prometheus(options):
    """A real Prometheus takes it: each name that alerts and dashboard ask for is there, and the alerts come and go."""
    promtool = need("promtool", "prometheus")
    for command in ([promtool, "check", "rules", RULES], [promtool, "test", "rules", RULES_TEST]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
        must(done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}")
    with network() as net:
        port, own_port = free_port(net), free_port(net)
        folder = os.path.join(options.folder, "prometheus")
        os.makedirs(folder)
        configuration = os.path.join(folder, "prometheus.yml")
        with open(configuration, "w", encoding="ascii") as file:
            json.dump({"global": {"scrape_interval": "1s", "evaluation_interval": "1s"}, "rule_files": [RULES],
                       "scrape_configs": [{"job_name": "finrace", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}]}, file)
        log = open(os.path.join(folder, "log"), "wb")
        server = subprocess.Popen(
            [need("prometheus", "prometheus"), f"--config.file={configuration}", f"--storage.tsdb.path={folder}/data",
             f"--web.listen-address=127.0.0.1:{own_port}"], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            preexec_fn=Finrace.enter_host)

        def query(text):
            status, _, answer = ask(net, own_port, path="/api/v1/query?" + urllib.parse.urlencode({"query": text}))
            answer = json.loads(answer)
            must(status == 200 and answer["status"] == "success", f"{text}: {answer}")
            return answer["data"]["result"]

        def alerts():
            """But those for an upstream of somebody else on this host."""
            return {(one["alertname"], one["alertstate"]) for one in (alert["metric"] for alert in query("ALERTS"))
                    if one.get("upstream", net.prefix).startswith(net.prefix)}

        def is_up():
            try:
                return query("up")
            except (OSError, ValueError):  # not yet listening, or not yet ready
                return False

        try:
            with Finrace(options, "--metrics", str(port), interval="100ms") as finrace:
                listener = listen(net)
                healthy(net, listener, exchanges=2)
                wait_for(is_up, "Prometheus")
                wait_for(lambda: query("finrace_races_total"), "the first scrape")
                before = query("finrace_races_total")[0]["value"][1]
                must(("FinraceRequestsLost", "firing") not in alerts(), "an alert before the first race")
                due = [stale(net, listener) for _ in range(2)]
                finrace.wait_verdicts(net, len(due))
                wait_for(lambda: query("finrace_races_total")[0]["value"][1] != before, "the races")
                wait_for(lambda: ("FinraceRequestsLost", "firing") in alerts(), lambda: f"the alert: {alerts()}")
                must({name for name, _ in alerts()} == {"FinraceRequestsLost"}, f"{alerts()}")

                exposed = teach(net, lambda: scraped(net, port)[0])
                alert = f'ALERTS{{alertname="FinraceUpstreamExposed", alertstate="pending", upstream="{exposed}"}}'
                wait_for(lambda: query(alert), lambda: f"the alert that it will lose requests: {alerts()}")

                wanted = asked()
                # One of a rule, of its annotations, of a panel, of its legend.
                must(wanted >= {("finrace_upstream_expected_races_per_day", "bound", "low"), ("finrace_output_failing", "output", None),
                                ("process_cpu_seconds_total", None, None), ("finrace_verdicts_total", "retried", None)}, f"only {wanted}")
                found, text = scraped(net, port)
                must(not unmet(wanted, found), lambda: f"asked for, but not there: {unmet(wanted, found)}")
                for name in dict.fromkeys(name for name, _, _ in wanted):
                    must(unmet(wanted, series(re.sub(rf"^{name}\b", f"{name}_renamed", text, flags=re.M))), f"{name} is not missed")
                for label in dict.fromkeys(label for _, label, _ in wanted if label):
                    must(unmet(wanted, series(re.sub(rf'([{{,]){label}="', rf'\1{label}_renamed="', text))), f"{label} is not missed")
                panels = list(expressions())
                must(len(panels) > 15, f"{len(panels)} expressions")

                def empty():
                    return {title for title, expression, _ in panels if not query(expression)}

                # A rate takes two scrapes of the series.
                wait_for(lambda: not empty(), lambda: f"data for {empty()}", pause=0.5)
                finrace.stop()
            wait_for(lambda: ("FinraceDown", "pending") in alerts(), lambda: f"word that it is gone: {alerts()}")
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(LIMIT)
            log.close()


TESTS = [test_refusals, test_port_is_taken, test_scrape, test_program_statistics, test_many_upstreams, test_hostile, test_prometheus]


def test(options, results):
    print(f"metrics: backend {options.backend_name}", flush=True)
    results.run_each(TESTS, options)


def parse():
    parser = harness.parser_of(__doc__)
    parser.add_argument("--sanitized", action="store_true", help="the binary has sanitizers")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(harness.main("metrics", parse, test))

#!/usr/bin/python3
"""What a fleet's hosts have told, in a cluster of real ClickHouse servers: two shards of two replicas each, and ZooKeeper.

The records are those of real runs, one for each host, whose local reports the fleet's must equal when they are added up. By
cgroup, connections whose two ends are on two hosts are made of real verdicts with other numbers; by trace two real runs tell
of them, each of one end. Ten million records are ClickHouse's own work.
"""

import base64
import http.server
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager

sys.dont_write_bytecode = True
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.join(os.path.dirname(HERE), "live"), os.path.dirname(HERE)]
import check_records  # noqa: E402
import harness  # noqa: E402
from clickhouse import SCHEMA, ClickHouse, ZooKeeper, free_ports, shards  # noqa: E402
from harness import LIMIT, Pair, ROOT, Wrong, listen, must, need, network, wait_for  # noqa: E402

RETENTION = os.path.join(ROOT, "packaging", "clickhouse", "retention")
TABLES = ("verdicts", "upstream_hours", "race_hours", "health_hours", "connections")
MILLION = 1_000_000
# What the tables leave out of a record, as schema.sql says.
LEFT_OUT = {"finrace.schema", "network.transport", "finrace.connection.states", "finrace.outputs", "finrace.health.missing_hooks",
            "finrace.health.confinement.files", "finrace.health.confinement.system_calls",
            "finrace.health.confinement.capabilities", "finrace.health.losses.events_by_kind", "finrace.health.verdicts",
            "finrace.upstream.verdicts"}
STOP_LIMIT = 30


class Cluster:
    """`servers`: two for each shard."""

    def __init__(self, servers):
        self.servers = servers

    @property
    def url(self):
        return self.servers[0].url

    def insert(self, lines, server=0):
        """As a pipeline does: through any server, which sends each record to its shard."""
        self.servers[server].query("INSERT INTO finrace.records FORMAT JSONEachRow", b"".join(line + b"\n" for line in lines),
                                   input_format_skip_unknown_fields=1, insert_distributed_sync=1)
        self.settle()

    def settle(self):
        """Until each server that is alive has what the others have."""
        for server in self.servers:
            if server.alive():
                for table in TABLES:
                    server.query(f"SYSTEM SYNC REPLICA finrace.{table}_local")

    def empty(self):
        for server in self.servers[::2]:
            for table in TABLES:
                server.query(f"TRUNCATE TABLE finrace.{table}_local")

    def count(self, table, server=0):
        return self.servers[server].value(f"SELECT count() AS n FROM finrace.{table} FINAL" if table != "race_hours" else
                                          "SELECT uniqExactMerge(verdicts) AS n FROM finrace.race_hours")


@contextmanager
def cluster(folder):
    ports = free_ports(13)
    with open(SCHEMA, encoding="utf-8") as file:
        schema = file.read()
    with ZooKeeper(os.path.join(folder, "keeper"), ports[12]):
        servers = []
        for number in range(4):
            http, tcp, between = ports[number * 3:number * 3 + 3]
            servers.append(ClickHouse(os.path.join(folder, f"server-{number}"), http, tcp, interserver_port=between,
                                      cluster={"finrace": shards(ports[1:12:3], 2)}, internal_replication=True,
                                      zookeeper=[("127.0.0.1", ports[12])], macros={"shard": number // 2, "replica": number % 2}))
        try:
            for server in servers:
                server.begin()
            for server in servers:
                server.wait_ready()
                server.script(schema)
            yield Cluster(servers)
        finally:
            for server in servers:
                server.kill()


class Host:
    """A host of that name: a finrace of its own, which sees the whole machine as any does, while its traffic goes on."""

    def __init__(self, options, net, name):
        self.options, self.net, self.name = options, net, name
        self.recording = os.path.join(options.folder, f"{name}.rec")

    def watch(self, work):
        command = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name, self.options.finrace, "record",
                   "--output", self.recording, "--upstream", f"{self.net.prefix}0/24", *self.options.backend_flags]
        with subprocess.Popen(command, stderr=subprocess.PIPE, preexec_fn=harness.die_with_parent) as process:
            harness.wait_said(process, "finrace: ready")
            work()
            time.sleep(1.5)  # the last verdicts wait for what becomes of their requests
            process.terminate()
            said = process.stderr.read()
            must(process.wait(STOP_LIMIT) == 0, lambda: f"finrace record ended with {process.returncode}: {said[-500:]}")

    def flat(self, *flags):
        """Its records, on one level, as lines."""
        done = subprocess.run([self.options.finrace, "run", "--flat", "--replay", self.recording, *flags], capture_output=True,
                              timeout=LIMIT, check=False)
        must(done.returncode == 0, lambda: f"the replay ended with {done.returncode}: {done.stderr[-500:]}")
        return done.stdout.splitlines()

    def report(self):
        return report_of(self.options, self.recording)


def report_of(options, *flags, status=(0, 1, 3)):
    ended, report, said = harness.diagnose(options, *flags)
    must(ended in status, lambda: f"diagnose ended with {ended}: {said[-1000:]}")
    return report


def fleet_report(options, url, *flags):
    return report_of(options, "--clickhouse", url, *flags)


def nested(flat):
    """A record as it was before it was flattened."""
    record = {}
    for name, value in flat.items():
        *way, last = name.split(".")
        place = record
        for step in way:
            place = place.setdefault(step, {})
        place[last] = value
    return record


def changed(line, **values):
    """The same record with other values; names with __ for dots."""
    record = json.loads(line)
    record.update({name.replace("__", "."): value for name, value in values.items()})
    return json.dumps(record).encode()


def make_traffic(net, listener, closed, stale, refused):
    """Requests that the upstream drops, requests that come after its close, attempts that nobody takes, and harmless ones
    whose connections it closes idle, of which its timer is learned."""
    one_at_a_time = threading.Lock()  # what a listener hands out next is the newest client's

    def connect():
        with one_at_a_time:
            return Pair(net, listener)

    def idle():
        pair = connect()
        pair.exchange()
        time.sleep(1.0)
        pair.server.close()
        must(pair.client.recv(1) == b"", "a byte came")
        pair.client.close()

    def one_stale():
        pair = connect()
        pair.exchange()
        time.sleep(1.0)
        pair.server.close()
        time.sleep(0.1)
        pair.client.sendall(b"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n")
        time.sleep(0.1)
        pair.client.close()

    def at(delay, work):
        time.sleep(delay)
        work()

    threads = [threading.Thread(target=at, args=(0.15 * number, idle)) for number in range(6)]
    threads += [threading.Thread(target=at, args=(0.1 * number, one_stale)) for number in range(stale)]
    for thread in threads:
        thread.start()
    for _ in range(closed):
        pair = connect()
        pair.request_unanswered()
        pair.client.close()
    for _ in range(refused):
        with socket.socket() as sock:
            sock.bind((net.address(), net.next_port()))
            try:
                sock.connect((net.address(2), 9))
                raise Wrong("somebody listens on port 9")
            except ConnectionRefusedError:
                pass
    for thread in threads:
        thread.join(LIMIT)


def finding_of(report, cause):
    found = [one for one in report["findings"] if one["cause"] == cause]
    must(len(found) == 1, lambda: f"{len(found)} findings {cause}: {[(one['cause'], one['verdicts']) for one in report['findings']]}")
    return found[0]


def added_up(reports):
    """Findings and pools of several reports, by what is counted."""
    findings, pools = {}, {}
    for report in reports:
        for one in report["findings"]:
            key = one["cause"], *harness.place_of(one.get("upstream") or one["listener"])
            into = findings.setdefault(key, Counter())
            for name in ("verdicts", "affected", "hidden_by_retry", "incomplete", "clients_left", "bursts"):
                into[name] += one[name]
            for name in ("certainty", "reason", "answers"):
                for word, count in one[name].items():
                    into[f"{name} {word}"] += count
        for one in report["upstreams"]:
            into = pools.setdefault(harness.place_of(one), Counter())
            for name in ("connections", "requests", "races", "unclassified"):
                into[name] += one[name]
    return findings, pools


def test_names_are_the_records_own(options):
    """Each of a record's values has a column, or is named as left out; and each column is a value's name."""
    with open(SCHEMA, encoding="utf-8") as file:
        text = file.read()
    columns = {line.strip().split("`")[1] for line in text.split("finrace.records_local (")[1].split(") ENGINE")[0].splitlines()
               if "`" in line}
    names = check_records.flat_names()
    races = {f"finrace.upstream.verdicts.{cause}" for cause in ("keepalive_race", "stale_response", "stale_reuse")}
    must(columns - races == names - LEFT_OUT, lambda: f"not alike: {sorted((columns - races) ^ (names - LEFT_OUT))}")


def test_the_report_equals_the_local_ones_added_up(options, there, hosts):
    """Two proxies at one upstream: what each says by itself, added up, is what the fleet's says; each record is there once."""
    lines = [host.flat() for host in hosts]
    for host, of_host in zip(hosts, lines):
        records = [nested(json.loads(line)) for line in of_host]
        complaints = check_records.complaints([json.dumps(record).encode() for record in records])
        must(not complaints, lambda: f"flat records, nested again, are not what the schema says: {complaints[:3]}")
        must([record["finrace"]["sequence"] for record in records] == list(range(1, len(records) + 1)), "numbers with gaps")
        must({record["host"]["name"] for record in records} == {host.name}, "another host's name")
    for number, of_host in enumerate(lines):
        there.insert(of_host, server=number)
    everything = [json.loads(line) for of_host in lines for line in of_host]
    for name, table in (("finrace.verdict", "verdicts"), ("finrace.connection", "connections")):
        due = sum(1 for one in everything if one["event.name"] == name)
        must(there.count(table) == due, lambda: f"{there.count(table)} of {due} in {table}")
    rows = {(row["host.name"], row["finrace.run"], row["finrace.sequence"]): row for row in
            there.servers[1].rows("SELECT * FROM finrace.verdicts FINAL")}
    for one in everything:
        if one["event.name"] != "finrace.verdict":
            continue
        row = rows[one["host.name"], one["finrace.run"], one["finrace.sequence"]]
        for name, value in one.items():
            if name not in LEFT_OUT | {"event.name"}:
                must(row[name] == value, lambda: f"{name} is {row[name]!r}, not {value!r}")
    fleet = fleet_report(options, there.url)
    local = [host.report() for host in hosts]
    must(added_up(local) == added_up([fleet]),
         lambda: f"the fleet's: {added_up([fleet])}\n          added up: {added_up(local)}")
    must(fleet["fleet"] == {"hosts": [host.name for host in hosts], "silent": [], "ended": []}, f"{fleet['fleet']}")
    for finding in fleet["findings"]:
        due = {host.name: sum(one["verdicts"] for one in report["findings"] if one["cause"] == finding["cause"])
               for host, report in zip(hosts, local)}
        must(finding["hosts"] == {name: count for name, count in due.items() if count}, f"{finding['hosts']}, not {due}")
        firsts = [one["first"] for report in local for one in report["findings"] if one["cause"] == finding["cause"]]
        lasts = [one["last"] for report in local for one in report["findings"] if one["cause"] == finding["cause"]]
        must((finding["first"], finding["last"]) == (min(firsts), max(lasts)), f"from {finding['first']} to {finding['last']}")
    timers = {(one["address"], one["port"]): one.get("idle_timeout") for report in local for one in report["upstreams"]}
    told = {(one["address"], one["port"]): one.get("idle_timeout") for one in fleet["upstreams"]}
    learned = [where for where, timer in timers.items() if timer]
    must(learned and all(told[where] for where in learned), f"timers of {learned}, in the store {told}")
    must(finding_of(fleet, "stale_reuse")["remedies"], "nothing to change")
    races = there.servers[2].value("SELECT uniqExactMerge(verdicts) AS n FROM finrace.race_hours")
    must(races == finding_of(fleet, "stale_reuse")["verdicts"], f"{races} races by hour")


def test_the_same_lines_again_change_nothing(options, there, hosts):
    """A batch that is sent twice, in other batches and through another server: what a collector does after a lost answer."""
    before = fleet_report(options, there.url)
    counts = [there.count(table) for table in TABLES]
    for host in hosts:
        lines = host.flat()
        run = there.servers[0].value(f"SELECT any(`finrace.run`) AS run FROM finrace.health_hours WHERE `host.name` = '{host.name}'")
        again = [changed(line, finrace__run=run) for line in lines]
        there.insert(again[:3], server=3)
        there.insert(again, server=2)
    must([there.count(table) for table in TABLES] == counts, "records were counted twice")
    after = fleet_report(options, there.url)
    must(added_up([before]) == added_up([after]), "the report has changed")


def test_a_replica_that_dies(options, there, hosts):
    """One server of each shard gone: records are taken, the report is whole; and what came meanwhile is there when it is back."""
    before = fleet_report(options, there.url)
    for server in there.servers[1::2]:
        server.kill()
    line = next(line for line in hosts[0].flat() if b'"finrace.verdict"' in line)
    cause = json.loads(line)["finrace.cause"]
    there.insert([changed(line, finrace__run="0123456789abcdef", finrace__sequence=1)])
    fleet = fleet_report(options, there.url)
    must(finding_of(fleet, cause)["verdicts"] == finding_of(before, cause)["verdicts"] + 1, "the report misses it")
    for server in there.servers[1::2]:
        server.begin()
    for server in there.servers[1::2]:
        server.wait_ready()
        wait_for(lambda server=server: server.value("SELECT count() AS n FROM finrace.verdicts_local FINAL") ==
                 there.servers[there.servers.index(server) - 1].value("SELECT count() AS n FROM finrace.verdicts_local FINAL"),
                 "the replica to have what it missed")


def test_what_came_before(options, there, hosts):
    """Counts of a run that began before --since are what was added since; verdicts from before are not told."""
    there.empty()
    lines = hosts[0].flat()
    upstream = [line for line in lines if b'"finrace.upstream"' in line][-1]
    verdict = next(line for line in lines if b'"finrace.verdict"' in line)
    now = time.time()

    def at(hours):
        return time.strftime("%Y-%m-%dT%H:%M:%S.000000001Z", time.gmtime(now - 3600 * hours))

    names = ("connections__closed", "exchanges", "unclassified", "verdicts__stale_reuse")
    for sequence, (hours, counts) in enumerate(((9, (5, 50, 0, 1)), (5, (10, 100, 1, 2)), (1, (13, 130, 2, 5)), (0, (17, 175, 2, 6))), 1):
        there.insert([changed(upstream, timestamp=at(hours), finrace__sequence=sequence,
                              **{f"finrace__upstream__{name}": count for name, count in zip(names, counts)}),
                      changed(verdict, timestamp=at(hours), finrace__sequence=100 + sequence)])
    where = json.loads(upstream)["network.peer.address"]
    for since, counts, verdicts in (("3h", (7, 75, 1, 4), 2), ("7h", (12, 125, 2, 5), 3),
                                    ("24h", (17, 175, 2, 6), 4)):
        report = fleet_report(options, there.url, "--since", since)
        (pool,) = (one for one in report["upstreams"] if one["address"] == where)
        found = pool["connections"], pool["requests"], pool["unclassified"], pool["races"]
        must(found == counts, f"since {since}: {found}, not {counts}")
        must(sum(one["verdicts"] for one in report["findings"]) == verdicts, f"since {since}: {report['findings']}")


def test_a_host_that_was_started_again(options, there, hosts):
    """Of one host's runs what they have counted adds up; how its pool stands, and what is to be expected, is the newest's word."""
    there.empty()
    upstream = [line for line in hosts[0].flat() if b'"finrace.upstream"' in line][-1]
    now = time.time()
    for number, (minutes, state, races) in enumerate(((180, "exposed", 40.0), (120, "exposed", 50.0), (1, "safe", None))):
        there.insert([changed(upstream, timestamp=time.strftime("%Y-%m-%dT%H:%M:%S.000000001Z", time.gmtime(now - 60 * minutes)),
                              finrace__run=f"{number:016x}", finrace__upstream__exchanges=100,
                              finrace__upstream__exposure__state=state, finrace__upstream__exposure__races_a_day=races,
                              finrace__upstream__exposure__told_by=25.0 if races else None)])
        (pool,) = fleet_report(options, there.url)["upstreams"]
        must(pool["requests"] == 100 * (number + 1), f"{pool['requests']} requests of {number + 1} runs")
        must(pool["state"] == state and list(pool["hosts"].values()) == [state], f"{pool['state']}, not {state}")
        if races:
            range_ = pool["exposure"]["races_a_day"]
            must(range_["low"] < races < range_["high"], f"{range_} races a day, of {number + 1} runs that say {races}")


def test_masked_upstreams(options, there, hosts):
    """Of upstreams that have one masked address each counts, and none that is safe hides one that is exposed."""
    there.empty()
    upstream = [line for line in hosts[0].flat() if b'"finrace.upstream"' in line][-1]
    for sequence, (name, state) in enumerate((("0123456789abcdef", "exposed"), ("fedcba9876543210", "safe")), 1):
        there.insert([changed(upstream, network__peer__address="10.0.0.0", finrace__sequence=sequence, finrace__upstream__id=name,
                              finrace__upstream__exchanges=100, finrace__upstream__exposure__state=state,
                              timestamp=time.strftime("%Y-%m-%dT%H:%M:%S.000000001Z", time.gmtime()))])
    (pool,) = fleet_report(options, there.url)["upstreams"]
    must(pool["address"] == "10.0.0.0" and pool["requests"] == 200, f"{pool}")
    must(pool["state"] == "exposed" and list(pool["hosts"].values()) == ["exposed"], f"{pool}")
    # Another run that has told of another network alone says nothing of this one.
    there.insert([changed(upstream, network__peer__address="10.0.1.0", finrace__sequence=1, finrace__upstream__id="00000000000000cc", finrace__run="f" * 16,
                          finrace__upstream__exchanges=5, finrace__upstream__exposure__state="safe",
                          timestamp=time.strftime("%Y-%m-%dT%H:%M:%S.000000001Z", time.gmtime(time.time() + 1)))])
    states = {pool["address"]: pool["state"] for pool in fleet_report(options, there.url)["upstreams"]}
    must(states == {"10.0.0.0": "exposed", "10.0.1.0": "safe"}, f"after a restart that has told of another network alone: {states}")
    # Another run tells them apart by other ids, and its word is newer.
    for sequence, name in enumerate(("00000000000000aa", "00000000000000bb"), 2):
        there.insert([changed(upstream, network__peer__address="10.0.0.0", finrace__sequence=sequence, finrace__upstream__id=name, finrace__run="f" * 16,
                              finrace__upstream__exchanges=10, finrace__upstream__exposure__state="safe",
                              timestamp=time.strftime("%Y-%m-%dT%H:%M:%S.000000001Z", time.gmtime(time.time() + 1)))])
    (pool,) = (pool for pool in fleet_report(options, there.url)["upstreams"] if pool["address"] == "10.0.0.0")
    must(pool["requests"] == 220 and pool["state"] == "safe", f"after a restart: {pool}")


def test_filters(options, there, hosts):
    """--upstream, --process and --side choose here as they do on one host; and what is not chosen hides nothing that is."""
    there.empty()
    line = next(line for line in hosts[0].flat() if b'"upstream_closed"' in line)
    client = json.loads(line)
    number = client["finrace.request.sequence_number"]
    server = {**client, "host.name": "app-1", "finrace.run": "f" * 16, "finrace.side": "server",
              "finrace.cause": "closed_on_request", "process.executable.name": "uvicorn", "process.pid": 7,
              "network.local.address": client["network.peer.address"], "network.local.port": client["network.peer.port"],
              "network.peer.address": client["network.local.address"], "network.peer.port": client["network.local.port"],
              "finrace.evidence.event": "closed", "finrace.evidence.unread_bytes": client["finrace.request.bytes"]}
    client["process.executable.name"] = "nginx"
    there.insert([json.dumps({**client, "process.pid": 6, "finrace.connection.idle_ms": 1000, "finrace.connection.reused": True}).encode(),
                  json.dumps(server).encode()])
    where = f"{client['network.peer.address']}:{client['network.peer.port']}"
    for flags, due in (((), ["keepalive_race"]), (("--upstream", where), ["keepalive_race"]), (("--upstream", "10.0.0.0/30"), []),
                       (("--side", "client"), ["keepalive_race"]), (("--side", "server"), ["closed_on_request"]),
                       (("--process", "nginx"), ["keepalive_race"]), (("--process", "uvicorn"), ["closed_on_request"]),
                       (("--process", "caddy"), [])):
        report = fleet_report(options, there.url, *flags)
        must([one["cause"] for one in report["findings"]] == due, lambda: f"{flags}: {[one['cause'] for one in report['findings']]}, not {due}")


def test_both_ends_of_a_connection(options, there, hosts):
    """Two hosts tell of the same connection: one verdict, with the stronger evidence, told by addresses, ports and sequence
    numbers, whatever their clocks say. Of the same ports at another time each has its own."""
    there.empty()
    line = next(line for line in hosts[0].flat() if b'"upstream_closed"' in line)
    client = json.loads(line)
    number = client["finrace.request.sequence_number"]
    size = client["finrace.request.bytes"]
    sequence = 1000

    def pair(cause, port, request, unread, late=False, skew=0, signal=None, unread_bytes=size, **more):
        nonlocal sequence
        sequence += 1
        of_client = {"timestamp": f"{client['timestamp'][:20]}{sequence:09d}Z", "finrace.run": "c" * 16, "finrace.sequence": sequence, "network.local.port": port, "finrace.cause": cause,
                     "finrace.certainty": "likely", "finrace.request.sequence_number": request,
                     "finrace.connection.reused": True, "finrace.connection.idle_ms": 1000}
        of_server = {"host.name": "app-1", "finrace.run": "d" * 16, "finrace.sequence": sequence,
                     "timestamp": client["timestamp"][:17] + f"{(int(client['timestamp'][17:19]) + skew) % 60:02d}" + client["timestamp"][19:],
                     "finrace.side": "server", "finrace.cause": "closed_on_request", "finrace.certainty": "proven",
                     "network.local.address": client["network.peer.address"], "network.local.port": client["network.peer.port"],
                     "network.peer.address": client["network.local.address"], "network.peer.port": port,
                     "finrace.request.sequence_number": unread, "finrace.message": "It lay unread.",
                     "finrace.evidence.event": "segment_after_close" if late else "closed",
                     "finrace.evidence.unread_bytes": 0 if late else unread_bytes}
        if signal:
            of_server["finrace.evidence.exit_signal"] = signal
        of_server.update(more)
        there.insert([json.dumps({**client, **of_client}).encode(), json.dumps({**client, **of_server}).encode()])

    pair("upstream_closed", 5001, number, number, skew=20)                   # it lay unread: a race
    pair("upstream_reset", 5002, 4294967290, 4294967290)                    # the same, where numbers go around
    pair("keepalive_race", 5003, number, number, late=True)                 # what was likely is proven
    pair("upstream_closed", 5004, number, number, signal=9)                 # killed: the loss is what it was, and proven
    pair("upstream_closed", 5005, number, number + 1_000_000)               # another connection of these ports
    pair("response_cut", 5006, number, (number + size) % 2**32, **{"finrace.cause": "server_cut_response"})
    pair("upstream_closed", 5007, number, number, unread_bytes=size - 1)    # some had been read: no race is proven
    # Some had come before the close, so that its process may have begun to read: of a crossing that is no proof.
    pair("keepalive_race", 5008, number, number + 5, late=True, **{"finrace.certainty": "likely"})
    report = fleet_report(options, there.url)
    found = {(one["side"], one["cause"]): (one["verdicts"], one["certainty"], one.get("upstream_hosts", {})) for one in report["findings"]}
    due = {("client", "keepalive_race"): (4, {"proven": 3, "likely": 1}, {"app-1": 4}),
           ("client", "upstream_closed"): (3, {"proven": 1, "likely": 2}, {"app-1": 2}),
           ("client", "response_cut"): (1, {"likely": 1}, {"app-1": 1}),
           ("server", "closed_on_request"): (1, {"proven": 1}, {})}
    must(found == due, lambda: f"{found}\n          not {due}")
    # The most telling one is a race now, whatever its record said.
    done = subprocess.run([options.finrace, "diagnose", "--clickhouse", there.url], capture_output=True, text=True, timeout=LIMIT, check=False)
    said = " ".join(done.stdout.split())
    for words in ("keepalive_race (reset_unread) proven", "The upstream's own host tells of the same connections: app-1 (4)",
                  "app-1 says: It lay unread."):
        must(words in said, lambda words=words: f"no {words!r} in {done.stdout}")


def test_a_host_falls_silent(options, there, hosts):
    """The report names a host that stopped telling, and one that said that it ended, long ago, apart from that."""
    there.empty()
    health = [line for line in hosts[0].flat() if b'"finrace.health"' in line][-1]
    must(json.loads(health)["finrace.health.last"] is True, "the last record of a run does not say so")
    stamp = {minutes: time.strftime("%Y-%m-%dT%H:%M:%S.000000001Z", time.gmtime(time.time() - 60 * minutes)) for minutes in (0, 30)}
    for name, minutes, last in (("well", 0, False), ("ended", 30, True), ("silent", 30, False)):
        there.insert([changed(health, host__name=name, timestamp=stamp[minutes], finrace__health__last=last)])
    report = fleet_report(options, there.url)
    must(report["fleet"] == {"hosts": ["ended", "silent", "well"], "silent": ["silent"], "ended": ["ended"]}, f"{report['fleet']}")
    # All of them at once, as when nothing arrives any more; but one that tells once an hour has time.
    there.empty()
    for name, interval in (("gone", 10_000), ("rare", 3_600_000)):
        there.insert([changed(health, host__name=name, timestamp=stamp[30], finrace__health__last=False, finrace__health__interval_ms=interval)])
    report = report_of(options, "--clickhouse", there.url, status=(3,))
    must(report["fleet"] == {"hosts": ["gone", "rare"], "silent": ["gone"], "ended": []}, f"{report['fleet']}")


QUOTED = 'a"b\\c d'  # what curl's configuration quotes


def test_retention(options, there, hosts):
    """What is older than asked goes from every table, on both replicas; what is younger stays; a wrong number is refused."""
    there.empty()
    lines = hosts[0].flat("--connections")
    old = time.strftime("%Y-%m-%dT00:00:00.000000001Z", time.gmtime(time.time() - 86400 * 130))
    there.insert(lines)
    young = [there.count(table) for table in TABLES]
    there.insert([changed(line, timestamp=old, finrace__run="e" * 16) for line in lines])
    must(all(there.count(table) > count for table, count in zip(TABLES, young)), "not every table has old records")
    for server in there.servers[::2]:
        done = subprocess.run([RETENTION, server.url, "90"], capture_output=True, text=True, timeout=LIMIT, check=False)
        must(done.returncode == 0, lambda: f"{done.stdout} {done.stderr}")
    for number in (0, 1):
        wait_for(lambda number=number: [there.count(table, number) for table in TABLES] == young, 
                 lambda number=number: f"the old ones to be gone: {[there.count(table, number) for table in TABLES]}, not {young}")
    who = []

    class Asked(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            who.append(base64.b64decode(self.headers["Authorization"].removeprefix("Basic ")).decode())
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Asked) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        subprocess.run([RETENTION, f"http://127.0.0.1:{server.server_port}", "90"], timeout=LIMIT, check=True,
                       env={**os.environ, "CLICKHOUSE_USER": "keeper", "CLICKHOUSE_PASSWORD": QUOTED})
    must(who == ["keeper:" + QUOTED], f"asked by {who}")
    for words in (["0"], ["ten"], ["36500"], []):
        done = subprocess.run([RETENTION, there.url, *words], capture_output=True, text=True, timeout=LIMIT, check=False)
        must(done.returncode == 2 and done.stderr, f"{words} is not refused: {done}")


def test_ten_million_records(options, there, hosts):
    """Of a thousand proxies and a day. How long the report takes is told (scripts/bench), and judged by nobody."""
    there.empty()
    count = options.records
    for server in there.servers:
        server.patience = 15 * LIMIT
    begin = int(time.time()) // 3600 * 3600 - 23 * 3600
    started = time.monotonic()
    there.servers[0].query(f"""
        INSERT INTO finrace.records (timestamp, `event.name`, `host.name`, `finrace.run`, `finrace.sequence`, `network.type`,
            `network.local.address`, `network.local.port`, `network.peer.address`, `network.peer.port`, `finrace.side`,
            `finrace.cause`, `finrace.certainty`, `finrace.reason`, `finrace.message`, `finrace.connection.reused`,
            `finrace.request.bytes`, `finrace.request.sequence_number`, `finrace.incomplete`, `finrace.evidence.event`,
            `finrace.evidence.state`, `finrace.upstream.exchanges`, `finrace.upstream.connections.closed`,
            `finrace.upstream.idle_timeout_ms`, `finrace.upstream.spread_ms`, `finrace.upstream.samples`,
            `finrace.upstream.exposure.state`)
        SELECT concat(replaceOne(toString(toDateTime({begin} + intDiv(number * 82000, {count})), 'UTC'), ' ', 'T'), '.',
                      substring(toString(1000000000 + number % 1000000000), 2), 'Z'),
            multiIf(number % 10 = 0, 'finrace.verdict', number % 10 < 8, 'finrace.upstream', number % 10 = 8, 'finrace.health',
                    'finrace.connection'),
            concat('proxy-', toString(intHash32(number) % 1000)), 'aaaaaaaaaaaaaaaa', number, 'ipv4',
            concat('10.1.', toString(intHash32(number) % 250), '.1'), 10000 + number % 50000,
            concat('10.2.0.', toString(intHash64(number) % 20)), 8000, 'client',
            if(intHash32(number + 1) % 2 = 0, 'keepalive_race', 'connect_refused'), 'proven', 'idle_timer', 'They crossed.', 1, 176,
            intHash32(number + 7), 0, 'peer_fin', 'CLOSE_WAIT', 10 + number, 1 + intDiv(number, 100), 5000, 3, 20,
            if(intHash64(number) % 20 = 3, 'exposed', 'safe')
        FROM system.numbers LIMIT {count}""", insert_distributed_sync=1)
    loaded = time.monotonic() - started
    there.settle()
    due = {(row["cause"], row["address"]): row["n"] for row in there.servers[3].rows(
        "SELECT `finrace.cause` AS cause, `upstream.address` AS address, count() AS n FROM finrace.verdicts FINAL "
        "GROUP BY cause, address")}
    must(sum(due.values()) == count // 10, lambda: f"{sum(due.values())} verdicts of {count // 10}")
    started = time.monotonic()
    report = fleet_report(options, there.url)
    reported = time.monotonic() - started
    print(f"          {count} records loaded in {loaded:.0f} s, the report made in {reported:.1f} s")
    stored = sum(server.value("SELECT sum(bytes_on_disk) FROM system.parts WHERE active AND database = 'finrace'") for server in there.servers)
    if options.table:
        with open(options.table, "w", encoding="ascii") as file:
            json.dump({"records": count, "hosts": 1000, "loaded": loaded, "reported": reported,
                       "stored": stored / count, "kernel": os.uname().release}, file)
    found = {(one["cause"], one["upstream"]["address"]): one["verdicts"] for one in report["findings"]}
    must(found == due, lambda: f"{found}, not {due}")
    must(len(report["fleet"]["hosts"]) == 1000 and len(report["upstreams"]) == 20, "hosts or upstreams are missing")
    (exposed,) = [one for one in report["upstreams"] if one["state"] == "exposed"]
    must(exposed["address"] == "10.2.0.3", f"{exposed['address']} is exposed")


def test_a_single_server(options, hosts):
    """The same schema, by single-node.sed, without a cluster."""
    http, tcp = free_ports(2)
    with ClickHouse(os.path.join(options.folder, "single"), http, tcp) as server:
        server.make_tables()
        for host in hosts:
            server.query("INSERT INTO finrace.records FORMAT JSONEachRow", b"\n".join(host.flat()),
                         input_format_skip_unknown_fields=1)
        fleet = fleet_report(options, server.url)
        must(added_up([host.report() for host in hosts]) == added_up([fleet]), "the report is another one")


# Whose server leaves the request unread, is closed as it comes, or cuts its answer: ends of which its host tells too.
TOLD_BY_BOTH = "race_reset_unread,race_fin_lingering,race_reset_closed,cut_by_reset"


def test_two_hosts_and_one_connection(options):
    """Live: a proxy's finrace, by cgroup, and an upstream's, by trace, each blind for the other's end, and the lab between them. In the
    store each connection has one verdict, which the upstream's host has strengthened."""
    truth = os.path.join(options.folder, "truth")
    files = {name: os.path.join(options.folder, f"{name}.jsonl") for name in ("proxy-1", "app-1")}
    ports = random.randrange(10000, 19900)
    running = []
    try:
        # Of servers' ends backend cgroup knows nothing.
        for name, side, backend in (("proxy-1", "client", ["--backend", "cgroup"]), ("app-1", "server", options.backend_flags)):
            command = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', name, options.finrace, "run", "--flat",
                       "--output", files[name], "--side", side, *backend]
            running.append(subprocess.Popen(command, stderr=subprocess.PIPE, preexec_fn=harness.die_with_parent))
            harness.wait_said(running[-1], "finrace: ready")
        lab = [sys.executable, os.path.join(ROOT, "tools", "lab.py"), "--truth", truth, "--runs", "5", "--scenario", TOLD_BY_BOTH,
               "--parallel", "20", "--port-base", str(ports), "--delay-line", options.delay_line]
        done = subprocess.run(lab, capture_output=True, text=True, timeout=10 * LIMIT, check=False)
        must(done.returncode == 0, lambda: f"the lab failed: {done.stderr[-1000:]}")
        time.sleep(3)  # an end waits a second for its client's to show
    finally:
        for process in running:
            process.terminate()
            process.wait(STOP_LIMIT)
    with open(truth, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    # Of a run that slipped the lab closes the client's end at once, and anything may be said of it.
    slipped = {(row["client_address"], row["client_port"]) for row in rows if row.get("slipped")}
    rows = [row for row in rows if (row["expected"] or {}).get("cause")]
    lines = {}
    for name, path in files.items():
        client, server = ("peer", "local") if name == "app-1" else ("local", "peer")
        with open(path, "rb") as file:
            verdicts = [(line, json.loads(line)) for line in file.read().splitlines() if b'"finrace.verdict"' in line]
        lines[name] = [line for line, one in verdicts if ports <= one[f"network.{server}.port"] < ports + 100
                       and (one[f"network.{client}.address"], one[f"network.{client}.port"]) not in slipped]
    due = Counter(row["expected"]["cause"] for row in rows)
    said = Counter(json.loads(line)["finrace.cause"] for line in lines["proxy-1"])
    must(said == due, lambda: f"the proxy's host says {said}, not {due}")
    of_server = [json.loads(line) for line in lines["app-1"]]
    must(len(of_server) >= len(rows) * 3 // 4, lambda: f"the upstream's host tells of {len(of_server)} ends of {len(rows)}")
    must(all(one.get("finrace.request.sequence_number") for one in of_server), "an end without a number")
    weak = sum(1 for line in lines["proxy-1"] if json.loads(line)["finrace.cause"] == "keepalive_race"
               and json.loads(line)["finrace.certainty"] != "proven")
    http, tcp = free_ports(2)
    with ClickHouse(os.path.join(options.folder, "single"), http, tcp) as server:
        server.make_tables()
        for of_host in lines.values():
            server.query("INSERT INTO finrace.records FORMAT JSONEachRow", b"\n".join(of_host), input_format_skip_unknown_fields=1)
        report = fleet_report(options, server.url)
    found = {cause: sum(one["verdicts"] for one in report["findings"] if one["cause"] == cause and one["side"] == "client") for cause in due}
    must(found == due, lambda: f"together they say {found}, not {due}")
    alone = [one for one in report["findings"] if one["side"] == "server"]
    must(not alone, lambda: f"ends of which the proxy's host told as well: {[(one['cause'], one['verdicts']) for one in alone]}")
    joined = sum(sum(one.get("upstream_hosts", {}).values()) for one in report["findings"])
    must(joined == len(of_server), f"{joined} of {len(of_server)} ends met their other ends")
    closed = sum(1 for one in of_server if one["finrace.cause"] == "closed_on_request")
    proven = sum(one["certainty"].get("proven", 0) for one in report["findings"] if one["cause"] == "keepalive_race")
    must(proven >= closed > due["keepalive_race"] - weak, f"{proven} races are proven, {due['keepalive_race'] - weak} by one alone, "
         f"though {closed} servers had them unread")
    print(f"          {len(rows)} connections, of {len(of_server)} both ends; {weak} races were not proven by one alone, "
          f"{due['keepalive_race'] - proven} are not by both")


def test_it_says_what_is_wrong(options, there, hosts):
    """Each with exit 2, and what to do; never with a password in it."""
    def refused(*flags, **environment):
        done = subprocess.run([options.finrace, "diagnose", *flags], capture_output=True, text=True, timeout=LIMIT,
                              check=False, env={**os.environ, **environment})
        must(done.returncode == 2 and not done.stdout, lambda: f"{flags}: {done}")
        must("s3cret" not in done.stderr, f"it tells the password: {done.stderr}")
        return done.stderr

    address = there.url.removeprefix("http://")
    for flags, words in (
            (["--clickhouse", address], "accepted: http[s]://"),
            (["--clickhouse", "http://"], "names no host"),
            (["--clickhouse", "http://127.0.0.1:0"], "is no port"),
            (["--clickhouse", "ftp://user:s3cret@127.0.0.1"], "accepted: http[s]://"),
            (["--clickhouse", f"http://%4@{address}"], "%25"),
            (["--clickhouse", f"http://me:s3cret/x@{address}"], "%2F"),
            (["--clickhouse", f"http://me:12/s3cret@{address}"], "%2F"),
            (["--clickhouse", f"http://127.0.0.1:{free_ports(1)[0]}"], "8123"),
            (["--clickhouse", f"http://nobody:s3cret@{address}"], "nobody"),
            (["--clickhouse", f"https://{address}"], "no answer"),
            (["--clickhouse", there.url, "--process", "17"], "accepted: a name"),
            (["--clickhouse", there.url, "--since", "yesterday"], "yesterday"),
            (["--clickhouse", there.url, "--for", "10s"], "--for"),
            (["--clickhouse", there.url, hosts[0].recording], "--clickhouse"),
            (["--since", "2h"], "--clickhouse")):
        said = refused(*flags)
        must(words in said, f"{flags}: {said}")
    must("nobody" in refused("--clickhouse", f"http://nobody@{address}", CLICKHOUSE_PASSWORD="s3cret"), "the user is not named")
    there.servers[0].query("CREATE DATABASE IF NOT EXISTS elsewhere")
    there.empty()
    nothing = report_of(options, "--clickhouse", there.url, status=(3,))
    must(nothing["state"] == "inconclusive" and nothing["fleet"]["hosts"] == [], f"{nothing}")
    there.servers[0].query("RENAME TABLE finrace.verdicts TO finrace.away")
    try:
        must("schema.sql" in refused("--clickhouse", there.url), "it does not say where the tables are from")
    finally:
        there.servers[0].query("RENAME TABLE finrace.away TO finrace.verdicts")
    there.servers[0].query("ALTER TABLE finrace.upstream_hours DROP COLUMN `finrace.upstream.id`")
    try:
        must("another version's" in refused("--clickhouse", there.url), "it does not say that a column is missing")
    finally:
        there.servers[0].query("ALTER TABLE finrace.upstream_hours ADD COLUMN `finrace.upstream.id` String AFTER `finrace.upstream.other`")
    again = report_of(options, "--clickhouse", there.url, status=(3,))
    must((again["state"], again["fleet"]) == (nothing["state"], nothing["fleet"]), f"once the column is there again: {again}")


def parse():
    parser = harness.parser_of(__doc__)
    parser.add_argument("--delay-line", default=os.path.join(ROOT, "build", "delay-line"), help="program of the lab")
    parser.add_argument("--records", type=int, default=10 * MILLION, help="how many the largest load has (default %(default)s)")
    parser.add_argument("--table", metavar="FILE", help="write what that took there, as JSON")
    return parser.parse_args()


def test(options, results):
    need("curl", "curl")
    if options.backend == "trace":  # which tells of servers' ends; all else is alike by whatever means the kernel is watched
        results.run("two hosts and one connection", test_two_hosts_and_one_connection, options)
        return
    results.run("names are the records' own", test_names_are_the_records_own, options)
    with network() as net:
        listener = listen(net)
        hosts = [Host(options, net, name) for name in ("proxy-1", "proxy-2")]
        for host, (closed, stale, refused) in zip(hosts, ((3, 2, 4), (5, 3, 0))):
            host.watch(lambda: make_traffic(net, listener, closed, stale, refused))
        with cluster(os.path.join(options.folder, "cluster")) as there:
            for one in (test_the_report_equals_the_local_ones_added_up, test_the_same_lines_again_change_nothing,
                        test_a_replica_that_dies, test_what_came_before, test_a_host_that_was_started_again, test_masked_upstreams, test_filters, test_both_ends_of_a_connection,
                        test_a_host_falls_silent, test_retention, test_it_says_what_is_wrong, test_ten_million_records):
                results.run(one.__name__.removeprefix("test_").replace("_", " "), one, options, there, hosts)
        results.run("a single server", test_a_single_server, options, hosts)


if __name__ == "__main__":
    sys.exit(harness.main("fleet", parse, test))

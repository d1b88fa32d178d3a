#!/usr/bin/python3
"""Records of a real finrace through a real syslog-ng into a real ClickHouse, and through a real rsyslog into a file and a real
PostgreSQL, with the configurations that finrace ships.

What is due is what finrace's files hold, told apart by (host, run, sequence): each record must arrive, and count once, while
databases and collectors are killed, the file is rotated under them, and lines come that are no records.
"""

import glob
import gzip
import json
import os
import re
import signal
import sys
import threading
import time
from contextlib import contextmanager
from datetime import datetime, timedelta

sys.dont_write_bytecode = True
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(os.path.dirname(HERE), "live"))
sys.path.insert(0, HERE)
import harness  # noqa: E402
from clickhouse import ClickHouse, free_ports  # noqa: E402
from collectors import Rsyslog, SyslogNg, configured, rotate, rsyslog_files, syslog_ng_files  # noqa: E402
from harness import LIMIT, ROOT, Finrace, listen, must, network, wait_for, wall_time  # noqa: E402
from postgresql import PostgreSQL  # noqa: E402
from robustness import healthy, stale, unanswered  # noqa: E402

KEY = ("host.name", "finrace.run", "finrace.sequence")
STAMP = '"timestamp":"2026-01-02T03:04:05.123456789Z"'
# What is no record: of other bytes, torn, another thing, without a time, half a character.
NO_RECORDS = [b"garbage", b'{"timestamp":"2026-', b"[1,2]", b'{"event.name":"finrace.verdict","finrace.run":"0123456789abcdef"}',
              f'{{{STAMP},"event.name":"finrace.verdict","finrace.run":"0123456789abcdef","finrace.message":"\\ud800"}}'.encode(),
              b'{"timestamp":"\xff\xfe"}', b'{"a":"\x01"}']
# A record but for its types.
ILL_TYPED = f'{{{STAMP},"event.name":"finrace.verdict","host.name":"x","finrace.run":"0123456789abcdef","finrace.sequence":1,' \
            '"network.peer.port":"http"}'


class Lines:
    """finrace at work with --flat, its file, and connections and failures without end, until `finish`."""

    def __init__(self, options, net, name, output=None):
        self.folder = os.path.join(options.folder, name)
        os.makedirs(os.path.join(self.folder, "log"))
        self.path = os.path.join(self.folder, "log", "finrace.jsonl")
        self.net = net
        outputs = ["--output", output] if output else []
        self.finrace = Finrace(options, "--flat", "--connections", "--upstream", f"{net.prefix}0/24", *outputs, interval="200ms",
                               output=self.path)
        self.stopping = threading.Event()
        self.problem = None
        self.rounds = 0
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def work(self):
        try:
            listener = listen(self.net)
            while not self.stopping.is_set():
                healthy(self.net, listener, exchanges=2)
                unanswered(self.net, listener)
                stale(self.net, listener)
                self.rounds += 1
                time.sleep(0.02)
        except (OSError, AssertionError) as error:
            self.problem = error

    def some_more(self, rounds=10):
        """Once that much more has happened: what is between two steps of a test depends on no clock."""
        until = self.rounds + rounds
        wait_for(lambda: self.rounds >= until or self.problem, lambda: f"{rounds} rounds; there were {self.rounds}")
        must(self.problem is None, lambda: f"the connections failed: {self.problem}")

    def append(self, lines):
        with open(self.path, "ab") as file:
            file.write(b"".join(line + b"\n" for line in lines))

    def finish(self):
        """{key: (line, record)} of all that finrace has written; its numbers have no gap."""
        self.some_more()
        self.stopping.set()
        self.thread.join(LIMIT)
        self.finrace.stop()
        found = {}
        for path in glob.glob(self.path + "*"):
            with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
                for line in file.read().splitlines():
                    if line in NO_RECORDS or line.decode() == ILL_TYPED:
                        continue
                    record = json.loads(line)
                    must(not any(isinstance(value, dict) and value for value in record.values()), f"not flat: {line[:300]!r}")
                    key = tuple(record[name] for name in KEY)
                    must(key not in found, f"{key} is there twice")
                    found[key] = line.decode(), record
        numbers = sorted(sequence for _, _, sequence in found)
        must(numbers == list(range(1, len(numbers) + 1)), f"{len(numbers)} records, up to number {numbers[-1]}")
        kinds = {record["event.name"] for _, record in found.values()}
        must(kinds == {"finrace.verdict", "finrace.connection", "finrace.upstream", "finrace.health"}, f"{kinds}")
        return found

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stopping.set()
        self.thread.join(LIMIT)
        self.finrace.kill()


def missing(due, arrived):
    """What a wait may say."""
    gone = sorted(sequence for _, _, sequence in set(due) - arrived)
    return f"{len(due)} are due, {len(arrived & set(due))} have arrived; missing: {gone[:20]}; foreign: {sorted(arrived - set(due))[:5]}"


def nanoseconds(stamp):
    """Since 1970, exactly."""
    return int(wall_time(stamp[:19] + "Z")) * 10 ** 9 + int(stamp[20:29])


# ---- syslog-ng and ClickHouse --------------------------------------------------------------------------------------------


@contextmanager
def clickhouse(folder):
    """A single server with the schema that finrace ships, and a table beside it that counts each arrival."""
    http_port, tcp_port = free_ports(2)
    with ClickHouse(folder, http_port, tcp_port) as server:
        server.make_tables()
        server.query("CREATE TABLE finrace.arrived (host String, run String, sequence UInt64) ENGINE = MergeTree ORDER BY sequence")
        server.query("CREATE MATERIALIZED VIEW finrace.to_arrived TO finrace.arrived AS SELECT `host.name` AS host, `finrace.run` AS run, "
                     "`finrace.sequence` AS sequence FROM finrace.records")
        yield server


def syslog_ng(folder, path, server, more=None):
    os.makedirs(os.path.join(folder, "buffer"))
    daemon = SyslogNg(folder, configured("syslog-ng.conf", {
        '"/var/log/finrace/finrace.jsonl"': f'"{path}"',
        '"http://127.0.0.1:8123"': f'"{server.url}"',
        '"/var/lib/syslog-ng"': f'"{folder}/buffer"',
        '"/var/log/finrace-rejected.jsonl"': f'"{folder}/rejected.jsonl"',
        **(more or {}),
    }))
    daemon.check()
    return daemon


def arrived(server):
    """The ids, each once; none while nobody answers."""
    try:
        return {(row["host"], row["run"], row["sequence"]) for row in server.rows("SELECT DISTINCT host, run, sequence FROM finrace.arrived")}
    except OSError:
        return set()


def wait_all(server, due):
    last = set()

    def there():
        last.clear()
        last.update(arrived(server))
        return set(due) <= last

    wait_for(there, lambda: missing(due, last), pause=0.2)
    must(set(due) == last, lambda: missing(due, last))


def rows_of(server, table):
    """Every row of a table of records, each once, as a dict by its key."""
    rows = server.rows(f"SELECT * FROM finrace.{table} FINAL")
    found = {tuple(row[name] for name in KEY): row for row in rows}
    must(len(found) == len(rows), f"{table}: {len(rows)} rows of {len(found)} records")
    return found


def same(value, stored):
    """A line's value and what ClickHouse keeps of it: true is 1, and a fraction may differ in its last digit."""
    if isinstance(value, bool):
        return stored in (0, 1) and bool(stored) == value
    if isinstance(value, float):
        return isinstance(stored, (int, float)) and abs(stored - value) <= 1e-12 * abs(value)
    return stored == value and type(stored) is type(value)


def check_rows(server, due):
    """Each verdict and each connection is one row, with the values of its line: numbers are numbers, no digit is lost."""
    for table, kind in (("verdicts", "finrace.verdict"), ("connections", "finrace.connection")):
        wanted = {key: record for key, (_, record) in due.items() if record["event.name"] == kind}
        # A batch is in one table before it is in the next.
        wait_for(lambda: wanted.keys() <= rows_of(server, table).keys(), lambda: f"{table}: {missing(wanted, set(rows_of(server, table)))}")
        rows = rows_of(server, table)
        must(wanted.keys() == rows.keys(), lambda: f"{table}: {missing(wanted, set(rows))}")
        columns = {row["name"]: row["type"] for row in server.rows(
            f"SELECT name, type FROM system.columns WHERE database = 'finrace' AND table = '{table}'")}
        must(columns["network.peer.port"] == "UInt16" and columns["finrace.sequence"] == "UInt64", f"{columns}")
        for key, record in wanted.items():
            row = rows[key]
            for name, value in row.items():
                if name in record:
                    must(same(record[name], value), lambda: f"{table} {key} {name}: {record[name]!r} has become {value!r}")
                elif re.match(r"(network|finrace|process|peer|http|k8s|container)\.", name):
                    must(value in ("", None, 0, []), lambda: f"{table} {key} {name}: absent from the record, here {value!r}")
            if table == "verdicts":
                must(row["at_ns"] == nanoseconds(record["timestamp"]), f"{row['at_ns']} for {record['timestamp']}")
        must(len(wanted) > 20, f"{len(wanted)} rows of {table}")


def test_clickhouse(options):
    """ClickHouse dies and comes back, syslog-ng is killed with a full disk buffer, the file is rotated: all of it arrives."""
    with network() as net, Lines(options, net, "clickhouse") as lines, clickhouse(os.path.join(lines.folder, "server")) as server:
        with syslog_ng(os.path.join(lines.folder, "syslog-ng"), lines.path, server) as daemon:
            wait_for(lambda: len(arrived(server)) > 20, "the first records")
            lines.append(NO_RECORDS + [ILL_TYPED.encode()])

            server.kill()
            lines.some_more()
            wait_for(lambda: "connect to server" in daemon.words(), "syslog-ng to notice")
            rotate(lines.folder, lines.path, lines.finrace)
            with open(lines.path + ".1", "rb") as file:
                count = file.read().count(b"\n")
            wait_for(lambda: daemon.taken() > count, "syslog-ng to go on in the new file")
            daemon.kill()
            lines.some_more()
            daemon.start()
            waiting = [int(count) for count in re.findall(r"disk-buffer state loaded;.*number_of_messages='(\d+)'", daemon.words())]
            must(sum(waiting) > 0, lambda: f"the disk buffer was empty: {daemon.words()[-2000:]}")
            server.start()
            lines.some_more()
            rotate(lines.folder, lines.path, lines.finrace)
            lines.some_more()

            due = lines.finish()
            wait_all(server, due)
            daemon.stop()
            check_rows(server, due)
            with open(os.path.join(daemon.folder, "rejected.jsonl"), "rb") as file:
                rejected = file.read().splitlines()
            must(sorted(rejected) == sorted(NO_RECORDS), f"rejected: {rejected}")

            # A batch that came twice.
            again = "".join(line + "\n" for line, _ in due.values())
            before = server.value("SELECT count() FROM finrace.arrived")
            server.query("INSERT INTO finrace.records FORMAT JSONEachRow", again, input_format_skip_unknown_fields=1)
            must(server.value("SELECT count() FROM finrace.arrived") == before + len(due), "it did not come again")
            check_rows(server, due)


def test_clickhouse_missed_rotation(options):
    """What was rotated while syslog-ng was stopped, it never reads: sent by hand, as docs/pipelines.md says, it is there."""
    with network() as net, Lines(options, net, "missed") as lines, clickhouse(os.path.join(lines.folder, "server")) as server:
        with syslog_ng(os.path.join(lines.folder, "syslog-ng"), lines.path, server) as daemon:
            wait_for(lambda: len(arrived(server)) > 20, "the first records")
            daemon.stop()
            lines.some_more()
            rotate(lines.folder, lines.path, lines.finrace)
            lines.some_more()
            daemon.start()
            due = lines.finish()
            with open(lines.path, encoding="utf-8") as file:
                late = {key for line in file for key, (text, _) in due.items() if text + "\n" == line}
            wait_for(lambda: late <= arrived(server), lambda: missing(late, arrived(server)), pause=0.2)
            must(not set(due) <= arrived(server), "syslog-ng has read the old file: the documentation says otherwise")
            with open(lines.path + ".1", "rb") as file:
                server.query("INSERT INTO finrace.records FORMAT JSONEachRow", file.read(), input_format_skip_unknown_fields=1)
            wait_all(server, due)
            check_rows(server, due)


def test_clickhouse_refuses(options):
    """A server that answers, and not with 200, is waited for like one that is away: here it has no table."""
    with network() as net, Lines(options, net, "refusing") as lines, clickhouse(os.path.join(lines.folder, "server")) as server:
        server.query("RENAME TABLE finrace.records TO finrace.elsewhere")
        with syslog_ng(os.path.join(lines.folder, "syslog-ng"), lines.path, server) as daemon:
            # Oftener than the three times after which syslog-ng drops by default.
            wait_for(lambda: len(re.findall(r"action='disconnect'", daemon.words())) > 8, "syslog-ng to be refused")
            must(not arrived(server), "there is a table")
            server.query("RENAME TABLE finrace.elsewhere TO finrace.records")
            due = lines.finish()
            wait_all(server, due)
            check_rows(server, due)


def test_clickhouse_socket(options):
    """Without a file between them: finrace speaks to syslog-ng's socket; ClickHouse dies and comes back."""
    folder = os.path.join(options.folder, "socket-folder")
    os.makedirs(folder)
    with network() as net, clickhouse(os.path.join(folder, "server")) as server:
        path = os.path.join(folder, "log")
        file_source = 'file("`finrace_file`" follow-freq(1) flags(no-parse) log-msg-size(262144) log-iw-size(10000));'
        daemon = syslog_ng(os.path.join(folder, "syslog-ng"), "unused", server, {
            file_source: "", '#unix-dgram("/run/finrace/log"': f'unix-dgram("{path}"'})
        with daemon, Lines(options, net, "socket", f"syslog:{path}") as lines:
            wait_for(lambda: len(arrived(server)) > 20, "the first records")
            server.kill()
            lines.some_more()
            wait_for(lambda: "connect to server" in daemon.words(), "syslog-ng to notice")
            server.start()
            due = lines.finish()
            wait_all(server, due)
            check_rows(server, due)


# ---- rsyslog and PostgreSQL ----------------------------------------------------------------------------------------------


def database(server):
    server.query("CREATE DATABASE finrace", database="postgres")
    with open(os.path.join(ROOT, "packaging", "pipelines", "postgresql.sql"), encoding="utf-8") as file:
        schema = file.read()
    server.query(schema)
    server.query(schema)  # nothing is lost by it


def stored(server):
    """The ids in the table; its key lets none be there twice."""
    return {(host, run, int(sequence)) for host, run, sequence in (
        row.split("|") for row in server.query("SELECT host, run, sequence FROM finrace.records").splitlines())}


def check_table(server, due):
    """Each record is one row: the jsonb says what the line says, and the columns beside it have types."""
    rows = [json.loads(line) for line in server.query("SELECT to_jsonb(r) FROM finrace.records r").splitlines()]
    must(len(rows) == len(due), f"{len(rows)} rows of {len(due)} records")
    for row in rows:
        record = due[row["host"], row["run"], row["sequence"]][1]
        must(row["record"] == record, lambda: f"{record} has become {row['record']}")
        must(row["unix_nano"] == nanoseconds(record["timestamp"]), f"{row['unix_nano']} for {record['timestamp']}")
        # PostgreSQL's own times are rounded to a microsecond.
        must(abs(datetime.fromisoformat(row["time"]) - datetime.fromisoformat(record["timestamp"][:26] + "+00:00")) <= timedelta(microseconds=1),
             lambda: f"{row['time']} for {record['timestamp']}")
        for column, name in (("event", "event.name"), ("cause", "finrace.cause"), ("certainty", "finrace.certainty"), ("side", "finrace.side"),
                             ("peer_address", "network.peer.address"), ("peer_port", "network.peer.port"),
                             ("local_address", "network.local.address"), ("local_port", "network.local.port")):
            must(row[column] == record.get(name), f"{column}: {row[column]!r} for {record.get(name)!r}")
    types = server.query("SELECT column_name, data_type FROM information_schema.columns WHERE table_schema = 'finrace' AND table_name = 'records'")
    for expected in ("record|jsonb", "time|timestamp with time zone", "unix_nano|bigint", "peer_address|inet", "peer_port|integer"):
        must(expected in types.splitlines(), f"no {expected}: {types}")
    ended = server.query("SELECT count(*) FROM finrace.records WHERE peer_port BETWEEN 1 AND 65535 AND peer_address <<= '10.0.0.0/8'")
    must(int(ended) > 20, f"{ended} rows by port and network")


def test_postgresql(options):
    """PostgreSQL dies and comes back, rsyslog is started anew, the file is rotated: all of it arrives, in a file as well."""
    with network() as net, PostgreSQL() as server, Lines(options, net, "postgresql") as lines:
        database(server)
        folder = os.path.join(lines.folder, "rsyslog")
        daemon = Rsyslog(folder, configured("rsyslog.conf", {
            '"/var/log/finrace/finrace.jsonl"': f'"{lines.path}"',
            '"/var/log/finrace-copy.jsonl"': f'"{folder}/copy.jsonl"',
            '"/var/log/finrace-rejected.jsonl"': f'"{folder}/rejected.jsonl"',
            "host=/var/run/postgresql&user=finrace": f"host={server.folder}/cluster&user=postgres",
        }))
        daemon.check()
        with daemon:
            wait_for(lambda: len(stored(server)) > 20, "the first records")
            lines.append(NO_RECORDS + [ILL_TYPED.encode()])

            server.kill()
            lines.some_more(20)
            rotate(lines.folder, lines.path, lines.finrace)
            lines.some_more(20)
            must(daemon.alive(), "rsyslog has ended")
            server.start()
            last = len(stored(server))
            wait_for(lambda: len(stored(server)) > last, "records after PostgreSQL's return")
            daemon.stop()
            lines.some_more()
            daemon.start()
            lines.some_more()
            rotate(lines.folder, lines.path, lines.finrace)
            lines.some_more()

            due = lines.finish()
            wait_for(lambda: set(due) <= stored(server), lambda: missing(due, stored(server)), pause=0.2)
            daemon.stop()
        must(set(due) == stored(server), lambda: missing(due, stored(server)))
        check_table(server, due)

        with open(f"{folder}/copy.jsonl", encoding="utf-8") as file:
            copied = [line for line in file.read().splitlines() if '"finrace.sequence":' in line and line != ILL_TYPED]
        must(sorted(copied) == sorted(line for line, _ in due.values()), f"the copy has {len(copied)} lines of {len(due)} records")
        with open(f"{folder}/rejected.jsonl", "rb") as file:
            rejected = file.read().splitlines()
        refused = server.query("SELECT line FROM finrace.rejected").splitlines()
        must({b"garbage", b'{"timestamp":"2026-', b"[1,2]"} <= set(rejected) and ILL_TYPED in refused, f"{rejected}, {refused}")
        must(len(rejected) + len(refused) == len(NO_RECORDS) + 1, f"{rejected}, {refused}")

        # All of it a second time, as docs/pipelines.md does it.
        path = os.path.join(lines.folder, "again")
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line, _ in due.values())
        took = server.query(f"""CREATE TEMP TABLE lines (line text);
\\copy lines FROM '{path}' WITH (FORMAT csv, DELIMITER E'\\x01', QUOTE E'\\x02')
SELECT count(finrace.take(line)) FROM lines;""")
        must(int(took) == len(due), f"{took} came again")
        check_table(server, due)
        must(server.query("SELECT line FROM finrace.rejected").splitlines() == refused, "a record that came twice was rejected")


def test(options, results):
    syslog_ng_files()
    rsyslog_files()  # now: the tests' network has no way out
    results.run_each([test_clickhouse, test_clickhouse_refuses, test_clickhouse_missed_rotation, test_clickhouse_socket, test_postgresql], options)


def parse():
    return harness.parser_of(__doc__).parse_args()


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(harness.main("pipelines", parse, test))

"""ClickHouse servers of a test's own: each with a data folder, a configuration written here and ports on loopback.

A server listens in the network namespace of the thread that starts it, so tests with a network of their own may take any ports.
A cluster is what every server of it is told: {name: [[(host, tcp_port), ...replicas], ...shards]}; `shards` makes one of servers.
Nothing but processes that were started here is ever ended.
"""

import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import urllib.parse
from contextlib import suppress
from xml.sax.saxutils import escape

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "live"))
from harness import LIMIT, ROOT, Wrong, die_with_parent, must, need, wait_for  # noqa: E402

SCHEMA = os.path.join(ROOT, "packaging", "clickhouse", "schema.sql")
SINGLE_NODE = os.path.join(ROOT, "packaging", "clickhouse", "single-node.sed")
HOST = "127.0.0.1"
USERS = """<yandex>
<profiles><default><max_memory_usage>2000000000</max_memory_usage></default></profiles>
<users><default><password></password><networks><ip>127.0.0.1</ip><ip>::1</ip></networks>
<profile>default</profile><quota>default</quota></default></users>
<quotas><default><interval><duration>3600</duration><queries>0</queries><errors>0</errors><result_rows>0</result_rows>
<read_rows>0</read_rows><execution_time>0</execution_time></interval></default></quotas>
</yandex>
"""


def free_ports(count):
    """As many TCP ports that nobody listens on now, in this thread's network namespace; nor takes for a client's, as those that a
    kernel chooses (net.ipv4.ip_local_port_range) may be before a server does."""
    found = []
    while len(found) < count:
        port = random.randrange(20000, 32000)
        with suppress(OSError), socket.socket() as one:
            one.bind((HOST, port))
            if port not in found:
                found.append(port)
    return found


def shards(ports, replicas=1):
    """The shards of a cluster whose servers have these TCP ports, one after the other `replicas` to a shard."""
    return [[(HOST, port) for port in ports[at:at + replicas]] for at in range(0, len(ports), replicas)]


def cluster_xml(clusters, internal_replication):
    text = ""
    for name, parts in clusters.items():
        text += f"<{name}>"
        for replicas in parts:
            text += f"<shard><internal_replication>{'true' if internal_replication else 'false'}</internal_replication>"
            text += "".join(f"<replica><host>{escape(host)}</host><port>{port}</port></replica>" for host, port in replicas)
            text += "</shard>"
        text += f"</{name}>"
    return f"<remote_servers>{text}</remote_servers>" if clusters else ""


class QueryFailed(Wrong):
    """The server refused a statement; `status` is HTTP's."""

    def __init__(self, status, text):
        super().__init__(f"ClickHouse says {status}: {text.strip()[:2000]}")
        self.status = status


class ClickHouse:
    """A clickhouse-server process; `with ClickHouse(...) as server` starts it, waits until it answers, and kills it at the end."""

    def __init__(self, folder, http_port, tcp_port, cluster=None, interserver_port=None, zookeeper=None, macros=None,
                 internal_replication=False):
        """`folder` is made and holds all that the server writes; the same one again finds its data. `cluster` as above.
        `zookeeper`: [(host, port), ...]; `macros`: {name: value}, for replicated tables; these need `interserver_port`."""
        self.folder, self.http_port, self.tcp_port = os.path.abspath(folder), http_port, tcp_port
        self.program = need("clickhouse-server", "clickhouse-server")
        self.process = None
        self.patience = LIMIT  # seconds, for an answer
        os.makedirs(self.folder, exist_ok=True)
        self.log = os.path.join(self.folder, "server.log")
        more = cluster_xml(cluster or {}, internal_replication)
        if interserver_port is not None:
            more += f"<interserver_http_port>{interserver_port}</interserver_http_port><interserver_http_host>{HOST}</interserver_http_host>"
        if zookeeper:
            nodes = "".join(f"<node><host>{escape(host)}</host><port>{port}</port></node>" for host, port in zookeeper)
            more += f"<zookeeper>{nodes}<session_timeout_ms>4000</session_timeout_ms></zookeeper><distributed_ddl><path>/clickhouse/task_queue/ddl</path></distributed_ddl>"
        if macros:
            more += "<macros>" + "".join(f"<{name}>{escape(str(value))}</{name}>" for name, value in macros.items()) + "</macros>"
        self.write("users.xml", USERS)
        self.write("config.xml", f"""<yandex>
<logger><level>information</level><log>{self.log}</log><errorlog>{self.folder}/error.log</errorlog></logger>
<http_port>{http_port}</http_port><tcp_port>{tcp_port}</tcp_port><listen_host>{HOST}</listen_host>
<path>{self.folder}/data/</path><tmp_path>{self.folder}/tmp/</tmp_path><user_files_path>{self.folder}/user_files/</user_files_path>
<users_config>users.xml</users_config><default_profile>default</default_profile><default_database>default</default_database>
<timezone>UTC</timezone><mark_cache_size>67108864</mark_cache_size><keep_alive_timeout>10</keep_alive_timeout>{more}
</yandex>
""")

    def write(self, name, text):
        with open(os.path.join(self.folder, name), "w", encoding="utf-8") as file:
            file.write(text)

    @property
    def url(self):
        return f"http://{HOST}:{self.http_port}"

    def start(self):
        """Returns once it answers; raises Wrong with the end of its log if it does not come up."""
        must(not self.alive(), "ClickHouse runs already")
        self.begin()
        return self.wait_ready()

    def begin(self):
        """Starts it and does not wait: several servers come up at once."""
        with open(os.path.join(self.folder, "output"), "ab") as output:
            self.process = subprocess.Popen([self.program, f"--config-file={self.folder}/config.xml"], stdin=subprocess.DEVNULL,
                                            stdout=output, stderr=output, preexec_fn=die_with_parent, cwd=self.folder)

    def wait_ready(self):
        def answers():
            must(self.process.poll() is None, lambda: f"clickhouse-server ended with {self.process.returncode}: {self.words()}")
            try:
                return self.request("/ping") == "Ok.\n"
            except (OSError, http.client.HTTPException):
                return False

        wait_for(answers, lambda: f"ClickHouse to answer: {self.words()}")
        return self

    def words(self):
        """The end of what it said."""
        said = b""
        for name in ("output", "error.log"):
            with suppress(OSError), open(os.path.join(self.folder, name), "rb") as file:
                said += file.read()[-1500:]
        return said.decode("utf-8", "replace")

    def alive(self):
        return self.process is not None and self.process.poll() is None

    def kill(self):
        """As by a crash: at once, with nothing put away."""
        if self.alive():
            self.process.kill()
            self.process.wait(LIMIT)

    def stop(self):
        """As by an administrator. Asserts that it was alive."""
        must(self.alive(), lambda: f"ClickHouse had ended: {self.words()}")
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(LIMIT)

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.kill()

    def request(self, path, body=None):
        connection = http.client.HTTPConnection(HOST, self.http_port, timeout=self.patience)
        try:
            connection.request("POST" if body is not None else "GET", path, body)
            response = connection.getresponse()
            text = response.read().decode("utf-8", "replace")
        finally:
            connection.close()
        if response.status != 200:
            raise QueryFailed(response.status, text)
        return text

    def query(self, sql, data=None, **settings):
        """What the server answers, text. `data`: bytes or text that an INSERT takes, sql being in the URL then. `settings`: of the
        query, as ClickHouse names them. Raises QueryFailed, or OSError where nobody answers."""
        if data is None:
            return self.request("/?" + urllib.parse.urlencode(settings), sql.encode())
        body = data.encode() if isinstance(data, str) else data
        return self.request("/?" + urllib.parse.urlencode({**settings, "query": sql}), body)

    def script(self, text):
        """Each statement of a file like schema.sql, whose statements end with ';' at a line's end."""
        lines = [line for line in text.splitlines() if not line.lstrip().startswith("--")]
        for statement in "\n".join(lines).split(";\n"):
            if statement.strip(" \n;"):
                self.query(statement.strip().rstrip(";"))

    def make_tables(self):
        """Those of schema.sql, as an administrator of a single server makes them: through single-node.sed."""
        done = subprocess.run(["sed", "-f", SINGLE_NODE, SCHEMA], capture_output=True, text=True, timeout=LIMIT, check=True)
        must("_local" not in done.stdout and "Replicated" not in done.stdout, "something of a cluster is left")
        self.script(done.stdout)

    def rows(self, sql):
        """A SELECT's rows, a dict each: 64-bit integers are numbers, not text."""
        answer = self.query(f"{sql} FORMAT JSONEachRow", output_format_json_quote_64bit_integers=0)
        return [json.loads(line) for line in answer.splitlines()]

    def value(self, sql):
        """Of a SELECT of one row and one column."""
        (row,) = self.rows(sql)
        (found,) = row.values()
        return found


class ZooKeeper:
    """Debian's ZooKeeper, a single server on loopback, for replicated tables; `with ZooKeeper(...)` starts it and ends it."""

    def __init__(self, folder, port):
        self.folder, self.port = os.path.abspath(folder), port
        self.program = need("/usr/share/zookeeper/bin/zkServer.sh", "zookeeper")
        self.process = None
        os.makedirs(self.folder, exist_ok=True)
        with open(os.path.join(self.folder, "zoo.cfg"), "w", encoding="utf-8") as file:
            file.write(f"tickTime=2000\ndataDir={self.folder}/data\nclientPort={port}\nclientPortAddress={HOST}\n"
                       "admin.enableServer=false\nmaxClientCnxns=0\n")

    def __enter__(self):
        with open(os.path.join(self.folder, "output"), "ab") as output:
            self.process = subprocess.Popen([self.program, "start-foreground", os.path.join(self.folder, "zoo.cfg")],
                                            stdin=subprocess.DEVNULL, stdout=output, stderr=output, preexec_fn=die_with_parent,
                                            env={**os.environ, "JMXDISABLE": "true"})

        def answers():
            must(self.process.poll() is None, lambda: f"ZooKeeper ended with {self.process.returncode}")
            # It listens before it serves, and may leave a question unanswered then.
            with suppress(OSError), socket.create_connection((HOST, self.port), 1) as asked:
                asked.sendall(b"srvr")
                return b"Mode: standalone" in asked.makefile("rb").read()
            return False

        wait_for(answers, "ZooKeeper to answer")
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait(LIMIT)

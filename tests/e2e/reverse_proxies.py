"""Nine real reverse proxies in front of one upstream, or of several: their configurations, and how their logs are read.

Each keeps its connections to the upstream open and uses them again, passes X-Request-Id on, waits `patience` seconds for an
answer, and logs for each request the status that its client got and, where it has words for it, why.
"""

import json
import os
import re
from dataclasses import dataclass, field

NGINX = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/nginx.err info; user root;
events {{ worker_connections {connections}; }}
http {{
    log_format exchange escape=json '{{"id":"$http_x_request_id","time":$msec,"status":$status,"connection":"$connection",'
        '"upstream":"$upstream_addr","upstream_status":"$upstream_status"}}';
    access_log {folder}/access.log exchange;
    client_max_body_size 0; client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
    uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
    upstream pool {{ {servers} keepalive 64; keepalive_timeout 1h; keepalive_requests 100000; }}
    server {{
        listen {address}:{port} backlog=1024;
        location / {{
            proxy_pass http://pool; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_read_timeout {patience}s;
            proxy_connect_timeout {connect}s; proxy_send_timeout {patience}s;
        }}
    }}
}}
"""
HAPROXY = """
global
    nbthread 2
defaults
    mode http
    timeout connect {connect}s
    timeout client 60s
    timeout server {patience}s
    option abortonclose
    log stdout format raw local0
frontend clients
    bind {address}:{port}
    http-request capture req.hdr(X-Request-Id) len 64
    log-format '{{"id":"%[capture.req.hdr(0)]","time":%Ts.%ms,"status":%ST,"state":"%ts","port":"%bp","retries":"%rc"}}'
    default_backend pool
backend pool
    http-reuse always
    {servers}
"""
APACHE = """
ServerRoot /etc/apache2
ServerName proxy
PidFile {folder}/apache.pid
DefaultRuntimeDir {folder}
ErrorLog {folder}/apache.err
ErrorLogFormat "[%{{u}}t] [%l] [%{{X-Request-Id}}i] %M"
LogLevel info
Listen {address}:{port}
LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
LoadModule proxy_module /usr/lib/apache2/modules/mod_proxy.so
LoadModule proxy_http_module /usr/lib/apache2/modules/mod_proxy_http.so
LogFormat "{{\\"id\\":\\"%{{X-Request-Id}}i\\",\\"time\\":%{{sec}}t,\\"status\\":%>s,\\"state\\":\\"%X\\"}}" exchange
CustomLog {folder}/access.log exchange
User www-data
Group www-data
StartServers 1
ServerLimit 1
ThreadsPerChild 64
MaxRequestWorkers 64
ProxyPass / http://{upstream_address}:{upstream}/ timeout={patience} connectiontimeout={connect} retry=0
"""
LIGHTTPD = """
server.modules = ("mod_proxy", "mod_accesslog")
server.bind = "{address}"
server.port = {port}
server.document-root = "/var/empty"
server.errorlog = "{folder}/lighttpd.err"
accesslog.filename = "{folder}/access.log"
accesslog.format = "{{\\"id\\":\\"%{{X-Request-Id}}i\\",\\"time\\":%{{sec}}t,\\"status\\":%s,\\"state\\":\\"%X\\"}}"
accesslog.escaping = "json"
proxy.server = ("" => (("host" => "{upstream_address}", "port" => {upstream}, "read-timeout" => {patience},
                        "connect-timeout" => {connect}, "disable-time" => 0)))
"""
VARNISH = """
vcl 4.1;
backend pool {{
    .host = "{upstream_address}"; .port = "{upstream}"; .first_byte_timeout = {patience}s; .connect_timeout = {connect}s;
    .between_bytes_timeout = {patience}s;
}}
sub vcl_recv {{ return (pass); }}
"""
CADDY = """
{{
    admin off
    auto_https off
    log {{
        output file {folder}/access.log
        format json
        level debug
    }}
}}
http://:{port} {{
    bind {address}
    log
    reverse_proxy {upstream_address}:{upstream} {{
        transport http {{
            response_header_timeout {patience}s
            dial_timeout {connect}s
            keepalive 1h
            keepalive_idle_conns_per_host 64
        }}
    }}
}}
"""
NODE = """
const fs = require('fs');
const http = require('http');
const agent = new http.Agent({{ keepAlive: true, maxFreeSockets: 256 }});
http.createServer((request, response) => {{
    const headers = {{ ...request.headers }};
    delete headers.connection;
    let why = '';
    const up = http.request({{ host: '{upstream_address}', port: {upstream}, path: request.url, method: request.method,
                              headers, agent, timeout: {patience} * 1000 }}, (answer) => {{
        response.writeHead(answer.statusCode, answer.headers);
        answer.on('error', (error) => {{ why = 'cut ' + error.code; response.destroy(); }});
        answer.pipe(response);
    }});
    let late = false;
    up.on('timeout', () => {{ late = true; up.destroy(); }});
    up.on('error', (error) => {{
        why = why || (late ? 'timeout' : error.code + ' ' + (error.syscall || '') + ' ' + error.message);
        if (response.headersSent) response.destroy();
        else if (!response.destroyed) {{ response.writeHead(late ? 504 : 502); response.end('failed'); }}
    }});
    response.on('close', () => {{
        if (!response.writableEnded) {{ why = why || 'client'; up.destroy(); }}
        fs.appendFileSync('{folder}/access.log', JSON.stringify({{ id: request.headers['x-request-id'] || '',
            time: Date.now() / 1000, status: response.headersSent ? response.statusCode : 0, state: why }}) + '\\n');
    }});
    request.pipe(up);
}}).listen({port}, '{address}');
"""
SQUID = """
http_port {address}:{port} accel defaultsite=lab no-vhost
cache_peer {upstream_address} parent {upstream} 0 no-query no-digest originserver name=pool connect-timeout={connect} \\
    connect-fail-limit=1000000
http_access allow all
cache deny all
never_direct allow all
server_persistent_connections on
pconn_timeout 1 hour
server_pconn_for_nonretriable allow all
read_timeout {patience} seconds
request_timeout 60 seconds
half_closed_clients off
quick_abort_min 0 KB
quick_abort_max 0 KB
negative_ttl 0 seconds
pinger_enable off
visible_hostname lab
pid_filename {folder}/squid.pid
coredump_dir {folder}
cache_log {folder}/cache.log
logformat exchange {{"id":"%{{X-Request-Id}}>h","time":%ts.%03tu,"status":%>Hs,"state":"%Ss %err_code %err_detail"}}
access_log stdio:{folder}/access.log exchange
shutdown_lifetime 1 seconds
memory_cache_shared off
cache_mem 0
"""
TRAFFICSERVER = """
CONFIG proxy.config.http.server_ports STRING {port}:ip-in={address}
CONFIG proxy.config.reverse_proxy.enabled INT 1
CONFIG proxy.config.url_remap.remap_required INT 1
CONFIG proxy.config.http.cache.http INT 0
CONFIG proxy.config.exec_thread.autoconfig INT 0
CONFIG proxy.config.exec_thread.limit INT 2
CONFIG proxy.config.http.server_session_sharing.match STRING ip
CONFIG proxy.config.http.server_session_sharing.pool STRING global
CONFIG proxy.config.http.keep_alive_no_activity_timeout_out INT 3600
CONFIG proxy.config.http.transaction_no_activity_timeout_out INT {patience}
CONFIG proxy.config.http.connect_attempts_timeout INT {connect}
CONFIG proxy.config.http.post_connect_attempts_timeout INT {connect}
CONFIG proxy.config.http.connect_attempts_max_retries INT 1
CONFIG proxy.config.http.down_server.cache_time INT 0
CONFIG proxy.config.http.wait_for_cache INT 0
CONFIG proxy.config.admin.user_id STRING www-data
CONFIG proxy.config.log.logging_enabled INT 3
CONFIG proxy.config.log.max_secs_per_buffer INT 1
CONFIG proxy.config.log.periodic_tasks_interval INT 1
CONFIG proxy.config.diags.output.error STRING E
CONFIG proxy.config.diags.show_location INT 0
"""
TRAFFICSERVER_LOGGING = """
logging:
  formats:
    - name: exchange
      format: '{{"id":"%<{{X-Request-Id}}cqh>","time":%<cqtq>,"status":%<pssc>,"state":"%<crc> %<cfsc>"}}'
  logs:
    - filename: access
      format: exchange
      mode: ascii
"""
TRAFFICSERVER_CLIENTS = """
ip_allow:
  - apply: in
    ip_addrs: 0/0
    action: allow
    methods: ALL
"""
TRAFFICSERVER_ROOT = """
prefix: /usr
exec_prefix: /usr
bindir: /usr/bin
sbindir: /usr/sbin
libexecdir: /usr/lib/trafficserver/modules
sysconfdir: {folder}
datadir: {folder}
localstatedir: {folder}
runtimedir: {folder}
logdir: {folder}
cachedir: {folder}
"""


@dataclass
class Said:
    """What a proxy's log says of a request. `what` is of WHATS."""

    time: float
    status: int  # what its client got by it; 0: nothing, or not said
    what: str
    text: str


# ok: answered; upstream: it closed, reset or cut the exchange; timeout: no answer in time; refused, no_connect: the opening
# failed; client: the client left; benched: no upstream is left to try, after failures before; connections: its own are used
# up; queue: waited for a connection in vain; other: an error without a reason that is known here.
WHATS = ("ok", "upstream", "timeout", "refused", "no_connect", "client", "benched", "connections", "queue", "other")


def _json_lines(folder, name):
    try:
        with open(os.path.join(folder, name), "rb") as file:
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return
    for line in lines:
        if line.startswith(b"{"):
            try:
                yield json.loads(line)
            except ValueError:
                continue


def _text_lines(folder, name):
    try:
        with open(os.path.join(folder, name), encoding="utf-8", errors="replace") as file:
            return file.read().splitlines()
    except FileNotFoundError:
        return []


def _first(text, rules, otherwise):
    return next((what for pattern, what in rules if re.search(pattern, text)), otherwise)


NGINX_SAYS = (
    (r"no live upstreams", "benched"),
    (r"worker_connections are not enough", "connections"),
    (r"\(111: Connection refused\) while connecting", "refused"),
    (r"\(110: Connection timed out\) while connecting|\(113: |\(101: |\(99: ", "no_connect"),
    (r"\(110: Connection timed out\)", "timeout"),
    (r"client prematurely closed|client .*closed connection while|\(104.*while sending to client", "client"),
    (r"upstream prematurely closed|upstream closed|\(104: |\(32: Broken pipe\)|upstream sent", "upstream"),
)


def nginx_log(folder):
    said, ids = [], {}
    for line in _json_lines(folder, "access.log"):
        ids[line["connection"]] = line["id"]
        what = "client" if line["status"] == 499 else "ok" if line["status"] < 500 else "other"
        said.append((line["id"], Said(line["time"], line["status"], what, f"{line['status']} {line['upstream_status']}")))
    for line in _text_lines(folder, "nginx.err"):
        found = re.match(r"\S+ \S+ \[(\w+)\] \d+#\d+: (?:\*(\d+) )?(.*)", line)
        if not found:
            continue
        what = _first(found[3], NGINX_SAYS, None)
        if what:
            said.append((ids.get(found[2], ""), Said(0, 0, what, found[3][:160])))
    return said


HAPROXY_SAYS = ((r"^[sS]C", "no_connect"), (r"^sH|^sD", "timeout"), (r"^S[HD]", "upstream"), (r"^C|^c", "client"),
                (r"^sQ|^PC|^RC", "queue"), (r"^--", "ok"))


def haproxy_log(folder):
    for line in _json_lines(folder, "output"):
        what = _first(line["state"], HAPROXY_SAYS, "other")
        if line["state"].startswith("SC"):
            what = "refused"
        yield line["id"], Said(float(line["time"]), max(0, line["status"]), what, f"{line['state']} {line['status']}")


APACHE_SAYS = (
    (r"Connection refused", "refused"),
    (r"AH00957|attempt to connect", "no_connect"),
    (r"timeout specified has expired|AH01110.*70007", "timeout"),
    (r"AH01102|AH01110|AH01097|AH01084|AH01095|reading response|error reading", "upstream"),
)


def apache_log(folder):
    for line in _json_lines(folder, "access.log"):
        what = "ok" if line["status"] < 500 else "other"
        if what == "ok" and line["state"] == "X":
            what = "client"
        yield line["id"], Said(line["time"], line["status"], what, f"{line['status']} {line['state']}")
    for line in _text_lines(folder, "apache.err"):
        found = re.match(r"\[.*?\] \[(\w+)\] \[(.*?)\] (.*)", line)
        if found and found[1] == "error":
            what = _first(found[3], APACHE_SAYS, None)
            if what:
                yield found[2].strip("-"), Said(0, 0, what, found[3][:160])


def lighttpd_log(folder):
    for line in _json_lines(folder, "access.log"):
        # 503: the upstream is disabled for a second after a connect that failed; what fails by itself gets 500.
        what = {500: "upstream", 503: "benched", 504: "timeout"}.get(line["status"], "ok")
        yield line["id"], Said(line["time"], line["status"], what, f"{line['status']} {line['state']}")


VARNISH_SAYS = (
    (r"first byte timeout|between bytes timeout", "timeout"),
    (r"backend pool: fail errno 111", "refused"),
    (r"fail errno 0", "benched"),  # held down for a moment after a connect that failed
    (r"fail errno", "no_connect"),
    (r"http first read error|HTC|[Bb]ackend closed|http read error|straight|eof|write error|backend write", "upstream"),
)


def varnish_log(folder):
    for line in _text_lines(folder, "varnishncsa"):
        parts = line.split("|", 4)
        if len(parts) == 5:
            side, name, when, status, errors = parts
            number = int(status) if status.isdigit() else 0
            what = _first(errors, VARNISH_SAYS, "other" if number >= 500 else "ok")
            yield name, Said(float(when or 0), number if side == "c" else 0, what, f"{side} {status} {errors}")


CADDY_SAYS = (
    (r"connection refused", "refused"),
    (r"dial tcp.*timeout", "no_connect"),
    (r"timeout awaiting response headers", "timeout"),
    (r"context canceled", "client"),
    (r"EOF|connection reset|server closed idle|broken pipe|unexpected", "upstream"),
)


def caddy_log(folder):
    for line in _json_lines(folder, "access.log"):
        name = next(iter(line.get("request", {}).get("headers", {}).get("X-Request-Id", [])), "")
        if not name:
            continue
        if line.get("logger", "").startswith("http.log.access"):
            status = int(line.get("status", 0))
            what = "client" if status in (0, 499) else "ok" if status < 500 else "other"
            yield name, Said(line["ts"], status, what, f"access {status}")
        elif line.get("error") or line.get("level") in ("error", "warn"):
            text = f"{line.get('msg')} {line.get('error', '')}"
            yield name, Said(line["ts"], 0, _first(text, CADDY_SAYS, "other"), text)


NODE_SAYS = (
    (r"ECONNREFUSED", "refused"), (r"^timeout", "timeout"), (r"^client", "client"), (r"ETIMEDOUT|EHOSTUNREACH", "no_connect"),
    (r"ECONNRESET|EPIPE|cut|HPE", "upstream"), (r"^$", "ok"),
)


def node_log(folder):
    for line in _json_lines(folder, "access.log"):
        yield line["id"], Said(line["time"], line["status"], _first(line["state"], NODE_SAYS, "other"),
                               f"{line['status']} {line['state']}")


SQUID_SAYS = (
    (r"ERR_READ_TIMEOUT", "timeout"),
    (r"ERR_CONNECT_FAIL.*errno=111|ERR_CONNECT_FAIL 111|CONNECT_FAIL", "refused"),
    (r"ERR_ZERO_SIZE_OBJECT|ERR_READ_ERROR|ERR_WRITE_ERROR", "upstream"),
    (r"ABORTED", "client"),
    (r"ERR_CANNOT_FORWARD", "benched"),
)


def squid_log(folder):
    for line in _json_lines(folder, "access.log"):
        what = _first(line["state"], SQUID_SAYS, "ok" if line["status"] < 500 else "other")
        yield line["id"], Said(line["time"], line["status"], what, f"{line['status']} {line['state']}")


TRAFFICSERVER_SAYS = (
    (r"ERR_CLIENT_ABORT|ERR_CLIENT_READ_ERROR|INTR", "client"),
    (r"ERR_READ_TIMEOUT|INACTIVE_TIMEOUT|ACTIVE_TIMEOUT", "timeout"),
    (r"Connection refused", "refused"),
    (r"CONNECTION_ERROR.*Connection timed out", "no_connect"),
    (r"BAD_INCOMING_RESPONSE|CONNECTION_CLOSED|PARSE_ERROR|CONNECTION_ERROR", "upstream"),
)


def trafficserver_log(folder):
    for line in _json_lines(folder, "access.log"):
        what = _first(line["state"], TRAFFICSERVER_SAYS, "ok" if line["status"] < 500 else "other")
        yield line["id"], Said(line["time"], line["status"], what, f"{line['status']} {line['state']}")
    for line in _text_lines(folder, "error.log"):
        found = re.search(r"attempt fail .*url='[^']*/([^/']+)'", line)
        if found:
            yield found[1], Said(0, 0, _first(line, TRAFFICSERVER_SAYS, "other"), line.partition("CONNECT: ")[2][:120])


@dataclass
class Kind:
    package: str
    program: str
    configuration: str
    arguments: list
    environment: dict = field(default_factory=dict)
    files: dict = field(default_factory=dict)  # of its folder, beside the configuration
    configuration_name: str = "configuration"
    companion: list = field(default_factory=list)  # a program that writes its log
    read_log: object = None
    reuses: bool = True  # keeps connections to the upstream
    disconnects: bool = False  # gives up a connect by shutdown(), which disconnects (tcp_disconnect())
    calls_off: bool = False  # closes a socket that is still connecting once its request has found another connection
    server: str = ""  # one upstream server, where the configuration can take several


KINDS = {
    "nginx": Kind("nginx-light", "nginx", NGINX, ["-e", "{folder}/start.err", "-c", "{file}"], read_log=nginx_log,
                  server="server {address}:{port} {benching};"),
    "haproxy": Kind("haproxy", "haproxy", HAPROXY, ["-db", "-f", "{file}"], read_log=haproxy_log, disconnects=True,
                    server="server s{number} {address}:{port} pool-purge-delay 1h"),
    "apache": Kind("apache2", "apache2", APACHE, ["-DFOREGROUND", "-f", "{file}"], read_log=apache_log),
    "lighttpd": Kind("lighttpd", "lighttpd", LIGHTTPD, ["-D", "-f", "{file}"], read_log=lighttpd_log, reuses=False),
    "varnish": Kind("varnish", "varnishd", VARNISH,
                    ["-F", "-j", "none", "-n", "{folder}/varnish", "-a", "{address}:{port}", "-f", "{file}",
                     "-p", "backend_idle_timeout=3600", "-p", "thread_pool_min=64"],
                    read_log=varnish_log,
                    companion=["varnishncsa", "-n", "{folder}/varnish", "-t", "30", "-c", "-b", "-w", "{folder}/varnishncsa",
                               "-F", "%{{Varnish:side}}x|%{{X-Request-Id}}i|%{{%s}}t|%s|%{{VSL:FetchError}}x"]),
    "caddy": Kind("caddy", "caddy", CADDY, ["run", "--config", "{file}", "--adapter", "caddyfile"], {"HOME": "{folder}"},
                  read_log=caddy_log, calls_off=True),
    "node": Kind("nodejs", "node", NODE, ["{file}"], read_log=node_log),
    "squid": Kind("squid", "squid", SQUID, ["-N", "-n", "lab{port}", "-f", "{file}"], read_log=squid_log),
    "trafficserver": Kind("trafficserver", "traffic_server", TRAFFICSERVER, [],
                          {"TS_RUNROOT": "{folder}/runroot.yaml", "RES_OPTIONS": "timeout:1 attempts:1"},
                          files={"runroot.yaml": TRAFFICSERVER_ROOT, "logging.yaml": TRAFFICSERVER_LOGGING,
                                 "remap.config": "map / http://{upstream_address}:{upstream}/\n",
                                 "storage.config": "", "plugin.config": "",
                                 "ip_allow.yaml": TRAFFICSERVER_CLIENTS},
                          configuration_name="records.config", read_log=trafficserver_log),
}


def write(kind, folder, address, port, upstreams, patience, *, connect=None, connections=1024, benching="max_fails=0"):
    """Writes what the kind needs into its folder; (arguments, environment, companion's command or None)."""
    upstream_address, upstream = upstreams[0]
    values = {"folder": folder, "address": address, "port": port, "upstream_address": upstream_address, "upstream": upstream,
              "patience": int(patience), "connect": int(connect or patience), "connections": connections,
              "servers": " ".join(kind.server.format(address=one, port=its_port, number=number, benching=benching)
                                  + ("\n    " if kind.program == "haproxy" else "")
                                  for number, (one, its_port) in enumerate(upstreams)),
              "file": os.path.join(folder, kind.configuration_name)}
    for name, text in {**kind.files, kind.configuration_name: kind.configuration}.items():
        with open(os.path.join(folder, name), "w", encoding="ascii") as file:
            file.write(text.format(**values))
    return ([one.format(**values) for one in kind.arguments],
            {name: value.format(**values) for name, value in kind.environment.items()},
            [one.format(**values) for one in kind.companion])

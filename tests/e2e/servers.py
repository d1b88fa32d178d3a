#!/usr/bin/python3
"""Real upstream servers, by name: how each is started, reloaded, killed and stopped, and what its application can do.

Everything is Debian 12's own, except the applications (tests/e2e/apps), which all serve the same paths, by any method:

    /ok/ID              200 and a short body, once the request's body has been read
    /slow/SECONDS/ID    the same, later
    /sleep/SECONDS/ID   the same, with the event loop blocked meanwhile
    /exit/ID            the worker kills itself over this request
    /big/BYTES/ID       that many bytes
    /close/WHEN/ID      the handler closes its own transport: before, between (head and body) or after its response

ServerKind.paths says which of them a kind has. What comes from the upstream's host carries "X-App: 1", error pages of nginx
and httpd included. The application's log has one JSON line when a request's handler begins and one when it has handed its
response over; a request without the second one was never answered.

Each server runs below a guard, a process that ends everything below it when it is told to, or when the test dies: workers
do not care for their master's death, let alone for its parent's. Where one process is the whole server (uvicorn, node,
tomcat, ...) the guard starts it again when it ends, as a service manager does. Meanwhile connects are refused; a master
(gunicorn, puma, ...) keeps listening.

`servers.py --check [NAME,...]` tries all that on loopback, in a network namespace of its own; `--defaults` measures how long
each lets a connection idle by default (80 s).
"""

import argparse
import ctypes
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from proxy_lab import listens

HERE = os.path.dirname(os.path.abspath(__file__))
APPS = os.path.join(HERE, "apps")
BUILD = os.path.join(os.path.dirname(os.path.dirname(HERE)), "build")
PYTHON = "/usr/bin/python3"

# Pauses end by readiness; these bound them, with room for an emulated machine: a JVM compiles and starts there.
START_LIMIT = 300.0
STOP_LIMIT = 60.0
LIMIT = 60.0

_libc = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


class ServerError(Exception):
    """A server that does not start, or is asked for what it can't."""


def need(program, package):
    path = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/bin")
    if path is None:
        raise ServerError(f"{program} is missing: install the package {package} (scripts/setup)")
    return path


# ---- processes -----------------------------------------------------------------------------------------------------------


def processes():
    """{pid: its parent} of all but zombies."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    state, parent = file.read().rpartition(b")")[2].split()[:2]
            except OSError:
                continue
            if state not in (b"Z", b"X"):
                found[int(name)] = int(parent)
    return found


def children(pid):
    return sorted(child for child, parent in processes().items() if parent == pid)


def descendants(pid):
    parents = processes()
    found, fresh = set(), {pid}
    while fresh:
        fresh = {child for child, parent in parents.items() if parent in fresh} - found
        found |= fresh
    return found


def send(pid, number):
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def guard(path):
    """Runs the commands of a launch file. SIGUSR1: they have started, from now on those that end are started again if the
    launch says so. SIGTERM, or the end of the process that asked: everything below this one is killed."""
    with open(path, encoding="utf-8") as file:
        launch = json.load(file)
    waited = {signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, waited)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # what is ignored is not waited for either
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1)  # whose master dies is still below this process
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGHUP)
    mains = {}

    def run(number):
        command, guard_pid = launch["commands"][number], os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() == guard_pid:
                    for one in (*waited, signal.SIGINT, signal.SIGPIPE):
                        signal.signal(one, signal.SIG_DFL)
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, waited)
                    os.execvpe(command[0], command, {**os.environ, **launch["environment"]})
            except OSError as error:
                os.write(2, f"{command[0]}: {error}\n".encode())
            finally:
                os._exit(127)
        mains[pid] = number
        with open(launch["mains"] + ".new", "w", encoding="ascii") as file:
            json.dump([next((pid for pid in mains if mains[pid] == one), 0) for one in range(len(launch["commands"]))], file)
        os.rename(launch["mains"] + ".new", launch["mains"])

    def reap():
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in mains:
                ended.append((mains.pop(pid), os.waitstatus_to_exitcode(status)))

    ended, again, status = [], False, 0
    for number in range(len(launch["commands"])):
        run(number)
    while os.getppid() == launch["parent"]:
        number = signal.sigwait(waited)
        if number == signal.SIGTERM:
            break
        if number == signal.SIGUSR1:
            again = launch["again"]
        reap()  # SIGHUP: a thread of the parent has ended, maybe not the parent
        if ended and not again:
            status = 1
            for one, code in ended:
                print(f"guard: {launch['commands'][one][0]} ended with {code}", file=sys.stderr, flush=True)
            break
        for one, _ in ended:
            time.sleep(0.05)
            run(one)
        ended.clear()
    deadline = time.monotonic() + STOP_LIMIT
    while (below := descendants(os.getpid())) and time.monotonic() < deadline:
        for pid in below:
            send(pid, signal.SIGKILL)
        reap()
        time.sleep(0.01)
    return status


# ---- kinds ---------------------------------------------------------------------------------------------------------------

EVERYWHERE = frozenset({"ok", "big"})
HANDLED = EVERYWHERE | {"slow", "exit"}
ASYNCHRONOUS = HANDLED | {"sleep"}
UVICORN = ASYNCHRONOUS | {"close"}


@dataclass(frozen=True)
class ServerKind:
    name: str
    packages: tuple
    prepare: Callable  # Server -> the commands that are to run; it writes their configuration
    default_keep_alive: float | None  # seconds that an idle connection lives by default, measured; None: it is not closed
    capabilities: frozenset  # of "keep_alive", "reload", "max_requests", "body_limit", "crash", "close"
    paths: frozenset
    recycles: str = "worker"  # what max_requests ends: a "worker" or a "connection"
    persists: bool = True  # False: it closes after each response, and says so in it
    late: float = 0.0  # an idle close may come as much later than keep_alive says, by design
    whole_seconds: bool = False  # of keep_alive
    master: int | None = None  # from that many workers on, a master listens and others work; None: never
    replaces: bool = True  # that master replaces workers that died
    reload_signal: int | None = None  # to the (first) master
    logs_begin: bool = True
    announces: bool = True  # its workers write their pids when they are ready
    purges: bool = False  # drops idle connections when it is short of workers or connections


def executable(name):
    return lambda server, *arguments: [need(name, server.kind.packages[0]), *(str(one) for one in arguments)]


def uvicorn_of(application):
    def prepare(server):
        command = executable("uvicorn")(server, application, "--host", server.address, "--port", server.port,
                                        "--no-access-log", "--workers", server.workers)
        if server.keep_alive is not None:
            command += ["--timeout-keep-alive", str(server.keep_alive)]
        if server.max_requests is not None:
            command += ["--limit-max-requests", str(server.max_requests)]
        return [command]

    return prepare


def gunicorn_of(worker, application, *flags):
    def prepare(server):
        command = executable("gunicorn")(server, "--bind", server.endpoint, "--workers", server.workers, "--worker-class",
                                         worker, *flags)
        if server.keep_alive is not None:
            command += ["--keep-alive", str(server.keep_alive)]
        if server.max_requests is not None:
            command += ["--max-requests", str(server.max_requests)]
        return [[*command, application]]

    return prepare


def hypercorn(server):
    return [executable("hypercorn")(server, "--bind", server.endpoint, "--workers", server.workers, "asgi:app")]


def daphne(server):
    return [executable("daphne")(server, "-b", server.address, "-p", server.port, "asgi:app")]


def aiohttp(server):
    keep_alive = [] if server.keep_alive is None else [str(server.keep_alive)]
    return [[PYTHON, os.path.join(APPS, "aiohttp_app.py"), server.address, str(server.port), *keep_alive]]


def node(server):
    return [executable("node")(server, os.path.join(APPS, "app.js"))]


def puma(server):
    # Always the cluster mode, which has a master; its number of threads is puma's own.
    lines = [f'bind "tcp://{server.endpoint}"', f"workers {server.workers}", "silence_single_worker_warning",
             "preload_app! false", f'rackup "{APPS}/config.ru"', 'environment "production"', "log_requests false"]
    if server.keep_alive is not None:
        lines.append(f"persistent_timeout {server.keep_alive}")
    return [executable("puma")(server, "-C", server.write("puma.rb", "\n".join(lines) + "\n"))]


def go(server):
    compiler = need("go", "golang-go")
    source = os.path.join(APPS, "app.go")

    def build(target, cache):
        done = subprocess.run([compiler, "build", "-o", target, source], capture_output=True, text=True, cwd=cache,
                              timeout=START_LIMIT * 2, check=False,
                              env={**os.environ, "GOCACHE": os.path.join(cache, "go"), "GO111MODULE": "off", "GOFLAGS": "",
                                   "GOPROXY": "off", "HOME": cache})
        if done.returncode != 0:
            raise ServerError(f"go build: {done.stderr.strip()}")

    return [[built(server, "go", source, build)]]


TOMCAT = "/usr/share/tomcat10"
TOMCAT_SERVER = """<?xml version="1.0" encoding="UTF-8"?>
<Server port="-1">
  <Service name="Catalina">
    <Connector address="{server.address}" port="{server.port}" protocol="HTTP/1.1" connectionTimeout="20000" {more}/>
    <Engine name="Catalina" defaultHost="localhost">
      <Host name="localhost" appBase="webapps" autoDeploy="false"/>
    </Engine>
  </Service>
</Server>
"""
TOMCAT_APPLICATION = """<?xml version="1.0" encoding="UTF-8"?>
<web-app xmlns="https://jakarta.ee/xml/ns/jakartaee" version="6.0" metadata-complete="true">
  <absolute-ordering/>
  <servlet>
    <servlet-name>app</servlet-name><servlet-class>App</servlet-class><load-on-startup>1</load-on-startup>
  </servlet>
  <servlet-mapping><servlet-name>app</servlet-name><url-pattern>/*</url-pattern></servlet-mapping>
</web-app>
"""


def tomcat(server):
    java = need("java", "openjdk-17-jre-headless")
    if not os.path.exists(f"{TOMCAT}/bin/bootstrap.jar"):
        raise ServerError(f"{TOMCAT} is missing: install the package tomcat10-common (scripts/setup)")
    source = os.path.join(APPS, "App.java")

    def build(target, _):
        # The compiler that tomcat has for its own pages: a JRE is enough.
        done = subprocess.run([java, "-cp", "/usr/share/java/eclipse-jdt-core.jar",
                               "org.eclipse.jdt.internal.compiler.batch.Main", "-17", "-proc:none", "-classpath",
                               f"{TOMCAT}/lib/servlet-api.jar", "-d", target, source],
                              capture_output=True, text=True, timeout=START_LIMIT, check=False)
        if done.returncode != 0 or not os.path.exists(os.path.join(target, "App.class")):
            raise ServerError(f"the servlet's compiler: {done.stdout}{done.stderr}")

    more = ""
    if server.keep_alive is not None:
        more += f'keepAliveTimeout="{server.keep_alive * 1000:.0f}" '
    if server.max_requests is not None:
        more += f'maxKeepAliveRequests="{server.max_requests}" '
    server.write("conf/server.xml", TOMCAT_SERVER.format(server=server, more=more))
    server.write("webapps/ROOT/WEB-INF/web.xml", TOMCAT_APPLICATION)
    shutil.copytree(built(server, "tomcat", source, build), server.path("webapps/ROOT/WEB-INF/classes"), dirs_exist_ok=True)
    os.makedirs(server.path("temp"), exist_ok=True)
    return [[java, "-Xmx128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", f"-Dcatalina.home={TOMCAT}",
             f"-Dcatalina.base={server.folder}", f"-Djava.io.tmpdir={server.path('temp')}",
             # Neither the servlet nor the connector has any use for what these jars would be searched for.
             "-Dtomcat.util.scan.StandardJarScanFilter.jarsToSkip=*.jar",
             "-cp", f"{TOMCAT}/bin/bootstrap.jar:{TOMCAT}/bin/tomcat-juli.jar", "org.apache.catalina.startup.Bootstrap",
             "start"]]


APACHE = """
ServerRoot /etc/apache2
ServerName app
PidFile {server.folder}/apache.pid
DefaultRuntimeDir {server.folder}
ErrorLog {server.folder}/apache.err
Listen {server.endpoint}
LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
LoadModule headers_module /usr/lib/apache2/modules/mod_headers.so
LoadModule env_module /usr/lib/apache2/modules/mod_env.so
LoadModule lua_module /usr/lib/apache2/modules/mod_lua.so
User www-data
Group www-data
StartServers {server.workers}
ServerLimit 32
ThreadsPerChild 16
MinSpareThreads {threads}
MaxSpareThreads 512
MaxRequestWorkers {threads}
LimitRequestBody {limit}
LuaMapHandler "^/" "{server.folder}/app.lua" handle
Header always set X-App 1
{more}
"""


def apache(server):
    # httpd does not run its workers as root, so they must be able to reach the log and the script by themselves.
    folder = server.folder
    os.chmod(folder, 0o755)
    while folder != "/":
        if not os.stat(folder).st_mode & 0o001:
            raise ServerError(f"apache's workers run as www-data, who may not enter {folder}")
        folder = os.path.dirname(folder)
    shutil.copyfile(os.path.join(APPS, "app.lua"), server.path("app.lua"))
    os.chmod(server.path("app.lua"), 0o644)
    os.chmod(server.log, 0o666)
    more = ""
    if server.keep_alive is not None:
        more += f"KeepAliveTimeout {server.keep_alive * 1000:.0f}ms\n"
    if server.max_requests is not None:
        more += f"MaxKeepAliveRequests {server.max_requests}\n"
    path = server.write("apache.conf", APACHE.format(server=server, threads=16 * server.workers,
                                                     limit=server.body_limit or 0, more=more))
    return [executable("apache2")(server, "-DFOREGROUND", "-f", path)]


NGINX = """
daemon off; pid {server.folder}/nginx.pid; error_log {server.folder}/nginx.err; user root;
worker_processes {processes};
events {{ worker_connections 512; }}
http {{
    map $uri $app_id {{ ~/([^/]+)$ $1; }}
    log_format app escape=none '{{"time": $msec, "id": "$app_id", "event": "end"}}';
    client_body_temp_path {server.folder}/body; proxy_temp_path {server.folder}/proxy; uwsgi_temp_path {server.folder}/uwsgi;
    fastcgi_temp_path {server.folder}/fastcgi; scgi_temp_path {server.folder}/scgi;
    default_type text/plain;
    {more}
    server {{
        listen {server.endpoint};
        client_max_body_size {limit};
        add_header X-App 1 always;
        {locations}
    }}
}}
"""
# There is no handler in it that counts: files, all zeros and no block on disk, of these sizes.
NGINX_SIZES = tuple(sorted({*(10 ** power for power in range(9)), *(2 ** power for power in range(28))}))
NGINX_LOCATIONS = r"""
        access_log {server.log} app;
        location /ok/ {{ return 200 "ok\n"; }}
        location ~ ^/big/(?<size>\d+)/ {{ alias {server.folder}/files/$size; }}
        location / {{ return 404 "unknown\n"; }}
"""
PHP_LOCATIONS = """
        access_log off;
        location / {{
            fastcgi_pass unix:{server.folder}/php.sock;
            fastcgi_read_timeout 600s;
            fastcgi_param SCRIPT_FILENAME {apps}/app.php;
            fastcgi_param REQUEST_METHOD $request_method;
            fastcgi_param REQUEST_URI $request_uri;
            fastcgi_param CONTENT_TYPE $content_type;
            fastcgi_param CONTENT_LENGTH $content_length;
            fastcgi_param APP_LOG {server.log};
        }}
"""
PHP_FPM = """
[global]
error_log = {server.folder}/php.err
daemonize = no
process_control_timeout = 60s
[app]
user = root
group = root
listen = {server.folder}/php.sock
pm = static
pm.max_children = {server.workers}
php_admin_value[post_max_size] = 0
{more}
"""


def nginx_with(server, processes, locations, more):
    if server.keep_alive is not None:
        more += f"keepalive_timeout {server.keep_alive * 1000:.0f}ms; "
    path = server.write("nginx.conf", NGINX.format(server=server, processes=processes, more=more,
                                                   limit=server.body_limit or 0,
                                                   locations=locations.format(server=server, apps=APPS)))
    return [need("nginx", "nginx-light"), "-e", server.path("nginx.err"), "-c", path]


def nginx(server):
    os.makedirs(server.path("files"), exist_ok=True)
    for size in NGINX_SIZES:
        with open(server.path(f"files/{size}"), "wb") as file:
            file.truncate(size)
    more = "" if server.max_requests is None else f"keepalive_requests {server.max_requests}; "
    return [nginx_with(server, server.workers, NGINX_LOCATIONS, more)]


def php(server):
    more = "" if server.max_requests is None else f"pm.max_requests = {server.max_requests}\n"
    path = server.write("php-fpm.conf", PHP_FPM.format(server=server, more=more))
    return [[need("php-fpm8.2", "php8.2-fpm"), "-F", "-R", "-y", path], nginx_with(server, 1, PHP_LOCATIONS, "")]


def built(server, name, source, build):
    """What build(target, cache folder) makes of the source, from build/servers if it was made before."""
    cache = os.path.join(BUILD, "servers")
    try:
        os.makedirs(cache, exist_ok=True)
        if not os.access(cache, os.W_OK):
            raise OSError
    except OSError:
        cache = server.path("built")
        os.makedirs(cache, exist_ok=True)
    with open(source, "rb") as file:
        target = os.path.join(cache, f"{name}-{os.uname().machine}-{hashlib.sha256(file.read()).hexdigest()[:16]}")
    if not os.path.exists(target):
        with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=cache) as fresh:
            made = os.path.join(fresh, "made")
            build(made, cache)
            try:
                os.rename(made, target)
            except OSError:  # another test was quicker
                if not os.path.exists(target):
                    raise
    return target


def of(text):
    return frozenset(text.split())


KINDS = (
    ServerKind("uvicorn", ("uvicorn", "python3-uvicorn"), uvicorn_of("asgi:app"), 5.0,
               of("keep_alive max_requests body_limit crash close"), UVICORN, whole_seconds=True, master=2, replaces=False),
    ServerKind("fastapi", ("uvicorn", "python3-uvicorn", "python3-fastapi"), uvicorn_of("fastapi_app:app"), 5.0,
               of("keep_alive max_requests body_limit crash close"), UVICORN, whole_seconds=True, master=2, replaces=False),
    ServerKind("gunicorn-sync", ("gunicorn",), gunicorn_of("sync", "wsgi:app"), None,
               of("reload max_requests body_limit crash"), HANDLED, persists=False, master=1, reload_signal=signal.SIGHUP),
    ServerKind("gunicorn-gthread", ("gunicorn",), gunicorn_of("gthread", "wsgi:app", "--threads", "4"), 2.0,
               of("keep_alive reload max_requests body_limit crash"), HANDLED, late=1.0, whole_seconds=True, master=1,
               reload_signal=signal.SIGHUP),
    ServerKind("gunicorn-uvicorn", ("gunicorn", "python3-uvicorn"), gunicorn_of("uvicorn.workers.UvicornWorker", "asgi:app"),
               2.0, of("keep_alive reload max_requests body_limit crash close"), UVICORN, whole_seconds=True, master=1,
               reload_signal=signal.SIGHUP),
    # Its --keep-alive (5 s) ends a connection before the first request only: 0.13.2 never starts that timer again.
    ServerKind("hypercorn", ("python3-hypercorn",), hypercorn, None, of("body_limit crash"), ASYNCHRONOUS, master=2,
               replaces=False),
    ServerKind("daphne", ("daphne",), daphne, 60.0, of("body_limit crash"), ASYNCHRONOUS),
    ServerKind("aiohttp", ("python3-aiohttp",), aiohttp, 75.0, of("keep_alive body_limit crash"), ASYNCHRONOUS),
    ServerKind("node", ("nodejs",), node, 6.0, of("keep_alive max_requests body_limit crash close"), HANDLED | {"close"},
               recycles="connection", late=1.0, master=2),
    ServerKind("puma", ("puma",), puma, 20.0, of("keep_alive reload body_limit crash"), HANDLED, master=1,
               reload_signal=signal.SIGUSR1),
    ServerKind("tomcat", ("tomcat10-common", "openjdk-17-jre-headless"), tomcat, 20.0,
               of("keep_alive max_requests body_limit crash"), HANDLED, recycles="connection", late=1.0),
    ServerKind("apache", ("apache2",), apache, 5.0, of("keep_alive reload max_requests body_limit crash"), HANDLED,
               recycles="connection", master=1, reload_signal=signal.SIGUSR1, announces=False, purges=True),
    ServerKind("nginx", ("nginx-light",), nginx, 75.0, of("keep_alive reload max_requests body_limit crash"), EVERYWHERE,
               recycles="connection", master=1, reload_signal=signal.SIGHUP, logs_begin=False, announces=False,
               purges=True),
    ServerKind("php-fpm", ("php8.2-fpm", "nginx-light"), php, 75.0, of("keep_alive reload max_requests body_limit crash"),
               HANDLED, master=1, reload_signal=signal.SIGUSR2, announces=False),
    ServerKind("go", ("golang-go",), go, None, of("keep_alive body_limit crash"), HANDLED),
)
SERVERS = {kind.name: kind for kind in KINDS}


# ---- a server ------------------------------------------------------------------------------------------------------------


class Server:
    """One server of a kind (or a kind's name), in a folder of its own below `folder`.

    keep_alive: seconds; None: the server's default. max_requests: of a worker or, where there is no such limit, of a
    connection. body_limit: bytes; None: no limit, nor the server's own default one.
    """

    def __init__(self, kind, address, port, folder, *, netns=None, keep_alive=None, max_requests=None, workers=1,
                 body_limit=None):
        self.kind = kind = SERVERS[kind] if isinstance(kind, str) else kind
        self.address, self.port, self.netns = address, port, netns
        self.keep_alive, self.max_requests, self.workers, self.body_limit = keep_alive, max_requests, workers, body_limit
        for name in ("keep_alive", "max_requests", "body_limit"):
            if getattr(self, name) is not None and name not in kind.capabilities:
                raise ServerError(f"{kind.name} has no {name}")
        if kind.whole_seconds and keep_alive is not None:
            if keep_alive != int(keep_alive):
                raise ServerError(f"{kind.name} knows whole seconds alone, not keep_alive {keep_alive}")
            self.keep_alive = int(keep_alive)
        if workers != 1 and kind.master is None:
            raise ServerError(f"{kind.name} has one worker, not {workers}")
        self.endpoint = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        self.folder = os.path.join(os.path.abspath(folder), f"{kind.name}-{port}")
        self.log = self.path("app.jsonl")
        self.process = None

    def path(self, name):
        return os.path.join(self.folder, name)

    def write(self, name, text):
        path = self.path(name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        return path

    @property
    def keeps_listening(self):
        """A worker's death leaves the listening socket: requests wait in it, where otherwise connects are refused."""
        return self.kind.master is not None and self.workers >= self.kind.master

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()

    def start(self):
        os.makedirs(self.folder, exist_ok=True)
        for path in (self.path("mains"), self.log + ".workers"):
            if os.path.exists(path):
                os.remove(path)
        with open(self.log, "ab"):
            pass
        environment = {"APP_LOG": self.log, "APP_ADDRESS": self.address, "APP_PORT": self.port, "APP_WORKERS": self.workers,
                       "APP_KEEP_ALIVE": "" if self.keep_alive is None else self.keep_alive,
                       "APP_MAX_REQUESTS": self.max_requests or "", "APP_BODY_LIMIT": self.body_limit or 0,
                       "PYTHONPATH": APPS, "PYTHONDONTWRITEBYTECODE": 1, "PYTHONUNBUFFERED": 1, "HOME": self.folder}
        launch = {"parent": os.getpid(), "commands": self.kind.prepare(self), "mains": self.path("mains"),
                  "environment": {name: str(value) for name, value in environment.items()},
                  "again": not self.keeps_listening}
        enter = [need("nsenter", "util-linux"), f"--net={self.netns}", "--"] if self.netns else []
        command = [*enter, PYTHON, os.path.abspath(__file__), "--guard", self.write("launch.json", json.dumps(launch))]
        with open(self.path("output"), "ab") as output:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=self.folder,
                                            start_new_session=True)
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        self.process.send_signal(signal.SIGUSR1)
        return self

    def wait_ready(self, limit=START_LIMIT):
        """Until it listens and all its workers have loaded their application; after reload() and kill_worker() as well."""
        deadline = time.monotonic() + limit
        while not self.ready():
            if not self.alive():
                raise ServerError(f"{self.kind.name} ended with {self.process.returncode}; {self.last_words()}")
            if time.monotonic() > deadline:
                raise ServerError(f"{self.kind.name} was not ready after {limit:g} s; {self.last_words()}")
            time.sleep(0.05)

    def ready(self):
        workers = self.worker_pids()
        if len(workers) < self.workers or not listens(workers[0], self.port):
            return False
        if self.kind.announces:
            try:
                with open(self.log + ".workers", encoding="ascii") as file:
                    return set(workers) <= {int(line) for line in file if line.endswith("\n")}
            except FileNotFoundError:
                return False
        return True

    def alive(self):
        return self.process is not None and self.process.poll() is None

    def last_words(self):
        text = ""
        for name in ("output", "apache.err", "nginx.err", "php.err"):
            if os.path.exists(self.path(name)):
                with open(self.path(name), encoding="utf-8", errors="replace") as file:
                    text += file.read()
        return "it said: " + ("\n    ".join(["", *text.splitlines()[-15:]]) if text else "nothing")

    def stop(self):
        """Kills all that has come of it."""
        if self.process is None:
            return
        below = descendants(self.process.pid)
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_LIMIT)
            except subprocess.TimeoutExpired:
                below |= descendants(self.process.pid)
                self.process.kill()
                self.process.wait()
                for pid in below:
                    send(pid, signal.SIGKILL)
        self.process = None

    def mains(self):
        """Its own processes, one for each command, masters first."""
        try:
            with open(self.path("mains"), encoding="ascii") as file:
                return json.load(file)
        except FileNotFoundError:
            return []

    def main_pid(self):
        mains = self.mains()
        if not mains or not mains[0]:
            raise ServerError(f"{self.kind.name} does not run")
        return mains[0]

    def worker_pids(self):
        """The processes that handle requests; behind php-fpm's nginx, php-fpm's."""
        mains = self.mains()[:1]
        if not mains or not mains[0] or mains[0] not in processes():
            return []
        if not self.keeps_listening:
            return mains
        found = []
        for pid in children(mains[0]):
            try:
                with open(f"/proc/{pid}/cmdline", "rb") as file:
                    if b"resource_tracker" not in file.read():  # Python's multiprocessing has it beside its workers
                        found.append(pid)
            except OSError:
                pass
        return found

    def kill_worker(self):
        """SIGKILL to one of them, and its end; its pid."""
        workers = self.worker_pids()
        if not workers:
            raise ServerError(f"{self.kind.name} has no worker to kill")
        send(workers[0], signal.SIGKILL)
        deadline = time.monotonic() + LIMIT
        while workers[0] in processes() and time.monotonic() < deadline:
            time.sleep(0.01)
        return workers[0]

    def reload(self):
        """Asks for new workers in place of the present ones, gracefully; does not wait for them."""
        if self.kind.reload_signal is None:
            raise ServerError(f"{self.kind.name} has no reload; there is restart()")
        os.kill(self.main_pid(), self.kind.reload_signal)

    def restart(self):
        """A deployment where there is no reload: SIGTERM, and the guard starts it again; does not wait for that."""
        if self.keeps_listening:
            raise ServerError(f"{self.kind.name} has a master: that would end it")
        os.kill(self.main_pid(), signal.SIGTERM)

    def log_lines(self):
        with open(self.log, encoding="utf-8") as file:
            return [json.loads(line) for line in file if line.endswith("\n")]


# ---- the self-test -------------------------------------------------------------------------------------------------------


class Client:
    """One connection; ask() reads one answer, by its Content-Length."""

    def __init__(self, address, port):
        self.socket = socket.create_connection((address, port), LIMIT)
        self.rest = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def more(self):
        try:
            part = self.socket.recv(65536)
        except ConnectionResetError:
            part = b""
        self.rest += part
        return bool(part)

    def ask(self, path, method="GET", body=b"", sent_in_parts=False):
        """(status, headers, body); status 0: closed before the head's end; body None: closed before its own end."""
        length = f"Content-Length: {len(body)}\r\n" if body else ""
        head = f"{method} {path} HTTP/1.1\r\nHost: app\r\n{length}\r\n".encode()
        try:
            for part in (head, body) if sent_in_parts else (head + body,):
                self.socket.sendall(part)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it may have answered before
        while b"\r\n\r\n" not in self.rest:
            if not self.more():
                return 0, {}, None
        head, _, self.rest = self.rest.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = 0 if method == "HEAD" else int(headers.get("content-length", 0))
        while len(self.rest) < length:
            if not self.more():
                return int(first.split()[1]), headers, None
        body, self.rest = self.rest[:length], self.rest[length:]
        return int(first.split()[1]), headers, body

    def closed(self, limit=LIMIT):
        """Whether the server closes within that time."""
        self.socket.settimeout(limit)
        try:
            while self.more():
                pass
            return True
        except TimeoutError:
            return False


class Check:
    """What is tried with one kind; every method named try_... is one check."""

    def __init__(self, kind, net, folder):
        self.kind, self.net, self.folder = kind, net, folder

    def serve(self, **options):
        return Server(self.kind, self.net.address(), self.net.next_port(), self.folder,
                      netns=f"/proc/{os.getpid()}/ns/net", **options)

    @staticmethod
    def connect(server):
        return Client(server.address, server.port)

    def good(self, server, path="/ok/again", **more):
        with self.connect(server) as client:
            status, headers, body = client.ask(path, **more)
            must(status == 200 and headers.get("x-app") == "1" and body == b"ok\n", f"{path}: {status} {headers} {body!r}")

    def good_again(self, server):
        """Once it has recovered: connects may be refused, and what waited at the dying worker may be lost."""
        def served():
            try:
                self.good(server)
                return True
            except (Wrong, OSError):
                must(server.alive(), lambda: f"it has ended; {server.last_words()}")
                return False

        wait_for(served, lambda: f"an answer; {server.last_words()}", START_LIMIT)

    def logged(self, server, name, *events):
        events = tuple(one for one in events if one == "end" or self.kind.logs_begin)

        def written():
            return tuple(line["event"] for line in server.log_lines() if line["id"] == name) == events

        wait_for(written, lambda: f"{events} of {name} in the log: {server.log_lines()[-5:]}")

    def try_paths(self):
        begun = time.time()
        with self.serve() as server:
            for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"):
                with self.connect(server) as client:
                    status, headers, body = client.ask(f"/ok/{method}", method)
                    must(status == 200 and headers.get("x-app") == "1" and headers.get("content-length") in ("3", None, "0"),
                         f"{method}: {status} {headers}")
                    must(method == "HEAD" or body == b"ok\n", f"{method}: {body!r}")
                self.logged(server, method, "begin", "end")
            # More than nginx and aiohttp take by default.
            self.good(server, "/ok/body", method="POST", body=b"x" * 1_100_000)
            self.logged(server, "body", "begin", "end")
            for size in (100, 100_000, 1_000_000):
                with self.connect(server) as client:
                    status, headers, body = client.ask(f"/big/{size}/big{size}")
                    must(status == 200 and headers.get("x-app") == "1" and len(body or b"") == size,
                         f"/big/{size}: {status} {headers} {len(body or b'')}")
                self.logged(server, f"big{size}", "begin", "end")
            for what in sorted({"slow", "sleep"} & self.kind.paths):
                sent = time.monotonic()
                self.good(server, f"/{what}/0.3/{what}")
                must(time.monotonic() - sent >= 0.29, f"/{what} was quick")
                self.logged(server, what, "begin", "end")
            for line in server.log_lines():
                must(begun - 1 < line["time"] < time.time() + 1, f"a time that is not now: {line}")

    def try_persistence(self):
        with self.serve() as server, self.connect(server) as client:
            for number in (1, 2):
                status, headers, _ = client.ask(f"/ok/{number}")
                if not self.kind.persists:
                    must(status == 200 and headers.get("connection") == "close" and client.closed(), f"{status} {headers}")
                    return
                must(status == 200 and headers.get("connection", "").lower() != "close", f"{number}: {status} {headers}")

    def try_keep_alive(self):
        keep_alive = 2
        with self.serve(keep_alive=keep_alive) as server, self.connect(server) as client:
            client.ask("/ok/idle")
            begun = time.monotonic()
            must(client.closed(), f"not closed within {LIMIT} s")
            idle = time.monotonic() - begun
            # An emulated machine is late, never early.
            must(keep_alive - 0.1 <= idle <= keep_alive + self.kind.late + 3, f"closed after {idle:.3f} s")
            return f"closed after {idle:.3f} s of {keep_alive}"

    def try_reload(self):
        with self.serve(workers=2) as server, self.connect(server) as client:
            before, main = set(server.worker_pids()), server.main_pid()
            client.ask("/ok/before")
            if "slow" in self.kind.paths:
                with self.connect(server) as busy:
                    asker = threading.Thread(target=lambda: answers.append(busy.ask("/slow/1.5/busy")))
                    answers = []
                    asker.start()
                    wait_for(lambda: any(line["id"] == "busy" for line in server.log_lines()), "the slow request")
                    server.reload()
                    asker.join(LIMIT)
                    must(answers and answers[0][0] == 200, f"a request during the reload got {answers}")
            else:
                server.reload()
            wait_for(lambda: len(server.worker_pids()) == 2 and not before & set(server.worker_pids()),
                     lambda: f"new workers; there are {server.worker_pids()}, there were {before}; {server.last_words()}",
                     START_LIMIT)
            server.wait_ready()
            must(server.main_pid() == main, "another master")
            self.good_again(server)
            return f"the idle connection was {'closed' if client.closed(0.5) else 'kept'}"

    def try_restart(self):
        with self.serve() as server:
            before = server.worker_pids()
            server.restart()
            wait_for(lambda: server.worker_pids() not in ([], before), "another process", START_LIMIT)
            server.wait_ready()
            self.good_again(server)

    def try_kill_worker(self):
        for workers in (1, 2) if self.kind.master else (1,):
            with self.serve(workers=workers) as server:
                must(server.kill_worker() not in server.worker_pids(), "the killed worker lives")
                if self.kind.replaces or not server.keeps_listening:
                    server.wait_ready()
                self.good_again(server)

    def try_exit(self):
        with self.serve() as server:
            with self.connect(server) as client:
                status, headers, body = client.ask("/exit/x", "POST", b"x" * 10)
                expected = 502 if self.kind.name == "php-fpm" else 0
                must(status == expected, f"{status} {headers} {body!r}")
            self.logged(server, "x", "begin")
            self.good_again(server)

    def try_max_requests(self):
        limit = 4
        with self.serve(max_requests=limit) as server:
            before = set(server.worker_pids())
            with self.connect(server) as client:
                statuses, said = [], False
                while len(statuses) <= limit + 1 and not said:
                    status, headers, _ = client.ask(f"/ok/{len(statuses)}")
                    if status == 0:
                        break
                    must(status == 200, f"{status} {headers}")
                    statuses.append(status)
                    said = headers.get("connection", "").lower() == "close"
                if self.kind.recycles == "connection":
                    # httpd does not count the first.
                    must(said and len(statuses) in (limit, limit + 1), f"{len(statuses)} requests, announced: {said}")
                    must(set(server.worker_pids()) == before, "another worker")
                    return f"announced after {len(statuses)} of {limit} requests"
            for _ in range(limit):
                self.good_again(server)
            wait_for(lambda: server.worker_pids() and not before & set(server.worker_pids()),
                     lambda: f"another worker than {before}", START_LIMIT)
            self.good_again(server)
            return f"its connection had {len(statuses)} of {limit} requests{' and was told' if said else ''}"

    def try_body_limit(self):
        with self.serve(body_limit=100_000) as server:
            self.good(server, "/ok/small", method="POST", body=b"x" * 50_000)
            with self.connect(server) as client:
                status, headers, _ = client.ask("/ok/large", "POST", b"x" * 200_000, sent_in_parts=True)
                must(status == 413 and headers.get("x-app") == "1", f"{status} {headers}")
                end = "closed" if client.closed(0.5) else "kept"
            self.good(server)
            return f"413, the connection was {end}"

    def try_close(self):
        with self.serve() as server:
            for when in ("before", "between", "after"):
                with self.connect(server) as client:
                    status, headers, body = client.ask(f"/close/{when}/{when}", "POST", b"x" * 10)
                    expected = {"before": (0, None), "between": (200, None), "after": (200, b"ok\n")}[when]
                    must((status, body) == expected, f"{when}: {status} {headers} {body!r}")
                    must(client.closed(5), f"{when}: not closed")
                self.logged(server, when, "begin", *(["end"] if when == "after" else []))
            self.good(server)

    def try_bad_start(self):
        """A port that is in use: the start fails, with words."""
        listener = socket.socket()
        with listener:
            listener.bind((self.net.address(), self.net.next_port()))
            port = listener.getsockname()[1]  # not listening: that would pass for the server
            try:
                Server(self.kind, self.net.address(), port, self.folder, netns=f"/proc/{os.getpid()}/ns/net").start().stop()
            except ServerError as error:
                must("it said" in str(error), str(error))
            else:
                raise Wrong("it started")

    def try_nothing_left(self):
        """The end of the process that started it ends it all."""
        with self.serve(workers=2 if self.kind.master else 1) as server:
            server.stop()
            pid = os.fork()
            if pid == 0:
                try:
                    server.start()
                    os.kill(os.getpid(), signal.SIGKILL)
                finally:
                    os._exit(1)
            deadline = time.monotonic() + START_LIMIT
            while os.waitpid(pid, os.WNOHANG)[0] == 0:
                must(time.monotonic() < deadline, "it did not start")
                time.sleep(0.05)
            marker = f"APP_LOG={server.log}".encode()

            def left():
                found = []
                for one in processes():
                    try:
                        with open(f"/proc/{one}/environ", "rb") as file:
                            if marker in file.read().split(b"\0"):
                                found.append(one)
                    except OSError:
                        pass
                return found

            must(server.mains() != [], "it has not started")
            wait_for(lambda: not left(), lambda: f"the end of {left()}")

    def try_default(self):
        with self.serve() as server, self.connect(server) as client:
            client.ask("/ok/idle")
            begun = time.monotonic()
            closed = client.closed(80)
            idle = time.monotonic() - begun
            expected = self.kind.default_keep_alive if self.kind.persists else 0
            must(closed == (expected is not None), f"{'' if closed else 'not '}closed within {idle:.3f} s")
            must(not closed or -0.1 <= idle - expected <= self.kind.late + 3, f"closed after {idle:.3f} s, not {expected}")
            return f"closed after {idle:.3f} s" if closed else "not closed within 80 s"

    def wanted(self, defaults):
        if defaults:
            return ["default"]
        names = ["paths", "persistence"]
        names += [name for name in ("keep_alive", "reload", "max_requests", "body_limit", "close")
                  if name in self.kind.capabilities]
        names += ["kill_worker"] * ("crash" in self.kind.capabilities) + ["exit"] * ("exit" in self.kind.paths)
        names += ["restart"] * (self.kind.master != 1)
        return [*names, "bad_start", "nothing_left"]

    def run(self, name):
        """(problem or None, what was seen, seconds)"""
        begun = time.monotonic()
        problem = seen = None
        try:
            seen = getattr(self, f"try_{name}")()
        except (Wrong, ServerError, OSError, ValueError, subprocess.SubprocessError) as error:
            problem = f"{type(error).__name__}: {error}"
        return problem, seen, time.monotonic() - begun


def self_test(options):
    if os.geteuid() != 0:
        print("servers: not root: run it with sudo", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = tempfile.mkdtemp(prefix="finrace-servers-")
    os.chmod(folder, 0o755)
    net = Net()
    passed = failed = 0
    lock = threading.Lock()

    def one(kind):
        nonlocal passed, failed
        check = Check(kind, net, folder)
        for name in check.wanted(options.defaults):
            problem, seen, seconds = check.run(name)
            with lock:
                print(f"  {'FAIL' if problem else 'pass'}  {kind.name} {name}{f': {seen}' if seen else ''}"
                      f"  ({seconds:.1f} s)" + (f"\n          {problem}" if problem else ""), flush=True)
                passed, failed = passed + (problem is None), failed + (problem is not None)

    try:
        kinds = [SERVERS[name] for name in options.check]
        if options.defaults:  # they do nothing but wait
            threads = [threading.Thread(target=one, args=(kind,), daemon=True) for kind in kinds]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        else:
            for kind in kinds:
                one(kind)
        print(f"{passed} passed, {failed} failed", flush=True)
        return 1 if failed else 0
    finally:
        if failed:
            print(f"servers: logs are kept in {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0], allow_abbrev=False)
    parser.add_argument("--check", nargs="?", const=",".join(SERVERS), required=True, metavar="NAME,...",
                        help="try these servers (all): " + ", ".join(SERVERS))
    parser.add_argument("--defaults", action="store_true", help="measure their default idle timeouts instead")
    options = parser.parse_args()
    options.check = options.check.split(",")
    unknown = [name for name in options.check if name not in SERVERS]
    if unknown:
        parser.error(f"--check {unknown[0]}: unknown; accepted: {', '.join(SERVERS)}")
    return self_test(options)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--guard"]:
        sys.exit(guard(sys.argv[2]))
    sys.path.insert(1, os.path.join(os.path.dirname(HERE), "live"))
    from harness import Net, Wrong, must, wait_for
    sys.exit(main())

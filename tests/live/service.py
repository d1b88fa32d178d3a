#!/usr/bin/python3
"""finrace as Debian's package installs it, under real systemd: from its first start to its purge; and in a container
(container.py). For a virtual machine alone (scripts/vm --systemd): what it installs and kills is this system's.
"""

import argparse
import ctypes
import glob
import grp
import json
import os
import pwd
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import container  # noqa: E402
import harness  # noqa: E402
import robustness  # noqa: E402
from harness import LIMIT, Pair, listen, must, need, network  # noqa: E402
from robustness import in_child  # noqa: E402

UNIT = "finrace.service"
LOG = "/var/log/finrace/finrace.jsonl"
CONFIGURATION = "/etc/finrace/finrace.toml"
DROP_IN = f"/run/systemd/system/{UNIT}.d/test.conf"
SLOW = 120.0  # seconds: an emulated machine verifies and attaches slowly
MOST_EXPOSURE = 30  # tenths, of systemd-analyze's 0 to 100
OLDER = "0.0.9"


def call(*command, good=(0,), limit=LIMIT):
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, timeout=limit)
    must(done.returncode in good, f"{' '.join(command)}: exit {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


def shown(name):
    return call("systemctl", "show", "--value", f"--property={name}", UNIT).strip()


def journal():
    return call("journalctl", "--no-pager", f"--unit={UNIT}", "--lines=50")


def main_pid():
    return int(shown("MainPID"))


def configured(*lines):
    """Restarts it with these in [Service]; with none as it was installed."""
    os.makedirs(os.path.dirname(DROP_IN), exist_ok=True)
    with open(DROP_IN, "w", encoding="ascii") as file:
        file.write("\n".join(["[Service]", *lines, ""]))
    call("systemctl", "daemon-reload")
    call("systemctl", "reset-failed", UNIT)
    call("systemctl", "restart", UNIT, good=(0, 1), limit=SLOW)


@contextmanager
def changed_configuration(change):
    """The file with another text, of which none is in use yet; yields the text before."""
    with open(CONFIGURATION, encoding="utf-8") as file:
        good = file.read()
    try:
        with open(CONFIGURATION, "w", encoding="utf-8") as file:
            file.write(change(good))
        yield good
    finally:
        with open(CONFIGURATION, "w", encoding="utf-8") as file:
            file.write(good)


def wait_for(condition, what, limit=LIMIT, pause=0.3):
    """harness.wait_for, with more time between: most conditions here start a process, which an emulated machine is long at."""
    return harness.wait_for(condition, what, limit, pause)


def must_be_gone(objects):
    """These BPF programs, maps and links, of which there were some, are not in the kernel any more."""
    must(objects, "it held no BPF objects")
    wait_for(lambda: not objects & harness.bpf_objects().keys(), lambda: f"the end of {objects & harness.bpf_objects().keys()}")


def records(name, path=LOG):
    with open(path, "rb") as file:
        lines = file.read().split(b"\n")[:-1]
    return [one for one in map(json.loads, lines) if one["event"]["name"] == name]


def client_of(verdict):
    """Address and port; each test's network has addresses of its own."""
    local = verdict["network"]["local"]
    return local["address"], local["port"]


def clients_of(path=LOG):
    return {client_of(one) for one in records("finrace.verdict", path)}


def lose_a_request(net):
    """The client, of an exchange that its server took and did not answer."""
    pair = Pair(net)
    pair.request_unanswered()
    pair.client.close()
    return pair.ends[:2]


def wait_verdict(client, path=LOG):
    wait_for(lambda: os.path.exists(path) and client in clients_of(path), f"the verdict on {client} in {path}")


def must_see(path=LOG):
    """It watches, and writes there."""
    with network() as net:
        wait_verdict(lose_a_request(net), path)


def repacked(options, version):
    """The package as another version of it."""
    folder = os.path.join(options.folder, version)
    call("dpkg-deb", "--raw-extract", options.package, folder)
    control = os.path.join(folder, "DEBIAN", "control")
    with open(control, encoding="utf-8") as file:
        lines = [f"Version: {version}\n" if line.startswith("Version:") else line for line in file]
    with open(control, "w", encoding="utf-8") as file:
        file.writelines(lines)
    call("dpkg-deb", "-Znone", "--root-owner-group", "--build", folder, folder + ".deb", limit=SLOW)
    return folder + ".deb"


def test_install(options):
    """Running and enabled after `dpkg --install`, ready only once it watches, as a user of its own without capabilities."""
    call("dpkg", "--install", repacked(options, OLDER), limit=SLOW)
    must(shown("ActiveState") == "active" and call("systemctl", "is-enabled", UNIT).strip() == "enabled", shown("ActiveState"))
    must("ready" not in shown("StatusText") and shown("StatusText"), f"status: {shown('StatusText')!r}")
    user = pwd.getpwnam("finrace")
    must(user.pw_shell.endswith("nologin"), f"{user}")
    status = os.stat(os.path.dirname(LOG))
    must((status.st_uid, status.st_mode & 0o777) == (user.pw_uid, 0o750), f"{status}")
    must_be_for_the_group()
    with open(f"/proc/{main_pid()}/status", encoding="ascii") as file:
        said = dict(line.rstrip("\n").split(":\t", 1) for line in file)
    must(said["Uid"].split() == [str(user.pw_uid)] * 4, said["Uid"])
    # CAP_BPF before Linux 5.19, for the counters (docs/design.md).
    allowed = {"CAP_BPF"} if options.kernel < (5, 19) else set()
    wait_for(lambda: records("finrace.health"), "a health record")
    confinement = records("finrace.health")[-1]["finrace"]["health"]["confinement"]
    must(confinement["files"] and confinement["system_calls"] and set(confinement["capabilities"]) <= allowed, f"{confinement}")
    must(bin(int(said["CapEff"], 16)).count("1") == len(confinement["capabilities"]) and said["Seccomp"] == "2" and
         said["NoNewPrivs"] == "1", f"{said}")


def test_verdict(_options):
    must_see()


def test_upgrade(options):
    """Another process, the same log; the unit is not left stopped."""
    before, size = main_pid(), os.stat(LOG).st_size
    call("dpkg", "--install", options.package, limit=SLOW)
    must(call("dpkg-query", "--show", "--showformat=${Version}", "finrace") != OLDER, "the version is the older one's")
    must(shown("ActiveState") == "active" and main_pid() not in (0, before), f"{shown('ActiveState')}, {main_pid()}")
    must(os.stat(LOG).st_size >= size, "the log has lost what it had")
    must_see()


def test_reload(options):
    """By SIGHUP the log is opened anew, the process stays, and systemd is told that it is done."""
    pid = main_pid()
    os.rename(LOG, LOG + ".moved")
    call("systemctl", "reload", UNIT)
    wait_for(lambda: os.path.exists(LOG), "the new log")
    must(main_pid() == pid and shown("ActiveState") == "active", "another process, or none")
    must_see()


def test_reload_configuration(_options):
    """`systemctl reload` takes what has changed in /etc/finrace/finrace.toml, without another process."""
    pid = main_pid()
    with network() as net:
        with changed_configuration(lambda text: text + f'upstream_name = "{net.prefix}0/24=billing"\n'):
            call("systemctl", "reload", UNIT)
            wait_for(lambda: "taken anew: upstream_name" in journal(), journal)
            client = lose_a_request(net)
            wait_verdict(client)
        call("systemctl", "reload", UNIT)
    named = next(one for one in records("finrace.verdict") if client_of(one) == client)
    must(named.get("peer") == {"service": "billing"} and main_pid() == pid, f"{named}")


def must_be_for_the_group():
    status = os.stat(LOG)
    must((pwd.getpwuid(status.st_uid).pw_name, grp.getgrgid(status.st_gid).gr_name, status.st_mode & 0o777) ==
         ("finrace", "finrace", 0o640), f"{status}")


def test_logrotate(options):
    """The installed rules, by real logrotate, while requests die: each has its verdict, in the old file or the new one."""
    clients = set()

    def told():
        found = set()
        for path in glob.glob(LOG + "*"):
            if not path.endswith(".gz"):
                found |= clients_of(path)
                continue
            call("gunzip", "--keep", path)
            found |= clients_of(path.removesuffix(".gz"))
            os.unlink(path.removesuffix(".gz"))
        return found

    with network() as net:
        for turn in range(3):
            clients.update(lose_a_request(net) for _ in range(5))
            if turn < 2:
                wait_for(lambda: os.stat(LOG).st_size > 0, "something to rotate")
                call(need("logrotate", "logrotate"), "--force", "/etc/logrotate.d/finrace")
        wait_for(lambda: clients <= told(), "all verdicts, over all files")
    must(os.path.exists(LOG + ".1") and glob.glob(LOG + "*.gz"), f"{os.listdir(os.path.dirname(LOG))}")
    must_be_for_the_group()
    call("systemctl", "stop", UNIT, limit=SLOW)
    call(need("logrotate", "logrotate"), "--force", "/etc/logrotate.d/finrace")
    must(not os.path.exists(LOG), "it was not rotated")
    call("systemctl", "start", UNIT, limit=SLOW)
    must_be_for_the_group()


def test_watchdog(options):
    """A loop that stands still is ended, and another process takes over. No core is left of it, with the records in it."""
    cores = os.path.join(options.folder, "cores")
    os.mkdir(cores)
    with open("/proc/sys/kernel/core_pattern", "w", encoding="ascii") as file:
        file.write(f"|/usr/bin/tee {cores}/%p")  # no limit keeps a core from a program
    other = subprocess.Popen([need("setpriv", "util-linux"), "--reuid=finrace", "--clear-groups", "sleep", "600"])
    wait_for(lambda: os.readlink(f"/proc/{other.pid}/exe").endswith("sleep"), "another process")
    other.send_signal(signal.SIGABRT)
    other.wait(LIMIT)
    wait_for(lambda: os.listdir(cores) == [str(other.pid)], "another process's core")
    configured("WatchdogSec=2s")
    time.sleep(5)
    must(shown("NRestarts") == "0", "a loop that turns was ended")
    pid = main_pid()
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: shown("NRestarts") == "1" and shown("ActiveState") == "active", "the restart", limit=SLOW)
    must(main_pid() != pid, "the same process")
    wait_for(lambda: "result 'watchdog'" in journal(), lambda: f"the watchdog's line in {journal()}")
    must(os.listdir(cores) == [str(other.pid)], "a core was written")
    must_see()


def test_killed(options):
    """After SIGKILL nothing stays in the kernel, and the next process takes the open connections in."""
    configured("RestartSec=4s")
    with network() as net:
        pair = Pair(net)
        pair.exchange()
        held = harness.held_objects([main_pid()])
        os.kill(main_pid(), signal.SIGKILL)
        must_be_gone(held)
        wait_for(lambda: shown("NRestarts") == "1" and shown("ActiveState") == "active", "the restart", limit=SLOW)
        pair.request_unanswered()
        pair.client.close()
        wait_verdict(pair.ends[:2])


# ---- other users of the host ---------------------------------------------------------------------------------------------


def become(user, groups=()):
    """This process, a child of the test's, is that user from now on; `groups` beside its own."""
    who = pwd.getpwnam(user)
    os.setgroups(list(groups))
    os.setresgid(who.pw_gid, who.pw_gid, who.pw_gid)
    os.setresuid(who.pw_uid, who.pw_uid, who.pw_uid)
    harness.die_with_parent()


def opening(path, flags=os.O_RDONLY):
    return lambda: os.close(os.open(path, flags))


def beside_the_log(make):
    path = LOG + ".planted"

    def attempt():
        make(path)
        os.unlink(path)

    return attempt


def call_kernel(*arguments):
    whole = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    return lambda: harness.checked(min(harness.libc.syscall(*whole), 0), f"system call {arguments[0]}")


def into_process(pid):
    """{what: how} to get at a process's memory and files; each raises OSError if it is refused, and does no harm if it is not."""
    numbers = {"process_vm_readv": 310, "pidfd_getfd": 438}  # of x86-64
    with open(f"/proc/{pid}/maps", encoding="ascii") as file:
        address = int(file.readline().split("-")[0], 16)
    buffer = ctypes.create_string_buffer(16)
    local = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 16)
    remote = (ctypes.c_size_t * 2)(address, 16)
    ways = {f"open /proc/PID/{name}": opening(f"/proc/{pid}/{name}") for name in ("mem", "environ", "maps", "auxv", "pagemap", "io")}
    ways |= {f"list /proc/PID/{name}": lambda name=name: os.listdir(f"/proc/{pid}/{name}") for name in ("fd", "map_files")}
    ways |= {f"follow /proc/PID/{name}": lambda name=name: os.readlink(f"/proc/{pid}/{name}") for name in ("exe", "root", "cwd", "ns/net")}

    def seize():
        harness.checked(harness.libc.ptrace(0x4206, pid, None, None), "PTRACE_SEIZE")  # until this child ends

    def take_descriptor():
        call_kernel(numbers["pidfd_getfd"], os.pidfd_open(pid), 0, 0)()

    def read_memory():
        call_kernel(numbers["process_vm_readv"], pid, local, 1, remote, 1, 0)()
        must(bytes(buffer)[:4] == b"\x7fELF", "other bytes")  # the beginning of its program

    return ways | {"ptrace": seize, "pidfd_getfd": take_descriptor, "process_vm_readv": read_memory}


def into_service(pid):
    """The same for its files, the kernel's objects, and what steers it."""
    with open(f"/proc/{pid}/cgroup", encoding="ascii") as file:
        cgroup = "/sys/fs/cgroup" + next(line.rstrip("\n")[3:] for line in file if line.startswith("0::"))
    journals = glob.glob("/var/log/journal/*/*.journal") + glob.glob("/run/log/journal/*/*.journal")
    must(journals, "there is no journal")
    ways = {f"write to {path}": opening(path, os.O_WRONLY) for path in (
        LOG, CONFIGURATION, f"/lib/systemd/system/{UNIT}", "/etc/logrotate.d/finrace", f"/proc/{pid}/oom_score_adj",
        f"{cgroup}/cgroup.procs", f"{cgroup}/cgroup.freeze")}
    create = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    for name, make in (("pipe", os.mkfifo), ("link", lambda path: os.symlink("/etc/passwd", path)),
                       ("second name", lambda path: os.link(LOG, path)), ("file", lambda path: os.close(os.open(path, create)))):
        ways[f"a {name} beside the log"] = beside_the_log(make)
    for path in journals:
        ways[f"read {path}"] = opening(path)
    bpf, by_id = 321, {"prog": 13, "map": 14, "link": 30}  # BPF_..._GET_FD_BY_ID
    for kind, number in harness.held_objects([pid]):
        attributes = (ctypes.c_uint32 * 3)(number, 0, 0)
        ways[f"BPF {kind} {number}"] = call_kernel(bpf, by_id[kind], attributes, ctypes.sizeof(attributes))
    ways["signal"] = lambda: os.kill(pid, 0)
    ways["affinity"] = lambda: os.sched_setaffinity(pid, os.sched_getaffinity(pid))
    ways["limits"] = lambda: resource.prlimit(pid, resource.RLIMIT_NOFILE)
    return ways


def allowed(ways, user, groups=()):
    """Those of them that this user is allowed."""
    def attempt():
        become(user, groups)
        done = []
        for name, way in ways.items():
            try:
                way()
                done.append(name)
            except OSError:
                pass
        return done

    with in_child(attempt) as (_, done):
        return set(done)


def test_other_users(_options):
    """Who is neither root nor finrace reads nothing of it, changes no file, has none of its objects, and stops nothing; who reads
    its log by its group can do that alone; and what else runs as finrace does not get into the process."""
    pid = main_pid()
    readings = {"read the log": opening(LOG), "list its folder": lambda: os.listdir(os.path.dirname(LOG))}
    inside, around = into_process(pid), into_service(pid)
    everything = readings | inside | around
    must(allowed(everything, "root") == everything.keys(), lambda: f"not even root may {everything.keys() - allowed(everything, 'root')}")
    for user, groups, due in (("nobody", [], set()), ("nobody", [grp.getgrnam("finrace").gr_gid], set(readings))):
        found = allowed(everything, user, groups)
        must(found == due, f"{user}, of {groups}, may {found ^ due}")
    must(not allowed(inside, "finrace"), lambda: f"what runs as finrace may {allowed(inside, 'finrace')}")

    status, restarts = shown("StatusText"), shown("NRestarts")

    def steer():
        become("nobody")
        done = [f"kill -{number}" for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGSTOP, signal.SIGABRT, signal.SIGKILL) if signalled(number)]
        # systemd takes what comes, from anybody, and looks at who sent it.
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            for message in ("STATUS=spoofed", "STOPPING=1", f"MAINPID={os.getpid()}", "WATCHDOG=trigger", f"ERRNO=1\nMAINPID={pid}"):
                sock.sendto(message.encode(), "/run/systemd/notify")
        answers = {}
        for command in (["show", "--property=MainPID", UNIT], ["stop", UNIT], ["reload", UNIT], ["kill", "--signal=KILL", UNIT],
                        ["set-property", "--runtime", UNIT, "CPUQuota=1%"]):
            said = subprocess.run(["systemctl", "--no-ask-password", *command], capture_output=True, text=True, timeout=LIMIT)
            answers[command[0]] = said.returncode, said.stdout + said.stderr
        return done, answers

    def signalled(number):
        try:
            os.kill(pid, number)
        except PermissionError:
            return False
        return True

    with in_child(steer) as (_, (done, answers)):
        must(not done, f"nobody may {done}")
    must(answers.pop("show") == [0, f"MainPID={pid}\n"], "systemctl does not reach systemd: what follows proves nothing")
    for verb, (code, said) in answers.items():
        must(code != 0 and re.search("authentication required|[Aa]ccess denied|not permitted", said), f"systemctl {verb}: {code}, {said}")
    must((main_pid(), shown("ActiveState"), shown("StatusText"), shown("NRestarts")) == (pid, "active", status, restarts),
         f"{main_pid()}, {shown('ActiveState')}, {shown('StatusText')!r}, {shown('NRestarts')}")
    must_see()


FLOOD = 400  # more takes an emulated machine too long; tests/live/robustness.py floods in earnest
HOSTILE_NAME = b'\x1b[2J\n"}{\x7f\xc2\x9b2J'


def test_flooded(options):
    """Of nobody's connections one after the other, each an accident, by a process with a name that steers terminals, and all of metrics'
    connections held: another's verdict is told, memory stays within bounds, each line is whole."""
    def memory():
        with open(f"/proc/{main_pid()}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    def flood(_held):
        listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        for _ in range(FLOOD):
            with socket.create_connection(listener.getsockname()) as client, listener.accept()[0] as server:
                client.sendall(b"x" * 50)
                server.recv(50)

    def begin():
        become("nobody")
        harness.libc.prctl(15, ctypes.create_string_buffer(HOSTILE_NAME))  # PR_SET_NAME
        held = [socket.create_connection(("127.0.0.1", 9735)) for _ in range(60)]
        for sock in held:
            sock.send(b"GET /metrics HTTP/1.1\r\nX: ")
        threading.Thread(target=flood, args=(held,), daemon=True).start()

    def floods(name):
        return [one for one in records("finrace.verdict") if one["process"]["executable"].get("name") == name]

    with changed_configuration(lambda text: text.replace("#metrics = 9735", "metrics = 9735")):
        configured()
        pid, before = main_pid(), memory()
        name = HOSTILE_NAME.decode()
        with in_child(begin):
            wait_for(lambda: len(floods(name)) > 100, "its verdicts", pause=0.5)
            must_see()
            wait_for(lambda: len(floods(name)) == FLOOD, "all of them", pause=0.5)
            must_see()
            must(memory() < before + (32 << 20), f"{before} bytes of memory, then {memory()}")
        with urllib.request.urlopen("http://127.0.0.1:9735/metrics", timeout=LIMIT) as answer:
            must(answer.status == 200, "no metrics once it is over")
        must(main_pid() == pid, "it was restarted")
    configured()
    with open(LOG, "rb") as file:
        text = file.read()
    must(not re.search(rb"[^\n\x20-\x7e\x80-\xff]|\xc2[\x80-\x9f]", text), "its log steers a terminal")
    os.truncate(LOG, 0)  # the tests below read it again and again


def test_linked_log(options):
    """A link in the place of its log, to what is another's, is not written through."""
    target = os.path.join(options.folder, "another's")
    with open(target, "w", encoding="ascii") as file:
        file.write("as it was")
    os.rename(LOG, LOG + ".aside")
    os.symlink(target, LOG)
    call("systemctl", "reload", UNIT)
    must_see(LOG + ".aside")  # what it has open stays in use
    with open(target, encoding="ascii") as file:
        must(file.read() == "as it was", "it was written to")
    os.unlink(LOG)
    call("systemctl", "reload", UNIT)
    must_see()


def test_exposure(_options):
    call("systemd-analyze", "security", f"--threshold={MOST_EXPOSURE}", UNIT)


def test_usage_error(_options):
    """What the next start would meet as well is told, and not tried again and again."""
    with changed_configuration(lambda text: text + "upstream = 'nonsense'\n") as good:
        configured()
        must((shown("ActiveState"), shown("ExecMainStatus"), shown("NRestarts")) == ("failed", "2", "0"), "it was tried again")
        place = f"{CONFIGURATION}:{good.count(chr(10)) + 1}: upstream: 'nonsense'"
        wait_for(lambda: place in journal(), lambda: f"'{place}' in {journal()}")
    configured()
    must(shown("ActiveState") == "active", "it does not start again")


def test_journal(_options):
    """Into the journal and to /dev/log beside its log; a journal that is restarted in between loses none."""
    def told(*match):
        text = call("journalctl", "--no-pager", "--output=json", "--all", *match)
        return [json.loads(line) for line in text.splitlines()]

    def by_fields():
        return sorted((entry["NETWORK_LOCAL_ADDRESS"], int(entry["NETWORK_LOCAL_PORT"])) for entry in told("FINRACE_CAUSE=upstream_closed"))

    def by_syslog():
        found = (re.search(r"finrace \d+ verdict - (\{.*\})", entry["MESSAGE"]) for entry in told("_TRANSPORT=syslog"))
        return sorted(client_of(json.loads(match[1])) for match in found if match)

    outputs = f'output = ["{LOG}", "journald", "syslog"]'
    with network() as net, changed_configuration(lambda text: re.sub(r"(?m)^output = .*$", outputs, text)):
        configured()
        due = [lose_a_request(net)]
        wait_for(lambda: by_fields() == due == by_syslog(), lambda: f"{due} in the journal: {by_fields()}, {by_syslog()}")
        call("systemctl", "restart", "systemd-journald.service", limit=SLOW)
        due = sorted(due + [lose_a_request(net) for _ in range(3)])
        wait_for(lambda: by_fields() == due == by_syslog(), lambda: f"{due} in the journal: {by_fields()}, {by_syslog()}")
        wait_for(lambda: set(due) <= clients_of(), "the same in the log")
    configured()
    entry = told("FINRACE_CAUSE=upstream_closed")[0]
    must(entry["MESSAGE"].startswith("upstream_closed: ") and entry["PRIORITY"] == "4" and entry["_SYSTEMD_UNIT"] == UNIT, f"{entry}")


def test_metrics(_options):
    """Served to this host, by the confined service. Where somebody else has the port it traces, and serves them once it is free."""
    def take_port():
        become("nobody")
        socket.create_server(("127.0.0.1", 9735)).detach()

    with changed_configuration(lambda text: text.replace("#metrics = 9735", "metrics = 9735")):
        with in_child(take_port):
            configured()
            must((shown("ActiveState"), shown("NRestarts")) == ("active", "0"), "it does not run")
            wait_for(lambda: "--metrics 127.0.0.1:9735: Address already in use" in journal(), journal)
            must_see()
            wait_for(lambda: "metrics are not served" in shown("StatusText"), lambda: shown("StatusText"))
        wait_for(lambda: "metrics are served at 127.0.0.1:9735 now" in journal(), journal)
        with urllib.request.urlopen("http://127.0.0.1:9735/metrics", timeout=LIMIT) as answer:
            text = answer.read().decode("utf-8")
    configured()
    must("\nfinrace_races_total 0\n" in text and "\nprocess_resident_memory_bytes " in text, text)


def read_group(group):
    with open(os.path.join(group, "cgroup.procs"), encoding="ascii") as file:
        return file.read()


def test_pods(_options):
    """Names of pods, though the kubelet keeps their folder to root: it is opened while there are rights to give up."""
    pod = "0c9a2d6e-41b7-4f6b-9d0e-6a2c3b1f5e77"
    folder, group = "/var/log/pods", os.path.join(robustness.cgroup_mount(), f"kubepods-pod{pod.replace('-', '_')}.slice")
    made = not os.path.isdir(folder)
    os.makedirs(folder, exist_ok=True)
    os.chmod(folder, 0o750)
    os.mkdir(group)
    process = None
    try:
        call("systemctl", "restart", UNIT, limit=SLOW)
        os.mkdir(os.path.join(folder, f"shop_billing-5d9c_{pod}"))  # later than that
        with network() as net:
            process = robustness.Placed(net, listen(net))
            port = process.lose_from(group)
            client = net.address(), port
            wait_verdict(client)
        (verdict,) = (one for one in records("finrace.verdict") if client_of(one) == client)
        must(verdict.get("k8s", {}).get("pod") == {"uid": pod, "name": "billing-5d9c"} and verdict["k8s"]["namespace"]["name"] == "shop", f"{verdict}")
    finally:
        if process:
            process.end()
        shutil.rmtree(os.path.join(folder, f"shop_billing-5d9c_{pod}"), ignore_errors=True)
        if made:
            os.rmdir(folder)
        wait_for(lambda: not read_group(group), "the control group to be empty")
        os.rmdir(group)


def test_stop(options):
    """A last summary, nothing left in the kernel, and no failure."""
    must_see()
    held = harness.held_objects([main_pid()])
    call("systemctl", "stop", UNIT, limit=SLOW)
    must((shown("ActiveState"), shown("Result"), shown("ExecMainStatus")) == ("inactive", "success", "0"), shown("Result"))
    must_be_gone(held)
    must(records("finrace.health")[-1]["finrace"]["health"]["last"], "no last summary")
    call("systemctl", "start", UNIT, limit=SLOW)


def test_remove(options):
    files = [path for path in call("dpkg", "--listfiles", "finrace").split("\n") if os.path.isfile(path)]
    must(len(files) > 10, f"{files}")
    held = harness.held_objects([main_pid()])
    call("dpkg", "--remove", "finrace", limit=SLOW)
    must_be_gone(held)
    left = [path for path in files if os.path.exists(path)]
    must(left == ["/etc/finrace/finrace.toml", "/etc/logrotate.d/finrace"] and os.path.exists(LOG), f"left: {left}")
    call("dpkg", "--purge", "finrace")
    must(not any(map(os.path.exists, (os.path.dirname(LOG), *left))), "files are left after a purge")


# Those whose outcome hardly depends on the kernel run on Debian 12's own.
WHOLE_ON = (6, 1)
EVERYWHERE = [test_verdict, test_killed, test_stop]
TESTS = [
    test_verdict, test_upgrade, test_reload, test_reload_configuration, test_logrotate, test_watchdog, test_killed, test_other_users, test_flooded,
    test_linked_log, test_exposure, test_usage_error, test_journal, test_metrics, test_pods, test_stop, test_remove,
]


def test(options, results):
    if os.environ.get("FINRACE_VM") is None or not os.path.isdir("/run/systemd/system"):
        raise harness.EnvironmentProblem("run it by scripts/vm KERNEL --systemd")
    need("dpkg-deb", "dpkg")
    # A container's, on which this machine may be modelled: "start nothing".
    if os.path.exists("/usr/sbin/policy-rc.d"):
        os.unlink("/usr/sbin/policy-rc.d")
    # What takes seconds of an emulated machine and tells nothing.
    if os.path.exists("/var/lib/man-db/auto-update"):
        os.unlink("/var/lib/man-db/auto-update")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    options.kernel = tuple(int(number) for number in os.uname().release.split("-")[0].split(".")[:2])
    tests = TESTS
    if options.kernel != WHOLE_ON and not options.whole:
        tests = EVERYWHERE
        print(f"service: on {WHOLE_ON[0]}.{WHOLE_ON[1]} alone, without --whole: " +
              ", ".join(one.__name__.removeprefix("test_").replace("_", " ") for one in TESTS if one not in tests), flush=True)
    results.run_each([test_install], options)
    if not results.failed:  # the others need it
        results.run_each(tests, options)
    if options.kernel == container.KERNEL or options.whole:
        call("systemctl", "stop", UNIT, good=(0, 5), limit=SLOW)  # 5: it has been purged
        container.test(options, results)
    else:
        print(f"service: in a container on {container.KERNEL[0]}.{container.KERNEL[1]} alone, without --whole", flush=True)
    if results.failed and options.logs:
        with open(os.path.join(options.logs, "service-journal"), "w", encoding="utf-8") as file:
            file.write(call("journalctl", "--no-pager", "--boot"))


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0], allow_abbrev=False)
    harness.add_options(parser)
    parser.add_argument("--package", required=True, help="the .deb")
    parser.add_argument("--whole", action="store_true", help="every test on every kernel")
    parser.add_argument("--only", default="*", help="patterns of test names, with commas")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(harness.main("service", parse, test))

"""The real syslog-ng and rsyslog, side by side: their packages exclude each other, so neither is installed.

Each comes out of its Debian package, which apt has verified, into a folder below build/, and runs from there with the
configuration that finrace ships, its paths and addresses replaced. The libraries that they need are in scripts/packages.
"""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "live"))
from harness import LIMIT, ROOT, EnvironmentProblem, die_with_parent, must, wait_for  # noqa: E402

CACHE = os.path.join(ROOT, "build", "collectors")
PIPELINES = os.path.join(ROOT, "packaging", "pipelines")
LIBRARIES = "usr/lib/x86_64-linux-gnu"
APT = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3"]


def fetched(name, packages):
    """The folder of these packages' files, unpacked over each other. Several runs may want them at once: the first fetches."""
    folder = os.path.join(CACHE, name)
    os.makedirs(CACHE, exist_ok=True)
    with open(os.path.join(CACHE, f".{name}.lock"), "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.isdir(folder):
            return folder
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=CACHE) as work:
            download = [*APT, "download", *packages]
            done = subprocess.run(download, cwd=work, capture_output=True, text=True, timeout=LIMIT * 5)
            if done.returncode != 0:  # the lists may be older than the mirror's packages
                subprocess.run([*APT, "update"], capture_output=True, timeout=LIMIT * 5)
                done = subprocess.run(download, cwd=work, capture_output=True, text=True, timeout=LIMIT * 5)
            if done.returncode != 0:
                raise EnvironmentProblem(f"cannot fetch {' '.join(packages)}: {done.stderr.strip()}; see whether `apt-get update` works")
            new = os.path.join(work, "new")
            for package in (one for one in os.listdir(work) if one.endswith(".deb")):
                subprocess.run(["dpkg-deb", "-x", os.path.join(work, package), new], check=True, timeout=LIMIT)
            os.rename(new, folder)
    return folder


def syslog_ng_files():
    return fetched("syslog-ng", ["syslog-ng-core", "syslog-ng-mod-http"])


def rsyslog_files():
    return fetched("rsyslog", ["rsyslog", "rsyslog-pgsql"])


def configured(name, replacements):
    """A configuration as it ships, with texts replaced. Each must be there: else it would be another one that is tested."""
    with open(os.path.join(PIPELINES, name), encoding="utf-8") as file:
        text = file.read()
    for old, new in replacements.items():
        must(old in text, f"packaging/pipelines/{name} has no {old!r}")
        text = text.replace(old, new)
    return text


class Daemon:
    """One that runs in the foreground: started, stopped in order, killed, started again."""

    def __init__(self, folder):
        self.folder = folder
        self.process = None
        os.makedirs(folder, exist_ok=True)

    def launch(self, command, environment=None):
        with open(os.path.join(self.folder, "said"), "ab") as said:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, preexec_fn=die_with_parent,
                                            cwd=self.folder, env={**os.environ, **(environment or {})})

    def words(self):
        with open(os.path.join(self.folder, "said"), encoding="utf-8", errors="replace") as file:
            return file.read()

    def alive(self):
        return self.process is not None and self.process.poll() is None

    def stop(self, number=signal.SIGTERM):
        """In order. Asserts that it was alive, and ends with 0."""
        must(self.alive(), lambda: f"{self.process.args[0]} had ended: {self.words()[-2000:]}")
        self.process.send_signal(number)
        self.process.wait(LIMIT)
        must(self.process.returncode == 0, lambda: f"{self.process.args[0]} ended with {self.process.returncode}: {self.words()[-2000:]}")

    def kill(self):
        if self.alive():
            self.process.kill()
        if self.process is not None:
            self.process.wait(LIMIT)

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.kill()


class SyslogNg(Daemon):
    def __init__(self, folder, configuration):
        """`configuration`: its text."""
        super().__init__(folder)
        self.root = syslog_ng_files()
        with open(os.path.join(folder, "syslog-ng.conf"), "w", encoding="utf-8") as file:
            file.write(configuration)

    def command(self, *more):
        return [os.path.join(self.root, "usr/sbin/syslog-ng"), "--foreground", "--no-caps", "--stderr",
                f"--module-path={self.root}/usr/lib/syslog-ng/3.38", f"--cfgfile={self.folder}/syslog-ng.conf",
                f"--persist-file={self.folder}/persist", f"--pidfile={self.folder}/pid", f"--control={self.folder}/control", *more]

    @property
    def environment(self):
        return {"LD_LIBRARY_PATH": f"{self.root}/usr/lib/syslog-ng"}

    def check(self):
        """Its own word that the configuration is good."""
        done = subprocess.run(self.command("--syntax-only"), env={**os.environ, **self.environment}, capture_output=True, text=True,
                              timeout=LIMIT)
        must(done.returncode == 0 and "rror" not in done.stderr, f"syslog-ng --syntax-only: {done.returncode}: {done.stderr}")

    def taken(self):
        """Lines that its source has read since it was started."""
        done = subprocess.run([os.path.join(self.root, "usr/sbin/syslog-ng-ctl"), "stats", f"--control={self.folder}/control"],
                              env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=LIMIT)
        must(done.returncode == 0, lambda: f"syslog-ng-ctl stats: {done.stderr}")
        return sum(int(line.split(";")[5]) for line in done.stdout.splitlines() if line.startswith("source;s_finrace;") and ";processed;" in line)

    def start(self):
        before = self.words().count("syslog-ng starting up") if self.process else 0
        self.launch(self.command(), self.environment)
        wait_for(lambda: self.words().count("syslog-ng starting up") > before or not self.alive(), "syslog-ng to start")
        must(self.alive(), lambda: f"syslog-ng: {self.words()[-2000:]}")
        return self


class Rsyslog(Daemon):
    def __init__(self, folder, configuration):
        super().__init__(folder)
        self.root = rsyslog_files()
        os.makedirs(os.path.join(folder, "spool"), exist_ok=True)
        with open(os.path.join(folder, "finrace.conf"), "w", encoding="utf-8") as file:
            file.write(configuration)
        # As Debian's rsyslog.conf has it, before /etc/rsyslog.d.
        with open(os.path.join(folder, "rsyslog.conf"), "w", encoding="utf-8") as file:
            file.write(f'global(workDirectory="{folder}/spool")\ninclude(file="{folder}/finrace.conf")\n')

    def command(self, *more):
        return [os.path.join(self.root, "usr/sbin/rsyslogd"), "-n", "-f", f"{self.folder}/rsyslog.conf", "-i", f"{self.folder}/pid",
                "-M", f"{self.root}/{LIBRARIES}/rsyslog", *more]

    def check(self):
        done = subprocess.run(self.command("-N1"), capture_output=True, text=True, timeout=LIMIT)
        must(done.returncode == 0 and "rror" not in done.stderr, f"rsyslogd -N1: {done.returncode}: {done.stderr}")

    def start(self):
        pid = os.path.join(self.folder, "pid")
        if os.path.exists(pid):
            os.unlink(pid)
        self.launch(self.command())
        wait_for(lambda: os.path.exists(pid) or not self.alive(), "rsyslogd to start")
        must(self.alive(), lambda: f"rsyslogd: {self.words()[-2000:]}")
        return self


def rotate(folder, path, finrace):
    """By real logrotate, with finrace's rules, for this file and this process."""
    rules = os.path.join(folder, "logrotate.conf")
    with open(os.path.join(ROOT, "packaging", "finrace.logrotate"), encoding="ascii") as file:
        text = file.read()
    for old, new in (("/var/log/finrace/*.jsonl", path), ("su finrace finrace", "su root root"),
                     ("$(systemctl show --property=MainPID --value finrace.service 2>/dev/null)", str(finrace.process.pid))):
        must(old in text, f"packaging/finrace.logrotate has no {old!r}")
        text = text.replace(old, new)
    with open(rules, "w", encoding="ascii") as file:
        file.write(text)
    program = shutil.which("logrotate", path="/usr/sbin:/usr/bin")
    if program is None:
        raise EnvironmentProblem("logrotate is missing: install the package logrotate (scripts/setup)")
    done = subprocess.run([program, "--force", "--state", os.path.join(folder, "logrotate.state"), rules], capture_output=True, text=True,
                          timeout=LIMIT)
    must(done.returncode == 0 and not done.stderr, f"logrotate: {done.returncode}: {done.stderr}")

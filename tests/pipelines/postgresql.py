"""A PostgreSQL server of a test's own: a cluster in a temporary folder, which it serves on a socket there and on no port."""

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "live"))
from harness import LIMIT, EnvironmentProblem, Wrong, die_with_parent, must, need, wait_for  # noqa: E402

PROGRAMS = "/usr/lib/postgresql/15/bin"


class PostgreSQL:
    """`with PostgreSQL() as server`: an empty cluster, whose administrator is postgres, that trusts whoever finds its socket."""

    def __init__(self):
        if not os.access(f"{PROGRAMS}/postgres", os.X_OK):
            raise EnvironmentProblem(f"{PROGRAMS}/postgres is missing: install the package postgresql-15 (scripts/setup)")
        self.psql = need("psql", "postgresql-client-15")
        self.user = pwd.getpwnam("postgres")
        # Not below a folder of the test's, which only root enters; and a socket's path is short.
        self.folder = tempfile.mkdtemp(prefix="finrace-pg-")
        os.chmod(self.folder, 0o755)
        os.makedirs(f"{self.folder}/cluster")
        os.chown(f"{self.folder}/cluster", self.user.pw_uid, self.user.pw_gid)
        self.process = None

    def become_postgres(self):
        os.initgroups("postgres", self.user.pw_gid)
        os.setgid(self.user.pw_gid)
        os.setuid(self.user.pw_uid)
        die_with_parent()  # after the change of user, which takes it back

    def __enter__(self):
        try:
            done = subprocess.run([f"{PROGRAMS}/initdb", "--pgdata", f"{self.folder}/cluster/data", "--auth=trust", "--no-sync",
                                   "--encoding=UTF8", "--locale=C.UTF-8"], preexec_fn=self.become_postgres, cwd="/",
                                  capture_output=True, text=True, timeout=LIMIT)
            must(done.returncode == 0, lambda: f"initdb: {done.stderr}")
            return self.start()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_):
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self):
        # Without fsync a crash of the server loses nothing, one of the machine would.
        with open(f"{self.folder}/said", "ab") as said:
            self.process = subprocess.Popen(
                [f"{PROGRAMS}/postgres", "-D", f"{self.folder}/cluster/data", "-k", f"{self.folder}/cluster", "-c", "listen_addresses=",
                 "-c", "fsync=off"], preexec_fn=self.become_postgres, cwd="/", stdin=subprocess.DEVNULL, stdout=said, stderr=said)

        def answers():
            must(self.process.poll() is None, lambda: f"postgres ended with {self.process.returncode}: {self.words()}")
            try:
                return self.query("SELECT 1", database="postgres") == "1\n"
            except Wrong:
                return False

        wait_for(answers, lambda: f"PostgreSQL to answer: {self.words()}")
        return self

    def words(self):
        with open(f"{self.folder}/said", encoding="utf-8", errors="replace") as file:
            return file.read()[-2000:]

    def kill(self):
        """As by a crash: every process of it goes at once, and the next start recovers."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait(LIMIT)

    def query(self, sql, database="finrace"):
        """What psql prints of these statements, or commands of its own, unaligned."""
        command = [self.psql, "-X", "-q", "-h", f"{self.folder}/cluster", "-U", "postgres", "-d", database, "-v", "ON_ERROR_STOP=1", "-At"]
        done = subprocess.run([*command, "-f", "-"], input=sql, capture_output=True, text=True, timeout=LIMIT)
        must(done.returncode == 0, lambda: f"psql: {done.stderr[-2000:]}")
        return done.stdout

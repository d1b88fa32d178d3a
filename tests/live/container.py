#!/usr/bin/python3
"""finrace in a container, with what packaging/kubernetes/finrace.yaml gives it and nothing else: podman and crun, the runtime's
own seccomp filter, and the files of Debian's package. No cluster is at hand: the manifest is read here, its fields are held
against what Kubernetes documents, and podman is told the same.

For a virtual machine alone (scripts/vm): what finrace sees is this whole system.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from types import SimpleNamespace

import yaml

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import harness  # noqa: E402
import lab_check  # noqa: E402
from harness import LIMIT, Finrace, must, need, network, wait_for  # noqa: E402

MANIFEST = os.path.join(harness.ROOT, "packaging", "kubernetes", "finrace.yaml")
CONTAINERFILE = os.path.join(harness.ROOT, "packaging", "container", "Containerfile")
KERNEL = (5, 10)  # where it takes most
# Of package golang-github-containers-common. It lets everybody call pivot_root(), as Docker's and containerd's, which it is
# made like, do not.
PODMANS_FILTER = "/usr/share/containers/seccomp.json"
CLONE_NEWNET = harness.CLONE_NEWNET


# ---- the manifest's fields (Kubernetes API reference, v1.30: Pod v1, DaemonSet apps/v1, ...)


class Map(dict):
    """Of any names, to values of one kind."""


class OneOf(tuple):
    """Words that are accepted."""


QUANTITY = re.compile(r"\d+(m|Ki|Mi|Gi)?")
PERCENT = re.compile(r"\d+%")
LABELS = Map(any=str)
META = {"name!": str, "namespace": str, "labels": LABELS, "annotations": LABELS}
PROBE = {"httpGet!": {"path": str, "port!": (int, str)}, "periodSeconds": int, "timeoutSeconds": int, "failureThreshold": int}
SECURITY = {
    "runAsUser": int, "runAsGroup": int, "privileged": bool, "allowPrivilegeEscalation": bool, "readOnlyRootFilesystem": bool,
    "capabilities": {"drop": [str], "add": [str]},
    "seccompProfile": {"type!": OneOf(("RuntimeDefault", "Unconfined"))},
    "appArmorProfile": {"type!": OneOf(("RuntimeDefault", "Unconfined"))},
    "seLinuxOptions": {"type": str},
}
CONTAINER = {
    "name!": str, "image!": str, "command": [str], "args": [str], "ports": [{"name": str, "containerPort!": int}],
    "securityContext": SECURITY, "resources": {"requests": Map(any=QUANTITY), "limits": Map(any=QUANTITY)},
    "startupProbe": PROBE, "volumeMounts": [{"name!": str, "mountPath!": str, "readOnly": bool}],
}
VOLUME = {
    "name!": str, "configMap": {"name!": str}, "emptyDir": {"medium": OneOf(("", "Memory")), "sizeLimit": QUANTITY},
    "hostPath": {"path!": str, "type": OneOf(("", "Directory", "DirectoryOrCreate", "File"))},
}
POD = {
    "serviceAccountName": str, "automountServiceAccountToken": bool, "enableServiceLinks": bool, "hostPID": bool, "hostNetwork": bool,
    "nodeSelector": LABELS, "tolerations": [{"operator": OneOf(("Exists", "Equal")), "key": str, "value": str, "effect": str}],
    "terminationGracePeriodSeconds": int, "containers!": [CONTAINER], "volumes": [VOLUME],
}
KINDS = {
    ("v1", "Namespace"): {"metadata!": META},
    ("v1", "ServiceAccount"): {"metadata!": META, "automountServiceAccountToken": bool},
    ("v1", "ConfigMap"): {"metadata!": META, "data": Map(any=str)},
    ("apps/v1", "DaemonSet"): {"metadata!": META, "spec!": {
        "selector!": {"matchLabels!": LABELS},
        "updateStrategy": {"type": OneOf(("RollingUpdate", "OnDelete")), "rollingUpdate": {"maxUnavailable": (int, PERCENT)}},
        "template!": {"metadata!": {"labels!": LABELS}, "spec!": POD}}},
}


def complaints(value, kind, where):
    """What of a value is not of that kind."""
    if isinstance(kind, OneOf):
        return [] if value in kind else [f"{where}: {value!r}, not one of {', '.join(map(repr, kind))}"]
    if isinstance(kind, tuple):
        each = [complaints(value, one, where) for one in kind]
        return [] if [] in each else each[0]
    if isinstance(kind, re.Pattern):
        return [] if isinstance(value, (str, int)) and kind.fullmatch(str(value)) else [f"{where}: {value!r}"]
    if isinstance(kind, type):
        return [] if type(value) is kind else [f"{where}: {value!r} is no {kind.__name__}"]
    if isinstance(kind, list):
        if not isinstance(value, list):
            return [f"{where}: no list"]
        return [one for index, entry in enumerate(value) for one in complaints(entry, kind[0], f"{where}[{index}]")]
    if not isinstance(value, dict):
        return [f"{where}: no map"]
    if isinstance(kind, Map):
        return [one for name, entry in value.items() for one in complaints(entry, kind["any"], f"{where}.{name}")]
    found = [f"{where}.{name[:-1]} is missing" for name in kind if name.endswith("!") and name[:-1] not in value]
    for name, entry in value.items():
        known = kind.get(name, kind.get(name + "!"))
        found += [f"{where}.{name}: no such field"] if known is None else complaints(entry, known, f"{where}.{name}")
    return found


class Manifest:
    def __init__(self, path=MANIFEST):
        with open(path, encoding="utf-8") as file:
            self.documents = list(yaml.safe_load_all(file))
        self.by_kind = {one.get("kind"): one for one in self.documents}
        self.spec = self.by_kind["DaemonSet"]["spec"]
        self.pod = self.spec["template"]["spec"]
        self.container = self.pod["containers"][0]
        self.security = self.container["securityContext"]
        self.capabilities = self.security["capabilities"]["add"]

    def complaints(self):
        found = []
        for document in self.documents:
            kind = document.get("apiVersion"), document.get("kind")
            rest = {name: value for name, value in document.items() if name not in ("apiVersion", "kind")}
            found += complaints(rest, KINDS[kind], kind[1]) if kind in KINDS else [f"{kind}: not known here"]
        return found

    def port(self, probe):
        """Of a probe, which may name one of the container's."""
        port = probe["httpGet"]["port"]
        return next((one["containerPort"] for one in self.container["ports"] if one.get("name") == port), port)


def test_manifest(setup):
    """Its fields are Kubernetes' own, and what it says in two places is the same."""
    manifest = setup.manifest
    found = manifest.complaints()
    must(not found, "; ".join(found))
    wrong = {"hostPid": True, "hostPID": "yes", "containers": [{"name": "x"}]}
    must(complaints(wrong, POD, "spec") == ["spec.hostPid: no such field", "spec.hostPID: 'yes' is no bool",
                                            "spec.containers[0].image is missing"], f"of {wrong}: {complaints(wrong, POD, 'spec')}")
    names = {one["metadata"].get("namespace", one["metadata"]["name"]) for one in manifest.documents}
    must(len(names) == 1, f"namespaces: {names}")
    must(manifest.spec["selector"]["matchLabels"] == manifest.spec["template"]["metadata"]["labels"], "the selector misses the pods")
    must(manifest.pod["serviceAccountName"] == manifest.by_kind["ServiceAccount"]["metadata"]["name"], "another ServiceAccount")
    must(not manifest.pod["automountServiceAccountToken"], "a token is mounted")
    volumes = [one["name"] for one in manifest.pod["volumes"]]
    must(sorted(volumes) == sorted(one["name"] for one in manifest.container["volumeMounts"]), "volumes and mounts differ")
    configured = manifest.by_kind["ConfigMap"]
    must([one["configMap"]["name"] for one in manifest.pod["volumes"] if "configMap" in one] == [configured["metadata"]["name"]], "no such ConfigMap")
    must(manifest.port(manifest.container["startupProbe"]) == manifest.container["ports"][0]["containerPort"], "startupProbe")
    must(manifest.security["capabilities"]["drop"] == ["ALL"] and not manifest.security["privileged"], "more than it names")


# ---- podman in Kubernetes' place


def image_of(folder, package):
    """What packaging/container/Containerfile makes: the package's files, here over this system's own libraries."""
    root = os.path.join(folder, "image")
    subprocess.run([need("dpkg-deb", "dpkg"), "--extract", package, root], check=True, timeout=LIMIT)
    shutil.rmtree(os.path.join(root, "lib"))  # units, which have no place in the links below
    link_system(root)
    program = os.path.join(root, "usr", "bin", "finrace")
    libraries = subprocess.run([need("ldd", "libc-bin"), program], check=True, capture_output=True, text=True, timeout=LIMIT).stdout
    must("not found" not in libraries, libraries)
    for path in re.findall(r"(/\S+)", libraries):
        if path != program + ":":
            target = root + os.path.realpath(os.path.dirname(path))
            os.makedirs(target, exist_ok=True)
            shutil.copy(os.path.realpath(path), os.path.join(target, os.path.basename(path)))
    return root


def link_system(root):
    """A root's folders, as Debian has them."""
    for name in ("proc", "sys", "dev", "tmp", "etc", "run", "usr", "var", "usr/bin", "usr/sbin", "usr/lib", "usr/lib64"):
        os.makedirs(os.path.join(root, name), exist_ok=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        os.symlink(f"usr/{name}", os.path.join(root, name))


def entry_point():
    with open(CONTAINERFILE, encoding="ascii") as file:
        lines = [line.split(maxsplit=1) for line in file if line.startswith("ENTRYPOINT")]
    return json.loads(lines[-1][1])


class Setup:
    def __init__(self, options):
        self.options = options
        self.manifest = Manifest()
        self.folder = options.folder
        self.image = image_of(options.folder, options.package)
        self.filter = os.path.join(options.folder, "seccomp.json")
        with open(PODMANS_FILTER, encoding="utf-8") as podmans, open(self.filter, "w", encoding="utf-8") as others:
            rules = json.load(podmans)
            for rule in rules["syscalls"]:
                rule["names"] = [name for name in rule["names"] if name != "pivot_root"]
            json.dump(rules, others)
        self.made = 0
        os.makedirs("/var/log/pods", exist_ok=True)  # DirectoryOrCreate

    def podman(self, *arguments):
        folder = os.path.join(self.folder, "podman")
        return [need("podman", "podman"), "--root", f"{folder}/root", "--runroot", f"{folder}/run", "--tmpdir", f"{folder}/tmp",
                "--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--events-backend", "none", "--runtime", need("crun", "crun"),
                *arguments]

    def call(self, *arguments):
        done = subprocess.run(self.podman(*arguments), capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, timeout=LIMIT)
        must(done.returncode == 0, f"podman {' '.join(arguments)}: exit {done.returncode}: {done.stderr}")
        return done.stdout

    def roomy(self):
        """Where locked memory counts: as much as container runtimes that systemd starts mostly have."""
        return ("--ulimit", "memlock=-1:-1") if self.options.kernel < (5, 11) else ()

    def new_name(self, what):
        self.made += 1
        return f"{what}-{self.made}"

    def volume(self, mount, without):
        """podman's flags for one of the manifest's mounts."""
        volume = next(one for one in self.manifest.pod["volumes"] if one["name"] == mount["name"])
        if mount["name"] in without:
            return []
        if "emptyDir" in volume:
            size = volume["emptyDir"]["sizeLimit"].replace("Mi", "m")
            return ["--mount", f"type=tmpfs,destination={mount['mountPath']},tmpfs-size={size}"]
        source = volume["hostPath"]["path"] if "hostPath" in volume else self.configuration()
        return ["--volume", f"{source}:{mount['mountPath']}" + (":ro" if mount.get("readOnly") else "")]

    def configuration(self, more=""):
        """The ConfigMap, as the kubelet lays it out: links to a folder that a link names, which another one replaces."""
        folder = os.path.join(self.folder, "configuration")
        version = self.new_name("..data")
        os.makedirs(os.path.join(folder, version))
        for name, text in self.manifest.by_kind["ConfigMap"]["data"].items():
            with open(os.path.join(folder, version, name), "w", encoding="utf-8") as file:
                file.write(text + more)
            if not os.path.lexists(os.path.join(folder, name)):
                os.symlink(f"..data/{name}", os.path.join(folder, name))
        os.symlink(version, os.path.join(folder, "..data_tmp"))
        os.rename(os.path.join(folder, "..data_tmp"), os.path.join(folder, "..data"))
        return folder

    def run(self, *arguments, name=None, drop=(), add=(), without=(), more=(), host_processes=True, seccomp=None):
        """The command that runs finrace in a container as the manifest says; what differs is told."""
        manifest, security = self.manifest, self.manifest.security
        must(security["privileged"] is False and manifest.pod["hostNetwork"] is False, "not known how to do that here")
        command = self.podman("run", "--rm", "--log-driver", "none", "--network", "none", "--name", name or self.new_name("finrace"),
                              "--user", f"{security['runAsUser']}:{security['runAsGroup']}",
                              "--memory", manifest.container["resources"]["limits"]["memory"].replace("Mi", "m"))
        if manifest.pod["hostPID"] and host_processes:
            command += ["--pid", "host"]
        if security["readOnlyRootFilesystem"]:
            command += ["--read-only", "--read-only-tmpfs=false"]
        if not security["allowPrivilegeEscalation"]:
            command += ["--security-opt", "no-new-privileges"]
        for option, kind in (("seccomp", seccomp or security["seccompProfile"]["type"]), ("apparmor", security["appArmorProfile"]["type"])):
            if kind == "Unconfined":
                command += ["--security-opt", f"{option}=unconfined"]
            elif option == "seccomp":
                command += ["--security-opt", f"seccomp={self.filter}"]
        for one in security["capabilities"]["drop"]:
            command += ["--cap-drop", one]
        for one in [*manifest.capabilities, *add]:
            if one not in drop:
                command += ["--cap-add", one]
        for mount in manifest.container["volumeMounts"]:
            command += self.volume(mount, without)
        return [*command, *more, "--rootfs", self.image, *manifest.container.get("command", entry_point()), *arguments]

    @contextmanager
    def finrace(self, *flags, **how):
        """Running by the manifest's own arguments, and these."""
        name = self.new_name("finrace")
        command = self.run(*self.manifest.container["args"], "--interval", "1s", *flags, name=name, **how)
        try:
            with Finrace(self.options, container=command) as finrace:
                finrace.container = name
                yield finrace
        finally:
            self.remove(name)

    def remove(self, name):
        subprocess.run(self.podman("rm", "--force", "--ignore", "--time", "0", name), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                       stdin=subprocess.DEVNULL, timeout=LIMIT, check=False)

    def refused(self, command, *flags, words=(), **how):
        limit = ["--for", "1s"] if command == "run" else []  # should it run after all
        return refused(self.run(command, *flags, *limit, **how), words)


def refused(command, words=()):
    """What it says as it ends with 2."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, timeout=harness.READY_LIMIT)
    said = done.stdout + done.stderr
    must(done.returncode == 2, f"exit {done.returncode}: {said}")
    for word in words:
        must(word in said.replace("\n", " "), f"no word of {word}: {said}")
    return said


# A server and its client, of a user of their own. "older" and "fresh" lose a request: of the connection that was there from
# the start, or of one that is opened then. Each is answered by the client's port.
POD_PROGRAM = r"""
import socket, sys

def pair():
    client = socket.create_connection(listener.getsockname())
    server, _ = listener.accept()
    client.sendall(b"GET / HTTP/1.1\r\n\r\n")
    server.recv(4096)
    server.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
    client.recv(4096)
    return client, server

listener = socket.create_server((sys.argv[1], 0))
older = pair()
print("ready", flush=True)
for line in sys.stdin:
    client, server = older if line == "older\n" else pair()
    port = client.getsockname()[1]
    client.sendall(b"GET /lost HTTP/1.1\r\n\r\n")
    server.recv(4096)
    server.close()
    client.recv(1)
    client.close()
    print(port, flush=True)
"""


class Pod:
    """Another container: of a pod, as far as its control group and /var/log/pods tell, with a network of its own."""

    def __init__(self, setup, net):
        self.setup, self.net = setup, net
        self.name = setup.new_name("pod")
        self.uid = "-".join("".join(random.choices("0123456789abcdef", k=size)) for size in (8, 4, 4, 4, 12))
        self.log = f"/var/log/pods/shop_{self.name}_{self.uid}"
        os.mkdir(self.log)
        root = os.path.join(setup.folder, "pods-image")
        if not os.path.exists(root):
            link_system(root)
        self.process = subprocess.Popen(
            setup.podman("run", "--rm", "--interactive", "--log-driver", "none", "--name", self.name, "--user", "65534:65534",
                         "--cap-drop", "ALL", "--cgroup-parent", f"/kubepods/pod{self.uid}", "--network", f"ns:/proc/{os.getpid()}/fd/{net.ns}",
                         "--volume", "/usr:/usr:ro", "--rootfs", root, "/usr/bin/python3", "-c", POD_PROGRAM, net.address()),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=Finrace.enter_host)
        must(self.process.stdout.readline() == "ready\n", lambda: f"the pod: {self.process.communicate(timeout=LIMIT)}")
        self.id = setup.call("inspect", "--format", "{{.Id}}", self.name).strip()

    def lose(self, which):
        self.process.stdin.write(which + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def verdict(self, finrace, which):
        port = self.lose(which)

        def there():
            return next((one for one in finrace.verdicts(self.net) if one.client and one.local[1] == port), None)

        return wait_for(there, lambda: f"the verdict on {which} at port {port}; it said {finrace.words()}")

    def must_be_told(self, verdict):
        told = [verdict.at(name) for name in ("container.id", "k8s.pod.uid", "k8s.pod.name", "k8s.namespace.name")]
        must(told == [self.id, self.uid, self.name, "shop"], f"{told}, not {self.id}, {self.uid}, {self.name}: {verdict}")
        must(verdict.at("process.linux.cgroup", "").startswith(f"/kubepods/pod{self.uid}/"), f"{verdict}")
        must(verdict.at("process.executable.name") == "python3", f"{verdict}")

    def close(self):
        self.process.kill()
        self.process.wait(LIMIT)
        self.setup.remove(self.name)
        os.rmdir(self.log)


@contextmanager
def pod_of(setup):
    with network() as net:
        pod = Pod(setup, net)
        try:
            yield pod
        finally:
            pod.close()


# ---- with what the manifest gives


def must_prove_races(setup, finrace):
    """The lab's, on the host: other network namespaces, and none of finrace's container."""
    truth = os.path.join(setup.folder, "truth")
    options = SimpleNamespace(runs=3, scenario="race_fin_crossed", family="4", parallel=3, delay=None, keep_alive="300ms", local=False,
                              delay_line=os.path.join(harness.ROOT, "build", "delay-line"))
    rows, _ = lab_check.run_lab(options, truth)
    due = {lab_check.ends(row) for row in rows if row["phase"] == "run" and not row.get("slipped")}
    must(len(due) == options.runs, f"{rows}")

    def judged():
        found = {one.ends: one for one in finrace.verdicts() if one.ends in due and one.client}
        return found if len(found) == len(due) else None

    for one in wait_for(judged, lambda: f"the verdicts on {due}: {finrace.words()}").values():
        must(one.verdict == "keepalive_race/fin_crossed/proven", f"{one}")


def answer(finrace, setup, probe):
    """What the kubelet gets, which asks from the host; here there is no way into that network but to enter it."""
    pid = setup.call("inspect", "--format", "{{.State.Pid}}", finrace.container).strip()
    here = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    there = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        harness.checked(harness.libc.setns(there, CLONE_NEWNET), "setns")
        url = f"http://127.0.0.1:{setup.manifest.port(probe)}{probe['httpGet']['path']}"
        with urllib.request.urlopen(url, timeout=probe.get("timeoutSeconds", 1) * 10) as got:
            return got.status, got.read().decode("utf-8")
    finally:
        harness.checked(harness.libc.setns(here, CLONE_NEWNET), "setns")
        os.close(here)
        os.close(there)


def must_see_all(setup, backend):
    """By one backend: races on the host, a pod's requests with the pod's name, connections older than finrace."""
    kept = ["CAP_BPF"] if setup.options.kernel < (5, 19) else []
    with pod_of(setup) as pod, setup.finrace("--backend", backend, more=setup.roomy()) as finrace:
        must(finrace.adopted() > 0, finrace.words())
        pod.must_be_told(pod.verdict(finrace, "older"))
        pod.must_be_told(pod.verdict(finrace, "fresh"))
        must_prove_races(setup, finrace)
        health = finrace.next_health()
        must(health.at("finrace.health.confinement") == {"files": True, "system_calls": True, "capabilities": kept}, f"{health}")
        must(health.at("host.name") == socket.gethostname(), f"{health}")
        must(health.at("finrace.health.backend") == backend and health.at("finrace.health.complete"), f"{health}")
        status, text = answer(finrace, setup, setup.manifest.container["startupProbe"])
        must(status == 200 and "\nfinrace_races_total" in text, text)
        setup.configuration('upstream_name = "10.0.0.0/8=billing"\n')
        setup.call("kill", "--signal", "HUP", finrace.container)
        wait_for(lambda: "finrace: taken anew: upstream_name" in finrace.said, finrace.words)
        must(pod.verdict(finrace, "fresh").at("peer.service") == "billing", "the new name is not used")
        finrace.stop(signal.SIGTERM)
        must(not any("warning" in text for text in finrace.said), finrace.words)
        harness.check_schema(finrace)


def test_by_trace(setup):
    must_see_all(setup, "trace")


def test_by_cgroup(setup):
    must_see_all(setup, "cgroup")


# ---- with less


def test_without_a_capability(setup):
    """Each is needed, on some kernel at least: without it finrace refuses, or says what it can't see, and does not see it."""
    needed = set()
    said = setup.refused("run", drop=["SYS_ADMIN"], words=["CAP_PERFMON", "CAP_SYS_ADMIN", "--cap-add"])
    must(len(said.strip().splitlines()) == 1, said)
    needed.add("SYS_ADMIN")
    if setup.options.kernel < (6, 9):
        setup.refused("run", "--backend", "cgroup", drop=["NET_ADMIN"], words=["does not attach", "takes CAP_NET_ADMIN"], more=setup.roomy())
    else:
        with setup.finrace("--backend", "cgroup", drop=["NET_ADMIN"]) as finrace:
            finrace.stop()
    needed.add("NET_ADMIN")
    with pod_of(setup) as pod:
        with setup.finrace("--backend", "cgroup", drop=["SYS_PTRACE"], more=setup.roomy()) as finrace:
            warned = [text for text in finrace.said if "CAP_SYS_PTRACE" in text]
            must(any("older than finrace are not taken in everywhere" in text for text in warned), finrace.words)
            must(any("do not show their files" in text for text in warned), finrace.words)
            must(finrace.adopted() == 0 and pod.verdict(finrace, "fresh"), finrace.words)
            needed.add("SYS_PTRACE")
        with setup.finrace("--backend", "cgroup", drop=["BPF"], more=setup.roomy()) as finrace:
            kept = finrace.next_health().at("finrace.health.confinement.capabilities")
            if setup.options.kernel < (5, 19):
                must(kept == ["CAP_SYS_ADMIN"] and any("CAP_SYS_ADMIN is kept" in text for text in finrace.said), f"{kept}: {finrace.words()}")
            else:
                must(kept == [], f"{kept}")
            needed.add("BPF")
        with setup.finrace("--backend", "cgroup", drop=["SYS_CHROOT"], more=setup.roomy()) as finrace:
            confinement = finrace.next_health().at("finrace.health.confinement")
            must(any("files that it does not need stay in its reach: pivot_root()" in text for text in finrace.said), finrace.words)
            must(not confinement["files"] and confinement["system_calls"], f"{confinement}")
            must(pod.verdict(finrace, "fresh"), finrace.words)
            needed.add("SYS_CHROOT")
        with setup.finrace("--backend", "cgroup", drop=["DAC_READ_SEARCH"], more=setup.roomy()) as finrace:
            must(any("CAP_DAC_READ_SEARCH" in text and "do not show their files" in text for text in finrace.said), finrace.words)
            verdict = pod.verdict(finrace, "older")
            must(finrace.adopted() > 0 and verdict.at("process") is None, f"{verdict}")
            needed.add("DAC_READ_SEARCH")
    must(needed == set(setup.manifest.capabilities), f"tried: {needed}")


def test_without_sys_admin(setup):
    """What is left without it, and without the runtime's filter, which bpf() passes by it alone."""
    bpf_alone = {"drop": ["SYS_ADMIN"], "add": ["PERFMON"], "more": setup.roomy()}
    setup.refused("run", words=["bpf() is refused", "seccomp"], **bpf_alone)
    if (5, 11) <= setup.options.kernel < (6, 2):
        setup.refused("run", "--backend", "trace", seccomp="Unconfined", words=["backend trace takes CAP_SYS_ADMIN", "modules"], **bpf_alone)
    with pod_of(setup) as pod, setup.finrace("--backend", "cgroup", seccomp="Unconfined", **bpf_alone) as finrace:
        for words in ("network namespaces can't be entered", "control groups are named as this container sees them"):
            must(any(words in text and "CAP_SYS_ADMIN" in text for text in finrace.said), finrace.words)
        verdict = pod.verdict(finrace, "fresh")
        must(verdict.at("container.id") == pod.id and finrace.adopted() == 0, f"{verdict}")


def test_unprivileged(setup):
    """One message that names what is missing and how a container gets it; `doctor` says the same."""
    for more in ((), ("--user", "65534")):
        nothing = {"drop": setup.manifest.capabilities, "more": more}
        said = setup.refused("run", words=["CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN", "--cap-add", "securityContext.capabilities.add"], **nothing)
        must(len(said.strip().splitlines()) == 1, said)
        must(said.strip().removeprefix("finrace: ") in setup.refused("doctor", **nothing), said)


def test_user_namespace(setup):
    """As in a rootless container: all capabilities are there, and none of them is of use."""
    inside = [need("unshare", "util-linux"), "--user", "--map-root-user", os.path.join(setup.image, "usr", "bin", "finrace")]
    said = refused([*inside, "run"], ["user namespace", "rootless"])
    must(len(said.strip().splitlines()) == 1, said)
    must(said.strip().removeprefix("finrace: ") in refused([*inside, "doctor"]), said)


def test_without_the_cgroup_mount(setup):
    """The container's own control group is not taken for the root: what is attached there would see its connections alone."""
    words = ["no cgroup v2 hierarchy is mounted with its root", "only its own connections", "hostPath"]
    setup.refused("run", "--backend", "cgroup", without=["cgroup"], words=words, more=setup.roomy())


def test_without_host_processes(setup):
    """Its /proc has other numbers: no process is told of by them, and that is said."""
    with pod_of(setup) as pod, setup.finrace("--backend", "cgroup", host_processes=False, more=setup.roomy()) as finrace:
        must(any("own numbers for processes" in text and "hostPID: true" in text for text in finrace.said), finrace.words)
        verdict = pod.verdict(finrace, "fresh")
        must(verdict.at("container") is None and verdict.at("process.linux") is None, f"{verdict}")


def test_locked_memory(setup):
    """Up to Linux 5.10 a limit of it takes a capability; later it counts for nothing."""
    little = ("--ulimit", "memlock=65536:65536")
    if setup.options.kernel < (5, 11):
        setup.refused("run", "--backend", "cgroup", more=little, words=["CAP_SYS_RESOURCE", "LimitMEMLOCK"])
    add = ["SYS_RESOURCE"] if setup.options.kernel < (5, 11) else []
    with setup.finrace("--backend", "cgroup", more=little, add=add) as finrace:
        finrace.stop()


TESTS = [
    test_manifest, test_by_trace, test_by_cgroup, test_without_a_capability, test_without_sys_admin, test_unprivileged, test_user_namespace,
    test_without_the_cgroup_mount, test_without_host_processes, test_locked_memory,
]


def test(options, results):
    """Needs options.package."""
    if os.environ.get("FINRACE_VM") is None:
        raise harness.EnvironmentProblem("run it by scripts/vm KERNEL")
    options.kernel = tuple(int(number) for number in os.uname().release.split("-")[0].split(".")[:2])
    results.run_each(TESTS, Setup(options))


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0], allow_abbrev=False)
    harness.add_options(parser)
    parser.add_argument("--package", required=True, help="the .deb")
    parser.add_argument("--only", default="*", help="patterns of test names, with commas")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(harness.main("container", parse, test))

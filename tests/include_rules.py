#!/usr/bin/python3
"""The house's floor plan, checked: event.h <- core <- {source, sink} <- cli, and no include the other way.

    tests/include_rules.py [ROOT]       checks the tree (this one by default)
    tests/include_rules.py --self-test  checks the checker: trees with one wrong include each

Exit 0: all includes go the right way; 1: some do not, one line each on standard error; 2: there is nothing to check.
"""

import re
import sys
import tempfile
from pathlib import Path

ROOMS = ("core", "source", "sink", "cli")

# What a room may include of the project's own, by the path's beginning.
OWN = {
    "bpf": ("event.h", "connection.h", "kernel.bpf.h", "emit.bpf.h"),
    "core": ("bpf/event.h", "bpf/connection.h", "core/"),
    "source": ("bpf/event.h", "bpf/connection.h", "core/", "source/"),
    "sink": ("bpf/event.h", "bpf/connection.h", "core/", "sink/"),
    "cli": ("bpf/event.h", "bpf/connection.h", "core/", "source/", "sink/", "cli/"),
}

# The C++ standard library, and what core may use beside it. Everything else in <> there is somebody's world: an operating
# system's header, libbpf, JSON, a command line.
STANDARD = re.compile(r"^[a-z_]+$")
CORE_ALSO = ("fmt/",)
CORE_C_HEADERS = ("cerrno",)  # names of errors are values, not calls
CORE_NOT = (  # of the standard library: clocks, files, processes, threads; core is a function of its input
    "chrono", "filesystem", "fstream", "iostream", "thread", "mutex", "csignal", "cstdio", "ctime", "future",
    "condition_variable", "atomic", "random",
)

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"]+)[>"]', re.MULTILINE)
COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
SUFFIXES = (".h", ".hpp", ".cpp", ".c", ".cc")


def without_comments(text):
    """Comments blanked, their line ends kept, so that line numbers stay."""
    return COMMENT.sub(lambda comment: "\n" * comment.group().count("\n"), text)


def room_of(path):
    parts = path.parts
    if parts[0] == "bpf":
        return "bpf"
    if parts[0] == "userspace" and len(parts) > 2:
        return parts[1]
    return None


def wrong(room, path, quoted, name):
    """Why `path` in `room` may not include `name`, or None."""
    if name.endswith(".bpf.h"):
        return None if room == "bpf" else "only bpf/ includes *.bpf.h"
    if ".." in Path(name).parts:
        return "includes are named from the root, not by .."
    if room == "bpf":
        if quoted and name not in OWN["bpf"]:
            return "bpf/ includes its own headers alone"
        if path.name in ("event.h", "connection.h") and not quoted and name != "linux/types.h":
            return "the contract and the accounting include <linux/types.h> alone: both worlds compile them"
        return None
    if quoted and name.endswith(".skel.h"):
        return None if room == "source" else "only userspace/source includes BPF skeletons"
    if name.startswith("bpf/") and not quoted:
        return None if room == "source" else "only userspace/source includes libbpf's <bpf/...>"
    if quoted:
        if any(name == own or (own.endswith("/") and name.startswith(own)) for own in OWN[room]):
            return None
        return f"{room} may include of the project: {', '.join(OWN[room])}"
    if room == "core":
        if name in CORE_NOT:
            return f"core has no use for <{name}>: it is a function of its input"
        if name in CORE_C_HEADERS or STANDARD.match(name) or name.startswith(CORE_ALSO):
            return None
        return "core includes the C++ standard library and fmt alone"
    return None


def check(root):
    """Returns the number of files looked at, and one line for each wrong include."""
    files = 0
    problems = []
    for top in ("bpf", "userspace"):
        for path in sorted((root / top).rglob("*")):
            if path.suffix not in SUFFIXES or not path.is_file():
                continue
            files += 1
            relative = path.relative_to(root)
            room = room_of(relative)
            if room not in OWN:
                problems.append(f"{relative}: belongs to no room: bpf/ or userspace/{{{','.join(ROOMS)}}}/")
                continue
            text = without_comments(path.read_text(encoding="utf-8"))
            for match in INCLUDE.finditer(text):
                reason = wrong(room, relative, match.group(1) == '"', match.group(2))
                if reason:
                    line = text.count("\n", 0, match.start(1)) + 1
                    problems.append(f"{relative}:{line}: includes {match.group(2)}: {reason}")
    return files, problems


def self_test():
    """A right tree passes; each wrong include in it fails, and is the only one that does."""
    right = {
        "bpf/event.h": "#include <linux/types.h>\n",
        "bpf/connection.h": '#include "event.h"\n',
        "bpf/trace.bpf.c": '#include "emit.bpf.h"\n#include <bpf/bpf_helpers.h>\n',
        "userspace/core/cause.h": "#include <string_view>\n",
        "userspace/core/classify.cpp": '#include "core/classify.h"\n#include <fmt/format.h>\n#include <cerrno>\n'
                                       '#include "bpf/event.h"\n',
        "userspace/source/live.cpp": '#include <bpf/libbpf.h>\n#include "trace_hash.skel.h"\n#include "core/cause.h"\n',
        "userspace/sink/json.cpp": '#include <nlohmann/json.hpp>\n#include "core/cause.h"\n// #include "source/live.h"\n',
        "userspace/cli/main.cpp": '#include "source/live.h"\n#include "sink/json.h"\n#include <CLI/CLI.hpp>\n',
    }
    wrongs = [
        ("bpf/event.h", "#include <stdint.h>"),
        ("bpf/connection.h", '#include "emit.bpf.h"\n#include <stdlib.h>'),
        ("bpf/trace.bpf.c", '#include "../userspace/core/cause.h"'),
        ("bpf/trace.bpf.c", '#include "core/cause.h"'),
        ("userspace/core/classify.cpp", '#include "source/live.h"'),
        ("userspace/core/classify.cpp", '#include "sink/json.h"'),
        ("userspace/core/classify.cpp", '  #  include "cli/options.h"'),
        ("userspace/core/classify.cpp", "#include <bpf/libbpf.h>"),
        ("userspace/core/classify.cpp", '#include "bpf/emit.bpf.h"'),
        ("userspace/core/classify.cpp", "#include <nlohmann/json.hpp>"),
        ("userspace/core/classify.cpp", "#include <CLI/CLI.hpp>"),
        ("userspace/core/classify.cpp", "#include <sys/socket.h>"),
        ("userspace/core/classify.cpp", "#include <unistd.h>"),
        ("userspace/core/classify.cpp", "#include <chrono>"),
        ("userspace/core/classify.cpp", "/* a comment */ #include <unistd.h>"),
        ("userspace/core/cause.h", '#include "../sink/json.h"'),
        ("userspace/sink/json.cpp", '#include "source/live.h"'),
        ("userspace/sink/json.cpp", '#include "cli/options.h"'),
        ("userspace/sink/json.cpp", "#include <bpf/bpf.h>"),
        ("userspace/sink/json.cpp", '#include "trace_hash.skel.h"'),
        ("userspace/source/live.cpp", '#include "sink/json.h"'),
        ("userspace/source/live.cpp", '#include "cli/options.h"'),
        ("userspace/source/live.cpp", '#include "bpf/kernel.bpf.h"'),
        ("userspace/cli/main.cpp", "#include <bpf/libbpf.h>"),
        ("userspace/cli/main.cpp", '#include "bpf/emit.bpf.h"'),
    ]
    failures = []

    def problems_with(extra=None):
        with tempfile.TemporaryDirectory(prefix="finrace-includes-") as directory:
            root = Path(directory)
            for name, text in right.items():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                if extra and extra[0] == name:
                    text += extra[1] + "\n"
                (root / name).write_text(text, encoding="utf-8")
            if extra and extra[0] not in right:
                (root / extra[0]).parent.mkdir(parents=True, exist_ok=True)
                (root / extra[0]).write_text(extra[1] + "\n", encoding="utf-8")
            return check(root)[1]

    if problems_with():
        failures.append(f"the right tree: {problems_with()}")
    for name, line in wrongs:
        found = problems_with((name, line))
        if len(found) != 1 or not found[0].startswith(f"{name}:"):
            failures.append(f"{name} with {line!r}: {found or 'not found'}")
    if not problems_with(("userspace/attic/old.cpp", "#include <vector>")):
        failures.append("a file in no room was not found")
    for failure in failures:
        print(f"include_rules self-test: {failure}", file=sys.stderr)
    print(f"include_rules self-test: {len(wrongs)} wrong includes, {len(failures)} of them missed or misjudged")
    return 1 if failures else 0


def main(arguments):
    if arguments == ["--self-test"]:
        return self_test()
    if len(arguments) > 1 or (arguments and arguments[0].startswith("-")):
        print("usage: include_rules.py [ROOT | --self-test]", file=sys.stderr)
        return 2
    root = Path(arguments[0]) if arguments else Path(__file__).resolve().parent.parent
    files, problems = check(root)
    if files == 0:
        print(f"include_rules: no sources in {root}/bpf and {root}/userspace: name the project's root", file=sys.stderr)
        return 2
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"include_rules: {files} files, {len(problems)} wrong includes")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

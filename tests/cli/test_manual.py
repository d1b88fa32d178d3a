#!/usr/bin/python3
"""What `finrace manual`, `completion` and `help` print, given to those who read it: man, bash, zsh and fish."""

import os
import re
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
FINRACE = os.path.join(ROOT, "build", "finrace")
sys.path.insert(1, os.path.join(ROOT, "tests", "live"))
from harness import must, need  # noqa: E402

COMMANDS = ("run", "watch", "diagnose", "record", "doctor", "explain", "manual", "completion", "help")


def output(*command, **more):
    done = subprocess.run(command, stdin=more.pop("stdin", subprocess.DEVNULL), capture_output=True, timeout=60, check=False,
                          text=True, **more)
    return done.returncode, done.stdout, done.stderr


def finrace(*arguments):
    status, text, said = output(FINRACE, *arguments)
    must(status == 0 and not said, f"finrace {' '.join(arguments)}: exit {status}, said {said}")
    return text


def formatted(page):
    """The page as a terminal shows it. groff's warnings are failures."""
    done = subprocess.run([need("man", "man-db"), "--warnings", "-E", "UTF-8", "-l", "-"], input=page, capture_output=True,
                          check=False, text=True, env={**os.environ, "MANWIDTH": "100", "LC_ALL": "C.UTF-8"}, timeout=60)
    must(done.returncode == 0 and not done.stderr, f"man: exit {done.returncode}: {done.stderr}")
    return re.sub(r".\x08", "", done.stdout)


def every_command_has_a_page():
    whole = formatted(finrace("manual"))
    for command in COMMANDS:
        must(f"finrace-{command}(8)" in whole, f"finrace(8) does not name {command}")
        page = formatted(finrace("manual", command))
        _, text, _ = output(FINRACE, command, "--help")
        flags = set(re.findall(r"--[a-z][a-z-]*", text.split("Options:")[1].split("Ends with")[0].split("Examples:")[0]))
        must(flags and all(flag in page for flag in flags), f"{command}: {flags} are not all on its page")
        must("EXAMPLES" in page or "Examples:" not in text, f"{command}: no examples")


def every_cause_is_explained():
    page = " ".join(formatted(finrace("manual", "causes")).split())
    ids = [word.strip(",") for line in finrace("explain").splitlines() if "  " in line
           for word in (line.split() if line.startswith("  ") else line.split()[:1])]
    must(len(ids) > 20 and {"keepalive_race", "restart", "exposed"} <= set(ids), f"explained are {ids}")
    for cause in ids:
        must(cause in page, f"{cause} is not on the page")
    must("uvicorn --timeout-keep-alive 65" in page.replace("‐", "-"), "what to look at is not there")


def no_such_page():
    status, text, said = output(FINRACE, "manual", "nothing")
    must(status == 2 and not text and "'nothing' is no page; known are: finrace, run" in said, f"exit {status}: {said}")
    status, text, said = output(FINRACE, "completion", "csh")
    must(status == 2 and not text and "accepted: bash, zsh, fish" in said, f"exit {status}: {said}")


def help_is_a_command():
    _, text, _ = output(FINRACE, "--help")
    must(finrace("help") == text and "finrace [OPTIONS] SUBCOMMAND" in text, f"not as --help: {text}")
    for command in COMMANDS:
        _, text, _ = output(FINRACE, command, "--help")
        must(finrace("help", command) == text and f"finrace {command} [OPTIONS]" in text, f"{command}: not as --help: {text}")
        noise = re.findall(r"Excludes|Needs|REQUIRED|:INT|\.\.\. \.\.\.", text)
        must(not noise, f"{command} --help: {noise}")
    text = finrace("help", "diagnose")
    must("[OPTIONS] [FILE...]\n" in text and "\n  FILE... " in text, f"no FILE... in {text}")
    status, text, said = output(FINRACE, "help", "nothing")
    must(status == 2 and not text and "'nothing' is no command; known are: run, " in said, f"exit {status}: {said}")
    status, _, _ = output(FINRACE, "doctor", "help")
    must(status == 2, f"finrace doctor help: exit {status}")


def what_a_reload_takes():
    """The help and docs/operations.md name the same keys."""
    keys = re.search(r"Of --config's keys (.*?) change while it runs", " ".join(finrace("help", "run").split()))
    with open(os.path.join(ROOT, "docs", "operations.md"), encoding="utf-8") as file:
        rows = re.search(r"^\| key \|.*?\n\n", file.read(), re.MULTILINE | re.DOTALL)
    must(keys and rows, "one of them does not tell")
    told = {key for row in rows[0].strip().splitlines() for key in re.findall(r"`(\w+)`", row.split("|")[1])}
    must(set(keys[1].split(", ")) == told, f"{keys[1]}, but {sorted(told)}")


# What is typed, and what must be among that which is offered; None: nothing is to be.
TYPED = [
    ("finrace di", {"diagnose"}),
    ("finrace diagnose --js", {"--json"}),
    ("finrace run --backend ", {"auto", "trace", "cgroup"}),
    ("finrace run --backend tr", {"trace"}),
    ("finrace explain keepalive", {"keepalive_race"}),
    ("finrace explain rest", {"restart"}),
    ("finrace completion ", {"bash", "zsh", "fish"}),
    ("finrace help di", {"diagnose"}),
    ("finrace manual ca", {"causes"}),
    ("finrace run --upstream ", None),
    ("finrace diagnose ./READ", {"./README.md"}),
]


def offered(typed, found, shell):
    def check(name, wanted):
        words = {word.split("\t")[0].strip() for word in found(name)}
        must(wanted <= words if wanted else not words, f"{shell}: '{name}' offers {sorted(words)}, wanted {wanted}")

    for one, wanted in typed:
        check(one, wanted)


def bash():
    script = finrace("completion", "bash")

    def found(typed):
        words = typed.split(" ")
        quoted = " ".join(f"'{word}'" for word in words)
        status, text, said = output("bash", "-c", f"{script}\nCOMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}\n_finrace\n"
                                    'printf "%s\\n" "${COMPREPLY[@]}"', cwd=ROOT)
        must(status == 0 and not said, f"bash: {said}")
        return [line for line in text.splitlines() if line]

    offered(TYPED, found, "bash")


def fish():
    script = finrace("completion", "fish")

    def found(typed):
        status, text, said = output(need("fish", "fish"), "--no-config", "-c", f"{script}\ncomplete -C '{typed}'", cwd=ROOT)
        must(status == 0 and not said, f"fish: {said}")
        return [line for line in text.splitlines() if line]

    offered(TYPED, found, "fish")


def zsh():
    """In a terminal of its own: zsh completes nowhere else. Tab twice lists."""
    script = f"""
        zmodload zsh/zpty
        zpty -b shell {need("zsh", "zsh")} -f -i
        say() {{ zpty -w shell "$1" }}
        say "autoload -Uz compinit && compinit -u -D; PS1=; zstyle ':completion:*' list-colors ''; LISTMAX=1000; stty -echo"
        say "source <({FINRACE} completion zsh)"
        say "echo re''ady"
        zpty -m -r shell seen '*ready*'
        zpty -n -w shell "$1"$'\\t\\t\\t'
        sleep 1
        zpty -r shell seen '*' || true
        while zpty -r -t shell more; do seen+=$more; done
        print -r -- "$seen"
        zpty -d shell
    """

    def found(typed):
        status, text, said = output(need("zsh", "zsh"), "-f", "-c", script, "zsh", typed, cwd=ROOT)
        must(status == 0, f"zsh: {said}")
        return re.findall(r"[./\w-]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", " ", text.replace("\r", " ")))

    must(output(need("zsh", "zsh"), "-n", "-c", finrace("completion", "zsh"))[0] == 0, "zsh -n refuses it")
    offered([one for one in TYPED if one[1]], found, "zsh")


def main():
    failed = 0
    tests = (every_command_has_a_page, every_cause_is_explained, no_such_page, help_is_a_command, what_a_reload_takes, bash, fish, zsh)
    for test in tests:
        name = test.__name__.replace("_", " ")
        try:
            test()
            print(f"  pass  {name}")
        except AssertionError as error:
            failed += 1
            print(f"  FAIL  {name}\n          {error}")
    print(f"{len(tests) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

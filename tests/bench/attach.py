#!/usr/bin/python3
"""Loads a BPF object and attaches all of its programs, until a signal comes. libbpf alone: works from 5.10 on.

usage: attach.py OBJECT [CGROUP]    cgroup programs go to the folder CGROUP
"""
import ctypes
import os
import signal
import sys


def main() -> int:
    if len(sys.argv) not in (2, 3):
        print(__doc__, file=sys.stderr)
        return 2
    libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
    libbpf.bpf_object__open_file.restype = ctypes.c_void_p
    libbpf.bpf_object__next_program.restype = ctypes.c_void_p
    libbpf.bpf_program__name.restype = ctypes.c_char_p
    libbpf.bpf_program__attach.restype = ctypes.c_void_p
    libbpf.bpf_program__attach_cgroup.restype = ctypes.c_void_p

    def checked(result, what):
        if not result:
            error = ctypes.get_errno()
            print(f"attach.py: {what} failed: {os.strerror(error)}", file=sys.stderr)
            sys.exit(2)
        return ctypes.c_void_p(result)

    bpf_object = checked(libbpf.bpf_object__open_file(sys.argv[1].encode(), None), f"opening {sys.argv[1]}")
    checked(libbpf.bpf_object__load(bpf_object) == 0, f"loading {sys.argv[1]}")
    cgroup = os.open(sys.argv[2], os.O_RDONLY | os.O_DIRECTORY) if len(sys.argv) == 3 else -1
    program = libbpf.bpf_object__next_program(bpf_object, None)
    while program:
        handle = ctypes.c_void_p(program)
        name = libbpf.bpf_program__name(handle).decode()
        if cgroup >= 0:
            checked(libbpf.bpf_program__attach_cgroup(handle, ctypes.c_int(cgroup)), f"attaching {name}")
        else:
            checked(libbpf.bpf_program__attach(handle), f"attaching {name}")
        program = libbpf.bpf_object__next_program(bpf_object, handle)
    print("attach.py: ready", file=sys.stderr, flush=True)
    signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main())

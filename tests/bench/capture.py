#!/usr/bin/python3
"""A capture of a gigabyte: how long `finrace diagnose` takes for it, and with how much memory, beside `tshark -q -z conv,tcp`.

It is written here, as a busy proxy's would be: keep-alive connections to four upstreams, a hundred of them at once, an exchange
of a request and a response of a few segments each. Both read it from the page cache, finrace three times (the median counts),
tshark once. Prints one JSON object. The file is deleted.
"""

import argparse
import heapq
import json
import os
import random
import statistics
import struct
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SYN, ACK, PSH, FIN = 2, 16, 8, 1
AT_ONCE = 100
UPSTREAMS = 4


def frame(source, target, seq, ack, flags, payload):
    tcp = struct.pack(">HHIIBBHHH", source[1], target[1], seq & 0xFFFFFFFF, ack & 0xFFFFFFFF, 0x50, flags, 501, 0, 0)
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 40 + len(payload), 0, 0x4000, 64, 6, 0, source[0], target[0])
    return b"\2" * 12 + b"\x08\x00" + ip + tcp + payload


class Connection:
    """Its segments, one at a time, with the pause before each."""

    def __init__(self, number, chance):
        client = (bytes((10, 0, 0, 1)), 20000 + number % 40000)
        server = (bytes((10, 0, 1, 1 + number % UPSTREAMS)), 8000)
        self.segments = self.play(client, server, chance)
        self.at = 0

    @staticmethod
    def play(client, server, chance):
        mine, theirs = chance.getrandbits(32), chance.getrandbits(32)
        yield 0, frame(client, server, mine, 0, SYN, b"")
        yield 20_000, frame(server, client, theirs, mine + 1, SYN | ACK, b"")
        mine, theirs = mine + 1, theirs + 1
        yield 20, frame(client, server, mine, theirs, ACK, b"")
        for _ in range(chance.randrange(1, 200)):
            request = b"POST /api/items HTTP/1.1\r\nHost: upstream\r\nContent-Length: 200\r\n\r\n".ljust(chance.randrange(100, 900), b"x")
            yield chance.randrange(100_000, 900_000), frame(client, server, mine, theirs, ACK | PSH, request)
            mine += len(request)
            for part in range(chance.randrange(1, 8)):
                yield 21_000 if part == 0 else 15, frame(server, client, theirs, mine, ACK, b"y" * 1448)
                theirs += 1448
            yield 30, frame(client, server, mine, theirs, ACK, b"")
        yield 5_000_000, frame(server, client, theirs, mine, FIN | ACK, b"")
        yield 100, frame(client, server, mine, theirs + 1, FIN | ACK, b"")
        yield 20_000, frame(server, client, theirs + 1, mine + 1, ACK, b"")


def write(path, size):
    """Not in the order of a heap but nearly so: each connection moves on by itself, the one that is furthest behind first."""
    chance = random.Random(1)
    count, number = 0, 0
    live = []
    with open(path, "wb", buffering=1 << 20) as file:
        file.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 262144, 1))
        start = 1_700_000_000_000_000
        for _ in range(AT_ONCE):
            heapq.heappush(live, (start + chance.randrange(1_000_000), number, Connection(number, chance)))
            number += 1
        written = 24
        while written < size:
            at, own, connection = heapq.heappop(live)
            try:
                pause, packet = next(connection.segments)
            except StopIteration:
                heapq.heappush(live, (at + 1000, number, Connection(number, chance)))
                number += 1
                continue
            at += pause
            file.write(struct.pack("<IIII", at // 1_000_000, at % 1_000_000, len(packet), len(packet)) + packet)
            written += 16 + len(packet)
            count += 1
            heapq.heappush(live, (at, own, connection))
    return count


def timed(command):
    begun = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return time.monotonic() - begun, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, process.returncode, output


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--finrace", default=os.path.join(ROOT, "build", "finrace"))
    parser.add_argument("--bytes", type=int, default=1 << 30)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="finrace-bench-") as folder:
        path = os.path.join(folder, "busy.pcap")
        packets = write(path, options.bytes)
        ways = {"finrace": [options.finrace, "diagnose", "--json", path], "tshark": ["tshark", "-r", path, "-q", "-z", "conv,tcp"]}
        # tshark takes minutes: what one run differs from the next by is nothing beside that.
        runs = {name: [timed(command) for _ in range(options.repeat if name == "finrace" else 1)] for name, command in ways.items()}
        report = json.loads(runs["finrace"][0][4])
        result = {"kernel": os.uname().release, "bytes": options.bytes, "packets": packets, "requests": report["requests"], "lost": report["lost"]}
        for name, taken in runs.items():
            result[name] = {"seconds": statistics.median(one[0] for one in taken), "processor": statistics.median(one[1] for one in taken),
                            "memory": max(one[2] for one in taken), "status": taken[0][3]}
        result["ratio"] = result["finrace"]["seconds"] / result["tshark"]["seconds"]
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

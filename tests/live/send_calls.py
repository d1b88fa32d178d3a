"""Every system call that sends bytes over a TCP socket, as Python functions of (socket, bytes).

Where Python has no name for a call (sendmmsg, vmsplice, io_uring) it is made through libc, by its number if need be.
"""

import ctypes
import mmap
import os
import socket
import struct
import tempfile

libc = ctypes.CDLL(None, use_errno=True)

SO_ZEROCOPY, MSG_ZEROCOPY = 60, 0x4000000  # asm-generic/socket.h, linux/socket.h
SYS_IO_URING_SETUP, SYS_IO_URING_ENTER = 425, 426  # the same on every architecture
IORING_OP_SENDMSG, IORING_OP_WRITE, IORING_OP_SEND = 9, 23, 26
IORING_OFF_SQ_RING, IORING_OFF_CQ_RING, IORING_OFF_SQES = 0, 0x8000000, 0x10000000
IORING_ENTER_GETEVENTS = 1


def checked(result, what):
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


def all_sent(result, data, what):
    if result != len(data):
        raise OSError(0, f"{what} took {result} of {len(data)} bytes")


def thirds(data):
    step = max(1, len(data) // 3)
    return [data[:step], data[step : 2 * step], data[2 * step :]]


def by_send(sock, data):
    all_sent(sock.send(data), data, "send")


def by_sendto(sock, data):
    all_sent(sock.sendto(data, sock.getpeername()), data, "sendto")


def by_sendmsg(sock, data):
    all_sent(sock.sendmsg(thirds(data)), data, "sendmsg")


class Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]


class Msghdr(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_void_p), ("name_size", ctypes.c_uint32),
        ("iov", ctypes.POINTER(Iovec)), ("iov_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p), ("control_size", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    ]


class Mmsghdr(ctypes.Structure):
    _fields_ = [("header", Msghdr), ("sent", ctypes.c_uint)]


class Messages:
    """One message for each part; the buffers live as long as this does."""

    def __init__(self, parts):
        self.buffers = [ctypes.create_string_buffer(part, len(part)) for part in parts]
        self.vectors = (Iovec * len(parts))()
        self.messages = (Mmsghdr * len(parts))()
        for index, buffer in enumerate(self.buffers):
            self.vectors[index] = Iovec(ctypes.addressof(buffer), len(parts[index]))
            self.messages[index].header.iov = ctypes.pointer(self.vectors[index])
            self.messages[index].header.iov_count = 1


def by_sendmmsg(sock, data):
    parts = thirds(data)
    messages = Messages(parts)
    checked(libc.sendmmsg(sock.fileno(), messages.messages, len(parts), 0), "sendmmsg")
    all_sent(sum(one.sent for one in messages.messages), data, "sendmmsg")


def by_write(sock, data):
    all_sent(os.write(sock.fileno(), data), data, "write")


def by_writev(sock, data):
    all_sent(os.writev(sock.fileno(), thirds(data)), data, "writev")


def by_sendfile(sock, data):
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        all_sent(os.sendfile(sock.fileno(), file.fileno(), 0, len(data)), data, "sendfile")


def through_pipe(sock, data, fill):
    reader, writer = os.pipe()
    try:
        all_sent(fill(writer), data, "filling the pipe")
        all_sent(os.splice(reader, sock.fileno(), len(data)), data, "splice")
    finally:
        os.close(reader)
        os.close(writer)


def by_splice(sock, data):
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        through_pipe(sock, data, lambda writer: os.splice(file.fileno(), writer, len(data), offset_src=0))


lent = []  # pages that vmsplice has given away: nobody says when they have been read


def by_vmsplice(sock, data):
    messages = Messages([data])
    lent.append(messages)
    through_pipe(sock, data, lambda writer: checked(libc.vmsplice(writer, messages.vectors, 1, 0), "vmsplice"))


def by_zerocopy(sock, data):
    sock.setsockopt(socket.SOL_SOCKET, SO_ZEROCOPY, 1)
    all_sent(sock.send(data, MSG_ZEROCOPY), data, "send with MSG_ZEROCOPY")


class Ring:
    """An io_uring of one entry."""

    def __init__(self):
        parameters = ctypes.create_string_buffer(120)
        self.fd = checked(libc.syscall(SYS_IO_URING_SETUP, 1, parameters), "io_uring_setup")
        words = struct.unpack("30I", parameters.raw)
        sq_entries, cq_entries = words[:2]
        self.sq_tail, self.sq_array = words[11], words[16]
        self.cq_head, self.cqes = words[20], words[25]
        self.maps = [
            self.map(self.sq_array + 4 * sq_entries, IORING_OFF_SQ_RING),
            self.map(self.cqes + 16 * cq_entries, IORING_OFF_CQ_RING),
            self.map(64 * sq_entries, IORING_OFF_SQES),
        ]

    def map(self, size, offset):
        return mmap.mmap(self.fd, size, mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)

    def submit(self, opcode, fd, address, size):
        """One request, waited for; its result."""
        sq, cq, sqes = self.maps
        # opcode, flags, ioprio, fd, off (-1: the file's own position), addr, len, op flags, user data
        struct.pack_into("=BBHiqQII", sqes, 0, opcode, 0, 0, fd, -1 if opcode == IORING_OP_WRITE else 0, address, size, 0)
        struct.pack_into("=I", sq, self.sq_array, 0)
        struct.pack_into("=I", sq, self.sq_tail, struct.unpack_from("=I", sq, self.sq_tail)[0] + 1)
        checked(libc.syscall(SYS_IO_URING_ENTER, self.fd, 1, 1, IORING_ENTER_GETEVENTS, None, 0), "io_uring_enter")
        _, result, _ = struct.unpack_from("=QiI", cq, self.cqes)
        if result < 0:
            raise OSError(-result, f"io_uring, operation {opcode}: {os.strerror(-result)}")
        return result

    def close(self):
        for one in self.maps:
            one.close()
        os.close(self.fd)


def through_io_uring(opcode):
    def by_io_uring(sock, data):
        messages = Messages([data])
        ring = Ring()
        try:
            if opcode == IORING_OP_SENDMSG:
                result = ring.submit(opcode, sock.fileno(), ctypes.addressof(messages.messages[0].header), 1)
            else:
                result = ring.submit(opcode, sock.fileno(), messages.vectors[0].base, len(data))
            all_sent(result, data, "io_uring")
        finally:
            ring.close()

    return by_io_uring


CALLS = {
    "send": by_send,
    "sendto": by_sendto,
    "sendmsg": by_sendmsg,
    "sendmmsg": by_sendmmsg,
    "write": by_write,
    "writev": by_writev,
    "sendfile": by_sendfile,
    "splice": by_splice,
    "vmsplice": by_vmsplice,
    "MSG_ZEROCOPY": by_zerocopy,
    "io_uring send": through_io_uring(IORING_OP_SEND),
    "io_uring sendmsg": through_io_uring(IORING_OP_SENDMSG),
    "io_uring write": through_io_uring(IORING_OP_WRITE),
}

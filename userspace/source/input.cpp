// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "source/input.h"

#include <array>
#include <cerrno>
#include <cstring>
#include <string_view>
#include <utility>

#include <fcntl.h>
#include <unistd.h>

#include <fmt/format.h>

namespace finrace {

namespace {

using namespace std::string_view_literals;

constexpr std::size_t head_bytes = 4;

/// pcap with microseconds and with nanoseconds, in either byte order, and pcapng's Section Header Block: what
/// pcap_open_offline(3) reads.
constexpr std::array capture_magics{"\xd4\xc3\xb2\xa1"sv, "\xa1\xb2\xc3\xd4"sv, "\x4d\x3c\xb2\xa1"sv,
                                    "\xa1\xb2\x3c\x4d"sv, "\x0a\x0d\x0d\x0a"sv};
/// gzip (RFC 1952 2.3.1), xz, zstd (RFC 8878 3.1.1), bzip2.
constexpr std::array compressed_magics{"\x1f\x8b"sv,
                                       "\xfd"
                                       "7zX"sv,
                                       "\x28\xb5\x2f\xfd"sv, "BZh"sv};

InputKind kind_of(std::string_view head)
{
    for (const std::string_view magic : capture_magics)
        if (head == magic)
            return InputKind::capture;
    for (const std::string_view magic : compressed_magics)
        if (head.starts_with(magic))
            return InputKind::compressed;
    if (head.starts_with("{\"") || head.starts_with("{\n"))
        return InputKind::json;
    return InputKind::other;
}

} // namespace

Input open_input(const std::string& path)
{
    Input input{.name = path == "-" ? "standard input" : path,
                .descriptor = Descriptor(path == "-" ? ::fcntl(STDIN_FILENO, F_DUPFD_CLOEXEC, 0)
                                                     : ::open(path.c_str(), O_RDONLY | O_CLOEXEC)),
                .head = std::string(head_bytes, '\0')};
    std::size_t got = 0;
    while (input.descriptor && got < head_bytes) {
        const ssize_t more = ::read(input.descriptor.get(), input.head.data() + got, head_bytes - got);
        if (more == 0)
            break;
        if (more < 0 && errno == EINTR)
            continue;
        if (more < 0)
            throw InputError(fmt::format("cannot read {}: {}", input.name, std::strerror(errno)));
        got += static_cast<std::size_t>(more);
    }
    if (!input.descriptor)
        throw InputError(fmt::format("cannot read {}: {}", input.name, std::strerror(errno)));
    input.head.resize(got);
    input.kind = kind_of(input.head);
    return input;
}

} // namespace finrace

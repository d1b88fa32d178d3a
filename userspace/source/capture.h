// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Captures as tcpdump writes them: pcap and pcapng, by libpcap. Here a packet becomes the TCP segment in it; what
// segments mean for a connection is source/follower.h's.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "source/input.h"

namespace finrace {

/// Which way a packet went, seen from the host that captured it; only `-i any` (LINUX_SLL, LINUX_SLL2) tells.
enum class Heading : std::uint8_t { unknown, inwards, outwards };

struct Endpoint {
    std::array<std::uint8_t, 16> address{}; ///< network order; IPv4 in the first four bytes
    std::uint16_t port = 0;

    bool operator==(const Endpoint&) const = default;
};

/// The headers of one segment, or of the segment that an ICMP error quotes.
struct Segment {
    std::uint64_t at_ns = 0; ///< the capture's clock: nanoseconds since 1970
    Endpoint source;
    Endpoint target;
    std::uint8_t family = 4; ///< 4 or 6
    std::uint8_t flags = 0;  ///< enum tcp_header_flag
    std::uint8_t hops = 0;   ///< routers passed, by the time to live that is left: senders start at 64, 128 or 255
    Heading heading = Heading::unknown;
    std::uint16_t icmp_error = 0; ///< the errno that ICMP's error makes of the connection; `source` sent what it quotes
    std::uint32_t seq = 0;
    std::uint32_t ack = 0;
    std::uint32_t payload = 0; ///< bytes by the IP header, captured or not
    std::uint32_t first = 0;   ///< the first four of them, the first in the highest place; 0 if they were not captured
};

/// What was met on the way to the segments.
struct CaptureCounts {
    std::uint64_t packets = 0;
    std::uint64_t segments = 0;
    std::uint64_t unreadable = 0; ///< TCP whose header was not captured, or lies in a later fragment
};

/// Takes a packet apart.
class Decoder {
public:
    /// `link_type` as pcap_datalink(3) has it. Throws InputError if there is no decoder for it.
    explicit Decoder(int link_type);

    /// The segment in a packet of which `captured` bytes of `length` are at `bytes`; nothing if it holds none, or none
    /// that can be read, which `counts` then has. The time is left to the caller.
    std::optional<Segment> decode(const std::uint8_t* bytes, std::size_t captured, std::size_t length,
                                  CaptureCounts& counts) const;

private:
    int link_type_;
};

/// Reads a capture from a file or a pipe of any size.
class CaptureReader {
public:
    /// Throws InputError if it can't be read as a capture. A read that a signal breaks off asks `stopped` whether that
    /// is the end.
    explicit CaptureReader(Input input, std::function<bool()> stopped = {});
    ~CaptureReader();
    CaptureReader(const CaptureReader&) = delete;
    CaptureReader& operator=(const CaptureReader&) = delete;

    /// The next segment; nothing at the end, or where the file can't be read on.
    std::optional<Segment> next();

    [[nodiscard]] const std::string& name() const { return name_; } ///< for people
    [[nodiscard]] int descriptor() const;
    [[nodiscard]] const CaptureCounts& counts() const { return counts_; }
    /// Why it could not be read to its end; empty if it was.
    [[nodiscard]] const std::string& problem() const { return problem_; }

private:
    struct Source;

    std::string name_;
    std::unique_ptr<Source> source_;
    std::optional<Decoder> decoder_;
    CaptureCounts counts_;
    std::string problem_;
};

} // namespace finrace

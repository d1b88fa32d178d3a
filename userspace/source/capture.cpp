// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "source/capture.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <span>
#include <utility>
#include <vector>

#include <netinet/in.h>
#include <unistd.h>

#include <pcap/pcap.h>

#include <fmt/format.h>

#include "bpf/connection.h"
#include "core/units.h"

namespace finrace {

namespace {

constexpr std::uint16_t ethertype_ipv4 = 0x0800;
constexpr std::uint16_t ethertype_ipv6 = 0x86dd;
constexpr std::uint16_t ethertype_pppoe = 0x8864; // RFC 2516 4
constexpr std::uint16_t ppp_ipv4 = 0x0021;        // RFC 1332 2
constexpr std::uint16_t ppp_ipv6 = 0x0057;        // RFC 5072 3
constexpr std::uint8_t sll_outgoing = 4;          // PACKET_OUTGOING, packet(7)

/// The most headers between link and network, or extension headers, that any packet in use has.
constexpr int most_headers = 8;

constexpr std::size_t buffer_bytes = 1U << 18U;

using Bytes = std::span<const std::uint8_t>;

std::uint16_t two(Bytes bytes, std::size_t at)
{
    return static_cast<std::uint16_t>(bytes[at] << 8U | bytes[at + 1]);
}

std::uint32_t four(Bytes bytes, std::size_t at)
{
    return static_cast<std::uint32_t>(two(bytes, at)) << 16U | two(bytes, at + 2);
}

Bytes behind(Bytes bytes, std::size_t count)
{
    return count <= bytes.size() ? bytes.subspan(count) : Bytes{};
}

/// What is left of a packet: as much as was captured, and as much as there was on the wire.
struct Packet {
    Bytes bytes;
    std::size_t length = 0;

    void pass(std::size_t count)
    {
        bytes = behind(bytes, count);
        length -= std::min(length, count);
    }
};

std::uint16_t ethertype_of_ppp(std::uint16_t protocol)
{
    return protocol == ppp_ipv4 ? ethertype_ipv4 : protocol == ppp_ipv6 ? ethertype_ipv6 : std::uint16_t{0};
}

/// Passes what lies between an EtherType and the network's header: VLAN tags (IEEE 802.1Q, 802.1ad), PPPoE.
std::uint16_t pass_tags(Packet& packet, std::uint16_t ethertype)
{
    for (int tags = 0; tags < most_headers; ++tags) {
        switch (ethertype) {
        case 0x8100:
        case 0x88a8:
        case 0x9100:
            if (packet.bytes.size() < 4)
                return 0;
            ethertype = two(packet.bytes, 2);
            packet.pass(4);
            break;
        case ethertype_pppoe:
            if (packet.bytes.size() < 8)
                return 0;
            ethertype = ethertype_of_ppp(two(packet.bytes, 6));
            packet.pass(8);
            break;
        default:
            return ethertype;
        }
    }
    return 0;
}

std::uint16_t ethertype_by_version(const Packet& packet)
{
    if (packet.bytes.empty())
        return 0;
    switch (packet.bytes[0] >> 4U) {
    case 4:
        return ethertype_ipv4;
    case 6:
        return ethertype_ipv6;
    default:
        return 0;
    }
}

/// Passes the link's header; the EtherType of what follows, 0 for nothing that concerns us. Formats: pcap-linktype(7).
std::uint16_t pass_link(int link_type, Packet& packet, Heading& heading)
{
    const auto header = [&packet](std::size_t size) { return packet.bytes.size() >= size; };
    std::uint16_t ethertype = 0;
    switch (link_type) {
    case DLT_EN10MB:
        if (!header(14))
            return 0;
        ethertype = two(packet.bytes, 12);
        packet.pass(14);
        return pass_tags(packet, ethertype);
    case DLT_LINUX_SLL:
        if (!header(16))
            return 0;
        heading = two(packet.bytes, 0) == sll_outgoing ? Heading::outwards : Heading::inwards;
        ethertype = two(packet.bytes, 14);
        packet.pass(16);
        return pass_tags(packet, ethertype);
    case DLT_LINUX_SLL2:
        if (!header(20))
            return 0;
        heading = packet.bytes[10] == sll_outgoing ? Heading::outwards : Heading::inwards;
        ethertype = two(packet.bytes, 0);
        packet.pass(20);
        return pass_tags(packet, ethertype);
    case DLT_NULL:
    case DLT_LOOP: // an address family that differs between systems: the version says as much
        packet.pass(4);
        return ethertype_by_version(packet);
    case DLT_PPP:
    case DLT_PPP_SERIAL: {
        if (header(2) && packet.bytes[0] == 0xff && packet.bytes[1] == 0x03) // RFC 1662 3.1
            packet.pass(2);
        if (packet.bytes.size() < 2)
            return 0;
        ethertype = ethertype_of_ppp(two(packet.bytes, 0));
        packet.pass(2);
        return ethertype;
    }
    default: // raw IP: the constructor takes no other
        return ethertype_by_version(packet);
    }
}

std::uint8_t hops_passed(std::uint8_t left)
{
    return static_cast<std::uint8_t>((left <= 64 ? 64 : left <= 128 ? 128 : 255) - left);
}

/// As tcp_v4_err() and icmp_err_convert (Linux 6.12) have ICMPv4's types and codes (RFC 792); 0 for what ends no
/// connection that is being opened.
std::uint16_t error_of_icmp4(std::uint8_t type, std::uint8_t code)
{
    if (type == 11) // time exceeded
        return EHOSTUNREACH;
    if (type != 3) // destination unreachable
        return 0;
    switch (code) {
    case 2:
        return ENOPROTOOPT;
    case 3:
        return ECONNREFUSED;
    case 4: // fragmentation needed
        return 0;
    case 5:
        return EOPNOTSUPP;
    case 7:
        return EHOSTDOWN;
    case 8:
        return ENONET;
    case 0:
    case 6:
    case 9:
    case 11:
        return ENETUNREACH;
    default:
        return EHOSTUNREACH;
    }
}

/// The same of ICMPv6 (RFC 4443 3), as icmpv6_err_convert() has it.
std::uint16_t error_of_icmp6(std::uint8_t type, std::uint8_t code)
{
    if (type == 3) // time exceeded
        return EHOSTUNREACH;
    if (type != 1) // destination unreachable
        return 0;
    switch (code) {
    case 0:
        return ENETUNREACH;
    case 1:
    case 5:
    case 6:
        return EACCES;
    case 4:
        return ECONNREFUSED;
    default:
        return EHOSTUNREACH;
    }
}

/// Where a network header leads.
struct Network {
    std::uint8_t protocol = 0;
    std::uint8_t left = 0; ///< time to live, hop limit
    bool later_fragment = false;
};

void set_addresses(Segment& segment, Bytes source, Bytes target)
{
    std::copy(source.begin(), source.end(), segment.source.address.begin());
    std::copy(target.begin(), target.end(), segment.target.address.begin());
}

/// Passes an IPv4 header (RFC 791 3.1); padding behind the datagram is cut off.
std::optional<Network> pass_ipv4(Packet& packet, Segment& segment)
{
    if (packet.bytes.size() < 20 || packet.bytes[0] >> 4U != 4)
        return std::nullopt;
    const std::size_t header = std::size_t{packet.bytes[0] & 0x0fU} * 4;
    const std::size_t total = two(packet.bytes, 2);
    if (header < 20 || (total != 0 && total < header))
        return std::nullopt;
    segment.family = 4;
    set_addresses(segment, packet.bytes.subspan(12, 4), packet.bytes.subspan(16, 4));
    const Network network{
        .protocol = packet.bytes[9], .left = packet.bytes[8], .later_fragment = (two(packet.bytes, 6) & 0x1fffU) != 0};
    if (total != 0) { // else the kernel had not cut it yet: more than 64 KiB by BIG TCP
        packet.length = std::min(packet.length, total);
        packet.bytes = packet.bytes.first(std::min(packet.bytes.size(), total));
    }
    packet.pass(header);
    return network;
}

/// The same of IPv6 with its extension headers (RFC 8200 4).
std::optional<Network> pass_ipv6(Packet& packet, Segment& segment)
{
    constexpr std::size_t fixed = 40;
    if (packet.bytes.size() < fixed || packet.bytes[0] >> 4U != 6)
        return std::nullopt;
    segment.family = 6;
    set_addresses(segment, packet.bytes.subspan(8, 16), packet.bytes.subspan(24, 16));
    Network network{.protocol = packet.bytes[6], .left = packet.bytes[7]};
    if (const std::size_t payload = two(packet.bytes, 4); payload != 0) { // else a jumbogram (RFC 2675)
        packet.length = std::min(packet.length, fixed + payload);
        packet.bytes = packet.bytes.first(std::min(packet.bytes.size(), fixed + payload));
    }
    packet.pass(fixed);
    for (int headers = 0; headers < most_headers; ++headers) {
        std::size_t size = 0;
        switch (network.protocol) {
        case IPPROTO_HOPOPTS:
        case IPPROTO_ROUTING:
        case IPPROTO_DSTOPTS:
            if (packet.bytes.size() < 8)
                return std::nullopt;
            size = (packet.bytes[1] + std::size_t{1}) * 8;
            break;
        case IPPROTO_AH: // RFC 4302 2.2
            if (packet.bytes.size() < 8)
                return std::nullopt;
            size = (packet.bytes[1] + std::size_t{2}) * 4;
            break;
        case IPPROTO_FRAGMENT:
            if (packet.bytes.size() < 8)
                return std::nullopt;
            size = 8;
            network.later_fragment = (two(packet.bytes, 2) & 0xfff8U) != 0;
            break;
        default:
            return network;
        }
        network.protocol = packet.bytes[0];
        packet.pass(size);
        if (network.later_fragment)
            return network;
    }
    return std::nullopt;
}

std::optional<Network> pass_network(Packet& packet, Segment& segment, std::uint16_t ethertype)
{
    return ethertype == ethertype_ipv4   ? pass_ipv4(packet, segment)
           : ethertype == ethertype_ipv6 ? pass_ipv6(packet, segment)
                                         : std::nullopt;
}

/// What an ICMP error quotes: the network's header and at least eight bytes of the segment (RFC 792, RFC 4443 2.4).
bool read_quoted(Packet packet, Segment& segment, std::uint16_t ethertype)
{
    const std::optional<Network> network = pass_network(packet, segment, ethertype);
    if (!network || network->protocol != IPPROTO_TCP || network->later_fragment || packet.bytes.size() < 8)
        return false;
    segment.source.port = two(packet.bytes, 0);
    segment.target.port = two(packet.bytes, 2);
    segment.seq = four(packet.bytes, 4);
    return true;
}

/// RFC 9293 3.1
bool read_tcp(const Packet& packet, Segment& segment)
{
    constexpr std::size_t needed = 14; // up to the flags
    if (packet.bytes.size() < needed)
        return false;
    const std::size_t header = std::size_t{packet.bytes[12]} / 16 * 4;
    if (header < 20 || header > packet.length)
        return false;
    segment.source.port = two(packet.bytes, 0);
    segment.target.port = two(packet.bytes, 2);
    segment.seq = four(packet.bytes, 4);
    segment.ack = four(packet.bytes, 8);
    segment.flags = packet.bytes[13];
    segment.payload = static_cast<std::uint32_t>(packet.length - header);
    if (segment.payload >= 4 && packet.bytes.size() >= header + 4)
        segment.first = four(packet.bytes, header);
    return true;
}

} // namespace

Decoder::Decoder(int link_type) : link_type_(link_type)
{
    switch (link_type) {
    case DLT_EN10MB:
    case DLT_LINUX_SLL:
    case DLT_LINUX_SLL2:
    case DLT_RAW:
    case DLT_IPV4:
    case DLT_IPV6:
    case DLT_NULL:
    case DLT_LOOP:
    case DLT_PPP:
    case DLT_PPP_SERIAL:
        return;
    default:
        break;
    }
    const char* name = ::pcap_datalink_val_to_name(link_type);
    throw InputError(fmt::format("its link type is {}, of which finrace reads no packets: capture with tcpdump on an "
                                 "Ethernet device, on a tunnel of IP, or with -i any",
                                 name != nullptr ? name : std::to_string(link_type)));
}

std::optional<Segment> Decoder::decode(const std::uint8_t* bytes, std::size_t captured, std::size_t length,
                                       CaptureCounts& counts) const
{
    Packet packet{.bytes = {bytes, captured}, .length = std::max(captured, length)};
    Segment segment;
    const std::uint16_t ethertype = pass_link(link_type_, packet, segment.heading);
    const std::optional<Network> network = pass_network(packet, segment, ethertype);
    if (!network)
        return std::nullopt;
    if (network->protocol == IPPROTO_TCP) {
        if (network->later_fragment || !read_tcp(packet, segment)) {
            ++counts.unreadable;
            return std::nullopt;
        }
        segment.hops = hops_passed(network->left);
        ++counts.segments;
        return segment;
    }
    const bool four_bytes = ethertype == ethertype_ipv4;
    const int icmp = four_bytes ? int{IPPROTO_ICMP} : int{IPPROTO_ICMPV6};
    if (network->later_fragment || network->protocol != icmp || packet.bytes.size() < 8)
        return std::nullopt;
    segment.icmp_error = four_bytes ? error_of_icmp4(packet.bytes[0], packet.bytes[1])
                                    : error_of_icmp6(packet.bytes[0], packet.bytes[1]);
    packet.pass(8);
    if (segment.icmp_error == 0 || !read_quoted(packet, segment, ethertype))
        return std::nullopt;
    return segment;
}

/// The stream that libpcap reads: what has been read of it already, and then the descriptor.
struct CaptureReader::Source {
    Input input;
    std::function<bool()> stopped;
    std::size_t head_given = 0;
    std::vector<char> buffer = std::vector<char>(buffer_bytes);
    ::pcap_t* pcap = nullptr; ///< owns the stream

    ~Source()
    {
        if (pcap != nullptr)
            ::pcap_close(pcap);
    }
    Source(Input input_, std::function<bool()> stopped_) : input(std::move(input_)), stopped(std::move(stopped_)) {}
    Source(const Source&) = delete;
    Source& operator=(const Source&) = delete;

    static ::ssize_t read(void* cookie, char* to, std::size_t size)
    {
        Source& self = *static_cast<Source*>(cookie);
        if (const std::size_t left = self.input.head.size() - self.head_given; left > 0) {
            const std::size_t given = std::min(left, size);
            std::memcpy(to, self.input.head.data() + self.head_given, given);
            self.head_given += given;
            return static_cast<::ssize_t>(given);
        }
        ::ssize_t got = 0;
        do
            got = ::read(self.input.descriptor.get(), to, size);
        while (got < 0 && errno == EINTR && !(self.stopped && self.stopped()));
        return got < 0 && errno == EINTR ? 0 : got;
    }
};

CaptureReader::CaptureReader(Input input, std::function<bool()> stopped)
    : name_(input.name), source_(std::make_unique<Source>(std::move(input), std::move(stopped)))
{
    std::FILE* stream = ::fopencookie(source_.get(), "r", {.read = Source::read, .write = {}, .seek = {}, .close = {}});
    if (stream == nullptr)
        throw InputError(fmt::format("cannot read {}: {}", name_, std::strerror(errno)));
    std::setvbuf(stream, source_->buffer.data(), _IOFBF, source_->buffer.size());
    std::array<char, PCAP_ERRBUF_SIZE> why{};
    source_->pcap = ::pcap_fopen_offline_with_tstamp_precision(stream, PCAP_TSTAMP_PRECISION_NANO, why.data());
    if (source_->pcap == nullptr) {
        std::fclose(stream);
        throw InputError(fmt::format("cannot read {}: {}", name_, why.data()));
    }
    try {
        decoder_.emplace(::pcap_datalink(source_->pcap));
    } catch (const InputError& error) {
        throw InputError(fmt::format("cannot read {}: {}", name_, error.what()));
    }
}

CaptureReader::~CaptureReader() = default;

int CaptureReader::descriptor() const
{
    return source_->input.descriptor.get();
}

std::optional<Segment> CaptureReader::next()
{
    ::pcap_pkthdr* header = nullptr;
    const std::uint8_t* bytes = nullptr;
    while (problem_.empty()) {
        const int status = ::pcap_next_ex(source_->pcap, &header, &bytes);
        if (status == PCAP_ERROR_BREAK)
            break;
        if (status != 1) {
            problem_ = ::pcap_geterr(source_->pcap);
            break;
        }
        ++counts_.packets;
        std::optional<Segment> segment = decoder_->decode(bytes, header->caplen, header->len, counts_);
        if (!segment)
            continue;
        // In nanoseconds, whatever the field is called.
        const auto seconds = static_cast<std::uint64_t>(std::max<std::int64_t>(header->ts.tv_sec, 0));
        const auto fraction = static_cast<std::uint64_t>(std::max<std::int64_t>(header->ts.tv_usec, 0));
        segment->at_ns = std::min(std::min(seconds, latest_ns / ns_per_second) * ns_per_second +
                                      std::min(fraction, ns_per_second - 1),
                                  latest_ns - 1);
        return segment;
    }
    return std::nullopt;
}

} // namespace finrace

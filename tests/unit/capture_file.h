// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Captures made by hand: packets of any link type, and a TCP conversation of which the test says who knows what, and in
// which order a place on the way sees it.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include <netinet/in.h>

#include <pcap/pcap.h>

#include "bpf/connection.h"

namespace finrace::test {

inline void put(std::string& bytes, std::uint64_t value, int size)
{
    for (int i = size - 1; i >= 0; --i)
        bytes.push_back(static_cast<char>(value >> (8 * i)));
}

/// A pcap file with nanoseconds, as it is on the disk.
class CaptureFile {
public:
    explicit CaptureFile(std::uint32_t link_type = 1) // LINKTYPE_ETHERNET
    {
        for (const std::uint32_t word : {0xa1b23c4dU, 2U | 4U << 16U, 0U, 0U, 262144U, link_type})
            put_word(word);
    }

    /// `length`: on the wire, where it was more than what was captured.
    void add(std::uint64_t at_ns, std::string_view packet, std::size_t length = 0)
    {
        put_word(static_cast<std::uint32_t>(at_ns / 1'000'000'000));
        put_word(static_cast<std::uint32_t>(at_ns % 1'000'000'000));
        put_word(static_cast<std::uint32_t>(packet.size()));
        put_word(static_cast<std::uint32_t>(length != 0 ? length : packet.size()));
        bytes_ += packet;
    }

    [[nodiscard]] const std::string& bytes() const { return bytes_; }

private:
    void put_word(std::uint32_t word)
    {
        for (int i = 0; i < 4; ++i)
            bytes_.push_back(static_cast<char>(word >> (8 * i)));
    }

    std::string bytes_;
};

/// The same packets as pcapng has them: a section, an Ethernet interface of nanoseconds, and a packet block each.
inline std::string pcapng_of(const std::string& pcap)
{
    std::string file;
    const auto word = [&file](std::uint32_t value) {
        for (int i = 0; i < 4; ++i)
            file.push_back(static_cast<char>(value >> (8 * i)));
    };
    const auto word_of = [&pcap](std::size_t at) {
        std::uint32_t value = 0;
        for (std::size_t i = 4; i-- > 0;)
            value = value << 8U | static_cast<unsigned char>(pcap[at + i]);
        return value;
    };
    for (const std::uint32_t value : {0x0a0d0d0aU, 28U, 0x1a2b3c4dU, 1U, ~0U, ~0U, 28U})
        word(value);
    for (const std::uint32_t value : {1U, 32U, 1U, 262144U, 9U | 1U << 16U, 9U, 0U, 32U}) // if_tsresol: 10^-9
        word(value);
    for (std::size_t at = 24; at < pcap.size();) {
        const std::uint32_t size = word_of(at + 8);
        const std::uint32_t padded = (size + 3) / 4 * 4;
        const std::uint64_t ns = std::uint64_t{word_of(at)} * 1'000'000'000 + word_of(at + 4);
        for (const std::uint32_t value : {6U, 32 + padded, 0U, static_cast<std::uint32_t>(ns >> 32U),
                                          static_cast<std::uint32_t>(ns), size, word_of(at + 12)})
            word(value);
        file.append(pcap, at + 16, size).append(padded - size, '\0');
        word(32 + padded);
        at += 16 + size;
    }
    return file;
}

struct TcpFields {
    std::uint16_t source_port;
    std::uint16_t target_port;
    std::uint32_t seq;
    std::uint32_t ack;
    std::uint8_t flags;
    std::size_t options = 0; ///< bytes of them, a multiple of four
};

inline std::string tcp(const TcpFields& fields, std::string_view payload)
{
    std::string bytes;
    put(bytes, fields.source_port, 2);
    put(bytes, fields.target_port, 2);
    put(bytes, fields.seq, 4);
    put(bytes, fields.ack, 4);
    put(bytes, (20 + fields.options) / 4 << 4U, 1);
    put(bytes, fields.flags, 1);
    put(bytes, 0xffff0000, 4); // window, checksum
    put(bytes, 0, 2);
    bytes.append(fields.options, '\1'); // NOP
    return bytes.append(payload);
}

inline std::string ipv4(std::uint32_t source, std::uint32_t target, std::string_view payload, std::uint8_t left = 64,
                        std::size_t options = 0, std::uint16_t fragment = 0, std::uint8_t protocol = IPPROTO_TCP)
{
    std::string bytes;
    put(bytes, 0x40 + (20 + options) / 4, 1);
    put(bytes, 0, 1);
    put(bytes, 20 + options + payload.size(), 2);
    put(bytes, 0, 2);
    put(bytes, fragment, 2);
    put(bytes, left, 1);
    put(bytes, protocol, 1);
    put(bytes, 0, 2);
    put(bytes, source, 4);
    put(bytes, target, 4);
    bytes.append(options, '\1');
    return bytes.append(payload);
}

/// `extensions`: whole headers, of which the last names TCP; `next`: the first one's number.
inline std::string ipv6(std::uint8_t source, std::uint8_t target, std::string_view payload,
                        std::string_view extensions = {}, std::uint8_t next = IPPROTO_TCP)
{
    std::string bytes;
    put(bytes, 0x60000000, 4);
    put(bytes, extensions.size() + payload.size(), 2);
    put(bytes, next, 1);
    put(bytes, 64, 1);
    for (const std::uint8_t last : {source, target}) {
        put(bytes, 0xfd77000000000000, 8);
        put(bytes, last, 8);
    }
    return bytes.append(extensions).append(payload);
}

inline std::string ethernet(std::uint16_t ethertype, std::string_view payload, std::string_view tags = {})
{
    std::string bytes(12, '\2');
    bytes += tags;
    put(bytes, ethertype, 2);
    return bytes.append(payload);
}

inline std::string vlan_tag(std::uint16_t ethertype, std::uint16_t id)
{
    std::string bytes;
    put(bytes, ethertype, 2);
    put(bytes, id, 2);
    return bytes;
}

/// `type`: 0 to this host, 4 from it.
inline std::string sll2(std::uint8_t type, std::uint32_t device, std::string_view payload)
{
    std::string bytes;
    put(bytes, 0x0800, 2);
    put(bytes, 0, 2);
    put(bytes, device, 4);
    put(bytes, 1, 2);
    put(bytes, type, 1);
    bytes.append(9, '\0');
    return bytes.append(payload);
}

inline std::string sll(std::uint8_t type, std::string_view payload)
{
    std::string bytes;
    put(bytes, type, 2);
    bytes.append(12, '\0');
    put(bytes, 0x0800, 2);
    return bytes.append(payload);
}

constexpr std::uint64_t capture_epoch_ns = 1'700'000'000'000'000'000;

/// One connection, from 10.0.0.1 to 10.0.0.2:80. What an end knows of the other is said by hears().
class Talk {
public:
    static constexpr std::uint64_t ms = 1'000'000;

    explicit Talk(CaptureFile& file, std::uint16_t port = 40000, std::uint32_t first_seq = 1000)
        : file_(file), port_(port), client_next_(first_seq), server_next_(900'000 + first_seq)
    {
    }

    std::uint64_t now_ns = capture_epoch_ns;
    std::uint16_t server_port = 80;
    std::uint32_t client_address = 0x0a000001;
    std::uint32_t server_address = 0x0a000002;
    std::uint8_t client_left = 64; ///< time to live
    std::uint8_t server_left = 64;
    bool client_seen = true; ///< whether the capture has what each end sends
    bool server_seen = true;
    std::size_t snap = 262144;
    int times = 1; ///< each packet is met, 20 µs apart

    void wait_ms(double n) { now_ns += static_cast<std::uint64_t>(n * 1e6); }

    void client_hears() { client_knows_ = server_next_; }
    void server_hears() { server_knows_ = client_next_; }

    void syn()
    {
        from_client(TCP_FLAG_BIT_SYN, "", 0);
        ++client_next_;
    }
    void syn_ack()
    {
        server_hears();
        from_server(TCP_FLAG_BIT_SYN | TCP_FLAG_BIT_ACK);
        ++server_next_;
    }
    /// By a capture at the client's end that sees the upstream `far_ms` away.
    void open(double far_ms = 20, double near_ms = 0.01)
    {
        syn();
        wait_ms(far_ms);
        syn_ack();
        wait_ms(near_ms);
        client_hears();
        client_acks();
    }
    void client_acks() { from_client(TCP_FLAG_BIT_ACK, "", client_knows_); }
    void server_acks() { from_server(TCP_FLAG_BIT_ACK); }
    void request(std::string_view text = default_request)
    {
        from_client(TCP_FLAG_BIT_ACK | TCP_FLAG_BIT_PSH, text, client_knows_);
        client_next_ += static_cast<std::uint32_t>(text.size());
    }
    /// The last request once more.
    void repeat_request(std::string_view text = default_request)
    {
        client_next_ -= static_cast<std::uint32_t>(text.size());
        request(text);
    }
    void response(std::string_view text = default_response)
    {
        from_server(TCP_FLAG_BIT_ACK | TCP_FLAG_BIT_PSH, text);
        server_next_ += static_cast<std::uint32_t>(text.size());
    }
    /// Request, answer and its acknowledgement, by a capture at the client's end.
    void exchange(double far_ms = 20)
    {
        request();
        wait_ms(far_ms);
        server_hears();
        response();
        wait_ms(0.01);
        client_hears();
        client_acks();
    }
    void server_fin()
    {
        from_server(TCP_FLAG_BIT_FIN | TCP_FLAG_BIT_ACK);
        ++server_next_;
    }
    void client_fin()
    {
        from_client(TCP_FLAG_BIT_FIN | TCP_FLAG_BIT_ACK, "", client_knows_);
        ++client_next_;
    }
    void server_reset() { from_server(TCP_FLAG_BIT_RST | TCP_FLAG_BIT_ACK); }
    /// By what is left of a socket: at the number that it was told.
    void server_bare_reset()
    {
        const std::uint32_t kept = server_next_;
        server_next_ = client_knows_;
        from_server(TCP_FLAG_BIT_RST);
        server_next_ = kept;
    }
    void client_reset() { from_client(TCP_FLAG_BIT_RST | TCP_FLAG_BIT_ACK, "", client_knows_); }
    void client_bare_reset() { from_client(TCP_FLAG_BIT_RST, "", 0); }
    /// A keep-alive probe.
    void client_probes()
    {
        --client_next_;
        client_acks();
        ++client_next_;
    }
    /// Sent, and lost to the capture.
    void unseen_response(std::uint32_t bytes) { server_next_ += bytes; }

    static constexpr std::string_view default_request =
        "POST /some/where HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n";
    static constexpr std::string_view default_response = "HTTP/1.1 204 No Content\r\n\r\n";

private:
    void from_client(int flags, std::string_view text, std::uint32_t ack)
    {
        if (client_seen)
            add(ipv4(client_address, server_address,
                     tcp({port_, server_port, client_next_, ack, static_cast<std::uint8_t>(flags)}, text),
                     client_left));
    }
    void from_server(int flags, std::string_view text = {})
    {
        const bool acks = (flags & TCP_FLAG_BIT_ACK) != 0;
        if (server_seen)
            add(ipv4(server_address, client_address,
                     tcp({server_port, port_, server_next_, acks ? server_knows_ : 0, static_cast<std::uint8_t>(flags)},
                         text),
                     server_left));
    }
    void add(const std::string& packet)
    {
        const std::string frame = ethernet(0x0800, packet);
        for (int i = 0; i < times; ++i)
            file_.add(now_ns + static_cast<std::uint64_t>(i) * 20'000, frame.substr(0, snap), frame.size());
    }

    CaptureFile& file_;
    std::uint16_t port_;
    std::uint32_t client_next_;
    std::uint32_t server_next_;
    std::uint32_t client_knows_ = 0;
    std::uint32_t server_knows_ = 0;
};

} // namespace finrace::test

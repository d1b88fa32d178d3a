// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Events as a kernel would send them, for the tests of what is made of them.
#pragma once

#include <cstring>
#include <string_view>

#include <arpa/inet.h>

#include "bpf/event.h"
#include "core/classify.h"
#include "teach.h"

namespace finrace::test {

constexpr std::uint64_t ms = 1'000'000;
constexpr std::uint64_t request_at = 10'000 * ms;
constexpr std::uint16_t everything = OBSERVED_PROCESS | OBSERVED_SEND_QUEUE | OBSERVED_RESET_HEADER |
                                     OBSERVED_SOCKET_ERROR | OBSERVED_UNREAD | OBSERVED_NETNS | OBSERVED_CLOSE_CALL;

inline void set_name(event& e, std::string_view name)
{
    std::memset(e.connection.comm, 0, sizeof(e.connection.comm));
    std::memcpy(e.connection.comm, name.data(), name.size());
}

/// A connection of nginx to 10.0.0.2:8000, opened at 5 s, that sent its third request of 176 bytes at 10 s.
inline event in_exchange(std::uint8_t kind, std::uint64_t at_ns)
{
    event e{};
    e.timestamp_ns = at_ns;
    e.family = 4;
    ::inet_pton(AF_INET, "10.0.0.1", e.local_address);
    ::inet_pton(AF_INET, "10.0.0.2", e.peer_address);
    e.local_port = 41234;
    e.peer_port = 8000;
    e.kind = kind;
    e.observed = everything;
    e.netns = 4026531840U;
    e.request_bytes = 176;
    e.srtt_us = 40'210;
    e.old_state = e.new_state = TCP_STATE_ESTABLISHED;
    e.version = FINRACE_EVENT_VERSION;
    connection& c = e.connection;
    c.id = 0xabcdef0123456789ULL;
    c.opened_ns = 5'000 * ms;
    c.request_ns = request_at;
    c.request_seq = 7000;
    c.exchange = 3;
    c.idle_ms = 981;
    c.longest_idle_ms = 990;
    c.pid = 1234;
    c.flags = CONNECTION_CLIENT;
    set_name(e, "nginx");
    return e;
}

/// The upstream's FIN, 20.113 ms after the request, acknowledges none of it.
inline event crossing()
{
    event e = in_exchange(EVENT_PEER_FIN, request_at + 20'113'000);
    e.new_state = TCP_STATE_CLOSE_WAIT;
    e.unacked_bytes = 176;
    e.connection.flags |= CONNECTION_PEER_FIN;
    e.connection.peer_fin_ns = e.timestamp_ns;
    e.connection.fin_unacked = 176;
    e.connection.fin_idle_ms = 20;
    return e;
}

/// The same connection 20 ms later: a bare RST with the FIN's number has closed it.
inline event crossing_closed()
{
    event e = crossing();
    e.kind = EVENT_CLOSED;
    e.timestamp_ns += 20 * ms;
    e.old_state = TCP_STATE_CLOSE_WAIT;
    e.new_state = TCP_STATE_CLOSE;
    e.connection.flags |= CONNECTION_PEER_RESET | CONNECTION_RESET_AT_FIN;
    e.connection.peer_reset_ns = e.timestamp_ns;
    return e;
}

inline event refused()
{
    event e = in_exchange(EVENT_OPEN_FAILED, 5'000 * ms + 250'000);
    e.old_state = TCP_STATE_SYN_SENT;
    e.new_state = TCP_STATE_CLOSE;
    e.socket_error = ECONNREFUSED;
    e.request_bytes = 0;
    e.srtt_us = 0;
    e.connection.exchange = 0;
    e.connection.request_ns = 0;
    e.connection.idle_ms = e.connection.longest_idle_ms = 0;
    e.connection.flags |= CONNECTION_PEER_RESET | CONNECTION_RESET_HAS_ACK;
    e.connection.peer_reset_ns = e.timestamp_ns;
    return e;
}

constexpr std::uint64_t closed_at = request_at + 21 * ms;

/// The other end of in_exchange()'s connection: gunicorn, that last answered 981 ms before the request.
inline event at_server(std::uint8_t kind)
{
    event e{};
    e.timestamp_ns = closed_at;
    e.kind = kind;
    e.family = 4;
    ::inet_pton(AF_INET, "10.0.0.2", e.local_address);
    ::inet_pton(AF_INET, "10.0.0.1", e.peer_address);
    e.local_port = 8000;
    e.peer_port = 41234;
    e.observed = everything;
    e.version = FINRACE_EVENT_VERSION;
    e.old_state = TCP_STATE_ESTABLISHED;
    e.new_state = TCP_STATE_FIN_WAIT1;
    e.received_ns = closed_at - ms;
    e.sent_ns = e.received_ns - 981 * ms;
    e.connection.local_close_ns = closed_at;
    e.connection.flags = CONNECTION_LOCAL_FIRST | CONNECTION_LOCAL_FIN;
    e.connection.pid = 77;
    set_name(e, "gunicorn");
    return e;
}

/// close() with the request unread.
inline event closed_unread(std::uint32_t unread_bytes = 176)
{
    event e = at_server(EVENT_CLOSED);
    e.new_state = TCP_STATE_CLOSE;
    e.unread_bytes = unread_bytes;
    e.connection.flags = CONNECTION_LOCAL_FIRST | CONNECTION_LOCAL_RESET | CONNECTION_SOCKET_CLOSED;
    return e;
}

/// The request came 5 ms after the close of a connection that had rested for 1002 ms since its last answer.
inline event late_segment(std::uint32_t segment_bytes = 176)
{
    event e = at_server(EVENT_SEGMENT_AFTER_CLOSE);
    e.old_state = e.new_state = TCP_STATE_FIN_WAIT1;
    e.segment_bytes = segment_bytes;
    e.connection.flags = CONNECTION_LOCAL_FIRST | CONNECTION_LOCAL_FIN | CONNECTION_SOCKET_CLOSED;
    e.connection.pid = 0;
    e.connection.local_close_ns = closed_at - 5 * ms;
    e.sent_ns = e.connection.local_close_ns - 1002 * ms;
    e.received_ns = e.sent_ns - ms;
    return e;
}

inline Verdict race(Variant variant = Variant::fin_crossed)
{
    return {.cause = Cause::keepalive_race,
            .variant = variant,
            .certainty = Certainty::proven,
            .incomplete = false,
            .message = "They crossed."};
}

/// An upstream whose idle closes agree on 1000 ms.
inline Upstream known_upstream()
{
    Upstream upstream;
    for (const std::uint32_t idle_ms : {998U, 1000U, 1000U, 1003U})
        teach(upstream.idle_timeout, idle_ms);
    return upstream;
}

/// Another upstream was tried a quarter of a millisecond later, and the client got a 200.
inline Outcome retried()
{
    Client client{
        .port = 4000, .family = 4, .left = false, .answered = true, .status = 200, .certainty = Certainty::possible};
    ::inet_pton(AF_INET, "192.0.2.7", client.address.data());
    UpstreamKey upstream{};
    ::inet_pton(AF_INET, "10.0.0.3", upstream.address.data());
    upstream.port = 8001;
    upstream.family = 4;
    return {.client = client,
            .retry = Retry{.connection_id = 255, .upstream = upstream, .after_ns = ms / 4},
            .known = true,
            .settled = false,
            .named = false};
}

} // namespace finrace::test

// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "sink/facts.h"

#include <arpa/inet.h>
#include <cerrno>
#include <cmath>
#include <cstring>

#include <fmt/compile.h>
#include <fmt/format.h>

#include "core/classify.h"
#include "core/flags.h"

namespace finrace {

std::string_view kind_name(unsigned kind)
{
    static constexpr std::array<std::string_view, EVENT_KINDS> names{
        "",
        "opened",
        "open_failed",
        "peer_fin",
        "peer_reset",
        "local_fin",
        "local_reset",
        "sent_after_fin",
        "segment_after_close",
        "state",
        "closed",
        "released",
        "tried",
        "client_answered",
        "client_released",
        "accept_overflow",
    };
    return kind < names.size() ? names[kind] : std::string_view{};
}

std::string_view loss_name(unsigned place)
{
    static constexpr std::array<std::string_view, LOSS_PLACES> names{"ring_full", "table_full", "unreadable",
                                                                     "program_skipped"};
    return place < names.size() ? names[place] : std::string_view{};
}

std::string_view state_name(unsigned state)
{
    static constexpr std::array<std::string_view, TCP_STATE_NEW_SYN_RECV + 1> names{
        "",      "ESTABLISHED", "SYN_SENT", "SYN_RECV", "FIN_WAIT1", "FIN_WAIT2",    "TIME_WAIT",
        "CLOSE", "CLOSE_WAIT",  "LAST_ACK", "LISTEN",   "CLOSING",   "NEW_SYN_RECV",
    };
    return state < names.size() ? names[state] : std::string_view{};
}

std::string error_name(int error)
{
    const char* name = ::strerrorname_np(error);
    return name != nullptr ? std::string(name) : fmt::format("error {}", error);
}

std::string address_text(const std::uint8_t* address, unsigned family)
{
    if (family != 6) // each record has two, and inet_ntop() goes through sprintf()
        return fmt::format(FMT_COMPILE("{}.{}.{}.{}"), address[0], address[1], address[2], address[3]);
    std::array<char, INET6_ADDRSTRLEN> text{};
    ::inet_ntop(AF_INET6, address, text.data(), text.size());
    return text.data();
}

std::optional<Address> parse_address(const std::string& text)
{
    Address address;
    address.family = text.find(':') != std::string::npos ? 6 : 4;
    if (::inet_pton(address.family == 6 ? AF_INET6 : AF_INET, text.c_str(), address.bytes.data()) != 1)
        return std::nullopt;
    return address;
}

std::string endpoint_text(const std::uint8_t* address, std::uint16_t port, unsigned family)
{
    return with_port(address_text(address, family), port);
}

std::string with_port(std::string_view address, std::uint64_t port)
{
    return address.find(':') != std::string_view::npos ? fmt::format("[{}]:{}", address, port)
                                                       : fmt::format("{}:{}", address, port);
}

std::string_view protocol_name(const connection& c)
{
    constexpr std::array<std::string_view, 4> names{"", "http/1", "tls", "http/2"};
    return names[(c.flags & CONNECTION_PROTOCOL) >> CONNECTION_PROTOCOL_SHIFT];
}

std::string_view to_string(PoolState state)
{
    switch (state) {
    case PoolState::unknown:
        return "unknown";
    case PoolState::not_reused:
        return "not_reused";
    case PoolState::safe:
        return "safe";
    case PoolState::kept_clear:
        return "kept_clear";
    case PoolState::exposed:
        return "exposed";
    }
    return {};
}

std::string_view owner_name(const connection& c)
{
    return {c.comm, ::strnlen(c.comm, sizeof(c.comm))};
}

bool knows_request_start(const connection& c)
{
    return c.exchange > 0 && c.request_ns != 0 && !has(c, CONNECTION_ADOPTED_IN_EXCHANGE);
}

std::string_view to_string(Close::By by)
{
    return by == Close::By::local ? "local" : "peer";
}

std::string_view to_string(Close::How how)
{
    switch (how) {
    case Close::How::fin:
        return "fin";
    case Close::How::reset:
        return "reset";
    case Close::How::timeout:
        return "timeout";
    }
    return {};
}

namespace {

/// A connection that ends with neither FIN nor RST: somebody on this host stopped waiting, as far as can be told.
std::optional<Close> silent_end(const event& e)
{
    const bool error_known = (e.observed & OBSERVED_SOCKET_ERROR) != 0;
    const Close gave_up{.by = Close::By::local, .how = Close::How::timeout, .at_ns = e.timestamp_ns};
    if (e.kind == EVENT_OPEN_FAILED) {
        // Without an error it was the process that closed, if its close can be seen; others (no route) are nobody's.
        const bool may_have_closed = has(e, CONNECTION_SOCKET_CLOSED) || (e.observed & OBSERVED_CLOSE_CALL) == 0;
        if (error_known ? e.socket_error == 0 || e.socket_error == ETIMEDOUT : may_have_closed)
            return gave_up;
    } else if (kernel_gave_up(e)) {
        return gave_up;
    }
    return std::nullopt;
}

/// This host has met nothing of the peer's before it closed, and nothing that was under way by then: a FIN that knows
/// nothing of a request knew nothing of a close after that, and left half a round trip before it came. Such is the one
/// behind a close_notify, at which a proxy closes at once.
bool closed_first(const event& e)
{
    const connection& c = e.connection;
    if (!has(c, CONNECTION_LOCAL_FIRST))
        return false;
    return !has(c, CONNECTION_PEER_FIN) || has(c, CONNECTION_SENT_AFTER_FIN) || c.fin_unacked == 0 ||
           c.peer_fin_ns >= c.local_close_ns + std::uint64_t{e.srtt_us} * 1000 / 2;
}

} // namespace

std::optional<Close> first_close(const event& e)
{
    const connection& c = e.connection;
    if (closed_first(e))
        return Close{.by = Close::By::local,
                     .how = has(c, CONNECTION_LOCAL_FIN) ? Close::How::fin : Close::How::reset,
                     .at_ns = c.local_close_ns};
    if (has(c, CONNECTION_PEER_FIN))
        return Close{.by = Close::By::peer, .how = Close::How::fin, .at_ns = c.peer_fin_ns};
    if (has(c, CONNECTION_PEER_RESET))
        return Close{.by = Close::By::peer, .how = Close::How::reset, .at_ns = c.peer_reset_ns};
    return silent_end(e);
}

std::optional<std::uint32_t> unacked_by_close(const event& e)
{
    const connection& c = e.connection;
    if (c.exchange == 0)
        return std::nullopt;
    // A FIN knows nothing of a request written after it.
    if (has(c, CONNECTION_SENT_AFTER_FIN))
        return e.request_bytes > 0 ? std::optional(e.unacked_bytes) : std::nullopt;
    if (!closed_first(e)) {
        if (has(c, CONNECTION_PEER_FIN))
            return c.fin_unacked;
        if (has(c, CONNECTION_PEER_RESET) && has(c, CONNECTION_RESET_HAS_ACK))
            return c.reset_unacked;
    }
    return e.unacked_bytes;
}

double milliseconds_between(std::uint64_t from_ns, std::uint64_t to_ns)
{
    // Whole microseconds first: three decimals, and no digits that the clocks cannot vouch for.
    const auto difference = static_cast<std::int64_t>(to_ns - from_ns);
    const double ms = std::round(static_cast<double>(difference) / 1e3) / 1e3;
    return ms == 0 ? 0.0 : ms; // of the two zeros the one without a sign
}

} // namespace finrace

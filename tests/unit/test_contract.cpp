// SPDX-License-Identifier: GPL-2.0-only OR MIT
// The contract as C++ has it: this file is built with -Wpadded as an error, so a hole in a struct fails the build;
// sizes, offsets and the enums' room are checked here once more, for a change of bpf/event.h must be made in two places
// on purpose.
#include "bpf/event.h" // first: -Wpadded is for these structs

#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpadded" // not ours
#endif
#include <catch2/catch.hpp>

#include <cstddef>
#include <cstring>
#include <limits>
#include <type_traits>
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif

static_assert(sizeof(connection) <= 120, "192 bytes a connection in the kernel, the kernel's own share included");
static_assert(sizeof(connection) % alignof(connection) == 0);
static_assert(sizeof(event) == 256);
static_assert(alignof(event) == 8 && alignof(connection) == 8);
static_assert(std::is_trivially_copyable_v<event> && std::is_standard_layout_v<event>);
static_assert(std::is_trivially_copyable_v<loss_counters> && std::is_standard_layout_v<loss_counters>);
static_assert(sizeof(loss_counters) == (std::size_t{LOSS_PLACES} + std::size_t{EVENT_KINDS}) * sizeof(__u64));
static_assert(offsetof(loss_counters, by_place) == 0);
static_assert(offsetof(loss_counters, by_kind) == LOSS_PLACES * sizeof(__u64));

// The same on every architecture: nothing in it is as wide as a pointer, and no enum is stored as one.
static_assert(std::is_same_v<decltype(event::kind), __u8>);
static_assert(std::is_same_v<decltype(event::observed), __u16>);
static_assert(std::is_same_v<decltype(connection::flags), __u32>);
static_assert(std::is_same_v<decltype(connection::state), __u8>);
static_assert(std::is_same_v<decltype(connection::lost_kinds), __u16>);

namespace {

template <typename Field, typename Value>
constexpr bool fits(Value value)
{
    return static_cast<unsigned long long>(value) <= std::numeric_limits<Field>::max();
}

// Every kind has a bit in lost_kinds and a value in kind.
static_assert(fits<decltype(event::kind)>(EVENT_KINDS - 1));
static_assert(fits<decltype(connection::lost_kinds)>(1ULL << (EVENT_KINDS - 1)));

constexpr unsigned states[] = {
    TCP_STATE_ESTABLISHED, TCP_STATE_SYN_SENT,  TCP_STATE_SYN_RECV, TCP_STATE_FIN_WAIT1,
    TCP_STATE_FIN_WAIT2,   TCP_STATE_TIME_WAIT, TCP_STATE_CLOSE,    TCP_STATE_CLOSE_WAIT,
    TCP_STATE_LAST_ACK,    TCP_STATE_LISTEN,    TCP_STATE_CLOSING,  TCP_STATE_NEW_SYN_RECV,
};

constexpr unsigned kinds[] = {
    EVENT_OPENED,          EVENT_OPEN_FAILED,     EVENT_PEER_FIN,        EVENT_PEER_RESET,
    EVENT_LOCAL_FIN,       EVENT_LOCAL_RESET,     EVENT_SENT_AFTER_FIN,  EVENT_SEGMENT_AFTER_CLOSE,
    EVENT_STATE,           EVENT_CLOSED,          EVENT_RELEASED,        EVENT_TRIED,
    EVENT_CLIENT_ANSWERED, EVENT_CLIENT_RELEASED, EVENT_ACCEPT_OVERFLOW,
};

constexpr unsigned flags[] = {
    CONNECTION_CLIENT,
    CONNECTION_ADOPTED,
    CONNECTION_CARRIED,
    CONNECTION_ADOPTED_IN_EXCHANGE,
    CONNECTION_PEER_FIN,
    CONNECTION_PEER_RESET,
    CONNECTION_RESET_HAS_ACK,
    CONNECTION_RESET_FLAGS_UNKNOWN,
    CONNECTION_RESET_AT_FIN,
    CONNECTION_RESET_BEYOND_FIN,
    CONNECTION_LOCAL_FIN,
    CONNECTION_LOCAL_RESET,
    CONNECTION_LOCAL_FIRST,
    CONNECTION_SENT_AFTER_FIN,
    CONNECTION_SOCKET_CLOSED,
    CONNECTION_STATE_CALLBACKS,
    CONNECTION_IGNORED,
    CONNECTION_DATA_AFTER_CLOSE,
    CONNECTION_EARLIER_UNACKED,
    CONNECTION_FIN_WAITS,
    CONNECTION_RESET_WITH_ACK_WAITS,
    CONNECTION_BARE_RESET_WAITS,
    CONNECTION_CLOSED_UNACKED,
    CONNECTION_CLIENT_WAITS,
    CONNECTION_TRIES_AGAIN,
    CONNECTION_PROCESS_ENDS,
};

/// Above the two bits of CONNECTION_PROTOCOL.
constexpr unsigned later_flags[] = {
    CONNECTION_HANDSHAKE,
    CONNECTION_UNTRIED,
    CONNECTION_SHUTDOWN_UNACKED,
};

constexpr unsigned observed_bits[] = {
    OBSERVED_PROCESS, OBSERVED_SEND_QUEUE, OBSERVED_RESET_HEADER, OBSERVED_SOCKET_ERROR,
    OBSERVED_UNREAD,  OBSERVED_NETNS,      OBSERVED_CLOSE_CALL,   OBSERVED_WIRE,
};

/// Single bits, in order and without a gap: a new one is added here, and none means two things.
template <std::size_t N>
constexpr bool are_bits_from(unsigned first, const unsigned (&bits)[N])
{
    for (std::size_t i = 0; i < N; ++i)
        if (bits[i] != first << i)
            return false;
    return true;
}

template <std::size_t N>
constexpr bool count_from_one(const unsigned (&values)[N])
{
    for (std::size_t i = 0; i < N; ++i)
        if (values[i] != i + 1)
            return false;
    return true;
}

static_assert(are_bits_from(1, flags));
static_assert(CONNECTION_PROTOCOL == (flags[std::size(flags) - 1] << 1 | flags[std::size(flags) - 1] << 2));
static_assert(are_bits_from(flags[std::size(flags) - 1] << 3, later_flags));
static_assert(are_bits_from(1, observed_bits));
static_assert(fits<decltype(connection::flags)>(later_flags[std::size(later_flags) - 1]));
static_assert(fits<decltype(event::observed)>(observed_bits[std::size(observed_bits) - 1]));
static_assert(count_from_one(states));
static_assert(fits<decltype(connection::state)>(states[std::size(states) - 1]));
static_assert(fits<decltype(event::new_state)>(states[std::size(states) - 1]));
static_assert(count_from_one(kinds));
static_assert(std::size(kinds) + 1 == EVENT_KINDS);

} // namespace

TEST_CASE("fields of the contract follow each other without a hole", "[contract]")
{
    // By address in a live object, independent of the header's own assertions.
    const event e{};
    const auto at = [&e](const auto& field) {
        return static_cast<std::size_t>(reinterpret_cast<const char*>(&field) - reinterpret_cast<const char*>(&e));
    };
    std::size_t next = 0;
    const auto follows = [&](const auto& field) {
        CHECK(at(field) == next);
        next = at(field) + sizeof(field);
    };
    follows(e.timestamp_ns);
    follows(e.bytes_sent);
    follows(e.bytes_received);
    follows(e.response_bytes);
    follows(e.local_address);
    follows(e.peer_address);
    follows(e.local_port);
    follows(e.peer_port);
    follows(e.family);
    follows(e.kind);
    follows(e.old_state);
    follows(e.new_state);
    follows(e.observed);
    follows(e.socket_error);
    follows(e.netns);
    follows(e.request_bytes);
    follows(e.unacked_bytes);
    follows(e.unread_bytes);
    follows(e.srtt_us);
    follows(e.retransmits);
    follows(e.version);
    follows(e.thread);
    follows(e.http_status);
    follows(e.turn);
    follows(e.sent_ns);
    follows(e.received_ns);
    follows(e.exit_code);
    follows(e.segment_bytes);
    CHECK(at(e.connection) == next);
    follows(e.connection.id);
    follows(e.connection.opened_ns);
    follows(e.connection.request_ns);
    follows(e.connection.last_byte_ns);
    follows(e.connection.received_before);
    follows(e.connection.request_seq);
    follows(e.connection.exchange);
    follows(e.connection.idle_ms);
    follows(e.connection.longest_idle_ms);
    follows(e.connection.flags);
    follows(e.connection.pid);
    CHECK(next - at(e.connection) == FINRACE_HEALTHY_BYTES);
    follows(e.connection.peer_fin_ns);
    follows(e.connection.peer_reset_ns);
    follows(e.connection.local_close_ns);
    follows(e.connection.fin_unacked);
    follows(e.connection.fin_idle_ms);
    follows(e.connection.reset_unacked);
    follows(e.connection.state);
    follows(e.connection.lost_events);
    follows(e.connection.lost_kinds);
    follows(e.connection.comm);
    CHECK(next == sizeof(event));
}

TEST_CASE("the states are the kernel's", "[contract]")
{
    // include/net/tcp_states.h; what INET_DIAG and inet_sock_set_state report.
    CHECK(TCP_STATE_ESTABLISHED == 1);
    CHECK(TCP_STATE_SYN_SENT == 2);
    CHECK(TCP_STATE_CLOSE == 7);
    CHECK(TCP_STATE_CLOSE_WAIT == 8);
    CHECK(TCP_STATE_LAST_ACK == 9);
    CHECK(TCP_STATE_CLOSING == 11);
}

TEST_CASE("an address of zeroes and a record of zeroes are the same", "[contract]")
{
    event e{};
    event zero;
    std::memset(&zero, 0, sizeof(zero));
    CHECK(std::memcmp(&e, &zero, sizeof(e)) == 0); // no padding that could differ
}

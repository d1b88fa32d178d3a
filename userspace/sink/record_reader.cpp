// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "sink/record_reader.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <iterator>

#include <nlohmann/json.hpp>

#include "core/flags.h"
#include "core/units.h"
#include "sink/facts.h"

namespace finrace {

namespace {

constexpr int largest_errno = 133;

/// The one of `first` to `last` that has this name.
template <typename Enum>
std::optional<Enum> named(std::string_view name, Enum first, Enum last)
{
    for (int value = static_cast<int>(first); value <= static_cast<int>(last); ++value)
        if (to_string(static_cast<Enum>(value)) == name)
            return static_cast<Enum>(value);
    return std::nullopt;
}

/// The same of names that a function of numbers gives; 0 if there is none.
template <typename Name>
std::uint8_t numbered(std::string_view name, unsigned end, Name name_of)
{
    for (unsigned value = 1; value < end; ++value)
        if (name_of(value) == name)
            return static_cast<std::uint8_t>(value);
    return 0;
}

std::uint16_t error_number(std::string_view name)
{
    for (int error = 1; error <= largest_errno; ++error)
        if (error_name(error) == name)
            return static_cast<std::uint16_t>(error);
    return 0;
}

/// CONNECTION_* where a value is there, and true if it is a truth.
struct FlagOf {
    const char* name;
    std::uint32_t flags;
    bool is_truth;
};
constexpr std::array<FlagOf, 8> flags_of{{
    {"finrace.connection.adopted", CONNECTION_ADOPTED, true},
    {"finrace.connection.reused", CONNECTION_CARRIED, true},
    {"finrace.evidence.peer_fin_ms", CONNECTION_PEER_FIN, false},
    {"finrace.evidence.peer_reset_ms", CONNECTION_PEER_RESET, false},
    {"finrace.evidence.reset_ack", CONNECTION_RESET_HAS_ACK, true},
    {"finrace.evidence.reset_at_fin", CONNECTION_RESET_AT_FIN, true},
    {"finrace.evidence.reset_beyond_fin", CONNECTION_RESET_BEYOND_FIN, true},
    {"finrace.evidence.sent_after_fin", CONNECTION_SENT_AFTER_FIN, true},
}};

std::uint32_t close_flags(const FlatRecord& record)
{
    const bool fin = record.text("finrace.close.how") == to_string(Close::How::fin);
    const bool reset = record.text("finrace.close.how") == to_string(Close::How::reset);
    if (!fin && !reset)
        return 0;
    if (record.text("finrace.close.by") == to_string(Close::By::peer))
        return fin ? CONNECTION_PEER_FIN : CONNECTION_PEER_RESET;
    return CONNECTION_LOCAL_FIRST | (fin ? CONNECTION_LOCAL_FIN : CONNECTION_LOCAL_RESET);
}

std::uint64_t later_by(std::uint64_t ns, double ms)
{
    return static_cast<std::uint64_t>(static_cast<std::int64_t>(ns) +
                                      std::llround(ms * static_cast<double>(ns_per_ms)));
}

/// The record has times relative to the request, which began so long before what was seen last.
void set_times(const FlatRecord& record, std::uint64_t at_ns, connection& c)
{
    constexpr std::array names{"finrace.evidence.peer_fin_ms", "finrace.evidence.peer_reset_ms",
                               "finrace.evidence.local_close_ms", "finrace.close.after_request_ms"};
    double latest_ms = 0;
    for (const char* name : names)
        latest_ms = std::max(latest_ms, record.real(name));
    c.request_ns = later_by(at_ns, -latest_ms);
    const auto time_of = [&](const char* name) {
        return record.has(name) ? later_by(c.request_ns, record.real(name)) : 0;
    };
    c.peer_fin_ns = time_of("finrace.evidence.peer_fin_ms");
    c.peer_reset_ns = time_of("finrace.evidence.peer_reset_ms");
    c.local_close_ns = time_of("finrace.evidence.local_close_ms");
    if (c.exchange == 0 && has(c, CONNECTION_PEER_RESET)) // of a SYN, which the record is about
        c.peer_reset_ns = at_ns;
    if (record.has("finrace.connection.age_ms"))
        c.opened_ns = later_by(at_ns, -record.real("finrace.connection.age_ms"));
}

} // namespace

bool FlatRecord::has(const char* name) const
{
    const auto found = record_.find(name);
    return found != record_.end() && !found->is_null();
}

std::string FlatRecord::text(const char* name) const
{
    const auto found = record_.find(name);
    return found != record_.end() && found->is_string() ? found->get<std::string>() : std::string();
}

std::uint64_t FlatRecord::number(const char* name) const
{
    const auto found = record_.find(name);
    return found != record_.end() && found->is_number_unsigned() ? found->get<std::uint64_t>() : 0;
}

double FlatRecord::real(const char* name) const
{
    const auto found = record_.find(name);
    return found != record_.end() && found->is_number() ? found->get<double>() : 0;
}

bool FlatRecord::truth(const char* name) const
{
    const auto found = record_.find(name);
    return found != record_.end() && ((found->is_boolean() && found->get<bool>()) || number(name) != 0);
}

std::optional<UpstreamKey> upstream_key(const std::string& address, std::uint64_t port)
{
    const std::optional<Address> where = parse_address(address);
    if (!where)
        return std::nullopt;
    return UpstreamKey{.address = where->bytes, .port = static_cast<std::uint16_t>(port), .family = where->family};
}

event event_of(const FlatRecord& record, std::uint64_t at_ns)
{
    event e{};
    connection& c = e.connection;
    const auto number32 = [&](const char* name) { return static_cast<std::uint32_t>(record.number(name)); };
    e.timestamp_ns = at_ns;
    const Address local = parse_address(record.text("network.local.address")).value_or(Address{});
    const Address peer = parse_address(record.text("network.peer.address")).value_or(Address{});
    e.family = local.family;
    std::copy(local.bytes.begin(), local.bytes.end(), std::begin(e.local_address));
    std::copy(peer.bytes.begin(), peer.bytes.end(), std::begin(e.peer_address));
    e.local_port = static_cast<std::uint16_t>(record.number("network.local.port"));
    e.peer_port = static_cast<std::uint16_t>(record.number("network.peer.port"));
    e.kind = numbered(record.text("finrace.evidence.event"), EVENT_KINDS, kind_name);
    e.new_state = numbered(record.text("finrace.evidence.state"), TCP_STATE_NEW_SYN_RECV + 1, state_name);
    e.version = FINRACE_EVENT_VERSION;
    e.request_bytes = number32("finrace.request.bytes");
    e.response_bytes = record.number("finrace.response.bytes");
    e.unacked_bytes = number32("finrace.evidence.unacked_bytes");
    e.unread_bytes = number32("finrace.evidence.unread_bytes");
    e.segment_bytes = number32("finrace.evidence.late_bytes");
    e.srtt_us = number32("finrace.evidence.srtt_us");
    e.retransmits = number32("finrace.evidence.retransmits");
    e.socket_error = error_number(record.text("finrace.evidence.socket_error"));
    const auto observe = [&](const char* name, unsigned what) {
        if (record.has(name))
            e.observed = static_cast<std::uint16_t>(e.observed | what);
    };
    observe("process.pid", OBSERVED_PROCESS);
    observe("finrace.evidence.reset_ack", OBSERVED_RESET_HEADER);
    observe("finrace.evidence.socket_error", OBSERVED_SOCKET_ERROR);
    observe("finrace.evidence.unread_bytes", OBSERVED_UNREAD);

    c.flags = record.text("finrace.side") == "server" ? 0U : std::uint32_t{CONNECTION_CLIENT};
    for (const FlagOf& flag : flags_of)
        if (flag.is_truth ? record.truth(flag.name) : record.has(flag.name))
            c.flags |= flag.flags;
    c.flags |= close_flags(record);
    c.pid = number32("process.pid");
    const std::string name = record.text("process.executable.name");
    std::copy_n(name.begin(), std::min(name.size(), sizeof(c.comm) - 1), std::begin(c.comm));
    c.exchange = number32("finrace.connection.exchange");
    c.idle_ms = number32("finrace.connection.idle_ms");
    c.fin_unacked = number32("finrace.evidence.fin_unacked_bytes");
    c.reset_unacked = number32("finrace.evidence.reset_unacked_bytes");
    c.fin_idle_ms = number32("finrace.evidence.quiet_before_close_ms");
    c.request_seq = number32("finrace.request.sequence_number");
    c.lost_events = static_cast<std::uint8_t>(record.number("finrace.lost_events"));
    set_times(record, at_ns, c);
    if (record.has("finrace.evidence.exit_signal") || record.has("finrace.evidence.exit_status")) {
        c.flags |= CONNECTION_PROCESS_ENDS;
        e.exit_code = number32("finrace.evidence.exit_signal") | number32("finrace.evidence.exit_status") << 8U;
    }
    return e;
}

std::optional<Verdict> verdict_of(const FlatRecord& record)
{
    const std::optional<Cause> cause = cause_from_string(record.text("finrace.cause"));
    if (!cause)
        return std::nullopt;
    Verdict verdict{.cause = *cause, .message = record.text("finrace.message")};
    verdict.variant =
        named(record.text("finrace.variant"), Variant::none, Variant::unanswered_probes).value_or(Variant::none);
    verdict.certainty = certainty_from_string(record.text("finrace.certainty")).value_or(Certainty::possible);
    verdict.incomplete = record.truth("finrace.incomplete");
    verdict.reason = reason_from_string(record.text("finrace.reason"));
    return verdict;
}

Outcome outcome_of(const FlatRecord& record)
{
    Outcome outcome;
    outcome.known = record.has("finrace.outcome.retried");
    if (const auto upstream = upstream_key(record.text("finrace.outcome.retry.peer_address"),
                                           record.number("finrace.outcome.retry.peer_port"));
        upstream && record.truth("finrace.outcome.retried"))
        outcome.retry = Retry{.connection_id = 0,
                              .upstream = *upstream,
                              .after_ns = later_by(0, record.real("finrace.outcome.retry.after_ms"))};
    if (const auto where =
            upstream_key(record.text("finrace.outcome.client_address"), record.number("finrace.outcome.client_port"))) {
        Client client{.address = where->address, .port = where->port, .family = where->family};
        client.left = record.truth("finrace.outcome.client_left");
        client.answered = record.truth("finrace.outcome.client_answered");
        client.status = static_cast<std::uint16_t>(record.number("http.response.status_code"));
        client.certainty =
            certainty_from_string(record.text("finrace.outcome.certainty")).value_or(Certainty::possible);
        outcome.client = client;
    }
    return outcome;
}

std::optional<Certainty> certainty_from_string(std::string_view text)
{
    return named(text, Certainty::proven, Certainty::possible);
}

std::optional<Reason> reason_from_string(std::string_view text)
{
    return named(text, Reason::unknown, Reason::early_purge);
}

std::optional<PoolState> pool_state_from_string(std::string_view text)
{
    return named(text, PoolState::not_reused, PoolState::exposed);
}

} // namespace finrace

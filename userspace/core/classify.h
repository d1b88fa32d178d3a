// SPDX-License-Identifier: GPL-2.0-only OR MIT
// From evidence to a cause. Pure: an event and what is known of its upstream go in, a classification comes
// out. What the evidence does not carry gets no name.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include "bpf/event.h"
#include "core/cause.h"
#include "core/flags.h"
#include "core/outcome.h"
#include "core/upstream.h"

namespace finrace {

inline constexpr std::uint32_t one_flight_bytes = FINRACE_ONE_FLIGHT_BYTES;

/// How a connection's end is to be counted.
enum class Ending {
    none,                ///< this event ends nothing, or what it ends has been judged before
    verdict,             ///< a failed exchange with a cause
    idle_close_by_peer,  ///< harmless
    idle_close_by_local, ///< harmless
    complete_close,      ///< harmless: closed right after a response
    unclassified,        ///< failed, and none of the causes can be named
};

struct Verdict {
    Cause cause{};
    Variant variant = Variant::none;
    Certainty certainty = Certainty::possible;
    bool incomplete = false; ///< events were lost, or the connection is older than the tracer and that matters
    std::string message;     ///< one sentence for people
    std::optional<Reason> reason = std::nullopt; ///< why the upstream closed, where that is what a race met
};

struct Classification {
    Ending ending = Ending::none;
    std::optional<Verdict> verdict;               ///< with Ending::verdict
    std::optional<std::uint32_t> learned_idle_ms; ///< a rest that the upstream ended: harmlessly, or a proven crossing
};

/// Judges one event. Every connection gets at most one ending other than none from all of its events. `outcome`: what
/// is known of it, where the event depends on it.
Classification classify(const event& e, const Upstream& upstream, const Outcome& outcome = {});

/// A request met the upstream's idle close.
inline constexpr std::array race_causes{Cause::keepalive_race, Cause::stale_response, Cause::stale_reuse};
bool is_race(Cause cause);
/// The upstream ended a request that it had taken.
inline constexpr std::array upstream_ends{Cause::upstream_closed, Cause::upstream_reset, Cause::response_cut};
bool is_by_upstream(Cause cause);
/// Of an upstream's verdicts those that are races.
std::uint64_t races_of(const UpstreamCounts& counts);

/// Whether this host ended an exchange that had no answer yet: what the client got tells why.
bool depends_on_outcome(const event& e);

/// Whether this host opened the event's connection.
inline bool is_client(const event& e)
{
    return has(e, CONNECTION_CLIENT);
}

/// Whether request number `connection.exchange` came over a connection that had carried bytes before.
bool is_reused(const connection& c);

/// Whether neither end closed an open connection: this host's kernel gave it up, after retransmissions, probes or TCP's
/// user timeout (tcp_write_err()). Where the source sees no errors: the peer ended nothing and no process closed, as
/// far as cgroup/sock_release tells, which sockets of the kernel's own do not pass; or a capture, where a process that
/// gave up looks the same: what its FIN waits behind is silence.
bool kernel_gave_up(const event& e);

/// Time from the request's first byte to the end that the event tells of, in nanoseconds; 0 without a request.
std::uint64_t close_after_request_ns(const event& e);

/// classify(), and then everything that is counted and learned from the event. What every command shares.
Classification account(const event& e, Upstreams& upstreams, const Outcome& outcome = {});

} // namespace finrace

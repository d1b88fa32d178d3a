// SPDX-License-Identifier: GPL-2.0-only OR MIT
// What is known about each upstream (a remote address and port): counts, and the idle timeout that its
// harmless idle closes teach.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <unordered_map>
#include <vector>

#include "bpf/event.h"
#include "core/cause.h"
#include "core/exposure.h"
#include "core/idle_timeout.h"
#include "core/reason.h"

namespace finrace {

/// The grouping key: the peer of connections that this host opened.
struct UpstreamKey {
    std::array<std::uint8_t, 16> address{}; ///< network order; IPv4 in the first four bytes
    std::uint16_t port = 0;
    std::uint8_t family = 4;
    std::uint32_t netns = 0; ///< of loopback addresses, which every network namespace has; 0 where that is not known

    static UpstreamKey of(const event& e);       ///< the peer's end of its connection
    static UpstreamKey local_of(const event& e); ///< this host's
    /// Where a verdict on it belongs: at the upstream, or at this host's own server.
    static UpstreamKey judged_at(const event& e);
    [[nodiscard]] bool is_loopback() const;
    auto operator<=>(const UpstreamKey&) const = default; // NOLINT(modernize-use-nullptr): the 0 is the compiler's own
};

struct UpstreamKeyHash {
    std::size_t operator()(const UpstreamKey& key) const noexcept;
};

struct UpstreamCounts {
    std::uint64_t opened = 0; ///< connections whose handshake was seen to complete: not those older than the tracer
    std::uint64_t open_failed = 0;
    std::uint64_t closed = 0;
    std::uint64_t exchanges = 0;           ///< of the connections that have closed
    std::uint64_t idle_closes_by_peer = 0; ///< harmless
    std::uint64_t idle_closes_by_local = 0;
    std::uint64_t complete_closes = 0; ///< right after a response
    std::uint64_t unclassified = 0;    ///< failed, and none of the causes named it
    std::map<Cause, std::uint64_t> verdicts;

    bool operator==(const UpstreamCounts&) const = default;
};

/// This host's newest closes of connections that had rested, since the upstream last closed one: a pool that was told
/// to close first shows it by these. What lies forty closes back is forgotten: rests of before it was told.
class OwnCloses {
public:
    static constexpr std::uint64_t enough = 20;

    void close(std::uint32_t rest_ms);
    /// Before a request.
    void rest(std::uint32_t rest_ms) { newest_.longest_ms = std::max(newest_.longest_ms, rest_ms); }
    [[nodiscard]] bool are_enough() const { return before_.count + newest_.count >= enough; }
    [[nodiscard]] std::uint32_t longest_ms() const { return std::max(before_.longest_ms, newest_.longest_ms); }

private:
    struct Block {
        std::uint64_t count = 0;
        std::uint32_t longest_ms = 0;
    };
    Block before_;
    Block newest_;
};

struct Upstream {
    IdleTimeoutLearner idle_timeout;   ///< the upstream's
    IdleTimeoutLearner own_idle_limit; ///< this host's, for connections to it
    RestHistogram rests;               ///< each reused connection's longest, before a request
    UpstreamCounts counts;
    CloseHistory closes;
    std::uint32_t longest_reused_idle_ms = 0;   ///< this host reused connections after as much as this
    std::uint32_t longest_answered_idle_ms = 0; ///< and a connection's last request was answered after this
    std::uint64_t kept_idle = 0;                ///< connections that had rested when this host closed or reset them
    std::uint32_t longest_kept_ms = 0;          ///< of these: as long as this
    /// comm of who used a connection to it again, the newest; else of who closed one. Empty if not known.
    std::array<char, FINRACE_COMM_LEN> owner{};
    OwnCloses own_closes;
    std::uint32_t rtt_us = 0;    ///< the newest connection's smoothed round-trip time
    std::uint64_t first_ns = 0;  ///< CLOCK_MONOTONIC, of its first event; 0 if not known
    std::uint64_t newest_ns = 0; ///< and of its newest

    /// For how long it has been watched by now, in a run of `run_ns`: since its first event, but for an hour at least,
    /// for until then nobody may have used it.
    [[nodiscard]] std::uint64_t watched_ns(std::uint64_t run_ns, std::uint64_t now_ns) const;
};

/// All upstreams seen, bounded: beyond `limit` those are forgotten of which nothing came for an hour; if there are
/// none, new ones share one entry, `other`.
class Upstreams {
public:
    static constexpr std::uint64_t forgotten_after_ns = 3'600'000'000'000;

    /// Of an upstream whose idle timer somebody knows: in ms.
    using TimerOf = std::function<std::optional<std::uint32_t>(const UpstreamKey&)>;

    explicit Upstreams(std::size_t limit = 4096) : limit_(limit) {}
    /// From now on it says what is not learned yet.
    void tell_timers(TimerOf timer_of);
    /// `now_ns`: of the event that is about it, CLOCK_MONOTONIC.
    Upstream& at(const UpstreamKey& key, std::uint64_t now_ns = 0);
    /// Whether that is `other`: it counts, but what one of those upstreams does teaches nothing about the rest.
    [[nodiscard]] bool is_other(const Upstream& upstream) const { return &upstream == &other_; }
    /// Calls `visit` for every upstream; the key is nullptr for `other`.
    void for_each(const std::function<void(const UpstreamKey*, const Upstream&)>& visit) const;
    [[nodiscard]] std::size_t size() const { return upstreams_.size(); }

private:
    void forget(std::uint64_t now_ns);

    std::size_t limit_;
    TimerOf timer_of_;
    std::uint64_t next_look_ns_ = 0; ///< for what is to be forgotten
    std::unordered_map<UpstreamKey, Upstream, UpstreamKeyHash> upstreams_;
    Upstream other_;
    bool other_used_ = false;
};

} // namespace finrace

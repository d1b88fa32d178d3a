// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Whether a pool of connections races with its upstream's idle timer, and how often: known before any request has died
// of it. From two things that harmless connections teach: where the upstream closes, and where this host still reuses.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "core/idle_timeout.h"

namespace finrace {

struct Ends;
struct Upstream;

/// How long connections had rested, by eighths of an octave: each bucket is at most an eighth wider than its lower end.
class RestHistogram {
public:
    void add(std::uint32_t rest_ms);
    [[nodiscard]] std::uint64_t count() const { return count_; }
    /// Rests of at least `from_ms` and less than `to_ms`; buckets that lie across an end count by their share.
    [[nodiscard]] double between(std::uint32_t from_ms, std::uint32_t to_ms) const;

    /// Rests of at least `from_ms` and less than `to_ms`.
    struct Bucket {
        std::uint64_t from_ms;
        std::uint64_t to_ms;
        std::uint32_t count;
    };
    /// Those that hold any, the shortest rests first.
    [[nodiscard]] std::vector<Bucket> filled() const;

private:
    static constexpr unsigned steps = 8; ///< of an octave
    static constexpr std::size_t buckets = std::size_t{32} * steps;
    static std::size_t bucket_of(std::uint32_t rest_ms);
    static std::uint64_t lower_end(std::size_t bucket);

    std::array<std::uint32_t, buckets> counts_{};
    std::uint64_t count_ = 0;
};

enum class PoolState {
    not_reused, ///< connections carry one request each: no idle close can meet another
    safe,       ///< this host closes first
    unknown,    ///< not enough has been seen
    kept_clear, ///< the upstream closes first, but of many late requests none came near its timer
    exposed,    ///< the upstream closes connections that this host would use again: a request will meet that close
};

/// What may be expected of a pool.
struct Exposure {
    PoolState state = PoolState::unknown;
    /// No idle close has taught the upstream's timeout: what it has been told is taken for it, in milliseconds.
    std::optional<std::uint32_t> told_timeout_ms;
    /// Too few have, but those came when this host's own limit does: both ends close at once.
    std::optional<IdleTimeout> tied_timeout;
    /// `safe` follows, in part, from what the ends have been told.
    bool safe_as_told = false;
    /// Time before the upstream's close becomes known here in which a request is lost: a round trip, and the turn of
    /// an event loop. In milliseconds.
    double window_ms = 0;
    /// Requests that followed a rest of between half the timeout and all of it. Of each connection the longest rest
    /// counts alone, so these are at least so many.
    double late_reuses = 0;
    double share = 0;       ///< of all requests, those to be expected to race
    double races_a_day = 0; ///< to be expected, if the day goes on as what was seen
    double told_by = 0;     ///< how many late requests, or races, that is reckoned from

    struct Range {
        double low;
        double high;
    };
    struct Expected {
        Range races_a_day;
        Range share;
    };
    /// Two standard errors of a count either way. Nothing where too few were seen to reckon from.
    [[nodiscard]] std::optional<Expected> expected() const;
};

/// Connections to an upstream that have not ended: how they will end is not known.
struct OpenConnections {
    std::uint64_t count = 0;
    std::uint64_t longest_ns = 0; ///< for how long one of them has been open by now
    bool rests_known = false;     ///< whether what follows is
    std::uint64_t resting = 0;    ///< of those that there are now, older ones included: those that carry no request
    std::uint64_t longest_rest_ms = 0; ///< of these

    /// Whether all of them may have been opened for one request, which some still carry.
    [[nodiscard]] bool may_be_single() const;
};

/// `observed_ns`: how long this upstream has been watched (Upstream::watched_ns()).
Exposure exposure_of(const Upstream& upstream, std::uint64_t observed_ns, const OpenConnections& open,
                     const Ends& ends);

} // namespace finrace

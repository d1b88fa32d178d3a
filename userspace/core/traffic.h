// SPDX-License-Identifier: GPL-2.0-only OR MIT
// What goes on towards each upstream right now: connections idle and busy, requests a second. Events tell of openings
// and ends alone; the rest comes from samples of the sockets that are open, whose accounting counts each request. Pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "bpf/event.h"
#include "core/exposure.h"
#include "core/upstream.h"

namespace finrace {

/// A connection that this host opened, as a sample found it.
struct SampledConnection {
    UpstreamKey upstream;
    std::uint64_t id = 0;        ///< as its events have it; 0 if its accounting is not known
    std::uint32_t exchange = 0;  ///< with an id: requests so far
    bool busy = false;           ///< a request has been sent, and no answer to it has begun
    std::uint64_t rested_ms = 0; ///< of one that is not: since its last byte came in, or it was opened
    bool used = false;           ///< bytes have come in
};

class Traffic {
public:
    static constexpr std::size_t most_open = 1U << 18U; ///< connections that are followed
    static constexpr std::uint64_t window_ns = 10'000'000'000;

    /// `began_ns`: since when events have told of openings; CLOCK_MONOTONIC, as all times here.
    explicit Traffic(std::uint64_t began_ns) : began_ns_(began_ns), sampled_ns_(began_ns) {}

    /// Any event of a connection that this host opened.
    void follow(const event& e);
    /// All connections that were open at `taken_ns`. Samples follow each other: the next one is begun after this call.
    /// `with_accounting`: whether the sample could tell it at all.
    void take(const std::vector<SampledConnection>& sample, std::uint64_t taken_ns, bool with_accounting);

    struct Flow {
        std::uint64_t idle = 0; ///< in the last sample
        std::uint64_t busy = 0;
        std::optional<double> requests_per_second; ///< over the last ten seconds; nothing if that can't be known
        OpenConnections open; ///< of one that is older it is not known for how long: since the beginning, at least
    };
    [[nodiscard]] Flow of(const UpstreamKey& key) const;
    /// Upstreams that had connections in the last sample, or in the one before and no end of them was told of.
    [[nodiscard]] std::vector<UpstreamKey> upstreams() const;

private:
    struct Open {
        UpstreamKey where;
        std::uint64_t since_ns; ///< the beginning, of one that is older
        std::uint32_t exchange; ///< that have been counted
        std::uint64_t seen_in;  ///< number of the last sample that had it, or that its opening followed
    };
    struct Interval {
        std::uint64_t from_ns;
        std::uint64_t to_ns;
        std::unordered_map<UpstreamKey, std::uint64_t, UpstreamKeyHash> requests;
    };

    std::unordered_map<std::uint64_t, Open> open_; ///< by connection
    std::unordered_set<std::uint64_t> ended_;      ///< since the last sample: the next one may have them still
    std::unordered_map<UpstreamKey, Flow, UpstreamKeyHash> flows_;
    std::unordered_map<UpstreamKey, std::uint64_t, UpstreamKeyHash> requests_; ///< on connections that ended since
    std::deque<Interval> intervals_;                                           ///< between samples, the newest last
    std::uint64_t began_ns_;
    std::uint64_t sampled_ns_;
    std::uint64_t samples_ = 0;
    bool tells_requests_ = false;
    bool lost_track_ = false; ///< of some that are open
};

} // namespace finrace

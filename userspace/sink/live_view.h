// SPDX-License-Identifier: GPL-2.0-only OR MIT
// What stands below the races on a terminal: a line for the whole, then one for each upstream, as many as fit. Lines of
// text from the state of things; whoever has the terminal draws them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "core/cause.h"
#include "core/exposure.h"
#include "core/upstream.h"
#include "sink/clock.h"
#include "sink/live_list.h"
#include "sink/text.h"

namespace finrace {

/// An upstream as its line has it.
struct UpstreamStatus {
    std::string name;
    bool sampled = false;   ///< whether `idle` and `busy` are known
    std::uint64_t idle = 0; ///< connections that carry no request
    std::uint64_t busy = 0; ///< a request has been sent, and no answer to it has begun
    std::optional<double> requests_per_second{};
    std::optional<IdleTimeout> timeout{}; ///< as learned, or told
    PoolState exposure = PoolState::unknown;
    std::uint64_t races = 0;
};

struct LiveStatus {
    std::uint64_t watched_ns = 0;
    std::map<Cause, std::uint64_t> verdicts;
    std::uint64_t unclassified = 0;
    std::uint64_t lost = 0;      ///< events and connections
    std::uint64_t not_taken = 0; ///< lines that the terminal did not take
    bool paused = false;
    std::uint64_t kept = 0;      ///< verdicts since
    std::uint64_t forgotten = 0; ///< of them, no room for the oldest
    std::string filter;
    std::uint64_t hidden = 0;          ///< verdicts that it left out
    std::optional<std::string> typing; ///< a filter that is not applied yet
    std::vector<UpstreamStatus> upstreams;
};

/// A third of a terminal's `height`, one at least: the lines that status_lines() may take.
std::size_t most_status_lines(std::size_t height);
/// At least one line, each of at most `width` columns.
std::vector<std::string> status_lines(LiveStatus status, const Paint& paint, std::size_t width, std::size_t height);

std::string folded_text(const Folded& folded, const WallClock& clock, const Paint& paint); ///< one line, ended
/// What the keys do: lines, each ended.
std::string keys_text(const Paint& paint);

} // namespace finrace

// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Verdicts on their way to a terminal that somebody reads: kept while paused, left out by a filter, and many alike in a
// second told in one line. Nothing is left out without being counted. Pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "core/upstream.h"
#include "sink/story.h"

namespace finrace {

/// Verdicts of one second that are not shown one by one.
struct Folded {
    std::uint64_t at_ns = 0; ///< CLOCK_MONOTONIC: when that second began
    Cause cause{};
    UpstreamKey where;
    std::uint64_t count = 0;
    std::uint64_t kinds = 1; ///< above 1: of so many causes and upstreams, of which `cause` and `where` are one
};

/// Whether `text` is in a verdict's cause, its upstream's address and port (on the server side this host's) or its
/// process's name; upper and lower case alike.
bool matches(const Sighting& sighting, std::string_view text);

class LiveList {
public:
    static constexpr std::size_t most_kept = 2000; ///< while paused
    static constexpr std::uint64_t second_ns = 1'000'000'000;
    static constexpr std::uint64_t alike_shown = 3;     ///< in a second, of one cause and upstream
    static constexpr std::uint64_t most_shown_all = 12; ///< in a second
    static constexpr std::size_t most_folded = 8;       ///< lines a second for the rest
    static constexpr std::size_t most_kinds = 1024;     ///< that are told apart within a second

    using Item = std::variant<Sighting, Folded>;

    void add(Sighting sighting, std::uint64_t now_ns);
    /// What is to be shown by now, in its order.
    std::vector<Item> take(std::uint64_t now_ns);
    /// The end: what is folded so far as well. What was kept stays behind.
    std::vector<Item> take_all(std::uint64_t now_ns);

    void toggle_pause() { paused_ = !paused_; }
    void set_filter(std::string text) { filter_ = std::move(text); }

    [[nodiscard]] bool paused() const { return paused_; }
    [[nodiscard]] const std::string& filter() const { return filter_; }
    [[nodiscard]] std::size_t kept() const { return kept_.size(); }
    [[nodiscard]] std::uint64_t forgotten() const { return forgotten_; } ///< no room while paused: the oldest
    [[nodiscard]] std::uint64_t hidden() const { return hidden_; }       ///< by the filter

private:
    struct Kept {
        Sighting sighting;
        std::uint64_t at_ns;
    };
    struct Alike {
        std::uint64_t shown = 0;
        std::uint64_t folded = 0;
    };

    void pass(Sighting sighting, std::uint64_t at_ns);
    void end_second();

    bool paused_ = false;
    std::string filter_;
    std::deque<Kept> kept_;
    std::uint64_t forgotten_ = 0;
    std::uint64_t hidden_ = 0;
    std::uint64_t second_began_ns_ = 0;
    std::uint64_t shown_ = 0; ///< in this second
    std::map<std::pair<Cause, UpstreamKey>, Alike> alike_;
    Folded beyond_; ///< found no room there
    std::vector<Item> items_;
};

} // namespace finrace

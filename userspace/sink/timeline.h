// SPDX-License-Identifier: GPL-2.0-only OR MIT
// A verdict for eyes: what went over the wire and when, relative to the request, what the sequence numbers of
// each segment prove, and one sentence.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "bpf/event.h"
#include "sink/clock.h"
#include "sink/story.h"
#include "sink/text.h"

namespace finrace {

/// Lines for the terminal, each ended; an empty one last.
std::string timeline(const Sighting& sighting, const WallClock& clock, const Paint& paint, std::size_t width);

/// The RST and the close may come a little after the FIN that the verdict is about: holds each sighting until
/// its connection has closed, half a second at most.
class SightingQueue {
public:
    static constexpr std::uint64_t hold_ns = 500'000'000;
    static constexpr std::size_t capacity = 1024; ///< beyond it the oldest no longer waits

    void add(Sighting sighting);
    /// An event that may belong to one of those waiting.
    void follow(const event& e);
    /// Those that are complete, or have waited for long enough, in the order of their verdicts.
    std::vector<Sighting> take_ready(std::uint64_t now_ns);
    std::vector<Sighting> take_all();

private:
    std::deque<Sighting> waiting_;
    std::vector<Sighting> ready_;
};

} // namespace finrace

// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Which connections of this host's are open, and since when, by what their events tell. Bounded. Pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>

#include "bpf/event.h"
#include "core/exposure.h"
#include "core/upstream.h"

namespace finrace {

class OpenTable {
public:
    static constexpr std::size_t most_open = 1U << 18U; ///< connections that are followed

    /// Any event of a connection that this host opened.
    void follow(const event& e);
    /// Events of some connections no longer come: from now on it has not all that are open.
    void lose_track() { lost_track_ = true; }
    /// What is open at `now_ns` (CLOCK_MONOTONIC), by upstream: nothing else is known of it.
    [[nodiscard]] std::unordered_map<UpstreamKey, OpenConnections, UpstreamKeyHash> at(std::uint64_t now_ns) const;
    /// Whether some are open that it has not: then none is known to be the oldest.
    [[nodiscard]] bool lost_track() const { return lost_track_; }

private:
    struct Open {
        UpstreamKey where;
        std::uint64_t since_ns;
    };
    std::unordered_map<std::uint64_t, Open> open_; ///< by connection
    bool lost_track_ = false;
};

} // namespace finrace

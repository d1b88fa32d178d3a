// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "core/open_table.h"

#include <algorithm>

namespace finrace {

void OpenTable::follow(const event& e)
{
    if (e.kind == EVENT_OPENED) {
        if (open_.size() < most_open)
            open_.insert_or_assign(e.connection.id, Open{.where = UpstreamKey::of(e), .since_ns = e.timestamp_ns});
        else
            lost_track_ = true;
    } else if (e.kind == EVENT_CLOSED) {
        open_.erase(e.connection.id);
    }
}

std::unordered_map<UpstreamKey, OpenConnections, UpstreamKeyHash> OpenTable::at(std::uint64_t now_ns) const
{
    std::unordered_map<UpstreamKey, OpenConnections, UpstreamKeyHash> by_upstream;
    for (const auto& [id, open] : open_) {
        OpenConnections& there = by_upstream[open.where];
        ++there.count;
        there.longest_ns = std::max(there.longest_ns, now_ns > open.since_ns ? now_ns - open.since_ns : 0);
    }
    return by_upstream;
}

} // namespace finrace

// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "cli/passed_over.h"

#include <utility>

#include "cli/filter.h"

namespace finrace {

void PassedOverCounts::add(const event& e, const ProcessNames& names)
{
    if (e.kind != EVENT_OPENED && e.kind != EVENT_OPEN_FAILED && e.kind != EVENT_CLOSED)
        return;
    const UpstreamKey where = UpstreamKey::of(e);
    auto known = upstreams_.find(where);
    if (known == upstreams_.end()) {
        if (upstreams_.size() == most)
            return;
        known = upstreams_.emplace(where, PassedOver{.process = process_name(e.connection, names)}).first;
    }
    ++(e.kind == EVENT_OPENED ? known->second.begun : known->second.ended);
}

std::map<UpstreamKey, PassedOver> PassedOverCounts::take()
{
    return std::exchange(upstreams_, {});
}

} // namespace finrace

// SPDX-License-Identifier: GPL-2.0-only OR MIT
// What a filter does not let through, by upstream: for somebody whose filter has matched nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

#include "bpf/event.h"
#include "cli/process_names.h"
#include "core/upstream.h"

namespace finrace {

/// Connections to one upstream that the filter did not let through.
struct PassedOver {
    std::string process; ///< of the first of them; empty if not known
    std::uint64_t begun = 0;
    std::uint64_t ended = 0; ///< older ones than the tracer included
};

class PassedOverCounts {
public:
    static constexpr std::size_t most = 1024; ///< upstreams; of more nothing is kept

    /// Any event of a connection that this host opened.
    void add(const event& e, const ProcessNames& names);
    /// All so far; begins anew.
    std::map<UpstreamKey, PassedOver> take();

private:
    std::map<UpstreamKey, PassedOver> upstreams_;
};

} // namespace finrace

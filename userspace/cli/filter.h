// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Which events concern us: the one place where --side, --upstream and --process are decided.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "bpf/event.h"
#include "cli/parse.h"
#include "cli/process_names.h"
#include "core/upstream.h"

namespace finrace {

/// The owner's name: of the thread that connected, as the kernel noted it, else its process's; empty if neither is
/// known.
std::string process_name(const connection& c, const ProcessNames& names);

enum class Side { client, server };

struct Filter {
    std::optional<Side> side{};              ///< of this host; none: both
    std::vector<AddressPattern> upstreams{}; ///< any of them; empty: all
    std::vector<ProcessPattern> processes{}; ///< any of them, by the thread's name or its process's; empty: all
    std::vector<std::string> flags{};        ///< all of that as it was typed, for people

    /// The upstream is the peer of a connection that this host opened, and this host on one that it accepted.
    [[nodiscard]] bool matches(const event& e, const ProcessNames& names) const;
    /// The same of a connection that this host opened. `comm`: its owner's name, where that is known besides its id.
    [[nodiscard]] bool matches_opened(const UpstreamKey& upstream, std::uint32_t pid, std::string_view comm,
                                      const ProcessNames& names) const;
    /// Whether it is one of those that were asked for, if any were.
    [[nodiscard]] bool chooses(const UpstreamKey& upstream) const;
    /// Whether it is at one of the addresses that were asked for, by any port.
    [[nodiscard]] bool has_address(const UpstreamKey& upstream) const;
};

} // namespace finrace

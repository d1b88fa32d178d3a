// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "cli/filter.h"

#include <algorithm>

#include "sink/facts.h"

namespace finrace {

std::string process_name(const connection& c, const ProcessNames& names)
{
    const std::string_view noted = owner_name(c);
    return noted.empty() ? names.of(c.pid) : std::string(noted);
}

bool Filter::matches(const event& e, const ProcessNames& names) const
{
    const bool client = is_client(e);
    if (side && (*side == Side::client) != client)
        return false;
    if (!upstreams.empty()) {
        const std::uint8_t* address = client ? e.peer_address : e.local_address;
        const std::uint16_t port = client ? e.peer_port : e.local_port;
        if (std::none_of(upstreams.begin(), upstreams.end(),
                         [&](const AddressPattern& pattern) { return pattern.matches(address, e.family, port); }))
            return false;
    }
    if (processes.empty())
        return true;
    const connection& c = e.connection;
    return std::any_of(processes.begin(), processes.end(), [&](const ProcessPattern& pattern) {
        if (pattern.pid)
            return *pattern.pid == c.pid;
        return !pattern.name.empty() && (pattern.name == owner_name(c) || pattern.name == names.of(c.pid));
    });
}

} // namespace finrace

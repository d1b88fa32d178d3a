// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "cli/filter.h"

#include <algorithm>
#include <iterator>

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
    if (!upstreams.empty() && !chooses(UpstreamKey::judged_at(e)))
        return false;
    if (processes.empty())
        return true;
    const connection& c = e.connection;
    return std::any_of(processes.begin(), processes.end(), [&](const ProcessPattern& pattern) {
        if (pattern.pid)
            return *pattern.pid == c.pid;
        return !pattern.name.empty() && (pattern.name == owner_name(c) || pattern.name == names.of(c.pid));
    });
}

bool Filter::matches_opened(const UpstreamKey& upstream, std::uint32_t pid, std::string_view comm,
                            const ProcessNames& names) const
{
    event e{};
    std::copy(upstream.address.begin(), upstream.address.end(), std::begin(e.peer_address));
    e.peer_port = upstream.port;
    e.family = upstream.family;
    e.connection.pid = pid;
    e.connection.flags = CONNECTION_CLIENT;
    std::copy_n(comm.begin(), std::min(comm.size(), sizeof(e.connection.comm) - 1), e.connection.comm);
    return matches(e, names);
}

bool Filter::chooses(const UpstreamKey& upstream) const
{
    return upstreams.empty() || std::any_of(upstreams.begin(), upstreams.end(), [&](const AddressPattern& pattern) {
               return pattern.matches(upstream.address.data(), upstream.family, upstream.port);
           });
}

bool Filter::has_address(const UpstreamKey& upstream) const
{
    return std::any_of(upstreams.begin(), upstreams.end(), [&](AddressPattern pattern) {
        pattern.port.reset();
        return pattern.matches(upstream.address.data(), upstream.family, upstream.port);
    });
}

} // namespace finrace

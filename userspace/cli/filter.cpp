// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "cli/filter.h"

#include <algorithm>
#include <fstream>

#include <fmt/format.h>

#include "sink/facts.h"

namespace finrace {

std::string process_name(const connection& c)
{
    if (const std::string_view noted = owner_name(c); !noted.empty() || c.pid == 0)
        return std::string(noted);
    // A name may hold newlines; the kernel adds one more at the end.
    std::ifstream file(fmt::format("/proc/{}/comm", c.pid));
    std::string name((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    if (!name.empty())
        name.pop_back();
    return name;
}

bool Filter::matches(const event& e) const
{
    if (!upstreams.empty()) {
        const bool client = is_client(e);
        const std::uint8_t* address = client ? e.peer_address : e.local_address;
        const std::uint16_t port = client ? e.peer_port : e.local_port;
        if (std::none_of(upstreams.begin(), upstreams.end(),
                         [&](const AddressPattern& pattern) { return pattern.matches(address, e.family, port); }))
            return false;
    }
    if (processes.empty())
        return true;
    const bool by_name =
        std::any_of(processes.begin(), processes.end(), [](const ProcessPattern& pattern) { return !pattern.pid; });
    const std::string name = by_name ? process_name(e.connection) : std::string();
    return std::any_of(processes.begin(), processes.end(), [&](const ProcessPattern& pattern) {
        return pattern.pid ? *pattern.pid == e.connection.pid : !name.empty() && pattern.name == name;
    });
}

} // namespace finrace

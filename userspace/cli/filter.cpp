// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "cli/filter.h"

#include <algorithm>
#include <chrono>
#include <fstream>
#include <iterator>
#include <unordered_map>

#include <fmt/format.h>

#include "sink/facts.h"

namespace finrace {

namespace {

/// The name of a process: of its first thread. Empty if it is gone. Kept for a second: a filter asks for each event.
const std::string& name_of_process(std::uint32_t pid)
{
    static std::unordered_map<std::uint32_t, std::string> names;
    static std::chrono::steady_clock::time_point emptied;
    if (const auto now = std::chrono::steady_clock::now(); now - emptied > std::chrono::seconds(1)) {
        names.clear();
        emptied = now;
    }
    const auto [found, unknown] = names.try_emplace(pid);
    if (unknown && pid != 0) {
        // A name may hold newlines; the kernel adds one more at the end.
        std::ifstream file(fmt::format("/proc/{}/comm", pid));
        found->second.assign(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
        if (!found->second.empty())
            found->second.pop_back();
    }
    return found->second;
}

} // namespace

std::string process_name(const connection& c)
{
    const std::string_view noted = owner_name(c);
    return noted.empty() ? name_of_process(c.pid) : std::string(noted);
}

bool Filter::matches(const event& e) const
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
        return !pattern.name.empty() && (pattern.name == owner_name(c) || pattern.name == name_of_process(c.pid));
    });
}

} // namespace finrace

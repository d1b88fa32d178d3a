// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "cli/process_names.h"

#include "source/host.h"

namespace finrace {

namespace {

const std::string unknown;

} // namespace

const std::string& LiveProcessNames::of(std::uint32_t pid) const
{
    if (const auto now = std::chrono::steady_clock::now(); now - emptied_ > std::chrono::seconds(1)) {
        names_.clear();
        emptied_ = now;
    }
    const auto [found, fresh] = names_.try_emplace(pid);
    if (fresh && pid != 0)
        found->second = process_comm(pid);
    return found->second;
}

const std::string& NotedProcessNames::of(std::uint32_t pid) const
{
    const auto found = names_.find(pid);
    return found == names_.end() ? unknown : found->second;
}

bool NotedProcessNames::note(std::uint32_t pid, std::string_view name)
{
    if (const auto found = names_.find(pid); found != names_.end() && found->second == name)
        return false;
    if (names_.size() >= capacity)
        names_.clear();
    names_.insert_or_assign(pid, std::string(name));
    return true;
}

} // namespace finrace

// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "cli/process_names.h"

#include "source/host.h"

namespace finrace {

namespace {

const std::string unknown;
const Placement nowhere;

} // namespace

void LiveProcessNames::empty_in_time() const
{
    const auto now = std::chrono::steady_clock::now();
    if (now - emptied_ <= std::chrono::seconds(1))
        return;
    names_.clear();
    placements_.clear();
    emptied_ = now;
}

const Placement& LiveProcessNames::placement(std::uint32_t pid) const
{
    empty_in_time();
    const auto [found, fresh] = placements_.try_emplace(pid);
    if (fresh && pid != 0) {
        found->second = placement_of(process_cgroup(pid));
        pods_.add_to(found->second);
    }
    return found->second;
}

const std::string& LiveProcessNames::of(std::uint32_t pid) const
{
    empty_in_time();
    const auto [found, fresh] = names_.try_emplace(pid);
    if (fresh && pid != 0)
        found->second = process_comm(pid);
    return found->second;
}

const std::string& NotedProcessNames::of(std::uint32_t pid) const
{
    const auto found = noted_.find(pid);
    return found == noted_.end() ? unknown : found->second.name;
}

const Placement& NotedProcessNames::placement(std::uint32_t pid) const
{
    const auto found = noted_.find(pid);
    return found == noted_.end() ? nowhere : found->second.placement;
}

NotedProcessNames::Noted& NotedProcessNames::at(std::uint32_t pid)
{
    if (noted_.size() >= capacity && noted_.count(pid) == 0)
        noted_.clear();
    return noted_[pid];
}

bool NotedProcessNames::note(std::uint32_t pid, std::string_view name)
{
    if (const auto found = noted_.find(pid); found != noted_.end() && found->second.name == name)
        return false;
    at(pid).name = name;
    return true;
}

bool NotedProcessNames::note(std::uint32_t pid, const Placement& placement)
{
    if (this->placement(pid) == placement)
        return false;
    at(pid).placement = placement;
    return true;
}

} // namespace finrace

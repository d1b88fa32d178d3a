// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "cli/process_names.h"

#include <utility>

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
    const auto found = names_.find(pid);
    return found == names_.end() ? unknown : found->second;
}

const Placement& NotedProcessNames::placement(std::uint32_t pid) const
{
    const auto found = placements_.find(pid);
    return found == placements_.end() ? nowhere : found->second;
}

void NotedProcessNames::note(std::uint32_t pid, Placement placement)
{
    if (placements_.size() >= capacity)
        placements_.clear();
    placements_.insert_or_assign(pid, std::move(placement));
}

void NotedProcessNames::clear()
{
    names_.clear();
    placements_.clear();
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

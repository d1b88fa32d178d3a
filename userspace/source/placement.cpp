// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "source/placement.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <filesystem>
#include <system_error>

namespace finrace {

namespace {

constexpr std::size_t container_id_digits = 64;
constexpr std::size_t static_pod_digits = 32;
constexpr std::size_t most_pods = 4096;

bool is_hex(char c)
{
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
}

bool is_word(char c)
{
    return is_hex(c) || (c >= 'g' && c <= 'z') || (c >= 'A' && c <= 'Z');
}

/// The next component of a path, which is taken off it; empty at its end.
std::string_view next_component(std::string_view& path)
{
    path.remove_prefix(std::min(path.find_first_not_of('/'), path.size()));
    const std::string_view component = path.substr(0, path.find('/'));
    path.remove_prefix(component.size());
    return component;
}

/// Just so many hexadecimal digits, with no other letter beside them.
std::string_view digits_in(std::string_view component, std::size_t count)
{
    for (std::size_t at = 0; at + count <= component.size(); ++at) {
        const std::string_view digits = component.substr(at, count);
        const bool alone = (at == 0 || !is_word(component[at - 1])) &&
                           (at + count == component.size() || !is_word(component[at + count]));
        if (alone && std::all_of(digits.begin(), digits.end(), is_hex))
            return digits;
    }
    return {};
}

/// pod0123…, or pod01234567-89ab-…, for whose '-' systemd's slices have '_'. Empty if there is none.
std::string pod_uid_in(std::string_view component)
{
    constexpr std::array<std::size_t, 5> groups{8, 4, 4, 4, 12};
    constexpr std::string_view mark = "pod";
    for (std::size_t at = component.find(mark); at != std::string_view::npos; at = component.find(mark, at + 1)) {
        if (at > 0 && is_word(component[at - 1]))
            continue;
        const std::string_view rest = component.substr(at + mark.size());
        if (rest.size() >= static_pod_digits &&
            digits_in(rest.substr(0, static_pod_digits + 1), static_pod_digits) == rest.substr(0, static_pod_digits))
            return std::string(rest.substr(0, static_pod_digits));
        std::string uid;
        std::size_t position = 0;
        for (const std::size_t size : groups) {
            if (!uid.empty()) {
                if (position >= rest.size() || (rest[position] != '-' && rest[position] != '_'))
                    break;
                uid += '-';
                ++position;
            }
            const std::string_view group = rest.substr(std::min(position, rest.size()), size);
            if (group.size() != size || !std::all_of(group.begin(), group.end(), is_hex))
                break;
            uid += group;
            position += size;
        }
        constexpr std::size_t uid_size = 36;
        if (uid.size() == uid_size && (position == rest.size() || !is_word(rest[position])))
            return uid;
    }
    return {};
}

bool is_unit(std::string_view component)
{
    return component.size() > std::string_view(".scope").size() &&
           (component.ends_with(".service") || component.ends_with(".scope"));
}

/// What a user's own service manager makes below that, it names as that user likes: another's pod, container or
/// service.
bool is_of_user(std::string_view component)
{
    return component.starts_with("user@") && component.ends_with(".service") && component != "user@0.service";
}

} // namespace

std::string cgroup_of(std::string_view proc_cgroup)
{
    constexpr std::string_view unified = "0::";
    constexpr std::string_view systemds = ":name=systemd:";
    std::string second;
    while (!proc_cgroup.empty()) {
        const std::string_view line = proc_cgroup.substr(0, proc_cgroup.find('\n'));
        proc_cgroup.remove_prefix(std::min(line.size() + 1, proc_cgroup.size()));
        if (line.starts_with(unified) && line.size() > unified.size() + 1)
            return std::string(line.substr(unified.size()));
        if (const std::size_t at = line.find(systemds); at != std::string_view::npos && line.find(':') == at)
            second = line.substr(at + systemds.size());
    }
    return second.size() > 1 ? second : std::string();
}

Placement placement_of(std::string_view cgroup)
{
    Placement placement{.cgroup = std::string(cgroup)};
    for (std::string_view component = next_component(cgroup); !component.empty(); component = next_component(cgroup)) {
        if (is_of_user(component)) {
            placement.unit = component;
            break;
        }
        if (const std::string uid = pod_uid_in(component); !uid.empty())
            placement.pod_uid = uid;
        const std::string_view id = digits_in(component, container_id_digits);
        // CRI-O and Podman watch a container from a scope beside it.
        if (!id.empty() && component.find("conmon") == std::string_view::npos)
            placement.container_id = id;
        else if (is_unit(component))
            placement.unit = component;
    }
    return placement;
}

PodNames::PodNames(const std::string& folder)
{
    // Whoever leaves all other files behind keeps the folder itself, not a link to it.
    std::error_code unknown;
    folder_ = std::filesystem::canonical(folder, unknown).string();
    if (unknown)
        folder_ = folder;
}

void PodNames::add_to(Placement& placement)
{
    if (placement.pod_uid.empty())
        return;
    auto found = pods_.find(placement.pod_uid);
    if (found == pods_.end()) {
        look();
        found = pods_.find(placement.pod_uid);
    }
    if (found == pods_.end())
        return;
    placement.pod_namespace = found->second.name_space;
    placement.pod_name = found->second.name;
}

int PodNames::keep_open()
{
    open_.reset(::opendir(folder_.c_str()));
    return open_ ? 0 : errno;
}

void PodNames::look()
{
    pods_.clear();
    const Listing own(open_ ? nullptr : ::opendir(folder_.c_str()));
    DIR* listing = open_ ? open_.get() : own.get();
    if (listing == nullptr)
        return;
    ::rewinddir(listing);
    while (const dirent* entry = ::readdir(listing)) { // one thread lists it
        const std::string_view name = entry->d_name;
        const std::size_t first = name.find('_');
        const std::size_t last = name.rfind('_');
        if (first == std::string_view::npos || last == first || pods_.size() >= most_pods)
            continue;
        pods_.insert_or_assign(std::string(name.substr(last + 1)),
                               Pod{.name_space = std::string(name.substr(0, first)),
                                   .name = std::string(name.substr(first + 1, last - first - 1))});
    }
}

} // namespace finrace

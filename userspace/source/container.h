// SPDX-License-Identifier: GPL-2.0-only OR MIT
// What a container leaves to finrace of its host: capabilities, numbers of processes, names of control groups, the
// host's own name. The kernel tells all of them as the host has them, so a namespace of finrace's own makes them
// another's. And what the kernel itself withholds.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

struct stat;

namespace finrace {

/// stat(2) of a namespace's file, in /proc/PID/ns or /run/netns. Returns an errno, or 0; ENOENT if it is no
/// namespace's.
int stat_namespace(const std::string& file, struct stat& status);

/// CapEff of /proc/self/status, a bit each; 0 if it can't be read.
std::uint64_t effective_capabilities();
std::uint64_t parse_effective_capabilities(std::string_view status);

/// Whether the numbers that the kernel gives to processes are those of /proc here.
bool sees_host_processes();

/// Whether capabilities are those of a user namespace, which count nowhere that finrace needs them.
bool is_in_user_namespace();

/// How far the kernel is locked down (kernel_lockdown.7): none, integrity or confidentiality. Empty if it does not
/// tell. Where securityfs is not mounted (containers, small systems), it is, where nobody else sees it.
std::string lockdown_mode();

/// Whether that control group, a folder of cgroup v2, is the whole hierarchy's root: what is attached elsewhere sees a
/// part of the host's connections.
bool is_cgroup_root(const std::string& folder);

/// From now on the calling thread, and those that it starts, reads names of control groups and of the host as the host
/// has them, if it sees the host's processes. Returns why names of control groups stay the container's, if they do.
std::optional<std::string> take_host_names();

} // namespace finrace

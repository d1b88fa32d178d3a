// SPDX-License-Identifier: GPL-2.0-only OR MIT
// The capabilities that watching the kernel takes, and those that this process has.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace finrace {

/// CapEff of /proc/self/status; 0 if it can't be read.
std::uint64_t effective_capabilities();
std::uint64_t parse_effective_capabilities(std::string_view status);

/// The capabilities that are missing, by name: empty if everything is there.
std::vector<std::string> missing_capabilities(std::uint64_t effective);

/// Throws UsageError that names what is missing and the remedy.
void require_capabilities();

} // namespace finrace

// SPDX-License-Identifier: GPL-2.0-only OR MIT
// The privileges that watching the kernel takes, and those that this process has.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace finrace {

/// The capabilities that are missing, by name: empty if everything is there.
std::vector<std::string> missing_capabilities(std::uint64_t effective);

/// Why this process can't watch the kernel at all, with the remedy: capabilities that are missing or count for nothing,
/// a seccomp filter. Nothing if the kernel may be asked.
std::optional<std::string> refusal();

/// Throws UsageError with refusal(), if there is one.
void require_privileges();

} // namespace finrace

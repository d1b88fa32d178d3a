// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "cli/privileges.h"

#include <charconv>

#include <linux/capability.h>
#include <unistd.h>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "cli/parse.h"
#include "source/descriptor.h"

namespace finrace {

std::uint64_t parse_effective_capabilities(std::string_view status)
{
    static constexpr std::string_view label = "\nCapEff:\t";
    std::uint64_t mask = 0;
    if (const std::size_t at = status.find(label); at != std::string_view::npos)
        std::from_chars(status.data() + at + label.size(), status.data() + status.size(), mask, 16);
    return mask;
}

std::uint64_t effective_capabilities()
{
    return parse_effective_capabilities(read_whole("/proc/self/status"));
}

std::vector<std::string> missing_capabilities(std::uint64_t effective)
{
    const auto has = [&](unsigned capability) { return (effective >> capability & 1U) != 0; };
    std::vector<std::string> missing;
    // CAP_SYS_ADMIN contains the others wherever bpf() asks for them. CAP_PERFMON is for backend cgroup, too: without
    // it the verifier distrusts programs so much that it refuses ours.
    if (has(CAP_SYS_ADMIN))
        return missing;
    if (!has(CAP_BPF))
        missing.emplace_back("CAP_BPF");
    if (!has(CAP_PERFMON))
        missing.emplace_back("CAP_PERFMON");
    if (!has(CAP_NET_ADMIN))
        missing.emplace_back("CAP_NET_ADMIN");
    return missing;
}

void require_capabilities()
{
    const std::vector<std::string> missing = missing_capabilities(effective_capabilities());
    if (missing.empty())
        return;
    throw UsageError(fmt::format("watching the kernel takes {}, which this process (user {}) does not have; run it as "
                                 "root, or give it CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN (or CAP_SYS_ADMIN, which "
                                 "contains them)",
                                 fmt::join(missing, ", "), ::geteuid()));
}

} // namespace finrace

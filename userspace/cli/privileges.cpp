// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "cli/privileges.h"

#include <cerrno>
#include <cstring>

#include <linux/bpf.h>
#include <linux/capability.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "cli/parse.h"
#include "source/container.h"

namespace finrace {

std::vector<std::string> missing_capabilities(std::uint64_t effective)
{
    const auto has = [&](unsigned capability) { return (effective >> capability & 1U) != 0; };
    std::vector<std::string> missing;
    // CAP_SYS_ADMIN contains the others wherever bpf() asks for them, but where backend cgroup attaches. CAP_PERFMON is
    // for backend cgroup, too: without it the verifier distrusts programs so much that it refuses ours.
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

std::optional<std::string> refusal()
{
    if (is_in_user_namespace())
        return "this is a user namespace (a rootless container, one with hostUsers: false, or a sandbox such as "
               "gVisor), whose capabilities do not let anybody watch the host's kernel; run it as root outside of it, "
               "or in a container that root has started";
    if (const std::vector<std::string> missing = missing_capabilities(effective_capabilities()); !missing.empty())
        return fmt::format(
            "watching the kernel takes {}, which this process (user {}) does not have; run it as root, or give it "
            "CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN (or CAP_SYS_ADMIN for the first two); in a container do both: "
            "podman or docker run --user 0 --cap-add SYS_ADMIN --cap-add NET_ADMIN, in Kubernetes "
            "securityContext.capabilities.add (finrace.yaml in packaging/kubernetes)",
            fmt::join(missing, ", "), ::geteuid());
    // No command that any kernel knows: whoever is asked says EINVAL.
    bpf_attr nothing{};
    constexpr int no_command = 0x7fffffff;
    if (::syscall(SYS_bpf, no_command, &nothing, sizeof(nothing)) == 0 || (errno != EPERM && errno != ENOSYS))
        return std::nullopt;
    return fmt::format("bpf() is refused here ({}), though no capability is missing: {}", std::strerror(errno),
                       errno == ENOSYS ? "this kernel, or what stands in for it (gVisor), has none"
                                       : "by a seccomp filter, such as container runtimes have; give the container "
                                         "CAP_SYS_ADMIN as well, for which they let it pass, or no filter (podman or "
                                         "docker run --security-opt seccomp=unconfined, in Kubernetes seccompProfile: "
                                         "{type: Unconfined})");
}

void require_privileges()
{
    if (const std::optional<std::string> problem = refusal())
        throw UsageError(*problem);
}

} // namespace finrace

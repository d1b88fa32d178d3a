// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Where a process belongs on its host, as its control group's path tells: a container, a pod of Kubernetes, a unit of
// systemd.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>

#include <dirent.h>

namespace finrace {

struct Placement {
    std::string cgroup{};        ///< its path below the hierarchy's root; empty if not known
    std::string container_id{};  ///< 64 hexadecimal digits: Docker, containerd, CRI-O, Podman
    std::string pod_uid{};       ///< 8-4-4-4-12, or 32 digits of a static pod
    std::string pod_namespace{}; ///< where the host's files tell it
    std::string pod_name{};      ///< likewise
    std::string unit{};          ///< of systemd: nginx.service; not of a container's own scope

    bool operator==(const Placement&) const = default;
};

/// What /proc/PID/cgroup (cgroups(7)) tells: the version 2 hierarchy's path, or systemd's own where that is empty.
std::string cgroup_of(std::string_view proc_cgroup);

/// By the names that systemd, the container runtimes and the kubelet give to control groups (systemd.slice(5);
/// kubernetes/pkg/kubelet/cm/cgroup_manager_linux.go).
Placement placement_of(std::string_view cgroup);

/// Pods by their uid: as the kubelet names the folders of their logs, NAMESPACE_NAME_UID.
class PodNames {
public:
    static constexpr const char* usual_folder = "/var/log/pods";

    explicit PodNames(const std::string& folder = usual_folder);

    /// Keeps the folder open from now on: the kubelet's is root's alone (0750), and whoever gives up root's rights
    /// can't open it again. Returns an errno, or 0.
    int keep_open();
    /// Adds namespace and name, if they are known by now.
    void add_to(Placement& placement);

private:
    struct Pod {
        std::string name_space;
        std::string name;
    };
    struct Closer {
        void operator()(DIR* open) const { ::closedir(open); }
    };
    using Listing = std::unique_ptr<DIR, Closer>;

    void look();

    std::string folder_;
    Listing open_;
    std::unordered_map<std::string, Pod> pods_;
};

} // namespace finrace

// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "source/container.h"

#include <cerrno>
#include <charconv>
#include <cstddef>
#include <cstring>

#include <fcntl.h>
#include <linux/magic.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <unistd.h>

#include <fmt/format.h>

#include "source/descriptor.h"

namespace finrace {

namespace {

/// The numbers of those that the kernel starts with: enum in include/linux/proc_ns.h, the same since Linux 3.8.
constexpr ino_t initial_user = 0xEFFFFFFD;
constexpr ino_t initial_pid = 0xEFFFFFFC;
constexpr ino_t initial_cgroup = 0xEFFFFFFB;

bool same_namespace(const struct stat& one, const struct stat& other)
{
    return one.st_dev == other.st_dev && one.st_ino == other.st_ino;
}

/// Also where the kernel has no namespaces of that kind.
bool is_initial(const char* file, ino_t number)
{
    struct stat status {};
    const int error = stat_namespace(file, status);
    return error == ENOENT || (error == 0 && status.st_ino == number);
}

/// An errno, or 0.
int join_first_process(const char* kind, int flag)
{
    const std::string file = fmt::format("/proc/1/ns/{}", kind);
    struct stat first {};
    struct stat own {};
    if (const int error = stat_namespace(fmt::format("/proc/thread-self/ns/{}", kind), own); error != 0)
        return error;
    if (const int error = stat_namespace(file, first); error != 0)
        return error;
    if (same_namespace(first, own))
        return 0;
    const Descriptor there(::open(file.c_str(), O_RDONLY | O_CLOEXEC));
    return there && ::setns(there.get(), flag) == 0 ? 0 : errno;
}

} // namespace

int stat_namespace(const std::string& file, struct stat& status)
{
    struct statfs system {};
    if (::stat(file.c_str(), &status) != 0 || ::statfs(file.c_str(), &system) != 0)
        return errno;
    if (system.f_type == NSFS_MAGIC)
        return 0;
    // Debian's Linux 5.10 leads to the folder around it, where it should refuse. In /run/netns names outlive
    // namespaces.
    return S_ISDIR(status.st_mode) ? EACCES : ENOENT;
}

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

bool sees_host_processes()
{
    static const bool sees = is_initial("/proc/self/ns/pid", initial_pid);
    return sees;
}

bool is_in_user_namespace()
{
    return !is_initial("/proc/self/ns/user", initial_user);
}

std::string lockdown_mode()
{
    std::string text = read_whole("/sys/kernel/security/lockdown");
    const Descriptor context(text.empty() ? ::fsopen("securityfs", FSOPEN_CLOEXEC) : -1);
    if (context && ::fsconfig(context.get(), FSCONFIG_CMD_CREATE, nullptr, nullptr, 0) == 0) {
        const Descriptor root(::fsmount(context.get(), FSMOUNT_CLOEXEC, 0));
        const Descriptor file(!root ? -1 : ::openat(root.get(), "lockdown", O_RDONLY | O_CLOEXEC));
        text.resize(256);
        const ssize_t size = !file ? -1 : ::read(file.get(), text.data(), text.size());
        text.resize(size > 0 ? static_cast<std::size_t>(size) : 0);
    }
    // As in "none [integrity] confidentiality".
    const std::size_t begin = text.find('[');
    const std::size_t end = text.find(']', begin);
    return end == std::string::npos ? std::string() : text.substr(begin + 1, end - begin - 1);
}

bool is_cgroup_root(const std::string& folder)
{
    // Of these files the first is in every control group, the second in all but the root (Linux,
    // Documentation/admin-guide/cgroup-v2.rst).
    return ::access((folder + "/cgroup.controllers").c_str(), F_OK) == 0 &&
           ::access((folder + "/cgroup.type").c_str(), F_OK) != 0;
}

std::optional<std::string> take_host_names()
{
    if (!sees_host_processes())
        return std::nullopt; // there is no process 1 of the host
    // Its own may be a copy of the host's name (systemd's ProtectHostname=): a refusal may mean nothing.
    join_first_process("uts", CLONE_NEWUTS);
    const int error = join_first_process("cgroup", CLONE_NEWCGROUP);
    if (error == 0 || is_initial("/proc/self/ns/cgroup", initial_cgroup))
        return std::nullopt;
    return fmt::format("control groups are named as this container sees them, and the host as the container: the "
                       "namespaces of the host's first process can't be joined ({}), which takes CAP_SYS_ADMIN and "
                       "CAP_SYS_PTRACE",
                       std::strerror(error));
}

} // namespace finrace

// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "source/sockets.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstddef>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <initializer_list>
#include <optional>
#include <set>
#include <string_view>
#include <thread>

#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/inet_diag.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <linux/sock_diag.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <sched.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "bpf/event.h"
#include "core/address.h"
#include "source/container.h"
#include "source/descriptor.h"

namespace finrace {

namespace {

namespace fs = std::filesystem;

std::vector<fs::path> namespace_files()
{
    std::vector<fs::path> files{"/proc/self/ns/net"};
    std::error_code ignored;
    for (const auto& entry : fs::directory_iterator("/run/netns", ignored))
        files.push_back(entry.path());
    for (const auto& entry : fs::directory_iterator("/proc", ignored)) {
        const std::string name = entry.path().filename();
        if (name.find_first_not_of("0123456789") == std::string::npos)
            files.push_back(entry.path() / "ns/net");
    }
    return files;
}

struct Capability {
    unsigned number;
    const char* name;
};

/// What could not be looked into, but for what is gone by now: the first of it, and how many of how many.
class Denials {
public:
    /// `few_tell`: a few where all capabilities are there are worth telling. Security modules keep some processes from
    /// everybody, which nobody can mend.
    explicit Denials(bool few_tell) : few_tell_(few_tell) {}
    void attempt() { ++attempts_; }
    void note(const fs::path& file, int error)
    {
        // ESRCH: of a process that has just ended, fs/proc.
        if (error == ENOENT || error == ESRCH)
            return;
        if (count_++ == 0) {
            file_ = file;
            error_ = error;
        }
    }
    /// Nothing if nothing is worth telling.
    [[nodiscard]] std::optional<std::string> told(std::string_view what,
                                                  std::initializer_list<Capability> capabilities) const
    {
        const std::uint64_t effective = effective_capabilities();
        std::vector<std::string_view> missing;
        for (const Capability& one : capabilities)
            if ((effective >> one.number & 1U) == 0)
                missing.emplace_back(one.name);
        if (count_ == 0 || (missing.empty() && !few_tell_ && 2 * count_ <= attempts_))
            return std::nullopt;
        return fmt::format("{} of {} {} ({}: {}), {}", count_, attempts_, what, file_.string(), std::strerror(error_),
                           missing.empty()
                               ? "though no capability is missing: a security module may refuse it (AppArmor, "
                                 "SELinux: a container's profile)"
                               : fmt::format("which takes {}", fmt::join(missing, " and ")));
    }

private:
    bool few_tell_;
    std::size_t attempts_ = 0;
    std::size_t count_ = 0;
    fs::path file_;
    int error_ = 0;
};

/// Calls `handle` with each of the attributes in `bytes` bytes.
template <typename Handle>
void for_each_attribute(const void* first, unsigned bytes, const Handle& handle)
{
    // Nested ones have flags beside their type.
    for (const auto* one = static_cast<const rtattr*>(first); RTA_OK(one, bytes); one = RTA_NEXT(one, bytes))
        handle(one->rta_type & NLA_TYPE_MASK, RTA_DATA(one), static_cast<unsigned>(RTA_PAYLOAD(one)));
}

/// What a map of socket storage holds for a socket: INET_DIAG_SK_BPF_STORAGES, include/uapi/linux/sock_diag.h.
void read_accounting(const void* storages, unsigned bytes, connection& accounting)
{
    for_each_attribute(storages, bytes, [&](int, const void* storage, unsigned storage_bytes) {
        for_each_attribute(storage, storage_bytes, [&](int type, const void* value, unsigned value_bytes) {
            if (type == SK_DIAG_BPF_STORAGE_MAP_VALUE && value_bytes == sizeof(accounting))
                std::memcpy(&accounting, value, sizeof(accounting));
        });
    });
}

bool list_family(int netlink, std::uint8_t family, const std::function<void(const ListedSocket&)>& handle,
                 int accounting)
{
    struct {
        nlmsghdr header;
        inet_diag_req_v2 request;
        rtattr storages;
        rtattr map;
        std::uint32_t map_fd;
    } message{};
    message.header.nlmsg_len = sizeof(message);
    message.storages.rta_type = INET_DIAG_REQ_SK_BPF_STORAGES | NLA_F_NESTED;
    message.storages.rta_len = RTA_LENGTH(RTA_LENGTH(sizeof(message.map_fd)));
    message.map.rta_type = SK_DIAG_BPF_STORAGE_REQ_MAP_FD;
    message.map.rta_len = RTA_LENGTH(sizeof(message.map_fd));
    message.map_fd = static_cast<std::uint32_t>(accounting);
    if (accounting < 0)
        message.header.nlmsg_len = offsetof(decltype(message), storages);
    message.header.nlmsg_type = SOCK_DIAG_BY_FAMILY;
    message.header.nlmsg_flags = NLM_F_REQUEST | NLM_F_DUMP;
    message.request.sdiag_family = family;
    message.request.sdiag_protocol = IPPROTO_TCP;
    message.request.idiag_ext = 1U << (INET_DIAG_INFO - 1);
    message.request.idiag_states = 0xffffffffU & ~(1U << TCP_STATE_TIME_WAIT | 1U << TCP_STATE_NEW_SYN_RECV |
                                                   1U << TCP_STATE_SYN_RECV | 1U << TCP_STATE_CLOSE);
    if (send(netlink, &message, message.header.nlmsg_len, 0) < 0)
        return false;

    // The kernel lists the first part as it is asked, and each other one as the one before is taken
    // (netlink_recvmsg(), Linux 6.12): many sockets take a second, and ages are told of when they are listed.
    std::uint64_t next_ns = monotonic_ns();
    std::array<char, 1U << 17U> buffer{};
    for (;;) {
        const std::uint64_t now = next_ns;
        const ssize_t got = recv(netlink, buffer.data(), buffer.size(), 0);
        if (got < 0 && errno == EINTR)
            continue;
        next_ns = monotonic_ns();
        if (got <= 0)
            return false;
        auto left = static_cast<unsigned>(got);
        for (auto* h = reinterpret_cast<nlmsghdr*>(buffer.data()); NLMSG_OK(h, left); h = NLMSG_NEXT(h, left)) {
            if (h->nlmsg_type == NLMSG_DONE)
                return true;
            if (h->nlmsg_type == NLMSG_ERROR) {
                errno = -static_cast<nlmsgerr*>(NLMSG_DATA(h))->error;
                return false;
            }
            const auto* socket = static_cast<const inet_diag_msg*>(NLMSG_DATA(h));
            ListedSocket listed{};
            listed.cookie = socket->id.idiag_cookie[0] | std::uint64_t{socket->id.idiag_cookie[1]} << 32U;
            listed.inode = socket->idiag_inode;
            listed.local_port = ntohs(socket->id.idiag_sport);
            listed.peer_port = ntohs(socket->id.idiag_dport);
            listed.family = socket->idiag_family == AF_INET ? 4 : 6;
            std::memcpy(listed.local_address.data(), socket->id.idiag_src, sizeof(socket->id.idiag_src));
            std::memcpy(listed.peer_address.data(), socket->id.idiag_dst, sizeof(socket->id.idiag_dst));
            // What listens for both families has no address at all.
            if (listed.family == 6 && is_ipv4_mapped(listed.local_address.data())) {
                listed.family = 4;
                ipv4_from_mapped(listed.local_address.data());
                if (is_ipv4_mapped(listed.peer_address.data()))
                    ipv4_from_mapped(listed.peer_address.data());
            }
            listed.state = socket->idiag_state;
            const auto bytes = static_cast<unsigned>(NLMSG_PAYLOAD(h, sizeof(*socket)));
            for_each_attribute(socket + 1, bytes, [&](int type, const void* data, unsigned size) {
                if (type == INET_DIAG_SK_BPF_STORAGES)
                    read_accounting(data, size, listed.accounting);
                if (type != INET_DIAG_INFO)
                    return;
                tcp_info info{};
                std::memcpy(&info, data, std::min(sizeof(info), std::size_t{size}));
                // Both stamps are set by the handshake as well: without payload they tell nothing.
                if (info.tcpi_bytes_acked > 1 || info.tcpi_unacked > 0)
                    listed.last_send_ns = now - std::uint64_t{info.tcpi_last_data_sent} * 1'000'000U;
                if (info.tcpi_bytes_received > 0)
                    listed.last_receive_ns = now - std::uint64_t{info.tcpi_last_data_recv} * 1'000'000U;
                listed.bytes_received = info.tcpi_bytes_received;
            });
            handle(listed);
        }
    }
}

} // namespace

std::uint64_t monotonic_ns()
{
    timespec now{};
    clock_gettime(CLOCK_MONOTONIC, &now);
    return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000U + static_cast<std::uint64_t>(now.tv_nsec);
}

std::vector<std::string> in_each_network_namespace(const std::function<void()>& work)
{
    Denials unseen(false);
    Denials closed(true);
    std::thread([&] {
        std::set<std::pair<dev_t, ino_t>> done;
        for (const fs::path& file : namespace_files()) {
            struct stat status {};
            unseen.attempt();
            if (const int error = stat_namespace(file, status); error != 0) {
                unseen.note(file, error);
                continue;
            }
            if (!done.emplace(status.st_dev, status.st_ino).second)
                continue;
            closed.attempt();
            const Descriptor ns(open(file.c_str(), O_RDONLY | O_CLOEXEC));
            // The first is our own: entering it takes no privilege.
            if (!ns || (done.size() > 1 && setns(ns.get(), CLONE_NEWNET) != 0)) {
                closed.note(file, errno);
                continue;
            }
            work();
        }
    }).join();
    std::vector<std::string> problems;
    if (const auto text =
            unseen.told("processes do not show their network namespace", {{CAP_SYS_PTRACE, "CAP_SYS_PTRACE"}}))
        problems.push_back(*text);
    if (const auto text = closed.told("network namespaces can't be entered", {{CAP_SYS_ADMIN, "CAP_SYS_ADMIN"}}))
        problems.push_back(*text);
    return problems;
}

bool list_tcp_sockets(const std::function<void(const ListedSocket&)>& handle, int accounting)
{
    const Descriptor netlink(socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG));
    if (!netlink)
        return false;
    return list_family(netlink.get(), AF_INET, handle, accounting) &&
           list_family(netlink.get(), AF_INET6, handle, accounting);
}

std::optional<std::string>
for_each_socket_holder(const std::function<void(std::uint32_t inode, std::uint32_t pid)>& handle)
{
    if (!sees_host_processes())
        return "this container has its own numbers for processes, not those that the kernel tells: which process has a "
               "connection is not told, its container neither, and nothing of connections older than finrace in other "
               "network namespaces; give it the host's (podman or docker run --pid=host, in Kubernetes hostPID: true)";
    Denials denials(false);
    std::error_code ignored;
    for (const auto& process : fs::directory_iterator("/proc", ignored)) {
        const std::string name = process.path().filename();
        std::uint32_t pid = 0;
        if (std::from_chars(name.data(), name.data() + name.size(), pid).ptr != name.data() + name.size())
            continue;
        const fs::path folder = process.path() / "fd";
        denials.attempt();
        std::error_code error;
        int unreadable = 0;
        for (fs::directory_iterator file(folder, error), end; !error && file != end; file.increment(error)) {
            std::array<char, 64> target{};
            const ssize_t length = readlink(file->path().c_str(), target.data(), target.size());
            if (length < 0)
                unreadable = errno;
            constexpr std::string_view prefix = "socket:[";
            const std::string_view text(target.data(), length > 0 ? static_cast<std::size_t>(length) : 0);
            std::uint32_t inode = 0;
            if (text.starts_with(prefix) &&
                std::from_chars(text.data() + prefix.size(), text.data() + text.size(), inode).ec == std::errc())
                handle(inode, pid);
        }
        if (error)
            denials.note(folder, error.value());
        else if (unreadable != 0)
            denials.note(folder, unreadable);
    }
    return denials.told(
        "processes do not show their files, so not which of the connections older than finrace are theirs",
        {{CAP_SYS_PTRACE, "CAP_SYS_PTRACE"}, {CAP_DAC_READ_SEARCH, "CAP_DAC_READ_SEARCH"}});
}

SocketOwners find_socket_owners(std::vector<std::string>* problems)
{
    SocketOwners owners;
    const std::optional<std::string> problem =
        for_each_socket_holder([&](std::uint32_t inode, std::uint32_t pid) { owners.emplace(inode, pid); });
    if (problem && problems != nullptr)
        problems->push_back(*problem);
    return owners;
}

} // namespace finrace

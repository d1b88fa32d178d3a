// SPDX-License-Identifier: GPL-2.0-only OR MIT
// The connections that are open already: network namespaces of this host, and their TCP sockets by NETLINK_SOCK_DIAG.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "bpf/event.h"

namespace finrace {

/// Runs `work` once inside every network namespace of this host that can be entered (each one only once), on a
/// thread of its own. Returns what could not be entered, for people. Needs CAP_SYS_ADMIN for foreign ones, and
/// CAP_SYS_PTRACE to see them.
std::vector<std::string> in_each_network_namespace(const std::function<void()>& work);

/// CLOCK_MONOTONIC, as ListedSocket has it.
std::uint64_t monotonic_ns();

/// A TCP socket as the kernel lists it (struct inet_diag_msg, struct tcp_info).
struct ListedSocket {
    std::uint64_t cookie;
    std::uint64_t last_send_ns;    ///< CLOCK_MONOTONIC, millisecond steps; 0 if nothing was sent
    std::uint64_t last_receive_ns; ///< 0 if nothing was received
    std::uint32_t inode;
    std::array<std::uint8_t, 16> local_address; ///< network order; IPv4 in the first four bytes
    std::array<std::uint8_t, 16> peer_address;
    std::uint16_t local_port;
    std::uint16_t peer_port;
    std::uint8_t family;          ///< 4 or 6; IPv4-mapped addresses are 4
    std::uint8_t state;           ///< enum tcp_connection_state
    std::uint64_t bytes_received; ///< payload
    connection accounting;        ///< zeros where the kernel has none for it, or it was not asked for
};

/// Lists the TCP sockets of the namespace that the calling thread is in. False with errno set if the kernel refuses.
/// `accounting`: descriptor of the socket storage with struct connection to tell as well (since Linux 5.7), or -1.
bool list_tcp_sockets(const std::function<void(const ListedSocket&)>& handle, int accounting = -1);

/// One walk through /proc: calls `handle` for each socket (by its inode) that a process holds. Returns what could not
/// be seen, for people; nothing at all is where /proc has other numbers than the kernel.
std::optional<std::string>
for_each_socket_holder(const std::function<void(std::uint32_t inode, std::uint32_t pid)>& handle);
/// Process ids by socket inode: of several that hold one, any. What could not be seen is added to `problems`.
using SocketOwners = std::unordered_map<std::uint32_t, std::uint32_t>;
SocketOwners find_socket_owners(std::vector<std::string>* problems = nullptr);

} // namespace finrace

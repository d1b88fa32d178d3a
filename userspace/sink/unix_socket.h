// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Names of UNIX sockets, as addresses: a path, or with @ in front a name in the abstract name space (unix(7)).
#pragma once

#include <cstddef>
#include <optional>
#include <string_view>

#include <sys/socket.h>
#include <sys/un.h>

namespace finrace {

constexpr std::size_t longest_unix_name = sizeof(sockaddr_un::sun_path) - 1;

struct UnixAddress {
    sockaddr_un where{};
    socklen_t size = 0;
};

/// Nothing if it is too long, or neither begins with / nor with @.
std::optional<UnixAddress> unix_address(std::string_view name);

/// connect(2). Returns false and leaves the reason in errno, also for what is no such name (EINVAL), and for a socket
/// that another user may have put in its server's place (EACCES; open_untampered()).
bool connect_unix(int fd, std::string_view name);

} // namespace finrace

// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "sink/unix_socket.h"

#include <cerrno>

namespace finrace {

std::optional<UnixAddress> unix_address(std::string_view name)
{
    if (name.size() < 2 || name.size() > longest_unix_name || (name[0] != '/' && name[0] != '@'))
        return std::nullopt;
    UnixAddress address;
    address.where.sun_family = AF_UNIX;
    name.copy(address.where.sun_path, name.size());
    if (name[0] == '@')
        address.where.sun_path[0] = '\0';
    address.size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + name.size());
    return address;
}

bool connect_unix(int fd, std::string_view name)
{
    const std::optional<UnixAddress> address = unix_address(name);
    if (!address) {
        errno = EINVAL;
        return false;
    }
    return ::connect(fd, reinterpret_cast<const sockaddr*>(&address->where), address->size) == 0;
}

} // namespace finrace

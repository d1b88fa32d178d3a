// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "sink/unix_socket.h"

#include <cerrno>
#include <string>

#include <fcntl.h>
#include <unistd.h>

#include <fmt/format.h>

#include "sink/untampered.h"

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
    std::optional<UnixAddress> address = unix_address(name);
    if (!address) {
        errno = EINVAL;
        return false;
    }
    int socket = -1;
    bool by_others = false;
    if (name.front() == '/') {
        try {
            socket = open_untampered(std::string(name), O_PATH, 0, &by_others);
        } catch (const Tampered&) {
            errno = EACCES;
            return false;
        }
        if (socket < 0)
            return false;
        if (by_others) // what was looked at, whatever has the name by now
            address = unix_address(fmt::format("/proc/self/fd/{}", socket));
    }
    const bool connected = ::connect(fd, reinterpret_cast<const sockaddr*>(&address->where), address->size) == 0;
    const int error = errno;
    if (socket >= 0)
        ::close(socket);
    errno = error;
    return connected;
}

} // namespace finrace

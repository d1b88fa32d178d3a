// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "cli/service_manager.h"

#include <cerrno>
#include <charconv>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <utility>

#include <sys/socket.h>
#include <unistd.h>

#include <fmt/format.h>

#include "cli/parse.h"
#include "sink/unix_socket.h"
#include "source/sockets.h"

namespace finrace {

namespace {

std::optional<std::string> take_variable(const char* name)
{
    const char* value = std::getenv(name);
    if (value == nullptr)
        return std::nullopt;
    std::string taken = value;
    ::unsetenv(name);
    return taken;
}

std::optional<std::uint64_t> take_number(const char* name)
{
    const std::optional<std::string> text = take_variable(name);
    std::uint64_t number = 0;
    if (!text || std::from_chars(text->data(), text->data() + text->size(), number).ec != std::errc())
        return std::nullopt;
    return number;
}

/// A path, or with @ in front a name in the abstract name space: unix(7).
Descriptor connect_to(const std::string& address)
{
    if (!unix_address(address))
        throw UsageError(fmt::format("NOTIFY_SOCKET={}: accepted: a path, or @ and a name, of {} bytes at most",
                                     address, longest_unix_name));
    Descriptor opened(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
    if (!opened || !connect_unix(opened.get(), address))
        throw UsageError(fmt::format("NOTIFY_SOCKET={}: {}; unset it, or start finrace from the service manager that "
                                     "listens there",
                                     address, std::strerror(errno)));
    return opened;
}

} // namespace

ServiceManager::ServiceManager()
{
    if (const std::optional<std::string> address = take_variable("NOTIFY_SOCKET"))
        socket_ = connect_to(*address);
    const std::optional<std::uint64_t> patience_us = take_number("WATCHDOG_USEC");
    const std::optional<std::uint64_t> watched = take_number("WATCHDOG_PID");
    if (patience_us && (!watched || *watched == static_cast<std::uint64_t>(::getpid())))
        told_every_ = std::chrono::microseconds(*patience_us) / 2;
}

void ServiceManager::tell_surely(std::string message)
{
    if (!socket_)
        return;
    untold_.push_back(std::move(message));
    tell_untold();
}

void ServiceManager::tell_untold()
{
    while (!untold_.empty() && tell(untold_.front()))
        untold_.erase(untold_.begin());
}

void ServiceManager::alive()
{
    tell_untold();
    if (told_every_.count() == 0)
        return;
    const auto now = std::chrono::steady_clock::now();
    if (now - told_ < told_every_)
        return;
    if (tell("WATCHDOG=1"))
        told_ = now;
}

void ServiceManager::reloading()
{
    tell_surely(fmt::format("RELOADING=1\nMONOTONIC_USEC={}", monotonic_ns() / 1000));
}

/// Never waits: a manager that does not listen is none of the daemon's troubles.
bool ServiceManager::tell(std::string_view message) const
{
    return socket_ && ::send(socket_.get(), message.data(), message.size(), MSG_DONTWAIT | MSG_NOSIGNAL) >= 0;
}

} // namespace finrace

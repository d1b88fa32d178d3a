// SPDX-License-Identifier: GPL-2.0-only OR MIT
// What systemd, or another service manager, is told of the daemon's state: sd_notify(3)'s protocol, one datagram each.
// The socket is opened before the process confines itself, and stays open.
#pragma once

#include <chrono>
#include <string>
#include <string_view>
#include <vector>

#include "source/descriptor.h"

namespace finrace {

class ServiceManager {
public:
    /// As $NOTIFY_SOCKET, $WATCHDOG_USEC and $WATCHDOG_PID tell, which are removed: nobody is told if there are none.
    /// Throws UsageError if $NOTIFY_SOCKET is no address that can be reached.
    ServiceManager();

    [[nodiscard]] bool is_there() const { return static_cast<bool>(socket_); }
    void ready(const std::string& status) { tell_surely("READY=1\nSTATUS=" + status); }
    void status(const std::string& status) { tell("STATUS=" + status); }
    /// To be called at each turn of the loop: a watchdog that hears nothing for so long ends the process.
    void alive();
    /// Between these two, what was asked for by SIGHUP is done.
    void reloading();
    void reloaded() { tell_surely("READY=1"); }
    void stopping() { tell("STOPPING=1"); }

private:
    /// Returns whether it is told.
    bool tell(std::string_view message) const;
    /// What the manager waits for: once more with each turn of the loop, until it is told.
    void tell_surely(std::string message);
    void tell_untold();

    Descriptor socket_;
    std::vector<std::string> untold_;
    std::chrono::nanoseconds told_every_{}; ///< half the watchdog's patience; 0: nobody watches
    std::chrono::steady_clock::time_point told_{};
};

} // namespace finrace

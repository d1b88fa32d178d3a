// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Hands out the metrics over HTTP (GET /metrics), on loopback unless told otherwise, from within the one loop there is:
// libmicrohttpd reads and answers, and never waits. Whoever asks too often gets what was made up a moment ago, and
// whoever says nothing is let go of.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>

#include "cli/parse.h"
#include "source/descriptor.h"

struct MHD_Daemon;

namespace finrace {

/// PORT, of 127.0.0.1, or ADDR:PORT. Throws UsageError.
AddressPattern parse_metrics_address(const std::string& text);

class MetricsServer {
public:
    /// `make_text`: the metrics' text now. Throws UsageError if that address can't be listened on.
    MetricsServer(const AddressPattern& address, std::function<std::string()> make_text);
    ~MetricsServer();
    MetricsServer(const MetricsServer&) = delete;
    MetricsServer& operator=(const MetricsServer&) = delete;
    MetricsServer(MetricsServer&&) = delete;
    MetricsServer& operator=(MetricsServer&&) = delete;

    /// Readable when somebody asks.
    [[nodiscard]] int descriptor() const;
    /// Answers whoever has asked, and lets go of who is silent. To be called when that is readable, and now and then.
    void serve();

    /// What is answered: not older than a second.
    const std::string& text();

private:
    std::function<std::string()> make_text_;
    std::string text_;
    std::chrono::steady_clock::time_point made_{};
    Descriptor listener_;
    MHD_Daemon* daemon_ = nullptr;
};

} // namespace finrace

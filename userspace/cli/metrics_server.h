// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Hands out the metrics over HTTP (GET /metrics), on loopback unless told otherwise, from within the one loop there is:
// libmicrohttpd reads and answers, and never waits. Whoever asks too often gets what was made up a moment ago; whoever
// takes too long, whatever comes from there, is let go of.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <string>

#include "cli/parse.h"
#include "source/descriptor.h"

struct MHD_Daemon;
struct MHD_Response;

namespace finrace {

/// PORT, of 127.0.0.1, or ADDR:PORT. Throws UsageError.
AddressPattern parse_metrics_address(const std::string& text);

/// A socket that listens for whoever asks, as soon as its port can be had: another process may have it, by mistake or
/// on purpose, and that is no reason not to trace.
class MetricsListener {
public:
    /// Tries once. Throws UsageError for another reason than that.
    explicit MetricsListener(const AddressPattern& address);

    /// Tries, if it does not listen yet: from then on whoever connects waits for an answer. Returns whether it does.
    bool try_to_listen();
    /// The errno that keeps it from that, or 0.
    [[nodiscard]] int problem() const { return problem_; }
    [[nodiscard]] const std::string& address() const { return text_; }
    [[nodiscard]] int descriptor() const { return socket_.get(); }

private:
    AddressPattern address_;
    std::string text_;
    Descriptor socket_;
    bool bound_ = false;
    int problem_ = 0;
};

class MetricsServer {
public:
    /// `listener`: a socket that listens, and outlives this. `make_text`: the metrics' text now. Throws UsageError.
    MetricsServer(int listener, std::function<std::string()> make_text);
    ~MetricsServer();
    MetricsServer(const MetricsServer&) = delete;
    MetricsServer& operator=(const MetricsServer&) = delete;
    MetricsServer(MetricsServer&&) = delete;
    MetricsServer& operator=(MetricsServer&&) = delete;

    /// Readable when somebody asks.
    [[nodiscard]] int descriptor() const;
    /// Answers whoever has asked, and lets go of who is silent. To be called when that is readable, and now and then.
    void serve();

private:
    struct Callbacks; ///< libmicrohttpd's

    /// What is answered: not older than a second.
    MHD_Response* response();

    std::function<std::string()> make_text_;
    std::chrono::steady_clock::time_point made_{};
    MHD_Response* response_ = nullptr;                               ///< the text, shared by all who ask for it
    std::map<int, std::chrono::steady_clock::time_point> connected_; ///< since when, by descriptor
    MHD_Daemon* daemon_ = nullptr;
};

} // namespace finrace

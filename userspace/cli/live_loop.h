// SPDX-License-Identifier: GPL-2.0-only OR MIT
// The loop that run and watch share: waits for the kernel's wake-up, a tick or a signal, takes in all events,
// filters and accounts for them, and hands them on.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "cli/options.h"
#include "core/classify.h"
#include "core/docket.h"
#include "core/upstream.h"
#include "sink/clock.h"
#include "source/descriptor.h"
#include "source/live.h"

namespace finrace {

/// What a command does with what the loop finds.
class LiveListener {
public:
    virtual ~LiveListener() = default;
    LiveListener() = default;
    LiveListener(const LiveListener&) = delete;
    LiveListener& operator=(const LiveListener&) = delete;

    /// An event that the filter lets through, as it comes.
    virtual void on_event(const event& e) = 0;
    /// A verdict. It may come a while after its event: when its outcome is known.
    virtual void on_verdict(const Judged& judged) = 0;
    /// After each look at the ring, and at least once a tick. Returns false to end the loop.
    virtual bool on_tick() = 0;
    /// To be watched: its reader's leaving, and room for what waits; -1 for none.
    [[nodiscard]] virtual int output_descriptor() const { return -1; }
    virtual void on_reader_left() {}
    /// SIGHUP. Returns false if that is the end.
    virtual bool on_hangup() { return false; }
};

class LiveLoop {
public:
    /// Blocks SIGINT, SIGTERM, SIGHUP and SIGUSR1, attaches, and says so on standard error. Throws
    /// SetupError or UsageError.
    LiveLoop(const WatchOptions& options, std::chrono::nanoseconds tick);

    /// Until a signal comes or the listener ends it. What was waiting in the ring is handed on before it returns.
    void run(LiveListener& listener);

    [[nodiscard]] const LiveSource& source() const { return *source_; }
    [[nodiscard]] const Upstreams& upstreams() const { return docket_->upstreams(); }
    [[nodiscard]] const WallClock& clock() const { return clock_; }
    [[nodiscard]] std::uint64_t events() const { return events_; }                 ///< all, before the filter
    [[nodiscard]] std::uint64_t outcome_events() const { return outcome_events_; } ///< of these, from EVENT_RELEASED on
    /// Those whose end was lost included; `losses` is source().losses().
    [[nodiscard]] std::uint64_t connections_ended(const loss_counters& losses) const;
    [[nodiscard]] const std::map<Cause, std::uint64_t>& verdicts() const { return verdicts_; }
    [[nodiscard]] std::uint64_t unclassified() const { return unclassified_; }

private:
    bool take_in();
    void on_judged(const Judged& judged);
    bool goes_on_after_signal();
    void say_warnings();

    Filter filter_;
    std::chrono::nanoseconds tick_;
    Descriptor signals_;
    bool hangup_ignored_ = false; ///< by nohup
    std::unique_ptr<LiveSource> source_;
    std::size_t warnings_said_ = 0;
    std::optional<Docket> docket_;
    LiveListener* listener_ = nullptr; ///< while it runs
    WallClock clock_;
    std::chrono::steady_clock::time_point clock_measured_;
    std::uint64_t events_ = 0;
    std::uint64_t outcome_events_ = 0;
    std::uint64_t ended_ = 0;
    std::map<Cause, std::uint64_t> verdicts_;
    std::uint64_t unclassified_ = 0;
};

} // namespace finrace

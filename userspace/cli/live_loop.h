// SPDX-License-Identifier: GPL-2.0-only OR MIT
// The live feed: waits for the kernel's wake-up, a tick or a signal, takes in all events, and hands them on.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "cli/intake.h"
#include "cli/options.h"
#include "cli/recorder.h"
#include "sink/clock.h"
#include "source/descriptor.h"
#include "source/live.h"

namespace finrace {

class LiveLoop final : public Feed {
public:
    /// Where nobody watches what comes: often enough.
    static constexpr std::chrono::nanoseconds unhurried_tick = std::chrono::milliseconds(200);

    /// Blocks SIGINT, SIGTERM, SIGHUP and SIGUSR1, attaches, and says so on standard error. What is taken in goes to
    /// `recorder` as well, if there is one. Throws SetupError, UsageError or OutputError.
    LiveLoop(const WatchOptions& options, std::chrono::nanoseconds tick, Recorder* recorder = nullptr);

    /// `on_ready` is called whenever `descriptor` is readable while it runs. To be called once.
    void watch_input(int descriptor, std::function<void()> on_ready);
    /// From now on it looks at what has come at least so often.
    void tick_every(std::chrono::nanoseconds tick);
    /// It ends by itself after so long, if there is a limit.
    void end_after(std::optional<std::chrono::nanoseconds> duration) { duration_ = duration; }

    /// What is let through from now on.
    void filter(Filter filter) { intake_->filter(std::move(filter)); }
    /// What still takes its rights once all files that it does not need are out of reach: Needed::with_rights.
    void use_rights();
    /// Intake's, from now on.
    void know(IdleTimers timers) { intake_->know(std::move(timers)); }

    /// Until a signal comes or the listener ends it. What was waiting in the ring is handed on before it returns.
    void run(Listener& listener) override;

    [[nodiscard]] const Intake& intake() const override { return *intake_; }
    [[nodiscard]] const WallClock& clock() const override { return clock_; }
    [[nodiscard]] std::uint64_t now_ns() const override { return WallClock::monotonic_now_ns(); }
    [[nodiscard]] const SourceFacts& facts() const override { return facts_; }
    [[nodiscard]] SourceCounts counts() const override { return source_->counts(); }
    [[nodiscard]] const ProcessNames& names() const override;
    [[nodiscard]] bool counts_losses() const { return source_->counts_losses(); }                   ///< LiveSource's
    [[nodiscard]] int accounting() const { return source_->accounting(); }                          ///< LiveSource's
    [[nodiscard]] std::vector<ProgramRuns> program_runs() const { return source_->program_runs(); } ///< LiveSource's

private:
    bool take_in();
    void measure_clock();
    bool goes_on_after_signal(Listener& listener);
    void say_warnings();

    Descriptor timer_;
    std::optional<std::chrono::nanoseconds> duration_;
    int input_ = -1;
    std::function<void()> on_input_;
    Descriptor signals_;
    bool hangup_ignored_ = false; ///< by nohup
    std::unique_ptr<LiveSource> source_;
    SourceFacts facts_;
    LiveProcessNames live_names_;
    std::size_t warnings_said_ = 0;
    std::optional<Intake> intake_;
    Recorder* recorder_;
    WallClock clock_;
    std::chrono::steady_clock::time_point clock_measured_;
};

} // namespace finrace

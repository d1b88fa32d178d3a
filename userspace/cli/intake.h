// SPDX-License-Identifier: GPL-2.0-only OR MIT
// What every command does with events, wherever they come from: filters, judges, counts, and hands on to the command.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <vector>

#include <poll.h>

#include "cli/filter.h"
#include "cli/idle_timers.h"
#include "core/classify.h"
#include "core/docket.h"
#include "core/upstream.h"
#include "sink/clock.h"
#include "source/status.h"

namespace finrace {

/// What a command does with what is found.
class Listener {
public:
    virtual ~Listener() = default;
    Listener() = default;
    Listener(const Listener&) = delete;
    Listener& operator=(const Listener&) = delete;

    /// An event that the filter lets through, as it comes.
    virtual void on_event(const event& e) = 0;
    /// An event of a connection that this host opened, which the filter does not let through.
    virtual void on_passed_over(const event& /*e*/) {}
    /// A verdict. It may come a while after its event: when its outcome is known.
    virtual void on_verdict(const Judged& judged) = 0;
    /// After each look at the source, and at least once a tick. Returns false to end.
    virtual bool on_tick() = 0;
    /// The source ends, or its run: nothing more of it comes.
    virtual void on_end() {}
    /// To be watched, as poll() takes it: their readers' leaving, and room for what waits.
    [[nodiscard]] virtual std::vector<pollfd> awaited_outputs() const { return {}; }
    virtual void on_reader_left(int /*descriptor*/) {}
    /// SIGHUP. Returns false if that is the end.
    virtual bool on_hangup() { return false; }
};

class Intake {
public:
    /// `names` must outlive it.
    Intake(Filter filter, const ProcessNames& names, bool tells_outcomes);

    /// To whom what is found goes, from now on.
    void listen(Listener& listener) { listener_ = &listener; }
    /// What it lets through from now on.
    void filter(Filter filter) { filter_ = std::move(filter); }
    /// What is known of upstreams from now on, besides what they teach.
    void know(IdleTimers timers);
    /// Whether the judgement needs this event: the filter lets it through, or it tells of what others did. Counts it.
    bool admits(const event& e);
    /// One that was admitted.
    void take(const event& e);
    /// What is settled by now, CLOCK_MONOTONIC, is judged.
    void advance(std::uint64_t now_ns) { docket_->advance(now_ns); }
    /// The end: all that waits is judged.
    void finish() { docket_->finish(); }
    /// Another run follows, which knows nothing of this one.
    void begin_anew(bool tells_outcomes);

    [[nodiscard]] const Upstreams& upstreams() const { return docket_->upstreams(); }
    [[nodiscard]] std::uint64_t events() const { return events_; }                 ///< all, before the filter
    [[nodiscard]] std::uint64_t outcome_events() const { return outcome_events_; } ///< of these, from EVENT_RELEASED on
    /// Those included whose end was lost, and those that are not followed to it.
    [[nodiscard]] std::uint64_t connections_ended(const loss_counters& losses) const;
    /// Connections older than finrace that have ended since it began; before the filter.
    [[nodiscard]] std::uint64_t adopted_ended() const { return adopted_ended_; }
    [[nodiscard]] const std::map<Cause, std::uint64_t>& verdicts() const { return verdicts_; }
    [[nodiscard]] std::uint64_t verdicts_in_all() const;
    [[nodiscard]] std::uint64_t unclassified() const { return unclassified_; }

private:
    void on_judged(const Judged& judged);

    Filter filter_;
    IdleTimers timers_;
    const ProcessNames& names_;
    std::optional<Docket> docket_;
    Listener* listener_ = nullptr;
    std::uint64_t events_ = 0;
    std::uint64_t outcome_events_ = 0;
    std::uint64_t ended_ = 0;
    std::uint64_t adopted_ended_ = 0;
    std::map<Cause, std::uint64_t> verdicts_;
    std::uint64_t unclassified_ = 0;
};

/// Where a command's events come from, and how they stand now: this host's kernel, or a recording.
class Feed {
public:
    virtual ~Feed() = default;
    Feed() = default;
    Feed(const Feed&) = delete;
    Feed& operator=(const Feed&) = delete;

    /// Until the source ends, a signal comes, or the listener ends it.
    virtual void run(Listener& listener) = 0;

    [[nodiscard]] virtual const Intake& intake() const = 0;
    [[nodiscard]] virtual const WallClock& clock() const = 0;
    [[nodiscard]] virtual std::uint64_t now_ns() const = 0; ///< CLOCK_MONOTONIC, of the events' host
    [[nodiscard]] virtual const SourceFacts& facts() const = 0;
    [[nodiscard]] virtual SourceCounts counts() const = 0;
    [[nodiscard]] virtual const ProcessNames& names() const = 0;
};

} // namespace finrace

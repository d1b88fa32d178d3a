// SPDX-License-Identifier: GPL-2.0-only OR MIT
// From events to endings: judges, counts and learns. What waits for its outcome waits here, half a second at most; the
// source must be one that tells of outcomes, or nothing waits. Pure: time is the events'.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <list>
#include <optional>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "bpf/event.h"
#include "core/benched.h"
#include "core/classify.h"
#include "core/outcome.h"
#include "core/server_end.h"
#include "core/upstream.h"

namespace finrace {

/// A connection's end as it was judged.
struct Judged {
    const event& e;    ///< that the judgement is about
    const event& last; ///< the connection's last so far
    const Classification& classification;
    const Outcome& outcome;
    const Upstream& upstream;
    const event* server_end; ///< what its server did, if that is on this host and its end left something undone
    const Benched* benched = nullptr; ///< of Cause::upstream_benched; `e` is the failure before, at the answer's time
};

class Docket {
public:
    /// How long a verdict waits for what the client got: with it, a verdict is there within a second of the end.
    static constexpr std::uint64_t wait_ns = 500'000'000;
    static constexpr std::size_t capacity = 4096; ///< beyond it the oldest waits no longer

    using Deliver = std::function<void(const Judged&)>;

    /// `tells_outcomes`: whether the source makes events from EVENT_RELEASED on.
    Docket(bool tells_outcomes, Deliver deliver)
        : tells_outcomes_(tells_outcomes), deliver_(std::move(deliver)),
          server_ends_([this](const event& e) { deliver_of_server(e, judge_server_end(e)); }),
          benches_([this](const Benched& benched) { deliver_benched(benched); })
    {
    }

    void take(const event& e);
    /// What is settled, or has waited long enough, is delivered. `now_ns` is CLOCK_MONOTONIC.
    void advance(std::uint64_t now_ns);
    /// All that waits is delivered.
    void finish();

    /// Upstreams::tell_timers().
    void tell_timers(Upstreams::TimerOf timer_of) { upstreams_.tell_timers(std::move(timer_of)); }
    [[nodiscard]] const Upstreams& upstreams() const { return upstreams_; }

private:
    struct Waiting {
        event e;
        event last;
        std::optional<Classification> classification; ///< none if it depends on the outcome
        std::optional<event> closed;                  ///< EVENT_CLOSED, come while its EVENT_LOCAL_FIN waits
    };

    void wait(const event& e, std::optional<Classification> classification);
    void settle(std::list<Waiting>::iterator waiting);
    void deliver(const event& e, const event& last, Classification classification, const Outcome& outcome);
    void deliver_of_server(const event& e, std::optional<Verdict> verdict);
    void deliver_benched(const Benched& benched);

    bool tells_outcomes_;
    Deliver deliver_;
    Upstreams upstreams_;
    Outcomes outcomes_;
    ServerEnds server_ends_;
    Benches benches_;
    std::list<Waiting> waiting_; ///< in the order of their events
    std::unordered_map<std::uint64_t, std::list<Waiting>::iterator> by_connection_;
    std::uint64_t looked_ns_ = 0;             ///< for what is settled
    std::unordered_set<std::uint64_t> named_; ///< connections with a verdict for this host's close, until EVENT_CLOSED
};

} // namespace finrace

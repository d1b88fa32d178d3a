// SPDX-License-Identifier: GPL-2.0-only OR MIT
// What a while of watching comes to: findings by harm, and each upstream's pool with its exposure. Pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/docket.h"
#include "core/exposure.h"
#include "core/open_table.h"
#include "core/software.h"
#include "core/upstream.h"

namespace finrace {

/// All failures of one cause at one upstream (on the server side: at one listener of this host's).
struct Finding {
    UpstreamKey where;
    bool server_side = false;
    Cause cause{};
    std::uint64_t verdicts = 0;
    std::uint64_t affected = 0; ///< requests, or connections: a verdict may stand for many
    std::uint64_t hidden = 0;   ///< of these, tried again so that the client got another answer than a 5xx
    std::map<Certainty, std::uint64_t> certainties;
    std::map<Reason, std::uint64_t> reasons;        ///< where the upstream's close has one that is known
    std::map<std::uint16_t, std::uint64_t> answers; ///< what clients got instead: statuses
    std::uint64_t clients_left = 0;                 ///< closed on without an answer, or gone before
    std::uint64_t first_ns = 0;                     ///< CLOCK_REALTIME
    std::uint64_t burst_ns = 0;                     ///< of the newest burst's beginning
    std::uint64_t last_ns = 0;
    std::uint64_t incomplete = 0; ///< verdicts on what had begun before, or of which something was lost

    /// From a request to the end that it met, in milliseconds: where no race decided that, somebody's patience may
    /// have.
    struct Waits {
        std::uint64_t lowest_ms = 0;
        std::uint64_t highest_ms = 0;
        IdleTimeoutLearner all; ///< a timer shows here as well
        /// The timer that most of them went by, of a second at least.
        [[nodiscard]] std::optional<IdleTimeout> timer() const;
    };
    std::optional<Waits> waits;
    std::uint64_t bursts = 0;       ///< a second apart, or more
    std::uint64_t at_once = 0;      ///< verdicts since at_once_ns
    std::uint64_t at_once_ns = 0;   ///< CLOCK_REALTIME
    std::uint64_t most_at_once = 0; ///< that one instant (one_instant_ns) has seen
    IdleTimeoutLearner gaps;        ///< between the beginnings of bursts
    static constexpr std::size_t most_times = 5;
    std::vector<std::uint64_t> times_ns; ///< CLOCK_REALTIME, of the first verdicts
    /// How often requests to this upstream died at one instant (one_instant_ns) of this cause and of another, as when a
    /// process ends: its kernel closes connections whose bytes it had read, and resets those where some lay unread.
    struct Together {
        std::uint64_t times = 0;
        std::uint64_t last_ns = 0; ///< CLOCK_REALTIME
    };
    std::map<Cause, Together> together;

    /// Of a fleet: verdicts by the host that gave them; and of these, those that the upstream's own host told of too.
    std::map<std::string, std::uint64_t> hosts;
    std::map<std::string, std::uint64_t> upstream_hosts;

    /// The most telling one: the most certain; of these one that is complete, whose client's answer is known, and the
    /// reason of its close; of these the first.
    struct Instance {
        event e;
        event last;
        Verdict verdict;
        Outcome outcome;
        std::string process;
        std::int64_t clock_offset_ns; ///< CLOCK_REALTIME less CLOCK_MONOTONIC
    } instance;

    static constexpr std::uint64_t burst_apart_ns = 1'000'000'000;
    /// One that begins at `from_ns` is new if the ones before have ended, at `ended_ns`, for so long. CLOCK_REALTIME.
    void note_burst(std::uint64_t from_ns, std::uint64_t ended_ns);
    /// What somebody lost by it. A client that leaves has lost nothing that a proxy or an upstream owed it.
    [[nodiscard]] std::uint64_t harm() const { return cause == Cause::client_abort ? 0 : affected - hidden; }
    /// Whether a request was lost, or a connection that a client of a proxy waited for. That somebody's attempt to
    /// connect failed is else no more than what a probe or a job on any busy host says all day.
    [[nodiscard]] bool cost_a_request() const;
    /// Whether an idle timeout's setting may cure some of it: it has the upstream's timer for a reason, or most races
    /// of it have none that is known.
    [[nodiscard]] bool is_of_timer() const;
};

/// Who owns connections to an upstream.
struct Owner {
    std::string process; ///< comm; empty if not known
    std::uint32_t pid = 0;
};

/// A pool's connections that are open now, older ones than the tracer included.
struct PoolNow {
    std::uint64_t resting = 0;         ///< that carry no request
    std::uint64_t longest_rest_ms = 0; ///< of these
    std::uint64_t open = 0;            ///< those whose requests are counted
    std::uint64_t requests = 0;        ///< on these, since they were followed
    Owner owner;                       ///< of one that rests
};
using PoolsNow = std::map<UpstreamKey, PoolNow>;

/// One upstream, over all runs.
struct Pool {
    UpstreamKey where;
    bool other = false; ///< all beyond those that are told apart
    Upstream upstream;  ///< as the run has it in which it stood worst
    Exposure exposure;
    std::uint64_t connections = 0; ///< that have ended
    std::uint64_t open = 0;        ///< that have not, of those that were opened meanwhile
    PoolNow now;                   ///< at the run's end
    std::uint64_t requests = 0;    ///< on those that have ended
    std::uint64_t races = 0;
    std::map<Reason, std::uint64_t> race_reasons; ///< why the upstream closed in these, where that is known
    std::uint64_t unclassified = 0;
    std::string process; ///< that used most of its connections again, or opened all of them; empty if not known
    Ends ends;
    std::map<std::string, PoolState> hosts{}; ///< of a fleet: how it stands on each

    /// The upstream's idle timeout as learned, else as it ties with this host's, else, without samples, as it has been
    /// told.
    [[nodiscard]] std::optional<IdleTimeout> timeout() const;
    /// Whether it is used, and whether it can race has not shown.
    [[nodiscard]] bool leaves_open() const;
};

/// What is known of the two ends of a pool.
using EndsOf = std::function<Ends(const UpstreamKey& where, const Owner& owner)>;
/// By the owner's name alone: of what was seen elsewhere, nothing is to be looked for on this host.
Ends ends_by_name(const UpstreamKey& where, const Owner& owner);

class Diagnosis {
public:
    enum class State {
        healthy,      ///< pools were seen that can't race, and nothing failed
        exposed,      ///< nothing failed by a race so far, but it will
        findings,     ///< requests died
        inconclusive, ///< not enough was seen, or not all
    };

    static constexpr std::size_t most_findings = 4096;
    static constexpr std::size_t most_pools = 4096; ///< of those of which no connection has ended

    /// Any event of a connection that this host opened; `process` is its owner's name.
    void follow(const event& e, std::string_view process);
    void add(const Judged& judged, const std::string& process, std::int64_t clock_offset_ns);
    /// A run of the source ends, `now_ns` on CLOCK_MONOTONIC: what its upstreams came to. `now`: what there is now,
    /// by upstream; nullptr if that is not known.
    void end_run(const Upstreams& upstreams, std::uint64_t observed_ns, std::uint64_t now_ns,
                 const EndsOf& ends_of = ends_by_name, const PoolsNow* now = nullptr);

    /// What is known already, and of which there is no other of the same cause, or upstream.
    void add(Finding finding);
    void add(Pool pool);

    /// By harm, the worst first; what cost no request comes after what did.
    [[nodiscard]] std::vector<const Finding*> findings() const;
    /// Failures that found no room in the table of findings.
    [[nodiscard]] std::uint64_t more_failures() const { return more_failures_; }
    /// Those that are exposed first, then those that are used again or by a proxy; the busiest of each.
    [[nodiscard]] std::vector<const Pool*> pools() const;
    [[nodiscard]] const Pool* pool(const UpstreamKey& key) const;
    [[nodiscard]] std::uint64_t runs() const { return runs_; } ///< that have ended
    [[nodiscard]] std::uint64_t connections() const { return sum(&Pool::connections); }
    [[nodiscard]] std::uint64_t open() const { return sum(&Pool::open); }
    [[nodiscard]] std::uint64_t requests() const { return sum(&Pool::requests); } ///< on connections that have ended
    /// On connections that are open now.
    [[nodiscard]] std::uint64_t open_requests() const;
    [[nodiscard]] std::uint64_t unclassified() const { return sum(&Pool::unclassified); }
    /// `unseen`: whether there was anything that has not been seen.
    [[nodiscard]] State state(bool unseen) const;

private:
    struct User {
        std::uint64_t connections = 0; ///< used again
        std::uint32_t pid = 0;         ///< of the newest
    };
    using Users = std::map<std::string, User, std::less<>>; ///< by process

    [[nodiscard]] Owner owner_of(const UpstreamKey& where, const PoolsNow* now) const;
    void note_together(Finding& finding, std::uint64_t at_ns);

    void add_run(Pool run);
    [[nodiscard]] std::uint64_t sum(std::uint64_t Pool::*count) const; ///< over all pools

    std::map<std::pair<UpstreamKey, Cause>, Finding> findings_;
    std::uint64_t more_failures_ = 0;
    std::map<UpstreamKey, Pool> pools_;
    std::unordered_map<UpstreamKey, Users, UpstreamKeyHash> users_;
    /// The process that opened all connections to an upstream; empty if there were several.
    std::unordered_map<UpstreamKey, std::string, UpstreamKeyHash> openers_;
    OpenTable open_; ///< of this run
    Pool other_;
    std::uint64_t runs_ = 0;
};

} // namespace finrace

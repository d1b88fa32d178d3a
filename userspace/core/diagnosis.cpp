// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "core/diagnosis.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <set>
#include <tuple>

#include "core/classify.h"
#include "core/units.h"

namespace finrace {

namespace {

constexpr std::uint16_t first_proxy_failure = 500; ///< status
constexpr std::size_t most_users = 8;              ///< of one upstream's that are told apart

/// A verdict on a full queue, or on a proxy that tries no upstream, is told once in a while for all.
std::uint64_t affected_by(const Judged& judged)
{
    const Cause cause = judged.classification.verdict->cause;
    std::uint64_t count = 0;
    if (cause == Cause::accept_overflow)
        count = judged.e.turned_away;
    else if (judged.benched != nullptr)
        count = judged.benched->answer.untried;
    return std::max<std::uint64_t>(count, 1);
}

/// The lower, the more an instance tells.
auto telling(const Verdict& verdict, const Outcome& outcome)
{
    return std::tuple(verdict.certainty, verdict.incomplete, !outcome.client.has_value(),
                      verdict.reason.value_or(Reason::unknown) == Reason::unknown);
}

const PoolNow* pool_in(const PoolsNow* now, const UpstreamKey& where)
{
    if (now == nullptr)
        return nullptr;
    const auto found = now->find(where);
    return found != now->end() ? &found->second : nullptr;
}

constexpr std::uint32_t shortest_patience_ms = 1000;

std::uint32_t saturated_ms(std::uint64_t ns)
{
    constexpr std::uint64_t most = std::numeric_limits<std::uint32_t>::max();
    return static_cast<std::uint32_t>(std::min(ns / ns_per_ms, most));
}

/// Nothing where a race decided, or where nothing was asked.
std::optional<std::uint32_t> wait_of(const Judged& judged)
{
    if (!is_client(judged.e) || judged.e.connection.exchange == 0 || is_race(judged.classification.verdict->cause))
        return std::nullopt;
    return saturated_ms(close_after_request_ns(judged.e));
}

} // namespace

Ends ends_by_name(const UpstreamKey& /*where*/, const Owner& owner)
{
    Ends ends;
    ends.proxy.software = setting_of_proxy(owner.process);
    return ends;
}

std::optional<IdleTimeout> Pool::timeout() const
{
    if (const auto learned = upstream.idle_timeout.timeout())
        return learned;
    if (exposure.tied_timeout)
        return exposure.tied_timeout;
    if (const auto told_ms = exposure.told_timeout_ms)
        return IdleTimeout{.ms = *told_ms, .lowest_ms = *told_ms, .highest_ms = *told_ms, .samples = 0};
    return std::nullopt;
}

bool Pool::leaves_open() const
{
    // What nothing was asked of is no pool.
    const bool asked = requests > 0 || open > 0 || now.resting > 0 || now.requests > 0;
    return asked && (exposure.state == PoolState::unknown || exposure.state == PoolState::kept_clear);
}

std::optional<IdleTimeout> Finding::Waits::timer() const
{
    const std::optional<IdleTimeout> timer = all.timeout();
    return timer && timer->lowest_ms >= shortest_patience_ms ? timer : std::nullopt;
}

void Finding::note_burst(std::uint64_t from_ns, std::uint64_t ended_ns)
{
    if (bursts > 0 && from_ns <= ended_ns + burst_apart_ns)
        return;
    if (bursts > 0)
        gaps.learn(saturated_ms(from_ns - burst_ns), from_ns);
    ++bursts;
    burst_ns = from_ns;
}

bool Finding::cost_a_request() const
{
    switch (cause) {
    case Cause::client_abort:
        return false;
    case Cause::connect_refused:
    case Cause::connect_timeout:
    case Cause::connect_unreachable:
    case Cause::handshake_failed:
        return !answers.empty() || clients_left > 0 || setting_of_proxy(instance.process) != nullptr;
    default:
        return true;
    }
}

bool Finding::is_of_timer() const
{
    const std::uint64_t known =
        std::accumulate(reasons.begin(), reasons.end(), std::uint64_t{0},
                        [](std::uint64_t sum, const auto& reason) { return sum + reason.second; });
    return is_race(cause) && (2 * known < verdicts || reasons.count(Reason::idle_timer) != 0);
}

void Diagnosis::follow(const event& e, std::string_view process)
{
    if (!is_client(e))
        return;
    const UpstreamKey where = UpstreamKey::of(e);
    open_.follow(e);
    if (e.kind != EVENT_CLOSED || process.empty())
        return;
    if (const auto opener = openers_.find(where); opener != openers_.end()) {
        if (opener->second != process)
            opener->second.clear();
    } else if (openers_.size() < most_pools) {
        openers_.emplace(where, process);
    }
    if (!is_reused(e.connection) || (users_.size() >= most_pools && users_.count(where) == 0))
        return;
    Users& users = users_[where];
    auto known = users.find(process);
    if (known == users.end()) {
        if (users.size() == most_users)
            return;
        known = users.emplace(process, User{}).first;
    }
    ++known->second.connections;
    known->second.pid = e.connection.pid;
}

void Diagnosis::add(const Judged& judged, const std::string& process, std::int64_t clock_offset_ns)
{
    const Verdict& verdict = *judged.classification.verdict;
    const UpstreamKey where = UpstreamKey::judged_at(judged.e);
    const auto at_ns = static_cast<std::uint64_t>(static_cast<std::int64_t>(judged.e.timestamp_ns) + clock_offset_ns);
    const std::pair key{where, verdict.cause};
    if (findings_.size() == most_findings && findings_.count(key) == 0) {
        ++more_failures_;
        return;
    }
    Finding& finding = findings_[key];
    if (finding.verdicts == 0) {
        finding.where = where;
        finding.server_side = !is_client(judged.e);
        finding.cause = verdict.cause;
        finding.first_ns = at_ns;
    }
    if (finding.verdicts == 0 ||
        telling(verdict, judged.outcome) < telling(finding.instance.verdict, finding.instance.outcome))
        finding.instance = {.e = judged.e,
                            .last = judged.last,
                            .verdict = verdict,
                            .outcome = judged.outcome,
                            .process = process,
                            .clock_offset_ns = clock_offset_ns};
    ++finding.verdicts;
    finding.affected += affected_by(judged);
    ++finding.certainties[verdict.certainty];
    finding.incomplete += verdict.incomplete ? 1 : 0;
    if (const auto wait_ms = wait_of(judged)) {
        if (!finding.waits)
            finding.waits.emplace(Finding::Waits{.lowest_ms = *wait_ms, .highest_ms = *wait_ms, .all = {}});
        finding.waits->lowest_ms = std::min<std::uint64_t>(finding.waits->lowest_ms, *wait_ms);
        finding.waits->highest_ms = std::max<std::uint64_t>(finding.waits->highest_ms, *wait_ms);
        finding.waits->all.learn(*wait_ms, judged.e.timestamp_ns);
    }
    if (verdict.reason && *verdict.reason != Reason::unknown)
        ++finding.reasons[*verdict.reason];
    finding.note_burst(at_ns, finding.last_ns);
    if (finding.at_once == 0 || at_ns > finding.at_once_ns + one_instant_ns) {
        finding.at_once = 0;
        finding.at_once_ns = at_ns;
    }
    finding.most_at_once = std::max(finding.most_at_once, ++finding.at_once);
    note_together(finding, at_ns);
    finding.first_ns = std::min(finding.first_ns, at_ns);
    finding.last_ns = std::max(finding.last_ns, at_ns);
    if (finding.times_ns.size() < Finding::most_times)
        finding.times_ns.push_back(at_ns);
    if (const auto& client = judged.outcome.client) {
        if (client->answered && client->status != 0)
            ++finding.answers[client->status];
        else if (!client->answered)
            ++finding.clients_left;
        if (judged.outcome.retry && client->answered && client->status != 0 && client->status < first_proxy_failure)
            ++finding.hidden;
    }
}

void Diagnosis::note_together(Finding& finding, std::uint64_t at_ns)
{
    if (!is_by_upstream(finding.cause))
        return;
    const auto note = [at_ns](Finding::Together& together) {
        if (together.times == 0 || at_ns > together.last_ns + one_instant_ns)
            ++together.times;
        together.last_ns = at_ns;
    };
    for (const Cause cause : upstream_ends) {
        const auto other = findings_.find({finding.where, cause});
        if (cause == finding.cause || other == findings_.end() || other->second.last_ns + one_instant_ns < at_ns ||
            at_ns + one_instant_ns < other->second.last_ns)
            continue;
        note(finding.together[cause]);
        note(other->second.together[finding.cause]);
    }
}

Owner Diagnosis::owner_of(const UpstreamKey& where, const PoolsNow* now) const
{
    if (const auto users = users_.find(where); users != users_.end()) {
        const auto most =
            std::max_element(users->second.begin(), users->second.end(), [](const auto& one, const auto& other) {
                return one.second.connections < other.second.connections;
            });
        return {.process = most->first, .pid = most->second.pid};
    }
    const PoolNow* pool = pool_in(now, where);
    return pool != nullptr ? pool->owner : Owner{};
}

void Diagnosis::end_run(const Upstreams& upstreams, std::uint64_t observed_ns, std::uint64_t now_ns,
                        const EndsOf& ends_of, const PoolsNow* now)
{
    const auto still_open = open_.at(now_ns);
    const auto add = [&](const UpstreamKey* key, const Upstream& upstream) {
        OpenConnections open;
        Pool run{.where = key != nullptr ? *key : UpstreamKey{},
                 .other = key == nullptr,
                 .upstream = upstream,
                 .exposure = {},
                 .connections = upstream.counts.closed,
                 .open = 0,
                 .now = {},
                 .requests = upstream.counts.exchanges,
                 .races = races_of(upstream.counts),
                 .race_reasons = {},
                 .unclassified = upstream.counts.unclassified,
                 .process = {},
                 .ends = {}};
        if (key != nullptr) {
            if (const auto found = still_open.find(*key); found != still_open.end())
                open = found->second;
            open.rests_known = now != nullptr;
            if (const PoolNow* there = pool_in(now, *key); there != nullptr) {
                run.now = *there;
                open.resting = there->resting;
                open.longest_rest_ms = there->longest_rest_ms;
            }
            const Owner owner = owner_of(*key, now);
            run.process = owner.process;
            if (const auto opener = openers_.find(*key); run.process.empty() && opener != openers_.end())
                run.process = opener->second;
            run.ends = ends_of(*key, owner);
            for (const Cause cause : race_causes)
                if (const auto found = findings_.find({*key, cause}); found != findings_.end())
                    for (const auto& [reason, count] : found->second.reasons)
                        run.race_reasons[reason] += count;
        }
        if (open_.lost_track())
            open.longest_ns = std::numeric_limits<std::uint64_t>::max();
        run.open = open.count;
        run.exposure = exposure_of(upstream, upstream.watched_ns(observed_ns, now_ns), open, run.ends);
        add_run(std::move(run));
    };
    std::set<UpstreamKey> told;
    upstreams.for_each([&](const UpstreamKey* key, const Upstream& upstream) {
        add(key, upstream);
        if (key != nullptr)
            told.insert(*key);
    });
    // Of these no connection has ended while they were watched.
    if (now != nullptr)
        for (const auto& [key, pool] : *now)
            if (told.count(key) == 0 && pools_.size() < most_pools)
                add(&key, Upstream{});
    open_ = OpenTable();
    ++runs_;
}

void Diagnosis::add_run(Pool run)
{
    Pool& pool = run.other ? other_ : pools_[run.where];
    run.connections += pool.connections;
    run.open += pool.open;
    run.requests += pool.requests;
    run.races += pool.races;
    run.unclassified += pool.unclassified;
    if (pool.connections != 0 && std::pair(pool.exposure.state, pool.upstream.counts.exchanges) >
                                     std::pair(run.exposure.state, run.upstream.counts.exchanges)) {
        run.upstream = pool.upstream;
        run.exposure = pool.exposure;
        run.ends = pool.ends;
    }
    pool = std::move(run);
}

void Diagnosis::add(Finding finding)
{
    const std::pair key{finding.where, finding.cause};
    findings_.insert_or_assign(key, std::move(finding));
}

void Diagnosis::add(Pool pool)
{
    Pool& place = pool.other ? other_ : pools_[pool.where];
    place = std::move(pool);
}

std::vector<const Finding*> Diagnosis::findings() const
{
    std::vector<const Finding*> sorted;
    sorted.reserve(findings_.size());
    for (const auto& [key, finding] : findings_)
        sorted.push_back(&finding);
    std::stable_sort(sorted.begin(), sorted.end(), [](const Finding* one, const Finding* other) {
        return std::tuple(one->cost_a_request(), one->harm(), one->affected) >
               std::tuple(other->cost_a_request(), other->harm(), other->affected);
    });
    return sorted;
}

std::vector<const Pool*> Diagnosis::pools() const
{
    std::vector<const Pool*> sorted;
    sorted.reserve(pools_.size() + 1);
    for (const auto& [key, pool] : pools_)
        sorted.push_back(&pool);
    // Where a proxy's clients are on its host, its own ports are upstreams as well: of those the least is to be said.
    const auto weight = [](const Pool* pool) {
        const bool may_race =
            pool->exposure.state != PoolState::not_reused || setting_of_proxy(pool->process) != nullptr;
        return std::tuple(pool->exposure.state == PoolState::exposed, may_race, pool->requests);
    };
    std::stable_sort(sorted.begin(), sorted.end(),
                     [&](const Pool* one, const Pool* other) { return weight(one) > weight(other); });
    if (other_.other)
        sorted.push_back(&other_);
    return sorted;
}

const Pool* Diagnosis::pool(const UpstreamKey& key) const
{
    const auto found = pools_.find(key);
    return found != pools_.end() ? &found->second : nullptr;
}

std::uint64_t Diagnosis::sum(std::uint64_t Pool::*count) const
{
    return std::accumulate(pools_.begin(), pools_.end(), other_.*count,
                           [count](std::uint64_t sum, const auto& one) { return sum + one.second.*count; });
}

std::uint64_t Diagnosis::open_requests() const
{
    return std::accumulate(pools_.begin(), pools_.end(), std::uint64_t{0},
                           [](std::uint64_t sum, const auto& one) { return sum + one.second.now.requests; });
}

Diagnosis::State Diagnosis::state(bool unseen) const
{
    if (std::any_of(findings_.begin(), findings_.end(),
                    [](const auto& one) { return one.second.cause != Cause::client_abort; }))
        return State::findings;
    const std::vector<const Pool*> all = pools();
    if (std::any_of(all.begin(), all.end(),
                    [](const Pool* pool) { return pool->exposure.state == PoolState::exposed; }))
        return State::exposed;
    if (unseen || requests() + open_requests() == 0 || unclassified() > 0 ||
        std::any_of(all.begin(), all.end(), [](const Pool* pool) { return pool->leaves_open(); }))
        return State::inconclusive;
    return State::healthy;
}

} // namespace finrace

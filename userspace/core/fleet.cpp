// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "core/fleet.h"

#include <algorithm>
#include <tuple>

#include <fmt/format.h>

#include "core/server_end.h"

namespace finrace {

namespace {

/// The upstream's own host told of the same end: what its process knew decides.
void take_server(FleetGroup& group)
{
    if (!group.server || group.incomplete || group.server->cause != Cause::closed_on_request)
        return;
    const ServerSays& server = *group.server;
    if (server.late ? !server.proven : !server.whole)
        return;
    const ClosedUnread closed{.late = server.late, .rested = group.rested, .killed = server.killed};
    if (const auto cause = cause_of_closed_unread(group.cause, group.certainty, closed)) {
        if (*cause != group.cause)
            group.reason.reset(); // a loss has none
        group.cause = *cause;
        group.certainty = Certainty::proven;
    }
}

/// The lower, the more a group's instance tells.
auto telling(const FleetGroup& group)
{
    return std::tuple(group.certainty, group.incomplete, group.rank, group.instance); // the same one each time
}

/// What several hosts' pools come to: counts add up, the worst stands for all, and what is to be expected adds up too.
Pool merged(std::vector<Pool> pools)
{
    std::stable_sort(pools.begin(), pools.end(), [](const Pool& one, const Pool& other) {
        return std::pair(one.exposure.state, one.requests) > std::pair(other.exposure.state, other.requests);
    });
    Pool all = pools.front();
    for (auto pool = pools.begin() + 1; pool != pools.end(); ++pool) {
        all.connections += pool->connections;
        all.open += pool->open;
        all.requests += pool->requests;
        all.races += pool->races;
        all.unclassified += pool->unclassified;
        for (const auto& [host, state] : pool->hosts) {
            const auto [known, fresh] = all.hosts.emplace(host, state);
            known->second = std::max(known->second, state);
        }
        if (all.process.empty())
            all.process = pool->process;
        const auto known_timeout = all.upstream.idle_timeout.timeout(); // what was learned goes before what was told
        const auto its_timeout = pool->upstream.idle_timeout.timeout();
        if (!known_timeout || (known_timeout->samples == 0 && its_timeout && its_timeout->samples > 0))
            all.upstream.idle_timeout = pool->upstream.idle_timeout;
        const auto known_limit =
            all.upstream.own_idle_limit.timeout(); // the longest is what the upstream has to outwait
        const auto its_limit = pool->upstream.own_idle_limit.timeout();
        if (its_limit && (!known_limit || its_limit->highest_ms > known_limit->highest_ms))
            all.upstream.own_idle_limit = pool->upstream.own_idle_limit;
        all.upstream.longest_reused_idle_ms =
            std::max(all.upstream.longest_reused_idle_ms, pool->upstream.longest_reused_idle_ms);
        if (pool->exposure.state != PoolState::exposed)
            continue;
        all.exposure.window_ms = std::max(all.exposure.window_ms, pool->exposure.window_ms);
        all.exposure.late_reuses += pool->exposure.late_reuses;
        all.exposure.told_by += pool->exposure.told_by;
        all.exposure.races_a_day += pool->exposure.races_a_day;
    }
    // Each host's share is of its own requests.
    double lost = 0;
    for (const Pool& pool : pools)
        lost += pool.exposure.share * static_cast<double>(pool.requests);
    if (all.requests > 0)
        all.exposure.share = lost / static_cast<double>(all.requests);
    return all;
}

} // namespace

void Fleet::add(FleetGroup group)
{
    const bool was_race = is_race(group.cause);
    take_server(group);
    if (!was_race && is_race(group.cause))
        more_races_[group.where] += group.verdicts;
    Merged& merged = findings_[{group.where, group.cause}];
    Finding& finding = merged.finding;
    finding.where = group.where;
    finding.server_side = group.server_side;
    finding.cause = group.cause;
    finding.verdicts += group.verdicts;
    finding.affected += group.affected;
    finding.hidden += group.hidden;
    finding.certainties[group.certainty] += group.verdicts;
    finding.incomplete += group.incomplete ? group.verdicts : 0;
    finding.hosts[group.host] += group.verdicts;
    if (group.server)
        finding.upstream_hosts[group.server->host] += group.verdicts;
    if (group.reason && *group.reason != Reason::unknown)
        finding.reasons[*group.reason] += group.verdicts;
    if (group.status != 0)
        finding.answers[group.status] += group.verdicts;
    finding.clients_left += group.clients_left;
    finding.last_ns = std::max(finding.last_ns, group.last_ns);
    if (!group.waits_ms.empty()) {
        if (!finding.waits)
            finding.waits.emplace(
                Finding::Waits{.lowest_ms = group.lowest_wait_ms, .highest_ms = group.highest_wait_ms, .all = {}});
        finding.waits->lowest_ms = std::min<std::uint64_t>(finding.waits->lowest_ms, group.lowest_wait_ms);
        finding.waits->highest_ms = std::max<std::uint64_t>(finding.waits->highest_ms, group.highest_wait_ms);
    }
    merged.groups.push_back(std::move(group));
}

void Fleet::add(Pool pool)
{
    const bool counts_on_timer =
        pool.exposure.state == PoolState::exposed || pool.exposure.state == PoolState::kept_clear;
    if (counts_on_timer && !pool.timeout()) {
        // Too few idle closes to learn from, but they came when its host closes as well (tied_timeout()): a record
        // tells of that limit alone.
        if ((pool.exposure.tied_timeout = pool.upstream.own_idle_limit.timeout()))
            pool.exposure.tied_timeout->samples = 1;
        else
            pool.exposure.state = PoolState::unknown;
        for (auto& [host, state] : pool.hosts)
            state = pool.exposure.state;
    }
    pools_[pool.where].push_back(std::move(pool));
}

std::vector<std::uint64_t> Fleet::instances() const
{
    std::vector<std::uint64_t> all;
    for (const auto& [key, merged] : findings_)
        all.push_back(std::min_element(
                          merged.groups.begin(), merged.groups.end(),
                          [](const FleetGroup& one, const FleetGroup& other) { return telling(one) < telling(other); })
                          ->instance);
    return all;
}

void Fleet::instance(std::uint64_t number, Finding::Instance told)
{
    for (auto& [key, merged] : findings_)
        for (const FleetGroup& group : merged.groups)
            if (group.instance == number) {
                // As both ends together tell it.
                if (group.server && told.verdict.cause != group.cause)
                    told.verdict.variant = group.server->reset ? Variant::reset_unread : Variant::fin_lingering;
                told.verdict.cause = group.cause;
                told.verdict.certainty = group.certainty;
                told.verdict.reason = group.reason;
                if (group.server)
                    told.verdict.message += fmt::format(" {} says: {}", group.server->host, group.server_message);
                merged.finding.instance = std::move(told);
                return;
            }
}

/// Their times, as Diagnosis has them of one host: bursts that overlap are one.
void Fleet::merge_bursts(Merged& merged)
{
    Finding& finding = merged.finding;
    std::vector<std::pair<std::uint64_t, std::uint64_t>> bursts;
    std::vector<std::pair<std::uint32_t, std::uint64_t>> waits;
    for (const FleetGroup& group : merged.groups) {
        bursts.insert(bursts.end(), group.bursts.begin(), group.bursts.end());
        finding.times_ns.insert(finding.times_ns.end(), group.times_ns.begin(), group.times_ns.end());
        waits.insert(waits.end(), group.waits_ms.begin(), group.waits_ms.end());
    }
    std::sort(finding.times_ns.begin(), finding.times_ns.end());
    if (!finding.times_ns.empty())
        finding.first_ns = finding.times_ns.front();
    if (finding.times_ns.size() > Finding::most_times)
        finding.times_ns.resize(Finding::most_times);
    std::sort(bursts.begin(), bursts.end());
    std::uint64_t end_ns = 0;
    for (const auto& [from_ns, to_ns] : bursts) {
        finding.note_burst(from_ns, end_ns);
        end_ns = std::max(end_ns, to_ns);
    }
    std::sort(waits.begin(), waits.end(), [](const auto& one, const auto& other) { return one.second < other.second; });
    for (const auto& [wait_ms, at_ns] : waits)
        finding.waits->all.learn(wait_ms, at_ns);
}

Diagnosis Fleet::diagnosis() &&
{
    Diagnosis diagnosis;
    for (auto& [where, pools] : pools_) {
        Pool pool = merged(std::move(pools));
        for (const Cause cause : race_causes)
            if (const auto found = findings_.find({where, cause}); found != findings_.end())
                for (const auto& [reason, count] : found->second.finding.reasons)
                    pool.race_reasons[reason] += count;
        pool.races += more_races_[where];
        pool.ends = ends_by_name(where, {.process = pool.process});
        diagnosis.add(std::move(pool));
    }
    for (auto& [key, merged] : findings_) {
        merge_bursts(merged);
        diagnosis.add(std::move(merged.finding));
    }
    return diagnosis;
}

} // namespace finrace

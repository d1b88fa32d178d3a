// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "core/diagnosis.h"

#include <algorithm>

namespace finrace {

namespace {

bool is_of_server(Cause cause)
{
    return cause == Cause::closed_on_request || cause == Cause::server_cut_response || cause == Cause::accept_overflow;
}

constexpr std::uint16_t first_failure_status = 400;

} // namespace

void Diagnosis::add(const Judged& judged, const std::string& process)
{
    const Verdict& verdict = *judged.classification.verdict;
    const bool server_side = is_of_server(verdict.cause);
    const UpstreamKey where = server_side ? UpstreamKey::local_of(judged.e) : UpstreamKey::of(judged.e);
    Finding& finding = findings_[{where, verdict.cause}];
    if (finding.count == 0) {
        finding.where = where;
        finding.server_side = server_side;
        finding.cause = verdict.cause;
        finding.first_ns = judged.e.timestamp_ns;
    }
    if (finding.count == 0 || verdict.certainty < finding.instance.verdict.certainty)
        finding.instance = {
            .e = judged.e, .last = judged.last, .verdict = verdict, .outcome = judged.outcome, .process = process};
    ++finding.count;
    ++finding.certainties[verdict.certainty];
    if (verdict.reason && *verdict.reason != Reason::unknown)
        ++finding.reasons[*verdict.reason];
    finding.last_ns = std::max<std::uint64_t>(finding.last_ns, judged.e.timestamp_ns);
    if (const auto& client = judged.outcome.client) {
        if (client->answered && client->status != 0)
            ++finding.answers[client->status];
        else if (!client->answered)
            ++finding.clients_left;
        if (judged.outcome.retry && client->answered && client->status != 0 && client->status < first_failure_status)
            ++finding.hidden;
    }
    if (!server_side)
        note_process(where, process);
}

void Diagnosis::note_process(const UpstreamKey& key, const std::string& process)
{
    if (!process.empty())
        processes_[key] = process;
}

void Diagnosis::add(const Upstreams& upstreams, std::uint64_t observed_ns)
{
    upstreams.for_each([&](const UpstreamKey* key, const Upstream& upstream) {
        Pool pool{.where = key != nullptr ? *key : UpstreamKey{},
                  .other = key == nullptr,
                  .upstream = upstream,
                  .exposure = exposure_of(upstream, observed_ns),
                  .process = {}};
        if (key == nullptr) {
            other_ = std::move(pool);
            return;
        }
        if (const auto named = processes_.find(*key); named != processes_.end())
            pool.process = named->second;
        const auto [place, fresh] = pools_.try_emplace(*key, pool);
        // Of several runs the one that saw more of it.
        if (!fresh && place->second.upstream.counts.exchanges < upstream.counts.exchanges)
            place->second = std::move(pool);
    });
}

std::vector<const Finding*> Diagnosis::findings() const
{
    std::vector<const Finding*> sorted;
    for (const auto& [key, finding] : findings_)
        sorted.push_back(&finding);
    std::stable_sort(sorted.begin(), sorted.end(), [](const Finding* one, const Finding* other) {
        return std::pair(one->harm(), one->count) > std::pair(other->harm(), other->count);
    });
    return sorted;
}

std::vector<const Pool*> Diagnosis::pools() const
{
    std::vector<const Pool*> sorted;
    for (const auto& [key, pool] : pools_)
        sorted.push_back(&pool);
    const auto weight = [](const Pool* pool) {
        return std::pair(pool->exposure.state == PoolState::exposed, pool->upstream.counts.exchanges);
    };
    std::stable_sort(sorted.begin(), sorted.end(),
                     [&](const Pool* one, const Pool* other) { return weight(one) > weight(other); });
    if (other_)
        sorted.push_back(&*other_);
    return sorted;
}

std::uint64_t Diagnosis::requests() const
{
    std::uint64_t sum = 0;
    for (const Pool* pool : pools())
        sum += pool->upstream.counts.exchanges;
    return sum;
}

std::uint64_t Diagnosis::unclassified() const
{
    std::uint64_t sum = 0;
    for (const Pool* pool : pools())
        sum += pool->upstream.counts.unclassified;
    return sum;
}

Diagnosis::State Diagnosis::state(bool lost) const
{
    if (!findings_.empty())
        return State::findings;
    const std::vector<const Pool*> all = pools();
    const auto is = [](PoolState state) { return [state](const Pool* pool) { return pool->exposure.state == state; }; };
    if (std::any_of(all.begin(), all.end(), is(PoolState::exposed)))
        return State::exposed;
    if (lost || all.empty() || unclassified() > 0 || std::any_of(all.begin(), all.end(), is(PoolState::unknown)))
        return State::inconclusive;
    return State::healthy;
}

} // namespace finrace

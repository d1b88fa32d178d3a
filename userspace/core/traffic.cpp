// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "core/traffic.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "core/classify.h"

namespace finrace {

void Traffic::follow(const event& e)
{
    if (!is_client(e))
        return;
    const std::uint64_t id = e.connection.id;
    if (e.kind == EVENT_OPENED) {
        if (open_.size() >= most_open) {
            lost_track_ = true;
            return;
        }
        // A sample may have had it before.
        open_.try_emplace(id, Open{.where = UpstreamKey::of(e), .since_ns = 0, .exchange = 0, .seen_in = samples_})
            .first->second.since_ns = e.timestamp_ns;
        return;
    }
    if (e.kind != EVENT_CLOSED)
        return;
    const auto found = open_.find(id);
    const std::uint32_t counted = found != open_.end() ? found->second.exchange : 0;
    if (e.connection.exchange > counted)
        requests_[UpstreamKey::of(e)] += e.connection.exchange - counted;
    if (found != open_.end())
        open_.erase(found);
    if (ended_.size() >= most_open) { // nobody samples: the next one may count some that have ended
        ended_.clear();
        lost_track_ = true;
    }
    ended_.insert(id);
}

void Traffic::take(const std::vector<SampledConnection>& sample, std::uint64_t taken_ns, bool with_accounting)
{
    ++samples_;
    Interval interval{.from_ns = sampled_ns_, .to_ns = taken_ns, .requests = std::exchange(requests_, {})};
    flows_.clear();
    for (const SampledConnection& one : sample) {
        if (ended_.count(one.id) != 0)
            continue;
        Flow& flow = flows_[one.upstream];
        ++(one.busy ? flow.busy : flow.idle);
        if (!one.busy) {
            ++flow.open.resting;
            flow.open.longest_rest_ms = std::max(flow.open.longest_rest_ms, one.rested_ms);
        }
        if (one.id == 0)
            continue;
        if (open_.size() >= most_open && open_.count(one.id) == 0) {
            lost_track_ = true;
            continue;
        }
        Open& open =
            open_.try_emplace(one.id, Open{.where = one.upstream, .since_ns = began_ns_, .exchange = 0, .seen_in = 0})
                .first->second;
        if (one.exchange > open.exchange) {
            interval.requests[one.upstream] += one.exchange - open.exchange;
            open.exchange = one.exchange;
        }
        open.seen_in = samples_;
    }
    ended_.clear();
    // Of these the end was lost. One sample may have missed a connection that was just opening.
    if (with_accounting)
        std::erase_if(open_, [&](const auto& entry) { return entry.second.seen_in + 1 < samples_; });
    for (const auto& [id, open] : open_) {
        OpenConnections& there = flows_[open.where].open;
        ++there.count;
        there.longest_ns = std::max(there.longest_ns, taken_ns > open.since_ns ? taken_ns - open.since_ns : 0);
    }
    intervals_.push_back(std::move(interval));
    while (intervals_.size() > 1 && taken_ns - intervals_.front().from_ns > window_ns)
        intervals_.pop_front();
    sampled_ns_ = taken_ns;
    tells_requests_ = with_accounting;
}

Traffic::Flow Traffic::of(const UpstreamKey& key) const
{
    Flow flow;
    if (const auto found = flows_.find(key); found != flows_.end())
        flow = found->second;
    flow.open.rests_known = samples_ > 0;
    if (lost_track_)
        flow.open.longest_ns = std::numeric_limits<std::uint64_t>::max();
    if (!tells_requests_)
        return flow;
    std::uint64_t requests = 0;
    for (const Interval& interval : intervals_)
        if (const auto found = interval.requests.find(key); found != interval.requests.end())
            requests += found->second;
    const std::uint64_t ns = intervals_.back().to_ns - intervals_.front().from_ns;
    flow.requests_per_second = ns > 0 ? static_cast<double>(requests) * 1e9 / static_cast<double>(ns) : 0;
    return flow;
}

std::vector<UpstreamKey> Traffic::upstreams() const
{
    std::vector<UpstreamKey> keys;
    keys.reserve(flows_.size());
    for (const auto& [key, flow] : flows_)
        keys.push_back(key);
    return keys;
}

} // namespace finrace

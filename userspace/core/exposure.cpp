// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "core/exposure.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <tuple>
#include <utility>

#include "core/classify.h"
#include "core/software.h"
#include "core/units.h"
#include "core/upstream.h"

namespace finrace {

namespace {

constexpr double day_ns = 86'400e9;
/// From a FIN's coming until an event loop has read it, where nothing is short of CPU.
constexpr double loop_turn_ms = 1.0;
/// So many connections of one request each, and none of more, are a habit.
constexpr std::uint64_t habit = 5;
constexpr double enough_near = 5;
/// So many late requests, and none in the last eighth before the timer, are no chance: 7/8 to that power is 1 in 200.
constexpr double enough_late = 20;
/// What has been open for longer may be kept to be used again.
constexpr std::uint64_t longest_single_ms = 1000;
/// If both ends' timers were as long, each close would be a toss: to that power is 1 in 32.
constexpr std::uint32_t enough_first = 5;
/// Fewer say nothing of how often.
constexpr double enough_told = 5;
/// A limit that is set stands out by its connections: so many, and none that rested for longer.
constexpr std::uint64_t enough_kept = 3;
/// Timers are late by that, at most, on a host that is not short of CPU.
constexpr std::uint32_t late_ms = 100;
/// What has been told is no measurement: one end's limit is below the other's only if it is so by this much.
constexpr std::uint32_t told_apart_ms = 500;
/// Some look for what is idle once in a while (gunicorn's gthread: once a second), and half as late again.
constexpr std::uint32_t told_late_ms = 1000;

/// Whether no connection can rest until the upstream's timer, which has not shown, by what the ends have been told and
/// what was seen.
bool is_safe_as_told(const Upstream& upstream, const OpenConnections& open, std::optional<std::uint32_t> own_ms,
                     std::uint32_t timeout_ms)
{
    if (upstream.counts.idle_closes_by_peer > 0)
        return false;
    const std::uint32_t longest_ms = std::max(upstream.longest_reused_idle_ms, upstream.longest_kept_ms);
    if (own_ms && *own_ms != 0 && *own_ms + told_apart_ms <= timeout_ms)
        return longest_ms <= *own_ms + late_ms;
    // No limit is known, but this host let go of all, well before.
    return upstream.kept_idle >= enough_kept && longest_ms <= timeout_ms / 2 &&
           open.longest_ns < timeout_ms * ns_per_ms && open.resting == 0;
}

} // namespace

bool OpenConnections::may_be_single() const
{
    return rests_known ? longest_rest_ms < longest_single_ms : longest_ns < longest_single_ms * ns_per_ms;
}

std::optional<Exposure::Expected> Exposure::expected() const
{
    if (told_by < enough_told)
        return std::nullopt;
    const double error = 2 / std::sqrt(told_by);
    const auto around = [error](double value) {
        return Range{.low = value * std::max(0.0, 1 - error), .high = value * (1 + error)};
    };
    const Range all = around(share);
    return Expected{.races_a_day = around(races_a_day), .share = {.low = all.low, .high = std::min(1.0, all.high)}};
}

namespace {

/// The upstream's few idle closes that came when this host closes as well: its timer is no longer than this host's.
std::optional<IdleTimeout> tied_timeout(const Upstream& upstream, const IdleTimeout& own)
{
    std::optional<IdleTimeout> tied;
    for (const std::uint32_t idle_ms : upstream.idle_timeout.idle_times_ms()) {
        if (own.nearness(idle_ms, upstream.rtt_us / 1000) != Nearness::at)
            continue;
        if (!tied)
            tied = IdleTimeout{.ms = idle_ms, .lowest_ms = idle_ms, .highest_ms = idle_ms, .samples = 0};
        tied->lowest_ms = std::min(tied->lowest_ms, idle_ms);
        tied->highest_ms = std::max(tied->highest_ms, idle_ms);
        tied->ms = tied->lowest_ms + tied->spread_ms() / 2;
        ++tied->samples;
    }
    return tied;
}

/// Whether this host's own limit keeps its connections from the upstream's timer, which has not shown: that timer is
/// known to be longer, or else would have been first in some of so many closes.
bool is_first(const IdleTimeout& own, std::optional<std::uint32_t> told_ms)
{
    if (told_ms)
        return *told_ms == 0 || own.highest_ms + told_apart_ms <= *told_ms;
    return own.samples >= enough_first;
}

} // namespace

std::size_t RestHistogram::bucket_of(std::uint32_t rest_ms)
{
    if (rest_ms < steps)
        return rest_ms;
    const auto octave = static_cast<unsigned>(std::bit_width(rest_ms) - 1);
    const unsigned step = (rest_ms >> (octave - 3U)) & (steps - 1);
    return std::size_t{octave - 2U} * steps + step;
}

std::uint64_t RestHistogram::lower_end(std::size_t bucket)
{
    if (bucket < steps)
        return bucket;
    const std::size_t octave = bucket / steps + 2;
    return (std::uint64_t{1} << octave) + (std::uint64_t{bucket % steps} << (octave - 3));
}

void RestHistogram::add(std::uint32_t rest_ms)
{
    ++counts_[bucket_of(rest_ms)];
    ++count_;
}

double RestHistogram::between(std::uint32_t from_ms, std::uint32_t to_ms) const
{
    double sum = 0;
    if (from_ms >= to_ms)
        return sum;
    for (std::size_t bucket = bucket_of(from_ms); bucket <= bucket_of(to_ms); ++bucket) {
        const std::uint64_t low = lower_end(bucket);
        const std::uint64_t high = lower_end(bucket + 1);
        const std::uint64_t from = std::max<std::uint64_t>(low, from_ms);
        const std::uint64_t to = std::min<std::uint64_t>(high, to_ms);
        if (to > from)
            sum += counts_[bucket] * static_cast<double>(to - from) / static_cast<double>(high - low);
    }
    return sum;
}

std::vector<RestHistogram::Bucket> RestHistogram::filled() const
{
    std::vector<Bucket> result;
    for (std::size_t bucket = 0; bucket < buckets; ++bucket)
        if (counts_[bucket] > 0)
            result.push_back({.from_ms = lower_end(bucket), .to_ms = lower_end(bucket + 1), .count = counts_[bucket]});
    return result;
}

Exposure exposure_of(const Upstream& upstream, std::uint64_t observed_ns, const OpenConnections& open, const Ends& ends)
{
    Exposure exposure;
    const UpstreamCounts& counts = upstream.counts;
    const std::optional<IdleTimeout> own = upstream.own_idle_limit.timeout();
    std::optional<IdleTimeout> learned = upstream.idle_timeout.timeout();
    if (!learned && own)
        learned = exposure.tied_timeout = tied_timeout(upstream, *own);
    const auto open_for_less_than = [&](std::uint64_t ms) { return open.longest_ns < ms * ns_per_ms; };
    const std::optional<std::uint32_t> own_told_ms = ends.proxy.limit_ms();
    const bool used_again = upstream.rests.count() > 0;
    exposure.window_ms = upstream.rtt_us / 1e3 + loop_turn_ms;

    std::uint32_t timeout_ms = learned ? learned->ms : 0;
    if (!learned) {
        if (const auto told_ms = ends.upstream.limit_ms(); told_ms && *told_ms != 0)
            timeout_ms = *told_ms;
        if (own && upstream.longest_reused_idle_ms <= own->highest_ms &&
            upstream.longest_kept_ms <= own->highest_ms + own->above_ms + late_ms && // by whom, another limit would be
            (counts.idle_closes_by_peer == 0 || upstream.own_closes.are_enough()) &&
            open_for_less_than(2ULL * own->highest_ms) && is_first(*own, ends.upstream.limit_ms())) {
            exposure.state = PoolState::safe;
            return exposure;
        }
        if (!own && counts.closed >= habit && !used_again && upstream.kept_idle == 0 &&
            counts.idle_closes_by_peer == 0 && open.may_be_single()) {
            exposure.state = PoolState::not_reused;
            return exposure;
        }
        if (timeout_ms == 0)
            return exposure;
        exposure.told_timeout_ms = timeout_ms;
        if (is_safe_as_told(upstream, open, own_told_ms, timeout_ms)) {
            exposure.state = PoolState::safe;
            exposure.safe_as_told = true;
            return exposure;
        }
        // Whether this host would keep connections for so long must be known as well.
        const bool outlives = own_told_ms && (*own_told_ms == 0 || *own_told_ms + told_apart_ms > timeout_ms);
        // A timer that several connections outlived is another one: a file says less than it seems to. One may be a
        // WebSocket.
        const std::uint32_t latest_ms = timeout_ms + timeout_ms / 2 + told_late_ms;
        const bool refuted = upstream.longest_answered_idle_ms > latest_ms &&
                             upstream.rests.between(latest_ms, std::numeric_limits<std::uint32_t>::max()) >= habit;
        if (!outlives || refuted || (own && own->highest_ms < timeout_ms) || (!used_again && open.resting == 0))
            return exposure;
    }

    // Rests are taken as even over the half before the timer; where enough of them are nearer to it, over its eighth.
    const auto lost_of = [&](std::uint32_t range_ms) {
        const double reuses = upstream.rests.between(timeout_ms - range_ms, timeout_ms);
        return std::pair(reuses, reuses * std::min(1.0, exposure.window_ms / std::max(1U, range_ms)));
    };
    double lost = 0;
    std::tie(exposure.late_reuses, lost) = lost_of(timeout_ms / 2);
    exposure.told_by = exposure.late_reuses;
    const auto [near, nearly_lost] = lost_of(timeout_ms / 8);
    if (near >= enough_near && nearly_lost > lost) {
        lost = nearly_lost;
        exposure.told_by = near;
    }
    // What has been seen is no less likely than what was reckoned.
    if (const auto seen = static_cast<double>(races_of(counts)); seen > lost) {
        lost = seen;
        exposure.told_by = seen;
    }
    if (counts.exchanges > 0)
        exposure.share = std::min(1.0, lost / static_cast<double>(counts.exchanges));
    if (observed_ns > 0)
        exposure.races_a_day = lost * day_ns / static_cast<double>(observed_ns);
    if (!learned) {
        // Told, but nobody has come near it.
        const bool far_from_it = static_cast<double>(upstream.rests.count()) >= enough_late &&
                                 upstream.longest_reused_idle_ms < timeout_ms / 2 &&
                                 open.longest_rest_ms < timeout_ms / 2;
        exposure.state = far_from_it ? PoolState::kept_clear : PoolState::exposed;
        return exposure;
    }
    const bool limited_on_use = ends.proxy.software != nullptr && ends.proxy.software->looked_at_on_use;
    const auto own_ms = limited_on_use ? own_told_ms : std::nullopt;
    const std::uint32_t earliest_ms = learned->lowest_ms - learned->below_ms;
    const auto& since = upstream.own_closes;
    if (own_ms && *own_ms != 0 && *own_ms + told_apart_ms <= earliest_ms &&
        upstream.longest_reused_idle_ms <= *own_ms + late_ms) {
        exposure.state = PoolState::safe;
        exposure.safe_as_told = true;
    } else if (own && own->highest_ms + told_apart_ms <= earliest_ms && since.are_enough() &&
               since.longest_ms() <= own->highest_ms + late_ms && open_for_less_than(2ULL * own->highest_ms)) {
        exposure.state = PoolState::safe; // it has been told so since: what was lost by then is no sign any more
        exposure.late_reuses = exposure.share = exposure.races_a_day = exposure.told_by = 0;
    } else if (!used_again) { // whether it would be is not known
        exposure.state = PoolState::unknown;
    } else if (exposure.late_reuses >= enough_late && near < 0.5 &&
               upstream.longest_reused_idle_ms < learned->lowest_ms) {
        exposure.state = PoolState::kept_clear;
    } else {
        exposure.state = PoolState::exposed;
    }
    return exposure;
}

} // namespace finrace

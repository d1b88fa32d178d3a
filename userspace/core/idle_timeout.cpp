// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "core/idle_timeout.h"

#include <algorithm>
#include <array>
#include <span>

#include "core/reason.h"

namespace finrace {

namespace {

template <typename Sample>
std::uint32_t widest_hole(std::span<const Sample> sorted)
{
    std::uint32_t widest = 0;
    for (std::size_t i = 1; i < sorted.size(); ++i)
        widest = std::max(widest, sorted[i].idle_ms - sorted[i - 1].idle_ms);
    return widest;
}

} // namespace

Nearness IdleTimeout::nearness(std::uint64_t rested_ms, std::uint64_t rtt_ms) const
{
    const std::uint64_t off = rested_ms < lowest_ms    ? lowest_ms - rested_ms
                              : rested_ms > highest_ms ? rested_ms - highest_ms
                                                       : 0;
    // On a path that stands still the round-trip time says little: never so much that any rest would do.
    const std::uint64_t most = ms / 4;
    if (off <= std::min<std::uint64_t>(ms / 100 + 2 * rtt_ms + 20, most))
        return Nearness::at;
    return off <= std::min<std::uint64_t>(ms / 50 + 2 * rtt_ms + 50, most) ? Nearness::near : Nearness::far;
}

bool IdleTimeout::reaches(std::uint64_t rested_ms, std::uint64_t rtt_ms) const
{
    IdleTimeout all = *this;
    all.lowest_ms -= below_ms;
    all.highest_ms += above_ms;
    return all.nearness(rested_ms, rtt_ms) != Nearness::far;
}

/// How many instants some of the samples that are kept come from.
class IdleTimeoutLearner::InstantsOf {
public:
    void add(const Sample& sample) { count_ += samples_of_[slot(sample)]++ == 0 ? 1 : 0; }
    void remove(const Sample& sample) { count_ -= --samples_of_[slot(sample)] == 0 ? 1 : 0; }
    [[nodiscard]] std::size_t count() const { return count_; }

private:
    // Numbers go up by one, and each has a sample: those of `capacity` samples lie within as much.
    static std::size_t slot(const Sample& sample) { return sample.instant % capacity; }

    std::array<std::uint8_t, capacity> samples_of_{};
    std::size_t count_ = 0;
};

void IdleTimeoutLearner::outlived(std::uint32_t rested_ms, std::uint64_t rtt_ms, std::uint64_t ended_ns)
{
    const std::optional<IdleTimeout> known = learned();
    if (!known || rested_ms < known->highest_ms || known->reaches(rested_ms, rtt_ms))
        return;
    if (++outlived_ < enough_outlived || ended_ns < met_ns_ + outlived_for_ns)
        return;
    samples_.clear();
    next_ = 0;
    outlived_ = 0;
    known_.reset();
}

void IdleTimeoutLearner::learn(std::uint32_t idle_ms, std::uint64_t closed_ns)
{
    if (const std::optional<IdleTimeout> known = learned(); !known || known->reaches(idle_ms, 0)) {
        outlived_ = 0;
        met_ns_ = std::max(met_ns_, closed_ns);
    }
    const bool at_once = (closed_ns > instant_began_ns_ ? closed_ns - instant_began_ns_
                                                        : instant_began_ns_ - closed_ns) <= one_instant_ns;
    if (samples_.empty() || !at_once) {
        ++instant_;
        instant_began_ns_ = closed_ns;
        of_instant_ = 0;
    }
    if (of_instant_ == most_of_instant) {
        widen_instant(idle_ms);
        return;
    }
    ++of_instant_;
    const Sample sample{.idle_ms = idle_ms, .instant = instant_};
    if (samples_.size() < capacity) {
        samples_.push_back(sample);
    } else {
        samples_[next_] = sample;
        next_ = (next_ + 1) % capacity;
    }
    known_.reset();
}

void IdleTimeoutLearner::widen_instant(std::uint32_t idle_ms)
{
    // A server that looks for them once in a while closes those that have rested longest first.
    Sample* shortest = nullptr;
    Sample* longest = nullptr;
    for (Sample& sample : samples_) {
        if (sample.instant != instant_)
            continue;
        if (shortest == nullptr || sample.idle_ms < shortest->idle_ms)
            shortest = &sample;
        if (longest == nullptr || sample.idle_ms >= longest->idle_ms)
            longest = &sample;
    }
    if (idle_ms < shortest->idle_ms)
        shortest->idle_ms = idle_ms;
    else if (idle_ms > longest->idle_ms)
        longest->idle_ms = idle_ms;
    else
        return;
    known_.reset();
}

std::vector<std::uint32_t> IdleTimeoutLearner::idle_times_ms() const
{
    std::vector<std::uint32_t> times;
    times.reserve(samples_.size());
    for (const Sample& sample : samples_)
        times.push_back(sample.idle_ms);
    return times;
}

std::optional<IdleTimeout> IdleTimeoutLearner::timeout() const
{
    std::optional<IdleTimeout> best = learned();
    if (!best && told_ms_)
        best = IdleTimeout{.ms = *told_ms_, .lowest_ms = *told_ms_, .highest_ms = *told_ms_, .samples = 0};
    return best;
}

std::optional<IdleTimeout> IdleTimeoutLearner::learned() const
{
    if (known_)
        return *known_;
    std::optional<IdleTimeout> result;
    std::vector<Sample> sorted = samples_;
    std::sort(sorted.begin(), sorted.end(), [](const Sample& a, const Sample& b) { return a.idle_ms < b.idle_ms; });
    InstantsOf all;
    for (const Sample& sample : sorted)
        all.add(sample);
    // A timer checked once a second (gunicorn's gthread) makes a wide cluster, most others a narrow one: the
    // narrowest width that holds most of the samples is the timer's. What is wide needs more samples and fewer
    // exceptions, for a handful of unrelated idle times lies within a factor of one and a half as often as not; and no
    // hole in its midst, for that makes two timers.
    struct Width {
        std::uint32_t percent;
        std::size_t samples;
        std::size_t share_percent;
        bool may_have_hole;
    };
    for (const auto& [percent, samples, share_percent, may_have_hole] :
         {Width{2, 3, 60, true}, Width{10, 5, 70, true}, Width{50, 10, 80, false}}) {
        std::span<const Sample> cluster;
        std::size_t most = 0;
        InstantsOf within;
        for (std::size_t first = 0, last = 0; first < sorted.size(); ++first) {
            const std::uint32_t width = std::max(30U, sorted[first].idle_ms / 100 * percent);
            while (last < sorted.size() && sorted[last].idle_ms - sorted[first].idle_ms <= width)
                within.add(sorted[last++]);
            if (within.count() > most) {
                most = within.count();
                cluster = std::span(sorted).subspan(first, last - first);
            }
            within.remove(sorted[first]);
        }
        // What had rested much shorter or longer when it was closed at the same instant speaks against a timer.
        InstantsOf mixed;
        for (const Sample& sample : sorted)
            if (!cluster.empty() &&
                (sample.idle_ms < cluster.front().idle_ms || sample.idle_ms > cluster.back().idle_ms))
                mixed.add(sample);
        if (most >= samples && (all.count() - mixed.count()) * 100 >= all.count() * share_percent &&
            (may_have_hole || widest_hole(cluster) * 2 <= cluster.back().idle_ms - cluster.front().idle_ms)) {
            result = IdleTimeout{
                .ms = cluster[cluster.size() / 2].idle_ms,
                .lowest_ms = cluster.front().idle_ms,
                .highest_ms = cluster.back().idle_ms,
                .samples = static_cast<std::uint32_t>(most),
            };
            for (const auto& [idle_ms, instant] : sorted) {
                const std::uint32_t below_ms = result->lowest_ms - std::min(idle_ms, result->lowest_ms);
                const std::uint32_t above_ms = std::max(idle_ms, result->highest_ms) - result->highest_ms;
                if (below_ms <= result->ms / 4 && above_ms <= result->ms / 4) {
                    result->below_ms = std::max(result->below_ms, below_ms);
                    result->above_ms = std::max(result->above_ms, above_ms);
                }
            }
            break;
        }
    }
    known_ = result;
    return result;
}

} // namespace finrace
